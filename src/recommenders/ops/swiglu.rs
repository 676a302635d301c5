//! The gated unit of Llama's feed-forward block (Shazeer 2020, arXiv 2002.05202): `silu(gate) * up` in one piece.
//!
//! In: two tensors of one shape. Out: one of that shape.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor};
use rayon::prelude::*;

use super::exp::exp;
use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::widest::{Work, multiply_add, widest};

/// `gate * sigmoid(gate) * up` of every number.
///
/// # Panics
/// When the shapes differ (our bug).
pub fn swiglu<B: FusedBackend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    assert_eq!(gate.dims(), up.dims(), "a gate of another shape than what it lets through");
    lift(B::fused(SwiGlu, [lower(gate), lower(up)]))
}

#[derive(Clone, Debug)]
struct SwiGlu;

/// Numbers of a unit of parallel work.
const CHUNK: usize = 1 << 14;

#[inline(always)]
fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    // Of the smaller exponential, which can't overflow.
    let e = exp::<FMA>(-x.abs());
    let s = 1.0 / (1.0 + e);
    if x < 0.0 { e * s } else { s }
}

/// Result, gate, up.
struct Forward<'a>(&'a mut [f32], &'a [f32], &'a [f32]);

impl Work for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for ((out, &g), &u) in self.0.iter_mut().zip(self.1).zip(self.2) {
            *out = g * sigmoid::<FMA>(g) * u;
        }
    }
}

/// Gradients of gate and up; gate, up, upstream gradient.
struct Backward<'a>([&'a mut [f32]; 2], [&'a [f32]; 3]);

impl Work for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let ([d_gate, d_up], [gate, up, upstream]) = (self.0, self.1);
        let rows = d_gate.iter_mut().zip(d_up.iter_mut()).zip(gate).zip(up).zip(upstream);
        for ((((d_gate, d_up), &g), &u), &d) in rows {
            let s = sigmoid::<FMA>(g);
            let silu = g * s;
            *d_up = d * silu;
            *d_gate = d * u * multiply_add::<FMA>(silu, 1.0 - s, s);
        }
    }
}

impl Operation<2> for SwiGlu {
    type Saved = ();

    fn plain<B: Backend>(&self, [gate, up]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        let gate = lift::<B, 2>(gate);
        lower(burn::tensor::activation::silu(gate) * lift(up))
    }

    fn shape(&self, [gate, _]: [Shape; 2]) -> Shape {
        gate
    }

    fn forward(&self, [gate, up]: [&[f32]; 2]) -> Vec<f32> {
        let mut out = vec![0f32; gate.len()];
        let chunks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
        chunks.for_each(|((out, gate), up)| widest(Forward(out, gate, up)));
        out
    }

    fn forward_saved(&self, operands: [&[f32]; 2]) -> (Vec<f32>, ()) {
        (self.forward(operands), ())
    }

    fn backward(&self, pass: Pass<'_, (), 2>) -> [Vec<f32>; 2] {
        let [gate, up] = pass.operands;
        let (mut d_gate, mut d_up) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
        let chunks = d_gate.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK)).zip(gate.par_chunks(CHUNK));
        let chunks = chunks.zip(up.par_chunks(CHUNK)).zip(pass.upstream.par_chunks(CHUNK));
        chunks.for_each(|((((d_gate, d_up), gate), up), upstream)| {
            widest(Backward([d_gate, d_up], [gate, up, upstream]));
        });
        [d_gate, d_up]
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for (n, dim) in [(1, 1), (5, 7), (700, 50)] {
            let gate: Vec<f32> = numbers(n * dim, 0.77).iter().map(|x| x * 6.0).collect();
            agree(&SwiGlu, [(gate, vec![n, dim]), (numbers(n * dim, 0.3), vec![n, dim])]);
        }
    }

    #[test]
    fn far_gates_are_open_or_shut() {
        let out = SwiGlu.forward([&[200.0, -200.0, 0.0], &[1.5, 1.5, 1.5]]);
        assert!(out[0] == 300.0 && out[1].abs() < 1e-30 && out[2] == 0.0, "{out:?}");
    }
}
