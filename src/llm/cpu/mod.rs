//! The decoder on CPU cores: the same model as `model.rs`, arranged for a processor's caches.
//!
//! In: a [`Pack`] and a [`Cache`]. Out: rows of logits. Weights are packed once, at load.
//! A layer is two parallel steps: attention, by (run, key/value head, stretch of queries); and everything else, by blocks of rows,
//! whose intermediate values stay near the core that makes them.
//! Logits are made for the rows that are read, and for no other.

pub mod attention;
pub mod kernels;
pub mod product;

use rayon::prelude::*;

use self::attention::Past;
use self::kernels::{Isa, LANES};
use self::product::Packed;
use super::config::LlamaConfig;
use super::decoder::Decoder;
use super::pack::Pack;
use super::weights::{EMBEDDING, FINAL_NORM, HEAD, Weights, layer_bias, layer_tensor};
use crate::error::{Error, Result};

/// Rows of a block, at most: enough that a panel of weights is used often once it is in the core's cache, few enough
/// that what a block makes between two products is not far. Half or a quarter costs one percent.
const BLOCK_ROWS: usize = 168;

/// Rows of logits that are made at once.
const HEAD_ROWS: usize = 56;

/// Weights of one layer.
struct Layer {
    /// `[hidden]`.
    attention_norm: Vec<f32>,
    /// Query, key and value projections side by side: `hidden -> q_width + 2 kv_width`.
    qkv: Packed,
    /// Biases of the three side by side, `[q_width + 2 kv_width]`; empty where the model has none.
    qkv_bias: Vec<f32>,
    /// Weights of the norms of query and key heads, `[head_dim]` each, where the model has them.
    head_norms: Option<[Vec<f32>; 2]>,
    /// `q_width -> hidden`.
    output: Packed,
    /// `[hidden]`.
    mlp_norm: Vec<f32>,
    /// Gate and up projections side by side: `hidden -> 2 intermediate`.
    gate_up: Packed,
    /// `intermediate -> hidden`.
    down: Packed,
}

/// A model in memory.
pub struct CpuModel {
    config: LlamaConfig,
    isa: Isa,
    layers: Vec<Layer>,
    /// `[hidden]`.
    final_norm: Vec<f32>,
    /// `hidden -> vocab`; the embedding where it is tied.
    head: Packed,
    /// `[vocab, hidden]` where the head is not the embedding.
    embedding: Option<Vec<f32>>,
    /// `[head_dim / 2]`.
    frequencies: Vec<f32>,
}

