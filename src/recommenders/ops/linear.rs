//! A linear layer in one piece: `x w + bias`.
//!
//! In: rows, weights, a bias. Out: rows.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor, TensorMetadata};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower, sum_over_rows};
use super::gemm::multiply;

/// Rows of a unit of parallel work.
const ROWS: usize = 256;

/// `x [n, inputs] x weight [inputs, outputs] + bias [outputs]`.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn linear<B: FusedBackend>(x: Tensor<B, 2>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, 2> {
    let ([_, inputs], [rows, outputs]) = (x.dims(), weight.dims());
    assert!(inputs == rows && inputs > 0, "rows of {inputs} numbers and a weight [{rows}, {outputs}]");
    assert!(bias.as_ref().is_none_or(|b| b.dims()[0] == outputs), "a bias that is not [{outputs}]");
    let operation = Linear { inputs, outputs };
    lift(match bias {
        None => B::fused(operation, [lower(x), lower(weight)]),
        Some(bias) => B::fused(operation, [lower(x), lower(weight), lower(bias)]),
    })
}

/// The operation on rows and weight, or rows, weight and bias.
#[derive(Clone, Debug)]
struct Linear {
    inputs: usize,
    outputs: usize,
}

impl Linear {
    fn product(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let Linear { inputs, outputs } = *self;
        let mut out = vec![0f32; x.len() / inputs * outputs];
        if out.is_empty() {
            return out;
        }
        out.par_chunks_mut(ROWS * outputs).zip(x.par_chunks(ROWS * inputs)).for_each(|(out, x)| {
            let rows = x.len() / inputs;
            multiply(out, [rows, outputs, inputs], (x, inputs, 1), (weight, outputs, 1), false);
            if let Some(bias) = bias {
                out.chunks_exact_mut(outputs).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
            }
        });
        out
    }

    /// Gradients of rows, weight and bias.
    fn gradients(&self, x: &[f32], weight: &[f32], upstream: &[f32], [rows, others]: [bool; 2]) -> [Vec<f32>; 3] {
        let Linear { inputs, outputs } = *self;
        let mut dx = vec![0f32; if rows { x.len() } else { 0 }];
        dx.par_chunks_mut(ROWS * inputs).zip(upstream.par_chunks((ROWS * outputs).max(1))).for_each(|(dx, dy)| {
            let rows = dx.len() / inputs;
            multiply(dx, [rows, inputs, outputs], (dy, outputs, 1), (weight, 1, outputs), false);
        });
        if !others {
            return [dx, Vec::new(), Vec::new()];
        }
        // The bias's gradient is the weight's for one more input that is always 1.
        let mut all = sum_over_rows(x.len() / inputs, |rows| {
            let mut sums = vec![0f32; (inputs + 1) * outputs];
            let (x, dy) =
                (&x[rows.start * inputs..rows.end * inputs], &upstream[rows.start * outputs..rows.end * outputs]);
            let (weight, bias) = sums.split_at_mut(inputs * outputs);
            multiply(weight, [inputs, outputs, rows.len()], (x, 1, inputs), (dy, outputs, 1), false);
            dy.chunks_exact(outputs.max(1)).for_each(|dy| bias.iter_mut().zip(dy).for_each(|(b, d)| *b += d));
            sums
        });
        let bias = all.split_off(inputs * outputs);
        [dx, all, bias]
    }
}

impl Operation<2> for Linear {
    type Saved = ();

    fn plain<B: Backend>(&self, [x, weight]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        B::float_matmul(x, weight)
    }

    fn shape(&self, [x, weight]: [Shape; 2]) -> Shape {
        Shape::new([x[0], weight[1]])
    }

    fn forward(&self, [x, weight]: [&[f32]; 2]) -> Vec<f32> {
        self.product(x, weight, None)
    }

    fn forward_saved(&self, [x, weight]: [&[f32]; 2]) -> (Vec<f32>, ()) {
        (self.product(x, weight, None), ())
    }

    fn backward(&self, pass: Pass<'_, (), 2>) -> [Vec<f32>; 2] {
        let [x, weight] = pass.operands;
        let [dx, dw, _] = self.gradients(x, weight, pass.upstream, pass.wanted);
        [dx, dw]
    }
}

impl Operation<3> for Linear {
    type Saved = ();

    fn plain<B: Backend>(&self, [x, weight, bias]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let outputs = bias.shape()[0];
        B::float_add(B::float_matmul(x, weight), B::float_reshape(bias, Shape::new([1, outputs])))
    }

    fn shape(&self, [x, weight, _]: [Shape; 3]) -> Shape {
        Shape::new([x[0], weight[1]])
    }

    fn forward(&self, [x, weight, bias]: [&[f32]; 3]) -> Vec<f32> {
        self.product(x, weight, Some(bias))
    }

    fn forward_saved(&self, [x, weight, bias]: [&[f32]; 3]) -> (Vec<f32>, ()) {
        (self.product(x, weight, Some(bias)), ())
    }

    fn backward(&self, pass: Pass<'_, (), 3>) -> [Vec<f32>; 3] {
        let [x, weight, _] = pass.operands;
        let [rows, of_weight, of_bias] = pass.wanted;
        self.gradients(x, weight, pass.upstream, [rows, of_weight || of_bias])
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for (n, inputs, outputs) in [(1, 1, 1), (7, 5, 3), (600, 64, 33), (1100, 20, 70), (0, 3, 4)] {
            let linear = Linear { inputs, outputs };
            let (x, w) =
                ((numbers(n * inputs, 0.7), vec![n, inputs]), (numbers(inputs * outputs, 0.3), vec![inputs, outputs]));
            let bias = (numbers(outputs, 1.9), vec![outputs]);
            if n > 0 {
                agree(&linear, [x.clone(), w.clone()]);
                agree(&linear, [x, w, bias]);
            } else {
                assert!(Operation::<2>::forward(&linear, [&x.0, &w.0]).is_empty());
                let grads = linear.gradients(&[], &w.0, &[], [true, true]);
                assert!(grads[0].is_empty() && grads[1].iter().all(|x| *x == 0.0));
            }
        }
    }
}
