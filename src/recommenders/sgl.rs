//! SGL (Wu et al. 2021, "Self-supervised graph learning for recommendation", arXiv 2010.10783): LightGCN with a
//! contrastive task beside the ranking loss.
//!
//! Each epoch draws two random subgraphs of the train graph ([`super::graph::augment`]), degrees counted anew. The
//! embeddings of a node over one should be nearer to its own over the other than to those of other nodes:
//! InfoNCE (eq. 10) with cosines over a temperature, among the distinct users of a batch and, apart, among its
//! distinct items; the mean over users and the mean over items are added and weighted.
//!
//! Loss: ranking loss + `contrast_weight` * InfoNCE + L2 on the ego embeddings of a batch, as in [`super::lightgcn`].
//!
//! Reference implementations: SELFRec `model/graph/SGL.py` (which contrasts users and items in one softmax; the paper
//! and RecBole keep them apart, as here) and RecBole's `SGL` (which contrasts with all nodes, not those of the batch).

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::{EmbeddingScorer, OverHistory};
use super::graph::augment::{drop_edges, drop_nodes};
use super::graph::{Bipartite, Propagation};
use super::idle::{self, Idle};
use super::lightgcn::{Nodes, TrainGraph, load_scorer, scorer_over};
use super::ops::linear_cross_entropy;
use super::optim::{Params, Vars};
use super::pairwise::{self, Batch, LARGE_BATCHES, PairModel, PairRecommender};
use super::ranking_loss::{Draw, Loss, LossHyper, RankingLoss, View, distinct, unit_rows};
use super::registry::{Backbone, Make, Task};
use super::saved::Tensors;
use super::sparse::SparseMatrix;
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;
use crate::interactions::sampler::NegativeSampler;

/// How a subgraph is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Augmentation {
    /// A share of the users and of the items loses all edges.
    NodeDrop,
    /// A share of the edges is left out.
    EdgeDrop,
    /// As `edge-drop`, with another draw for each layer.
    RandomWalk,
}

/// Hyper-parameters of `sgl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SglHyper {
    /// Length of the users' and items' embeddings. Default 128, with `bpr` 64 (SELFRec `conf/SGL.yaml`: 64).
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Number of propagations over the graph, K. Default 3 (SELFRec `conf/SGL.yaml`, `n_layer`: 2; the paper: 3).
    #[schemars(range(min = 1, max = 10))]
    pub layers: u32,
    /// Weight of the L2 term on the ego embeddings of a batch. Default 0.005, with `bpr` 0.0001 (SELFRec
    /// `conf/SGL.yaml`: 0.0001).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2: f64,
    /// How the two subgraphs of an epoch are drawn: `edge-drop`, `node-drop`, or `random-walk` (another edge drop for
    /// each layer). Default `edge-drop` (SELFRec `conf/SGL.yaml`, `aug_type`: 1).
    pub augmentation: Augmentation,
    /// Share of the edges or nodes that a subgraph leaves out. Default 0.3, with `bpr` 0.1 (SELFRec
    /// `conf/SGL.yaml`: 0.1).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub drop_rate: f64,
    /// Weight of the contrastive loss. Default 0.003, with `bpr` 0.02 (SELFRec `conf/SGL.yaml`, `lambda`: 0.1).
    #[schemars(range(min = 0.0, max = 100.0))]
    pub contrast_weight: f64,
    /// What cosines are divided by in the contrastive loss. Default 1, with `bpr` 0.2 (SELFRec
    /// `conf/SGL.yaml`, `temp`: 0.2).
    #[schemars(range(min = 0.01, max = 10.0))]
    pub contrast_temperature: f64,
    /// Whether embeddings are propagated anew over the history that is known when the model scores (train and
    /// validation at test time; the weights stay fitted on train). Default true. SELFRec scores over the train graph.
    pub propagate_history: bool,
    /// The ranking loss.
    #[serde(flatten)]
    pub loss: LossHyper,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl Default for SglHyper {
    fn default() -> Self {
        SglHyper::defaults(Loss::Softmax)
    }
}

