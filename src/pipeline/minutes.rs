//! A budget in minutes as a number of users, before the stage that asks starts.
//!
//! In: minutes, what earlier nights recorded, the stage and its inputs. Out: the same stage with `budget.users`, and that
//! number, which is in its fingerprint. A night that is run again with the same minutes keeps its number, though the rate has
//! changed since.

use std::collections::BTreeMap;

use serde_json::Value;

use super::StageNode;
use super::cache::{Cache, Record};
use super::journal::{RunEntry, tokens_per_second};
use super::nodes::{Digests, stage_identity};
use crate::error::Result;
use crate::stages::context::{ASKED_TOKENS, Minutes};
use crate::stages::{ModelFile, Stage};

/// Users of the first measurement on a machine that knows no rate; doubled until something was measured.
pub const PILOT: u64 = 16;
/// Prompt tokens that a measurement must have seen.
pub const ENOUGH_TOKENS: f64 = 1.0;

/// The minutes that hold for a stage: those of the command line where it has some, else those of the config.
pub fn minutes_of(stage: &dyn Stage, asked: Option<f64>) -> Option<f64> {
    match (stage.minutes(), asked) {
        (Minutes::No, _) => None,
        (Minutes::Open, asked) => asked,
        (Minutes::Set(_), Some(asked)) => Some(asked),
        (Minutes::Set(minutes), None) => Some(minutes),
    }
}

/// Rate of a record's own work, in prompt tokens per second.
pub fn measured(record: &Record) -> Option<f64> {
    let figure = |key: &str| record.counters.get(key).and_then(Value::as_f64);
    let (tokens, seconds) = (figure(ASKED_TOKENS)?, figure("llm_seconds")?);
    (tokens >= ENOUGH_TOKENS && seconds > 0.0).then(|| tokens / seconds)
}

/// Rate of the last nights.
pub fn recorded(runs: &[RunEntry], pipeline: &str, stage: &str) -> Option<f64> {
    tokens_per_second(runs, pipeline, stage)
}

/// What an earlier run made of the same inputs, settings and minutes: the record and the number of users.
pub async fn remembered(
    cache: &Cache,
    runs: &[RunEntry],
    pipeline: &str,
    node: &StageNode,
    (known, models): (&Digests, &BTreeMap<String, ModelFile>),
    minutes: f64,
) -> Result<Option<(Record, u64)>> {
    let earlier = runs.iter().rev().filter(|r| r.pipeline == pipeline).filter_map(|r| r.node(&node.name));
    for entry in earlier.filter(|n| n.minutes == Some(minutes)) {
        let Some(users) = entry.budget_users else { continue };
        let Some(stage) = node.stage.for_users(users) else { continue };
        let Ok(identity) = stage_identity(node, stage.as_ref(), known, models) else { continue };
        if identity.fingerprint() != entry.fingerprint {
            continue;
        }
        if let Some(record) = cache.find(&entry.fingerprint).await? {
            return Ok(Some((record, users)));
        }
    }
    Ok(None)
}
