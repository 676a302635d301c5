//! Models that predict the rating of a (user, item) pair.
//!
//! In: [`Ratings`] (categorical and dense fields of users, items and rows, as [`crate::interactions::fields`] encodes
//! them), hyper-parameters and a seed. Out: a [`RatingFit`] with a [`Predictor`].

#[cfg(test)]
mod contract;
#[cfg(test)]
pub(super) mod golden;
pub mod layers;
pub mod layout;
pub mod learner;
pub mod predictor;
pub mod recent;

use super::{Embeddings, Epoch, FitContext, NamedTensor};
use crate::error::{Error, Result};
use crate::interactions::fields::{Entities, FieldSet, Rows};

/// What a rating model learns from.
#[derive(Clone, Copy, Debug)]
pub struct Ratings<'a> {
    /// The fields; kept with the model.
    pub fields: &'a FieldSet,
    /// Users of the rows.
    pub users: &'a Entities,
    /// Items of the rows.
    pub items: &'a Entities,
    /// Rows to learn from, in time order within each user where a model is to know what was earlier.
    pub train: &'a Rows,
    /// Their ratings, `[train.len()]`, finite.
    pub train_ratings: &'a [f32],
    /// Rows for early stopping; may be empty.
    pub valid: &'a Rows,
    /// Their ratings, `[valid.len()]`, finite.
    pub valid_ratings: &'a [f32],
}

impl Ratings<'_> {
    /// Checks sizes, indices and ratings.
    ///
    /// # Errors
    /// A rating is NaN or infinite (exit 65; the row is named); rows do not fit the fields (exit 65).
    pub fn check(&self) -> Result<()> {
        for (rows, ratings, what) in
            [(self.train, self.train_ratings, "train"), (self.valid, self.valid_ratings, "valid")]
        {
            self.fields.check(self.users, self.items, rows)?;
            if rows.len() != ratings.len() {
                return Err(Error::data(format!("{} ratings for {} {what} rows", ratings.len(), rows.len())));
            }
            if let Some(row) = ratings.iter().position(|r| !r.is_finite()) {
                let told = format!("the rating in row {row} (0-based) of `{what}` is {}", ratings[row]);
                return Err(Error::data(told).with_help("drop such rows in a `sql` stage"));
            }
        }
        Ok(())
    }
}

/// A fitted rating model with its training log.
pub struct RatingFit {
    /// The best model by RMSE on the validation rows, or the last one without any.
    pub predictor: Box<dyn Predictor>,
    /// One entry per epoch that was run; `valid` is the RMSE with a minus sign.
    pub epochs: Vec<Epoch>,
    /// The epoch that `predictor` comes from (1-based; 0 = the initial weights).
    pub best_epoch: usize,
}

/// A rating backbone with its hyper-parameters, ready to learn.
pub trait RatingRecommender: Send + Sync {
    /// The hyper-parameters in full, defaults filled in.
    fn hyper(&self) -> serde_json::Value;

    /// Learns. The same data, hyper-parameters and seed give the same model on the CPU.
    ///
    /// # Errors
    /// Those of [`Ratings::check`]; what [`super::Watch::check`] returned; a loss that is no longer finite (exit 78).
    fn fit(&self, data: &Ratings<'_>, ctx: &FitContext<'_>) -> Result<RatingFit>;
}

/// A fitted rating model.
pub trait Predictor: Send + Sync {
    /// The fields that it was fitted with.
    fn fields(&self) -> &FieldSet;

    /// Ratings `[rows.len()]`, inside the range of the ratings that the model was fitted on. A user, an item or a value
    /// without a train row has an embedding of zeros and a linear weight of 0: what else is known of the row decides.
    ///
    /// # Errors
    /// The rows do not fit the fields (exit 65).
    fn predict(&self, users: &Entities, items: &Entities, rows: &Rows) -> Result<Vec<f32>>;

    /// Embeddings of the users' ids, `[users, dim]`.
    fn user_embeddings(&self) -> Embeddings<'_>;

    /// Embeddings of the items' ids, `[items, dim]`.
    fn item_embeddings(&self) -> Embeddings<'_>;

    /// The weights, for [`super::saved`]; the backbone's `load` makes the same predictor of them and the fields.
    fn tensors(&self) -> Vec<NamedTensor>;
}

/// Root mean squared error; `None` without rows.
pub fn rmse(predicted: &[f32], wanted: &[f32]) -> Option<f64> {
    mean(predicted, wanted, |d| d * d).map(f64::sqrt)
}

/// Mean absolute error; `None` without rows.
pub fn mae(predicted: &[f32], wanted: &[f32]) -> Option<f64> {
    mean(predicted, wanted, f64::abs)
}

fn mean(predicted: &[f32], wanted: &[f32], of: impl Fn(f64) -> f64) -> Option<f64> {
    let n = predicted.len();
    let sum: f64 = predicted.iter().zip(wanted).map(|(p, w)| of(f64::from(*p) - f64::from(*w))).sum();
    (n > 0).then(|| sum / n as f64)
}
