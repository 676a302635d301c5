//! Layers that the rating models share: dropout, the multilayer perceptron, products of embeddings.
//!
//! In: weights ([`Vars`]) and tensors. Out: tensors. A [`Pass`] says whether this is training.

use burn::tensor::activation::{relu, sigmoid};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use rand::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::recommenders::idle::{self, Idle};
use crate::recommenders::ops::{self, FusedBackend};
use crate::recommenders::optim::{ParamId, Params, Vars, xavier_normal};

/// One pass through a model: training or use.
pub struct Pass<B: Backend> {
    /// Of the dropout of this step; `None` = no training.
    seed: Option<u64>,
    /// Dropouts so far.
    dropouts: u64,
    /// New values of weights that are not learned: running means and variances.
    pub statistics: Vec<(ParamId, Tensor<B, 1>)>,
}

impl<B: Backend> Pass<B> {
    /// A training step; what is dropped depends on the three numbers alone.
    pub fn training(seed: u64, epoch: usize, step: usize) -> Self {
        let seed = mixed(mixed(mixed(seed) ^ epoch as u64) ^ step as u64);
        Pass { seed: Some(seed), dropouts: 0, statistics: Vec::new() }
    }

    /// A pass that learns nothing and drops nothing.
    pub fn prediction() -> Self {
        Pass { seed: None, dropouts: 0, statistics: Vec::new() }
    }

    /// Sets a `share` of the values to 0 and scales the others up by `1 / (1 - share)`; training only.
    pub fn dropout<const D: usize>(&mut self, x: Tensor<B, D>, share: f64) -> Tensor<B, D>
    where
        B: FusedBackend,
    {
        let Some(seed) = self.seed else { return x };
        self.dropouts += 1;
        ops::dropout(x, share as f32, mixed(seed ^ self.dropouts))
    }
}

/// SplitMix64's output function.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// What follows a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// 1 / (1 + exp(-x)).
    Sigmoid,
    /// x where it is positive, else x times a learned factor (one a layer, .25 at first).
    Prelu,
    /// x.
    Linear,
}

impl Activation {
    /// Applies it. [`Activation::Prelu`] has a weight and is applied by [`Mlp`] only; elsewhere it is as `relu`.
    pub fn apply<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Activation::Relu | Activation::Prelu => relu(x),
            Activation::Sigmoid => sigmoid(x),
            Activation::Linear => x,
        }
    }
}

/// What has no effect in a model without a perceptron.
pub const NO_PERCEPTRON: Idle = Idle {
    keys: &["l2_reg_dnn", "dnn_dropout", "dnn_activation", "dnn_use_bn"],
    when: |full| idle::len(full, "dnn_hidden_units") == 0,
    why: "with an empty `dnn_hidden_units`: there is no perceptron",
};

/// Hyper-parameters of a multilayer perceptron.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Dnn {
    /// Units of each hidden layer of the perceptron, first to last; each 1 to 65,536, empty = no perceptron.
    /// Default: `deepfm` and `autoint` [128, 64], `nfm` [64], `dcn` [128, 128], `xdeepfm` [256, 128] (DeepCTR-Torch:
    /// `deepfm` and `autoint` [256, 128], `nfm` and `dcn` [128, 128], `xdeepfm` [256, 256]).
    pub dnn_hidden_units: Vec<u32>,
    /// Weight of the sum of squares of the perceptron's matrices in the loss (the mean over a batch). Default 0, as in
    /// DeepCTR-Torch.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub l2_reg_dnn: f64,
    /// Share of the hidden units that a training step drops, 0 to .99. Default: `deepfm` 0.4, `xdeepfm` 0.3, `autoint` 0.2,
    /// others 0 (DeepCTR-Torch: 0).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub dnn_dropout: f64,
    /// After each hidden layer: "relu", "sigmoid", "prelu" or "linear". Default "relu", as in DeepCTR-Torch (whose "dice"
    /// is not here).
    pub dnn_activation: Activation,
    /// Whether each hidden layer is normalised over the batch before its activation. Default false, as in
    /// DeepCTR-Torch.
    pub dnn_use_bn: bool,
}

impl Dnn {
    /// DeepCTR-Torch's settings with the given layers.
    pub fn new(units: &[u32]) -> Self {
        Dnn {
            dnn_hidden_units: units.to_vec(),
            l2_reg_dnn: 0.0,
            dnn_dropout: 0.0,
            dnn_activation: Activation::Relu,
            dnn_use_bn: false,
        }
    }

    /// Checks what a schema cannot.
    ///
    /// # Errors
    /// A layer without units (exit 78).
    pub fn check(&self, model: &str) -> Result<()> {
        check_layers(model, "dnn_hidden_units", &self.dnn_hidden_units)
    }
}

