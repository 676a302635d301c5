//! Matrix factorisation trained with BPR (Rendle et al. 2009, arXiv 1205.2618): a user's score
//! of an item is the product of their embeddings, without biases.
//!
//! Reference implementation: RecBole's `BPR`, with one difference: L2 on the batch's rows is
//! part of the loss here (see [`super::trainer`]), and the initial weights are Xavier-uniform.

use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::EmbeddingScorer;
use super::pairwise::{self, PairwiseConfig, PairwiseModel};
use super::registry::{Backbone, Make, Task};
use super::sparse::SparseMatrix;
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;

/// Hyper-parameters of `mf`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MfHyper {
    /// Length of the users' and items' embeddings. Default 64.
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Weight of the L2 term on the embeddings of a batch. Default 0.004.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2: f64,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl Default for MfHyper {
    fn default() -> Self {
        MfHyper {
            embedding_dim: 64,
            l2: 4e-3,
            schedule: Schedule { learning_rate: 2e-3, batch_size: 2048, epochs: 200, eval_every: 2, patience: 10 },
        }
    }
}

/// `mf` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "mf",
    about: "matrix factorisation with the BPR loss: fast, no graph",
    task: Task::Direct,
    schema: || schemars::schema_for!(MfHyper),
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<MfHyper>("mf", given)?)),
        load: |_, tensors| Ok(Box::new(EmbeddingScorer::load(tensors)?)),
    },
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

    fn embeds(&self) -> Embeds {
        Embeds::Both
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        let config =
            PairwiseConfig { embedding_dim: self.embedding_dim as usize, l2: self.l2, schedule: self.schedule.clone() };
        pairwise::fit(&Mf, &config, data, ctx)
    }
}
