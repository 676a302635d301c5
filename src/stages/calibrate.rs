//! `calibrate`: which mode, a1 and a2 to fuse with, chosen on validation by the code that serves.
//!
//! In: shortlists and the LLM's ranks as of validation time for a sample of users, the
//! validation items, the long-tail coefficients, perhaps the recommender. Out: `calibration` (the choice, for `fuse`)
//! and `grid` (what was tried).

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, StringArray};
use arrow::datatypes::{DataType, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::context::{Artifact, InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::fuse::check_c;
use super::registry::StageKind;
use crate::columns::{ITEM_ID, USER_ID};
use crate::error::{Error, Result};
use crate::eval::metrics::ndcg_at;
use crate::fusion::calibration::{self, BestCell, FittedAs, Made, Rule};
use crate::fusion::{Bounds, Calibration, GridCell, LongTail, Shortlists};
use crate::recommenders::saved::read_card;
use crate::tables::Table;
use crate::tables::schemas::CALIBRATION_GRID;

/// How a pair of weights is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RuleConfig {
    /// The smallest a1, then the smallest a2, whose mean NDCG@10 is less than the best one's by at
    /// most one standard error of their paired difference.
    OneStandardError,
    /// The pair with the highest mean NDCG@10.
    HighestMean,
}

impl RuleConfig {
    fn rule(self) -> Rule {
        match self {
            RuleConfig::OneStandardError => Rule::OneStandardError,
            RuleConfig::HighestMean => Rule::HighestMean,
        }
    }

    fn name(self) -> &'static str {
        match self {
            RuleConfig::OneStandardError => "one-standard-error",
            RuleConfig::HighestMean => "highest-mean",
        }
    }
}

/// Config of a `calibrate` stage.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CalibrateConfig {
    /// The shortlists as of validation time: `user_id`, `item_id`, `rec_rank`.
    pub shortlist: String,
    /// The LLM's ranks of them for a sample of users: `user_id`, `item_id`, `llm_rank`. Or those of several modes by
    /// their names, `{ label = "rerank_label", likelihood = "rerank_titles" }`: the mode is chosen too, on the users that
    /// have ranks in all of them; earlier names of the alphabet are preferred where nothing else decides.
    pub rerank: Ranks,
    /// The validation items: `user_id`, `item_id`.
    pub valid: String,
    /// Long-tail coefficients of all users as of validation time: `user_id`, `interactions`,
    /// `long_tail_coefficient`, `bucket`. Their bounds travel with the choice.
    pub long_tail: String,
    /// The recommender that made the shortlists, an artifact of a `train` stage: its hyper-parameters and the number of
    /// its epochs go into the calibration, for `hyper_from` of the `train` stage that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The a1 that are tried, each in [0, 1]. Default [0.1, 0.3, 0.5, 0.7, 0.9] (the paper's); a1 = 0,
    /// the recommender alone, is tried in any case.
    #[serde(default = "paper_grid")]
    pub a1: Vec<f64>,
    /// The a2 that are tried with each of them, each in [0, 1). Default [0.1, 0.3, 0.5, 0.7, 0.9] (the
    /// paper's).
    #[serde(default = "paper_grid")]
    pub a2: Vec<f64>,
    /// C of the utility of a position, as in `fuse`. Above 0, default 1.
    #[serde(default = "default_c")]
    pub c: f64,
    /// How the pair is chosen. Default `one-standard-error`.
    #[serde(default = "default_rule")]
    pub rule: RuleConfig,
    /// The mode in which the LLM made the ranks, as the calibration says it, where `rerank` names one table. Default
    /// `label`.
    #[serde(default = "default_mode")]
    pub mode: String,
}

/// One table of ranks, or one per mode.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Ranks {
    /// Of the mode that `mode` names.
    One(String),
    /// Mode = ranks.
    Modes(BTreeMap<String, String>),
}

fn paper_grid() -> Vec<f64> {
    vec![0.1, 0.3, 0.5, 0.7, 0.9]
}
fn default_c() -> f64 {
    1.0
}
fn default_rule() -> RuleConfig {
    RuleConfig::OneStandardError
}
fn default_mode() -> String {
    "label".to_owned()
}

/// The `calibrate` stage kind.
pub const KIND: StageKind = StageKind {
    name: "calibrate",
    version: 2,
    about: "Chooses the LLM's mode, a1 and a2 on validation items by NDCG@10, with a one-standard-error rule toward the recommender alone.",
    sample: r#"shortlist = "valid_shortlists"
rerank = "valid_reranked"
valid = "parts.valid"
long_tail = "long_tail"
rule = "one-standard-error"
"#,
    schema: || schemars::schema_for!(CalibrateConfig),
    resolve,
};

