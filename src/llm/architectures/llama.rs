//! Llama 2 and 3, and what is built alike (SmolLM2, TinyLlama).
//!
//! Architecture: LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783, its rotary frequencies are scaled).
//! Reference implementation: transformers, `models/llama/modeling_llama.py`.

use super::Architecture;
use crate::llm::config::OnDisk;

/// No biases, no norms of heads; GGUF rotates neighbouring pairs.
pub const ARCHITECTURE: Architecture = Architecture {
    name: "llama",
    class: "LlamaForCausalLM",
    pairs_in_gguf: true,
    qkv_bias: false,
    qk_norm: false,
    head_dim: None,
    context: 2048,
    refuse,
};

fn refuse(config: &OnDisk) -> Result<(), String> {
    match config.sliding_window {
        Some(window) if config.use_sliding_window != Some(false) => {
            Err(format!("sliding_window {window} is not supported (every token sees all before it)"))
        }
        _ => Ok(()),
    }
}
