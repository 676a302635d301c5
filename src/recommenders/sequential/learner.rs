//! Sequential models in training.
//!
//! In: a [`SequenceModel`] and [`Interactions`]. Out: a [`Fit`] by the shared [`trainer`].
//!
//! Validation ranks all items minus the user's train items, as [`topk::ranks`](super::super::topk::ranks) does.

use burn::tensor::{ElementConversion, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::ops::Excluded;
use super::super::optim::{Adam, Params};
use super::super::pairwise::validation_ndcg;
use super::super::saved::{NamedTensor, Tensors};
use super::super::trainer::{self, Learner, Schedule, epoch_rng};
use super::super::{Fit, FitContext, Interactions, Watch};
use super::augmentation::{self, Shares};
use super::batches::{Batch, Window, arrange, causal_batch, causal_windows, cloze_batch, cloze_windows};
use super::config::{Augmentation, EncoderHyper, LossKind, OptimizerHyper};
use super::encoder::{Dropout, Encoder, Shape};
use super::loss::{Contrast, Negatives, SharedSampler, Step, step_loss};
use super::scorer::SequentialScorer;
use crate::device::{ModelBackend, OnBackend};
use crate::error::Result;
use crate::interactions::sampler::NegativeSampler;

/// What a position predicts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Each position the next item; attention looks back only.
    Causal,
    /// Masked positions their own item; attention looks both ways.
    Cloze {
        /// Probability that a position is masked.
        mask_share: f64,
        /// Share of the sequences of which only the last position is masked, as it is in a score.
        last_only: f64,
        /// How often an epoch has each window, with masks of its own each time.
        passes: u32,
    },
}

/// The contrastive term (CL4SRec).
#[derive(Clone, Debug, PartialEq)]
pub struct Views {
    /// Weight in the loss.
    pub weight: f64,
    /// Temperature of NT-Xent.
    pub temperature: f64,
    /// What a view may be; each draws one of them.
    pub choices: Vec<Augmentation>,
    /// How much they touch.
    pub shares: Shares,
}

/// A sequential backbone.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceModel {
    /// What a position predicts.
    pub objective: Objective,
    /// The transformer.
    pub encoder: EncoderHyper,
    /// Loss and step size.
    pub optimizer: OptimizerHyper,
    /// The contrastive term, if any.
    pub views: Option<Views>,
}

impl SequenceModel {
    /// What the objective needs of the encoder, for a catalogue of that size.
    pub fn shape(&self, n_items: usize) -> Shape {
        let cloze = matches!(self.objective, Objective::Cloze { .. });
        Shape { n_items, causal: !cloze, mask_row: cloze || self.views.is_some(), head: cloze }
    }
}

/// Fits `model`.
///
/// # Errors
/// As [`trainer::run`].
pub fn fit(model: &SequenceModel, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
    ctx.device.run(Task { model, data, ctx })
}

struct Task<'a> {
    model: &'a SequenceModel,
    data: &'a Interactions<'a>,
    ctx: &'a FitContext<'a>,
}

impl OnBackend for Task<'_> {
    type Output = Result<Fit>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<Fit> {
        let Task { model, data, ctx } = self;
        let mut params = Params::<B>::new(device);
        let mut rng = ChaCha8Rng::seed_from_u64(ctx.seed);
        let encoder = Encoder::new(&model.encoder, model.shape(data.n_items), &mut params, Some(&mut rng));
        if let Some(warm) = ctx.warm {
            warm.apply(&mut params)?;
        }
        let mut average = Params::<B>::new(device);
        if model.optimizer.average > 0.0 {
            Encoder::new(&model.encoder, model.shape(data.n_items), &mut average, None);
            average.set(&Tensors::new(params.tensors()))?;
        }
        let mut learner = SequenceLearner { source: Source::new(model, data, ctx.seed), encoder, params, average };
        // With nothing to learn from the initial weights are the model.
        let schedule = match learner.source.steps(1).next() {
            Some(_) => model.optimizer.schedule.clone(),
            None => Schedule { epochs: 0, ..model.optimizer.schedule.clone() },
        };
        let trained = trainer::run(&mut learner, &schedule, ctx)?;
        let scorer = trained.fitted.with_users(data.train);
        Ok(Fit { scorer: Box::new(scorer), epochs: trained.epochs, best_epoch: trained.best_epoch })
    }
}

