//! The tables of a `train` or `search` stage as what models learn from.
//!
//! In: train interactions, held-out ones, perhaps tables of all users and items. Out: [`TrainData`]: dense indices,
//! histories or encoded ratings, and a sha256 of them.

use super::columns::{self, FieldsConfig};
use crate::columns::{ITEM_ID, RATING, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::fields::{Entities, FieldSet, Rows, Side, Values};
use crate::interactions::{Histories, IdMap};
use crate::recommenders::Interactions;
use crate::recommenders::rating::Ratings;
use crate::stages::context::{InputSlot, StageContext};
use crate::tables::{IdColumn, Table};

/// References to the tables, `items` and `users` resolved.
#[derive(Clone, Debug)]
pub(in crate::stages) struct References {
    pub train: String,
    pub valid: Option<String>,
    pub items: Option<String>,
    pub users: Option<String>,
}

impl References {
    /// What is left out lies beside `X.train`: `X.items` and `X.users`; `""` means none.
    pub fn new(train: &str, valid: Option<&String>, items: Option<&String>, users: Option<&String>) -> Self {
        let beside = |name: &str| train.strip_suffix(".train").map(|stage| format!("{stage}.{name}"));
        let of = |given: Option<&String>, name: &str| given.cloned().or_else(|| beside(name)).filter(|r| !r.is_empty());
        References {
            train: train.to_owned(),
            valid: valid.cloned(),
            items: of(items, "items"),
            users: of(users, "users"),
        }
    }

    /// The input slots; ratings need their column too.
    pub fn slots(&self, rating: bool) -> Vec<InputSlot> {
        let columns: &[&'static str] = if rating { &[USER_ID, ITEM_ID, RATING] } else { &[USER_ID, ITEM_ID] };
        let mut slots = vec![InputSlot::table("train", &self.train, columns)];
        slots.extend(self.valid.as_ref().map(|r| InputSlot::table("valid", r, columns)));
        slots.extend(self.items.as_ref().map(|r| InputSlot::table("items", r, &[ITEM_ID])));
        slots.extend(self.users.as_ref().map(|r| InputSlot::table("users", r, &[USER_ID])));
        slots
    }
}

/// The tables in memory.
#[derive(Clone, Debug)]
pub(in crate::stages) struct Tables {
    pub train: Table,
    pub valid: Option<Table>,
    pub items: Option<Table>,
    pub users: Option<Table>,
}

impl Tables {
    /// Those that the stage was given.
    pub async fn collect(ctx: &StageContext) -> Result<Self> {
        Ok(Tables {
            train: ctx.collect("train").await?,
            valid: ctx.collect_opt("valid").await?,
            items: ctx.collect_opt("items").await?,
            users: ctx.collect_opt("users").await?,
        })
    }

    fn ids(&self, name: &str, slot: &'static str) -> Result<IdMap> {
        let all = if slot == "users" { self.users.as_ref() } else { self.items.as_ref() };
        let tables = [("train", Some(&self.train)), ("valid", self.valid.as_ref()), (slot, all)];
        let columns: Vec<IdColumn> = tables
            .into_iter()
            .filter_map(|(slot, table)| Some((slot, table?)))
            .map(|(slot, table)| table.ids(name).map_err(|e| e.at(format!("input `{slot}`"))))
            .collect::<Result<_>>()?;
        IdMap::new(&columns.iter().collect::<Vec<_>>()).map_err(|e| e.at(format!("column `{name}`")))
    }
}

/// What the weights are fitted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::stages) enum FitOn {
    /// Train, with the held-out interactions for early stopping.
    Train,
    /// Both, with none held out.
    TrainAndValid,
}

impl FitOn {
    /// As in tables and cards.
    pub fn as_str(self) -> &'static str {
        match self {
            FitOn::Train => "train",
            FitOn::TrainAndValid => "train+valid",
        }
    }
}

/// What models learn from, with the ids that indices stand for.
pub(in crate::stages) struct TrainData {
    pub users: IdMap,
    pub items: IdMap,
    pub log: Log,
}

/// Interactions or ratings.
pub(in crate::stages) enum Log {
    Ranking(RankingLog),
    Rating(Box<RatingLog>),
}

