//! Causal attention within segments of a packed sequence, with grouped heads (Ainslie et al. 2023, arXiv 2305.13245).
//!
//! In: queries `[n, heads * size]`, keys and values `[n, kv_heads * size]`, the lengths of the segments. Out: rows
//! `[n, heads * size]`. A position sees itself and those before it in its own segment, nothing of another one: short
//! examples are packed one after the other without padding.

use std::sync::Arc;

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Bool, Shape, Tensor};

use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::segment_kernel::{Plan, backward, forward};

/// Shape of the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; divides `query`.
    pub key: usize,
    /// Numbers of a head.
    pub size: usize,
}

/// `softmax(q k' / sqrt(size)) v` per head and segment; query head `h` reads key head `h / (query / key)`.
/// `segments` are the lengths of the segments in their order; they sum up to `n`.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn segment_attention<B: FusedBackend>(
    q: Tensor<B, 2>,
    k: Tensor<B, 2>,
    v: Tensor<B, 2>,
    heads: Heads,
    segments: &[usize],
) -> Tensor<B, 2> {
    let [n, dim] = q.dims();
    assert!(heads.key > 0 && heads.query.is_multiple_of(heads.key), "{heads:?} that can't be shared");
    assert!(dim == heads.query * heads.size, "{heads:?} and rows of {dim}");
    assert!(k.dims() == [n, heads.key * heads.size] && v.dims() == k.dims(), "{heads:?} and {:?} keys", k.dims());
    assert_eq!(segments.iter().sum::<usize>(), n, "segments that do not cover the sequence");
    lift(B::fused(SegmentAttention { heads, segments: segments.into() }, [q, k, v].map(lower)))
}

/// The operation on queries, keys and values.
#[derive(Clone, Debug)]
struct SegmentAttention {
    heads: Heads,
    segments: Arc<[usize]>,
}

impl SegmentAttention {
    fn plan(&self) -> Plan<'_> {
        Plan { heads: self.heads, segments: &self.segments }
    }

    fn in_burn<B: Backend>(&self, [q, k, v]: [Tensor<B, 2>; 3]) -> Tensor<B, 2> {
        let Heads { query, key, size } = self.heads;
        let group = query / key;
        let mut parts = Vec::with_capacity(self.segments.len());
        let mut start = 0;
        for &len in self.segments.iter().filter(|len| **len > 0) {
            // [key, group * len, size] and [key, len, size].
            let q = q.clone().narrow(0, start, len).reshape([len, key, group, size]).permute([1, 2, 0, 3]);
            let q = q.reshape([key, group * len, size]);
            let split = |x: &Tensor<B, 2>| x.clone().narrow(0, start, len).reshape([len, key, size]).swap_dims(0, 1);
            let (k, v) = (split(&k), split(&v));
            let later = Tensor::<B, 2, Bool>::tril_mask([len, len], 0, &q.device());
            let later = later.unsqueeze::<4>().expand([key, group, len, len]);
            let scores = q.matmul(k.transpose()).mul_scalar(1.0 / (size as f32).sqrt());
            let scores = scores.reshape([key, group, len, len]).mask_fill(later, -1e9);
            let mixed = softmax(scores, 3).reshape([key, group * len, len]).matmul(v);
            parts.push(mixed.reshape([key, group, len, size]).permute([2, 0, 1, 3]).reshape([len, query * size]));
            start += len;
        }
        Tensor::cat(parts, 0)
    }
}

impl Operation<3> for SegmentAttention {
    /// Logarithms of the sums of exponentials.
    type Saved = Vec<f32>;

    fn plain<B: Backend>(&self, operands: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        lower(self.in_burn::<B>(operands.map(lift)))
    }

    fn shape(&self, [q, _, _]: [Shape; 3]) -> Shape {
        q
    }

    fn forward(&self, operands: [&[f32]; 3]) -> Vec<f32> {
        forward(self.plan(), operands).0
    }

    fn forward_saved(&self, operands: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        forward(self.plan(), operands)
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 3>) -> [Vec<f32>; 3] {
        backward(self.plan(), pass.operands, [pass.result, pass.upstream], &pass.saved)
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{agree, numbers};
    use super::*;

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        let cases =
            [([1, 1, 1], vec![1]), ([4, 2, 6], vec![3, 1, 7]), ([3, 1, 16], vec![130, 70]), ([2, 2, 8], vec![64])];
        for ([query, key, size], segments) in cases {
            let n: usize = segments.iter().sum();
            let heads = Heads { query, key, size };
            let rows = |heads: usize, step: f32| {
                let values: Vec<f32> = numbers(n * heads * size, step).iter().map(|x| x * 2.0).collect();
                (values, vec![n, heads * size])
            };
            let operation = SegmentAttention { heads, segments: segments.as_slice().into() };
            agree(&operation, [rows(query, 0.77), rows(key, 0.31), rows(key, 1.3)]);
        }
    }

    #[test]
    fn a_segment_does_not_see_its_neighbours() {
        let heads = Heads { query: 2, key: 1, size: 4 };
        let of = |segments: &[usize], q: &[f32], k: &[f32]| {
            SegmentAttention { heads, segments: segments.into() }.forward([q, k, k])
        };
        let (q, k) = (numbers(9 * 8, 0.7), numbers(9 * 4, 0.3));
        let packed = of(&[4, 5], &q, &k);
        let alone = [of(&[4], &q[..32], &k[..16]), of(&[5], &q[32..], &k[16..])].concat();
        assert_eq!(packed, alone);
    }
}
