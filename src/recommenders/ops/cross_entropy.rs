//! Softmax cross-entropy of a linear layer: `[n, dim] x [classes, dim]` transposed, without keeping `[n, classes]`.
//!
//! In: states, a table of classes, the right class of each state. Out: a loss per state.
//!
//! On the CPU the loss and, when gradients are wanted, the gradients for an upstream gradient of 1 come out of
//! one pass over blocks of states, as in Liger's fused linear cross-entropy (arXiv 2410.10989). The usual upstream
//! gradient, the same for every state (a mean), only scales them. Where it differs from state to state
//! the pass is run again with it.

use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive};

use super::linear_softmax::{self, Excluded, LEFT_OUT, Layer};

/// The operands; cheap to clone.
#[derive(Clone, Debug)]
pub struct LinearSoftmax<B: Backend> {
    /// `[n, dim]`.
    pub states: Tensor<B, 2>,
    /// `[classes, dim]`.
    pub table: Tensor<B, 2>,
    /// `[classes]`.
    pub bias: Option<Tensor<B, 1>>,
    /// `[n]`, each below `classes`.
    pub targets: Arc<[u32]>,
    /// Classes that are left out of a state's softmax, unless they are its target.
    pub excluded: Option<Arc<Excluded>>,
}

/// Losses and gradients of their weighted sum.
#[derive(Clone, Debug)]
pub struct LossAndGradients<B: Backend> {
    /// `[n]`.
    pub loss: Tensor<B, 1>,
    /// `[n, dim]`.
    pub states: Tensor<B, 2>,
    /// `[classes, dim]`.
    pub table: Tensor<B, 2>,
    /// `[classes]`.
    pub bias: Option<Tensor<B, 1>>,
}

/// A back end that has the operation.
pub trait CrossEntropyBackend: Backend {
    /// See [`linear_cross_entropy`].
    fn cross_entropy(layer: LinearSoftmax<Self>) -> Tensor<Self, 1> {
        unfused(layer)
    }

    /// Losses, and the gradients of their sum with `weights [n]` (1 without); `None` where a back end has
    /// nothing better than its own rules of differentiation.
    fn cross_entropy_gradients(
        _layer: &LinearSoftmax<Self>,
        _weights: Option<&Tensor<Self, 1>>,
    ) -> Option<LossAndGradients<Self>> {
        None
    }
}

/// `-ln softmax(states table' + bias)[target]` of each state.
///
/// `states [n, dim]`, `table [classes, dim]`, `bias [classes]`, `targets [n]` below `classes`; gives `[n]`. Gradients
/// flow to states, table and bias.
///
/// # Panics
/// When the shapes do not fit or a target is no class (our bug).
pub fn linear_cross_entropy<B: CrossEntropyBackend>(
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
pub fn linear_cross_entropy_excluding<B: CrossEntropyBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    targets: &[u32],
    excluded: Option<Excluded>,
) -> Tensor<B, 1> {
    let ([n, dim], [classes, width]) = (states.dims(), table.dims());
    assert!(n == targets.len() && dim == width && dim > 0, "{n} states of {dim} and {} targets", targets.len());
    assert!(bias.as_ref().is_none_or(|b| b.dims()[0] == classes), "a bias that is not [{classes}]");
    assert!(targets.iter().all(|&t| (t as usize) < classes), "a target that is none of the {classes} classes");
    if let Some(excluded) = &excluded {
        assert!(excluded.ranges.len() == n, "{n} states and {} lists of classes", excluded.ranges.len());
        assert!(excluded.classes.iter().all(|&c| (c as usize) < classes), "a class that is none of the {classes}");
    }
    B::cross_entropy(LinearSoftmax { states, table, bias, targets: targets.into(), excluded: excluded.map(Arc::new) })
}

