//! `predict`: the rating of each given pair of a user and an item.
//!
//! In: artifact `model` of a `train` stage with a rating model, pairs (`user_id`, `item_id`), perhaps the tables that
//! carry side columns. Out: `predictions`, one row per pair, sorted by user and item.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::Float64Array;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{
    Artifact, Cancel, InputSlot, Observer, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::recommend::ids_like;
use super::registry::StageKind;
use super::train::columns::{config_of, separator_of};
use super::train::measure::{SideTables, encode_pairs};
use super::train::outputs::id_type;
use crate::columns::{ITEM_ID, PREDICTED_RATING, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::fields::{Entities, Field as SideField, Kind, Rows, Side, Values};
use crate::recommenders::saved::{TrainedRater, read_card};
use crate::recommenders::{Task, registry};
use crate::tables::Table;

/// `kind = "predict"`.
pub const KIND: StageKind = StageKind {
    name: "predict",
    version: 1,
    about: "The rating that a model predicts for each given pair of a user and an item.",
    sample: r#"model = "deepfm.model"
pairs = "parts.test"
users = "users"
items = "items"
"#,
    schema: || schemars::schema_for!(PredictConfig),
    resolve,
};

/// The rating that a model predicts for each given pair of a user and an item.
///
/// Predictions lie inside the range of the ratings that the model was fitted on. A user or an item that the model does not know
/// contributes nothing by its id; its side columns count where they are there. A pair of which nothing is known gets the model's bias, near the
/// mean rating.
///
/// Counters: `rows`, `users_unknown` and `items_unknown` (distinct ids that the model does not know), `rows_unknown` (pairs with one of them),
/// `repeats_dropped` (a pair is predicted once).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PredictConfig {
    /// The `model` output of a `train` stage with a rating model.
    pub model: String,
    /// What to predict: `user_id`, `item_id`, and the row columns that the model was fitted with.
    pub pairs: String,
    /// The table with the side columns of users. Left out, they count as missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// The table with the side columns of items. Left out, they count as missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<String>,
}

fn resolve(value: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: PredictConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `predict` is wrong").because(e))?;
    Ok(Box::new(Predict { config }))
}

struct Predict {
    config: PredictConfig,
}

fn schema(user: DataType, item: DataType) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(USER_ID, user, false),
        Field::new(ITEM_ID, item, false),
        Field::new(PREDICTED_RATING, DataType::Float64, false),
    ]))
}

#[async_trait]
impl Stage for Predict {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots =
            vec![InputSlot::artifact("model", &c.model), InputSlot::table("pairs", &c.pairs, &[USER_ID, ITEM_ID])];
        slots.extend(c.users.as_ref().map(|r| InputSlot::table("users", r, &[USER_ID])));
        slots.extend(c.items.as_ref().map(|r| InputSlot::table("items", r, &[ITEM_ID])));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![OutputSlot {
            name: "predictions",
            what: What::Table,
            about: "`user_id`, `item_id`, `predicted_rating`, one row per pair, sorted by both.",
        }]
    }

    fn identity(&self) -> Value {
        json!(self.config)
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name: &str| {
            let field = inputs.get("pairs").and_then(|p| p.field_with_name(name).ok());
            field.map(|f| id_type(f.data_type()))
        };
        Ok(id(USER_ID).zip(id(ITEM_ID)).map(|(u, i)| ("predictions".to_owned(), schema(u, i))).into_iter().collect())
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let artifact = ctx.artifact("model")?.1.clone();
        let pairs = ctx.collect("pairs").await?;
        let users = ctx.collect_opt("users").await?;
        let items = ctx.collect_opt("items").await?;
        let (observer, cancel) = (ctx.observer.clone(), ctx.cancel.clone());
        let work = move || predictions(&artifact, &pairs, (users.as_ref(), items.as_ref()), observer.as_ref(), &cancel);
        tokio::task::spawn_blocking(work).await?
    }
}

/// Pairs that are predicted at once, so that memory is bounded and a stop request is heard.
const BLOCK: usize = 1 << 14;

