//! How little is known of a user, and how much the LLM weighs for it: eq. 5 and eq. 7 of
//! arXiv 2401.13870.
//!
//! In: numbers of interactions, or a table of them. Out: long-tail coefficients, their
//! bounds over all users, the LLM's weight, and the terciles that figures are reported by.

use std::fmt;

use crate::columns::{BUCKET, INTERACTIONS, LONG_TAIL_COEFFICIENT, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::IdMap;
use crate::tables::{Id, Table};

/// l_u = ln(N(u) + 1), eq. 5; `interactions` is N(u), a negative one counts as 0.
pub fn long_tail_coefficient(interactions: i64) -> f64 {
    (interactions.max(0) as f64 + 1.0).ln()
}

/// l_min and l_max of eq. 7: the least and the greatest long-tail coefficient of all users.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Least coefficient.
    pub l_min: f64,
    /// Greatest coefficient, at least `l_min`.
    pub l_max: f64,
}

impl Bounds {
    /// Over coefficients; `None` when there is none.
    pub fn over(coefficients: &[f64]) -> Option<Bounds> {
        let first = *coefficients.first()?;
        Some(coefficients.iter().fold(Bounds { l_min: first, l_max: first }, |b, &l| Bounds {
            l_min: b.l_min.min(l),
            l_max: b.l_max.max(l),
        }))
    }

    /// (l_max - l) / (l_max - l_min), in [0, 1]: 1 for the user with the least history.
    ///
    /// 0 when the bounds meet. The bounds may come from an earlier evaluation, so that a
    /// user can lie outside of them; such a one counts as lying on the nearer bound.
    pub fn tail_ratio(&self, l: f64) -> f64 {
        let width = self.l_max - self.l_min;
        if width > 0.0 { ((self.l_max - l) / width).clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// a1 and a2 of eq. 7.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// The greatest weight of the LLM, in [0, 1]; 0 leaves the recommender alone.
    pub a1: f64,
    /// The floor of the tail ratio, in [0, 1).
    pub a2: f64,
}

impl Weights {
    /// Checks the ranges. `place` says where the numbers come from, for the error (exit 78).
    pub fn new(a1: f64, a2: f64, place: &str) -> Result<Weights> {
        if !(0.0..=1.0).contains(&a1) {
            return Err(Error::spec(format!("{place}: `a1` is {a1}")).with_help("`a1` lies in [0, 1]"));
        }
        if !(0.0..1.0).contains(&a2) {
            return Err(Error::spec(format!("{place}: `a2` is {a2}")).with_help("`a2` lies in [0, 1)"));
        }
        Ok(Weights { a1, a2 })
    }

    /// alpha_u = a1 * max((l_max - l_u) / (l_max - l_min), a2), eq. 7; in [a1 * a2, a1].
    pub fn alpha(&self, l: f64, bounds: &Bounds) -> f64 {
        self.a1 * bounds.tail_ratio(l).max(self.a2)
    }
}

/// A third of the users by N(u).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bucket {
    /// The third with the fewest interactions.
    Tail,
    /// The third between.
    Torso,
    /// The third with the most interactions.
    Head,
}

impl Bucket {
    /// From few interactions to many.
    pub const ALL: [Bucket; 3] = [Bucket::Tail, Bucket::Torso, Bucket::Head];

    /// Its name in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Bucket::Tail => "tail",
            Bucket::Torso => "torso",
            Bucket::Head => "head",
        }
    }

    /// The bucket of that name; another word is an error (exit 65).
    pub fn parse(name: &str) -> Result<Bucket> {
        Bucket::ALL.into_iter().find(|b| b.as_str() == name).ok_or_else(|| {
            Error::data(format!("column `{BUCKET}` holds `{name}`")).with_help("it is one of tail, torso, head")
        })
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Terciles of N(u): `interactions[u]` is N of the user with index `u`, and equal numbers are
/// ordered by that index, which is the order of the ids.
///
/// Where the users are not a multiple of three, the first thirds have one more (as numpy's
/// `array_split` and SQL's `ntile(3)` do it).
pub fn buckets(interactions: &[i64]) -> Vec<Bucket> {
    let n = interactions.len();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&u| (interactions[u], u));
    let tail = n / 3 + usize::from(!n.is_multiple_of(3));
    let torso = n / 3 + usize::from(n % 3 > 1);
    let mut found = vec![Bucket::Head; n];
    for (place, &user) in order.iter().enumerate().take(tail + torso) {
        found[user] = if place < tail { Bucket::Tail } else { Bucket::Torso };
    }
    found
}

/// What is known of one user's history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct History {
    /// N(u).
    pub interactions: i64,
    /// l_u.
    pub coefficient: f64,
    /// The user's tercile.
    pub bucket: Bucket,
}

