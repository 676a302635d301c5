//! The modes of asking a model, all on one scheduler: checks, jobs, what becomes of the numbers.
//!
//! In: prompts as token ids. Out: log-probabilities, orders, ratings, texts. Every mode is a set of jobs for the
//! [`Scheduler`] with a [`Plan`] for what is read; the head is multiplied by what is read only. Known beginnings
//! of prompts are kept from call to call, whatever the mode. Calls wait for each other, so that the memory's
//! bound holds for all of them together.

use std::sync::{Mutex, PoisonError};

use super::config::LlamaConfig;
use super::decoder::{Decoder, Wanted};
use super::options::{LlmOptions, Memory};
use super::radix::Radix;
use super::ranking::{RankRequest, Ranked, Ranking, Writer};
use super::rating::{Rating, RatingScale};
use super::scheduler::{Job, Limits, More, Plan, Scheduler};
use super::scoring::{among, argmax};
use crate::error::{Error, Result};

/// A prompt and texts that may follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoreRequest {
    /// Token ids, at least 1.
    pub prompt: Vec<u32>,
    /// Token ids of each continuation, at least 1 each.
    pub continuations: Vec<Vec<u32>>,
}

/// Called with the number of prompts that were finished since the last call; an error stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(usize) -> Result<()>;

