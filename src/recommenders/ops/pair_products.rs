//! A linear layer over all products of two rows' numbers, without keeping the products: what a compressed interaction
//! network is made of (arXiv 1803.05170, eq. 6).
//!
//! In: `left [rows, a]`, `right [rows, b]`, `weight [b * a, out]`. Out: `[rows, out]`,
//! `y[r, o] = sum over j, i of right[r, j] left[r, i] weight[j * a + i, o]`, with gradients for all three.
//!
//! On the CPU products are made for some rows at a time, small enough for the cache, multiplied with the weights at
//! once, and made again in the backward pass. Rows are cut into fixed blocks, which threads take; the weights' gradients
//! of the blocks are added in order, so that the number of threads changes no bit.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use rayon::prelude::*;

use super::linear_softmax::multiply;

/// The operands; cheap to clone.
#[derive(Clone, Debug)]
pub struct PairProducts<B: Backend> {
    /// `[rows, a]`.
    pub left: Tensor<B, 2>,
    /// `[rows, b]`.
    pub right: Tensor<B, 2>,
    /// `[b * a, out]`.
    pub weight: Tensor<B, 2>,
}

/// A back end that has the operation.
pub trait PairProductsBackend: Backend {
    /// See [`pair_products`].
    fn pair_products(x: PairProducts<Self>) -> Tensor<Self, 2> {
        products(&x).matmul(x.weight)
    }

    /// Gradients of the operands for an upstream gradient `[rows, out]`.
    fn pair_products_gradients(x: PairProducts<Self>, upstream: Tensor<Self, 2>) -> PairProducts<Self> {
        let ([rows, a], [_, b]) = (x.left.dims(), x.right.dims());
        let weight = products(&x).transpose().matmul(upstream.clone());
        let flow = upstream.matmul(x.weight.transpose()).reshape([rows, b, a]);
        let left = (flow.clone() * x.right.reshape([rows, b, 1])).sum_dim(1).reshape([rows, a]);
        let right = (flow * x.left.reshape([rows, 1, a])).sum_dim(2).reshape([rows, b]);
        PairProducts { left, right, weight }
    }
}

/// `y[r, o] = sum over j, i of right[r, j] left[r, i] weight[j * a + i, o]`; see the module.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn pair_products<B: PairProductsBackend>(
    left: Tensor<B, 2>,
    right: Tensor<B, 2>,
    weight: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let ([rows, a], [others, b], [products, _]) = (left.dims(), right.dims(), weight.dims());
    assert!(rows == others && products == a * b, "[{rows}, {a}], [{others}, {b}] and weights of {products} products");
    B::pair_products(PairProducts { left, right, weight })
}

/// `[rows, b * a]`.
fn products<B: Backend>(x: &PairProducts<B>) -> Tensor<B, 2> {
    let ([rows, a], [_, b]) = (x.left.dims(), x.right.dims());
    (x.right.clone().reshape([rows, b, 1]) * x.left.clone().reshape([rows, 1, a])).reshape([rows, b * a])
}

#[cfg(feature = "cuda")]
impl PairProductsBackend for burn::backend::Cuda {}

/// Rows that a thread takes at a time.
const BLOCK: usize = 4096;
/// Products that are held at a time: 1 MiB of them.
const HELD: usize = 1 << 18;

