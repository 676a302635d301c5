//! xDeepFM (Lian et al. 2018, arXiv 1803.05170): a compressed interaction network (CIN) beside a perceptron.
//!
//! CIN, per dimension of the embeddings: map `h` of layer k is `act(sum over j, i of W[h, j, i] x(0)[j] x(k-1)[i] + b[h])`
//! (eq. 6); the maps are summed over the dimensions and weighted into the output. With `cin_split_half` the first half of
//! a layer's maps goes on to the next layer and the second half to the output (the last layer: all to the output).
//! `y = bias + linear + w . cin + v . mlp(all embeddings, dense values)` (eq. 9).
//!
//! Reference implementation: DeepCTR-Torch's `xDeepFM`. Deviations: see [`super::rating::learner`].

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::{self, Idle};
use super::ops::pair_products;
use super::optim::{ParamId, Params, Vars, xavier_normal};
use super::rating::layers::{self, Activation, Dnn, Mlp, Pass, check_layers, penalty, plus, sum_groups};
use super::rating::learner::{self, Common, Inputs, RatingModel, Sizes};
use super::rating::predictor::Fitted;
use super::rating::{RatingFit, RatingRecommender, Ratings};
use super::registry::{Backbone, Make, Task};
use super::trainer::Schedule;
use super::{FitContext, hyper};
use crate::device::ModelBackend;
use crate::error::{Error, Result};

/// Hyper-parameters of `xdeepfm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct XDeepFm {
    /// Feature maps of each CIN layer, first to last; each 1 to 65,536, empty = no CIN. With `cin_split_half` all but
    /// the last must be even. Default [16] (DeepCTR-Torch: [256, 128]).
    pub cin_layer_size: Vec<u32>,
    /// Whether half of the maps of a layer go to the next and the other half to the output; false = all go to both.
    /// Default true, as in DeepCTR-Torch.
    pub cin_split_half: bool,
    /// Of the feature maps: "relu", "sigmoid" or "linear". Default "relu", as in DeepCTR-Torch.
    pub cin_activation: Activation,
    /// Weight of the sum of squares of the CIN's matrices in the loss (the mean over a batch). Default 0, as in DeepCTR-Torch.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2_reg_cin: f64,
    /// The perceptron.
    #[serde(flatten)]
    pub dnn: Dnn,
    /// Embeddings, steps and epochs.
    #[serde(flatten)]
    pub common: Common,
}

