//! The decoder on CPU cores: the same model as `model.rs`, arranged for a processor's caches.
//!
//! In: a [`Pack`] and [`Segment`]s. Out: rows of logits, and segments. Weights are packed once, at load.
//! A layer is two parallel steps: attention, by (run, key/value head, stretch of queries); and everything else, by blocks of rows,
//! whose intermediate values stay near the core that makes them.
//! Logits are made for the rows that are read, and for no other.

pub mod attention;
pub mod codes;
pub mod dot;
pub mod head;
pub mod kernels;
pub mod linear;
pub mod product;
pub mod segment;
pub mod words;

use rayon::prelude::*;

use self::kernels::{Isa, LANES};
use self::linear::{Linear, Precision};
pub use self::segment::Segment;
use super::config::LlamaConfig;
use super::decoder::{Decoder, PassSize};
use super::pack::{Pack, Read, Run};
use super::weights::{EMBEDDING, FINAL_NORM, HEAD, Weights, layer_bias, layer_tensor};
use crate::error::{Error, Result};

/// Rows of a block, at most: enough that a panel of weights is used often once it is in the core's cache, few enough
/// that what a block makes between two products is not far. Half or a quarter costs one percent.
const BLOCK_ROWS: usize = 168;

/// Tokens of a batch.
pub const BATCH_TOKENS: usize = 1536;

/// Weights of one layer.
struct Layer {
    /// `[hidden]`.
    attention_norm: Vec<f32>,
    /// Query, key and value projections side by side: `hidden -> q_width + 2 kv_width`.
    qkv: Linear,
    /// Biases of the three side by side, `[q_width + 2 kv_width]`; empty where the model has none.
    qkv_bias: Vec<f32>,
    /// Weights of the norms of query and key heads, `[head_dim]` each, where the model has them.
    head_norms: Option<[Vec<f32>; 2]>,
    /// `q_width -> hidden`.
    output: Linear,
    /// `[hidden]`.
    mlp_norm: Vec<f32>,
    /// Gate and up projections side by side: `hidden -> 2 intermediate`.
    gate_up: Linear,
    /// `intermediate -> hidden`.
    down: Linear,
}

/// A model in memory.
pub struct CpuModel {
    config: LlamaConfig,
    isa: Isa,
    layers: Vec<Layer>,
    /// `[hidden]`.
    final_norm: Vec<f32>,
    /// `hidden -> vocab`; the embedding where it is tied.
    head: Linear,
    /// `[vocab, hidden]` where the head is not the embedding.
    embedding: Option<Vec<f32>>,
    /// `[head_dim / 2]`.
    frequencies: Vec<f32>,
}

impl CpuModel {
    /// Loads weights for an instruction set of this machine; linear layers compute in f32.
    ///
    /// # Errors
    /// Exit 65 where a tensor cannot be read.
    pub fn load(weights: &Weights, isa: Isa) -> Result<Self> {
        CpuModel::load_with(weights, isa, Precision::F32)
    }

