//! Many prompts at a server: bounded in number and in time, each with exactly one outcome.
//!
//! In: [`Ask`]s. Out: an [`Outcome`] for each, as they come. An error is for what no prompt is to blame for: a wrong
//! key, a server that is down, one that cannot do what the mode needs.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use serde_json::Value;
use tokio::time::Instant;

use super::client::{Client, Failure, Spent};
use super::config::{Dialect, RemoteSpec};
use super::protocol::{self, Reading};
use super::reading::head;
use crate::error::{Error, Fault, Result};

/// Bytes of an answer's text that are kept.
const TEXT_BYTES: usize = 4000;
/// How often a sink is asked whether to go on.
const TICK: Duration = Duration::from_millis(200);

/// One prompt and its candidates.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// System message; may be empty.
    pub system: String,
    /// User message.
    pub user: String,
    /// Titles of the candidates in the order shown.
    pub titles: Vec<String>,
    /// Their letters, where the prompt shows such; empty where it shows titles alone.
    pub letters: Vec<char>,
    /// Their places in the recommender's shortlist.
    pub places: Vec<u32>,
    /// The whole chat as text, where the model's template is known: what `echo` needs.
    pub chat: Option<String>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Log-probabilities `[candidates][tokens]`; one number each in mode `label`, the negative place in mode `generate`.
    pub scores: Vec<Vec<f32>>,
    /// Tokens of the prompt, as the server counts.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// The text of a generated answer, cut.
    pub text: Option<String>,
}

/// What became of a prompt.
pub type Outcome = Result<Reply, Failure>;

