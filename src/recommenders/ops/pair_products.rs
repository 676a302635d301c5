//! A linear layer over all products of two rows' numbers, without keeping the products: what a compressed interaction
//! network is made of (arXiv 1803.05170, eq. 6).
//!
//! In: the first `a` columns of `left [rows, width]`, `right [rows, b]`, `weight [b * a, out]`. Out: `[rows, out]`,
//! `y[r, o] = sum over j, i of right[r, j] left[r, i] weight[j * a + i, o]`, with gradients for all three.
//!
//! On the CPU products are made for some rows at a time, small enough for the cache, multiplied with the weights at
//! once, and made again in the backward pass. Rows are cut into fixed blocks, which threads take; the weights' gradients
//! of the blocks are added in order, so that the number of threads changes no bit.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor, TensorMetadata};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::gemm::multiply;

/// `y[r, o] = sum over j, i < a of right[r, j] left[r, i] weight[j * a + i, o]`; see the module.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn pair_products<B: FusedBackend>(
    (left, a): (Tensor<B, 2>, usize),
    right: Tensor<B, 2>,
    weight: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let ([rows, width], [others, b], [products, out]) = (left.dims(), right.dims(), weight.dims());
    assert!(rows == others && a <= width, "{a} columns of [{rows}, {width}] and [{others}, {b}]");
    assert!(products == a * b && products > 0 && out > 0, "weights of {products} products of {a} and {b} numbers");
    lift(B::fused(PairProducts { width, a, b, out }, [lower(left), lower(right), lower(weight)]))
}

/// The operation on left, right and weight.
#[derive(Clone, Debug)]
struct PairProducts {
    width: usize,
    a: usize,
    b: usize,
    out: usize,
}

impl PairProducts {
    fn host<'a>(&self, [left, right, weight]: [&'a [f32]; 3]) -> Host<'a> {
        Host { left, right, weight, width: self.width, a: self.a, b: self.b, out: self.out }
    }
}

impl Operation<3> for PairProducts {
    type Saved = ();

    fn plain<B: Backend>(&self, [left, right, weight]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let rows = left.shape()[0];
        let left = lift::<B, 2>(left).slice([0..rows, 0..self.a]).reshape([rows, 1, self.a]);
        let right = lift::<B, 2>(right).reshape([rows, self.b, 1]);
        lower((right * left).reshape([rows, self.a * self.b]).matmul(lift(weight)))
    }

    fn shape(&self, [left, _, weight]: [Shape; 3]) -> Shape {
        Shape::new([left[0], weight[1]])
    }

    fn forward(&self, operands: [&[f32]; 3]) -> Vec<f32> {
        self.host(operands).forward()
    }

    fn forward_saved(&self, operands: [&[f32]; 3]) -> (Vec<f32>, ()) {
        (self.forward(operands), ())
    }

    fn backward(&self, pass: Pass<'_, (), 3>) -> [Vec<f32>; 3] {
        let (left, right, weight) = self.host(pass.operands).backward(pass.upstream);
        [left, right, weight]
    }
}

/// Rows that a thread takes at a time.
const BLOCK: usize = 4096;
/// Products that are held at a time: 1 MiB of them.
const HELD: usize = 1 << 18;

/// Host memory and sizes of the operands.
struct Host<'a> {
    left: &'a [f32],
    right: &'a [f32],
    weight: &'a [f32],
    width: usize,
    a: usize,
    b: usize,
    out: usize,
}

