//! Attention over a tree of runs on any Burn back end: blocks of queries, those of like size computed together.
//!
//! In: queries `[tokens, q_width]` of a pack, keys and values `[rows, kv_width]` of its cached segments and of itself.
//! Out: `[tokens, q_width]`. A block is a stretch of one run's queries with all keys that they see. Blocks are
//! padded to a few sizes, so a layer takes a few batched products, however many runs there are; their indices and masks
//! are made once per pass, on the host, and nothing comes back from the device between layers.

use std::collections::BTreeMap;

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Int, Tensor, TensorData};

use super::config::LlamaConfig;
use super::pack::{Pack, Run};

/// Queries of a block at most.
const QUERIES: usize = 256;

/// Bytes of the scores that are computed together, unless one block alone has more.
const SCORE_BYTES: usize = 64 << 20;

/// Blocks of one padded size.
struct Bucket<B: Backend> {
    blocks: usize,
    queries: usize,
    keys: usize,
    /// Rows of the pack, `[blocks * queries]`.
    query_rows: Tensor<B, 1, Int>,
    /// Rows of the keys and values, `[blocks * keys]`.
    key_rows: Tensor<B, 1, Int>,
    /// 0 where a query sees a key, negative infinity elsewhere: `[blocks, 1, queries, keys]`.
    mask: Tensor<B, 4>,
}

/// The blocks of one pack.
pub struct Blocks<B: Backend> {
    buckets: Vec<Bucket<B>>,
    /// Where each token's result is among the rows of all buckets, `[tokens]`.
    places: Tensor<B, 1, Int>,
}

/// A stretch of a run's queries.
#[derive(Clone, Copy)]
struct Block<'a> {
    run: &'a Run,
    from: usize,
    len: usize,
}

impl Block<'_> {
    /// Keys that its last query sees.
    fn seen(&self) -> usize {
        self.run.position + self.from + self.len
    }
}

