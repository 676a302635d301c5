//! Causal attention over a tree of runs, on CPU cores.
//!
//! In: fused queries, keys and values of all tokens of a pack, `[tokens, width]` each row
//! `[q heads | k heads | v heads]`, and the cached segments that its runs continue. Out: `[tokens, q_width]`.
//! A task is one key/value head and a stretch of queries, of one run or of several short ones with the same past: it packs
//! the keys and values that its queries see, in the order of their positions (a shared past once), and does two
//! products per query head with the same kernels as the linear layers. Sums run over positions, so they do not
//! depend on how a past is divided into segments and runs.

use std::ops::Range;

use rayon::prelude::*;

use super::Segment;
use super::kernels::{self, Isa, LANES};
use super::product::{Product, product};
use crate::llm::config::LlamaConfig;
use crate::llm::pack::{Pack, Run};

/// Queries of a task: four of the largest tiles.
const QUERIES: usize = 56;

/// What all tasks of a layer read.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// The shape of the model.
    pub config: &'a LlamaConfig,
    /// The batch.
    pub pack: &'a Pack,
    /// Cached segments, as the runs' [`Run::past`] numbers them.
    pub past: &'a [&'a Segment],
    /// Index of the layer.
    pub index: usize,
    /// Fused queries, keys and values, `[tokens, width]`.
    pub qkv: &'a [f32],
    /// Width of a row of `qkv`.
    pub width: usize,
}

/// A stretch of consecutive tokens' keys (or values): row `t` starts at `data[t * stride]`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    len: usize,
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// Keys, `[panels of 16 keys][head_dim][16]`.
    keys: Vec<f32>,
    /// Values, `[panels of 16 dimensions][keys][16]`.
    values: Vec<f32>,
    /// Scores of one query head, `[queries][keys, padded]`.
    scores: Vec<f32>,
    /// `[queries][head_dim, padded]`.
    out: Vec<f32>,
}

/// A result row that several tasks write disjoint columns of.
struct Shared(*mut f32);

// SAFETY: tasks write disjoint (row, head) stretches; see `attend`.
unsafe impl Sync for Shared {}

/// Queries that one task attends for.
struct Stretch {
    /// Runs with the same past and parents; one, or several that are taken whole.
    runs: Range<usize>,
    /// First query, within the run.
    from: usize,
    /// Queries of a single run; of several, at most so many of each.
    queries: usize,
}

/// Bytes of one thread's buffers where no token sees more than `seen` tokens.
pub fn scratch_bytes(c: &LlamaConfig, seen: usize) -> usize {
    let padded = (seen + QUERIES).next_multiple_of(LANES);
    let dim = c.head_dim.next_multiple_of(LANES);
    4 * (padded * c.head_dim + padded * dim + QUERIES * padded + QUERIES * dim)
}

/// Attention of every token of a pack; `attended` is `[tokens, q_width]`.
pub fn attend(isa: Isa, layer: Layer<'_>, attended: &mut [f32]) {
    let (c, pack) = (layer.config, layer.pack);
    assert!(layer.qkv.len() == pack.ids.len() * layer.width && attended.len() == pack.ids.len() * c.q_width());
    let stretches = stretches(pack);
    let tasks: Vec<(&Stretch, usize)> =
        stretches.iter().flat_map(|s| (0..c.kv_heads).map(move |kv_head| (s, kv_head))).collect();
    let shared = Shared(attended.as_mut_ptr());
    tasks.par_iter().for_each_init(Scratch::default, |scratch, (stretch, kv_head)| {
        attend_task(isa, layer, stretch, *kv_head, scratch, &shared);
    });
}

/// Divides a pack's queries into tasks: long runs into stretches, short siblings taken together.
fn stretches(pack: &Pack) -> Vec<Stretch> {
    let mut out = Vec::new();
    let mut from = 0;
    while from < pack.runs.len() {
        let first = &pack.runs[from];
        let mut queries = first.len;
        let mut to = from + 1;
        while let Some(next) = pack.runs.get(to)
            && queries + next.len <= QUERIES
            && next.parents == first.parents
            && next.past == first.past
        {
            queries += next.len;
            to += 1;
        }
        if to - from > 1 {
            out.push(Stretch { runs: from..to, from: 0, queries: QUERIES });
        } else {
            let starts = (0..first.len).step_by(QUERIES);
            out.extend(starts.map(|at| Stretch { runs: from..to, from: at, queries: QUERIES.min(first.len - at) }));
        }
        from = to;
    }
    out
}

/// The keys (or values) that a run continues, in order of position.
fn before<'a>(layer: Layer<'a>, run: &Run, kv_head: usize, value: bool) -> Vec<Rows<'a>> {
    let c = layer.config;
    let cached = run.past.iter().map(|seen| {
        let segment = layer.past[seen.segment];
        let data = if value { segment.values(layer.index) } else { segment.keys(layer.index) };
        Rows { data: &data[kv_head * c.head_dim..], stride: c.kv_width(), len: seen.len }
    });
    let fresh = run.parents.iter().map(|parent| {
        let run = &layer.pack.runs[*parent];
        own(layer, run, run.len, kv_head, value)
    });
    cached.chain(fresh).collect()
}

/// The keys (or values) of a run's first `len` tokens.
fn own<'a>(layer: Layer<'a>, run: &Run, len: usize, kv_head: usize, value: bool) -> Rows<'a> {
    let c = layer.config;
    let column = c.q_width() + if value { c.kv_width() } else { 0 } + kv_head * c.head_dim;
    Rows { data: &layer.qkv[run.start * layer.width + column..], stride: layer.width, len }
}

