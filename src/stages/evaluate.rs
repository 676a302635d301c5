//! `evaluate`: what a ranked table, or predicted ratings, are worth on held-out interactions, by bucket.
//!
//! In: the `shortlist` output of `fuse` (or any table with users, items and a rank) or predictions, and what was held
//! out. Out: `metrics`, `comparison` (a paired test), and where it is asked for `tie_orders`.

use std::collections::BTreeMap;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use super::train::savings::Savings;
use crate::columns::{BUCKET, ITEM_ID, RATING, ROW_ID, TIMESTAMP, USER_ID};
use crate::error::{Error, Result};
use crate::eval::evaluate::{EvaluateOptions, FILE_ORDER, FUSED, LLM, Protocol, RECOMMENDER, TABLE_COLUMNS, evaluate};
use crate::eval::ratings::{PREDICTION_COLUMNS, evaluate_ratings};
use crate::interactions::split::SplitRule;
use crate::recommenders::saved::read_card;
use crate::tables::schemas::{EVALUATION_COMPARISON, EVALUATION_METRICS, EVALUATION_TIES};

mod tie_orders;

pub use tie_orders::TieOrders;

/// Metrics of a ranked table, or of predicted ratings, on held-out interactions.
///
/// With `shortlist`: Hit@k and NDCG@k of recommender, LLM and fused order, by bucket, with a paired test. With `predictions`: RMSE and MAE.
///
/// Counters: `users_evaluated`, `users_not_evaluated`, `users_without_list`, `users_asked`; with `tie_orders` `draws_kept` (of an earlier run).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluateConfig {
    /// The ranked table: `user_id`, `item_id` and at least one of `rank`, `rec_rank`, `llm_rank`
    /// (1-based). The `shortlist` output of `fuse` has all three; its `recommendations` are enough
    /// for the final order alone. Use this or `predictions`.
    #[serde(default)]
    pub shortlist: Option<String>,
    /// Predicted ratings: `user_id`, `item_id`, `predicted_rating`, the output of a `predict` stage whose `pairs` are `test`.
    #[serde(default)]
    pub predictions: Option<String>,
    /// The held-out items: `user_id`, `item_id`. Users without one are not evaluated; users with one
    /// and without a list count as 0. With `predictions` also `rating`.
    pub test: String,
    /// Long-tail coefficients (`user_id`, `bucket`): the bucket of users that have no list, and of
    /// all users where the ranked table has no `bucket`.
    #[serde(default)]
    pub long_tail: Option<String>,
    /// The `model` output of the `train` stage: its card says what the weights were fitted on. `tie_orders` fits it again.
    #[serde(default)]
    pub model: Option<String>,
    /// Cut-offs of Hit@k and NDCG@k, each at least 1. Default [3, 5, 10].
    #[serde(default = "default_ks")]
    pub ks: Vec<usize>,
    /// What the order in column `rank`, or the prediction, is called in the metrics. Default `fused`, with `predictions`
    /// `recommender`; name it for a table of your own, for example `popularity`.
    #[serde(default)]
    pub system: Option<String>,
    /// What the recommender's weights were fitted on, as the metrics say it: `train` (default) or
    /// `train+valid`. With `model` its card says it, and this may be left out.
    #[serde(default)]
    pub weights_fit_on: Option<String>,
    /// How far the recommender's figures depend on the order of interactions of equal time, which the split decides by the order of the
    /// file: the output `tie_orders`. For models that rank items, split by leave-one-out; needs `model`.
    #[serde(default)]
    pub tie_orders: Option<TieOrders>,
}

fn default_ks() -> Vec<usize> {
    vec![3, 5, 10]
}

/// The `evaluate` stage kind.
pub const KIND: StageKind = StageKind {
    name: "evaluate",
    version: 2,
    about: "Metrics on held-out interactions by bucket: Hit@k and NDCG@k of ranked tables with a paired test, RMSE and MAE of predicted ratings.",
    sample: r#"shortlist = "fused.shortlist"
test = "parts.test"
ks = [3, 5, 10]
"#,
    schema: || schemars::schema_for!(EvaluateConfig),
    resolve,
};

