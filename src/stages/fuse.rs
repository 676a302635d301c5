//! `fuse`: one order per user out of the recommender's and the LLM's (eq. 5 to 7 of
//! arXiv 2401.13870).
//!
//! In: the shortlists, the LLM's ranks, the users that it was not asked for, the long-tail
//! coefficients, titles, a calibration. Out: `recommendations` (the first k) and `shortlist`
//! (all candidates), both in the columns of the fused table.

use std::collections::BTreeMap;

use arrow::array::new_empty_array;
use arrow::datatypes::{DataType, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{ITEM_ID, USER_ID};
use crate::error::{Error, Result};
use crate::fusion::{Calibration, FuseInputs, FuseOptions, LongTail, Weights, calibration, fuse_tables};
use crate::tables::IdColumn;
use crate::tables::schemas::{RECOMMENDATIONS, SHORTLIST};

/// Config of a `fuse` stage.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FuseConfig {
    /// The shortlists: `user_id`, `item_id`, `rec_rank`, `rec_score`. Items may have been filtered
    /// out of them; the places that are left are counted anew.
    pub shortlist: String,
    /// The LLM's ranks: `user_id`, `item_id`, `llm_rank`, `llm_score`, `prompt_digest`,
    /// `llm_asked_at`, and `source` where it is there. Without it every user gets the
    /// recommender's order.
    #[serde(default)]
    pub rerank: Option<String>,
    /// The users that the LLM was not asked for or failed for: `user_id`, `reason`, and `source`
    /// (`recommender` or `fallback`) where it is there. Users that neither this table nor `rerank`
    /// has get the reason `not_asked`.
    #[serde(default)]
    pub not_asked: Option<String>,
    /// Lists for users without any known interaction, of a `popular` stage: the columns of `shortlist`. Those of users who
    /// are in `shortlist` are left out. Their rows have the source `popularity` and the reason `cold_user`.
    #[serde(default)]
    pub popular: Option<String>,
    /// Long-tail coefficients: `user_id`, `interactions`, `long_tail_coefficient`, `bucket`, one
    /// row per user. A user that it lacks has no known interaction.
    pub long_tail: String,
    /// The item table, for titles: `item_id`, `title`.
    #[serde(default)]
    pub items: Option<String>,
    /// The artifact of a `calibrate` stage. It sets a1, a2, c and the bounds of the long-tail
    /// coefficient; the keys below are not used then.
    #[serde(default)]
    pub calibration: Option<String>,
    /// The recommender that made the shortlists, an artifact of a `train` stage: the rows carry the
    /// digest of its weights.
    #[serde(default)]
    pub model: Option<String>,
    /// The LLM that made the ranks, by catalogue name or path: the rows carry the digest of its
    /// weights.
    #[serde(default)]
    pub llm: Option<String>,
    /// How many items each user is recommended. At least 1, default 10.
    #[serde(default = "default_k")]
    #[schemars(range(min = 1))]
    pub k: usize,
    /// C of the utility of a position, -position * C. Above 0, default 1 (the paper's).
    #[serde(default = "default_c")]
    pub c: f64,
    /// a1 of eq. 7, the greatest weight of the LLM. In [0, 1], default 0.5; 0 leaves the
    /// recommender alone. Used where no `calibration` is named.
    #[serde(default = "default_a1")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub a1: f64,
    /// a2 of eq. 7, the floor of a user's place in the tail. In [0, 1), default 0.1. Used where no
    /// `calibration` is named.
    #[serde(default = "default_a2")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub a2: f64,
}

fn default_k() -> usize {
    10
}
fn default_c() -> f64 {
    1.0
}
fn default_a1() -> f64 {
    0.5
}
fn default_a2() -> f64 {
    0.1
}

/// The `fuse` stage kind.
pub const KIND: StageKind = StageKind {
    name: "fuse",
    version: 2,
    about: "Mixes the recommender's order with the LLM's, the LLM weighing more for users with little history.",
    sample: r#"shortlist = "shortlists"
rerank = "reranked"
not_asked = "reranked.not_asked"
long_tail = "long_tail"
items = "items"
calibration = "calibrated"
k = 10
"#,
    schema: || schemars::schema_for!(FuseConfig),
    resolve,
};

fn resolve(value: serde_json::Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: FuseConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `fuse` is wrong").because(e))?;
    Weights::new(config.a1, config.a2, "`fuse`")?;
    check_c(config.c)?;
    if config.k == 0 {
        return Err(Error::spec("`k` is 0").with_help("recommend at least one item"));
    }
    Ok(Box::new(Fuse { config }))
}

/// Refuses a C that does not order positions (exit 78).
pub(super) fn check_c(c: f64) -> Result<()> {
    match c.is_finite() && c > 0.0 {
        true => Ok(()),
        false => Err(Error::spec(format!("`c` is {c}")).with_help("`c` is a number above 0; the paper has 1")),
    }
}

/// The type that an id column has after fusion, where the schema has such a column.
fn id_type(schema: &SchemaRef, name: &str) -> Option<DataType> {
    let field = schema.field_with_name(name).ok()?;
    let empty = new_empty_array(field.data_type());
    IdColumn::try_from_array(name, &empty).ok().map(|ids| ids.data_type())
}

