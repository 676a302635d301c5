//! AutoInt (Song et al. 2018, arXiv 1810.11921): multi-head self-attention over the fields, beside a perceptron.
//!
//! A layer: per head `softmax(Q K') V` over the fields, `Q = e Wq`, `K = e Wk`, `V = e Wv` (eq. 5 to 7, not scaled); heads
//! side by side, plus `e Wres` if asked for, then relu (eq. 8). `y = bias + linear + w . [all fields of the last layer,
//! mlp(all embeddings, dense values)]` (AutoInt+; without hidden layers AutoInt).
//!
//! Reference implementation: DeepCTR's `AutoInt` (`att_embedding_size` is a setting there, in DeepCTR-Torch it is
//! `embedding_dim / att_head_num`). Deviations: see [`super::rating::learner`].

use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::{self, Idle};
use super::ops::{AttentionMask, attention};
use super::optim::{ParamId, Params, Vars, xavier_normal};
use super::rating::layers::{self, Dnn, Mlp, Pass};
use super::rating::learner::{self, Common, Inputs, RatingModel, Sizes};
use super::rating::predictor::Fitted;
use super::rating::{RatingFit, RatingRecommender, Ratings};
use super::registry::{Backbone, Make, Task};
use super::trainer::Schedule;
use super::{FitContext, hyper};
use crate::device::ModelBackend;
use crate::error::{Error, Result};

/// Hyper-parameters of `autoint`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AutoInt {
    /// Number of attention layers; 0 = none. Default 1 (DeepCTR-Torch: 3).
    #[schemars(range(min = 0, max = 32))]
    pub att_layer_num: u32,
    /// Width of a head. Default 8, as in DeepCTR.
    #[schemars(range(min = 1, max = 1024))]
    pub att_embedding_size: u32,
    /// Number of heads. Default 2, as in DeepCTR-Torch.
    #[schemars(range(min = 1, max = 64))]
    pub att_head_num: u32,
    /// Whether a layer's input is added to its output through a matrix. Default true, as in DeepCTR-Torch.
    pub att_res: bool,
    /// The perceptron.
    #[serde(flatten)]
    pub dnn: Dnn,
    /// Embeddings, steps and epochs.
    #[serde(flatten)]
    pub common: Common,
}

/// Chosen on the validation ratings of ML-100K; each field tells the reference code's default.
impl Default for AutoInt {
    fn default() -> Self {
        AutoInt {
            att_layer_num: 1,
            att_embedding_size: 8,
            att_head_num: 2,
            att_res: true,
            dnn: Dnn { dnn_dropout: 0.2, ..Dnn::new(&[128, 64]) },
            common: Common {
                embedding_dim: 16,
                l2_reg_linear: 1e-3,
                l2_reg_embedding: 3e-2,
                init_std: 1e-2,
                recent_decay: 0.75,
                schedule: Schedule { learning_rate: 2e-3, batch_size: 512, epochs: 100, eval_every: 1, patience: 5 },
            },
        }
    }
}

/// `autoint` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "autoint",
    about: "AutoInt: self-attention over the fields, beside a perceptron; predicts ratings",
    task: Task::Rating,
    schema: || schemars::schema_for!(AutoInt),
    idle: &[
        layers::NO_PERCEPTRON,
        Idle {
            keys: &["att_embedding_size", "att_head_num", "att_res"],
            when: |full| idle::is_zero(full, "att_layer_num"),
            why: "with `att_layer_num = 0`",
        },
    ],
    make: Make::Rating {
        build: |given| Ok(Box::new(parse(given)?)),
        load: |given, fields, tensors| Ok(Box::new(Fitted::load(&parse(given.clone())?, fields, tensors)?)),
    },
};

fn parse(given: serde_json::Value) -> Result<AutoInt> {
    let model: AutoInt = hyper::parse("autoint", given)?;
    model.dnn.check("autoint")?;
    if model.att_layer_num == 0 && model.dnn.dnn_hidden_units.is_empty() {
        let told = "`autoint` has neither attention layers nor hidden layers";
        return Err(Error::spec(told).with_help("give `att_layer_num` or `dnn_hidden_units`"));
    }
    Ok(model)
}

/// Attention layers, perceptron, output weights.
pub struct Weights {
    layers: Vec<Attention>,
    mlp: Mlp,
    out: ParamId,
}

/// Each `[width before, heads * head width]`.
struct Attention {
    query: ParamId,
    key: ParamId,
    value: ParamId,
    residual: Option<ParamId>,
}

impl RatingModel for AutoInt {
    type Weights = Weights;

    fn common(&self) -> &Common {
        &self.common
    }

    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Weights {
        let width = (self.att_head_num * self.att_embedding_size) as usize;
        let (mut layers, mut before) = (Vec::new(), sizes.dim);
        for n in 0..self.att_layer_num {
            let mut add = |what: &str| {
                params.add(&format!("attention.{n}.{what}"), &[before, width], xavier_normal(before, width, rng))
            };
            layers.push(Attention {
                query: add("query"),
                key: add("key"),
                value: add("value"),
                residual: self.att_res.then(|| add("residual")),
            });
            before = width;
        }
        let mlp = Mlp::add(params, &self.dnn, sizes.flat(), rng);
        let attended = if layers.is_empty() { 0 } else { sizes.fields * width };
        let deep = if mlp.is_empty() { 0 } else { mlp.width(0) };
        let out = params.add("out", &[attended + deep, 1], xavier_normal(attended + deep, 1, rng));
        Weights { layers, mlp, out }
    }

    fn forward<B: ModelBackend>(
        &self,
        weights: &Weights,
        vars: &Vars<B>,
        inputs: &Inputs<B>,
        pass: &mut Pass<B>,
    ) -> Tensor<B, 1> {
        let [n, fields, _] = inputs.embeddings.dims();
        let (heads, size) = (self.att_head_num as usize, self.att_embedding_size as usize);
        let lengths = vec![fields as u32; n];
        let mut e = inputs.embeddings.clone();
        for layer in &weights.layers {
            let before = e.dims()[2];
            let rows = e.reshape([n * fields, before]);
            let through = |id: ParamId| rows.clone().matmul(vars.get::<2>(id));
            let fields_of = |id: ParamId| through(id).reshape([n, fields, heads * size]);
            // The operation divides by the root of a head's width, AutoInt does not.
            let query = fields_of(layer.query) * (size as f32).sqrt();
            let mask = AttentionMask { lengths: &lengths, causal: false };
            let mixed = attention(query, fields_of(layer.key), fields_of(layer.value), heads, mask, None);
            let mixed = mixed.reshape([n * fields, heads * size]);
            let mixed = match layer.residual {
                Some(id) => mixed + through(id),
                None => mixed,
            };
            e = relu(mixed).reshape([n, fields, heads * size]);
        }
        let mut parts = Vec::new();
        if !weights.layers.is_empty() {
            parts.push(e.reshape([n, fields * heads * size]));
        }
        if !weights.mlp.is_empty() {
            parts.push(weights.mlp.apply(vars, inputs.flat(), pass));
        }
        Tensor::cat(parts, 1).matmul(vars.get::<2>(weights.out)).reshape([n])
    }

    fn penalty<B: ModelBackend>(&self, weights: &Weights, vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        weights.mlp.penalty(vars, None)
    }
}

impl RatingRecommender for AutoInt {
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
        super::super::rating::golden::check("autoint", super::parse);
    }
}
