//! MixGCF (Huang et al. 2021, "MixGCF: An improved training method for graph neural network-based recommender
//! systems", KDD 2021): LightGCN trained with synthetic hard negatives.
//!
//! For a pair (u, i), M items that u has not seen are drawn. Positive mixing (eq. 6): in hop l each candidate becomes
//! `a i(l) + (1 - a) j(l)` with `a` uniform in [0, 1), drawn for each pair and hop. Hop mixing (eq. 7 and 8): each hop
//! takes the candidate with the greatest product with the user's final embedding (its own hop with `concat`);
//! since `a` is the same for all candidates of a hop, that is the candidate whose unmixed product is greatest. The
//! hops, from different candidates, are pooled as those of an item are, and are the pair's negative.
//!
//! Loss: mean over pairs of `ln(1 + sum over negatives of exp(s(u, j) - s(u, i)))`, which is BPR for one negative, +
//! `l2 / 2 * (|e_u|^2 + |e_i|^2 + sum of |e_j|^2)` on the ego embeddings (of a negative: its mixed hop 0).
//!
//! Reference implementations: the authors' `MixGCF` and SELFRec `model/graph/MixGCF.py`. SELFRec draws `a` anew for each
//! candidate and dimension; we follow the paper and the authors' code, where a hop's candidates share it.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn::tensor::activation::{log_sigmoid, log_softmax};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::{EmbeddingScorer, OverHistory};
use super::graph::{Bipartite, Pooling, Propagation};
use super::lightgcn::{Nodes, TrainGraph, load_scorer, scorer_over};
use super::ops::dropout;
use super::optim::{Params, Vars};
use super::pairwise::{self, Batch, PairModel, PairRecommender, host};
use super::registry::{Backbone, Make, Task};
use super::saved::Tensors;
use super::sparse::{Csr, SparseMatrix};
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;
use crate::interactions::sampler::NegativeSampler;

/// Hyper-parameters of `mixgcf`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MixGcfHyper {
    /// Length of the users' and items' embeddings. Default 64 (SELFRec `conf/MixGCF.yaml`: 64).
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Number of propagations over the graph, K. Default 3 (SELFRec `conf/MixGCF.yaml`, `n_layer`).
    #[schemars(range(min = 1, max = 10))]
    pub layers: u32,
    /// Weight of the L2 term on the ego embeddings of a batch. Default 0.001 (SELFRec `conf/MixGCF.yaml`: 0.0001, of
    /// norms that are not squared).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2: f64,
    /// Candidates that a negative is mixed of, M. Default 16 (SELFRec `conf/MixGCF.yaml`, `n_negs`: 64; the harder the
    /// negatives, the earlier it over-fits a small catalogue).
    #[schemars(range(min = 1, max = 4096))]
    pub candidates: u32,
    /// Mixed negatives per train pair, each of its own candidates. Default 1 (the authors' `K`).
    #[schemars(range(min = 1, max = 64))]
    pub negatives: u32,
    /// How the hops of a node become its final embedding: `mean`, `sum`, `concat` or `final` (the last hop). Default
    /// `mean` (SELFRec, and the authors' commands for LightGCN).
    pub pooling: Pooling,
    /// Share of the numbers of each hop that a training step sets to 0. Default 0.1 (SELFRec `MixGCF_Encoder`).
    #[schemars(range(min = 0.0, max = 0.9))]
    pub message_dropout: f64,
    /// Whether embeddings are propagated anew over the history that is known when the model scores (train and
    /// validation at test time; the weights stay fitted on train). Default true. SELFRec scores over the train graph.
    pub propagate_history: bool,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl Default for MixGcfHyper {
    /// Tuned on the validation part of MovieLens-100K, where half this learning rate takes twice the epochs; SELFRec
    /// has 0.001.
    fn default() -> Self {
        MixGcfHyper {
            embedding_dim: 64,
            layers: 3,
            l2: 1e-3,
            candidates: 16,
            negatives: 1,
            pooling: Pooling::Mean,
            message_dropout: 0.1,
            propagate_history: true,
            schedule: Schedule { learning_rate: 4e-3, batch_size: 2048, epochs: 40, eval_every: 2, patience: 4 },
        }
    }
}

/// `mixgcf` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "mixgcf",
    about: "MixGCF: LightGCN trained with hard negatives that are mixed of hops and positives",
    task: Task::Direct,
    schema: || schemars::schema_for!(MixGcfHyper),
    idle: &[],
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<MixGcfHyper>("mixgcf", given)?)),
        load: |given, tensors| {
            let hyper = hyper::parse::<MixGcfHyper>("mixgcf", given.clone())?;
            Ok(Box::new(load_scorer(tensors, hyper.over_history(), hyper.propagate_history)?))
        },
    },
};

