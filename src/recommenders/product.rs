//! Products of a block of users' vectors with all items' vectors, tile by tile, for scores and for shortlists.
//!
//! In: vectors of at most 64 users and the item table, both row-major. Out: scores `[users, items]` ([`scores`]), or
//! for each tile of six items what passes each user's bound ([`walk`]), so that a shortlist needs no memory for the
//! scores that it does not keep.
//!
//! How: users lie across the lanes of vectors, items are read where they are, row by row, and the sums stay in
//! registers. A sum is taken in the order of the dimensions whatever the tile, so a score does not depend on the
//! block that it was made in; machines with and without fused multiply-adds differ in rounding.

/// Most users of a block: bits of a mask.
pub const USERS: usize = 64;
/// Items of a tile.
pub const ITEMS: usize = 6;
/// Users are padded to a multiple of this.
const LANES: usize = 16;

/// Scores of a tile by item, then user.
pub type TileScores = [[f32; USERS]; ITEMS];

/// Vectors of a block of users, dimension by dimension.
pub struct UserBlock {
    users: usize,
    dim: usize,
    /// `users` rounded up to lanes.
    padded: usize,
    /// `[dim, padded]`
    values: Vec<f32>,
}

impl UserBlock {
    /// From rows `[users, dim]`.
    ///
    /// # Panics
    /// When there are more than [`USERS`] or the length does not fit (our bug).
    pub fn new(rows: &[f32], users: usize, dim: usize) -> Self {
        assert!(users <= USERS && rows.len() == users * dim, "a block of users does not have its shape");
        let padded = users.next_multiple_of(LANES);
        let mut values = vec![0f32; dim * padded];
        for (user, row) in rows.chunks_exact(dim.max(1)).enumerate() {
            for (d, &x) in row.iter().enumerate() {
                values[d * padded + user] = x;
            }
        }
        UserBlock { users, dim, padded, values }
    }
}

/// What is done with the tiles of [`walk`].
pub trait Sink {
    /// A score passes unless it is at most its user's bound: a bound that is not a number lets everything pass.
    fn bounds(&self) -> &[f32; USERS];

    /// Items `first..first + n` of all users of the block; bit `u` of `passing[i]` is set where the score of item
    /// `first + i` passes. Bits beyond the block's users mean nothing.
    fn take(&mut self, first: usize, n: usize, scores: &TileScores, passing: &[u64; ITEMS]);
}

/// Goes over all items `[items, dim]`, in order.
pub fn walk(block: &UserBlock, items: &[f32], sink: &mut impl Sink) {
    let dim = block.dim;
    if dim == 0 || block.users == 0 {
        return;
    }
    let tile = tile_function();
    let n_items = items.len() / dim;
    let mut scores: TileScores = [[0.0; USERS]; ITEMS];
    for first in (0..n_items).step_by(ITEMS) {
        let n = ITEMS.min(n_items - first);
        // The last tile repeats its last item.
        let rows: [&[f32]; ITEMS] = std::array::from_fn(|i| &items[(first + i.min(n - 1)) * dim..][..dim]);
        let passing = tile(block, &rows, sink.bounds(), &mut scores);
        sink.take(first, n, &scores, &passing);
    }
}

/// Scores `out [users, items]` of a block of any size, by the calling thread.
///
/// # Panics
/// When a length does not fit the shapes (our bug).
pub fn scores(users: &[f32], items: &[f32], dim: usize, out: &mut [f32]) {
    if dim == 0 || users.is_empty() || items.is_empty() {
        out.fill(0.0);
        return;
    }
    let n_items = items.len() / dim;
    assert_eq!(out.len(), users.len() / dim * n_items, "scores do not have the shape [users, items]");
    for (users, out) in users.chunks(USERS * dim).zip(out.chunks_mut(USERS * n_items)) {
        let block = UserBlock::new(users, users.len() / dim, dim);
        let mut rows =
            Rows { users: block.users, n_items, kept: Vec::with_capacity(ROWS), out, open: [f32::NAN; USERS] };
        walk(&block, items, &mut rows);
        rows.flush(n_items);
    }
}

/// Items that are gathered before they are written, so that a user's scores are written in whole cache lines.
const ROWS: usize = 8 * ITEMS;

/// Writes tiles as rows of users.
struct Rows<'a> {
    users: usize,
    n_items: usize,
    /// Scores of the latest items, by item, then user.
    kept: Vec<[f32; USERS]>,
    out: &'a mut [f32],
    open: [f32; USERS],
}

