//! Weights that are no small integers, rounded to words per block of 32, for processors that multiply words twice as fast as f32.
//!
//! In: f32 matrices and f32 rows. Out: f32 rows. Both sides are rounded so that a block's sum of products fits i32 and is exact:
//! 14 bits, that is an error of half a part in 8,000 of a block's largest weight, and of its largest activation.

use rayon::prelude::*;

use super::codes::{BLOCK, Rounding, Rows};
use super::dot::{Dot, Form, QUADS, tile_rows};
use super::kernels::{Isa, LANES};

/// Largest magnitude of a weight and of an activation: 32 products of two of them fit i32.
const LIMIT: f32 = 8000.0;

/// Words of a line: two of each of 16 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([[i16; 2]; LANES]);

/// One number per column of a panel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Lanes([f32; LANES]);

/// A weight matrix in panels of 16 output columns, as words.
pub struct Words {
    k: usize,
    columns: usize,
    /// `[panels][blocks][2 QUADS]`.
    words: Vec<Line>,
    /// `[panels][blocks]`.
    scales: Vec<Lanes>,
}

impl Words {
    /// Packs matrices of `[rows, k]` below each other. `None` where k is no whole number of blocks, or the instruction set has
    /// no product for them.
    pub fn pack(isa: Isa, matrices: &[&[f32]], k: usize) -> Option<Self> {
        if isa != Isa::Avx512Vnni || !k.is_multiple_of(BLOCK) {
            return None;
        }
        let blocks = k / BLOCK;
        let rows: Vec<&[f32]> = matrices.iter().flat_map(|m| m.chunks_exact(k)).collect();
        let panels = rows.len().div_ceil(LANES);
        let mut words = vec![Line([[0; 2]; LANES]); panels * blocks * 2 * QUADS];
        let mut scales = vec![Lanes([0.0; LANES]); panels * blocks];
        words
            .par_chunks_mut(blocks * 2 * QUADS)
            .zip(scales.par_chunks_mut(blocks))
            .zip(rows.par_chunks(LANES))
            .for_each(|((words, scales), rows)| {
                for (lane, row) in rows.iter().enumerate() {
                    for (b, block) in row.as_chunks::<BLOCK>().0.iter().enumerate() {
                        let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                        let inverse = if largest < 1e-30 { 0.0 } else { LIMIT / largest };
                        scales[b].0[lane] = if largest < 1e-30 { 0.0 } else { largest / LIMIT };
                        for (line, two) in words[b * 2 * QUADS..].iter_mut().zip(block.as_chunks::<2>().0) {
                            line.0[lane] = two.map(|v| (v * inverse).round_ties_even() as i16);
                        }
                    }
                }
            });
        Some(Words { k, columns: rows.len(), words, scales })
    }

    /// Panels of 16 columns.
    pub fn panels(&self) -> usize {
        self.columns.div_ceil(LANES)
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.words[..]) + size_of_val(&self.scales[..])
    }

    /// The rounded values of output column `column`, `[k]`.
    pub fn unpack_row(&self, column: usize, out: &mut [f32]) {
        let (blocks, lane) = (self.k / BLOCK, column % LANES);
        let first = column / LANES * blocks;
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let lines = &self.words[(first + b) * 2 * QUADS..];
            for (line, out) in lines.iter().zip(out.chunks_exact_mut(2)) {
                for (o, q) in out.iter_mut().zip(line.0[lane]) {
                    *o = self.scales[first + b].0[lane] * f32::from(q);
                }
            }
        }
    }

    /// `c = a W` (or `c += a W`) for rows of `a` that are `k` wide and a few of the panels, into rows of `c` that are
    /// `16 panels.len()` wide; on this thread.
    pub fn multiply(&self, a: &[f32], panels: std::ops::Range<usize>, c: &mut [f32], add: bool) {
        // Only `pack` makes one, and only where there is VNNI.
        let isa = Isa::Avx512Vnni;
        let (width, blocks) = (panels.len() * LANES, self.k / BLOCK);
        let rows = a.len() / self.k;
        assert!(panels.start <= panels.end && panels.end <= self.panels(), "panels are within the matrix");
        assert!(a.len() == rows * self.k && c.len() == rows * width, "a product's rows fit each other");
        let rounding = Rounding { form: Form::Words, tile: tile_rows(isa), limit: LIMIT, zero: None };
        Rows::with(isa, a, blocks, rounding, |side| {
            let p = Dot {
                quads: side.quads.as_ptr(),
                row_scales: side.scales.as_ptr(),
                row_sums: side.sums.as_ptr(),
                codes: self.words[panels.start * blocks * 2 * QUADS..].as_ptr().cast(),
                scales: self.scales[panels.start * blocks..].as_ptr().cast(),
                minima: std::ptr::null(),
                c: c.as_mut_ptr(),
                c_stride: width,
                rows,
                panels: panels.len(),
                blocks,
                form: Form::Words,
                add,
            };
            // SAFETY: the lengths were checked above, `Rows` made all tiles of the rows, the matrix holds all its
            // panels in lines of 64 bytes, `c` is borrowed mutably, and `pack` checked the instruction set.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                super::dot::dot_of_words(p)
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = p;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::tests::noise;
    use super::*;

    #[test]
    fn products_agree_with_plain_sums_and_rows_do_not_depend_on_each_other() {
        let isa = Isa::detect();
        for (rows, k, columns) in [(1, 32, 16), (3, 64, 40), (14, 96, 32), (31, 160, 48)] {
            let (mut a, mut w) = (noise(rows * k, 1), noise(columns * k, 2));
            // The largest sum that there can be.
            a[..32].fill(1.0);
            w[..32].fill(-1.0);
            let Some(words) = Words::pack(isa, &[&w], k) else { return };
            let width = words.panels() * LANES;
            let mut c = vec![1f32; rows * width];
            words.multiply(&a, 0..words.panels(), &mut c, true);
            let mut row = vec![0f32; k];
            for n in 0..columns {
                words.unpack_row(n, &mut row);
                assert!(row.iter().zip(&w[n * k..]).all(|(got, want)| (got - want).abs() <= 0.51 / LIMIT));
                for r in 0..rows {
                    let terms = (0..k).map(|i| f64::from(a[r * k + i]) * f64::from(w[n * k + i]));
                    let (got, want) = (f64::from(c[r * width + n]), 1.0 + terms.sum::<f64>());
                    assert!((got - want).abs() < 2e-4 * (k as f64).sqrt() + 1e-4, "{r},{n}: {got} != {want}");
                }
            }
            for r in 0..rows {
                let mut one = vec![1f32; width];
                words.multiply(&a[r * k..(r + 1) * k], 0..words.panels(), &mut one, true);
                assert_eq!(one, c[r * width..(r + 1) * width]);
                let mut last = vec![0f32; LANES];
                words.multiply(&a[r * k..(r + 1) * k], words.panels() - 1..words.panels(), &mut last, false);
                assert!(last.iter().zip(&one[width - LANES..]).all(|(x, y)| (x + 1.0 - y).abs() < 1e-5));
            }
        }
    }
}
