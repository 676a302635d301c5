//! Block types of GGUF tensors and their values.
//!
//! In: the bytes of a tensor. Out: f32, bit for bit what ggml's `dequantize_row_*`
//! (`ggml/src/ggml-quants.c`) and gguf-py give: every product here is exact in f32, so there
//! is one rounding at most and the order of operations cannot matter.

use half::{bf16, f16};

/// How the values of a tensor are stored. The ids are ggml's (`enum ggml_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// 4 bytes, IEEE single precision.
    F32,
    /// 2 bytes, IEEE half precision.
    F16,
    /// 2 bytes, the upper half of a single.
    BF16,
    /// 32 values: f16 scale d, 16 bytes of nibbles q; d (q - 8).
    Q4_0,
    /// 32 values: f16 scale d, f16 minimum m, 16 bytes of nibbles q; d q + m.
    Q4_1,
    /// 32 values: f16 scale d, 32 high bits, 16 bytes of nibbles; d (q - 16).
    Q5_0,
    /// 32 values: f16 scale d, f16 minimum m, 32 high bits, 16 bytes of nibbles; d q + m.
    Q5_1,
    /// 32 values: f16 scale d, 32 signed bytes q; d q.
    Q8_0,
}

/// All that can be read, in the order in which messages name them.
const ALL: [BlockType; 8] = [
    BlockType::F32,
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
];

/// Names of ggml types that exist but cannot be read, so that a message can name them.
const UNREADABLE: [(u32, &str); 25] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl BlockType {
    /// The type of a ggml id, or words that name what it is.
    pub fn from_id(id: u32) -> Result<Self, String> {
        if let Some(t) = ALL.into_iter().find(|t| t.id() == id) {
            return Ok(t);
        }
        match UNREADABLE.iter().find(|(n, _)| *n == id) {
            Some((_, name)) => Err(format!("quantization type {name} (id {id}), which is not supported")),
            None => Err(format!("unknown quantization type {id}")),
        }
    }

    /// ggml's id.
    pub fn id(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 6,
            BlockType::Q5_1 => 7,
            BlockType::Q8_0 => 8,
            BlockType::BF16 => 30,
        }
    }

    /// What can be read, for messages.
    pub fn names() -> String {
        ALL.map(|t| format!("{t:?}")).join(", ")
    }

    /// Values of a block and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            BlockType::F32 => (1, 4),
            BlockType::F16 | BlockType::BF16 => (1, 2),
            BlockType::Q4_0 => (32, 18),
            BlockType::Q4_1 => (32, 20),
            BlockType::Q5_0 => (32, 22),
            BlockType::Q5_1 => (32, 24),
            BlockType::Q8_0 => (32, 34),
        }
    }

    /// Bytes of a tensor with these sizes (fastest first); `None` where a row is no whole number
    /// of blocks, a size is 0, or the product does not fit the machine.
    pub fn bytes_of(self, dims: &[usize]) -> Option<usize> {
        let (values, bytes) = self.block();
        let total = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        if total == 0 || !dims.first()?.is_multiple_of(values) {
            return None;
        }
        // The f32 values must be addressable too.
        total.checked_mul(4)?;
        (total / values).checked_mul(bytes)
    }

    /// Writes the values of whole blocks. `bytes` and `out` hold the same number of blocks.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let (values, size) = self.block();
        debug_assert_eq!(bytes.len() / size, out.len() / values);
        for (block, y) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(values)) {
            match self {
                BlockType::F32 => y[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                BlockType::F16 => y[0] = half(block, 0),
                BlockType::BF16 => y[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                BlockType::Q4_0 => {
                    let d = half(block, 0);
                    nibbles(&block[2..], |i, q| y[i] = d * (f32::from(q) - 8.0));
                }
                BlockType::Q4_1 => {
                    let (d, m) = (half(block, 0), half(block, 2));
                    nibbles(&block[4..], |i, q| y[i] = d * f32::from(q) + m);
                }
                BlockType::Q5_0 => {
                    let (d, high) = (half(block, 0), word(block, 2));
                    nibbles(&block[6..], |i, q| y[i] = d * (f32::from(q | fifth_bit(high, i)) - 16.0));
                }
                BlockType::Q5_1 => {
                    let (d, m, high) = (half(block, 0), half(block, 2), word(block, 4));
                    nibbles(&block[8..], |i, q| y[i] = d * f32::from(q | fifth_bit(high, i)) + m);
                }
                BlockType::Q8_0 => {
                    let d = half(block, 0);
                    for (v, q) in y.iter_mut().zip(&block[2..]) {
                        *v = d * f32::from(*q as i8);
                    }
                }
            }
        }
    }
}

/// The half-precision number at a byte of a block.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 32-bit word at a byte of a block.
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Bit `i` of `high` as the fifth bit of a value.
fn fifth_bit(high: u32, i: usize) -> u8 {
    (((high >> i) & 1) << 4) as u8
}

/// Value `i` of the first half of a block is the low nibble of byte `i`, of the second half the high one.
#[inline(always)]
fn nibbles(bytes: &[u8], mut put: impl FnMut(usize, u8)) {
    for (i, b) in bytes[..16].iter().enumerate() {
        put(i, b & 15);
        put(i + 16, b >> 4);
    }
}

/// Index of the first NaN or infinity.
pub fn first_not_finite(values: &[f32]) -> Option<usize> {
    // The sum of x * 0 is 0 unless a value is not finite; it vectorises, a search does not.
    let clean = values.chunks(1024).all(|c| c.iter().map(|x| x * 0.0).sum::<f32>() == 0.0);
    if clean { None } else { values.iter().position(|x| !x.is_finite()) }
}
