//! Softmax cross-entropy of a linear layer: `[n, dim] x [classes, dim]` transposed, without keeping `[n, classes]`.
//!
//! In: states, a table of classes, the right class of each state. Out: a loss per state.
//!
//! On the CPU the loss and, when gradients are wanted, the gradients for an upstream gradient of 1 come out of
//! one pass over blocks of states, as in Liger's fused linear cross-entropy (arXiv 2410.10989). The usual upstream
//! gradient, the same for every state (a mean), only scales them. Where it differs from state to state
//! the pass is run again with it.

use std::sync::Arc;

use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Shape, Tensor, TensorData};

use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::linear_softmax::{Excluded, Gradients, LEFT_OUT, Layer, losses, losses_and_gradients};

/// `-ln softmax(states table' + bias)[target]` of each state.
///
/// `states [n, dim]`, `table [classes, dim]`, `bias [classes]`, `targets [n]` below `classes`; gives `[n]`. Gradients
/// flow to states, table and bias.
///
/// # Panics
/// When the shapes do not fit or a target is no class (our bug).
pub fn linear_cross_entropy<B: FusedBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    targets: &[u32],
) -> Tensor<B, 1> {
    linear_cross_entropy_excluding(states, table, bias, targets, None)
}

/// As [`linear_cross_entropy`] with some classes left out of each state's softmax; a target never is.
///
/// # Panics
/// When the shapes do not fit, or a target or class is none (our bug).
pub fn linear_cross_entropy_excluding<B: FusedBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    targets: &[u32],
    excluded: Option<Excluded>,
) -> Tensor<B, 1> {
    if let Some(excluded) = &excluded {
        let ([n, _], [classes, _]) = (states.dims(), table.dims());
        assert!(excluded.ranges.len() == n, "{n} states and {} lists of classes", excluded.ranges.len());
        assert!(excluded.classes.iter().all(|&c| (c as usize) < classes), "a class that is none of the {classes}");
    }
    let excluded = excluded.map(Arc::new);
    run(states, table, bias, LinearSoftmax { targets: targets.into(), weights: None, excluded, dim: 0, fixed: false })
}

/// The same times `weights [n]`, which are constants: `[n]`. On the CPU one pass is enough however the weights differ.
///
/// # Panics
/// When the shapes do not fit or a target is no class (our bug).
pub fn weighted_cross_entropy<B: FusedBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    targets: &[u32],
    weights: &[f32],
) -> Tensor<B, 1> {
    assert_eq!(weights.len(), targets.len(), "one weight per state is wanted");
    run(
        states,
        table,
        bias,
        LinearSoftmax { targets: targets.into(), weights: Some(weights.into()), excluded: None, dim: 0, fixed: false },
    )
}

/// As [`linear_cross_entropy`] without a bias and with a table that is not learned: no gradient flows to it, and on
/// the CPU none is computed.
///
/// # Panics
/// When the shapes do not fit or a target is no class (our bug).
pub fn fixed_cross_entropy<B: FusedBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    targets: &[u32],
) -> Tensor<B, 1> {
    let operation = LinearSoftmax { targets: targets.into(), weights: None, excluded: None, dim: 0, fixed: true };
    run(states, table.detach(), None, operation)
}

fn run<B: FusedBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    operation: LinearSoftmax,
) -> Tensor<B, 1> {
    let ([n, dim], [classes, width]) = (states.dims(), table.dims());
    let targets = &operation.targets;
    assert!(n == targets.len() && dim == width && dim > 0, "{n} states of {dim} and {} targets", targets.len());
    assert!(bias.as_ref().is_none_or(|b| b.dims()[0] == classes), "a bias that is not [{classes}]");
    assert!(targets.iter().all(|&t| (t as usize) < classes), "a target that is none of the {classes} classes");
    let operation = LinearSoftmax { dim, ..operation };
    lift(match bias {
        None => B::fused(operation, [lower(states), lower(table)]),
        Some(bias) => B::fused(operation, [lower(states), lower(table), lower(bias)]),
    })
}

/// The operation on states and table, or states, table and bias.
#[derive(Clone, Debug)]
struct LinearSoftmax {
    targets: Arc<[u32]>,
    /// Factors of the losses; 1 without.
    weights: Option<Arc<[f32]>>,
    /// Classes that are left out of a state's softmax, unless they are its target.
    excluded: Option<Arc<Excluded>>,
    dim: usize,
    /// Whether the table's gradient is not wanted.
    fixed: bool,
}

