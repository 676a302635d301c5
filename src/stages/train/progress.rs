//! What a person sees of a fit: epoch, loss, validation, remaining time.
//!
//! In: the epochs as the trainer tells them, those of a resumed fit again. Out: calls of the stage's observer.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::error::Result;
use crate::recommenders::{Epoch, Watch};
use crate::stages::context::{Cancel, Observer};

/// Epochs that the remaining time is estimated from.
const RECENT: usize = 10;

/// Shows a fit, and stops it where that was asked for.
pub(in crate::stages) struct FitProgress {
    observer: Arc<dyn Observer>,
    cancel: Cancel,
    /// Name of the validation metric, and its sign: RMSE is told with a minus sign.
    metric: (&'static str, f64),
    /// What comes before the epoch, as `trial 3 of 20: `; where it is none, epochs are the units of the bar.
    before: Option<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    epochs: usize,
    best: Option<(usize, f64)>,
    last: Option<Instant>,
    recent: Vec<f64>,
}

impl FitProgress {
    /// A fit that is the whole work of its stage: a unit is an epoch.
    pub fn of_stage(observer: Arc<dyn Observer>, cancel: Cancel, metric: (&'static str, f64)) -> Self {
        FitProgress { observer, cancel, metric, before: None, state: Mutex::default() }
    }

    /// One of many fits, told by `before`; the units are the caller's.
    pub fn of_many(observer: Arc<dyn Observer>, cancel: Cancel, metric: (&'static str, f64), before: String) -> Self {
        FitProgress { observer, cancel, metric, before: Some(before), state: Mutex::default() }
    }

    fn text(&self, epoch: &Epoch, state: &mut State) -> String {
        // An epoch that a checkpoint told comes at once, and counts with the seconds that it took.
        let wall = state.last.replace(Instant::now()).map_or(0.0, |last| last.elapsed().as_secs_f64());
        state.recent.push(wall.max(epoch.seconds));
        if state.recent.len() > RECENT {
            state.recent.remove(0);
        }
        if let Some(quality) = epoch.valid
            && state.best.is_none_or(|(_, best)| quality > best)
        {
            state.best = Some((epoch.number, quality));
        }
        let (name, sign) = self.metric;
        let valid = match (epoch.valid, state.best) {
            (Some(now), Some((at, best))) => {
                format!(", validation {name} {:.4} (best {:.4} in epoch {at})", now * sign, best * sign)
            }
            (None, Some((at, best))) => format!(", best validation {name} {:.4} in epoch {at}", best * sign),
            _ => String::new(),
        };
        let mean = state.recent.iter().sum::<f64>() / state.recent.len() as f64;
        let left = remaining(mean * state.epochs.saturating_sub(epoch.number) as f64);
        let before = self.before.as_deref().unwrap_or_default();
        format!("{before}epoch {} of {}, loss {:.4}{valid}, {left} left", epoch.number, state.epochs, epoch.loss)
    }
}

/// Seconds as `45 s`, `3 min` or `2 h 5 min`; early stopping may end sooner.
fn remaining(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..=89 => format!("at most {seconds} s"),
        90..=5399 => format!("at most {} min", seconds.div_ceil(60)),
        _ => format!("at most {} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

impl Watch for FitProgress {
    fn begin(&self, epochs: usize) {
        if let Ok(mut state) = self.state.lock() {
            *state = State { epochs, last: Some(Instant::now()), ..State::default() };
        }
        if self.before.is_none() {
            self.observer.begin("epochs", epochs as u64);
        }
    }

    fn epoch(&self, epoch: &Epoch) {
        if let Ok(mut state) = self.state.lock() {
            let text = self.text(epoch, &mut state);
            self.observer.status(&text);
        }
        if self.before.is_none() {
            self.observer.advance(1);
        }
    }

    fn check(&self) -> Result<()> {
        self.cancel.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);
    impl Observer for Heard {
        fn begin(&self, unit: &str, total: u64) {
            self.note(&format!("begin {unit} {total}"));
        }
        fn advance(&self, n: u64) {
            self.note(&format!("advance {n}"));
        }
        fn status(&self, text: &str) {
            self.note(text);
        }
        fn note(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    #[test]
    fn an_epoch_is_told_with_loss_validation_and_time() {
        let heard = Arc::new(Heard::default());
        let progress = FitProgress::of_stage(heard.clone(), Cancel::default(), ("RMSE", -1.0));
        progress.begin(41);
        progress.epoch(&Epoch { number: 1, loss: 0.5, valid: Some(-1.25), seconds: 5.0 });
        progress.epoch(&Epoch { number: 2, loss: 0.25, valid: None, seconds: 5.0 });
        let heard = heard.0.lock().unwrap();
        assert_eq!(
            *heard,
            [
                "begin epochs 41",
                "epoch 1 of 41, loss 0.5000, validation RMSE 1.2500 (best 1.2500 in epoch 1), at most 4 min left",
                "advance 1",
                "epoch 2 of 41, loss 0.2500, best validation RMSE 1.2500 in epoch 1, at most 4 min left",
                "advance 1",
            ]
        );
        assert_eq!(remaining(7500.0), "at most 2 h 5 min");
    }

    #[test]
    fn one_of_many_fits_leaves_the_units_to_the_caller() {
        let heard = Arc::new(Heard::default());
        let progress = FitProgress::of_many(heard.clone(), Cancel::default(), ("NDCG@10", 1.0), "trial 2: ".to_owned());
        progress.begin(1);
        progress.epoch(&Epoch { number: 1, loss: 0.5, valid: None, seconds: 0.0 });
        assert_eq!(*heard.0.lock().unwrap(), ["trial 2: epoch 1 of 1, loss 0.5000, at most 0 s left"]);
    }
}
