//! From an interaction log to one ordered row per (user, item).
//!
//! In: a table with `user_id`, `item_id`, `row_id`, perhaps `rating` and `timestamp`.
//! Out: [`Ordered`]: which rows stay, in (user, time) order, with dense ids, and
//! [`CleanReport`]: what was dropped. Rules:
//!
//! 1. Exact duplicates (same user, item, rating, timestamp) are one interaction; the one with
//!    the highest `row_id` stays.
//! 2. Of several ratings of one (user, item), the last by (timestamp, `row_id`) wins.
//! 3. A user's order is (timestamp, `row_id`). Without timestamps it is a random permutation that
//!    depends on the seed, the user's id and the set of the user's items, and on nothing else.

use arrow::datatypes::DataType;
use polars::prelude::{
    DataFrame, Float64Chunked, Int64Chunked, IntoColumn, SortMultipleOptions, UInt32Chunked, UniqueKeepStrategy,
};
use rand::seq::SliceRandom;

use super::polars::to_polars;
use super::{IdMap, user_rng};
use crate::columns::{ITEM_ID, RATING, ROW_ID, TIMESTAMP, USER_ID};
use crate::error::{Error, Result};
use crate::tables::Table;

/// Column of the frame that Polars sorts: place of the row in the input.
const ROW: &str = "row";

/// What cleaning found, in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanReport {
    /// Rows of the input.
    pub rows: usize,
    /// Exact duplicates, dropped.
    pub duplicates: usize,
    /// Earlier ratings of the same (user, item), dropped.
    pub re_ratings: usize,
}

/// The rows that stay, ordered by (user, time).
#[derive(Clone, Debug)]
pub struct Ordered {
    /// `[kept]`: rows of the input table.
    pub rows: Vec<u32>,
    /// `[kept]`: dense user indices, ascending.
    pub users: Vec<u32>,
    /// `[kept]`: dense item indices.
    pub items: Vec<u32>,
    /// `[kept]`: timestamps, ascending within a user; `None` when the log has none and the order is random.
    pub timestamps: Option<Vec<i64>>,
    /// All users of the input.
    pub user_map: IdMap,
    /// All items of the input.
    pub item_map: IdMap,
    /// What was dropped.
    pub report: CleanReport,
}

impl Ordered {
    /// Start and end (in kept rows) of every user, users ascending. Every user of the input keeps at least one row.
    pub fn user_ranges(&self) -> Vec<std::ops::Range<usize>> {
        let mut ranges = Vec::with_capacity(self.user_map.len());
        let mut start = 0;
        for end in 1..=self.users.len() {
            if end == self.users.len() || self.users[end] != self.users[start] {
                ranges.push(start..end);
                start = end;
            }
        }
        ranges
    }
}

/// Drops duplicates and earlier ratings, and orders what is left.
///
/// Errors (exit 65): an empty table, a missing column, null ids or timestamps, more than 2^32 - 1 rows.
pub fn clean(table: &Table, seed: u64) -> Result<Ordered> {
    let n = table.num_rows();
    if n == 0 {
        return Err(Error::data("the interaction table is empty")
            .with_help("check the source's `uri` and `filter`, and the SQL before this stage"));
    }
    if n >= u32::MAX as usize {
        return Err(Error::data(format!("{n} interactions are more than one split takes (4294967294)"))
            .with_help("split by a filter, for instance the last two years"));
    }
    let user_ids = table.ids(USER_ID)?;
    let item_ids = table.ids(ITEM_ID)?;
    let row_ids = table.i64s(ROW_ID).map_err(|e| {
        if table.has(ROW_ID) {
            return e;
        }
        Error::data(format!("column `{ROW_ID}` is missing")).with_help(
            "the reader of sources adds it and it decides ties of time; keep it in the select list of the `sql` stage",
        )
    })?;
    let user_map = IdMap::new(&[&user_ids])?;
    let item_map = IdMap::new(&[&item_ids])?;
    let users: Vec<u32> = user_map.encode(&user_ids).into_iter().flatten().collect();
    let items: Vec<u32> = item_map.encode(&item_ids).into_iter().flatten().collect();

    let mut columns = vec![
        UInt32Chunked::from_vec(USER_ID.into(), users).into_column(),
        UInt32Chunked::from_vec(ITEM_ID.into(), items).into_column(),
        Int64Chunked::from_vec(ROW_ID.into(), row_ids).into_column(),
        UInt32Chunked::from_vec(ROW.into(), (0..n as u32).collect()).into_column(),
    ];
    let timed = table.has(TIMESTAMP);
    let time = if timed {
        // The order of integers and of Arrow timestamps of one unit is that of their numbers.
        Int64Chunked::from_vec(TIMESTAMP.into(), table.i64s(TIMESTAMP)?)
    } else {
        Int64Chunked::from_vec(TIMESTAMP.into(), vec![0; n])
    };
    columns.push(time.into_column());
    columns.push(if table.has(RATING) {
        to_polars(RATING, &table.column_as(RATING, &DataType::Float64)?)?
    } else {
        Float64Chunked::from_vec(RATING.into(), vec![0.0; n]).into_column()
    });

    // `row_id` is unique in what the reader gives; the keys after it make the result a function
    // of the set of rows even where a union of sources repeats it.
    let frame = DataFrame::new(n, columns)?
        .sort([TIMESTAMP, ROW_ID, USER_ID, ITEM_ID, RATING], SortMultipleOptions::new().with_maintain_order(true))?;
    let once = last_of(&frame, &[USER_ID, ITEM_ID, RATING, TIMESTAMP])?;
    let latest = last_of(&once, &[USER_ID, ITEM_ID])?;
    let report = CleanReport { rows: n, duplicates: n - once.height(), re_ratings: once.height() - latest.height() };

    let order: &[&str] = if timed { &[USER_ID, TIMESTAMP, ROW_ID, ITEM_ID] } else { &[USER_ID, ITEM_ID] };
    let sorted = latest.sort(order, SortMultipleOptions::new().with_maintain_order(true))?;
    let take_u32 =
        |name: &str| -> Result<Vec<u32>> { Ok(sorted.column(name)?.u32()?.rechunk().cont_slice()?.to_vec()) };
    let mut ordered = Ordered {
        rows: take_u32(ROW)?,
        users: take_u32(USER_ID)?,
        items: take_u32(ITEM_ID)?,
        timestamps: match timed {
            true => Some(sorted.column(TIMESTAMP)?.i64()?.rechunk().cont_slice()?.to_vec()),
            false => None,
        },
        user_map,
        item_map,
        report,
    };
    if !timed {
        shuffle_each_user(&mut ordered, seed);
    }
    Ok(ordered)
}

