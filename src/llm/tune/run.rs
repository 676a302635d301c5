//! The loop of a tuning: steps, the schedule, evaluation on examples held out, checkpoints.
//!
//! In: a [`Tuner`], examples to learn from and examples held out, [`Settings`]. Out: the learned weights in the tuner,
//! and [`Tuned`], the curve.
//!
//! * A step's loss is the mean over all learned tokens of its examples, however they are packed: accumulation over packs
//!   changes rounding only.
//! * A tuning that was stopped goes on from its last checkpoint and gives the same curve and weights as one that was
//!   not, to the bit: every random choice is a function of the seed and the step.
//! * A loss that is not finite stops it (exit 78).

use std::time::{Duration, Instant};

use super::examples::{Batch, Example};
use super::progress::{Best, Point, State, Watch, duration};
use super::schedule::{examples_of, rate, steps_of_epoch};
use super::seeds::derived;
use super::tuner::Tuner;
use crate::device::ModelBackend;
use crate::error::{Error, Result};
use crate::recommenders::optim::Adam;
use crate::recommenders::saved::{NamedTensor, Tensors};
use crate::recommenders::trainer::Checkpoints;

/// How a model is tuned.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Steps in all.
    pub steps: usize,
    /// Examples of a step.
    pub batch: usize,
    /// Peak of the learning rate.
    pub learning_rate: f64,
    /// Steps until the peak.
    pub warmup: usize,
    /// Decoupled weight decay.
    pub decay: f64,
    /// Norm that gradients are clipped to.
    pub clip: Option<f64>,
    /// Input tokens that are computed at once.
    pub pack_tokens: usize,
    /// Steps from one evaluation to the next; it is also done before the first step and after the last.
    pub eval_every: usize,
    /// Evaluations without a gain before it stops; the best weights are kept then. `None`: the last ones are.
    pub patience: Option<usize>,
    /// Seed of the order and of dropout.
    pub seed: u64,
}

impl Settings {
    /// Steps that so many passes over the examples take.
    pub fn steps_of(epochs: usize, examples: usize, batch: usize) -> usize {
        epochs * steps_of_epoch(examples, batch)
    }
}

/// What a tuning leaves beside the weights.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// Row 0 before the first step, then one row per step.
    pub curve: Vec<Point>,
    /// Step that the weights are of.
    pub step: usize,
    /// Whether it went on from a checkpoint.
    pub resumed: bool,
}

/// Share of the time that checkpoints may take.
const CHECKPOINT_SHARE: f64 = 0.02;

/// Tunes.
///
/// # Errors
/// What `watch` returned; nothing to learn from, or a loss that is no longer finite (exit 78); what the checkpoints' store returned.
pub fn run<B: ModelBackend>(
    tuner: &mut Tuner<B>,
    (train, held_out): (&[Example], &[Example]),
    settings: &Settings,
    watch: &dyn Watch,
    checkpoints: Option<&dyn Checkpoints>,
) -> Result<Tuned> {
    let train: Vec<&Example> = train.iter().filter(|e| e.targets() > 0).collect();
    if train.is_empty() && settings.steps > 0 {
        return Err(Error::spec("there is no example to learn from")
            .with_help("look at the rows of the `train` split and at `max_tokens`, which leaves longer examples out"));
    }
    let held_out = Batch::split(held_out, settings.pack_tokens);
    let mut run =
        Run { tuner, train, held_out, settings, watch, curve: Vec::new(), best: None, started: Instant::now() };
    let resumed = match checkpoints.map(Checkpoints::load).transpose()?.flatten() {
        // A checkpoint only saves work: one that cannot be read costs the work again.
        Some(files) => match State::from_files(&files) {
            Ok(state) => run.restore(state).map(|()| true)?,
            Err(_) => false,
        },
        None => false,
    };
    watch.begin(settings.steps, run.curve.last().map_or(0, |p| p.step));
    if run.curve.is_empty() {
        let held_out = run.measure(0)?;
        run.point(Point { step: 0, loss: None, held_out, rate: 0.0, norm: 0.0, tokens: 0, seconds: 0.0 });
    }
    let (mut saved, mut cost) = (Instant::now(), Duration::ZERO);
    while run.curve.len() <= settings.steps && !run.is_over() {
        run.step()?;
        let Some(checkpoints) = checkpoints else { continue };
        let wait = checkpoints.every().max(cost.div_f64(CHECKPOINT_SHARE));
        if saved.elapsed() >= wait {
            let begun = Instant::now();
            checkpoints.save(run.state().to_files()?)?;
            // What is quick need not be counted; and then tests need not wait.
            cost = Some(begun.elapsed()).filter(|c| c.as_secs_f64() > 0.2).unwrap_or_default();
            saved = Instant::now();
        }
    }
    let mut step = run.curve.len() - 1;
    if let Some(best) = run.best.take().filter(|_| settings.patience.is_some())
        && best.step != step
    {
        run.tuner.learned_mut().set(&Tensors::new(best.tensors))?;
        step = best.step;
    }
    Ok(Tuned { curve: run.curve, step, resumed })
}