impl Host<'_> {
    /// Rows whose products are held at a time.
    fn tile(&self) -> usize {
        (HELD / (self.a * self.b).max(1)).clamp(16, BLOCK)
    }

    fn rows(&self) -> usize {
        self.left.len() / self.width
    }

    /// Products of `rows` into `out [rows, b * a]`.
    fn products(&self, rows: std::ops::Range<usize>, out: &mut [f32]) {
        for (r, out) in rows.zip(out.chunks_exact_mut(self.a * self.b)) {
            let left = &self.left[r * self.width..][..self.a];
            for (&y, out) in self.right[r * self.b..][..self.b].iter().zip(out.chunks_exact_mut(self.a)) {
                out.iter_mut().zip(left).for_each(|(o, x)| *o = y * x);
            }
        }
    }

    fn forward(&self) -> Vec<f32> {
        let (k, tile) = (self.a * self.b, self.tile());
        let mut y = vec![0f32; self.rows() * self.out];
        y.par_chunks_mut(BLOCK * self.out).enumerate().for_each(|(block, y)| {
            let mut held = vec![0f32; tile * k];
            for (n, y) in y.chunks_mut(tile * self.out).enumerate() {
                let (first, rows) = (block * BLOCK + n * tile, y.len() / self.out);
                self.products(first..first + rows, &mut held);
                multiply(y, [rows, self.out, k], (&held, k, 1), (self.weight, self.out, 1), false);
            }
        });
        y
    }

    /// Gradients of left, right and weight.
    fn backward(&self, upstream: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (b, width, k, tile) = (self.b, self.width, self.a * self.b, self.tile());
        let (mut left, mut right) = (vec![0f32; self.left.len()], vec![0f32; self.right.len()]);
        let blocks = left.par_chunks_mut(BLOCK * width).zip(right.par_chunks_mut(BLOCK * b)).enumerate();
        let weights: Vec<Vec<f32>> = blocks
            .map(|(block, (left, right))| {
                let mut held = vec![0f32; tile * k];
                let mut weight = vec![0f32; k * self.out];
                for (n, (left, right)) in left.chunks_mut(tile * width).zip(right.chunks_mut(tile * b)).enumerate() {
                    let (first, rows) = (block * BLOCK + n * tile, left.len() / width);
                    let flow = &upstream[first * self.out..][..rows * self.out];
                    self.products(first..first + rows, &mut held);
                    multiply(&mut weight, [k, self.out, rows], (&held, 1, k), (flow, self.out, 1), true);
                    multiply(&mut held, [rows, k, self.out], (flow, self.out, 1), (self.weight, 1, self.out), false);
                    self.split(first, &held, left, right);
                }
                weight
            })
            .collect();
        let mut weight = vec![0f32; k * self.out];
        for part in weights {
            weight.iter_mut().zip(part).for_each(|(w, p)| *w += p);
        }
        (left, right, weight)
    }

    /// Gradients of the products `[rows, b * a]` from row `first` on -> those of left and right.
    fn split(&self, first: usize, flow: &[f32], left: &mut [f32], right: &mut [f32]) {
        let (a, b, width) = (self.a, self.b, self.width);
        for (n, (left, right)) in left.chunks_exact_mut(width).zip(right.chunks_exact_mut(b)).enumerate() {
            let (x, y) = (&self.left[(first + n) * width..][..a], &self.right[(first + n) * b..][..b]);
            for ((flow, &y), right) in flow[n * a * b..].chunks_exact(a).zip(y).zip(right) {
                left.iter_mut().zip(flow).for_each(|(l, f)| *l += f * y);
                // Eight sums side by side, which fit a register.
                let (mut sums, eights) = ([0f32; 8], flow.chunks_exact(8).zip(x.chunks_exact(8)));
                for (f, x) in eights {
                    sums.iter_mut().zip(f.iter().zip(x)).for_each(|(s, (f, x))| *s += f * x);
                }
                let rest = a - a % 8;
                let rest: f32 = flow[rest..].iter().zip(&x[rest..]).map(|(f, x)| f * x).sum();
                *right = sums.iter().sum::<f32>() + rest;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        // Rows in several tiles and blocks, widths that are no multiple of eight.
        for [rows, width, a, b, out] in [[5, 3, 3, 2, 4], [4100, 71, 70, 5, 3], [1, 1, 1, 1, 1], [40, 18, 9, 9, 7]] {
            let left = (numbers(rows * width, 0.7), vec![rows, width]);
            let right = (numbers(rows * b, 0.3), vec![rows, b]);
            let weight = (numbers(a * b * out, 1.9), vec![a * b, out]);
            agree(&PairProducts { width, a, b, out }, [left, right, weight]);
        }
        let nothing = PairProducts { width: 2, a: 2, b: 3, out: 4 };
        assert!(nothing.forward([&[], &[], &[0.5; 24]]).is_empty());
    }
}