fn resolve(value: serde_json::Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: EvaluateConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `evaluate` is wrong").because(e))?;
    if config.ks.is_empty() || config.ks.contains(&0) {
        return Err(
            Error::spec(format!("`ks` is {:?}", config.ks)).with_help("name one cut-off or more, each at least 1")
        );
    }
    let mut distinct = config.ks.clone();
    distinct.sort_unstable();
    distinct.dedup();
    if distinct.len() < config.ks.len() {
        return Err(Error::spec(format!("`ks` names a cut-off twice: {:?}", config.ks)));
    }
    let ratings = match (&config.shortlist, &config.predictions) {
        (Some(_), None) => false,
        (None, Some(_)) => true,
        (Some(_), Some(_)) => return Err(Error::spec("`shortlist` and `predictions` exclude each other")),
        (None, None) => {
            return Err(Error::spec("there is nothing to evaluate")
                .with_help("name a ranked table as `shortlist`, or predicted ratings as `predictions`"));
        }
    };
    let system = config.system.clone().unwrap_or_else(|| if ratings { RECOMMENDER } else { FUSED }.to_owned());
    if !ratings && [RECOMMENDER, LLM].contains(&system.as_str()) {
        return Err(Error::spec(format!("`system` is `{system}`"))
            .with_help("that is the name of the order in another column; take another one"));
    }
    let tie_rule = match &config.tie_orders {
        None => None,
        Some(_) if ratings => return Err(Error::spec("`tie_orders` is for ranked tables, not for `predictions`")),
        Some(_) if config.model.is_none() => {
            return Err(Error::spec("`tie_orders` needs `model`: it is fitted again for each order")
                .with_help("name the `model` output of the `train` stage"));
        }
        Some(tie_orders) => Some(tie_orders::rule(tie_orders, ctx.history_at_test)?),
    };
    Ok(Box::new(Evaluate { config, ratings, system, tie_rule, history_at_test: ctx.history_at_test.to_owned() }))
}

struct Evaluate {
    config: EvaluateConfig,
    /// Predicted ratings are evaluated, not a ranked table.
    ratings: bool,
    system: String,
    tie_rule: Option<SplitRule>,
    history_at_test: String,
}

impl Evaluate {
    /// What the weights were fitted on: as the model's card says, where it is given.
    fn weights_fit_on(&self, ctx: &StageContext) -> Result<String> {
        let given = self.config.weights_fit_on.as_deref();
        if self.config.model.is_none() {
            return Ok(given.unwrap_or("train").to_owned());
        }
        let card = read_card(&ctx.artifact("model")?.1.files).map_err(|e| e.at("input `model`"))?;
        match given {
            Some(given) if given != card.weights_fit_on => Err(Error::spec(format!(
                "`weights_fit_on` is `{given}`, and the model's card says `{}`",
                card.weights_fit_on
            ))
            .with_help("leave it out: the card knows")),
            _ => Ok(card.weights_fit_on),
        }
    }

    async fn tie_orders(&self, ctx: &StageContext, config: &TieOrders, rule: SplitRule) -> Result<StageResult> {
        let interactions = ctx.collect("tie_orders.interactions").await?;
        let artifact = ctx.artifact("model")?.1.clone();
        let work = tie_orders::Work {
            draws: config.draws,
            ks: self.config.ks.clone(),
            rule,
            device: ctx.device,
            seed: ctx.seed,
            savings: Some(Savings::new(&ctx.savings)),
            observer: ctx.observer.clone(),
            cancel: ctx.cancel.clone(),
        };
        let history_at_test = self.history_at_test.clone();
        let run = move || work.run(&interactions, &artifact, &history_at_test);
        let (table, kept) = tokio::task::spawn_blocking(run).await??;
        Ok(StageResult::default().with_table("tie_orders", table).with_counter("draws_kept", kept))
    }
}

