//! `recommend`: a shortlist of k' items for each user from a fitted recommender.
//!
//! In: artifact `model` of a `train` stage, what users have seen (`user_id`, `item_id`, oldest first within a
//! user), perhaps the users to recommend for. Out: `shortlist`, sorted by user and rank.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Float32Array, Int32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{
    Artifact, InputSlot, OutputSlot, OutputTable, ResolveContext, Stage, StageContext, StageResult, What,
};
use super::registry::StageKind;
use super::train::outputs::id_type;
use crate::columns::{ITEM_ID, REC_RANK, REC_SCORE, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::{Histories, IdMap};
use crate::recommenders::saved::TrainedModel;
use crate::recommenders::topk::{self, Scored};
use crate::tables::{IdColumn, Table};

mod cold;

/// `kind = "recommend"`.
pub const KIND: StageKind = StageKind {
    name: "recommend",
    version: 1,
    about: "The recommender's shortlist: the best k items for each user that the user has not seen.",
    sample: r#"model = "lightgcn.model"
history = "parts.history"
k = 20
"#,
    schema: || schemars::schema_for!(RecommendConfig),
    resolve,
};

/// Makes the recommender's shortlist: the best k items for each user that the user has not seen.
///
/// Equal scores rank in the order of item ids. A user who has seen nearly everything gets fewer than k items.
///
/// Counters: `users` (with a shortlist), `rows`, `users_unknown` (left out: not in the model), `users_without_history` (left
/// out: in `users` but not in `history`), `users_short` (fewer than k items), `history_rows_unknown` (rows whose item is not in the model: it
/// cannot be recommended, so nothing is masked), `new_items` (places that went to new items).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecommendConfig {
    /// The `model` output of a `train` stage.
    pub model: String,
    /// What each user has seen, `user_id` and `item_id`: these items are not recommended again. `X.history` of a
    /// `split` stage is what is known at test time; `X.train` what is known at validation time.
    pub history: String,
    /// Recommend for the users of this table only (`user_id`); all users of `history` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<String>,
    /// Length of a shortlist, k'. Default 20.
    #[serde(default = "default_k")]
    #[schemars(range(min = 1, max = 10_000))]
    pub k: u32,
    /// Share of a shortlist that is kept for new items, which nobody in `history` has an interaction with: the last
    /// places, `cold_share * k` of them rounded down. In [0, 1), default 0. The recommender knows nothing of such items; they come
    /// from `cold`.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub cold_share: f64,
    /// Shortlists from what can score items without interactions, such as a `train_items` model that reads their titles:
    /// `user_id`, `item_id`, `rec_rank`, `rec_score`. Each user gets the first of their new items; scores are kept as they
    /// are, on the scale of what made them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold: Option<String>,
}

fn is_zero(share: &f64) -> bool {
    *share == 0.0
}

fn default_k() -> u32 {
    20
}

fn resolve(value: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: RecommendConfig =
        serde_json::from_value(value).map_err(|e| Error::spec("the config of `recommend` is wrong").because(e))?;
    if !(1..=10_000).contains(&config.k) {
        return Err(Error::spec(format!("`k` is {}", config.k)).with_help("allowed is 1 to 10000"));
    }
    if !(0.0..1.0).contains(&config.cold_share) {
        return Err(Error::spec(format!("`cold_share` is {}", config.cold_share)).with_help("it lies in [0, 1)"));
    }
    if (config.cold_share > 0.0) != config.cold.is_some() {
        return Err(Error::spec("`cold_share` and `cold` belong together").with_help(
            "new items need something that can score them: name its shortlists in `cold`, and a share of the places",
        ));
    }
    Ok(Box::new(Recommend { config }))
}

/// The output.
const SHORTLIST: &str = "shortlist";

struct Recommend {
    config: RecommendConfig,
}

fn schema(user: DataType, item: DataType) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(USER_ID, user, false),
        Field::new(ITEM_ID, item, false),
        Field::new(REC_RANK, DataType::Int32, false),
        Field::new(REC_SCORE, DataType::Float32, false),
    ]))
}

