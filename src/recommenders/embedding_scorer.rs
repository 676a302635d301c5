//! The scorer of models that score by the product of two embeddings.
//!
//! In: final embeddings, and for a graph model the ego embeddings that they were made of. Out: scores. A graph model
//! propagates its ego embeddings over the graph of whatever history is known when it scores
//! ([`Scorer::with_history`]): the weights stay as they were fitted.

use std::sync::Arc;

use super::graph::Propagation;
use super::saved::{NamedTensor, Tensors};
use super::{Embeddings, Factors, Scorer, product};
use crate::error::{Error, Result};
use crate::interactions::Histories;

/// Names of the tensors in a saved model.
const USERS: &str = "user_embeddings";
const ITEMS: &str = "item_embeddings";
const EGO: &str = "ego_embeddings";

/// Final embeddings of users and items, and perhaps the ego embeddings that they were made of.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingScorer {
    n_users: usize,
    n_items: usize,
    dim: usize,
    /// `[users, dim]`
    users: Vec<f32>,
    /// `[items, dim]`
    items: Vec<f32>,
    /// `[users + items, ego dim]`: the learned parameters, where they are not the final embeddings.
    ego: Option<Arc<Vec<f32>>>,
    /// How final embeddings are made of `ego`, where that is done anew for each history.
    over_history: Option<OverHistory>,
}

/// How a graph model's final embeddings follow from a history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OverHistory {
    /// Over the graph of the history.
    pub propagation: Propagation,
    /// Whether final embeddings are scaled to length 1.
    pub cosine: bool,
}

impl EmbeddingScorer {
    /// From final embeddings `all` and parameters `ego`, both `[users + items, dim]`.
    ///
    /// # Panics
    /// When a length does not fit (our bug).
    pub fn new(n_users: usize, n_items: usize, dim: usize, all: Vec<f32>, ego: Vec<f32>) -> Self {
        assert_eq!(ego.len(), all.len(), "ego embeddings do not have the shape [users + items, dim]");
        EmbeddingScorer { ego: Some(Arc::new(ego)), ..EmbeddingScorer::plain(n_users, n_items, dim, all) }
    }

    /// From final embeddings `all [users + items, dim]` that are the parameters themselves.
    ///
    /// # Panics
    /// When a length does not fit (our bug).
    pub fn plain(n_users: usize, n_items: usize, dim: usize, all: Vec<f32>) -> Self {
        assert_eq!(all.len(), (n_users + n_items) * dim, "final embeddings do not have the shape [users + items, dim]");
        let mut users = all;
        let items = users.split_off(n_users * dim);
        EmbeddingScorer { n_users, n_items, dim, users, items, ego: None, over_history: None }
    }

    /// From ego embeddings `[users + items, ego dim]` and the final ones `all [users + items, dim]` that `over_history`
    /// makes of them over the train graph.
    ///
    /// # Panics
    /// When a length does not fit (our bug).
    pub fn graph(n_users: usize, n_items: usize, all: Vec<f32>, ego: Vec<f32>, over_history: OverHistory) -> Self {
        let nodes = n_users + n_items;
        let ego_dim = ego.len() / nodes.max(1);
        let dim = over_history.propagation.final_dim(ego_dim);
        assert_eq!(ego.len(), nodes * ego_dim, "ego embeddings do not have the shape [users + items, dim]");
        let mut scorer = EmbeddingScorer::plain(n_users, n_items, dim, all);
        if over_history.cosine {
            scorer.scale_to_unit();
        }
        EmbeddingScorer { ego: Some(Arc::new(ego)), over_history: Some(over_history), ..scorer }
    }

    /// Scales every embedding to length 1: products are cosines then. An embedding of zeros stays one.
    pub fn scale_to_unit(&mut self) {
        if self.dim == 0 {
            return;
        }
        for row in self.users.chunks_exact_mut(self.dim).chain(self.items.chunks_exact_mut(self.dim)) {
            let length = (row.iter().map(|x| x * x).sum::<f32>() + 1e-12).sqrt();
            row.iter_mut().for_each(|x| *x /= length);
        }
    }

