//! Layer normalisation (Ba et al. 2016, arXiv 1607.06450) over the last dimension.
//!
//! In: rows `[n, dim]`, scale and shift `[dim]`. Out: `[n, dim]`. On the CPU each row is read once forwards and
//! once backwards; mean and deviation are computed again in the backward pass, not kept.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use rayon::prelude::*;

/// Added to the variance before its root.
const EPSILON: f32 = 1e-8;

/// A back end that has the operation.
pub trait LayerNormBackend: Backend {
    /// See [`layer_norm`].
    fn normed(x: Tensor<Self, 2>, scale: Tensor<Self, 1>, shift: Tensor<Self, 1>) -> Tensor<Self, 2> {
        let (unit, _) = standardised(x);
        unit * scale.unsqueeze::<2>() + shift.unsqueeze::<2>()
    }

    /// Gradients of rows, scale and shift from `upstream [n, dim]`.
    fn norm_gradients(x: Tensor<Self, 2>, scale: Tensor<Self, 1>, upstream: Tensor<Self, 2>) -> Gradient<Self> {
        let (unit, inverse) = standardised(x);
        let shift = upstream.clone().sum_dim(0).squeeze_dim::<1>(0);
        let of_scale = (upstream.clone() * unit.clone()).sum_dim(0).squeeze_dim::<1>(0);
        let flow = upstream * scale.unsqueeze::<2>();
        let mean = flow.clone().mean_dim(1);
        let along = (flow.clone() * unit.clone()).mean_dim(1);
        ((flow - mean - unit * along) * inverse, of_scale, shift)
    }
}

/// Gradients of rows, scale and shift.
pub type Gradient<B> = (Tensor<B, 2>, Tensor<B, 1>, Tensor<B, 1>);

/// `(x - mean) / sqrt(variance + 1e-8) * scale + shift` of each row of `x [n, dim]`; `scale`, `shift` `[dim]`.
pub fn layer_norm<B: LayerNormBackend>(x: Tensor<B, 2>, scale: Tensor<B, 1>, shift: Tensor<B, 1>) -> Tensor<B, 2> {
    B::normed(x, scale, shift)
}

/// Rows with mean 0 and variance 1, and the factors that made them so, `[n, 1]`.
fn standardised<B: Backend>(x: Tensor<B, 2>) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let mean = x.clone().mean_dim(1);
    let centred = x - mean;
    let variance = (centred.clone() * centred.clone()).mean_dim(1);
    let inverse = (variance + EPSILON).sqrt().recip();
    (centred * inverse.clone(), inverse)
}

#[cfg(feature = "cuda")]
impl LayerNormBackend for burn::backend::Cuda {}

/// Numbers that one task of Rayon works on; sums over rows are taken per task and then in their order, so that they
/// do not depend on the number of threads.
const TASK: usize = 1 << 15;

impl LayerNormBackend for Flex {
    fn normed(x: Tensor<Self, 2>, scale: Tensor<Self, 1>, shift: Tensor<Self, 1>) -> Tensor<Self, 2> {
        let [n, dim] = x.dims();
        if n * dim == 0 {
            return x;
        }
        let mut x = x.into_primitive().tensor().to_contiguous();
        let scale = scale.into_primitive().tensor().to_contiguous();
        let shift = shift.into_primitive().tensor().to_contiguous();
        let rows = TASK.div_ceil(dim) * dim;
        let (scale, shift) = (scale.storage::<f32>(), shift.storage::<f32>());
        x.storage_mut::<f32>().par_chunks_mut(rows).for_each(|chunk| forward(chunk, scale, shift));
        Tensor::from_primitive(TensorPrimitive::Float(x))
    }

