//! LightGCN (He et al. 2020, arXiv 2002.02126): embeddings smoothed over the user-item graph.
//!
//! `E(k+1) = D^-1/2 A D^-1/2 E(k)`, final `E = mean of E(0)..E(K)`; A is the bipartite graph of
//! the train interactions (each pair once), D the diagonal of its degrees. A node without
//! interactions keeps `E(0) / (K + 1)`. Only E(0) is learned.
//!
//! Reference implementations: the authors' `LightGCN-PyTorch` (loss and L2) and RecBole's
//! `LightGCN` (Xavier-uniform start); we differ from RecBole in the L2 term, which there takes norms and not squares.

use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::EmbeddingScorer;
use super::pairwise::{self, PairwiseConfig, PairwiseModel};
use super::registry::{Backbone, Make, Task};
use super::sparse::{Csr, SparseMatrix};
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;
use crate::interactions::Histories;

/// Hyper-parameters of `lightgcn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LightGcnHyper {
    /// Length of the users' and items' embeddings. Default 64.
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Number of propagations over the graph, K. Default 3.
    #[schemars(range(min = 1, max = 10))]
    pub layers: u32,
    /// Weight of the L2 term on the ego embeddings of a batch. Default 0.0001.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2: f64,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl Default for LightGcnHyper {
    fn default() -> Self {
        LightGcnHyper {
            embedding_dim: 64,
            layers: 3,
            l2: 1e-4,
            schedule: Schedule { learning_rate: 5e-3, batch_size: 2048, epochs: 200, eval_every: 2, patience: 10 },
        }
    }
}

/// `lightgcn` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "lightgcn",
    about: "LightGCN: embeddings smoothed over the user-item graph, BPR loss",
    task: Task::Direct,
    schema: || schemars::schema_for!(LightGcnHyper),
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<LightGcnHyper>("lightgcn", given)?)),
        load: |_, tensors| Ok(Box::new(EmbeddingScorer::load(tensors)?)),
    },
};

/// The model.
pub struct LightGcn {
    /// K, the number of propagations.
    pub layers: usize,
}

/// `D^-1/2 A D^-1/2` of the bipartite graph, `[users + items, users + items]`, symmetric.
///
/// # Errors
/// An item outside `0..n_items` (our bug).
pub fn normalised_adjacency(n_users: usize, n_items: usize, train: &Histories) -> Result<Csr> {
    let mut pairs: Vec<(u32, u32)> =
        (0..n_users).flat_map(|u| train.of(u).iter().map(move |&i| (u as u32, n_users as u32 + i))).collect();
    pairs.sort_unstable();
    pairs.dedup();
    let mut degree = vec![0f64; n_users + n_items];
    for &(u, i) in &pairs {
        degree[u as usize] += 1.0;
        degree[i as usize] += 1.0;
    }
    let entries: Vec<(u32, u32, f32)> = pairs
        .iter()
        .flat_map(|&(u, i)| {
            let value = (1.0 / (degree[u as usize] * degree[i as usize]).sqrt()) as f32;
            [(u, i, value), (i, u, value)]
        })
        .collect();
    Csr::from_entries(n_users + n_items, n_users + n_items, &entries)
}

impl PairwiseModel for LightGcn {
    fn graph(&self, data: &Interactions<'_>) -> Result<Option<Csr>> {
        normalised_adjacency(data.n_users, data.n_items, data.train).map(Some)
    }

    fn embed<B: ModelBackend>(&self, ego: Tensor<B, 2>, graph: Option<&SparseMatrix<B>>) -> Tensor<B, 2> {
        let graph = graph.expect("`graph` of this model always gives a matrix");
        let mut layer = ego.clone();
        let mut sum = ego;
        for _ in 0..self.layers {
            layer = graph.matmul(layer);
            sum = sum + layer.clone();
        }
        sum / (self.layers + 1) as f32
    }
}

impl Recommender for LightGcnHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn embeds(&self) -> Embeds {
        Embeds::Both
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        let config =
            PairwiseConfig { embedding_dim: self.embedding_dim as usize, l2: self.l2, schedule: self.schedule.clone() };
        pairwise::fit(&LightGcn { layers: self.layers as usize }, &config, data, ctx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacency_is_symmetric_and_normalised_by_degrees() {
        // User 0: items 0, 1 (item 0 twice in the log); user 1: item 1; item 2 unseen.
        let train = Histories::from_pairs(2, &[(0, 0), (0, 1), (1, 1), (0, 0)]);
        let graph = normalised_adjacency(2, 3, &train).unwrap();
        assert_eq!((graph.rows(), graph.cols(), graph.nonzeros()), (5, 5, 6));
        assert_eq!(graph.transpose(), graph);
        let half = 0.5f32; // degrees: user 0 and item 1 have 2, user 1 and item 0 have 1
        assert_eq!(graph.row(0), (&[2u32, 3][..], &[half.sqrt(), half][..]));
        assert_eq!(graph.row(1), (&[3u32][..], &[half.sqrt()][..]));
        assert_eq!(graph.row(4), (&[][..], &[][..]));
    }
}
