//! A fit of either task: selection on validation with checkpoints, perhaps a second fit on train and validation.
//!
//! In: a backbone, its hyper-parameters, [`TrainData`]. Out: [`Fitted`]. `train`, `search` and the tie orders of
//! `evaluate` all fit through here.

use std::time::Duration;

use serde_json::{Value, json};

use super::data::{FitOn, Log, TrainData};
use super::savings::{Savings, key_of};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::recommenders::pairwise::validation_ndcg;
use crate::recommenders::rating::Predictor;
use crate::recommenders::trainer::Checkpoints;
use crate::recommenders::warm::WarmStart;
use crate::recommenders::{Backbone, Embeddings, Embeds, Epoch, FitContext, Scorer, Task, Watch};

/// A fitted model of either task.
pub(in crate::stages) enum FittedModel {
    Scorer(Box<dyn Scorer>),
    Predictor(Box<dyn Predictor>),
}

impl FittedModel {
    /// One vector per user, where the model has them.
    pub fn user_embeddings(&self) -> Option<Embeddings<'_>> {
        match self {
            FittedModel::Scorer(scorer) => scorer.user_embeddings(),
            FittedModel::Predictor(predictor) => Some(predictor.user_embeddings()),
        }
    }

    /// One vector per item, where the model has them.
    pub fn item_embeddings(&self) -> Option<Embeddings<'_>> {
        match self {
            FittedModel::Scorer(scorer) => scorer.item_embeddings(),
            FittedModel::Predictor(predictor) => Some(predictor.item_embeddings()),
        }
    }
}

/// The result of a fit.
pub(in crate::stages) struct Fitted {
    pub model: FittedModel,
    /// The log of the fit that was measured on validation.
    pub epochs: Vec<Epoch>,
    /// Its best epoch.
    pub best_epoch: usize,
    /// Quality on validation, higher is better: of the best epoch, or of a model that has no epochs; `None` without
    /// validation data.
    pub quality: Option<f64>,
    pub fit_on: FitOn,
}

/// Quality of the best epoch.
fn best_of(epochs: &[Epoch]) -> Option<f64> {
    epochs.iter().filter_map(|e| e.valid).reduce(f64::max)
}

/// Name of a task's validation metric, and the sign by which its quality is told.
pub(in crate::stages) fn valid_metric(task: Task) -> (&'static str, f64) {
    match task {
        Task::Rating => ("RMSE", -1.0),
        Task::Direct | Task::Sequential => ("NDCG@10", 1.0),
    }
}

/// The column (and counter) of a task's validation metric.
pub(in crate::stages) fn valid_column(task: Task) -> &'static str {
    match task {
        Task::Rating => "valid_rmse",
        Task::Direct | Task::Sequential => "valid_ndcg_10",
    }
}

/// The embeddings that a model of these hyper-parameters will have.
///
/// # Errors
/// The hyper-parameters are wrong (exit 78).
pub(in crate::stages) fn embeds_of(backbone: &Backbone, hyper: &Value) -> Result<Embeds> {
    match backbone.task {
        Task::Rating => backbone.rating_recommender(hyper).map(|_| Embeds::Both),
        Task::Direct | Task::Sequential => Ok(backbone.recommender(hyper)?.embeds()),
    }
}

/// What a fit needs besides data and hyper-parameters.
pub(in crate::stages) struct Fitter<'a> {
    pub backbone: &'static Backbone,
    pub device: &'a Device,
    pub watch: &'a dyn Watch,
    /// Where checkpoints lie, if anywhere, and how long a fit may go without one.
    pub savings: Option<(&'a Savings, Duration)>,
    /// Weights to start from, with their digest.
    pub warm: Option<(&'a WarmStart, &'a str)>,
}

