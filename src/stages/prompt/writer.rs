//! One user's titles -> prompts, and prompts -> tables.
//!
//! In: [`Cases`]. Out: the tables `prompts` and `skipped` with the stage's counters.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, ListArray, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::Field;
use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::PromptConfig;
use super::cases::Cases;
use crate::columns::{
    CANDIDATE_PLACES, CANDIDATE_TITLES, CANDIDATES, HISTORY_DIGEST, HISTORY_SHOWN, PERMUTATION, PROMPT, PROMPT_DIGEST,
    PROMPT_TOKENS, REASON, SYSTEM, TITLES_TRIMMED, USER_ID,
};
use crate::error::Result;
use crate::interactions::Histories;
use crate::llm::Message;
use crate::prompts::topk::prompts_of;
use crate::prompts::{Budget, Fields, Templates, TopkOptions, TopkPrompt, UserCase};
use crate::stages::context::{Cancel, Observer, StageResult};
use crate::tables::{IdColumn, Table};

/// Users between two looks at the stop request and the progress.
const BLOCK: usize = 256;

/// Counts the tokens of a chat.
pub(super) type CountChat<'a> = dyn Fn(&[Message]) -> Result<usize> + Sync + 'a;

/// Turns one user's titles into prompts.
pub(super) struct Writer<'a> {
    options: TopkOptions,
    templates: Templates,
    system: String,
    /// How a user is told, whoever it is: part of every history's digest.
    told: String,
    count: &'a CountChat<'a>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        config: &PromptConfig,
        seed: u64,
        templates: Templates,
        context: usize,
        count: &'a CountChat<'a>,
    ) -> Result<Self> {
        let options = TopkOptions {
            noun: config.noun.clone(),
            style: config.candidate_style,
            history_items: config.history_items,
            similar_items: config.similar_items,
            prediction_items: config.prediction_items,
            permutations: config.permutations,
            order: config.order,
            seed,
            budget: Budget { context, answer: config.answer_tokens, max_tokens: config.max_tokens },
        };
        let system = templates.system(&options.noun, options.style)?;
        // A sample stands for the template: another template writes it otherwise.
        let sample = ["\u{1}", "\u{2}"];
        let (noun, style) = (options.noun.as_str(), options.style);
        let (history, candidates, similar, prediction) = (&sample[..], &sample[..], &sample[..1], &sample[..1]);
        let sample = templates.user(&Fields { noun, style, history, candidates, similar, prediction })?;
        let limits = [config.history_items, config.similar_items, config.prediction_items, config.max_title_chars];
        let told = serde_json::json!([system, sample, limits, config.permutations, config.order]).to_string();
        Ok(Writer { options, templates, system, told, count })
    }

    /// sha256 (hex) over what is known of a user, oldest first, and how prompts tell it. Neither the candidates nor what the
    /// recommender adds (a similar user, its prediction) is in it: both change whenever it is trained.
    fn history_digest(&self, items: &[u32], ids: &IdColumn) -> String {
        history_digest(&self.told, items.iter().map(|&item| ids.get(item as usize).to_string()))
    }

    pub(super) fn messages(&self, user_message: &str) -> [Message; 2] {
        [Message::new("system", self.system.as_str()), Message::new("user", user_message)]
    }

    pub(super) fn write(&self, case: &UserCase<'_>) -> Result<Vec<TopkPrompt>> {
        prompts_of(case, &self.options, &self.templates, &|text| (self.count)(&self.messages(text)))
    }

    pub(super) fn digest(&self, user_message: &str) -> String {
        chat_digest(self.messages(user_message))
    }
}

/// sha256 (hex) over role and content of each message, as the JSON `[[role, content], ...]`.
pub(in crate::stages) fn chat_digest(messages: [Message; 2]) -> String {
    let pairs = messages.map(|m| [m.role, m.content]);
    hex(&Sha256::digest(Value::from(pairs.map(|pair| Value::from(pair.to_vec())).to_vec()).to_string().as_bytes()))
}