/// Checks a list of layer sizes.
///
/// # Errors
/// One is 0 or above 65,536 (exit 78).
pub fn check_layers(model: &str, key: &str, sizes: &[u32]) -> Result<()> {
    match sizes.iter().find(|&&n| n == 0 || n > 65_536) {
        None => Ok(()),
        Some(n) => {
            let told = format!("hyper-parameter `{key}` of `{model}` has a layer of {n} units, allowed is 1 to 65536");
            Err(Error::spec(told).with_help("leave the layer out of the list"))
        }
    }
}

/// Running means and variances of a layer, with scale and shift.
#[derive(Clone, Debug)]
struct BatchNorm {
    scale: ParamId,
    shift: ParamId,
    mean: ParamId,
    variance: ParamId,
}

/// As in torch: added to the variance.
const BN_EPSILON: f64 = 1e-5;
/// As in torch: the share of a new batch in the running values.
const BN_MOMENTUM: f64 = 0.1;

impl BatchNorm {
    fn add<B: Backend>(params: &mut Params<B>, name: &str, n: usize) -> Self {
        let mut add = |what: &str, value: f32| params.add(&format!("{name}.bn.{what}"), &[n], vec![value; n]);
        BatchNorm {
            scale: add("scale", 1.0),
            shift: add("shift", 0.0),
            mean: add("mean", 0.0),
            variance: add("variance", 1.0),
        }
    }

    /// `x [batch, n]`.
    fn apply<B: Backend>(&self, vars: &Vars<B>, x: Tensor<B, 2>, pass: &mut Pass<B>) -> Tensor<B, 2> {
        let [batch, n] = x.dims();
        let row = |id: ParamId| vars.get::<1>(id).reshape([1, n]);
        let (mean, variance) = match pass.seed {
            // A batch of one has no variance.
            Some(_) if batch > 1 => {
                let mean = x.clone().mean_dim(0);
                let variance = (x.clone() - mean.clone()).powi_scalar(2).mean_dim(0);
                let running = |id: ParamId, new: Tensor<B, 2>| {
                    let old = vars.get::<1>(id).detach();
                    (id, old * (1.0 - BN_MOMENTUM) + new.detach().reshape([n]) * BN_MOMENTUM)
                };
                pass.statistics.push(running(self.mean, mean.clone()));
                let unbiased = variance.clone() * (batch as f64 / (batch - 1) as f64);
                pass.statistics.push(running(self.variance, unbiased));
                (mean, variance)
            }
            _ => (row(self.mean).detach(), row(self.variance).detach()),
        };
        (x - mean) / (variance + BN_EPSILON).sqrt() * row(self.scale) + row(self.shift)
    }
}

/// A multilayer perceptron: per hidden layer linear, batch norm, activation, dropout. Weights are `[in, out]`.
#[derive(Clone, Debug)]
pub struct Mlp {
    dnn: Dnn,
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    weight: ParamId,
    bias: ParamId,
    bn: Option<BatchNorm>,
    slope: Option<ParamId>,
}

impl Mlp {
    /// Adds its weights (`dnn.0.weight`, ..) for inputs of `width` values. Start: Glorot and Bengio's normal
    /// distribution, biases 0 (as in RecBole; DeepCTR-Torch's deviation of 1e-4 makes training start on a plateau).
    pub fn add<B: Backend>(params: &mut Params<B>, dnn: &Dnn, width: usize, rng: &mut impl Rng) -> Self {
        let mut layers = Vec::new();
        let mut from = width;
        for (n, &units) in dnn.dnn_hidden_units.iter().enumerate() {
            let (to, name) = (units as usize, format!("dnn.{n}"));
            // Glorot's values do not depend on the side that is called `in`.
            let weight = params.add(&format!("{name}.weight"), &[from, to], xavier_normal(from, to, rng));
            let bias = params.add(&format!("{name}.bias"), &[to], vec![0.0; to]);
            let bn = dnn.dnn_use_bn.then(|| BatchNorm::add(params, &name, to));
            let slope = (dnn.dnn_activation == Activation::Prelu)
                .then(|| params.add(&format!("{name}.slope"), &[1], vec![0.25]));
            layers.push(Layer { weight, bias, bn, slope });
            from = to;
        }
        Mlp { dnn: dnn.clone(), layers }
    }

    /// Whether it has no layer, so that its output is its input.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Width of its output for inputs of `width` values.
    pub fn width(&self, width: usize) -> usize {
        self.dnn.dnn_hidden_units.last().map_or(width, |&n| n as usize)
    }