/// The engine's face, the same for every device. What the modes do is told at [`super::Llm`].
pub trait Engine: Send + Sync {
    /// The shape of the model.
    fn config(&self) -> &LlamaConfig;
    /// Bytes that it takes at most.
    fn memory(&self) -> Memory;
    /// See [`super::Llm::forget`].
    fn forget(&self);
    /// See [`super::Llm::label_logprobs`].
    fn label_logprobs(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>>;
    /// See [`super::Llm::label_logprobs_among`].
    fn label_logprobs_among(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>>;
    /// See [`super::Llm::next_tokens`].
    fn next_tokens(&self, prompts: &[Vec<u32>], progress: Progress<'_>) -> Result<Vec<u32>>;
    /// See [`super::Llm::continuation_logprobs`].
    fn continuation_logprobs(&self, requests: &[ScoreRequest], progress: Progress<'_>) -> Result<Vec<Vec<Vec<f32>>>>;
    /// See [`super::Llm::rank_by_generation`].
    fn rank_by_generation(&self, requests: &[RankRequest], progress: Progress<'_>) -> Result<Vec<Ranked>>;
    /// See [`super::Llm::rate`].
    fn rate(&self, prompts: &[Vec<u32>], scale: &RatingScale, progress: Progress<'_>) -> Result<Vec<Rating>>;
    /// See [`super::Llm::hidden_means`].
    fn hidden_means(&self, texts: &[Vec<u32>], progress: Progress<'_>) -> Result<Vec<Vec<f32>>>;
    /// See [`super::Llm::logits`].
    fn logits(&self, ids: &[u32]) -> Result<Vec<f32>>;
    /// See [`super::Llm::generate`].
    fn generate(&self, prompt: &[u32], max_new: usize, stop: &[u32]) -> Result<Vec<u32>>;
}

/// A decoder with what it knows of earlier prompts.
pub struct Local<D: Decoder> {
    decoder: D,
    options: LlmOptions,
    limits: Limits,
    /// Locked for a whole call.
    tree: Mutex<Radix<D::Segment>>,
}

impl<D: Decoder> Local<D> {
    /// An engine over a decoder.
    pub fn new(decoder: D, options: LlmOptions) -> Self {
        let batch = options.batch_tokens.unwrap_or(decoder.batch_tokens()).max(1);
        let limits = Limits { batch, held: options.kv_bytes / decoder.token_bytes().max(1) };
        let tree = Mutex::new(Radix::new(decoder.token_bytes(), options.kv_bytes));
        Local { decoder, options, limits, tree }
    }

    fn run(&self, jobs: Vec<Job>, plan: &mut dyn Plan) -> Result<()> {
        // After a panic the tree is whole: it is changed between batches only.
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        Scheduler::new(&self.decoder, &mut tree, self.limits, jobs).run(plan)
    }

    /// Jobs that read the last position of prompts.
    fn prompt_jobs(&self, prompts: &[Vec<u32>], wanted: &dyn Fn(usize) -> Wanted) -> Result<Vec<Job>> {
        let job = |(i, prompt): (usize, &Vec<u32>)| {
            check_tokens(Decoder::config(&self.decoder), "prompt", prompt, 0)?;
            Ok(Job { ids: prompt.clone(), reads: vec![(prompt.len() - 1, wanted(i))], more: 0 })
        };
        prompts.iter().enumerate().map(job).collect()
    }

    fn labels(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        wanted: fn(Vec<u32>) -> Wanted,
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        if prompts.len() != labels.len() {
            let (n, m) = (prompts.len(), labels.len());
            return Err(Error::internal(format!("{n} prompts came with {m} lists of labels")));
        }
        labels.iter().try_for_each(|l| check_ids(Decoder::config(&self.decoder), "labels", l))?;
        let jobs = self.prompt_jobs(prompts, &|i| wanted(labels[i].clone()))?;
        let mut out = vec![Vec::new(); prompts.len()];
        self.run(
            jobs,
            &mut Once { read: &mut |job, _, values| out[job] = values.to_vec(), done: &mut |_| progress(1) },
        )?;
        Ok(out)
    }
}

/// A plan for jobs that are read once.
struct Once<'a> {
    read: &'a mut dyn FnMut(usize, usize, &[f32]),
    done: &'a mut dyn FnMut(usize) -> Result<()>,
}

impl Plan for Once<'_> {
    fn read(&mut self, job: usize, read: usize, values: &[f32]) {
        (self.read)(job, read, values);
    }

    fn done(&mut self, job: usize) -> Result<()> {
        (self.done)(job)
    }
}

impl<D: Decoder> Engine for Local<D> {
    fn config(&self) -> &LlamaConfig {
        self.decoder.config()
    }

    fn memory(&self) -> Memory {
        Memory::bound(&self.decoder, &self.options)
    }

    fn forget(&self) {
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        tree.set_budget(0);
        tree.set_budget(self.options.kv_bytes);
    }

    fn label_logprobs(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        self.labels(prompts, labels, Wanted::LogProbs, progress)
    }

    fn label_logprobs_among(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let logits = self.labels(prompts, labels, Wanted::Logits, progress)?;
        Ok(logits.iter().map(|l| among(l)).collect())
    }

    fn next_tokens(&self, prompts: &[Vec<u32>], progress: Progress<'_>) -> Result<Vec<u32>> {
        let jobs = self.prompt_jobs(prompts, &|_| Wanted::Vocabulary)?;
        let mut out = vec![0; prompts.len()];
        self.run(
            jobs,
            &mut Once { read: &mut |job, _, logits| out[job] = argmax(logits), done: &mut |_| progress(1) },
        )?;
        Ok(out)
    }

    fn continuation_logprobs(&self, requests: &[ScoreRequest], progress: Progress<'_>) -> Result<Vec<Vec<Vec<f32>>>> {
        let config = self.decoder.config();
        let mut jobs = Vec::new();
        // Which request and continuation a job is.
        let mut places = Vec::new();
        let mut left: Vec<usize> = requests.iter().map(|r| r.continuations.len()).collect();
        for (r, request) in requests.iter().enumerate() {
            for (c, continuation) in request.continuations.iter().enumerate() {
                check_tokens(config, "continuation", continuation, request.prompt.len())?;
                check_tokens(config, "prompt", &request.prompt, continuation.len())?;
                let mut ids = request.prompt.clone();
                // Nothing follows the last token, so it need not be computed.
                ids.extend_from_slice(&continuation[..continuation.len() - 1]);
                let first = request.prompt.len() - 1;
                let read = |(k, id): (usize, &u32)| (first + k, Wanted::LogProbs(vec![*id]));
                jobs.push(Job { ids, reads: continuation.iter().enumerate().map(read).collect(), more: 0 });
                places.push((r, c));
            }
        }
        let mut out: Vec<Vec<Vec<f32>>> =
            requests.iter().map(|r| r.continuations.iter().map(|c| vec![0.0; c.len()]).collect()).collect();
        let mut read = |job: usize, k: usize, logprobs: &[f32]| {
            let (r, c) = places[job];
            out[r][c][k] = logprobs[0];
        };
        let mut done = |job: usize| {
            let (r, _) = places[job];
            left[r] -= 1;
            if left[r] == 0 { progress(1) } else { Ok(()) }
        };
        self.run(jobs, &mut Once { read: &mut read, done: &mut done })?;
        Ok(out)
    }

    fn rank_by_generation(&self, requests: &[RankRequest], progress: Progress<'_>) -> Result<Vec<Ranked>> {
        let config = self.decoder.config();
        let mut out = vec![Ranked::default(); requests.len()];
        let (mut jobs, mut writers, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (r, request) in requests.iter().enumerate() {
            let written = request.written();
            check_tokens(config, "prompt", &request.prompt, written)?;
            request.candidates.iter().try_for_each(|c| check_ids(config, "candidates", c))?;
            request.leads.iter().try_for_each(|l| check_ids(config, "leads", l))?;
            let mut writer = Writer::new(request);
            match writer.next_choice() {
                // Nothing to choose: the order is known.
                None => {
                    out[r] = writer.finish();
                    progress(1)?;
                }
                Some((forced, allowed)) => {
                    let mut ids = request.prompt.clone();
                    ids.extend(forced);
                    let reads = vec![(ids.len() - 1, Wanted::Logits(allowed))];
                    jobs.push(Job { ids, reads, more: written.max(1) });
                    writers.push(writer);
                    places.push(r);
                }
            }
        }
        let mut ranking = Ranking { chosen: vec![None; writers.len()], writers, progress };
        self.run(jobs, &mut ranking)?;
        for (place, writer) in places.into_iter().zip(ranking.writers) {
            out[place] = writer.finish();
        }
        Ok(out)
    }

    fn rate(&self, prompts: &[Vec<u32>], scale: &RatingScale, progress: Progress<'_>) -> Result<Vec<Rating>> {
        if let Some(labels) = scale.single_tokens() {
            let labels = vec![labels; prompts.len()];
            let logits = self.labels(prompts, &labels, Wanted::Logits, progress)?;
            return Ok(logits.iter().map(|l| scale.rating(&l.iter().map(|x| vec![*x]).collect::<Vec<_>>())).collect());
        }
        let request = |p: &Vec<u32>| ScoreRequest { prompt: p.clone(), continuations: scale.tokens().to_vec() };
        let requests: Vec<ScoreRequest> = prompts.iter().map(request).collect();
        let logprobs = self.continuation_logprobs(&requests, progress)?;
        Ok(logprobs.iter().map(|l| scale.rating(l)).collect())
    }

    fn hidden_means(&self, texts: &[Vec<u32>], progress: Progress<'_>) -> Result<Vec<Vec<f32>>> {
        let config = self.decoder.config();
        texts.iter().try_for_each(|t| check_tokens(config, "text", t, 0))?;
        let job = |text: &Vec<u32>| {
            let reads = (0..text.len()).map(|position| (position, Wanted::Hidden)).collect();
            Job { ids: text.clone(), reads, more: 0 }
        };
        let mut sums = vec![vec![0f64; config.hidden]; texts.len()];
        let mut read = |job: usize, _: usize, hidden: &[f32]| {
            sums[job].iter_mut().zip(hidden).for_each(|(s, h)| *s += f64::from(*h));
        };
        self.run(texts.iter().map(job).collect(), &mut Once { read: &mut read, done: &mut |_| progress(1) })?;
        let mean = |(sum, text): (Vec<f64>, &Vec<u32>)| sum.iter().map(|s| (s / text.len() as f64) as f32).collect();
        Ok(sums.into_iter().zip(texts).map(mean).collect())
    }

    fn logits(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let jobs = self.prompt_jobs(&[ids.to_vec()], &|_| Wanted::Vocabulary)?;
        let mut out = Vec::new();
        self.run(jobs, &mut Once { read: &mut |_, _, logits| out = logits.to_vec(), done: &mut |_| Ok(()) })?;
        Ok(out)
    }

    fn generate(&self, prompt: &[u32], max_new: usize, stop: &[u32]) -> Result<Vec<u32>> {
        check_tokens(self.decoder.config(), "prompt", prompt, max_new)?;
        if max_new == 0 {
            return Ok(Vec::new());
        }
        let reads = vec![(prompt.len() - 1, Wanted::Vocabulary)];
        let mut text = Text { ids: Vec::new(), max_new, stop };
        self.run(vec![Job { ids: prompt.to_vec(), reads, more: max_new }], &mut text)?;
        Ok(text.ids)
    }
}

/// A greedy text.
struct Text<'a> {
    ids: Vec<u32>,
    max_new: usize,
    stop: &'a [u32],
}

impl Plan for Text<'_> {
    fn read(&mut self, _: usize, _: usize, logits: &[f32]) {
        self.ids.push(argmax(logits));
    }

    fn next(&mut self, _: usize) -> Option<More> {
        let last = self.ids.last().copied().filter(|id| self.ids.len() < self.max_new && !self.stop.contains(id))?;
        Some(More { ids: vec![last], wanted: Wanted::Vocabulary })
    }

    fn done(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
}

/// A sequence has at least one token, each of the vocabulary, and fits the context with `more` beside it.
fn check_tokens(config: &LlamaConfig, what: &str, ids: &[u32], more: usize) -> Result<()> {
    if ids.is_empty() {
        return Err(Error::data(format!("the {what} has no tokens; at least 1 is needed")));
    }
    if ids.len().saturating_add(more) > config.context {
        let with = if more > 0 { format!(" with the {more} beside it") } else { String::new() };
        return Err(Error::data(format!(
            "the {what} of {} tokens{with} is longer than the model's context of {} tokens",
            ids.len(),
            config.context
        )));
    }
    check_ids(config, what, ids)
}

/// Every id is below the vocabulary's size.
fn check_ids(config: &LlamaConfig, what: &str, ids: &[u32]) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= config.vocab_size) {
        Some(id) => Err(Error::data(format!(
            "the {what} has the token id {id}, which is not in the vocabulary (0 to {})",
            config.vocab_size - 1
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