/// The last row of every group of equal `keys`, in the frame's order.
fn last_of(frame: &DataFrame, keys: &[&str]) -> Result<DataFrame> {
    let keys: Vec<String> = keys.iter().map(|&k| k.to_owned()).collect();
    Ok(frame.unique_stable(Some(&keys), UniqueKeepStrategy::Last, None)?)
}

/// Gives every user's rows (sorted by item so far) an order of their own.
fn shuffle_each_user(ordered: &mut Ordered, seed: u64) {
    for range in ordered.user_ranges() {
        let id = ordered.user_map.ids().get(ordered.users[range.start] as usize);
        let mut pairs: Vec<(u32, u32)> = range.clone().map(|r| (ordered.rows[r], ordered.items[r])).collect();
        pairs.shuffle(&mut user_rng(seed, "order without timestamps", &id, 0));
        for (r, (row, item)) in range.zip(pairs) {
            ordered.rows[r] = row;
            ordered.items[r] = item;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float32Array, Int64Array, StringArray};
    use proptest::prelude::*;

    use super::*;

    /// (user, item, rating, timestamp), `row_id` = place.
    pub(crate) fn log(rows: &[(i64, i64, f32, i64)]) -> Table {
        let n = rows.len() as i64;
        let ints =
            |f: fn(&(i64, i64, f32, i64)) -> i64| Arc::new(rows.iter().map(f).collect::<Int64Array>()) as ArrayRef;
        Table::from_columns(vec![
            (USER_ID, ints(|r| r.0), false),
            (ITEM_ID, ints(|r| r.1), false),
            (RATING, Arc::new(rows.iter().map(|r| r.2).collect::<Float32Array>()), false),
            (TIMESTAMP, ints(|r| r.3), false),
            (ROW_ID, Arc::new((0..n).collect::<Int64Array>()), false),
        ])
        .unwrap()
    }

    /// The same without the given columns.
    pub(crate) fn without(table: &Table, drop: &[&str]) -> Table {
        let batch = table.to_batch().unwrap();
        let keep: Vec<usize> =
            (0..batch.num_columns()).filter(|&c| !drop.contains(&batch.schema().field(c).name().as_str())).collect();
        Table::from_batch(batch.project(&keep).unwrap())
    }

    #[test]
    fn orders_by_time_then_row() {
        let ordered = clean(&log(&[(2, 10, 1., 5), (1, 10, 1., 9), (1, 11, 1., 3), (2, 12, 1., 5), (1, 13, 1., 3)]), 0);
        let ordered = ordered.unwrap();
        assert_eq!(ordered.rows, [2, 4, 1, 0, 3]);
        assert_eq!(ordered.users, [0, 0, 0, 1, 1]);
        assert_eq!(ordered.user_ranges(), [0..3, 3..5]);
    }

    #[test]
    fn ties_go_to_row_id_not_to_the_order_of_rows() {
        let table = log(&[(1, 10, 1., 5), (1, 11, 1., 5), (1, 12, 1., 5)]).to_batch().unwrap();
        let mut columns = table.columns().to_vec();
        columns[4] = Arc::new(Int64Array::from(vec![30, 10, 20]));
        let table = Table::from_batch(arrow::array::RecordBatch::try_new(table.schema(), columns).unwrap());
        assert_eq!(clean(&table, 0).unwrap().rows, [1, 2, 0]);
    }

    #[test]
    fn duplicates_and_re_ratings_are_told_apart() {
        let ordered = clean(
            &log(&[
                (1, 10, 4., 5), // duplicate of row 2
                (1, 11, 3., 1),
                (1, 10, 4., 5),
                (1, 11, 5., 9), // re-rating of row 1, wins
                (1, 11, 2., 4), // re-rating, loses although its row is later
                (2, 10, 4., 5), // another user: no duplicate
            ]),
            0,
        )
        .unwrap();
        assert_eq!(ordered.report, CleanReport { rows: 6, duplicates: 1, re_ratings: 2 });
        assert_eq!(ordered.rows, [2, 3, 5]);
    }

    #[test]
    fn equal_times_of_re_ratings_go_to_the_later_row() {
        let ordered = clean(&log(&[(1, 10, 4., 5), (1, 10, 2., 5)]), 0).unwrap();
        assert_eq!(ordered.report, CleanReport { rows: 2, duplicates: 0, re_ratings: 1 });
        assert_eq!(ordered.rows, [1]);
    }

    #[test]
    fn without_ratings_equal_times_are_duplicates() {
        let table = without(&log(&[(1, 10, 4., 5), (1, 10, 2., 5), (1, 10, 2., 6)]), &[RATING]);
        assert_eq!(clean(&table, 0).unwrap().report, CleanReport { rows: 3, duplicates: 1, re_ratings: 1 });
    }

    #[test]
    fn without_timestamps_the_order_is_seeded_per_user() {
        let rows: Vec<(i64, i64, f32, i64)> = (0..40).map(|r| (r % 2, 100 + r, 1., r)).collect();
        let items = |rows: &[(i64, i64, f32, i64)], seed| -> Vec<Vec<u32>> {
            let ordered = clean(&without(&log(rows), &[TIMESTAMP]), seed).unwrap();
            assert!(ordered.timestamps.is_none());
            ordered.user_ranges().into_iter().map(|r| ordered.items[r].to_vec()).collect()
        };
        let one = items(&rows, 1);
        assert_eq!(one, items(&rows, 1));
        assert_ne!(one, items(&rows, 2));
        // Neither the order of rows nor another user's rows change a user's order.
        let mut reversed = rows.clone();
        reversed.reverse();
        assert_eq!(one, items(&reversed, 1));
        let mut more = rows.clone();
        more.extend((0..5).map(|r| (9, 100 + r, 1., r)));
        assert_eq!(one[..], items(&more, 1)[..2]);
    }

    #[test]
    fn string_ids_sort_by_bytes() {
        let n = 3;
        let table = Table::from_columns(vec![
            (USER_ID, Arc::new(StringArray::from(vec!["u10", "u9", "Ü"])), false),
            (ITEM_ID, Arc::new(StringArray::from(vec!["a", "a", "b"])), false),
            (ROW_ID, Arc::new((0..n).collect::<Int64Array>()), false),
        ])
        .unwrap();
        assert_eq!(clean(&table, 0).unwrap().rows, [0, 1, 2]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let table = log(&[(1, 10, 4., 5)]);
        for column in [USER_ID, ITEM_ID, ROW_ID] {
            let error = clean(&without(&table, &[column]), 0).unwrap_err();
            assert_eq!(error.fault.exit_code(), 65);
            assert!(error.message.contains(&format!("`{column}`")) && error.help.is_some(), "{error}");
        }
        assert_eq!(clean(&log(&[]), 0).unwrap_err().fault.exit_code(), 65);
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_reading_of_the_rules(
            rows in prop::collection::vec((0i64..4, 0i64..5, 1u8..3, 0i64..4), 1..60)
        ) {
            let rows: Vec<(i64, i64, f32, i64)> = rows.into_iter().map(|(u, i, r, t)| (u, i, r as f32, t)).collect();
            let ordered = clean(&log(&rows), 0).unwrap();
            let mut expected: Vec<usize> = (0..rows.len())
                .filter(|&a| {
                    (0..rows.len()).all(|b| {
                        (rows[b].0, rows[b].1) != (rows[a].0, rows[a].1) || (rows[b].3, b) <= (rows[a].3, a)
                    })
                })
                .collect();
            expected.sort_by_key(|&a| (rows[a].0, rows[a].3, a));
            prop_assert_eq!(ordered.rows.iter().map(|&r| r as usize).collect::<Vec<_>>(), expected);
            let mut distinct: Vec<_> = rows.iter().map(|r| (r.0, r.1, r.2 as u8, r.3)).collect();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(ordered.report.duplicates, rows.len() - distinct.len());
            prop_assert_eq!(ordered.report.re_ratings, distinct.len() - ordered.rows.len());
        }
    }
}