/// A tuning under way.
struct Run<'a, B: ModelBackend> {
    tuner: &'a mut Tuner<B>,
    train: Vec<&'a Example>,
    held_out: Vec<Batch>,
    settings: &'a Settings,
    watch: &'a dyn Watch,
    curve: Vec<Point>,
    best: Option<Best>,
    /// When step 0 would have begun had it been computed without a break.
    started: Instant,
}

impl<B: ModelBackend> Run<'_, B> {
    fn step(&mut self) -> Result<()> {
        let (s, step) = (self.settings, self.curve.len() - 1);
        let chosen = examples_of(step, self.train.len(), s.batch, s.seed);
        let batches = Batch::split(chosen.into_iter().map(|n| self.train[n]), s.pack_tokens);
        let targets: usize = batches.iter().map(|b| b.targets.len()).sum();
        let share = 1.0 / targets as f64;
        let (mut gradients, mut sum, mut tokens) = (self.tuner.learned().no_gradients(), 0.0, 0);
        for (n, batch) in batches.iter().enumerate() {
            self.watch.check()?;
            let seed = derived(derived(s.seed, step as u64), n as u64);
            sum += self.tuner.gradients(batch, share, seed, &mut gradients);
            tokens += batch.ids.len() as u64;
        }
        let loss = sum * share;
        if !loss.is_finite() {
            return Err(Error::spec(format!("tuning diverged in step {}: the loss is {loss}", step + 1))
                .with_help("lower `learning_rate`, or raise `warmup_steps`"));
        }
        let rate = rate(s.learning_rate, step, s.warmup, s.steps);
        let adam = Adam { decay: s.decay, clip_norm: s.clip, ..Adam::new(rate) };
        let norm = self.tuner.learned_mut().apply(gradients, &adam);
        let done = step + 1;
        let due = done == s.steps || (s.eval_every > 0 && done.is_multiple_of(s.eval_every));
        let held_out = if due { self.measure(done)? } else { None };
        let tokens = tokens + self.curve.last().map_or(0, |p| p.tokens);
        let seconds = self.started.elapsed().as_secs_f64();
        self.point(Point { step: done, loss: Some(loss), held_out, rate, norm, tokens, seconds });
        Ok(())
    }

    /// Mean loss of the examples held out; keeps the best.
    fn measure(&mut self, step: usize) -> Result<Option<f64>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let (mut sum, mut n) = (0.0, 0);
        for batch in &self.held_out {
            self.watch.check()?;
            let losses = self.tuner.losses(batch);
            sum += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
            n += losses.len();
        }
        let loss = sum / n as f64;
        match &mut self.best {
            Some(best) if loss >= best.loss || loss.is_nan() => best.since += 1,
            best => {
                let keep = self.settings.patience.is_some();
                let tensors = if keep { self.tuner.learned().tensors() } else { Vec::new() };
                *best = Some(Best { step, loss, since: 0, tensors });
            }
        }
        Ok(Some(loss))
    }

    fn is_over(&self) -> bool {
        let since = self.best.as_ref().map_or(0, |b| b.since);
        self.settings.patience.is_some_and(|patience| since >= patience)
    }

    fn point(&mut self, point: Point) {
        self.curve.push(point);
        let s = self.settings;
        let mut told = match point.loss {
            None => "before the first step".to_owned(),
            Some(loss) => format!("step {} of {}, loss {loss:.4}", point.step, s.steps),
        };
        if let Some(loss) = self.curve.iter().rev().find_map(|p| p.held_out) {
            told += &format!(", held-out loss {loss:.4}");
        }
        if point.step > 0 && point.seconds > 0.0 {
            let left = point.seconds / point.step as f64 * s.steps.saturating_sub(point.step) as f64;
            let speed = point.tokens as f64 / point.seconds;
            told += &format!(", {speed:.0} tokens/s, about {} left", duration(left));
        }
        self.watch.point(&point, &told);
    }

    fn state(&self) -> State {
        State { curve: self.curve.clone(), best: self.best.clone(), tensors: self.tuner.learned().state() }
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.tuner.learned_mut().restore(&Tensors::new(state.tensors))?;
        let spent = state.curve.last().map_or(0.0, |p| p.seconds);
        self.started = Instant::now().checked_sub(Duration::from_secs_f64(spent)).unwrap_or(self.started);
        self.curve = state.curve;
        self.best = state.best;
        Ok(())
    }
}

/// Learned weights, for files.
pub fn learned<B: ModelBackend>(tuner: &Tuner<B>) -> Vec<NamedTensor> {
    tuner.learned().tensors()
}