/// Host memory and sizes of the operands.
struct Host<'a> {
    left: &'a [f32],
    right: &'a [f32],
    weight: &'a [f32],
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
        self.left.len() / self.a.max(1)
    }

    /// Products of `rows` into `out [rows, b * a]`.
    fn products(&self, rows: std::ops::Range<usize>, out: &mut [f32]) {
        for (r, out) in rows.zip(out.chunks_exact_mut(self.a * self.b)) {
            let left = &self.left[r * self.a..][..self.a];
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
        let (a, b, k, tile) = (self.a, self.b, self.a * self.b, self.tile());
        let (mut left, mut right) = (vec![0f32; self.left.len()], vec![0f32; self.right.len()]);
        let blocks = left.par_chunks_mut(BLOCK * a).zip(right.par_chunks_mut(BLOCK * b)).enumerate();
        let weights: Vec<Vec<f32>> = blocks
            .map(|(block, (left, right))| {
                let mut held = vec![0f32; tile * k];
                let mut weight = vec![0f32; k * self.out];
                for (n, (left, right)) in left.chunks_mut(tile * a).zip(right.chunks_mut(tile * b)).enumerate() {
                    let (first, rows) = (block * BLOCK + n * tile, left.len() / a);
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
        let (a, b) = (self.a, self.b);
        for (n, (left, right)) in left.chunks_exact_mut(a).zip(right.chunks_exact_mut(b)).enumerate() {
            let (x, y) = (&self.left[(first + n) * a..][..a], &self.right[(first + n) * b..][..b]);
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

fn on_host<T>(x: &PairProducts<Flex>, run: impl FnOnce(Host<'_>) -> T) -> T {
    let contiguous = |t: &Tensor<Flex, 2>| t.clone().into_primitive().tensor().to_contiguous(); // copies only what is not
    let (left, right, weight) = (contiguous(&x.left), contiguous(&x.right), contiguous(&x.weight));
    let (a, b, out) = (x.left.dims()[1], x.right.dims()[1], x.weight.dims()[1]);
    run(Host { left: left.storage(), right: right.storage(), weight: weight.storage(), a, b, out })
}

fn tensor(values: Vec<f32>, shape: [usize; 2]) -> Tensor<Flex, 2> {
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

impl PairProductsBackend for Flex {
    fn pair_products(x: PairProducts<Self>) -> Tensor<Self, 2> {
        tensor(on_host(&x, |x| x.forward()), [x.left.dims()[0], x.weight.dims()[1]])
    }

    fn pair_products_gradients(x: PairProducts<Self>, upstream: Tensor<Self, 2>) -> PairProducts<Self> {
        let upstream = upstream.into_primitive().tensor().to_contiguous();
        let (left, right, weight) = on_host(&x, |x| x.backward(upstream.storage()));
        PairProducts {
            left: tensor(left, x.left.dims()),
            right: tensor(right, x.right.dims()),
            weight: tensor(weight, x.weight.dims()),
        }
    }
}

/// The gradient rule, with the operands.
#[derive(Debug)]
struct Rule;

impl<B: PairProductsBackend> Backward<B, 3> for Rule {
    type State = PairProducts<B>;

    fn backward(self, ops: Ops<PairProducts<B>, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = Tensor::from_primitive(TensorPrimitive::Float(grads.consume::<B>(&ops.node)));
        let flow = B::pair_products_gradients(ops.state, upstream);
        for (parent, grad) in ops.parents.into_iter().zip([flow.left, flow.right, flow.weight]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad.into_primitive().tensor());
            }
        }
    }
}

impl<B: PairProductsBackend, C: CheckpointStrategy> PairProductsBackend for Autodiff<B, C> {
    fn pair_products(x: PairProducts<Self>) -> Tensor<Self, 2> {
        let [left, right, weight] = [x.left, x.right, x.weight].map(|t| t.into_primitive().tensor());
        let inner = |t: &burn::tensor::ops::FloatTensor<Self>| {
            Tensor::from_primitive(TensorPrimitive::Float(t.primitive.clone()))
        };
        let state = PairProducts::<B> { left: inner(&left), right: inner(&right), weight: inner(&weight) };
        let y = B::pair_products(state.clone()).into_primitive().tensor();
        let prepared = Backward::<B, 3>::prepare::<C>(Rule, [left.node, right.node, weight.node]);
        let y = match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(state, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        };
        Tensor::from_primitive(TensorPrimitive::Float(y))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Ad = Autodiff<Flex>;

    fn values(n: usize, from: usize) -> Vec<f32> {
        (0..n).map(|k| ((k + from) as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_product() {
        // Rows in several tiles and blocks, widths that are no multiple of eight.
        for [rows, a, b, out] in [[5, 3, 2, 4], [4100, 70, 5, 3], [1, 1, 1, 1], [40, 9, 9, 7], [0, 3, 2, 4]] {
            let device = Default::default();
            let leaf = |n: [usize; 2], from: usize| {
                let data = TensorData::new(values(n[0] * n[1], from), n);
                Tensor::<Ad, 2>::from_data(data, &device).require_grad()
            };
            let flow = Tensor::<Ad, 2>::from_data(TensorData::new(values(rows * out, 5), [rows, out]), &device);
            let run = |fused: bool| {
                let x =
                    PairProducts { left: leaf([rows, a], 1), right: leaf([rows, b], 2), weight: leaf([a * b, out], 3) };
                let y = match fused {
                    true => pair_products(x.left.clone(), x.right.clone(), x.weight.clone()),
                    false => products(&x).matmul(x.weight.clone()),
                };
                let grads = (y.clone() * flow.clone()).sum().backward();
                let mut all: Vec<Vec<f32>> = vec![y.into_data().to_vec().unwrap()];
                all.extend([x.left, x.right, x.weight].map(|t| t.grad(&grads).unwrap().into_data().to_vec().unwrap()));
                all
            };
            for (part, (got, want)) in run(true).iter().zip(&run(false)).enumerate() {
                let largest = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                assert_eq!(got.len(), want.len());
                for (g, w) in got.iter().zip(want) {
                    assert!((g - w).abs() <= 1e-4 * largest, "[{rows}, {a}, {b}, {out}] part {part}: {g} is not {w}");
                }
            }
        }
    }

    #[test]
    fn the_way_of_other_back_ends_gives_the_same_gradients() {
        let device = Default::default();
        let leaf = |n: [usize; 2], from: usize| {
            Tensor::<Flex, 2>::from_data(TensorData::new(values(n[0] * n[1], from), n), &device)
        };
        let x = PairProducts { left: leaf([6, 5], 1), right: leaf([6, 3], 2), weight: leaf([15, 4], 3) };
        let flow = leaf([6, 4], 9);
        let fused = Flex::pair_products_gradients(x.clone(), flow.clone());
        let ([rows, a], b) = ([6, 5], 3);
        let weight = products(&x).transpose().matmul(flow.clone());
        let through = flow.matmul(x.weight.transpose()).reshape([rows, b, a]);
        let left = (through.clone() * x.right.reshape([rows, b, 1])).sum_dim(1).reshape([rows, a]);
        let right = (through * x.left.reshape([rows, 1, a])).sum_dim(2).reshape([rows, b]);
        for (got, want) in [(fused.left, left), (fused.right, right), (fused.weight, weight)] {
            let difference: f32 = (got - want).abs().max().into_scalar();
            assert!(difference < 1e-5, "{difference}");
        }
    }
}
