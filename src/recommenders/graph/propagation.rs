//! LightGCN's propagation (He et al. 2020, arXiv 2002.02126, eq. 7 and 8).
//!
//! In: ego embeddings `E(0) [nodes, dim]`, a normalised adjacency. Out: the hops `E(k) = A E(k-1)` and
//! their pooling.

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Bipartite;
use crate::device::ModelBackend;
use crate::interactions::Histories;
use crate::recommenders::sparse::SparseMatrix;

/// How a node's hops become its final embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// Their mean: `[dim]`.
    Mean,
    /// Their sum: `[dim]`.
    Sum,
    /// One after another: `[dim * (layers + 1)]`.
    Concat,
    /// The last one: `[dim]`.
    Final,
}

/// How often embeddings are propagated and how the hops are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Propagation {
    /// K, the number of propagations.
    pub layers: usize,
    /// How the K + 1 hops are pooled.
    pub pooling: Pooling,
}

impl Propagation {
    /// LightGCN's: the mean of the hops.
    pub fn mean(layers: usize) -> Self {
        Propagation { layers, pooling: Pooling::Mean }
    }

    /// Length of a final embedding.
    pub fn final_dim(&self, dim: usize) -> usize {
        match self.pooling {
            Pooling::Concat => dim * (self.layers + 1),
            _ => dim,
        }
    }

    /// The hops `E(0)..E(K)`, each `[nodes, dim]`; hop k goes over `graph(k - 1)`.
    pub fn hops<'a, B: ModelBackend>(
        &self,
        ego: Tensor<B, 2>,
        graph: impl Fn(usize) -> &'a SparseMatrix<B>,
    ) -> Vec<Tensor<B, 2>> {
        let mut hops = vec![ego];
        for k in 0..self.layers {
            let next = graph(k).matmul(hops[k].clone());
            hops.push(next);
        }
        hops
    }

    /// The pooled hops, `[nodes, final_dim]`.
    ///
    /// # Panics
    /// Without hops (our bug).
    pub fn pool<B: ModelBackend>(&self, hops: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
        let n = hops.len() as f32;
        match self.pooling {
            Pooling::Concat => Tensor::cat(hops, 1),
            Pooling::Final => hops.into_iter().next_back().expect("there is always the ego embedding"),
            Pooling::Sum => sum(hops),
            Pooling::Mean => sum(hops) / n,
        }
    }

    /// Final embeddings `[nodes, final_dim]` of ego embeddings `[nodes, dim]` over one graph.
    pub fn embed<B: ModelBackend>(&self, ego: Tensor<B, 2>, graph: &SparseMatrix<B>) -> Tensor<B, 2> {
        self.pool(self.hops(ego, |_| graph))
    }

    /// The same on the host, over the graph of `history`: `ego [users + items, dim]`.
    pub fn embed_over(&self, ego: &[f32], dim: usize, n_users: usize, history: &Histories) -> Vec<f32> {
        let nodes = ego.len() / dim;
        let device = Default::default();
        let graph = Bipartite::new(n_users, nodes - n_users, history).normalised();
        let ego = Tensor::<Flex, 2>::from_data(TensorData::new(ego.to_vec(), [nodes, dim]), &device);
        self.embed(ego, &SparseMatrix::symmetric(graph, &device)).into_data().to_vec().expect("tensors on Flex are f32")
    }
}

fn sum<B: ModelBackend>(hops: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
    hops.into_iter().reduce(|a, b| a + b).expect("there is always the ego embedding")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_propagated_by_hand() {
        // One user, one item, one edge of weight 1: each hop swaps the two.
        let history = Histories::from_pairs(1, &[(0, 0)]);
        let embed = |layers, pooling| Propagation { layers, pooling }.embed_over(&[1.0, 5.0], 1, 1, &history);
        assert_eq!(embed(1, Pooling::Mean), [3.0, 3.0]);
        assert_eq!(embed(2, Pooling::Sum), [7.0, 11.0]);
        assert_eq!(embed(3, Pooling::Final), [5.0, 1.0]);
        assert_eq!(embed(2, Pooling::Concat), [1.0, 5.0, 1.0, 5.0, 1.0, 5.0]);
        assert_eq!(embed(0, Pooling::Mean), [1.0, 5.0]);
        // Without the edge a node keeps its share of the mean.
        let alone = Propagation::mean(3).embed_over(&[1.0, 5.0], 1, 1, &Histories::default());
        assert_eq!(alone, [0.25, 1.25]);
    }
}