    fn norm_gradients(x: Tensor<Self, 2>, scale: Tensor<Self, 1>, upstream: Tensor<Self, 2>) -> Gradient<Self> {
        let [n, dim] = x.dims();
        let device = x.device();
        if n * dim == 0 {
            return (x, Tensor::zeros([dim], &device), Tensor::zeros([dim], &device));
        }
        let x = x.into_primitive().tensor().to_contiguous();
        let scale = scale.into_primitive().tensor().to_contiguous();
        let mut flow = upstream.into_primitive().tensor().to_contiguous();
        let rows = TASK.div_ceil(dim) * dim;
        let scale = scale.storage::<f32>();
        let parts = flow.storage_mut::<f32>().par_chunks_mut(rows).zip(x.storage::<f32>().par_chunks(rows));
        let sums: Vec<Vec<f32>> = parts.map(|(flow, x)| backward(flow, x, scale)).collect();
        let mut total = vec![0f32; 2 * dim];
        sums.iter().for_each(|part| total.iter_mut().zip(part).for_each(|(t, p)| *t += p));
        let vector = |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), [dim]), &device);
        let flow = Tensor::from_primitive(TensorPrimitive::Float(flow));
        (flow, vector(&total[..dim]), vector(&total[dim..]))
    }
}

fn forward(rows: &mut [f32], scale: &[f32], shift: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just checked.
        return unsafe { forward_avx2(rows, scale, shift) };
    }
    forward_body(rows, scale, shift);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn forward_avx2(rows: &mut [f32], scale: &[f32], shift: &[f32]) {
    forward_body(rows, scale, shift);
}

fn backward(flow: &mut [f32], x: &[f32], scale: &[f32]) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just checked.
        return unsafe { backward_avx2(flow, x, scale) };
    }
    backward_body(flow, x, scale)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn backward_avx2(flow: &mut [f32], x: &[f32], scale: &[f32]) -> Vec<f32> {
    backward_body(flow, x, scale)
}

/// Sum over `f` of pairs, in 16 lanes, so that it may be done in vectors.
#[inline(always)]
fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (whole, rest) = (a.chunks_exact(16).zip(b.chunks_exact(16)), a.len() / 16 * 16);
    for (a, b) in whole {
        for n in 0..16 {
            lanes[n] += f(a[n], b[n]);
        }
    }
    let tail: f32 = a[rest..].iter().zip(&b[rest..]).map(|(&a, &b)| f(a, b)).sum();
    lanes.iter().sum::<f32>() + tail
}

/// Mean and `1 / sqrt(variance + epsilon)`.
#[inline(always)]
fn moments(x: &[f32]) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x, x, |a, _| a) / n;
    let variance = sum(x, x, |a, _| (a - mean) * (a - mean)) / n;
    (mean, 1.0 / (variance + EPSILON).sqrt())
}

#[inline(always)]
fn forward_body(rows: &mut [f32], scale: &[f32], shift: &[f32]) {
    for x in rows.chunks_exact_mut(scale.len()) {
        let (mean, inverse) = moments(x);
        for ((x, s), b) in x.iter_mut().zip(scale).zip(shift) {
            *x = (*x - mean) * inverse * s + b;
        }
    }
}

/// `flow`: the upstream gradient in, that of `x` out. Gives the gradients of scale and shift, `[2 dim]`.
#[inline(always)]
fn backward_body(flow: &mut [f32], x: &[f32], scale: &[f32]) -> Vec<f32> {
    let dim = scale.len();
    let mut sums = vec![0f32; 2 * dim];
    let (of_scale, of_shift) = sums.split_at_mut(dim);
    let (mut unit, mut through) = (vec![0f32; dim], vec![0f32; dim]);
    for (flow, x) in flow.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
        let (mean, inverse) = moments(x);
        for d in 0..dim {
            unit[d] = (x[d] - mean) * inverse;
            through[d] = flow[d] * scale[d];
            of_scale[d] += flow[d] * unit[d];
            of_shift[d] += flow[d];
        }
        let mean = sum(&through, &through, |a, _| a) / dim as f32;
        let along = sum(&through, &unit, |a, b| a * b) / dim as f32;
        for d in 0..dim {
            flow[d] = (through[d] - mean - unit[d] * along) * inverse;
        }
    }
    sums
}

