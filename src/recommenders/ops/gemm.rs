//! Products of matrices on one thread, by the `gemm` crate: Rayon goes over blocks of rows outside, so that no
//! result depends on the number of threads.
//!
//! In and out: slices with strides.

use gemm::Parallelism;

/// A matrix: numbers, steps from row to row and from column to column.
pub type Matrix<'a> = (&'a [f32], usize, usize);

/// `out [m, n] = a [m, k] x b [k, n]`, or `+=`; `out` is row-major.
///
/// # Panics
/// When a slice is too short for its shape (our bug).
pub fn multiply(out: &mut [f32], [m, n, k]: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let covers = |(x, row, column): Matrix<'_>, rows: usize, columns: usize| {
        assert!(x.len() > (rows - 1) * row + (columns - 1) * column, "a factor is smaller than its shape");
    };
    assert!(out.len() >= m * n, "the product is smaller than its shape");
    covers(a, m, k);
    covers(b, k, n);
    // SAFETY: the last element of each matrix lies within its slice (just checked), and `out`, borrowed mutably,
    // overlaps neither factor.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.0.as_ptr(),
            a.2 as isize,
            a.1 as isize,
            b.0.as_ptr(),
            b.2 as isize,
            b.1 as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