fn predictions(
    artifact: &Artifact,
    pairs: &Table,
    (users, items): (Option<&Table>, Option<&Table>),
    observer: &dyn Observer,
    cancel: &Cancel,
) -> Result<StageResult> {
    let card = read_card(&artifact.files).map_err(|e| e.at("input `model`"))?;
    if registry::find(&card.model).is_ok_and(|backbone| backbone.task != Task::Rating) {
        return Err(Error::spec(format!("`{}` ranks items and does not predict ratings", card.model))
            .with_help("name the `train` stage of a rating model, or use a `recommend` stage"));
    }
    let model = TrainedRater::from_files(&artifact.files).map_err(|e| e.at("input `model`"))?;
    ids_like(pairs, "pairs", USER_ID, &model.users)?;
    ids_like(pairs, "pairs", ITEM_ID, &model.items)?;
    let fields = model.predictor.fields();
    let separator = model.card.separator.clone().unwrap_or_else(|| separator_of(None));
    let mut config = config_of(fields, &separator);
    // Without their table all side columns of users, or items, are missing.
    for (side, table) in [(Side::User, users), (Side::Item, items)] {
        if table.is_none() && fields.of(side).next().is_some() {
            observer.note(&format!("no table gives the model's columns of {}s: they count as missing", name_of(side)));
            match side {
                Side::User => config.user.clear(),
                _ => config.item.clear(),
            }
        }
    }
    let side = SideTables { config: &config, users, items };
    let known = (&model.users, &model.items);
    let mut encoded = encode_pairs(pairs, "pairs", known, fields, &side)?;
    fill_missing(&mut encoded.users, fields.of(Side::User).collect(), users.is_none());
    fill_missing(&mut encoded.items, fields.of(Side::Item).collect(), items.is_none());
    let (users_unknown, items_unknown) = encoded.unknown();

    // Sorted by user and item; the entities of `encode_pairs` are in the order of the sorted ids.
    let mut order: Vec<usize> = (0..encoded.rows.len()).collect();
    let key = |n: usize| (encoded.rows.user[n], encoded.rows.item[n]);
    order.sort_by_key(|&n| key(n));
    order.dedup_by_key(|n| key(*n));
    let unknown = |n: &&usize| {
        let (user, item) = key(**n);
        encoded.users.ids[user as usize] == 0 || encoded.items.ids[item as usize] == 0
    };
    let rows_unknown = order.iter().filter(unknown).count();

    observer.begin("pairs", order.len() as u64);
    let mut predicted: Vec<f64> = Vec::with_capacity(order.len());
    for block in order.chunks(BLOCK) {
        cancel.check()?;
        let rows = take(&encoded.rows, block);
        let values = model.predictor.predict(&encoded.users, &encoded.items, &rows)?;
        predicted.extend(values.into_iter().map(f64::from));
        observer.advance(block.len() as u64);
    }
    let (user_ids, item_ids) = (pairs.ids(USER_ID)?, pairs.ids(ITEM_ID)?);
    let table = Table::from_columns(vec![
        (USER_ID, user_ids.take(order.iter().copied()).to_array(), false),
        (ITEM_ID, item_ids.take(order.iter().copied()).to_array(), false),
        (PREDICTED_RATING, Arc::new(Float64Array::from(predicted)), false),
    ])?;
    Ok(StageResult::default()
        .with_counter("rows", table.num_rows())
        .with_counter("users_unknown", users_unknown)
        .with_counter("items_unknown", items_unknown)
        .with_counter("rows_unknown", rows_unknown)
        .with_counter("repeats_dropped", pairs.num_rows() - table.num_rows())
        .with_table("predictions", table))
}

fn name_of(side: Side) -> &'static str {
    match side {
        Side::User => "user",
        Side::Item => "item",
        Side::Row => "row",
    }
}

/// Gives every entity a missing value of each field.
fn fill_missing(entities: &mut Entities, fields: Vec<&SideField>, missing: bool) {
    if !missing {
        return;
    }
    let n = entities.ids.len();
    let value = |field: &&SideField| match field.kind {
        Kind::Single { .. } => Values::Single(vec![0; n]),
        Kind::Multi { .. } => Values::Multi { offsets: (0..=n as u32).collect(), values: vec![0; n] },
        Kind::Dense { .. } => Values::Dense(vec![0.0; n]),
    };
    entities.values = fields.iter().map(value).collect();
}

/// The given rows in that order.
fn take(rows: &Rows, places: &[usize]) -> Rows {
    let of = |v: &[u32]| places.iter().map(|&n| v[n]).collect::<Vec<u32>>();
    let values = rows.values.iter().map(|values| match values {
        Values::Single(v) => Values::Single(of(v)),
        Values::Dense(v) => Values::Dense(places.iter().map(|&n| v[n]).collect()),
        Values::Multi { offsets, values } => {
            let (mut to, mut kept) = (vec![0u32], Vec::new());
            for &n in places {
                kept.extend_from_slice(&values[offsets[n] as usize..offsets[n + 1] as usize]);
                to.push(kept.len() as u32);
            }
            Values::Multi { offsets: to, values: kept }
        }
    });
    Rows { user: of(&rows.user), item: of(&rows.item), values: values.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_taken_with_their_values() {
        let rows = Rows {
            user: vec![4, 5, 6],
            item: vec![7, 8, 9],
            values: vec![
                Values::Single(vec![1, 2, 3]),
                Values::Multi { offsets: vec![0, 2, 3, 4], values: vec![1, 2, 3, 4] },
                Values::Dense(vec![0.1, 0.2, 0.3]),
            ],
        };
        let want = Rows {
            user: vec![6, 4],
            item: vec![9, 7],
            values: vec![
                Values::Single(vec![3, 1]),
                Values::Multi { offsets: vec![0, 1, 3], values: vec![4, 1, 2] },
                Values::Dense(vec![0.3, 0.1]),
            ],
        };
        assert_eq!(take(&rows, &[2, 0]), want);
    }
}
