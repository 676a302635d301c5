//! Shortlists and ranks out of scores, in blocks of users so that memory is bounded.
//!
//! In: a [`Scorer`], users, what they have seen. Out: per user the best k items that were not
//! seen ([`top_k`]), or the rank of a given item among all that were not seen ([`ranks`]).
//! Order: score descending, then item index ascending. A score that is not a number is no
//! recommendation.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;

use super::product::{self, Sink, TileScores, UserBlock};
use super::{Factors, Scorer};
use crate::error::Result;
use crate::interactions::Histories;

/// One place of a shortlist.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Item index.
    pub item: u32,
    /// The model's score.
    pub score: f32,
}

/// Users per block: at most 64, and at most 16 MiB of scores for each thread.
fn block_users(n_items: usize) -> usize {
    ((1 << 22) / n_items.max(1)).clamp(1, product::USERS)
}

/// A place as one number, the better the greater: the score's bits in an order that is that of the scores, then the
/// item's index turned round. Scores are never NaN here, and -0 was made +0.
fn key(item: u32, score: f32) -> u64 {
    let bits = score.to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!item)
}

fn scored(key: u64) -> Scored {
    let ordered = (key >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    Scored { item: !(key as u32), score: f32::from_bits(bits) }
}

/// The best `k` places so far.
struct Best {
    k: usize,
    /// The worst on top.
    heap: BinaryHeap<Reverse<u64>>,
}

impl Best {
    fn new(k: usize, n_items: usize) -> Self {
        Best { k, heap: BinaryHeap::with_capacity(k.min(n_items)) }
    }

    /// The score that a later item must exceed to enter; NaN while any score may.
    fn bound(&self) -> f32 {
        match self.heap.peek() {
            Some(Reverse(worst)) if self.heap.len() == self.k => scored(*worst).score,
            _ => f32::NAN,
        }
    }

    fn offer(&mut self, item: u32, score: f32) {
        if score.is_nan() || self.k == 0 {
            return;
        }
        let key = key(item, score + 0.0); // -0 and +0 are the same score
        if self.heap.len() < self.k {
            self.heap.push(Reverse(key));
        } else if let Some(mut worst) = self.heap.peek_mut()
            && worst.0 < key
        {
            worst.0 = key;
        }
    }

    fn into_list(self) -> Vec<Scored> {
        self.heap.into_sorted_vec().into_iter().map(|key| scored(key.0)).collect()
    }
}

/// Scores that are compared with the bound in one step.
const STEP: usize = 32;

/// The best `k` of one user's scores `[items]` (NaN = left out), best first.
pub fn best_k(scores: &[f32], k: usize) -> Vec<Scored> {
    let mut best = Best::new(k, scores.len());
    let mut bound = best.bound();
    for (step, chunk) in scores.chunks(STEP).enumerate() {
        // Later items lose ties, so only a greater score can enter a full heap. Without a branch per score, so
        // that the compiler uses vectors.
        if !bound.is_nan() && !chunk.iter().fold(false, |any, &score| any | (score > bound)) {
            continue;
        }
        for (n, &score) in chunk.iter().enumerate() {
            best.offer((step * STEP + n) as u32, score);
        }
        bound = best.bound();
    }
    best.into_list()
}

/// Shortlists of a block of users out of the tiles of a product.
struct Shortlists<'a> {
    best: Vec<Best>,
    bounds: [f32; product::USERS],
    /// `[items]`: bit `u` is set where user `u` of the block has seen the item.
    seen: &'a [u64],
    /// A bit for each user of the block.
    users: u64,
}

impl Sink for Shortlists<'_> {
    fn bounds(&self) -> &[f32; product::USERS] {
        &self.bounds
    }

    fn take(&mut self, first: usize, n: usize, scores: &TileScores, passing: &[u64; product::ITEMS]) {
        for (i, scores) in scores[..n].iter().enumerate() {
            let mut left = passing[i] & self.users & !self.seen[first + i];
            while left != 0 {
                let user = left.trailing_zeros() as usize;
                left &= left - 1;
                // The bound may have risen within the tile; `offer` compares again.
                self.best[user].offer((first + i) as u32, scores[user]);
                self.bounds[user] = self.best[user].bound();
            }
        }
    }
}

