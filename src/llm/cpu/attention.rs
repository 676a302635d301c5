//! Causal attention over a tree of runs, on CPU cores.
//!
//! In: fused queries, keys and values of all tokens of a pack, `[tokens, width]` each row
//! `[q heads | k heads | v heads]`, and the keys and values of the cache. Out: `[tokens, q_width]`.
//! A task is one run, one key/value head and a stretch of queries: it packs the keys and values that
//! its queries see, in the order of their positions, and does two products per query head with the same
//! kernels as the linear layers.

use rayon::prelude::*;

use super::kernels::{self, Isa, LANES};
use super::product::{Product, product};
use crate::llm::config::LlamaConfig;
use crate::llm::pack::{Pack, Run};

/// Queries of a task: four of the largest tiles.
const QUERIES: usize = 56;

/// Keys and values of one layer of the cache.
#[derive(Clone, Copy)]
pub struct Past<'a> {
    /// Tokens.
    pub len: usize,
    /// `[len, kv_width]`.
    pub keys: &'a [f32],
    /// `[len, kv_width]`.
    pub values: &'a [f32],
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

/// One task.
struct Task<'a> {
    run: &'a Run,
    kv_head: usize,
    /// First query, within the run.
    from: usize,
    /// Its queries.
    queries: usize,
}

/// Attention of every token of a pack; `attended` is `[tokens, q_width]`.
pub fn attend(isa: Isa, c: &LlamaConfig, pack: &Pack, past: Past<'_>, qkv: &[f32], width: usize, attended: &mut [f32]) {
    assert!(qkv.len() == pack.ids.len() * width && attended.len() == pack.ids.len() * c.q_width());
    let tasks: Vec<Task<'_>> = pack
        .runs
        .iter()
        .flat_map(|run| (0..c.kv_heads).map(move |kv_head| (run, kv_head)))
        .flat_map(|(run, kv_head)| {
            let starts = (0..run.len).step_by(QUERIES);
            starts.map(move |from| Task { run, kv_head, from, queries: QUERIES.min(run.len - from) })
        })
        .collect();
    let shared = Shared(attended.as_mut_ptr());
    tasks.par_iter().for_each_init(Scratch::default, |scratch, task| {
        let shared = &shared;
        attend_task(isa, c, pack, past, qkv, width, task, scratch, shared);
    });
}

/// The stretches that a task's queries see, in order of position, the last one up to its last query.
fn stretches<'a>(
    c: &LlamaConfig,
    pack: &Pack,
    past: Past<'a>,
    qkv: &'a [f32],
    width: usize,
    task: &Task<'_>,
    value: bool,
) -> Vec<Rows<'a>> {
    let column = task.kv_head * c.head_dim;
    let base = c.q_width() + if value { c.kv_width() } else { 0 } + column;
    let cached = if value { past.values } else { past.keys };
    let mut out = Vec::with_capacity(task.run.parents.len() + 2);
    if past.len > 0 {
        out.push(Rows { data: &cached[column..], stride: c.kv_width(), len: past.len });
    }
    let fresh = |start: usize, len: usize| Rows { data: &qkv[start * width + base..], stride: width, len };
    for parent in &task.run.parents {
        let run = &pack.runs[*parent];
        out.push(fresh(run.start, run.len));
    }
    out.push(fresh(task.run.start, task.from + task.queries));
    out
}

#[allow(clippy::too_many_arguments)]
fn attend_task(
    isa: Isa,
    c: &LlamaConfig,
    pack: &Pack,
    past: Past<'_>,
    qkv: &[f32],
    width: usize,
    task: &Task<'_>,
    scratch: &mut Scratch,
    shared: &Shared,
) {
    let dim = c.head_dim;
    let before = past.len + task.run.position;
    let seen = before + task.from + task.queries;
    let padded = seen.div_ceil(LANES) * LANES;
    let dim_panels = dim.div_ceil(LANES);
    pack_keys(&stretches(c, pack, past, qkv, width, task, false), dim, padded, &mut scratch.keys);
    pack_values(&stretches(c, pack, past, qkv, width, task, true), dim, seen, &mut scratch.values);
    scratch.scores.resize(task.queries * padded, 0.0);
    scratch.out.resize(task.queries * dim_panels * LANES, 0.0);
    let scale = 1.0 / (dim as f32).sqrt();
    let group = c.heads / c.kv_heads;
    let first_row = task.run.start + task.from;
    let tile = isa.tile_rows();
    for head in task.kv_head * group..(task.kv_head + 1) * group {
        // A tile of queries sees the keys up to its last query and no product reaches beyond them.
        for from in (0..task.queries).step_by(tile) {
            let rows = tile.min(task.queries - from);
            let visible = before + task.from + from + rows;
            let scores = &mut scratch.scores[from * padded..(from + rows) * padded];
            let queries = &qkv[(first_row + from) * width + head * dim..];
            assert!(queries.len() >= (rows - 1) * width + dim);
            let score_product = Product {
                a: queries.as_ptr(),
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
            // rows and `scores` `rows` rows of `padded`, and `visible <= seen <= padded`.
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
                b_stride: seen * LANES,
                c: out.as_mut_ptr(),
                c_stride: dim_panels * LANES,
                rows,
                panels: dim_panels,
                k: visible,
                add: false,
            };
            // SAFETY: `scores` holds `rows` rows of `padded >= visible`, `values` holds
            // `dim_panels` panels of `seen >= visible` rows, and `out` `rows` whole rows.
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

/// Keys as panels of 16, each transposed: `[panels][dim][16]`, padded with zeros.
fn pack_keys(stretches: &[Rows<'_>], dim: usize, padded: usize, out: &mut Vec<f32>) {
    out.resize(padded * dim, 0.0);
    let mut at = 0;
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
    // What an earlier task left in the last panel.
    for at in at..padded {
        let panel = &mut out[(at / LANES) * dim * LANES + at % LANES..];
        panel.iter_mut().step_by(LANES).take(dim).for_each(|slot| *slot = 0.0);
    }
}

/// Values as panels of 16 dimensions: `[dim / 16][seen][16]`, padded with zeros.
fn pack_values(stretches: &[Rows<'_>], dim: usize, seen: usize, out: &mut Vec<f32>) {
    let panels = dim.div_ceil(LANES);
    out.resize(panels * seen * LANES, 0.0);
    let mut at = 0;
    for rows in stretches {
        for t in 0..rows.len {
            let row = &rows.data[t * rows.stride..t * rows.stride + dim];
            for (p, part) in row.chunks(LANES).enumerate() {
                let slot = &mut out[(p * seen + at) * LANES..(p * seen + at + 1) * LANES];
                slot[..part.len()].copy_from_slice(part);
                slot[part.len()..].fill(0.0);
            }
            at += 1;
        }
    }
}
