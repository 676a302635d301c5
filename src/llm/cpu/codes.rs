//! Weights as the small integers that a quantised file holds, and activations as integers.
//!
//! In: blocks of 32 values as they lie in the file, and f32 rows. Out: f32 rows.
//! A block's value is `d q + m` with an integer q of up to 8 bits, so nothing of a weight is lost. Activations are rounded
//! per row and block of 32, to 16 bits (the error of a logit is then of the size of f32's own) or to 8.

use std::cell::RefCell;

use rayon::prelude::*;

use super::dot::{Dot, Form, QUADS, dot, tile_rows};
use super::kernels::{Isa, LANES, PORTABLE_FMA, for_each_isa};
use crate::llm::quant::BlockType;
use crate::llm::quant::k4::scale_and_minimum;
use crate::llm::weights::Blocks;

/// Values of a block.
pub const BLOCK: usize = 32;

/// Largest magnitude of an activation of 16 bits: its high byte is at most 127 and its low byte is signed.
const WIDE_LIMIT: f32 = 127.0 * 256.0;

/// Largest magnitude of an activation of 8 bits.
const NARROW_LIMIT: f32 = 127.0;

/// 64 bytes that begin a cache line: four codes of each of 16 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([[u8; 4]; LANES]);

/// One number per column of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Lanes([f32; LANES]);

/// A weight matrix in panels of 16 output columns, as the integers of its file.
pub struct Codes {
    /// Length of a sum: the input width.
    k: usize,
    /// Output columns.
    columns: usize,
    /// Whether activations get 16 bits.
    wide: bool,
    /// The code that stands for 0, of all blocks; `None` where each block has a minimum.
    zero: Option<i32>,
    /// `[panels][blocks][QUADS]`.
    codes: Vec<Line>,
    /// `[panels][blocks]`.
    scales: Vec<Lanes>,
    /// `[panels][blocks]`; empty with `zero`.
    minima: Vec<Lanes>,
}

/// The code that stands for 0; `None` where the type has minima.
fn zero_of(kind: BlockType) -> Option<i32> {
    match kind {
        BlockType::Q4_0 => Some(8),
        BlockType::Q5_0 => Some(16),
        BlockType::Q8_0 => Some(128),
        _ => None,
    }
}

/// Whether blocks of a type are groups of 32 small integers with a scale.
pub fn has_codes(kind: BlockType) -> bool {
    use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q8_0};
    matches!(kind, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K)
}

/// Codes of group `g` of a block, its scale, and its minimum where the type has one.
fn decode(kind: BlockType, block: &[u8], g: usize, codes: &mut [u8; BLOCK]) -> (f32, f32) {
    let half = |at: usize| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    if matches!(kind, BlockType::Q4_K | BlockType::Q5_K) {
        let (scale, minimum) = scale_and_minimum(&block[4..16], g);
        let nibbles = if kind == BlockType::Q5_K { 48 } else { 16 } + BLOCK * (g / 2);
        for (c, b) in codes.iter_mut().zip(&block[nibbles..nibbles + BLOCK]) {
            *c = (b >> (4 * (g % 2))) & 15;
        }
        if kind == BlockType::Q5_K {
            for (c, b) in codes.iter_mut().zip(&block[16..16 + BLOCK]) {
                *c |= ((b >> g) & 1) << 4;
            }
        }
        return (half(0) * f32::from(scale), -(half(2) * f32::from(minimum)));
    }
    let (has_minimum, high_bits) = match kind {
        BlockType::Q4_1 => (true, false),
        BlockType::Q5_1 => (true, true),
        BlockType::Q5_0 => (false, true),
        _ => (false, false),
    };
    let at = 2 + if has_minimum { 2 } else { 0 };
    let (d, m) = (half(0), if has_minimum { half(2) } else { 0.0 });
    if kind == BlockType::Q8_0 {
        for (c, q) in codes.iter_mut().zip(&block[at..at + BLOCK]) {
            *c = q ^ 0x80;
        }
        return (d, m);
    }
    let nibbles = at + if high_bits { 4 } else { 0 };
    let (low, high) = codes.split_at_mut(BLOCK / 2);
    for ((l, h), b) in low.iter_mut().zip(high).zip(&block[nibbles..nibbles + BLOCK / 2]) {
        (*l, *h) = (b & 15, b >> 4);
    }
    if high_bits {
        let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        for (i, c) in codes.iter_mut().enumerate() {
            *c |= (((bits >> i) & 1) << 4) as u8;
        }
    }
    (d, m)
}

