//! The one training loop: epochs, validation, early stopping, checkpoints.
//!
//! In: a [`Learner`] (a backbone with its data, weights and optimizer), a [`Schedule`], a
//! [`FitContext`]. Out: [`Trained`], the best model by validation with the log of all epochs.
//!
//! * Without validation data exactly `epochs` epochs are run and the last weights are the result.
//! * A loss that is not finite stops the fit (exit 78): nothing that was learned before is overwritten.
//! * A fit that was stopped goes on from its last checkpoint and ends with the same model as one that was not:
//!   a checkpoint is taken between epochs and holds all that later epochs depend on, and every random choice is
//!   a function of the seed and the epoch's number ([`epoch_rng`]).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::saved::{NamedTensor, Tensors};
use super::{Epoch, FitContext, Watch};
use crate::error::{Error, Result};

/// The hyper-parameters that every trained backbone has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Schedule {
    /// Step size of Adam.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub learning_rate: f64,
    /// Examples per step: train pairs, sequences (`sasrec`, `bert4rec`, `cl4srec`) or ratings.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: u32,
    /// At most so many passes over the train data; exactly so many without a `valid` table.
    #[schemars(range(min = 0, max = 100_000))]
    pub epochs: u32,
    /// Epochs from one validation to the next.
    #[schemars(range(min = 1, max = 1000))]
    pub eval_every: u32,
    /// Validations without a gain before training stops; the best weights are kept.
    #[schemars(range(min = 1, max = 1000))]
    pub patience: u32,
}

/// A backbone in training: its data, its weights on a device, its optimizer.
pub trait Learner {
    /// The model as it is saved and used: weights on the host.
    type Fitted;

    /// One pass over the train data; gives the mean loss. Asks `watch.check()` before each step.
    ///
    /// # Errors
    /// What `watch` returned.
    fn epoch(&mut self, number: usize, watch: &dyn Watch) -> Result<f64>;

    /// A copy of the current weights.
    ///
    /// # Errors
    /// Only our bugs.
    fn fitted(&self) -> Result<Self::Fitted>;

    /// How good the model is on the validation data, higher is better: NDCG@10, or RMSE with a minus
    /// sign. `None` without validation data.
    fn quality(&self, fitted: &Self::Fitted) -> Option<f64>;

    /// The tensors of a model, for its file.
    fn tensors(fitted: &Self::Fitted) -> Vec<NamedTensor>;

    /// The model that [`Learner::tensors`] was made of.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    fn load(&self, tensors: &Tensors) -> Result<Self::Fitted>;

    /// All that later epochs depend on: weights, moments, number of steps.
    fn state(&self) -> Vec<NamedTensor>;

    /// Takes a state back.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    fn restore(&mut self, state: &Tensors) -> Result<()>;
}

/// The result of a fit.
pub struct Trained<F> {
    /// The best model by validation, or the last one without validation.
    pub fitted: F,
    /// One entry per epoch that was run, resumed ones included.
    pub epochs: Vec<Epoch>,
    /// The epoch of `fitted` (1-based; 0 = the initial weights).
    pub best_epoch: usize,
}

/// Random numbers of one epoch: a function of seed and epoch alone.
pub fn epoch_rng(seed: u64, epoch: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch as u64);
    rng
}

/// Where checkpoints are kept between runs; the caller names the place after everything the fit depends on.
pub trait Checkpoints: Sync {
    /// The last one that was saved.
    ///
    /// # Errors
    /// The store fails (exit 75).
    fn load(&self) -> Result<Option<BTreeMap<String, Bytes>>>;
    /// Replaces the last one, at once or not at all.
    ///
    /// # Errors
    /// The store fails (exit 75).
    fn save(&self, files: BTreeMap<String, Bytes>) -> Result<()>;
    /// How long a run may go without one.
    fn every(&self) -> Duration {
        Duration::from_secs(20)
    }
}

