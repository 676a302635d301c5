//! Stage `rerank`: the LLM orders the shortlist, tail first, within a budget.
//!
//! In: prompts (from `prompt`), N(u) per user (from the long-tail SQL), an LLM. Out: one order
//! of the candidates per user that was asked (`reranked`), and the users that were not, with the
//! reason (`not_asked`). Every answer goes to the ledger first, so a killed run resumes row by row.

mod orders;
mod questions;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::orders::{not_asked, orders};
use self::questions::{Prompt, Prompts, Question, interactions_of};
use crate::columns::*;
use crate::error::{Error, Result};
use crate::llm::ledger::{Answer, Ledger, digest};
use crate::llm::{ChatTokenizer, Llm, Message, ScoreRequest};
use crate::stages::{
    InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageKind, StageResult, What, context::Cancel,
};
use crate::tables::Id;

/// How an answer is read from the LLM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One prefill; the candidates are ranked by the log-probabilities of their letters. Needs
    /// prompts with `candidate_style = "letters"`.
    #[default]
    Label,
    /// The log-probability of each candidate's title given the prompt. Needs prompts with
    /// `candidate_style = "titles"`.
    Likelihood,
}

/// What a title's log-probability is divided by or compared with (mode `likelihood`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Normalise {
    /// Sum over the title's tokens: favours short titles.
    Sum,
    /// Mean over the title's tokens.
    #[default]
    Mean,
    /// Sum, less the title's log-probability after an empty prompt: favours what the history explains.
    Unconditional,
}

/// Which users are asked first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Users with the fewest interactions first (the LLM weighs most for them, eq. 7), ties by user id.
    #[default]
    TailFirst,
    /// A seeded sample, for calibration: every part of the long tail is in it.
    Random,
}

/// How much the LLM may be asked. The smaller of the two limits counts; no limit asks everyone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// At most so many users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<u64>,
    /// At most so many prompt tokens; a user is asked only when all of their prompts fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// Config of `kind = "rerank"`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RerankConfig {
    /// Table of prompts: output `prompts` of a `prompt` stage.
    pub prompts: String,
    /// Table with `user_id` and `interactions`, N(u): decides who is asked first.
    pub long_tail: String,
    /// Users without a prompt and why: output `skipped` of the `prompt` stage. They are passed on in `not_asked`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The LLM: a name from the catalogue, a GGUF file or a Hugging Face folder. The same as in the `prompt` stage.
    pub model: String,
    /// How the LLM's order is read.
    #[serde(default)]
    pub mode: Mode,
    /// Mode `likelihood`: how titles of different length are made comparable.
    #[serde(default)]
    pub normalise: Normalise,
    /// How much may be asked.
    #[serde(default)]
    pub budget: Budget,
    /// Who is asked first.
    #[serde(default)]
    pub order: Order,
}

/// The registry's entry.
pub const KIND: StageKind = StageKind {
    name: "rerank",
    version: 1,
    about: "The LLM orders each user's shortlist, users of the long tail first, within a budget.",
    sample: "prompts = \"prompts\"\nlong_tail = \"tail\"\nmodel = \"smollm2-135m-instruct\"\nbudget = { users = 100 }\n",
    schema: || schemars::schema_for!(RerankConfig),
    resolve,
};

fn resolve(config: serde_json::Value, _ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: RerankConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config does not fit").because(e))?;
    Ok(Box::new(Rerank { config }))
}

struct Rerank {
    config: RerankConfig,
}

#[async_trait]
impl Stage for Rerank {
    fn inputs(&self) -> Vec<InputSlot> {
        let prompts = [USER_ID, PERMUTATION, SYSTEM, PROMPT, CANDIDATES, CANDIDATE_TITLES, PROMPT_TOKENS].as_slice();
        let mut inputs = vec![
            InputSlot::table("prompts", &self.config.prompts, prompts),
            InputSlot::table("long_tail", &self.config.long_tail, &[USER_ID, INTERACTIONS]),
        ];
        if let Some(skipped) = &self.config.skipped {
            inputs.push(InputSlot::table("skipped", skipped, &[USER_ID, REASON]));
        }
        inputs
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![
            OutputSlot {
                name: "reranked",
                what: What::Table,
                about: "user_id, item_id, llm_rank, llm_score, prompt_digest, llm_asked_at, source; best first",
            },
            OutputSlot { name: "not_asked", what: What::Table, about: "user_id, source, reason" },
        ]
    }

