//! Metrics: of one ranked list against the user's held-out items, and of predicted ratings.
//!
//! In: the 1-based places of the held-out items among all items that the user has not
//! interacted with; or predictions and ratings. Out: the metric of one user (a table's value
//! is the mean over its users), or of a whole table. All of them are entries of [`METRICS`].

/// Hit@k: 1 when the held-out item is among the first `k`. `rank` is its 1-based place,
/// `None` when it is not in the list.
///
/// ```
/// use tailfuse::eval::metrics::hit_at;
/// assert_eq!([hit_at(Some(3), 3), hit_at(Some(4), 3), hit_at(None, 3)], [1.0, 0.0, 0.0]);
/// ```
pub fn hit_at(rank: Option<usize>, k: usize) -> f64 {
    match rank {
        Some(r) if r <= k => 1.0,
        _ => 0.0,
    }
}

/// NDCG@k with one relevant item: `1 / log2(rank + 1)` inside the cut-off (the ideal DCG is 1).
///
/// ```
/// use tailfuse::eval::metrics::ndcg_at;
/// assert_eq!([ndcg_at(Some(1), 3), ndcg_at(Some(3), 3), ndcg_at(Some(4), 3)], [1.0, 0.5, 0.0]);
/// ```
pub fn ndcg_at(rank: Option<usize>, k: usize) -> f64 {
    match rank {
        Some(r) if r <= k => 1.0 / ((r + 1) as f64).log2(),
        _ => 0.0,
    }
}

/// Where a user's held-out items are in a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// 1-based places of those that are in the list, from first to last.
    pub places: Vec<usize>,
    /// How many there are, in the list or not; >= 1 for a user that is evaluated. Leave-one-out
    /// has one.
    pub held_out: usize,
}

/// Hit@k with several held-out items: 1 when any of them is among the first `k`.
pub fn hit_of(found: &Found, k: usize) -> f64 {
    hit_at(found.places.first().copied(), k)
}

/// NDCG@k with several held-out items of equal relevance: the DCG of those found, divided by
/// that of a list that has all of them first (of as many as fit into `k`). With one it is
/// [`ndcg_at`].
pub fn ndcg_of(found: &Found, k: usize) -> f64 {
    // Not `sum()`, which is -0 for no place.
    let dcg = found.places.iter().fold(0.0, |dcg, &r| dcg + ndcg_at(Some(r), k));
    let ideal: f64 = (1..=found.held_out.min(k)).map(|r| ndcg_at(Some(r), k)).sum();
    if ideal > 0.0 { dcg / ideal } else { 0.0 }
}

/// Root mean squared error; NaN without a pair. Both slices have the same length.
///
/// ```
/// use tailfuse::eval::metrics::rmse;
/// assert_eq!(rmse(&[1.0, 5.0], &[1.0, 3.0]), 2f64.sqrt());
/// ```
pub fn rmse(predicted: &[f64], actual: &[f64]) -> f64 {
    (predicted.iter().zip(actual).map(|(p, a)| (p - a).powi(2)).sum::<f64>() / actual.len() as f64).sqrt()
}

/// Mean absolute error; NaN without a pair. Both slices have the same length.
///
/// ```
/// use tailfuse::eval::metrics::mae;
/// assert_eq!(mae(&[1.0, 5.0], &[1.0, 3.0]), 1.0);
/// ```
pub fn mae(predicted: &[f64], actual: &[f64]) -> f64 {
    predicted.iter().zip(actual).map(|(p, a)| (p - a).abs()).sum::<f64>() / actual.len() as f64
}

/// Which way a metric is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// What a metric is computed from.
#[derive(Clone, Copy, Debug)]
pub enum MetricFn {
    /// Per user, from the places of the held-out items and a cut-off; a table's value is the mean.
    PerUser(fn(&Found, usize) -> f64),
    /// From all predictions and ratings of a table.
    WholeTable(fn(&[f64], &[f64]) -> f64),
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name without a cut-off.
    pub name: &'static str,
    /// Which way it is better.
    pub direction: Direction,
    /// The function.
    pub function: MetricFn,
}

