//! A linear layer whose weight lies as in checkpoints, `[outputs, inputs]`, in one piece: `x weight' + bias`.
//!
//! In: rows, weight, a bias. Out: rows. Only the gradients that are wanted are computed: a frozen weight costs
//! nothing in the backward pass.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor, TensorMetadata};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower, sum_over_rows};
use super::gemm::multiply;

/// Rows of a unit of parallel work.
const ROWS: usize = 256;

/// `x [n, inputs] x weight [outputs, inputs]' + bias [outputs]`.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn project<B: FusedBackend>(x: Tensor<B, 2>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, 2> {
    let ([_, width], [outputs, inputs]) = (x.dims(), weight.dims());
    assert!(width == inputs && inputs > 0 && outputs > 0, "rows of {width} and a weight [{outputs}, {inputs}]");
    assert!(bias.as_ref().is_none_or(|b| b.dims()[0] == outputs), "a bias that is not [{outputs}]");
    let operation = Project { inputs, outputs };
    lift(match bias {
        None => B::fused(operation, [lower(x), lower(weight)]),
        Some(bias) => B::fused(operation, [lower(x), lower(weight), lower(bias)]),
    })
}

/// The operation on rows and weight, or rows, weight and bias.
#[derive(Clone, Debug)]
struct Project {
    inputs: usize,
    outputs: usize,
}

impl Project {
    fn product(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let Project { inputs, outputs } = *self;
        let mut out = vec![0f32; x.len() / inputs * outputs];
        out.par_chunks_mut(ROWS * outputs).zip(x.par_chunks(ROWS * inputs)).for_each(|(out, x)| {
            let rows = x.len() / inputs;
            multiply(out, [rows, outputs, inputs], (x, inputs, 1), (weight, 1, inputs), false);
            if let Some(bias) = bias {
                out.chunks_exact_mut(outputs).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
            }
        });
        out
    }

    /// Gradients of rows, weight and bias, as far as they are wanted.
    fn gradients(&self, [x, weight, upstream]: [&[f32]; 3], [of_rows, of_weight, of_bias]: [bool; 3]) -> [Vec<f32>; 3] {
        let Project { inputs, outputs } = *self;
        let n = x.len() / inputs;
        let mut dx = vec![0f32; if of_rows { x.len() } else { 0 }];
        dx.par_chunks_mut(ROWS * inputs).zip(upstream.par_chunks(ROWS * outputs)).for_each(|(dx, dy)| {
            let rows = dx.len() / inputs;
            multiply(dx, [rows, inputs, outputs], (dy, outputs, 1), (weight, inputs, 1), false);
        });
        // Threads take rows of the weight, so that no sum is split.
        let mut dw = vec![0f32; if of_weight { weight.len() } else { 0 }];
        let step = outputs.div_ceil(4).max(64);
        dw.par_chunks_mut(step * inputs).enumerate().for_each(|(part, dw)| {
            let dy = upstream.get(part * step..).unwrap_or_default();
            multiply(dw, [dw.len() / inputs, inputs, n], (dy, 1, outputs), (x, inputs, 1), false);
        });
        let db = match of_bias {
            false => Vec::new(),
            true => sum_over_rows(n, |rows| {
                let mut sums = vec![0f32; outputs];
                let dy = &upstream[rows.start * outputs..rows.end * outputs];
                dy.chunks_exact(outputs).for_each(|dy| sums.iter_mut().zip(dy).for_each(|(b, d)| *b += d));
                sums
            }),
        };
        [dx, dw, db]
    }
}

impl Operation<2> for Project {
    type Saved = ();

    fn plain<B: Backend>(&self, [x, weight]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        B::float_matmul(x, B::float_transpose(weight))
    }

    fn shape(&self, [x, weight]: [Shape; 2]) -> Shape {
        Shape::new([x[0], weight[0]])
    }

    fn forward(&self, [x, weight]: [&[f32]; 2]) -> Vec<f32> {
        self.product(x, weight, None)
    }

    fn forward_saved(&self, [x, weight]: [&[f32]; 2]) -> (Vec<f32>, ()) {
        (self.product(x, weight, None), ())
    }

    fn backward(&self, pass: Pass<'_, (), 2>) -> [Vec<f32>; 2] {
        let ([x, weight], [of_rows, of_weight]) = (pass.operands, pass.wanted);
        let [dx, dw, _] = self.gradients([x, weight, pass.upstream], [of_rows, of_weight, false]);
        [dx, dw]
    }
}

impl Operation<3> for Project {
    type Saved = ();

    fn plain<B: Backend>(&self, [x, weight, bias]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let outputs = bias.shape()[0];
        let product = B::float_matmul(x, B::float_transpose(weight));
        B::float_add(product, B::float_reshape(bias, Shape::new([1, outputs])))
    }

    fn shape(&self, [x, weight, _]: [Shape; 3]) -> Shape {
        Shape::new([x[0], weight[0]])
    }

    fn forward(&self, [x, weight, bias]: [&[f32]; 3]) -> Vec<f32> {
        self.product(x, weight, Some(bias))
    }

    fn forward_saved(&self, [x, weight, bias]: [&[f32]; 3]) -> (Vec<f32>, ()) {
        (self.product(x, weight, Some(bias)), ())
    }

    fn backward(&self, pass: Pass<'_, (), 3>) -> [Vec<f32>; 3] {
        let [x, weight, _] = pass.operands;
        self.gradients([x, weight, pass.upstream], pass.wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for (n, inputs, outputs) in [(1, 1, 1), (7, 5, 3), (600, 64, 133), (300, 20, 70)] {
            let project = Project { inputs, outputs };
            let x = (numbers(n * inputs, 0.7), vec![n, inputs]);
            let w = (numbers(inputs * outputs, 0.3), vec![outputs, inputs]);
            agree(&project, [x.clone(), w.clone()]);
            agree(&project, [x, w, (numbers(outputs, 1.9), vec![outputs])]);
        }
    }

    #[test]
    fn what_is_not_wanted_is_not_computed() {
        let project = Project { inputs: 2, outputs: 2 };
        let grads = project.gradients([&[1.0, 2.0], &[1.0, 0.0, 0.0, 1.0], &[3.0, 4.0]], [true, false, false]);
        assert_eq!(grads, [vec![3.0, 4.0], vec![], vec![]]);
        assert!(project.product(&[], &[0.0; 4], None).is_empty());
    }
}
