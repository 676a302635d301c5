//! Cholesky factors, and the inverse of a symmetric positive definite matrix in its own place.
//!
//! [`invert`] sweeps blocks of pivots (Gauss and Jordan; Goodnight 1979, "A tutorial on the SWEEP operator"): with
//! the sign chosen so that the matrix stays symmetric, half of it has to be kept up to date, which makes `n^3`
//! operations, as many as by a Cholesky factor, nearly all of them in products of blocks.

use rayon::prelude::*;

use super::{Matrix, Target, multiply};
use crate::error::{Error, Result};

/// Pivots that are swept at once.
const BLOCK: usize = 64;

/// Replaces the symmetric positive definite `a [n, n]` by its inverse; only its lower triangle is read. `check` is
/// asked before each block of pivots.
///
/// # Errors
/// `a` is not positive definite in floating point (exit 78); what `check` returned.
///
/// # Panics
/// When the length is not `n * n` (our bug).
pub fn invert(a: &mut [f64], n: usize, check: &dyn Fn() -> Result<()>) -> Result<()> {
    assert_eq!(a.len(), n * n, "a matrix is not square");
    for first in (0..n).step_by(BLOCK) {
        check()?;
        let b = BLOCK.min(n - first);
        let pivots = first..first + b;
        // The columns of the pivots [n, b]; above the diagonal they are read from the rows of the pivots.
        let mut panel = vec![0f64; n * b];
        for (r, row) in panel.chunks_exact_mut(b).enumerate() {
            for (c, x) in row.iter_mut().enumerate() {
                let column = first + c;
                *x = if r >= column { a[r * n + column] } else { a[column * n + r] };
            }
        }
        let mut inverse = panel[first * b..][..b * b].to_vec();
        if !invert_block(&mut inverse, b) {
            return Err(not_definite());
        }
        let mut scaled = vec![0f64; n * b];
        let block = Matrix::new(&inverse, b, b);
        multiply(Matrix::new(&panel, n, b), block, 1.0, Target::Replace, &mut scaled, b);
        let (panel, scaled) = (&panel, &scaled);
        a.par_chunks_mut(BLOCK * n).enumerate().for_each(|(at, rows)| {
            let from = at * BLOCK;
            let height = rows.len() / n;
            if from == first {
                // The pivots' own rows: left of the pivots the scaled panel, then minus the inverse.
                for (r, row) in rows.chunks_exact_mut(n).enumerate() {
                    for (c, x) in row[..first].iter_mut().enumerate() {
                        *x = scaled[c * b + r];
                    }
                    for (x, i) in row[pivots.clone()].iter_mut().zip(&inverse[r * b..][..b]) {
                        *x = -i;
                    }
                }
                return;
            }
            // Columns up to the end of the block on the diagonal; the rest belongs to the upper triangle.
            let to = (from + height).min(n);
            let left = Matrix::new(&scaled[from * b..][..height * b], height, b);
            let right = Matrix::new(&panel[..to * b], to, b).transposed();
            multiply(left, right, -1.0, Target::Add, rows, n);
            if from > first {
                for (r, row) in rows.chunks_exact_mut(n).enumerate() {
                    row[pivots.clone()].copy_from_slice(&scaled[(from + r) * b..][..b]);
                }
            }
        });
    }
    // Now it holds minus the inverse in its lower triangle.
    a.iter_mut().for_each(|x| *x = -*x);
    for from in (0..n).step_by(BLOCK) {
        for to in (0..=from).step_by(BLOCK) {
            for r in from..(from + BLOCK).min(n) {
                for c in to..(to + BLOCK).min(r) {
                    a[c * n + r] = a[r * n + c];
                }
            }
        }
    }
    match a.iter().step_by(n + 1).all(|x| x.is_finite() && *x > 0.0) {
        true => Ok(()),
        false => Err(not_definite()),
    }
}

fn not_definite() -> Error {
    Error::spec("the matrix to invert is not positive definite in floating point")
        .with_help("raise the weight of the L2 term in the stage's `hyper` table")
}

/// Inverts a small symmetric positive definite `a [n, n]`; false where it is not.
fn invert_block(a: &mut [f64], n: usize) -> bool {
    let Some(lower) = cholesky(a, n) else { return false };
    let inverse = invert_lower(&lower, n);
    let factor = Matrix::new(&inverse, n, n);
    multiply(factor.transposed(), factor, 1.0, Target::Replace, a, n);
    true
}

