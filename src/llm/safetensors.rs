//! Hugging Face checkpoints: one `model.safetensors`, or shards with an index.
//!
//! In: a model folder. Out: [`Checkpoint`], which gives tensors as f32 by name. Headers are
//! checked by the `safetensors` crate (lengths, offsets, overlaps) when a file is opened.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::quant::BlockType;
use crate::error::{Error, Result};

/// The files of a checkpoint, mapped.
pub struct Checkpoint {
    files: Vec<(PathBuf, Mmap)>,
    /// Tensor name -> index of its file.
    home: HashMap<String, usize>,
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
    /// Exit 65 where a file is missing, cut off or malformed, or a tensor of the index is in no shard.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index_path = folder.join("model.safetensors.index.json");
        if !single.is_file() && index_path.is_file() {
            return Self::open_shards(folder, &index_path);
        }
        let map = map(&single)?;
        let home = read(&single, &map)?.names().into_iter().map(|n| (n.to_owned(), 0)).collect();
        Ok(Checkpoint { files: vec![(single, map)], home })
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
        let mut home = HashMap::new();
        for name in names {
            // A shard's name is a file beside the index, never a way out of the folder.
            if Path::new(name).components().count() != 1 || name.starts_with("..") {
                return Err(fault(format!("the shard name `{name}` is not a plain file name")));
            }
            let path = folder.join(name);
            let map = map(&path)?;
            for tensor in read(&path, &map)?.names() {
                home.insert(tensor.to_owned(), files.len());
            }
            files.push((path, map));
        }
        if let Some((tensor, shard)) = index.weight_map.iter().find(|(t, _)| !home.contains_key(*t)) {
            return Err(fault(format!("the tensor `{tensor}` is not in its shard `{shard}`")));
        }
        Ok(Checkpoint { files, home })
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.home.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Sizes of a tensor, slowest first (`[rows, columns]`); `None` where there is none.
    pub fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        let Some(file) = self.home.get(name) else { return Ok(None) };
        let (path, map) = &self.files[*file];
        let tensors = read(path, map)?;
        Ok(tensors.tensor(name).ok().map(|t| t.shape().to_vec()))
    }

    /// Type, sizes (slowest first) and bytes of a tensor.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor, or its type is not f32, f16 or bf16.
    pub fn bytes(&self, name: &str) -> Result<(BlockType, Vec<usize>, &[u8])> {
        let missing = || Error::data(format!("{}: there is no tensor `{name}`", self.files[0].0.display()));
        let (path, map) = &self.files[*self.home.get(name).ok_or_else(missing)?];
        let tensors = read(path, map)?;
        let view = tensors.tensor(name).map_err(|_| missing())?;
        let block_type = match view.dtype() {
            Dtype::F32 => BlockType::F32,
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::BF16,
            other => {
                let what = format!("the tensor `{name}` has the type {other:?}, which is not supported");
                return Err(Error::data(format!("{}: {what}", path.display()))
                    .with_help("save the model as float32, float16 or bfloat16"));
            }
        };
        Ok((block_type, view.shape().to_vec(), view.data()))
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
                let path = &self.files[self.home[name]].0;
                let what = format!("value {i} of the tensor `{name}` is {}", values[i]);
                Err(Error::data(format!("{}: {what}", path.display())).with_help("the file is damaged; fetch it again"))
            }
            None => Ok(values),
        }
    }
}

/// Maps a file.
fn map(path: &Path) -> Result<Mmap> {
    let file = fs_err::File::open(path).map_err(|e| Error::data("cannot open the model's weights").because(e))?;
    // SAFETY: the map is read only; see `gguf.rs` for what happens when the file shrinks meanwhile.
    unsafe { Mmap::map(file.file()) }
        .map_err(|e| Error::data(format!("cannot map the model file {}", path.display())).because(e))
}

/// Reads and checks a file's header.
fn read<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|e| {
        let what = format!("{}: not a whole safetensors file ({} bytes): {e}", path.display(), map.len());
        Error::data(what).with_help("the file is cut off or damaged; fetch it again")
    })
}
