//! `evaluate`: what a ranked table is worth on the held-out items, by bucket, with a paired test.
//!
//! In: the `shortlist` output of `fuse` (or any table with users, items and a rank) and the
//! held-out items. Out: `metrics` and `comparison`.

use std::collections::BTreeMap;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{BUCKET, ITEM_ID, USER_ID};
use crate::error::{Error, Result};
use crate::eval::evaluate::{EvaluateOptions, FUSED, LLM, Protocol, RECOMMENDER, TABLE_COLUMNS, evaluate};
use crate::tables::schemas::{EVALUATION_COMPARISON, EVALUATION_METRICS};

/// Config of an `evaluate` stage.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluateConfig {
    /// The ranked table: `user_id`, `item_id` and at least one of `rank`, `rec_rank`, `llm_rank`
    /// (1-based). The `shortlist` output of `fuse` has all three; its `recommendations` are enough
    /// for the final order alone.
    pub shortlist: String,
    /// The held-out items: `user_id`, `item_id`. Users without one are not evaluated; users with one
    /// and without a list count as 0.
    pub test: String,
    /// Long-tail coefficients (`user_id`, `bucket`): the bucket of users that have no list, and of
    /// all users where the ranked table has no `bucket`.
    #[serde(default)]
    pub long_tail: Option<String>,
    /// Cut-offs of Hit@k and NDCG@k, each at least 1. Default [3, 5, 10].
    #[serde(default = "default_ks")]
    pub ks: Vec<usize>,
    /// What the order in column `rank` is called in the metrics. Default `fused`; name it for a
    /// table of your own, for example `popularity`.
    #[serde(default = "default_system")]
    pub system: String,
    /// What the recommender's weights were fitted on, as the metrics say it: `train` (default) or
    /// `train+valid`.
    #[serde(default = "default_fit")]
    pub weights_fit_on: String,
}

fn default_ks() -> Vec<usize> {
    vec![3, 5, 10]
}
fn default_system() -> String {
    FUSED.to_owned()
}
fn default_fit() -> String {
    "train".to_owned()
}

/// The `evaluate` stage kind.
pub const KIND: StageKind = StageKind {
    name: "evaluate",
    version: 1,
    about: "Hit@k and NDCG@k of recommender, LLM and fused order on the held-out items, by bucket, with a paired test.",
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
    if [RECOMMENDER, LLM].contains(&config.system.as_str()) {
        return Err(Error::spec(format!("`system` is `{}`", config.system))
            .with_help("that is the name of the order in another column; take another one"));
    }
    Ok(Box::new(Evaluate { config, history_at_test: ctx.history_at_test.to_owned() }))
}

struct Evaluate {
    config: EvaluateConfig,
    history_at_test: String,
}

#[async_trait]
impl Stage for Evaluate {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = vec![
            InputSlot::table("shortlist", &c.shortlist, &TABLE_COLUMNS),
            InputSlot::table("test", &c.test, &[USER_ID, ITEM_ID]),
        ];
        slots.extend(c.long_tail.as_ref().map(|r| InputSlot::table("long_tail", r, &[USER_ID, BUCKET])));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![
            OutputSlot {
                name: "metrics",
                what: What::Table,
                about: "One row per system, group of users, bucket and metric.",
            },
            OutputSlot {
                name: "comparison",
                what: What::Table,
                about: "The paired t-test of each system against the recommender.",
            },
        ]
    }

    /// The references are no part of it; what they name is.
    fn identity(&self) -> serde_json::Value {
        let c = &self.config;
        json!({
            "ks": c.ks, "system": c.system, "weights_fit_on": c.weights_fit_on, "history_at_test": self.history_at_test,
        })
    }

    async fn plan_schemas(&self, _: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        Ok(BTreeMap::from([
            ("metrics".to_owned(), EVALUATION_METRICS.plain_schema()),
            ("comparison".to_owned(), EVALUATION_COMPARISON.plain_schema()),
        ]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let table = ctx.collect("shortlist").await?;
        let test = ctx.collect("test").await?;
        let long_tail = ctx.collect_opt("long_tail").await?;
        let options = EvaluateOptions {
            ks: self.config.ks.clone(),
            system: self.config.system.clone(),
            protocol: Protocol {
                history_at_test: self.history_at_test.clone(),
                weights_fit_on: self.config.weights_fit_on.clone(),
                ranking: "full".to_owned(),
                tie_rule: "file order".to_owned(),
            },
        };
        ctx.cancel.check()?;
        let found =
            tokio::task::spawn_blocking(move || evaluate(&table, &test, long_tail.as_ref(), &options)).await??;
        if !found.incomplete.is_empty() {
            ctx.observer.note(&format!(
                "not reported over all users, since the table lacks some of their places: {}",
                found.incomplete.join(", ")
            ));
        }
        Ok(StageResult::default()
            .with_table("metrics", found.metrics)
            .with_table("comparison", found.comparison)
            .with_counter("users_evaluated", found.users_evaluated)
            .with_counter("users_not_evaluated", found.users_not_evaluated)
            .with_counter("users_without_list", found.users_without_list)
            .with_counter("users_asked", found.users_asked))
    }
}
