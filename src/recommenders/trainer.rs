//! Training of pairwise embedding models: BPR loss, Adam, early stopping on validation.
//!
//! In: a [`PairwiseModel`] (how ego embeddings become final ones), [`TrainerConfig`],
//! [`Interactions`]. Out: a [`Fit`] with the best checkpoint by validation NDCG@10.
//!
//! * Loss (arXiv 2401.13870, eq. 2 and 3): mean over the batch of `-ln sigmoid(y_ui - y_uj)`,
//!   `i` a train item of `u`, `j` an item that `u` has not seen in train (uniform, one per pair, drawn anew each epoch).
//! * L2: `l2 / 2 * mean over the batch of (|e_u|^2 + |e_i|^2 + |e_j|^2)` on the EGO embeddings of the batch's
//!   rows, as in the authors' LightGCN code; not on the whole table, not on the final embeddings.
//! * Adam as in torch (betas .9 and .999, epsilon 1e-8), no weight decay of its own.
//! * Validation: full ranking of all items minus the user's train items, ties by item index.

use std::time::Instant;

use burn::backend::Autodiff;
use burn::optim::{Adam, AdamConfig, SimpleOptimizer};
use burn::tensor::activation::log_sigmoid;
use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Int, Tensor, TensorData};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::embedding_scorer::EmbeddingScorer;
use super::sparse::{Csr, SparseMatrix};
use super::{Epoch, Fit, FitContext, Interactions, topk};
use crate::device::{ModelBackend, OnBackend};
use crate::error::{Error, Result};
use crate::eval::metrics::ndcg_at;
use crate::interactions::sampler::NegativeSampler;

/// A model whose score is the product of a user's and an item's final embedding. Nodes are the
/// users, then the items.
pub trait PairwiseModel: Sync {
    /// The constant matrix `[nodes, nodes]` that [`PairwiseModel::embed`] needs, if any.
    ///
    /// # Errors
    /// Only our bugs.
    fn graph(&self, _data: &Interactions<'_>) -> Result<Option<Csr>> {
        Ok(None)
    }

    /// Ego embeddings (the parameters) `[nodes, dim]` -> final ones `[nodes, dim]`.
    fn embed<B: ModelBackend>(&self, ego: Tensor<B, 2>, graph: Option<&SparseMatrix<B>>) -> Tensor<B, 2>;
}

/// What the models share; each documents its own defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainerConfig {
    /// Length of an embedding.
    pub embedding_dim: usize,
    /// Adam's step size.
    pub learning_rate: f64,
    /// Weight of the L2 term.
    pub l2: f64,
    /// Pairs per step.
    pub batch_size: usize,
    /// At most so many passes over the train pairs.
    pub epochs: usize,
    /// Epochs from one validation to the next.
    pub eval_every: usize,
    /// Validations without a gain before training stops.
    pub patience: usize,
}

/// Mean BPR loss `[1]` of scores `[pairs]` of positive and negative items: `-ln sigmoid(pos - neg)`.
pub fn bpr_loss<B: Backend>(positive: Tensor<B, 1>, negative: Tensor<B, 1>) -> Tensor<B, 1> {
    log_sigmoid(positive - negative).mean().neg()
}

/// Fits `model`.
///
/// # Errors
/// What `ctx.watch` returned, or a loss that is no longer finite (exit 78).
pub fn fit<M: PairwiseModel>(
    model: &M,
    config: &TrainerConfig,
    data: &Interactions<'_>,
    ctx: &FitContext<'_>,
) -> Result<Fit> {
    ctx.device.run(Task { model, config, data, ctx })
}

struct Task<'a, M> {
    model: &'a M,
    config: &'a TrainerConfig,
    data: &'a Interactions<'a>,
    ctx: &'a FitContext<'a>,
}

