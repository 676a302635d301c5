//! `prompt_ratings`: rated histories and pairs -> one prompt per pair, which asks the LLM for a rating.
//!
//! In: `pairs`, `history` with ratings, `items`, perhaps `neighbours` and `predictions`. Out: `prompts`, one row per pair, for a
//! `rerank` stage in mode `rating`, and `skipped`, one row per pair without a prompt. The text is that of the instruction task
//! `rating` (arXiv 2401.13870, sections 4.3 and 4.5), so that the LLM is asked what it was tuned on.

mod cases;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, ListArray, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::cases::{Cases, Tables};
use super::context::{Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::prompt::prompt_columns;
use super::prompt::writer::{chat_digest, history_digest};
use super::registry::StageKind;
use crate::columns::{
    CANDIDATE_PLACES, CANDIDATE_TITLES, CANDIDATES, HISTORY_DIGEST, HISTORY_SHOWN, ITEM_ID, NEIGHBOUR_ID, PERMUTATION,
    POSITION, PREDICTED_RATING, PROMPT, PROMPT_DIGEST, PROMPT_TOKENS, RANK, RATING, REASON, SYSTEM, TITLE,
    TITLES_TRIMMED, USER_ID,
};
use crate::error::{Error, Result};
use crate::llm::{ChatTokenizer, Message};
use crate::prompts::{
    Budget, Fitted, InstructionFields, InstructionTask, InstructionTemplates, Line, defaults, fit, rating_text,
};
use crate::tables::Table;

/// `kind = "prompt_ratings"`.
pub const KIND: StageKind = StageKind {
    name: "prompt_ratings",
    version: 1,
    about: "Writes one prompt per pair of a user and an item that asks for the rating: rated history, candidate, prediction.",
    sample: "pairs = \"parts.test\"\nhistory = \"parts.history\"\nitems = \"items\"\nmodel = \"smollm2-135m-instruct\"\n",
    schema: || schemars::schema_for!(PromptRatingsConfig),
    resolve,
};

/// Writes one prompt per pair of a user and an item: instruction, history with the user's ratings, the candidate, a
/// similar user's history with their ratings, the recommender's prediction, output (arXiv 2401.13870, section 4.3).
///
/// A `rerank` stage in mode `rating` reads them: `llm_score` is the LLM's rating of the pair.
///
/// A pair gets no prompt, and a row in `skipped`, where the user has no known interaction (`cold_user`), where the item
/// has no title, or nothing in the history has one (`no_title`). A pair that the history has already is asked all the same.
///
/// Counters: `pairs`, `users`, `prompts`, `skipped_no_title`, `skipped_cold_user`, `repeats_dropped` (a pair is asked once),
/// `prompts_trimmed`, `titles_trimmed`, `prompt_tokens` (sum) and `prompt_tokens_max`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PromptRatingsConfig {
    /// What to ask: `user_id`, `item_id`, for instance `valid` of a `split` stage.
    pub pairs: String,
    /// What is known of each user: `user_id`, `item_id`, `position`, `rating`.
    pub history: String,
    /// The item table: `item_id`, `title`.
    pub items: String,
    /// Similar users, of a `similar` stage: `user_id`, `neighbour_id`, `rank`. The history of the most similar one that has a
    /// title in it is shown, with that user's ratings. Without this input the field is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbours: Option<String>,
    /// Predicted ratings of the pairs, of a `predict` stage: `user_id`, `item_id`, `predicted_rating`. Without this input
    /// the field is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictions: Option<String>,
    /// The LLM (catalogue name or path) whose tokenizer counts and whose context bounds the prompt.
    pub model: String,
    /// Titles of the user's history at most, the latest ones; default 30.
    #[serde(default = "defaults::history_items")]
    #[schemars(range(min = 1))]
    pub history_items: usize,
    /// Titles of the similar user's history at most, the latest ones; default 10, 0 leaves the field out.
    #[serde(default = "defaults::similar_items")]
    pub similar_items: usize,
    /// What the items are, in the plural, as the instruction calls them; default `items`.
    #[serde(default = "defaults::noun")]
    pub noun: String,
    /// File of the user message's template, relative to the pipeline's `root`; prompts/instruct.rating.jinja by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Tokens of a prompt at most, chat template included; the model's context less `answer_tokens` by default. Longer
    /// prompts lose the oldest titles of the history, then those of the similar user's, never the candidate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_tokens: Option<usize>,
    /// Tokens of the context that stay free for the answer; default 8.
    #[serde(default = "default_answer_tokens")]
    pub answer_tokens: usize,
    /// Characters of a title at most; longer ones are cut; default 120.
    #[serde(default = "defaults::max_title_chars")]
    #[schemars(range(min = 8))]
    pub max_title_chars: usize,
}

