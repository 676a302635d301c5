//! `train`: fits a recommender on train interactions or ratings.
//!
//! In: interactions (`user_id`, `item_id`, oldest first within a user) or ratings, perhaps held-out ones for early
//! stopping, perhaps tables of all users and items. Out: artifact `model`
//! ([`crate::recommenders::saved`]), its embeddings as tables, the training log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::context::{
    Artifact, Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::registry::StageKind;
use crate::columns::{ITEM_ID, USER_ID};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::interactions::IdMap;
use crate::interactions::fields::Side;
use crate::recommenders::saved::TrainedModel;
use crate::recommenders::warm::WarmStart;
use crate::recommenders::{Backbone, Embeds, Task, registry};

pub(super) mod columns;
pub(super) mod data;
mod digest;
pub(super) mod fit;
pub(super) mod hyper_from;
pub(super) mod measure;
pub(super) mod outputs;
pub(super) mod progress;
pub(super) mod savings;

pub use columns::FieldsConfig;
use data::{FitOn, Log, References, Tables, TrainData};
use fit::{Fitter, valid_column, valid_metric};
use progress::FitProgress;
use savings::Savings;

/// `kind = "train"`.
pub const KIND: StageKind = StageKind {
    name: "train",
    version: 2,
    about: "Fits a recommender on train interactions or ratings, stopping early on validation.",
    sample: r#"model = "lightgcn"
train = "parts.train"
valid = "parts.valid"
hyper = { layers = 3, embedding_dim = 64 }
"#,
    schema: || schemars::schema_for!(TrainConfig),
    resolve,
};

/// Fits a recommender on train interactions or ratings.
///
/// The models and their hyper-parameters are listed [below](#models). A fit that was stopped goes on from its last checkpoint when
/// the same command runs again, and ends with the same model as one that was not. The model's card, `model.json`, says what was fitted, on
/// what, with which hyper-parameters and seed, and how good it was on validation.
///
/// The outputs `user_embeddings` and `item_embeddings` exist only for models that have such vectors: a sequence model has
/// none per user, `popularity` or `ease` have none at all.
///
/// Counters: `users`, `items`, `interactions` (distinct pairs; of a rating model, ratings), `epochs`, `best_epoch`, `valid_ndcg_10` or `valid_rmse` (of the
/// best epoch; null without `valid`), `valid_users` (held-out rows that are measured), `valid_cold` (held-out rows of users without train interactions, not
/// measured), `seconds_per_epoch` (median, without validation), `weights_fit_on`, `device`, `warm_weights` (of a warm start: tables and vectors that
/// began with earlier values).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The recommender, by its name in the list of [models](#models).
    pub model: String,
    /// What to learn from: `user_id`, `item_id`, for a rating model also `rating`. Repeated pairs count once for models that
    /// rank items.
    pub train: String,
    /// Held-out interactions, the same columns: NDCG@10 on them (all items but the user's train items ranked), or for a
    /// rating model RMSE, decides which epoch's weights are kept and when training stops. Without it
    /// exactly `hyper.epochs` epochs are run and the last weights kept. They are never trained on, unless `refit` says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<String>,
    /// A table whose `item_id` column lists all items, so that items without train interactions are
    /// known too. Left out, it is `X.items` where `train` is `X.train` (the outputs of a `split` stage);
    /// with `""`, or where `train` has another name, the items of `train` and `valid` are all there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<String>,
    /// The same for users, `user_id`: left out, it is `X.users` where `train` is `X.train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// Columns besides the ids that a rating model reads; it always reads user and item.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fields: Option<FieldsConfig>,
    /// Hyper-parameters of the model; what is not given has its default.
    #[serde(default)]
    pub hyper: Map<String, Value>,
    /// The `best` output of a `search` stage, or a calibration (`calibration.json`): its hyper-parameters in place of the
    /// defaults, and of a calibration the number of epochs too. What `hyper` gives goes before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hyper_from: Option<String>,
    /// An earlier model of the same kind to start from, for example yesterday's, a source with `role = "artifact"` and
    /// `optional = true`: users and items that it knows begin with their earlier weights, new ones as usual. Where it has no files
    /// the start is a cold one. Models that are learned step by step only; off by default. The result then depends on
    /// all nights before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_start: Option<String>,
    /// Epochs of a warm start, in place of `hyper.epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub warm_epochs: Option<u32>,
    /// What the final weights are fitted on, where that is more than train: after the best epoch was found on validation the model is
    /// fitted once more from the start, on both tables, for exactly so many epochs (a step size that falls
    /// with the epochs falls faster then). Card, counters and metrics say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refit: Option<Refit>,
    /// Seconds of training that a stopped run may lose: a checkpoint is kept so often, between two epochs.
    #[serde(default = "default_checkpoint_seconds")]
    #[schemars(range(min = 0.0))]
    pub checkpoint_seconds: f64,
}

