//! Many sequences through one decoder: batches by tokens, known beginnings, sequences that go on.
//!
//! In: [`Job`]s, and a [`Plan`] that gets what is read and says how a sequence goes on. What sequences begin with is
//! looked up in a [`Radix`] tree and, where it is not known yet, computed once per batch and put there.
//! A batch has at most `batch_tokens` tokens: sequences of several jobs, merged and packed; a longer sequence goes
//! through in pieces. Sequences that go on keep their segments meanwhile, within the budget: as many at a time
//! as fit, always at least one.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::decoder::{Decoder, Wanted};
use super::pack::{Merged, Seen, Sequence, common_prefix};
use super::radix::{Held, Radix};
use crate::error::Result;

/// A sequence to compute.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its tokens, at least 1.
    pub ids: Vec<u32>,
    /// Positions and what is wanted of each, ascending, at least one.
    pub reads: Vec<(usize, Wanted)>,
    /// Tokens that may be added to it at most.
    pub more: usize,
}

/// What a call does with what is read.
pub trait Plan {
    /// Gets the result of a job's read (its index in the reads that were given last).
    fn read(&mut self, job: usize, read: usize, values: &[f32]);

    /// All reads of a job were answered: how it goes on, or `None`.
    fn next(&mut self, job: usize) -> Option<More> {
        let _ = job;
        None
    }

    /// The job is done; an error stops the work.
    fn done(&mut self, job: usize) -> Result<()>;
}

/// Tokens that are added to a sequence, at least 1; what is wanted is read at the last one.
#[derive(Clone, Debug)]
pub struct More {
    /// The tokens.
    pub ids: Vec<u32>,
    /// What is wanted after them.
    pub wanted: Wanted,
}

/// Limits of a run, all in whole tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a batch.
    pub batch: usize,
    /// Tokens whose keys and values are held, in the tree and by sequences that go on.
    pub held: usize,
}

/// A sequence in work.
struct Flight<S> {
    job: usize,
    ids: Vec<u32>,
    reads: Vec<(usize, Wanted)>,
    /// Reads that were answered.
    answered: usize,
    /// Keys and values of its first tokens.
    path: Vec<Held<S>>,
    /// How many tokens those are.
    cached: usize,
    /// Tokens that others may begin with.
    shared: usize,
    /// Tokens that may be added to it; 0 where it ends with its last read.
    more: usize,
    /// Tokens that are set aside for it.
    reserved: usize,
}

impl<S> Flight<S> {
    fn pending(&self) -> usize {
        self.ids.len() - self.cached
    }

    fn goes_on(&self) -> bool {
        self.more > 0
    }
}

/// Runs jobs to their end.
pub struct Scheduler<'a, D: Decoder> {
    decoder: &'a D,
    tree: &'a mut Radix<D::Segment>,
    limits: Limits,
    jobs: Vec<Option<Job>>,
    /// Jobs that were not begun, neighbours share beginnings.
    queue: VecDeque<usize>,
    /// Sequences that were begun and go on.
    active: VecDeque<Flight<D::Segment>>,
    /// Tokens that are set aside for those.
    reserved: usize,
}

impl<'a, D: Decoder> Scheduler<'a, D> {
    /// Prepares jobs.
    pub fn new(decoder: &'a D, tree: &'a mut Radix<D::Segment>, limits: Limits, jobs: Vec<Job>) -> Self {
        let mut order: Vec<usize> = (0..jobs.len()).collect();
        order.sort_by(|a, b| jobs[*a].ids.cmp(&jobs[*b].ids));
        let jobs = jobs.into_iter().map(Some).collect();
        tree.set_budget(limits.held.saturating_mul(decoder.token_bytes()));
        Scheduler { decoder, tree, limits, jobs, queue: order.into(), active: VecDeque::new(), reserved: 0 }
    }

    /// Runs all jobs.
    ///
    /// # Errors
    /// What the decoder or `plan` gives; the jobs that are not done then never will be.
    pub fn run(mut self, plan: &mut dyn Plan) -> Result<()> {
        loop {
            let batch = self.next_batch();
            if batch.is_empty() {
                return Ok(());
            }
            self.compute(batch, plan)?;
        }
    }

