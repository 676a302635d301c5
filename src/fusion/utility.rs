//! Positions become utilities, utilities are mixed, the mix gives the final order: eq. 6 of
//! arXiv 2401.13870.
//!
//! In: a user's shortlist in the recommender's order with the LLM's ranks, and alpha. Out:
//! the fused order with its utilities.

/// One item of a user's shortlist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Index of the item: its place among the sorted ids, the last tie rule.
    pub item: u32,
    /// 1-based place in the recommender's shortlist.
    pub rec_place: u32,
    /// 1-based place in the LLM's order of the shortlist; `None` for an item that the LLM
    /// was not shown, which keeps the recommender's place in that order too.
    pub llm_place: Option<u32>,
}

/// An item in the fused order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fused {
    /// Which of the given candidates.
    pub index: usize,
    /// U of eq. 6, rounded to 1e-9.
    pub utility: f64,
}

/// Utilities are compared in steps of 1 / `STEPS` = 1e-9: mixes of positions that are equal on
/// paper must tie whatever the rounding of their terms.
pub const STEPS: f64 = 1e9;

/// The utility of a 1-based place: U = -s * C.
pub fn position_utility(place: u32, c: f64) -> f64 {
    -f64::from(place) * c
}

/// U = alpha * U_llm + (1 - alpha) * U_rec, eq. 6.
pub fn final_utility(alpha: f64, llm: f64, rec: f64) -> f64 {
    alpha * llm + (1.0 - alpha) * rec
}

/// The LLM's order of a whole shortlist, from its ranks of the items that it was shown.
///
/// `ranks[s]` belongs to the item at the recommender's place `s + 1`; the answer is the
/// 1-based place of that item in the LLM's order. The places that the shown items hold in
/// the recommender's order are dealt out among them by the LLM's ranks (equal ranks by the
/// recommender's place). The others keep theirs, on which the LLM has no opinion: so an LLM
/// that agrees with the recommender changes nothing, and one that does not cannot move an
/// item that it never saw against the whole list.
///
/// ```
/// use tailfuse::fusion::utility::llm_places;
/// // The second item was not shown; the LLM turns the others round.
/// assert_eq!(llm_places(&[Some(3), None, Some(2), Some(1)]), [Some(4), None, Some(3), Some(1)]);
/// ```
pub fn llm_places(ranks: &[Option<i32>]) -> Vec<Option<u32>> {
    let held: Vec<usize> = (0..ranks.len()).filter(|&s| ranks[s].is_some()).collect();
    let mut order = held.clone();
    order.sort_by_key(|&s| (ranks[s], s));
    let mut places = vec![None; ranks.len()];
    for (&slot, item) in held.iter().zip(order) {
        places[item] = Some(slot as u32 + 1);
    }
    places
}

/// The fused order of one user's shortlist, best first.
///
/// A position gives the utility `-s * c` (`c` > 0); U is rounded to 1e-9, and
/// equal ones are ordered by the recommender's place, then by the item's index. The result
/// is a permutation of `candidates`. `alpha` = 0 gives the recommender's order, 1 the LLM's.
pub fn fuse(candidates: &[Candidate], alpha: f64, c: f64) -> Vec<Fused> {
    let mut order: Vec<Fused> = candidates
        .iter()
        .enumerate()
        .map(|(index, x)| {
            let rec = position_utility(x.rec_place, c);
            let llm = position_utility(x.llm_place.unwrap_or(x.rec_place), c);
            Fused { index, utility: rounded(final_utility(alpha, llm, rec)) }
        })
        .collect();
    order.sort_by(|a, b| {
        let key = |f: &Fused| (candidates[f.index].rec_place, candidates[f.index].item);
        b.utility.total_cmp(&a.utility).then_with(|| key(a).cmp(&key(b)))
    });
    order
}

