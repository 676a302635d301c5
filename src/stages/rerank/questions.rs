//! What the LLM is asked: the rows of the `prompt` stage, and prompts with their ledger keys.
//!
//! In: the table `prompts`. Out: each user's prompts in order of permutation, and [`Question`]s.

use std::collections::{BTreeMap, HashMap};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Int32Type};
use sha2::{Digest, Sha256};

use super::config::{Mode, RatedBy, RerankConfig};
use crate::columns::*;
use crate::error::{Error, Result};
use crate::llm::ledger::digest;
use crate::llm::remote::{Ask, RemoteSpec, protocol};
use crate::llm::{ChatTokenizer, Message, Precision};
use crate::tables::{Id, IdColumn, Table};

/// One prompt as the `prompt` stage made it.
pub(super) struct Prompt {
    pub(super) system: String,
    pub(super) prompt: String,
    /// As shown; indices into the shown order are what the LLM scores.
    pub(super) candidates: IdColumn,
    pub(super) titles: Vec<String>,
    /// Their places in the recommender's shortlist, from 1; as shown where the table does not say.
    pub(super) places: Vec<u32>,
    pub(super) tokens: u64,
    /// What is known of the user, where the table says it.
    pub(super) history_digest: Option<String>,
}

impl Default for Prompt {
    fn default() -> Self {
        let candidates = IdColumn::Int(Vec::new());
        let (system, prompt, titles, places) = (String::new(), String::new(), Vec::new(), Vec::new());
        Prompt { system, prompt, candidates, titles, places, tokens: 0, history_digest: None }
    }
}

impl Prompt {
    /// Whether the text names its first candidates by letters: two of them, so that a title that happens to follow an
    /// initial ("L.A. Confidential") decides nothing.
    fn lettered(&self) -> bool {
        self.titles.iter().take(2).enumerate().all(|(place, title)| {
            crate::prompts::label(place).is_some_and(|label| names_by_letter(&self.prompt, label, title))
        })
    }

    pub(super) fn messages(&self) -> Vec<Message> {
        let user = Message::new("user", self.prompt.as_str());
        match self.system.is_empty() {
            true => vec![user],
            false => vec![Message::new("system", self.system.as_str()), user],
        }
    }

    /// Whether it asks for the rating of its one candidate, as those of a `prompt_ratings` stage do: an order has two at least.
    pub(super) fn asks_a_rating(&self) -> bool {
        self.titles.len() == 1
    }

    /// Items in the recommender's order, by the places that the table tells.
    pub(super) fn shortlist(&self) -> Vec<Id> {
        let mut order: Vec<usize> = (0..self.candidates.len()).collect();
        order.sort_by_key(|&shown| self.places.get(shown).copied().unwrap_or(u32::MAX));
        order.into_iter().map(|shown| self.candidates.get(shown)).collect()
    }
}

/// All prompts, and each user's rows in order of permutation.
pub(super) struct Prompts {
    pub(super) prompts: Vec<Prompt>,
    pub(super) rows: BTreeMap<Id, Vec<usize>>,
    pub(super) ids_are_int: bool,
    pub(super) item_type: DataType,
}

/// A prompt with its key.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) prompt_digest: String,
    /// Row of the prompt.
    pub(super) row: usize,
    /// Token ids; empty where a server makes them.
    pub(super) ids: Vec<u32>,
    /// Per candidate what is scored after the prompt: one label token, or the tokens of a title. Empty likewise.
    pub(super) scored: Vec<Vec<u32>>,
    /// Whether candidates go by letters.
    pub(super) lettered: bool,
    /// Tokens that it costs, as far as is known before it is asked.
    pub(super) tokens: usize,
}