    /// As [`CpuModel::load`], with a precision of the linear layers.
    ///
    /// # Errors
    /// As [`CpuModel::load`].
    pub fn load_with(weights: &Weights, isa: Isa, precision: Precision) -> Result<Self> {
        let c = weights.config().clone();
        let layer = |i: usize| -> Result<Layer> {
            let vector = |leaf: &str| weights.values(&layer_tensor(i, leaf));
            let matrix = |leaves: &[&str], k: usize| {
                let names: Vec<String> = leaves.iter().map(|leaf| layer_tensor(i, leaf)).collect();
                Linear::pack(weights, &names, k, isa, precision)
            };
            let mut qkv_bias = Vec::new();
            for leaf in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].iter().filter(|_| c.qkv_bias) {
                qkv_bias.extend(weights.values(&layer_bias(i, leaf))?);
            }
            let head_norms = || Ok::<_, Error>([vector("self_attn.q_norm")?, vector("self_attn.k_norm")?]);
            Ok(Layer {
                attention_norm: vector("input_layernorm")?,
                qkv: matrix(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], c.hidden)?,
                qkv_bias,
                head_norms: c.qk_norm.then(head_norms).transpose()?,
                output: matrix(&["self_attn.o_proj"], c.q_width())?,
                mlp_norm: vector("post_attention_layernorm")?,
                gate_up: matrix(&["mlp.gate_proj", "mlp.up_proj"], c.hidden)?,
                down: matrix(&["mlp.down_proj"], c.intermediate)?,
            })
        };
        let layers = (0..c.layers).into_par_iter().map(layer).collect::<Result<Vec<_>>>()?;
        let head = if c.tied { EMBEDDING } else { HEAD };
        let head = Linear::pack(weights, &[head.to_owned()], c.hidden, isa, precision)?;
        let embedding = if c.tied { None } else { Some(weights.values(EMBEDDING)?) };
        let (final_norm, frequencies) = (weights.values(FINAL_NORM)?, c.rope_frequencies());
        Ok(CpuModel { config: c, isa, layers, final_norm, head, embedding, frequencies })
    }

    /// Bytes that the weights take in memory.
    pub fn bytes(&self) -> usize {
        let layer = |l: &Layer| {
            let head_norms = l.head_norms.iter().flatten().map(Vec::len).sum::<usize>();
            let vectors = l.attention_norm.len() + l.mlp_norm.len() + l.qkv_bias.len() + head_norms;
            [&l.qkv, &l.output, &l.gate_up, &l.down].iter().map(|m| m.bytes()).sum::<usize>()
                + vectors * size_of::<f32>()
        };
        let floats = self.final_norm.len() + self.frequencies.len() + self.embedding.as_ref().map_or(0, Vec::len);
        self.layers.iter().map(layer).sum::<usize>() + self.head.bytes() + floats * size_of::<f32>()
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
    fn rotations(&self, pack: &Pack) -> (Vec<f32>, Vec<f32>) {
        let half = self.frequencies.len();
        let mut cos = vec![0f32; pack.ids.len() * half];
        let mut sin = cos.clone();
        for run in &pack.runs {
            for t in 0..run.len {
                let position = (run.position + t) as f32;
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
        qkv_width(&self.config)
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
fn add_product(weights: &Linear, isa: Isa, a: &[f32], x: &mut [f32], width: usize, padded: &mut Vec<f32>) {
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

/// Width of a row of fused queries, keys and values.
fn qkv_width(c: &LlamaConfig) -> usize {
    (c.q_width() + 2 * c.kv_width()).next_multiple_of(LANES)
}

/// Bytes that the weights of a model take at most, in f32; where they stay integers, they take less.
pub fn most_weight_bytes(c: &LlamaConfig) -> usize {
    let packed = |columns: usize, k: usize| columns.next_multiple_of(LANES) * k;
    let matrices = packed(qkv_width(c), c.hidden)
        + packed(c.hidden, c.q_width())
        + packed(2 * c.intermediate, c.hidden)
        + packed(c.hidden, c.intermediate);
    let vectors = 2 * c.hidden + qkv_width(c) + 2 * c.head_dim;
    let embedding = if c.tied { 0 } else { c.vocab_size * c.hidden };
    let tables = packed(c.vocab_size, c.hidden) + embedding + c.hidden + c.head_dim;
    4 * (c.layers * (matrices + vectors) + tables)
}

/// Bytes that keys and values of a token take.
pub fn token_bytes(c: &LlamaConfig) -> usize {
    4 * 2 * c.layers * c.kv_width()
}

/// Bytes that one pass takes at most besides weights and segments.
pub fn pass_bytes(c: &LlamaConfig, PassSize { tokens, seen, .. }: PassSize) -> usize {
    let vocabulary = c.vocab_size.next_multiple_of(LANES);
    let inner = 2 * c.intermediate + LANES;
    let rows = tokens * (c.hidden + qkv_width(c) + c.q_width() + c.head_dim)
        + tokens * (2 * c.hidden + c.q_width())
        + head::ROWS * (2 * vocabulary + c.hidden)
        + vocabulary;
    // The last term: activations as integers, with their scales.
    let block = BLOCK_ROWS * (2 * c.hidden + LANES + inner + c.intermediate + c.intermediate.max(c.q_width()));
    let threads = rayon::current_num_threads().max(1);
    // Besides: runs, reads and tasks, which are lists of a few words per token.
    4 * rows + threads * (4 * block + attention::scratch_bytes(c, seen)) + 1024 * tokens
}

impl Decoder for CpuModel {
    type Segment = Segment;

    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn batch_tokens(&self) -> usize {
        BATCH_TOKENS
    }

    fn weight_bytes(&self) -> usize {
        self.bytes()
    }

    fn token_bytes(&self) -> usize {
        token_bytes(&self.config)
    }

    fn pass_bytes(&self, size: PassSize) -> usize {
        pass_bytes(&self.config, size)
    }

    fn slice(&self, segment: &Segment, from: usize, len: usize) -> Segment {
        segment.slice(&self.config, from, len)
    }

    fn forward(&self, pack: &Pack, past: &[&Segment], each: &mut dyn FnMut(usize, &[f32])) -> Result<Vec<Segment>> {
        let c = &self.config;
        let tokens = pack.ids.len();
        let (hidden, width, half) = (c.hidden, self.qkv_width(), self.frequencies.len());
        let (cos, sin) = self.rotations(pack);
        let mut x = vec![0f32; tokens * hidden];
        x.par_chunks_mut(hidden).zip(&pack.ids).for_each(|(row, id)| self.embed(*id, row));
        let mut qkv = vec![0f32; tokens * width];
        let mut attended = vec![0f32; tokens * c.q_width()];
        let block = self.block_rows(tokens);
        let keeping: Vec<&Run> = pack.runs.iter().filter(|run| run.keep > 0).collect();
        let mut kept: Vec<Segment> = keeping.iter().map(|run| Segment::new(c, run.keep)).collect();

        let first = &self.layers[0];
        x.par_chunks(block * hidden)
            .zip(qkv.par_chunks_mut(block * width))
            .zip(cos.par_chunks(block * half).zip(sin.par_chunks(block * half)))
            .for_each_init(Scratch::default, |scratch, ((x, qkv), (cos, sin))| {
                self.project(first, x, qkv, cos, sin, scratch);
            });
        for (i, layer) in self.layers.iter().enumerate() {
            let of_layer = attention::Layer { config: c, pack, past, index: i, qkv: &qkv, width };
            attention::attend(self.isa, of_layer, &mut attended);
            for (segment, run) in kept.iter_mut().zip(&keeping) {
                segment.fill(i, &qkv[run.start * width..(run.start + run.keep) * width], width, c.q_width());
            }
            // After the last layer only the rows that are read go on.
            let Some(next) = self.layers.get(i + 1) else { break };
            x.par_chunks_mut(block * hidden)
                .zip(attended.par_chunks(block * c.q_width()))
                .zip(qkv.par_chunks_mut(block * width))
                .zip(cos.par_chunks(block * half).zip(sin.par_chunks(block * half)))
                .for_each_init(Scratch::default, |scratch, (((x, attended), qkv), (cos, sin))| {
                    self.feed_forward(layer, attended, x, scratch);
                    self.project(next, x, qkv, cos, sin, scratch);
                });
        }
        drop(qkv);
        let last = &self.layers[self.layers.len() - 1];
        let mut rows = vec![0f32; pack.read.len() * hidden];
        let mut mixed = vec![0f32; pack.read.len() * c.q_width()];
        for (r, Read { at, .. }) in pack.read.iter().enumerate() {
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
        self.answer(&normed, &pack.read, each);
        Ok(kept)
    }
}