/// sha256 (hex) over what a user is told by (`told`) and what is known of the user, oldest first.
pub(in crate::stages) fn history_digest(told: &str, known: impl IntoIterator<Item = String>) -> String {
    let mut hasher = Sha256::new();
    hasher.update(told.as_bytes());
    for part in known {
        hasher.update([0]);
        hasher.update(part.as_bytes());
    }
    hex(&hasher.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What came of one user.
enum Outcome {
    Skipped { user: u32, reason: &'static str },
    Written { user: u32, candidates: Vec<u32>, prompts: Vec<TopkPrompt> },
}

fn write_one(writer: &Writer<'_>, cases: &Cases, user: u32) -> Result<Outcome> {
    let history = cases.histories.of(user as usize);
    if history.is_empty() {
        return Ok(Outcome::Skipped { user, reason: "cold_user" });
    }
    let candidates: Vec<u32> = (cases.shortlists.of(user as usize).iter().copied())
        .filter(|&item| cases.titles[item as usize].is_some())
        .collect();
    let history = cases.titled(history);
    if candidates.len() < 2 || history.is_empty() {
        return Ok(Outcome::Skipped { user, reason: "no_title" });
    }
    let prompts = writer.write(&UserCase {
        user: &cases.users.ids().get(user as usize),
        shortlist: &cases.titled(&candidates),
        history: &history,
        similar: &cases.similar(user),
    })?;
    Ok(Outcome::Written { user, candidates, prompts })
}

pub(super) fn write_all(
    writer: &Writer<'_>,
    cases: &Cases,
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<StageResult> {
    observer.begin("users", cases.asked.len() as u64);
    let mut outcomes = Vec::with_capacity(cases.asked.len());
    for block in cases.asked.chunks(BLOCK) {
        cancel.check()?;
        // Collected before looking at errors, so that the first user's is reported on any number of threads.
        let written: Vec<Result<Outcome>> = block.par_iter().map(|&user| write_one(writer, cases, user)).collect();
        for outcome in written {
            outcomes.push(outcome?);
        }
        observer.advance(block.len() as u64);
    }
    let result = StageResult::default()
        .with_table("prompts", prompts_table(writer, cases, &outcomes)?)
        .with_table("skipped", skipped_table(cases, &outcomes)?);
    Ok(with_counters(result, cases, &outcomes))
}

fn prompts_table(writer: &Writer<'_>, cases: &Cases, outcomes: &[Outcome]) -> Result<Table> {
    let rows: Vec<(u32, &[u32], &TopkPrompt)> = outcomes
        .iter()
        .flat_map(|outcome| match outcome {
            Outcome::Skipped { .. } => Vec::new(),
            Outcome::Written { user, candidates, prompts } => {
                prompts.iter().map(|p| (*user, candidates.as_slice(), p)).collect()
            }
        })
        .collect();
    let ints = |f: &dyn Fn(&TopkPrompt) -> usize| -> ArrayRef {
        Arc::new(rows.iter().map(|(_, _, p)| f(p) as i32).collect::<Int32Array>())
    };
    let shown: Vec<u32> =
        rows.iter().flat_map(|(_, candidates, p)| p.order.iter().map(|&place| candidates[place])).collect();
    let lists = |values: ArrayRef| -> Result<ArrayRef> {
        let field = Arc::new(Field::new_list_field(values.data_type().clone(), false));
        let offsets = OffsetBuffer::from_lengths(rows.iter().map(|(_, _, p)| p.order.len()));
        Ok(Arc::new(ListArray::try_new(field, offsets, values, None)?))
    };
    let digests: Vec<String> = rows.par_iter().map(|(_, _, p)| writer.digest(&p.text)).collect();
    let places = rows.iter().flat_map(|(.., p)| p.order.iter().map(|&place| place as i32 + 1));
    let places: ArrayRef = Arc::new(places.collect::<Int32Array>());
    let histories = (rows.par_iter())
        .map(|(user, ..)| writer.history_digest(cases.histories.of(*user as usize), cases.items.ids()))
        .collect::<Vec<_>>();
    Table::from_columns(vec![
        (USER_ID, cases.users.ids().take(rows.iter().map(|(user, ..)| *user as usize)).to_array(), false),
        (PERMUTATION, ints(&|p| p.permutation as usize), false),
        (SYSTEM, Arc::new(StringArray::from_iter_values(rows.iter().map(|_| &writer.system))), false),
        (PROMPT, Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, _, p)| &p.text))), false),
        (CANDIDATES, lists(cases.items.ids().take(shown.iter().map(|&item| item as usize)).to_array())?, false),
        (CANDIDATE_TITLES, lists(Arc::new(StringArray::from_iter_values(cases.titled(&shown))))?, false),
        (PROMPT_TOKENS, ints(&|p| p.tokens), false),
        (HISTORY_SHOWN, ints(&|p| p.history_shown), false),
        (TITLES_TRIMMED, ints(&|p| p.titles_trimmed), false),
        (PROMPT_DIGEST, Arc::new(StringArray::from_iter_values(digests)), false),
        (CANDIDATE_PLACES, lists(places)?, false),
        (HISTORY_DIGEST, Arc::new(StringArray::from_iter_values(histories)), false),
    ])
}

