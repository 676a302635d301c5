//! Products of small matrices on one thread: what attention needs of them for one head of one sequence.
//!
//! In and out: row-major slices whose rows are padded to whole vectors ([`ROWS`], [`COLUMNS`]), so there are no
//! remainders. The widest instruction set that the machine has is found at run time.

/// Rows of a product are a multiple of this.
pub const ROWS: usize = 8;

/// Columns of a product are a multiple of this.
pub const COLUMNS: usize = 16;

/// `n` rounded up to a multiple of `of`.
pub fn padded(n: usize, of: usize) -> usize {
    n.div_ceil(of) * of
}

/// Which part of a product is needed, or of its depth can differ from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All.
    All,
    /// Columns up to the row's number: the rest of the result is left as it is.
    ColumnsToRow,
    /// Depth up to the row's number: beyond it the left factor is 0.
    DepthToRow,
    /// Depth from the row's number on: before it the left factor is 0.
    DepthFromRow,
}

/// A left factor: numbers, steps from row to row and along the depth.
#[derive(Clone, Copy)]
pub struct Left<'a>(pub &'a [f32], pub usize, pub usize);

/// `out [rows, columns] = left [rows, depth] x right [depth, columns]`; rows of `right` and `out` follow one another
/// after `right_step` and `out_step` numbers.
///
/// # Panics
/// When a slice is too short for its shape (our bug).
pub fn product(
    (out, out_step): (&mut [f32], usize),
    left: Left<'_>,
    (right, right_step): (&[f32], usize),
    [rows, columns, depth]: [usize; 3],
    part: Part,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(rows.is_multiple_of(ROWS) && columns.is_multiple_of(COLUMNS), "rows and columns are padded");
    assert!(columns <= out_step && columns <= right_step, "rows that overlap");
    assert!(out.len() >= (rows - 1) * out_step + columns, "the product is smaller than its shape");
    if depth > 0 {
        assert!(left.0.len() > (rows - 1) * left.1 + (depth - 1) * left.2, "the left factor is too small");
        assert!(right.len() >= (depth - 1) * right_step + columns, "the right factor is too small");
    }
    let task = Task {
        out: out.as_mut_ptr(),
        out_step,
        left,
        right: right.as_ptr(),
        right_step,
        shape: [rows, columns, depth],
    };
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512F was found, and the slices hold the shapes.
            return unsafe { x86::product_avx512(&task, part) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: AVX2 and FMA were found, and the slices hold the shapes.
            return unsafe { x86::product_avx2(&task, part) };
        }
    }
    // SAFETY: the slices hold the shapes.
    unsafe { tiles::<Portable, 4, 2, 2>(&task, part) }
}

struct Task<'a> {
    out: *mut f32,
    out_step: usize,
    left: Left<'a>,
    right: *const f32,
    right_step: usize,
    shape: [usize; 3],
}