    /// The same model, which scores over the train graph whatever history is known.
    pub fn fixed(self) -> Self {
        EmbeddingScorer { over_history: None, ..self }
    }

    /// From the tensors of a saved model.
    ///
    /// # Errors
    /// A tensor is missing, or the shapes do not fit each other (exit 65).
    pub fn load(tensors: &Tensors) -> Result<Self> {
        let (users, items) = (tensors.get(USERS)?, tensors.get(ITEMS)?);
        let ego = tensors.has(EGO).then(|| tensors.get(EGO)).transpose()?;
        let ego_shape = ego.map(|e| e.shape.as_slice());
        match (users.shape.as_slice(), items.shape.as_slice(), ego_shape) {
            (&[n_users, a], &[n_items, b], e)
                if a == b && e.is_none_or(|e| e.len() == 2 && e[0] == n_users + n_items) =>
            {
                let (users, items) = (users.values.clone(), items.values.clone());
                let ego = ego.map(|e| Arc::new(e.values.clone()));
                Ok(EmbeddingScorer { n_users, n_items, dim: a, users, items, ego, over_history: None })
            }
            (u, i, e) => Err(Error::data(format!(
                "the model's embeddings have shapes {u:?}, {i:?} and {e:?}; [users, dim], [items, dim] and [users + items, ego dim] are wanted"
            ))),
        }
    }

    /// From the tensors of a saved graph model.
    ///
    /// # Errors
    /// As [`EmbeddingScorer::load`].
    pub fn load_graph(tensors: &Tensors, over_history: OverHistory) -> Result<Self> {
        let scorer = EmbeddingScorer::load(tensors)?;
        let nodes = scorer.n_users + scorer.n_items;
        let ego_dim = tensors.get(EGO)?.values.len() / nodes.max(1);
        let dim = over_history.propagation.final_dim(ego_dim);
        match dim == scorer.dim {
            true => Ok(EmbeddingScorer { over_history: Some(over_history), ..scorer }),
            false => Err(Error::data(format!(
                "the model's final embeddings have {} dimensions; its ego embeddings and hyper-parameters make {dim}",
                scorer.dim
            ))),
        }
    }

    /// `[users, dim]`
    fn rows_of(&self, users: &[u32]) -> Vec<f32> {
        users.iter().flat_map(|&user| &self.users[user as usize * self.dim..][..self.dim]).copied().collect()
    }
}

impl Scorer for EmbeddingScorer {
    fn n_users(&self) -> usize {
        self.n_users
    }

    fn n_items(&self) -> usize {
        self.n_items
    }

    fn score(&self, users: &[u32], _history: &Histories, out: &mut [f32]) {
        // One thread: blocks of users are the parallel unit.
        product::scores(&self.rows_of(users), &self.items, self.dim, out);
    }

