//! Tables -> pairs, rated histories and titles by dense index.
//!
//! In: the input tables. Out: [`Cases`]: what to ask, and what is known of each user.

use std::collections::HashMap;

use crate::columns::{ITEM_ID, NEIGHBOUR_ID, POSITION, PREDICTED_RATING, RANK, TITLE, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::{Histories, IdMap};
use crate::prompts::{Line, clean_title, rating_text};
use crate::stages::train::data::ratings;
use crate::tables::Table;

/// The inputs in memory.
pub(super) struct Tables {
    pub(super) pairs: Table,
    pub(super) history: Table,
    pub(super) items: Table,
    pub(super) neighbours: Option<Table>,
    pub(super) predictions: Option<Table>,
}

/// What to ask, and what is known, by dense index.
pub(super) struct Cases {
    pub(super) users: IdMap,
    pub(super) items: IdMap,
    /// User and item, sorted, each once.
    pub(super) pairs: Vec<(u32, u32)>,
    /// Rows of `pairs` that an earlier row has.
    pub(super) repeats: usize,
    /// `[users]`: items, oldest first.
    pub(super) histories: Histories,
    /// Least and greatest rating of the history, as text.
    pub(super) range: (String, String),
    /// `[interactions]` beside the items of `histories`.
    ratings: Vec<f32>,
    /// `[items]`: the clean title, where there is one.
    titles: Vec<Option<String>>,
    /// Most similar first.
    neighbours: Option<Histories>,
    predictions: HashMap<(u32, u32), f32>,
}

impl Cases {
    pub(super) fn new(tables: &Tables, max_title_chars: usize) -> Result<Self> {
        let pair_ids = (tables.pairs.ids(USER_ID)?, tables.pairs.ids(ITEM_ID)?);
        let known = (tables.history.ids(USER_ID)?, tables.history.ids(ITEM_ID)?);
        let item_ids = tables.items.ids(ITEM_ID)?;
        let users = IdMap::new(&[&pair_ids.0, &known.0]).map_err(|e| e.at(format!("column `{USER_ID}`")))?;
        let items = IdMap::new(&[&pair_ids.1, &known.1, &item_ids]).map_err(|e| e.at(format!("column `{ITEM_ID}`")))?;

        let mut pairs: Vec<(u32, u32)> = (users.encode(&pair_ids.0).into_iter().flatten())
            .zip(items.encode(&pair_ids.1).into_iter().flatten())
            .collect();
        let rows = pairs.len();
        pairs.sort_unstable();
        pairs.dedup();

        let given = ratings(&tables.history, "history")?;
        if given.is_empty() {
            return Err(Error::data("input `history` has no rows").with_help("look at the filters before it"));
        }
        let mut log: Vec<(u32, i32, u32, usize)> = (users.encode(&known.0).into_iter().flatten())
            .zip(tables.history.i32s(POSITION)?)
            .zip(items.encode(&known.1).into_iter().flatten())
            .enumerate()
            .map(|(row, ((user, position), item))| (user, position, item, row))
            .collect();
        log.sort_unstable();
        let log_pairs: Vec<(u32, u32)> = log.iter().map(|r| (r.0, r.2)).collect();
        let least = given.iter().copied().fold(f32::INFINITY, f32::min);
        let greatest = given.iter().copied().fold(f32::NEG_INFINITY, f32::max);

        let mut titles = vec![None; items.len()];
        let mut seen = vec![false; items.len()];
        for (item, title) in items.encode(&item_ids).into_iter().flatten().zip(tables.items.strings(TITLE)?) {
            // Of several rows of one item the first one counts.
            if !std::mem::replace(&mut seen[item as usize], true) {
                titles[item as usize] = title.and_then(|t| clean_title(&t, max_title_chars));
            }
        }

        let neighbours = match &tables.neighbours {
            None => None,
            Some(table) => {
                let (of, who) = (users.encode(&table.ids(USER_ID)?), users.encode(&table.ids(NEIGHBOUR_ID)?));
                let mut rows: Vec<(u32, i32, u32)> = (of.into_iter().zip(who).zip(table.i32s(RANK)?))
                    .filter_map(|((of, who), rank)| Some((of?, rank, who?)))
                    .collect();
                rows.sort_unstable();
                Some(Histories::from_pairs(users.len(), &rows.into_iter().map(|r| (r.0, r.2)).collect::<Vec<_>>()))
            }
        };
        let predictions = match &tables.predictions {
            None => HashMap::new(),
            Some(table) => {
                let (of, what) = (users.encode(&table.ids(USER_ID)?), items.encode(&table.ids(ITEM_ID)?));
                let rows = of.into_iter().zip(what).zip(table.f32s(PREDICTED_RATING)?);
                rows.filter_map(|((user, item), rating)| Some(((user?, item?), rating))).collect()
            }
        };
        Ok(Cases {
            histories: Histories::from_pairs(users.len(), &log_pairs),
            ratings: log.iter().map(|r| given[r.3]).collect(),
            range: (rating_text(least), rating_text(greatest)),
            repeats: rows - pairs.len(),
            users,
            items,
            pairs,
            titles,
            neighbours,
            predictions,
        })
    }

    /// The title of an item, where it has one.
    pub(super) fn title(&self, item: u32) -> Option<&str> {
        self.titles[item as usize].as_deref()
    }

    /// The latest titled items of a user with their ratings, oldest first.
    pub(super) fn lines(&self, user: u32, most: usize) -> Vec<Line<'_>> {
        let begin = self.histories.offsets()[user as usize];
        let places = self.histories.of(user as usize).iter().enumerate().rev();
        let lines = places.filter_map(|(place, &item)| {
            Some(Line { title: self.title(item)?, value: rating_text(self.ratings[begin + place]) })
        });
        let mut lines: Vec<Line<'_>> = lines.take(most).collect();
        lines.reverse();
        lines
    }

    /// The rated history of the most similar user who has a titled item in it; empty where there is none.
    pub(super) fn similar(&self, user: u32, most: usize) -> Vec<Line<'_>> {
        let Some(neighbours) = &self.neighbours else { return Vec::new() };
        let of = neighbours.of(user as usize).iter().filter(|&&neighbour| neighbour != user);
        of.map(|&neighbour| self.lines(neighbour, most)).find(|lines| !lines.is_empty()).unwrap_or_default()
    }

    /// The predicted rating of a pair.
    pub(super) fn prediction(&self, user: u32, item: u32) -> Option<f32> {
        self.predictions.get(&(user, item)).copied()
    }

    /// All that is known of a user, oldest first: `item=rating`.
    pub(super) fn known(&self, user: u32) -> impl Iterator<Item = String> {
        let begin = self.histories.offsets()[user as usize];
        let items = self.histories.of(user as usize).iter().enumerate();
        items.map(move |(place, &item)| {
            format!("{}={}", self.items.ids().get(item as usize), rating_text(self.ratings[begin + place]))
        })
    }
}