    fn identity(&self) -> serde_json::Value {
        serde_json::json!(self.config)
    }

    fn models(&self) -> Vec<String> {
        vec![self.config.model.clone()]
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let Some(prompts) = inputs.get("prompts") else { return Ok(BTreeMap::new()) };
        let user = prompts.field_with_name(USER_ID).ok().map(|f| f.data_type().clone());
        let item = prompts.field_with_name(CANDIDATES).ok().and_then(|f| match f.data_type() {
            DataType::List(item) => Some(item.data_type().clone()),
            _ => None,
        });
        let (Some(user), Some(item)) = (user, item) else { return Ok(BTreeMap::new()) };
        let schema = |columns: &[(&str, DataType)]| -> SchemaRef {
            Arc::new(Schema::new(columns.iter().map(|(n, t)| Field::new(*n, t.clone(), false)).collect::<Vec<_>>()))
        };
        let instant = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let reranked = [
            (USER_ID, user.clone()),
            (ITEM_ID, item),
            (LLM_RANK, DataType::Int32),
            (LLM_SCORE, DataType::Float32),
            (PROMPT_DIGEST, DataType::Utf8),
            (LLM_ASKED_AT, instant),
            (SOURCE, DataType::Utf8),
        ];
        let not_asked = [(USER_ID, user), (SOURCE, DataType::Utf8), (REASON, DataType::Utf8)];
        Ok(BTreeMap::from([("reranked".to_owned(), schema(&reranked)), ("not_asked".to_owned(), schema(&not_asked))]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let prompts = Prompts::read(&ctx.collect("prompts").await?)?;
        let interactions = interactions_of(&ctx.collect("long_tail").await?)?;
        let model = ctx.model(&self.config.model)?.clone();

        let order = self.asking_order(&prompts, &interactions, ctx.seed);
        let (asked, left_out) = self.within_budget(&prompts, order);

        // Keys need the token ids, so tokenise first; the weights are loaded only if something is left to ask.
        let path = model.path.clone();
        let chat = tokio::task::spawn_blocking(move || ChatTokenizer::open(&path)).await??;
        let mode = serde_json::json!([self.config.mode, self.config.normalise]).to_string();
        let mut questions = Vec::new();
        for user in &asked {
            for &row in &prompts.rows[user] {
                questions.push(self.question(&prompts.prompts[row], &chat, &model.digest, &mode)?);
            }
        }
        let (mut ledger, unreadable) = Ledger::open(&ctx.savings, &model.digest).await?;
        if unreadable > 0 {
            ctx.observer
                .note(&format!("{unreadable} unreadable ledger segments skipped; their prompts are asked again"));
        }
        let open: Vec<Question> =
            questions.iter().filter(|q| ledger.get(&q.prompt_digest).is_none()).cloned().collect();
        let reused = questions.len() - open.len();
        if reused > 0 {
            ctx.observer.note(&format!("{reused} of {} prompts were answered before", questions.len()));
        }
        let asked_tokens: u64 = open.iter().map(|q| q.tokens() as u64).sum();
        let began = std::time::Instant::now();
        let n_open = open.len();
        self.ask(ctx, &model.path, &chat, open, &mut ledger).await?;
        let seconds = began.elapsed().as_secs_f64();

        let reranked = orders(&prompts, &asked, &questions, &ledger, ctx)?;
        let not_asked = not_asked(&left_out, ctx.collect_opt("skipped").await?)?;
        let rate = |n: f64| {
            if n_open > 0 { serde_json::json!((n / seconds * 100.0).round() / 100.0) } else { serde_json::Value::Null }
        };
        Ok(StageResult::default()
            .with_table("reranked", reranked)
            .with_table("not_asked", not_asked)
            .with_counter("users_asked", asked.len())
            .with_counter("users_left_out_by_budget", left_out.len())
            .with_counter("prompts", questions.len())
            .with_counter("prompts_reused", reused)
            .with_counter("llm_tokens", asked_tokens)
            .with_counter("llm_seconds", (seconds * 1000.0).round() / 1000.0)
            .with_counter("llm_tokens_per_second", rate(asked_tokens as f64))
            .with_counter("prompts_per_second", rate(n_open as f64)))
    }
}

impl Rerank {
    /// All users with a prompt, in the order in which they are asked.
    fn asking_order(&self, prompts: &Prompts, interactions: &HashMap<Id, i64>, seed: u64) -> Vec<Id> {
        use rand::SeedableRng;
        use rand::seq::SliceRandom;
        let mut users: Vec<Id> = prompts.rows.keys().cloned().collect();
        match self.config.order {
            // A stable sort over users in id order: ties go by id. A user the table lacks has no history.
            Order::TailFirst => users.sort_by_key(|u| interactions.get(u).copied().unwrap_or(0)),
            Order::Random => users.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed)),
        }
        users
    }

