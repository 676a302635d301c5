//! Qwen2 and Qwen2.5: biases on queries, keys and values.
//!
//! Architecture: Qwen2 (arXiv 2407.10671). Reference implementation: transformers, `models/qwen2/modeling_qwen2.py`.

use super::Architecture;
use crate::llm::config::OnDisk;

/// Llama with biases; GGUF keeps the halves of a head.
pub const ARCHITECTURE: Architecture = Architecture {
    name: "qwen2",
    class: "Qwen2ForCausalLM",
    pairs_in_gguf: false,
    qkv_bias: true,
    qk_norm: false,
    head_dim: None,
    context: 32768,
    refuse: refuse_windows,
};

/// Layers from `max_window_layers` on see a window of tokens where `use_sliding_window` says so.
pub(super) fn refuse_windows(config: &OnDisk) -> Result<(), String> {
    let from = config.max_window_layers.unwrap_or(28);
    if config.use_sliding_window == Some(true) && from < config.num_hidden_layers {
        return Err(format!(
            "use_sliding_window with max_window_layers {from} is not supported: layers from there on would see a window only"
        ));
    }
    Ok(())
}
