//! Asks the LLM in this process.
//!
//! In: open questions. Out: answers, put in the ledger in segments of a few prompts.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::config::{Mode, Normalise, RerankConfig};
use super::questions::Question;
use crate::error::Result;
use crate::llm::ledger::{Answer, Ledger};
use crate::llm::{ChatTokenizer, Llm, Message, ScoreRequest};
use crate::stages::{StageContext, context::Cancel};

/// Prompts per ledger segment: some 15 seconds of work on two cores are lost by a kill.
const SEGMENT: usize = 16;

/// Asks what is open, in segments that go to the ledger one by one.
pub(super) async fn ask(
    config: &RerankConfig,
    ctx: &StageContext,
    path: &Path,
    chat: &ChatTokenizer,
    open: Vec<Question>,
    ledger: &mut Ledger,
) -> Result<()> {
    if open.is_empty() {
        return Ok(());
    }
    let (path, device) = (path.to_owned(), ctx.device);
    let llm = Arc::new(tokio::task::spawn_blocking(move || Llm::open(&path, device)).await??);
    ctx.observer.begin("prompts", open.len() as u64);
    let unconditional = match (config.mode, config.normalise) {
        (Mode::Likelihood, Normalise::Unconditional) => unconditional(&llm, chat, &open, &ctx.cancel).await?,
        _ => HashMap::new(),
    };
    for segment in open.chunks(SEGMENT) {
        ctx.cancel.check()?;
        let (llm, segment, cancel) = (llm.clone(), segment.to_vec(), ctx.cancel.clone());
        let (observer, config_of) = (ctx.observer.clone(), config.clone());
        let (segment, scored) = tokio::task::spawn_blocking(move || {
            let mut progress = |n: usize| {
                observer.advance(n as u64);
                cancel.check()
            };
            score(&llm, &config_of, &segment, &mut progress).map(|s| (segment, s))
        })
        .await??;
        let asked_at = chrono::Utc::now().timestamp_micros();
        let answers = segment.iter().zip(scored).map(|(q, per_candidate)| Answer {
            prompt_digest: q.prompt_digest.clone(),
            scores: (q.scored.iter().zip(per_candidate))
                .map(|(ids, lp)| {
                    let base = unconditional.get(ids).copied().unwrap_or(0.0);
                    normalised(config, &lp) - base
                })
                .collect(),
            tokens: q.tokens as i32,
            mode: config.mode.name().to_owned(),
            asked_at,
            ..Answer::default()
        });
        ledger.append(answers.collect()).await?;
    }
    Ok(())
}

/// One number of what a candidate's tokens have.
pub(super) fn normalised(config: &RerankConfig, logprobs: &[f32]) -> f32 {
    let sum: f32 = logprobs.iter().sum();
    match (config.mode, config.normalise) {
        (Mode::Likelihood, Normalise::Mean) => sum / logprobs.len().max(1) as f32,
        _ => sum,
    }
}

/// Log-probability of every title after a prompt that knows nothing of the user.
async fn unconditional(
    llm: &Arc<Llm>,
    chat: &ChatTokenizer,
    open: &[Question],
    cancel: &Cancel,
) -> Result<HashMap<Vec<u32>, f32>> {
    let titles: BTreeSet<Vec<u32>> = open.iter().flat_map(|q| q.scored.iter().cloned()).collect();
    let titles: Vec<Vec<u32>> = titles.into_iter().collect();
    let neutral = chat.encode_chat(&[Message { role: "user".into(), content: "Name one title.".into() }])?;
    let request = ScoreRequest { prompt: neutral, continuations: titles.clone() };
    let (llm, cancel) = (llm.clone(), cancel.clone());
    let scores = tokio::task::spawn_blocking(move || llm.continuation_logprobs(&[request], &mut |_| cancel.check()))
        .await??;
    let sums = scores.into_iter().flatten().map(|lp| lp.iter().sum());
    Ok(titles.into_iter().zip(sums).collect())
}

/// Per question and candidate: log-probabilities of its tokens, or one number that orders the candidates.
fn score(
    llm: &Llm,
    config: &RerankConfig,
    segment: &[Question],
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<Vec<f32>>>> {
    let prompts = || segment.iter().map(|q| q.ids.clone()).collect::<Vec<Vec<u32>>>();
    match config.mode {
        Mode::Label => {
            let labels: Vec<Vec<u32>> = segment.iter().map(|q| q.scored.iter().map(|l| l[0]).collect()).collect();
            let scores = llm.label_logprobs(&prompts(), &labels, progress)?;
            Ok(scores.into_iter().map(|row| row.into_iter().map(|s| vec![s]).collect()).collect())
        }
        Mode::Likelihood => {
            let requests: Vec<ScoreRequest> = segment
                .iter()
                .map(|q| ScoreRequest { prompt: q.ids.clone(), continuations: q.scored.clone() })
                .collect();
            llm.continuation_logprobs(&requests, progress)
        }
        Mode::Generate | Mode::Rating => Err(crate::error::Error::spec("this mode is not built yet")),
    }
}
