//! Changed copies of a sequence, for the contrastive loss (CL4SRec, arXiv 2010.14395, section III-C).
//!
//! In: a sequence of items and a share. Out: another sequence. None of them is empty unless the sequence is.

use rand::Rng;
use rand::seq::SliceRandom;
use rand::seq::index;

use super::config::Augmentation;

/// How much each augmentation touches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    /// What [`crop`] keeps.
    pub crop: f64,
    /// What [`mask`] hides.
    pub mask: f64,
    /// What [`reorder`] shuffles.
    pub reorder: f64,
}

/// Number of positions that are a share of `n`, rounded down.
fn part(n: usize, share: f64) -> usize {
    ((n as f64 * share) as usize).min(n)
}

/// Places of a contiguous part of `part(n, share)` positions, but at least `least`.
fn stretch(n: usize, share: f64, least: usize, rng: &mut impl Rng) -> std::ops::Range<usize> {
    let len = part(n, share).max(least).min(n);
    let from = rng.random_range(0..=n - len);
    from..from + len
}

/// A contiguous part: the share `keep` of the sequence, at least one item.
pub fn crop(sequence: &[u32], keep: f64, rng: &mut impl Rng) -> Vec<u32> {
    sequence[stretch(sequence.len(), keep, 1, rng)].to_vec()
}

/// The share `hide` of the items, at random places, replaced by `mask`.
pub fn mask(sequence: &[u32], hide: f64, mask: u32, rng: &mut impl Rng) -> Vec<u32> {
    let mut changed = sequence.to_vec();
    for place in index::sample(rng, sequence.len(), part(sequence.len(), hide)) {
        changed[place] = mask;
    }
    changed
}

/// A contiguous part, the share `shuffle` of the sequence, in random order.
pub fn reorder(sequence: &[u32], shuffle: f64, rng: &mut impl Rng) -> Vec<u32> {
    let mut changed = sequence.to_vec();
    changed[stretch(sequence.len(), shuffle, 0, rng)].shuffle(rng);
    changed
}

/// The sequence changed by one of `choices`, drawn with equal probability.
pub fn view(
    sequence: &[u32],
    choices: &[Augmentation],
    shares: Shares,
    mask_item: u32,
    rng: &mut impl Rng,
) -> Vec<u32> {
    if choices.is_empty() {
        return sequence.to_vec();
    }
    match choices[rng.random_range(0..choices.len())] {
        Augmentation::Crop => crop(sequence, shares.crop, rng),
        Augmentation::Mask => mask(sequence, shares.mask, mask_item, rng),
        Augmentation::Reorder => reorder(sequence, shares.reorder, rng),
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
        fn a_crop_is_a_contiguous_part(n in 0usize..40, keep in 0.0f64..=1.0, seed in any::<u64>()) {
            let sequence: Vec<u32> = (0..n as u32).map(|i| i * 3).collect();
            let cropped = crop(&sequence, keep, &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(cropped.len(), part(n, keep).max(n.min(1)));
            prop_assert!(cropped.is_empty() || sequence.windows(cropped.len()).any(|w| w == cropped));
        }

        #[test]
        fn a_mask_keeps_length_and_the_other_positions(n in 0usize..40, hide in 0.0f64..=1.0, seed in any::<u64>()) {
            let sequence: Vec<u32> = (0..n as u32).collect();
            let masked = mask(&sequence, hide, 99, &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(masked.len(), n);
            prop_assert_eq!(masked.iter().filter(|&&i| i == 99).count(), part(n, hide));
            prop_assert!(masked.iter().zip(&sequence).all(|(m, s)| m == s || *m == 99));
        }

        #[test]
        fn a_reorder_keeps_the_items_and_all_outside_of_one_part(
            n in 0usize..40, shuffle in 0.0f64..=1.0, seed in any::<u64>(),
        ) {
            let sequence: Vec<u32> = (0..n as u32).collect();
            let changed = reorder(&sequence, shuffle, &mut ChaCha8Rng::seed_from_u64(seed));
            let moved: Vec<usize> = (0..n).filter(|&t| changed[t] != sequence[t]).collect();
            if let (Some(first), Some(last)) = (moved.first(), moved.last()) {
                prop_assert!(last - first < part(n, shuffle));
            }
            let mut sorted = changed;
            sorted.sort_unstable();
            prop_assert_eq!(sorted, sequence);
        }
    }

    #[test]
    fn a_view_is_one_of_the_chosen_ones() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let sequence: Vec<u32> = (0..20).collect();
        let shares = Shares { crop: 0.5, mask: 0.5, reorder: 0.5 };
        for _ in 0..20 {
            assert_eq!(view(&sequence, &[Augmentation::Crop], shares, 99, &mut rng).len(), 10);
            let masked = view(&sequence, &[Augmentation::Mask], shares, 99, &mut rng);
            assert_eq!(masked.iter().filter(|&&i| i == 99).count(), 10);
        }
        assert_eq!(view(&sequence, &[], shares, 99, &mut rng), sequence);
    }
}
