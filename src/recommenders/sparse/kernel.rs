//! The CPU kernel of the sparse product: Rayon over blocks of rows, SIMD over `dim`.
//!
//! The widest instruction set that the machine has is found at run time, so one binary
//! serves AVX-512, AVX2 and everything else. A row of the result is summed in registers, in
//! the order of the row's entries, in strips of 64, 16 or 8 columns of the dense matrix.

use rayon::prelude::*;

use super::Csr;

/// Multiply-adds below which threads cost more than they save.
const SEQUENTIAL_WORK: usize = 1 << 17;

/// `matrix [rows, cols] x dense [cols, dim] -> out [rows, dim]`, both dense ones row-major;
/// `out` is overwritten.
///
/// # Panics
/// When a length does not fit the shapes (our bug).
pub fn csr_matmul(matrix: &Csr, dense: &[f32], dim: usize, out: &mut [f32]) {
    assert_eq!(dense.len(), matrix.cols() * dim, "dense operand does not have the shape [cols, dim]");
    assert_eq!(out.len(), matrix.rows() * dim, "result does not have the shape [rows, dim]");
    if dim == 0 {
        return;
    }
    let copy;
    let dense = match gathers_gain_from_alignment(matrix, dense, dim) {
        true => {
            copy = Aligned::of(dense);
            copy.values()
        }
        false => dense,
    };
    let rows = row_function();
    if matrix.nonzeros() * dim < SEQUENTIAL_WORK {
        rows(matrix, 0..matrix.rows(), dense, dim, out);
        return;
    }
    let mut rest = out;
    let mut work = Vec::new();
    for block in matrix.blocks() {
        let (mine, others) = rest.split_at_mut(block.len() * dim);
        work.push((block, mine));
        rest = others;
    }
    work.into_par_iter().for_each(|(block, out)| rows(matrix, block, dense, dim, out));
}

/// A load of 64 bytes that crosses a cache line costs two, and tensors begin at any multiple of 16 bytes. Where
/// every row of the dense matrix is gathered several times, a copy at the right address pays (a
/// third of the time on ML-100K's graph with AVX-512).
fn gathers_gain_from_alignment(matrix: &Csr, dense: &[f32], dim: usize) -> bool {
    dim.is_multiple_of(LINE) && matrix.nonzeros() > 4 * matrix.cols() && dense.as_ptr().align_offset(4 * LINE) != 0
}

/// Numbers in a cache line of 64 bytes.
const LINE: usize = 16;

/// A copy that begins with a cache line.
struct Aligned {
    buffer: Vec<f32>,
    skip: usize,
}

impl Aligned {
    fn of(values: &[f32]) -> Self {
        let mut buffer = Vec::<f32>::with_capacity(values.len() + LINE);
        let skip = buffer.as_ptr().align_offset(4 * LINE).min(LINE);
        buffer.resize(skip, 0.0);
        buffer.extend_from_slice(values);
        Aligned { buffer, skip }
    }

    fn values(&self) -> &[f32] {
        &self.buffer[self.skip..]
    }
}

type Rows = fn(&Csr, std::ops::Range<usize>, &[f32], usize, &mut [f32]);

