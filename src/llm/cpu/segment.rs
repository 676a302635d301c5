//! Keys and values of tokens that were computed, for the tokens that follow them.
//!
//! In: rows of fused queries, keys and values, layer by layer. Out: [`Segment`], which attention reads in place.

use crate::llm::config::LlamaConfig;

/// Keys and values of consecutive tokens, in one piece of memory.
#[derive(Clone)]
pub struct Segment {
    len: usize,
    kv_width: usize,
    /// `[layers][keys | values][len, kv_width]`.
    data: Vec<f32>,
}

impl Segment {
    /// Zeros for `len` tokens.
    pub(super) fn new(c: &LlamaConfig, len: usize) -> Self {
        Segment { len, kv_width: c.kv_width(), data: vec![0.0; c.layers * 2 * len * c.kv_width()] }
    }

    /// Keys of a layer, `[len, kv_width]`.
    pub(super) fn keys(&self, layer: usize) -> &[f32] {
        &self.data[self.range(layer, 0)]
    }

    /// Values of a layer, `[len, kv_width]`.
    pub(super) fn values(&self, layer: usize) -> &[f32] {
        &self.data[self.range(layer, 1)]
    }

    fn range(&self, layer: usize, which: usize) -> std::ops::Range<usize> {
        let size = self.len * self.kv_width;
        let from = (2 * layer + which) * size;
        from..from + size
    }

    /// Takes keys and values of a layer from a run's first rows of `[q | k | v]`.
    pub(super) fn fill(&mut self, layer: usize, rows: &[f32], width: usize, keys_at: usize) {
        for which in 0..2 {
            let (from, kv_width) = (keys_at + which * self.kv_width, self.kv_width);
            let range = self.range(layer, which);
            for (to, row) in self.data[range].chunks_exact_mut(kv_width).zip(rows.chunks_exact(width)) {
                to.copy_from_slice(&row[from..from + kv_width]);
            }
        }
    }

    /// Copies the tokens `from .. from + len`.
    pub(super) fn slice(&self, c: &LlamaConfig, from: usize, len: usize) -> Segment {
        let width = self.kv_width;
        let mut out = Segment::new(c, len);
        for layer in 0..c.layers {
            for which in 0..2 {
                let source = self.range(layer, which).start + from * width;
                let target = out.range(layer, which);
                out.data[target].copy_from_slice(&self.data[source..source + len * width]);
            }
        }
        out
    }
}