    /// Sequences for the next batch; none when all is done.
    fn next_batch(&mut self) -> Vec<Flight<D::Segment>> {
        let size = self.limits.batch.max(1);
        let mut batch: Vec<Flight<D::Segment>> = Vec::new();
        let mut tokens = 0;
        // Those in work go first: each that ends makes room.
        for _ in 0..self.active.len() {
            let Some(flight) = self.active.pop_front() else { break };
            if batch.is_empty() || tokens + flight.pending() <= size {
                tokens += flight.pending();
                batch.push(flight);
            } else {
                self.active.push_back(flight);
            }
        }
        while tokens < size
            && let Some(job) = self.queue.front().copied()
        {
            let Some(flight) = self.begin(job) else { break };
            let fresh = match batch.last() {
                Some(before) if same_past(&before.path, &flight.path) => {
                    flight.ids.len() - common_prefix(&before.ids, &flight.ids).max(flight.cached)
                }
                _ => flight.pending(),
            };
            if !batch.is_empty() && tokens + fresh > size {
                self.give_up(flight);
                break;
            }
            self.queue.pop_front();
            tokens += fresh;
            batch.push(flight);
        }
        batch
    }

    /// Looks up what is known of a job; `None` where no room is left for a sequence that goes on.
    fn begin(&mut self, job: usize) -> Option<Flight<D::Segment>> {
        let Job { ids, reads, more } = self.jobs[job].take()?;
        // A known position has no result, so what is read is computed.
        let first_read = reads.first().map_or(0, |r| r.0);
        let path = self.tree.lookup(&ids[..first_read]);
        let cached: usize = path.iter().map(|h| h.len).sum();
        let fresh = ids.len() - cached;
        let goes_on = more > 0;
        let shared = if goes_on { ids.len() } else { first_read };
        // What it will hold between batches beside the tree: itself, or what was computed of a sequence longer than a batch.
        let reserved = if goes_on || fresh > self.limits.batch { fresh + more } else { 0 };
        let others = self.reserved > 0;
        let flight = Flight { job, ids, reads, answered: 0, path, cached, shared, more, reserved };
        self.reserve(reserved as isize);
        // The tree keeps what others hold.
        if reserved > 0 && others && self.reserved + self.tree.tokens() > self.limits.held {
            self.give_up(flight);
            return None;
        }
        Some(flight)
    }

    /// Puts a job back that was looked up only.
    fn give_up(&mut self, flight: Flight<D::Segment>) {
        let Flight { job, ids, reads, more, path, reserved, .. } = flight;
        drop(path);
        self.reserve(-(reserved as isize));
        self.jobs[job] = Some(Job { ids, reads, more });
    }

    /// Sets tokens aside (or frees them); the tree has the rest.
    fn reserve(&mut self, tokens: isize) {
        if tokens == 0 {
            return;
        }
        self.reserved = self.reserved.saturating_add_signed(tokens);
        let rest = self.limits.held.saturating_sub(self.reserved);
        self.tree.set_budget(rest * self.decoder.token_bytes());
    }

