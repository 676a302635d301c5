//! The nearest rows of an embedding table by cosine (eq. 4 of arXiv 2401.13870), exactly.
//!
//! In: rows of float32, `[rows, dim]`. Out: for chosen rows the n others with the largest cosine,
//! best first, ties in row order, the row itself left out. Rows without a direction (null, or all
//! zeros) have no neighbours and are nobody's.
//!
//! How: a block of query rows times a tile of all rows is one matrix product in float32; what it
//! ranks highest (n and a margin) is scored again in float64, so rounding in the product cannot
//! change the order. Work is spread over query blocks, so the result does not depend on the
//! number of threads.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Query rows of a block.
const BLOCK: usize = 128;
/// Rows of a tile that a block is multiplied with: 128 x 2048 scores are 1 MiB, near the cache.
const TILE: usize = 2048;
/// Candidates kept beyond n for the second scoring.
const MARGIN: usize = 16;
/// Scores that are compared with the threshold in one step.
const STEP: usize = 32;

/// A neighbour: its row, and the cosine to the query row.
pub type Neighbour = (u32, f64);

/// Rows to be compared, `[rows, dim]`, in tiles of equal shape (the last one padded with zeros).
#[derive(Debug, Default)]
pub struct Embeddings {
    dim: usize,
    rows: usize,
    /// `[padded rows, dim]`, each row scaled by a power of two (exact) to a largest entry in [1/2, 1).
    values: Vec<f32>,
    /// 1 / norm of each scaled row; NaN where it has no direction, which no comparison lets pass.
    inverse_norms: Vec<f32>,
}

impl Embeddings {
    /// No rows yet; rows will have `dim` entries. Room is made for `rows`.
    pub fn with_capacity(dim: usize, rows: usize) -> Self {
        let rows = rows.next_multiple_of(TILE);
        Embeddings { dim, rows: 0, values: Vec::with_capacity(rows * dim), inverse_norms: Vec::with_capacity(rows) }
    }

    /// Bytes that `rows` rows take.
    pub fn bytes(dim: usize, rows: usize) -> usize {
        rows.next_multiple_of(TILE).saturating_mul(dim + 1).saturating_mul(size_of::<f32>())
    }

    /// Bytes that the search takes beside the rows, for all threads.
    pub fn scratch_bytes(dim: usize) -> usize {
        rayon::current_num_threads() * BLOCK * (TILE + dim) * size_of::<f32>()
    }

    /// Appends a row; `None` has no direction. Error (exit 65): another length, or an entry that
    /// is not finite.
    pub fn push(&mut self, row: Option<&[f32]>) -> Result<()> {
        let Some(row) = row else {
            self.values.resize(self.values.len() + self.dim, 0.0);
            self.inverse_norms.push(f32::NAN);
            self.rows += 1;
            return Ok(());
        };
        if row.len() != self.dim {
            return Err(Error::data(format!(
                "embeddings differ in length: row {} has {} entries, the first one has {} (rows count from 0)",
                self.rows,
                row.len(),
                self.dim
            )));
        }
        let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        if !row.iter().all(|v| v.is_finite()) {
            return Err(Error::data(format!(
                "the embedding in row {} (0-based) has an entry that is not finite",
                self.rows
            )));
        }
        let scale = power_of_two_below(largest);
        self.values.extend(row.iter().map(|v| (f64::from(*v) * scale) as f32));
        let start = self.rows * self.dim;
        let norm = dot(&self.values[start..], &self.values[start..]).sqrt();
        self.inverse_norms.push(if largest > 0.0 { (1.0 / norm) as f32 } else { f32::NAN });
        self.rows += 1;
        Ok(())
    }

