//! Softmax cross-entropy of a linear layer: `[n, dim] x [classes, dim]` transposed, without keeping `[n, classes]`.
//!
//! In: states, a table of classes, the right class of each state. Out: a loss per state.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Flex};
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

/// A back end that has the operation.
pub trait CrossEntropyBackend: Backend {
    /// See [`linear_cross_entropy`].
    fn linear_cross_entropy(
        states: Tensor<Self, 2>,
        table: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        targets: &[u32],
    ) -> Tensor<Self, 1> {
        unfused(states, table, bias, targets)
    }
}

impl CrossEntropyBackend for Flex {}
#[cfg(feature = "cuda")]
impl CrossEntropyBackend for burn::backend::Cuda {}
impl<B: CrossEntropyBackend, C: CheckpointStrategy> CrossEntropyBackend for Autodiff<B, C> {}

/// `-ln softmax(states table' + bias)[target]` of each state.
///
/// `states [n, dim]`, `table [classes, dim]`, `bias [classes]`, `targets [n]` below `classes`; gives `[n]`. Gradients
/// flow to states, table and bias.
pub fn linear_cross_entropy<B: CrossEntropyBackend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    targets: &[u32],
) -> Tensor<B, 1> {
    B::linear_cross_entropy(states, table, bias, targets)
}

fn unfused<B: Backend>(
    states: Tensor<B, 2>,
    table: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    targets: &[u32],
) -> Tensor<B, 1> {
    let n = targets.len();
    let index: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [n]), &states.device()).reshape([n, 1]);
    let mut logits = states.matmul(table.transpose());
    if let Some(bias) = bias {
        let classes = bias.dims()[0];
        logits = logits + bias.reshape([1, classes]);
    }
    log_softmax(logits, 1).gather(1, index).reshape([n]).neg()
}