#[async_trait]
impl Stage for Recommend {
    fn inputs(&self) -> Vec<InputSlot> {
        let c = &self.config;
        let mut slots =
            vec![InputSlot::artifact("model", &c.model), InputSlot::table("history", &c.history, &[USER_ID, ITEM_ID])];
        slots.extend(c.users.as_ref().map(|r| InputSlot::table("users", r, &[USER_ID])));
        slots.extend(c.cold.as_ref().map(|r| InputSlot::table("cold", r, &[USER_ID, ITEM_ID, REC_RANK, REC_SCORE])));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![OutputSlot {
            name: SHORTLIST,
            what: What::Table,
            about: "`user_id`, `item_id`, `rec_rank` (1-based), `rec_score`, sorted by user and rank.",
        }]
    }

    fn identity(&self) -> Value {
        json!(self.config)
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let id = |name: &str| {
            let field = inputs.get("history").and_then(|h| h.field_with_name(name).ok());
            field.map(|f| id_type(f.data_type()))
        };
        Ok(id(USER_ID).zip(id(ITEM_ID)).map(|(u, i)| ("shortlist".to_owned(), schema(u, i))).into_iter().collect())
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let artifact = ctx.artifact("model")?.1.clone();
        let history = ctx.collect("history").await?;
        let users = ctx.collect_opt("users").await?;
        let cold = ctx.collect_opt("cold").await?;
        let places = (self.config.cold_share * f64::from(self.config.k) + 1e-9).floor() as usize;
        let (k, observer, cancel) = (self.config.k as usize, ctx.observer.clone(), ctx.cancel.clone());
        let work = move || {
            let mut result = shortlists(&artifact, &history, users.as_ref(), k, &|event| {
                match event {
                    Event::Begin(n) => observer.begin("users", n as u64),
                    Event::Done(n) => observer.advance(n as u64),
                }
                cancel.check()
            })?;
            if let (Some(cold), Some(OutputTable::Memory(table))) = (&cold, result.tables.get(SHORTLIST)) {
                let (with_new, entered) = cold::entered(table, cold, &history, k, places)?;
                result = result.with_counter("rows", with_new.num_rows()).with_counter("new_items", entered);
                result.tables.insert(SHORTLIST, OutputTable::Memory(with_new));
            }
            Ok(result)
        };
        tokio::task::spawn_blocking(work).await?
    }
}

/// Progress of [`shortlists`].
enum Event {
    /// So many users will follow.
    Begin(usize),
    /// So many more are done.
    Done(usize),
}

fn shortlists(
    artifact: &Artifact,
    history: &Table,
    users: Option<&Table>,
    k: usize,
    progress: &(dyn Fn(Event) -> Result<()> + Sync),
) -> Result<StageResult> {
    let model = TrainedModel::from_files(&artifact.files).map_err(|e| e.at("input `model`"))?;
    let history_users = ids_like(history, "history", USER_ID, &model.users)?;
    let history_items = ids_like(history, "history", ITEM_ID, &model.items)?;

    let mut rows_unknown = 0usize;
    let mut pairs = Vec::with_capacity(history.num_rows());
    for (user, item) in model.users.encode(&history_users).into_iter().zip(model.items.encode(&history_items)) {
        match (user, item) {
            (Some(user), Some(item)) => pairs.push((user, item)),
            (Some(_), None) => rows_unknown += 1,
            (None, _) => {}
        }
    }
    let seen = Histories::from_pairs(model.users.len(), &pairs);

    let asked = match users {
        None => IdMap::new(&[&history_users])?,
        Some(users) => IdMap::new(&[&ids_like(users, "users", USER_ID, &model.users)?])?,
    };
    let in_history = IdMap::new(&[&history_users])?;
    let (mut unknown, mut without_history) = (0usize, 0usize);
    let mut known = Vec::with_capacity(asked.len());
    for (row, index) in model.users.encode(asked.ids()).into_iter().enumerate() {
        match index {
            None => unknown += 1,
            Some(_) if in_history.get(&asked.ids().get(row)).is_none() => without_history += 1,
            Some(user) => known.push(user),
        }
    }
    progress(Event::Begin(known.len()))?;
    // A graph model propagates over what is known now; most models read a user's own history or none.
    let informed = model.scorer.with_history(&seen);
    let scorer = informed.as_deref().unwrap_or(model.scorer.as_ref());
    let lists = topk::top_k(scorer, &known, &seen, k, &|n| progress(Event::Done(n)))?;
    let short = lists.iter().filter(|l| l.len() < k).count();
    let table = shortlist_table(&model, &known, &lists)?;
    Ok(StageResult::default()
        .with_counter("users", lists.iter().filter(|l| !l.is_empty()).count())
        .with_counter("rows", table.num_rows())
        .with_counter("users_unknown", unknown)
        .with_counter("users_without_history", without_history)
        .with_counter("users_short", short)
        .with_counter("history_rows_unknown", rows_unknown)
        .with_table("shortlist", table))
}