/// `sgl` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "sgl",
    about: "SGL: LightGCN with a contrastive task over random subgraphs",
    task: Task::Direct,
    schema: || schemars::schema_for!(SglHyper),
    idle: &[
        Idle {
            keys: &["augmentation", "drop_rate", "contrast_temperature"],
            when: |full| idle::is_zero(full, "contrast_weight"),
            why: "with `contrast_weight = 0`: there is no contrastive loss",
        },
        Idle {
            keys: &["augmentation"],
            when: |full| idle::is_zero(full, "drop_rate"),
            why: "with `drop_rate = 0`: the subgraphs are the whole graph",
        },
    ],
    make: Make::Ranking {
        build: |given| Ok(Box::new(SglHyper::build(given)?)),
        load: |given, tensors| {
            let hyper = SglHyper::build(given.clone())?;
            Ok(Box::new(load_scorer(tensors, hyper.over_history(), hyper.propagate_history)?))
        },
    },
};

impl SglHyper {
    /// Tuned on the validation part of MovieLens-100K. A softmax over all items already spreads the embeddings as the
    /// contrast does, which therefore needs less weight and a higher temperature beside it than beside BPR.
    fn defaults(loss: Loss) -> Self {
        let softmax = SglHyper {
            embedding_dim: 128,
            layers: 3,
            l2: 5e-3,
            augmentation: Augmentation::EdgeDrop,
            drop_rate: 0.3,
            contrast_weight: 0.003,
            contrast_temperature: 1.0,
            propagate_history: true,
            loss: LossHyper::new(loss),
            schedule: Schedule { patience: 12, ..LARGE_BATCHES },
        };
        match loss {
            Loss::Softmax | Loss::SampledSoftmax => softmax,
            Loss::Bpr => SglHyper {
                embedding_dim: 64,
                l2: 1e-4,
                drop_rate: 0.1,
                contrast_weight: 0.02,
                contrast_temperature: 0.2,
                schedule: Schedule { learning_rate: 0.01, batch_size: 8192, epochs: 200, eval_every: 2, patience: 10 },
                ..softmax
            },
        }
    }

    fn build(given: serde_json::Value) -> Result<Self> {
        let defaults = SglHyper::defaults(LossHyper::asked(&given).unwrap_or(Loss::Softmax));
        let mut hyper: SglHyper = hyper::parse_over("sgl", &defaults, given)?;
        hyper.loss.resolve("sgl")?;
        Ok(hyper)
    }

    fn over_history(&self) -> OverHistory {
        OverHistory { propagation: Propagation::mean(self.layers as usize), cosine: self.loss.cosine }
    }
}

impl Recommender for SglHyper {
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

impl PairRecommender for SglHyper {
    type Model<B: ModelBackend> = Sgl<B>;

    fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    fn model<B: ModelBackend>(
        &self,
        data: &Interactions<'_>,
        params: &mut Params<B>,
        sampler: &NegativeSampler,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sgl<B>> {
        let nodes = Nodes::new(data, self.embedding_dim as usize, params, rng);
        let (bipartite, device) = (Bipartite::new(data.n_users, data.n_items, data.train), params.device().clone());
        Ok(Sgl {
            hyper: self.clone(),
            loss: RankingLoss::new(&self.loss, self.schedule.batch_size as usize, data.n_items, sampler)?,
            graph: TrainGraph::new(bipartite.normalised(), &device),
            views: [Vec::new(), Vec::new()],
            nodes,
            bipartite,
            device,
        })
    }
}

/// The model on a back end.
pub struct Sgl<B: ModelBackend> {
    hyper: SglHyper,
    nodes: Nodes,
    loss: RankingLoss,
    bipartite: Bipartite,
    graph: TrainGraph<B>,
    /// The two subgraphs of the epoch: one for all layers, or one for each.
    views: [Vec<SparseMatrix<Autodiff<B>>>; 2],
    device: B::Device,
}

impl<B: ModelBackend> Sgl<B> {
    fn subgraph(&self, rng: &mut impl Rng) -> Vec<bool> {
        match self.hyper.augmentation {
            Augmentation::NodeDrop => drop_nodes(&self.bipartite, self.hyper.drop_rate, rng),
            Augmentation::EdgeDrop | Augmentation::RandomWalk => drop_edges(&self.bipartite, self.hyper.drop_rate, rng),
        }
    }

