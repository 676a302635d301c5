//! Block types of GGUF tensors and their values.
//!
//! In: the bytes of a tensor. Out: f32, bit for bit what ggml's `dequantize_row_*`
//! (`ggml/src/ggml-quants.c`) and gguf-py give: every product here is exact in f32, so there
//! is one rounding at most and the order of operations cannot matter.
//!
//! A type is one file, one name of [`BlockType`] and one line of [`ALL`].

pub mod float;
pub mod iq4;
pub mod k2;
pub mod k3;
pub mod k4;
pub mod k5;
pub mod k6;
pub mod q4;
pub mod q5;
pub mod q8;

use half::f16;

/// How the values of a tensor are stored, by ggml's names.
#[allow(non_camel_case_types, reason = "the names of ggml, under which everybody knows them")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// 256 values in 16 groups with 4-bit scales and minima, 2 bits each.
    Q2_K,
    /// 256 values in 16 groups with 6-bit scales, 3 bits each.
    Q3_K,
    /// 256 values in 8 groups with 6-bit scales and minima, 4 bits each.
    Q4_K,
    /// 256 values in 8 groups with 6-bit scales and minima, 5 bits each.
    Q5_K,
    /// 256 values in 16 groups with 8-bit scales, 6 bits each.
    Q6_K,
    /// 32 values: f16 scale d, 16 bytes of nibbles that choose one of 16 uneven steps.
    IQ4_NL,
    /// 256 values in 8 groups with 6-bit scales, steps as in `IQ4_NL`.
    IQ4_XS,
}

/// One block type.
pub struct Block {
    /// Its name in the program.
    pub block_type: BlockType,
    /// Its id in files (`enum ggml_type`).
    pub id: u32,
    /// Its name in messages.
    pub name: &'static str,
    /// Values of a block.
    pub values: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Writes the values of whole blocks.
    pub dequantize: fn(&[u8], &mut [f32]),
}

/// All that can be read, in the order of [`BlockType`], in which messages name them too.
pub const ALL: [Block; 15] = [
    float::F32,
    float::F16,
    float::BF16,
    q4::Q4_0,
    q4::Q4_1,
    q5::Q5_0,
    q5::Q5_1,
    q8::Q8_0,
    k2::Q2_K,
    k3::Q3_K,
    k4::Q4_K,
    k5::Q5_K,
    k6::Q6_K,
    iq4::IQ4_NL,
    iq4::IQ4_XS,
];

/// Names of ggml types that exist but cannot be read, so that a message can name them.
const UNREADABLE: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
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
        if let Some(b) = ALL.iter().find(|b| b.id == id) {
            return Ok(b.block_type);
        }
        match UNREADABLE.iter().find(|(n, _)| *n == id) {
            Some((_, name)) => Err(format!("quantization type {name} (id {id}), which is not supported")),
            None => Err(format!("unknown quantization type {id}")),
        }
    }

    fn entry(self) -> &'static Block {
        const { &ALL }.get(self as usize).expect("every type is in the list, in this order; tested")
    }

    /// ggml's id.
    pub fn id(self) -> u32 {
        self.entry().id
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// What can be read, for messages.
    pub fn names() -> String {
        ALL.map(|b| b.name).join(", ")
    }

    /// Values of a block and its bytes.
    pub fn block(self) -> (usize, usize) {
        (self.entry().values, self.entry().bytes)
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
        (self.entry().dequantize)(bytes, out);
    }
}

/// Calls `each` with every block of `BYTES` bytes and the place of its `VALUES` values.
#[inline(always)]
fn each_block<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    mut each: impl FnMut(&[u8; BYTES], &mut [f32; VALUES]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (values, _) = out.as_chunks_mut::<VALUES>();
    for (block, y) in blocks.iter().zip(values) {
        each(block, y);
    }
}

/// The half-precision number at a byte of a block.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value as Json;
    use sha2::{Digest, Sha256};

    use super::*;

    fn golden(name: &str) -> Json {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm").join(name);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn the_list_is_in_the_order_of_the_names() {
        for (i, b) in ALL.iter().enumerate() {
            assert_eq!(b.block_type as usize, i);
            assert_eq!(BlockType::from_id(b.id), Ok(b.block_type));
            assert_eq!(format!("{:?}", b.block_type), b.name);
            assert!(UNREADABLE.iter().all(|(id, _)| *id != b.id));
        }
    }

    /// Random bytes and what gguf-py makes of them; the file has all types that we read but F32.
    #[test]
    fn blocks_are_dequantized_bit_for_bit() {
        let mut tested = 0;
        for block in golden("blocks.json").as_array().unwrap() {
            let name = block["type"].as_str().unwrap();
            let block_type = BlockType::from_id(block["ggml_id"].as_u64().unwrap() as u32).unwrap();
            assert_eq!(block_type.name(), name);
            let hex = block["bytes_hex"].as_str().unwrap();
            let bytes: Vec<u8> =
                (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
            let mut values = vec![0f32; 512];
            assert_eq!(block_type.bytes_of(&[256, 2]), Some(bytes.len()));
            block_type.dequantize(&bytes, &mut values);
            let hash = Sha256::digest(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
            let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hash, block["sha256"].as_str().unwrap(), "{name}");
            tested += 1;
        }
        assert_eq!(tested, ALL.len() - 1);
    }

    /// A tiny model per type, its logits by transformers from gguf-py's values, by both decoders.
    #[test]
    fn a_model_of_each_type_gives_the_logits_of_transformers() {
        for (kind, want) in golden("types/golden.json").as_object().unwrap() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llm/types");
            let worst = crate::llm::architectures::tests::worst(&folder.join(format!("{kind}.gguf")), want);
            assert!(worst < 2e-4, "{kind}: {worst}");
        }
    }
}
