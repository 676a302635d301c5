//! Q6_K: 256 values of 6 bits, 16 groups.
//!
//! Bytes: 128 of low nibbles, 64 of high pairs, 16 signed scales, f16 d. In half `h`: value `128 h + 64 k + i` (i below 64) has
//! nibble `k` of byte `64 h + i`; value `128 h + 32 k + i` (i below 32) has bits `2 k` of high byte `32 h + i`.

use super::{Block, BlockType, each_block, half};

/// d scale (q - 32).
pub const Q6_K: Block =
    Block { block_type: BlockType::Q6_K, id: 14, name: "Q6_K", values: 256, bytes: 210, dequantize: q6_k };

fn q6_k(bytes: &[u8], out: &mut [f32]) {
    each_block::<210, 256>(bytes, out, |block, y| {
        let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(block, 208));
        for (g, y) in y.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(scales[g] as i8);
            let (h, within) = (g / 8, 16 * (g % 8));
            let (nibble, pair) = (4 * (within / 64), 2 * (within / 32));
            let low = &low[64 * h + within % 64..];
            let high = &high[32 * h + within % 32..];
            for ((v, q), p) in y.iter_mut().zip(low).zip(high) {
                let q = ((q >> nibble) & 15) | (((p >> pair) & 3) << 4);
                *v = scale * (f32::from(q) - 32.0);
            }
        }
    });
}
