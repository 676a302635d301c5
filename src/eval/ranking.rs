//! Where the held-out items are in a ranked table.
//!
//! In: a table with users, items and a rank, in any order of rows, and the held-out pairs.
//! Out: per user the places of its held-out items, and down to which place its list is
//! complete.

use crate::columns::{ITEM_ID, USER_ID};
use crate::error::{Error, Result};
use crate::eval::metrics::Found;
use crate::interactions::IdMap;
use crate::tables::{Id, Table};

/// The users and items of a ranked table and of the held-out pairs, as indices; rows by user.
#[derive(Clone, Debug)]
pub struct RankedTable {
    users: IdMap,
    items: Vec<u32>,
    rows: Vec<Vec<usize>>,
    held_out: Vec<Vec<u32>>,
}

/// One user's list in one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRanking {
    /// Where the held-out items are.
    pub found: Found,
    /// Up to this place no item of the order is missing in the table; `usize::MAX` when none is.
    pub complete_to: usize,
}

impl RankedTable {
    /// From a table with `user_id` and `item_id`, and the held-out pairs in the same columns
    /// (exact repeats count once). Errors (exit 65): an item twice on a user's list, ids of
    /// different types.
    pub fn new(table: &Table, held_out: &Table) -> Result<RankedTable> {
        let at = |e: Error| e.at("ranked table");
        let of = |e: Error| e.at("held-out items");
        let (user_ids, item_ids) = (table.ids(USER_ID).map_err(at)?, table.ids(ITEM_ID).map_err(at)?);
        let (out_users, out_items) = (held_out.ids(USER_ID).map_err(of)?, held_out.ids(ITEM_ID).map_err(of)?);
        let users = IdMap::new(&[&user_ids, &out_users]).map_err(|e| e.at("column `user_id`"))?;
        let item_map = IdMap::new(&[&item_ids, &out_items]).map_err(|e| e.at("column `item_id`"))?;
        let known = |index: Option<u32>| index.ok_or_else(|| Error::internal("an id is missing from its own map"));

        let items = item_map.encode(&item_ids).into_iter().map(known).collect::<Result<Vec<u32>>>()?;
        let mut rows = vec![Vec::new(); users.len()];
        for (row, user) in users.encode(&user_ids).into_iter().enumerate() {
            rows[known(user)? as usize].push(row);
        }
        for (user, list) in rows.iter().enumerate() {
            let mut seen: Vec<u32> = list.iter().map(|&r| items[r]).collect();
            seen.sort_unstable();
            if let Some(twice) = seen.windows(2).find(|w| w[0] == w[1]) {
                return Err(Error::data(format!(
                    "ranked table: user `{}` has item `{}` twice",
                    users.ids().get(user),
                    item_map.ids().get(twice[0] as usize)
                ))
                .with_help("a list has an item once; drop the repeats in a `sql` stage"));
            }
        }
        let mut pairs = vec![Vec::new(); users.len()];
        for (user, item) in users.encode(&out_users).into_iter().zip(item_map.encode(&out_items)) {
            pairs[known(user)? as usize].push(known(item)?);
        }
        for list in &mut pairs {
            list.sort_unstable();
            list.dedup();
        }
        Ok(RankedTable { users, items, rows, held_out: pairs })
    }

    /// Number of users, of the table or with a held-out item.
    pub fn n_users(&self) -> usize {
        self.rows.len()
    }

    /// The id of a user.
    pub fn user(&self, user: usize) -> Id {
        self.users.ids().get(user)
    }

    /// The rows of a user.
    pub fn rows(&self, user: usize) -> &[usize] {
        &self.rows[user]
    }

    /// The users that are evaluated: those with a held-out item, with a list or without one.
    pub fn evaluated(&self) -> Vec<usize> {
        (0..self.n_users()).filter(|&u| !self.held_out[u].is_empty()).collect()
    }