impl<M: PairwiseModel> OnBackend for Task<'_, M> {
    type Output = Result<Fit>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<Fit> {
        let Task { model, config, data, ctx } = self;
        let graph = model.graph(data)?.map(|csr| SparseMatrix::<Autodiff<B>>::new(csr, device));
        let scorer_of = |table: &Tensor<B, 2>| {
            let ego = Tensor::<Autodiff<B>, 2>::from_inner(table.clone());
            let all = model.embed(ego, graph.as_ref()).inner();
            EmbeddingScorer::new(data.n_users, data.n_items, config.embedding_dim, host(all), host(table.clone()))
        };
        let pairs = Pairs::new(data);
        let mut table = initial::<B>(data, config.embedding_dim, ctx.seed, device);
        let mut optimizer = Optimizer::new(config.learning_rate);
        let mut stop = EarlyStop::new(config.patience);
        let mut best = (0, table.clone());
        let mut log = Vec::new();
        ctx.watch.begin(config.epochs);
        let epochs = if pairs.is_empty() { 0 } else { config.epochs };
        for number in 1..=epochs {
            let started = Instant::now();
            let mut total = Tensor::<B, 1>::zeros([1], device);
            for batch in pairs.epoch(ctx.seed, number).chunks(config.batch_size) {
                ctx.watch.check()?;
                let parameters = Tensor::<Autodiff<B>, 2>::from_inner(table.clone()).require_grad();
                let all = model.embed(parameters.clone(), graph.as_ref());
                let loss = batch_loss(&parameters, all, batch, data.n_users, config.l2);
                let mut grads = loss.backward();
                total = total + loss.inner() * batch.len() as f32;
                let grad = parameters.grad_remove(&mut grads).expect("a parameter of the loss has a gradient");
                table = optimizer.step(table, grad);
            }
            let loss = f64::from(total.into_scalar().elem::<f32>()) / pairs.len() as f64;
            if !loss.is_finite() {
                return Err(Error::spec(format!("training diverged in epoch {number}: the loss is {loss}"))
                    .with_help("lower `learning_rate` in the stage's `hyper` table"));
            }
            let seconds = started.elapsed().as_secs_f64();
            let due = number % config.eval_every == 0 || number == epochs;
            let valid_ndcg_10 = match due && !data.valid.is_empty() {
                true => Some(valid_ndcg(&scorer_of(&table), data)),
                false => None,
            };
            let epoch = Epoch { number, loss, valid_ndcg_10, seconds };
            ctx.watch.epoch(&epoch);
            log.push(epoch);
            match valid_ndcg_10 {
                Some(value) if stop.gained(value) => best = (number, table.clone()),
                Some(_) if stop.finished() => break,
                Some(_) => {}
                // Without validation the last weights are the result.
                None if data.valid.is_empty() => best = (number, table.clone()),
                None => {}
            }
        }
        Ok(Fit { scorer: Box::new(scorer_of(&best.1)), epochs: log, best_epoch: best.0 })
    }
}

/// One training example: the user prefers the first item to the second.
type Triple = (u32, u32, u32);

/// Loss `[1]` of a batch: BPR on the final embeddings, L2 on the ego embeddings of its rows.
fn batch_loss<B: Backend>(
    ego: &Tensor<B, 2>,
    all: Tensor<B, 2>,
    batch: &[Triple],
    n_users: usize,
    l2: f64,
) -> Tensor<B, 1> {
    let (n, device) = (batch.len(), ego.device());
    let nodes = ego.dims()[0];
    let node = |of: &dyn Fn(&Triple) -> u32| batch.iter().map(|t| of(t) as i32).collect::<Vec<i32>>();
    let first_item = n_users as u32;
    let nodes_of = [node(&|t| t.0), node(&|t| first_item + t.1), node(&|t| first_item + t.2)];
    let mut weights = vec![0f32; nodes];
    for &row in nodes_of.iter().flatten() {
        weights[row as usize] += (l2 / (2.0 * n as f64)) as f32;
    }
    let [users, positives, negatives] = nodes_of.map(|rows| {
        let rows = Tensor::<B, 1, Int>::from_data(TensorData::new(rows, [n]), &device);
        all.clone().select(0, rows)
    });
    let score = |items: Tensor<B, 2>| (users.clone() * items).sum_dim(1).reshape([n]);
    let bpr = bpr_loss(score(positives), score(negatives));
    if l2 == 0.0 {
        return bpr;
    }
    // Summed over the batch's rows with repeats = over all nodes, weighted by how often they occur.
    let weights = Tensor::<B, 1>::from_data(TensorData::new(weights, [nodes]), &device).reshape([nodes, 1]);
    bpr + (ego.clone().powi_scalar(2) * weights).sum()
}

/// Xavier-uniform ego embeddings `[users + items, dim]`, the two tables by their own sizes.
fn initial<B: Backend>(data: &Interactions<'_>, dim: usize, seed: u64, device: &B::Device) -> Tensor<B, 2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let nodes = data.n_users + data.n_items;
    let mut values = Vec::with_capacity(nodes * dim);
    for rows in [data.n_users, data.n_items] {
        let bound = (6.0 / (rows + dim).max(1) as f32).sqrt();
        values.extend((0..rows * dim).map(|_| rng.random_range(-bound..=bound)));
    }
    Tensor::from_data(TensorData::new(values, [nodes, dim]), device)
}

fn host<B: Backend>(table: Tensor<B, 2>) -> Vec<f32> {
    table.into_data().to_vec().expect("models are f32 on every back end")
}