fn rounded(utility: f64) -> f64 {
    (utility * STEPS).round() / STEPS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shortlist(llm: &[Option<i32>]) -> Vec<Candidate> {
        llm_places(llm)
            .into_iter()
            .enumerate()
            .map(|(s, llm_place)| Candidate { item: 100 - s as u32, rec_place: s as u32 + 1, llm_place })
            .collect()
    }

    fn order(fused: &[Fused]) -> Vec<usize> {
        fused.iter().map(|f| f.index).collect()
    }

    #[test]
    fn by_hand() {
        // Items a b c d at the recommender's places 1 to 4; the LLM says d a b c.
        // alpha = .4: a -(.4*2 + .6*1) = -1.4; b -(.4*3 + .6*2) = -2.4; c -3.4; d -(.4*1 + .6*4) = -2.8.
        let fused = fuse(&shortlist(&[Some(2), Some(3), Some(4), Some(1)]), 0.4, 1.0);
        assert_eq!(order(&fused), [0, 1, 3, 2]);
        for (f, u) in fused.iter().zip([-1.4, -2.4, -2.8, -3.4]) {
            assert!((f.utility - u).abs() < 1e-12, "{f:?}");
        }
    }

    #[test]
    fn c_scales_utilities_and_nothing_else() {
        let list = shortlist(&[Some(3), Some(1), Some(2)]);
        let (one, half) = (fuse(&list, 0.3, 1.0), fuse(&list, 0.3, 0.5));
        assert_eq!(order(&one), order(&half));
        for (a, b) in one.iter().zip(&half) {
            assert!((a.utility * 0.5 - b.utility).abs() < 1e-9);
        }
    }

    #[test]
    fn ties_go_to_the_recommender() {
        // Swapped neighbours at alpha = .5: both have U = -1.5.
        let fused = fuse(&shortlist(&[Some(2), Some(1)]), 0.5, 1.0);
        assert_eq!(fused[0].utility, fused[1].utility);
        assert_eq!(order(&fused), [0, 1]);
        // At alpha = 1/3 the places (4, 1) and (2, 5) both give U = -3, by sums of other terms.
        let a = Candidate { item: 1, rec_place: 4, llm_place: Some(1) };
        let b = Candidate { item: 0, rec_place: 2, llm_place: Some(5) };
        let fused = fuse(&[a, b], 1.0 / 3.0, 1.0);
        assert_eq!(fused[0].utility, fused[1].utility);
        assert_eq!(order(&fused), [1, 0]);
    }

    #[test]
    fn equal_places_go_by_item_index() {
        let x = |item| Candidate { item, rec_place: 1, llm_place: None };
        assert_eq!(order(&fuse(&[x(7), x(2), x(5)], 0.0, 1.0)), [1, 2, 0]);
    }

    #[test]
    fn an_item_that_was_not_shown_keeps_its_place_in_the_llms_order() {
        // a b c d, c not shown, the LLM says d b a: it fills the places 1, 2, 4.
        let list = shortlist(&[Some(3), Some(2), None, Some(1)]);
        assert_eq!(list.iter().map(|x| x.llm_place).collect::<Vec<_>>(), [Some(4), Some(2), None, Some(1)]);
        // alpha = .5: a -2.5, b -2, c -3, d -2.5: b, a before d by the recommender's place, c.
        let fused = fuse(&list, 0.5, 1.0);
        assert_eq!(order(&fused), [1, 0, 3, 2]);
        assert_eq!(order(&fuse(&list, 1.0, 1.0)), [3, 1, 2, 0]);
    }

    #[test]
    fn an_llm_that_agrees_changes_nothing_even_where_it_saw_little() {
        let mut seen = vec![None; 12];
        seen[10] = Some(1);
        seen[11] = Some(2);
        for alpha in [0.0, 0.3, 0.9, 1.0] {
            assert_eq!(order(&fuse(&shortlist(&seen), alpha, 1.0)), (0..12).collect::<Vec<_>>());
        }
    }

    #[test]
    fn one_candidate_and_none() {
        let fused = fuse(&shortlist(&[Some(1)]), 0.7, 1.0);
        assert_eq!(fused, [Fused { index: 0, utility: -1.0 }]);
        assert!(fuse(&[], 0.7, 1.0).is_empty());
    }

    /// LLM ranks: a shuffled 1..=n with some taken away.
    fn ranks() -> impl Strategy<Value = Vec<Option<i32>>> {
        (1usize..25).prop_flat_map(|n| {
            (
                Just((1..=n as i32).collect::<Vec<_>>()).prop_shuffle(),
                prop::collection::vec(prop::bool::weighted(0.8), n),
            )
                .prop_map(|(r, shown)| r.into_iter().zip(shown).map(|(r, s)| s.then_some(r)).collect())
        })
    }

    proptest! {
        #[test]
        fn fused_is_a_permutation_that_ends_at_both_orders(llm in ranks(), alpha in 0.0f64..=1.0) {
            let list = shortlist(&llm);
            let n = list.len();
            let mut all = order(&fuse(&list, alpha, 1.0));
            all.sort_unstable();
            prop_assert_eq!(all, (0..n).collect::<Vec<_>>());
            prop_assert_eq!(order(&fuse(&list, 0.0, 1.0)), (0..n).collect::<Vec<_>>());
            let mut by_llm: Vec<usize> = (0..n).collect();
            by_llm.sort_by_key(|&i| list[i].llm_place.unwrap_or(list[i].rec_place));
            prop_assert_eq!(order(&fuse(&list, 1.0, 1.0)), by_llm);
        }

        #[test]
        fn the_llms_places_are_a_permutation_and_keep_its_order(llm in ranks()) {
            let places = llm_places(&llm);
            let mut all: Vec<u32> = places.iter().enumerate().map(|(s, p)| p.unwrap_or(s as u32 + 1)).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (1..=llm.len() as u32).collect::<Vec<_>>());
            for (a, x) in llm.iter().enumerate() {
                for (b, y) in llm.iter().enumerate() {
                    if let (Some(x), Some(y)) = (x, y) {
                        prop_assert_eq!(x < y, places[a] < places[b]);
                    }
                }
            }
        }

        #[test]
        fn agreement_changes_nothing(n in 1usize..25, alpha in 0.0f64..=1.0) {
            let same: Vec<Option<i32>> = (1..=n as i32).map(Some).collect();
            prop_assert_eq!(order(&fuse(&shortlist(&same), alpha, 1.0)), (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn utilities_never_rise(llm in ranks(), alpha in 0.0f64..=1.0, c in 0.1f64..10.0) {
            let fused = fuse(&shortlist(&llm), alpha, c);
            prop_assert!(fused.windows(2).all(|w| w[0].utility >= w[1].utility));
        }
    }
}