/// Interactions.
pub(in crate::stages) struct RankingLog {
    pub train: Histories,
    pub both: Histories,
    /// Held-out pairs of users with train interactions.
    pub valid: Vec<(u32, u32)>,
    /// Held-out pairs of users without any: there is nothing to measure.
    pub cold: usize,
}

/// Ratings.
pub(in crate::stages) struct RatingLog {
    pub fields: FieldSet,
    pub users: Entities,
    pub items: Entities,
    pub train: RatedRows,
    pub valid: RatedRows,
    pub both: RatedRows,
}

/// Rows with their ratings.
#[derive(Default)]
pub(in crate::stages) struct RatedRows {
    pub rows: Rows,
    pub ratings: Vec<f32>,
}

impl TrainData {
    /// For models that rank items.
    ///
    /// # Errors
    /// `train` has no rows, an id is null or of another type (exit 65).
    pub fn ranking(tables: &Tables) -> Result<Self> {
        let (users, items) = ids(tables)?;
        let train = pairs(&tables.train, "train", &users, &items)?;
        let held_out = match &tables.valid {
            Some(table) => pairs(table, "valid", &users, &items)?,
            None => Vec::new(),
        };
        let both: Vec<(u32, u32)> = train.iter().chain(&held_out).copied().collect();
        let train = Histories::from_pairs(users.len(), &train);
        let both = Histories::from_pairs(users.len(), &both);
        // A user without train interactions has no embedding worth measuring.
        let known = |&(user, _): &(u32, u32)| !train.of(user as usize).is_empty();
        let (valid, cold): (Vec<_>, Vec<_>) = held_out.into_iter().partition(known);
        let log = Log::Ranking(RankingLog { train, both, valid, cold: cold.len() });
        Ok(TrainData { users, items, log })
    }

    /// For models that predict ratings.
    ///
    /// # Errors
    /// As [`TrainData::ranking`]; a rating that is null or no finite number, a side column that is missing or
    /// cannot be used (exit 65).
    pub fn rating(tables: &Tables, config: &FieldsConfig) -> Result<Self> {
        let (users, items) = ids(tables)?;
        let user_columns =
            columns::columns_by_id(config, Side::User, tables.users.as_ref(), ("users", USER_ID), &users)?;
        let item_columns =
            columns::columns_by_id(config, Side::Item, tables.items.as_ref(), ("items", ITEM_ID), &items)?;
        let row_columns = columns::columns_of_rows(config, &tables.train, "train")?;
        let mut fields = columns::learn(Side::User, &user_columns)?;
        fields.extend(columns::learn(Side::Item, &item_columns)?);
        fields.extend(columns::learn(Side::Row, &row_columns)?);
        let fields = FieldSet { n_users: users.len(), n_items: items.len(), fields };
        let entities = |n: usize, side: Side, columns: &[(String, _)]| -> Result<Entities> {
            Ok(Entities::all(n, columns::encode(&fields, side, columns)?))
        };
        let (of_users, of_items) =
            (entities(users.len(), Side::User, &user_columns)?, entities(items.len(), Side::Item, &item_columns)?);
        let rated = |table: &Table, slot: &str| -> Result<RatedRows> {
            let pairs = pairs(table, slot, &users, &items)?;
            let (user, item) = pairs.into_iter().unzip();
            let values = columns::encode(&fields, Side::Row, &columns::columns_of_rows(config, table, slot)?)?;
            Ok(RatedRows { rows: Rows { user, item, values }, ratings: ratings(table, slot)? })
        };
        let train = rated(&tables.train, "train")?;
        let valid = match &tables.valid {
            Some(table) => rated(table, "valid")?,
            None => rated(&empty_like(&tables.train), "train")?,
        };
        let both = train.concat(&valid)?;
        let log = RatingLog { fields, users: of_users, items: of_items, train, valid, both };
        Ok(TrainData { users, items, log: Log::Rating(Box::new(log)) })
    }

    /// Whether there is anything that was held out and can be measured.
    pub fn has_valid(&self) -> bool {
        match &self.log {
            Log::Ranking(log) => !log.valid.is_empty(),
            Log::Rating(log) => !log.valid.ratings.is_empty(),
        }
    }
}

