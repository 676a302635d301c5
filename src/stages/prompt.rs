//! `prompt`: shortlists, histories and titles -> the messages that the LLM is asked.
//!
//! In: `shortlist`, `history`, `items`, perhaps `neighbours`. Out: `prompts`, one row per user and
//! permutation, and `skipped`, one row per user without a prompt, with the reason. The text is made in
//! [`crate::prompts`]; here tables become titles ([`cases`]) and prompts become tables ([`writer`]).

mod cases;
pub(super) mod writer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::cases::{Cases, Tables};
use self::writer::{Writer, write_all};
use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{
    CANDIDATE_PLACES, CANDIDATE_TITLES, CANDIDATES, HISTORY_DIGEST, HISTORY_SHOWN, ITEM_ID, NEIGHBOUR_ID, PERMUTATION,
    POSITION, PROMPT, PROMPT_DIGEST, PROMPT_TOKENS, RANK, REASON, REC_RANK, SYSTEM, TITLE, TITLES_TRIMMED, USER_ID,
};
use crate::error::{Error, Result};
use crate::fusion::{Calibration, calibration};
use crate::llm::{ChatTokenizer, Message};
use crate::prompts::templates::{TOPK_SYSTEM, TOPK_USER};
use crate::prompts::{CandidateOrder, CandidateStyle, Templates, defaults};

/// `kind = "prompt"`.
pub const KIND: StageKind = StageKind {
    name: "prompt",
    version: 2,
    about: "Writes the prompt of each user: history, candidates, a similar user's history, the recommender's prediction.",
    sample: "shortlist = \"shortlist\"\nhistory = \"parts.history\"\nitems = \"items\"\nmodel = \"smollm2-135m-instruct\"\n",
    schema: || schemars::schema_for!(PromptConfig),
    resolve,
};

/// Writes the prompts of a shortlist: instruction, interaction history, candidates, a similar user's history,
/// the recommender's prediction, output (arXiv 2401.13870, section 4.3).
///
/// A user gets no prompt, and a row in `skipped`, without any known interaction (`cold_user`), with fewer than two
/// candidates that have a title, or with no title in the history (`no_title`).
///
/// Counters: `users` (with a shortlist, and in `users` where given), `prompts`, `skipped_no_title`, `skipped_cold_user`,
/// `candidates_without_title`, `history_without_title` and, among these, `history_not_in_item_table` (rows of those
/// users), `item_table_repeats` (rows of an item that an earlier row has, ignored), `prompts_trimmed` and `titles_trimmed`
/// (for the token budget), `prompt_tokens` (sum) and `prompt_tokens_max`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PromptConfig {
    /// The recommender's shortlists: `user_id`, `item_id`, `rec_rank`.
    pub shortlist: String,
    /// What is known of each user: `user_id`, `item_id`, `position`. Take `history` of a `split` stage to rank
    /// test items, `train` to rank validation items.
    pub history: String,
    /// The item table: `item_id`, `title`. Items that it lacks, or whose title is null or empty, are not shown to the LLM.
    pub items: String,
    /// Similar users, of a `similar` stage: `user_id`, `neighbour_id`, `rank`. The most similar one with a title
    /// in the history is shown. Without this input the field is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbours: Option<String>,
    /// The similar users' interactions: `user_id`, `item_id`, `position`. `history` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbour_history: Option<String>,
    /// Only users who occur in this table's `user_id` get a prompt, for instance `valid` of a `split` stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// The LLM (catalogue name or path) whose tokenizer counts and whose context bounds the prompt.
    pub model: String,
    /// Titles of the user's history at most, the latest ones; default 30.
    #[serde(default = "defaults::history_items")]
    #[schemars(range(min = 1))]
    pub history_items: usize,
    /// Titles of the similar user's history at most, the latest ones; default 10, 0 leaves the field out.
    #[serde(default = "defaults::similar_items")]
    pub similar_items: usize,
    /// Titles of the recommender's prediction, its best ones; default 5, 0 leaves the field out.
    #[serde(default = "defaults::prediction_items")]
    pub prediction_items: usize,
    /// How candidates are listed: `letters` for `mode = "label"` (the default), `titles` for `likelihood` and `generate`.
    #[serde(default)]
    pub candidate_style: CandidateStyle,
    /// A calibration: the style that its mode needs, in place of `candidate_style`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// Prompts per user, each with another order of the candidates; default 1.
    #[serde(default = "default_permutations")]
    #[schemars(range(min = 1, max = 100))]
    pub permutations: u32,
    /// Order of the candidates in a user's first prompt: `shuffled` (default) or `recommender`. All later
    /// permutations are shuffled. Shuffles depend on the seed and the user's id.
    #[serde(default)]
    pub order: CandidateOrder,
    /// What the items are, in the plural, as the instruction calls them; default `items`.
    #[serde(default = "defaults::noun")]
    pub noun: String,
    /// File of the system message's template, relative to the pipeline's `root`; prompts/topk.system.jinja by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_template: Option<String>,
    /// File of the user message's template, relative to the pipeline's `root`; prompts/topk.user.jinja by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_template: Option<String>,
    /// Tokens of a prompt at most, chat template included; the model's context less `answer_tokens` by default.
    /// Longer prompts lose the oldest titles of the history, then those of the similar user's, never a candidate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_tokens: Option<usize>,
    /// Tokens of the context that stay free for the answer; default 64.
    #[serde(default = "default_answer_tokens")]
    pub answer_tokens: usize,
    /// Characters of a title at most; longer ones are cut; default 120.
    #[serde(default = "defaults::max_title_chars")]
    #[schemars(range(min = 8))]
    pub max_title_chars: usize,
}