/// Chosen on the validation ratings of ML-100K; each field tells the reference code's default.
impl Default for XDeepFm {
    fn default() -> Self {
        XDeepFm {
            cin_layer_size: vec![16],
            cin_split_half: true,
            cin_activation: Activation::Relu,
            l2_reg_cin: 0.0,
            dnn: Dnn { dnn_dropout: 0.3, ..Dnn::new(&[256, 128]) },
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

/// `xdeepfm` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "xdeepfm",
    about: "xDeepFM: a compressed interaction network beside a perceptron; predicts ratings",
    task: Task::Rating,
    schema: || schemars::schema_for!(XDeepFm),
    idle: &[
        layers::NO_PERCEPTRON,
        Idle {
            keys: &["cin_activation", "l2_reg_cin"],
            when: |full| idle::len(full, "cin_layer_size") == 0,
            why: "with an empty `cin_layer_size`",
        },
        Idle {
            keys: &["cin_split_half"],
            when: |full| idle::len(full, "cin_layer_size") < 2,
            why: "with fewer than two layers in `cin_layer_size`: no maps go on",
        },
    ],
    make: Make::Rating {
        build: |given| Ok(Box::new(parse(given)?)),
        load: |given, fields, tensors| Ok(Box::new(Fitted::load(&parse(given.clone())?, fields, tensors)?)),
    },
};

fn parse(given: serde_json::Value) -> Result<XDeepFm> {
    let model: XDeepFm = hyper::parse("xdeepfm", given)?;
    model.dnn.check("xdeepfm")?;
    check_layers("xdeepfm", "cin_layer_size", &model.cin_layer_size)?;
    let (_, before_last) = model.cin_layer_size.split_last().unwrap_or((&0, &[]));
    if let Some(size) = before_last.iter().find(|&n| model.cin_split_half && n % 2 == 1) {
        let told =
            format!("hyper-parameter `cin_layer_size` of `xdeepfm` has a layer of {size} maps, which has no half");
        return Err(Error::spec(told).with_help("make it even, or set `cin_split_half` to false"));
    }
    if model.cin_activation == Activation::Prelu {
        let told = "hyper-parameter `cin_activation` of `xdeepfm` is \"prelu\"";
        return Err(Error::spec(told).with_help("use \"relu\", \"sigmoid\" or \"linear\""));
    }
    Ok(model)
}

/// CIN layers (weight `[fields * maps before, maps]` and bias), its output weights, the perceptron, its output weights.
pub struct Weights {
    cin: Vec<(ParamId, ParamId)>,
    cin_out: Option<ParamId>,
    mlp: Mlp,
    dnn_out: Option<ParamId>,
}

impl RatingModel for XDeepFm {
    type Weights = Weights;

    fn common(&self) -> &Common {
        &self.common
    }

    fn weights<B: ModelBackend>(&self, sizes: Sizes, params: &mut Params<B>, rng: &mut ChaCha8Rng) -> Weights {
        let (mut cin, mut before, mut maps_out) = (Vec::new(), sizes.fields, 0);
        for (k, &maps) in self.cin_layer_size.iter().enumerate() {
            let (from, maps) = (before * sizes.fields, maps as usize);
            let weight = params.add(&format!("cin.{k}.weight"), &[from, maps], xavier_normal(from, maps, rng));
            cin.push((weight, params.add(&format!("cin.{k}.bias"), &[maps], vec![0.0; maps])));
            let halved = self.cin_split_half && k + 1 < self.cin_layer_size.len();
            before = if halved { maps / 2 } else { maps };
            maps_out += before;
        }
        let cin_out = (maps_out > 0).then(|| params.add("cin.out", &[maps_out, 1], xavier_normal(maps_out, 1, rng)));
        let mlp = Mlp::add(params, &self.dnn, sizes.flat(), rng);
        let width = mlp.width(0);
        let dnn_out = (!mlp.is_empty()).then(|| params.add("dnn.out", &[width, 1], xavier_normal(width, 1, rng)));
        Weights { cin, cin_out, mlp, dnn_out }
    }

    fn forward<B: ModelBackend>(
        &self,
        weights: &Weights,
        vars: &Vars<B>,
        inputs: &Inputs<B>,
        pass: &mut Pass<B>,
    ) -> Tensor<B, 1> {
        let [n, fields, dim] = inputs.embeddings.dims();
        let mut y = Tensor::zeros([n, 1], &inputs.embeddings.device());
        if let Some(out) = weights.cin_out {
            let (out, device) = (vars.get::<2>(out), inputs.embeddings.device());
            // One row per rating and dimension, so that a layer is one matrix product.
            let x0 = inputs.embeddings.clone().swap_dims(1, 2).reshape([n * dim, fields]);
            let (mut x, mut before, mut used) = (x0.clone(), fields, 0);
            let mut terms = Tensor::zeros([n * dim, 1], &device);
            for (k, &(weight, bias)) in weights.cin.iter().enumerate() {
                let bias = vars.get::<1>(bias);
                let maps = bias.dims()[0];
                let all = pair_products((x, before), x0.clone(), vars.get::<2>(weight)) + bias.reshape([1, maps]);
                let all = self.cin_activation.apply(all);
                // The maps that go on to the next layer only have an output weight of 0: no copy of either half.
                let halved = self.cin_split_half && k + 1 < weights.cin.len();
                let first = if halved { maps / 2 } else { 0 };
                let part = out.clone().slice([used..used + maps - first, 0..1]);
                let part = match first {
                    0 => part,
                    _ => Tensor::cat(vec![Tensor::zeros([first, 1], &device), part], 0),
                };
                terms = terms + all.clone().matmul(part);
                used += maps - first;
                (x, before) = (all, if halved { first } else { maps });
            }
            y = sum_groups(terms.reshape([n, dim]), 1);
        }
        if let Some(out) = weights.dnn_out {
            y = y + weights.mlp.apply(vars, inputs.flat(), pass).matmul(vars.get::<2>(out));
        }
        y.reshape([n])
    }

    fn penalty<B: ModelBackend>(&self, weights: &Weights, vars: &Vars<B>) -> Option<Tensor<B, 1>> {
        let cin = penalty(vars, self.l2_reg_cin, weights.cin.iter().map(|layer| layer.0));
        plus(cin, weights.mlp.penalty(vars, weights.dnn_out))
    }
}

impl RatingRecommender for XDeepFm {
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
        super::super::rating::golden::check("xdeepfm", super::parse);
    }
}
