//! `search`: random search over hyper-parameters on validation, and what the best setting is worth on test.
//!
//! In: the tables of a `train` stage, a space, perhaps held-out test interactions. Out: `trials`, the artifact `best`
//! (`hyper.json`), and with `test` the table `confirmed`. Every fit that has ended is kept, so that a search that was
//! stopped repeats none.

use std::collections::BTreeMap;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use super::train::data::{References, Tables};
use super::train::savings::Savings;
use super::train::{FieldsConfig, Refit, check_task, checkpoint_every, default_checkpoint_seconds};
use crate::columns::{ITEM_ID, RATING, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::fields::Side;
use crate::recommenders::{Backbone, Task, registry};
use crate::tables::schemas::{SEARCH_CONFIRMED, SEARCH_TRIALS};

mod report;
mod space;
mod trials;

use space::Space;
use trials::{Confirm, Work};

/// `kind = "search"`.
pub const KIND: StageKind = StageKind {
    name: "search",
    version: 1,
    about: "Random search over a model's hyper-parameters on validation; the best setting's figures on test.",
    sample: r#"model = "lightgcn"
train = "parts.train"
valid = "parts.valid"
test = "parts.test"
history = "parts.history"
trials = 20
space = { learning_rate = { log = [1e-3, 2e-2] }, layers = [1, 2, 3], l2 = { log = [1e-5, 1e-2] } }
"#,
    schema: || schemars::schema_for!(SearchConfig),
    resolve,
};

/// Random search over a model's hyper-parameters on validation; the best setting's figures on test.
///
/// Each trial draws every hyper-parameter of `space` on its own, and is fitted for each of `seeds` seeds. The trial with the best mean on
/// validation wins (NDCG@10, or RMSE of a rating model; the earlier one where two are equal). A trial whose loss is no longer finite, or that the model
/// refuses, is a row of the table and no end of the search. Trials depend on the stage's seed, the space and nothing else; there are no two of the
/// same setting, so that a small space has fewer trials than asked for.
///
/// With `test`, the best setting is fitted for `confirm_seeds` seeds, with early stopping on validation as before, and measured on `test`:
/// these figures are reported and choose nothing. A search with an empty space is that report for the defaults.
///
/// Each fit is kept when it ends: the same command goes on where a stopped search was, and a changed space, or more trials, pay for new settings only.
///
/// Counters: `trials`, `fits` (with those that were kept), `fits_kept`, `diverged`, `best_trial`, `best_valid`, `seconds` (of the fits made now).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SearchConfig {
    /// The recommender, by its name in the list of [models](#models).
    pub model: String,
    /// What to learn from, as in a `train` stage.
    pub train: String,
    /// Held-out interactions: NDCG@10 on them, or RMSE, is what trials are compared by.
    pub valid: String,
    /// A table of all items, as in a `train` stage; also the side columns of items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<String>,
    /// A table of all users, as in a `train` stage; also the side columns of users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// Columns besides the ids that a rating model reads, as in a `train` stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fields: Option<FieldsConfig>,
    /// What each hyper-parameter may be: a list of choices, `{ uniform = [low, high] }`, `{ log = [low, high] }` (uniform in the
    /// logarithm), `{ int = [low, high] }` or `{ log_int = [low, high] }`, ends included. Numbers are rounded to four digits.
    #[serde(default)]
    pub space: Map<String, Value>,
    /// Hyper-parameters that are the same in all trials; what is neither here nor in `space` has its default.
    #[serde(default)]
    pub fixed: Map<String, Value>,
    /// Number of settings.
    #[serde(default = "default_trials")]
    #[schemars(range(min = 1, max = 100_000))]
    pub trials: u32,
    /// Seeds that each setting is fitted for; the mean counts. They are the stage's seed and those after it.
    #[serde(default = "default_seeds")]
    #[schemars(range(min = 1, max = 1000))]
    pub seeds: u32,
    /// Held-out interactions that the best setting is measured on, never used to choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<String>,
    /// What is known when test items are ranked (`X.history` of a `split` stage): these items are not ranked again.
    /// Needed with `test` for models that rank items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<String>,
    /// Seeds of the figures on `test`.
    #[serde(default = "default_confirm_seeds")]
    #[schemars(range(min = 1, max = 1000))]
    pub confirm_seeds: u32,
    /// What the weights that are measured on `test` are fitted on, where that is more than train, as in a `train` stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refit: Option<Refit>,
    /// Seconds of training that a stopped run may lose.
    #[serde(default = "default_checkpoint_seconds")]
    #[schemars(range(min = 0.0))]
    pub checkpoint_seconds: f64,
}

fn default_trials() -> u32 {
    20
}
fn default_seeds() -> u32 {
    1
}
fn default_confirm_seeds() -> u32 {
    5
}

