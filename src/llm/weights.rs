//! Where weights come from: a GGUF file or a Hugging Face folder, by one set of names.
//!
//! In: a path. Out: [`Weights`], which gives every tensor as f32 under its Hugging Face name and
//! in Hugging Face row order, checked against the model's shape.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::config::LlamaConfig;
use super::gguf::Gguf;
use super::quant::BlockType;
use super::safetensors::Checkpoint;
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
}

/// A tensor as it lies in its file: whole blocks, rows in Hugging Face order.
pub struct Blocks<'a> {
    /// How its values are stored.
    pub kind: BlockType,
    /// `[rows][columns / values of a block]` blocks.
    pub bytes: Cow<'a, [u8]>,
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
        let (store, config) = if is_folder(path) {
            let config = LlamaConfig::from_hf(&path.join("config.json"))?;
            (Store::Folder(Checkpoint::open(path)?), config)
        } else {
            let gguf = Gguf::open(path)?;
            let config = LlamaConfig::from_gguf(&gguf)?;
            (Store::Gguf(gguf), config)
        };
        let weights = Weights { path: path.to_owned(), store, config };
        weights.check()?;
        Ok(weights)
    }

    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The values of a tensor by its Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`:
    /// `[rows, columns]` row by row, or `[columns]`.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        match &self.store {
            Store::Folder(checkpoint) => checkpoint.values(name),
            Store::Gguf(gguf) => {
                let values = gguf.dequantize(&gguf_name(name))?;
                let c = &self.config;
                Ok(match name.rsplit('.').nth(1) {
                    Some("q_proj") => unpermute(&values, c.heads, c.head_dim, c.hidden),
                    Some("k_proj") => unpermute(&values, c.kv_heads, c.head_dim, c.hidden),
                    _ => values,
                })
            }
        }
    }

    /// The bytes of a tensor by its Hugging Face name; `None` where the file does not store it in ggml's blocks.
    ///
    /// # Errors
    /// Exit 65 where there is no such tensor.
    pub fn blocks(&self, name: &str) -> Result<Option<Blocks<'_>>> {
        let Store::Gguf(gguf) = &self.store else { return Ok(None) };
        let (kind, bytes) = gguf.blocks(&gguf_name(name))?;
        let c = &self.config;
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => c.heads,
            Some("k_proj") => c.kv_heads,
            _ => return Ok(Some(Blocks { kind, bytes: Cow::Borrowed(bytes) })),
        };
        let row = bytes.len() / (heads * c.head_dim);
        Ok(Some(Blocks { kind, bytes: Cow::Owned(unpermute(bytes, heads, c.head_dim, row)) }))
    }

    /// Sizes of a tensor, slowest first.
    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        match &self.store {
            Store::Folder(checkpoint) => checkpoint.shape(name),
            Store::Gguf(gguf) => Ok(gguf.tensor(&gguf_name(name)).map(|t| t.dims.iter().rev().copied().collect())),
        }
    }

    fn check(&self) -> Result<()> {
        let fault = |what: String| Error::data(format!("{}: {what}", self.path.display()));
        let expected = self.expected();
        for (name, shape) in &expected {
            match self.shape(name)? {
                Some(found) if found == *shape => {}
                Some(found) => {
                    return Err(fault(format!(
                        "the tensor `{name}` has the sizes {found:?}, but the model's configuration makes it {shape:?}"
                    ))
                    .with_help("the weights and the configuration are of different models"));
                }
                None => return Err(fault(format!("the tensor `{name}` is missing"))),
            }
        }
        let known = |name: &str| expected.iter().any(|(n, _)| n == name);
        let extra = match &self.store {
            // Buffers, not weights: old checkpoints store them, and they follow from the configuration.
            Store::Folder(c) => c
                .names()
                .into_iter()
                .find(|n| !known(n) && !n.ends_with("rotary_emb.inv_freq") && *n != "lm_head.weight")
                .map(str::to_owned),
            Store::Gguf(g) => {
                let names: Vec<String> = expected.iter().map(|(n, _)| gguf_name(n)).collect();
                g.tensor_names().into_iter().find(|n| !names.iter().any(|m| m == n)).map(str::to_owned)
            }
        };
        match extra {
            Some(name) => Err(fault(format!("the tensor `{name}` has no place in this architecture"))
                .with_help("plain Llama models are supported: no biases, no scaled rotary embeddings, no experts")),
            None => Ok(()),
        }
    }

    /// Every tensor that the decoder reads, with its sizes.
    fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let c = &self.config;
        let mut out =
            vec![(EMBEDDING.to_owned(), vec![c.vocab_size, c.hidden]), (FINAL_NORM.to_owned(), vec![c.hidden])];
        if !c.tied {
            out.push((HEAD.to_owned(), vec![c.vocab_size, c.hidden]));
        }
        for layer in 0..c.layers {
            let shapes = [
                ("input_layernorm", vec![c.hidden]),
                ("self_attn.q_proj", vec![c.q_width(), c.hidden]),
                ("self_attn.k_proj", vec![c.kv_width(), c.hidden]),
                ("self_attn.v_proj", vec![c.kv_width(), c.hidden]),
                ("self_attn.o_proj", vec![c.hidden, c.q_width()]),
                ("post_attention_layernorm", vec![c.hidden]),
                ("mlp.gate_proj", vec![c.intermediate, c.hidden]),
                ("mlp.up_proj", vec![c.intermediate, c.hidden]),
                ("mlp.down_proj", vec![c.hidden, c.intermediate]),
            ];
            out.extend(shapes.into_iter().map(|(leaf, shape)| (layer_tensor(layer, leaf), shape)));
        }
        out
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

/// GGUF's name of a Hugging Face tensor (llama.cpp, `gguf-py/gguf/tensor_mapping.py`).
fn gguf_name(name: &str) -> String {
    let leaf = match name {
        EMBEDDING => return "token_embd.weight".to_owned(),
        FINAL_NORM => return "output_norm.weight".to_owned(),
        HEAD => return "output.weight".to_owned(),
        other => other.trim_start_matches("model.layers.").trim_end_matches(".weight"),
    };
    let (layer, leaf) = leaf.split_once('.').unwrap_or((leaf, ""));
    let leaf = match leaf {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{layer}.{leaf}.weight")
}

/// GGUF row order to Hugging Face row order. GGUF rotates neighbouring pairs, Hugging Face
/// halves: within a head, GGUF row `2 i + j` is Hugging Face row `j head_dim / 2 + i`.
fn unpermute<T: Copy>(values: &[T], heads: usize, head_dim: usize, columns: usize) -> Vec<T> {
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for row in 0..head_dim {
            let (j, i) = (row / half, row % half);
            let from = (head * head_dim + 2 * i + j) * columns;
            out.extend_from_slice(&values[from..from + columns]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_worlds() {
        assert_eq!(gguf_name("model.layers.12.self_attn.q_proj.weight"), "blk.12.attn_q.weight");
        assert_eq!(gguf_name("model.layers.0.input_layernorm.weight"), "blk.0.attn_norm.weight");
        assert_eq!(gguf_name(EMBEDDING), "token_embd.weight");
    }

    #[test]
    fn unpermute_takes_pairs_apart() {
        // Two heads of four rows, one column: pairs (a0 b0 a1 b1) become halves (a0 a1 b0 b1).
        let rows = [0.0, 10.0, 1.0, 11.0, 4.0, 14.0, 5.0, 15.0];
        assert_eq!(unpermute(&rows, 2, 4, 1), [0.0, 1.0, 10.0, 11.0, 4.0, 5.0, 14.0, 15.0]);
    }
}
