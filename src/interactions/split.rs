//! Which interaction is for training, for validation, for testing.
//!
//! In: [`Ordered`] interactions and a [`SplitRule`]. Out: [`Split`]: a part per row, what is
//! known at test time, which users can be evaluated. Nothing here moves data.
//!
//! *Leave-one-out* (arXiv 2401.13870, section 5.1): per user by time, the last interaction is
//! test, the one before it validation, the rest train. It trains on other users' future.
//! *Global time*: one cut for validation and one for test, the same for all users, as a nightly
//! job would meet the world. Users without an interaction in a window are not evaluated on it; what
//! they did before it is train all the same.
//! *Nothing*: all is train, for serving.

use serde::{Deserialize, Serialize};

use super::clean::Ordered;
use crate::columns::TIMESTAMP;
use crate::error::{Error, Result};

/// What is known of a user when the test item is ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HistoryAtTest {
    /// Train and validation interactions, as a deployed system would have them.
    #[serde(rename = "train+valid")]
    TrainAndValid,
    /// Train interactions only.
    #[serde(rename = "train")]
    Train,
}

impl HistoryAtTest {
    /// From the pipeline's `history_at_test`. Errors (exit 78): another word.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "train+valid" => Ok(HistoryAtTest::TrainAndValid),
            "train" => Ok(HistoryAtTest::Train),
            other => Err(Error::spec(format!("`history_at_test` is `{other}`"))
                .with_help("it can be \"train+valid\" or \"train\"")),
        }
    }
}

/// How to split.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Last interaction of each user = test, the one before = validation.
    LeaveOneOut,
    /// Shares of all interactions, by time: `valid` before the last `test`.
    TimeShares {
        /// Share of validation interactions, in (0, 1).
        valid: f64,
        /// Share of test interactions, in (0, 1).
        test: f64,
    },
    /// Timestamps of the first validation and the first test interaction, `valid_from < test_from`.
    TimeCuts {
        /// Interactions at this time or later are not train.
        valid_from: i64,
        /// Interactions at this time or later are test.
        test_from: i64,
    },
    /// Everything is train: nothing is held out, and nobody is evaluated.
    Nothing,
}

/// A method and who takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitRule {
    /// How to split.
    pub method: Method,
    /// Users with fewer interactions are not evaluated. At least 3 for leave-one-out.
    pub min_interactions: usize,
    /// What is known at test time.
    pub history_at_test: HistoryAtTest,
}

/// The part of one interaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Weights are fitted on it.
    Train,
    /// Early stopping and calibration use it.
    Valid,
    /// Figures are reported on it.
    Test,
    /// In no part: it lies behind a time cut, and its user cannot be evaluated.
    SetAside,
}

/// A split: parts and what follows from them.
#[derive(Clone, Debug)]
pub struct Split {
    /// `[kept]`: the part of each row of [`Ordered`].
    pub parts: Vec<Part>,
    /// `[kept]`: whether the interaction is known when test items are ranked.
    pub in_history: Vec<bool>,
    /// `[kept]`: 0-based place in the user's ordered interactions.
    pub positions: Vec<i32>,
    /// `[users]`: whether the user has a test interaction that counts.
    pub evaluated: Vec<bool>,
    /// `[users]`: N(u), the user's interactions in the history.
    pub interactions: Vec<i64>,
    /// Users with fewer than `min_interactions`.
    pub users_too_few: usize,
    /// Evaluated users whose test interaction has the time of the one before it, so that
    /// `row_id` alone made it the test interaction. Leave-one-out with timestamps only.
    pub users_tied: usize,
    /// First timestamps of validation and test, for the time methods.
    pub cuts: Option<(i64, i64)>,
}

impl Split {
    /// Number of rows of a part.
    pub fn count(&self, part: Part) -> usize {
        self.parts.iter().filter(|&&p| p == part).count()
    }
}

