//! Tables -> users, items and titles by dense index.
//!
//! In: the input tables. Out: [`Cases`]: whom to write for, and what is known of each.

use crate::columns::{ITEM_ID, NEIGHBOUR_ID, POSITION, RANK, REC_RANK, TITLE, USER_ID};
use crate::error::Result;
use crate::interactions::{Histories, IdMap};
use crate::prompts::clean_title;
use crate::tables::{IdColumn, Table};

/// The inputs in memory.
pub(super) struct Tables {
    pub(super) shortlist: Table,
    pub(super) history: Table,
    pub(super) items: Table,
    pub(super) neighbours: Option<Table>,
    pub(super) neighbour_history: Option<Table>,
    pub(super) users: Option<Table>,
}

/// All users with their items and titles, by dense index.
pub(super) struct Cases {
    pub(super) users: IdMap,
    pub(super) items: IdMap,
    /// `[items]`: the clean title, where there is one.
    pub(super) titles: Vec<Option<String>>,
    /// Users to write for, ascending.
    pub(super) asked: Vec<u32>,
    /// Best first.
    pub(super) shortlists: Histories,
    /// Oldest first.
    pub(super) histories: Histories,
    pub(super) neighbour_histories: Option<Histories>,
    /// Most similar first.
    pub(super) neighbours: Option<Histories>,
    /// Items of the item table.
    pub(super) known: Vec<bool>,
    /// Rows of the item table whose item an earlier row has.
    pub(super) repeated_items: usize,
}

impl Cases {
    pub(super) fn new(tables: &Tables, max_title_chars: usize) -> Result<Self> {
        let shortlist = (tables.shortlist.ids(USER_ID)?, tables.shortlist.ids(ITEM_ID)?);
        let history = (tables.history.ids(USER_ID)?, tables.history.ids(ITEM_ID)?);
        let theirs = match &tables.neighbour_history {
            Some(t) => Some((t.ids(USER_ID)?, t.ids(ITEM_ID)?)),
            None => None,
        };
        let pairs = match &tables.neighbours {
            Some(t) => Some((t.ids(USER_ID)?, t.ids(NEIGHBOUR_ID)?)),
            None => None,
        };
        let only = tables.users.as_ref().map(|t| t.ids(USER_ID)).transpose()?;
        let item_ids = tables.items.ids(ITEM_ID)?;

        let (mut all_users, mut all_items) =
            (vec![&shortlist.0, &history.0], vec![&shortlist.1, &history.1, &item_ids]);
        if let Some((users, items)) = &theirs {
            all_users.push(users);
            all_items.push(items);
        }
        if let Some((users, neighbours)) = &pairs {
            all_users.extend([users, neighbours]);
        }
        all_users.extend(&only);
        let users = IdMap::new(&all_users).map_err(|e| e.at(format!("column `{USER_ID}`")))?;
        let items = IdMap::new(&all_items).map_err(|e| e.at(format!("column `{ITEM_ID}`")))?;

        let mut titles = vec![None; items.len()];
        let mut known = vec![false; items.len()];
        let mut repeated_items = 0;
        for (item, title) in items.encode(&item_ids).into_iter().flatten().zip(tables.items.strings(TITLE)?) {
            let item = item as usize;
            repeated_items += usize::from(known[item]);
            if !std::mem::replace(&mut known[item], true) {
                titles[item] = title.and_then(|t| clean_title(&t, max_title_chars));
            }
        }

        let grouped = |left: Vec<Option<u32>>, right: Vec<Option<u32>>, order: Vec<i32>| {
            let mut rows: Vec<(u32, i32, u32)> = left
                .into_iter()
                .flatten()
                .zip(order)
                .zip(right.into_iter().flatten())
                .map(|((l, o), r)| (l, o, r))
                .collect();
            rows.sort_unstable();
            let pairs: Vec<(u32, u32)> = rows.into_iter().map(|(l, _, r)| (l, r)).collect();
            Histories::from_pairs(users.len(), &pairs)
        };
        let by_position = |table: &Table, ids: &(IdColumn, IdColumn)| -> Result<Histories> {
            Ok(grouped(users.encode(&ids.0), items.encode(&ids.1), table.i32s(POSITION)?))
        };
        let shortlists =
            grouped(users.encode(&shortlist.0), items.encode(&shortlist.1), tables.shortlist.i32s(REC_RANK)?);
        let histories = by_position(&tables.history, &history)?;
        let neighbour_histories = match (&tables.neighbour_history, &theirs) {
            (Some(table), Some(ids)) => Some(by_position(table, ids)?),
            _ => None,
        };
        let neighbours = match (&tables.neighbours, &pairs) {
            (Some(table), Some((of, who))) => Some(grouped(users.encode(of), users.encode(who), table.i32s(RANK)?)),
            _ => None,
        };
        let wanted = only.map(|ids| {
            let mut wanted = vec![false; users.len()];
            users.encode(&ids).into_iter().flatten().for_each(|u| wanted[u as usize] = true);
            wanted
        });
        let asked = (0..users.len() as u32)
            .filter(|&u| !shortlists.of(u as usize).is_empty())
            .filter(|&u| wanted.as_ref().is_none_or(|w| w[u as usize]))
            .collect();
        Ok(Cases {
            users,
            items,
            titles,
            asked,
            shortlists,
            histories,
            neighbour_histories,
            neighbours,
            known,
            repeated_items,
        })
    }

    /// The titles of those items that have one.
    pub(super) fn titled(&self, items: &[u32]) -> Vec<&str> {
        items.iter().filter_map(|&item| self.titles[item as usize].as_deref()).collect()
    }

    /// The history of the most similar user who has a titled item in it; empty where there is none.
    /// It depends on nothing of `user` but the neighbours that the recommender's embeddings gave.
    pub(super) fn similar(&self, user: u32) -> Vec<&str> {
        let Some(neighbours) = &self.neighbours else { return Vec::new() };
        let histories = self.neighbour_histories.as_ref().unwrap_or(&self.histories);
        let of = neighbours.of(user as usize).iter().filter(|&&neighbour| neighbour != user);
        of.map(|&neighbour| self.titled(histories.of(neighbour as usize))).find(|t| !t.is_empty()).unwrap_or_default()
    }
}