/// The gradient rule.
#[derive(Debug)]
struct Rule;

impl<B: LayerNormBackend> Backward<B, 3> for Rule {
    type State = (Tensor<B, 2>, Tensor<B, 1>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = Tensor::from_primitive(TensorPrimitive::Float(grads.consume::<B>(&ops.node)));
        let (x, scale) = ops.state;
        let (x, scale, shift) = B::norm_gradients(x, scale, upstream);
        let flow = [x.into_primitive(), scale.into_primitive(), shift.into_primitive()];
        for (parent, grad) in ops.parents.into_iter().zip(flow) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad.tensor());
            }
        }
    }
}

impl<B: LayerNormBackend, C: CheckpointStrategy> LayerNormBackend for Autodiff<B, C> {
    fn normed(x: Tensor<Self, 2>, scale: Tensor<Self, 1>, shift: Tensor<Self, 1>) -> Tensor<Self, 2> {
        let (inner, by) = (x.clone().inner(), scale.clone().inner());
        let output = B::normed(inner.clone(), by.clone(), shift.clone().inner()).into_primitive().tensor();
        let nodes = [
            x.into_primitive().tensor().node,
            scale.into_primitive().tensor().node,
            shift.into_primitive().tensor().node,
        ];
        let output = match Backward::<B, 3>::prepare::<C>(Rule, nodes).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((inner, by), output),
            OpsKind::UnTracked(prepared) => prepared.finish(output),
        };
        Tensor::from_primitive(TensorPrimitive::Float(output))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Ad = Autodiff<Flex>;

    fn values(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin() * 2.0 + 0.3).collect()
    }

    fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<Ad, D> {
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    fn list<const D: usize>(t: Tensor<Flex, D>) -> Vec<f32> {
        t.into_data().to_vec().unwrap()
    }

    #[test]
    fn values_and_gradients_equal_those_of_single_operations() {
        // Widths with and without a tail of the lanes; more rows than one task has.
        for (n, dim) in [(3, 5), (4, 16), (7, 37), (1500, 64)] {
            let leaves = || {
                let x = tensor(values(n * dim, 0.37), [n, dim]).require_grad();
                (x, tensor(values(dim, 0.9), [dim]).require_grad(), tensor(values(dim, 1.3), [dim]).require_grad())
            };
            let weights = tensor(values(n * dim, 0.11), [n, dim]);
            let (x, scale, shift) = leaves();
            let fused = layer_norm(x.clone(), scale.clone(), shift.clone());
            let got = (fused.clone() * weights.clone()).sum().backward();
            let (x2, scale2, shift2) = leaves();
            let (unit, _) = standardised(x2.clone());
            let plain = unit * scale2.clone().unsqueeze::<2>() + shift2.clone().unsqueeze::<2>();
            let want = (plain.clone() * weights).sum().backward();
            let near = |a: Vec<f32>, b: Vec<f32>| {
                let size = b.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5 * size), "[{n}, {dim}]: {a:?} {b:?}");
            };
            near(list(fused.inner()), list(plain.inner()));
            near(list(x.grad(&got).unwrap()), list(x2.grad(&want).unwrap()));
            near(list(scale.grad(&got).unwrap()), list(scale2.grad(&want).unwrap()));
            near(list(shift.grad(&got).unwrap()), list(shift2.grad(&want).unwrap()));
        }
    }

    #[test]
    fn a_constant_row_gives_the_shift_and_no_nan() {
        let (x, scale) = (tensor(vec![2.0; 6], [2, 3]).require_grad(), tensor(vec![1.0; 3], [3]));
        let y = layer_norm(x.clone(), scale, tensor(vec![0.5, 1.0, 1.5], [3]));
        assert_eq!(list(y.clone().inner()), [0.5, 1.0, 1.5, 0.5, 1.0, 1.5]);
        let grads = y.sum().backward();
        assert!(list(x.grad(&grads).unwrap()).iter().all(|g| g.is_finite()));
    }
}
