//! Asks the LLM in this process.
//!
//! In: open questions. Out: answers, put in the ledger in segments of a few prompts.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::config::{Mode, Normalise, RatedBy, RerankConfig};
use super::questions::Question;
use crate::error::Result;
use crate::llm::ledger::{Answer, Ledger};
use crate::llm::ranking::RankRequest;
use crate::llm::rating::{Rating, RatingScale};
use crate::llm::{ChatTokenizer, Llm, LlmOptions, Message, ScoreRequest};
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
    let options = LlmOptions { precision: config.precision, ..LlmOptions::default() };
    let llm = Arc::new(tokio::task::spawn_blocking(move || Llm::open_with(&path, device, options)).await??);
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
                (0..n).for_each(|_| crate::fault::point("rerank-row"));
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

/// Ratings of a scale that nobody set.
const FIVE: [f64; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];

/// An order as one score per candidate: the negative place, from 1.
fn places(order: &[usize]) -> Vec<Vec<f32>> {
    let mut scores = vec![vec![f32::NEG_INFINITY]; order.len()];
    for (rank, &candidate) in order.iter().enumerate() {
        if let Some(score) = scores.get_mut(candidate) {
            *score = vec![-((rank + 1) as f32)];
        }
    }
    scores
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
    let scores =
        tokio::task::spawn_blocking(move || llm.continuation_logprobs(&[request], &mut |_| cancel.check())).await??;
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
            let scores = llm.label_logprobs_among(&prompts(), &labels, progress)?;
            Ok(scores.into_iter().map(|row| row.into_iter().map(|s| vec![s]).collect()).collect())
        }
        Mode::Likelihood => {
            let requests: Vec<ScoreRequest> = segment
                .iter()
                .map(|q| ScoreRequest { prompt: q.ids.clone(), continuations: q.scored.clone() })
                .collect();
            llm.continuation_logprobs(&requests, progress)
        }
        Mode::Generate => {
            let requests: Vec<RankRequest> = segment
                .iter()
                .map(|q| RankRequest { prompt: q.ids.clone(), candidates: q.scored.clone(), leads: Vec::new() })
                .collect();
            let ranked = llm.rank_by_generation(&requests, progress)?;
            Ok(ranked.into_iter().map(|r| places(&r.order)).collect())
        }
        Mode::Rating => {
            let scale = RatingScale::new(llm.chat(), config.ratings.as_deref().unwrap_or(&FIVE))?;
            // One prompt per candidate, all with the same beginning, which is computed once.
            let prompts: Vec<Vec<u32>> =
                segment.iter().flat_map(|q| q.scored.iter().map(|title| [q.ids.as_slice(), title].concat())).collect();
            let mut left: Vec<usize> = segment.iter().map(|q| q.scored.len()).collect();
            left.reverse();
            // Progress is told in prompts of users.
            let mut rated = 0;
            let ratings = llm.rate(&prompts, &scale, &mut |n| {
                rated += n;
                let mut users = 0;
                while let Some(next) = left.last().copied().filter(|next| *next <= rated) {
                    rated -= next;
                    users += 1;
                    left.pop();
                }
                progress(users)
            })?;
            let number = |r: Rating| match config.rated_by {
                RatedBy::Expected => r.expected,
                RatedBy::Greedy => r.greedy,
            };
            let mut ratings = ratings.into_iter().map(|r| vec![number(r) as f32]);
            Ok(segment.iter().map(|q| ratings.by_ref().take(q.scored.len()).collect()).collect())
        }
    }
}
