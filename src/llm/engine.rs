//! Many prompts through one decoder: checks, order, batches, the shared prefix, progress.
//!
//! In: token sequences with the positions that are read. Out: the logits of those positions,
//! one row at a time, so that no batch of vocabulary-wide rows is ever held.
//!
//! Sequences are sorted, so that neighbours share prefixes. What all of them begin with is computed
//! once per call and kept in the cache; what the sequences of a batch share beyond that is computed
//! once per batch ([`Pack::merge`]).

use super::config::LlamaConfig;
use super::decoder::Decoder;
use super::pack::{Pack, Sequence, common_prefix};
use super::scoring::{argmax, log_probabilities};
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

/// The engine's face, the same for every device.
pub trait Engine: Send + Sync {
    /// The shape of the model.
    fn config(&self) -> &LlamaConfig;
    /// See [`super::Llm::label_logprobs`].
    fn label_logprobs(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>>;
    /// See [`super::Llm::next_tokens`].
    fn next_tokens(&self, prompts: &[Vec<u32>], progress: Progress<'_>) -> Result<Vec<u32>>;
    /// See [`super::Llm::continuation_logprobs`].
    fn continuation_logprobs(&self, requests: &[ScoreRequest], progress: Progress<'_>) -> Result<Vec<Vec<Vec<f32>>>>;
    /// See [`super::Llm::logits`].
    fn logits(&self, ids: &[u32]) -> Result<Vec<f32>>;
    /// See [`super::Llm::generate`].
    fn generate(&self, prompt: &[u32], max_new: usize, stop: &[u32]) -> Result<Vec<u32>>;
}

/// A shared prefix shorter than this is not worth a pass of its own.
const SHORT_PREFIX: usize = 16;

/// One sequence of a call.
struct Job {
    ids: Vec<u32>,
    read_from: usize,
}

impl<D: Decoder> Engine for D {
    fn config(&self) -> &LlamaConfig {
        Decoder::config(self)
    }

    fn label_logprobs(
        &self,
        prompts: &[Vec<u32>],
        labels: &[Vec<u32>],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        if prompts.len() != labels.len() {
            return Err(Error::internal(format!(
                "{} prompts came with {} lists of labels",
                prompts.len(),
                labels.len()
            )));
        }
        let jobs = prompt_jobs(Decoder::config(self), prompts)?;
        for labels in labels {
            check_ids(Decoder::config(self), "labels", labels)?;
        }
        let mut out = vec![Vec::new(); prompts.len()];
        let mut read = |job: usize, _: usize, logits: &[f32]| out[job] = log_probabilities(logits, &labels[job]);
        run(self, &jobs, &mut read, &mut |jobs| progress(jobs.len()))?;
        Ok(out)
    }

    fn next_tokens(&self, prompts: &[Vec<u32>], progress: Progress<'_>) -> Result<Vec<u32>> {
        let jobs = prompt_jobs(Decoder::config(self), prompts)?;
        let mut out = vec![0; prompts.len()];
        run(self, &jobs, &mut |job, _, logits| out[job] = argmax(logits), &mut |jobs| progress(jobs.len()))?;
        Ok(out)
    }

    fn continuation_logprobs(&self, requests: &[ScoreRequest], progress: Progress<'_>) -> Result<Vec<Vec<Vec<f32>>>> {
        let config = Decoder::config(self);
        let mut jobs = Vec::new();
        // Which request and continuation a job is.
        let mut places = Vec::new();
        let mut left: Vec<usize> = requests.iter().map(|r| r.continuations.len()).collect();
        for (r, request) in requests.iter().enumerate() {
            for (c, continuation) in request.continuations.iter().enumerate() {
                check_tokens(config, "continuation", continuation, request.prompt.len())?;
                check_tokens(config, "prompt", &request.prompt, continuation.len())?;
                let mut ids = request.prompt.clone();
                // Nothing follows the last token, so it need not be read.
                ids.extend_from_slice(&continuation[..continuation.len() - 1]);
                jobs.push(Job { ids, read_from: request.prompt.len() - 1 });
                places.push((r, c));
            }
        }
        let mut out: Vec<Vec<Vec<f32>>> =
            requests.iter().map(|r| r.continuations.iter().map(|c| vec![0.0; c.len()]).collect()).collect();
        let mut read = |job: usize, k: usize, logits: &[f32]| {
            let (r, c) = places[job];
            out[r][c][k] = log_probabilities(logits, &requests[r].continuations[c][k..=k])[0];
        };
        let mut done = |jobs: &[usize]| {
            let mut finished = 0;
            for job in jobs {
                let (r, _) = places[*job];
                left[r] -= 1;
                finished += usize::from(left[r] == 0);
            }
            progress(finished)
        };
        run(self, &jobs, &mut read, &mut done)?;
        Ok(out)
    }

    fn logits(&self, ids: &[u32]) -> Result<Vec<f32>> {
        check_tokens(Decoder::config(self), "prompt", ids, 0)?;
        let jobs = [Job { ids: ids.to_vec(), read_from: ids.len() - 1 }];
        let mut out = Vec::new();
        run(self, &jobs, &mut |_, _, logits| out = logits.to_vec(), &mut |_| Ok(()))?;
        Ok(out)
    }

    fn generate(&self, prompt: &[u32], max_new: usize, stop: &[u32]) -> Result<Vec<u32>> {
        check_tokens(Decoder::config(self), "prompt", prompt, max_new)?;
        let mut cache = self.empty();
        let mut out = Vec::new();
        let mut fresh = prompt.to_vec();
        while out.len() < max_new {
            let mut next = 0;
            chunks(self, &mut cache, &fresh, fresh.len() - 1, &mut |_, logits| next = argmax(logits))?;
            out.push(next);
            if stop.contains(&next) {
                break;
            }
            fresh = vec![next];
        }
        Ok(out)
    }
}

/// Prompts whose last position is read.
fn prompt_jobs(config: &LlamaConfig, prompts: &[Vec<u32>]) -> Result<Vec<Job>> {
    let job = |prompt: &Vec<u32>| {
        check_tokens(config, "prompt", prompt, 0)?;
        Ok(Job { ids: prompt.clone(), read_from: prompt.len() - 1 })
    };
    prompts.iter().map(job).collect()
}

/// Appends `ids` to the cache, as many at once as the decoder likes, and calls `each` with every
/// position from `read_from` on (counted from there) and its logits.
fn chunks<D: Decoder>(
    decoder: &D,
    cache: &mut D::Cache,
    ids: &[u32],
    read_from: usize,
    each: &mut dyn FnMut(usize, &[f32]),
) -> Result<()> {
    let size = decoder.batch_tokens();
    for (i, chunk) in ids.chunks(size).enumerate() {
        let start = i * size;
        let first = read_from.saturating_sub(start).min(chunk.len());
        let pack = Pack::chain(chunk, first);
        decoder.forward(cache, &pack, true, &mut |r, logits| each(start + first + r - read_from, logits))?;
    }
    Ok(())
}

/// Runs all jobs. `read` gets a job, the index of a position from its `read_from` on, and the
/// position's logits; `done` gets the jobs that a batch has finished.
fn run<D: Decoder>(
    decoder: &D,
    jobs: &[Job],
    read: &mut dyn FnMut(usize, usize, &[f32]),
    done: &mut dyn FnMut(&[usize]) -> Result<()>,
) -> Result<()> {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by(|a, b| jobs[*a].ids.cmp(&jobs[*b].ids));
    let (Some(first), Some(last)) = (order.first(), order.last()) else { return Ok(()) };

    let mut cache = decoder.empty();
    let mut root = common_prefix(&jobs[*first].ids, &jobs[*last].ids);
    // A cached position's logits are gone.
    root = jobs.iter().map(|j| j.read_from).fold(root, usize::min);
    let fresh: usize = jobs.iter().map(|j| j.ids.len() - root).sum();
    if root < SHORT_PREFIX || fresh <= decoder.batch_tokens() {
        root = 0;
    } else {
        chunks(decoder, &mut cache, &jobs[*first].ids[..root], root, &mut |_, _| ())?;
    }

    let mut from = 0;
    while from < order.len() {
        let to = batch_end(decoder, jobs, &order, from, root);
        let batch = &order[from..to];
        let longest = jobs[batch[0]].ids.len() - root;
        if batch.len() == 1 && longest > decoder.batch_tokens() {
            let job = &jobs[batch[0]];
            chunks(decoder, &mut cache, &job.ids[root..], job.read_from - root, &mut |k, logits| {
                read(batch[0], k, logits);
            })?;
            decoder.truncate(&mut cache, root);
        } else {
            let sequences: Vec<Sequence<'_>> = batch
                .iter()
                .map(|j| Sequence { ids: &jobs[*j].ids[root..], read_from: jobs[*j].read_from - root })
                .collect();
            let pack = Pack::merge(&sequences);
            let places: Vec<(usize, usize)> =
                batch.iter().flat_map(|j| (0..jobs[*j].ids.len() - jobs[*j].read_from).map(move |k| (*j, k))).collect();
            decoder.forward(&mut cache, &pack, false, &mut |r, logits| read(places[r].0, places[r].1, logits))?;
        }
        done(batch)?;
        from = to;
    }
    Ok(())
}

/// Where the batch that begins at `from` ends: the tokens that it adds fit the decoder's batch.
fn batch_end<D: Decoder>(decoder: &D, jobs: &[Job], order: &[usize], from: usize, root: usize) -> usize {
    let mut tokens = 0;
    let mut before: &[u32] = &jobs[order[from]].ids[..root];
    for (i, job) in order.iter().enumerate().skip(from) {
        let ids = &jobs[*job].ids;
        tokens += ids.len() - common_prefix(before, ids);
        if tokens > decoder.batch_tokens() && i > from {
            return i;
        }
        before = ids;
    }
    order.len()
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
mod tests {
    use std::path::Path;

    use super::*;
    use crate::llm::cpu::kernels::Isa;
    use crate::llm::cpu::{Cache, CpuModel};
    use crate::llm::weights::Weights;

    /// The tiny model with batches of a few tokens.
    struct Small {
        model: CpuModel,
        batch: usize,
    }

    impl Decoder for Small {
        type Cache = Cache;

        fn config(&self) -> &LlamaConfig {
            Decoder::config(&self.model)
        }
        fn batch_tokens(&self) -> usize {
            self.batch
        }
        fn empty(&self) -> Cache {
            self.model.empty()
        }
        fn truncate(&self, cache: &mut Cache, len: usize) {
            self.model.truncate(cache, len);
        }
        fn forward(
            &self,
            cache: &mut Cache,
            pack: &Pack,
            keep: bool,
            each: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<()> {
            self.model.forward(cache, pack, keep, each)
        }
    }

    fn tiny(batch: usize) -> Small {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm/tiny");
        let model = CpuModel::load(&Weights::open(&path).unwrap(), Isa::detect()).unwrap();
        Small { model, batch }
    }

    /// Every way to cut the work (prefix in the cache, batches, a sequence longer than a batch) gives the same bits.
    #[test]
    fn the_size_of_a_batch_does_not_change_results() {
        let common: Vec<u32> = (0..40).map(|i| (i * 11 + 5) % 64).collect();
        let request = |i: u32| {
            let mut prompt = common[..40 - (i as usize % 3)].to_vec();
            prompt.extend((0..i * 7 % 30).map(|t| (t * i + 1) % 64));
            ScoreRequest { prompt, continuations: vec![vec![i, 2, 3, 4], vec![i], vec![9; 20]] }
        };
        let requests: Vec<ScoreRequest> = (0..9).map(request).collect();
        let prompts: Vec<Vec<u32>> = requests.iter().map(|r| r.prompt.clone()).collect();
        let labels = vec![vec![7, 8]; prompts.len()];
        let all = |engine: &Small| {
            let scores = engine.continuation_logprobs(&requests, &mut |_| Ok(())).unwrap();
            let mut finished = 0;
            let mut progress = |n: usize| {
                finished += n;
                Ok(())
            };
            let labels = engine.label_logprobs(&prompts, &labels, &mut progress).unwrap();
            assert_eq!(finished, prompts.len());
            (
                scores,
                labels,
                engine.generate(&prompts[1], 9, &[]).unwrap(),
                engine.next_tokens(&prompts, &mut |_| Ok(())).unwrap(),
            )
        };
        let want = all(&tiny(4096));
        for batch in [1, 7, 50, 100] {
            assert_eq!(all(&tiny(batch)), want, "batches of {batch}");
        }
    }

    #[test]
    fn no_prompts_are_no_work() {
        let engine = tiny(100);
        assert!(engine.label_logprobs(&[], &[], &mut |_| Ok(())).unwrap().is_empty());
        let request = ScoreRequest { prompt: vec![1], continuations: vec![] };
        assert_eq!(engine.continuation_logprobs(&[request], &mut |_| Ok(())).unwrap(), [Vec::<Vec<f32>>::new()]);
        assert!(engine.generate(&[1], 0, &[]).unwrap().is_empty());
    }
}
