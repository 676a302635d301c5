//! The shape of a Llama-like model: what is on disk, resolved to numbers without options.
//!
//! In: a Hugging Face `config.json` or the metadata of a GGUF file. Out: [`LlamaConfig`]. Which families there are,
//! and what each adds, is in [`super::architectures`].
//! Anything that would change the arithmetic and that the decoders do not do (another activation, sliding windows,
//! experts, scaled logits) is refused here by name, since running on would give wrong numbers.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use super::architectures::Architecture;
use super::gguf::{Gguf, Value};
use super::rope::RopeScaling;
use crate::error::{Error, Result};

/// The shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Its family.
    pub architecture: &'static Architecture,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether every head of queries and keys is normalised (RMSNorm with a weight `[head_dim]`) before its rotation.
    pub qk_norm: bool,
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
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
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
        let biases = if self.qkv_bias { self.q_width() + 2 * self.kv_width() } else { 0 };
        let norms = 2 * self.hidden + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = attention + biases + 3 * self.hidden * self.intermediate + norms;
        let head = if self.tied { 0 } else { self.vocab_size * self.hidden };
        self.vocab_size * self.hidden + self.layers * layer + self.hidden + head
    }

    /// Rotary frequencies of a head, `[head_dim / 2]`: theta^(-2i / head_dim), stretched where the model says so.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        self.rope_scaling.frequencies(self.rope_theta, self.head_dim)
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
        self.rope_scaling.check(self.rope_theta, self.head_dim)?;
        Ok(self)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// Exit 65 for another architecture, a missing key, or sizes that contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.text("general.architecture")?;
        let architecture = Architecture::find(arch).ok_or_else(|| gguf.fault(unsupported(arch)))?;
        let key = |leaf: &str| format!("{arch}.{leaf}");
        for (leaf, harmless) in UNSUPPORTED_GGUF {
            let value = gguf.get(&key(leaf)).filter(|v| !harmless(v));
            if let Some(value) = value {
                return Err(gguf.fault(format!("`{}` is {value:?}, which is not supported", key(leaf))));
            }
        }
        let heads = gguf.count(&key("attention.head_count"))?;
        let hidden = gguf.count(&key("embedding_length"))?;
        let key_length = gguf.count_opt(&key("attention.key_length"))?;
        let head_dim = key_length.unwrap_or(hidden.checked_div(heads).unwrap_or(0));
        for leaf in ["attention.value_length", "rope.dimension_count"] {
            if let Some(n) = gguf.count_opt(&key(leaf))?.filter(|n| *n != head_dim) {
                let what = format!("`{}` is {n}, but the head size is {head_dim}; this is not supported", key(leaf));
                return Err(gguf.fault(what));
            }
        }
        let embedding =
            gguf.tensor("token_embd.weight").ok_or_else(|| gguf.fault("there is no tensor `token_embd.weight`"))?;
        let rows = embedding.dims.get(1).copied().unwrap_or(0);
        if let Some(n) = gguf.count_opt(&key("vocab_size"))?.filter(|n| *n != rows) {
            return Err(gguf
                .fault(format!("`{}` is {n}, but `token_embd.weight` has {rows} rows", key("vocab_size")))
                .with_help("the vocabulary and the weights are of different models"));
        }
        let token = |key: &str| gguf.count_opt(key).map(|n| n.and_then(|n| u32::try_from(n).ok()));
        let mut eos: Vec<u32> = Vec::new();
        // End of text first, then the end of a turn and of a message, where the model has one.
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            eos.extend(token(key)?.filter(|id| !eos.contains(id)));
        }
        let eps = key("attention.layer_norm_rms_epsilon");
        LlamaConfig {
            architecture,
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            vocab_size: rows,
            hidden,
            intermediate: gguf.count(&key("feed_forward_length"))?,
            layers: gguf.count(&key("block_count"))?,
            heads,
            kv_heads: gguf.count_opt(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            context: gguf.count(&key("context_length"))?,
            rms_eps: gguf.number_opt(&eps)?.ok_or_else(|| gguf.fault(format!("the metadata key `{eps}` is missing")))?
                as f32,
            rope_theta: gguf.number_opt(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: RopeScaling::from_gguf(gguf, arch)?,
            tied: gguf.tensor("output.weight").is_none(),
            bos: token("tokenizer.ggml.bos_token_id")?,
            eos,
        }
        .check()
        .map_err(|what| gguf.fault(what))
    }

    /// Reads a Hugging Face `config.json`, and the tokens that end a text from a `generation_config.json` beside it.
    ///
    /// # Errors
    /// Exit 65 for a file that is missing, malformed, or of another architecture.
    pub fn from_hf(path: &Path) -> Result<Self> {
        let text = fs_err::read(path).map_err(|e| Error::data("cannot read the model's configuration").because(e))?;
        let fault = |path: &Path, what: String| Error::data(format!("{}: {what}", path.display()));
        let mut config = Self::from_hf_bytes(&text).map_err(|what| fault(path, what))?;
        let generation = path.with_file_name("generation_config.json");
        if generation.is_file() {
            let text = fs_err::read(&generation)
                .map_err(|e| Error::data("cannot read the model's configuration").because(e))?;
            let ends: Ends = serde_json::from_slice(&text)
                .map_err(|e| fault(&generation, format!("not a configuration of generation: {e}")))?;
            config.eos.extend(ends.eos_token_id.map(|ids| ids.0).unwrap_or_default());
            let mut seen = std::collections::HashSet::new();
            config.eos.retain(|id| seen.insert(*id));
        }
        Ok(config)
    }

    /// Reads the bytes of a `config.json`.
    ///
    /// # Errors
    /// In words, as [`LlamaConfig::from_hf`].
    pub fn from_hf_bytes(bytes: &[u8]) -> Result<Self, String> {
        let json: Json = serde_json::from_slice(bytes).map_err(|e| format!("not a model configuration: {e}"))?;
        let words: Words = Deserialize::deserialize(&json).map_err(|e| format!("not a model configuration: {e}"))?;
        // The family comes first: another one's file may lack the keys below, and that is not what is wrong with it.
        let architecture = words.architecture()?;
        let disk: OnDisk = Deserialize::deserialize(&json).map_err(|e| format!("not a model configuration: {e}"))?;
        for (key, harmless) in UNSUPPORTED_HF {
            let value = &json[*key];
            if !value.is_null() && !harmless(value) {
                return Err(format!("`{key}` is {value}, which is not supported"));
            }
        }
        (architecture.refuse)(&disk)?;
        disk.resolve(architecture).and_then(Self::check)
    }
}