struct SequenceLearner<'a, B: ModelBackend> {
    source: Source<'a>,
    encoder: Encoder,
    params: Params<B>,
    /// With `average` above 0 the running average of `params`, else empty.
    average: Params<B>,
}

impl<B: ModelBackend> SequenceLearner<'_, B> {
    fn averages(&self) -> bool {
        self.source.model.optimizer.average > 0.0
    }
}

/// Prefix of the average's tensors in a checkpoint.
const AVERAGE: &str = "average.";

impl<B: ModelBackend> Learner for SequenceLearner<'_, B> {
    type Fitted = SequentialScorer;

    fn epoch(&mut self, number: usize, watch: &dyn Watch) -> Result<f64> {
        let optimizer = &self.source.model.optimizer;
        let clip_norm = (optimizer.clip_norm > 0.0).then_some(optimizer.clip_norm);
        let mut total = Tensor::<B, 1>::zeros([1], self.params.device());
        let mut targets = 0;
        for (progress, step, seed) in self.source.steps(number) {
            watch.check()?;
            let adam = Adam { decay: optimizer.weight_decay, clip_norm, ..Adam::new(optimizer.rate(progress)) };
            let n = step.batch.targets.len();
            let vars = self.params.tracked();
            let loss = step_loss(&self.encoder, &vars, &step, Some(&mut Dropout::new(seed)));
            total = total + self.params.step(loss, vars, &adam) * n as f32;
            if optimizer.average > 0.0 {
                self.params.average_into(&mut self.average, optimizer.average);
            }
            targets += n;
        }
        Ok(f64::from(total.into_scalar().elem::<f32>()) / targets.max(1) as f64)
    }

    fn fitted(&self) -> Result<SequentialScorer> {
        let data = self.source.data;
        let mut tensors = if self.averages() { self.average.tensors() } else { self.params.tensors() };
        tensors.push(SequentialScorer::popularity(data.train, data.n_items));
        self.load(&Tensors::new(tensors))
    }

    fn quality(&self, fitted: &SequentialScorer) -> Option<f64> {
        validation_ndcg(fitted, self.source.data)
    }

    fn tensors(fitted: &SequentialScorer) -> Vec<NamedTensor> {
        fitted.weights()
    }

    fn load(&self, tensors: &Tensors) -> Result<SequentialScorer> {
        SequentialScorer::new(self.encoder.hyper(), self.encoder.shape(), self.source.data.n_users, tensors)
    }

    fn state(&self) -> Vec<NamedTensor> {
        let mut state = self.params.state();
        let average = self.average.tensors().into_iter();
        state.extend(average.map(|t| NamedTensor { name: format!("{AVERAGE}{}", t.name), ..t }));
        state
    }

    fn restore(&mut self, state: &Tensors) -> Result<()> {
        self.params.restore(state)?;
        let mut average = self.average.tensors();
        for tensor in &mut average {
            tensor.values = state.shaped(&format!("{AVERAGE}{}", tensor.name), &tensor.shape)?.to_vec();
        }
        self.average.set(&Tensors::new(average))
    }
}

/// Where the steps come from.
struct Source<'a> {
    model: &'a SequenceModel,
    data: &'a Interactions<'a>,
    seed: u64,
    /// With `loss = "bce"`.
    own: Option<NegativeSampler>,
    /// With `loss = "sampled-softmax"`.
    shared: Option<SharedSampler>,
}

impl<'a> Source<'a> {
    fn new(model: &'a SequenceModel, data: &'a Interactions<'a>, seed: u64) -> Self {
        let loss = model.optimizer.loss;
        let own = (loss == LossKind::Bce).then(|| NegativeSampler::new(data.train, data.n_items));
        let shared = (loss == LossKind::SampledSoftmax)
            .then(|| SharedSampler::new(data.train, data.n_items, model.optimizer.negative_power));
        Source { model, data, seed, own, shared }
    }

