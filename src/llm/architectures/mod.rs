//! The decoder families that are computed here, one file each.
//!
//! In: a name (`model_type` of a `config.json`, `general.architecture` of a GGUF file). Out: what that family differs
//! in: defaults of its configuration, keys that it refuses, tensors that it has beside those of all families, the
//! order of its rows in GGUF files.
//!
//! A family is one file and one line of [`ALL`]. What both decoders must compute for it is said by flags of
//! [`super::config::LlamaConfig`], so that they ask for a bias, not for a name.

pub mod llama;
pub mod qwen2;
pub mod qwen3;

use super::config::{LlamaConfig, OnDisk};
use super::weights::{EMBEDDING, FINAL_NORM, HEAD};

/// One family of decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and what this one adds.
pub struct Architecture {
    /// `model_type` in `config.json` and `general.architecture` in GGUF; also the prefix of the GGUF keys.
    pub name: &'static str,
    /// The class in `architectures` of a `config.json` without `model_type`.
    pub class: &'static str,
    /// Whether GGUF files hold the rows of queries and keys as neighbouring pairs, not as halves of a head.
    pub pairs_in_gguf: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether every head of queries and keys is normalised before its rotation.
    pub qk_norm: bool,
    /// Width of a head where the configuration has none: `None` for hidden size by heads.
    pub head_dim: Option<usize>,
    /// Context length where the configuration has none.
    pub context: usize,
    /// Refuses, in words, what this family's configuration may ask for and the decoders do not do.
    pub refuse: fn(&OnDisk) -> Result<(), String>,
}

/// All families, in the order in which messages name them.
pub const ALL: &[&Architecture] = &[&llama::ARCHITECTURE, &qwen2::ARCHITECTURE, &qwen3::ARCHITECTURE];

impl Architecture {
    /// The family with a name.
    pub fn find(name: &str) -> Option<&'static Architecture> {
        ALL.iter().find(|a| a.name == name).copied()
    }

    /// The family with a class of transformers.
    pub fn of_class(class: &str) -> Option<&'static Architecture> {
        ALL.iter().find(|a| a.class == class).copied()
    }

    /// The names of all, for messages.
    pub fn names() -> String {
        ALL.iter().map(|a| format!("`{}`", a.name)).collect::<Vec<_>>().join(", ")
    }
}

impl PartialEq for Architecture {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl std::fmt::Debug for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// A tensor by both of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorName {
    /// In a Hugging Face folder, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub hf: String,
    /// In a GGUF file, e.g. `blk.0.attn_q.weight`.
    pub gguf: String,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
}

/// Which of the sizes of a configuration a tensor of a layer has.
type Shape = fn(&LlamaConfig) -> Vec<usize>;

/// Names of a layer's tensors in both worlds (llama.cpp, `gguf-py/gguf/tensor_mapping.py`), which families have them, sizes.
const LAYER: &[(&str, &str, fn(&LlamaConfig) -> bool, Shape)] = &[
    ("input_layernorm.weight", "attn_norm.weight", |_| true, |c| vec![c.hidden]),
    ("self_attn.q_proj.weight", "attn_q.weight", |_| true, |c| vec![c.q_width(), c.hidden]),
    ("self_attn.k_proj.weight", "attn_k.weight", |_| true, |c| vec![c.kv_width(), c.hidden]),
    ("self_attn.v_proj.weight", "attn_v.weight", |_| true, |c| vec![c.kv_width(), c.hidden]),
    ("self_attn.q_proj.bias", "attn_q.bias", |c| c.qkv_bias, |c| vec![c.q_width()]),
    ("self_attn.k_proj.bias", "attn_k.bias", |c| c.qkv_bias, |c| vec![c.kv_width()]),
    ("self_attn.v_proj.bias", "attn_v.bias", |c| c.qkv_bias, |c| vec![c.kv_width()]),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", |c| c.qk_norm, |c| vec![c.head_dim]),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", |c| c.qk_norm, |c| vec![c.head_dim]),
    ("self_attn.o_proj.weight", "attn_output.weight", |_| true, |c| vec![c.hidden, c.q_width()]),
    ("post_attention_layernorm.weight", "ffn_norm.weight", |_| true, |c| vec![c.hidden]),
    ("mlp.gate_proj.weight", "ffn_gate.weight", |_| true, |c| vec![c.intermediate, c.hidden]),
    ("mlp.up_proj.weight", "ffn_up.weight", |_| true, |c| vec![c.intermediate, c.hidden]),
    ("mlp.down_proj.weight", "ffn_down.weight", |_| true, |c| vec![c.hidden, c.intermediate]),
];

/// Every tensor that the decoder of a configuration reads.
pub fn tensors(c: &LlamaConfig) -> Vec<TensorName> {
    let whole = |hf: &str, shape| TensorName { hf: hf.to_owned(), gguf: gguf_name(hf), shape };
    let mut out = vec![whole(EMBEDDING, vec![c.vocab_size, c.hidden]), whole(FINAL_NORM, vec![c.hidden])];
    if !c.tied {
        out.push(whole(HEAD, vec![c.vocab_size, c.hidden]));
    }
    for layer in 0..c.layers {
        out.extend(LAYER.iter().filter(|(_, _, has, _)| has(c)).map(|(hf, gguf, _, shape)| TensorName {
            hf: format!("model.layers.{layer}.{hf}"),
            gguf: format!("blk.{layer}.{gguf}"),
            shape: shape(c),
        }));
    }
    out
}

/// GGUF's name of a Hugging Face tensor; the name itself where GGUF has none.
pub fn gguf_name(name: &str) -> String {
    match name {
        EMBEDDING => return "token_embd.weight".to_owned(),
        FINAL_NORM => return "output_norm.weight".to_owned(),
        HEAD => return "output.weight".to_owned(),
        _ => {}
    }
    let found = name.strip_prefix("model.layers.").and_then(|rest| {
        let (layer, leaf) = rest.split_once('.')?;
        let (_, gguf, _, _) = LAYER.iter().find(|(hf, ..)| *hf == leaf)?;
        Some(format!("blk.{layer}.{gguf}"))
    });
    found.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_worlds() {
        assert_eq!(gguf_name("model.layers.12.self_attn.q_proj.weight"), "blk.12.attn_q.weight");
        assert_eq!(gguf_name("model.layers.3.self_attn.v_proj.bias"), "blk.3.attn_v.bias");
        assert_eq!(gguf_name("model.layers.0.input_layernorm.weight"), "blk.0.attn_norm.weight");
        assert_eq!(gguf_name(EMBEDDING), "token_embd.weight");
        assert_eq!(gguf_name("model.layers.x"), "model.layers.x");
    }

    #[test]
    fn every_family_is_found_by_both_names() {
        for a in ALL {
            assert_eq!(Architecture::find(a.name), Some(*a));
            assert_eq!(Architecture::of_class(a.class), Some(*a));
        }
        assert_eq!(Architecture::names(), "`llama`, `qwen2`, `qwen3`");
    }
}