impl MixGcfHyper {
    fn over_history(&self) -> OverHistory {
        let propagation = Propagation { layers: self.layers as usize, pooling: self.pooling };
        OverHistory { propagation, cosine: false }
    }
}

impl Recommender for MixGcfHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn embeds(&self) -> Embeds {
        Embeds::Both
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        pairwise::fit(self, data, ctx)
    }
}

impl PairRecommender for MixGcfHyper {
    type Model<B: ModelBackend> = MixGcf<B>;

    fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    fn model<B: ModelBackend>(
        &self,
        data: &Interactions<'_>,
        params: &mut Params<B>,
        _sampler: &NegativeSampler,
        rng: &mut ChaCha8Rng,
    ) -> Result<MixGcf<B>> {
        let nodes = Nodes::new(data, self.embedding_dim as usize, params, rng);
        let graph = Bipartite::new(data.n_users, data.n_items, data.train).normalised();
        Ok(MixGcf { hyper: self.clone(), nodes, graph: TrainGraph::new(graph, params.device()) })
    }
}

/// The model on a back end.
pub struct MixGcf<B: ModelBackend> {
    hyper: MixGcfHyper,
    nodes: Nodes,
    graph: TrainGraph<B>,
}

/// What was drawn for a batch.
struct Mixing {
    /// `[negatives][pairs * candidates]`: unseen items.
    candidates: Vec<Vec<u32>>,
    /// `[negatives][pairs * (layers + 1)]`: weight of the positive in each hop.
    weights: Vec<Vec<f32>>,
    /// Of the dropout of each layer.
    dropout_seeds: Vec<u64>,
}

impl<B: ModelBackend> MixGcf<B> {
    fn draw(&self, batch: &Batch<'_>, rng: &mut ChaCha8Rng) -> Mixing {
        let (m, hops) = (self.hyper.candidates as usize, self.hyper.layers as usize + 1);
        let mut item =
            |user: u32| batch.sampler.sample(user as usize, rng).expect("users without negatives are in no batch");
        let mut candidates = Vec::new();
        for _ in 0..self.hyper.negatives {
            let users = batch.pairs.iter().flat_map(|p| std::iter::repeat_n(p.0, m));
            candidates.push(users.map(&mut item).collect());
        }
        let weights =
            (0..self.hyper.negatives).map(|_| (0..batch.pairs.len() * hops).map(|_| rng.random()).collect()).collect();
        Mixing { candidates, weights, dropout_seeds: (1..hops).map(|_| rng.random()).collect() }
    }

    fn loss_of(&self, vars: &Vars<Autodiff<B>>, pairs: &[(u32, u32)], mixing: &Mixing) -> Tensor<Autodiff<B>, 1> {
        let propagation = self.hyper.over_history().propagation;
        let (n, ego) = (pairs.len(), vars.get::<2>(self.nodes.ego));
        let mut hops = vec![ego.clone()];
        for seed in &mixing.dropout_seeds {
            let next = self.graph.tracked.matmul(hops[hops.len() - 1].clone());
            hops.push(dropout(next, self.hyper.message_dropout as f32, *seed));
        }
        let all = propagation.pool(hops.clone());
        let view = self.nodes.view(all.clone());
        let users = view.users.select(&pairs.iter().map(|p| p.0).collect::<Vec<u32>>());
        let positives = view.items.select(&pairs.iter().map(|p| p.1).collect::<Vec<u32>>());
        let values = HopValues {
            hops: hops.iter().map(|hop| Arc::new(host(hop.clone().inner()))).collect(),
            pooled: (self.hyper.pooling != Pooling::Concat).then(|| Arc::new(host(all.inner()))),
            n_users: self.nodes.n_users,
            dim: self.hyper.embedding_dim as usize,
        };
        let mut scores = vec![(users.clone() * positives).sum_dim(1)];
        let mut mixed_egos = Vec::new();
        for (candidates, weights) in mixing.candidates.iter().zip(&mixing.weights) {
            let hardest = values.hardest(pairs, candidates);
            let mixed: Vec<_> =
                hops.iter().enumerate().map(|(l, hop)| self.mixed(hop, pairs, &hardest, weights, l)).collect();
            mixed_egos.push(mixed[0].clone());
            scores.push((users.clone() * propagation.pool(mixed)).sum_dim(1));
        }
        let loss = match scores.as_slice() {
            [positive, negative] => log_sigmoid(positive.clone() - negative.clone()).mean().neg(),
            // ln(1 + sum of exp(negative - positive)) is the cross-entropy of the positive among all of them.
            _ => log_softmax(Tensor::cat(scores, 1), 1).narrow(1, 0, 1).mean().neg(),
        };
        if self.hyper.l2 == 0.0 {
            return loss;
        }
        let read = pairs.iter().copied().unzip();
        let weight = (self.hyper.l2 / (2.0 * n as f64)) as f32;
        let mixed = mixed_egos.into_iter().map(|m| m.powi_scalar(2).sum() * weight);
        mixed.fold(loss + self.nodes.l2(ego, read, n, self.hyper.l2), |sum, term| sum + term)
    }