/// A vector of some instruction set.
trait Vector: Copy {
    const WIDTH: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b`.
    unsafe fn plus(self, a: Self, b: Self) -> Self;
}

/// All tiles of `M` rows and `N` vectors (`LAST` where `N` no longer fit).
///
/// # Safety
/// The machine has the instructions of `V`, and the task's pointers cover its shape.
#[inline(always)]
unsafe fn tiles<V: Vector, const M: usize, const N: usize, const LAST: usize>(task: &Task<'_>, part: Part) {
    let [rows, columns, depth] = task.shape;
    for row in (0..rows).step_by(M) {
        // Within a block of ROWS rows all have the same bounds.
        let first = row / ROWS * ROWS;
        let to_row = first + ROWS;
        let columns = if part == Part::ColumnsToRow { padded(to_row, COLUMNS).min(columns) } else { columns };
        let range = match part {
            Part::DepthToRow => 0..to_row.min(depth),
            Part::DepthFromRow => first.min(depth)..depth,
            _ => 0..depth,
        };
        let mut column = 0;
        while column + N * V::WIDTH <= columns {
            // SAFETY: as this function's; the tile lies within the shape.
            unsafe { tile::<V, M, N>(task, row, column, range.clone()) };
            column += N * V::WIDTH;
        }
        while column < columns {
            // SAFETY: as above; what is left is a multiple of COLUMNS.
            unsafe { tile::<V, M, LAST>(task, row, column, range.clone()) };
            column += LAST * V::WIDTH;
        }
    }
}

/// # Safety
/// As [`tiles`]; rows `row..row + M`, columns `column..column + N * WIDTH` lie within the shape.
#[inline(always)]
unsafe fn tile<V: Vector, const M: usize, const N: usize>(
    task: &Task<'_>,
    row: usize,
    column: usize,
    depth: std::ops::Range<usize>,
) {
    let Left(left, row_step, step) = task.left;
    // SAFETY: every place read or written lies within the slices, by the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        let left = left.as_ptr().add(row * row_step);
        for k in depth {
            let right = task.right.add(k * task.right_step + column);
            let mut vectors = [V::splat(0.0); N];
            for (n, vector) in vectors.iter_mut().enumerate() {
                *vector = V::load(right.add(n * V::WIDTH));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = V::splat(*left.add(m * row_step + k * step));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = sum.plus(x, vector);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(task.out.add((row + m) * task.out_step + column + n * V::WIDTH));
            }
        }
    }
}

/// Eight numbers, for any machine.
#[derive(Clone, Copy)]
struct Portable([f32; 8]);

impl Vector for Portable {
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Portable(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn plus(mut self, a: Self, b: Self) -> Self {
        for n in 0..8 {
            self.0[n] += a.0[n] * b.0[n];
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Part, Task, Vector, tiles};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub unsafe fn product_avx512(task: &Task<'_>, part: Part) {
        // SAFETY: the caller's promise.
        unsafe { tiles::<__m512, 8, 2, 1>(task, part) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn product_avx2(task: &Task<'_>, part: Part) {
        // SAFETY: the caller's promise.
        unsafe { tiles::<__m256, 4, 2, 2>(task, part) }
    }

    impl Vector for __m512 {
        const WIDTH: usize = 16;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller's promise, here and below.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn plus(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
    }

    impl Vector for __m256 {
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller's promise, here and below.
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn plus(self, a: Self, b: Self) -> Self {
            unsafe { _mm256_fmadd_ps(a, b, self) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, k: f32) -> Vec<f32> {
        (0..n).map(|x| (x as f32 * k).sin()).collect()
    }

    fn check(run: impl Fn(&Task<'_>, Part)) {
        for (rows, columns, depth) in [(8, 16, 1), (24, 48, 20), (16, 32, 16), (40, 16, 37)] {
            for part in [Part::All, Part::ColumnsToRow, Part::DepthToRow, Part::DepthFromRow] {
                for (row_step, step) in [(depth + 3, 1), (1, rows)] {
                    let mut left = numbers(rows * (depth + 3), 0.7);
                    let right = numbers(depth * (columns + 5), 0.3);
                    // What the part promises to be 0.
                    for r in 0..rows {
                        for k in 0..depth {
                            let zero = part == Part::DepthToRow && k > r || part == Part::DepthFromRow && k < r;
                            if zero {
                                left[r * row_step + k * step] = 0.0;
                            }
                        }
                    }
                    let mut out = vec![f32::NAN; rows * columns];
                    let task = Task {
                        out: out.as_mut_ptr(),
                        out_step: columns,
                        left: Left(&left, row_step, step),
                        right: right.as_ptr(),
                        right_step: columns + 5,
                        shape: [rows, columns, depth],
                    };
                    run(&task, part);
                    for r in 0..rows {
                        let needed = if part == Part::ColumnsToRow { (r + 1).min(columns) } else { columns };
                        for c in 0..needed {
                            let want: f64 = (0..depth)
                                .map(|k| {
                                    f64::from(left[r * row_step + k * step]) * f64::from(right[k * (columns + 5) + c])
                                })
                                .sum();
                            let got = f64::from(out[r * columns + c]);
                            assert!((got - want).abs() < 1e-5, "{part:?} [{rows}, {columns}, {depth}]: {got}, {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_double_precision() {
        // SAFETY: the slices hold the shapes, and the instructions are there.
        check(|task, part| unsafe { tiles::<Portable, 4, 2, 2>(task, part) });
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                check(|task, part| unsafe { x86::product_avx2(task, part) });
            }
            if is_x86_feature_detected!("avx512f") {
                check(|task, part| unsafe { x86::product_avx512(task, part) });
            }
        }
    }
}
