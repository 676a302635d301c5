//! Weights by catalogue name or by path, with their digest.
//!
//! In: what the pipeline file calls `model`. Out: a [`ModelFile`]: the GGUF file or Hugging Face folder on this
//! machine and the sha256 of its weights, which is part of every fingerprint that the model has a hand in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::digest::{remembered_sha256, sha256_bytes};
use super::fetch::FetchProgress;
use super::spec::EntryKind;
use super::{Catalog, suggestion};
use crate::error::{Error, Result};

/// Files of a Hugging Face folder, apart from `*.safetensors`, that change what the model answers.
const TEXT_FILES: [&str; 7] = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Weights on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// A GGUF file or a Hugging Face folder.
    pub path: PathBuf,
    /// sha256 (hex): of the GGUF file, or over the digests of the folder's weights, config and tokenizer files.
    pub digest: String,
}

impl Catalog {
    /// The weights that `name_or_path` means, on this machine: an entry of the catalogue (fetched if need be), else a
    /// path relative to `root`.
    /// Errors: neither (exit 78, with the nearest name); a folder without weights (exit 65); no source (exit 75).
    pub async fn resolve_model(
        &self,
        name_or_path: &str,
        root: &Path,
        cache: &Path,
        progress: &dyn FetchProgress,
    ) -> Result<ModelFile> {
        if self.has(name_or_path) {
            let path = self.weights_path(name_or_path, cache)?;
            let digest = self.fetch(name_or_path, cache, progress).await?.digest;
            return Ok(ModelFile { path, digest });
        }
        let (path, cache) = (self.model_path(name_or_path, root)?, cache.to_owned());
        tokio::task::spawn_blocking(move || ModelFile::of(path, &cache)).await?
    }

    /// The same without fetching anything: for an entry of the catalogue, `path` is where the weights will be.
    pub fn model_digest(&self, name_or_path: &str, root: &Path, cache: &Path) -> Result<ModelFile> {
        match self.entries.get(name_or_path).and_then(|e| e.weights.as_ref()) {
            Some(weights) => {
                Ok(ModelFile { path: self.weights_path(name_or_path, cache)?, digest: weights.sha256.clone() })
            }
            None => ModelFile::of(self.model_path(name_or_path, root)?, cache),
        }
    }

    /// The path that `name_or_path` means where it is no entry of the catalogue.
    fn model_path(&self, name_or_path: &str, root: &Path) -> Result<PathBuf> {
        if self.has(name_or_path) {
            return Err(Error::spec(format!("`{name_or_path}` is a data set of the catalogue, not a model")));
        }
        let path = root.join(name_or_path);
        if path.exists() {
            return Ok(path);
        }
        let models: Vec<&str> = self.entries().filter(|(_, e)| e.kind == EntryKind::Model).map(|(n, _)| n).collect();
        Err(Error::spec(format!(
            "there is no model `{name_or_path}`: neither an entry of the catalogue nor the file or folder {}",
            path.display()
        ))
        .with_help(suggestion(name_or_path, &models)))
    }
}

impl ModelFile {
    /// A Hugging Face folder that a stage made, put into the cache folder under its digest.
    /// Errors: the files are no model (exit 65); they cannot be written (exit 75).
    pub fn of_files(files: &BTreeMap<String, Bytes>, digest: &str, cache: &Path) -> Result<ModelFile> {
        for name in ["config.json", "model.safetensors"] {
            if !files.contains_key(name) {
                return Err(Error::data(format!(
                    "the artifact that `model` names has no `{name}`: it is no language model"
                ))
                .with_help("name the output `model` of a `finetune` stage"));
            }
        }
        let path = cache.join("tuned").join(digest);
        if path.is_dir() {
            return Ok(ModelFile { path, digest: digest.to_owned() });
        }
        let fail = |e| Error::environment("cannot put a tuned model into the cache folder").because(e);
        let unfinished = cache.join("tuned").join(format!("{digest}.{}", std::process::id()));
        fs_err::create_dir_all(&unfinished).map_err(fail)?;
        for (name, bytes) in files {
            fs_err::write(unfinished.join(name), bytes).map_err(fail)?;
        }
        match fs_err::rename(&unfinished, &path) {
            // Another run was first.
            Err(_) if path.is_dir() => {
                let _ = fs_err::remove_dir_all(&unfinished);
            }
            result => result.map_err(fail)?,
        }
        Ok(ModelFile { path, digest: digest.to_owned() })
    }