/// The message about an architecture that is not computed here.
fn unsupported(name: &str) -> String {
    format!("the architecture `{name}` is not supported ({} are)", Architecture::names())
}

/// A key that changes the arithmetic in a way that the decoders do not do, and the values of it that change nothing.
type Unsupported<V> = (&'static str, fn(&V) -> bool);

/// Keys of `config.json`: of the families themselves, and of relatives that some export under the same `model_type`.
const UNSUPPORTED_HF: &[Unsupported<Json>] = &[
    ("attention_bias", |v| *v == false),
    ("mlp_bias", |v| *v == false),
    ("layer_types", |v| v.as_array().is_some_and(|l| l.iter().all(|t| t == "full_attention"))),
    ("partial_rotary_factor", |v| v.as_f64() == Some(1.0)),
    ("rope_interleaved", |v| *v == false),
    ("quantization_config", |_| false),
    ("num_local_experts", |v| matches!(v.as_u64(), Some(0 | 1))),
    ("num_experts", |v| matches!(v.as_u64(), Some(0 | 1))),
    ("attn_logit_softcapping", |_| false),
    ("final_logit_softcapping", |_| false),
    ("query_pre_attn_scalar", |_| false),
    ("embedding_multiplier", |v| v.as_f64() == Some(1.0)),
    ("residual_multiplier", |v| v.as_f64() == Some(1.0)),
    ("attention_multiplier", |_| false),
    ("logits_scaling", |v| v.as_f64() == Some(1.0)),
    ("logit_scale", |v| v.as_f64() == Some(1.0)),
    ("use_mrope", |v| *v == false),
    ("is_causal", |v| *v == true),
];

/// Keys of GGUF files, after `<architecture>.`.
const UNSUPPORTED_GGUF: &[Unsupported<Value>] = &[
    ("attention.sliding_window", |v| *v == Value::U64(0)),
    ("attention.causal", |v| *v == Value::Bool(true)),
    ("attention.scale", |v| *v == Value::F32(0.0)),
    ("attn_logit_softcapping", |v| *v == Value::F32(0.0)),
    ("final_logit_softcapping", |v| *v == Value::F32(0.0)),
    ("embedding_scale", |v| matches!(v, Value::F32(x) if *x == 0.0 || *x == 1.0)),
    ("residual_scale", |v| matches!(v, Value::F32(x) if *x == 0.0 || *x == 1.0)),
    ("logit_scale", |v| matches!(v, Value::F32(x) if *x == 0.0 || *x == 1.0)),
    ("expert_count", |v| *v == Value::U64(0)),
    ("rope.dimension_sections", |_| false),
    ("use_parallel_residual", |v| *v == Value::Bool(false)),
];

/// The keys that name a family.
#[derive(Deserialize)]
struct Words {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
}

impl Words {
    fn architecture(self) -> Result<&'static Architecture, String> {
        let classes = self.architectures.unwrap_or_default();
        let Some(name) = self.model_type else {
            let found = classes.iter().find_map(|c| Architecture::of_class(c));
            return found.ok_or_else(|| unsupported(&classes.join(", ")));
        };
        let found = Architecture::find(&name).ok_or_else(|| unsupported(&name))?;
        // A classifier has the family's layers, but no head to read logits from.
        match classes.first() {
            Some(class) if class.contains("For") && Architecture::of_class(class) != Some(found) => {
                Err(unsupported(class))
            }
            _ => Ok(found),
        }
    }
}

