//! Matrix factorisation trained with BPR (Rendle et al. 2009, arXiv 1205.2618): a user's score
//! of an item is the product of their embeddings, without biases.
//!
//! Reference implementation: RecBole's `BPR`, with one difference: L2 on the batch's rows is
//! part of the loss here (see [`super::trainer`]), and the initial weights are Xavier-uniform.

use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::EmbeddingScorer;
use super::registry::{Backbone, Task};
use super::sparse::SparseMatrix;
use super::trainer::{self, PairwiseModel, TrainerConfig};
use super::{Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;

/// Hyper-parameters of `mf`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MfHyper {
    /// Length of the users' and items' embeddings. Default 64.
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Step size of Adam. Default 0.002.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub learning_rate: f64,
    /// Weight of the L2 term on the embeddings of a batch. Default 0.004.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2: f64,
    /// Train pairs per step. Default 2048.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: u32,
    /// At most so many passes over the train pairs; exactly so many without a `valid` table. Default 200.
    #[schemars(range(min = 0, max = 100_000))]
    pub epochs: u32,
    /// Epochs from one validation (NDCG@10, full ranking) to the next. Default 2.
    #[schemars(range(min = 1, max = 1000))]
    pub eval_every: u32,
    /// Validations without a gain before training stops; the best weights are kept. Default 10.
    #[schemars(range(min = 1, max = 1000))]
    pub patience: u32,
}

impl Default for MfHyper {
    fn default() -> Self {
        MfHyper {
            embedding_dim: 64,
            learning_rate: 2e-3,
            l2: 4e-3,
            batch_size: 2048,
            epochs: 200,
            eval_every: 2,
            patience: 10,
        }
    }
}

/// `mf` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "mf",
    about: "matrix factorisation with the BPR loss: fast, no graph",
    task: Task::TopK,
    schema: || schemars::schema_for!(MfHyper),
    build: |given| Ok(Box::new(hyper::parse::<MfHyper>("mf", given)?)),
    load: |tensors| Ok(Box::new(EmbeddingScorer::load(tensors)?)),
};

/// The model: final embeddings are the ego embeddings.
pub struct Mf;

impl PairwiseModel for Mf {
    fn embed<B: ModelBackend>(&self, ego: Tensor<B, 2>, _graph: Option<&SparseMatrix<B>>) -> Tensor<B, 2> {
        ego
    }
}

impl Recommender for MfHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        let config = TrainerConfig {
            embedding_dim: self.embedding_dim as usize,
            learning_rate: self.learning_rate,
            l2: self.l2,
            batch_size: self.batch_size as usize,
            epochs: self.epochs as usize,
            eval_every: self.eval_every as usize,
            patience: self.patience as usize,
        };
        trainer::fit(&Mf, &config, data, ctx)
    }
}
