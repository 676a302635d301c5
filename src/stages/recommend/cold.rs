//! New items on a recommender's shortlists: the last places of each list go to items that nobody has an interaction with.
//!
//! In: the recommender's shortlists, those of what can score new items, what users have seen. Out: the shortlists with the
//! new items' places.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{Float32Array, Int32Array, UInt64Array};
use arrow::compute::{concat, take};

use crate::columns::{ITEM_ID, REC_RANK, REC_SCORE, USER_ID};
use crate::error::{Error, Result};
use crate::tables::{Id, Table};

/// Rows by user, best first.
fn lists(table: &Table) -> Result<BTreeMap<Id, Vec<usize>>> {
    let (users, ranks) = (table.ids(USER_ID)?, table.i32s(REC_RANK)?);
    let mut lists: BTreeMap<Id, Vec<usize>> = BTreeMap::new();
    for row in 0..users.len() {
        lists.entry(users.get(row)).or_default().push(row);
    }
    lists.values_mut().for_each(|rows| rows.sort_by_key(|&row| ranks[row]));
    Ok(lists)
}

/// The shortlists of `table`, `k` items at most each, with up to `places` new items of `cold` behind the others; and how many
/// places these took.
///
/// # Errors
/// Ids of another type (exit 65).
pub(super) fn entered(table: &Table, cold: &Table, history: &Table, k: usize, places: usize) -> Result<(Table, usize)> {
    let at = |e: Error| e.at("input `cold`");
    let (new_users, new_items) = (cold.ids(USER_ID).map_err(at)?, cold.ids(ITEM_ID).map_err(at)?);
    let (users, items) = (table.ids(USER_ID)?, table.ids(ITEM_ID)?);
    if [(&new_users, &users), (&new_items, &items)].iter().any(|(a, b)| a.data_type() != b.data_type() && !a.is_empty())
    {
        return Err(at(Error::data("its ids are of another type than the recommender's")
            .with_help("cast one of them in a `sql` stage")));
    }
    let seen = history.ids(ITEM_ID)?;
    let seen: HashSet<Id> = (0..seen.len()).map(|row| seen.get(row)).collect();
    let candidates = lists(cold)?;

    // Rows of the recommender's table, and behind them those of `cold`.
    let (mut rows, mut ranks, mut entered) = (Vec::new(), Vec::new(), 0);
    for (user, own) in lists(table)? {
        let mine: HashSet<Id> = own.iter().map(|&row| items.get(row)).collect();
        let new = candidates.get(&user).map_or(&[][..], Vec::as_slice).iter().copied();
        let new: Vec<usize> = new
            .filter(|&row| !seen.contains(&new_items.get(row)) && !mine.contains(&new_items.get(row)))
            .take(places)
            .collect();
        let kept = own.len().min(k - new.len());
        entered += new.len();
        rows.extend(own[..kept].iter().map(|&row| row as u64));
        rows.extend(new.iter().map(|&row| (users.len() + row) as u64));
        ranks.extend(1..=(kept + new.len()) as i32);
    }
    let rows = UInt64Array::from(rows);
    let joined = |name: &str| -> Result<_> {
        let (a, b) = match name {
            USER_ID => (users.to_array(), new_users.to_array()),
            _ => (items.to_array(), new_items.to_array()),
        };
        let both = if b.is_empty() { a } else { concat(&[&a, &b])? };
        Ok(take(&both, &rows, None)?)
    };
    let scores = [table.f32s(REC_SCORE)?, cold.f32s(REC_SCORE).map_err(at)?].concat();
    let scores = take(&Float32Array::from(scores), &rows, None)?;
    let with_new = Table::from_columns(vec![
        (USER_ID, joined(USER_ID)?, false),
        (ITEM_ID, joined(ITEM_ID)?, false),
        (REC_RANK, Arc::new(Int32Array::from(ranks)), false),
        (REC_SCORE, scores, false),
    ])?;
    Ok((with_new, entered))
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int64Array};

    use super::*;

    fn table(rows: &[(i64, i64, i32, f32)]) -> Table {
        let ints = |of: fn(&(i64, i64, i32, f32)) -> i64| -> ArrayRef {
            Arc::new(Int64Array::from_iter_values(rows.iter().map(of)))
        };
        Table::from_columns(vec![
            (USER_ID, ints(|r| r.0), false),
            (ITEM_ID, ints(|r| r.1), false),
            (REC_RANK, Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.2))), false),
            (REC_SCORE, Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.3))), false),
        ])
        .unwrap()
    }

    #[test]
    fn new_items_take_the_last_places_and_known_ones_none() {
        let own = table(&[(1, 10, 1, 9.), (1, 11, 2, 8.), (1, 12, 3, 7.), (2, 10, 1, 9.)]);
        // 11 is known to someone; 90 is the best new one of user 1.
        let cold = table(&[(1, 11, 1, 5.), (1, 91, 3, 3.), (1, 90, 2, 4.), (3, 90, 1, 1.)]);
        let history = table(&[(9, 11, 1, 0.), (9, 10, 1, 0.), (9, 12, 1, 0.)]);
        let (with_new, entered) = entered(&own, &cold, &history, 3, 1).unwrap();
        assert_eq!(entered, 1);
        assert_eq!(with_new.i64s(ITEM_ID).unwrap(), [10, 11, 90, 10]);
        assert_eq!(with_new.i32s(REC_RANK).unwrap(), [1, 2, 3, 1]);
        assert_eq!(with_new.f32s(REC_SCORE).unwrap(), [9., 8., 4., 9.]);
    }
}
