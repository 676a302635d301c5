//! AFM, the attentional factorisation machine (Xiao et al. 2017, arXiv 1708.04617): a factorisation machine that
//! weighs its pairs of fields.
//!
//! `y = bias + linear + p . sum over pairs a_ij (e_i * e_j)`, `a = softmax over pairs of h . relu(W' (e_i * e_j) + b)`
//! (eq. 4 to 6). Without attention it is a plain factorisation machine. Dense values take part in the linear terms only.
//!
//! Reference implementation: DeepCTR-Torch's `AFM`. Deviations: see [`super::rating::learner`].

use burn::tensor::activation::{relu, softmax};
use burn::tensor::{Int, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::Idle;
use super::optim::{ParamId, Params, Vars, xavier_normal};
use super::rating::layers::{Pass, bi_interaction, penalty, sum_groups};
use super::rating::learner::{self, Common, Inputs, RatingModel, Sizes};
use super::rating::predictor::Fitted;
use super::rating::{RatingFit, RatingRecommender, Ratings};
use super::registry::{Backbone, Make, Task};
use super::trainer::Schedule;
use super::{FitContext, hyper};
use crate::device::ModelBackend;
use crate::error::Result;

/// Hyper-parameters of `afm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Afm {
    /// Whether pairs are weighed; false = a factorisation machine, and the attention's settings are not used.
    /// Default true, as in DeepCTR-Torch.
    pub use_attention: bool,
    /// Units of the attention's hidden layer. Default 8, as in DeepCTR-Torch.
    #[schemars(range(min = 1, max = 4096))]
    pub attention_factor: u32,
    /// Weight of the sum of squares of the attention's matrix in the loss (the mean over a batch). Default 0.00001, as in
    /// DeepCTR-Torch.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2_reg_att: f64,
    /// Share of the pooled products that a training step drops, 0 to .99. Default 0.3 (DeepCTR-Torch: 0).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub afm_dropout: f64,
    /// Embeddings, steps and epochs.
    #[serde(flatten)]
    pub common: Common,
}

/// Chosen on the validation ratings of ML-100K; each field tells the reference code's default.
impl Default for Afm {
    fn default() -> Self {
        Afm {
            use_attention: true,
            attention_factor: 8,
            l2_reg_att: 1e-5,
            afm_dropout: 0.3,
            common: Common {
                embedding_dim: 16,
                l2_reg_linear: 1e-3,
                l2_reg_embedding: 1e-5,
                init_std: 1e-1,
                recent_decay: 0.75,
                schedule: Schedule { learning_rate: 3e-3, batch_size: 256, epochs: 100, eval_every: 1, patience: 5 },
            },
        }
    }
}

/// `afm` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "afm",
    about: "AFM: a factorisation machine with attention over its pairs of fields; predicts ratings",
    task: Task::Rating,
    schema: || schemars::schema_for!(Afm),
    idle: &[Idle {
        keys: &["attention_factor", "l2_reg_att", "afm_dropout"],
        when: |full| full["use_attention"] == false,
        why: "with `use_attention = false`",
    }],
    make: Make::Rating {
        build: |given| Ok(Box::new(parse(given)?)),
        load: |given, fields, tensors| Ok(Box::new(Fitted::load(&parse(given.clone())?, fields, tensors)?)),
    },
};

fn parse(given: serde_json::Value) -> Result<Afm> {
    let model: Afm = hyper::parse("afm", given)?;
    Ok(model)
}

/// The attention's weights; `None` without attention.
pub struct Weights(Option<Attention>);

/// `w [dim, factor]`, `b [factor]`, `h [factor, 1]`, `p [dim, 1]`.
struct Attention {
    w: ParamId,
    b: ParamId,
    h: ParamId,
    p: ParamId,
}

impl RatingModel for Afm {
    type Weights = Weights;

    fn common(&self) -> &Common {
        &self.common
    }

    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Weights {
        if !self.use_attention {
            return Weights(None);
        }
        let (dim, factor) = (sizes.dim, self.attention_factor as usize);
        Weights(Some(Attention {
            w: params.add("attention.w", &[dim, factor], xavier_normal(dim, factor, rng)),
            b: params.add("attention.b", &[factor], vec![0.0; factor]),
            h: params.add("attention.h", &[factor, 1], xavier_normal(factor, 1, rng)),
            p: params.add("attention.p", &[dim, 1], xavier_normal(dim, 1, rng)),
        }))
    }

    fn forward<B: ModelBackend>(
        &self,
        weights: &Weights,
        vars: &Vars<B>,
        inputs: &Inputs<B>,
        pass: &mut Pass<B>,
    ) -> Tensor<B, 1> {
        let [n, fields, dim] = inputs.embeddings.dims();
        let Some(Attention { w, b, h, p }) = &weights.0 else {
            return sum_groups(bi_interaction(inputs.embeddings.clone()), 1).reshape([n]);
        };
        let (pairs, factor) = (fields * (fields - 1) / 2, self.attention_factor as usize);
        let flat = inputs.embeddings.clone().reshape([n * fields, dim]);
        let device = flat.device();
        // One side of each pair of each rating.
        let side = |pick: fn((i32, i32)) -> i32| {
            let last = fields as i32;
            let all = (0..last).flat_map(|i| (i + 1..last).map(move |j| (i, j)));
            let rows: Vec<i32> = (0..n as i32).flat_map(|r| all.clone().map(move |p| r * last + pick(p))).collect();
            flat.clone().select(0, Tensor::<B, 1, Int>::from_data(TensorData::new(rows, [n * pairs]), &device))
        };
        let products = side(|p| p.0) * side(|p| p.1);
        let hidden = products.clone().matmul(vars.get::<2>(*w)) + vars.get::<1>(*b).reshape([1, factor]);
        let shares = softmax(relu(hidden).matmul(vars.get::<2>(*h)).reshape([n, pairs]), 1);
        // Spread over the columns by a product with ones: a broadcast is slow on the CPU.
        let shares = shares.reshape([n * pairs, 1]).matmul(Tensor::ones([1, dim], &device));
        let pooled = sum_groups((products * shares).reshape([n, pairs * dim]), dim);
        pass.dropout(pooled, self.afm_dropout).matmul(vars.get::<2>(*p)).reshape([n])
    }

    fn penalty<B: ModelBackend>(&self, weights: &Weights, vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        penalty(vars, self.l2_reg_att, weights.0.iter().map(|a| a.w))
    }
}

impl RatingRecommender for Afm {
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
        super::super::rating::golden::check("afm", super::parse);
    }
}
