//! f32 matrix products on packed weights, for CPU cores.
//!
//! In: rows of activations, and a [`Packed`] matrix (or panels that attention packed). Out: rows.
//! A weight matrix is packed once, at load, into panels of 16 output columns. Panels are outside, rows
//! inside: a panel stays in the second-level cache while the rows pass, and a tile of rows by one or two panels
//! is summed in registers over the whole of k, so that each output is one chain of multiply-adds.

use super::kernels::{Isa, LANES, PORTABLE_FMA, fma};

/// The operands of a product of a few rows with panels of a packed matrix.
///
/// Row `i` of the left side starts at `a + i * a_stride` and has `k` values. Panel `j` starts
/// at `b + j * b_stride` and has `k` rows of 16. Row `i` of the result starts at `c + i * c_stride`; panel `j`
/// fills its columns `16 j .. 16 j + 16`.
#[derive(Clone, Copy)]
pub struct Product {
    /// Left side.
    pub a: *const f32,
    /// Distance of its rows.
    pub a_stride: usize,
    /// Packed right side.
    pub b: *const f32,
    /// Distance of its panels.
    pub b_stride: usize,
    /// Result.
    pub c: *mut f32,
    /// Distance of its rows.
    pub c_stride: usize,
    /// Rows.
    pub rows: usize,
    /// Panels.
    pub panels: usize,
    /// Length of a sum.
    pub k: usize,
    /// Whether to add to what is in `c`.
    pub add: bool,
}

/// Computes a product on this thread.
///
/// # Safety
/// Every row and panel that [`Product`] describes must be readable (`c`: writable), and nothing
/// else may use the written columns meanwhile.
pub unsafe fn product(isa: Isa, p: Product) {
    // SAFETY: the caller's promise; and the instruction set comes from `Isa::available`.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni | Isa::Avx512 => x86::product_avx512(p),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::product_avx2(p),
            _ => product_portable(p),
        }
    }
}

/// Runs `tile::<ROWS>` down the rows, the last ones with fewer.
macro_rules! rows_in_tiles {
    ($p:ident, $largest:literal, [$($n:literal),*], $tile:ident, $b:expr, $column:expr) => {{
        let mut row = 0;
        while row < $p.rows {
            let left = $p.rows - row;
            let a = $p.a.add(row * $p.a_stride);
            let c = $p.c.add(row * $p.c_stride);
            match left {
                $($n => $tile::<$n>($p, a, c, $b, $column),)*
                _ => $tile::<$largest>($p, a, c, $b, $column),
            }
            row += left.min($largest);
        }
    }};
}

unsafe fn product_portable(p: Product) {
    for panel in 0..p.panels {
        // SAFETY: the caller's promise, panel by panel.
        unsafe {
            let b = p.b.add(panel * p.b_stride);
            rows_in_tiles!(p, 4, [1, 2, 3], tile_portable, b, panel * LANES);
        }
    }
}

