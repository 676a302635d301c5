//! Where weights come from: a GGUF file or a Hugging Face folder, by one set of names.
//!
//! In: a path. Out: [`Weights`], which gives every tensor as f32 under its Hugging Face name and
//! in Hugging Face row order, checked against the model's shape.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::architectures::{TensorName, gguf_name, tensors};
use super::config::LlamaConfig;
use super::gguf::Gguf;
use super::quant::BlockType;
use super::safetensors::Checkpoint;
use super::tune::LoraFile;
use crate::error::{Error, Result};

/// The file or folder behind [`Weights`].
enum Store {
    Gguf(Gguf),
    Folder(Checkpoint),
}

/// The weights of one model.
pub struct Weights {
    path: PathBuf,
    store: Store,
    config: LlamaConfig,
    adapter: Option<LoraFile>,
}

/// Whether a path is a model folder (else a GGUF file).
pub fn is_folder(path: &Path) -> bool {
    path.is_dir()
}

impl Weights {
    /// Opens a GGUF file or a model folder and checks that every tensor is there with the right
    /// sizes, and none that the decoder would leave out.
    ///
    /// # Errors
    /// Exit 65, with the name of the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        if !is_folder(path) {
            return Self::from_gguf(Gguf::open(path)?);
        }
        let config = LlamaConfig::from_hf(&path.join("config.json"))?;
        let store = Store::Folder(Checkpoint::open(path)?);
        let weights = Weights { path: path.to_owned(), store, config, adapter: None };
        weights.check()?;
        Ok(weights)
    }

    /// Takes an opened GGUF file, as [`Weights::open`] does.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let config = LlamaConfig::from_gguf(&gguf)?;
        let weights = Weights { path: gguf.path().to_owned(), store: Store::Gguf(gguf), config, adapter: None };
        weights.check()?;
        Ok(weights)
    }

    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The shape of the model, for tests that spoil it.
    #[cfg(test)]
    pub(crate) fn config_mut(&mut self) -> &mut LlamaConfig {
        &mut self.config
    }

    /// The same model with an adapter added to its matrices.
    ///
    /// # Errors
    /// The adapter is of another model (exit 65).
    pub fn with_adapter(mut self, adapter: Option<LoraFile>) -> Result<Self> {
        if let Some(adapter) = &adapter {
            adapter.check(&self.config)?;
        }
        self.adapter = adapter;
        Ok(self)
    }

    /// The values of a tensor by its Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`:
    /// `[rows, columns]` row by row, or `[columns]`.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let mut values = self.own_values(name)?;
        if let Some(adapter) = &self.adapter {
            adapter.add_to(name, &mut values);
        }
        Ok(values)
    }

    /// Those of the file, without the adapter.
    fn own_values(&self, name: &str) -> Result<Vec<f32>> {
        match &self.store {
            Store::Folder(checkpoint) => checkpoint.values(name),
            Store::Gguf(gguf) => {
                let values = gguf.dequantize(&gguf_name(name))?;
                Ok(match self.in_pairs(name) {
                    true => unpermute(&values, self.config.head_dim, self.config.hidden),
                    false => values,
                })
            }
        }
    }

    /// A tensor as it is stored, without making it f32: its type and its bytes, rows in Hugging Face order.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor, or its type cannot be read. Values are not looked at: a damaged file may
    /// hold infinities, which [`Weights::values`] refuses.
    ///
    /// A matrix that an adapter adds to is f32, whatever the file holds.
    pub fn blocks(&self, name: &str) -> Result<Blocks<'_>> {
        if let Some([a, b]) = self.adapter.as_ref().and_then(|adapter| adapter.of(name)) {
            let bytes = self.values(name)?.iter().flat_map(|x| x.to_le_bytes()).collect();
            let (rows, columns) = (b.shape[0], a.shape[1]);
            return Ok(Blocks { block_type: BlockType::F32, rows, columns, bytes: Cow::Owned(bytes) });
        }
        let (block_type, dims, bytes) = match &self.store {
            Store::Folder(checkpoint) => {
                let (block_type, shape, bytes) = checkpoint.bytes(name)?;
                (block_type, shape.to_vec(), bytes)
            }
            Store::Gguf(gguf) => {
                let (info, bytes) = gguf.bytes(&gguf_name(name))?;
                (info.block_type, info.dims.iter().rev().copied().collect(), bytes)
            }
        };
        let columns = dims.last().copied().unwrap_or(1);
        let rows = dims.iter().rev().skip(1).product::<usize>();
        let bytes = match self.in_pairs(name) {
            true => Cow::Owned(unpermute(bytes, self.config.head_dim, bytes.len() / rows.max(1))),
            false => Cow::Borrowed(bytes),
        };
        Ok(Blocks { block_type, rows, columns, bytes })
    }

    /// Whether the file holds the rows of this tensor as pairs, where Hugging Face has halves of a head.
    fn in_pairs(&self, name: &str) -> bool {
        matches!(self.store, Store::Gguf(_))
            && self.config.architecture.pairs_in_gguf
            && matches!(name.rsplit('.').nth(1), Some("q_proj" | "k_proj"))
    }

    /// Sizes of a tensor, slowest first.
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.store {
            Store::Folder(checkpoint) => checkpoint.shape(name).map(<[usize]>::to_vec),
            Store::Gguf(gguf) => gguf.tensor(&gguf_name(name)).map(|t| t.dims.iter().rev().copied().collect()),
        }
    }

    fn check(&self) -> Result<()> {
        let fault = |what: String| Error::data(format!("{}: {what}", self.path.display()));
        let mut expected = Vec::new();
        for tensor in tensors(&self.config) {
            let TensorName { hf: name, shape, .. } = &tensor;
            match self.shape(name) {
                Some(found) if found == *shape => expected.push(tensor),
                Some(found) => {
                    return Err(fault(format!(
                        "the tensor `{name}` has the sizes {found:?}, but the model's configuration makes it {shape:?}"
                    ))
                    .with_help("the weights and the configuration are of different models"));
                }
                None => return Err(fault(format!("the tensor `{name}` is missing"))),
            }
        }
        // Buffers follow from the configuration: old checkpoints store them, GGUF has the frequencies' factors.
        let extra = match &self.store {
            Store::Folder(c) => {
                let known: HashSet<&str> = expected.iter().map(|t| t.hf.as_str()).collect();
                let buffer = |n: &str| n.ends_with("rotary_emb.inv_freq") || n == HEAD;
                c.names().into_iter().find(|n| !known.contains(n) && !buffer(n)).map(str::to_owned)
            }
            Store::Gguf(g) => {
                let known: HashSet<&str> = expected.iter().map(|t| t.gguf.as_str()).collect();
                let buffer = |n: &str| n == "rope_freqs.weight";
                g.tensor_names().into_iter().find(|n| !known.contains(n) && !buffer(n)).map(str::to_owned)
            }
        };
        match extra {
            Some(name) => {
                let family = self.config.architecture.name;
                Err(fault(format!("the tensor `{name}` has no place in the architecture `{family}`"))
                    .with_help("adapters are merged first; experts and further biases are not supported"))
            }
            None => Ok(()),
        }
    }
}

