//! The shape of a Llama model: what is on disk, resolved to numbers without options.
//!
//! In: a Hugging Face `config.json` or the metadata of a GGUF file. Out: [`LlamaConfig`].
//! Anything that would change the arithmetic and that the decoder does not do (biases, another
//! activation, scaled RoPE) is refused here by name, since running on would give wrong numbers.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use super::gguf::{Gguf, Value};
use crate::error::{Error, Result};

/// The shape of a Llama-architecture decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Tokens in the vocabulary; rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Tokens that a sequence may have at most.
    pub context: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the head is the embedding matrix.
    pub tied: bool,
    /// Beginning of text, where the model names one.
    pub bos: Option<u32>,
    /// Tokens that end a text; generation may stop there.
    pub eos: Vec<u32>,
}

/// Sizes above this are damage, not a model; it keeps every product within 64 bits.
const MAX_SIZE: usize = 1 << 24;

/// Layers above this are damage: lists are made per layer before the weights are looked at.
const MAX_LAYERS: usize = 4096;

impl LlamaConfig {
    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        let attention = self.hidden * (2 * self.q_width() + 2 * self.kv_width());
        let layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden;
        let head = if self.tied { 0 } else { self.vocab_size * self.hidden };
        self.vocab_size * self.hidden + self.layers * layer + self.hidden + head
    }

    /// Rotary frequencies of a head, `[head_dim / 2]`: theta^(-2i / head_dim), as the reference
    /// computes them (transformers, `modeling_rope_utils.py`: in f32).
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let dim = self.head_dim as f32;
        (0..self.head_dim / 2).map(|i| 1.0 / (self.rope_theta as f32).powf((2 * i) as f32 / dim)).collect()
    }

    /// Checks sizes against each other.
    fn check(self) -> Result<Self, String> {
        let sizes = [
            ("vocabulary", self.vocab_size),
            ("hidden size", self.hidden),
            ("intermediate size", self.intermediate),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("number of key/value heads", self.kv_heads),
            ("head size", self.head_dim),
            ("context length", self.context),
        ];
        if let Some((name, n)) = sizes.iter().find(|(_, n)| *n == 0 || *n > MAX_SIZE) {
            return Err(format!("the {name} is {n}, which cannot be"));
        }
        if self.layers > MAX_LAYERS {
            return Err(format!("{} layers cannot be (at most {MAX_LAYERS})", self.layers));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads cannot share {} key/value heads evenly", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("the head size {} is odd, but rotary embeddings need pairs", self.head_dim));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0 && self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(format!("rms_norm_eps {} or rope_theta {} is out of range", self.rms_eps, self.rope_theta));
        }
        Ok(self)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// Exit 65 for another architecture, a missing key, or sizes that contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.text("general.architecture")?;
        if arch != "llama" {
            return Err(gguf.fault(format!("the architecture `{arch}` is not supported (`llama` is)")));
        }
        let heads = gguf.count("llama.attention.head_count")?;
        let hidden = gguf.count("llama.embedding_length")?;
        let key_length = gguf.count_opt("llama.attention.key_length")?;
        let head_dim = key_length.unwrap_or(hidden.checked_div(heads).unwrap_or(0));
        for (key, want) in [("llama.attention.value_length", head_dim), ("llama.rope.dimension_count", head_dim)] {
            if let Some(n) = gguf.count_opt(key)?.filter(|n| *n != want) {
                return Err(gguf.fault(format!("`{key}` is {n}, but the head size is {want}; this is not supported")));
            }
        }
        match gguf.get("llama.rope.scaling.type") {
            None => {}
            Some(Value::Text(t)) if t == "none" => {}
            Some(other) => return Err(gguf.fault(format!("scaled rotary embeddings ({other:?}) are not supported"))),
        }
        let embedding =
            gguf.tensor("token_embd.weight").ok_or_else(|| gguf.fault("there is no tensor `token_embd.weight`"))?;
        let rows = embedding.dims.get(1).copied().unwrap_or(0);
        if let Some(n) = gguf.count_opt("llama.vocab_size")?.filter(|n| *n != rows) {
            return Err(gguf
                .fault(format!("`llama.vocab_size` is {n}, but `token_embd.weight` has {rows} rows"))
                .with_help("the vocabulary and the weights are of different models"));
        }
        let token = |key: &str| gguf.count_opt(key).map(|n| n.and_then(|n| u32::try_from(n).ok()));
        let eps = "llama.attention.layer_norm_rms_epsilon";
        LlamaConfig {
            vocab_size: rows,
            hidden,
            intermediate: gguf.count("llama.feed_forward_length")?,
            layers: gguf.count("llama.block_count")?,
            heads,
            kv_heads: gguf.count_opt("llama.attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            context: gguf.count("llama.context_length")?,
            rms_eps: gguf.number_opt(eps)?.ok_or_else(|| gguf.fault(format!("the metadata key `{eps}` is missing")))?
                as f32,
            rope_theta: gguf.number_opt("llama.rope.freq_base")?.unwrap_or(10_000.0),
            tied: gguf.tensor("output.weight").is_none(),
            bos: token("tokenizer.ggml.bos_token_id")?,
            eos: token("tokenizer.ggml.eos_token_id")?.into_iter().collect(),
        }
        .check()
        .map_err(|what| gguf.fault(what))
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// Exit 65 for a file that is missing, malformed, or of another architecture.
    pub fn from_hf(path: &Path) -> Result<Self> {
        let text = fs_err::read(path).map_err(|e| Error::data("cannot read the model's configuration").because(e))?;
        let fault = |what: String| Error::data(format!("{}: {what}", path.display()));
        let disk: OnDisk =
            serde_json::from_slice(&text).map_err(|e| fault(format!("not a model configuration: {e}")))?;
        disk.resolve().and_then(Self::check).map_err(fault)
    }
}

/// `config.json` as written by transformers; version 5 moved `rope_theta` into `rope_parameters`.
#[derive(Deserialize)]
struct OnDisk {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Json>,
    rope_scaling: Option<Json>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

/// `eos_token_id` is a number or a list of them.
struct OneOrMany(Vec<u32>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Json::deserialize(deserializer)?;
        let ids = match &json {
            Json::Array(values) => values.iter().map(Json::as_u64).collect(),
            other => other.as_u64().map(|n| vec![n]),
        };
        let ids = ids.and_then(|ids: Vec<u64>| ids.into_iter().map(|n| u32::try_from(n).ok()).collect());
        ids.map(OneOrMany).ok_or_else(|| serde::de::Error::custom(format!("eos_token_id is {json}, not a token id")))
    }
}

impl OnDisk {
    fn resolve(self) -> Result<LlamaConfig, String> {
        let is_llama = match (&self.model_type, &self.architectures) {
            (Some(t), _) => t == "llama",
            (None, Some(names)) => names.iter().any(|n| n == "LlamaForCausalLM"),
            (None, None) => false,
        };
        if !is_llama {
            let what = self.model_type.or_else(|| self.architectures.map(|a| a.join(", "))).unwrap_or_default();
            return Err(format!("the architecture `{what}` is not supported (`llama` is)"));
        }
        if let Some(act) = self.hidden_act.filter(|a| a != "silu" && a != "swish") {
            return Err(format!("hidden_act `{act}` is not supported (`silu` is)"));
        }
        if self.attention_bias == Some(true) || self.mlp_bias == Some(true) {
            return Err("attention_bias and mlp_bias are not supported".to_owned());
        }
        for (key, value) in [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)] {
            let kind = value.as_ref().and_then(|v| v.get("rope_type").or_else(|| v.get("type"))).and_then(Json::as_str);
            if let Some(kind) = kind.filter(|k| *k != "default") {
                return Err(format!("`{key}` of type `{kind}` is not supported (`default` is)"));
            }
        }
        let nested = self.rope_parameters.as_ref().and_then(|v| v.get("rope_theta")).and_then(Json::as_f64);
        let heads = self.num_attention_heads;
        Ok(LlamaConfig {
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size.checked_div(heads).unwrap_or(0)),
            context: self.max_position_embeddings.unwrap_or(2048),
            rms_eps: self.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta: nested.or(self.rope_theta).unwrap_or(10_000.0),
            tied: self.tie_word_embeddings.unwrap_or(false),
            bos: self.bos_token_id,
            eos: self.eos_token_id.map(|ids| ids.0).unwrap_or_default(),
        })
    }
}