fn default_permutations() -> u32 {
    1
}
fn default_answer_tokens() -> usize {
    64
}

struct PromptStage {
    config: PromptConfig,
    system_template: String,
    user_template: String,
}

fn resolve(config: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: PromptConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `prompt` stage").because(e))?;
    for (key, value, least) in [
        ("history_items", config.history_items, 1),
        ("permutations", config.permutations as usize, 1),
        ("max_tokens", config.max_tokens.unwrap_or(1), 1),
        ("max_title_chars", config.max_title_chars, 8),
    ] {
        if value < least {
            return Err(Error::spec(format!("`{key}` is {value}; it must be at least {least}")));
        }
    }
    if config.neighbour_history.is_some() && config.neighbours.is_none() {
        return Err(Error::spec("`neighbour_history` is read with `neighbours` only")
            .with_help("name the output of a `similar` stage in `neighbours`, or remove the key"));
    }
    let system_template = template("system_template", &config.system_template, TOPK_SYSTEM, ctx.root)?;
    let user_template = template("user_template", &config.user_template, TOPK_USER, ctx.root)?;
    Templates::new(&system_template, &user_template)?;
    Ok(Box::new(PromptStage { config, system_template, user_template }))
}

fn template(key: &str, file: &Option<String>, built_in: &str, root: &Path) -> Result<String> {
    match file {
        None => Ok(built_in.to_owned()),
        Some(file) => fs_err::read_to_string(root.join(file))
            .map_err(|e| Error::spec(format!("`{key}` cannot be read")).because(e)),
    }
}

