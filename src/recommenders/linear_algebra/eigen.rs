//! Eigenvalues and eigenvectors: of a small dense symmetric matrix ([`symmetric`]), and the leading ones of a large
//! matrix that is only known by its products with vectors ([`leading`]).
//!
//! * Dense: Householder reflections to a tridiagonal matrix, then QL steps with implicit shifts (Wilkinson and
//!   Reinsch 1971, procedures `tred2` and `tql2`).
//! * Leading: a block Krylov space (Musco and Musco 2015, arXiv 1504.05477) with full orthogonalisation and
//!   Rayleigh and Ritz's projection.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{Matrix, Target, gram, multiply, tall_product, to_f32};
use crate::recommenders::optim::normal;

/// Eigenvalues ascending, and eigenvectors as rows `[n, n]` in that order.
pub struct Eigen {
    /// `[n]`.
    pub values: Vec<f64>,
    /// `[n, n]`, one vector a row.
    pub vectors: Vec<f64>,
}

/// All eigenvectors of the symmetric `a [n, n]`.
///
/// # Panics
/// When the length is not `n * n` (our bug).
pub fn symmetric(a: &[f64], n: usize) -> Eigen {
    assert_eq!(a.len(), n * n, "a matrix is not square");
    let (mut diagonal, mut off, mut basis) = tridiagonal(a.to_vec(), n);
    ql(&mut diagonal, &mut off, &mut basis, n);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&x, &y| diagonal[x].total_cmp(&diagonal[y]).then(x.cmp(&y)));
    let values = order.iter().map(|&i| diagonal[i]).collect();
    let vectors = order.iter().flat_map(|&i| basis[i * n..][..n].iter().copied()).collect();
    Eigen { values, vectors }
}

/// `a = B^T T B` with `T` tridiagonal: its diagonal `[n]`, what stands below it `[n]` (the last one 0), `B [n, n]`.
fn tridiagonal(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut basis = vec![0f64; n * n];
    basis.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
    let (mut diagonal, mut off) = (vec![0f64; n], vec![0f64; n]);
    let mut v = vec![0f64; n];
    let mut p = vec![0f64; n];
    for k in 0..n.saturating_sub(2) {
        // The reflection I - v v^T / h that turns column k below the diagonal into one number.
        let below = k + 1..n;
        let norm = below.clone().map(|r| a[r * n + k].powi(2)).sum::<f64>().sqrt();
        if norm == 0.0 {
            continue;
        }
        for r in below.clone() {
            v[r] = a[r * n + k];
        }
        let first = v[k + 1];
        let alpha = if first > 0.0 { -norm } else { norm };
        v[k + 1] -= alpha;
        let h = norm * norm - first * alpha;
        if h == 0.0 {
            continue;
        }
        // p = A v / h, then A -= v q^T + q v^T with q = p - (v p / 2h) v.
        for r in below.clone() {
            p[r] = below.clone().map(|c| a[r * n + c] * v[c]).sum::<f64>() / h;
        }
        let half = below.clone().map(|r| v[r] * p[r]).sum::<f64>() / (2.0 * h);
        for r in below.clone() {
            p[r] -= half * v[r];
        }
        for r in below.clone() {
            for c in below.clone() {
                a[r * n + c] -= v[r] * p[c] + p[r] * v[c];
            }
        }
        for r in below.clone() {
            (a[r * n + k], a[k * n + r]) = (0.0, 0.0);
        }
        (a[(k + 1) * n + k], a[k * n + k + 1]) = (alpha, alpha);
        // B <- (I - v v^T / h) B, row by row.
        let mut along = vec![0f64; n];
        for r in below.clone() {
            for (s, x) in along.iter_mut().zip(&basis[r * n..][..n]) {
                *s += v[r] * x;
            }
        }
        for r in below {
            let factor = v[r] / h;
            for (x, s) in basis[r * n..][..n].iter_mut().zip(&along) {
                *x -= factor * s;
            }
        }
    }
    for k in 0..n {
        diagonal[k] = a[k * n + k];
        off[k] = if k + 1 < n { a[(k + 1) * n + k] } else { 0.0 };
    }
    (diagonal, off, basis)
}

