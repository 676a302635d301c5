//! A linear layer's weights, in the form in which this machine multiplies them.
//!
//! In: tensors of [`Weights`] and what precision is asked for. Out: [`Linear`], either f32 panels (`product.rs`) or the
//! integers of a quantised file (`codes.rs`), or words that the values are rounded to (`words.rs`).

use super::codes::Codes;
use super::kernels::{Isa, LANES};
use super::product::Packed;
use super::words::Words;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::llm::weights::{Blocks, Weights};

/// How exactly linear layers compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
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
        let mut integers = false;
        if precision != Precision::F32 {
            let blocks = names.iter().map(|n| weights.blocks(n)).collect::<Result<Vec<Blocks<'_>>>>()?;
            let quantised = blocks.iter().any(|b| b.block_type.block().0 > 1);
            integers = precision != Precision::Auto || (isa == Isa::Avx512Vnni && quantised);
            if integers && let Some(codes) = Codes::pack(&blocks, k, precision != Precision::Int8) {
                return Ok(Linear::Codes(codes));
            }
        }
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

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::llm::LlmOptions;
    use crate::llm::cpu::CpuModel;
    use crate::llm::engine::{Engine, Local};

    fn logits(path: &Path, isa: Isa, precision: Precision) -> Vec<f32> {
        let model = CpuModel::load_with(&Weights::open(path).unwrap(), isa, precision).unwrap();
        Local::new(model, LlmOptions::default()).logits(&[1, 5, 9, 30, 2, 17]).unwrap()
    }

    /// Files of every block type, and folders of floats: 16 bits are nearer to f32 than 8 by far, and `Auto` is one of the two.
    #[test]
    fn every_stored_type_is_near_to_f32() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm");
        let files = std::fs::read_dir(golden.join("types")).unwrap().map(|f| f.unwrap().path());
        let mut paths: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
        assert!(paths.len() >= 7, "{paths:?}");
        paths.extend(["tiny", "tiny_untied", "qwen3", "llama2/model.gguf"].map(|p| golden.join(p)));
        for path in paths {
            let want = logits(&path, Isa::detect(), Precision::F32);
            let deviation = want.iter().map(|v| v * v).sum::<f32>().sqrt() / (want.len() as f32).sqrt();
            for isa in Isa::available() {
                for (precision, tolerance) in
                    [(Precision::Int16, 5e-3), (Precision::Auto, 5e-3), (Precision::Int8, 0.2)]
                {
                    let got = logits(&path, isa, precision);
                    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    let name = path.display();
                    assert!(worst <= tolerance * deviation, "{name} {isa:?} {precision:?}: {worst} of {deviation}");
                }
            }
        }
    }
}
