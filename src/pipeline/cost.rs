//! What a night costs: prompt tokens, minutes and memory, from what the journal recorded.
//!
//! In: a plan and the journal. Out: tonight's [`Cost`] and the last night's.

use std::fmt;

use super::Pipeline;
use super::journal::{self, RunEntry};
use super::plan::{PlannedNode, State};
use crate::error::Result;
use crate::tables::Store;

/// What a night takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Prompt tokens that the LLM is asked: at most, for a night to come.
    pub tokens: f64,
    /// Minutes of work.
    pub minutes: f64,
    /// The most memory that the process holds, in bytes, where it is known.
    pub memory_bytes: Option<u64>,
    /// Stages whose time is not known.
    pub unknown: usize,
}

impl Cost {
    /// Of a plan: what will run, each stage as long as it took last, the LLM by its rate.
    pub fn tonight(nodes: &[PlannedNode], pipeline: &str, runs: &[RunEntry]) -> Cost {
        let mut cost = Cost::default();
        for node in nodes.iter().filter(|n| matches!(n.state, State::WillRun { .. })) {
            cost.tokens += node.estimate.tokens.unwrap_or(0) as f64;
            match node.expected_seconds {
                Some(seconds) => cost.minutes += seconds / 60.0,
                None => cost.unknown += 1,
            }
        }
        let models = nodes.iter().filter_map(|n| n.estimate.memory_bytes).max();
        let last = journal::nights(runs, pipeline, 1).next().and_then(|r| r.peak_memory_bytes);
        cost.memory_bytes = models.max(last);
        cost
    }

    /// Of the last run that ended well, with its id.
    pub fn last_night<'a>(pipeline: &'a str, runs: &'a [RunEntry]) -> Option<(&'a str, Cost)> {
        let run = journal::nights(runs, pipeline, 1).next()?;
        let (tokens, _) = run.llm();
        let cost = Cost { tokens, minutes: run.seconds / 60.0, memory_bytes: run.peak_memory_bytes, unknown: 0 };
        Some((&run.run_id, cost))
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} LLM tokens, {:.1} minutes", self.tokens, self.minutes)?;
        match self.memory_bytes {
            Some(bytes) => write!(f, ", {:.2} GiB", bytes as f64 / f64::from(1 << 30)),
            None => Ok(()),
        }
    }
}

/// The journal of a pipeline's artifacts.
///
/// # Errors
/// Exit 75 where the store fails.
pub async fn nights(pipeline: &Pipeline) -> Result<Vec<RunEntry>> {
    journal::read(&Store::open(&pipeline.artifacts, &pipeline.root)?).await
}
