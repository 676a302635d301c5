//! IQ4_NL and IQ4_XS: 4 bits that choose one of 16 uneven steps.
//!
//! IQ4_XS, bytes: f16 d, 16 bits of upper scale pairs, 4 bytes of lower scale nibbles, 128 of values in 8 groups as Q4_0.

use super::{Block, BlockType, each_block, half, nibbles};

/// The steps (`kvalues_iq4nl`).
const STEPS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// d step.
pub const IQ4_NL: Block =
    Block { block_type: BlockType::IQ4_NL, id: 20, name: "IQ4_NL", values: 32, bytes: 18, dequantize: iq4_nl };

/// d (scale - 32) step.
pub const IQ4_XS: Block =
    Block { block_type: BlockType::IQ4_XS, id: 23, name: "IQ4_XS", values: 256, bytes: 136, dequantize: iq4_xs };

fn step(q: u8) -> f32 {
    f32::from(STEPS[usize::from(q & 15)])
}

fn iq4_nl(bytes: &[u8], out: &mut [f32]) {
    each_block::<18, 32>(bytes, out, |block, y| {
        let d = half(block, 0);
        nibbles(&block[2..], |i, q| y[i] = d * step(q));
    });
}

fn iq4_xs(bytes: &[u8], out: &mut [f32]) {
    each_block::<136, 256>(bytes, out, |block, y| {
        let (d, upper) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
        for (g, y) in y.chunks_exact_mut(32).enumerate() {
            let four = (block[4 + g / 2] >> (4 * (g % 2))) & 15;
            let two = ((upper >> (2 * g)) & 3) as u8;
            let scale = d * (f32::from(four | (two << 4)) - 32.0);
            nibbles(&block[8 + 16 * g..], |i, q| y[i] = scale * step(q));
        }
    });
}