/// Where outcomes go.
#[async_trait]
pub trait Sink: Send {
    /// What became of the prompt at `place`. Called once for each prompt; an error stops the work.
    async fn take(&mut self, place: usize, outcome: Outcome) -> Result<()>;
    /// Called some times a second, whether something came or not; an error stops the work.
    async fn tick(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A server and how it is asked.
#[derive(Clone, Debug)]
pub struct Remote {
    spec: Arc<RemoteSpec>,
    client: Arc<Client>,
    reading: Reading,
}

impl Remote {
    /// A connection; nothing is sent yet.
    ///
    /// # Errors
    /// Exit 78: no key where one was named, or a mode that such a server cannot answer.
    pub fn new(spec: RemoteSpec, reading: Reading) -> Result<Self> {
        protocol::check(spec.dialect, reading)?;
        let client = Arc::new(Client::new(&spec)?);
        Ok(Remote { spec: Arc::new(spec), client, reading })
    }

    /// What was used.
    pub fn spent(&self) -> &Spent {
        &self.client.spent
    }

    /// Asks everything; each outcome goes to `sink` with its prompt's place in `asks`, in the order in which they come.
    ///
    /// # Errors
    /// What the sink gives; requests in flight are dropped then. Exit 78 where the server wants another key or lacks the
    /// model or the feature, 75 where it is down: `give_up_after` prompts in a row failed for the server's sake, or all
    /// that were asked did.
    pub async fn ask_all(&self, asks: Vec<Ask>, sink: &mut dyn Sink) -> Result<()> {
        let until = self.spec.deadline.map(|d| Instant::now() + d);
        let mut outcomes = stream::iter(asks.into_iter().enumerate())
            .map(|(place, ask)| {
                let remote = self.clone();
                async move { (place, remote.ask(&ask, until).await) }
            })
            .buffer_unordered(self.spec.concurrency);
        let mut tick = tokio::time::interval(TICK);
        let (mut answered, mut in_a_row, mut last) = (0usize, 0usize, None);
        loop {
            let next = tokio::select! {
                next = outcomes.next() => next,
                _ = tick.tick() => {
                    sink.tick().await?;
                    continue;
                }
            };
            let Some((place, outcome)) = next else { break };
            match &outcome {
                Ok(_) => (answered, in_a_row) = (answered + 1, 0),
                Err(failure) => {
                    tracing::info!(reason = failure.reason(), "a prompt has no answer: {failure}");
                    if let Some(error) = self.hopeless(failure, answered) {
                        return Err(error);
                    }
                    if failure.of_server() {
                        in_a_row += 1;
                        last = Some(failure.clone());
                    }
                }
            }
            sink.take(place, outcome).await?;
            if in_a_row >= self.spec.give_up_after {
                return Err(self.down(last.as_ref()));
            }
        }
        match last {
            Some(failure) if answered == 0 => Err(self.down(Some(&failure))),
            _ => Ok(()),
        }
    }

    /// What would fail for every prompt alike.
    fn hopeless(&self, failure: &Failure, answered: usize) -> Option<Error> {
        let error = |help: &str| {
            Error::spec(format!("the LLM server refuses model `{}`: {failure}", self.spec.model)).with_help(help)
        };
        match failure {
            Failure::Refused(401 | 403, _) => Some(error(match &self.spec.api_key_env {
                Some(_) => "check the key in the environment variable that `engine.api_key_env` names",
                None => "name the environment variable with the API key in `engine.api_key_env`",
            })),
            Failure::Refused(404 | 405, _) if answered == 0 => {
                Some(error("check `engine.url` (it mostly ends in /v1) and `engine.model`"))
            }
            Failure::Unsupported(what) if answered == 0 => Some(
                Error::spec(what.clone())
                    .with_help("use mode = \"generate\", another server, or engine.kind = \"local\""),
            ),
            Failure::Refused(code, text) if answered == 0 && unsupported(self.reading, text) => Some(
                Error::spec(format!("the server cannot answer mode = \"{}\": HTTP {code}: {text}", self.mode()))
                    .with_help("use mode = \"label\" or \"generate\", another server, or engine.kind = \"local\""),
            ),
            _ => None,
        }
    }

    fn mode(&self) -> &'static str {
        match self.reading {
            Reading::Label => "label",
            Reading::Likelihood => "likelihood",
            Reading::Generate => "generate",
        }
    }

    fn down(&self, last: Option<&Failure>) -> Error {
        let why = last.map_or_else(String::new, |f| format!(": {f}"));
        Error::new(Fault::Environment, format!("the LLM server does not answer{why}"))
            .with_help("what it answered is in the ledger; the same command goes on from there")
    }

    /// One prompt.
    async fn ask(&self, ask: &Ask, until: Option<Instant>) -> Outcome {
        let mut reply = Reply { scores: Vec::new(), prompt_tokens: 0, completion_tokens: 0, text: None };
        match self.reading {
            Reading::Label => {
                let body = protocol::label_body(&self.spec, &ask.system, &ask.user);
                let answer = self.chat(&body, until, &mut reply).await?;
                let scores = protocol::read_labels(&answer, &ask.letters)?;
                reply.scores = scores.into_iter().map(|s| vec![s]).collect();
            }
            Reading::Likelihood => {
                // One after the other: the first leaves the prompt in the server's prefix cache for the others.
                for title in &ask.titles {
                    let scores = self.likelihood(ask, title, until, &mut reply).await?;
                    reply.scores.push(scores);
                }
            }
            Reading::Generate => {
                let body = protocol::generate_body(&self.spec, &ask.system, &ask.user, &ask.titles, &ask.letters);
                let answer = self.chat(&body, until, &mut reply).await?;
                let (text, order) = protocol::read_order(&answer, &ask.titles, !ask.letters.is_empty(), &ask.places)?;
                let mut scores = vec![Vec::new(); ask.titles.len()];
                for (rank, place) in order.into_iter().enumerate() {
                    scores[place] = vec![-((rank + 1) as f32)];
                }
                reply.scores = scores;
                reply.text = Some(head(&text, TEXT_BYTES).to_owned());
            }
        }
        Ok(reply)
    }

    async fn likelihood(
        &self,
        ask: &Ask,
        title: &str,
        until: Option<Instant>,
        reply: &mut Reply,
    ) -> Result<Vec<f32>, Failure> {
        if self.spec.dialect == Dialect::Vllm {
            let body = protocol::prompt_logprobs_body(&self.spec, &ask.system, &ask.user, title);
            return protocol::read_prompt_logprobs(&self.chat(&body, until, reply).await?, title);
        }
        let prompt = ask.chat.as_deref().ok_or_else(|| {
            Failure::Unsupported(
                "mode = \"likelihood\" by completions needs the chat template of the stage's `model`".into(),
            )
        })?;
        let body = protocol::echo_body(&self.spec, prompt, title);
        let answer = self.post("/completions", &body, until, reply).await?;
        protocol::read_echo(&answer, prompt, title)
    }

    async fn chat(&self, body: &Value, until: Option<Instant>, reply: &mut Reply) -> Result<Value, Failure> {
        self.post("/chat/completions", body, until, reply).await
    }

    async fn post(
        &self,
        path: &str,
        body: &Value,
        until: Option<Instant>,
        reply: &mut Reply,
    ) -> Result<Value, Failure> {
        let answer = self.client.post(path, body, until).await?;
        let used = |key: &str| answer.pointer(&format!("/usage/{key}")).and_then(Value::as_u64).unwrap_or(0);
        reply.prompt_tokens += used("prompt_tokens");
        reply.completion_tokens += used("completion_tokens");
        Ok(answer)
    }
}

/// Whether a refusal speaks of the feature that a mode needs, and not of this prompt.
fn unsupported(reading: Reading, text: &str) -> bool {
    let text = text.to_lowercase();
    match reading {
        Reading::Label => text.contains("logprobs"),
        Reading::Likelihood => ["logprobs", "echo", "max_tokens"].iter().any(|w| text.contains(w)),
        Reading::Generate => ["response_format", "json_schema"].iter().any(|w| text.contains(w)),
    }
}
