//! What a fitted model is worth on held-out interactions, without a table in between.
//!
//! In: a [`FittedModel`], the held-out table and what is known before it. Out: the figures that `evaluate` gives for
//! the same model over all users: full ranking, the metrics of [`crate::eval::metrics`].

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::columns::{self, FieldsConfig};
use super::data::{TrainData, ratings};
use super::fit::FittedModel;
use super::savings::hex;
use crate::columns::{ITEM_ID, USER_ID};
use crate::error::{Error, Result};
use crate::eval::metrics::{Found, METRICS, MetricFn, ranking_metrics};
use crate::interactions::fields::{Column, Entities, FieldSet, Rows, Side};
use crate::interactions::{Histories, IdMap};
use crate::recommenders::topk;
use crate::tables::Table;

/// A metric of a model.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::stages) struct Figure {
    /// `NDCG@10`, `RMSE`.
    pub metric: String,
    /// The cut-off of a ranking metric.
    pub k: Option<usize>,
    pub value: f64,
    /// Users in the mean, or ratings.
    pub n: usize,
}

/// Figures as JSON, numbers as bits: what is kept between runs must give the same table.
pub(in crate::stages) fn figures_to_json(figures: &[Figure]) -> Value {
    figures.iter().map(|f| json!([f.metric, f.k, f.value.to_bits(), f.n])).collect()
}

/// What [`figures_to_json`] wrote; `None` where it is something else.
pub(in crate::stages) fn figures_from_json(kept: &Value) -> Option<Vec<Figure>> {
    let figure = |f: &Value| {
        Some(Figure {
            metric: f[0].as_str()?.to_owned(),
            k: f[1].as_u64().map(|k| k as usize),
            value: f[2].as_u64().map(f64::from_bits)?,
            n: f[3].as_u64()? as usize,
        })
    };
    kept.as_array()?.iter().map(figure).collect()
}

/// What is held out, in the indices of a model.
pub(in crate::stages) enum Test {
    Ranking { history: Histories, cases: Vec<Case> },
    Rating { pairs: Pairs, ratings: Vec<f32> },
}

/// A user's held-out items.
pub(in crate::stages) struct Case {
    /// `None`: the model does not know the user, or nothing is known of the user, who gets no list.
    pub user: Option<u32>,
    /// Those that the model knows, sorted and distinct.
    pub items: Vec<u32>,
    /// All of them.
    pub held_out: usize,
}

impl Test {
    /// From the held-out table and what is known when its items are ranked.
    ///
    /// # Errors
    /// A column is missing or of another type (exit 65); `test` has no rows (exit 65).
    pub fn ranking(data: &TrainData, test: &Table, history: &Table) -> Result<Test> {
        let ids = |table: &Table, slot: &str, name: &str| table.ids(name).map_err(|e| e.at(format!("input `{slot}`")));
        let (of_users, of_items) = (ids(test, "test", USER_ID)?, ids(test, "test", ITEM_ID)?);
        if of_users.is_empty() {
            return Err(Error::data("input `test` has no rows, so that nobody can be evaluated"));
        }
        let seen_users = data.users.encode(&ids(history, "history", USER_ID)?);
        let seen_items = data.items.encode(&ids(history, "history", ITEM_ID)?);
        let seen: Vec<(u32, u32)> = seen_users.into_iter().zip(seen_items).filter_map(|(u, i)| u.zip(i)).collect();
        let history = Histories::from_pairs(data.users.len(), &seen);

        // Users of the test table by their place among its sorted ids.
        let users = IdMap::new(&[&of_users])?;
        let items = IdMap::new(&[&of_items])?;
        let mut held_out: Vec<Vec<u32>> = vec![Vec::new(); users.len()];
        for (user, item) in users.encode(&of_users).into_iter().zip(items.encode(&of_items)) {
            if let (Some(user), Some(item)) = (user, item) {
                held_out[user as usize].push(item);
            }
        }
        let (known_users, known_items) = (data.users.encode(users.ids()), data.items.encode(items.ids()));
        let cases = held_out.into_iter().enumerate().map(|(user, mut list)| {
            list.sort_unstable();
            list.dedup();
            let user = known_users[user].filter(|&u| !history.of(u as usize).is_empty());
            let mut found: Vec<u32> = list.iter().filter_map(|&i| known_items[i as usize]).collect();
            found.sort_unstable();
            Case { user, items: found, held_out: list.len() }
        });
        let cases = cases.collect();
        Ok(Test::Ranking { history, cases })
    }

    /// From the held-out ratings and the tables that carry side columns.
    ///
    /// # Errors
    /// As [`encode_pairs`]; a rating that is no finite number; no rows (exit 65).
    pub fn rating(data: &TrainData, fields: &FieldSet, side: &SideTables<'_>, test: &Table) -> Result<Test> {
        let ratings = ratings(test, "test")?;
        if ratings.is_empty() {
            return Err(Error::data("input `test` has no rows, so that nothing can be evaluated"));
        }
        let pairs = encode_pairs(test, "test", (&data.users, &data.items), fields, side)?;
        Ok(Test::Rating { pairs, ratings })
    }

