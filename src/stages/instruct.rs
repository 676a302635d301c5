//! `instruct`: train interactions and titles -> the instructions that the LLM is tuned on.
//!
//! In: `train`, `items`, perhaps `neighbours`, a fitted recommender, predicted ratings. Out: `instructions`, one row
//! each, and `counts`. The text is made in [`crate::prompts::instructions`]; here tables become titles ([`world`]), draws
//! become examples ([`examples`]), and examples a mixture without repeats ([`mixture`]).
//!
//! Nothing that was held out can be in an example's history or answer: the stage has no input that holds it. A held-out item can be
//! a candidate that is not chosen, since "unseen" means unseen in train; if it could not, its absence would give it away.

mod examples;
mod mixture;
#[cfg(test)]
mod tests;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::examples::Maker;
use self::mixture::mix;
use self::world::{Tables, World};
use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{ITEM_ID, NEIGHBOUR_ID, POSITION, PREDICTED_RATING, RANK, RATING, TITLE, USER_ID};
use crate::error::{Error, Result};
use crate::llm::{ChatTokenizer, Message};
use crate::prompts::templates::{TOPK_SYSTEM, TOPK_USER};
use crate::prompts::{CandidateStyle, InstructionTask, InstructionTemplates, LETTERS, Templates, defaults};
use crate::tables::schemas::{INSTRUCTION_COUNTS, INSTRUCTIONS};

/// `kind = "instruct"`.
pub const KIND: StageKind = StageKind {
    name: "instruct",
    version: 1,
    about: "Builds the instructions that the LLM is tuned on, from train interactions only.",
    sample: "train = \"parts.train\"\nitems = \"items\"\nmodel = \"smollm2-135m-instruct\"\n",
    schema: || schemars::schema_for!(InstructConfig),
    resolve,
};

/// Builds the instructions that the LLM is tuned on: pairwise preference, list preference, side information, top-k ranking
/// and rating, the last two with and without augmented fields (arXiv 2401.13870, sections 4.2, 4.3 and 4.5).
///
/// Each is made of one train interaction of a user: what came before it is the history, the item itself is the answer, and
/// the other candidates are drawn from the items that are unseen in train. Validation and test interactions are in no
/// example: they are no input. As items that were not chosen they can occur.
///
/// Users with fewer than `min_interactions` train interactions are left out, and so are repeats of an instruction. All
/// instructions of one user are in the same `split`.
///
/// Counters: `users` (of `train`), `users_too_few`, `users_held_out`, `instructions`, `augmented`, `duplicates_dropped`, `no_example`
/// (drawn interactions of which nothing could be made: no title, no earlier item, nothing unseen), `too_long` (left out for
/// `max_tokens`), `trimmed` (lost titles of a history for it), `tokens`, `tokens_max`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstructConfig {
    /// Train interactions: `user_id`, `item_id`, `position`; for the task `rating` also `rating`.
    pub train: String,
    /// The item table: `item_id`, `title`, and what `side_columns` names. Items without a title are in no example.
    pub items: String,
    /// The LLM (catalogue name or path) whose tokenizer counts and whose chat template is used.
    pub model: String,
    /// The tasks that are mixed. By default all; `side_info` only with `side_columns`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks: Option<Vec<InstructionTask>>,
    /// Instructions of each task at most; default 5000, as in the paper.
    #[serde(default = "default_per_task")]
    #[schemars(range(min = 1))]
    pub per_task: usize,
    /// Columns of the item table that `side_info` fills in, such as `genres`; null and empty values are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub side_columns: Vec<String>,
    /// Similar users, of a `similar` stage over embeddings that were fitted on train: `user_id`, `neighbour_id`, `rank`.
    /// The train history of the most similar one augments `ranking` and `rating`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbours: Option<String>,
    /// A recommender, the `model` output of a `train` stage that was fitted on train: its best candidates augment `ranking`.
    /// It has seen the answer when it was fitted, so it looks better here than it will be; a model of an earlier split is
    /// more honest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recommender: Option<String>,
    /// Predicted ratings of train interactions, of a `predict` stage: `user_id`, `item_id`, `predicted_rating`. They augment `rating`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictions: Option<String>,
    /// Share of `ranking` and `rating` that is augmented, where there is something to augment with; default .5.
    #[serde(default = "half")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub augmented_share: f64,
    /// Share of the users whose instructions are `held-out`; default .05.
    #[serde(default = "default_held_out_share")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub held_out_share: f64,
    /// Users with fewer train interactions are left out; default 3, as in the paper.
    #[serde(default = "default_min_interactions")]
    #[schemars(range(min = 1))]
    pub min_interactions: usize,
    /// Titles of a history (and examples of `side_info`) at most, the latest ones; default 30.
    #[serde(default = "defaults::history_items")]
    #[schemars(range(min = 1))]
    pub history_items: usize,
    /// Titles of the similar user's history at most; default 10, 0 leaves the field out.
    #[serde(default = "defaults::similar_items")]
    pub similar_items: usize,
    /// Titles of the recommender's prediction; default 5, 0 leaves the field out.
    #[serde(default = "defaults::prediction_items")]
    pub prediction_items: usize,
    /// Candidates of a `ranking`; default 20.
    #[serde(default = "default_candidates")]
    #[schemars(range(min = 2, max = 1000))]
    pub candidates: usize,
    /// Items of a `list`; default 10.
    #[serde(default = "default_list_items")]
    #[schemars(range(min = 2, max = 1000))]
    pub list_items: usize,
    /// How `ranking` lists candidates, as in the `prompt` stage whose prompts will be asked: with `letters` (the default) the
    /// answer is the next item's letter; with `titles` it is all titles, the next item's first, then those of the
    /// recommender's order, or without one by their number of train interactions.
    #[serde(default)]
    pub candidate_style: CandidateStyle,
    /// What the items are, in the plural; default `items`.
    #[serde(default = "defaults::noun")]
    pub noun: String,
    /// Own templates, task = file relative to the pipeline's `root`: `pairwise`, `list`, `side_info`, `rating`. For `ranking` see
    /// `system_template` and `user_template`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub templates: BTreeMap<InstructionTask, String>,
    /// The system template of `ranking`, as in the `prompt` stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_template: Option<String>,
    /// The user template of `ranking`, as in the `prompt` stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_template: Option<String>,
    /// Tokens of a conversation at most, answer included; default 2048 (the paper's), and never more than the model's context. A
    /// longer one loses the oldest titles of its histories.
    #[serde(default = "default_max_tokens")]
    #[schemars(range(min = 1))]
    pub max_tokens: usize,
    /// Characters of a title (and of a side column's value) at most; default 120.
    #[serde(default = "defaults::max_title_chars")]
    #[schemars(range(min = 8))]
    pub max_title_chars: usize,
}

