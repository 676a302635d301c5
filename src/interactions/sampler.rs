//! Negative items: what a user has not seen in train, drawn uniformly.
//!
//! In: train [`Histories`]. Out: item indices. "Seen" means seen in TRAIN: held-out items
//! must be able to occur as negatives, or they would leak by their absence.
//!
//! The draw is exact and takes one random number: the r-th unseen item is found by binary
//! search among the user's sorted seen items, so a user who has seen nearly everything costs
//! no more than any other, and one who has seen everything has no negative at all.

use rand::Rng;

use super::Histories;

/// Draws items that a user has not seen in train.
#[derive(Clone, Debug)]
pub struct NegativeSampler {
    n_items: u32,
    offsets: Vec<usize>,
    /// Per user: distinct seen items, ascending.
    seen: Vec<u32>,
}

impl NegativeSampler {
    /// From the train histories; items are `0..n_items`.
    ///
    /// # Panics
    /// When a history names an item outside `0..n_items` (our bug).
    pub fn new(train: &Histories, n_items: usize) -> Self {
        let mut offsets = Vec::with_capacity(train.n_users() + 1);
        let mut seen = Vec::with_capacity(train.n_interactions());
        offsets.push(0);
        let mut mine = Vec::new();
        for user in 0..train.n_users() {
            mine.clear();
            mine.extend_from_slice(train.of(user));
            mine.sort_unstable();
            mine.dedup();
            assert!(
                mine.last().is_none_or(|&i| (i as usize) < n_items),
                "user {user} has an item outside 0..{n_items}"
            );
            seen.extend_from_slice(&mine);
            offsets.push(seen.len());
        }
        NegativeSampler { n_items: n_items as u32, offsets, seen }
    }

    /// Number of users.
    pub fn n_users(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The distinct items that `user` has seen in train, ascending.
    pub fn seen(&self, user: usize) -> &[u32] {
        &self.seen[self.offsets[user]..self.offsets[user + 1]]
    }

    /// The distinct items of all users, user after user.
    pub fn all_seen(&self) -> &[u32] {
        &self.seen
    }

    /// How many items `user` has not seen.
    pub fn unseen(&self, user: usize) -> usize {
        self.n_items as usize - self.seen(user).len()
    }

    /// One item that `user` has not seen, each with the same probability; `None` for a user who
    /// has seen everything.
    pub fn sample(&self, user: usize, rng: &mut impl Rng) -> Option<u32> {
        let seen = self.seen(user);
        let unseen = self.n_items - seen.len() as u32;
        if unseen == 0 {
            return None;
        }
        let r = rng.random_range(0..unseen);
        // `seen[j] - j` unseen items lie below `seen[j]`; it ascends with j. The r-th unseen item is
        // preceded by exactly those seen items that have at most r unseen ones below them.
        let (mut low, mut high) = (0, seen.len());
        while low < high {
            let middle = (low + high) / 2;
            match seen[middle] - middle as u32 <= r {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Some(r + low as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    proptest! {
        #[test]
        fn no_train_item_is_ever_a_negative(
            pairs in prop::collection::vec((0u32..5, 0u32..40), 0..120),
            seed in any::<u64>(),
        ) {
            let train = Histories::from_pairs(5, &pairs);
            let sampler = NegativeSampler::new(&train, 40);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            for user in 0..5 {
                for _ in 0..50 {
                    match sampler.sample(user, &mut rng) {
                        Some(item) => {
                            prop_assert!(item < 40);
                            prop_assert!(!train.of(user).contains(&item), "user {user} has seen {item}");
                        }
                        None => prop_assert_eq!(sampler.unseen(user), 0),
                    }
                }
            }
        }

        #[test]
        fn every_unseen_item_occurs(seen in prop::collection::btree_set(0u32..12, 0..12), seed in any::<u64>()) {
            let pairs: Vec<(u32, u32)> = seen.iter().map(|&i| (0, i)).collect();
            let sampler = NegativeSampler::new(&Histories::from_pairs(1, &pairs), 12);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let drawn: std::collections::BTreeSet<u32> =
                (0..600).filter_map(|_| sampler.sample(0, &mut rng)).collect();
            let unseen: std::collections::BTreeSet<u32> = (0..12).filter(|i| !seen.contains(i)).collect();
            prop_assert_eq!(drawn, unseen);
        }
    }

    #[test]
    fn held_out_items_do_occur_as_negatives() {
        // Items 3 (validation) and 4 (test) of the user are unknown to the sampler.
        let sampler = NegativeSampler::new(&Histories::from_pairs(1, &[(0, 0), (0, 1), (0, 2)]), 6);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut count = [0usize; 6];
        for _ in 0..3000 {
            count[sampler.sample(0, &mut rng).unwrap() as usize] += 1;
        }
        assert_eq!(count[..3], [0, 0, 0]);
        // 1000 expected each, standard deviation 26.
        assert!(count[3..].iter().all(|&n| (850..1150).contains(&n)), "{count:?}");
    }

    #[test]
    fn a_user_who_has_seen_everything_has_no_negative() {
        let sampler = NegativeSampler::new(&Histories::from_pairs(2, &[(0, 0), (0, 1), (0, 0)]), 2);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(sampler.sample(0, &mut rng), None);
        assert!(sampler.sample(1, &mut rng).is_some());
        assert_eq!((sampler.unseen(0), sampler.unseen(1)), (0, 2));
    }

    #[test]
    fn without_items_nobody_has_a_negative() {
        let sampler = NegativeSampler::new(&Histories::from_pairs(1, &[]), 0);
        assert_eq!(sampler.sample(0, &mut ChaCha8Rng::seed_from_u64(1)), None);
    }
}