    /// Subgraphs by view and layer (one mark per edge) as the views of the epoch.
    fn set_views(&mut self, keep: [Vec<Vec<bool>>; 2]) {
        let matrix = |keep: Vec<bool>| SparseMatrix::symmetric(self.bipartite.normalised_kept(&keep), &self.device);
        self.views = keep.map(|layers| layers.into_iter().map(matrix).collect());
    }

    fn loss_of(&self, vars: &Vars<Autodiff<B>>, pairs: &[(u32, u32)], draw: &Draw) -> Tensor<Autodiff<B>, 1> {
        let propagation = self.hyper.over_history().propagation;
        let ego = vars.get::<2>(self.nodes.ego);
        let all = propagation.embed(ego.clone(), &self.graph.tracked);
        let mut loss = self.loss.value(&self.nodes.view(all), pairs, draw);
        if self.hyper.contrast_weight > 0.0 {
            let [a, b] = self.views.each_ref().map(|graphs| {
                let hops = propagation.hops(ego.clone(), |k| &graphs[k.min(graphs.len() - 1)]);
                self.nodes.view(propagation.pool(hops))
            });
            loss = loss + self.contrast(&a, &b, pairs) * self.hyper.contrast_weight as f32;
        }
        match self.hyper.l2 == 0.0 {
            true => loss,
            false => loss + self.nodes.l2(ego, self.loss.regularised(pairs, draw), pairs.len(), self.hyper.l2),
        }
    }

    /// InfoNCE among the users and among the items of a batch.
    fn contrast<C: ModelBackend>(&self, a: &View<C>, b: &View<C>, pairs: &[(u32, u32)]) -> Tensor<C, 1> {
        let temperature = self.hyper.contrast_temperature as f32;
        let users = distinct(pairs.iter().map(|p| p.0));
        let items = distinct(pairs.iter().map(|p| p.1));
        info_nce(a.users.select(&users), b.users.select(&users), temperature)
            + info_nce(a.items.select(&items), b.items.select(&items), temperature)
    }
}

/// Mean over rows n of `-ln(exp(c(a_n, b_n) / temperature) / sum over m of exp(c(a_n, b_m) / temperature))`, c the cosine;
/// `a`, `b [n, dim]`.
pub fn info_nce<B: ModelBackend>(a: Tensor<B, 2>, b: Tensor<B, 2>, temperature: f32) -> Tensor<B, 1> {
    let own: Vec<u32> = (0..a.dims()[0] as u32).collect();
    linear_cross_entropy(unit_rows(a) / temperature, unit_rows(b), None, &own).mean()
}

impl<B: ModelBackend> PairModel<B> for Sgl<B> {
    fn start_epoch(&mut self, rng: &mut ChaCha8Rng) {
        let layers = match self.hyper.augmentation {
            Augmentation::RandomWalk => self.hyper.layers,
            Augmentation::NodeDrop | Augmentation::EdgeDrop => 1,
        };
        let keep = [(); 2].map(|()| (0..layers).map(|_| self.subgraph(rng)).collect());
        self.set_views(keep);
    }

    fn loss(&self, vars: &Vars<Autodiff<B>>, batch: &Batch<'_>, rng: &mut ChaCha8Rng) -> Tensor<Autodiff<B>, 1> {
        let draw = self.loss.draw(batch.pairs, batch.sampler, rng);
        self.loss_of(vars, batch.pairs, &draw)
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

    #[test]
    fn loss_gradient_and_embeddings_equal_golden_values() {
        Golden::read("sgl").check(
            |given| SglHyper::build(given.clone()).unwrap(),
            |model, vars, golden, case| {
                model.set_views([case.keep[0].clone(), case.keep[1].clone()]);
                model.loss_of(vars, &golden.pairs, &Draw { negatives: case.draw.clone() })
            },
        );
    }

    #[test]
    fn it_fits_a_toy_set_again_and_again_alike() {
        for augmentation in ["edge-drop", "node-drop", "random-walk"] {
            // The contrast sets alike users apart, which is all that this toy set knows; so it gets little weight.
            contract("sgl", serde_json::json!({"augmentation": augmentation, "contrast_weight": 0.01}));
        }
        contract("sgl", serde_json::json!({"loss": "softmax", "contrast_weight": 0.0}));
    }
}