    /// The figures of a model.
    ///
    /// # Errors
    /// The model is of the other task (our bug).
    pub fn figures(&self, model: &FittedModel, ks: &[usize]) -> Result<Vec<Figure>> {
        match (self, model) {
            (Test::Ranking { history, cases }, FittedModel::Scorer(scorer)) => {
                let informed = scorer.with_history(history);
                let scorer = informed.as_deref().unwrap_or(scorer.as_ref());
                Ok(ranking_figures(&places(scorer, history, cases), ks))
            }
            (Test::Rating { pairs, ratings }, FittedModel::Predictor(predictor)) => {
                let predicted = predictor.predict(&pairs.users, &pairs.items, &pairs.rows)?;
                let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
                let (predicted, wanted) = (wide(&predicted), wide(ratings));
                let figures = METRICS.iter().filter_map(|metric| match metric.function {
                    MetricFn::PerUser(_) => None,
                    MetricFn::WholeTable(f) => {
                        let value = f(&predicted, &wanted);
                        Some(Figure { metric: metric.name.to_owned(), k: None, value, n: wanted.len() })
                    }
                });
                Ok(figures.collect())
            }
            _ => Err(Error::internal("held-out data and model are of two tasks")),
        }
    }

    /// sha256 (hex) of what figures depend on besides the model.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut number = |n: u64| hash.update(n.to_le_bytes());
        match self {
            Test::Ranking { history, cases } => {
                history.offsets().iter().for_each(|&n| number(n as u64));
                history.items().iter().for_each(|&n| number(u64::from(n)));
                for case in cases {
                    number(case.user.map_or(0, |u| u64::from(u) + 1));
                    number(case.held_out as u64);
                    number(case.items.len() as u64);
                    case.items.iter().for_each(|&n| number(u64::from(n)));
                }
            }
            Test::Rating { pairs, ratings } => {
                for ids in [&pairs.users.ids, &pairs.items.ids, &pairs.rows.user, &pairs.rows.item] {
                    number(ids.len() as u64);
                    ids.iter().for_each(|&n| number(u64::from(n)));
                }
                ratings.iter().for_each(|r| number(u64::from(r.to_bits())));
                // Side values of users and items come from the tables that the fit's key has a digest of, but for
                // those that the model does not know.
                hash.update(format!("{:?}{:?}{:?}", pairs.users.values, pairs.items.values, pairs.rows.values));
            }
        }
        hex(hash.finalize().as_slice())
    }
}

/// Where each user's held-out items are in the full ranking.
fn places(scorer: &dyn crate::recommenders::Scorer, history: &Histories, cases: &[Case]) -> Vec<Found> {
    let pairs: Vec<(u32, u32)> = cases
        .iter()
        .filter_map(|c| Some((c.user?, c)))
        .flat_map(|(u, c)| c.items.iter().map(move |&i| (u, i)))
        .collect();
    let mut ranks = topk::ranks(scorer, &pairs, history, history).into_iter();
    cases
        .iter()
        .map(|case| {
            let n = case.user.map_or(0, |_| case.items.len());
            let mut places: Vec<usize> = ranks.by_ref().take(n).flatten().collect();
            places.sort_unstable();
            Found { places, held_out: case.held_out }
        })
        .collect()
}

fn ranking_figures(found: &[Found], ks: &[usize]) -> Vec<Figure> {
    let n = found.len();
    ks.iter()
        .flat_map(|&k| {
            ranking_metrics().map(move |(name, function)| {
                let value = found.iter().map(|f| function(f, k)).sum::<f64>() / n.max(1) as f64;
                Figure { metric: format!("{name}@{k}"), k: Some(k), value, n }
            })
        })
        .collect()
}

/// The tables that carry side columns, and how to read them.
pub(in crate::stages) struct SideTables<'a> {
    pub config: &'a FieldsConfig,
    pub users: Option<&'a Table>,
    pub items: Option<&'a Table>,
}

/// Pairs of users and items as a rating model takes them.
pub(in crate::stages) struct Pairs {
    pub users: Entities,
    pub items: Entities,
    pub rows: Rows,
}

impl Pairs {
    /// Users and items that the model does not know, distinct ones.
    pub fn unknown(&self) -> (usize, usize) {
        let unknown = |entities: &Entities| entities.ids.iter().filter(|&&id| id == 0).count();
        (unknown(&self.users), unknown(&self.items))
    }
}

/// Encodes the pairs of a table. A user or item that the model does not know keeps its side values.
///
/// # Errors
/// A column is missing, or has another type than in training (exit 65).
pub(in crate::stages) fn encode_pairs(
    table: &Table,
    slot: &str,
    known: (&IdMap, &IdMap),
    fields: &FieldSet,
    side: &SideTables<'_>,
) -> Result<Pairs> {
    let of = |name: &str| table.ids(name).map_err(|e| e.at(format!("input `{slot}`")));
    let (user_ids, item_ids) = (of(USER_ID)?, of(ITEM_ID)?);
    let (users, items) = (IdMap::new(&[&user_ids])?, IdMap::new(&[&item_ids])?);
    let user_columns = columns::columns_by_id(side.config, Side::User, side.users, ("users", USER_ID), &users)?;
    let item_columns = columns::columns_by_id(side.config, Side::Item, side.items, ("items", ITEM_ID), &items)?;
    let row_columns = columns::columns_of_rows(side.config, table, slot)?;
    // A side without a table, and so without columns, is filled by the caller.
    let encode = |side: Side, columns: &[(String, Column)]| match columns.is_empty() {
        true => Ok(Vec::new()),
        false => columns::encode(fields, side, columns),
    };
    let place = |map: &IdMap, known: &IdMap| -> Vec<u32> {
        known.encode(map.ids()).into_iter().map(|index| index.map_or(0, |i| i + 1)).collect()
    };
    let index = |map: &IdMap, ids| -> Vec<u32> { map.encode(ids).into_iter().flatten().collect() };
    Ok(Pairs {
        users: Entities { ids: place(&users, known.0), values: encode(Side::User, &user_columns)? },
        items: Entities { ids: place(&items, known.1), values: encode(Side::Item, &item_columns)? },
        rows: Rows {
            user: index(&users, &user_ids),
            item: index(&items, &item_ids),
            values: encode(Side::Row, &row_columns)?,
        },
    })
}
