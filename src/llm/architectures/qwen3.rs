//! Qwen3: no biases, every head of queries and keys is normalised, the width of a head is its own.
//!
//! Architecture: Qwen3 (arXiv 2505.09388). Reference implementation: transformers, `models/qwen3/modeling_qwen3.py`.

use super::Architecture;

/// Llama with norms of heads; GGUF keeps the halves of a head.
pub const ARCHITECTURE: Architecture = Architecture {
    name: "qwen3",
    class: "Qwen3ForCausalLM",
    pairs_in_gguf: false,
    qkv_bias: false,
    qk_norm: true,
    head_dim: Some(128),
    context: 32768,
    refuse: super::qwen2::refuse_windows,
};