/// Integers on a device.
pub(super) fn indices<B: Backend>(values: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i64> = values.iter().map(|v| *v as i64).collect();
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// Padded number of queries: 4, 16, 64 or 256.
fn query_size(n: usize) -> usize {
    [4, 16, 64].into_iter().find(|size| n <= *size).unwrap_or(QUERIES)
}

/// Padded number of keys: a power of two, or one and a half of it.
fn key_size(n: usize) -> usize {
    let power = n.max(16).next_power_of_two();
    if n <= power / 4 * 3 { power / 4 * 3 } else { power }
}

/// Bytes of the products of a pass and of their indices at most, where no token sees more than `seen`.
pub(super) fn bytes(c: &LlamaConfig, tokens: usize, seen: usize) -> usize {
    let keys = key_size(seen);
    let row = 4 * c.heads * keys;
    // Padding makes at most four queries of one.
    let scores = (4 * tokens * row).min(SCORE_BYTES.max(QUERIES * row));
    let blocks = tokens.min(SCORE_BYTES / (4 * row)).max(1);
    // Scores with and without their mask, their softmax and its parts; keys and values gathered and laid out; masks and indices.
    4 * scores + 4 * 4 * blocks * keys * c.kv_width() + 24 * tokens * keys
}

impl<B: Backend> Blocks<B> {
    /// The blocks of a pack whose cached segments have `segments` tokens each and lie before the pack's own rows.
    pub fn new(c: &LlamaConfig, pack: &Pack, segments: &[usize], device: &B::Device) -> Self {
        let mut starts = Vec::with_capacity(segments.len());
        let mut past = 0;
        for len in segments {
            starts.push(past);
            past += len;
        }
        let mut by_size: BTreeMap<(usize, usize), Vec<Block<'_>>> = BTreeMap::new();
        for run in &pack.runs {
            for from in (0..run.len).step_by(QUERIES) {
                let block = Block { run, from, len: QUERIES.min(run.len - from) };
                by_size.entry((query_size(block.len), key_size(block.seen()))).or_default().push(block);
            }
        }
        let mut buckets = Vec::new();
        let mut places = vec![0; pack.ids.len()];
        let mut row = 0;
        for ((queries, keys), blocks) in by_size {
            let at_once = (SCORE_BYTES / (4 * c.heads * queries * keys)).max(1);
            for blocks in blocks.chunks(at_once) {
                let n = blocks.len();
                let mut query_rows = vec![0; n * queries];
                let mut key_rows = vec![0; n * keys];
                let mut mask = vec![f32::NEG_INFINITY; n * queries * keys];
                for (b, block) in blocks.iter().enumerate() {
                    let rows = key_rows[b * keys..(b + 1) * keys].iter_mut();
                    rows.zip(seen_rows(pack, block, &starts, past)).for_each(|(to, from)| *to = from);
                    for q in 0..queries {
                        let at = b * queries + q;
                        // Queries that are padding see one key, so that their softmax is a number.
                        let mut visible = 1;
                        if q < block.len {
                            let token = block.run.start + block.from + q;
                            query_rows[at] = token;
                            places[token] = row + at;
                            visible = block.run.position + block.from + q + 1;
                        }
                        mask[at * keys..at * keys + visible].fill(0.0);
                    }
                }
                row += n * queries;
                buckets.push(Bucket {
                    blocks: n,
                    queries,
                    keys,
                    query_rows: indices(&query_rows, device),
                    key_rows: indices(&key_rows, device),
                    mask: Tensor::from_data(TensorData::new(mask, [n, 1, queries, keys]), device),
                });
            }
        }
        Blocks { buckets, places: indices(&places, device) }
    }

    /// Attention of all tokens: `q` `[tokens, q_width]`, `k` and `v` `[rows, kv_width]`, all of one type; the softmax in f32.
    pub fn attend(&self, c: &LlamaConfig, q: &Tensor<B, 2>, k: &Tensor<B, 2>, v: &Tensor<B, 2>) -> Tensor<B, 2> {
        let (groups, group, dim) = (c.kv_heads, c.heads / c.kv_heads, c.head_dim);
        let scale = 1.0 / (dim as f64).sqrt();
        let kind = q.dtype();
        let mixed = self.buckets.iter().map(|bucket| {
            let Bucket { blocks: n, queries, keys, .. } = *bucket;
            // The query heads of a group share a key head: [n groups, group queries, dim].
            let q = q.clone().select(0, bucket.query_rows.clone()).reshape([n, queries, groups, group, dim]);
            let q = q.permute([0, 2, 3, 1, 4]).reshape([n * groups, group * queries, dim]);
            let heads = |x: &Tensor<B, 2>| {
                let x = x.clone().select(0, bucket.key_rows.clone()).reshape([n, keys, groups, dim]);
                x.swap_dims(1, 2).reshape([n * groups, keys, dim])
            };
            let scores = q.matmul(heads(k).transpose()).cast(FloatDType::F32).mul_scalar(scale);
            let scores = scores.reshape([n, c.heads, queries, keys]).add(bucket.mask.clone());
            let weights = softmax(scores, 3).cast(kind).reshape([n * groups, group * queries, keys]);
            let mixed = weights.matmul(heads(v)).reshape([n, groups, group, queries, dim]);
            mixed.permute([0, 3, 1, 2, 4]).reshape([n * queries, c.q_width()])
        });
        let mut mixed: Vec<Tensor<B, 2>> = mixed.collect();
        let all = if mixed.len() == 1 { mixed.swap_remove(0) } else { Tensor::cat(mixed, 0) };
        all.select(0, self.places.clone())
    }
}

/// Rows of the keys that a block sees, in order of position.
fn seen_rows<'a>(
    pack: &'a Pack,
    block: &Block<'a>,
    starts: &'a [usize],
    past: usize,
) -> impl Iterator<Item = usize> + 'a {
    let cached = block.run.past.iter().flat_map(|seen| starts[seen.segment]..starts[seen.segment] + seen.len);
    let parents = block.run.parents.iter().map(|p| &pack.runs[*p]);
    let fresh = parents.flat_map(move |run| past + run.start..past + run.start + run.len);
    let start = past + block.run.start;
    cached.chain(fresh).chain(start..start + block.from + block.len)
}