/// Splits. Errors (exit 65): nobody can be evaluated (but for [`Method::Nothing`]), no timestamps for a
/// split by time, an empty train, validation or test part.
pub fn split(ordered: &Ordered, rule: &SplitRule) -> Result<Split> {
    match rule.method {
        Method::LeaveOneOut => leave_one_out(ordered, rule),
        Method::TimeShares { valid, test } => {
            let times = times(ordered)?;
            let cuts = cuts_of_shares(times, valid, test);
            by_time(ordered, times, cuts, rule)
        }
        Method::TimeCuts { valid_from, test_from } => by_time(ordered, times(ordered)?, (valid_from, test_from), rule),
        Method::Nothing => nothing_held_out(ordered),
    }
}

fn nothing_held_out(ordered: &Ordered) -> Result<Split> {
    let n = ordered.rows.len();
    if n == 0 {
        return Err(Error::data("the log has no interactions")
            .with_help("look at the source's path, its filter and its columns"));
    }
    let ranges = ordered.user_ranges();
    let mut positions = vec![0; n];
    for range in &ranges {
        range.clone().enumerate().for_each(|(position, row)| positions[row] = position as i32);
    }
    Ok(Split {
        parts: vec![Part::Train; n],
        in_history: vec![true; n],
        positions,
        evaluated: vec![false; ranges.len()],
        interactions: ranges.iter().map(|range| range.len() as i64).collect(),
        users_too_few: 0,
        users_tied: 0,
        cuts: None,
    })
}

fn times(ordered: &Ordered) -> Result<&[i64]> {
    ordered.timestamps.as_deref().ok_or_else(|| {
        Error::data(format!("column `{TIMESTAMP}` is missing; a split by global time needs it"))
            .with_help("map it in the source's `columns`, or use strategy = \"leave-one-out\"")
    })
}

fn nobody(rule: &SplitRule, ordered: &Ordered) -> Error {
    let longest = ordered.user_ranges().into_iter().map(|r| r.len()).max().unwrap_or(0);
    Error::data(format!(
        "no user can be evaluated: of {} users none has {} interactions and a test interaction among them (the longest history has {longest})",
        ordered.user_map.len(),
        rule.min_interactions,
    ))
    .with_help("check that `user_id` is mapped to the right column, take a longer time span, or lower `min_interactions`")
}

fn leave_one_out(ordered: &Ordered, rule: &SplitRule) -> Result<Split> {
    let n = ordered.rows.len();
    let ranges = ordered.user_ranges();
    let mut split = Split {
        parts: vec![Part::Train; n],
        in_history: vec![true; n],
        positions: vec![0; n],
        evaluated: vec![false; ranges.len()],
        interactions: vec![0; ranges.len()],
        users_too_few: 0,
        users_tied: 0,
        cuts: None,
    };
    // Fewer than three would leave nothing to train on.
    let enough = rule.min_interactions.max(3);
    for (user, range) in ranges.into_iter().enumerate() {
        let len = range.len();
        for (position, row) in range.clone().enumerate() {
            split.positions[row] = position as i32;
        }
        let mut known = len;
        if len < enough {
            split.users_too_few += 1;
        } else {
            let (valid, test) = (range.end - 2, range.end - 1);
            split.parts[valid] = Part::Valid;
            split.parts[test] = Part::Test;
            split.in_history[test] = false;
            split.in_history[valid] = rule.history_at_test == HistoryAtTest::TrainAndValid;
            split.evaluated[user] = true;
            known = len - 1 - usize::from(!split.in_history[valid]);
            split.users_tied += usize::from(ordered.timestamps.as_ref().is_some_and(|t| t[valid] == t[test]));
        }
        split.interactions[user] = known as i64;
    }
    match split.evaluated.contains(&true) {
        true => Ok(split),
        false => Err(nobody(rule, ordered)),
    }
}

/// The timestamps at which the shares begin. All interactions of one timestamp go to the same,
/// later part, so ties at a cut make the later part larger than its share, never smaller.
fn cuts_of_shares(times: &[i64], valid: f64, test: f64) -> (i64, i64) {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = |share: f64| {
        let before = ((1.0 - share) * sorted.len() as f64).round() as usize;
        sorted[before.min(sorted.len() - 1)]
    };
    (at(valid + test), at(test))
}

