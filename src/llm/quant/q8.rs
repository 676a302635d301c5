//! Q8_0: 32 signed bytes with one scale.

use super::{Block, BlockType, each_block, half};

/// d q.
pub const Q8_0: Block =
    Block { block_type: BlockType::Q8_0, id: 8, name: "Q8_0", values: 32, bytes: 34, dequantize: q8_0 };

fn q8_0(bytes: &[u8], out: &mut [f32]) {
    each_block::<34, 32>(bytes, out, |block, y| {
        let d = half(block, 0);
        for (v, q) in y.iter_mut().zip(&block[2..]) {
            *v = d * f32::from(*q as i8);
        }
    });
}