impl History {
    /// A user of whom nothing is known: N = 0, l = 0, tail.
    pub const NONE: History = History { interactions: 0, coefficient: 0.0, bucket: Bucket::Tail };
}

/// The long-tail table: N(u), l_u and the tercile of each user.
#[derive(Clone, Debug)]
pub struct LongTail {
    users: IdMap,
    of: Vec<History>,
    bounds: Bounds,
}

impl LongTail {
    /// Columns that [`LongTail::from_table`] reads.
    pub const COLUMNS: [&'static str; 4] = [USER_ID, INTERACTIONS, LONG_TAIL_COEFFICIENT, BUCKET];

    /// From a table with one row per user and [`LongTail::COLUMNS`].
    /// Errors (exit 65): no row, a user in two rows, a coefficient that is not a number,
    /// a bucket that is none.
    pub fn from_table(table: &Table) -> Result<LongTail> {
        let ids = table.ids(USER_ID)?;
        let users = IdMap::new(&[&ids])?;
        let interactions = table.i64s(INTERACTIONS)?;
        let coefficients = table.f64s(LONG_TAIL_COEFFICIENT)?;
        let names = table.strings(BUCKET)?;
        let mut of: Vec<Option<History>> = vec![None; users.len()];
        for (row, user) in users.encode(&ids).into_iter().enumerate() {
            let slot = user.and_then(|u| of.get_mut(u as usize));
            let slot = slot.ok_or_else(|| Error::internal("a user is missing from its own map"))?;
            if slot.is_some() {
                return Err(Error::data(format!("user `{}` has two rows", ids.get(row)))
                    .with_help("the long-tail table has one row per user"));
            }
            let coefficient = coefficients[row];
            if !coefficient.is_finite() {
                return Err(Error::data(format!(
                    "column `{LONG_TAIL_COEFFICIENT}` is {coefficient} for user `{}`",
                    ids.get(row)
                )));
            }
            let bucket = Bucket::parse(names[row].as_deref().unwrap_or("null"))?;
            *slot = Some(History { interactions: interactions[row], coefficient, bucket });
        }
        let of: Vec<History> = of.into_iter().flatten().collect();
        let coefficients: Vec<f64> = of.iter().map(|h| h.coefficient).collect();
        let bounds = Bounds::over(&coefficients)
            .ok_or_else(|| Error::data("the long-tail table is empty").with_help("it has one row per user"))?;
        Ok(LongTail { users, of, bounds })
    }

    /// What is known of a user; [`History::NONE`] for one that the table lacks.
    pub fn of(&self, user: &Id) -> History {
        self.users.get(user).map_or(History::NONE, |u| self.of[u as usize])
    }

    /// Whether the table has the user.
    pub fn has(&self, user: &Id) -> bool {
        self.users.get(user).is_some()
    }

    /// l_min and l_max over all users of the table.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// The map of its users, for checks of the id type.
    pub fn users(&self) -> &IdMap {
        &self.users
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray};
    use proptest::prelude::*;
    use std::sync::Arc;

    #[test]
    fn coefficient_is_the_natural_logarithm_of_n_plus_one() {
        assert_eq!(long_tail_coefficient(0), 0.0);
        assert!((long_tail_coefficient(1) - std::f64::consts::LN_2).abs() < 1e-15);
        assert!((long_tail_coefficient(99) - 4.605170185988092).abs() < 1e-12);
        assert_eq!(long_tail_coefficient(-3), 0.0);
    }

    #[test]
    fn alpha_by_hand() {
        // l in [1, 3]: ratios 1, 0.5, 0.25 (below the floor .4) and 0.
        let b = Bounds { l_min: 1.0, l_max: 3.0 };
        let w = Weights { a1: 0.5, a2: 0.4 };
        assert_eq!(w.alpha(1.0, &b), 0.5);
        assert_eq!(w.alpha(2.0, &b), 0.25);
        assert!((w.alpha(2.5, &b) - 0.2).abs() < 1e-15);
        assert!((w.alpha(3.0, &b) - 0.2).abs() < 1e-15);
    }

    #[test]
    fn alpha_outside_of_calibrated_bounds_is_that_of_the_nearer_bound() {
        let b = Bounds { l_min: 1.0, l_max: 3.0 };
        let w = Weights { a1: 0.9, a2: 0.1 };
        assert_eq!(w.alpha(0.0, &b), w.alpha(1.0, &b));
        assert_eq!(w.alpha(9.0, &b), w.alpha(3.0, &b));
    }

    #[test]
    fn equal_bounds_give_the_floor() {
        let b = Bounds { l_min: 2.0, l_max: 2.0 };
        assert_eq!(b.tail_ratio(2.0), 0.0);
        assert!((Weights { a1: 0.5, a2: 0.1 }.alpha(2.0, &b) - 0.05).abs() < 1e-15);
        assert_eq!(Weights { a1: 0.5, a2: 0.0 }.alpha(2.0, &b), 0.0);
    }

    #[test]
    fn weights_outside_of_their_ranges_are_refused() {
        assert!(Weights::new(1.1, 0.1, "here").is_err());
        assert!(Weights::new(f64::NAN, 0.1, "here").is_err());
        let e = Weights::new(0.5, 1.0, "here").unwrap_err();
        assert_eq!(e.fault.exit_code(), 78);
        assert!(Weights::new(0.0, 0.0, "here").is_ok());
    }

    #[test]
    fn terciles_split_like_array_split_and_ties_go_by_id() {
        use Bucket::{Head, Tail, Torso};
        // Five users: thirds of 2, 2, 1. N = 7 three times: the smaller index comes first.
        assert_eq!(buckets(&[7, 1, 7, 7, 30]), vec![Tail, Tail, Torso, Torso, Head]);
        assert_eq!(buckets(&[30, 20, 10]), vec![Head, Torso, Tail]);
        assert_eq!(buckets(&[4]), vec![Tail]);
        assert_eq!(buckets(&[4, 4]), vec![Tail, Torso]);
        assert_eq!(buckets(&[]), vec![]);
        // 943 users: 315, 314, 314, as in numpy.
        let many = buckets(&(0..943).collect::<Vec<i64>>());
        let count = |b| many.iter().filter(|&&x| x == b).count();
        assert_eq!((count(Tail), count(Torso), count(Head)), (315, 314, 314));
    }

    fn table(users: Vec<i64>, coefficients: Vec<f64>, names: Vec<&str>) -> Table {
        let n = users.len() as i64;
        Table::from_columns(vec![
            (USER_ID, Arc::new(Int64Array::from(users)) as ArrayRef, false),
            (INTERACTIONS, Arc::new(Int64Array::from_iter_values(1..=n)), false),
            (LONG_TAIL_COEFFICIENT, Arc::new(Float64Array::from(coefficients)), false),
            (BUCKET, Arc::new(StringArray::from(names)), false),
        ])
        .unwrap()
    }

    #[test]
    fn a_long_tail_table_is_read_by_user() {
        let t = LongTail::from_table(&table(vec![9, 4], vec![0.5, 2.0], vec!["tail", "head"])).unwrap();
        assert_eq!(t.of(&Id::Int(9)), History { interactions: 1, coefficient: 0.5, bucket: Bucket::Tail });
        assert_eq!(t.of(&Id::Int(4)).bucket, Bucket::Head);
        assert_eq!(t.of(&Id::Int(5)), History::NONE);
        assert_eq!(t.bounds(), Bounds { l_min: 0.5, l_max: 2.0 });
    }

    #[test]
    fn a_wrong_long_tail_table_is_refused() {
        for (t, word) in [
            (table(vec![1, 1], vec![1.0, 2.0], vec!["tail", "tail"]), "two rows"),
            (table(vec![1], vec![f64::NAN], vec!["tail"]), "NaN"),
            (table(vec![1], vec![1.0], vec!["middle"]), "middle"),
            (table(vec![], vec![], vec![]), "empty"),
        ] {
            let e = LongTail::from_table(&t).unwrap_err();
            assert_eq!(e.fault.exit_code(), 65, "{e}");
            assert!(e.to_string().contains(word), "{e}");
        }
    }

    proptest! {
        #[test]
        fn alpha_lies_between_the_floor_and_a1(
            n in 0i64..1_000_000, lo in 0i64..1000, more in 0i64..100_000, a1 in 0.0f64..=1.0, a2 in 0.0f64..1.0
        ) {
            let b = Bounds { l_min: long_tail_coefficient(lo), l_max: long_tail_coefficient(lo + more) };
            let alpha = Weights { a1, a2 }.alpha(long_tail_coefficient(n), &b);
            prop_assert!((0.0..=a1).contains(&alpha));
            prop_assert!(alpha >= a1 * a2);
        }

        #[test]
        fn more_history_never_raises_alpha(n in 0i64..100_000, more in 0i64..1000, a1 in 0.0f64..=1.0) {
            let b = Bounds { l_min: long_tail_coefficient(3), l_max: long_tail_coefficient(5000) };
            let w = Weights { a1, a2: 0.1 };
            prop_assert!(w.alpha(long_tail_coefficient(n + more), &b) <= w.alpha(long_tail_coefficient(n), &b));
        }
    }
}