impl Fitter<'_> {
    /// The key of a fit: everything that its result depends on.
    pub fn key(&self, hyper: &Value, seed: u64, data: &TrainData, on: FitOn) -> String {
        let mut key = json!({
            "version": super::KIND.version,
            "model": self.backbone.name,
            "hyper": hyper,
            "seed": seed,
            "data": data.fit_fingerprint(on),
            "weights_fit_on": on.as_str(),
        });
        if let Some((_, digest)) = self.warm {
            key["warm_start"] = json!(digest);
        }
        key_of(&key)
    }

    /// Fits on train with the held-out data for early stopping; with `refit`, fits again on both for as many epochs
    /// as were best. Checkpoints of both fits stay until both have ended.
    ///
    /// # Errors
    /// Those of the backbone's fit; the store fails (exit 75).
    pub fn fit(&self, hyper: &Value, seed: u64, data: &TrainData, refit: bool) -> Result<Fitted> {
        let first = self.checkpoints(hyper, seed, data, FitOn::Train);
        let mut fitted = self.fit_once(hyper, seed, data, FitOn::Train, first.as_ref())?;
        if refit {
            let hyper = for_epochs(hyper, fitted.best_epoch);
            let second = self.checkpoints(&hyper, seed, data, FitOn::TrainAndValid);
            let again = self.fit_once(&hyper, seed, data, FitOn::TrainAndValid, second.as_ref())?;
            fitted = Fitted { model: again.model, fit_on: again.fit_on, ..fitted };
            if let Some(second) = second {
                second.clear()?;
            }
        }
        if let Some(first) = first {
            first.clear()?;
        }
        Ok(fitted)
    }

    /// Fits without validation for exactly `epochs` epochs.
    ///
    /// # Errors
    /// As [`Fitter::fit`].
    pub fn fit_for(&self, hyper: &Value, seed: u64, data: &TrainData, on: FitOn, epochs: usize) -> Result<Fitted> {
        self.fit_once(&for_epochs(hyper, epochs), seed, data, on, None)
    }

    fn checkpoints(
        &self,
        hyper: &Value,
        seed: u64,
        data: &TrainData,
        on: FitOn,
    ) -> Option<super::savings::StoredCheckpoints> {
        self.savings.map(|(savings, every)| savings.checkpoints(&self.key(hyper, seed, data, on), every))
    }

    fn fit_once(
        &self,
        hyper: &Value,
        seed: u64,
        data: &TrainData,
        on: FitOn,
        checkpoints: Option<&super::savings::StoredCheckpoints>,
    ) -> Result<Fitted> {
        let checkpoints = checkpoints.map(|c| c as &dyn Checkpoints);
        let ctx = FitContext {
            seed,
            device: self.device,
            watch: self.watch,
            checkpoints,
            warm: self.warm.map(|(warm, _)| warm),
        };
        match &data.log {
            Log::Ranking(log) => {
                let interactions = log.interactions(data.items.len(), on);
                let fit = self.backbone.recommender(hyper)?.fit(&interactions, &ctx)?;
                // A closed form has no epochs, and is measured here.
                let quality = best_of(&fit.epochs).or_else(|| validation_ndcg(fit.scorer.as_ref(), &interactions));
                let model = FittedModel::Scorer(fit.scorer);
                Ok(Fitted { model, epochs: fit.epochs, best_epoch: fit.best_epoch, quality, fit_on: on })
            }
            Log::Rating(log) => {
                let nothing = log.nothing();
                let fit = self.backbone.rating_recommender(hyper)?.fit(&log.ratings(on, &nothing), &ctx)?;
                let quality = best_of(&fit.epochs);
                let model = FittedModel::Predictor(fit.predictor);
                Ok(Fitted { model, epochs: fit.epochs, best_epoch: fit.best_epoch, quality, fit_on: on })
            }
        }
    }
}

/// The same hyper-parameters with exactly so many epochs; those of a closed form as they are.
pub(super) fn for_epochs(hyper: &Value, epochs: usize) -> Value {
    let mut hyper = hyper.clone();
    if let Some(given) = hyper.get_mut("epochs") {
        *given = json!(epochs);
    }
    hyper
}

/// Whether an error of a fit is the setting's fault, so that other settings may do: `Some("diverged")` for a loss
/// that was not finite, `Some("failed")` for what the model refuses.
pub(in crate::stages) fn fault_of_setting(error: &Error) -> Option<&'static str> {
    match error.fault {
        crate::error::Fault::Spec if error.message.contains("diverged") => Some("diverged"),
        crate::error::Fault::Spec => Some("failed"),
        _ => None,
    }
}