/// Rotations of neighbouring rows of `basis` until `off` vanishes.
fn ql(diagonal: &mut [f64], off: &mut [f64], basis: &mut [f64], n: usize) {
    for l in 0..n {
        // Each eigenvalue takes two or three rounds; the bound only keeps NaN from looping for ever.
        for _ in 0..60 {
            let small = |m: usize| off[m].abs() <= f64::EPSILON * (diagonal[m].abs() + diagonal[m + 1].abs());
            let m = (l..n - 1).find(|&m| small(m)).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let g = (diagonal[l + 1] - diagonal[l]) / (2.0 * off[l]);
            let r = g.hypot(1.0);
            let mut g = diagonal[m] - diagonal[l] + off[l] / (g + r.copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut stopped = false;
            for i in (l..m).rev() {
                let (f, b) = (s * off[i], c * off[i]);
                let r = f.hypot(g);
                off[i + 1] = r;
                if r == 0.0 {
                    diagonal[i + 1] -= p;
                    off[m] = 0.0;
                    stopped = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                let shifted = diagonal[i + 1] - p;
                let t = (diagonal[i] - shifted) * s + 2.0 * c * b;
                p = s * t;
                diagonal[i + 1] = shifted + p;
                g = c * t - b;
                let (upper, lower) = basis.split_at_mut((i + 1) * n);
                for (x, y) in upper[i * n..].iter_mut().zip(&mut lower[..n]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
            if !stopped {
                diagonal[l] -= p;
                off[l] = g;
                off[m] = 0.0;
            }
        }
    }
}

/// Vectors of a Krylov block.
const BLOCK: usize = 16;

/// Orthonormal eigenvectors of the `rank` largest eigenvalues of a symmetric positive semidefinite matrix `[n, n]`,
/// as columns `[n, rank]` in descending order of the eigenvalues; fewer where `n` is less. `product(x, columns)` is
/// the matrix times `x [n, columns]`. The same seed gives the same vectors.
///
/// The Krylov space has six times `rank` dimensions (64 to 512 more). The vectors of eigenvalues that lie close
/// to the one after them are then approximate, which a filter that takes them all alike hardly feels.
pub fn leading(n: usize, rank: usize, seed: u64, product: &dyn Fn(&[f32], usize) -> Vec<f32>) -> Vec<f32> {
    let rank = rank.min(n);
    let wanted = (6 * rank).clamp(rank + 64, rank + 512).min(n);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Blocks [n, columns] of the orthonormal basis and their products with the matrix.
    let mut basis: Vec<(Vec<f32>, usize)> = Vec::new();
    let mut images: Vec<Vec<f32>> = Vec::new();
    let mut dims = 0;
    while dims < wanted {
        let columns = BLOCK.min(wanted - dims);
        let mut next = match images.last() {
            Some(image) if basis.last().is_some_and(|b| b.1 >= columns) => {
                let width = basis.last().map_or(0, |b| b.1);
                image.chunks_exact(width).flat_map(|row| row[..columns].iter().copied()).collect()
            }
            _ => normal(n * columns, 1.0, &mut rng),
        };
        orthonormalise(&mut next, columns, &basis, &mut rng);
        images.push(product(&next, columns));
        basis.push((next, columns));
        dims += columns;
    }
    // T = Q^T A Q, by blocks.
    let mut projected = vec![0f64; dims * dims];
    let mut row = 0;
    for (q, k) in &basis {
        let mut column = 0;
        for (image, (_, m)) in images.iter().zip(&basis) {
            let block = gram(q, *k, image, *m);
            for (r, values) in block.chunks_exact(*m).enumerate() {
                projected[(row + r) * dims + column..][..*m].copy_from_slice(values);
            }
            column += m;
        }
        row += k;
    }
    for r in 0..dims {
        for c in 0..r {
            let mean = 0.5 * (projected[r * dims + c] + projected[c * dims + r]);
            (projected[r * dims + c], projected[c * dims + r]) = (mean, mean);
        }
    }
    let eigen = symmetric(&projected, dims);
    // The last rows of `vectors` belong to the largest eigenvalues.
    let mut out = vec![0f32; n * rank];
    let mut at = 0;
    for (q, k) in &basis {
        let mut part = vec![0f64; k * rank];
        for (r, row) in part.chunks_exact_mut(rank.max(1)).enumerate() {
            for (c, x) in row.iter_mut().enumerate() {
                *x = eigen.vectors[(dims - 1 - c) * dims + at + r];
            }
        }
        let product = tall_product(q, Matrix::new(&to_f32(&part), *k, rank));
        out.iter_mut().zip(product).for_each(|(o, p)| *o += p);
        at += k;
    }
    out
}

/// Makes the columns of `block [n, columns]` orthonormal, and orthogonal to `basis`. A column that depends on the
/// others is replaced by a random one.
fn orthonormalise(block: &mut [f32], columns: usize, basis: &[(Vec<f32>, usize)], rng: &mut ChaCha8Rng) {
    let n = block.len() / columns;
    for round in 0..3 {
        for (q, k) in basis {
            let along = to_f32(&gram(q, *k, block, columns));
            let part = tall_product(q, Matrix::new(&along, *k, columns));
            block.iter_mut().zip(part).for_each(|(x, p)| *x -= p);
        }
        for c in 0..columns {
            let before = norm(block, columns, c);
            for earlier in 0..c {
                let along: f64 =
                    (0..n).map(|r| f64::from(block[r * columns + c]) * f64::from(block[r * columns + earlier])).sum();
                for r in 0..n {
                    block[r * columns + c] -= along as f32 * block[r * columns + earlier];
                }
            }
            let after = norm(block, columns, c);
            if after <= 1e-6 * before || after < 1e-30 {
                // Nothing new in this direction; a later round makes the random one orthogonal.
                if round < 2 {
                    let fresh = normal(n, 1.0, rng);
                    for (r, x) in fresh.into_iter().enumerate() {
                        block[r * columns + c] = x / (n as f32).sqrt();
                    }
                }
                continue;
            }
            for r in 0..n {
                block[r * columns + c] /= after as f32;
            }
        }
    }
}

fn norm(block: &[f32], columns: usize, c: usize) -> f64 {
    block.iter().skip(c).step_by(columns).map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// `out [n, m] = scale * left [n, k] right^T`, `right [m, k]`, in parallel over blocks of rows.
pub fn outer(left: &[f32], right: &[f32], k: usize, scale: f32, out: &mut [f32]) {
    use rayon::prelude::*;
    if k == 0 || right.is_empty() {
        return;
    }
    let m = right.len() / k;
    out.par_chunks_mut(64 * m).zip(left.par_chunks(64 * k)).for_each(|(out, left)| {
        let rows = left.len() / k;
        let right = Matrix::new(right, m, k).transposed();
        multiply(Matrix::new(left, rows, k), right, scale, Target::Add, out, m);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn semidefinite(n: usize, rank: usize) -> Vec<f64> {
        let x: Vec<f32> = normal(n * rank, 1.0, &mut ChaCha8Rng::seed_from_u64(7));
        (0..n * n).map(|at| (0..rank).map(|k| f64::from(x[at / n * rank + k] * x[at % n * rank + k])).sum()).collect()
    }

    #[test]
    fn eigenvectors_are_orthonormal_and_make_the_matrix_again() {
        for (n, rank) in [(0, 0), (1, 1), (2, 2), (3, 1), (40, 40), (30, 5)] {
            let a = semidefinite(n, rank);
            let eigen = symmetric(&a, n);
            assert!(eigen.values.is_sorted());
            let row = |i: usize| &eigen.vectors[i * n..][..n];
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = row(i).iter().zip(row(j)).map(|(x, y)| x * y).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-10, "n {n}: {i}, {j}: {dot}");
                    let again: f64 = (0..n).map(|k| eigen.values[k] * row(k)[i] * row(k)[j]).sum();
                    assert!((again - a[i * n + j]).abs() < 1e-9 * n as f64, "n {n}: {again} for {}", a[i * n + j]);
                }
            }
        }
    }

    #[test]
    fn the_leading_ones_span_what_the_dense_ones_span() {
        // 300 dimensions, four eigenvalues far above the rest, two of them equal.
        let n = 300;
        let noise = normal(n * 6, 1.0, &mut ChaCha8Rng::seed_from_u64(3));
        let mut q = noise.clone();
        orthonormalise(&mut q, 6, &[], &mut ChaCha8Rng::seed_from_u64(0));
        let weights = [9.0f32, 9.0, 7.0, 5.0, 1.0, 0.5];
        let product = |x: &[f32], columns: usize| {
            let mut along = to_f32(&gram(&q, 6, x, columns));
            along.chunks_exact_mut(columns).zip(weights).for_each(|(row, w)| row.iter_mut().for_each(|v| *v *= w));
            tall_product(&q, Matrix::new(&along, 6, columns))
        };
        let vectors = leading(n, 4, 5, &product);
        for c in 0..4 {
            let inside: f64 = (0..4)
                .map(|k| (0..n).map(|r| f64::from(q[r * 6 + k]) * f64::from(vectors[r * 4 + c])).sum::<f64>().powi(2))
                .sum();
            assert!((inside - 1.0).abs() < 1e-4, "vector {c}: {inside}");
        }
        assert_eq!(vectors, leading(n, 4, 5, &product));
        assert!(leading(2, 4, 5, &|x, _| x.to_vec()).len() == 4 && leading(0, 4, 5, &|x, _| x.to_vec()).is_empty());
    }
}
