//! Shortlists and ranks out of scores, in blocks of users so that memory is bounded.
//!
//! In: a [`Scorer`], users, what they have seen. Out: per user the best k items that were not
//! seen ([`top_k`]), or the rank of a given item among all that were not seen ([`ranks`]).
//! Order: score descending, then item index ascending. A score that is not a number is no
//! recommendation.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use rayon::prelude::*;

use super::Scorer;
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
    ((1 << 22) / n_items.max(1)).clamp(1, 64)
}

/// Better first: score descending, item ascending. Scores are never NaN here.
fn better(a: &Scored, b: &Scored) -> Ordering {
    b.score.total_cmp(&a.score).then(a.item.cmp(&b.item))
}

#[derive(PartialEq)]
struct ByPlace(Scored);
impl Eq for ByPlace {}
impl PartialOrd for ByPlace {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ByPlace {
    /// The worst is the greatest, so that a max-heap has it on top.
    fn cmp(&self, other: &Self) -> Ordering {
        better(&self.0, &other.0)
    }
}

/// The best `k` of one user's scores `[items]` (NaN = left out), best first.
pub fn best_k(scores: &[f32], k: usize) -> Vec<Scored> {
    let mut heap: BinaryHeap<ByPlace> = BinaryHeap::with_capacity(k.min(scores.len()) + 1);
    if k == 0 {
        return Vec::new();
    }
    let mut worst = f32::NEG_INFINITY;
    for (item, &score) in scores.iter().enumerate() {
        // -0 and +0 are the same score.
        let place = ByPlace(Scored { item: item as u32, score: score + 0.0 });
        if heap.len() < k {
            if !score.is_nan() {
                heap.push(place);
            }
        } else if score > worst {
            // Later items lose ties, so only a greater score can enter a full heap.
            heap.pop();
            heap.push(place);
        } else {
            continue;
        }
        worst = heap.peek().map_or(f32::NEG_INFINITY, |p| p.0.score);
    }
    heap.into_sorted_vec().into_iter().map(|p| p.0).collect()
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
    let blocks = users
        .par_chunks(block_users(n_items))
        .map(|block| {
            let scores = masked_scores(scorer, block, seen, seen);
            let lists = match n_items {
                0 => vec![Vec::new(); block.len()],
                _ => scores.chunks_exact(n_items).map(|row| best_k(row, k)).collect(),
            };
            on_block(block.len())?;
            Ok(lists)
        })
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