/// Keys and values of the tokens so far, of one sequence.
#[derive(Clone, Default)]
pub struct Cache {
    len: usize,
    /// Per layer: keys and values, `[len, kv_width]` each.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl CpuModel {
    /// Loads weights for an instruction set of this machine.
    ///
    /// # Errors
    /// Exit 65 where a tensor cannot be read.
    pub fn load(weights: &Weights, isa: Isa) -> Result<Self> {
        let c = weights.config().clone();
        let layer = |i: usize| -> Result<Layer> {
            let get = |leaf: &str| weights.values(&layer_tensor(i, leaf));
            let (q, k, v) = (get("self_attn.q_proj")?, get("self_attn.k_proj")?, get("self_attn.v_proj")?);
            let mut qkv_bias = Vec::new();
            for leaf in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].iter().filter(|_| c.qkv_bias) {
                qkv_bias.extend(weights.values(&layer_bias(i, leaf))?);
            }
            let head_norms = || Ok::<_, Error>([get("self_attn.q_norm")?, get("self_attn.k_norm")?]);
            let (gate, up) = (get("mlp.gate_proj")?, get("mlp.up_proj")?);
            Ok(Layer {
                attention_norm: get("input_layernorm")?,
                qkv: Packed::pack(&[&q, &k, &v], c.hidden),
                qkv_bias,
                head_norms: c.qk_norm.then(head_norms).transpose()?,
                output: Packed::pack(&[&get("self_attn.o_proj")?], c.q_width()),
                mlp_norm: get("post_attention_layernorm")?,
                gate_up: Packed::pack(&[&gate, &up], c.hidden),
                down: Packed::pack(&[&get("mlp.down_proj")?], c.intermediate),
            })
        };
        let layers = (0..c.layers).into_par_iter().map(layer).collect::<Result<Vec<_>>>()?;
        let embedding = weights.values(EMBEDDING)?;
        let (head, embedding) = if c.tied {
            (Packed::pack(&[&embedding], c.hidden), None)
        } else {
            (Packed::pack(&[&weights.values(HEAD)?], c.hidden), Some(embedding))
        };
        let (final_norm, frequencies) = (weights.values(FINAL_NORM)?, c.rope_frequencies());
        Ok(CpuModel { config: c, isa, layers, final_norm, head, embedding, frequencies })
    }

    /// The embedding of a token, `[hidden]`.
    fn embed(&self, id: u32, out: &mut [f32]) {
        let id = id as usize;
        match &self.embedding {
            Some(table) => out.copy_from_slice(&table[id * out.len()..(id + 1) * out.len()]),
            None => self.head.unpack_row(id, out),
        }
    }

    /// Cosines and sines of the rotation at each token, `[tokens, head_dim / 2]` each.
    fn rotations(&self, pack: &Pack, past: usize) -> (Vec<f32>, Vec<f32>) {
        let half = self.frequencies.len();
        let mut cos = vec![0f32; pack.ids.len() * half];
        let mut sin = cos.clone();
        for run in &pack.runs {
            for t in 0..run.len {
                let position = (past + run.position + t) as f32;
                let at = (run.start + t) * half;
                for (i, f) in self.frequencies.iter().enumerate() {
                    // The reference rounds the angle to f32 before it takes the cosine.
                    let angle = f64::from(position * f);
                    cos[at + i] = angle.cos() as f32;
                    sin[at + i] = angle.sin() as f32;
                }
            }
        }
        (cos, sin)
    }

    /// Width of a row of fused queries, keys and values.
    fn qkv_width(&self) -> usize {
        (self.config.q_width() + 2 * self.config.kv_width()).div_ceil(LANES) * LANES
    }

    /// Rows of a block so that every thread has about the same number of them.
    fn block_rows(&self, rows: usize) -> usize {
        let threads = rayon::current_num_threads().max(1);
        let blocks = rows.div_ceil(BLOCK_ROWS).div_ceil(threads) * threads;
        rows.div_ceil(blocks.max(1)).max(1).next_multiple_of(self.isa.tile_rows())
    }

    /// Norm, projections and rotation of a block of rows: the queries, keys and values of `layer`.
    fn project(&self, layer: &Layer, x: &[f32], qkv: &mut [f32], cos: &[f32], sin: &[f32], scratch: &mut Scratch) {
        let c = &self.config;
        let normed = &mut scratch.normed;
        normed.resize(x.len(), 0.0);
        kernels::rms_norm(self.isa, x, &layer.attention_norm, c.rms_eps, normed);
        layer.qkv.multiply(self.isa, normed, qkv, false);
        let half = self.frequencies.len();
        for ((row, cos), sin) in qkv.chunks_exact_mut(self.qkv_width()).zip(cos.chunks(half)).zip(sin.chunks(half)) {
            add(row, &layer.qkv_bias);
            if let Some([query, key]) = &layer.head_norms {
                let (queries, rest) = row.split_at_mut(c.q_width());
                norm_heads(queries, query, c.rms_eps);
                norm_heads(&mut rest[..c.kv_width()], key, c.rms_eps);
            }
            kernels::rotate(self.isa, &mut row[..c.q_width() + c.kv_width()], cos, sin);
        }
    }

    /// What follows attention in a layer, for a block of rows: output projection and feed-forward.
    fn feed_forward(&self, layer: &Layer, attended: &[f32], x: &mut [f32], scratch: &mut Scratch) {
        let c = &self.config;
        let rows = x.len() / c.hidden;
        add_product(&layer.output, self.isa, attended, x, c.hidden, &mut scratch.padded);
        let inner = layer.gate_up.panels() * LANES;
        let normed = &mut scratch.normed;
        normed.resize(x.len(), 0.0);
        kernels::rms_norm(self.isa, x, &layer.mlp_norm, c.rms_eps, normed);
        scratch.gate_up.resize(rows * inner, 0.0);
        layer.gate_up.multiply(self.isa, normed, &mut scratch.gate_up, false);
        scratch.activated.resize(rows * c.intermediate, 0.0);
        if inner == 2 * c.intermediate {
            kernels::swiglu(self.isa, &scratch.gate_up, c.intermediate, &mut scratch.activated);
        } else {
            // Padded panels: row by row.
            let rows = scratch.gate_up.chunks(inner).zip(scratch.activated.chunks_mut(c.intermediate));
            for (row, out) in rows {
                kernels::swiglu(self.isa, &row[..2 * c.intermediate], c.intermediate, out);
            }
        }
        add_product(&layer.down, self.isa, &scratch.activated, x, c.hidden, &mut scratch.padded);
    }

    /// Logits of hidden rows, `each` called with the index of the row and `[vocab]`.
    fn logits(&self, hidden: &[f32], each: &mut dyn FnMut(usize, &[f32])) {
        let (width, vocab) = (self.config.hidden, self.config.vocab_size);
        let panels = self.head.panels();
        let threads = rayon::current_num_threads().max(1);
        // A few stretches of the vocabulary per thread; each is a product of its own.
        let stretch = panels.div_ceil(4 * threads).max(1);
        let mut logits = vec![0f32; HEAD_ROWS.min(hidden.len() / width) * panels * LANES];
        let mut row = vec![0f32; panels * LANES];
        for (block, rows) in hidden.chunks(HEAD_ROWS * width).enumerate() {
            let n = rows.len() / width;
            // Stretch by stretch in memory: `[stretches][n][columns of the stretch]`.
            logits[..n * panels * LANES].par_chunks_mut(n * stretch * LANES).enumerate().for_each(|(s, out)| {
                let first = s * stretch;
                self.head.multiply_panels(self.isa, rows, first..(first + stretch).min(panels), out);
            });
            for r in 0..n {
                for (s, part) in logits[..n * panels * LANES].chunks(n * stretch * LANES).enumerate() {
                    let columns = part.len() / n;
                    let at = s * stretch * LANES;
                    row[at..at + columns].copy_from_slice(&part[r * columns..(r + 1) * columns]);
                }
                each(block * HEAD_ROWS + r, &row[..vocab]);
            }
        }
    }
}

