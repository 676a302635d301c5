//! Layer normalisation (Ba et al. 2016, arXiv 1607.06450) in one piece.
//!
//! In: rows, scale, shift. Out: rows.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower, sum_over_rows};
use super::widest::{Work, multiply_add, widest};

/// Added to the variance before its root.
const EPSILON: f32 = 1e-8;

/// `(x - mean) / sqrt(variance + 1e-8) * scale + shift` of each row; `x [n, dim]`, `scale [dim]`, `shift [dim]`. The
/// variance is that of the row's numbers (divided by `dim`).
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn layer_norm<B: FusedBackend>(x: Tensor<B, 2>, scale: Tensor<B, 1>, shift: Tensor<B, 1>) -> Tensor<B, 2> {
    let dim = x.dims()[1];
    assert!(dim > 0 && scale.dims()[0] == dim && shift.dims()[0] == dim, "scale or shift that is not [{dim}]");
    lift(B::fused(LayerNorm { dim }, [lower(x), lower(scale), lower(shift)]))
}

#[derive(Clone, Debug)]
struct LayerNorm {
    dim: usize,
}

/// Rows of a unit of parallel work.
const ROWS: usize = 256;

/// Partial sums of a row.
const LANES: usize = 16;

/// The sum of `f` over places `0..n`, in lanes.
#[inline(always)]
pub(super) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        for (k, lane) in lanes.iter_mut().enumerate() {
            *lane += f(first + k);
        }
    }
    for (k, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + k);
    }
    for half in [8, 4, 2, 1] {
        for k in 0..half {
            lanes[k] += lanes[k + half];
        }
    }
    lanes[0]
}

/// Rows of the result and `[mean, 1 / deviation]` of each.
struct Forward<'a> {
    out: &'a mut [f32],
    moments: &'a mut [[f32; 2]],
    operands: [&'a [f32]; 3],
}

impl Work for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let [x, scale, shift] = self.operands;
        let dim = scale.len();
        let rows = self.out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(self.moments);
        for ((out, x), moments) in rows {
            let mean = sum(dim, |k| x[k]) / dim as f32;
            let variance = sum(dim, |k| (x[k] - mean) * (x[k] - mean)) / dim as f32;
            let inverse = 1.0 / (variance + EPSILON).sqrt();
            *moments = [mean, inverse];
            for (((out, &x), &g), &b) in out.iter_mut().zip(x).zip(scale).zip(shift) {
                *out = multiply_add::<FMA>((x - mean) * inverse, g, b);
            }
        }
    }
}

/// Rows of the gradient of `x`.
struct OfRows<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    scale: &'a [f32],
    upstream: &'a [f32],
    moments: &'a [[f32; 2]],
}

impl Work for OfRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (scale, dim) = (self.scale, self.scale.len());
        let rows = self.out.chunks_exact_mut(dim).zip(self.x.chunks_exact(dim)).zip(self.upstream.chunks_exact(dim));
        for (((out, x), up), &[mean, inverse]) in rows.zip(self.moments) {
            let (x, up) = (&x[..dim], &up[..dim]);
            let plain = sum(dim, |k| up[k] * scale[k]) / dim as f32;
            let along = sum(dim, |k| up[k] * scale[k] * (x[k] - mean)) * inverse * inverse / dim as f32;
            for (k, out) in out.iter_mut().enumerate() {
                let centred = multiply_add::<FMA>(up[k], scale[k], -plain);
                *out = inverse * multiply_add::<FMA>(-along, x[k] - mean, centred);
            }
        }
    }
}

/// Adds rows to the gradients of scale and shift, one after the other in `sums`.
struct OfOthers<'a> {
    sums: &'a mut [f32],
    x: &'a [f32],
    upstream: &'a [f32],
    moments: &'a [[f32; 2]],
}

