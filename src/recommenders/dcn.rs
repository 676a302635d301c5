//! DCN, the deep and cross network, version 1 (Wang et al. 2017, arXiv 1708.05123) and 2 (Wang et al. 2020,
//! arXiv 2008.13535): layers that multiply the input with itself, beside a perceptron.
//!
//! With `x0` = all embeddings and dense values: version 1 (`vector`) `x(l+1) = x0 (x(l) . w) + b + x(l)`, version 2
//! (`matrix`) `x(l+1) = x0 * (W x(l) + b) + x(l)`; `y = bias + linear + w . [x(L), mlp(x0)]` (the parallel form).
//!
//! Reference implementation: DeepCTR-Torch's `DCN`. Deviations: see [`super::rating::learner`]; the output weights are
//! regularised by `l2_reg_dnn` (there by `l2_reg_linear`).

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::{self, Idle};
use super::optim::{ParamId, Params, Vars, xavier_normal};
use super::rating::layers::{self, Dnn, Mlp, Pass, penalty, plus};
use super::rating::learner::{self, Common, Inputs, RatingModel, Sizes};
use super::rating::predictor::Fitted;
use super::rating::{RatingFit, RatingRecommender, Ratings};
use super::registry::{Backbone, Make, Task};
use super::trainer::Schedule;
use super::{FitContext, hyper};
use crate::device::ModelBackend;
use crate::error::{Error, Result};

/// How a cross layer is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cross {
    /// One vector a layer: version 1.
    Vector,
    /// One matrix a layer: version 2.
    Matrix,
}

/// Hyper-parameters of `dcn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Dcn {
    /// Number of cross layers; 0 = none. Default 2, as in DeepCTR-Torch.
    #[schemars(range(min = 0, max = 32))]
    pub cross_num: u32,
    /// Weights of a cross layer: "vector" (version 1) or "matrix" (version 2). Default "vector", as in
    /// DeepCTR-Torch.
    pub cross_parameterization: Cross,
    /// Weight of the sum of squares of the cross layers' weights in the loss (the mean over a batch).
    /// Default 0.00001, as in DeepCTR-Torch.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2_reg_cross: f64,
    /// The perceptron.
    #[serde(flatten)]
    pub dnn: Dnn,
    /// Embeddings, steps and epochs.
    #[serde(flatten)]
    pub common: Common,
}

/// Chosen on the validation ratings of ML-100K; each field tells the reference code's default.
impl Default for Dcn {
    fn default() -> Self {
        Dcn {
            cross_num: 2,
            cross_parameterization: Cross::Vector,
            l2_reg_cross: 1e-5,
            dnn: Dnn::new(&[128, 128]),
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

/// `dcn` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "dcn",
    about: "DCN: layers that cross the input with itself, beside a perceptron; predicts ratings",
    task: Task::Rating,
    schema: || schemars::schema_for!(Dcn),
    idle: &[
        layers::NO_PERCEPTRON,
        Idle {
            keys: &["cross_parameterization", "l2_reg_cross"],
            when: |full| idle::is_zero(full, "cross_num"),
            why: "with `cross_num = 0`",
        },
    ],
    make: Make::Rating {
        build: |given| Ok(Box::new(parse(given)?)),
        load: |given, fields, tensors| Ok(Box::new(Fitted::load(&parse(given.clone())?, fields, tensors)?)),
    },
};

fn parse(given: serde_json::Value) -> Result<Dcn> {
    let model: Dcn = hyper::parse("dcn", given)?;
    model.dnn.check("dcn")?;
    if model.cross_num == 0 && model.dnn.dnn_hidden_units.is_empty() {
        let told = "`dcn` has neither cross layers nor hidden layers";
        return Err(Error::spec(told).with_help("give `cross_num` or `dnn_hidden_units`"));
    }
    Ok(model)
}

/// Cross layers (weight and bias), perceptron, output weights.
pub struct Weights {
    cross: Vec<(ParamId, ParamId)>,
    mlp: Mlp,
    out: ParamId,
}

impl RatingModel for Dcn {
    type Weights = Weights;

    fn common(&self) -> &Common {
        &self.common
    }

    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Weights {
        let width = sizes.flat();
        let columns = match self.cross_parameterization {
            Cross::Vector => 1,
            Cross::Matrix => width,
        };
        let mut layer = |n: u32| {
            let weight =
                params.add(&format!("cross.{n}.weight"), &[width, columns], xavier_normal(width, columns, rng));
            (weight, params.add(&format!("cross.{n}.bias"), &[width], vec![0.0; width]))
        };
        let cross: Vec<(ParamId, ParamId)> = (0..self.cross_num).map(&mut layer).collect();
        let mlp = Mlp::add(params, &self.dnn, width, rng);
        let crossed = if cross.is_empty() { 0 } else { width };
        let deep = if mlp.is_empty() { 0 } else { mlp.width(width) };
        let out = params.add("out", &[crossed + deep, 1], xavier_normal(crossed + deep, 1, rng));
        Weights { cross, mlp, out }
    }

    fn forward<B: ModelBackend>(
        &self,
        weights: &Weights,
        vars: &Vars<B>,
        inputs: &Inputs<B>,
        pass: &mut Pass<B>,
    ) -> Tensor<B, 1> {
        let x0 = inputs.flat();
        let [n, width] = x0.dims();
        let mut x = x0.clone();
        for &(weight, bias) in &weights.cross {
            let product = x.clone().matmul(vars.get::<2>(weight));
            let bias = vars.get::<1>(bias).reshape([1, width]);
            x = match self.cross_parameterization {
                // The number of each row is spread over its columns by a product: a broadcast is slow on the CPU.
                Cross::Vector => x0.clone() * product.matmul(Tensor::ones([1, width], &x0.device())) + bias + x,
                Cross::Matrix => x0.clone() * (product + bias) + x,
            };
        }
        let mut parts = Vec::new();
        if !weights.cross.is_empty() {
            parts.push(x);
        }
        if !weights.mlp.is_empty() {
            parts.push(weights.mlp.apply(vars, x0, pass));
        }
        Tensor::cat(parts, 1).matmul(vars.get::<2>(weights.out)).reshape([n])
    }

    fn penalty<B: ModelBackend>(&self, weights: &Weights, vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        let cross = penalty(vars, self.l2_reg_cross, weights.cross.iter().map(|layer| layer.0));
        plus(cross, weights.mlp.penalty(vars, Some(weights.out)))
    }
}

impl RatingRecommender for Dcn {
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
        super::super::rating::golden::check("dcn", super::parse);
    }
}
