//! Training sequences out of histories.
//!
//! In: train histories, the longest sequence, a generator. Out: [`Window`]s that have every interaction as a target
//! once, and [`Batch`]es of them, padded on the right.
//!
//! A history of n items has n - 1 targets in a causal model (the first item has nothing before it) and n in a
//! Cloze model. One that is longer than the maximum is cut at places that are drawn anew in each epoch.

use rand::Rng;
use rand::seq::SliceRandom;

use crate::interactions::Histories;

/// Items `from..to` of a user's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// User index.
    pub user: u32,
    /// First item.
    pub from: u32,
    /// One past the last item.
    pub to: u32,
}

/// Sequences of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Positions of the longest sequence.
    pub length: usize,
    /// Real positions of each sequence, `[batch]`.
    pub lengths: Vec<u32>,
    /// Item of each position, `[batch * length]`; padding holds item 0.
    pub inputs: Vec<u32>,
    /// User of each sequence, `[batch]`.
    pub users: Vec<u32>,
    /// Flat places in `inputs` whose states predict, ascending.
    pub places: Vec<u32>,
    /// The item that each of them should predict.
    pub targets: Vec<u32>,
}

impl Batch {
    /// Sequences `[batch]`, padded.
    pub fn padded(sequences: &[Vec<u32>]) -> Self {
        let length = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let mut batch = Batch { length, inputs: vec![0; length * sequences.len()], ..Batch::default() };
        for (n, sequence) in sequences.iter().enumerate() {
            batch.inputs[n * length..][..sequence.len()].copy_from_slice(sequence);
            batch.lengths.push(sequence.len() as u32);
        }
        batch
    }

    /// The sequences without their padding.
    pub fn sequences(&self) -> impl Iterator<Item = &[u32]> {
        let real = self.lengths.iter().enumerate();
        real.map(|(n, &len)| &self.inputs[n * self.length..][..len as usize])
    }

    /// Flat place of each sequence's last position.
    pub fn last_places(&self) -> Vec<u32> {
        let real = self.lengths.iter().enumerate();
        real.map(|(n, &len)| (n * self.length) as u32 + len.saturating_sub(1)).collect()
    }

    /// The user of a flat place.
    pub fn user_of(&self, place: u32) -> u32 {
        self.users[place as usize / self.length]
    }
}

/// Windows that cover `0..n` in pieces of `size`, the first one cut short at random where there are several.
fn cut(n: usize, size: usize, rng: &mut impl Rng) -> Vec<(usize, usize)> {
    let first = if n <= size { n } else { rng.random_range(1..=size) };
    let rest = (first..n).step_by(size).map(|from| (from, (from + size).min(n)));
    std::iter::once((0, first)).filter(|w| w.1 > 0).chain(rest).collect()
}

/// Windows of an epoch of a causal model: the inputs are all items but the last one of a window, the targets all
/// but the first. At most `max_len` inputs.
pub fn causal_windows(train: &Histories, max_len: usize, rng: &mut impl Rng) -> Vec<Window> {
    let mut windows = Vec::new();
    for user in 0..train.n_users() {
        for (from, to) in cut(train.of(user).len().saturating_sub(1), max_len, rng) {
            windows.push(Window { user: user as u32, from: from as u32, to: to as u32 + 1 });
        }
    }
    windows
}

/// Windows of an epoch of a Cloze model, at most `max_len` items each.
pub fn cloze_windows(train: &Histories, max_len: usize, rng: &mut impl Rng) -> Vec<Window> {
    let mut windows = Vec::new();
    for user in 0..train.n_users() {
        for (from, to) in cut(train.of(user).len(), max_len, rng) {
            windows.push(Window { user: user as u32, from: from as u32, to: to as u32 });
        }
    }
    windows
}

/// Batches that are sorted by length: windows are shuffled, sorted within runs of this many batches, and the
/// batches shuffled again, so that little is padding and every batch is still a random one.
const SORTED: usize = 16;

/// Windows in batches of at most `size`, in random order.
pub fn arrange(mut windows: Vec<Window>, size: usize, rng: &mut impl Rng) -> Vec<Vec<Window>> {
    windows.shuffle(rng);
    for run in windows.chunks_mut(size.saturating_mul(SORTED)) {
        run.sort_by_key(|w| w.to - w.from);
    }
    let mut batches: Vec<Vec<Window>> = windows.chunks(size).map(<[Window]>::to_vec).collect();
    batches.shuffle(rng);
    batches
}

/// Each position predicts the next item.
pub fn causal_batch(train: &Histories, windows: &[Window]) -> Batch {
    let items = |w: &Window| &train.of(w.user as usize)[w.from as usize..w.to as usize];
    let inputs: Vec<Vec<u32>> = windows.iter().map(|w| items(w)[..(w.to - w.from) as usize - 1].to_vec()).collect();
    let mut batch = Batch::padded(&inputs);
    for (n, window) in windows.iter().enumerate() {
        batch.users.push(window.user);
        for (t, &target) in items(window)[1..].iter().enumerate() {
            batch.places.push((n * batch.length + t) as u32);
            batch.targets.push(target);
        }
    }
    batch
}