    /// `[pairs, dim]`: hop `l` of the positives mixed into that of the chosen candidates. One sparse product: a row has the
    /// positive's weight and the candidate's.
    fn mixed(
        &self,
        hop: &Tensor<Autodiff<B>, 2>,
        pairs: &[(u32, u32)],
        hardest: &[u32],
        weights: &[f32],
        l: usize,
    ) -> Tensor<Autodiff<B>, 2> {
        let (n, hops) = (pairs.len(), self.hyper.layers as usize + 1);
        let node = |item: u32| self.nodes.n_users as u32 + item;
        let (mut columns, mut values) = (Vec::with_capacity(2 * n), Vec::with_capacity(2 * n));
        for (row, &(_, positive)) in pairs.iter().enumerate() {
            let (chosen, weight) = (hardest[row * hops + l], weights[row * hops + l]);
            let mut entries = [(node(positive), weight), (node(chosen), 1.0 - weight)];
            entries.sort_unstable_by_key(|e| e.0);
            entries.iter().for_each(|&(column, value)| {
                columns.push(column);
                values.push(value);
            });
        }
        let offsets = (0..=n).map(|row| 2 * row).collect();
        let matrix = Csr::from_parts(n, self.nodes.n_users + self.nodes.n_items, offsets, columns, values);
        SparseMatrix::new(matrix, &hop.device()).matmul(hop.clone())
    }
}

/// The hops on the host, where candidates are compared.
struct HopValues {
    /// `[layers + 1]` of `[nodes, dim]`
    hops: Vec<Arc<Vec<f32>>>,
    /// `[nodes, dim]`: the users' final embeddings; without, a hop is compared with the user's own.
    pooled: Option<Arc<Vec<f32>>>,
    n_users: usize,
    dim: usize,
}

impl HopValues {
    /// `[pairs * hops]`: of each pair's candidates the one whose hop has the greatest product with the user; the first
    /// among equals.
    fn hardest(&self, pairs: &[(u32, u32)], candidates: &[u32]) -> Vec<u32> {
        let (hops, m) = (self.hops.len(), candidates.len() / pairs.len().max(1));
        let mut chosen = vec![0u32; pairs.len() * hops];
        let work = chosen.par_chunks_mut(hops).zip(pairs.par_iter().zip(candidates.par_chunks(m.max(1))));
        work.with_min_len(64).for_each(|(chosen, (&(user, _), candidates))| {
            for (hop, best) in self.hops.iter().zip(chosen) {
                let user = &self.pooled.as_ref().unwrap_or(hop)[user as usize * self.dim..][..self.dim];
                *best = hardest_of(hop, self.n_users, user, candidates);
            }
        });
        chosen
    }
}

/// Of `candidates` the item with the greatest product with `user [dim]` in `hop [nodes, dim]`.
fn hardest_of(hop: &[f32], n_users: usize, user: &[f32], candidates: &[u32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just checked.
        return unsafe { hardest_avx2(hop, n_users, user, candidates) };
    }
    hardest_body(hop, n_users, user, candidates)
}

/// The same loop, which the compiler may turn into AVX2 code.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn hardest_avx2(hop: &[f32], n_users: usize, user: &[f32], candidates: &[u32]) -> u32 {
    hardest_body(hop, n_users, user, candidates)
}

#[inline(always)]
fn hardest_body(hop: &[f32], n_users: usize, user: &[f32], candidates: &[u32]) -> u32 {
    let dim = user.len();
    let mut best = (f32::NEG_INFINITY, candidates[0]);
    for &item in candidates {
        let row = &hop[(n_users + item as usize) * dim..][..dim];
        // Sixteen sums, so that they fit registers of any width.
        let mut sums = [0f32; 16];
        let (a, b) = (user.chunks_exact(16), row.chunks_exact(16));
        let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
        for (a, b) in a.zip(b) {
            #[allow(clippy::needless_range_loop)] // the form that becomes vector code
            for n in 0..16 {
                sums[n] += a[n] * b[n];
            }
        }
        let score = sums.iter().sum::<f32>() + rest;
        if score > best.0 {
            best = (score, item);
        }
    }
    best.1
}