fn default_per_task() -> usize {
    5000
}
fn half() -> f64 {
    0.5
}
fn default_held_out_share() -> f64 {
    0.05
}
fn default_min_interactions() -> usize {
    3
}
fn default_candidates() -> usize {
    20
}
fn default_list_items() -> usize {
    10
}
fn default_max_tokens() -> usize {
    2048
}

impl InstructConfig {
    /// The tasks, each once, in the order of the docs.
    fn tasks(&self) -> Vec<InstructionTask> {
        let wanted: BTreeSet<InstructionTask> = match &self.tasks {
            Some(tasks) => tasks.iter().copied().collect(),
            None => InstructionTask::ALL
                .into_iter()
                .filter(|t| *t != InstructionTask::SideInfo || !self.side_columns.is_empty())
                .collect(),
        };
        wanted.into_iter().collect()
    }

    fn check(&self) -> Result<()> {
        for (key, value, least) in [
            ("per_task", self.per_task, 1),
            ("min_interactions", self.min_interactions, 1),
            ("history_items", self.history_items, 1),
            ("candidates", self.candidates, 2),
            ("list_items", self.list_items, 2),
            ("max_tokens", self.max_tokens, 1),
            ("max_title_chars", self.max_title_chars, 8),
        ] {
            if value < least {
                return Err(Error::spec(format!("`{key}` is {value}; it must be at least {least}")));
            }
        }
        for (key, share) in [("augmented_share", self.augmented_share), ("held_out_share", self.held_out_share)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::spec(format!("`{key}` is {share}; it must be between 0 and 1")));
            }
        }
        let tasks = self.tasks();
        if tasks.is_empty() {
            return Err(Error::spec("`tasks` is empty").with_help("name at least one task, or remove the key"));
        }
        if tasks.contains(&InstructionTask::SideInfo) && self.side_columns.is_empty() {
            return Err(Error::spec("the task `side_info` needs `side_columns`").with_help(
                "name columns of the item table, such as side_columns = [\"genres\"], or leave the task out",
            ));
        }
        if self.candidate_style == CandidateStyle::Letters && self.candidates > LETTERS {
            return Err(Error::spec(format!(
                "`candidates` is {}, more than the {LETTERS} letters that can name them",
                self.candidates
            ))
            .with_help("give at most 26, or set candidate_style = \"titles\""));
        }
        if self.templates.contains_key(&InstructionTask::Ranking) {
            return Err(Error::spec("`templates.ranking` is not read")
                .with_help("give `system_template` and `user_template`, as in the `prompt` stage"));
        }
        Ok(())
    }
}

