//! Q5_0 and Q5_1: 32 values of 5 bits, the fifth ones in a word of their own.

use super::{Block, BlockType, each_block, half, nibbles};

/// d (q - 16).
pub const Q5_0: Block =
    Block { block_type: BlockType::Q5_0, id: 6, name: "Q5_0", values: 32, bytes: 22, dequantize: q5_0 };

/// d q + m.
pub const Q5_1: Block =
    Block { block_type: BlockType::Q5_1, id: 7, name: "Q5_1", values: 32, bytes: 24, dequantize: q5_1 };

fn q5_0(bytes: &[u8], out: &mut [f32]) {
    each_block::<22, 32>(bytes, out, |block, y| {
        let (d, high) = (half(block, 0), word(block, 2));
        nibbles(&block[6..], |i, q| y[i] = d * (f32::from(q | fifth_bit(high, i)) - 16.0));
    });
}

fn q5_1(bytes: &[u8], out: &mut [f32]) {
    each_block::<24, 32>(bytes, out, |block, y| {
        let (d, m, high) = (half(block, 0), half(block, 2), word(block, 4));
        nibbles(&block[8..], |i, q| y[i] = d * f32::from(q | fifth_bit(high, i)) + m);
    });
}

/// The 32-bit word at a byte of a block.
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Bit `i` of `high` as the fifth bit of a value.
fn fifth_bit(high: u32, i: usize) -> u8 {
    (((high >> i) & 1) << 4) as u8
}