/// Trains `learner`.
///
/// # Errors
/// What `ctx.watch` returned; a loss that is no longer finite (exit 78); what the checkpoints' store returned.
pub fn run<L: Learner>(learner: &mut L, schedule: &Schedule, ctx: &FitContext<'_>) -> Result<Trained<L::Fitted>> {
    let epochs = schedule.epochs as usize;
    ctx.watch.begin(epochs);
    let mut log: Vec<Epoch> = Vec::new();
    let mut best = Best { epoch: 0, quality: f64::NEG_INFINITY, since: 0, fitted: learner.fitted()? };
    if let Some(found) = resume(learner, ctx)? {
        for epoch in &found.0 {
            ctx.watch.epoch(epoch);
        }
        (log, best) = found;
    }
    let mut saved = Instant::now();
    while log.len() < epochs && best.since < schedule.patience as usize {
        let number = log.len() + 1;
        let started = Instant::now();
        let loss = learner.epoch(number, ctx.watch)?;
        if !loss.is_finite() {
            return Err(Error::spec(format!("training diverged in epoch {number}: the loss is {loss}"))
                .with_help("lower `learning_rate` in the stage's `hyper` table"));
        }
        let seconds = started.elapsed().as_secs_f64();
        let due = number.is_multiple_of(schedule.eval_every as usize) || number == epochs;
        let mut measured = None;
        if due {
            let fitted = learner.fitted()?;
            measured = learner.quality(&fitted);
            match measured {
                Some(quality) if quality > best.quality => {
                    best = Best { epoch: number, quality, since: 0, fitted };
                }
                Some(_) => best.since += 1,
                None => best = Best { epoch: number, fitted, ..best },
            }
        }
        let epoch = Epoch { number, loss, valid: measured, seconds };
        ctx.watch.epoch(&epoch);
        log.push(epoch);
        crate::fault::point("train-epoch");
        if let Some(checkpoints) = ctx.checkpoints
            && saved.elapsed() >= checkpoints.every()
        {
            checkpoints.save(checkpoint_of(learner, &log, &best).to_files()?)?;
            saved = Instant::now();
        }
    }
    Ok(Trained { fitted: best.fitted, epochs: log, best_epoch: best.epoch })
}

/// The best model so far.
struct Best<F> {
    epoch: usize,
    quality: f64,
    /// Validations since.
    since: usize,
    fitted: F,
}

fn checkpoint_of<L: Learner>(learner: &L, log: &[Epoch], best: &Best<L::Fitted>) -> Checkpoint {
    Checkpoint {
        epochs: log.to_vec(),
        best_epoch: best.epoch,
        // JSON has no infinity.
        best_quality: best.quality.is_finite().then_some(best.quality),
        since: best.since,
        state: learner.state(),
        best: L::tensors(&best.fitted),
    }
}

/// The log and the best model of a fit that was stopped.
type Resumed<F> = (Vec<Epoch>, Best<F>);