/// What a second fit learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Refit {
    /// The train and the validation interactions.
    #[serde(rename = "train+valid")]
    TrainValid,
}

pub(super) fn default_checkpoint_seconds() -> f64 {
    20.0
}

/// Seconds of a config as a duration.
///
/// # Errors
/// Not a number of seconds (exit 78).
pub(super) fn checkpoint_every(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| {
        Error::spec(format!("`checkpoint_seconds` is {seconds}")).with_help("give a number of seconds, 0 or more")
    })
}

/// What `train` and `search` ask of their configs alike.
pub(super) fn check_task(task: Task, fields: Option<&FieldsConfig>) -> Result<()> {
    match (task, fields) {
        (Task::Rating, Some(fields)) => fields.check(),
        (Task::Direct | Task::Sequential, Some(_)) => Err(Error::spec("`fields` is read by rating models only")
            .with_help("remove it, or take a model that predicts ratings")),
        (_, None) => Ok(()),
    }
}

fn resolve(value: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let mut config: TrainConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `train` is wrong").because(e))?;
    let backbone = registry::find(&config.model)?;
    let full = backbone.hyper(&Value::Object(config.hyper.clone()))?;
    let embeds = fit::embeds_of(backbone, &full)?;
    check_task(backbone.task, config.fields.as_ref())?;
    if config.refit.is_some() && config.valid.is_none() {
        return Err(Error::spec("`refit` needs `valid`: it fits again on train and validation")
            .with_help("name the validation table, or remove `refit`: without `valid` all of `train` is fitted on"));
    }
    if config.warm_start.is_some() && backbone.task == Task::Rating {
        return Err(Error::spec("`warm_start` is for models that rank items").with_help("remove it"));
    }
    if config.warm_epochs.is_some() && config.warm_start.is_none() {
        return Err(Error::spec("`warm_epochs` is read with `warm_start` only").with_help("remove it"));
    }
    let every = checkpoint_every(config.checkpoint_seconds)?;
    if let (None, Value::Object(full)) = (&config.hyper_from, full) {
        config.hyper = full;
    }
    let references =
        References::new(&config.train, config.valid.as_ref(), config.items.as_ref(), config.users.as_ref());
    config.items = references.items.clone();
    config.users = references.users.clone();
    Ok(Box::new(Train { config, backbone, embeds, references, every }))
}

struct Train {
    config: TrainConfig,
    backbone: &'static Backbone,
    embeds: Embeds,
    references: References,
    every: Duration,
}

/// Slot of the hyper-parameters that a search found.
const HYPER_FROM: &str = "hyper_from";
/// Slot of the model that is started from.
const WARM_START: &str = "warm_start";

#[async_trait]
impl Stage for Train {
    fn inputs(&self) -> Vec<InputSlot> {
        let mut slots = self.references.slots(self.backbone.task == Task::Rating);
        slots.extend(self.config.hyper_from.as_ref().map(|r| InputSlot::artifact(HYPER_FROM, r)));
        slots.extend(self.config.warm_start.as_ref().map(|r| InputSlot::artifact(WARM_START, r)));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        let mut outputs = vec![OutputSlot {
            name: "model",
            what: What::Artifact,
            about: "The fitted model: `model.safetensors` (weights, ids) and `model.json`.",
        }];
        if self.embeds == Embeds::Both {
            outputs.push(table("user_embeddings", "`user_id` and `embedding`, one row per user, sorted by user."));
        }
        if self.embeds != Embeds::None {
            outputs.push(table("item_embeddings", "`item_id` and `embedding`, one row per item, sorted by item."));
        }
        let about = match self.backbone.task {
            Task::Rating => "The training log: `epoch`, `loss`, `valid_rmse`, `seconds`.",
            Task::Direct | Task::Sequential => "The training log: `epoch`, `loss`, `valid_ndcg_10`, `seconds`.",
        };
        outputs.push(table("epochs", about));
        outputs
    }

