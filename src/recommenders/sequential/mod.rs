//! What the sequential backbones share: a transformer over item histories, its batches, losses, learner and scorer.
//!
//! In: train [`Histories`](crate::interactions::Histories) and a [`SequenceModel`] (made by `sasrec`, `bert4rec` or
//! `cl4srec` from their hyper-parameters). Out: a [`Fit`](super::Fit) whose [`SequentialScorer`] reads a history.
//!
//! * Histories longer than `max_len` are cut into windows for training ([`batches`]); a score reads the last
//!   `max_len` items.
//! * A user without a history gets the items' popularity as scores; one with a single interaction is scored by it and
//!   trains nothing in a causal model.
//! * Sequences are padded on the right; padding is neither seen by attention nor ever a target.
//! * Every random choice (windows, their order, masks, dropout, negatives, views) is a function of seed and epoch.

pub mod augmentation;
pub mod batches;
pub mod config;
#[cfg(test)]
pub mod contract;
pub mod encoder;
pub mod learner;
pub mod loss;
pub mod scorer;

pub use config::{Activation, Augmentation, Decay, EncoderHyper, LossKind, NormPlace, OptimizerHyper, Positions};
pub use learner::{Objective, SequenceModel, Views, fit};
pub use scorer::SequentialScorer;