fn resume<L: Learner>(learner: &mut L, ctx: &FitContext<'_>) -> Result<Option<Resumed<L::Fitted>>> {
    let Some(files) = ctx.checkpoints.map(Checkpoints::load).transpose()?.flatten() else {
        return Ok(None);
    };
    // A checkpoint only saves work: one that cannot be read costs the work again, not the run.
    let Ok(found) = Checkpoint::from_files(&files) else {
        return Ok(None);
    };
    let fitted = learner.load(&Tensors::new(found.best))?;
    learner.restore(&Tensors::new(found.state))?;
    let quality = found.best_quality.unwrap_or(f64::NEG_INFINITY);
    Ok(Some((found.epochs, Best { epoch: found.best_epoch, quality, since: found.since, fitted })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::recommenders::Unwatched;
    use std::sync::Mutex;

    /// A model of one number, whose quality after each epoch is told in advance.
    struct Told {
        weight: f32,
        qualities: Vec<f64>,
        /// The epoch in which the process is stopped.
        stop_in: Option<usize>,
    }

    impl Learner for Told {
        type Fitted = f32;
        fn epoch(&mut self, number: usize, _: &dyn Watch) -> Result<f64> {
            if self.stop_in == Some(number) {
                return Err(Error::internal("stopped"));
            }
            self.weight = self.weight * 3.0 + number as f32;
            Ok(f64::from(self.weight))
        }
        fn fitted(&self) -> Result<f32> {
            Ok(self.weight)
        }
        fn quality(&self, fitted: &f32) -> Option<f64> {
            assert_eq!(*fitted, self.weight);
            let epochs = (1..=self.qualities.len()).find(|&n| told_weight(n) == self.weight);
            epochs.map(|n| self.qualities[n - 1])
        }
        fn tensors(fitted: &f32) -> Vec<NamedTensor> {
            vec![NamedTensor::new("w", vec![1], vec![*fitted])]
        }
        fn load(&self, tensors: &Tensors) -> Result<f32> {
            Ok(tensors.shaped("w", &[1])?[0])
        }
        fn state(&self) -> Vec<NamedTensor> {
            Self::tensors(&self.weight)
        }
        fn restore(&mut self, state: &Tensors) -> Result<()> {
            self.weight = self.load(state)?;
            Ok(())
        }
    }

    fn told_weight(epochs: usize) -> f32 {
        (1..=epochs).fold(0.0, |w, n| w * 3.0 + n as f32)
    }

    fn told(qualities: &[f64]) -> Told {
        Told { weight: 0.0, qualities: qualities.to_vec(), stop_in: None }
    }

    fn schedule(epochs: u32, eval_every: u32, patience: u32) -> Schedule {
        Schedule { learning_rate: 0.1, batch_size: 1, epochs, eval_every, patience }
    }

    #[derive(Default)]
    struct Kept(Mutex<Option<BTreeMap<String, Bytes>>>);
    impl Checkpoints for Kept {
        fn load(&self) -> Result<Option<BTreeMap<String, Bytes>>> {
            Ok(self.0.lock().unwrap().clone())
        }
        fn save(&self, files: BTreeMap<String, Bytes>) -> Result<()> {
            *self.0.lock().unwrap() = Some(files);
            Ok(())
        }
        fn every(&self) -> Duration {
            Duration::ZERO
        }
    }

    fn fit(learner: &mut Told, schedule: &Schedule, kept: Option<&Kept>) -> Result<Trained<f32>> {
        let checkpoints = kept.map(|k| k as &dyn Checkpoints);
        run(
            learner,
            schedule,
            &FitContext { seed: 1, device: &Device::Cpu, watch: &Unwatched, checkpoints, warm: None },
        )
    }

    #[test]
    fn training_stops_after_patience_validations_without_a_gain_and_keeps_the_best() {
        // Equal is no gain.
        let trained = fit(&mut told(&[0.1, 0.3, 0.3, 0.2, 0.9, 0.9]), &schedule(6, 1, 2), None).unwrap();
        assert_eq!((trained.epochs.len(), trained.best_epoch), (4, 2));
        assert_eq!(trained.fitted, told_weight(2));
        let trained = fit(&mut told(&[0.1, 0.3, 0.3, 0.2, 0.9, 0.8]), &schedule(6, 1, 3), None).unwrap();
        assert_eq!((trained.epochs.len(), trained.best_epoch), (6, 5));
    }

    #[test]
    fn validation_is_due_every_few_epochs_and_at_the_end() {
        let trained = fit(&mut told(&[0.9, 0.1, 0.9, 0.2, 0.3]), &schedule(5, 2, 9), None).unwrap();
        let measured: Vec<Option<f64>> = trained.epochs.iter().map(|e| e.valid).collect();
        assert_eq!(measured, [None, Some(0.1), None, Some(0.2), Some(0.3)]);
        assert_eq!(trained.best_epoch, 5);
    }

    #[test]
    fn without_validation_the_last_weights_are_the_result() {
        let trained = fit(&mut told(&[]), &schedule(5, 2, 1), None).unwrap();
        assert_eq!((trained.epochs.len(), trained.best_epoch, trained.fitted), (5, 5, told_weight(5)));
        let trained = fit(&mut told(&[]), &schedule(0, 2, 1), None).unwrap();
        assert_eq!((trained.epochs.len(), trained.best_epoch, trained.fitted), (0, 0, 0.0));
    }

    #[test]
    fn a_fit_that_is_stopped_anywhere_ends_as_one_that_was_not() {
        let qualities = [0.1, 0.3, 0.2, 0.4, 0.1, 0.2, 0.3, 0.2];
        let plan = schedule(8, 1, 3);
        let straight = fit(&mut told(&qualities), &plan, None).unwrap();
        for stop in 1..=straight.epochs.len() {
            let kept = Kept::default();
            let mut first = Told { stop_in: Some(stop), ..told(&qualities) };
            assert!(fit(&mut first, &plan, Some(&kept)).is_err());
            let resumed = fit(&mut told(&qualities), &plan, Some(&kept)).unwrap();
            assert_eq!((resumed.fitted, resumed.best_epoch), (straight.fitted, straight.best_epoch), "stop in {stop}");
            let curve = |t: &Trained<f32>| t.epochs.iter().map(|e| (e.number, e.loss, e.valid)).collect::<Vec<_>>();
            assert_eq!(curve(&resumed), curve(&straight));
        }
    }

    #[test]
    fn a_checkpoint_that_cannot_be_read_costs_the_work_again_and_no_more() {
        let kept = Kept(Mutex::new(Some(BTreeMap::from([("checkpoint.json".to_owned(), Bytes::from("{"))]))));
        let trained = fit(&mut told(&[0.1, 0.2]), &schedule(2, 1, 3), Some(&kept)).unwrap();
        assert_eq!(trained.epochs.len(), 2);
    }

    #[test]
    fn a_loss_that_is_not_finite_stops_the_fit() {
        let mut learner = Told { weight: f32::MAX, ..told(&[]) };
        let error = fit(&mut learner, &schedule(3, 1, 3), None).err().unwrap();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("epoch 1") && error.help.unwrap().contains("learning_rate"));
    }
}