/// Some positions are masked (by item `mask`) and predict their own item: each with probability `share`, at least
/// one; of a share `last_only` of the sequences the last one and no other.
pub fn cloze_batch(
    train: &Histories,
    windows: &[Window],
    mask: u32,
    (share, last_only): (f64, f64),
    rng: &mut impl Rng,
) -> Batch {
    let items = |w: &Window| &train.of(w.user as usize)[w.from as usize..w.to as usize];
    let sequences: Vec<Vec<u32>> = windows.iter().map(|w| items(w).to_vec()).collect();
    let mut batch = Batch::padded(&sequences);
    let mut masked = Vec::new();
    for (n, window) in windows.iter().enumerate() {
        batch.users.push(window.user);
        let real = items(window);
        masked.clear();
        match rng.random_bool(last_only) {
            true => masked.push(real.len() - 1),
            false => masked.extend((0..real.len()).filter(|_| rng.random_bool(share))),
        }
        if masked.is_empty() {
            masked.push(rng.random_range(0..real.len()));
        }
        for &t in &masked {
            let place = n * batch.length + t;
            batch.inputs[place] = mask;
            batch.places.push(place as u32);
            batch.targets.push(real[t]);
        }
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn histories() -> impl Strategy<Value = Histories> {
        prop::collection::vec((0u32..4, 0u32..50), 0..80).prop_map(|pairs| Histories::from_pairs(4, &pairs))
    }

    proptest! {
        #[test]
        fn every_interaction_but_the_first_is_a_causal_target_once(
            train in histories(), max_len in 1usize..9, size in 1usize..5, seed in any::<u64>(),
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let windows = causal_windows(&train, max_len, &mut rng);
            let mut covered: Vec<Vec<u32>> = (0..4).map(|u| vec![0; train.of(u).len()]).collect();
            for batch in arrange(windows, size, &mut rng) {
                prop_assert!(batch.len() <= size);
                let made = causal_batch(&train, &batch);
                prop_assert_eq!(made.places.len(), made.targets.len());
                prop_assert!(made.length <= max_len);
                let mut at = made.places.iter().zip(&made.targets);
                for (n, window) in batch.iter().enumerate() {
                    let history = train.of(window.user as usize);
                    for t in window.from + 1..window.to {
                        covered[window.user as usize][t as usize] += 1;
                        let (&place, &target) = at.next().unwrap();
                        // The state of the item before it, which is no padding.
                        prop_assert_eq!(place as usize, n * made.length + (t - 1 - window.from) as usize);
                        prop_assert_eq!(made.inputs[place as usize], history[t as usize - 1]);
                        prop_assert_eq!(target, history[t as usize]);
                        prop_assert_eq!(made.user_of(place), window.user);
                        prop_assert!(place as usize % made.length < made.lengths[n] as usize);
                    }
                }
                prop_assert!(at.next().is_none());
            }
            for counts in covered {
                for (t, n) in counts.into_iter().enumerate() {
                    prop_assert_eq!(n, u32::from(t > 0), "item {}", t);
                }
            }
        }

        #[test]
        fn a_cloze_batch_masks_real_positions_and_keeps_the_others(
            train in histories(), max_len in 1usize..9, share in 0.0f64..=1.0, last in 0.0f64..=1.0, seed in any::<u64>(),
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let windows = cloze_windows(&train, max_len, &mut rng);
            let total: u32 = windows.iter().map(|w| w.to - w.from).sum();
            prop_assert_eq!(total as usize, train.n_interactions());
            let batch = cloze_batch(&train, &windows, 50, (share, last), &mut rng);
            let mut targets = batch.places.iter().zip(&batch.targets).peekable();
            for (n, window) in windows.iter().enumerate() {
                let real = &train.of(window.user as usize)[window.from as usize..window.to as usize];
                prop_assert_eq!(batch.lengths[n] as usize, real.len());
                let mut masked = 0;
                for (t, &item) in real.iter().enumerate() {
                    let place = (n * batch.length + t) as u32;
                    if targets.peek().is_some_and(|p| *p.0 == place) {
                        prop_assert_eq!(*targets.next().unwrap().1, item);
                        prop_assert_eq!(batch.inputs[place as usize], 50);
                        masked += 1;
                    } else {
                        prop_assert_eq!(batch.inputs[place as usize], item);
                    }
                }
                prop_assert!(masked >= 1);
            }
            prop_assert!(targets.next().is_none());
        }
    }

    #[test]
    fn masking_the_last_position_only_is_a_choice() {
        let train = Histories::from_pairs(1, &[(0, 3), (0, 4), (0, 5)]);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let windows = cloze_windows(&train, 5, &mut rng);
        let batch = cloze_batch(&train, &windows, 9, (0.9, 1.0), &mut rng);
        assert_eq!((batch.inputs, batch.places, batch.targets), (vec![3, 4, 9], vec![2], vec![5]));
    }

    #[test]
    fn cuts_move_from_epoch_to_epoch_and_only_they() {
        let train = Histories::from_pairs(1, &(0..100).map(|i| (0, i)).collect::<Vec<_>>());
        let windows = |seed| causal_windows(&train, 10, &mut ChaCha8Rng::seed_from_u64(seed));
        assert_eq!(windows(1), windows(1));
        assert!((2..20).any(|seed| windows(seed) != windows(1)));
        // A history that fits is never cut.
        assert_eq!(causal_windows(&train, 99, &mut ChaCha8Rng::seed_from_u64(1)).len(), 1);
    }
}