struct InstructStage {
    config: InstructConfig,
    texts: Texts,
}

/// Sources of the templates.
#[derive(Clone)]
struct Texts {
    system: String,
    user: String,
    own: BTreeMap<InstructionTask, String>,
}

impl Texts {
    fn compile(&self) -> Result<(Templates, InstructionTemplates)> {
        Ok((Templates::new(&self.system, &self.user)?, InstructionTemplates::new(&self.own)?))
    }
}

fn resolve(config: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: InstructConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of an `instruct` stage").because(e))?;
    config.check()?;
    let text = |key: &str, file: Option<&String>, built_in: &str| match file {
        None => Ok(built_in.to_owned()),
        Some(file) => read(ctx.root, key, file),
    };
    let own = config.templates.iter();
    let texts = Texts {
        system: text("system_template", config.system_template.as_ref(), TOPK_SYSTEM)?,
        user: text("user_template", config.user_template.as_ref(), TOPK_USER)?,
        own: own.map(|(task, file)| Ok((*task, read(ctx.root, "templates", file)?))).collect::<Result<_>>()?,
    };
    texts.compile()?;
    Ok(Box::new(InstructStage { config, texts }))
}

fn read(root: &Path, key: &str, file: &str) -> Result<String> {
    fs_err::read_to_string(root.join(file)).map_err(|e| Error::spec(format!("`{key}` cannot be read")).because(e))
}

#[async_trait]
impl Stage for InstructStage {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let rating = c.tasks().contains(&InstructionTask::Rating);
        let train: &[&'static str] =
            if rating { &[USER_ID, ITEM_ID, POSITION, RATING] } else { &[USER_ID, ITEM_ID, POSITION] };
        let mut slots =
            vec![InputSlot::table("train", &c.train, train), InputSlot::table("items", &c.items, &[ITEM_ID, TITLE])];
        let neighbours: &[&'static str] = &[USER_ID, NEIGHBOUR_ID, RANK];
        slots.extend(c.neighbours.as_ref().map(|r| InputSlot::table("neighbours", r, neighbours)));
        slots.extend(c.recommender.as_ref().map(|r| InputSlot::artifact("recommender", r)));
        let predictions: &[&'static str] = &[USER_ID, ITEM_ID, PREDICTED_RATING];
        slots.extend(c.predictions.as_ref().map(|r| InputSlot::table("predictions", r, predictions)));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            table("instructions", "The instructions; see [the table](tables.md#instructinstructions)."),
            table("counts", "Instructions per task; see [the table](tables.md#instructcounts)."),
        ]
    }

    fn identity(&self) -> Value {
        let mut identity = serde_json::to_value(&self.config).unwrap_or_default();
        identity["system_template"] = self.texts.system.clone().into();
        identity["user_template"] = self.texts.user.clone().into();
        identity["templates"] = serde_json::to_value(&self.texts.own).unwrap_or_default();
        identity
    }

    fn models(&self) -> Vec<String> {
        vec![self.config.model.clone()]
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name: &str| inputs.get("train").and_then(|s| s.field_with_name(name).ok());
        let (Some(user), Some(item)) = (id(USER_ID), id(ITEM_ID)) else { return Ok(BTreeMap::new()) };
        Ok(BTreeMap::from([
            ("instructions".to_owned(), INSTRUCTIONS.schema(user.data_type(), item.data_type())),
            ("counts".to_owned(), INSTRUCTION_COUNTS.plain_schema()),
        ]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let recommender = match self.config.recommender {
            Some(_) => Some(ctx.artifact("recommender")?.1.clone()),
            None => None,
        };
        let tables = Tables {
            train: ctx.collect("train").await?,
            items: ctx.collect("items").await?,
            neighbours: ctx.collect_opt("neighbours").await?,
            predictions: ctx.collect_opt("predictions").await?,
            recommender,
        };
        let model = ctx.model(&self.config.model)?.path.clone();
        let (config, texts, seed) = (self.config.clone(), self.texts.clone(), ctx.seed);
        let (observer, cancel) = (ctx.observer.clone(), ctx.cancel.clone());
        tokio::task::spawn_blocking(move || {
            let tokenizer = ChatTokenizer::open(&model)?;
            let count = |messages: &[Message]| Ok(tokenizer.encode_conversation(messages, false)?.len());
            let budget = config.max_tokens.min(tokenizer.context_length());
            let world = World::new(&tables, &config)?;
            let maker = Maker::new(&config, &world, texts.compile()?, (seed, budget), &count)?;
            mix(&maker, observer.as_ref(), &cancel)
        })
        .await?
    }
}