impl Prompts {
    pub(super) fn read(table: &Table) -> Result<Self> {
        let batch = table.to_batch()?;
        let users = table.ids(USER_ID)?;
        let permutations = table.i32s(PERMUTATION)?;
        let (systems, texts) = (table.strings(SYSTEM)?, table.strings(PROMPT)?);
        let tokens = table.i32s(PROMPT_TOKENS)?;
        let candidates = list_column(&batch, CANDIDATES)?;
        let titles = list_column(&batch, CANDIDATE_TITLES)?;
        let places = match table.has(CANDIDATE_PLACES) {
            true => Some(table.column_as(
                CANDIDATE_PLACES,
                &DataType::List(std::sync::Arc::new(Field::new_list_field(DataType::Int32, true))),
            )?),
            false => None,
        };
        let histories =
            if table.has(HISTORY_DIGEST) { table.strings(HISTORY_DIGEST)? } else { vec![None; users.len()] };
        let mut prompts = Vec::with_capacity(users.len());
        let mut rows: BTreeMap<Id, Vec<usize>> = BTreeMap::new();
        for (row, history_digest) in histories.into_iter().enumerate() {
            let ids = IdColumn::try_from_array(CANDIDATES, &candidates.value(row))?;
            let names = Table::from_columns(vec![(TITLE, titles.value(row), true)])?.strings(TITLE)?;
            let places = match &places {
                Some(list) => {
                    let list = list.as_list::<i32>().value(row);
                    list.as_primitive::<Int32Type>().values().iter().map(|p| (*p).max(0) as u32).collect()
                }
                None => (1..=ids.len() as u32).collect::<Vec<u32>>(),
            };
            if names.len() != ids.len() || places.len() != ids.len() {
                return Err(Error::data(format!(
                    "the prompt of user `{}` has {} candidates, {} titles and {} places",
                    users.get(row),
                    ids.len(),
                    names.len(),
                    places.len()
                )));
            }
            prompts.push(Prompt {
                system: systems[row].clone().unwrap_or_default(),
                prompt: texts[row].clone().unwrap_or_default(),
                candidates: ids,
                titles: names.into_iter().map(Option::unwrap_or_default).collect(),
                places,
                tokens: tokens[row].max(0) as u64,
                history_digest,
            });
            rows.entry(users.get(row)).or_default().push(row);
        }
        for rows in rows.values_mut() {
            rows.sort_by_key(|&r| permutations[r]);
        }
        let item_type = candidates.value_type();
        Ok(Prompts { prompts, rows, ids_are_int: matches!(users, IdColumn::Int(_)), item_type })
    }

    pub(super) fn users(&self, ids: &[Id]) -> IdColumn {
        id_column(self.ids_are_int, ids)
    }
}

/// Makes questions out of prompts, for the engine that will answer them.
pub(super) struct Maker<'a> {
    config: &'a RerankConfig,
    /// The local model's tokenizer; none where a server has its own.
    chat: Option<&'a ChatTokenizer>,
    remote: Option<&'a RemoteSpec>,
    /// Digest or name of the weights.
    pub(super) weights: String,
    /// Mode and settings as text.
    settings: String,
}

impl<'a> Maker<'a> {
    pub(super) fn local(config: &'a RerankConfig, chat: &'a ChatTokenizer, weights: &str) -> Self {
        let settings = match config.mode {
            Mode::Label => serde_json::json!([config.mode, "among the labels"]),
            Mode::Likelihood => serde_json::json!([config.mode, config.normalise]),
            Mode::Generate => serde_json::json!([config.mode]),
            Mode::Rating if config.rated_by == RatedBy::Greedy => {
                serde_json::json!([config.mode, config.ratings, config.rated_by])
            }
            Mode::Rating => serde_json::json!([config.mode, config.ratings]),
        };
        // `auto` is within the tolerance of f32 on every machine; what somebody chose is kept apart.
        let settings = match config.precision {
            Precision::Auto => settings,
            chosen => serde_json::json!([settings, chosen]),
        };
        Maker { config, chat: Some(chat), remote: None, weights: weights.to_owned(), settings: settings.to_string() }
    }

    pub(super) fn remote(config: &'a RerankConfig, spec: &'a RemoteSpec, chat: Option<&'a ChatTokenizer>) -> Self {
        let settings =
            serde_json::json!([config.mode, config.normalise, protocol::VERSION, spec.identity()]).to_string();
        Maker { config, chat, remote: Some(spec), weights: spec.weights(), settings }
    }

    /// Digest of how the LLM is asked.
    pub(super) fn settings_digest(&self) -> String {
        sha256([self.weights.as_str(), self.settings.as_str()])
    }

