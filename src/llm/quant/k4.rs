//! Q4_K: 256 values of 4 bits, 8 groups.
//!
//! Bytes: f16 d, f16 dmin, 12 of 6-bit scales and minima, 128 of values: byte `32 h + i` holds value `64 h + i` in its low
//! nibble and `64 h + 32 + i` in its high one.

use super::{Block, BlockType, each_block, half};

/// d scale q - dmin minimum.
pub const Q4_K: Block =
    Block { block_type: BlockType::Q4_K, id: 12, name: "Q4_K", values: 256, bytes: 144, dequantize: q4_k };

fn q4_k(bytes: &[u8], out: &mut [f32]) {
    each_block::<144, 256>(bytes, out, |block, y| {
        let (d, dmin) = (half(block, 0), half(block, 2));
        for (g, y) in y.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_and_minimum(&block[4..16], g);
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for (v, q) in y.iter_mut().zip(&block[16 + 32 * (g / 2)..]) {
                *v = scale * f32::from((q >> (4 * (g % 2))) & 15) - min;
            }
        }
    });
}

/// Scale and minimum of group `g` (0 to 7), 0 to 63 each, from the 12 bytes of Q4_K and Q5_K.
pub fn scale_and_minimum(packed: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        return (packed[g] & 63, packed[g + 4] & 63);
    }
    let both = packed[g + 4];
    ((both & 15) | ((packed[g - 4] >> 6) << 4), (both >> 4) | ((packed[g] >> 6) << 4))
}