#[async_trait]
impl Stage for PromptStage {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut inputs = vec![
            InputSlot::table("shortlist", &c.shortlist, &[USER_ID, ITEM_ID, REC_RANK]),
            InputSlot::table("history", &c.history, &[USER_ID, ITEM_ID, POSITION]),
            InputSlot::table("items", &c.items, &[ITEM_ID, TITLE]),
        ];
        if let Some(reference) = &c.neighbours {
            inputs.push(InputSlot::table("neighbours", reference, &[USER_ID, NEIGHBOUR_ID, RANK]));
        }
        if let Some(reference) = &c.neighbour_history {
            inputs.push(InputSlot::table("neighbour_history", reference, &[USER_ID, ITEM_ID, POSITION]));
        }
        if let Some(reference) = &c.users {
            inputs.push(InputSlot::table("users", reference, &[USER_ID]));
        }
        inputs.extend(c.calibration.as_ref().map(|r| InputSlot::artifact("calibration", r)));
        inputs
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            table("prompts", "One row per user and permutation: the messages, the candidates as shown, token counts."),
            table("skipped", "Users without a prompt: `user_id`, `reason` (`no_title`, `cold_user`)."),
        ]
    }

    fn identity(&self) -> Value {
        let mut identity = serde_json::to_value(&self.config).unwrap_or_default();
        identity["system_template"] = self.system_template.clone().into();
        identity["user_template"] = self.user_template.clone().into();
        identity
    }

    fn models(&self) -> Vec<String> {
        vec![self.config.model.clone()]
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name: &str| inputs.get("shortlist").and_then(|s| s.field_with_name(name).ok());
        let (Some(user), Some(item)) = (id(USER_ID), id(ITEM_ID)) else { return Ok(BTreeMap::new()) };
        let (user, item) = (user.data_type().clone(), item.data_type().clone());
        let skipped = [(USER_ID, user.clone()), (REASON, DataType::Utf8)].map(|(name, of)| Field::new(name, of, false));
        Ok(BTreeMap::from([
            ("prompts".to_owned(), prompt_columns(user, item)),
            ("skipped".to_owned(), Arc::new(Schema::new(skipped.to_vec()))),
        ]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let tables = Tables {
            shortlist: ctx.collect("shortlist").await?,
            history: ctx.collect("history").await?,
            items: ctx.collect("items").await?,
            neighbours: ctx.collect_opt("neighbours").await?,
            neighbour_history: ctx.collect_opt("neighbour_history").await?,
            users: ctx.collect_opt("users").await?,
        };
        let model = ctx.model(&self.config.model)?.path.clone();
        let templates = Templates::new(&self.system_template, &self.user_template)?;
        let (mut config, seed) = (self.config.clone(), ctx.seed);
        if config.calibration.is_some() {
            let chosen = Calibration::from_bytes(ctx.artifact("calibration")?.1.file(calibration::FILE)?)?;
            config.candidate_style = match super::rerank::Mode::parse(&chosen.mode)? {
                super::rerank::Mode::Label => CandidateStyle::Letters,
                _ => CandidateStyle::Titles,
            };
        }
        let (observer, cancel) = (ctx.observer.clone(), ctx.cancel.clone());
        tokio::task::spawn_blocking(move || {
            let tokenizer = ChatTokenizer::open(&model)?;
            let count = |messages: &[Message]| Ok(tokenizer.encode_chat(messages)?.len());
            let writer = Writer::new(&config, seed, templates, tokenizer.context_length(), &count)?;
            let cases = Cases::new(&tables, config.max_title_chars)?;
            write_all(&writer, &cases, observer.as_ref(), &cancel)
        })
        .await?
    }
}

/// Schema of `prompts`, given the types of both ids.
pub(super) fn prompt_columns(user: DataType, item: DataType) -> SchemaRef {
    let list = |kind: DataType| DataType::List(Arc::new(Field::new_list_field(kind, false)));
    let columns = [
        (USER_ID, user),
        (PERMUTATION, DataType::Int32),
        (SYSTEM, DataType::Utf8),
        (PROMPT, DataType::Utf8),
        (CANDIDATES, list(item)),
        (CANDIDATE_TITLES, list(DataType::Utf8)),
        (PROMPT_TOKENS, DataType::Int32),
        (HISTORY_SHOWN, DataType::Int32),
        (TITLES_TRIMMED, DataType::Int32),
        (PROMPT_DIGEST, DataType::Utf8),
        (CANDIDATE_PLACES, list(DataType::Int32)),
        (HISTORY_DIGEST, DataType::Utf8),
    ];
    Arc::new(Schema::new(columns.map(|(name, of)| Field::new(name, of, false)).to_vec()))
}

#[cfg(test)]
mod tests;
