//! What a person sees of a tuning: step, loss, held-out loss, tokens per second, remaining time.

use std::sync::Arc;

use crate::error::Result;
use crate::llm::tune::progress::{Point, Watch};
use crate::stages::context::{Cancel, Observer};

/// Shows a tuning, and stops it where that was asked for.
pub(super) struct TuneProgress {
    observer: Arc<dyn Observer>,
    cancel: Cancel,
}

impl TuneProgress {
    pub fn new(observer: Arc<dyn Observer>, cancel: Cancel) -> Self {
        TuneProgress { observer, cancel }
    }
}

impl Watch for TuneProgress {
    fn begin(&self, steps: usize, done: usize) {
        self.observer.begin("steps", steps as u64);
        if done > 0 {
            self.observer.note(&format!("goes on after step {done} of {steps}"));
            self.observer.advance(done as u64);
        }
    }

    fn point(&self, point: &Point, told: &str) {
        match point.held_out {
            Some(_) => self.observer.note(told),
            None => self.observer.status(told),
        }
        if point.step > 0 {
            self.observer.advance(1);
        }
    }

    fn check(&self) -> Result<()> {
        self.cancel.check()
    }
}