    fn factors(&self, users: &[u32], _history: &Histories) -> Option<Factors<'_>> {
        Some(Factors { dim: self.dim, users: self.rows_of(users), items: &self.items })
    }

    fn with_history(&self, history: &Histories) -> Option<Box<dyn Scorer>> {
        let (ego, over) = (self.ego.as_ref()?, self.over_history?);
        let nodes = self.n_users + self.n_items;
        if ego.is_empty() {
            return None;
        }
        let ego_dim = ego.len() / nodes;
        let all = over.propagation.embed_over(ego, ego_dim, self.n_users, history);
        let mut scorer = EmbeddingScorer::plain(self.n_users, self.n_items, self.dim, all);
        if over.cosine {
            scorer.scale_to_unit();
        }
        Some(Box::new(EmbeddingScorer { ego: self.ego.clone(), over_history: self.over_history, ..scorer }))
    }

    fn user_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.dim, values: &self.users })
    }

    fn item_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.dim, values: &self.items })
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let nodes = self.n_users + self.n_items;
        let ego = self.ego.as_ref().map(|ego| {
            let dim = ego.len().checked_div(nodes).unwrap_or(self.dim);
            NamedTensor::new(EGO, vec![nodes, dim], ego.to_vec())
        });
        [
            NamedTensor::new(USERS, vec![self.n_users, self.dim], self.users.clone()),
            NamedTensor::new(ITEMS, vec![self.n_items, self.dim], self.items.clone()),
        ]
        .into_iter()
        .chain(ego)
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_product_of_the_embeddings() {
        // 2 users, 3 items, dim 2.
        let all = vec![1.0, 2.0, -1.0, 0.5, 3.0, 0.0, 0.0, 1.0, 2.0, 2.0];
        let scorer = EmbeddingScorer::new(2, 3, 2, all.clone(), all);
        let mut out = vec![f32::NAN; 6];
        scorer.score(&[1, 0], &Histories::default(), &mut out);
        assert_eq!(out, [-3.0, 0.5, -1.0, 3.0, 2.0, 6.0]);
        scorer.score(&[], &Histories::default(), &mut []);
    }

    #[test]
    fn a_graph_model_follows_the_history_and_a_fixed_one_does_not() {
        // Two users, two items, dim 1; train: (0, 0), (1, 1).
        let train = Histories::from_pairs(2, &[(0, 0), (1, 1)]);
        let ego = vec![1.0, 2.0, 3.0, 5.0];
        let over = OverHistory { propagation: Propagation::mean(1), cosine: false };
        let all = over.propagation.embed_over(&ego, 1, 2, &train);
        let scorer = EmbeddingScorer::graph(2, 2, all, ego, over);
        assert_eq!(scorer.users, [2.0, 3.5]);
        let again = scorer.with_history(&train).unwrap();
        assert_eq!(again.user_embeddings().unwrap().values, scorer.users);
        // User 0 now knows item 1 too: (1 + 3 / sqrt 2 + 5 / 2) / 2.
        let later = scorer.with_history(&Histories::from_pairs(2, &[(0, 0), (1, 1), (0, 1)])).unwrap();
        assert!((later.user_embeddings().unwrap().values[0] - (3.5 + 3.0 / 2f32.sqrt()) / 2.0).abs() < 1e-6);
        let loaded = EmbeddingScorer::load_graph(&Tensors::new(scorer.tensors()), over).unwrap();
        assert_eq!(loaded, scorer);
        assert!(scorer.fixed().with_history(&train).is_none());
        let other = OverHistory {
            propagation: Propagation { layers: 1, pooling: super::super::graph::Pooling::Concat },
            ..over
        };
        let error = EmbeddingScorer::load_graph(&Tensors::new(loaded.tensors()), other).unwrap_err();
        assert_eq!(error.fault.exit_code(), 65);
    }

    #[test]
    fn unit_embeddings_give_cosines() {
        let mut scorer = EmbeddingScorer::plain(1, 3, 2, vec![3.0, 4.0, 6.0, 8.0, -4.0, 3.0, 0.0, 0.0]);
        scorer.scale_to_unit();
        let mut out = vec![f32::NAN; 3];
        scorer.score(&[0], &Histories::default(), &mut out);
        assert!((out[0] - 1.0).abs() < 1e-6 && out[1].abs() < 1e-6 && out[2] == 0.0, "{out:?}");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let tensors = Tensors::new(vec![
            NamedTensor::new(USERS, vec![2, 2], vec![0.0; 4]),
            NamedTensor::new(ITEMS, vec![1, 3], vec![0.0; 3]),
            NamedTensor::new(EGO, vec![3, 2], vec![0.0; 6]),
        ]);
        assert_eq!(EmbeddingScorer::load(&tensors).unwrap_err().fault.exit_code(), 65);
        let error = EmbeddingScorer::load(&Tensors::new(Vec::new())).unwrap_err();
        assert!(error.message.contains("`user_embeddings`"), "{error}");
    }
}