fn attend_task(isa: Isa, layer: Layer<'_>, stretch: &Stretch, kv_head: usize, scratch: &mut Scratch, shared: &Shared) {
    let (c, pack, width) = (layer.config, layer.pack, layer.width);
    let dim = c.head_dim;
    let runs = &pack.runs[stretch.runs.clone()];
    let past = runs[0].position;
    let upto = |run: &Run| run.len.min(stretch.from + stretch.queries);
    // Room for the run that sees most.
    let most = past + runs.iter().map(upto).max().unwrap_or(0);
    let padded = most.div_ceil(LANES) * LANES;
    let dim_panels = dim.div_ceil(LANES);
    scratch.keys.resize(padded * dim, 0.0);
    scratch.values.resize(dim_panels * most * LANES, 0.0);
    pack_keys(&before(layer, &runs[0], kv_head, false), dim, 0, &mut scratch.keys);
    pack_values(&before(layer, &runs[0], kv_head, true), dim, most, 0, &mut scratch.values);
    let scale = 1.0 / (dim as f32).sqrt();
    let group = c.heads / c.kv_heads;
    let tile = isa.tile_rows();
    for run in runs {
        let queries = upto(run) - stretch.from;
        pack_keys(&[own(layer, run, upto(run), kv_head, false)], dim, past, &mut scratch.keys);
        pack_values(&[own(layer, run, upto(run), kv_head, true)], dim, most, past, &mut scratch.values);
        scratch.scores.resize(queries * padded, 0.0);
        scratch.out.resize(queries * dim_panels * LANES, 0.0);
        let first_row = run.start + stretch.from;
        for head in kv_head * group..(kv_head + 1) * group {
            // A tile of queries sees the keys up to its last query and no product reaches beyond them.
            for from in (0..queries).step_by(tile) {
                let rows = tile.min(queries - from);
                let visible = past + stretch.from + from + rows;
                let scores = &mut scratch.scores[from * padded..(from + rows) * padded];
                let q = &layer.qkv[(first_row + from) * width + head * dim..];
                assert!(q.len() >= (rows - 1) * width + dim);
                let score_product = Product {
                    a: q.as_ptr(),
                    a_stride: width,
                    b: scratch.keys.as_ptr(),
                    b_stride: dim * LANES,
                    c: scores.as_mut_ptr(),
                    c_stride: padded,
                    rows,
                    panels: visible.div_ceil(LANES),
                    k: dim,
                    add: false,
                };
                // SAFETY: the query rows were checked above; `keys` holds `padded / 16` panels of `dim`
                // rows and `scores` `rows` rows of `padded`, and `visible <= most <= padded`.
                unsafe { product(isa, score_product) };
                let out = &mut scratch.out[from * dim_panels * LANES..(from + rows) * dim_panels * LANES];
                let mut sums = [0f32; 16];
                for (r, row) in scores.chunks_exact_mut(padded).enumerate() {
                    let own = visible - rows + r + 1;
                    sums[r] = kernels::softmax_unscaled(isa, &mut row[..own], scale);
                    row[own..visible].fill(0.0);
                }
                let value_product = Product {
                    a: scores.as_ptr(),
                    a_stride: padded,
                    b: scratch.values.as_ptr(),
                    b_stride: most * LANES,
                    c: out.as_mut_ptr(),
                    c_stride: dim_panels * LANES,
                    rows,
                    panels: dim_panels,
                    k: visible,
                    add: false,
                };
                // SAFETY: `scores` holds `rows` rows of `padded >= visible`, `values` holds
                // `dim_panels` panels of `most >= visible` rows, and `out` `rows` whole rows.
                unsafe { product(isa, value_product) };
                for (r, row) in out.chunks_exact(dim_panels * LANES).enumerate() {
                    let at = (first_row + from + r) * c.q_width() + head * dim;
                    // SAFETY: `attend` checked that the result has a row for every token, and no other
                    // task has this (row, head): tasks differ in their rows or in their key/value head.
                    let target = unsafe { std::slice::from_raw_parts_mut(shared.0.add(at), dim) };
                    for (t, v) in target.iter_mut().zip(row) {
                        *t = *v / sums[r];
                    }
                }
            }
        }
    }
}

/// Keys as panels of 16, each transposed: `[panels][dim][16]`, from key `at` on. What the last panel holds beyond its
/// keys is computed with, and read by nobody.
fn pack_keys(stretches: &[Rows<'_>], dim: usize, mut at: usize, out: &mut [f32]) {
    for rows in stretches {
        for t in 0..rows.len {
            let row = &rows.data[t * rows.stride..t * rows.stride + dim];
            let panel = &mut out[(at / LANES) * dim * LANES + at % LANES..];
            for (v, slot) in row.iter().zip(panel.iter_mut().step_by(LANES)) {
                *slot = *v;
            }
            at += 1;
        }
    }
}

/// Values as panels of 16 dimensions: `[dim / 16][most][16]`, padded with zeros, from value `at` on.
fn pack_values(stretches: &[Rows<'_>], dim: usize, most: usize, mut at: usize, out: &mut [f32]) {
    for rows in stretches {
        for t in 0..rows.len {
            let row = &rows.data[t * rows.stride..t * rows.stride + dim];
            for (p, part) in row.chunks(LANES).enumerate() {
                let slot = &mut out[(p * most + at) * LANES..(p * most + at + 1) * LANES];
                slot[..part.len()].copy_from_slice(part);
                slot[part.len()..].fill(0.0);
            }
            at += 1;
        }
    }
}