fn skipped_table(cases: &Cases, outcomes: &[Outcome]) -> Result<Table> {
    let rows: Vec<(u32, &str)> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Skipped { user, reason } => Some((*user, *reason)),
            Outcome::Written { .. } => None,
        })
        .collect();
    Table::from_columns(vec![
        (USER_ID, cases.users.ids().take(rows.iter().map(|(user, _)| *user as usize)).to_array(), false),
        (REASON, Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, reason)| *reason))), false),
    ])
}

fn with_counters(result: StageResult, cases: &Cases, outcomes: &[Outcome]) -> StageResult {
    let skipped = |wanted: &str| {
        outcomes.iter().filter(|o| matches!(o, Outcome::Skipped { reason, .. } if *reason == wanted)).count()
    };
    let prompts: Vec<&TopkPrompt> = outcomes
        .iter()
        .filter_map(|o| match o {
            Outcome::Written { prompts, .. } => Some(prompts),
            Outcome::Skipped { .. } => None,
        })
        .flatten()
        .collect();
    let of_asked = |rows: &Histories, test: &dyn Fn(usize) -> bool| -> usize {
        cases.asked.iter().flat_map(|&user| rows.of(user as usize)).filter(|&&item| test(item as usize)).count()
    };
    let untitled = |item: usize| cases.titles[item].is_none();
    let absent = |item: usize| !cases.known[item];
    result
        .with_counter("users", cases.asked.len())
        .with_counter("prompts", prompts.len())
        .with_counter("skipped_no_title", skipped("no_title"))
        .with_counter("skipped_cold_user", skipped("cold_user"))
        .with_counter("candidates_without_title", of_asked(&cases.shortlists, &untitled))
        .with_counter("history_without_title", of_asked(&cases.histories, &untitled))
        .with_counter("history_not_in_item_table", of_asked(&cases.histories, &absent))
        .with_counter("item_table_repeats", cases.repeated_items)
        .with_counter("prompts_trimmed", prompts.iter().filter(|p| p.titles_trimmed > 0).count())
        .with_counter("titles_trimmed", prompts.iter().map(|p| p.titles_trimmed).sum::<usize>())
        .with_counter("prompt_tokens", prompts.iter().map(|p| p.tokens).sum::<usize>())
        .with_counter("prompt_tokens_max", prompts.iter().map(|p| p.tokens).max().unwrap_or(0))
}