impl RankingLog {
    /// What a model learns from.
    pub fn interactions(&self, n_items: usize, on: FitOn) -> Interactions<'_> {
        let (train, valid): (_, &[(u32, u32)]) = match on {
            FitOn::Train => (&self.train, &self.valid),
            FitOn::TrainAndValid => (&self.both, &[]),
        };
        Interactions { n_users: train.n_users(), n_items, train, valid }
    }

    /// Distinct pairs that weights are fitted on.
    pub fn distinct(&self, on: FitOn) -> usize {
        let histories = if on == FitOn::Train { &self.train } else { &self.both };
        (0..histories.n_users())
            .map(|user| {
                let mut seen = histories.of(user).to_vec();
                seen.sort_unstable();
                seen.dedup();
                seen.len()
            })
            .sum()
    }
}

impl RatingLog {
    /// What a model learns from; `nothing` stands for the held-out rows of a fit on all of them.
    pub fn ratings<'a>(&'a self, on: FitOn, nothing: &'a RatedRows) -> Ratings<'a> {
        let (train, valid) = match on {
            FitOn::Train => (&self.train, &self.valid),
            FitOn::TrainAndValid => (&self.both, nothing),
        };
        Ratings {
            fields: &self.fields,
            users: &self.users,
            items: &self.items,
            train: &train.rows,
            train_ratings: &train.ratings,
            valid: &valid.rows,
            valid_ratings: &valid.ratings,
        }
    }

    /// No rows, of the right fields.
    pub fn nothing(&self) -> RatedRows {
        let values = self.train.rows.values.iter().map(|values| match values {
            Values::Single(_) => Values::Single(Vec::new()),
            Values::Multi { .. } => Values::Multi { offsets: vec![0], values: Vec::new() },
            Values::Dense(_) => Values::Dense(Vec::new()),
        });
        RatedRows { rows: Rows { values: values.collect(), ..Rows::default() }, ratings: Vec::new() }
    }
}

impl RatedRows {
    fn concat(&self, other: &RatedRows) -> Result<RatedRows> {
        let (a, b) = (&self.rows, &other.rows);
        let values = a.values.iter().zip(&b.values).map(|(x, y)| columns::concat(x, y)).collect::<Result<_>>()?;
        let join = |x: &[u32], y: &[u32]| [x, y].concat();
        Ok(RatedRows {
            rows: Rows { user: join(&a.user, &b.user), item: join(&a.item, &b.item), values },
            ratings: [self.ratings.as_slice(), &other.ratings].concat(),
        })
    }
}

fn ids(tables: &Tables) -> Result<(IdMap, IdMap)> {
    if tables.train.num_rows() == 0 {
        return Err(Error::data("input `train` has no rows")
            .with_help("look at the filters before it, and at the source's path and columns"));
    }
    Ok((tables.ids(USER_ID, "users")?, tables.ids(ITEM_ID, "items")?))
}

/// `(user, item)` of each row in dense indices.
fn pairs(table: &Table, slot: &str, users: &IdMap, items: &IdMap) -> Result<Vec<(u32, u32)>> {
    let encode = |map: &IdMap, name: &str| -> Result<Vec<u32>> {
        let known =
            |index: Option<u32>| index.ok_or_else(|| Error::internal(format!("an id of `{name}` has no index")));
        let ids = table.ids(name).map_err(|e| e.at(format!("input `{slot}`")))?;
        map.encode(&ids).into_iter().map(known).collect()
    };
    Ok(encode(users, USER_ID)?.into_iter().zip(encode(items, ITEM_ID)?).collect())
}

/// The ratings of a table, each a finite number.
///
/// # Errors
/// One is null, NaN or infinite (exit 65; row and column are named).
pub(in crate::stages) fn ratings(table: &Table, slot: &str) -> Result<Vec<f32>> {
    let values = table.f64s(RATING).map_err(|e| e.at(format!("input `{slot}`")))?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values.into_iter().map(|v| v as f32).collect()),
        Some(row) => {
            let told = format!("input `{slot}`: column `{RATING}` is {} in row {row} (0-based)", values[row]);
            Err(Error::data(told).with_help("drop such rows in a `sql` stage"))
        }
    }
}

fn empty_like(table: &Table) -> Table {
    Table::new(table.schema(), Vec::new())
}