/// Buffers of one thread for one block of rows.
#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    gate_up: Vec<f32>,
    activated: Vec<f32>,
    padded: Vec<f32>,
}

/// `x += a W`, also where the width of `x` is no whole number of panels.
fn add_product(weights: &Packed, isa: Isa, a: &[f32], x: &mut [f32], width: usize, padded: &mut Vec<f32>) {
    let full = weights.panels() * LANES;
    if full == width {
        weights.multiply(isa, a, x, true);
        return;
    }
    padded.resize(x.len() / width * full, 0.0);
    weights.multiply(isa, a, padded, false);
    for (x, p) in x.chunks_mut(width).zip(padded.chunks(full)) {
        for (x, p) in x.iter_mut().zip(p) {
            *x += *p;
        }
    }
}

/// `row += bias`, as far as the bias goes.
fn add(row: &mut [f32], bias: &[f32]) {
    for (x, b) in row.iter_mut().zip(bias) {
        *x += b;
    }
}

/// RMSNorm of each head of a row, in place; `weight` is `[head_dim]`.
fn norm_heads(row: &mut [f32], weight: &[f32], eps: f32) {
    for head in row.chunks_exact_mut(weight.len()) {
        // Sums side by side, so that the compiler may keep them in one register.
        let mut sums = [0f32; LANES];
        for part in head.chunks(LANES) {
            for (sum, x) in sums.iter_mut().zip(part) {
                *sum += x * x;
            }
        }
        let scale = 1.0 / (sums.iter().sum::<f32>() / weight.len() as f32 + eps).sqrt();
        for (x, w) in head.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    }
}