fn resolve(value: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: SearchConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `search` is wrong").because(e))?;
    let backbone = registry::find(&config.model)?;
    check_task(backbone.task, config.fields.as_ref())?;
    let base = backbone.hyper(&Value::Object(config.fixed.clone()))?;
    let space = Space::new(&config.space, &config.fixed, backbone)?;
    let ranking = backbone.task != Task::Rating;
    match (&config.test, &config.history) {
        (Some(_), None) if ranking => {
            return Err(Error::spec("`test` needs `history`: what users have seen is not ranked again")
                .with_help("name the `history` output of the `split` stage"));
        }
        (None, Some(_)) => return Err(Error::spec("`history` is read with `test` only")),
        (Some(_), Some(_)) if !ranking => return Err(Error::spec("`history` is not read by rating models")),
        (None, None) if config.refit.is_some() => return Err(Error::spec("`refit` is read with `test` only")),
        _ => {}
    }
    let every = checkpoint_every(config.checkpoint_seconds)?;
    let references = References::new(&config.train, Some(&config.valid), config.items.as_ref(), config.users.as_ref());
    let history_at_test = ctx.history_at_test.to_owned();
    Ok(Box::new(Search { config, backbone, base, space, references, every, history_at_test }))
}

struct Search {
    config: SearchConfig,
    backbone: &'static Backbone,
    /// The model's defaults with what is fixed.
    base: Value,
    space: Space,
    references: References,
    every: Duration,
    history_at_test: String,
}

#[async_trait]
impl Stage for Search {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let rating = self.backbone.task == Task::Rating;
        let mut slots = self.references.slots(rating);
        let columns: &[&'static str] = if rating { &[USER_ID, ITEM_ID, RATING] } else { &[USER_ID, ITEM_ID] };
        slots.extend(c.test.as_ref().map(|r| InputSlot::table("test", r, columns)));
        slots.extend(c.history.as_ref().map(|r| InputSlot::table("history", r, &[USER_ID, ITEM_ID])));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let mut outputs = vec![
            OutputSlot { name: "trials", what: What::Table, about: "One row per setting and seed." },
            OutputSlot {
                name: "best",
                what: What::Artifact,
                about: "`hyper.json`: the best setting in full, for `hyper_from` of a `train` stage.",
            },
        ];
        if self.config.test.is_some() {
            let about = "The best setting on test: one row per seed and metric.";
            outputs.push(OutputSlot { name: "confirmed", what: What::Table, about });
        }
        outputs
    }

    fn identity(&self) -> Value {
        let c = &self.config;
        json!({
            "model": c.model, "base": self.base, "space": c.space, "trials": c.trials, "seeds": c.seeds, "fields": c.fields,
            "test": c.test.is_some(), "confirm_seeds": c.confirm_seeds, "refit": c.refit,
            "history_at_test": self.history_at_test,
        })
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        if let Some(fields) = &self.config.fields {
            for (side, slot) in [(Side::User, "users"), (Side::Item, "items"), (Side::Row, "train")] {
                fields.check_schema(side, slot, inputs.get(slot))?;
            }
        }
        let mut schemas = BTreeMap::from([("trials".to_owned(), SEARCH_TRIALS.plain_schema())]);
        if self.config.test.is_some() {
            schemas.insert("confirmed".to_owned(), SEARCH_CONFIRMED.plain_schema());
        }
        Ok(schemas)
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let tables = Tables::collect(ctx).await?;
        let test = ctx.collect_opt("test").await?;
        let history = ctx.collect_opt("history").await?;
        let c = &self.config;
        let settings = self.space.draw(ctx.seed, c.trials as usize);
        let work = Work {
            backbone: self.backbone,
            settings: settings.into_iter().map(|setting| self.setting(setting)).collect(),
            only_one: self.space.is_empty(),
            seeds: c.seeds,
            fields: c.fields.clone(),
            confirm: test.map(|test| Confirm {
                test,
                history,
                seeds: c.confirm_seeds,
                refit: c.refit.is_some(),
                history_at_test: self.history_at_test.clone(),
            }),
            device: ctx.device,
            seed: ctx.seed,
            savings: Some((Savings::new(&ctx.savings), self.every)),
            observer: ctx.observer.clone(),
            cancel: ctx.cancel.clone(),
        };
        tokio::task::spawn_blocking(move || work.run(&tables)).await?
    }
}

impl Search {
    fn setting(&self, drawn: Map<String, Value>) -> trials::Setting {
        let mut hyper = self.base.clone();
        if let Value::Object(full) = &mut hyper {
            full.extend(drawn.clone());
        }
        trials::Setting { drawn: Value::Object(drawn), hyper }
    }
}
