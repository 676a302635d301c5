//! Multi-head attention over sequences that are padded on the right.
//!
//! In: queries, keys and values `[batch, length, dim]`. Out: `[batch, length, dim]`.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Flex};
use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, Tensor, TensorData};

/// Which positions a position sees.
#[derive(Clone, Copy, Debug)]
pub struct AttentionMask<'a> {
    /// Real positions of each sequence, `[batch]`; those after them are padding that nobody sees. A sequence
    /// of length 0 sees its first position.
    pub lengths: &'a [u32],
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
}

/// A back end that has the operation.
pub trait AttentionBackend: Backend {
    /// See [`attention`].
    fn masked_attention(
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        heads: usize,
        mask: AttentionMask<'_>,
        dropout: Option<(f32, u64)>,
    ) -> Tensor<Self, 3> {
        unfused(q, k, v, heads, mask, dropout)
    }
}

impl AttentionBackend for Flex {}
#[cfg(feature = "cuda")]
impl AttentionBackend for burn::backend::Cuda {}
impl<B: AttentionBackend, C: CheckpointStrategy> AttentionBackend for Autodiff<B, C> {}

/// `softmax(q k' / sqrt(dim / heads)) v` per head. `dropout` is the share of weights that are set to 0 (the others
/// scaled up by `1 / (1 - share)`) and a seed; which ones depends on the seed and the place alone.
pub fn attention<B: AttentionBackend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    heads: usize,
    mask: AttentionMask<'_>,
    dropout: Option<(f32, u64)>,
) -> Tensor<B, 3> {
    B::masked_attention(q, k, v, heads, mask, dropout)
}

/// Whether the weight at flat place `[batch, heads, query, key]` is kept.
pub(super) fn kept(place: u64, share: f32, seed: u64) -> bool {
    // SplitMix64 of the place: independent of order and threads.
    let mut x = seed ^ place.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^= x >> 31;
    (x >> 40) as f32 >= share * (1u64 << 24) as f32
}

fn unfused<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    heads: usize,
    mask: AttentionMask<'_>,
    dropout: Option<(f32, u64)>,
) -> Tensor<B, 3> {
    let [batch, length, dim] = q.dims();
    let device = q.device();
    let size = dim / heads;
    let split = |t: Tensor<B, 3>| t.reshape([batch, length, heads, size]).swap_dims(1, 2);
    let hidden: Vec<bool> = mask
        .lengths
        .iter()
        .flat_map(|&n| {
            let n = (n as usize).max(1);
            (0..length).flat_map(move |i| (0..length).map(move |j| j >= n || (mask.causal && j > i)))
        })
        .collect();
    let hidden = Tensor::<B, 4, Bool>::from_data(TensorData::new(hidden, [batch, 1, length, length]), &device);
    let scores = split(q).matmul(split(k).swap_dims(2, 3)) / (size as f32).sqrt();
    let mut weights = softmax(scores.mask_fill(hidden.expand([batch, heads, length, length]), -1e9), 3);
    if let Some((share, seed)) = dropout {
        let n = batch * heads * length * length;
        let scale = 1.0 / (1.0 - share);
        let factors: Vec<f32> = (0..n).map(|p| if kept(p as u64, share, seed) { scale } else { 0.0 }).collect();
        weights = weights * Tensor::from_data(TensorData::new(factors, [batch, heads, length, length]), &device);
    }
    weights.matmul(split(v)).swap_dims(1, 2).reshape([batch, length, dim])
}