impl<B: ModelBackend> PairModel<B> for MixGcf<B> {
    fn loss(&self, vars: &Vars<Autodiff<B>>, batch: &Batch<'_>, rng: &mut ChaCha8Rng) -> Tensor<Autodiff<B>, 1> {
        let mixing = self.draw(batch, rng);
        self.loss_of(vars, batch.pairs, &mixing)
    }

    fn scorer(&self, vars: &Vars<B>) -> EmbeddingScorer {
        let over = self.hyper.over_history();
        scorer_over(vars, &self.nodes, over, &self.graph.plain, self.hyper.propagate_history)
    }

    fn load(&self, tensors: &Tensors) -> Result<EmbeddingScorer> {
        load_scorer(tensors, self.hyper.over_history(), self.hyper.propagate_history)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pairwise_golden::{Golden, contract};
    use super::*;
    use crate::interactions::Histories;
    use crate::recommenders::trainer::epoch_rng;
    use burn::backend::Flex;
    use proptest::prelude::*;

    #[test]
    fn loss_gradient_and_embeddings_equal_golden_values() {
        Golden::read("mixgcf").check(
            |given| hyper::parse::<MixGcfHyper>("mixgcf", given.clone()).unwrap(),
            |model, vars, golden, case| {
                let mixing = Mixing {
                    candidates: case.candidates.clone(),
                    weights: case.mixing_weights.clone(),
                    dropout_seeds: vec![0; model.hyper.layers as usize],
                };
                model.loss_of(vars, &golden.pairs, &mixing)
            },
        );
    }

    #[test]
    fn it_fits_a_toy_set_again_and_again_alike() {
        for pooling in ["mean", "concat", "sum", "final"] {
            contract("mixgcf", serde_json::json!({"pooling": pooling, "candidates": 4}));
        }
        contract("mixgcf", serde_json::json!({"negatives": 3, "candidates": 2, "message_dropout": 0.0}));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn candidates_are_unseen_and_weights_in_range(
            pairs in prop::collection::btree_set((0u32..4, 0u32..7), 1..20), seed in any::<u64>(),
        ) {
            let pairs: Vec<(u32, u32)> = pairs.into_iter().collect();
            let train = Histories::from_pairs(4, &pairs);
            let sampler = NegativeSampler::new(&train, 7);
            let pairs: Vec<(u32, u32)> = pairs.into_iter().filter(|p| sampler.unseen(p.0 as usize) > 0).collect();
            let data = Interactions { n_users: 4, n_items: 7, train: &train, valid: &[] };
            let hyper = MixGcfHyper { candidates: 5, negatives: 2, embedding_dim: 2, ..MixGcfHyper::default() };
            let mut params = Params::<Flex>::new(&Default::default());
            let mut rng = epoch_rng(seed, 1);
            let model = hyper.model(&data, &mut params, &sampler, &mut rng).unwrap();
            let mixing = model.draw(&Batch { pairs: &pairs, sampler: &sampler }, &mut rng);
            prop_assert_eq!(mixing.candidates.len(), 2);
            for candidates in &mixing.candidates {
                prop_assert_eq!(candidates.len(), pairs.len() * 5);
                for (n, item) in candidates.iter().enumerate() {
                    prop_assert!(!train.of(pairs[n / 5].0 as usize).contains(item));
                }
            }
            for weights in &mixing.weights {
                prop_assert_eq!(weights.len(), pairs.len() * 4);
                prop_assert!(weights.iter().all(|w| (0.0..1.0).contains(w)));
            }
        }

        #[test]
        fn the_hardest_candidate_has_the_greatest_product(
            values in prop::collection::vec(-1.0f32..1.0, 20 * 19), candidates in prop::collection::vec(0u32..15, 1..9),
        ) {
            let (n_users, dim) = (5, 19);
            let user = &values[2 * dim..3 * dim];
            let score = |item: u32| {
                let row = &values[(n_users + item as usize) * dim..][..dim];
                user.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
            };
            let best = candidates.iter().map(|&c| score(c)).fold(f64::NEG_INFINITY, f64::max);
            for found in [hardest_of(&values, n_users, user, &candidates), hardest_body(&values, n_users, user, &candidates)] {
                prop_assert!(candidates.contains(&found) && best - score(found) < 1e-5);
            }
        }
    }
}
