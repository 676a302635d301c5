//! Q3_K: 256 values of 3 bits, 16 groups.
//!
//! Bytes: 32 of third bits (bit `k` of byte `i`: value `32 k + i`, 0 for less 4), 64 of low bits as in Q2_K, 12 of
//! 6-bit scales, f16 d.

use super::{Block, BlockType, each_block, half};

/// d (scale - 32) q, q from -4 to 3.
pub const Q3_K: Block =
    Block { block_type: BlockType::Q3_K, id: 11, name: "Q3_K", values: 256, bytes: 110, dequantize: q3_k };

fn q3_k(bytes: &[u8], out: &mut [f32]) {
    each_block::<110, 256>(bytes, out, |block, y| {
        let (high, low, scales, d) = (&block[..32], &block[32..96], &block[96..108], half(block, 108));
        for (g, y) in y.chunks_exact_mut(16).enumerate() {
            // Low nibbles of 8 bytes, then their high ones; two more bits from the last 4 bytes.
            let four = (scales[g % 8] >> (4 * (g / 8))) & 15;
            let two = (scales[8 + g % 4] >> (2 * (g / 4))) & 3;
            let scale = d * (f32::from(four | (two << 4)) - 32.0);
            let (from, shift) = (32 * (g / 8) + 16 * (g % 2), 2 * (g / 2 % 4));
            let third = &high[16 * (g % 2)..];
            for ((v, q), h) in y.iter_mut().zip(&low[from..]).zip(third) {
                let less = if (h >> (g / 2)) & 1 == 0 { 4.0 } else { 0.0 };
                *v = scale * (f32::from((q >> shift) & 3) - less);
            }
        }
    });
}
