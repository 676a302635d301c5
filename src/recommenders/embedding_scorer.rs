//! The scorer of models that score by the product of two embeddings.

use gemm::Parallelism;

use super::saved::{NamedTensor, Tensors};
use super::{Embeddings, Scorer};
use crate::error::{Error, Result};
use crate::interactions::Histories;

/// Names of the tensors in a saved model.
const USERS: &str = "user_embeddings";
const ITEMS: &str = "item_embeddings";
const EGO: &str = "ego_embeddings";

/// Final embeddings of users and items, and the ego embeddings that they were made of.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingScorer {
    n_users: usize,
    n_items: usize,
    dim: usize,
    /// `[users, dim]`
    users: Vec<f32>,
    /// `[items, dim]`
    items: Vec<f32>,
    /// `[users + items, dim]`: the learned parameters.
    ego: Vec<f32>,
}

impl EmbeddingScorer {
    /// From final embeddings `all` and parameters `ego`, both `[users + items, dim]`.
    ///
    /// # Panics
    /// When a length does not fit (our bug).
    pub fn new(n_users: usize, n_items: usize, dim: usize, all: Vec<f32>, ego: Vec<f32>) -> Self {
        assert_eq!(all.len(), (n_users + n_items) * dim, "final embeddings do not have the shape [users + items, dim]");
        assert_eq!(ego.len(), all.len(), "ego embeddings do not have the shape [users + items, dim]");
        let mut users = all;
        let items = users.split_off(n_users * dim);
        EmbeddingScorer { n_users, n_items, dim, users, items, ego }
    }

    /// From the tensors of a saved model.
    ///
    /// # Errors
    /// A tensor is missing, or the shapes do not fit each other (exit 65).
    pub fn load(tensors: &Tensors) -> Result<Self> {
        let (users, items, ego) = (tensors.get(USERS)?, tensors.get(ITEMS)?, tensors.get(EGO)?);
        match (users.shape.as_slice(), items.shape.as_slice(), ego.shape.as_slice()) {
            (&[n_users, a], &[n_items, b], &[n, c]) if a == b && b == c && n == n_users + n_items => {
                let (users, items, ego) = (users.values.clone(), items.values.clone(), ego.values.clone());
                Ok(EmbeddingScorer { n_users, n_items, dim: a, users, items, ego })
            }
            (u, i, e) => Err(Error::data(format!(
                "the model's embeddings have shapes {u:?}, {i:?} and {e:?}; [users, dim], [items, dim] and [users + items, dim] are wanted"
            ))),
        }
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
        let (m, n, k) = (users.len(), self.n_items, self.dim);
        assert_eq!(out.len(), m * n, "scores do not have the shape [users, items]");
        let mut block = Vec::with_capacity(m * k);
        for &user in users {
            block.extend_from_slice(&self.users[user as usize * k..][..k]);
        }
        if m == 0 || n == 0 {
            return;
        }
        // out [m, n] = block [m, k] x items [n, k] transposed. One thread: blocks of users are the parallel
        // unit, and a block's scores must not depend on the number of threads.
        // SAFETY: the three slices have exactly m * n, m * k and n * k elements, strides are those of row-major
        // matrices, and `out` overlaps neither operand.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                block.as_ptr(),
                1,
                k as isize,
                self.items.as_ptr(),
                k as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }

    fn user_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.dim, values: &self.users })
    }

    fn item_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.dim, values: &self.items })
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        vec![
            NamedTensor::new(USERS, vec![self.n_users, self.dim], self.users.clone()),
            NamedTensor::new(ITEMS, vec![self.n_items, self.dim], self.items.clone()),
            NamedTensor::new(EGO, vec![self.n_users + self.n_items, self.dim], self.ego.clone()),
        ]
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
