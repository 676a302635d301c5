//! Q2_K: 256 values of 2 bits, 16 groups.
//!
//! Bytes: 16 of (4-bit scale, 4-bit minimum), 64 of values, f16 d, f16 dmin. Byte `32 h + i` of the values holds value
//! `128 h + 32 k + i` at bits `2 k`.

use super::{Block, BlockType, each_block, half};

/// d scale q - dmin minimum.
pub const Q2_K: Block =
    Block { block_type: BlockType::Q2_K, id: 10, name: "Q2_K", values: 256, bytes: 84, dequantize: q2_k };

fn q2_k(bytes: &[u8], out: &mut [f32]) {
    each_block::<84, 256>(bytes, out, |block, y| {
        let (d, dmin) = (half(block, 80), half(block, 82));
        for (g, y) in y.chunks_exact_mut(16).enumerate() {
            let (scale, min) = (d * f32::from(block[g] & 15), dmin * f32::from(block[g] >> 4));
            let (from, shift) = (16 + 32 * (g / 8) + 16 * (g % 2), 2 * (g / 2 % 4));
            for (v, q) in y.iter_mut().zip(&block[from..from + 16]) {
                *v = scale * f32::from((q >> shift) & 3) - min;
            }
        }
    });
}