impl Codes {
    /// Packs matrices of `[rows, k]` (Hugging Face's `[out, in]`) below each other. `None` where a type has no codes,
    /// k is no whole number of blocks, or a scale is not finite.
    pub fn pack(matrices: &[Blocks<'_>], k: usize, wide: bool) -> Option<Self> {
        if !matrices.iter().all(|m| has_codes(m.block_type) && k.is_multiple_of(m.block_type.block().0)) {
            return None;
        }
        let blocks = k / BLOCK;
        let row_bytes = |m: &Blocks<'_>| k / m.block_type.block().0 * m.block_type.block().1;
        let rows: Vec<(BlockType, &[u8])> =
            matrices.iter().flat_map(|m| m.bytes.chunks_exact(row_bytes(m)).map(|r| (m.block_type, r))).collect();
        let zero = zero_of(matrices.first()?.block_type)
            .filter(|z| matrices.iter().all(|m| zero_of(m.block_type) == Some(*z)));
        let panels = rows.len().div_ceil(LANES);
        let mut codes = vec![Line([[0; 4]; LANES]); panels * blocks * QUADS];
        let mut scales = vec![Lanes([0.0; LANES]); panels * blocks];
        let mut minima = vec![Lanes([0.0; LANES]); panels * blocks];
        let finite = codes
            .par_chunks_mut(blocks * QUADS)
            .zip(scales.par_chunks_mut(blocks).zip(minima.par_chunks_mut(blocks)))
            .zip(rows.par_chunks(LANES))
            .all(|((codes, (scales, minima)), rows)| {
                let mut finite = true;
                let mut one = [0u8; BLOCK];
                for (lane, (kind, row)) in rows.iter().enumerate() {
                    let (values, size) = kind.block();
                    let groups = values / BLOCK;
                    for b in 0..blocks {
                        let block = &row[b / groups * size..(b / groups + 1) * size];
                        let (d, m) = decode(*kind, block, b % groups, &mut one);
                        finite &= d.is_finite() && m.is_finite();
                        scales[b].0[lane] = d;
                        minima[b].0[lane] = zero_of(*kind).map_or(m, |z| -(z as f32) * d);
                        for (line, four) in codes[b * QUADS..].iter_mut().zip(one.as_chunks::<4>().0) {
                            line.0[lane] = *four;
                        }
                    }
                }
                finite
            });
        if zero.is_some() {
            minima = Vec::new();
        }
        finite.then_some(Codes { k, columns: rows.len(), wide, zero, codes, scales, minima })
    }

    /// Length of a sum.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Panels of 16 columns.
    pub fn panels(&self) -> usize {
        self.columns.div_ceil(LANES)
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.codes[..]) + size_of_val(&self.scales[..]) + size_of_val(&self.minima[..])
    }

    /// The values of output column `column` (a row of the matrix as it came), `[k]`: those of its file, bit for bit.
    pub fn unpack_row(&self, column: usize, out: &mut [f32]) {
        let (blocks, lane) = (self.k / BLOCK, column % LANES);
        let first = column / LANES * blocks;
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let d = self.scales[first + b].0[lane];
            let lines = &self.codes[(first + b) * QUADS..];
            for (line, out) in lines.iter().zip(out.chunks_exact_mut(4)) {
                for (o, q) in out.iter_mut().zip(line.0[lane]) {
                    *o = match self.zero {
                        Some(zero) => d * (i32::from(q) - zero) as f32,
                        None => d * f32::from(q) + self.minima[first + b].0[lane],
                    };
                }
            }
        }
    }

    /// `c = a W` (or `c += a W`) for rows of `a` that are `k` wide and a few of the panels, into rows of `c` that are
    /// `16 panels.len()` wide; on this thread.
    pub fn multiply(&self, isa: Isa, a: &[f32], panels: std::ops::Range<usize>, c: &mut [f32], add: bool) {
        let (width, blocks) = (panels.len() * LANES, self.k / BLOCK);
        let rows = a.len() / self.k;
        assert!(panels.start <= panels.end && panels.end <= self.panels(), "panels are within the matrix");
        assert!(a.len() == rows * self.k && c.len() == rows * width, "a product's rows fit each other");
        let rounding = Rounding {
            form: Form::of(isa, self.wide),
            tile: tile_rows(isa),
            limit: if self.wide { WIDE_LIMIT } else { NARROW_LIMIT },
            zero: self.zero,
        };
        Rows::with(isa, a, blocks, rounding, |side| {
            let p = Dot {
                quads: side.quads.as_ptr(),
                row_scales: side.scales.as_ptr(),
                row_sums: side.sums.as_ptr(),
                codes: self.codes[panels.start * blocks * QUADS..].as_ptr().cast(),
                scales: self.scales[panels.start * blocks..].as_ptr().cast(),
                minima: match self.zero {
                    Some(_) => std::ptr::null(),
                    None => self.minima[panels.start * blocks..].as_ptr().cast(),
                },
                c: c.as_mut_ptr(),
                c_stride: width,
                rows,
                panels: panels.len(),
                blocks,
                form: Form::of(isa, self.wide),
                add,
            };
            // SAFETY: the lengths were checked above, `Rows` made all tiles of the rows, the matrix holds all its
            // panels in lines of 64 bytes, and `c` is borrowed mutably.
            unsafe { dot(isa, p) }
        });
    }
}