/// An id column that must be of the model's type, or nothing would be found in it.
pub(super) fn ids_like(table: &Table, slot: &str, name: &str, model: &IdMap) -> Result<IdColumn> {
    let ids = table.ids(name).map_err(|e| e.at(format!("input `{slot}`")))?;
    let same = ids.data_type() == model.ids().data_type();
    match same || ids.is_empty() || model.is_empty() {
        true => Ok(ids),
        false => Err(Error::data(format!(
            "input `{slot}`: column `{name}` is {}, but the model's ids are {}",
            ids.data_type(),
            model.ids().data_type()
        ))
        .with_help("cast one of them in a `sql` stage, or train on this data")),
    }
}

/// Rows sorted by user (the order of `users`) and rank.
fn shortlist_table(model: &TrainedModel, users: &[u32], lists: &[Vec<Scored>]) -> Result<Table> {
    let rows = || users.iter().zip(lists).flat_map(|(&user, list)| list.iter().map(move |place| (user, place)));
    let user_ids = model.users.ids().take(rows().map(|(user, _)| user as usize));
    let item_ids = model.items.ids().take(rows().map(|(_, place)| place.item as usize));
    let ranks = lists.iter().flat_map(|list| 1..=list.len() as i32);
    Table::from_columns(vec![
        (USER_ID, user_ids.to_array(), false),
        (ITEM_ID, item_ids.to_array(), false),
        (REC_RANK, Arc::new(Int32Array::from_iter_values(ranks)), false),
        (REC_SCORE, Arc::new(Float32Array::from_iter_values(rows().map(|(_, place)| place.score))), false),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;
    use crate::recommenders::embedding_scorer::EmbeddingScorer;
    use crate::recommenders::saved::ModelCard;
    use arrow::array::{ArrayRef, Int64Array, StringArray};

    /// Users a, b, c; items 1 to 4; the score of item n is n for a and b, -n for c.
    fn artifact() -> Artifact {
        let all = vec![1.0, 1.0, -1.0, 1.0, 2.0, 3.0, 4.0];
        let strings = IdColumn::Str(["a", "b", "c"].map(str::to_owned).to_vec());
        let model = TrainedModel {
            card: ModelCard::new("mf", json!({}), 3, 4),
            users: IdMap::new(&[&strings]).unwrap(),
            items: IdMap::new(&[&IdColumn::Int(vec![1, 2, 3, 4])]).unwrap(),
            scorer: Box::new(EmbeddingScorer::new(3, 4, 1, all.clone(), all)),
        };
        Artifact { files: model.to_files().unwrap() }
    }

    fn strings(values: &[&str]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }

    fn history(pairs: &[(&str, i64)]) -> Table {
        let items: ArrayRef = Arc::new(Int64Array::from_iter_values(pairs.iter().map(|p| p.1)));
        let users = strings(&pairs.iter().map(|p| p.0).collect::<Vec<_>>());
        Table::from_columns(vec![(USER_ID, users, false), (ITEM_ID, items, false)]).unwrap()
    }

    fn run(history: &Table, users: Option<&Table>, k: usize) -> Result<StageResult> {
        shortlists(&artifact(), history, users, k, &|_| Ok(()))
    }

    fn rows(result: &StageResult) -> Vec<(String, i64, i32, f32)> {
        let OutputTable::Memory(table) = &result.tables["shortlist"] else { panic!("a table in memory was expected") };
        let users = table.strings(USER_ID).unwrap().into_iter().flatten();
        let (items, ranks) = (table.i64s(ITEM_ID).unwrap(), table.i32s(REC_RANK).unwrap());
        let scores = table.f32s(REC_SCORE).unwrap();
        users.zip(items).zip(ranks).zip(scores).map(|(((u, i), r), s)| (u, i, r, s)).collect()
    }

    #[test]
    fn unseen_items_come_best_first_sorted_by_user() {
        let result = run(&history(&[("c", 4), ("a", 4), ("a", 2), ("a", 9), ("z", 1)]), None, 2).unwrap();
        let want = [("a", 3, 1, 3.0), ("a", 1, 2, 1.0), ("c", 1, 1, -1.0), ("c", 2, 2, -2.0)];
        assert_eq!(rows(&result), want.map(|(u, i, r, s)| (u.to_owned(), i, r, s)));
        for (name, value) in [
            ("users", 2),
            ("rows", 4),
            ("users_unknown", 1),         // z is not in the model
            ("history_rows_unknown", 1),  // item 9 is not in the model
            ("users_without_history", 0), // b is in the model only
            ("users_short", 0),
        ] {
            assert_eq!(result.counters[name], json!(value), "{name}");
        }
        let OutputTable::Memory(table) = &result.tables["shortlist"] else { panic!() };
        assert_eq!(table.schema(), schema(DataType::Utf8, DataType::Int64));
    }

    #[test]
    fn only_the_users_that_are_asked_for() {
        let users = Table::from_columns(vec![(USER_ID, strings(&["c", "c", "b", "z"]), false)]).unwrap();
        let result = run(&history(&[("c", 4), ("a", 4)]), Some(&users), 9).unwrap();
        assert_eq!(
            rows(&result).iter().map(|r| (r.0.as_str(), r.1)).collect::<Vec<_>>(),
            [("c", 1), ("c", 2), ("c", 3)]
        );
        assert_eq!(result.counters["users_without_history"], json!(1));
        assert_eq!(result.counters["users_unknown"], json!(1));
        assert_eq!(result.counters["users_short"], json!(1));
    }

    #[test]
    fn nothing_seen_by_anyone_gives_an_empty_table() {
        let result = run(&history(&[]), None, 3).unwrap();
        assert!(rows(&result).is_empty());
    }

    #[test]
    fn ids_of_another_type_are_an_error_and_not_an_empty_result() {
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        let table = Table::from_columns(vec![(USER_ID, numbers.clone(), false), (ITEM_ID, numbers, false)]).unwrap();
        let error = run(&table, None, 3).err().unwrap();
        assert_eq!((error.fault, error.message.contains("`user_id`")), (Fault::Data, true));
    }

    #[test]
    fn a_damaged_model_is_named() {
        let mut damaged = artifact();
        damaged.files.remove("model.safetensors");
        let error = shortlists(&damaged, &history(&[("a", 1)]), None, 3, &|_| Ok(())).err().unwrap();
        assert_eq!((error.fault, error.message.contains("`model`")), (Fault::Data, true));
    }

    #[test]
    fn a_stop_request_ends_the_work() {
        let stop = |event| match event {
            Event::Begin(_) => Ok(()),
            Event::Done(_) => Err(Error::internal("stop")),
        };
        assert!(shortlists(&artifact(), &history(&[("a", 1)]), None, 3, &stop).is_err());
    }
}
