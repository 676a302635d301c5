//! Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467) in one piece.
//!
//! In: rows, scale. Out: rows.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower, sum_over_rows};
use super::layer_norm::sum;
use super::widest::{Work, multiply_add, widest};

/// `x / sqrt(mean(x^2) + epsilon) * scale` of each row; `x [n, dim]`, `scale [dim]`.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn rms_norm<B: FusedBackend>(x: Tensor<B, 2>, scale: Tensor<B, 1>, epsilon: f32) -> Tensor<B, 2> {
    let dim = x.dims()[1];
    assert!(dim > 0 && scale.dims()[0] == dim, "a scale that is not [{dim}]");
    lift(B::fused(RmsNorm { dim, epsilon }, [lower(x), lower(scale)]))
}

#[derive(Clone, Debug)]
struct RmsNorm {
    dim: usize,
    epsilon: f32,
}

/// Rows of a unit of parallel work.
const ROWS: usize = 64;

/// Rows of the result and `1 / root` of each.
struct Forward<'a> {
    out: &'a mut [f32],
    inverses: &'a mut [f32],
    x: &'a [f32],
    scale: &'a [f32],
    epsilon: f32,
}

impl Work for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let dim = self.scale.len();
        let rows = self.out.chunks_exact_mut(dim).zip(self.x.chunks_exact(dim)).zip(self.inverses);
        for ((out, x), inverse) in rows {
            let r = 1.0 / (sum(dim, |k| x[k] * x[k]) / dim as f32 + self.epsilon).sqrt();
            *inverse = r;
            for ((out, &x), &g) in out.iter_mut().zip(x).zip(self.scale) {
                *out = x * r * g;
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
    inverses: &'a [f32],
}

impl Work for OfRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (scale, dim) = (self.scale, self.scale.len());
        let rows = self.out.chunks_exact_mut(dim).zip(self.x.chunks_exact(dim)).zip(self.upstream.chunks_exact(dim));
        for (((out, x), up), &r) in rows.zip(self.inverses) {
            let (x, up) = (&x[..dim], &up[..dim]);
            let along = sum(dim, |k| up[k] * scale[k] * x[k]) * r * r / dim as f32;
            for (k, out) in out.iter_mut().enumerate() {
                *out = r * multiply_add::<FMA>(-along, x[k], up[k] * scale[k]);
            }
        }
    }
}

/// Adds rows to the gradient of the scale.
struct OfScale<'a> {
    sums: &'a mut [f32],
    x: &'a [f32],
    upstream: &'a [f32],
    inverses: &'a [f32],
}

impl Work for OfScale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let dim = self.sums.len();
        for ((x, up), &r) in self.x.chunks_exact(dim).zip(self.upstream.chunks_exact(dim)).zip(self.inverses) {
            for ((g, &x), &up) in self.sums.iter_mut().zip(x).zip(up) {
                *g = multiply_add::<FMA>(up, x * r, *g);
            }
        }
    }
}

impl Operation<2> for RmsNorm {
    /// `1 / root` of each row.
    type Saved = Vec<f32>;

    fn plain<B: Backend>(&self, [x, scale]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        let (x, scale) = (lift::<B, 2>(x), lift::<B, 1>(scale));
        let root = (x.clone() * x.clone()).mean_dim(1).add_scalar(self.epsilon).sqrt();
        lower(x / root * scale.reshape([1, self.dim]))
    }

    fn shape(&self, [x, _]: [Shape; 2]) -> Shape {
        x
    }

    fn forward(&self, operands: [&[f32]; 2]) -> Vec<f32> {
        self.forward_saved(operands).0
    }

    fn forward_saved(&self, [x, scale]: [&[f32]; 2]) -> (Vec<f32>, Vec<f32>) {
        let (dim, epsilon) = (self.dim, self.epsilon);
        let (mut out, mut inverses) = (vec![0f32; x.len()], vec![0f32; x.len() / dim]);
        let blocks = out.par_chunks_mut(ROWS * dim).zip(inverses.par_chunks_mut(ROWS)).zip(x.par_chunks(ROWS * dim));
        blocks.for_each(|((out, inverses), x)| widest(Forward { out, inverses, x, scale, epsilon }));
        (out, inverses)
    }

    fn backward(&self, pass: Pass<'_, Self::Saved, 2>) -> [Vec<f32>; 2] {
        let ([x, scale], dim, [rows, of_scale]) = (pass.operands, self.dim, pass.wanted);
        let mut dx = vec![0f32; if rows { x.len() } else { 0 }];
        let blocks = dx.par_chunks_mut(ROWS * dim).zip(x.par_chunks(ROWS * dim));
        let blocks = blocks.zip(pass.upstream.par_chunks(ROWS * dim)).zip(pass.saved.par_chunks(ROWS));
        blocks.for_each(|(((out, x), upstream), inverses)| widest(OfRows { out, x, scale, upstream, inverses }));
        if !of_scale {
            return [dx, Vec::new()];
        }
        let d_scale = sum_over_rows(pass.saved.len(), |rows| {
            let mut sums = vec![0f32; dim];
            let numbers = rows.start * dim..rows.end * dim;
            let (x, upstream, inverses) = (&x[numbers.clone()], &pass.upstream[numbers], &pass.saved[rows]);
            widest(OfScale { sums: &mut sums, x, upstream, inverses });
            sums
        });
        [dx, d_scale]
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for (n, dim) in [(1, 1), (3, 7), (700, 64), (300, 50)] {
            let x: Vec<f32> = numbers(n * dim, 0.77).iter().map(|x| x * 3.0 + 0.2).collect();
            agree(&RmsNorm { dim, epsilon: 1e-5 }, [(x, vec![n, dim]), (numbers(dim, 0.3), vec![dim])]);
        }
    }

    #[test]
    fn a_row_of_equal_numbers_is_the_scale() {
        let norm = RmsNorm { dim: 3, epsilon: 0.0 };
        assert_eq!(norm.forward([&[4.0, 4.0, 4.0], &[1.0, 2.0, 3.0]]), [1.0, 2.0, 3.0]);
    }
}
