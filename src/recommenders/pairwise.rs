//! Pairwise embedding models in training: BPR loss over the train pairs.
//!
//! In: a [`PairwiseModel`] (how ego embeddings become final ones), [`Interactions`], [`PairwiseConfig`]. Out: a
//! [`Fit`] by the shared [`trainer`].
//!
//! * Loss (arXiv 2401.13870, eq. 2 and 3): mean over the batch of `-ln sigmoid(y_ui - y_uj)`,
//!   `i` a train item of `u`, `j` an item that `u` has not seen in train (uniform, one per pair, drawn anew each epoch).
//! * L2: `l2 / 2 * mean over the batch of (|e_u|^2 + |e_i|^2 + |e_j|^2)` on the EGO embeddings of the batch's
//!   rows, as in the authors' LightGCN code; not on the whole table, not on the final embeddings.
//! * Validation: full ranking of all items minus the user's train items, ties by item index.

use burn::backend::Autodiff;
use burn::tensor::activation::log_sigmoid;
use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::embedding_scorer::EmbeddingScorer;
use super::optim::{Adam, ParamId, Params, xavier_uniform};
use super::saved::{NamedTensor, Tensors};
use super::sparse::{Csr, SparseMatrix};
use super::trainer::{self, Learner, Schedule, epoch_rng};
use super::{Fit, FitContext, Interactions, Scorer, Watch, topk};
use crate::device::{ModelBackend, OnBackend};
use crate::error::Result;
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

/// What the models share besides the schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct PairwiseConfig {
    /// Length of an embedding.
    pub embedding_dim: usize,
    /// Weight of the L2 term.
    pub l2: f64,
    /// Epochs, steps, patience.
    pub schedule: Schedule,
}

/// Mean BPR loss `[1]` of scores `[pairs]` of positive and negative items: `-ln sigmoid(pos - neg)`.
pub fn bpr_loss<B: Backend>(positive: Tensor<B, 1>, negative: Tensor<B, 1>) -> Tensor<B, 1> {
    log_sigmoid(positive - negative).mean().neg()
}

/// Fits `model`.
///
/// # Errors
/// As [`trainer::run`].
pub fn fit<M: PairwiseModel>(
    model: &M,
    config: &PairwiseConfig,
    data: &Interactions<'_>,
    ctx: &FitContext<'_>,
) -> Result<Fit> {
    ctx.device.run(Task { model, config, data, ctx })
}

struct Task<'a, M> {
    model: &'a M,
    config: &'a PairwiseConfig,
    data: &'a Interactions<'a>,
    ctx: &'a FitContext<'a>,
}

impl<M: PairwiseModel> OnBackend for Task<'_, M> {
    type Output = Result<Fit>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<Fit> {
        let Task { model, config, data, ctx } = self;
        let graph = model.graph(data)?;
        let dim = config.embedding_dim;
        let mut rng = ChaCha8Rng::seed_from_u64(ctx.seed);
        let mut params = Params::<B>::new(device);
        let mut values = xavier_uniform(data.n_users, dim, &mut rng);
        values.extend(xavier_uniform(data.n_items, dim, &mut rng));
        let ego = params.add("ego_embeddings", &[data.n_users + data.n_items, dim], values);
        let mut learner = PairwiseLearner {
            model,
            config,
            data,
            seed: ctx.seed,
            pairs: Pairs::new(data),
            tracked_graph: graph.clone().map(|csr| SparseMatrix::new(csr, device)),
            graph: graph.map(|csr| SparseMatrix::new(csr, device)),
            adam: Adam::new(config.schedule.learning_rate),
            params,
            ego,
        };
        // With nothing to learn from the initial weights are the model.
        let schedule = match learner.pairs.is_empty() {
            true => Schedule { epochs: 0, ..config.schedule.clone() },
            false => config.schedule.clone(),
        };
        let trained = trainer::run(&mut learner, &schedule, ctx)?;
        Ok(Fit { scorer: Box::new(trained.fitted), epochs: trained.epochs, best_epoch: trained.best_epoch })
    }
}

struct PairwiseLearner<'a, M, B: ModelBackend> {
    model: &'a M,
    config: &'a PairwiseConfig,
    data: &'a Interactions<'a>,
    seed: u64,
    pairs: Pairs,
    tracked_graph: Option<SparseMatrix<Autodiff<B>>>,
    graph: Option<SparseMatrix<B>>,
    adam: Adam,
    params: Params<B>,
    ego: ParamId,
}

impl<M: PairwiseModel, B: ModelBackend> Learner for PairwiseLearner<'_, M, B> {
    type Fitted = EmbeddingScorer;

    fn epoch(&mut self, number: usize, watch: &dyn Watch) -> Result<f64> {
        let mut total = Tensor::<B, 1>::zeros([1], self.params.device());
        for batch in self.pairs.epoch(self.seed, number).chunks(self.config.schedule.batch_size as usize) {
            watch.check()?;
            let vars = self.params.tracked();
            let ego = vars.get::<2>(self.ego);
            let all = self.model.embed(ego.clone(), self.tracked_graph.as_ref());
            let loss = batch_loss(&ego, all, batch, self.data.n_users, self.config.l2);
            total = total + self.params.step(loss, vars, &self.adam) * batch.len() as f32;
        }
        Ok(f64::from(total.into_scalar().elem::<f32>()) / self.pairs.len() as f64)
    }

    fn fitted(&self) -> Result<EmbeddingScorer> {
        let ego = self.params.constants().get::<2>(self.ego);
        let all = self.model.embed(ego.clone(), self.graph.as_ref());
        let dim = self.config.embedding_dim;
        Ok(EmbeddingScorer::new(self.data.n_users, self.data.n_items, dim, host(all), host(ego)))
    }

    fn quality(&self, fitted: &EmbeddingScorer) -> Option<f64> {
        validation_ndcg(fitted, self.data)
    }

    fn tensors(fitted: &EmbeddingScorer) -> Vec<NamedTensor> {
        fitted.tensors()
    }

    fn load(&self, tensors: &Tensors) -> Result<EmbeddingScorer> {
        EmbeddingScorer::load(tensors)
    }

    fn state(&self) -> Vec<NamedTensor> {
        self.params.state()
    }

    fn restore(&mut self, state: &Tensors) -> Result<()> {
        self.params.restore(state)
    }
}

/// Mean NDCG@10 over the held-out pairs, all items but the user's train items ranked; `None` without any.
pub fn validation_ndcg(scorer: &dyn Scorer, data: &Interactions<'_>) -> Option<f64> {
    let ranks = topk::ranks(scorer, data.valid, data.train, data.train);
    let n = ranks.len();
    (n > 0).then(|| ranks.iter().map(|&rank| ndcg_at(rank, 10)).sum::<f64>() / n as f64)
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

fn host<B: Backend>(table: Tensor<B, 2>) -> Vec<f32> {
    table.into_data().to_vec().expect("models are f32 on every back end")
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
        let mut rng = epoch_rng(seed, number);
        let mut order = self.pairs.clone();
        order.shuffle(&mut rng);
        order.into_iter().filter_map(|(u, i)| Some((u, i, self.sampler.sample(u as usize, &mut rng)?))).collect()
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
}