    /// A file or folder with its digest, which is remembered in the cache folder.
    fn of(path: PathBuf, cache: &Path) -> Result<ModelFile> {
        let digest = match path.is_dir() {
            true => folder_digest(&path, cache)?,
            false => remembered_sha256(&path, cache)?,
        };
        Ok(ModelFile { path, digest })
    }
}

/// Digest of a Hugging Face folder: sha256 over `NAME DIGEST` lines of its files, sorted by name.
fn folder_digest(folder: &Path, cache: &Path) -> Result<String> {
    let mut names = Vec::new();
    let fail = |e| Error::data("cannot read a model's folder").because(e);
    for entry in fs_err::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if let Some(name) = entry.file_name().to_str()
            && entry.path().is_file()
            && (name.ends_with(".safetensors") || TEXT_FILES.contains(&name))
        {
            names.push(name.to_owned());
        }
    }
    if !names.iter().any(|n| n.ends_with(".safetensors")) {
        return Err(Error::data(format!("the model folder {} has no `.safetensors` file", folder.display()))
            .with_help("name a GGUF file, or a folder with config.json, model.safetensors and tokenizer.json"));
    }
    names.sort_unstable();
    let mut lines = String::new();
    for name in names {
        let digest = remembered_sha256(&folder.join(&name), cache)?;
        lines.push_str(&format!("{name} {digest}\n"));
    }
    Ok(sha256_bytes(lines.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::super::{Quiet, sha256_bytes};
    use super::*;
    use crate::error::Fault;

    fn catalog() -> Catalog {
        Catalog::parse(super::super::BUILT_IN, "the built-in catalogue").unwrap()
    }

    #[tokio::test]
    async fn a_file_and_a_folder_have_digests_that_follow_their_content() {
        let root = tempfile::tempdir().unwrap();
        let cache = root.path().join("cache");
        std::fs::write(root.path().join("w.gguf"), b"weights").unwrap();
        let file = catalog().resolve_model("w.gguf", root.path(), &cache, &Quiet).await.unwrap();
        assert_eq!(file.digest, sha256_bytes(b"weights"));
        assert_eq!(catalog().model_digest("w.gguf", root.path(), &cache).unwrap(), file);

        let folder = root.path().join("hf");
        std::fs::create_dir(&folder).unwrap();
        for name in ["model.safetensors", "config.json", "tokenizer.json", "README.md"] {
            std::fs::write(folder.join(name), name).unwrap();
        }
        let resolve = || async { catalog().resolve_model("hf", root.path(), &cache, &Quiet).await.unwrap().digest };
        let before = resolve().await;
        std::fs::write(folder.join("README.md"), "another text").unwrap();
        assert_eq!(resolve().await, before, "a file that the engine never reads changes nothing");
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            let last = resolve().await;
            std::fs::write(folder.join(name), format!("{name} changed")).unwrap();
            assert_ne!(resolve().await, last, "{name}");
        }
    }

    #[tokio::test]
    async fn what_is_no_model_is_named() {
        let root = tempfile::tempdir().unwrap();
        let cache = root.path().join("cache");
        let error = catalog().resolve_model("smollm2-135m", root.path(), &cache, &Quiet).await.unwrap_err();
        assert_eq!(error.fault, Fault::Spec);
        assert!(error.to_string().contains("did you mean `smollm2-135m-instruct`?"), "{error}");
        let planned = catalog().model_digest("smollm2-135m-instruct", root.path(), &cache).unwrap();
        assert!(planned.digest.starts_with("b179c952") && !planned.path.exists());
        let error = catalog().resolve_model("ml-100k", root.path(), &cache, &Quiet).await.unwrap_err();
        assert_eq!(error.fault, Fault::Spec);
        std::fs::create_dir(root.path().join("empty")).unwrap();
        let error = catalog().resolve_model("empty", root.path(), &cache, &Quiet).await.unwrap_err();
        assert_eq!(error.fault, Fault::Data);
    }
}
