//! Settings of the `item` mode, and the shape of the LLM that a saved model keeps.
//!
//! In: JSON. Out: [`ItemHyper`]; [`Saved`], which with the tensors is the whole model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::llm::LlamaConfig;
use crate::llm::rope::RopeScaling;
use crate::recommenders::trainer::Schedule;

/// What the layers start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The LLM's weights.
    #[default]
    Llm,
    /// Random ones of the same shape: the control that tells what the LLM's weights are worth.
    Random,
}

/// Hyper-parameters of the item model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ItemHyper {
    /// So many of the LLM's first layers.
    #[schemars(range(min = 1, max = 512))]
    pub layers: u32,
    /// What the layers start from.
    pub init: Init,
    /// Whether items start from their titles; without it from random vectors.
    pub text: bool,
    /// Items of a history that are read, the latest ones; longer ones are cut into windows for training.
    #[schemars(range(min = 2, max = 100_000))]
    pub max_len: u32,
    /// Step size of Adam for layers and projection; by default 2e-4 with `init = "llm"` and 5e-4 with `"random"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub learning_rate: Option<f64>,
    /// Step size of Adam for the items' residuals.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub item_learning_rate: f64,
    /// Decoupled weight decay (AdamW); it pulls residuals to 0, items to their titles.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub weight_decay: f64,
    /// The gradient is scaled down to this norm; 0 leaves it as it is.
    #[schemars(range(min = 0.0))]
    pub clip_norm: f64,
    /// The step size rises from 0 over so many epochs.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub warmup_epochs: f64,
    /// Share of the numbers of the layers' inputs and of their results that is dropped.
    #[schemars(range(min = 0.0, max = 0.95))]
    pub dropout: f64,
    /// Positions of a step.
    #[schemars(range(min = 2, max = 16_777_216))]
    pub batch_tokens: u32,
    /// At most so many passes over the train data; exactly so many without a `valid` table.
    #[schemars(range(min = 0, max = 100_000))]
    pub epochs: u32,
    /// Epochs from one validation to the next.
    #[schemars(range(min = 1, max = 1000))]
    pub eval_every: u32,
    /// Validations without a gain before training stops; the best weights are kept.
    #[schemars(range(min = 1, max = 1000))]
    pub patience: u32,
    /// Whether what a user has chosen before is left out of the softmax, as it is of the ranking.
    pub exclude_seen: bool,
    /// Catalogues up to this size get the full softmax; larger ones a sampled one with corrected logits.
    pub full_softmax_items: u32,
    /// Items that are drawn for a step of the sampled softmax.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub negatives: u32,
    /// They are drawn in proportion to this power of their train interactions.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub negative_power: f64,
}

impl Default for ItemHyper {
    fn default() -> Self {
        ItemHyper {
            layers: 12,
            init: Init::Llm,
            text: true,
            max_len: 100,
            learning_rate: None,
            item_learning_rate: 1e-3,
            weight_decay: 0.01,
            clip_norm: 1.0,
            warmup_epochs: 0.5,
            dropout: 0.2,
            batch_tokens: 1024,
            epochs: 10,
            eval_every: 1,
            patience: 3,
            exclude_seen: true,
            full_softmax_items: 20_000,
            negatives: 2048,
            negative_power: 0.75,
        }
    }
}

impl ItemHyper {
    /// With everything that depends on something else filled in.
    pub fn resolved(mut self) -> Self {
        let rate = if self.init == Init::Llm { 2e-4 } else { 5e-4 };
        self.learning_rate.get_or_insert(rate);
        self
    }

    /// The step size of layers and projection.
    pub fn rate(&self) -> f64 {
        self.clone().resolved().learning_rate.unwrap_or_default()
    }

    /// The trainer's part; a batch is counted in positions.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            learning_rate: self.rate(),
            batch_size: self.batch_tokens,
            epochs: self.epochs,
            eval_every: self.eval_every,
            patience: self.patience,
        }
    }

    /// Checks ranges that serde does not know.
    ///
    /// # Errors
    /// A value is outside its range (exit 78).
    pub fn check(&self) -> Result<()> {
        let ranges = [
            ("layers", f64::from(self.layers), 1.0, 512.0),
            ("max_len", f64::from(self.max_len), 2.0, 100_000.0),
            ("learning_rate", self.rate(), 0.0, 1.0),
            ("item_learning_rate", self.item_learning_rate, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, 100.0),
            ("clip_norm", self.clip_norm, 0.0, f64::MAX),
            ("warmup_epochs", self.warmup_epochs, 0.0, 1000.0),
            ("dropout", self.dropout, 0.0, 0.95),
            ("batch_tokens", f64::from(self.batch_tokens), 2.0, 16_777_216.0),
            ("eval_every", f64::from(self.eval_every), 1.0, 1000.0),
            ("patience", f64::from(self.patience), 1.0, 1000.0),
            ("negatives", f64::from(self.negatives), 1.0, 1_048_576.0),
            ("negative_power", self.negative_power, 0.0, 2.0),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            None => Ok(()),
            Some((key, value, low, high)) => {
                Err(Error::spec(format!("`hyper.{key}` is {value}, allowed is {low} to {high}")))
            }
        }
    }
}

/// What the card of a fitted model keeps beside its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// The hyper-parameters in full.
    #[serde(flatten)]
    pub hyper: ItemHyper,
    /// The LLM's shape, as in a `config.json` of the layers that were taken.
    pub config: Value,
    /// What states are multiplied by before they meet the items.
    pub scale: f32,
}

/// A shape as a `config.json`.
///
/// # Errors
/// Rotary frequencies that only GGUF files have a way to write down (exit 78).
pub fn config_json(config: &LlamaConfig, layers: usize) -> Result<Value> {
    let scaling = match &config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear(factor) => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": *original_context as u64,
        }),
        RopeScaling::Factors(_) => {
            return Err(Error::spec("the rotary frequencies of this GGUF file can't be kept in an item model")
                .with_help("use the Hugging Face folder of the same model"));
        }
    };
    Ok(json!({
        "model_type": config.architecture.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": true,
    }))
}
