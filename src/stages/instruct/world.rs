//! Tables -> users, items, titles and histories by dense index.
//!
//! In: the input tables. Out: [`World`]: all that examples are made of.

use std::collections::HashMap;

use super::InstructConfig;
use crate::columns::{ITEM_ID, NEIGHBOUR_ID, POSITION, PREDICTED_RATING, RANK, TITLE, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::sampler::NegativeSampler;
use crate::interactions::{Histories, IdMap};
use crate::prompts::{InstructionTask, clean_title, rating_text};
use crate::recommenders::saved::TrainedModel;
use crate::stages::context::Artifact;
use crate::tables::Table;

/// The inputs in memory.
pub(super) struct Tables {
    pub(super) train: Table,
    pub(super) items: Table,
    pub(super) neighbours: Option<Table>,
    pub(super) predictions: Option<Table>,
    pub(super) recommender: Option<Artifact>,
}

/// All that examples are made of, by dense index.
pub(super) struct World {
    pub(super) users: IdMap,
    /// `[items]`: the clean title, where there is one.
    pub(super) titles: Vec<Option<String>>,
    /// `[users]`: train items, oldest first.
    pub(super) train: Histories,
    /// `[interactions]` beside the items of `train`; empty where no task reads them.
    ratings: Vec<f32>,
    /// Least and greatest rating, as text.
    pub(super) range: (String, String),
    /// `[items]`: train interactions.
    pub(super) popularity: Vec<u32>,
    /// Draws what a user has not seen in train.
    pub(super) unseen: NegativeSampler,
    /// Per side column its name, and `[items]` the clean value where there is one.
    pub(super) side: Vec<(String, Vec<Option<String>>)>,
    /// Most similar first.
    neighbours: Option<Histories>,
    /// `(user, item)` -> predicted rating.
    predictions: HashMap<(u32, u32), f32>,
    pub(super) recommender: Option<Recommender>,
}

/// A fitted recommender and what its indices are here.
pub(super) struct Recommender {
    pub(super) model: TrainedModel,
    /// `[users]`: index in the model.
    pub(super) users: Vec<Option<u32>>,
    /// `[items]`: index in the model.
    pub(super) items: Vec<Option<u32>>,
}

impl World {
    pub(super) fn new(tables: &Tables, config: &InstructConfig) -> Result<Self> {
        let (train_users, train_items) = (tables.train.ids(USER_ID)?, tables.train.ids(ITEM_ID)?);
        if train_users.is_empty() {
            return Err(Error::data("input `train` has no rows").with_help("look at the filters before it"));
        }
        let item_ids = tables.items.ids(ITEM_ID)?;
        let users = IdMap::new(&[&train_users]).map_err(|e| e.at(format!("column `{USER_ID}`")))?;
        let items = IdMap::new(&[&train_items, &item_ids]).map_err(|e| e.at(format!("column `{ITEM_ID}`")))?;

        let of_items: Vec<u32> = items.encode(&item_ids).into_iter().flatten().collect();
        let clean = |values: Vec<Option<String>>| {
            // Of several rows of one item the first one counts.
            let mut known = vec![false; items.len()];
            let mut clean = vec![None; items.len()];
            for (&item, value) in of_items.iter().zip(values) {
                if !std::mem::replace(&mut known[item as usize], true) {
                    clean[item as usize] = value.and_then(|v| clean_title(&v, config.max_title_chars));
                }
            }
            clean
        };
        let titles = clean(tables.items.strings(TITLE)?);
        let side = config.side_columns.iter().map(|name| {
            let values = tables.items.strings(name).map_err(|e| e.at("input `items`"))?;
            Ok((name.clone(), clean(values)))
        });
        let side = side.collect::<Result<Vec<_>>>()?;

        let rated = config.tasks().contains(&InstructionTask::Rating);
        let given = if rated { super::super::train::data::ratings(&tables.train, "train")? } else { Vec::new() };
        let positions = tables.train.i32s(POSITION)?;
        let mut rows: Vec<(u32, i32, u32, usize)> = (users.encode(&train_users).into_iter().flatten())
            .zip(positions)
            .zip(items.encode(&train_items).into_iter().flatten())
            .enumerate()
            .map(|(row, ((user, position), item))| (user, position, item, row))
            .collect();
        rows.sort_unstable();
        let pairs: Vec<(u32, u32)> = rows.iter().map(|r| (r.0, r.2)).collect();
        let train = Histories::from_pairs(users.len(), &pairs);
        let ratings: Vec<f32> = if rated { rows.iter().map(|r| given[r.3]).collect() } else { Vec::new() };
        let least = ratings.iter().copied().fold(f32::INFINITY, f32::min);
        let greatest = ratings.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut popularity = vec![0; items.len()];
        train.items().iter().for_each(|&item| popularity[item as usize] += 1);
        let unseen = NegativeSampler::new(&train, items.len());

        let neighbours = tables.neighbours.as_ref().map(|table| neighbours(table, &users)).transpose()?;
        let predictions = match &tables.predictions {
            Some(table) => predictions(table, &users, &items)?,
            None => HashMap::new(),
        };
        let recommender = tables.recommender.as_ref().map(|a| Recommender::new(a, &users, &items)).transpose()?;
        Ok(World {
            users,
            titles,
            train,
            ratings,
            range: (rating_text(least), rating_text(greatest)),
            popularity,
            unseen,
            side,
            neighbours,
            predictions,
            recommender,
        })
    }

    /// The rating that goes with the interaction in place `at` of a user's history.
    pub(super) fn rating(&self, user: u32, at: usize) -> f32 {
        self.ratings[self.train.offsets()[user as usize] + at]
    }

    /// The title of an item, where it has one.
    pub(super) fn title(&self, item: u32) -> Option<&str> {
        self.titles[item as usize].as_deref()
    }

    /// The most similar user with a titled item in the train history. It depends on nothing that is held out.
    pub(super) fn neighbour(&self, user: u32) -> Option<u32> {
        let of = self.neighbours.as_ref()?.of(user as usize).iter().copied();
        let titled = |n: u32| self.train.of(n as usize).iter().any(|&item| self.title(item).is_some());
        of.filter(|&n| n != user).find(|&n| titled(n))
    }

    /// The predicted rating of a pair.
    pub(super) fn prediction(&self, user: u32, item: u32) -> Option<f32> {
        self.predictions.get(&(user, item)).copied()
    }
}

fn neighbours(table: &Table, users: &IdMap) -> Result<Histories> {
    let (of, who) = (users.encode(&table.ids(USER_ID)?), users.encode(&table.ids(NEIGHBOUR_ID)?));
    let mut rows: Vec<(u32, i32, u32)> = (of.into_iter().zip(who).zip(table.i32s(RANK)?))
        .filter_map(|((of, who), rank)| Some((of?, rank, who?)))
        .collect();
    rows.sort_unstable();
    let pairs: Vec<(u32, u32)> = rows.into_iter().map(|(of, _, who)| (of, who)).collect();
    Ok(Histories::from_pairs(users.len(), &pairs))
}

fn predictions(table: &Table, users: &IdMap, items: &IdMap) -> Result<HashMap<(u32, u32), f32>> {
    let (of_users, of_items) = (users.encode(&table.ids(USER_ID)?), items.encode(&table.ids(ITEM_ID)?));
    let rows = of_users.into_iter().zip(of_items).zip(table.f32s(PREDICTED_RATING)?);
    Ok(rows.filter_map(|((user, item), rating)| Some(((user?, item?), rating))).collect())
}

impl Recommender {
    fn new(artifact: &Artifact, users: &IdMap, items: &IdMap) -> Result<Self> {
        let model = TrainedModel::from_files(&artifact.files).map_err(|e| e.at("input `recommender`"))?;
        if model.card.weights_fit_on != "train" {
            return Err(Error::spec(format!(
                "input `recommender`: its weights were fitted on {}, so what it says of train interactions comes from held-out ones too",
                model.card.weights_fit_on
            ))
            .with_help("name a `train` stage without `refit`"));
        }
        let (of_users, of_items) = (model.users.encode(users.ids()), model.items.encode(items.ids()));
        Ok(Recommender { users: of_users, items: of_items, model })
    }
}