impl Rows<'_> {
    /// Writes what is kept, the scores of the items before `end`.
    fn flush(&mut self, end: usize) {
        let first = end - self.kept.len();
        for user in 0..self.users {
            let out = &mut self.out[user * self.n_items + first..][..self.kept.len()];
            out.iter_mut().zip(&self.kept).for_each(|(o, item)| *o = item[user]);
        }
        self.kept.clear();
    }
}

impl Sink for Rows<'_> {
    fn bounds(&self) -> &[f32; USERS] {
        &self.open
    }

    fn take(&mut self, first: usize, n: usize, scores: &TileScores, _: &[u64; ITEMS]) {
        self.kept.extend_from_slice(&scores[..n]);
        if self.kept.len() >= ROWS {
            self.flush(first + n);
        }
    }
}

type Tile = fn(&UserBlock, &[&[f32]; ITEMS], &[f32; USERS], &mut TileScores) -> [u64; ITEMS];

#[cfg(target_arch = "x86_64")]
fn tile_function() -> Tile {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512F was found on this machine.
        |block, rows, bounds, scores| unsafe { x86::tile_avx512(block, rows, bounds, scores) }
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA were found on this machine.
        |block, rows, bounds, scores| unsafe { x86::tile_avx2(block, rows, bounds, scores) }
    } else {
        tile_portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn tile_function() -> Tile {
    tile_portable
}

/// For any machine.
fn tile_portable(
    block: &UserBlock,
    rows: &[&[f32]; ITEMS],
    bounds: &[f32; USERS],
    scores: &mut TileScores,
) -> [u64; ITEMS] {
    for (row, scores) in rows.iter().zip(scores.iter_mut()) {
        for (lanes, scores) in scores[..block.padded].chunks_exact_mut(LANES).enumerate() {
            let mut sums = [0f32; LANES];
            for (x, users) in row.iter().zip(block.values.chunks_exact(block.padded)) {
                let users = &users[lanes * LANES..][..LANES];
                sums.iter_mut().zip(users).for_each(|(s, u)| *s += u * x);
            }
            scores.copy_from_slice(&sums);
        }
    }
    std::array::from_fn(|i| {
        let passes = |u: usize| u64::from(scores[i][u] > bounds[u] || scores[i][u].is_nan() || bounds[u].is_nan());
        (0..block.users).fold(0, |mask, u| mask | passes(u) << u)
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ITEMS, LANES, TileScores, USERS, UserBlock};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub fn tile_avx512(
        block: &UserBlock,
        rows: &[&[f32]; ITEMS],
        bounds: &[f32; USERS],
        scores: &mut TileScores,
    ) -> [u64; ITEMS] {
        match block.padded / LANES {
            1 => vectors_avx512::<1>(block, rows, bounds, scores),
            2 => vectors_avx512::<2>(block, rows, bounds, scores),
            3 => vectors_avx512::<3>(block, rows, bounds, scores),
            _ => vectors_avx512::<4>(block, rows, bounds, scores),
        }
    }

    /// `V` vectors of 16 users.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn vectors_avx512<const V: usize>(
        block: &UserBlock,
        rows: &[&[f32]; ITEMS],
        bounds: &[f32; USERS],
        scores: &mut TileScores,
    ) -> [u64; ITEMS] {
        let dim = block.dim;
        assert!(block.padded == V * LANES && block.values.len() == dim * V * LANES);
        assert!(rows.iter().all(|row| row.len() == dim));
        let mut sums = [[_mm512_setzero_ps(); V]; ITEMS];
        for d in 0..dim {
            // SAFETY: d < dim, and the lengths were checked above.
            let users: [__m512; V] =
                std::array::from_fn(|v| unsafe { _mm512_loadu_ps(block.values.as_ptr().add((d * V + v) * LANES)) });
            for (row, sums) in rows.iter().zip(&mut sums) {
                // SAFETY: d < dim, the length of each row.
                let x = _mm512_set1_ps(unsafe { *row.get_unchecked(d) });
                for (sum, user) in sums.iter_mut().zip(users) {
                    *sum = _mm512_fmadd_ps(user, x, *sum);
                }
            }
        }
        let mut passing = [0u64; ITEMS];
        for ((sums, scores), passing) in sums.iter().zip(scores).zip(&mut passing) {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: V is at most 4, and both arrays hold 64 values.
                let bound = unsafe {
                    _mm512_storeu_ps(scores.as_mut_ptr().add(v * LANES), *sum);
                    _mm512_loadu_ps(bounds.as_ptr().add(v * LANES))
                };
                *passing |= u64::from(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(*sum, bound)) << (v * LANES);
            }
        }
        passing
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn tile_avx2(
        block: &UserBlock,
        rows: &[&[f32]; ITEMS],
        bounds: &[f32; USERS],
        scores: &mut TileScores,
    ) -> [u64; ITEMS] {
        /// Vectors of eight users that make one padding unit.
        const V: usize = LANES / 8;
        let (dim, padded) = (block.dim, block.padded);
        assert!(padded <= USERS && block.values.len() == dim * padded);
        assert!(rows.iter().all(|row| row.len() == dim));
        let mut passing = [0u64; ITEMS];
        for from in (0..padded).step_by(LANES) {
            let mut sums = [[_mm256_setzero_ps(); V]; ITEMS];
            for d in 0..dim {
                // SAFETY: d < dim and from + 16 <= padded, and the lengths were checked above.
                let users: [__m256; V] = std::array::from_fn(|v| unsafe {
                    _mm256_loadu_ps(block.values.as_ptr().add(d * padded + from + v * 8))
                });
                for (row, sums) in rows.iter().zip(&mut sums) {
                    // SAFETY: d < dim, the length of each row.
                    let x = _mm256_set1_ps(unsafe { *row.get_unchecked(d) });
                    for (sum, user) in sums.iter_mut().zip(users) {
                        *sum = _mm256_fmadd_ps(user, x, *sum);
                    }
                }
            }
            for ((sums, scores), passing) in sums.iter().zip(scores.iter_mut()).zip(&mut passing) {
                for (v, sum) in sums.iter().enumerate() {
                    let at = from + v * 8;
                    // SAFETY: at + 8 <= padded <= 64, the length of both arrays.
                    let bound = unsafe {
                        _mm256_storeu_ps(scores.as_mut_ptr().add(at), *sum);
                        _mm256_loadu_ps(bounds.as_ptr().add(at))
                    };
                    let mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(*sum, bound));
                    *passing |= (mask as u64) << at;
                }
            }
        }
        passing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recommenders::optim::normal;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    proptest! {
        #[test]
        fn scores_are_products_whatever_the_block(
            users in 0usize..140, items in 0usize..70, dim in 0usize..20, seed in 0u64..9,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (x, y) = (normal(users * dim, 1.0, &mut rng), normal(items * dim, 1.0, &mut rng));
            let mut out = vec![f32::NAN; users * items];
            scores(&x, &y, dim, &mut out);
            for user in 0..users {
                let mut alone = vec![f32::NAN; items];
                scores(&x[user * dim..][..dim], &y, dim, &mut alone);
                prop_assert_eq!(&alone[..], &out[user * items..][..items]);
                for item in 0..items {
                    let want: f32 = (0..dim).map(|d| x[user * dim + d] * y[item * dim + d]).sum();
                    prop_assert!((alone[item] - want).abs() < 1e-5, "{} {}", alone[item], want);
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for users in [1, 16, 17, 40, 64] {
            let block = UserBlock::new(&normal(users * 9, 1.0, &mut rng), users, 9);
            let rows = normal(ITEMS * 9, 1.0, &mut rng);
            let rows: [&[f32]; ITEMS] = std::array::from_fn(|i| &rows[i * 9..][..9]);
            let bounds: [f32; USERS] = std::array::from_fn(|u| [0.0, f32::NAN, f32::INFINITY, -0.5][u % 4]);
            let run = |tile: Tile| {
                let mut scores = [[0.0; USERS]; ITEMS];
                let passing = tile(&block, &rows, &bounds, &mut scores);
                (passing.map(|p| p & (u64::MAX >> (64 - users))), scores)
            };
            let (want, scores) = run(tile_portable);
            let mut tiles = vec![tile_function()];
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: AVX2 and FMA were found on this machine.
                tiles.push(|b, r, l, s| unsafe { x86::tile_avx2(b, r, l, s) });
            }
            for tile in tiles {
                let (got, near) = run(tile);
                assert_eq!(got, want, "{users} users");
                assert!(near.iter().flatten().zip(scores.iter().flatten()).all(|(a, b)| (a - b).abs() < 1e-5));
            }
        }
    }
}