    /// `x [batch, width]` -> `[batch, units of the last layer]`.
    pub fn apply<B: FusedBackend>(&self, vars: &Vars<B>, mut x: Tensor<B, 2>, pass: &mut Pass<B>) -> Tensor<B, 2> {
        for layer in &self.layers {
            x = ops::linear(x, vars.get(layer.weight), Some(vars.get(layer.bias)));
            if let Some(bn) = &layer.bn {
                x = bn.apply(vars, x, pass);
            }
            x = match layer.slope {
                Some(slope) => relu(x.clone()) - relu(x.neg()) * vars.get::<1>(slope).reshape([1, 1]),
                None => self.dnn.dnn_activation.apply(x),
            };
            x = pass.dropout(x, self.dnn.dnn_dropout);
        }
        x
    }

    /// `l2_reg_dnn` times the squares of its matrices and of `more`, if that is above 0.
    pub fn penalty<B: Backend>(&self, vars: &Vars<B>, more: Option<ParamId>) -> Option<Tensor<B, 1>> {
        penalty(vars, self.dnn.l2_reg_dnn, self.layers.iter().map(|l| l.weight).chain(more))
    }
}

/// `weight` times the sum of squares of matrices; `None` where that is 0.
pub fn penalty<B: Backend>(
    vars: &Vars<B>,
    weight: f64,
    matrices: impl Iterator<Item = ParamId>,
) -> Option<Tensor<B, 1>> {
    if weight == 0.0 {
        return None;
    }
    let squares = |id: ParamId| vars.get::<2>(id).powi_scalar(2).sum();
    matrices.map(squares).reduce(|a, b| a + b).map(|sum| sum * weight)
}

/// Adds up to two penalties.
pub fn plus<B: Backend>(a: Option<Tensor<B, 1>>, b: Option<Tensor<B, 1>>) -> Option<Tensor<B, 1>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

/// The sum over groups of columns: `[batch, groups * dim]` -> `[batch, dim]`. A matrix product, since a sum over a
/// middle axis has a broadcast for its gradient, which is slow on the CPU.
pub fn sum_groups<B: Backend>(x: Tensor<B, 2>, dim: usize) -> Tensor<B, 2> {
    let groups = x.dims()[1] / dim;
    let ones = (0..groups * dim * dim).map(|n| f32::from(u8::from(n / dim % dim == n % dim))).collect::<Vec<f32>>();
    let ones = Tensor::from_data(TensorData::new(ones, [groups * dim, dim]), &x.device());
    x.matmul(ones)
}

/// The sum of products of all pairs of embeddings, element by element (He and Chua 2017, eq. 4):
/// `[batch, fields, dim]` -> `[batch, dim]`. Summed over `dim` it is the second-order term of a factorisation machine.
pub fn bi_interaction<B: Backend>(embeddings: Tensor<B, 3>) -> Tensor<B, 2> {
    let [batch, fields, dim] = embeddings.dims();
    let flat = embeddings.reshape([batch, fields * dim]);
    let sum = sum_groups(flat.clone(), dim);
    let squares = sum_groups(flat.clone() * flat, dim);
    (sum.clone() * sum - squares) * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn dropout_keeps_the_mean_and_depends_on_seed_epoch_and_step_alone() {
        let x = || Tensor::<Flex, 2>::ones([100, 101], &Default::default());
        let drop = |seed, epoch, step, share| {
            let mut pass = Pass::<Flex>::training(seed, epoch, step);
            let first: Vec<f32> = pass.dropout(x(), share).into_data().to_vec().unwrap();
            let second: Vec<f32> = pass.dropout(x(), share).into_data().to_vec().unwrap();
            (first, second)
        };
        let (a, b) = drop(1, 2, 3, 0.3);
        assert_ne!(a, b);
        assert_eq!(drop(1, 2, 3, 0.3), (a.clone(), b));
        for other in [drop(2, 2, 3, 0.3), drop(1, 3, 3, 0.3), drop(1, 2, 4, 0.3)] {
            assert_ne!(other.0, a);
        }
        let dropped = a.iter().filter(|&&x| x == 0.0).count() as f64 / a.len() as f64;
        assert!((dropped - 0.3).abs() < 0.02, "{dropped}");
        assert!(a.iter().all(|&x| x == 0.0 || (x - 1.0 / 0.7).abs() < 1e-6));
        let mut pass = Pass::<Flex>::prediction();
        assert_eq!(pass.dropout(x(), 0.5).into_data(), x().into_data());
    }

    #[test]
    fn pairs_are_summed_once_each() {
        let e = Tensor::<Flex, 3>::from_data([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]], &Default::default());
        let got: Vec<f32> = bi_interaction(e).into_data().to_vec().unwrap();
        assert_eq!(got, [1.0 * 3.0 + 1.0 * 0.5 + 3.0 * 0.5, -2.0 + 2.0 * 4.0 - 4.0]);
    }

    #[test]
    fn layers_without_units_are_refused() {
        let error = Dnn::new(&[8, 0]).check("deepfm").unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("dnn_hidden_units"));
        Dnn::new(&[]).check("deepfm").unwrap();
    }
}
