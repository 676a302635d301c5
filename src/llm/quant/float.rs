//! F32, F16 and BF16: one value a block.

use half::{bf16, f16};

use super::{Block, BlockType, each_block};

/// IEEE single precision.
pub const F32: Block = Block {
    block_type: BlockType::F32,
    id: 0,
    name: "F32",
    values: 1,
    bytes: 4,
    dequantize: |bytes, out| each_block::<4, 1>(bytes, out, |b, y| y[0] = f32::from_le_bytes(*b)),
};

/// IEEE half precision.
pub const F16: Block = Block {
    block_type: BlockType::F16,
    id: 1,
    name: "F16",
    values: 1,
    bytes: 2,
    dequantize: |bytes, out| each_block::<2, 1>(bytes, out, |b, y| y[0] = f16::from_le_bytes(*b).to_f32()),
};

/// The upper half of a single.
pub const BF16: Block = Block {
    block_type: BlockType::BF16,
    id: 30,
    name: "BF16",
    values: 1,
    bytes: 2,
    dequantize: |bytes, out| each_block::<2, 1>(bytes, out, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32()),
};