/// `config.json` as written by transformers; version 5 moved `rope_theta` and `rope_scaling` into `rope_parameters`.
#[derive(Deserialize)]
pub struct OnDisk {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Json>,
    rope_scaling: Option<Json>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    /// Tokens that a token sees where windows are in use.
    pub sliding_window: Option<usize>,
    /// Whether windows are in use.
    pub use_sliding_window: Option<bool>,
    /// First layer with a window.
    pub max_window_layers: Option<usize>,
    bos_token_id: Option<OneOrMany>,
    eos_token_id: Option<OneOrMany>,
}

/// What `generation_config.json` adds.
#[derive(Deserialize)]
struct Ends {
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
        ids.map(OneOrMany).ok_or_else(|| serde::de::Error::custom(format!("{json} is not a token id")))
    }
}

impl OnDisk {
    fn resolve(self, architecture: &'static Architecture) -> Result<LlamaConfig, String> {
        if let Some(act) = self.hidden_act.filter(|a| a != "silu" && a != "swish") {
            return Err(format!("hidden_act `{act}` is not supported (`silu` is)"));
        }
        // By kind of layer where a model has several; here all are of full attention.
        let parameters = self.rope_parameters.as_ref().map(|v| v.get("full_attention").unwrap_or(v));
        let (rope_key, rope) = match (parameters, &self.rope_scaling) {
            (Some(v), _) if !v.is_null() => ("rope_parameters", v),
            (_, Some(v)) => ("rope_scaling", v),
            _ => ("rope_scaling", &Json::Null),
        };
        let original = self.original_max_position_embeddings.or(self.max_position_embeddings);
        let rope_scaling = RopeScaling::from_hf(rope_key, rope, original)?;
        let nested = rope.get("rope_theta").and_then(Json::as_f64);
        let heads = self.num_attention_heads;
        let head_dim = self.head_dim.or(architecture.head_dim);
        Ok(LlamaConfig {
            architecture,
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: head_dim.unwrap_or(self.hidden_size.checked_div(heads).unwrap_or(0)),
            context: self.max_position_embeddings.unwrap_or(architecture.context),
            rms_eps: self.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta: nested.or(self.rope_theta).unwrap_or(10_000.0),
            rope_scaling,
            tied: self.tie_word_embeddings.unwrap_or(false),
            bos: self.bos_token_id.and_then(|ids| ids.0.first().copied()),
            eos: self.eos_token_id.map(|ids| ids.0).unwrap_or_default(),
        })
    }
}