fn by_time(ordered: &Ordered, times: &[i64], cuts: (i64, i64), rule: &SplitRule) -> Result<Split> {
    let n = ordered.rows.len();
    let (valid_from, test_from) = cuts;
    let ranges = ordered.user_ranges();
    let known_until = match rule.history_at_test {
        HistoryAtTest::TrainAndValid => test_from,
        HistoryAtTest::Train => valid_from,
    };
    let mut split = Split {
        parts: vec![Part::SetAside; n],
        in_history: times.iter().map(|&t| t < known_until).collect(),
        positions: vec![0; n],
        evaluated: vec![false; ranges.len()],
        interactions: vec![0; ranges.len()],
        users_too_few: 0,
        users_tied: 0,
        cuts: Some(cuts),
    };
    for (user, range) in ranges.into_iter().enumerate() {
        let enough = range.len() >= rule.min_interactions;
        let trained = times[range.start] < valid_from;
        let known = range.clone().filter(|&r| split.in_history[r]).count();
        for (position, row) in range.clone().enumerate() {
            split.positions[row] = position as i32;
            split.parts[row] = match times[row] {
                t if t < valid_from => Part::Train,
                t if t < test_from && enough && trained => Part::Valid,
                t if t >= test_from && enough && known > 0 => Part::Test,
                _ => Part::SetAside,
            };
        }
        split.users_too_few += usize::from(!enough);
        split.interactions[user] = known as i64;
        split.evaluated[user] = range.clone().any(|r| split.parts[r] == Part::Test);
    }
    for (part, name) in [(Part::Train, "train"), (Part::Valid, "validation")] {
        if split.count(part) == 0 {
            let (first, last) = (times.iter().min().copied(), times.iter().max().copied());
            return Err(Error::data(format!(
                "the {name} part is empty: validation begins at {valid_from}, test at {test_from}, and the log spans {} to {}",
                first.unwrap_or_default(),
                last.unwrap_or_default()
            ))
            .with_help("choose other shares or cut points; interactions of one timestamp all go to the later part"));
        }
    }
    match split.evaluated.contains(&true) {
        true => Ok(split),
        false => Err(nobody(rule, ordered)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::clean::clean;
    use super::super::clean::tests::{log, without};
    use super::*;

    const LOO: SplitRule =
        SplitRule { method: Method::LeaveOneOut, min_interactions: 3, history_at_test: HistoryAtTest::TrainAndValid };

    fn timed(method: Method) -> SplitRule {
        SplitRule { method, ..LOO }
    }

    #[test]
    fn last_is_test_the_one_before_valid() {
        let ordered = clean(
            &log(&[(1, 10, 1., 4), (1, 11, 1., 1), (1, 12, 1., 3), (1, 13, 1., 2), (2, 10, 1., 1), (2, 11, 1., 2)]),
            0,
        )
        .unwrap();
        let split_ = split(&ordered, &LOO).unwrap();
        use Part::*;
        assert_eq!(ordered.rows, [1, 3, 2, 0, 4, 5]);
        assert_eq!(split_.parts, [Train, Train, Valid, Test, Train, Train]);
        assert_eq!(split_.positions, [0, 1, 2, 3, 0, 1]);
        assert_eq!(split_.evaluated, [true, false]);
        assert_eq!(split_.interactions, [3, 2]);
        assert_eq!((split_.users_too_few, split_.users_tied), (1, 0));
        let strict = split(&ordered, &SplitRule { history_at_test: HistoryAtTest::Train, ..LOO }).unwrap();
        // A user who is not evaluated keeps the whole history: nothing of it is held out.
        assert_eq!(strict.interactions, [2, 2]);
        assert_eq!(strict.in_history, [true, true, false, false, true, true]);
    }

    #[test]
    fn with_nothing_held_out_all_is_train_and_known() {
        let ordered = clean(&log(&[(1, 10, 1., 4), (1, 11, 1., 1), (2, 10, 1., 1)]), 0).unwrap();
        let all = split(&ordered, &timed(Method::Nothing)).unwrap();
        assert_eq!((all.count(Part::Train), all.count(Part::SetAside)), (3, 0));
        assert_eq!((all.in_history, all.positions), (vec![true; 3], vec![0, 1, 0]));
        assert_eq!((all.evaluated, all.interactions), (vec![false; 2], vec![2, 1]));
    }

    #[test]
    fn users_outside_the_windows_stay_in_train() {
        let ordered = clean(
            &log(&[
                (1, 1, 1., 1),
                (1, 2, 1., 5),
                (1, 3, 1., 9),
                (2, 1, 1., 1),
                (2, 2, 1., 2),
                (2, 3, 1., 3), // nothing in either window
                (3, 1, 1., 2),
                (3, 2, 1., 3),
                (3, 4, 1., 9), // nothing in the validation window
            ]),
            0,
        )
        .unwrap();
        let split_ = split(&ordered, &timed(Method::TimeCuts { valid_from: 5, test_from: 8 })).unwrap();
        use Part::*;
        assert_eq!(split_.parts, [Train, Valid, Test, Train, Train, Train, Train, Train, Test]);
        assert_eq!(split_.evaluated, [true, false, true]);
    }

    #[test]
    fn ties_of_the_last_interaction_are_counted() {
        let ordered = clean(
            &log(&[
                (1, 1, 1., 1),
                (1, 2, 1., 5),
                (1, 3, 1., 5), // tied
                (2, 1, 1., 1),
                (2, 2, 1., 1),
                (2, 3, 1., 2), // tie elsewhere
                (3, 1, 1., 5),
                (3, 2, 1., 5), // tied, not evaluated
            ]),
            0,
        );
        assert_eq!(split(&ordered.unwrap(), &LOO).unwrap().users_tied, 1);
    }

    #[test]
    fn nobody_with_enough_is_an_error_with_figures() {
        let ordered = clean(&log(&[(1, 1, 1., 1), (1, 2, 1., 5), (2, 3, 1., 5)]), 0).unwrap();
        let error = split(&ordered, &LOO).unwrap_err();
        assert_eq!(error.fault.exit_code(), 65);
        assert!(error.message.contains("of 2 users") && error.message.contains("has 2"), "{error}");
    }

    #[test]
    fn time_shares_cut_where_the_share_begins_and_ties_go_later() {
        // Ten interactions at times 0..=9, two users who alternate.
        let rows: Vec<_> = (0..10).map(|t| (t % 2, t, 1., t)).collect();
        let ordered = clean(&log(&rows), 0).unwrap();
        let split_ = split(&ordered, &timed(Method::TimeShares { valid: 0.2, test: 0.1 })).unwrap();
        assert_eq!(split_.cuts, Some((7, 9)));
        assert_eq!([Part::Train, Part::Valid, Part::Test].map(|p| split_.count(p)), [7, 2, 1]);
        assert_eq!(split_.evaluated, [false, true]);
        assert_eq!(split_.interactions, [5, 4]);
        // With times in pairs (0, 0, 1, 1, ...) no timestamp is torn apart.
        let rows: Vec<_> = (0..10).map(|t| (t % 2, t, 1., t / 2)).collect();
        let ordered = clean(&log(&rows), 0).unwrap();
        let split_ = split(&ordered, &timed(Method::TimeShares { valid: 0.2, test: 0.1 })).unwrap();
        assert_eq!(split_.cuts, Some((3, 4)));
        assert_eq!([Part::Train, Part::Valid, Part::Test].map(|p| split_.count(p)), [6, 2, 2]);
    }

    #[test]
    fn time_cuts_set_aside_what_cannot_be_evaluated() {
        let ordered = clean(
            &log(&[
                (1, 1, 1., 1),
                (1, 2, 1., 5),
                (1, 3, 1., 9),
                (2, 1, 1., 9),
                (2, 2, 1., 9),
                (2, 3, 1., 9), // nothing known at test time
                (3, 1, 1., 2),
                (3, 2, 1., 9), // too few
                (4, 1, 1., 5),
                (4, 2, 1., 6),
                (4, 3, 1., 9), // known only from validation on
            ]),
            0,
        )
        .unwrap();
        let rule = timed(Method::TimeCuts { valid_from: 5, test_from: 8 });
        let both = split(&ordered, &rule).unwrap();
        use Part::*;
        assert_eq!(
            both.parts,
            [Train, Valid, Test, SetAside, SetAside, SetAside, Train, SetAside, SetAside, SetAside, Test]
        );
        assert_eq!(both.evaluated, [true, false, false, true]);
        assert_eq!(both.interactions, [2, 0, 1, 2]);
        assert_eq!(both.users_too_few, 1);
        let strict = split(&ordered, &SplitRule { history_at_test: HistoryAtTest::Train, ..rule }).unwrap();
        assert_eq!(strict.evaluated, [true, false, false, false]);
        assert_eq!(strict.interactions, [1, 0, 1, 0]);
    }

    #[test]
    fn impossible_time_splits_say_why() {
        let table = log(&[(1, 1, 1., 1), (1, 2, 1., 5), (1, 3, 1., 9)]);
        let rule = timed(Method::TimeCuts { valid_from: 1, test_from: 8 });
        let error = split(&clean(&table, 0).unwrap(), &rule).unwrap_err();
        assert!(error.message.contains("train part is empty") && error.message.contains("1 to 9"), "{error}");
        let error = split(&clean(&without(&table, &[TIMESTAMP]), 0).unwrap(), &rule).unwrap_err();
        assert!(error.message.contains("`timestamp`"), "{error}");
        assert_eq!(error.fault.exit_code(), 65);
    }

    proptest! {
        #[test]
        fn every_part_keeps_its_promises(
            rows in prop::collection::vec((0i64..5, 0i64..30, 0i64..12), 4..80),
            by_time in any::<bool>(),
            strict in any::<bool>(),
        ) {
            let rows: Vec<_> = rows.into_iter().map(|(u, i, t)| (u, i, 1., t)).collect();
            let ordered = clean(&log(&rows), 0).unwrap();
            let method = if by_time { Method::TimeShares { valid: 0.25, test: 0.25 } } else { Method::LeaveOneOut };
            let history_at_test = if strict { HistoryAtTest::Train } else { HistoryAtTest::TrainAndValid };
            let Ok(split_) = split(&ordered, &SplitRule { method, min_interactions: 3, history_at_test }) else {
                return Ok(());
            };
            for (user, range) in ordered.user_ranges().into_iter().enumerate() {
                let of = |p: Part| range.clone().filter(|&r| split_.parts[r] == p).count();
                prop_assert_eq!(split_.evaluated[user], of(Part::Test) > 0);
                prop_assert_eq!(
                    split_.interactions[user] as usize,
                    range.clone().filter(|&r| split_.in_history[r]).count()
                );
                if !by_time {
                    prop_assert_eq!(of(Part::SetAside), 0);
                    prop_assert_eq!(of(Part::Valid), usize::from(range.len() >= 3));
                    prop_assert_eq!(of(Part::Test), usize::from(range.len() >= 3));
                }
                for r in range.clone() {
                    // Nothing that is held out is known; with leave-one-out train always is.
                    prop_assert!(!(split_.in_history[r] && split_.parts[r] == Part::Test));
                    prop_assert!(!(strict && split_.in_history[r] && split_.parts[r] == Part::Valid));
                    if split_.parts[r] == Part::Train {
                        prop_assert!(split_.in_history[r]);
                    }
                    // Parts follow time within a user.
                    for later in r + 1..range.end {
                        let rank = |p: Part| match p { Part::Train => 0, Part::Valid => 1, _ => 2 };
                        if split_.parts[later] != Part::SetAside && split_.parts[r] != Part::SetAside {
                            prop_assert!(rank(split_.parts[r]) <= rank(split_.parts[later]));
                        }
                    }
                }
            }
        }
    }
}
