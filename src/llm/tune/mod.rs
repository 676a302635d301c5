//! Tuning: supervised fine-tuning of all weights or of low-rank adapters, on one's own machine.
//!
//! In: [`Weights`](super::weights::Weights) and examples, token ids of which some are to be learned. Out: learned weights, the curve
//! of losses, and files: an adapter in PEFT's format or a model folder in that of transformers.
//!
//! [`decoder`] is the arithmetic with gradients, [`lora`] the adapters, [`examples`] what is learned from, [`tuner`]
//! one model in training, [`run`] the loop with its schedule, evaluation and checkpoints, [`export`] the files.

pub mod decoder;
pub mod examples;
pub mod export;
#[cfg(test)]
mod golden;
pub mod lora;
pub mod peft;
pub mod progress;
pub mod run;
pub mod schedule;
pub mod seeds;
pub mod session;
pub mod text;
pub mod tuner;

pub use decoder::{Decoder, Packed, Parts, Reads};
pub use examples::{Batch, Example};
pub use lora::{Adapter, Target};
pub use peft::LoraFile;
pub use run::{Settings, Tuned};
pub use tuner::Tuner;