    /// Computes a batch, hands out what was read and puts what others may begin with into the tree.
    fn compute(&mut self, mut batch: Vec<Flight<D::Segment>>, plan: &mut dyn Plan) -> Result<()> {
        let mut past: Vec<Arc<D::Segment>> = Vec::new();
        let mut index: HashMap<*const D::Segment, usize> = HashMap::new();
        let mut seen: Vec<Vec<Seen>> = Vec::with_capacity(batch.len());
        for flight in &batch {
            let of = |held: &Held<D::Segment>| {
                let segment = *index.entry(Arc::as_ptr(&held.segment)).or_insert_with(|| {
                    past.push(held.segment.clone());
                    past.len() - 1
                });
                Seen { segment, len: held.len }
            };
            seen.push(flight.path.iter().map(of).collect());
        }
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by(|a, b| (&seen[*a], &batch[*a].ids).cmp(&(&seen[*b], &batch[*b].ids)));
        // Only a sequence that is alone can be longer than a batch.
        let cut = self.limits.batch.max(1);
        let upto: Vec<usize> = order
            .iter()
            .map(|f| batch[*f].ids.len().min(batch[*f].cached + if batch.len() == 1 { cut } else { usize::MAX / 2 }))
            .collect();
        let sequences: Vec<Sequence<'_>> = order
            .iter()
            .zip(&upto)
            .map(|(f, upto)| {
                let flight = &batch[*f];
                let waiting = &flight.reads[flight.answered..];
                let now = waiting.iter().take_while(|r| r.0 < *upto).count();
                let held = flight.goes_on() || *upto < flight.ids.len();
                Sequence {
                    ids: &flight.ids[..*upto],
                    past: &seen[*f],
                    cached: flight.cached,
                    keep: if held { *upto } else { flight.shared.min(*upto) },
                    reads: &waiting[..now],
                }
            })
            .collect();
        let merged = Merged::new(&sequences);
        let mut picked = Vec::new();
        let borrowed: Vec<&D::Segment> = past.iter().map(Arc::as_ref).collect();
        let segments = self.decoder.forward(&merged.pack, &borrowed, &mut |read, values| {
            for reader in &merged.readers[read] {
                let flight = &batch[order[reader.sequence]];
                let at = flight.answered + reader.read;
                match &reader.picks {
                    None => plan.read(flight.job, at, values),
                    Some(picks) => {
                        picked.clear();
                        picked.extend(picks.iter().map(|p| values[*p]));
                        plan.read(flight.job, at, &picked);
                    }
                }
            }
        })?;
        let answered: Vec<usize> = sequences.iter().map(|s| s.reads.len()).collect();
        let mut kept: Vec<Option<Arc<D::Segment>>> = vec![None; merged.pack.runs.len()];
        let keeping = merged.pack.runs.iter().enumerate().filter(|(_, run)| run.keep > 0).map(|(r, _)| r);
        for (run, segment) in keeping.zip(segments) {
            kept[run] = Some(Arc::new(segment));
        }
        self.remember(&batch, &order, &merged, &kept);
        drop(past);
        for (s, f) in order.iter().enumerate() {
            batch[*f].answered += answered[s];
            if batch[*f].goes_on() || upto[s] < batch[*f].ids.len() {
                let runs = merged.paths[s].iter().map(|r| (&kept[*r], merged.pack.runs[*r].len));
                let fresh = runs.filter_map(|(segment, len)| Some(Held { segment: segment.clone()?, len }));
                batch[*f].path.extend(fresh);
                batch[*f].cached = upto[s];
            } else {
                batch[*f].cached = batch[*f].ids.len();
            }
        }
        drop(kept);
        for flight in batch {
            self.advance(flight, plan)?;
        }
        Ok(())
    }

    /// Puts what others may begin with into the tree.
    fn remember(
        &mut self,
        batch: &[Flight<D::Segment>],
        order: &[usize],
        merged: &Merged,
        kept: &[Option<Arc<D::Segment>>],
    ) {
        let decoder = self.decoder;
        let slice = |s: &D::Segment, from: usize, len: usize| decoder.slice(s, from, len);
        let mut shared = vec![0; merged.pack.runs.len()];
        for (path, flight) in merged.paths.iter().zip(order) {
            path.iter().for_each(|run| shared[*run] = batch[*flight].shared.max(shared[*run]));
        }
        for (r, run) in merged.pack.runs.iter().enumerate() {
            if let Some(segment) = kept[r].as_ref().filter(|_| run.position < shared[r]) {
                let ids = &batch[order[merged.owners[r]]].ids;
                self.tree.insert(&ids[..run.position + run.keep], run.position, segment.clone(), &slice);
            }
        }
    }

    /// Ends a sequence or lets it go on.
    fn advance(&mut self, mut flight: Flight<D::Segment>, plan: &mut dyn Plan) -> Result<()> {
        if flight.answered < flight.reads.len() || flight.pending() > 0 {
            self.active.push_back(flight);
            return Ok(());
        }
        if flight.goes_on()
            && let Some(More { ids, wanted }) = plan.next(flight.job)
        {
            flight.ids.extend(ids);
            flight.reads = vec![(flight.ids.len() - 1, wanted)];
            flight.answered = 0;
            self.active.push_back(flight);
            return Ok(());
        }
        let Flight { job, path, reserved, .. } = flight;
        drop(path);
        self.reserve(-(reserved as isize));
        plan.done(job)
    }
}

/// Whether two paths are the same segments.
fn same_past<S>(a: &[Held<S>], b: &[Held<S>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.len == b.len && Arc::ptr_eq(&a.segment, &b.segment))
}
