//! The state of a tuning between two steps, and what is told of it.
//!
//! In: a [`State`]. Out: `tuning.json` (the curve, the best step so far) and `tuning.safetensors` (weights and optimizer under
//! `state.`, the best weights under `best.`), and back.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::recommenders::checkpoint::StateFiles;
use crate::recommenders::saved::NamedTensor;

const FILES: StateFiles = StateFiles { log: "tuning.json", tensors: "tuning.safetensors", version: 1 };

/// One row of the curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Steps that were taken; 0 before the first.
    pub step: usize,
    /// Mean loss of the step's learned tokens, before the step; `None` in row 0.
    pub loss: Option<f64>,
    /// Mean loss of the held-out examples' learned tokens after the step, where it was measured.
    pub held_out: Option<f64>,
    /// Learning rate of the step.
    pub rate: f64,
    /// Norm of the step's gradient before it was clipped.
    pub norm: f64,
    /// Tokens that went through the layers in all steps so far.
    pub tokens: u64,
    /// Seconds of all steps so far, evaluation included.
    pub seconds: f64,
}

/// Hears of a tuning's progress and may stop it.
pub trait Watch {
    /// At most `steps` steps will follow; `done` of them are already taken.
    fn begin(&self, _steps: usize, _done: usize) {}
    /// A step was taken, or the examples held out were measured.
    fn point(&self, _point: &Point, _told: &str) {}
    /// Asked before each pack of examples; an error stops the tuning and is what it returns.
    ///
    /// # Errors
    /// A stop was asked for.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// A [`Watch`] that neither hears nor stops.
pub struct Unwatched;
impl Watch for Unwatched {}

/// The best weights by the examples held out.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// After so many steps.
    pub step: usize,
    /// Their loss.
    pub loss: f64,
    /// Measurements since without a gain.
    pub since: usize,
    /// Them; empty where they are not kept.
    pub tensors: Vec<NamedTensor>,
}

/// All that the rest of a tuning depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The curve so far.
    pub curve: Vec<Point>,
    /// The best so far.
    pub best: Option<Best>,
    /// Weights, moments, number of steps.
    pub tensors: Vec<NamedTensor>,
}

/// Numbers are kept as bits: a resumed tuning must give the same bytes.
#[derive(Serialize, Deserialize)]
struct Log {
    curve: Vec<Line>,
    best: Option<(usize, u64, usize)>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    step: usize,
    loss: Option<u64>,
    held_out: Option<u64>,
    rate: u64,
    norm: u64,
    tokens: u64,
    seconds: u64,
}

impl State {
    /// As files.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_files(&self) -> Result<BTreeMap<String, Bytes>> {
        let line = |p: &Point| Line {
            step: p.step,
            loss: p.loss.map(f64::to_bits),
            held_out: p.held_out.map(f64::to_bits),
            rate: p.rate.to_bits(),
            norm: p.norm.to_bits(),
            tokens: p.tokens,
            seconds: p.seconds.to_bits(),
        };
        let best = self.best.as_ref().map(|b| (b.step, b.loss.to_bits(), b.since));
        let log = Log { curve: self.curve.iter().map(line).collect(), best };
        FILES.write(log, &self.tensors, self.best.as_ref().map_or(&[][..], |b| &b.tensors))
    }

    /// From files.
    ///
    /// # Errors
    /// A file is missing, damaged or of another version (exit 65).
    pub fn from_files(files: &BTreeMap<String, Bytes>) -> Result<Self> {
        let (log, tensors, mut of_best): (Log, _, _) = FILES.read(files)?;
        let point = |l: &Line| Point {
            step: l.step,
            loss: l.loss.map(f64::from_bits),
            held_out: l.held_out.map(f64::from_bits),
            rate: f64::from_bits(l.rate),
            norm: f64::from_bits(l.norm),
            tokens: l.tokens,
            seconds: f64::from_bits(l.seconds),
        };
        let best = log.best.map(|(step, loss, since)| Best {
            step,
            loss: f64::from_bits(loss),
            since,
            tensors: std::mem::take(&mut of_best),
        });
        Ok(State { curve: log.curve.iter().map(point).collect(), best, tensors })
    }
}

/// Seconds as `45 s`, `3 min` or `2 h 5 min`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..=89 => format!("{seconds} s"),
        90..=5399 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_give_back_every_bit() {
        let point = |step, loss| Point {
            step,
            loss,
            held_out: Some(1.0 / 3.0),
            rate: 0.1 + 0.2,
            norm: 3.0,
            tokens: 1 << 40,
            seconds: 0.7,
        };
        let tensor = |name: &str| NamedTensor::new(name, vec![2, 1], vec![1.5, f32::MIN_POSITIVE]);
        let state = State {
            curve: vec![point(0, None), point(1, Some(1e-300))],
            best: Some(Best { step: 1, loss: 0.3, since: 2, tensors: vec![tensor("a.b")] }),
            tensors: vec![tensor("a.b"), tensor("c")],
        };
        let files = state.to_files().unwrap();
        let mut back = State::from_files(&files).unwrap();
        back.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(back, state);
        for name in [FILES.log, FILES.tensors] {
            let mut cut = files.clone();
            cut.insert(name.to_owned(), files[name].slice(..files[name].len() / 2));
            assert_eq!(State::from_files(&cut).unwrap_err().fault.exit_code(), 65);
        }
    }

    #[test]
    fn durations_are_short() {
        assert_eq!([45.2, 90.0, 7500.0].map(duration), ["45 s", "2 min", "2 h 5 min"]);
    }
}
