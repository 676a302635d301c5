//! Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) in one piece: halves of each head are rotated, as
//! transformers does it.
//!
//! In: rows of heads and the angles of each row. Out: rows.

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor, TensorData};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower};

/// Cosines and sines of each row, `[n, size / 2]` each.
#[derive(Clone, Debug)]
pub struct Angles {
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    half: usize,
}

impl Angles {
    /// The angles `position * frequency`, both of the product in f32, as the reference computes them.
    pub fn new(positions: &[u32], frequencies: &[f32]) -> Self {
        let all: Vec<f32> = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f32 * f)).collect();
        let table = |f: fn(f64) -> f64| all.iter().map(|&a| f(f64::from(a)) as f32).collect();
        Angles { cos: table(f64::cos), sin: table(f64::sin), half: frequencies.len() }
    }
}

/// Rotates the halves of each head: `(a, b)` becomes `(a cos - b sin, b cos + a sin)`; `x [n, heads * size]`.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn rotary<B: FusedBackend>(x: Tensor<B, 2>, angles: &Angles) -> Tensor<B, 2> {
    let [n, dim] = x.dims();
    let half = angles.half;
    assert!(half > 0 && dim.is_multiple_of(2 * half) && angles.cos.len() == n * half, "angles of other rows or heads");
    lift(B::fused(Rotary { angles: angles.clone(), dim }, [lower(x)]))
}

#[derive(Clone, Debug)]
struct Rotary {
    angles: Angles,
    dim: usize,
}

impl Rotary {
    /// Turns by the angles times `sign`.
    fn turned(&self, x: &[f32], sign: f32) -> Vec<f32> {
        let (dim, half) = (self.dim, self.angles.half);
        let mut out = vec![0f32; x.len()];
        let angles = self.angles.cos.par_chunks(half).zip(self.angles.sin.par_chunks(half));
        let rows = out.par_chunks_mut(dim).zip(x.par_chunks(dim)).zip(angles);
        rows.with_min_len(32).for_each(|((out, x), (cos, sin))| {
            for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                let ((first, second), (a, b)) = (out.split_at_mut(half), x.split_at(half));
                for k in 0..half {
                    let s = sign * sin[k];
                    first[k] = a[k] * cos[k] - b[k] * s;
                    second[k] = b[k] * cos[k] + a[k] * s;
                }
            }
        });
        out
    }
}

impl Operation<1> for Rotary {
    type Saved = ();

    fn plain<B: Backend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let x = lift::<B, 2>(x);
        let ([n, dim], half, device) = (x.dims(), self.angles.half, x.device());
        let table = |values: &[f32]| {
            Tensor::<B, 3>::from_data(TensorData::new(values.to_vec(), [n, 1, half]), &device).cast(x.dtype())
        };
        let (cos, sin) = (table(&self.angles.cos), table(&self.angles.sin));
        let heads = x.reshape([n, dim / (2 * half), 2 * half]);
        let (a, b) = (heads.clone().narrow(2, 0, half), heads.narrow(2, half, half));
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        lower(Tensor::cat(vec![first, second], 2).reshape([n, dim]))
    }

    fn shape(&self, [x]: [Shape; 1]) -> Shape {
        x
    }

    fn forward(&self, [x]: [&[f32]; 1]) -> Vec<f32> {
        self.turned(x, 1.0)
    }

    fn forward_saved(&self, [x]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        (self.turned(x, 1.0), ())
    }

    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        [self.turned(pass.upstream, -1.0)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for (n, heads, half) in [(1, 1, 1), (5, 3, 4), (70, 2, 8)] {
            let positions: Vec<u32> = (0..n as u32).map(|p| p % 13).collect();
            let angles = Angles::new(&positions, &numbers(half, 0.4));
            let dim = heads * 2 * half;
            agree(&Rotary { angles, dim }, [(numbers(n * dim, 0.77), vec![n, dim])]);
        }
    }
}