fn resolve(value: serde_json::Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: CalibrateConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `calibrate` is wrong").because(e))?;
    check_c(config.c)?;
    calibration::grid(&config.a1, &config.a2)?;
    for (key, axis) in [("a1", &config.a1), ("a2", &config.a2)] {
        if axis.is_empty() {
            return Err(Error::spec(format!("`{key}` is empty")).with_help("name one value or more"));
        }
    }
    for mode in config.modes().keys() {
        super::rerank::Mode::parse(mode)?;
    }
    if config.modes().is_empty() {
        return Err(Error::spec("`rerank` is empty").with_help("name the ranks of one mode or more"));
    }
    Ok(Box::new(Calibrate { config }))
}

impl CalibrateConfig {
    /// Mode -> reference.
    fn modes(&self) -> BTreeMap<String, String> {
        match &self.rerank {
            Ranks::One(reference) => BTreeMap::from([(self.mode.clone(), reference.clone())]),
            Ranks::Modes(modes) => modes.clone(),
        }
    }

    /// Mode -> slot.
    fn slots(&self) -> Vec<(String, String)> {
        let one = matches!(self.rerank, Ranks::One(_));
        let slot = |mode: &String| if one { "rerank".to_owned() } else { format!("rerank.{mode}") };
        self.modes().keys().map(|mode| (mode.clone(), slot(mode))).collect()
    }
}

struct Calibrate {
    config: CalibrateConfig,
}