impl LinearSoftmax {
    fn in_burn<B: Backend>(
        &self,
        states: Tensor<B, 2>,
        table: Tensor<B, 2>,
        bias: Option<Tensor<B, 1>>,
    ) -> Tensor<B, 1> {
        let n = self.targets.len();
        let index: Vec<i32> = self.targets.iter().map(|&t| t as i32).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [n]), &states.device()).reshape([n, 1]);
        let mut logits = states.matmul(table.transpose());
        if let Some(bias) = bias {
            let classes = bias.dims()[0];
            logits = logits + bias.reshape([1, classes]);
        }
        if let Some(excluded) = &self.excluded {
            let [_, classes] = logits.dims();
            let mut out = vec![0f32; n * classes];
            for (row, out) in out.chunks_exact_mut(classes.max(1)).enumerate() {
                excluded.of(row).iter().for_each(|&class| out[class as usize] = LEFT_OUT);
                out[self.targets[row] as usize] = 0.0;
            }
            let device = logits.device();
            logits = logits + Tensor::from_data(TensorData::new(out, [n, classes]), &device);
        }
        let losses = log_softmax(logits, 1).gather(1, index).reshape([n]).neg();
        match &self.weights {
            None => losses,
            Some(weights) => {
                let weights = Tensor::<B, 1>::from_data(TensorData::new(weights.to_vec(), [n]), &losses.device());
                losses * weights
            }
        }
    }

    fn layer<'a>(&'a self, states: &'a [f32], table: &'a [f32], bias: Option<&'a [f32]>) -> Layer<'a> {
        Layer {
            states,
            table,
            bias,
            targets: &self.targets,
            excluded: self.excluded.as_deref(),
            dim: self.dim,
            fixed: self.fixed,
        }
    }

    fn weighted(&self, mut losses: Vec<f32>) -> Vec<f32> {
        if let Some(weights) = &self.weights {
            losses.iter_mut().zip(weights.iter()).for_each(|(loss, weight)| *loss *= weight);
        }
        losses
    }
}

/// Gradients for the upstream gradient `[n]` of losses that were weighted, given those for 1.
fn scaled(layer: Layer<'_>, weights: Option<&[f32]>, unit: Gradients, upstream: &[f32]) -> Gradients {
    let first = upstream.first().copied().unwrap_or(0.0);
    if upstream.iter().any(|w| *w != first) {
        return match weights {
            None => losses_and_gradients(layer, Some(upstream)).1,
            Some(weights) => {
                let both: Vec<f32> = weights.iter().zip(upstream).map(|(w, u)| w * u).collect();
                losses_and_gradients(layer, Some(&both)).1
            }
        };
    }
    let mut all = unit;
    for grad in [&mut all.states, &mut all.table, &mut all.bias] {
        grad.iter_mut().for_each(|x| *x *= first);
    }
    all
}

impl Operation<2> for LinearSoftmax {
    type Saved = Gradients;

    fn plain<B: Backend>(&self, [states, table]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        lower(self.in_burn::<B>(lift(states), lift(table), None))
    }

    fn shape(&self, _operands: [Shape; 2]) -> Shape {
        Shape::new([self.targets.len()])
    }

    fn forward(&self, [states, table]: [&[f32]; 2]) -> Vec<f32> {
        self.weighted(losses(self.layer(states, table, None)))
    }

    fn forward_saved(&self, [states, table]: [&[f32]; 2]) -> (Vec<f32>, Gradients) {
        let (losses, gradients) = losses_and_gradients(self.layer(states, table, None), self.weights.as_deref());
        (self.weighted(losses), gradients)
    }

    fn backward(&self, pass: Pass<'_, Gradients, 2>) -> [Vec<f32>; 2] {
        let [states, table] = pass.operands;
        let all = scaled(self.layer(states, table, None), self.weights.as_deref(), pass.saved, pass.upstream);
        [all.states, all.table]
    }
}

impl Operation<3> for LinearSoftmax {
    type Saved = Gradients;

    fn plain<B: Backend>(&self, [states, table, bias]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        lower(self.in_burn::<B>(lift(states), lift(table), Some(lift(bias))))
    }

    fn shape(&self, _operands: [Shape; 3]) -> Shape {
        Shape::new([self.targets.len()])
    }

    fn forward(&self, [states, table, bias]: [&[f32]; 3]) -> Vec<f32> {
        self.weighted(losses(self.layer(states, table, Some(bias))))
    }

    fn forward_saved(&self, [states, table, bias]: [&[f32]; 3]) -> (Vec<f32>, Gradients) {
        let (losses, gradients) = losses_and_gradients(self.layer(states, table, Some(bias)), self.weights.as_deref());
        (self.weighted(losses), gradients)
    }

