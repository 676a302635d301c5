//! A linear layer's weights, in the form in which this machine multiplies them.
//!
//! In: tensors of [`Weights`] and what precision is asked for. Out: [`Linear`], either f32 panels (`product.rs`) or the
//! integers of a quantised file (`codes.rs`), or words that the values are rounded to (`words.rs`).

use super::codes::Codes;
use super::kernels::{Isa, LANES};
use super::product::Packed;
use super::words::Words;
use crate::error::Result;
use crate::llm::weights::{Blocks, Weights};

/// How exactly linear layers compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// [`Precision::Int16`] where the file holds quantised weights and the processor has VNNI with 512 bits (on others it would be as
    /// fast as f32 at best); else [`Precision::F32`].
    #[default]
    Auto,
    /// Weights become f32, activations stay f32.
    F32,
    /// Integers. Of types that are groups of 32 small integers (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K), these very integers, so that
    /// nothing of a weight is lost, and activations rounded per row and block of 32 to 16 bits. Of other types, with VNNI, weights and
    /// activations of 14 bits; without it, f32.
    Int16,
    /// The first of these with activations of 8 bits, as llama.cpp computes: a quarter of a standard deviation of the logits may be
    /// lost.
    Int8,
}

/// A weight matrix of `k` inputs and `columns` outputs, packed.
pub enum Linear {
    /// f32.
    Float(Packed),
    /// Integers of the file, with a scale per block of 32.
    Codes(Codes),
    /// Words, with a scale per block of 32.
    Words(Words),
}

impl Linear {
    /// Packs tensors of `[out, k]` below each other.
    ///
    /// # Errors
    /// Exit 65 where a tensor cannot be read or has a value that is not finite.
    pub fn pack(weights: &Weights, names: &[String], k: usize, isa: Isa, precision: Precision) -> Result<Self> {
        let blocks = names.iter().map(|n| weights.blocks(n)).collect::<Result<Vec<Blocks<'_>>>>()?;
        let quantised = blocks.iter().any(|b| b.block_type.block().0 > 1);
        let integers = match precision {
            Precision::Auto => isa == Isa::Avx512Vnni && quantised,
            Precision::F32 => false,
            Precision::Int16 | Precision::Int8 => true,
        };
        if integers && let Some(codes) = Codes::pack(&blocks, k, precision != Precision::Int8) {
            return Ok(Linear::Codes(codes));
        }
        drop(blocks);
        // A value that is not finite is named here.
        let values = names.iter().map(|n| weights.values(n)).collect::<Result<Vec<_>>>()?;
        let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        if integers && let Some(words) = Words::pack(isa, &values, k) {
            return Ok(Linear::Words(words));
        }
        Ok(Linear::Float(Packed::pack(&values, k)))
    }

    /// Panels of 16 columns.
    pub fn panels(&self) -> usize {
        match self {
            Linear::Float(m) => m.panels(),
            Linear::Codes(m) => m.panels(),
            Linear::Words(m) => m.panels(),
        }
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        match self {
            Linear::Float(m) => m.panels() * LANES * m.k * size_of::<f32>(),
            Linear::Codes(m) => m.bytes(),
            Linear::Words(m) => m.bytes(),
        }
    }

    /// Copies output column `column` (a row of the matrix as it came) to `out`, `[k]`.
    pub fn unpack_row(&self, column: usize, out: &mut [f32]) {
        match self {
            Linear::Float(m) => m.unpack_row(column, out),
            Linear::Codes(m) => m.unpack_row(column, out),
            Linear::Words(m) => m.unpack_row(column, out),
        }
    }

    /// `c = a W` (or `c += a W`) for rows of `a` that are `k` wide and rows of `c` that are
    /// `16 panels` wide; on this thread.
    pub fn multiply(&self, isa: Isa, a: &[f32], c: &mut [f32], add: bool) {
        match self {
            Linear::Float(m) => m.multiply(isa, a, c, add),
            Linear::Codes(m) => m.multiply(isa, a, 0..m.panels(), c, add),
            Linear::Words(m) => m.multiply(a, 0..m.panels(), c, add),
        }
    }

    /// As [`Linear::multiply`] for a few of the panels, into rows of `c` that are `16 panels.len()` wide.
    pub fn multiply_panels(&self, isa: Isa, a: &[f32], panels: std::ops::Range<usize>, c: &mut [f32]) {
        match self {
            Linear::Float(m) => m.multiply_panels(isa, a, panels, c),
            Linear::Codes(m) => m.multiply(isa, a, panels, c, false),
            Linear::Words(m) => m.multiply(a, panels, c, false),
        }
    }
}