/// Mean NDCG@10 over the held-out pairs.
fn valid_ndcg(scorer: &EmbeddingScorer, data: &Interactions<'_>) -> f64 {
    let ranks = topk::ranks(scorer, data.valid, data.train, data.train);
    ranks.iter().map(|&rank| ndcg_at(rank, 10)).sum::<f64>() / ranks.len().max(1) as f64
}

/// The train pairs of users who have something left that they have not seen.
struct Pairs {
    sampler: NegativeSampler,
    pairs: Vec<(u32, u32)>,
}

impl Pairs {
    fn new(data: &Interactions<'_>) -> Self {
        let sampler = NegativeSampler::new(data.train, data.n_items);
        let pairs = (0..sampler.n_users())
            .filter(|&u| sampler.unseen(u) > 0)
            .flat_map(|u| sampler.seen(u).iter().map(move |&i| (u as u32, i)))
            .collect();
        Pairs { sampler, pairs }
    }

    fn len(&self) -> usize {
        self.pairs.len()
    }

    fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// All pairs in random order, each with a negative: a function of seed and epoch alone.
    fn epoch(&self, seed: u64, number: usize) -> Vec<Triple> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number as u64);
        let mut order = self.pairs.clone();
        order.shuffle(&mut rng);
        order.into_iter().filter_map(|(u, i)| Some((u, i, self.sampler.sample(u as usize, &mut rng)?))).collect()
    }
}

/// Adam with its state for one table.
struct Optimizer<B: Backend> {
    adam: Adam,
    rate: f64,
    state: Option<<Adam as SimpleOptimizer<B>>::State<2>>,
}

impl<B: Backend> Optimizer<B> {
    fn new(rate: f64) -> Self {
        Optimizer { adam: AdamConfig::new().with_epsilon(1e-8).build(), rate, state: None }
    }

    fn step(&mut self, table: Tensor<B, 2>, grad: Tensor<B, 2>) -> Tensor<B, 2> {
        let (table, state) = self.adam.step(self.rate, table, grad, self.state.take());
        self.state = state;
        table
    }
}

/// Best value so far and how long ago it was.
struct EarlyStop {
    patience: usize,
    best: f64,
    since: usize,
}

impl EarlyStop {
    fn new(patience: usize) -> Self {
        EarlyStop { patience, best: f64::NEG_INFINITY, since: 0 }
    }

    /// Whether `value` is the best so far; equal is not.
    fn gained(&mut self, value: f64) -> bool {
        if value > self.best {
            (self.best, self.since) = (value, 0);
            return true;
        }
        self.since += 1;
        false
    }

    fn finished(&self) -> bool {
        self.since >= self.patience
    }
}

/// For tests and benchmarks of the loss: its value and gradient `[nodes, dim]` at `ego [nodes, dim]`.
#[cfg(test)]
fn loss_and_gradient<M: PairwiseModel>(
    model: &M,
    data: &Interactions<'_>,
    ego: &[f32],
    batch: &[Triple],
    l2: f64,
) -> (f64, Vec<f32>) {
    type A = Autodiff<burn::backend::Flex>;
    let (nodes, device) = (data.n_users + data.n_items, Default::default());
    let graph = model.graph(data).unwrap().map(|csr| SparseMatrix::<A>::new(csr, &device));
    let ego = Tensor::<A, 2>::from_data(TensorData::new(ego.to_vec(), [nodes, ego.len() / nodes]), &device);
    let ego = ego.require_grad();
    let all = model.embed(ego.clone(), graph.as_ref());
    let loss = batch_loss(&ego, all, batch, data.n_users, l2);
    let grads = loss.backward();
    (f64::from(loss.into_scalar()), host(ego.grad(&grads).unwrap()))
}

#[cfg(test)]
mod tests {
    use super::super::lightgcn::LightGcn;
    use super::super::mf::Mf;
    use super::*;
    use crate::interactions::Histories;

    const USERS: usize = 3;
    const ITEMS: usize = 4;
    const DIM: usize = 5;

    fn histories() -> Histories {
        Histories::from_pairs(USERS, &[(0, 0), (0, 1), (1, 1), (1, 2), (2, 3), (2, 0)])
    }

    fn ego() -> Vec<f32> {
        (0..(USERS + ITEMS) * DIM).map(|n| ((n * n + 3) as f32 * 0.7).sin()).collect()
    }