    /// The question of a prompt.
    ///
    /// Errors (exit 78): a mode that does not fit the prompt, more candidates than letters, a prompt beyond the context.
    pub(super) fn question(&self, row: usize, prompt: &Prompt) -> Result<Question> {
        let lettered = prompt.lettered() && !prompt.asks_a_rating();
        if prompt.asks_a_rating() && self.config.mode != Mode::Rating {
            let mode = self.config.mode.name();
            return Err(Error::spec(format!(
                "mode = \"{mode}\" does not fit the prompts of `{}`",
                self.config.prompts
            ))
            .with_help("they ask for one rating each: set mode = \"rating\""));
        }
        self.check_style(lettered)?;
        let letters = match lettered || self.config.mode == Mode::Label {
            true => letters(prompt.titles.len())?,
            false => Vec::new(),
        };
        match (self.remote, self.chat) {
            (Some(_), _) => {
                let parts = [self.weights.as_str(), &self.settings, &prompt.system, &prompt.prompt];
                let names: Vec<String> = letters.iter().map(char::to_string).collect();
                let all = parts
                    .into_iter()
                    .chain(names.iter().map(String::as_str))
                    .chain(prompt.titles.iter().map(String::as_str));
                let (prompt_digest, tokens) = (sha256(all), prompt.tokens as usize);
                Ok(Question { prompt_digest, row, ids: Vec::new(), scored: Vec::new(), lettered, tokens })
            }
            (None, Some(chat)) => self.in_tokens(row, prompt, chat, &letters),
            (None, None) => Err(Error::internal("a local question without a tokenizer")),
        }
    }

    fn in_tokens(&self, row: usize, prompt: &Prompt, chat: &ChatTokenizer, letters: &[char]) -> Result<Question> {
        let model = self.config.model.as_deref().unwrap_or_default();
        let ids = chat.encode_chat(&prompt.messages())?;
        let lettered = !letters.is_empty();
        // As it is written: a line of a list ends, and a rating stands behind its title.
        let end = match self.config.mode {
            Mode::Label | Mode::Likelihood => "",
            Mode::Generate => "\n",
            Mode::Rating => ": ",
        };
        let name = |name: &dyn std::fmt::Display| chat.encode_text(&format!("{name}{end}"));
        let scored: Vec<Vec<u32>> = match lettered {
            // The rating is the answer itself.
            false if self.config.mode == Mode::Rating && prompt.asks_a_rating() => vec![Vec::new()],
            true => letters.iter().map(|l| name(l)).collect(),
            false => prompt.titles.iter().map(|title| name(title)).collect(),
        };
        if let (Mode::Label, Some(label)) = (self.config.mode, scored.iter().position(|l| l.len() != 1)) {
            return Err(Error::spec(format!("label {label} is not one token of `{model}`"))
                .with_help("use mode = \"likelihood\" with candidate_style = \"titles\", or a smaller shortlist"));
        }
        let titles: usize = scored.iter().map(Vec::len).sum();
        // What is computed after the prompt, and the longest of it that has to fit with the prompt.
        let (tokens, longest) = match self.config.mode {
            Mode::Label => (ids.len(), ids.len() + 1),
            Mode::Likelihood => (ids.len() + titles, ids.len() + scored.iter().map(Vec::len).max().unwrap_or(0)),
            Mode::Generate => (ids.len() + titles, ids.len() + titles),
            // A rating has a few tokens at most.
            Mode::Rating => {
                (ids.len() + titles + scored.len(), ids.len() + 8 + scored.iter().map(Vec::len).max().unwrap_or(0))
            }
        };
        if longest > chat.context_length() {
            return Err(Error::spec(format!(
                "a prompt of {longest} tokens exceeds the context of {} of `{model}`",
                chat.context_length(),
            ))
            .with_help("make the shortlist or `history_items` smaller, or set `max_tokens` in the `prompt` stage"));
        }
        let prompt_digest = digest(&ids, &scored, &self.weights, &self.settings);
        Ok(Question { prompt_digest, row, ids, scored, lettered, tokens })
    }

    /// A prompt that names its candidates by letters wants a letter, and one that lists titles wants a title.
    fn check_style(&self, lettered: bool) -> Result<()> {
        let style = match (self.config.mode, lettered) {
            (Mode::Label, false) => "letters",
            (Mode::Likelihood | Mode::Rating, true) => "titles",
            _ => return Ok(()),
        };
        let mode = self.config.mode.name();
        Err(Error::spec(format!("mode = \"{mode}\" does not fit the prompts of `{}`", self.config.prompts))
            .with_help(format!("set candidate_style = \"{style}\" in that stage, or another mode here")))
    }

