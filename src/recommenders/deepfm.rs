//! DeepFM (Guo et al. 2017, arXiv 1703.04247): a factorisation machine and a perceptron over the same embeddings.
//!
//! `y = bias + linear + sum over pairs of fields <e_i, e_j> + w . mlp(all embeddings, dense values)` (eq. 1 to 4), here
//! for ratings, without the sigmoid.
//!
//! Reference implementation: DeepCTR-Torch's `DeepFM`. Deviations: see [`super::rating::learner`] (L2, start, bias).

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::optim::{ParamId, Params, Vars, xavier_normal};
use super::rating::layers::{self, Dnn, Mlp, Pass, bi_interaction, sum_groups};
use super::rating::learner::{self, Common, Inputs, RatingModel, Sizes};
use super::rating::predictor::Fitted;
use super::rating::{RatingFit, RatingRecommender, Ratings};
use super::registry::{Backbone, Make, Task};
use super::trainer::Schedule;
use super::{FitContext, hyper};
use crate::device::ModelBackend;
use crate::error::Result;

/// Hyper-parameters of `deepfm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeepFm {
    /// Whether the model has the second-order term of the factorisation machine. Default true, as in
    /// DeepCTR-Torch.
    pub use_fm: bool,
    /// The perceptron.
    #[serde(flatten)]
    pub dnn: Dnn,
    /// Embeddings, steps and epochs.
    #[serde(flatten)]
    pub common: Common,
}

/// Chosen on the validation ratings of ML-100K; each field tells the reference code's default.
impl Default for DeepFm {
    fn default() -> Self {
        DeepFm {
            use_fm: true,
            dnn: Dnn { dnn_dropout: 0.4, ..Dnn::new(&[128, 64]) },
            common: Common {
                embedding_dim: 16,
                l2_reg_linear: 3e-2,
                l2_reg_embedding: 1e-2,
                init_std: 1e-2,
                recent_decay: 0.75,
                schedule: Schedule { learning_rate: 3e-3, batch_size: 512, epochs: 100, eval_every: 1, patience: 5 },
            },
        }
    }
}

/// `deepfm` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "deepfm",
    about: "DeepFM: a factorisation machine and a perceptron over the same embeddings; predicts ratings",
    task: Task::Rating,
    schema: || schemars::schema_for!(DeepFm),
    idle: &[layers::NO_PERCEPTRON],
    make: Make::Rating {
        build: |given| Ok(Box::new(parse(given)?)),
        load: |given, fields, tensors| Ok(Box::new(Fitted::load(&parse(given.clone())?, fields, tensors)?)),
    },
};

fn parse(given: serde_json::Value) -> Result<DeepFm> {
    let model: DeepFm = hyper::parse("deepfm", given)?;
    model.dnn.check("deepfm")?;
    Ok(model)
}

/// The perceptron and its output weights, if it has layers.
pub struct Weights {
    mlp: Mlp,
    out: Option<ParamId>,
}

impl RatingModel for DeepFm {
    type Weights = Weights;

    fn common(&self) -> &Common {
        &self.common
    }

    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Weights {
        let mlp = Mlp::add(params, &self.dnn, sizes.flat(), rng);
        let width = mlp.width(0);
        let out = (!mlp.is_empty()).then(|| params.add("dnn.out", &[width, 1], xavier_normal(width, 1, rng)));
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
        let mut y = Tensor::zeros([n, 1], &inputs.embeddings.device());
        if self.use_fm {
            y = sum_groups(bi_interaction(inputs.embeddings.clone()), 1);
        }
        if let Some(out) = weights.out {
            y = y + weights.mlp.apply(vars, inputs.flat(), pass).matmul(vars.get::<2>(out));
        }
        y.reshape([n])
    }

    fn penalty<B: ModelBackend>(&self, weights: &Weights, vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        weights.mlp.penalty(vars, weights.out)
    }
}

impl RatingRecommender for DeepFm {
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
        super::super::rating::golden::check("deepfm", super::parse);
    }
}