/// How activations are rounded.
#[derive(Clone, Copy)]
pub struct Rounding {
    /// How the integers are held.
    pub form: Form,
    /// Rows of a tile.
    pub tile: usize,
    /// The integer of a block's largest magnitude.
    pub limit: f32,
    /// The code of the weights that stands for 0; `None` with minima.
    pub zero: Option<i32>,
}

/// Rows of activations as integers; the layout is [`Dot`]'s.
#[derive(Default)]
pub struct Rows {
    /// Integers.
    pub quads: Vec<u8>,
    /// What a block's integers are multiplied by.
    pub scales: Vec<f32>,
    /// Sums of blocks.
    pub sums: Vec<u32>,
}

impl Rows {
    /// Calls `work` with rounded rows of `blocks` blocks; their buffers stay with the thread.
    pub fn with(isa: Isa, a: &[f32], blocks: usize, how: Rounding, work: impl FnOnce(&Rows)) {
        thread_local!(static ROWS: RefCell<Rows> = RefCell::default());
        ROWS.with_borrow_mut(|rows| {
            let padded = (a.len() / (blocks * BLOCK)).next_multiple_of(how.tile) * blocks;
            rows.quads.resize(padded * BLOCK * how.form.size(), 0);
            rows.scales.resize(padded, 0.0);
            rows.sums.resize(padded, 0);
            match how.form {
                Form::Bytes => round_to_bytes(isa, a, blocks, how, rows),
                Form::TwoBytes => round_to_two_bytes(isa, a, blocks, how, rows),
                Form::Words => round_to_words(isa, a, blocks, how, rows),
            }
            work(rows);
        });
    }
}

for_each_isa! {
    /// Rounds rows of `blocks` blocks to [`Form::Bytes`].
    fn round_to_bytes(isa; a: &[f32], blocks: usize, how: Rounding, out: &mut Rows) = bytes_body
}

for_each_isa! {
    /// Rounds rows of `blocks` blocks to [`Form::TwoBytes`].
    fn round_to_two_bytes(isa; a: &[f32], blocks: usize, how: Rounding, out: &mut Rows) = two_bytes_body
}

for_each_isa! {
    /// Rounds rows of `blocks` blocks to [`Form::Words`].
    fn round_to_words(isa; a: &[f32], blocks: usize, how: Rounding, out: &mut Rows) = words_body
}

#[inline(always)]
fn bytes_body<const FMA: bool>(a: &[f32], blocks: usize, how: Rounding, out: &mut Rows) {
    round_body(a, blocks, how, out, |v| [v.map(|v| v as u8)]);
}

#[inline(always)]
fn two_bytes_body<const FMA: bool>(a: &[f32], blocks: usize, how: Rounding, out: &mut Rows) {
    // The low byte is signed too, so the high one takes its carry.
    let high = |v: i32| v.wrapping_add(128) >> 8;
    round_body(a, blocks, how, out, |v| [v.map(|v| high(v) as u8), v.map(|v| v as u8)]);
}

#[inline(always)]
fn words_body<const FMA: bool>(a: &[f32], blocks: usize, how: Rounding, out: &mut Rows) {
    round_body(a, blocks, how, out, |v| {
        let mut bytes = [[0u8; 2]; BLOCK];
        bytes.iter_mut().zip(v).for_each(|(b, v)| *b = (v as i16).to_ne_bytes());
        [bytes]
    });
}