    /// Steps of an epoch, made one at a time: progress in epochs, what is learned from, seed of the dropout.
    fn steps(&self, number: usize) -> impl Iterator<Item = (f64, Step, u64)> + use<'_, 'a> {
        let mut rng = epoch_rng(self.seed, number);
        let max_len = self.model.encoder.max_len as usize;
        let train = self.data.train;
        let windows = match self.model.objective {
            Objective::Causal => causal_windows(train, max_len, &mut rng),
            Objective::Cloze { passes, .. } => {
                (0..passes).flat_map(|_| cloze_windows(train, max_len, &mut rng)).collect()
            }
        };
        let batches = arrange(windows, self.model.optimizer.schedule.batch_size as usize, &mut rng);
        let n = batches.len();
        batches.into_iter().enumerate().filter_map(move |(at, windows)| {
            let step = self.step(&windows, &mut rng);
            let seed = rng.random();
            let progress = (number - 1) as f64 + at as f64 / n as f64;
            (!step.batch.targets.is_empty()).then_some((progress, step, seed))
        })
    }

    fn step(&self, windows: &[Window], rng: &mut ChaCha8Rng) -> Step {
        let train = self.data.train;
        let mask = self.data.n_items as u32;
        let mut batch = match self.model.objective {
            Objective::Causal => causal_batch(train, windows),
            Objective::Cloze { mask_share, last_only, .. } => {
                cloze_batch(train, windows, mask, (mask_share, last_only), rng)
            }
        };
        let negatives = match (&self.own, &self.shared) {
            (Some(sampler), _) => Negatives::Own(own_negatives(&mut batch, sampler, rng)),
            (_, Some(sampler)) => sampler.draw(self.model.optimizer.negatives as usize, &batch.targets, rng),
            _ => Negatives::All(self.model.optimizer.exclude_seen.then(|| self.seen(&batch, windows))),
        };
        let contrast = self.model.views.as_ref().map(|views| {
            let mut both = Vec::with_capacity(2 * batch.lengths.len());
            for _ in 0..2 {
                for sequence in batch.sequences() {
                    both.push(augmentation::view(sequence, &views.choices, views.shares, mask, rng));
                }
            }
            Contrast { views: Batch::padded(&both), weight: views.weight, temperature: views.temperature }
        });
        Step { batch, negatives, contrast, l2: self.model.optimizer.l2 }
    }
}

impl Source<'_> {
    /// What the user of each target has seen: in a causal model what came before, in a Cloze model all the history.
    fn seen(&self, batch: &Batch, windows: &[Window]) -> Excluded {
        let mut seen = Excluded::default();
        let mut begins = Vec::with_capacity(windows.len());
        let causal = self.model.objective == Objective::Causal;
        for window in windows {
            begins.push(seen.classes.len() as u32);
            let history = self.data.train.of(window.user as usize);
            let until = if causal { window.to as usize } else { history.len() };
            seen.classes.extend_from_slice(&history[..until]);
        }
        let range = |&place: &u32| {
            let (n, t) = (place as usize / batch.length, place % batch.length as u32);
            let until = match causal {
                true => begins[n] + windows[n].from + t + 1,
                false => begins.get(n + 1).map_or(seen.classes.len() as u32, |&next| next),
            };
            (begins[n], until)
        };
        seen.ranges = batch.places.iter().map(range).collect();
        seen
    }
}

/// A negative for each target; targets of users who have seen everything are left out.
fn own_negatives(batch: &mut Batch, sampler: &NegativeSampler, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut negatives = Vec::with_capacity(batch.targets.len());
    let (mut places, mut targets) = (Vec::new(), Vec::new());
    for (&place, &target) in batch.places.iter().zip(&batch.targets) {
        if let Some(negative) = sampler.sample(batch.user_of(place) as usize, rng) {
            places.push(place);
            targets.push(target);
            negatives.push(negative);
        }
    }
    (batch.places, batch.targets) = (places, targets);
    negatives
}

#[cfg(test)]
mod tests {
    use super::super::super::registry;
    use super::*;
    use crate::interactions::Histories;

