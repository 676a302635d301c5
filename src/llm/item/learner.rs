//! The item model in training.
//!
//! In: an LLM's weights, [`TitleTable`], [`Interactions`]. Out: [`ItemFit`] by the shared [`trainer`]: NDCG@10 on validation,
//! early stopping, checkpoints.
//!
//! A step has whole histories (or windows of `max_len`), one after another without padding, and learns at every position:
//! cross-entropy of the next item over the catalogue, or over the targets and shared draws with corrected logits
//! (Bengio and Senecal 2008) where the catalogue is large.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::tensor::activation::log_softmax;
use burn::tensor::{ElementConversion, Tensor, TensorData};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::ItemHyper;
use super::model::{ItemModel, Source, select};
use super::scorer::ItemScorer;
use super::text::TitleTable;
use crate::device::{ModelBackend, OnBackend};
use crate::error::{Error, Result};
use crate::llm::weights::Weights;
use crate::recommenders::ops::{Excluded, linear_cross_entropy_excluding};
use crate::recommenders::optim::{Adam, Params, Vars};
use crate::recommenders::pairwise::validation_ndcg;
use crate::recommenders::saved::{NamedTensor, Tensors};
use crate::recommenders::sequential::batches::{Window, causal_windows};
use crate::recommenders::sequential::loss::{Negatives, SharedSampler};
use crate::recommenders::trainer::{self, Learner, Schedule, epoch_rng};
use crate::recommenders::{Epoch, FitContext, Interactions, Watch};

/// Logit of a draw that is the target itself.
const LEFT_OUT: f32 = -1e9;

/// A fitted item model with its training log.
pub struct ItemFit {
    /// The best epoch's model, with user embeddings.
    pub scorer: ItemScorer,
    /// One entry per epoch that was run.
    pub epochs: Vec<Epoch>,
    /// The epoch that `scorer` comes from (1-based; 0 = the initial weights).
    pub best_epoch: usize,
}

/// Fits an item model.
///
/// # Errors
/// As [`trainer::run`]; the LLM has fewer layers, or its hidden size is not that of the titles (exit 78).
pub fn fit(
    hyper: &ItemHyper,
    weights: &Weights,
    titles: TitleTable,
    data: &Interactions<'_>,
    ctx: &FitContext<'_>,
) -> Result<ItemFit> {
    if titles.dim != weights.config().hidden || titles.known.len() != data.n_items {
        return Err(Error::internal("a table of titles of another LLM or catalogue"));
    }
    ctx.device.run(Task { hyper: &hyper.clone().resolved(), weights, titles: Arc::new(titles), data, ctx })
}

struct Task<'a> {
    hyper: &'a ItemHyper,
    weights: &'a Weights,
    titles: Arc<TitleTable>,
    data: &'a Interactions<'a>,
    ctx: &'a FitContext<'a>,
}

impl OnBackend for Task<'_> {
    type Output = Result<ItemFit>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<ItemFit> {
        let Task { hyper, weights, titles, data, ctx } = self;
        let mut params = Params::<B>::new(device);
        let mut rng = ChaCha8Rng::seed_from_u64(ctx.seed);
        let mut warm = vec![false; data.n_items];
        data.train.items().iter().for_each(|&item| warm[item as usize] = true);
        let model = ItemModel::new(hyper, titles, Source::Fresh(weights, &mut rng, &warm), &mut params)?;
        let sampled = data.n_items > hyper.full_softmax_items as usize;
        let sampler = sampled.then(|| SharedSampler::new(data.train, data.n_items, hyper.negative_power));
        let mut learner = ItemLearner { hyper, data, seed: ctx.seed, model, params, sampler };
        // With nothing to learn from the initial weights are the model.
        let schedule = match learner.batches(1).0.is_empty() {
            false => hyper.schedule(),
            true => Schedule { epochs: 0, ..hyper.schedule() },
        };
        let trained = trainer::run(&mut learner, &schedule, ctx)?;
        let scorer = trained.fitted.with_users(data.train);
        Ok(ItemFit { scorer, epochs: trained.epochs, best_epoch: trained.best_epoch })
    }
}

struct ItemLearner<'a, B: ModelBackend> {
    hyper: &'a ItemHyper,
    data: &'a Interactions<'a>,
    seed: u64,
    model: ItemModel,
    params: Params<B>,
    /// For the sampled softmax.
    sampler: Option<SharedSampler>,
}

/// What one step learns from.
struct Step {
    /// Positions of each window.
    lengths: Vec<usize>,
    /// `[positions]`.
    inputs: Vec<u32>,
    /// `[positions]`.
    targets: Vec<u32>,
    negatives: Negatives,
    dropout_seed: u64,
}