    /// Loss of eq. 2 and 3 with L2 in double precision, on dense matrices, independent of Burn.
    #[allow(clippy::needless_range_loop)] // matrix indices, as in the formula
    fn reference(layers: usize, ego: &[f64], batch: &[Triple], l2: f64) -> f64 {
        let nodes = USERS + ITEMS;
        let train = histories();
        let mut a = vec![vec![0f64; nodes]; nodes];
        for u in 0..USERS {
            for &i in train.of(u) {
                a[u][USERS + i as usize] = 1.0;
                a[USERS + i as usize][u] = 1.0;
            }
        }
        let degree: Vec<f64> = a.iter().map(|row| row.iter().sum()).collect();
        let (mut layer, mut sum) = (ego.to_vec(), ego.to_vec());
        for _ in 0..layers {
            let mut next = vec![0f64; nodes * DIM];
            for r in 0..nodes {
                for c in 0..nodes {
                    for d in 0..DIM {
                        if a[r][c] > 0.0 {
                            next[r * DIM + d] += layer[c * DIM + d] / (degree[r] * degree[c]).sqrt();
                        }
                    }
                }
            }
            layer = next;
            sum.iter_mut().zip(&layer).for_each(|(s, x)| *s += x);
        }
        let all: Vec<f64> = sum.iter().map(|s| s / (layers + 1) as f64).collect();
        let row = |table: &[f64], n: usize| table[n * DIM..(n + 1) * DIM].to_vec();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let mut loss = 0.0;
        for &(u, i, j) in batch {
            let (u, i, j) = (u as usize, USERS + i as usize, USERS + j as usize);
            let difference = dot(&row(&all, u), &row(&all, i)) - dot(&row(&all, u), &row(&all, j));
            loss += (1.0 + (-difference).exp()).ln();
            for n in [u, i, j] {
                loss += l2 / 2.0 * dot(&row(ego, n), &row(ego, n));
            }
        }
        loss / batch.len() as f64
    }

    fn check<M: PairwiseModel>(model: &M, layers: usize) {
        let (train, l2) = (histories(), 0.1);
        let data = Interactions { n_users: USERS, n_items: ITEMS, train: &train, valid: &[] };
        // User 0 and item 1 occur twice, item 2 as positive and negative.
        let batch = [(0, 0, 2), (0, 1, 3), (1, 2, 0), (2, 3, 1)];
        let ego = ego();
        let (loss, gradient) = loss_and_gradient(model, &data, &ego, &batch, l2);
        let wide: Vec<f64> = ego.iter().map(|&x| f64::from(x)).collect();
        assert!((loss - reference(layers, &wide, &batch, l2)).abs() < 1e-5);
        for (n, got) in gradient.into_iter().enumerate() {
            let (mut up, mut down) = (wide.clone(), wide.clone());
            up[n] += 1e-5;
            down[n] -= 1e-5;
            let want = (reference(layers, &up, &batch, l2) - reference(layers, &down, &batch, l2)) / 2e-5;
            assert!((f64::from(got) - want).abs() < 1e-5, "element {n}: {got} is not {want}");
        }
    }

    #[test]
    fn loss_and_gradient_of_mf_equal_finite_differences() {
        check(&Mf, 0);
    }

    #[test]
    fn loss_and_gradient_of_lightgcn_equal_finite_differences() {
        for layers in [1, 3] {
            check(&LightGcn { layers }, layers);
        }
    }

    #[test]
    fn an_epoch_has_every_pair_once_and_its_own_negatives() {
        let train = Histories::from_pairs(3, &[(0, 0), (0, 2), (0, 0), (1, 0), (1, 1), (1, 2), (2, 1)]);
        let data = Interactions { n_users: 3, n_items: 3, train: &train, valid: &[] };
        let pairs = Pairs::new(&data);
        // The repeated pair counts once; user 1 has seen everything and is left out.
        let mut seen: Vec<(u32, u32)> = pairs.epoch(5, 1).iter().map(|t| (t.0, t.1)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [(0, 0), (0, 2), (2, 1)]);
        assert!(pairs.epoch(5, 1).iter().all(|t| !train.of(t.0 as usize).contains(&t.2)));
        assert_eq!(pairs.epoch(5, 1), pairs.epoch(5, 1));
        let epochs: Vec<_> = (1..20).map(|n| pairs.epoch(5, n)).collect();
        assert!(epochs.iter().any(|e| e != &epochs[0]));
    }

    #[test]
    fn early_stopping_counts_validations_without_a_gain() {
        let mut stop = EarlyStop::new(2);
        assert!(stop.gained(0.1) && !stop.finished());
        assert!(!stop.gained(0.1) && !stop.finished());
        assert!(stop.gained(0.2));
        assert!(!stop.gained(0.15) && !stop.finished());
        assert!(!stop.gained(0.19) && stop.finished());
    }
}