/// Rounds rows; `hold` makes the parts of a block, which are stored four values of each row at a time.
#[inline(always)]
fn round_body<T: Copy, const PARTS: usize>(
    a: &[f32],
    blocks: usize,
    how: Rounding,
    out: &mut Rows,
    hold: impl Fn([i32; BLOCK]) -> [[T; BLOCK]; PARTS],
) where
    [T; BLOCK]: bytemuck::Pod,
{
    // Adding 1.5 * 2^23 rounds to the nearest integer (ties to even), which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let (tile, four) = (how.tile, 4 * size_of::<T>());
    for (row, a) in a.chunks_exact(blocks * BLOCK).enumerate() {
        for (b, a) in a.as_chunks::<BLOCK>().0.iter().enumerate() {
            // As integers, magnitudes are in order, and what is not finite is largest.
            let mut largest = [0u32; LANES];
            for half in a.as_chunks::<LANES>().0 {
                for (l, v) in largest.iter_mut().zip(half) {
                    *l = (*l).max(v.to_bits() & 0x7fff_ffff);
                }
            }
            let largest = f32::from_bits(largest.iter().copied().fold(0, u32::max));
            // What is smaller would overflow the division; it is 0 beside any other block.
            let (scale, inverse) = match largest {
                l if l < 1e-30 => (0.0, 0.0),
                l if l.is_finite() => (l / how.limit, how.limit / l),
                _ => (f32::NAN, 0.0),
            };
            let mut values = [0i32; BLOCK];
            for (i, v) in values.iter_mut().zip(a) {
                *i = (v * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
            }
            let sum = values.iter().fold(0i32, |s, v| s.wrapping_add(*v));
            let first = row / tile * blocks + b;
            let size = PARTS * QUADS * four * tile;
            let quads = &mut out.quads[first * size..(first + 1) * size];
            let parts = hold(values);
            let fours = parts.iter().flat_map(|p| bytemuck::bytes_of(p).chunks_exact(four));
            for (quad, bytes) in fours.enumerate() {
                let at = (quad * tile + row % tile) * four;
                quads[at..at + four].copy_from_slice(bytes);
            }
            let at = first * tile + row % tile;
            out.scales[at] = scale;
            out.sums[at] = match how.zero {
                Some(zero) => sum.wrapping_mul(-zero) as u32,
                None => (scale * sum as f32).to_bits(),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::super::kernels::tests::noise;
    use super::*;

    use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q8_0};
    const TYPES: [BlockType; 7] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K];

    /// Blocks of a type with random codes and sensible scales, and the values that they stand for.
    fn blocks(kind: BlockType, values: usize, seed: u32) -> (Vec<u8>, Vec<f32>) {
        let size = kind.block().1;
        let n = values / kind.block().0;
        let mut bytes: Vec<u8> = noise(n * size, seed).iter().map(|v| (v * 127.9) as i8 as u8).collect();
        for (block, scale) in bytes.chunks_exact_mut(size).zip(noise(n, seed + 1)) {
            block[..2].copy_from_slice(&half::f16::from_f32(scale * 0.1).to_le_bytes());
            if zero_of(kind).is_none() {
                // A fraction of the minima of K types, which have six bits.
                let part = if kind.block().0 > BLOCK { 0.02 } else { 1.0 };
                block[2..4].copy_from_slice(&half::f16::from_f32(-scale * part).to_le_bytes());
            }
        }
        let mut out = vec![0f32; values];
        kind.dequantize(&bytes, &mut out);
        (bytes, out)
    }

    fn matrix(kind: BlockType, bytes: &[u8]) -> Blocks<'_> {
        Blocks { block_type: kind, rows: 0, columns: 0, bytes: Cow::Borrowed(bytes) }
    }

    #[test]
    fn packed_rows_come_back_bit_for_bit() {
        for kind in TYPES {
            let (bytes, values) = blocks(kind, 20 * 256, 5);
            let codes = Codes::pack(&[matrix(kind, &bytes)], 256, true).unwrap();
            let mut row = vec![0f32; 256];
            for r in 0..20 {
                codes.unpack_row(r, &mut row);
                assert_eq!(row, values[r * 256..(r + 1) * 256], "{kind:?}");
            }
        }
    }

    /// The weights are exact, and an activation of 16 bits is off by at most half of a part in 32,512 of its block's largest.
    #[test]
    fn products_agree_with_plain_sums_on_every_instruction_set() {
        for kind in TYPES {
            for (rows, k, columns) in [(1usize, 32usize, 16), (3, 64, 40), (14, 96, 32), (31, 160, 48), (5, 256, 20)] {
                if !k.is_multiple_of(kind.block().0) {
                    continue;
                }
                let mut a = noise(rows * k, 1);
                // One block with an outlier, one of zeros.
                a[5] = 300.0;
                a[(rows - 1) * k + k - 32..].fill(0.0);
                let (bytes, w) = blocks(kind, columns * k, 2);
                for (wide, limit) in [(true, WIDE_LIMIT), (false, NARROW_LIMIT)] {
                    let codes = Codes::pack(&[matrix(kind, &bytes)], k, wide).unwrap();
                    let width = codes.panels() * LANES;
                    let mut first: Option<Vec<f32>> = None;
                    for isa in Isa::available() {
                        let mut c = vec![1f32; rows * width];
                        codes.multiply(isa, &a, 0..codes.panels(), &mut c, true);
                        for r in 0..rows {
                            for n in 0..columns {
                                let (mut want, mut bound) = (1f64, 1e-5f64);
                                for b in 0..k / BLOCK {
                                    let x = &a[r * k + b * BLOCK..][..BLOCK];
                                    let w = &w[n * k + b * BLOCK..][..BLOCK];
                                    let step = x.iter().fold(0f32, |m, v| m.max(v.abs())) / limit;
                                    for (x, w) in x.iter().zip(w) {
                                        want += f64::from(*x) * f64::from(*w);
                                        bound += f64::from(w.abs() * step) * 0.5 + f64::from((x * w).abs()) * 2e-6;
                                    }
                                }
                                let got = f64::from(c[r * width + n]);
                                assert!((got - want).abs() <= bound, "{kind:?} {isa:?} {r},{n}: {got} != {want}");
                            }
                        }
                        // Integers are exact; what is left is the order of f32 sums, which is the same, fused or not.
                        let first = first.get_or_insert_with(|| c.clone());
                        let near = first.iter().zip(&c).all(|(x, y)| (x - y).abs() <= 1e-4 * (1.0 + x.abs()));
                        assert!(near, "{kind:?} {isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (k, columns) = (96, 80);
        let a = noise(20 * k, 3);
        for kind in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q8_0] {
            let (bytes, _) = blocks(kind, columns * k, 4);
            for wide in [true, false] {
                let codes = Codes::pack(&[matrix(kind, &bytes)], k, wide).unwrap();
                for isa in Isa::available() {
                    let mut all = vec![0f32; 20 * columns];
                    codes.multiply(isa, &a, 0..5, &mut all, false);
                    for r in 0..20 {
                        let mut one = vec![0f32; columns];
                        codes.multiply(isa, &a[r * k..(r + 1) * k], 0..5, &mut one, false);
                        assert_eq!(one, all[r * columns..(r + 1) * columns], "{isa:?} row {r}");
                        let mut some = vec![0f32; 2 * LANES];
                        codes.multiply(isa, &a[r * k..(r + 1) * k], 3..5, &mut some, false);
                        assert_eq!(some, one[3 * LANES..5 * LANES]);
                    }
                }
            }
        }
    }

    #[test]
    fn types_may_be_mixed_in_a_matrix() {
        let (a, k) = (noise(2 * 64, 7), 64);
        let (first, w1) = blocks(BlockType::Q4_1, 16 * k, 8);
        let (second, w2) = blocks(BlockType::Q8_0, 16 * k, 9);
        let mixed = [matrix(BlockType::Q4_1, &first), matrix(BlockType::Q8_0, &second)];
        let codes = Codes::pack(&mixed, k, true).unwrap();
        let w = [w1, w2].concat();
        for isa in Isa::available() {
            let mut c = vec![0f32; 2 * 32];
            codes.multiply(isa, &a, 0..2, &mut c, false);
            for (at, got) in c.iter().enumerate() {
                let (a, w) = (&a[at / 32 * k..][..k], &w[at % 32 * k..][..k]);
                let want: f64 = a.iter().zip(w).map(|(a, w)| f64::from(*a) * f64::from(*w)).sum();
                assert!((f64::from(*got) - want).abs() < 5e-3, "{isa:?} {at}: {got} != {want}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let (bytes, _) = blocks(BlockType::Q4_0, 16 * 64, 4);
        let codes = Codes::pack(&[matrix(BlockType::Q4_0, &bytes)], 64, true).unwrap();
        for isa in Isa::available() {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut a = noise(2 * 64, 3);
                a[64 + 40] = bad;
                let mut c = vec![0f32; 32];
                codes.multiply(isa, &a, 0..1, &mut c, false);
                assert!(c[..16].iter().all(|v| v.is_finite()) && c[16..].iter().all(|v| v.is_nan()));
            }
        }
        let mut damaged = bytes;
        damaged[..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
        assert!(Codes::pack(&[matrix(BlockType::Q4_0, &damaged)], 64, true).is_none());
    }
}