    /// The users whose prompts fit the budget, and the rest.
    fn within_budget(&self, prompts: &Prompts, order: Vec<Id>) -> (Vec<Id>, Vec<Id>) {
        let Budget { users, tokens } = self.config.budget;
        let mut spent = 0u64;
        let mut cut = order.len();
        for (n, user) in order.iter().enumerate() {
            spent += prompts.rows[user].iter().map(|&r| prompts.prompts[r].tokens).sum::<u64>();
            if users.is_some_and(|most| n as u64 >= most) || tokens.is_some_and(|most| spent > most) {
                cut = n;
                break;
            }
        }
        let mut asked = order;
        let left_out = asked.split_off(cut);
        (asked, left_out)
    }

    fn question(&self, prompt: &Prompt, chat: &ChatTokenizer, weights: &str, mode: &str) -> Result<Question> {
        let messages = [
            Message { role: "system".into(), content: prompt.system.clone() },
            Message { role: "user".into(), content: prompt.prompt.clone() },
        ];
        let messages = if prompt.system.is_empty() { &messages[1..] } else { &messages[..] };
        let ids = chat.encode_chat(messages)?;
        let scored: Vec<Vec<u32>> = match self.config.mode {
            Mode::Label => (0..prompt.candidates.len())
                .map(|place| {
                    let label = crate::prompts::label(place).ok_or_else(|| {
                        Error::spec(format!(
                            "there are {} letters and {} candidates",
                            crate::prompts::LETTERS,
                            prompt.candidates.len()
                        ))
                        .with_help("make the shortlist smaller, or use mode = \"likelihood\"")
                    })?;
                    Ok(chat.encode_text(&label.to_string()))
                })
                .collect::<Result<_>>()?,
            Mode::Likelihood => prompt.titles.iter().map(|title| chat.encode_text(title)).collect(),
        };
        if let (Mode::Label, Some(label)) = (self.config.mode, scored.iter().position(|l| l.len() != 1)) {
            return Err(Error::spec(format!("label {label} is not one token of `{}`", self.config.model))
                .with_help("use mode = \"likelihood\" with candidate_style = \"titles\", or a smaller shortlist"));
        }
        self.check_style(prompt)?;
        let longest = ids.len() + scored.iter().map(Vec::len).max().unwrap_or(0);
        if longest > chat.context_length() {
            return Err(Error::spec(format!(
                "a prompt of {longest} tokens exceeds the context of {} of `{}`",
                chat.context_length(),
                self.config.model
            ))
            .with_help("make the shortlist or `history_items` smaller, or set `max_tokens` in the `prompt` stage"));
        }
        Ok(Question { prompt_digest: digest(&ids, &scored, weights, mode), ids, scored, mode: self.config.mode })
    }

