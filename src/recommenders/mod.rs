//! The conventional recommenders, on Burn.
//!
//! In: [`Interactions`] (dense indices), hyper-parameters (JSON, checked against the backbone's
//! own schema) and a seed. Out: a [`Fit`] with a [`Scorer`], which gives scores `[users, items]`
//! and, where the model has them, embeddings; [`topk`] makes shortlists of it and
//! [`saved`] files.
//!
//! Adding a backbone: one file here, its `pub mod` line, its entry in [`registry::BACKBONES`].

pub mod afm;
pub mod autoint;
pub mod bert4rec;
pub mod checkpoint;
pub mod cl4srec;
#[cfg(test)]
mod closed_form_tests;
pub mod dcn;
pub mod deepfm;
pub mod ease;
pub mod embedding_scorer;
pub mod gf_cf;
pub mod graph;
pub mod hyper;
pub mod ials;
pub mod idle;
pub mod item_item;
pub mod item_knn;
pub mod lightgcn;
pub mod linear_algebra;
pub mod mf;
pub mod mixgcf;
pub mod nfm;
pub mod ops;
pub mod optim;
pub mod pairwise;
#[cfg(test)]
mod pairwise_golden;
pub mod popularity;
pub mod product;
pub mod ranking_loss;
pub mod rating;
pub mod registry;
pub mod sasrec;
pub mod saved;
pub mod sequential;
pub mod sgl;
pub mod sparse;
pub mod topk;
pub mod trainer;
pub mod warm;
pub mod xdeepfm;

use crate::device::Device;
use crate::error::Result;
use crate::interactions::Histories;

pub use registry::{BACKBONES, Backbone, Task};
pub use saved::NamedTensor;

/// What a backbone learns from, in dense indices.
#[derive(Clone, Copy, Debug)]
pub struct Interactions<'a> {
    /// Number of users; indices are `0..n_users`.
    pub n_users: usize,
    /// Number of items; indices are `0..n_items`.
    pub n_items: usize,
    /// Train interactions per user, oldest first.
    pub train: &'a Histories,
    /// Held-out `(user, item)` pairs for early stopping; may be empty. They are never
    /// trained on, and never known to the negative sampler.
    pub valid: &'a [(u32, u32)],
}

/// Hears of a fit's progress and may stop it.
pub trait Watch: Sync {
    /// At most `epochs` epochs will follow.
    fn begin(&self, _epochs: usize) {}
    /// An epoch is done.
    fn epoch(&self, _epoch: &Epoch) {}
    /// Asked before each batch; an error stops the fit and is what it returns.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// A [`Watch`] that neither hears nor stops.
pub struct Unwatched;
impl Watch for Unwatched {}

/// What a fit may know besides its data.
pub struct FitContext<'a> {
    /// Seed of the initial weights, the order of the batches and the negatives.
    pub seed: u64,
    /// Where tensors live.
    pub device: &'a Device,
    /// Progress and stop requests.
    pub watch: &'a dyn Watch,
    /// Where an interrupted fit is kept, if anywhere.
    pub checkpoints: Option<&'a dyn trainer::Checkpoints>,
    /// Weights to start from, for backbones that learn step by step; closed forms do without.
    pub warm: Option<&'a warm::WarmStart>,
}

/// One epoch of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Epoch {
    /// 1-based.
    pub number: usize,
    /// Mean training loss per example, regularisation included.
    pub loss: f64,
    /// Quality on the held-out rows, higher is better: NDCG@10 over the full ranking, or for a rating model its
    /// RMSE with a minus sign; `None` where it was not measured.
    pub valid: Option<f64>,
    /// Wall seconds of the epoch: sampling, batching and updates, without validation.
    pub seconds: f64,
}

/// A fitted model with its training log.
pub struct Fit {
    /// The best checkpoint by validation, or the last one without validation.
    pub scorer: Box<dyn Scorer>,
    /// One entry per epoch that was run.
    pub epochs: Vec<Epoch>,
    /// The epoch that `scorer` comes from (1-based; 0 = the initial weights).
    pub best_epoch: usize,
}

/// Of what a fitted model has one vector each, so that they can be compared with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Embeds {
    /// Of nothing: popularity, item-item models.
    #[default]
    None,
    /// Of items: sequence models, whose users are read from their histories.
    Items,
    /// Of users and items.
    Both,
}

/// A backbone with its hyper-parameters, ready to learn.
pub trait Recommender: Send + Sync {
    /// The hyper-parameters in full, defaults filled in.
    fn hyper(&self) -> serde_json::Value;

    /// The embeddings that the fitted [`Scorer`] will have.
    fn embeds(&self) -> Embeds {
        Embeds::None
    }

    /// Learns. The same data, hyper-parameters and seed give the same model on the CPU.
    ///
    /// # Errors
    /// What [`Watch::check`] returned; a loss that is no longer finite (exit 78).
    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit>;
}

/// Rows of an embedding table, `[rows, dim]` row-major.
#[derive(Clone, Copy, Debug)]
pub struct Embeddings<'a> {
    /// Length of a row.
    pub dim: usize,
    /// `[rows * dim]`.
    pub values: &'a [f32],
}

/// What [`Scorer::factors`] gives.
pub struct Factors<'a> {
    /// Length of a vector.
    pub dim: usize,
    /// `[users, dim]`, those that were asked for.
    pub users: Vec<f32>,
    /// `[items, dim]`, all items.
    pub items: &'a [f32],
}

/// A fitted model.
pub trait Scorer: Send + Sync {
    /// Number of users that the model knows.
    fn n_users(&self) -> usize;

    /// Number of items that the model knows.
    fn n_items(&self) -> usize;

    /// Scores of all items for a block of users: `out [users.len(), n_items]` row-major, higher is
    /// better. `history` is what the users have seen, oldest first, for models that read it
    /// (matrix factorisation and graphs do not).
    ///
    /// # Panics
    /// When `out` has another length or a user is unknown (our bug).
    fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]);

    /// The model as it scores once `history` is known, where that takes more than reading one user's history: a
    /// graph model propagates over the graph of `history`. `None` where [`Scorer::score`] is enough.
    fn with_history(&self, _history: &Histories) -> Option<Box<dyn Scorer>> {
        None
    }

    /// The vectors whose products are the scores of `users` given `history`, where scores are made in that way: a
    /// shortlist is then found without holding all scores. They must be those of [`Scorer::score`] to the bit,
    /// which they are where that uses [`product::scores`].
    fn factors(&self, _users: &[u32], _history: &Histories) -> Option<Factors<'_>> {
        None
    }

    /// `[users, dim]`, where the model has one vector per user.
    fn user_embeddings(&self) -> Option<Embeddings<'_>> {
        None
    }

    /// `[items, dim]`, where the model has one vector per item.
    fn item_embeddings(&self) -> Option<Embeddings<'_>> {
        None
    }

    /// The weights, for [`saved`]; the backbone's `load` makes the same scorer of them.
    fn tensors(&self) -> Vec<NamedTensor>;
}