/// A tensor as it is stored.
#[derive(Clone, Debug)]
pub struct Blocks<'a> {
    /// How its values are stored.
    pub block_type: BlockType,
    /// 1 for a vector.
    pub rows: usize,
    /// Values of a row, a whole number of blocks.
    pub columns: usize,
    /// Row by row, blocks one after the other, without gaps; not aligned.
    pub bytes: Cow<'a, [u8]>,
}

impl Blocks<'_> {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        let (values, bytes) = self.block_type.block();
        self.columns / values * bytes
    }
}

/// The embedding, `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm before the head, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The head where it is not tied, `[vocab, hidden]`.
pub const HEAD: &str = "lm_head.weight";

/// Name of a layer's tensor, e.g. (0, `mlp.up_proj`).
pub fn layer_tensor(layer: usize, leaf: &str) -> String {
    format!("model.layers.{layer}.{leaf}.weight")
}

/// Name of a layer's bias, e.g. (0, `self_attn.q_proj`).
pub fn layer_bias(layer: usize, leaf: &str) -> String {
    format!("model.layers.{layer}.{leaf}.bias")
}

/// GGUF row order to Hugging Face row order. GGUF rotates neighbouring pairs, Hugging Face
/// halves: within a head, GGUF row `2 i + j` is Hugging Face row `j head_dim / 2 + i`.
/// `width` is that of a row, in `T`s.
fn unpermute<T: Copy>(rows: &[T], head_dim: usize, width: usize) -> Vec<T> {
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * width) {
        for row in 0..head_dim {
            let (j, i) = (row / half, row % half);
            let from = (2 * i + j) * width;
            out.extend_from_slice(&head[from..from + width]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_takes_pairs_apart() {
        // Two heads of four rows, one column: pairs (a0 b0 a1 b1) become halves (a0 a1 b0 b1).
        let rows = [0.0, 10.0, 1.0, 11.0, 4.0, 14.0, 5.0, 15.0];
        assert_eq!(unpermute(&rows, 4, 1), [0.0, 1.0, 10.0, 11.0, 4.0, 5.0, 14.0, 15.0]);
    }
}
