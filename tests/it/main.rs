//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

/// The leave-one-out split of MovieLens-100K has the reference's contents.
mod split_ml100k;
/// The LLM engine against golden values.
mod llm;
/// Damaged, cut-off and foreign model files.
mod llm_files;
/// The JSON-lines protocol of `tailfuse llm`.
mod llm_serve;
/// Prompts counted by a real tokenizer: budget, common beginning, hostile titles.
mod prompts;
