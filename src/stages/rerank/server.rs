//! Asks the LLM behind a server.
//!
//! In: open questions. Out: answers in the ledger as they come, and for each question without one the reason.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::config::{Mode, RerankConfig};
use super::local::normalised;
use super::questions::{Maker, Prompts, Question};
use crate::error::{Error, Result};
use crate::llm::ledger::{Answer, Ledger};
use crate::llm::remote::{Outcome, Reading, Remote, RemoteSpec, Sink, Spent};
use crate::stages::context::Cancel;
use crate::stages::{Observer, StageContext};

/// Answers per ledger segment, unless they come slowly.
const SEGMENT: usize = 16;
/// The longest that an answer waits for its segment.
const LONGEST: Duration = Duration::from_secs(2);

/// What became of the questions.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Prompt digest -> why there is no answer.
    pub(super) failures: HashMap<String, &'static str>,
    /// Figures for the result document.
    pub(super) counters: Vec<(&'static str, serde_json::Value)>,
}

/// Connects; whatever is wrong with the config shows before anything is sent.
pub(super) fn connect(spec: &RemoteSpec, mode: Mode) -> Result<Remote> {
    let reading = match mode {
        Mode::Label => Reading::Label,
        Mode::Likelihood => Reading::Likelihood,
        Mode::Generate => Reading::Generate,
        Mode::Rating => return Err(Error::spec("mode = \"rating\" is for the engine in this process")),
    };
    Remote::new(spec.clone(), reading)
}

/// Asks what is open. Whatever ends it, what was answered is in the ledger.
pub(super) async fn ask(
    config: &RerankConfig,
    ctx: &StageContext,
    (spec, maker): (&RemoteSpec, &Maker<'_>),
    prompts: &Prompts,
    open: Vec<Question>,
    ledger: &mut Ledger,
) -> Result<Asked> {
    let remote = connect(spec, config.mode)?;
    let asks = open.iter().map(|q| maker.ask(q, &prompts.prompts[q.row])).collect::<Result<Vec<_>>>()?;
    if !open.is_empty() {
        ctx.observer.begin("prompts", open.len() as u64);
    }
    let mut collector = Collector {
        config,
        questions: &open,
        ledger,
        pending: Vec::new(),
        since: Instant::now(),
        failures: HashMap::new(),
        observer: ctx.observer.clone(),
        cancel: ctx.cancel.clone(),
    };
    let outcome = remote.ask_all(asks, &mut collector).await;
    collector.flush().await?;
    outcome?;
    let failures = collector.failures;
    let spent = remote.spent();
    let (prompt, completion) = (Spent::of(&spent.prompt_tokens), Spent::of(&spent.completion_tokens));
    let counters = vec![
        ("llm_requests", Spent::of(&spent.requests).into()),
        ("llm_retries", Spent::of(&spent.retries).into()),
        ("llm_prompt_tokens", prompt.into()),
        ("llm_completion_tokens", completion.into()),
        ("llm_cost", ((spec.cost(prompt, completion) * 1e6).round() / 1e6).into()),
    ];
    Ok(Asked { failures, counters })
}

/// Takes outcomes as they come.
struct Collector<'a> {
    config: &'a RerankConfig,
    questions: &'a [Question],
    ledger: &'a mut Ledger,
    pending: Vec<Answer>,
    since: Instant,
    failures: HashMap<String, &'static str>,
    observer: Arc<dyn Observer>,
    cancel: Cancel,
}

impl Collector<'_> {
    async fn flush(&mut self) -> Result<()> {
        self.since = Instant::now();
        self.ledger.append(std::mem::take(&mut self.pending)).await
    }
}

#[async_trait]
impl Sink for Collector<'_> {
    async fn take(&mut self, place: usize, outcome: Outcome) -> Result<()> {
        let question =
            self.questions.get(place).ok_or_else(|| Error::internal("an answer to a question that was not asked"))?;
        self.observer.advance(1);
        crate::fault::point("rerank-row");
        match outcome {
            Err(failure) => {
                self.failures.insert(question.prompt_digest.clone(), failure.reason());
            }
            Ok(reply) => {
                let tokens = match reply.prompt_tokens {
                    0 => question.tokens as u64,
                    counted => counted,
                };
                self.pending.push(Answer {
                    prompt_digest: question.prompt_digest.clone(),
                    scores: reply.scores.iter().map(|lp| normalised(self.config, lp)).collect(),
                    tokens: i32::try_from(tokens).unwrap_or(i32::MAX),
                    answer_tokens: i32::try_from(reply.completion_tokens).unwrap_or(i32::MAX),
                    text: reply.text,
                    mode: self.config.mode.name().to_owned(),
                    asked_at: chrono::Utc::now().timestamp_micros(),
                });
            }
        }
        if self.pending.len() >= SEGMENT {
            self.flush().await?;
        }
        self.cancel.check()
    }

    async fn tick(&mut self) -> Result<()> {
        if !self.pending.is_empty() && self.since.elapsed() >= LONGEST {
            self.flush().await?;
        }
        self.cancel.check()
    }
}
