//! Operations that the CPU does in one piece, with their gradients: how a back end and its differentiation get them.
//!
//! In: an [`Operation`], which says what it is in Burn's own operations (for every back end), and how slices go
//! through it forward and backward (for the CPU). Out: the operation on any [`FusedBackend`], differentiable
//! where that is `Autodiff` of one.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Bytes, DType, Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_flex::{FlexTensor, Layout};

/// An operation of `N` tensors that gives one.
pub trait Operation<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// What the backward pass needs beside operands and result.
    type Saved: Clone + Debug + Send + 'static;

    /// In Burn's operations; differentiable by Burn's rules.
    fn plain<B: Backend>(&self, operands: [FloatTensor<B>; N]) -> FloatTensor<B>;

    /// The shape of the result.
    fn shape(&self, operands: [Shape; N]) -> Shape;

    /// On the CPU, without gradients: the result of operands that are row-major.
    fn forward(&self, operands: [&[f32]; N]) -> Vec<f32>;

    /// The same when gradients will be asked for.
    fn forward_saved(&self, operands: [&[f32]; N]) -> (Vec<f32>, Self::Saved);

    /// Gradients of the operands from `upstream`, that of the result. One that is not `wanted` may be empty.
    fn backward(&self, pass: Pass<'_, Self::Saved, N>) -> [Vec<f32>; N];
}

/// What a backward pass goes by.
pub struct Pass<'a, S, const N: usize> {
    /// As in the forward pass.
    pub operands: [&'a [f32]; N],
    /// As in the forward pass.
    pub result: &'a [f32],
    /// The gradient of the result.
    pub upstream: &'a [f32],
    /// What the forward pass left.
    pub saved: S,
    /// Which operands' gradients are used.
    pub wanted: [bool; N],
}

/// What the rule of differentiation keeps.
#[derive(Clone, Debug)]
pub struct Tape<B: Backend, O: Operation<N>, const N: usize> {
    operation: O,
    operands: [FloatTensor<B>; N],
    result: FloatTensor<B>,
    saved: O::Saved,
}

/// A back end that runs [`Operation`]s.
pub trait FusedBackend: Backend {
    /// The operation without gradients.
    fn fused<O: Operation<N>, const N: usize>(operation: O, operands: [FloatTensor<Self>; N]) -> FloatTensor<Self> {
        operation.plain::<Self>(operands)
    }

    /// The operation when gradients will be asked for. `None` where the back end has nothing better than
    /// Burn's rules of differentiation.
    fn fused_tape<O: Operation<N>, const N: usize>(
        _operation: O,
        _operands: [FloatTensor<Self>; N],
    ) -> Option<Tape<Self, O, N>> {
        None
    }

    /// The operands' gradients; a back end has it if it has [`FusedBackend::fused_tape`].
    fn fused_gradients<O: Operation<N>, const N: usize>(
        _tape: Tape<Self, O, N>,
        _upstream: FloatTensor<Self>,
        _wanted: [bool; N],
    ) -> Option<[FloatTensor<Self>; N]> {
        None
    }
}

impl FusedBackend for Flex {
    fn fused<O: Operation<N>, const N: usize>(operation: O, operands: [FlexTensor; N]) -> FlexTensor {
        let operands = operands.map(|x| x.to_contiguous()); // copies only what is not yet
        let result = operation.forward(operands.each_ref().map(|x| x.storage()));
        tensor(result, operation.shape(operands.map(|x| x.shape())))
    }

    fn fused_tape<O: Operation<N>, const N: usize>(
        operation: O,
        operands: [FlexTensor; N],
    ) -> Option<Tape<Self, O, N>> {
        let operands = operands.map(|x| x.to_contiguous());
        let (result, saved) = operation.forward_saved(operands.each_ref().map(|x| x.storage()));
        let shape = operation.shape(operands.each_ref().map(TensorMetadata::shape));
        Some(Tape { operation, operands, result: tensor(result, shape), saved })
    }

    fn fused_gradients<O: Operation<N>, const N: usize>(
        tape: Tape<Self, O, N>,
        upstream: FlexTensor,
        wanted: [bool; N],
    ) -> Option<[FlexTensor; N]> {
        let Tape { operation, operands, result, saved } = tape;
        let (result, upstream) = (result.to_contiguous(), upstream.to_contiguous());
        let slices = operands.each_ref().map(|x| x.storage());
        let pass = Pass { operands: slices, result: result.storage(), upstream: upstream.storage(), saved, wanted };
        let mut grads = operation.backward(pass).into_iter();
        Some(operands.map(|operand| {
            let grad = grads.next().expect("as many gradients as operands");
            match grad.len() == operand.shape().num_elements() {
                true => tensor(grad, operand.shape()),
                false => tensor(grad, Shape::new([0])), // not wanted
            }
        }))
    }
}

fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// The rule of differentiation of `O`.
#[derive(Debug)]
struct Rule<O>(PhantomData<fn() -> O>);

impl<B: FusedBackend, O: Operation<N>, const N: usize> Backward<B, N> for Rule<O> {
    type State = Tape<B, O, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = grads.consume::<B>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let flow = B::fused_gradients(ops.state, upstream, wanted).expect("a back end that has a tape reads it");
        for (parent, grad) in ops.parents.into_iter().zip(flow) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: FusedBackend, C: CheckpointStrategy> FusedBackend for Autodiff<B, C> {
    fn fused<O: Operation<N>, const N: usize>(operation: O, operands: [FloatTensor<Self>; N]) -> FloatTensor<Self> {
        let nodes = operands.each_ref().map(|x| x.node.clone());
        let inner = operands.each_ref().map(|x| x.primitive.clone());
        let rule = Rule::<O>(PhantomData);
        match Backward::<B, N>::prepare::<C>(rule, nodes).compute_bound().stateful() {
            OpsKind::UnTracked(prepared) => prepared.finish(B::fused(operation, inner)),
            OpsKind::Tracked(prepared) => match B::fused_tape(operation.clone(), inner) {
                None => operation.plain::<Self>(operands),
                Some(tape) => {
                    let result = tape.result.clone();
                    prepared.finish(tape, result)
                }
            },
        }
    }
}

/// A tensor as its back end's own.
pub fn lower<B: Backend, const D: usize>(x: Tensor<B, D>) -> FloatTensor<B> {
    x.into_primitive().tensor()
}

/// The reverse of [`lower`].
pub fn lift<B: Backend, const D: usize>(x: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Sums over rows in a fixed order for any number of threads: `part(rows)` for groups of rows that depend on `n`
/// alone, then the groups' sums one after the other.
pub fn sum_over_rows(n: usize, part: impl Fn(std::ops::Range<usize>) -> Vec<f32> + Sync) -> Vec<f32> {
    use rayon::prelude::*;
    let step = n.div_ceil(16).max(256);
    let starts: Vec<usize> = (0..n.max(1)).step_by(step).collect();
    let parts: Vec<Vec<f32>> = starts.into_par_iter().map(|first| part(first..(first + step).min(n))).collect();
    let mut parts = parts.into_iter();
    let mut sum = parts.next().expect("at least one group");
    for part in parts {
        sum.iter_mut().zip(part).for_each(|(s, x)| *s += x);
    }
    sum
}