/// All metrics in the order of the tables. Adding one: a function above, an entry here.
pub static METRICS: &[Metric] = &[
    Metric { name: "Hit", direction: Direction::Higher, function: MetricFn::PerUser(hit_of) },
    Metric { name: "NDCG", direction: Direction::Higher, function: MetricFn::PerUser(ndcg_of) },
    Metric { name: "RMSE", direction: Direction::Lower, function: MetricFn::WholeTable(rmse) },
    Metric { name: "MAE", direction: Direction::Lower, function: MetricFn::WholeTable(mae) },
];

/// The metrics of ranked lists: (name, function).
pub fn ranking_metrics() -> impl Iterator<Item = (&'static str, fn(&Found, usize) -> f64)> {
    METRICS.iter().filter_map(|m| match m.function {
        MetricFn::PerUser(f) => Some((m.name, f)),
        MetricFn::WholeTable(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(places: &[usize], held_out: usize) -> Found {
        Found { places: places.to_vec(), held_out }
    }

    #[test]
    fn one_relevant_item_by_hand() {
        // 1 / log2(rank + 1): 1, .6309, .5, .4307, .3869.
        for (rank, want) in [(1, 1.0), (2, 0.6309297535714575), (4, 0.43067655807339306), (5, 0.38685280723454163)] {
            assert!((ndcg_at(Some(rank), 5) - want).abs() < 1e-12);
        }
        assert_eq!(ndcg_at(Some(6), 5), 0.0);
        assert_eq!(ndcg_at(None, 5), 0.0);
        assert_eq!((hit_at(Some(5), 5), hit_at(Some(6), 5), hit_at(None, 5)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn several_relevant_items_as_scikit_learn_has_them() {
        // ndcg_score([[0,1,0,1,1]], [[5,4,3,2,1]], k=4):
        // DCG = .63093 + .43068 = 1.06161, ideal 1 + .63093 + .5 = 2.13093.
        assert!((ndcg_of(&found(&[2, 4, 5], 3), 4) - 0.49818925746641285).abs() < 1e-12);
        assert_eq!(ndcg_of(&found(&[1, 2, 3], 3), 2), 1.0);
        assert_eq!((hit_of(&found(&[4, 9], 5), 3), hit_of(&found(&[4, 9], 5), 4)), (0.0, 1.0));
        assert_eq!((ndcg_of(&found(&[], 2), 3), hit_of(&found(&[], 2), 3)), (0.0, 0.0));
    }

    #[test]
    fn nothing_found_is_a_positive_zero() {
        assert_eq!(ndcg_of(&found(&[], 1), 10).to_bits(), 0.0f64.to_bits());
    }

    #[test]
    fn rating_errors_by_hand() {
        assert!((rmse(&[3.5, 2.0, 4.0], &[4.0, 2.0, 2.0]) - (4.25f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!((mae(&[3.5, 2.0, 4.0], &[4.0, 2.0, 2.0]) - 2.5 / 3.0).abs() < 1e-12);
        assert!(rmse(&[], &[]).is_nan() && mae(&[], &[]).is_nan());
    }

    #[test]
    fn the_registry_has_each_name_once_and_its_direction_is_true() {
        let names: std::collections::BTreeSet<&str> = METRICS.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), METRICS.len());
        for m in METRICS {
            let (good, bad) = match m.function {
                MetricFn::PerUser(f) => (f(&found(&[1], 1), 3), f(&found(&[], 1), 3)),
                MetricFn::WholeTable(f) => (f(&[3.0], &[3.0]), f(&[1.0], &[3.0])),
            };
            assert_eq!(good > bad, m.direction == Direction::Higher, "{}", m.name);
        }
    }

    proptest! {
        #[test]
        fn the_general_form_is_the_simple_one_for_one_item(rank in prop::option::of(1usize..60), k in 1usize..50) {
            let one = Found { places: rank.into_iter().collect(), held_out: 1 };
            prop_assert_eq!(hit_of(&one, k), hit_at(rank, k));
            prop_assert_eq!(ndcg_of(&one, k), ndcg_at(rank, k));
        }

        #[test]
        fn values_lie_between_0_and_1(places in prop::collection::btree_set(1usize..40, 0..8), more in 1usize..4, k in 1usize..50) {
            let places: Vec<usize> = places.into_iter().collect();
            let f = Found { held_out: places.len() + more, places };
            prop_assert!((0.0..=1.0).contains(&ndcg_of(&f, k)));
            prop_assert!(ndcg_of(&f, k) <= hit_of(&f, k));
        }
    }
}