#[async_trait]
impl Stage for Calibrate {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = vec![InputSlot::table("shortlist", &c.shortlist, &Shortlists::COLUMNS)];
        let references = c.modes();
        let ranks = c.slots().into_iter().zip(references.values());
        slots.extend(ranks.map(|((_, slot), r)| InputSlot::table(&slot, r, &Shortlists::LLM_COLUMNS)));
        slots.push(InputSlot::table("valid", &c.valid, &[USER_ID, ITEM_ID]));
        slots.push(InputSlot::table("long_tail", &c.long_tail, &LongTail::COLUMNS));
        slots.extend(c.model.as_ref().map(|r| InputSlot::artifact("model", r)));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![
            OutputSlot {
                name: "calibration",
                what: What::Artifact,
                about: "The choice, `calibration.json`, for `calibration` of `fuse`, `prompt` and `rerank`, and `hyper_from` of `train`.",
            },
            OutputSlot { name: "grid", what: What::Table, about: "Every pair of weights and what it reached." },
        ]
    }

    /// The references are no part of it; what they name is.
    fn identity(&self) -> serde_json::Value {
        let c = &self.config;
        let modes: Vec<String> = c.modes().into_keys().collect();
        json!({ "a1": c.a1, "a2": c.a2, "c": c.c, "rule": c.rule, "modes": modes })
    }

    async fn plan_schemas(&self, _: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        Ok(BTreeMap::from([("grid".to_owned(), CALIBRATION_GRID.plain_schema())]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let shortlist = ctx.collect("shortlist").await?;
        let mut ranks = Vec::new();
        for (mode, slot) in self.config.slots() {
            ranks.push((mode, ctx.collect(&slot).await?));
        }
        let valid = ctx.collect("valid").await?;
        let long_tail = ctx.collect("long_tail").await?;
        let config = self.config.clone();
        ctx.cancel.check()?;
        let mut found =
            tokio::task::spawn_blocking(move || calibrate(&config, &shortlist, &ranks, &valid, &long_tail)).await??;
        if self.config.model.is_some() {
            let (digest, artifact) = ctx.artifact("model")?;
            let card = read_card(&artifact.files).map_err(|e| e.at("input `model`"))?;
            let epochs = (card.hyper.get("epochs").is_some() && card.best_epoch > 0).then_some(card.best_epoch as u64);
            found.calibration.recommender = Some(FittedAs {
                model: card.model,
                hyper: card.hyper,
                epochs,
                metrics: card.metrics,
                sha256: digest.to_owned(),
            });
        }
        found.calibration.made = Some(Made {
            at: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            run_id: ctx.run_id.clone(),
            from: ctx.publishing.fingerprint.clone(),
        });
        let c = &found.calibration;
        ctx.observer.note(&format!(
            "mode {}, a1 {}, a2 {} over {} users: NDCG@10 {:.4}, the recommender alone {:.4}, the best pair (a1 {}, a2 {}) {:.4}",
            c.mode, c.a1, c.a2, c.n_users, c.mean, c.recommender_mean, c.best.a1, c.best.a2, c.best.mean
        ));
        let files = [(calibration::FILE.to_owned(), c.to_bytes()?)].into();
        Ok(StageResult::default()
            .with_artifact("calibration", Artifact { files })
            .with_table("grid", grid_table(&found.modes, &found.cells)?)
            .with_counter("mode", c.mode.clone())
            .with_counter("users", c.n_users)
            .with_counter("users_without_valid", found.users_without_valid)
            .with_counter("a1", c.a1)
            .with_counter("a2", c.a2)
            .with_counter("ndcg_10", c.mean)
            .with_counter("ndcg_10_se", c.se)
            .with_counter("ndcg_10_recommender", c.recommender_mean)
            .with_counter("epochs", c.recommender.as_ref().and_then(|r| r.epochs)))
    }
}

/// What a calibration found.
#[derive(Clone, Debug)]
pub struct Calibrated {
    /// The choice.
    pub calibration: Calibration,
    /// The names of the modes.
    pub modes: Vec<String>,
    /// The grid.
    pub cells: Vec<GridCell>,
    /// Users that the LLM ranked for and that have no validation item, left out.
    pub users_without_valid: usize,
}

/// The work of the stage on tables in memory, `ranks` by mode: see [`calibration::choose`] for the rule.
pub fn calibrate(
    config: &CalibrateConfig,
    shortlist: &Table,
    ranks: &[(String, Table)],
    valid: &Table,
    long_tail: &Table,
) -> Result<Calibrated> {
    let of_mode = |(mode, table): &(String, Table)| {
        Shortlists::from_tables(shortlist, Some(table)).map_err(|e| e.at(format!("shortlists with mode `{mode}`")))
    };
    let lists = ranks.iter().map(of_mode).collect::<Result<Vec<_>>>()?;
    let modes: Vec<String> = ranks.iter().map(|(mode, _)| mode.clone()).collect();
    let long_tail = LongTail::from_table(long_tail).map_err(|e| e.at("long-tail table"))?;
    let cells = calibration::grid(&config.a1, &config.a2)?;
    let metric = |place| ndcg_at(place, calibration::CUT_OFF);
    let trial = calibration::try_cells(&lists, valid, &long_tail, cells, config.c, metric)?;
    let n_users = trial.values.first().map_or(0, Vec::len);
    let cells = calibration::choose(&trial, config.rule.rule());
    let one = |wanted: fn(&GridCell) -> bool| {
        cells.iter().copied().find(wanted).ok_or_else(|| Error::internal("a grid without a choice"))
    };
    let (chosen, best) = (one(|c| c.chosen)?, one(|c| c.best)?);
    let Bounds { l_min, l_max } = long_tail.bounds();
    let calibration = Calibration {
        version: calibration::FORMAT,
        mode: modes[chosen.mode].clone(),
        a1: chosen.a1,
        a2: chosen.a2,
        c: config.c,
        l_min,
        l_max,
        metric: calibration::METRIC.to_owned(),
        rule: config.rule.name().to_owned(),
        n_users: n_users as u64,
        mean: chosen.mean,
        recommender_mean: cells.first().map_or(0.0, |c| c.mean),
        se: chosen.mean_se,
        recommender_se: cells.first().and_then(|c| c.mean_se),
        recommender: None,
        made: None,
        best: BestCell { a1: best.a1, a2: best.a2, mean: best.mean },
    };
    Ok(Calibrated { calibration, modes, cells, users_without_valid: trial.users_without_valid })
}

/// The `grid` table.
fn grid_table(modes: &[String], cells: &[GridCell]) -> Result<Table> {
    let numbers = |of: fn(&GridCell) -> f64| Arc::new(Float64Array::from_iter_values(cells.iter().map(of))) as ArrayRef;
    let flags = |of: fn(&GridCell) -> bool| Arc::new(cells.iter().map(|c| Some(of(c))).collect::<BooleanArray>());
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(cells.iter().map(|c| &modes[c.mode]))),
        numbers(|c| c.a1),
        numbers(|c| c.a2),
        numbers(|c| c.mean),
        numbers(|c| c.difference),
        Arc::new(cells.iter().map(|c| c.se).collect::<Float64Array>()),
        flags(|c| c.best),
        flags(|c| c.chosen),
    ];
    CALIBRATION_GRID.table(&DataType::Utf8, &DataType::Utf8, arrays)
}