    fn backward(&self, pass: Pass<'_, Gradients, 3>) -> [Vec<f32>; 3] {
        let [states, table, bias] = pass.operands;
        let all = scaled(self.layer(states, table, Some(bias)), self.weights.as_deref(), pass.saved, pass.upstream);
        [all.states, all.table, all.bias]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    type Ad = Autodiff<Flex>;

    struct Case {
        states: Vec<f32>,
        table: Vec<f32>,
        bias: Vec<f32>,
        targets: Vec<u32>,
        upstream: Vec<f32>,
        shape: [usize; 3],
    }

    fn case(shape: [usize; 3], size: f32, uniform: bool) -> Case {
        let [n, classes, dim] = shape;
        let mut rng = ChaCha8Rng::seed_from_u64(n as u64 + 3);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-size..size)).collect::<Vec<f32>>();
        let (states, table, bias) = (draw(n * dim), draw(classes * dim), draw(classes));
        let upstream = (0..n).map(|k| if uniform { 0.3 } else { (k as f32 * 0.9).sin() }).collect();
        let targets = (0..n).map(|_| rng.random_range(0..classes as u32)).collect();
        Case { states, table, bias, targets, upstream, shape }
    }

    /// Losses and gradients of states, table and bias.
    fn run(case: &Case, with_bias: bool, fused: bool) -> Vec<Vec<f32>> {
        run_excluding(case, with_bias, fused, None)
    }

    fn run_excluding(case: &Case, with_bias: bool, fused: bool, excluded: Option<Excluded>) -> Vec<Vec<f32>> {
        let [n, classes, dim] = case.shape;
        fn leaf<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<Ad, D> {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), &Default::default()).require_grad()
        }
        let (states, table) = (leaf(&case.states, [n, dim]), leaf(&case.table, [classes, dim]));
        let bias = with_bias.then(|| leaf(&case.bias, [classes]));
        let loss = match fused {
            true => {
                linear_cross_entropy_excluding(states.clone(), table.clone(), bias.clone(), &case.targets, excluded)
            }
            false => {
                let (targets, excluded) = (case.targets.as_slice().into(), excluded.map(Arc::new));
                let operation = LinearSoftmax { targets, weights: None, excluded, dim, fixed: false };
                operation.in_burn(states.clone(), table.clone(), bias.clone())
            }
        };
        let upstream = Tensor::from_data(TensorData::new(case.upstream.clone(), [n]), &Default::default());
        let grads = (loss.clone() * upstream).sum().backward();
        let mut all = vec![loss.into_data().to_vec().unwrap()];
        all.push(states.grad(&grads).unwrap().into_data().to_vec().unwrap());
        all.push(table.grad(&grads).unwrap().into_data().to_vec().unwrap());
        all.extend(bias.map(|b| b.grad(&grads).unwrap().into_data().to_vec().unwrap()));
        all
    }

    fn close(a: &[Vec<f32>], b: &[Vec<f32>]) {
        assert_eq!(a.len(), b.len());
        for (what, (a, b)) in a.iter().zip(b).enumerate() {
            assert_eq!(a.len(), b.len());
            let scale = b.iter().fold(0f32, |m, x| m.max(x.abs())).max(1e-3);
            for (n, (x, y)) in a.iter().zip(b).enumerate() {
                assert!((x - y).abs() <= 2e-5 * scale, "result {what}, element {n}: {x} is not {y}");
            }
        }
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for shape in [[1, 1, 1], [1, 7, 3], [5, 1, 4], [33, 40, 17], [300, 2100, 16], [130, 9, 64]] {
            for (with_bias, uniform) in [(false, true), (true, true), (false, false), (true, false)] {
                let case = case(shape, 1.0, uniform);
                close(&run(&case, with_bias, true), &run(&case, with_bias, false));
            }
        }
    }

    #[test]
    fn classes_that_are_left_out_get_no_probability_unless_they_are_the_target() {
        let case = case([130, 40, 9], 1.0, false);
        // Rows share lists of 0 to 6 classes; some of them are the row's target.
        let classes: Vec<u32> = (0..40).map(|n| n * 7 % 40).collect();
        let ranges = (0..130u32).map(|row| (row % 30, row % 30 + row % 7)).collect();
        let excluded = Excluded { classes, ranges };
        assert!((0..130).any(|row| excluded.of(row).contains(&case.targets[row])));
        let fused = run_excluding(&case, true, true, Some(excluded.clone()));
        close(&fused, &run_excluding(&case, true, false, Some(excluded)));
        let all = run(&case, true, true);
        assert!(fused[0].iter().zip(&all[0]).all(|(some, all)| some <= all));
        assert!(fused[0].iter().zip(&all[0]).any(|(some, all)| *some < 0.99 * all));
    }

    #[test]
    fn weights_scale_each_loss_and_its_gradients() {
        for (with_bias, uniform) in [(false, true), (true, false)] {
            let case = case([130, 40, 9], 1.0, uniform);
            let [n, classes, dim] = case.shape;
            let weights: Vec<f32> = (0..n).map(|k| (k % 5) as f32).collect();
            let run = |weighted: bool| {
                let states =
                    Tensor::<Ad, 2>::from_data(TensorData::new(case.states.clone(), [n, dim]), &Default::default());
                let table = Tensor::<Ad, 2>::from_data(
                    TensorData::new(case.table.clone(), [classes, dim]),
                    &Default::default(),
                );
                let (states, table) = (states.require_grad(), table.require_grad());
                let bias = with_bias
                    .then(|| Tensor::from_data(TensorData::new(case.bias.clone(), [classes]), &Default::default()));
                let factor =
                    |x: &[f32]| Tensor::<Ad, 1>::from_data(TensorData::new(x.to_vec(), [n]), &Default::default());
                let loss = match weighted {
                    true => weighted_cross_entropy(states.clone(), table.clone(), bias, &case.targets, &weights),
                    false => {
                        linear_cross_entropy(states.clone(), table.clone(), bias, &case.targets) * factor(&weights)
                    }
                };
                let grads = (loss.clone() * factor(&case.upstream)).sum().backward();
                let host = |t: Tensor<Flex, 2>| t.into_data().to_vec().unwrap();
                let (states, table) = (host(states.grad(&grads).unwrap()), host(table.grad(&grads).unwrap()));
                vec![loss.into_data().to_vec().unwrap(), states, table]
            };
            close(&run(true), &run(false));
        }
    }

    #[test]
    fn gradients_equal_finite_differences_in_double_precision() {
        let case = case([4, 6, 3], 1.0, false);
        let [n, classes, dim] = case.shape;
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let inputs = [wide(&case.states), wide(&case.table), wide(&case.bias)];
        let value = |x: &[Vec<f64>]| {
            let mut total = 0.0;
            for r in 0..n {
                let dot = |c: usize| (0..dim).map(|d| x[0][r * dim + d] * x[1][c * dim + d]).sum::<f64>() + x[2][c];
                let sum: f64 = (0..classes).map(|c| dot(c).exp()).sum();
                total += f64::from(case.upstream[r]) * (sum.ln() - dot(case.targets[r] as usize));
            }
            total
        };
        let got = run(&case, true, true);
        for which in 0..3 {
            for n in 0..inputs[which].len() {
                let (mut up, mut down) = (inputs.to_vec(), inputs.to_vec());
                up[which][n] += 1e-5;
                down[which][n] -= 1e-5;
                let want = (value(&up) - value(&down)) / 2e-5;
                let got = f64::from(got[which + 1][n]);
                assert!((got - want).abs() < 1e-5, "operand {which}, element {n}: {got} is not {want}");
            }
        }
    }

    #[test]
    fn large_logits_give_finite_losses_and_bad_ones_are_seen() {
        let large = case([20, 50, 8], 40.0, false);
        let got = run(&large, true, true);
        assert!(got.iter().flatten().all(|x| x.is_finite()));
        close(&got, &run(&large, true, false));
        let mut bad = case([20, 50, 8], 1.0, true);
        bad.states[9] = f32::NAN;
        assert!(run(&bad, false, true)[0][1].is_nan());
        bad.states[9] = f32::INFINITY;
        assert!(run(&bad, false, true)[0][1].is_nan());
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let case = case([700, 1000, 24], 1.0, false);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&case, true, true))
        };
        assert_eq!(with(1), with(5));
    }

    #[test]
    fn nothing_gives_nothing_and_without_gradients_the_losses_are_the_same() {
        let empty = case([0, 4, 2], 1.0, true);
        let got = run(&empty, true, true);
        assert!(got[0].is_empty() && got[2..].iter().flatten().all(|x| *x == 0.0));
        let case = case([50, 30, 8], 1.0, true);
        let losses = linear_cross_entropy::<Flex>(
            Tensor::from_data(TensorData::new(case.states.clone(), [50, 8]), &Default::default()),
            Tensor::from_data(TensorData::new(case.table.clone(), [30, 8]), &Default::default()),
            None,
            &case.targets,
        );
        assert_eq!(losses.into_data().to_vec::<f32>().unwrap(), run(&case, false, true)[0]);
    }
}
