//! LightGCN (He et al. 2020, arXiv 2002.02126): embeddings smoothed over the user-item graph.
//!
//! `E(k+1) = D^-1/2 A D^-1/2 E(k)`, final `E = mean of E(0)..E(K)`; A is the bipartite graph of
//! the train interactions (each pair once), D the diagonal of its degrees. A node without
//! interactions keeps `E(0) / (K + 1)`. Only E(0) is learned, with BPR or a softmax ([`super::ranking_loss`]).
//!
//! L2, part of the loss: `l2 / 2 * mean over the batch of (|e_u|^2 + |e_i|^2 + sum of |e_j|^2)` on the EGO embeddings
//! of a pair's user, item and, for `bpr`, negatives, as in the authors' `LightGCN-PyTorch`.
//!
//! Reference implementations: the authors' code, SELFRec `model/graph/LightGCN.py` and RecBole's `LightGCN`
//! (Xavier-uniform start). We differ from the latter two in the L2 term, which there takes norms and not squares.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::{EmbeddingScorer, OverHistory};
use super::graph::{Bipartite, Propagation};
use super::optim::{ParamId, Params, Vars, xavier_uniform};
use super::pairwise::{self, Batch, LARGE_BATCHES, PairModel, PairRecommender, host};
use super::ranking_loss::{Draw, Loss, LossHyper, RankingLoss, Rows, View, weighted_squares};
use super::registry::{Backbone, Make, Task};
use super::saved::Tensors;
use super::sparse::SparseMatrix;
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;
use crate::interactions::sampler::NegativeSampler;

/// Hyper-parameters of `lightgcn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LightGcnHyper {
    /// Length of the users' and items' embeddings. Default 128, with `bpr` 64 (SELFRec `conf/LightGCN.yaml`: 64).
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Number of propagations over the graph, K. Default 3 (SELFRec `conf/LightGCN.yaml`: 2; the paper: 3).
    #[schemars(range(min = 1, max = 10))]
    pub layers: u32,
    /// Weight of the L2 term on the ego embeddings of a batch. Default 0.005, with `bpr` 0.0001 (SELFRec
    /// `conf/LightGCN.yaml`: 0.0001).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2: f64,
    /// Whether embeddings are propagated anew over the history that is known when the model scores (train and
    /// validation at test time; the weights stay fitted on train). Default true. SELFRec scores over the train graph.
    pub propagate_history: bool,
    /// The loss.
    #[serde(flatten)]
    pub loss: LossHyper,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl Default for LightGcnHyper {
    fn default() -> Self {
        LightGcnHyper::defaults(Loss::Softmax)
    }
}

/// `lightgcn` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "lightgcn",
    about: "LightGCN: embeddings smoothed over the user-item graph, with a softmax loss or BPR",
    task: Task::Direct,
    schema: || schemars::schema_for!(LightGcnHyper),
    idle: &[],
    make: Make::Ranking {
        build: |given| Ok(Box::new(LightGcnHyper::build(given)?)),
        load: |given, tensors| {
            let hyper = LightGcnHyper::build(given.clone())?;
            Ok(Box::new(load_scorer(tensors, hyper.over_history(), hyper.propagate_history)?))
        },
    },
};

impl LightGcnHyper {
    /// Tuned on the validation part of MovieLens-100K. SELFRec has batches of 2,048 and a learning rate of 0.001, at
    /// which the ranking stays a long while at that of popularity. Large batches save most of the propagations.
    fn defaults(loss: Loss) -> Self {
        let (embedding_dim, l2, schedule) = match loss {
            Loss::Bpr => {
                (64, 1e-4, Schedule { learning_rate: 5e-3, batch_size: 2048, epochs: 200, eval_every: 2, patience: 10 })
            }
            Loss::Softmax | Loss::SampledSoftmax => (128, 5e-3, LARGE_BATCHES),
        };
        LightGcnHyper { embedding_dim, layers: 3, l2, propagate_history: true, loss: LossHyper::new(loss), schedule }
    }

    fn build(given: serde_json::Value) -> Result<Self> {
        let defaults = LightGcnHyper::defaults(LossHyper::asked(&given).unwrap_or(Loss::Softmax));
        let mut hyper: LightGcnHyper = hyper::parse_over("lightgcn", &defaults, given)?;
        hyper.loss.resolve("lightgcn")?;
        Ok(hyper)
    }

    fn over_history(&self) -> OverHistory {
        OverHistory { propagation: Propagation::mean(self.layers as usize), cosine: self.loss.cosine }
    }
}

/// A saved graph model.
///
/// # Errors
/// As [`EmbeddingScorer::load_graph`].
pub(super) fn load_scorer(tensors: &Tensors, over: OverHistory, propagate_history: bool) -> Result<EmbeddingScorer> {
    let scorer = EmbeddingScorer::load_graph(tensors, over)?;
    Ok(if propagate_history { scorer } else { scorer.fixed() })
}

impl Recommender for LightGcnHyper {
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

impl PairRecommender for LightGcnHyper {
    type Model<B: ModelBackend> = LightGcn<B>;

    fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    fn model<B: ModelBackend>(
        &self,
        data: &Interactions<'_>,
        params: &mut Params<B>,
        sampler: &NegativeSampler,
        rng: &mut ChaCha8Rng,
    ) -> Result<LightGcn<B>> {
        let nodes = Nodes::new(data, self.embedding_dim as usize, params, rng);
        let (over, device) = (self.over_history(), params.device().clone());
        let graph = Bipartite::new(data.n_users, data.n_items, data.train).normalised();
        Ok(LightGcn {
            l2: self.l2,
            loss: RankingLoss::new(&self.loss, self.schedule.batch_size as usize, data.n_items, sampler)?,
            over,
            propagate_history: self.propagate_history,
            graph: TrainGraph::new(graph, &device),
            nodes,
        })
    }
}

/// The learned ego embeddings of users and items, in one table.
#[derive(Clone, Copy)]
pub(super) struct Nodes {
    /// Number of users; their rows come first.
    pub(super) n_users: usize,
    /// Number of items.
    pub(super) n_items: usize,
    /// `[users + items, dim]`
    pub(super) ego: ParamId,
}

impl Nodes {
    /// Users and items each Xavier-uniform.
    pub(super) fn new<B: ModelBackend>(
        data: &Interactions<'_>,
        dim: usize,
        params: &mut Params<B>,
        rng: &mut ChaCha8Rng,
    ) -> Self {
        let (n_users, n_items) = (data.n_users, data.n_items);
        let mut values = xavier_uniform(n_users, dim, rng);
        values.extend(xavier_uniform(n_items, dim, rng));
        Nodes { n_users, n_items, ego: params.add("ego_embeddings", &[n_users + n_items, dim], values) }
    }

    /// Users and items of a table `[users + items, dim]`.
    pub(super) fn view<B: Backend>(&self, table: Tensor<B, 2>) -> View<B> {
        View {
            users: Rows::All { table: table.clone(), first: 0, len: self.n_users },
            items: Rows::All { table, first: self.n_users, len: self.n_items },
        }
    }

    /// The L2 term `[1]` of a batch: `l2 / 2 * mean over pairs of the squared lengths of its ego embeddings`.
    pub(super) fn l2<B: Backend>(
        &self,
        ego: Tensor<B, 2>,
        read: (Vec<u32>, Vec<u32>),
        n_pairs: usize,
        l2: f64,
    ) -> Tensor<B, 1> {
        let weight = (l2 / (2.0 * n_pairs as f64)) as f32;
        let mut weights = vec![0f32; self.n_users + self.n_items];
        read.0.iter().for_each(|&u| weights[u as usize] += weight);
        read.1.iter().for_each(|&i| weights[self.n_users + i as usize] += weight);
        weighted_squares(ego, weights)
    }
}

/// The train graph for steps and for scoring.
pub(super) struct TrainGraph<B: ModelBackend> {
    /// With gradients.
    pub(super) tracked: SparseMatrix<Autodiff<B>>,
    /// Without.
    pub(super) plain: SparseMatrix<B>,
}

impl<B: ModelBackend> TrainGraph<B> {
    /// A normalised adjacency on a device.
    pub(super) fn new(csr: super::sparse::Csr, device: &B::Device) -> Self {
        let tracked = SparseMatrix::<Autodiff<B>>::symmetric(csr, device);
        TrainGraph { plain: tracked.inner(), tracked }
    }
}

/// The model on a back end.
pub struct LightGcn<B: ModelBackend> {
    nodes: Nodes,
    l2: f64,
    loss: RankingLoss,
    over: OverHistory,
    propagate_history: bool,
    graph: TrainGraph<B>,
}

impl<B: ModelBackend> LightGcn<B> {
    fn loss_of(&self, vars: &Vars<Autodiff<B>>, pairs: &[(u32, u32)], draw: &Draw) -> Tensor<Autodiff<B>, 1> {
        let ego = vars.get::<2>(self.nodes.ego);
        let all = self.over.propagation.embed(ego.clone(), &self.graph.tracked);
        let loss = self.loss.value(&self.nodes.view(all), pairs, draw);
        match self.l2 == 0.0 {
            true => loss,
            false => loss + self.nodes.l2(ego, self.loss.regularised(pairs, draw), pairs.len(), self.l2),
        }
    }
}

impl<B: ModelBackend> PairModel<B> for LightGcn<B> {
    fn loss(&self, vars: &Vars<Autodiff<B>>, batch: &Batch<'_>, rng: &mut ChaCha8Rng) -> Tensor<Autodiff<B>, 1> {
        let draw = self.loss.draw(batch.pairs, batch.sampler, rng);
        self.loss_of(vars, batch.pairs, &draw)
    }

    fn scorer(&self, vars: &Vars<B>) -> EmbeddingScorer {
        scorer_over(vars, &self.nodes, self.over, &self.graph.plain, self.propagate_history)
    }

    fn load(&self, tensors: &Tensors) -> Result<EmbeddingScorer> {
        load_scorer(tensors, self.over, self.propagate_history)
    }
}

/// The scorer of a graph model's weights.
pub(super) fn scorer_over<B: ModelBackend>(
    vars: &Vars<B>,
    nodes: &Nodes,
    over: OverHistory,
    graph: &SparseMatrix<B>,
    propagate_history: bool,
) -> EmbeddingScorer {
    let ego = vars.get::<2>(nodes.ego);
    let all = over.propagation.embed(ego.clone(), graph);
    let scorer = EmbeddingScorer::graph(nodes.n_users, nodes.n_items, host(all), host(ego), over);
    if propagate_history { scorer } else { scorer.fixed() }
}

#[cfg(test)]
mod tests {
    use super::super::pairwise_golden::{Golden, contract};
    use super::*;

    #[test]
    fn loss_gradient_and_embeddings_equal_golden_values() {
        let golden = Golden::read("lightgcn");
        golden.check(
            |given| LightGcnHyper::build(given.clone()).unwrap(),
            |model, vars, golden, case| model.loss_of(vars, &golden.pairs, &Draw { negatives: case.draw.clone() }),
        );
    }

    #[test]
    fn it_fits_a_toy_set_again_and_again_alike() {
        for loss in ["bpr", "softmax", "sampled-softmax"] {
            contract("lightgcn", serde_json::json!({"loss": loss}));
            contract("lightgcn", serde_json::json!({"loss": loss, "cosine": true}));
        }
    }
}
