//! Hugging Face checkpoints: one `model.safetensors`, or shards with an index.
//!
//! In: a model folder. Out: [`Checkpoint`], which gives tensors as f32 by name. Headers are
//! checked by the `safetensors` crate (lengths, offsets, overlaps) when a file is opened.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::bytes::FileBytes;
use super::quant::BlockType;
use crate::error::{Error, Result};

/// The files of a checkpoint, mapped.
pub struct Checkpoint {
    files: Vec<(PathBuf, FileBytes)>,
    tensors: HashMap<String, Entry>,
}

/// One tensor.
struct Entry {
    /// Index of its file.
    file: usize,
    dtype: Dtype,
    /// Sizes, slowest first.
    shape: Vec<usize>,
    /// Its bytes in the file.
    bytes: Range<usize>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens the checkpoint of a folder.
    ///
    /// # Errors
    /// Exit 65 where a file is missing, cut off or malformed, or a tensor is not in the shard that the index names.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index_path = folder.join("model.safetensors.index.json");
        if !single.is_file() && index_path.is_file() {
            return Self::open_shards(folder, &index_path);
        }
        Self::from_bytes(FileBytes::map(&single)?, &single)
    }

    /// Reads and checks the bytes of a single file; `path` is for messages.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(bytes: FileBytes, path: &Path) -> Result<Self> {
        let tensors = entries(path, &bytes, 0)?.collect();
        Ok(Checkpoint { files: vec![(path.to_owned(), bytes)], tensors })
    }

    fn open_shards(folder: &Path, index_path: &Path) -> Result<Self> {
        let fault = |what: String| Error::data(format!("{}: {what}", index_path.display()));
        let text =
            fs_err::read(index_path).map_err(|e| Error::data("cannot read the checkpoint's index").because(e))?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| fault(format!("not an index of shards: {e}")))?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        let mut files = Vec::new();
        let mut tensors: HashMap<String, Entry> = HashMap::new();
        // Tensors that are somewhere else than the index says.
        let mut elsewhere: HashMap<String, &String> = HashMap::new();
        for name in names {
            // A shard's name is a file beside the index, never a way out of the folder.
            if Path::new(name).components().count() != 1 || name.starts_with("..") {
                return Err(fault(format!("the shard name `{name}` is not a plain file name")));
            }
            let path = folder.join(name);
            if !path.is_file() {
                let of = index.weight_map.values().filter(|shard| *shard == name).count();
                return Err(fault(format!("the shard `{name}` with {of} tensors is missing"))
                    .with_help("fetch all files of the model into the folder"));
            }
            let bytes = FileBytes::map(&path)?;
            for (tensor, entry) in entries(&path, &bytes, files.len())? {
                if index.weight_map.get(&tensor) == Some(name) {
                    tensors.insert(tensor, entry);
                } else {
                    elsewhere.insert(tensor, name);
                }
            }
            files.push((path, bytes));
        }
        let mut listed: Vec<_> = index.weight_map.iter().collect();
        listed.sort_unstable();
        if let Some((tensor, shard)) = listed.into_iter().find(|(t, _)| !tensors.contains_key(*t)) {
            let where_else = match elsewhere.get(tensor) {
                Some(other) => format!("it is in `{other}`"),
                None => "it is in none".to_owned(),
            };
            return Err(fault(format!("the tensor `{tensor}` is not in its shard `{shard}`; {where_else}"))
                .with_help("the index and the shards are of different versions; fetch them again together"));
        }
        Ok(Checkpoint { files, tensors })
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Sizes of a tensor, slowest first (`[rows, columns]`); `None` where there is none.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Type, sizes (slowest first) and bytes of a tensor.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor, or its type is not f32, f16 or bf16.
    pub fn bytes(&self, name: &str) -> Result<(BlockType, &[usize], &[u8])> {
        let missing = || Error::data(format!("{}: there is no tensor `{name}`", self.files[0].0.display()));
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        let (path, bytes) = &self.files[entry.file];
        let block_type = match entry.dtype {
            Dtype::F32 => BlockType::F32,
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::BF16,
            other => {
                let what = format!("the tensor `{name}` has the type {other:?}, which is not supported");
                return Err(Error::data(format!("{}: {what}", path.display()))
                    .with_help("save the model as float32, float16 or bfloat16"));
            }
        };
        Ok((block_type, &entry.shape, &bytes[entry.bytes.clone()]))
    }

    /// The values of a tensor as f32, rows one after the other.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor, its type is not f32, f16 or bf16, or a value is not finite.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let (block_type, shape, bytes) = self.bytes(name)?;
        let mut values = vec![0f32; shape.iter().product()];
        block_type.dequantize(bytes, &mut values);
        match super::quant::first_not_finite(&values) {
            Some(i) => {
                let path = &self.files[self.tensors[name].file].0;
                let what = format!("value {i} of the tensor `{name}` is {}", values[i]);
                Err(Error::data(format!("{}: {what}", path.display())).with_help("the file is damaged; fetch it again"))
            }
            None => Ok(values),
        }
    }
}

/// Reads and checks a file's header: its tensors.
fn entries<'a>(path: &Path, bytes: &'a [u8], file: usize) -> Result<impl Iterator<Item = (String, Entry)> + use<'a>> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
        let what = format!("{}: not a whole safetensors file ({} bytes): {e}", path.display(), bytes.len());
        Error::data(what).with_help("the file is cut off or damaged; fetch it again")
    })?;
    let start = bytes.as_ptr() as usize;
    Ok(tensors.tensors().into_iter().map(move |(name, view)| {
        // A view is a part of `bytes`; what is kept is where it begins in it.
        let at = view.data().as_ptr() as usize - start;
        let range = at..at + view.data().len();
        (name, Entry { file, dtype: view.dtype(), shape: view.shape().to_vec(), bytes: range })
    }))
}