impl Decoder for CpuModel {
    type Cache = Cache;

    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn batch_tokens(&self) -> usize {
        1536
    }

    fn empty(&self) -> Cache {
        Cache { len: 0, layers: vec![(Vec::new(), Vec::new()); self.config.layers] }
    }

    fn truncate(&self, cache: &mut Cache, len: usize) {
        for (keys, values) in &mut cache.layers {
            keys.truncate(len * self.config.kv_width());
            values.truncate(len * self.config.kv_width());
        }
        cache.len = cache.len.min(len);
    }

    fn forward(&self, cache: &mut Cache, pack: &Pack, keep: bool, each: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let c = &self.config;
        let tokens = pack.ids.len();
        let (hidden, width, half) = (c.hidden, self.qkv_width(), self.frequencies.len());
        let (cos, sin) = self.rotations(pack, cache.len);
        let mut x = vec![0f32; tokens * hidden];
        x.par_chunks_mut(hidden).zip(&pack.ids).for_each(|(row, id)| self.embed(*id, row));
        let mut qkv = vec![0f32; tokens * width];
        let mut attended = vec![0f32; tokens * c.q_width()];
        let block = self.block_rows(tokens);

        let first = &self.layers[0];
        x.par_chunks(block * hidden)
            .zip(qkv.par_chunks_mut(block * width))
            .zip(cos.par_chunks(block * half).zip(sin.par_chunks(block * half)))
            .for_each_init(Scratch::default, |scratch, ((x, qkv), (cos, sin))| {
                self.project(first, x, qkv, cos, sin, scratch);
            });
        for (i, layer) in self.layers.iter().enumerate() {
            let (keys, values) = &cache.layers[i];
            let past = Past { len: cache.len, keys, values };
            attention::attend(self.isa, c, pack, past, &qkv, width, &mut attended);
            if keep {
                let (keys, values) = &mut cache.layers[i];
                for row in qkv.chunks_exact(width) {
                    keys.extend_from_slice(&row[c.q_width()..c.q_width() + c.kv_width()]);
                    values.extend_from_slice(&row[c.q_width() + c.kv_width()..c.q_width() + 2 * c.kv_width()]);
                }
            }
            let next = self.layers.get(i + 1);
            // After the last layer only the rows that are read go on.
            if next.is_none() {
                break;
            }
            x.par_chunks_mut(block * hidden)
                .zip(attended.par_chunks(block * c.q_width()))
                .zip(qkv.par_chunks_mut(block * width))
                .zip(cos.par_chunks(block * half).zip(sin.par_chunks(block * half)))
                .for_each_init(Scratch::default, |scratch, (((x, attended), qkv), (cos, sin))| {
                    self.feed_forward(layer, attended, x, scratch);
                    if let Some(next) = next {
                        self.project(next, x, qkv, cos, sin, scratch);
                    }
                });
        }
        if keep {
            cache.len += tokens;
        }
        let last = &self.layers[self.layers.len() - 1];
        let mut rows = vec![0f32; pack.read.len() * hidden];
        let mut mixed = vec![0f32; pack.read.len() * c.q_width()];
        for (r, at) in pack.read.iter().enumerate() {
            rows[r * hidden..(r + 1) * hidden].copy_from_slice(&x[at * hidden..(at + 1) * hidden]);
            mixed[r * c.q_width()..(r + 1) * c.q_width()]
                .copy_from_slice(&attended[at * c.q_width()..(at + 1) * c.q_width()]);
        }
        let mut normed = vec![0f32; rows.len()];
        let block = self.block_rows(pack.read.len());
        rows.par_chunks_mut(block * hidden)
            .zip(mixed.par_chunks(block * c.q_width()))
            .zip(normed.par_chunks_mut(block * hidden))
            .for_each_init(Scratch::default, |scratch, ((x, attended), normed)| {
                self.feed_forward(last, attended, x, scratch);
                kernels::rms_norm(self.isa, x, &self.final_norm, c.rms_eps, normed);
            });
        self.logits(&normed, each);
        Ok(())
    }
}