    /// A prompt that names its candidates by letters wants a letter, and one that lists titles wants a title.
    fn check_style(&self, prompt: &Prompt) -> Result<()> {
        // Two of them, so that a title that happens to follow an initial ("L.A. Confidential") decides nothing.
        let lettered = prompt.titles.iter().take(2).enumerate().all(|(place, title)| {
            crate::prompts::label(place).is_some_and(|label| names_by_letter(&prompt.prompt, label, title))
        });
        let (mode, style) = match (self.config.mode, lettered) {
            (Mode::Label, false) => ("label", "letters"),
            (Mode::Likelihood, true) => ("likelihood", "titles"),
            _ => return Ok(()),
        };
        Err(Error::spec(format!("mode = \"{mode}\" does not fit the prompts of `{}`", self.config.prompts))
            .with_help(format!("set candidate_style = \"{style}\" in that stage, or the other mode here")))
    }

    /// Asks what is open, in segments that go to the ledger one by one.
    async fn ask(
        &self,
        ctx: &StageContext,
        path: &std::path::Path,
        chat: &ChatTokenizer,
        open: Vec<Question>,
        ledger: &mut Ledger,
    ) -> Result<()> {
        /// Prompts per ledger segment: some 15 seconds of work on two cores are lost by a kill.
        const SEGMENT: usize = 16;
        if open.is_empty() {
            return Ok(());
        }
        let (path, device) = (path.to_owned(), ctx.device);
        let llm = Arc::new(tokio::task::spawn_blocking(move || Llm::open(&path, device)).await??);
        ctx.observer.begin("prompts", open.len() as u64);
        let unconditional = match (self.config.mode, self.config.normalise) {
            (Mode::Likelihood, Normalise::Unconditional) => self.unconditional(&llm, chat, &open, &ctx.cancel).await?,
            _ => HashMap::new(),
        };
        for segment in open.chunks(SEGMENT) {
            ctx.cancel.check()?;
            let (llm, segment, cancel) = (llm.clone(), segment.to_vec(), ctx.cancel.clone());
            let observer = ctx.observer.clone();
            let (segment, logprobs) = tokio::task::spawn_blocking(move || {
                let mut progress = |n: usize| {
                    observer.advance(n as u64);
                    cancel.check()
                };
                score(&llm, &segment, &mut progress).map(|s| (segment, s))
            })
            .await??;
            let asked_at = chrono::Utc::now().timestamp_micros();
            let answers = segment.iter().zip(logprobs).map(|(q, per_candidate)| Answer {
                prompt_digest: q.prompt_digest.clone(),
                scores: q
                    .scored
                    .iter()
                    .zip(per_candidate)
                    .map(|(ids, lp)| self.normalised(ids, &lp, &unconditional))
                    .collect(),
                tokens: q.tokens() as i32,
                asked_at,
            });
            ledger.append(answers.collect()).await?;
        }
        Ok(())
    }

    fn normalised(&self, ids: &[u32], logprobs: &[f32], unconditional: &HashMap<Vec<u32>, f32>) -> f32 {
        let sum: f32 = logprobs.iter().sum();
        match (self.config.mode, self.config.normalise) {
            (Mode::Label, _) | (Mode::Likelihood, Normalise::Sum) => sum,
            (Mode::Likelihood, Normalise::Mean) => sum / logprobs.len().max(1) as f32,
            (Mode::Likelihood, Normalise::Unconditional) => sum - unconditional.get(ids).copied().unwrap_or(0.0),
        }
    }

    /// Log-probability of every title after a prompt that knows nothing of the user.
    async fn unconditional(
        &self,
        llm: &Arc<Llm>,
        chat: &ChatTokenizer,
        open: &[Question],
        cancel: &Cancel,
    ) -> Result<HashMap<Vec<u32>, f32>> {
        let titles: std::collections::BTreeSet<Vec<u32>> = open.iter().flat_map(|q| q.scored.iter().cloned()).collect();
        let titles: Vec<Vec<u32>> = titles.into_iter().collect();
        let neutral = chat.encode_chat(&[Message { role: "user".into(), content: "Name one title.".into() }])?;
        let request = ScoreRequest { prompt: neutral, continuations: titles.clone() };
        let (llm, cancel) = (llm.clone(), cancel.clone());
        let scores =
            tokio::task::spawn_blocking(move || llm.continuation_logprobs(&[request], &mut |_| cancel.check()))
                .await??;
        let sums = scores.into_iter().flatten().map(|lp| lp.iter().sum());
        Ok(titles.into_iter().zip(sums).collect())
    }
}