    /// A question as a server is asked it.
    pub(super) fn ask(&self, question: &Question, prompt: &Prompt) -> Result<Ask> {
        let chat = match (self.chat, self.config.mode) {
            (Some(chat), Mode::Likelihood) => Some(chat.render(&prompt.messages(), true)?),
            _ => None,
        };
        Ok(Ask {
            system: prompt.system.clone(),
            user: prompt.prompt.clone(),
            titles: prompt.titles.clone(),
            letters: if question.lettered { letters(prompt.titles.len())? } else { Vec::new() },
            places: prompt.places.clone(),
            chat,
        })
    }
}

/// The letters of `n` candidates.
fn letters(n: usize) -> Result<Vec<char>> {
    (0..n)
        .map(|place| {
            crate::prompts::label(place).ok_or_else(|| {
                Error::spec(format!("there are {} letters and {n} candidates", crate::prompts::LETTERS))
                    .with_help("make the shortlist smaller, or use mode = \"likelihood\"")
            })
        })
        .collect()
}

/// sha256 (hex) over texts; how they are cut is part of it.
fn sha256<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Whether a text shows `title` right behind its letter: `A. Alien`, `A) Alien`, `[A] Alien`.
fn names_by_letter(text: &str, label: char, title: &str) -> bool {
    text.match_indices(title).any(|(at, _)| {
        let before = text[..at].trim_end().trim_end_matches(['.', ')', ':', ']', '-']);
        let letter = before.strip_suffix(label);
        before.len() < text[..at].trim_end().len()
            && letter.is_some_and(|rest| !rest.chars().next_back().is_some_and(char::is_alphanumeric))
    })
}

pub(super) fn id_column(int: bool, ids: &[Id]) -> IdColumn {
    match int {
        true => IdColumn::Int(ids.iter().map(|id| if let Id::Int(n) = id { *n } else { 0 }).collect()),
        false => IdColumn::Str(ids.iter().map(Id::to_string).collect()),
    }
}

pub(super) fn list_column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a arrow::array::ListArray> {
    let column = batch.column_by_name(name).ok_or_else(|| Error::data(format!("column `{name}` is missing")))?;
    column
        .as_list_opt::<i32>()
        .ok_or_else(|| Error::data(format!("column `{name}` has type {}, a list is wanted", column.data_type())))
}

pub(super) fn interactions_of(table: &Table) -> Result<HashMap<Id, i64>> {
    let users = table.ids(USER_ID)?;
    Ok(table.i64s(INTERACTIONS)?.into_iter().enumerate().map(|(row, n)| (users.get(row), n)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_before_titles_are_seen() {
        for text in ["Candidates:\nA. Alien\nB. Brazil", "pick: A) Alien; B) Brazil", "[A] Alien", "A: Alien"] {
            assert!(names_by_letter(text, 'A', "Alien"), "{text}");
        }
        for text in ["Candidate Items: Alien; Brazil", "A Alien", "USA. Alien", "B. Alien", "no film at all"] {
            assert!(!names_by_letter(text, 'A', "Alien"), "{text}");
        }
    }

    #[test]
    fn a_servers_key_depends_on_what_the_answer_depends_on() {
        let config = |more: &str| -> RerankConfig {
            toml::from_str(&format!(
                "prompts = \"p\"\nlong_tail = \"t\"\n[engine]\nkind = \"openai\"\nmodel = \"m\"\n{more}"
            ))
            .unwrap()
        };
        let prompt = |text: &str| Prompt {
            prompt: format!("{text}\nA. Alien\nB. Brazil"),
            titles: vec!["Alien".into(), "Brazil".into()],
            candidates: IdColumn::Int(vec![1, 2]),
            places: vec![1, 2],
            ..Prompt::default()
        };
        let key = |more: &str, prompt: &Prompt| {
            let config = config(more);
            let spec = config.resolve().unwrap().unwrap();
            Maker::remote(&config, &spec, None).question(0, prompt).unwrap().prompt_digest
        };
        let url = "url = \"http://x/v1\"";
        let base = key(url, &prompt("one"));
        assert_eq!(
            base,
            key("url = \"https://elsewhere:1/api\"\nretries = 1\napi_key_env = \"SECRET\"", &prompt("one"))
        );
        assert_ne!(base, key(url, &prompt("two")));
        assert_ne!(base, key("url = \"http://x/v1\"\nrevision = \"b\"", &prompt("one")));
        let mut other = prompt("one");
        other.system = "Be brief.".into();
        assert_ne!(base, key(url, &other));
    }
}