    /// Users 0 to 3 with 5, 12, 1 and 6 interactions of 20 items; user 3 repeats one.
    fn train() -> Histories {
        let one = |u: u32, items: &[u32]| items.iter().map(|&i| (u, i)).collect::<Vec<_>>();
        let all = [
            one(0, &[4, 2, 9, 11, 3]),
            one(1, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
            one(2, &[5]),
            one(3, &[7, 8, 7, 1, 7, 2]),
        ];
        Histories::from_pairs(4, &all.concat())
    }

    fn model(objective: Objective, loss: LossKind) -> SequenceModel {
        let defaults = registry::find("sasrec").unwrap().recommender(&serde_json::json!({})).unwrap().hyper();
        let mut optimizer: OptimizerHyper = hyper_part(&defaults);
        (optimizer.loss, optimizer.exclude_seen, optimizer.schedule.batch_size) = (loss, true, 3);
        let encoder = EncoderHyper { max_len: 4, ..hyper_part(&defaults) };
        SequenceModel { objective, encoder, optimizer, views: None }
    }

    fn hyper_part<T: serde::de::DeserializeOwned>(full: &serde_json::Value) -> T {
        serde_json::from_value(full.clone()).unwrap()
    }

    #[test]
    fn negatives_of_a_target_are_unseen_in_train_and_held_out_items_are_among_them() {
        let train = train();
        let data = Interactions { n_users: 4, n_items: 20, train: &train, valid: &[(0, 19)] };
        let model = model(Objective::Causal, LossKind::Bce);
        let source = Source::new(&model, &data, 3);
        let mut held_out = 0;
        for epoch in 1..60 {
            for (_, step, _) in source.steps(epoch) {
                let Negatives::Own(negatives) = &step.negatives else { panic!("not one for each") };
                assert_eq!(negatives.len(), step.batch.targets.len());
                for (&place, &negative) in step.batch.places.iter().zip(negatives) {
                    let user = step.batch.user_of(place);
                    assert!(!train.of(user as usize).contains(&negative));
                    held_out += u32::from(user == 0 && negative == 19);
                }
            }
        }
        // 59 epochs with 4 targets of user 0, one of 15 unseen items each: 16 expected.
        assert!((6..30).contains(&held_out), "{held_out}");
    }

    #[test]
    fn targets_of_users_who_have_seen_everything_are_left_out() {
        let train = Histories::from_pairs(2, &[(0, 0), (0, 1), (1, 1), (1, 1)]);
        let data = Interactions { n_users: 2, n_items: 2, train: &train, valid: &[] };
        let model = model(Objective::Causal, LossKind::Bce);
        let source = Source::new(&model, &data, 3);
        let steps: Vec<Step> = source.steps(1).map(|s| s.1).collect();
        assert_eq!((steps.len(), steps[0].batch.targets.as_slice()), (1, &[1][..]));
        assert_eq!(steps[0].negatives, Negatives::Own(vec![0]));
    }

    #[test]
    fn what_a_user_has_seen_before_a_target_is_excluded() {
        let train = train();
        let data = Interactions { n_users: 4, n_items: 20, train: &train, valid: &[] };
        let cloze = Objective::Cloze { mask_share: 0.5, last_only: 0.2, passes: 2 };
        for objective in [Objective::Causal, cloze] {
            let model = model(objective, LossKind::Softmax);
            let source = Source::new(&model, &data, 3);
            for (_, step, _) in source.steps(2) {
                let Negatives::All(Some(excluded)) = &step.negatives else { panic!("nothing is excluded") };
                for (n, (&place, target)) in step.batch.places.iter().zip(&step.batch.targets).enumerate() {
                    let history = train.of(step.batch.user_of(place) as usize);
                    let seen = excluded.of(n);
                    match objective {
                        Objective::Causal => {
                            assert_eq!(seen, &history[..seen.len()]);
                            assert_eq!(history[seen.len()], *target);
                        }
                        Objective::Cloze { .. } => assert_eq!(seen, history),
                    }
                }
            }
        }
    }

    #[test]
    fn steps_are_a_function_of_seed_and_epoch() {
        let train = train();
        let data = Interactions { n_users: 4, n_items: 20, train: &train, valid: &[] };
        for (objective, loss) in [
            (Objective::Causal, LossKind::Bce),
            (Objective::Causal, LossKind::SampledSoftmax),
            (Objective::Cloze { mask_share: 0.3, last_only: 0.1, passes: 2 }, LossKind::Softmax),
        ] {
            let model = model(objective, loss);
            let steps = |seed, epoch| Source::new(&model, &data, seed).steps(epoch).collect::<Vec<_>>();
            assert_eq!(steps(1, 4), steps(1, 4));
            assert_ne!(steps(1, 4), steps(2, 4));
            // The progress is in epochs; what is learned differs too.
            assert!(steps(1, 4)[0].0 == 3.0 && steps(1, 4)[0].1 != steps(1, 5)[0].1);
        }
    }
}