/// Log-probabilities per question and candidate.
fn score(llm: &Llm, segment: &[Question], progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<Vec<Vec<f32>>>> {
    match segment.first().map(|q| q.mode) {
        None => Ok(Vec::new()),
        Some(Mode::Label) => {
            let prompts: Vec<Vec<u32>> = segment.iter().map(|q| q.ids.clone()).collect();
            let labels: Vec<Vec<u32>> = segment.iter().map(|q| q.scored.iter().map(|l| l[0]).collect()).collect();
            let scores = llm.label_logprobs(&prompts, &labels, progress)?;
            Ok(scores.into_iter().map(|row| row.into_iter().map(|s| vec![s]).collect()).collect())
        }
        Some(Mode::Likelihood) => {
            let requests: Vec<ScoreRequest> = segment
                .iter()
                .map(|q| ScoreRequest { prompt: q.ids.clone(), continuations: q.scored.clone() })
                .collect();
            llm.continuation_logprobs(&requests, progress)
        }
    }
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

    fn rerank(budget: Budget, order: Order) -> Rerank {
        let text = |s: &str| s.to_owned();
        let (prompts, long_tail, model) = (text("p"), text("t"), text("m"));
        let (mode, normalise) = (Mode::Label, Normalise::Mean);
        Rerank { config: RerankConfig { prompts, long_tail, skipped: None, model, mode, normalise, budget, order } }
    }

    /// Users 0 to 4 with one prompt of 100 tokens each.
    fn five() -> Prompts {
        let prompt = |_| Prompt {
            system: String::new(),
            prompt: String::new(),
            candidates: crate::tables::IdColumn::Int(vec![7]),
            titles: vec!["x".to_owned()],
            tokens: 100,
        };
        Prompts {
            prompts: (0..5).map(prompt).collect(),
            rows: (0..5).map(|u| (Id::Int(u as i64), vec![u])).collect(),
            ids_are_int: true,
            item_type: DataType::Int64,
        }
    }

    fn ids(users: &[Id]) -> Vec<String> {
        users.iter().map(Id::to_string).collect()
    }

    #[test]
    fn the_tail_comes_first_and_ties_go_by_id() {
        let interactions = [(0, 9), (1, 3), (2, 3), (3, 50)].map(|(u, n)| (Id::Int(u), n)).into();
        let stage = rerank(Budget::default(), Order::TailFirst);
        // User 4 is not in the table: nothing is known of them.
        assert_eq!(ids(&stage.asking_order(&five(), &interactions, 1)), ["4", "1", "2", "0", "3"]);
        let stage = rerank(Budget::default(), Order::Random);
        let draw = |seed| ids(&stage.asking_order(&five(), &interactions, seed));
        assert_eq!(draw(3), draw(3));
        assert!((0..20).any(|seed| draw(seed) != draw(3)));
    }

    #[test]
    fn the_smaller_budget_counts() {
        let order: Vec<Id> = (0..5).map(Id::Int).collect();
        for (users, tokens, expected) in [
            (None, None, 5),
            (Some(2), None, 2),
            (Some(0), None, 0),
            (Some(9), Some(350), 3),
            (Some(2), Some(350), 2),
            (None, Some(99), 0),
            (None, Some(500), 5),
        ] {
            let stage = rerank(Budget { users, tokens }, Order::TailFirst);
            let (asked, left) = stage.within_budget(&five(), order.clone());
            assert_eq!((asked.len(), asked.len() + left.len()), (expected, 5), "{users:?} {tokens:?}");
        }
    }
}