    fn identity(&self) -> Value {
        let mut identity = json!(self.config);
        // How often a checkpoint is taken changes nothing but what a kill costs.
        identity.as_object_mut().map(|map| map.shift_remove("checkpoint_seconds"));
        identity
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        if let Some(fields) = &self.config.fields {
            for (side, slot) in [(Side::User, "users"), (Side::Item, "items"), (Side::Row, "train")] {
                fields.check_schema(side, slot, inputs.get(slot))?;
            }
        }
        let mut schemas = BTreeMap::from([("epochs".to_owned(), outputs::epochs_schema(self.backbone.task))]);
        for (output, id, there) in [
            ("user_embeddings", USER_ID, self.embeds == Embeds::Both),
            ("item_embeddings", ITEM_ID, self.embeds != Embeds::None),
        ] {
            if there && let Some(Ok(field)) = inputs.get("train").map(|train| train.field_with_name(id)) {
                schemas.insert(output.to_owned(), outputs::embedding_schema(id, outputs::id_type(field.data_type())));
            }
        }
        Ok(schemas)
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let hyper = match &self.config.hyper_from {
            None => Value::Object(self.config.hyper.clone()),
            Some(_) => {
                let (_, artifact) = ctx.artifact(HYPER_FROM)?;
                hyper_from::read(artifact, self.backbone, &self.config.hyper)?
            }
        };
        let warm_start = match self.config.warm_start {
            None => None,
            Some(_) => {
                let (digest, artifact) = ctx.artifact(WARM_START)?;
                if artifact.files.is_empty() {
                    ctx.observer.note("there are no earlier weights: a cold start");
                }
                (!artifact.files.is_empty()).then(|| (artifact.clone(), digest.to_owned()))
            }
        };
        let tables = Tables::collect(ctx).await?;
        let work = Work {
            backbone: self.backbone,
            hyper,
            fields: self.config.fields.clone(),
            refit: self.config.refit.is_some(),
            device: ctx.device,
            seed: ctx.seed,
            embeds: self.embeds,
            savings: Some((Savings::new(&ctx.savings), self.every)),
            warm_start,
            warm_epochs: self.config.warm_epochs,
            observer: ctx.observer.clone(),
            cancel: ctx.cancel.clone(),
        };
        tokio::task::spawn_blocking(move || work.run(&tables)).await?
    }
}

/// What goes to the worker thread.
struct Work {
    backbone: &'static Backbone,
    hyper: Value,
    fields: Option<FieldsConfig>,
    refit: bool,
    device: DeviceChoice,
    seed: u64,
    embeds: Embeds,
    savings: Option<(Savings, Duration)>,
    /// An earlier model, with its digest.
    warm_start: Option<(Artifact, String)>,
    warm_epochs: Option<u32>,
    observer: Arc<dyn Observer>,
    cancel: Cancel,
}

impl Work {
    /// The weights of an earlier fit for the users and items of this one.
    fn earlier(&self, artifact: &Artifact, data: &TrainData) -> Result<WarmStart> {
        let old = TrainedModel::from_files(&artifact.files).map_err(|e| e.at("input `warm_start`"))?;
        if old.card.model != self.backbone.name {
            return Err(Error::data(format!(
                "`warm_start` is a `{}`, and `model` is `{}`",
                old.card.model, self.backbone.name
            ))
            .with_help("name a model of the same kind, or remove `warm_start` for one night"));
        }
        let same = |old: &IdMap, new: &IdMap| old.is_empty() || old.ids().data_type() == new.ids().data_type();
        if !same(&old.users, &data.users) || !same(&old.items, &data.items) {
            return Err(Error::data("the ids of `warm_start` are of another type")
                .with_help("remove `warm_start` for one night"));
        }
        Ok(WarmStart::new(&old, &data.users, &data.items))
    }

