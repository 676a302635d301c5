//! Every user's shortlist, with the LLM's places in it: what fusion, calibration and tests
//! of both start from.
//!
//! In: the table of shortlists and, where an LLM was asked, the table of its ranks. Out:
//! [`Shortlists`], the candidates of each user in the recommender's order.

use std::collections::HashMap;

use crate::columns::{ITEM_ID, LLM_RANK, REC_RANK, USER_ID};
use crate::error::{Error, Result};
use crate::fusion::utility::{self, Candidate, Fused};
use crate::interactions::IdMap;
use crate::tables::{IdColumn, Table};

/// One candidate and the rows that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The item and its places.
    pub candidate: Candidate,
    /// Its row in the table of shortlists, 0-based.
    pub row: usize,
    /// Its row in the table of the LLM's ranks; `None` where the LLM was not shown it.
    pub llm_row: Option<usize>,
}

/// The shortlists of all users: users in order of their ids, each list in the recommender's order.
#[derive(Clone, Debug)]
pub struct Shortlists {
    users: IdMap,
    items: IdMap,
    offsets: Vec<usize>,
    entries: Vec<Entry>,
    llm_rows_outside: usize,
}

impl Shortlists {
    /// Columns that [`Shortlists::from_tables`] reads of the shortlists.
    pub const COLUMNS: [&'static str; 3] = [USER_ID, ITEM_ID, REC_RANK];
    /// Columns that it reads of the LLM's ranks.
    pub const LLM_COLUMNS: [&'static str; 3] = [USER_ID, ITEM_ID, LLM_RANK];

    /// From a table with `user_id`, `item_id`, `rec_rank`, and one with `user_id`, `item_id`,
    /// `llm_rank`.
    ///
    /// A list is ordered by (`rec_rank`, item index) and its places count from 1 without gaps,
    /// so that items may have been filtered out since it was made. Ranks of the LLM for items
    /// that are not on the user's list are left out and counted. Errors (exit 65): an item
    /// twice on a list or twice among a user's LLM ranks; ids of another type.
    pub fn from_tables(shortlist: &Table, ranks: Option<&Table>) -> Result<Shortlists> {
        let (user_ids, item_ids) = (shortlist.ids(USER_ID)?, shortlist.ids(ITEM_ID)?);
        let (users, items) = (IdMap::new(&[&user_ids])?, IdMap::new(&[&item_ids])?);
        let rec_ranks = shortlist.i32s(REC_RANK)?;
        let row_users = encode(&users, &user_ids, USER_ID)?;
        let row_items = encode(&items, &item_ids, ITEM_ID)?;
        let key = |row: usize| (row_users[row].unwrap_or(u32::MAX), row_items[row].unwrap_or(u32::MAX));

        let llm = match ranks {
            Some(table) => LlmRanks::from_table(table, &users, &items)?,
            None => LlmRanks::default(),
        };

        let mut order: Vec<usize> = (0..shortlist.num_rows()).collect();
        order.sort_by_key(|&row| (key(row).0, rec_ranks[row], key(row).1));

        let mut offsets = vec![0usize; users.len() + 1];
        let mut entries = Vec::with_capacity(order.len());
        let mut found = 0usize;
        for rows in order.chunk_by(|&a, &b| key(a).0 == key(b).0) {
            refuse_repeats(rows.iter().map(|&r| (key(r).1, r)).collect(), &user_ids, &item_ids)?;
            let shown: Vec<Option<(i32, usize)>> = rows.iter().map(|&r| llm.of.get(&key(r)).copied()).collect();
            let ranks: Vec<Option<i32>> = shown.iter().map(|s| s.map(|(rank, _)| rank)).collect();
            found += shown.iter().flatten().count();
            for (place, llm_place) in utility::llm_places(&ranks).into_iter().enumerate() {
                let candidate = Candidate { item: key(rows[place]).1, rec_place: place as u32 + 1, llm_place };
                entries.push(Entry { candidate, row: rows[place], llm_row: shown[place].map(|(_, row)| row) });
            }
            offsets[key(rows[0]).0 as usize + 1] = rows.len();
        }
        for u in 0..users.len() {
            offsets[u + 1] += offsets[u];
        }
        Ok(Shortlists { users, items, offsets, entries, llm_rows_outside: llm.rows - found })
    }

    /// The users that have a list; the index of a user is its place here.
    pub fn users(&self) -> &IdMap {
        &self.users
    }

    /// The items on any list.
    pub fn items(&self) -> &IdMap {
        &self.items
    }

    /// A user's list in the recommender's order.
    pub fn of(&self, user: usize) -> &[Entry] {
        &self.entries[self.offsets[user]..self.offsets[user + 1]]
    }

    /// Number of candidates of all users.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no user has a candidate.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the LLM ranked any of the user's items.
    pub fn asked(&self, user: usize) -> bool {
        self.of(user).iter().any(|e| e.llm_row.is_some())
    }

    /// How many LLM ranks belong to no candidate.
    pub fn llm_rows_outside(&self) -> usize {
        self.llm_rows_outside
    }

    /// The fused order of a user's list: [`utility::fuse`], the indices into [`Shortlists::of`].
    pub fn fuse(&self, user: usize, alpha: f64, c: f64) -> Vec<Fused> {
        let candidates: Vec<Candidate> = self.of(user).iter().map(|e| e.candidate).collect();
        utility::fuse(&candidates, alpha, c)
    }
}

/// The LLM's ranks: (user, item) -> (rank, row).
#[derive(Default)]
struct LlmRanks {
    of: HashMap<(u32, u32), (i32, usize)>,
    rows: usize,
}

impl LlmRanks {
    fn from_table(table: &Table, users: &IdMap, items: &IdMap) -> Result<LlmRanks> {
        let (user_ids, item_ids) = (table.ids(USER_ID)?, table.ids(ITEM_ID)?);
        let ranks = table.i32s(LLM_RANK)?;
        let row_users = encode(users, &user_ids, USER_ID)?;
        let row_items = encode(items, &item_ids, ITEM_ID)?;
        let mut of = HashMap::with_capacity(ranks.len());
        for (row, &rank) in ranks.iter().enumerate() {
            if let (Some(user), Some(item)) = (row_users[row], row_items[row])
                && of.insert((user, item), (rank, row)).is_some()
            {
                return Err(repeated(&user_ids, &item_ids, row, LLM_RANK));
            }
        }
        Ok(LlmRanks { of, rows: ranks.len() })
    }
}

/// Indices of a column of ids; an error (exit 65) where it is of another type than the map's,
/// which would otherwise look like ids that nobody knows.
pub(crate) fn encode(map: &IdMap, column: &IdColumn, name: &str) -> Result<Vec<Option<u32>>> {
    let (known, given) = (map.ids().data_type(), column.data_type());
    if known != given && !column.is_empty() && !map.is_empty() {
        return Err(Error::data(format!("column `{name}` is {known} in one input and {given} in another"))
            .with_help("cast one of them in a `sql` stage"));
    }
    Ok(map.encode(column))
}

fn refuse_repeats(mut items: Vec<(u32, usize)>, user_ids: &IdColumn, item_ids: &IdColumn) -> Result<()> {
    items.sort_unstable();
    match items.windows(2).find(|w| w[0].0 == w[1].0) {
        Some(w) => Err(repeated(user_ids, item_ids, w[1].1, REC_RANK)),
        None => Ok(()),
    }
}

fn repeated(user_ids: &IdColumn, item_ids: &IdColumn, row: usize, rank: &str) -> Error {
    Error::data(format!(
        "user `{}` has item `{}` twice (again in row {row}, 0-based) in the table with `{rank}`",
        user_ids.get(row),
        item_ids.get(row)
    ))
    .with_help("a list has an item once; drop the repeats in a `sql` stage")
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Int32Array, Int64Array, StringArray};
    use std::sync::Arc;

    fn ranks(column: &str, rows: &[(i64, &str, i32)]) -> Table {
        Table::from_columns(vec![
            (USER_ID, Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.0))) as ArrayRef, false),
            (ITEM_ID, Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.1))), false),
            (column, Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.2))), false),
        ])
        .unwrap()
    }

    fn items(lists: &Shortlists, user: usize) -> Vec<(String, u32, Option<u32>)> {
        let name = |e: &Entry| lists.items().ids().get(e.candidate.item as usize).to_string();
        lists.of(user).iter().map(|e| (name(e), e.candidate.rec_place, e.candidate.llm_place)).collect()
    }

    #[test]
    fn rows_in_any_order_become_lists_in_the_recommenders_order() {
        let rec = ranks(REC_RANK, &[(7, "b", 2), (3, "x", 1), (7, "a", 1), (7, "c", 3)]);
        let llm = ranks(LLM_RANK, &[(7, "c", 1), (7, "a", 2)]);
        let lists = Shortlists::from_tables(&rec, Some(&llm)).unwrap();
        assert_eq!(lists.users().ids(), &IdColumn::Int(vec![3, 7]));
        assert_eq!(items(&lists, 0), [("x".to_owned(), 1, None)]);
        let want = [("a", 1, Some(3)), ("b", 2, None), ("c", 3, Some(1))];
        assert_eq!(items(&lists, 1), want.map(|(i, r, l)| (i.to_owned(), r, l)));
        assert_eq!(
            lists.of(1)[2],
            Entry { candidate: Candidate { item: 2, rec_place: 3, llm_place: Some(1) }, row: 3, llm_row: Some(0) }
        );
        assert!(!lists.asked(0) && lists.asked(1));
        assert_eq!(lists.len(), 4);
    }

    #[test]
    fn places_close_the_gaps_that_a_filter_left_and_ties_go_by_item() {
        let lists = Shortlists::from_tables(&ranks(REC_RANK, &[(1, "d", 9), (1, "c", 4), (1, "b", 4)]), None).unwrap();
        assert_eq!(items(&lists, 0).iter().map(|x| x.0.as_str()).collect::<Vec<_>>(), ["b", "c", "d"]);
        assert_eq!(items(&lists, 0).iter().map(|x| x.1).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn what_the_llm_ranked_beyond_the_lists_is_counted_and_left_out() {
        let rec = ranks(REC_RANK, &[(1, "a", 1), (1, "b", 2)]);
        let llm = ranks(LLM_RANK, &[(1, "z", 1), (1, "b", 2), (1, "a", 3), (2, "a", 1)]);
        let lists = Shortlists::from_tables(&rec, Some(&llm)).unwrap();
        assert_eq!(lists.llm_rows_outside(), 2);
        assert_eq!(items(&lists, 0), [("a".to_owned(), 1, Some(2)), ("b".to_owned(), 2, Some(1))]);
    }

    #[test]
    fn repeats_and_mixed_ids_are_refused() {
        let good = ranks(REC_RANK, &[(1, "a", 1), (1, "b", 2)]);
        let twice = ranks(REC_RANK, &[(1, "a", 1), (2, "a", 1), (1, "a", 2)]);
        let e = Shortlists::from_tables(&twice, None).unwrap_err();
        assert!(e.to_string().contains("user `1` has item `a` twice"), "{e}");
        assert_eq!(e.fault.exit_code(), 65);
        let e = Shortlists::from_tables(&good, Some(&ranks(LLM_RANK, &[(1, "b", 1), (1, "b", 2)]))).unwrap_err();
        assert!(e.to_string().contains("llm_rank"), "{e}");
        let text_users = Table::from_columns(vec![
            (USER_ID, Arc::new(StringArray::from(vec!["1"])) as ArrayRef, false),
            (ITEM_ID, Arc::new(StringArray::from(vec!["b"])), false),
            (LLM_RANK, Arc::new(Int32Array::from(vec![1])), false),
        ])
        .unwrap();
        let e = Shortlists::from_tables(&good, Some(&text_users)).unwrap_err();
        assert!(e.to_string().contains("`user_id` is Int64 in one input and Utf8 in another"), "{e}");
    }

    #[test]
    fn an_empty_table_has_no_lists() {
        let lists = Shortlists::from_tables(&ranks(REC_RANK, &[]), None).unwrap();
        assert!(lists.is_empty() && lists.users().is_empty());
    }
}