impl<B: ModelBackend> ItemLearner<'_, B> {
    /// The windows of an epoch in batches of about `batch_tokens` positions, in random order, and the generator that made them.
    fn batches(&self, number: usize) -> (Vec<Vec<Window>>, ChaCha8Rng) {
        let mut rng = epoch_rng(self.seed, number);
        let mut windows = causal_windows(self.data.train, self.hyper.max_len as usize, &mut rng);
        windows.retain(|w| w.to - w.from >= 2);
        windows.shuffle(&mut rng);
        let mut batches: Vec<Vec<Window>> = Vec::new();
        let mut positions = usize::MAX;
        for window in windows {
            let n = (window.to - window.from) as usize - 1;
            if positions.saturating_add(n) > self.hyper.batch_tokens as usize {
                batches.push(Vec::new());
                positions = 0;
            }
            positions += n;
            if let Some(last) = batches.last_mut() {
                last.push(window);
            }
        }
        (batches, rng)
    }

    fn step(&self, windows: &[Window], rng: &mut ChaCha8Rng) -> Step {
        let (mut lengths, mut inputs, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let mut seen = Excluded::default();
        for w in windows {
            let history = self.data.train.of(w.user as usize);
            let (from, to) = (w.from as usize, w.to as usize);
            let begin = seen.classes.len() as u32;
            seen.classes.extend_from_slice(&history[..to]);
            seen.ranges.extend((from..to - 1).map(|at| (begin, begin + at as u32 + 1)));
            inputs.extend_from_slice(&history[from..to - 1]);
            targets.extend_from_slice(&history[from + 1..to]);
            lengths.push(to - from - 1);
        }
        let negatives = match &self.sampler {
            Some(sampler) => sampler.draw(self.hyper.negatives as usize, &targets, rng),
            None => Negatives::All(self.hyper.exclude_seen.then_some(seen)),
        };
        Step { lengths, inputs, targets, negatives, dropout_seed: rng.random() }
    }

    /// Mean loss `[1]`.
    fn loss(&self, vars: &Vars<Autodiff<B>>, step: &Step) -> Tensor<Autodiff<B>, 1> {
        let packed = self.model.packed(&step.lengths);
        let dropped = (self.hyper.dropout > 0.0).then_some((self.hyper.dropout as f32, step.dropout_seed));
        match &step.negatives {
            Negatives::Shared { items: drawn, negative_logs, target_logs } => {
                let mut rows = [&step.inputs[..], &step.targets, drawn].concat();
                rows.sort_unstable();
                rows.dedup();
                let table = self.model.rows(vars, &rows);
                let of = |items: &[u32]| {
                    let place = |item: &u32| rows.binary_search(item).expect("all items of the step were read") as u32;
                    select(table.clone(), &items.iter().map(place).collect::<Vec<u32>>())
                };
                let states = self.model.states(vars, of(&step.inputs), &packed, dropped);
                let (n, m, device) = (step.targets.len(), drawn.len(), states.device());
                let row = |values: Vec<f32>, shape: [usize; 2]| {
                    Tensor::<Autodiff<B>, 2>::from_data(TensorData::new(values, shape), &device)
                };
                let yes = (states.clone() * of(&step.targets)).sum_dim(1) - row(target_logs.clone(), [n, 1]);
                let same =
                    step.targets.iter().flat_map(|t| drawn.iter().map(move |j| if t == j { LEFT_OUT } else { 0.0 }));
                let no = states.matmul(of(drawn).transpose()) - row(negative_logs.clone(), [1, m])
                    + row(same.collect(), [n, m]);
                log_softmax(Tensor::cat(vec![yes, no], 1), 1).slice([0..n, 0..1]).mean().neg()
            }
            Negatives::All(excluded) => {
                let table = self.model.table(vars);
                let states = self.model.states(vars, select(table.clone(), &step.inputs), &packed, dropped);
                linear_cross_entropy_excluding(states, table, None, &step.targets, excluded.clone()).mean()
            }
            Negatives::Own(_) => unreachable!("no draws of one's own are made here"),
        }
    }
}

impl<B: ModelBackend> Learner for ItemLearner<'_, B> {
    type Fitted = ItemScorer;

    fn epoch(&mut self, number: usize, watch: &dyn Watch) -> Result<f64> {
        let (batches, mut rng) = self.batches(number);
        let hyper = self.hyper;
        let n_batches = batches.len() as f64;
        let clip_norm = (hyper.clip_norm > 0.0).then_some(hyper.clip_norm);
        let (mut total, mut targets) = (0f64, 0usize);
        for (at, windows) in batches.iter().enumerate() {
            watch.check()?;
            let step = self.step(windows, &mut rng);
            let progress = (number - 1) as f64 + (at + 1) as f64 / n_batches;
            let warmed = if hyper.warmup_epochs > 0.0 { (progress / hyper.warmup_epochs).min(1.0) } else { 1.0 };
            let adam = Adam { decay: hyper.weight_decay, clip_norm, ..Adam::new(hyper.rate() * warmed) };
            let vars = self.params.tracked();
            let loss = self.loss(&vars, &step);
            let loss = self.params.step(loss, vars, &adam).into_scalar().elem::<f32>();
            total += f64::from(loss) * step.targets.len() as f64;
            targets += step.targets.len();
        }
        Ok(total / targets.max(1) as f64)
    }

    fn fitted(&self) -> Result<ItemScorer> {
        let mut tensors = self.params.tensors();
        tensors.extend(ItemScorer::constants(self.model.titles(), self.data.train));
        self.load(&Tensors::new(tensors))
    }

    fn quality(&self, fitted: &ItemScorer) -> Option<f64> {
        validation_ndcg(fitted, self.data)
    }

    fn tensors(fitted: &ItemScorer) -> Vec<NamedTensor> {
        fitted.weights()
    }

    fn load(&self, tensors: &Tensors) -> Result<ItemScorer> {
        let sizes = (self.data.n_users, self.data.n_items);
        ItemScorer::new(self.hyper, self.model.config(), self.model.scale, sizes, tensors)
    }

    fn state(&self) -> Vec<NamedTensor> {
        self.params.state()
    }

    fn restore(&mut self, state: &Tensors) -> Result<()> {
        self.params.restore(state)
    }
}