struct Fuse {
    config: FuseConfig,
}

#[async_trait]
impl Stage for Fuse {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = vec![
            InputSlot::table("shortlist", &c.shortlist, &FuseInputs::SHORTLIST),
            InputSlot::table("long_tail", &c.long_tail, &LongTail::COLUMNS),
        ];
        let tables: [(&str, &Option<String>, &[&'static str]); 4] = [
            ("popular", &c.popular, &FuseInputs::SHORTLIST),
            ("rerank", &c.rerank, &FuseInputs::RERANK),
            ("not_asked", &c.not_asked, &FuseInputs::NOT_ASKED),
            ("items", &c.items, &FuseInputs::ITEMS),
        ];
        for (slot, reference, columns) in tables {
            slots.extend(reference.as_ref().map(|r| InputSlot::table(slot, r, columns)));
        }
        for (slot, reference) in [("calibration", &c.calibration), ("model", &c.model)] {
            slots.extend(reference.as_ref().map(|r| InputSlot::artifact(slot, r)));
        }
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![
            OutputSlot {
                name: "recommendations",
                what: What::Table,
                about: "The fused table: the first k items of each user.",
            },
            OutputSlot {
                name: "shortlist",
                what: What::Table,
                about: "The same columns over the whole shortlist, for evaluation and audits.",
            },
        ]
    }

    /// The references are no part of it (what they name is), nor are weights that a calibration replaces.
    fn identity(&self) -> serde_json::Value {
        let c = &self.config;
        match c.calibration.is_some() {
            true => json!({ "k": c.k }),
            false => json!({ "k": c.k, "c": c.c, "a1": c.a1, "a2": c.a2 }),
        }
    }

    fn models(&self) -> Vec<String> {
        self.config.llm.iter().cloned().collect()
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name| inputs.get("shortlist").and_then(|s| id_type(s, name));
        let (Some(user), Some(item)) = (id(USER_ID), id(ITEM_ID)) else { return Ok(BTreeMap::new()) };
        let tables = [&RECOMMENDATIONS, &SHORTLIST];
        Ok(tables.into_iter().map(|t| (t.name.to_owned(), t.schema(&user, &item))).collect())
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let shortlist = ctx.collect("shortlist").await?;
        let long_tail = ctx.collect("long_tail").await?;
        let rerank = ctx.collect_opt("rerank").await?;
        let not_asked = ctx.collect_opt("not_asked").await?;
        let items = ctx.collect_opt("items").await?;
        let popular = ctx.collect_opt("popular").await?;
        let config = self.config.clone();

        let calibrated = match config.calibration.is_some() {
            true => Some(Calibration::from_bytes(ctx.artifact("calibration")?.1.file(calibration::FILE)?)?),
            false => None,
        };
        let rec_model = match config.model.is_some() {
            true => Some(ctx.artifact("model")?.0.to_owned()),
            false => None,
        };
        let llm_model = match &config.llm {
            Some(name) => Some(ctx.model(name)?.digest.clone()),
            None => None,
        };
        let options = FuseOptions {
            weights: calibrated.as_ref().map_or(Weights { a1: config.a1, a2: config.a2 }, Calibration::weights),
            c: calibrated.as_ref().map_or(config.c, |x| x.c),
            bounds: calibrated.as_ref().map(Calibration::bounds),
            k: config.k,
            run_id: ctx.run_id.clone(),
            rec_model,
            llm_model,
        };
        let weights = options.weights;
        let (rec_model, llm_model) = (options.rec_model.clone(), options.llm_model.clone());
        ctx.cancel.check()?;
        let fused = tokio::task::spawn_blocking(move || {
            let inputs = FuseInputs {
                shortlist: &shortlist,
                popular: popular.as_ref(),
                rerank: rerank.as_ref(),
                not_asked: not_asked.as_ref(),
                long_tail: &long_tail,
                items: items.as_ref(),
            };
            fuse_tables(&inputs, &options)
        })
        .await??;

        let n = fused.counts;
        if n.llm_rows_outside > 0 {
            ctx.observer.note(&format!("{} LLM ranks are of items outside of the shortlists", n.llm_rows_outside));
        }
        Ok(StageResult::default()
            .with_table("recommendations", fused.recommendations)
            .with_table("shortlist", fused.shortlist)
            .with_counter("users", n.users)
            .with_counter("users_fused", n.users_fused)
            .with_counter("users_fallback", n.users_fallback)
            .with_counter("users_popularity", n.users_popularity)
            .with_counter("users_first_place_changed", n.users_first_place_changed)
            .with_counter("users_top_k_changed", n.users_top_k_changed)
            .with_counter("candidates_without_title", n.candidates_without_title)
            .with_counter("llm_rows_outside", n.llm_rows_outside)
            .with_counter("a1", weights.a1)
            .with_counter("a2", weights.a2)
            .with_counter("rec_model", rec_model)
            .with_counter("llm_model", llm_model))
    }
}
