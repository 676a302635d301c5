//! What a model may use: memory, tokens of a batch, precision; and what that comes to in bytes.
//!
//! In: [`LlmOptions`] and the shape of a model. Out: [`Memory`], an upper bound that holds for any prompts.

use serde::{Deserialize, Serialize};

use super::config::LlamaConfig;
use super::cpu::{self, linear::Precision};
use super::decoder::{Decoder, PassSize};

/// Type of the weights and of what passes between layers, on devices that have the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Half {
    /// bfloat16 on CUDA, f32 elsewhere.
    #[default]
    Auto,
    /// f32 everywhere.
    Never,
    /// bfloat16 wherever the model runs on Burn. Norms, softmax and the sums between layers stay in f32.
    Always,
}

/// What a model may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LlmOptions {
    /// Tokens that are computed at once; the device's own number by default.
    pub batch_tokens: Option<usize>,
    /// Bytes for keys and values: of known beginnings, and of sequences that are being written. One sequence as long as
    /// the context is always held, whatever this says.
    pub kv_bytes: usize,
    /// Type of the weights on a GPU.
    pub half: Half,
    /// How exactly linear layers compute on a CPU.
    pub precision: Precision,
}

impl Default for LlmOptions {
    fn default() -> Self {
        LlmOptions { batch_tokens: None, kv_bytes: 512 << 20, half: Half::Auto, precision: Precision::Auto }
    }
}

/// Bytes that a model takes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights.
    pub weights: usize,
    /// Keys and values: known beginnings, sequences in work, and those of the batch in work.
    pub kv: usize,
    /// What passes between the layers, attention's buffers, and the logits.
    pub pass: usize,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.kv + self.pass
    }

    /// The bound for a decoder under options: prompts of any number and length up to the context.
    ///
    /// Keys and values are counted as the budget (or one whole sequence, where that is more), and on top of it
    /// twice a batch: what a batch makes, and the copy that is taken where a known beginning is divided.
    pub fn bound<D: Decoder>(decoder: &D, options: &LlmOptions) -> Self {
        let batch = options.batch_tokens.unwrap_or(decoder.batch_tokens()).max(1);
        let pass = |size| decoder.pass_bytes(size);
        Self::of(decoder.config(), options, decoder.weight_bytes(), decoder.token_bytes(), batch, &pass)
    }

    /// The bound for a model of this shape on the CPU, before its weights are read: as if all became f32.
    pub fn before_loading(config: &LlamaConfig, options: &LlmOptions) -> Self {
        let batch = options.batch_tokens.unwrap_or(cpu::BATCH_TOKENS).max(1);
        let pass = |size| cpu::pass_bytes(config, size);
        Self::of(config, options, cpu::most_weight_bytes(config), cpu::token_bytes(config), batch, &pass)
    }

    fn of(
        config: &LlamaConfig,
        options: &LlmOptions,
        weights: usize,
        token: usize,
        batch: usize,
        pass: &dyn Fn(PassSize) -> usize,
    ) -> Self {
        let held = options.kv_bytes.max(config.context * token);
        let size = PassSize { tokens: batch, seen: config.context, past: held / token.max(1) };
        Memory { weights, kv: held + 2 * batch * token, pass: pass(size) }
    }
}

#[cfg(test)]
mod tests;