fn default_answer_tokens() -> usize {
    8
}

struct PromptRatings {
    config: PromptRatingsConfig,
    /// Sources of templates in place of the built-in one.
    own: BTreeMap<InstructionTask, String>,
}

fn resolve(config: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: PromptRatingsConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `prompt_ratings` stage").because(e))?;
    for (key, value, least) in [
        ("history_items", config.history_items, 1),
        ("max_tokens", config.max_tokens.unwrap_or(1), 1),
        ("max_title_chars", config.max_title_chars, 8),
    ] {
        if value < least {
            return Err(Error::spec(format!("`{key}` is {value}; it must be at least {least}")));
        }
    }
    let own = match &config.template {
        None => BTreeMap::new(),
        Some(file) => {
            let source = fs_err::read_to_string(ctx.root.join(file));
            let source = source.map_err(|e| Error::spec("`template` cannot be read").because(e))?;
            BTreeMap::from([(InstructionTask::Rating, source)])
        }
    };
    InstructionTemplates::new(&own)?;
    Ok(Box::new(PromptRatings { config, own }))
}

#[async_trait]
impl Stage for PromptRatings {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots = vec![
            InputSlot::table("pairs", &c.pairs, &[USER_ID, ITEM_ID]),
            InputSlot::table("history", &c.history, &[USER_ID, ITEM_ID, POSITION, RATING]),
            InputSlot::table("items", &c.items, &[ITEM_ID, TITLE]),
        ];
        let neighbours: &[&'static str] = &[USER_ID, NEIGHBOUR_ID, RANK];
        slots.extend(c.neighbours.as_ref().map(|r| InputSlot::table("neighbours", r, neighbours)));
        let predictions: &[&'static str] = &[USER_ID, ITEM_ID, PREDICTED_RATING];
        slots.extend(c.predictions.as_ref().map(|r| InputSlot::table("predictions", r, predictions)));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            table(
                "prompts",
                "One row per pair, with the columns of a `prompt` stage's `prompts`; `permutation` counts a user's pairs.",
            ),
            table("skipped", "Pairs without a prompt: `user_id`, `item_id`, `reason` (`no_title`, `cold_user`)."),
        ]
    }

    fn identity(&self) -> Value {
        let mut identity = serde_json::to_value(&self.config).unwrap_or_default();
        identity["template"] = serde_json::to_value(&self.own).unwrap_or_default();
        identity
    }

    fn models(&self) -> Vec<String> {
        vec![self.config.model.clone()]
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name: &str| inputs.get("pairs").and_then(|s| s.field_with_name(name).ok());
        let (Some(user), Some(item)) = (id(USER_ID), id(ITEM_ID)) else { return Ok(BTreeMap::new()) };
        let (user, item) = (user.data_type().clone(), item.data_type().clone());
        let skipped = [(USER_ID, user.clone()), (ITEM_ID, item.clone()), (REASON, DataType::Utf8)];
        let skipped = skipped.map(|(name, of)| Field::new(name, of, false));
        Ok(BTreeMap::from([
            ("prompts".to_owned(), prompt_columns(user, item)),
            ("skipped".to_owned(), Arc::new(Schema::new(skipped.to_vec()))),
        ]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let tables = Tables {
            pairs: ctx.collect("pairs").await?,
            history: ctx.collect("history").await?,
            items: ctx.collect("items").await?,
            neighbours: ctx.collect_opt("neighbours").await?,
            predictions: ctx.collect_opt("predictions").await?,
        };
        let model = ctx.model(&self.config.model)?.path.clone();
        let (config, own) = (self.config.clone(), self.own.clone());
        let (observer, cancel) = (ctx.observer.clone(), ctx.cancel.clone());
        tokio::task::spawn_blocking(move || {
            let tokenizer = ChatTokenizer::open(&model)?;
            let count = |messages: &[Message]| Ok(tokenizer.encode_chat(messages)?.len());
            let cases = Cases::new(&tables, config.max_title_chars)?;
            let writer = Writer::new(&config, &own, tokenizer.context_length(), &cases, &count)?;
            writer.write_all(observer.as_ref(), &cancel)
        })
        .await?
    }
}

/// Counts the tokens of a chat.
type Count<'a> = dyn Fn(&[Message]) -> Result<usize> + Sync + 'a;

/// Pairs between two looks at the stop request and the progress.
const BLOCK: usize = 1024;

/// Turns pairs into prompts.
struct Writer<'a> {
    config: &'a PromptRatingsConfig,
    templates: InstructionTemplates,
    system: String,
    /// How a user is told, whoever it is: part of every history's digest.
    told: String,
    budget: Budget,
    cases: &'a Cases,
    count: &'a Count<'a>,
}

/// What came of one pair.
enum Outcome {
    Skipped(&'static str),
    /// The prompt, and how many titles both histories have.
    Written(Fitted, usize),
}

impl<'a> Writer<'a> {
    fn new(
        config: &'a PromptRatingsConfig,
        own: &BTreeMap<InstructionTask, String>,
        context: usize,
        cases: &'a Cases,
        count: &'a Count<'a>,
    ) -> Result<Self> {
        let templates = InstructionTemplates::new(own)?;
        let system = templates.system(&config.noun)?;
        let budget = Budget { context, answer: config.answer_tokens, max_tokens: config.max_tokens };
        let mut writer = Writer { config, templates, system, told: String::new(), budget, cases, count };
        // A sample stands for the template: another template writes it otherwise.
        let line = [Line { title: "\u{1}", value: "\u{2}".to_owned() }];
        let sample = writer.text(&line, &line, "\u{3}", &["\u{4}".to_owned()])?;
        let limits = [config.history_items, config.similar_items, config.max_title_chars];
        writer.told = serde_json::json!([writer.system, sample, limits]).to_string();
        Ok(writer)
    }

