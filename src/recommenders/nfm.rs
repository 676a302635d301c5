//! NFM, the neural factorisation machine (He and Chua 2017, arXiv 1708.05027): a perceptron over the sum of products
//! of all pairs of embeddings.
//!
//! `y = bias + linear + h . mlp(sum over pairs of fields e_i * e_j)` (eq. 3 to 7); dense values join the pooled
//! vector. Without hidden layers it is a factorisation machine with learned weights of the dimensions.
//!
//! Reference implementation: DeepCTR-Torch's `NFM`. Deviations: see [`super::rating::learner`]; batch norm after a
//! hidden layer, which the paper has, can be asked for.

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::optim::{ParamId, Params, Vars, xavier_normal};
use super::rating::layers::{self, Dnn, Mlp, Pass, bi_interaction};
use super::rating::learner::{self, Common, Inputs, RatingModel, Sizes};
use super::rating::predictor::Fitted;
use super::rating::{RatingFit, RatingRecommender, Ratings};
use super::registry::{Backbone, Make, Task};
use super::trainer::Schedule;
use super::{FitContext, hyper};
use crate::device::ModelBackend;
use crate::error::Result;

/// Hyper-parameters of `nfm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Nfm {
    /// Share of the pooled products that a training step drops, 0 to .99. Default 0.3 (DeepCTR-Torch: 0).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub bi_dropout: f64,
    /// The perceptron.
    #[serde(flatten)]
    pub dnn: Dnn,
    /// Embeddings, steps and epochs.
    #[serde(flatten)]
    pub common: Common,
}

/// Chosen on the validation ratings of ML-100K; each field tells the reference code's default.
impl Default for Nfm {
    fn default() -> Self {
        Nfm {
            bi_dropout: 0.3,
            dnn: Dnn::new(&[64]),
            common: Common {
                embedding_dim: 16,
                l2_reg_linear: 1e-3,
                l2_reg_embedding: 3e-2,
                init_std: 1e-2,
                recent_decay: 0.75,
                schedule: Schedule { learning_rate: 1e-3, batch_size: 256, epochs: 100, eval_every: 1, patience: 5 },
            },
        }
    }
}

/// `nfm` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "nfm",
    about: "NFM: a perceptron over the pooled products of all pairs of embeddings; predicts ratings",
    task: Task::Rating,
    schema: || schemars::schema_for!(Nfm),
    idle: &[layers::NO_PERCEPTRON],
    make: Make::Rating {
        build: |given| Ok(Box::new(parse(given)?)),
        load: |given, fields, tensors| Ok(Box::new(Fitted::load(&parse(given.clone())?, fields, tensors)?)),
    },
};

fn parse(given: serde_json::Value) -> Result<Nfm> {
    let model: Nfm = hyper::parse("nfm", given)?;
    model.dnn.check("nfm")?;
    Ok(model)
}

/// The perceptron and its output weights.
pub struct Weights {
    mlp: Mlp,
    out: ParamId,
}

impl RatingModel for Nfm {
    type Weights = Weights;

    fn common(&self) -> &Common {
        &self.common
    }

    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Weights {
        let width = sizes.dim + sizes.dense;
        let mlp = Mlp::add(params, &self.dnn, width, rng);
        let width = mlp.width(width);
        let out = params.add("dnn.out", &[width, 1], xavier_normal(width, 1, rng));
        Weights { mlp, out }
    }

    fn forward<B: ModelBackend>(
        &self,
        weights: &Weights,
        vars: &Vars<B>,
        inputs: &Inputs<B>,
        pass: &mut Pass<B>,
    ) -> Tensor<B, 1> {
        let [n, _, _] = inputs.embeddings.dims();
        let pooled = pass.dropout(bi_interaction(inputs.embeddings.clone()), self.bi_dropout);
        let hidden = weights.mlp.apply(vars, inputs.beside(pooled), pass);
        hidden.matmul(vars.get::<2>(weights.out)).reshape([n])
    }

    fn penalty<B: ModelBackend>(&self, weights: &Weights, vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        weights.mlp.penalty(vars, Some(weights.out))
    }
}

impl RatingRecommender for Nfm {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn fit(&self, data: &Ratings<'_>, ctx: &FitContext<'_>) -> Result<RatingFit> {
        learner::fit(self, data, ctx)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn values_and_gradients_equal_the_golden_ones() {
        super::super::rating::golden::check("nfm", super::parse);
    }
}
