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
        let seconds = run.started.elapsed().as_secs_f64();
        run.point(Point { step: 0, loss: None, held_out, rate: 0.0, norm: 0.0, tokens: 0, seconds });
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
        // Of the steps alone: the measurement before the first one comes once.
        let seconds = point.seconds - self.curve[0].seconds;
        if point.step > 0 && seconds > 0.0 {
            let left = seconds / point.step as f64 * s.steps.saturating_sub(point.step) as f64;
            let speed = point.tokens as f64 / seconds;
            told += &format!(", {speed:.0} tokens/s, about {} left", duration(left));
        }
        self.watch.point(&point, &told);
        crate::fault::point("tune-step");
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use burn::backend::Flex;
    use bytes::Bytes;

    use super::super::golden::whole;
    use super::super::progress::Unwatched;
    use super::super::{Adapter, Target};
    use super::*;
    use crate::recommenders::optim::Params;

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

    /// Stops after so many questions.
    struct StopAfter(Cell<usize>);
    impl Watch for StopAfter {
        fn check(&self) -> Result<()> {
            if self.0.get() == 0 {
                return Err(Error::internal("stopped"));
            }
            self.0.set(self.0.get() - 1);
            Ok(())
        }
    }

    fn examples(n: usize, seed: u32) -> Vec<Example> {
        let token = |n: usize, k: usize| 3 + ((n * 17 + k * 29 + seed as usize * 7) % 60) as u32;
        // The response repeats the prompt: there is something to learn.
        let prompt = |n: usize| (0..3 + n % 4).map(|k| token(n, k)).collect::<Vec<u32>>();
        (0..n).map(|n| Example::response(&prompt(n), &prompt(n)[..2])).collect()
    }

    fn settings(steps: usize) -> Settings {
        Settings {
            steps,
            batch: 3,
            learning_rate: 3e-3,
            warmup: 2,
            decay: 0.01,
            clip: Some(1.0),
            pack_tokens: 12,
            eval_every: 2,
            patience: None,
            seed: 5,
        }
    }

    fn model(lora: bool) -> Tuner<Flex> {
        let mut tuner = whole("tiny", false);
        if lora {
            let mut params = Params::new(&Default::default());
            let targets = [Target::Query, Target::Value, Target::Down];
            let adapter = Adapter::new(tuner.decoder.config(), (4, 8.0), &targets, 3, &mut params).unwrap();
            tuner.adapter = Some((adapter, params));
            tuner.dropout = 0.1;
        }
        tuner
    }

    fn tune(tuner: &mut Tuner<Flex>, s: &Settings, watch: &dyn Watch, kept: Option<&Kept>) -> Result<Tuned> {
        let (train, held_out) = (examples(10, 1), examples(4, 2));
        run(tuner, (&train, &held_out), s, watch, kept.map(|k| k as &dyn Checkpoints))
    }

    fn comparable(tuned: &Tuned) -> Vec<Point> {
        tuned.curve.iter().map(|p| Point { seconds: 0.0, ..*p }).collect()
    }

    #[test]
    fn a_tuning_that_is_stopped_anywhere_ends_as_one_that_was_not() {
        for lora in [false, true] {
            let mut straight = model(lora);
            let curve = tune(&mut straight, &settings(7), &Unwatched, None).unwrap();
            assert_eq!(curve.curve.len(), 8);
            let mut asked = 1;
            loop {
                let kept = Kept::default();
                if tune(&mut model(lora), &settings(7), &StopAfter(Cell::new(asked)), Some(&kept)).is_ok() {
                    break;
                }
                let had = kept.0.lock().unwrap().is_some();
                let mut resumed = model(lora);
                let again = tune(&mut resumed, &settings(7), &Unwatched, Some(&kept)).unwrap();
                assert_eq!(again.resumed, had);
                assert_eq!(comparable(&again), comparable(&curve), "stopped at {asked}");
                assert_eq!(learned(&resumed), learned(&straight), "stopped at {asked}");
                asked += 5;
            }
            // Two questions for each evaluation, two or three for each step.
            assert!(asked > 20, "it was stopped at {asked} questions at most");
        }
    }

    #[test]
    fn the_loss_falls_and_the_threads_do_not_matter() {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut tuner = model(true);
                let tuned = tune(&mut tuner, &settings(40), &Unwatched, None).unwrap();
                (comparable(&tuned), learned(&tuner))
            })
        };
        let (curve, weights) = with(1);
        assert_eq!((curve.clone(), weights), with(3));
        let (first, last) = (curve[1].loss.unwrap(), curve[40].loss.unwrap());
        assert!(last < first - 0.3, "{first} to {last}");
        assert!(curve[40].held_out.unwrap() < curve[0].held_out.unwrap());
        assert_eq!((curve[0].tokens, curve[1].rate, curve[3].rate), (0, 0.0, 3e-3));
    }

    #[test]
    fn packing_changes_rounding_only() {
        let curve = |pack_tokens| {
            let settings = Settings { pack_tokens, clip: None, ..settings(3) };
            tune(&mut model(false), &settings, &Unwatched, None).unwrap().curve
        };
        for (a, b) in curve(1).iter().zip(&curve(1000)) {
            assert!((a.loss.unwrap_or(0.0) - b.loss.unwrap_or(0.0)).abs() < 1e-5);
            assert_eq!(a.tokens, b.tokens);
        }
    }

    #[test]
    fn the_best_weights_are_kept_where_it_may_stop_early() {
        // Far too large a rate: the examples held out only get worse.
        let settings = Settings { learning_rate: 0.3, eval_every: 1, patience: Some(2), warmup: 0, ..settings(30) };
        let mut tuner = model(false);
        let before = learned(&tuner);
        let tuned = tune(&mut tuner, &settings, &Unwatched, None).unwrap();
        assert!(tuned.curve.len() < 31, "it did not stop");
        assert_eq!(tuned.curve.len(), tuned.step + 3);
        if tuned.step == 0 {
            assert_eq!(learned(&tuner), before);
        }
    }

    #[test]
    fn without_examples_there_is_a_way_out() {
        let mut tuner = model(false);
        let error = run(&mut tuner, (&[], &[]), &settings(1), &Unwatched, None).unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.help.unwrap().contains("max_tokens"));
    }
}