    /// Finds a user's held-out items in the order of `rank`, the 1-based rank per row.
    ///
    /// Equal ranks are ordered by the item's place among the sorted ids; an item's place is the
    /// number of rows up to it. A place before which a rank is missing (1, 2, 4) has been
    /// filtered out of the table: it is not known what stood there, and
    /// [`UserRanking::complete_to`] says so.
    pub fn find(&self, user: usize, rank: impl Fn(usize) -> i64) -> UserRanking {
        let mut order: Vec<(i64, u32)> = self.rows[user].iter().map(|&r| (rank(r), self.items[r])).collect();
        order.sort_unstable();
        let complete_to = order.iter().enumerate().find(|(i, (rank, _))| *rank > *i as i64 + 1);
        let places = order.iter().enumerate().filter(|(_, (_, item))| self.held_out[user].binary_search(item).is_ok());
        UserRanking {
            found: Found { places: places.map(|(i, _)| i + 1).collect(), held_out: self.held_out[user].len() },
            complete_to: complete_to.map_or(usize::MAX, |(i, _)| i),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Int64Array, StringArray};
    use std::sync::Arc;

    fn pairs(rows: &[(i64, &str)]) -> Table {
        Table::from_columns(vec![
            (USER_ID, Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.0))) as ArrayRef, false),
            (ITEM_ID, Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1))), false),
        ])
        .unwrap()
    }

    fn find(list: &[(&str, i64)], held_out: &[&str]) -> UserRanking {
        let table = pairs(&list.iter().map(|x| (5, x.0)).collect::<Vec<_>>());
        let out = pairs(&held_out.iter().map(|&x| (5, x)).collect::<Vec<_>>());
        RankedTable::new(&table, &out).unwrap().find(0, |row| list[row].1)
    }

    fn ranking(places: &[usize], held_out: usize, complete_to: usize) -> UserRanking {
        UserRanking { found: Found { places: places.to_vec(), held_out }, complete_to }
    }

    #[test]
    fn places_by_rank_whatever_the_order_of_rows() {
        assert_eq!(find(&[("c", 3), ("a", 1), ("b", 2)], &["b"]), ranking(&[2], 1, usize::MAX));
        assert_eq!(find(&[("c", 3), ("a", 1), ("b", 2)], &["z"]), ranking(&[], 1, usize::MAX));
        assert_eq!(find(&[("c", 3), ("a", 1), ("b", 2)], &["c", "a", "q", "a"]), ranking(&[1, 3], 3, usize::MAX));
    }

    #[test]
    fn equal_ranks_go_by_item() {
        // SQL's rank(): b and c share 2, d is 4. c is third, d fourth, and nothing is missing.
        let list = [("d", 4), ("c", 2), ("b", 2), ("x", 1)];
        assert_eq!(find(&list, &["c"]), ranking(&[3], 1, usize::MAX));
        assert_eq!(find(&list, &["b"]), ranking(&[2], 1, usize::MAX));
        assert_eq!(find(&list, &["d"]), ranking(&[4], 1, usize::MAX));
    }

    #[test]
    fn a_missing_rank_ends_what_is_known() {
        assert_eq!(find(&[("a", 1), ("b", 2), ("d", 4)], &["d"]).complete_to, 2);
        assert_eq!(find(&[("a", 2)], &["a"]).complete_to, 0);
        assert_eq!(find(&[], &["a"]), ranking(&[], 1, usize::MAX));
    }

    #[test]
    fn users_with_a_held_out_item_are_evaluated() {
        let t = RankedTable::new(&pairs(&[(1, "a"), (2, "a")]), &pairs(&[(2, "b"), (3, "a")])).unwrap();
        let ids: Vec<String> = t.evaluated().into_iter().map(|u| t.user(u).to_string()).collect();
        assert_eq!(ids, ["2", "3"]);
        assert_eq!((t.rows(1), t.rows(2).len()), (&[1usize][..], 0));
    }

    #[test]
    fn an_item_twice_is_refused() {
        let e = RankedTable::new(&pairs(&[(1, "a"), (1, "a")]), &pairs(&[(1, "b")])).unwrap_err();
        assert!(e.to_string().contains("user `1` has item `a` twice"), "{e}");
        let ids = Table::from_columns(vec![
            (USER_ID, Arc::new(StringArray::from(vec!["1"])) as ArrayRef, false),
            (ITEM_ID, Arc::new(StringArray::from(vec!["a"])), false),
        ]);
        let e = RankedTable::new(&ids.unwrap(), &pairs(&[(1, "b")])).unwrap_err();
        assert_eq!(e.fault.exit_code(), 65);
    }
}
