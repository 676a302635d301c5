//! Q5_K: 256 values of 5 bits, 8 groups.
//!
//! Bytes: f16 d, f16 dmin, 12 of scales and minima as in Q4_K, 32 of fifth bits (bit `g` of byte `i`: value `32 g + i`), 128
//! of nibbles as in Q4_K.

use super::k4::scale_and_minimum;
use super::{Block, BlockType, each_block, half};

/// d scale q - dmin minimum.
pub const Q5_K: Block =
    Block { block_type: BlockType::Q5_K, id: 13, name: "Q5_K", values: 256, bytes: 176, dequantize: q5_k };

fn q5_k(bytes: &[u8], out: &mut [f32]) {
    each_block::<176, 256>(bytes, out, |block, y| {
        let (d, dmin, high) = (half(block, 0), half(block, 2), &block[16..48]);
        for (g, y) in y.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_and_minimum(&block[4..16], g);
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for ((v, q), h) in y.iter_mut().zip(&block[48 + 32 * (g / 2)..]).zip(high) {
                let q = ((q >> (4 * (g % 2))) & 15) | (((h >> g) & 1) << 4);
                *v = scale * f32::from(q) - min;
            }
        }
    });
}
