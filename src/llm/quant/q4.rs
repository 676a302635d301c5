//! Q4_0 and Q4_1: 32 values of 4 bits with one scale, and a minimum.

use super::{Block, BlockType, each_block, half, nibbles};

/// d (q - 8).
pub const Q4_0: Block =
    Block { block_type: BlockType::Q4_0, id: 2, name: "Q4_0", values: 32, bytes: 18, dequantize: q4_0 };

/// d q + m.
pub const Q4_1: Block =
    Block { block_type: BlockType::Q4_1, id: 3, name: "Q4_1", values: 32, bytes: 20, dequantize: q4_1 };

fn q4_0(bytes: &[u8], out: &mut [f32]) {
    each_block::<18, 32>(bytes, out, |block, y| {
        let d = half(block, 0);
        nibbles(&block[2..], |i, q| y[i] = d * (f32::from(q) - 8.0));
    });
}

fn q4_1(bytes: &[u8], out: &mut [f32]) {
    each_block::<20, 32>(bytes, out, |block, y| {
        let (d, m) = (half(block, 0), half(block, 2));
        nibbles(&block[4..], |i, q| y[i] = d * f32::from(q) + m);
    });
}