#[async_trait]
impl Stage for Evaluate {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = Vec::new();
        slots.extend(c.shortlist.as_ref().map(|r| InputSlot::table("shortlist", r, &TABLE_COLUMNS)));
        slots.extend(c.predictions.as_ref().map(|r| InputSlot::table("predictions", r, &PREDICTION_COLUMNS)));
        let held_out: &[&'static str] = if self.ratings { &[USER_ID, ITEM_ID, RATING] } else { &[USER_ID, ITEM_ID] };
        slots.push(InputSlot::table("test", &c.test, held_out));
        slots.extend(c.long_tail.as_ref().map(|r| InputSlot::table("long_tail", r, &[USER_ID, BUCKET])));
        slots.extend(c.model.as_ref().map(|r| InputSlot::artifact("model", r)));
        slots.extend(c.tie_orders.as_ref().map(|t| {
            InputSlot::table("tie_orders.interactions", &t.interactions, &[USER_ID, ITEM_ID, ROW_ID, TIMESTAMP])
        }));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        let mut outputs = vec![
            table("metrics", "One row per system, group of users, bucket and metric."),
            table("comparison", "The paired t-test of each system against the recommender."),
        ];
        if self.config.tie_orders.is_some() {
            outputs.push(table("tie_orders", "The spread of the recommender's figures over random orders of ties."));
        }
        outputs
    }

    /// The references are no part of it; what they name is.
    fn identity(&self) -> serde_json::Value {
        let c = &self.config;
        json!({
            "ks": c.ks, "system": self.system, "ratings": self.ratings, "weights_fit_on": c.weights_fit_on,
            "history_at_test": self.history_at_test,
            "tie_orders": c.tie_orders.as_ref().map(|t| json!([t.draws, t.min_interactions])),
        })
    }

    async fn plan_schemas(&self, _: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let mut schemas = BTreeMap::from([
            ("metrics".to_owned(), EVALUATION_METRICS.plain_schema()),
            ("comparison".to_owned(), EVALUATION_COMPARISON.plain_schema()),
        ]);
        if self.config.tie_orders.is_some() {
            schemas.insert("tie_orders".to_owned(), EVALUATION_TIES.plain_schema());
        }
        Ok(schemas)
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let ratings = self.ratings;
        let table = ctx.collect(if ratings { "predictions" } else { "shortlist" }).await?;
        let test = ctx.collect("test").await?;
        let long_tail = ctx.collect_opt("long_tail").await?;
        let options = EvaluateOptions {
            ks: self.config.ks.clone(),
            system: self.system.clone(),
            protocol: Protocol {
                history_at_test: self.history_at_test.clone(),
                weights_fit_on: self.weights_fit_on(ctx)?,
                ranking: if ratings { "pairs" } else { "full" }.to_owned(),
                tie_rule: FILE_ORDER.to_owned(),
            },
        };
        ctx.cancel.check()?;
        let work = move || match ratings {
            true => evaluate_ratings(&table, &test, long_tail.as_ref(), &options),
            false => evaluate(&table, &test, long_tail.as_ref(), &options),
        };
        let found = tokio::task::spawn_blocking(work).await??;
        if !found.incomplete.is_empty() {
            ctx.observer.note(&format!(
                "not reported over all users, since the table lacks some of their places: {}",
                found.incomplete.join(", ")
            ));
        }
        let result = match (&self.config.tie_orders, self.tie_rule) {
            (Some(config), Some(rule)) => self.tie_orders(ctx, config, rule).await?,
            _ => StageResult::default(),
        };
        Ok(result
            .with_table("metrics", found.metrics)
            .with_table("comparison", found.comparison)
            .with_counter("users_evaluated", found.users_evaluated)
            .with_counter("users_not_evaluated", found.users_not_evaluated)
            .with_counter("users_without_list", found.users_without_list)
            .with_counter("users_asked", found.users_asked))
    }
}