    fn text(&self, history: &[Line<'_>], similar: &[Line<'_>], title: &str, prediction: &[String]) -> Result<String> {
        let fields = InstructionFields {
            noun: &self.config.noun,
            history,
            candidates: &[title],
            similar,
            prediction,
            field: "",
            range: (&self.cases.range.0, &self.cases.range.1),
        };
        self.templates.user(InstructionTask::Rating, &fields)
    }

    fn messages(&self, text: &str) -> [Message; 2] {
        [Message::new("system", self.system.as_str()), Message::new("user", text)]
    }

    fn write(&self, user: u32, item: u32) -> Result<Outcome> {
        let cases = self.cases;
        if cases.histories.of(user as usize).is_empty() {
            return Ok(Outcome::Skipped("cold_user"));
        }
        let history = cases.lines(user, self.config.history_items);
        let (Some(title), false) = (cases.title(item), history.is_empty()) else {
            return Ok(Outcome::Skipped("no_title"));
        };
        let similar = cases.similar(user, self.config.similar_items);
        let prediction: Vec<String> = cases.prediction(user, item).map(rating_text).into_iter().collect();
        let render = |h: usize, s: usize| {
            self.text(&history[history.len() - h..], &similar[similar.len() - s..], title, &prediction)
        };
        let count = |text: &str| (self.count)(&self.messages(text));
        match fit(history.len(), similar.len(), self.budget.tokens(), &render, &count)? {
            Ok(fitted) => Ok(Outcome::Written(fitted, history.len() + similar.len())),
            Err(too_long) => Err(Error::spec(format!(
                "a prompt of {} tokens without any history exceeds the {} that it may have (user `{}`)",
                too_long.tokens,
                self.budget.tokens(),
                cases.users.ids().get(user as usize)
            ))
            .with_help(self.budget.way_out(too_long.tokens))),
        }
    }