    fn run(&self, tables: &Tables) -> Result<StageResult> {
        let task = self.backbone.task;
        let data = read_data(task, tables, self.fields.as_ref())?;
        let opened = self.device.open()?;
        self.observer.note(&opened.why);
        if self.refit && !data.has_valid() {
            self.observer.note("no held-out row can be measured: the last epoch counts as the best");
        }
        let (metric, sign) = valid_metric(task);
        let watch = FitProgress::of_stage(self.observer.clone(), self.cancel.clone(), (metric, sign));
        let savings = self.savings.as_ref().map(|(savings, every)| (savings, *every));
        let earlier =
            self.warm_start.as_ref().map(|(artifact, digest)| self.earlier(artifact, &data).map(|w| (w, digest)));
        let earlier = earlier.transpose()?;
        let warm = earlier.as_ref().map(|(warm, digest)| (warm, digest.as_str()));
        let fitter = Fitter { backbone: self.backbone, device: &opened.device, watch: &watch, savings, warm };
        let shortened = match (&warm, self.warm_epochs) {
            (Some(_), Some(epochs)) => Some(fit::for_epochs(&self.hyper, epochs as usize)),
            _ => None,
        };
        let fitted = fitter.fit(shortened.as_ref().unwrap_or(&self.hyper), self.seed, &data, self.refit)?;
        let warm_weights = warm.map(|(warm, _)| {
            let (users, items) = warm.known();
            self.observer
                .note(&format!("started from earlier weights: {} of them, {users} users, {items} items", warm.taken()));
            warm.taken()
        });
        let valid = fitted.quality.map(|quality| quality * sign);
        if let Some(valid) = valid {
            let best = match (fitted.epochs.len(), fitted.best_epoch) {
                (0, _) => String::new(),
                (ran, best) => format!("epoch {best} of {ran} is the best: "),
            };
            self.observer.note(&format!("{best}validation {metric} {valid:.4}"));
        }
        if fitted.fit_on == FitOn::TrainAndValid {
            let epochs =
                if fitted.epochs.is_empty() { String::new() } else { format!(", {} epochs", fitted.best_epoch) };
            self.observer.note(&format!("fitted again on train and validation{epochs}"));
        }
        let (interactions, measured, cold) = match &data.log {
            Log::Ranking(log) => (log.distinct(fitted.fit_on), log.valid.len(), log.cold),
            Log::Rating(log) => match fitted.fit_on {
                FitOn::Train => (log.train.ratings.len(), log.valid.ratings.len(), 0),
                FitOn::TrainAndValid => (log.both.ratings.len(), log.valid.ratings.len(), 0),
            },
        };
        let counters = [
            ("users", json!(data.users.len())),
            ("items", json!(data.items.len())),
            ("interactions", json!(interactions)),
            ("epochs", json!(fitted.epochs.len())),
            ("best_epoch", json!(fitted.best_epoch)),
            (valid_column(task), json!(valid)),
            ("valid_users", json!(measured)),
            ("valid_cold", json!(cold)),
            ("seconds_per_epoch", json!(median(fitted.epochs.iter().map(|e| e.seconds).collect()))),
            ("weights_fit_on", json!(fitted.fit_on.as_str())),
            ("device", json!(opened.device.name())),
            ("warm_weights", json!(warm_weights)),
        ];
        let mut result =
            StageResult::default().with_table("epochs", outputs::epochs_table(task, sign, &fitted.epochs)?);
        for (output, id, map, rows, there) in [
            ("user_embeddings", USER_ID, &data.users, fitted.model.user_embeddings(), self.embeds == Embeds::Both),
            ("item_embeddings", ITEM_ID, &data.items, fitted.model.item_embeddings(), self.embeds != Embeds::None),
        ] {
            if there {
                let name = self.backbone.name;
                let rows = rows.ok_or_else(|| Error::internal(format!("`{name}` has no {output}")))?;
                result = result.with_table(output, outputs::embedding_table(id, map, rows)?);
            }
        }
        let separator = (task == Task::Rating).then(|| columns::separator_of(self.fields.as_ref()));
        let model = outputs::Model { backbone: self.backbone, hyper: &self.hyper, seed: self.seed, valid, separator };
        let result = result.with_artifact("model", model.files(data, fitted)?);
        Ok(counters.into_iter().fold(result, |result, (name, value)| result.with_counter(name, value)))
    }
}

/// The tables as what a model of that task learns from.
pub(super) fn read_data(task: Task, tables: &Tables, fields: Option<&FieldsConfig>) -> Result<TrainData> {
    match task {
        Task::Rating => TrainData::rating(tables, &fields.cloned().unwrap_or_default()),
        Task::Direct | Task::Sequential => TrainData::ranking(tables),
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests;