#[cfg(target_arch = "x86_64")]
fn row_function() -> Rows {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512F was found on this machine.
        |m, r, x, d, out| unsafe { x86::rows_avx512(m, r, x, d, out) }
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA were found on this machine.
        |m, r, x, d, out| unsafe { x86::rows_avx2(m, r, x, d, out) }
    } else {
        rows_portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn row_function() -> Rows {
    rows_portable
}

/// Rows `range` of the product into `out [range, dim]`, for any machine.
fn rows_portable(matrix: &Csr, range: std::ops::Range<usize>, dense: &[f32], dim: usize, out: &mut [f32]) {
    for (row, out) in range.zip(out.chunks_exact_mut(dim)) {
        out.fill(0.0);
        columns_from(matrix, row, dense, dim, 0, out);
    }
}

/// Adds columns `from..dim` of one row of the product to `out [dim]`.
fn columns_from(matrix: &Csr, row: usize, dense: &[f32], dim: usize, from: usize, out: &mut [f32]) {
    let (columns, values) = matrix.row(row);
    for (&column, &value) in columns.iter().zip(values) {
        let source = &dense[column as usize * dim..][from..dim];
        for (o, &x) in out[from..].iter_mut().zip(source) {
            *o += value * x;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Csr, columns_from};
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Rows `range` of the product into `out [range, dim]`.
    #[target_feature(enable = "avx512f")]
    pub fn rows_avx512(matrix: &Csr, range: Range<usize>, dense: &[f32], dim: usize, out: &mut [f32]) {
        for (row, out) in range.zip(out.chunks_exact_mut(dim)) {
            let mut at = 0;
            while at + 64 <= dim {
                strip_avx512::<4>(matrix, row, dense, dim, at, out);
                at += 64;
            }
            while at + 16 <= dim {
                strip_avx512::<1>(matrix, row, dense, dim, at, out);
                at += 16;
            }
            if at < dim {
                out[at..].fill(0.0);
                columns_from(matrix, row, dense, dim, at, out);
            }
        }
    }

    /// Columns `at..at + 16 * N` of one row.
    #[target_feature(enable = "avx512f")]
    fn strip_avx512<const N: usize>(matrix: &Csr, row: usize, dense: &[f32], dim: usize, at: usize, out: &mut [f32]) {
        let (columns, values) = matrix.row(row);
        let mut sums = [_mm512_setzero_ps(); N];
        for (&column, &value) in columns.iter().zip(values) {
            let source = &dense[column as usize * dim + at..][..16 * N];
            let value = _mm512_set1_ps(value);
            for (n, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `source` has 16 * N elements and n < N.
                let x = unsafe { _mm512_loadu_ps(source.as_ptr().add(16 * n)) };
                *sum = _mm512_fmadd_ps(value, x, *sum);
            }
        }
        let out = &mut out[at..at + 16 * N];
        for (n, sum) in sums.iter().enumerate() {
            // SAFETY: `out` has 16 * N elements and n < N.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * n), *sum) };
        }
    }

    /// Rows `range` of the product into `out [range, dim]`.
    #[target_feature(enable = "avx2,fma")]
    pub fn rows_avx2(matrix: &Csr, range: Range<usize>, dense: &[f32], dim: usize, out: &mut [f32]) {
        for (row, out) in range.zip(out.chunks_exact_mut(dim)) {
            let mut at = 0;
            while at + 64 <= dim {
                strip_avx2::<8>(matrix, row, dense, dim, at, out);
                at += 64;
            }
            while at + 8 <= dim {
                strip_avx2::<1>(matrix, row, dense, dim, at, out);
                at += 8;
            }
            if at < dim {
                out[at..].fill(0.0);
                columns_from(matrix, row, dense, dim, at, out);
            }
        }
    }

    /// Columns `at..at + 8 * N` of one row.
    #[target_feature(enable = "avx2,fma")]
    fn strip_avx2<const N: usize>(matrix: &Csr, row: usize, dense: &[f32], dim: usize, at: usize, out: &mut [f32]) {
        let (columns, values) = matrix.row(row);
        let mut sums = [_mm256_setzero_ps(); N];
        for (&column, &value) in columns.iter().zip(values) {
            let source = &dense[column as usize * dim + at..][..8 * N];
            let value = _mm256_set1_ps(value);
            for (n, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `source` has 8 * N elements and n < N.
                let x = unsafe { _mm256_loadu_ps(source.as_ptr().add(8 * n)) };
                *sum = _mm256_fmadd_ps(value, x, *sum);
            }
        }
        let out = &mut out[at..at + 8 * N];
        for (n, sum) in sums.iter().enumerate() {
            // SAFETY: `out` has 8 * N elements and n < N.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * n), *sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rows: usize, cols: usize, nonzeros: usize, dim: usize) -> (Csr, Vec<f32>) {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let entries: Vec<(u32, u32, f32)> = (0..nonzeros)
            .map(|_| (rng.random_range(0..rows as u32), rng.random_range(0..cols as u32), rng.random_range(-1.0..1.0)))
            .collect();
        let dense = (0..cols * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
        (Csr::from_entries(rows, cols, &entries).unwrap(), dense)
    }

    fn in_f64(matrix: &Csr, dense: &[f32], dim: usize) -> Vec<f64> {
        let mut out = vec![0f64; matrix.rows() * dim];
        for r in 0..matrix.rows() {
            let (columns, values) = matrix.row(r);
            for (&c, &v) in columns.iter().zip(values) {
                for d in 0..dim {
                    out[r * dim + d] += f64::from(v) * f64::from(dense[c as usize * dim + d]);
                }
            }
        }
        out
    }

    #[test]
    fn every_strip_width_agrees_with_double_precision() {
        for dim in [0, 1, 7, 8, 16, 24, 63, 64, 65, 96, 153] {
            let (matrix, dense) = random(60, 40, 600, dim);
            let want = in_f64(&matrix, &dense, dim);
            let mut functions: Vec<(&str, Rows)> = vec![("portable", rows_portable), ("chosen", row_function())];
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: just checked.
                functions.push(("avx2", |m, r, x, d, out| unsafe { x86::rows_avx2(m, r, x, d, out) }));
            }
            for (name, rows) in functions {
                if dim == 0 {
                    continue;
                }
                // NaN in the beginning: every element must be written, empty rows too.
                let mut out = vec![f32::NAN; matrix.rows() * dim];
                rows(&matrix, 0..matrix.rows(), &dense, dim, &mut out);
                for (got, want) in out.iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{name}, dim {dim}: {got} is not {want}");
                }
            }
            let mut out = vec![f32::NAN; matrix.rows() * dim];
            csr_matmul(&matrix, &dense, dim, &mut out);
            assert!(out.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-5));
        }
    }

    #[test]
    fn a_dense_operand_at_any_address_gives_the_same_bits() {
        let (matrix, dense) = random(80, 40, 600, 32);
        let mut results = Vec::new();
        for shift in 0..17 {
            let mut buffer = vec![0f32; shift];
            buffer.extend_from_slice(&dense);
            let dense = &buffer[shift..];
            if dense.as_ptr().align_offset(64) != 0 {
                assert!(gathers_gain_from_alignment(&matrix, dense, 32));
                assert_eq!(Aligned::of(dense).values().as_ptr().align_offset(64), 0);
            }
            let mut out = vec![0f32; matrix.rows() * 32];
            csr_matmul(&matrix, dense, 32, &mut out);
            results.push(out);
        }
        assert!(results.iter().all(|r| r == &results[0]));
        assert_eq!(Aligned::of(&dense).values(), dense);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (matrix, dense) = random(900, 700, 60_000, 64);
        assert!(matrix.nonzeros() * 64 > SEQUENTIAL_WORK && matrix.blocks().count() > 4);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0f32; matrix.rows() * 64];
            pool.install(|| csr_matmul(&matrix, &dense, 64, &mut out));
            out.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
        };
        let one = with(1);
        assert_eq!(one, with(2));
        assert_eq!(one, with(5));
    }
}
