//! Dense linear algebra of the closed forms, on `gemm`'s kernels and Rayon.
//!
//! In: row-major slices. Out: products, inverses, eigenvectors. Every result is the same for any number of threads:
//! a product of a block is always taken by one thread, and blocks are cut by the shape alone.

pub mod eigen;
pub mod inverse;

use gemm::Parallelism;
use rayon::prelude::*;

/// `f32` or `f64`.
pub trait Real: Copy + Send + Sync + 'static {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
}

/// A matrix somebody else holds.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    values: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// Row-major `[rows, cols]`.
    ///
    /// # Panics
    /// When the length does not fit (our bug).
    pub fn new(values: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "a matrix does not have its shape");
        Matrix { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn transposed(self) -> Self {
        let Matrix { values, rows, cols, row_stride, col_stride } = self;
        Matrix { values, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// What a product does with what the result held before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// It is overwritten.
    Replace,
    /// The product is added to it.
    Add,
}

/// `out = scale * a b` or `out += scale * a b`, by the calling thread; rows of `out` begin every `stride` values.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn multiply<T: Real>(a: Matrix<'_, T>, b: Matrix<'_, T>, scale: T, into: Target, out: &mut [T], stride: usize) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "the operands of a product do not fit each other");
    if m == 0 || n == 0 {
        return;
    }
    assert!(stride >= n && out.len() >= (m - 1) * stride + n, "the result of a product has no room");
    let add = into == Target::Add;
    if k == 0 {
        if !add {
            out.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(T::ZERO));
        }
        return;
    }
    // SAFETY: a `Matrix` holds `rows * cols` values at its strides (checked when it was made), `out` was checked
    // above and, being `&mut`, overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            add,
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Rows of a block of [`tall_product`] and [`gram`].
const BLOCK_ROWS: usize = 1024;

/// `tall [n, k] x small [k, m]` as `[n, m]`, in parallel over blocks of rows.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn tall_product<T: Real>(tall: &[T], small: Matrix<'_, T>) -> Vec<T> {
    let (k, m) = (small.rows, small.cols);
    if k == 0 || m == 0 {
        return Vec::new();
    }
    let n = tall.len() / k;
    let mut out = vec![T::ZERO; n * m];
    out.par_chunks_mut(BLOCK_ROWS * m).zip(tall.par_chunks(BLOCK_ROWS * k)).for_each(|(out, block)| {
        multiply(Matrix::new(block, block.len() / k, k), small, T::ONE, Target::Replace, out, m);
    });
    out
}

/// `a^T b` `[k, m]` of tall `a [n, k]` and `b [n, m]`; products of blocks of rows are added up in f64, in order.
///
/// # Panics
/// When the shapes do not fit (our bug).
pub fn gram(a: &[f32], k: usize, b: &[f32], m: usize) -> Vec<f64> {
    let mut sum = vec![0f64; k * m];
    if k == 0 || m == 0 {
        return sum;
    }
    assert_eq!(a.len() / k, b.len() / m, "the operands of a product do not have the same rows");
    let blocks: Vec<Vec<f32>> = a
        .par_chunks(BLOCK_ROWS * k)
        .zip(b.par_chunks(BLOCK_ROWS * m))
        .map(|(a, b)| {
            let n = a.len() / k;
            let mut out = vec![0f32; k * m];
            multiply(Matrix::new(a, n, k).transposed(), Matrix::new(b, n, m), 1.0, Target::Replace, &mut out, m);
            out
        })
        .collect();
    for block in blocks {
        sum.iter_mut().zip(block).for_each(|(s, x)| *s += f64::from(x));
    }
    sum
}

/// Rounded to f32.
pub fn to_f32(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_definition() {
        let a: Vec<f64> = (0..6).map(f64::from).collect(); // [2, 3]
        let b: Vec<f64> = (0..12).map(|x| f64::from(x) - 4.0).collect(); // [3, 4]
        let mut out = vec![1.0; 2 * 5];
        multiply(Matrix::new(&a, 2, 3), Matrix::new(&b, 3, 4), 2.0, Target::Add, &mut out, 5);
        for r in 0..2 {
            for c in 0..4 {
                let want: f64 = 1.0 + 2.0 * (0..3).map(|k| a[r * 3 + k] * b[k * 4 + c]).sum::<f64>();
                assert_eq!(out[r * 5 + c], want);
            }
        }
        assert_eq!((out[4], out[9]), (1.0, 1.0)); // beyond the columns nothing is touched
        let mut empty = vec![7.0; 4];
        multiply(Matrix::<f64>::new(&[], 2, 0), Matrix::new(&[], 0, 2), 1.0, Target::Replace, &mut empty, 2);
        assert_eq!(empty, [0.0; 4]);
    }

    #[test]
    fn tall_ones_are_the_same_in_blocks() {
        let n = 2 * BLOCK_ROWS + 3;
        let a: Vec<f32> = (0..n * 2).map(|x| (x % 13) as f32).collect();
        let b: Vec<f32> = (0..n * 3).map(|x| (x % 7) as f32 - 3.0).collect();
        let sum = gram(&a, 2, &b, 3);
        let want: f32 = (0..n).map(|r| a[r * 2 + 1] * b[r * 3 + 2]).sum();
        assert_eq!(sum[5], f64::from(want));
        let small = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let out = tall_product(&a, Matrix::new(&small, 2, 3));
        assert_eq!(out[(n - 1) * 3 + 2], a[(n - 1) * 2] * 3.0 + a[(n - 1) * 2 + 1] * 6.0);
    }
}