#[inline(always)]
unsafe fn tile_portable<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
    let mut sums = [[0f32; LANES]; ROWS];
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..p.k {
            let b: &[f32; LANES] = &*b.add(i * LANES).cast();
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *a.add(r * p.a_stride + i);
                for (s, b) in sums.iter_mut().zip(b) {
                    *s = fma::<PORTABLE_FMA>(x, *b, *s);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let c: &mut [f32; LANES] = &mut *c.add(r * p.c_stride + column).cast();
            for (c, s) in c.iter_mut().zip(sums) {
                *c = if p.add { *c + *s } else { *s };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The tiles in `std::arch`: 14 rows by 32 columns (28 of 32 registers hold sums), and 6 by 16
    //! (12 of 16). Both reach the machine's peak when a panel is in the second-level cache.

    use std::arch::x86_64::*;

    use super::{LANES, Product};

    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    pub unsafe fn product_avx512(p: Product) {
        let mut panel = 0;
        while panel < p.panels {
            // SAFETY: the caller's promise, panel by panel.
            unsafe {
                let b = p.b.add(panel * p.b_stride);
                if panel + 2 <= p.panels {
                    rows_in_tiles!(p, 14, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], two_panels, b, panel * LANES);
                } else {
                    rows_in_tiles!(p, 14, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], one_panel, b, panel * LANES);
                }
            }
            panel += 2;
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    unsafe fn two_panels<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let b1 = b.add(p.b_stride);
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            for i in 0..p.k {
                let x0 = _mm512_loadu_ps(b.add(i * LANES));
                let x1 = _mm512_loadu_ps(b1.add(i * LANES));
                for (r, s) in sums.iter_mut().enumerate() {
                    let v = _mm512_set1_ps(*a.add(r * p.a_stride + i));
                    s[0] = _mm512_fmadd_ps(v, x0, s[0]);
                    s[1] = _mm512_fmadd_ps(v, x1, s[1]);
                }
            }
            for (r, s) in sums.iter().enumerate() {
                for (half, s) in s.iter().enumerate() {
                    let c = c.add(r * p.c_stride + column + half * LANES);
                    let s = if p.add { _mm512_add_ps(*s, _mm512_loadu_ps(c)) } else { *s };
                    _mm512_storeu_ps(c, s);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    unsafe fn one_panel<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); ROWS];
            for i in 0..p.k {
                let x = _mm512_loadu_ps(b.add(i * LANES));
                for (r, s) in sums.iter_mut().enumerate() {
                    *s = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(r * p.a_stride + i)), x, *s);
                }
            }
            for (r, s) in sums.iter().enumerate() {
                let c = c.add(r * p.c_stride + column);
                let s = if p.add { _mm512_add_ps(*s, _mm512_loadu_ps(c)) } else { *s };
                _mm512_storeu_ps(c, s);
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn product_avx2(p: Product) {
        for panel in 0..p.panels {
            // SAFETY: the caller's promise, panel by panel.
            unsafe {
                let b = p.b.add(panel * p.b_stride);
                rows_in_tiles!(p, 6, [1, 2, 3, 4, 5], half_panels, b, panel * LANES);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn half_panels<const ROWS: usize>(p: Product, a: *const f32, c: *mut f32, b: *const f32, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
            for i in 0..p.k {
                let x0 = _mm256_loadu_ps(b.add(i * LANES));
                let x1 = _mm256_loadu_ps(b.add(i * LANES + 8));
                for (r, s) in sums.iter_mut().enumerate() {
                    let v = _mm256_set1_ps(*a.add(r * p.a_stride + i));
                    s[0] = _mm256_fmadd_ps(v, x0, s[0]);
                    s[1] = _mm256_fmadd_ps(v, x1, s[1]);
                }
            }
            for (r, s) in sums.iter().enumerate() {
                for (half, s) in s.iter().enumerate() {
                    let c = c.add(r * p.c_stride + column + half * 8);
                    let s = if p.add { _mm256_add_ps(*s, _mm256_loadu_ps(c)) } else { *s };
                    _mm256_storeu_ps(c, s);
                }
            }
        }
    }
}

/// A weight matrix in panels of 16 output columns: `[columns / 16][k][16]`, padded with zeros.
pub struct Packed {
    /// Length of a sum: the input width.
    pub k: usize,
    /// Output columns.
    pub columns: usize,
    data: Vec<f32>,
}

impl Packed {
    /// Packs matrices of `[rows, k]` (Hugging Face's `[out, in]`) below each other.
    pub fn pack(matrices: &[&[f32]], k: usize) -> Self {
        let columns = matrices.iter().map(|m| m.len()).sum::<usize>() / k;
        let panels = columns.div_ceil(LANES);
        let mut data = vec![0f32; panels * k * LANES];
        let rows = matrices.iter().flat_map(|m| m.chunks_exact(k));
        for (r, row) in rows.enumerate() {
            let panel = &mut data[(r / LANES) * k * LANES..];
            for (i, v) in row.iter().enumerate() {
                panel[i * LANES + r % LANES] = *v;
            }
        }
        Packed { k, columns, data }
    }

    /// Panels of 16 columns.
    pub fn panels(&self) -> usize {
        self.columns.div_ceil(LANES)
    }

    /// Copies output column `column` (a row of the matrix as it came) to `out`, `[k]`.
    pub fn unpack_row(&self, column: usize, out: &mut [f32]) {
        let panel = &self.data[(column / LANES) * self.k * LANES..];
        for (i, o) in out.iter_mut().enumerate() {
            *o = panel[i * LANES + column % LANES];
        }
    }

    /// `c = a W` (or `c += a W`) for rows of `a` that are `k` wide and rows of `c` that are
    /// `16 panels` wide; on this thread.
    pub fn multiply(&self, isa: Isa, a: &[f32], c: &mut [f32], add: bool) {
        let width = self.panels() * LANES;
        let rows = a.len() / self.k;
        assert!(a.len() == rows * self.k && c.len() == rows * width, "a product's rows fit each other");
        let p = Product {
            a: a.as_ptr(),
            a_stride: self.k,
            b: self.data.as_ptr(),
            b_stride: self.k * LANES,
            c: c.as_mut_ptr(),
            c_stride: width,
            rows,
            panels: self.panels(),
            k: self.k,
            add,
        };
        // SAFETY: the lengths were checked above, `data` holds all panels, and `c` is borrowed mutably.
        unsafe { product(isa, p) }
    }

    /// As [`Packed::multiply`] for a few of the panels, into rows of `c` that are `16 panels.len()` wide.
    pub fn multiply_panels(&self, isa: Isa, a: &[f32], panels: std::ops::Range<usize>, c: &mut [f32]) {
        let width = panels.len() * LANES;
        let rows = a.len() / self.k;
        assert!(panels.end <= self.panels(), "panels are within the matrix");
        assert!(a.len() == rows * self.k && c.len() == rows * width, "a product's rows fit each other");
        let p = Product {
            a: a.as_ptr(),
            a_stride: self.k,
            b: self.data[panels.start * self.k * LANES..].as_ptr(),
            b_stride: self.k * LANES,
            c: c.as_mut_ptr(),
            c_stride: width,
            rows,
            panels: panels.len(),
            k: self.k,
            add: false,
        };
        // SAFETY: the lengths were checked above, and `c` is borrowed mutably.
        unsafe { product(isa, p) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::tests::noise;
    use super::*;

    #[test]
    fn products_agree_with_plain_sums_on_every_instruction_set() {
        for (rows, k, columns) in [(1, 7, 16), (3, 64, 40), (14, 33, 32), (31, 50, 48), (29, 5, 100)] {
            let (a, w) = (noise(rows * k, 1), noise(columns * k, 2));
            let packed = Packed::pack(&[&w], k);
            let width = packed.panels() * LANES;
            for isa in Isa::available() {
                let mut c = vec![1f32; rows * width];
                packed.multiply(isa, &a, &mut c, true);
                for r in 0..rows {
                    for n in 0..columns {
                        let want: f64 =
                            1.0 + (0..k).map(|i| f64::from(a[r * k + i]) * f64::from(w[n * k + i])).sum::<f64>();
                        let got = f64::from(c[r * width + n]);
                        assert!((got - want).abs() < 1e-4, "{isa:?} {rows}x{k}x{columns} at {r},{n}: {got} != {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (k, columns) = (96, 80);
        let (a, w) = (noise(20 * k, 3), noise(columns * k, 4));
        let packed = Packed::pack(&[&w], k);
        for isa in Isa::available() {
            let mut all = vec![0f32; 20 * columns];
            packed.multiply(isa, &a, &mut all, false);
            for r in 0..20 {
                let mut one = vec![0f32; columns];
                packed.multiply(isa, &a[r * k..(r + 1) * k], &mut one, false);
                assert_eq!(one, all[r * columns..(r + 1) * columns], "{isa:?} row {r}");
                let mut some = vec![0f32; 2 * LANES];
                packed.multiply_panels(isa, &a[r * k..(r + 1) * k], 3..5, &mut some);
                assert_eq!(some, one[3 * LANES..5 * LANES]);
            }
        }
    }

    #[test]
    fn packed_rows_come_back() {
        let w = noise(20 * 9, 5);
        let packed = Packed::pack(&[&w[..9 * 7], &w[9 * 7..]], 9);
        let mut row = vec![0f32; 9];
        for r in 0..20 {
            packed.unpack_row(r, &mut row);
            assert_eq!(row, w[r * 9..(r + 1) * 9]);
        }
    }
}