impl Work for OfOthers<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let dim = self.sums.len() / 2;
        let (scale, shift) = self.sums.split_at_mut(dim);
        let rows = self.x.chunks_exact(dim).zip(self.upstream.chunks_exact(dim)).zip(self.moments);
        for ((x, up), &[mean, inverse]) in rows {
            for (((g, b), &x), &up) in scale.iter_mut().zip(shift.iter_mut()).zip(x).zip(up) {
                *g = multiply_add::<FMA>(up, (x - mean) * inverse, *g);
                *b += up;
            }
        }
    }
}

impl Operation<3> for LayerNorm {
    /// Mean and inverse deviation of each row.
    type Saved = Vec<[f32; 2]>;

    fn plain<B: Backend>(&self, [x, scale, shift]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let (x, scale, shift) = (lift::<B, 2>(x), lift::<B, 1>(scale), lift::<B, 1>(shift));
        let centred = x.clone() - x.mean_dim(1);
        let variance = (centred.clone() * centred.clone()).mean_dim(1);
        let normal = centred / (variance + EPSILON).sqrt();
        lower(normal * scale.reshape([1, self.dim]) + shift.reshape([1, self.dim]))
    }

    fn shape(&self, [x, _, _]: [Shape; 3]) -> Shape {
        x
    }

    fn forward(&self, operands: [&[f32]; 3]) -> Vec<f32> {
        self.forward_saved(operands).0
    }

    fn forward_saved(&self, [x, scale, shift]: [&[f32]; 3]) -> (Vec<f32>, Vec<[f32; 2]>) {
        let (mut out, mut moments) = (vec![0f32; x.len()], vec![[0f32; 2]; x.len() / self.dim]);
        let blocks = out.par_chunks_mut(ROWS * self.dim).zip(moments.par_chunks_mut(ROWS));
        blocks.zip(x.par_chunks(ROWS * self.dim)).for_each(|((out, moments), x)| {
            widest(Forward { out, moments, operands: [x, scale, shift] });
        });
        (out, moments)
    }

    fn backward(&self, pass: Pass<'_, Self::Saved, 3>) -> [Vec<f32>; 3] {
        let ([x, scale, _], dim) = (pass.operands, self.dim);
        let mut dx = vec![0f32; x.len()];
        let blocks = dx.par_chunks_mut(ROWS * dim).zip(x.par_chunks(ROWS * dim));
        let blocks = blocks.zip(pass.upstream.par_chunks(ROWS * dim)).zip(pass.saved.par_chunks(ROWS));
        blocks.for_each(|(((out, x), upstream), moments)| widest(OfRows { out, x, scale, upstream, moments }));
        let mut d_scale = sum_over_rows(pass.saved.len(), |rows| {
            let mut sums = vec![0f32; 2 * dim];
            let numbers = rows.start * dim..rows.end * dim;
            let (x, upstream, moments) = (&x[numbers.clone()], &pass.upstream[numbers], &pass.saved[rows]);
            widest(OfOthers { sums: &mut sums, x, upstream, moments });
            sums
        });
        let d_shift = d_scale.split_off(dim);
        [dx, d_scale, d_shift]
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for (n, dim) in [(1, 1), (3, 7), (700, 64), (300, 50)] {
            let x: Vec<f32> = numbers(n * dim, 0.77).iter().map(|x| x * 3.0 + 1.0).collect();
            let (scale, shift) = ((numbers(dim, 0.3), vec![dim]), (numbers(dim, 1.3), vec![dim]));
            agree(&LayerNorm { dim }, [(x, vec![n, dim]), scale, shift]);
        }
    }

    #[test]
    fn a_row_of_equal_numbers_is_the_shift() {
        let norm = LayerNorm { dim: 3 };
        let out = norm.forward([&[5.0, 5.0, 5.0], &[1.0, 2.0, 3.0], &[0.1, 0.2, 0.3]]);
        assert_eq!(out, [0.1, 0.2, 0.3]);
    }
}