fn unfused<B: Backend>(layer: LinearSoftmax<B>) -> Tensor<B, 1> {
    let LinearSoftmax { states, table, bias, targets, excluded } = layer;
    let n = targets.len();
    let index: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [n]), &states.device()).reshape([n, 1]);
    let mut logits = states.matmul(table.transpose());
    if let Some(bias) = bias {
        let classes = bias.dims()[0];
        logits = logits + bias.reshape([1, classes]);
    }
    if let Some(excluded) = excluded {
        let [_, classes] = logits.dims();
        let mut out = vec![0f32; n * classes];
        for (row, out) in out.chunks_exact_mut(classes.max(1)).enumerate() {
            excluded.of(row).iter().for_each(|&class| out[class as usize] = LEFT_OUT);
            out[targets[row] as usize] = 0.0;
        }
        let device = logits.device();
        logits = logits + Tensor::from_data(TensorData::new(out, [n, classes]), &device);
    }
    log_softmax(logits, 1).gather(1, index).reshape([n]).neg()
}

#[cfg(feature = "cuda")]
impl CrossEntropyBackend for burn::backend::Cuda {}

impl CrossEntropyBackend for Flex {
    fn cross_entropy(layer: LinearSoftmax<Self>) -> Tensor<Self, 1> {
        let losses = on_host(&layer, linear_softmax::losses);
        tensor(losses, [layer.targets.len()])
    }

    fn cross_entropy_gradients(
        layer: &LinearSoftmax<Self>,
        weights: Option<&Tensor<Self, 1>>,
    ) -> Option<LossAndGradients<Self>> {
        let weights = weights.map(|w| w.clone().into_primitive().tensor().to_contiguous());
        let weights = weights.as_ref().map(|w| w.storage::<f32>());
        let (losses, grads) = on_host(layer, |layer| linear_softmax::losses_and_gradients(layer, weights));
        Some(LossAndGradients {
            loss: tensor(losses, [layer.targets.len()]),
            states: tensor(grads.states, layer.states.dims()),
            table: tensor(grads.table, layer.table.dims()),
            bias: layer.bias.as_ref().map(|b| tensor(grads.bias, b.dims())),
        })
    }
}

/// Calls `run` with the tensors' own memory.
fn on_host<T>(layer: &LinearSoftmax<Flex>, run: impl FnOnce(Layer<'_>) -> T) -> T {
    let contiguous = |t: TensorPrimitive<Flex>| t.tensor().to_contiguous(); // copies only what is not yet
    let dim = layer.states.dims()[1];
    let states = contiguous(layer.states.clone().into_primitive());
    let table = contiguous(layer.table.clone().into_primitive());
    let bias = layer.bias.clone().map(|b| contiguous(b.into_primitive()));
    run(Layer {
        states: states.storage(),
        table: table.storage(),
        bias: bias.as_ref().map(|b| b.storage()),
        targets: &layer.targets,
        excluded: layer.excluded.as_deref(),
        dim,
    })
}

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<Flex, D> {
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

/// The gradient rule with the operands (for a second pass) and the gradients for an upstream gradient of 1.
#[derive(Debug)]
struct Rule;

type Saved<B> = (LinearSoftmax<B>, LossAndGradients<B>);

/// Gradients of states, table and bias for the upstream gradient `[n]`.
fn scaled<B: CrossEntropyBackend>((layer, unit): Saved<B>, upstream: Tensor<B, 1>) -> LossAndGradients<B> {
    let weights: Vec<f32> = upstream.to_data().iter::<f32>().collect();
    let first = weights.first().copied().unwrap_or(0.0);
    if weights.iter().all(|w| *w == first) {
        let LossAndGradients { loss, states, table, bias } = unit;
        return LossAndGradients { loss, states: states * first, table: table * first, bias: bias.map(|b| b * first) };
    }
    B::cross_entropy_gradients(&layer, Some(&upstream)).expect("the back end that gave gradients gives them again")
}

fn register<B: Backend, const D: usize>(grads: &mut Gradients, node: Option<NodeId>, grad: Tensor<B, D>) {
    if let Some(node) = node {
        grads.register::<B>(node, grad.into_primitive().tensor());
    }
}

impl<B: CrossEntropyBackend> Backward<B, 2> for Rule {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = Tensor::from_primitive(TensorPrimitive::Float(grads.consume::<B>(&ops.node)));
        let flow = scaled(ops.state, upstream);
        let [states, table] = ops.parents.map(|p| p.map(|p| p.id));
        register(grads, states, flow.states);
        register(grads, table, flow.table);
    }
}

impl<B: CrossEntropyBackend> Backward<B, 3> for Rule {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = Tensor::from_primitive(TensorPrimitive::Float(grads.consume::<B>(&ops.node)));
        let flow = scaled(ops.state, upstream);
        let [states, table, bias] = ops.parents.map(|p| p.map(|p| p.id));
        register(grads, states, flow.states);
        register(grads, table, flow.table);
        if let Some(d_bias) = flow.bias {
            register(grads, bias, d_bias);
        }
    }
}