    /// Fills the last tile; call it once, after the last row.
    pub fn finish(&mut self) {
        let padded = self.rows.next_multiple_of(TILE);
        self.values.resize(padded * self.dim, 0.0);
        self.inverse_norms.resize(padded, f32::NAN);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Query rows that are worth handing over at a time: a block for each thread, twice.
    pub fn chunk() -> usize {
        2 * BLOCK * rayon::current_num_threads()
    }

    /// The `n` nearest rows of each query row, `[queries]` lists of at most `n`.
    pub fn nearest(&self, queries: &[u32], n: usize) -> Vec<Vec<Neighbour>> {
        queries.par_chunks(BLOCK).flat_map_iter(|block| self.nearest_of_block(block, n)).collect()
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    fn nearest_of_block(&self, queries: &[u32], n: usize) -> Vec<Vec<Neighbour>> {
        // Always a full block: products of one shape round alike, so equal rows score equal.
        let mut block = vec![0f32; BLOCK * self.dim];
        for (q, &row) in queries.iter().enumerate() {
            block[q * self.dim..(q + 1) * self.dim].copy_from_slice(self.row(row as usize));
        }
        let mut scores = vec![0f32; BLOCK * TILE];
        let mut best: Vec<Best> = queries.iter().map(|_| Best::new(n + MARGIN)).collect();
        for (tile, rows) in self.values.chunks_exact(TILE * self.dim).enumerate() {
            product(&block, rows, self.dim, &mut scores);
            let first = tile * TILE;
            let inverse_norms = &self.inverse_norms[first..first + TILE];
            for ((best, scores), &query) in best.iter_mut().zip(scores.chunks_exact(TILE)).zip(queries) {
                best.look(scores, inverse_norms, first as u32, query);
            }
        }
        best.into_iter().zip(queries).map(|(best, &query)| self.rescored(best, query, n)).collect()
    }

    /// The kept candidates by their cosine in float64.
    fn rescored(&self, best: Best, query: u32, n: usize) -> Vec<Neighbour> {
        let own = self.row(query as usize);
        let own_square = dot(own, own);
        if own_square == 0.0 {
            return Vec::new();
        }
        let cosine = |row: u32| {
            let other = self.row(row as usize);
            (dot(own, other) / (own_square.sqrt() * dot(other, other).sqrt())).clamp(-1.0, 1.0)
        };
        let mut scored: Vec<Neighbour> = best.kept.into_iter().map(|(_, row)| (row, cosine(row))).collect();
        scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        scored.truncate(n);
        scored
    }
}

/// The largest power of two that brings `largest` below 1 and not below 1/2.
fn power_of_two_below(largest: f32) -> f64 {
    match largest > 0.0 {
        true => {
            let exponent = f64::from(largest).log2().floor() as i32 + 1;
            2f64.powi(-exponent)
        }
        false => 1.0,
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// `scores[BLOCK, TILE] = block[BLOCK, dim] x rows[TILE, dim]^T`.
fn product(block: &[f32], rows: &[f32], dim: usize, scores: &mut [f32]) {
    assert!(block.len() == BLOCK * dim && rows.len() == TILE * dim && scores.len() == BLOCK * TILE);
    let dim_stride = dim as isize;
    // SAFETY: the three slices have exactly the lengths that the shapes and strides below reach
    // (asserted above), and `scores` is borrowed mutably, so nothing else sees it.
    unsafe {
        gemm::gemm(
            BLOCK,
            TILE,
            dim,
            scores.as_mut_ptr(),
            1,
            TILE as isize,
            false,
            block.as_ptr(),
            1,
            dim_stride,
            rows.as_ptr(),
            dim_stride,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// The best candidates of one query so far, best first, ties in row order.
struct Best {
    kept: Vec<(f32, u32)>,
    wanted: usize,
}

impl Best {
    fn new(wanted: usize) -> Self {
        Best { kept: Vec::with_capacity(wanted + 1), wanted }
    }

    /// What a score must exceed; rows come in order, so an equal one is too late.
    fn threshold(&self) -> f32 {
        match self.kept.len() < self.wanted {
            true => f32::NEG_INFINITY,
            false => self.kept[self.wanted - 1].0,
        }
    }

    /// Looks at a tile's scores, `[TILE]`; `first` is the tile's first row, `query` is left out.
    fn look(&mut self, scores: &[f32], inverse_norms: &[f32], first: u32, query: u32) {
        for (step, (scores, inverse)) in scores.chunks_exact(STEP).zip(inverse_norms.chunks_exact(STEP)).enumerate() {
            let threshold = self.threshold();
            let mut any = false;
            for (s, i) in scores.iter().zip(inverse) {
                any |= s * i > threshold;
            }
            if any {
                for (j, (s, i)) in scores.iter().zip(inverse).enumerate() {
                    let row = first + (step * STEP + j) as u32;
                    let score = s * i;
                    if score > self.threshold() && row != query {
                        let at = self.kept.partition_point(|k| k.0 >= score);
                        self.kept.insert(at, (score, row));
                        self.kept.truncate(self.wanted);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    fn of(rows: &[Option<Vec<f32>>], dim: usize) -> Embeddings {
        let mut e = Embeddings::with_capacity(dim, rows.len());
        rows.iter().for_each(|r| e.push(r.as_deref()).unwrap());
        e.finish();
        e
    }

    fn random(rows: usize, dim: usize, seed: u64) -> Vec<Option<Vec<f32>>> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..rows).map(|_| Some((0..dim).map(|_| rng.random_range(-1.0f32..1.0)).collect())).collect()
    }

    /// All cosines in float64, sorted.
    fn brute_force(rows: &[Option<Vec<f32>>], query: usize, n: usize) -> Vec<Neighbour> {
        let Some(q) = &rows[query] else { return Vec::new() };
        let mut all: Vec<Neighbour> = rows
            .iter()
            .enumerate()
            .filter(|(i, r)| *i != query && r.as_ref().is_some_and(|r| r.iter().any(|v| *v != 0.0)))
            .map(|(i, r)| {
                let r = r.as_ref().unwrap();
                (i as u32, dot(q, r) / (dot(q, q).sqrt() * dot(r, r).sqrt()))
            })
            .collect();
        if q.iter().all(|v| *v == 0.0) {
            return Vec::new();
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.truncate(n);
        all
    }

    #[test]
    fn agrees_with_brute_force() {
        for (rows, dim, n) in [(1, 3, 2), (2, 1, 5), (300, 7, 5), (2500, 16, 3)] {
            let data = random(rows, dim, rows as u64);
            let queries: Vec<u32> = (0..rows as u32).step_by(1 + rows / 150).collect();
            let found = of(&data, dim).nearest(&queries, n);
            for (q, found) in queries.iter().zip(found) {
                let wanted = brute_force(&data, *q as usize, n);
                assert_eq!(found.len(), wanted.len());
                for (f, w) in found.iter().zip(&wanted) {
                    assert!(f.0 == w.0 && (f.1 - w.1).abs() < 1e-12, "row {q}: {f:?} for {w:?}");
                }
            }
        }
    }

    #[test]
    fn equal_rows_come_in_row_order() {
        let mut data = random(2100, 5, 1);
        for row in (0..2100).step_by(7) {
            data[row] = Some(vec![0.3, -0.1, 0.7, 0.2, 0.9]);
        }
        let found = of(&data, 5).nearest(&[14], 4);
        assert_eq!(found[0].iter().map(|f| f.0).collect::<Vec<_>>(), [0, 7, 21, 28]);
        assert!(found[0].iter().all(|f| (f.1 - 1.0).abs() < 1e-12));
    }

    #[test]
    fn rows_without_direction_are_left_out() {
        let data = vec![Some(vec![1.0, 0.0]), Some(vec![0.0, 0.0]), None, Some(vec![-2.0, 0.0])];
        let found = of(&data, 2).nearest(&[0, 1, 2, 3], 3);
        assert_eq!(found, vec![vec![(3, -1.0)], vec![], vec![], vec![(0, -1.0)]]);
    }

    #[test]
    fn very_large_and_very_small_rows_have_a_direction_too() {
        let data = vec![Some(vec![3e38, 3e38]), Some(vec![1e-38, 1e-38]), Some(vec![1.0, 0.0])];
        let found = of(&data, 2).nearest(&[0], 2);
        assert_eq!(found[0][0].0, 1);
        assert!((found[0][0].1 - 1.0).abs() < 1e-12);
        assert!((found[0][1].1 - 0.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn another_length_or_nan_is_refused() {
        let mut e = Embeddings::with_capacity(2, 2);
        assert!(e.push(Some(&[1.0])).unwrap_err().message.contains("row 0 has 1 entries"));
        assert!(e.push(Some(&[1.0, f32::NAN])).is_err());
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let e = of(&random(700, 9, 3), 9);
        let queries: Vec<u32> = (0..700).collect();
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(one.install(|| e.nearest(&queries, 6)), three.install(|| e.nearest(&queries, 6)));
    }
}