/// The lower triangular `L [n, n]` with `L L^T = a`; `None` where `a` is not positive definite. Only the lower
/// triangle of `a` is read.
///
/// # Panics
/// When the length is not `n * n` (our bug).
pub fn cholesky(a: &[f64], n: usize) -> Option<Vec<f64>> {
    assert_eq!(a.len(), n * n, "a matrix is not square");
    let mut l = vec![0f64; n * n];
    for r in 0..n {
        let (done, rest) = l.split_at_mut(r * n);
        let row = &mut rest[..n];
        for c in 0..r {
            let above = &done[c * n..][..c + 1];
            let x = (a[r * n + c] - dot(&row[..c], &above[..c])) / above[c];
            row[c] = x;
        }
        let pivot = a[r * n + r] - dot(&row[..r], &row[..r]);
        if !(pivot.is_finite() && pivot > 0.0) {
            return None;
        }
        row[r] = pivot.sqrt();
    }
    Some(l)
}

/// The inverse `[n, n]` of a lower triangular matrix without zeros on its diagonal.
///
/// # Panics
/// When the length is not `n * n` (our bug).
pub fn invert_lower(l: &[f64], n: usize) -> Vec<f64> {
    assert_eq!(l.len(), n * n, "a matrix is not square");
    let mut inverse = vec![0f64; n * n];
    for r in 0..n {
        let (done, rest) = inverse.split_at_mut(r * n);
        let row = &mut rest[..n];
        for (k, above) in done.chunks_exact(n).enumerate() {
            let factor = l[r * n + k];
            for (x, y) in row[..=k].iter_mut().zip(&above[..=k]) {
                *x -= factor * y;
            }
        }
        let pivot = l[r * n + r];
        row[..r].iter_mut().for_each(|x| *x /= pivot);
        row[r] = 1.0 / pivot;
    }
    inverse
}

/// In eight strands, so that the compiler can use vectors; the same order on every machine.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recommenders::optim::normal;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn definite(n: usize) -> Vec<f64> {
        let values: Vec<f64> =
            normal(n * n, 1.0, &mut ChaCha8Rng::seed_from_u64(n as u64)).iter().map(|&x| f64::from(x)).collect();
        let mut a = vec![0f64; n * n];
        let square = Matrix::new(&values, n, n);
        multiply(square, square.transposed(), 1.0, Target::Replace, &mut a, n);
        a.iter_mut().step_by(n + 1).for_each(|x| *x += 1.0);
        a
    }

    #[test]
    fn the_inverse_times_the_matrix_is_the_identity() {
        for n in [0, 1, 2, 63, 64, 65, 128, 200] {
            let a = definite(n);
            let mut inverse = a.clone();
            // The upper triangle must not matter.
            (0..n).for_each(|r| inverse[r * n + r + 1..(r + 1) * n].fill(f64::NAN));
            invert(&mut inverse, n, &|| Ok(())).unwrap();
            let mut product = vec![0f64; n * n];
            multiply(Matrix::new(&a, n, n), Matrix::new(&inverse, n, n), 1.0, Target::Replace, &mut product, n);
            for (at, x) in product.iter().enumerate() {
                let want = f64::from(u8::from(at / n == at % n));
                assert!((x - want).abs() < 1e-9, "n {n}, place {at}: {x}");
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut a = definite(150);
            pool.install(|| invert(&mut a, 150, &|| Ok(())).unwrap());
            a
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn what_is_not_definite_is_refused() {
        let mut a = vec![1.0, 2.0, 2.0, 1.0];
        assert_eq!(invert(&mut a, 2, &|| Ok(())).unwrap_err().fault.exit_code(), 78);
        assert_eq!(invert(&mut [f64::NAN], 1, &|| Ok(())).unwrap_err().fault.exit_code(), 78);
        let stop = || Err(Error::internal("stop"));
        assert_eq!(invert(&mut [1.0], 1, &stop).unwrap_err().message, "stop");
    }

    #[test]
    fn the_factor_squared_is_the_matrix() {
        let n = 37;
        let a = definite(n);
        let l = cholesky(&a, n).unwrap();
        let mut square = vec![0f64; n * n];
        multiply(Matrix::new(&l, n, n), Matrix::new(&l, n, n).transposed(), 1.0, Target::Replace, &mut square, n);
        assert!(a.iter().zip(&square).all(|(x, y)| (x - y).abs() < 1e-9));
        let mut one = vec![0f64; n * n];
        let inverse = invert_lower(&l, n);
        multiply(Matrix::new(&l, n, n), Matrix::new(&inverse, n, n), 1.0, Target::Replace, &mut one, n);
        assert!(one.iter().enumerate().all(|(at, x)| (x - f64::from(u8::from(at / n == at % n))).abs() < 1e-9));
    }
}