/// The shortlists of a block whose scores are products. `marks [items]` is all zeros, before and after.
fn product_lists(
    factors: &Factors<'_>,
    users: &[u32],
    seen: &Histories,
    k: usize,
    marks: &mut [u64],
) -> Vec<Vec<Scored>> {
    if k == 0 || marks.is_empty() {
        return vec![Vec::new(); users.len()];
    }
    for (n, &user) in users.iter().enumerate() {
        seen.of(user as usize).iter().for_each(|&item| marks[item as usize] |= 1 << n);
    }
    let mut lists = Shortlists {
        best: users.iter().map(|_| Best::new(k, marks.len())).collect(),
        bounds: [f32::NAN; product::USERS],
        seen: marks,
        users: u64::MAX >> (64 - users.len()),
    };
    let block = UserBlock::new(&factors.users, users.len(), factors.dim);
    product::walk(&block, factors.items, &mut lists);
    let lists = lists.best.into_iter().map(Best::into_list).collect();
    for &user in users {
        seen.of(user as usize).iter().for_each(|&item| marks[item as usize] = 0);
    }
    lists
}

/// The best `k` items of each user of `users` (in that order) that `seen` does not hold for them,
/// best first; fewer where fewer are left. `on_block(n)` hears of each `n` users that are done.
///
/// # Errors
/// What `on_block` returned, which stops the work.
pub fn top_k(
    scorer: &dyn Scorer,
    users: &[u32],
    seen: &Histories,
    k: usize,
    on_block: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<Vec<Vec<Scored>>> {
    let n_items = scorer.n_items();
    // A block whose scores are products holds none of them; it is known by the first one, which costs little.
    let size = match users.first().is_some_and(|u| scorer.factors(&[*u], seen).is_some()) {
        true => product::USERS,
        false => block_users(n_items),
    };
    let blocks = users
        .par_chunks(size)
        .map_init(
            || vec![0u64; n_items],
            |marks, block| {
                let lists = match scorer.factors(block, seen) {
                    Some(factors) if factors.dim > 0 => product_lists(&factors, block, seen, k, marks),
                    _ if n_items == 0 => vec![Vec::new(); block.len()],
                    _ => {
                        let scores = masked_scores(scorer, block, seen, seen);
                        scores.chunks_exact(n_items).map(|row| best_k(row, k)).collect()
                    }
                };
                on_block(block.len())?;
                Ok(lists)
            },
        )
        .collect::<Result<Vec<Vec<Vec<Scored>>>>>()?;
    Ok(blocks.into_iter().flatten().collect())
}

/// The 1-based rank of each pair's item among the items that `seen` does not hold for the pair's
/// user; `None` where `seen` holds the item itself or its score is not a number.
pub fn ranks(scorer: &dyn Scorer, pairs: &[(u32, u32)], seen: &Histories, history: &Histories) -> Vec<Option<usize>> {
    let n_items = scorer.n_items();
    let blocks: Vec<Vec<Option<usize>>> = pairs
        .par_chunks(block_users(n_items))
        .map(|block| {
            let users: Vec<u32> = block.iter().map(|p| p.0).collect();
            let scores = masked_scores(scorer, &users, seen, history);
            block.iter().enumerate().map(|(n, p)| rank_of(&scores[n * n_items..][..n_items], p.1)).collect()
        })
        .collect();
    blocks.into_iter().flatten().collect()
}

/// The 1-based rank of `item` among scores `[items]` (NaN = left out).
pub fn rank_of(scores: &[f32], item: u32) -> Option<usize> {
    let own = *scores.get(item as usize)?;
    if own.is_nan() {
        return None;
    }
    let (before, after) = scores.split_at(item as usize);
    let better = before.iter().filter(|&&s| s >= own).count() + after.iter().filter(|&&s| s > own).count();
    Some(better + 1)
}

fn masked_scores(scorer: &dyn Scorer, users: &[u32], seen: &Histories, history: &Histories) -> Vec<f32> {
    let n_items = scorer.n_items();
    let mut scores = vec![0f32; users.len() * n_items];
    scorer.score(users, history, &mut scores);
    for (n, &user) in users.iter().enumerate() {
        for &item in seen.of(user as usize) {
            scores[n * n_items + item as usize] = f32::NAN;
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::super::NamedTensor;
    use super::*;
    use proptest::prelude::*;

    /// Scores from a table.
    struct Fixed(Vec<Vec<f32>>);
    impl Scorer for Fixed {
        fn n_users(&self) -> usize {
            self.0.len()
        }
        fn n_items(&self) -> usize {
            self.0.first().map_or(0, Vec::len)
        }
        fn score(&self, users: &[u32], _: &Histories, out: &mut [f32]) {
            let all: Vec<f32> = users.iter().flat_map(|&u| self.0[u as usize].clone()).collect();
            out.copy_from_slice(&all);
        }
        fn tensors(&self) -> Vec<NamedTensor> {
            Vec::new()
        }
    }

    fn items(list: &[Scored]) -> Vec<u32> {
        list.iter().map(|s| s.item).collect()
    }

    #[test]
    fn ties_go_by_item_and_seen_items_are_left_out() {
        let scorer = Fixed(vec![vec![1.0, 3.0, 3.0, f32::NAN, 2.0], vec![0.0, -0.0, 0.0, -1.0, 0.0]]);
        let seen = Histories::from_pairs(2, &[(0, 1), (1, 0)]);
        let lists = top_k(&scorer, &[0, 1], &seen, 3, &|_| Ok(())).unwrap();
        assert_eq!(items(&lists[0]), [2, 4, 0]); // item 3 has no score
        assert_eq!(items(&lists[1]), [1, 2, 4]);
        assert_eq!(lists[0][0].score, 3.0);
    }

    #[test]
    fn k_beyond_the_catalogue_gives_what_there_is() {
        let scorer = Fixed(vec![vec![1.0, 2.0, 3.0]]);
        let seen = Histories::from_pairs(1, &[(0, 2)]);
        assert_eq!(items(&top_k(&scorer, &[0], &seen, 99, &|_| Ok(())).unwrap()[0]), [1, 0]);
        assert!(top_k(&scorer, &[0], &seen, 0, &|_| Ok(())).unwrap()[0].is_empty());
        assert!(
            top_k(&Fixed(vec![vec![]]), &[0], &Histories::from_pairs(1, &[]), 5, &|_| Ok(())).unwrap()[0].is_empty()
        );
    }

    proptest! {
        #[test]
        fn equals_a_full_sort(
            // few distinct values, so that ties are common
            scores in prop::collection::vec(prop::sample::select(vec![-1.0f32, 0.0, 0.5, 2.0, f32::NAN]), 0..40),
            k in 0usize..45,
        ) {
            let mut all: Vec<Scored> = scores.iter().enumerate().filter(|(_, s)| !s.is_nan())
                .map(|(i, &score)| Scored { item: i as u32, score }).collect();
            all.sort_by(|a, b| b.score.partial_cmp(&a.score).unwrap().then(a.item.cmp(&b.item)));
            let best = best_k(&scores, k);
            prop_assert_eq!(&best[..], &all[..k.min(all.len())]);
            for (place, scored) in all.iter().enumerate() {
                prop_assert_eq!(rank_of(&scores, scored.item), Some(place + 1));
            }
        }
    }

    /// A scorer whose scores are products of small whole numbers, so that ties are common and sums exact.
    struct Products {
        dim: usize,
        users: Vec<f32>,
        items: Vec<f32>,
    }
    impl Scorer for Products {
        fn n_users(&self) -> usize {
            self.users.len() / self.dim
        }
        fn n_items(&self) -> usize {
            self.items.len() / self.dim
        }
        fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
            let factors = self.factors(users, history).unwrap();
            product::scores(&factors.users, factors.items, self.dim, out);
        }
        fn factors(&self, users: &[u32], _: &Histories) -> Option<Factors<'_>> {
            let rows = users.iter().flat_map(|&u| self.users[u as usize * self.dim..][..self.dim].to_vec());
            Some(Factors { dim: self.dim, users: rows.collect(), items: &self.items })
        }
        fn tensors(&self) -> Vec<NamedTensor> {
            Vec::new()
        }
    }

    proptest! {
        #[test]
        fn lists_of_products_equal_those_of_all_scores(
            dim in 1usize..4,
            users in prop::collection::vec(-2i8..3, 0..300),
            items in prop::collection::vec(-2i8..3, 0..200),
            k in 0usize..30,
            pairs in prop::collection::vec((0usize..1000, 0usize..1000), 0..200),
            odd in prop::sample::select(vec![0.5f32, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]),
        ) {
            let floats = |x: &[i8]| x[..x.len() / dim * dim].iter().map(|&x| f32::from(x)).collect::<Vec<f32>>();
            let mut scorer = Products { dim, users: floats(&users), items: floats(&items) };
            if let Some(last) = scorer.items.last_mut() {
                *last = odd;
            }
            let (n_users, n_items) = (scorer.n_users(), scorer.n_items());
            let pairs: Vec<(u32, u32)> = pairs.iter().filter(|_| n_users * n_items > 0)
                .map(|&(u, i)| ((u % n_users) as u32, (i % n_items) as u32)).collect();
            let seen = Histories::from_pairs(n_users, &pairs);
            let everyone: Vec<u32> = (0..n_users as u32).collect();
            let lists = top_k(&scorer, &everyone, &seen, k, &|_| Ok(())).unwrap();
            prop_assert_eq!(lists.len(), n_users);
            for (user, list) in lists.iter().enumerate() {
                let want = best_k(&masked_scores(&scorer, &[user as u32], &seen, &seen), k);
                prop_assert_eq!(list, &want, "user {}", user);
            }
        }
    }

    #[test]
    fn ranks_are_places_in_the_full_list() {
        let scorer = Fixed(vec![vec![1.0, 3.0, 3.0, 2.0]]);
        let seen = Histories::from_pairs(1, &[(0, 1)]);
        assert_eq!(ranks(&scorer, &[(0, 2), (0, 3), (0, 0), (0, 1)], &seen, &seen), [Some(1), Some(2), Some(3), None]);
    }

    #[test]
    fn an_error_stops_the_work() {
        let scorer = Fixed(vec![vec![1.0]; 200]);
        let users: Vec<u32> = (0..200).collect();
        let stop = |_| Err(crate::error::Error::internal("stop"));
        assert_eq!(top_k(&scorer, &users, &Histories::from_pairs(200, &[]), 1, &stop).unwrap_err().message, "stop");
    }

    #[test]
    fn blocks_do_not_change_the_result() {
        let n = 300; // several blocks of 64
        let scorer = Fixed((0..n).map(|u| (0..7).map(|i| ((u * 31 + i * 17) % 11) as f32).collect()).collect());
        let seen = Histories::from_pairs(n, &[]);
        let users: Vec<u32> = (0..n as u32).rev().collect();
        let done = std::sync::atomic::AtomicUsize::new(0);
        let lists = top_k(&scorer, &users, &seen, 3, &|n| {
            done.fetch_add(n, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        })
        .unwrap();
        assert_eq!(done.into_inner(), n);
        for (user, list) in users.iter().zip(&lists) {
            assert_eq!(list, &best_k(&scorer.0[*user as usize], 3), "user {user}");
        }
    }
}