    fn write_all(&self, observer: &dyn Observer, cancel: &Cancel) -> Result<StageResult> {
        let pairs = &self.cases.pairs;
        observer.begin("pairs", pairs.len() as u64);
        let mut outcomes = Vec::with_capacity(pairs.len());
        for block in pairs.chunks(BLOCK) {
            cancel.check()?;
            // Collected before looking at errors, so that the first pair's is reported on any number of threads.
            let written: Vec<Result<Outcome>> = block.par_iter().map(|&(u, i)| self.write(u, i)).collect();
            for outcome in written {
                outcomes.push(outcome?);
            }
            observer.advance(block.len() as u64);
        }
        let skipped: Vec<((u32, u32), &str)> = (pairs.iter().zip(&outcomes))
            .filter_map(|(pair, o)| if let Outcome::Skipped(why) = o { Some((*pair, *why)) } else { None })
            .collect();
        let rows: Vec<(u32, u32, &Fitted, usize)> = (pairs.iter().zip(&outcomes))
            .filter_map(|((u, i), o)| match o {
                Outcome::Written(fitted, titles) => Some((*u, *i, fitted, titles - fitted.history - fitted.similar)),
                Outcome::Skipped(_) => None,
            })
            .collect();
        let users: std::collections::BTreeSet<u32> = pairs.iter().map(|p| p.0).collect();
        let of = |why: &str| skipped.iter().filter(|s| s.1 == why).count();
        Ok(StageResult::default()
            .with_table("prompts", self.prompts_table(&rows)?)
            .with_table("skipped", self.skipped_table(&skipped)?)
            .with_counter("pairs", pairs.len())
            .with_counter("users", users.len())
            .with_counter("prompts", rows.len())
            .with_counter("skipped_no_title", of("no_title"))
            .with_counter("skipped_cold_user", of("cold_user"))
            .with_counter("repeats_dropped", self.cases.repeats)
            .with_counter("prompts_trimmed", rows.iter().filter(|r| r.3 > 0).count())
            .with_counter("titles_trimmed", rows.iter().map(|r| r.3).sum::<usize>())
            .with_counter("prompt_tokens", rows.iter().map(|r| r.2.tokens).sum::<usize>())
            .with_counter("prompt_tokens_max", rows.iter().map(|r| r.2.tokens).max().unwrap_or(0)))
    }

    fn prompts_table(&self, rows: &[(u32, u32, &Fitted, usize)]) -> Result<Table> {
        let cases = self.cases;
        let ints = |values: Vec<i32>| -> ArrayRef { Arc::new(Int32Array::from(values)) };
        let one_each = |values: ArrayRef| -> Result<ArrayRef> {
            let field = Arc::new(Field::new_list_field(values.data_type().clone(), false));
            let offsets = OffsetBuffer::from_lengths(rows.iter().map(|_| 1));
            Ok(Arc::new(ListArray::try_new(field, offsets, values, None)?))
        };
        // Pairs are sorted by user: a user's come one after the other.
        let mut permutations = Vec::with_capacity(rows.len());
        for (row, (user, ..)) in rows.iter().enumerate() {
            let earlier = permutations.last().filter(|_| row > 0 && rows[row - 1].0 == *user);
            permutations.push(earlier.map_or(0, |p| p + 1));
        }
        let places = ints(permutations.iter().map(|p| p + 1).collect());
        let digests: Vec<String> = rows.par_iter().map(|r| chat_digest(self.messages(&r.2.text))).collect();
        let histories: Vec<String> = rows.par_iter().map(|r| history_digest(&self.told, cases.known(r.0))).collect();
        let texts = |of: &dyn Fn(usize) -> String| -> ArrayRef {
            Arc::new(StringArray::from_iter_values((0..rows.len()).map(of)))
        };
        let items = cases.items.ids().take(rows.iter().map(|r| r.1 as usize)).to_array();
        Table::from_columns(vec![
            (USER_ID, cases.users.ids().take(rows.iter().map(|r| r.0 as usize)).to_array(), false),
            (PERMUTATION, ints(permutations), false),
            (SYSTEM, texts(&|_| self.system.clone()), false),
            (PROMPT, texts(&|row| rows[row].2.text.clone()), false),
            (CANDIDATES, one_each(items)?, false),
            (CANDIDATE_TITLES, one_each(texts(&|row| cases.title(rows[row].1).unwrap_or_default().to_owned()))?, false),
            (PROMPT_TOKENS, ints(rows.iter().map(|r| r.2.tokens as i32).collect()), false),
            (HISTORY_SHOWN, ints(rows.iter().map(|r| r.2.history as i32).collect()), false),
            (TITLES_TRIMMED, ints(rows.iter().map(|r| r.3 as i32).collect()), false),
            (PROMPT_DIGEST, Arc::new(StringArray::from(digests)), false),
            (CANDIDATE_PLACES, one_each(places)?, false),
            (HISTORY_DIGEST, Arc::new(StringArray::from(histories)), false),
        ])
    }

    fn skipped_table(&self, rows: &[((u32, u32), &str)]) -> Result<Table> {
        let (users, items) = (self.cases.users.ids(), self.cases.items.ids());
        Table::from_columns(vec![
            (USER_ID, users.take(rows.iter().map(|r| r.0.0 as usize)).to_array(), false),
            (ITEM_ID, items.take(rows.iter().map(|r| r.0.1 as usize)).to_array(), false),
            (REASON, Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1))), false),
        ])
    }
}