impl<B: CrossEntropyBackend, C: CheckpointStrategy> CrossEntropyBackend for Autodiff<B, C> {
    fn cross_entropy(layer: LinearSoftmax<Self>) -> Tensor<Self, 1> {
        let (states, table) =
            (layer.states.clone().into_primitive().tensor(), layer.table.clone().into_primitive().tensor());
        let bias = layer.bias.clone().map(|b| b.into_primitive().tensor());
        let inner = LinearSoftmax {
            states: layer.states.clone().inner(),
            table: layer.table.clone().inner(),
            bias: layer.bias.clone().map(Tensor::inner),
            targets: layer.targets.clone(),
            excluded: layer.excluded.clone(),
        };
        let nodes = [states.node, table.node];
        match bias {
            None => finish(Backward::<B, 2>::prepare::<C>(Rule, nodes), layer, inner),
            Some(bias) => {
                let [a, b] = nodes;
                finish(Backward::<B, 3>::prepare::<C>(Rule, [a, b, bias.node]), layer, inner)
            }
        }
    }
}

fn finish<B: CrossEntropyBackend, C: CheckpointStrategy, const N: usize>(
    prepared: burn::backend::autodiff::ops::OpsPrep<Rule, B, Saved<B>, C, N>,
    layer: LinearSoftmax<Autodiff<B, C>>,
    inner: LinearSoftmax<B>,
) -> Tensor<Autodiff<B, C>, 1>
where
    Rule: Backward<B, N, State = Saved<B>>,
{
    let output = match prepared.compute_bound().stateful() {
        OpsKind::UnTracked(prepared) => prepared.finish(B::cross_entropy(inner).into_primitive().tensor()),
        OpsKind::Tracked(prepared) => match B::cross_entropy_gradients(&inner, None) {
            None => return unfused(layer),
            Some(unit) => {
                let loss = unit.loss.clone().into_primitive().tensor();
                prepared.finish((inner, unit), loss)
            }
        },
    };
    Tensor::from_primitive(TensorPrimitive::Float(output))
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let [n, classes, dim] = case.shape;
        fn leaf<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<Ad, D> {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), &Default::default()).require_grad()
        }
        let (states, table) = (leaf(&case.states, [n, dim]), leaf(&case.table, [classes, dim]));
        let bias = with_bias.then(|| leaf(&case.bias, [classes]));
        let loss = match fused {
            true => linear_cross_entropy(states.clone(), table.clone(), bias.clone(), &case.targets),
            false => unfused(LinearSoftmax {
                states: states.clone(),
                table: table.clone(),
                bias: bias.clone(),
                targets: case.targets.as_slice().into(),
                excluded: None,
            }),
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
            tensor(case.states.clone(), [50, 8]),
            tensor(case.table.clone(), [30, 8]),
            None,
            &case.targets,
        );
        assert_eq!(losses.into_data().to_vec::<f32>().unwrap(), run(&case, false, true)[0]);
    }
}
