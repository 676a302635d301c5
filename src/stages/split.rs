//! `split`: an interaction table -> train, validation and test parts, and what is known at test time.
//!
//! In: one table with `user_id`, `item_id`, `row_id`, perhaps `rating` and `timestamp`.
//! Out: `train`, `valid`, `test`, `history` (the input's columns and `position`, sorted by user and
//! position), `users`, `items`. The rules are in [`crate::interactions::clean`] and
//! [`crate::interactions::split`]; here are the config and the tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Int32Array, Int64Array, RecordBatch, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{EVALUATED, INTERACTIONS, ITEM_ID, POSITION, ROW_ID, USER_ID};
use crate::error::{Error, Result};
use crate::interactions::clean::{Ordered, clean};
use crate::interactions::split::{HistoryAtTest, Method, Part, Split, SplitRule, split};
use crate::tables::Table;

/// `kind = "split"`.
pub const KIND: StageKind = StageKind {
    name: "split",
    version: 1,
    about: "Drops duplicates and earlier ratings, orders each user's interactions, and holds out the last ones.",
    sample: "input = \"interactions\"\n",
    schema: || schemars::schema_for!(SplitConfig),
    resolve,
};

/// How interactions are held out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Per user by time: the last interaction is test, the one before it validation, the rest train
    /// (arXiv 2401.13870, section 5.1). Trains on other users' future.
    #[default]
    LeaveOneOut,
    /// Two points in time, the same for all users: train, then validation, then test. Users without an interaction in a
    /// window are not evaluated on it; what they did before is train.
    GlobalTime,
    /// Nothing is held out: everything is train, for serving. `valid` and `test` are empty.
    None,
}

/// Cleans an interaction table, orders each user's interactions and holds out the last ones.
///
/// Exact duplicates (same user, item, rating and timestamp) are dropped; of several ratings of one item by one
/// user the last one by (timestamp, `row_id`) stays. A user's order is (timestamp, `row_id`).
///
/// Counters: `rows` (of the input), `duplicates_dropped`, `re_ratings_dropped`, `interactions` (what stays), `order`
/// (`timestamp` or `random`), `users`, `items`, `users_evaluated`, `users_too_few` (below `min_interactions`), `users_tied`
/// (evaluated users whose test interaction only `row_id` tells from the one before it), `train`, `valid`, `test`,
/// `set_aside` (interactions in no part: behind a time cut, of users who cannot be evaluated), `valid_from`, `test_from`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitConfig {
    /// The interaction table: `user_id`, `item_id`, `row_id`, perhaps `rating` and `timestamp`. Without
    /// `timestamp` each user's order is random, drawn from the seed and the user's id.
    pub input: String,
    /// How interactions are held out.
    #[serde(default)]
    pub strategy: Strategy,
    /// Users with fewer interactions are recommended for, but not evaluated. With `leave-one-out` all their
    /// interactions are train; with `global-time` those after a cut are in no part. At least 3, the default.
    #[serde(default = "default_min_interactions")]
    #[schemars(range(min = 3))]
    pub min_interactions: usize,
    /// `global-time`: share of all interactions, before the test ones, that is validation. Between 0 and 1; .1 by
    /// default. Interactions of one timestamp are never torn apart: all go to the later part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub valid_share: Option<f64>,
    /// `global-time`: share of all interactions, the latest ones, that is test. Between 0 and 1; .1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub test_share: Option<f64>,
    /// `global-time`, in place of shares: timestamp (in the column's unit) of the first validation interaction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_from: Option<i64>,
    /// `global-time`, in place of shares: timestamp of the first test interaction, later than `valid_from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_from: Option<i64>,
}

fn default_min_interactions() -> usize {
    3
}

/// The rule that a config means. Errors (exit 78): values that exclude each other.
fn rule(config: &SplitConfig, history_at_test: HistoryAtTest) -> Result<SplitRule> {
    let given = [
        ("valid_share", config.valid_share.is_some()),
        ("test_share", config.test_share.is_some()),
        ("valid_from", config.valid_from.is_some()),
        ("test_from", config.test_from.is_some()),
    ];
    let method = match config.strategy {
        Strategy::LeaveOneOut | Strategy::None => {
            if let Some((key, _)) = given.iter().find(|(_, is)| *is) {
                return Err(Error::spec(format!("`{key}` is read with strategy = \"global-time\" only"))
                    .with_help("remove the key, or set the strategy"));
            }
            if config.strategy == Strategy::None { Method::Nothing } else { Method::LeaveOneOut }
        }
        Strategy::GlobalTime => match (config.valid_from, config.test_from) {
            (None, None) => {
                let (valid, test) = (config.valid_share.unwrap_or(0.1), config.test_share.unwrap_or(0.1));
                if !(valid > 0.0 && test > 0.0 && valid + test < 1.0) {
                    return Err(Error::spec(format!(
                        "`valid_share` is {valid} and `test_share` is {test}; both must be above 0, and less than 1 together"
                    )));
                }
                Method::TimeShares { valid, test }
            }
            (Some(valid_from), Some(test_from)) => {
                if config.valid_share.is_some() || config.test_share.is_some() {
                    return Err(Error::spec("shares and cut points exclude each other")
                        .with_help("give `valid_share` and `test_share`, or `valid_from` and `test_from`"));
                }
                if valid_from >= test_from {
                    return Err(Error::spec(format!(
                        "`valid_from` is {valid_from}, which is not before `test_from`, {test_from}"
                    )));
                }
                Method::TimeCuts { valid_from, test_from }
            }
            _ => {
                return Err(Error::spec("`valid_from` and `test_from` belong together")
                    .with_help("give both, or shares in their place"));
            }
        },
    };
    if config.min_interactions < 3 {
        return Err(Error::spec(format!("`min_interactions` is {}", config.min_interactions))
            .with_help("3 is the least: one interaction each for train, validation and test"));
    }
    Ok(SplitRule { method, min_interactions: config.min_interactions, history_at_test })
}

struct SplitStage {
    config: SplitConfig,
    rule: SplitRule,
}

fn resolve(config: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: SplitConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `split` stage").because(e))?;
    let rule = rule(&config, HistoryAtTest::parse(ctx.history_at_test)?)?;
    Ok(Box::new(SplitStage { config, rule }))
}

#[async_trait]
impl Stage for SplitStage {
    fn inputs(&self) -> Vec<InputSlot> {
        vec![InputSlot::table("input", &self.config.input, &[USER_ID, ITEM_ID, ROW_ID])]
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        let table = |name, about| OutputSlot { name, what: What::Table, about };
        vec![
            table("train", "Interactions that weights are fitted on: the input's columns and `position`."),
            table("valid", "Held out for early stopping and calibration, same columns."),
            table("test", "Held out for the reported figures, same columns."),
            table("history", "What is known when test items are ranked (`history_at_test`), same columns."),
            table("users", "All users: `user_id`, `interactions` (N(u), in `history`), `evaluated`."),
            table("items", "All items: `item_id`, `interactions` (in `train`)."),
        ]
    }

    fn identity(&self) -> Value {
        let method = match self.rule.method {
            Method::LeaveOneOut | Method::Nothing => json!({}),
            Method::TimeShares { valid, test } => json!({ "valid_share": valid, "test_share": test }),
            Method::TimeCuts { valid_from, test_from } => json!({ "valid_from": valid_from, "test_from": test_from }),
        };
        json!({
            "input": self.config.input,
            "strategy": self.config.strategy,
            "method": method,
            "min_interactions": self.rule.min_interactions,
            "history_at_test": self.rule.history_at_test,
        })
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let Some(input) = inputs.get("input") else { return Ok(BTreeMap::new()) };
        let id = |name: &str| input.field_with_name(name).map(|f| f.data_type().clone());
        let (Ok(user), Ok(item)) = (id(USER_ID), id(ITEM_ID)) else { return Ok(BTreeMap::new()) };
        let mut fields: Vec<Field> =
            input.fields().iter().filter(|f| f.name() != POSITION).map(|f| f.as_ref().clone()).collect();
        fields.push(Field::new(POSITION, DataType::Int32, false));
        let part: SchemaRef = Arc::new(Schema::new(fields));
        let count = Field::new(INTERACTIONS, DataType::Int64, false);
        let users =
            vec![Field::new(USER_ID, user, false), count.clone(), Field::new(EVALUATED, DataType::Boolean, false)];
        let items = vec![Field::new(ITEM_ID, item, false), count];
        let mut schemas: BTreeMap<String, SchemaRef> =
            ["train", "valid", "test", "history"].map(|name| (name.to_owned(), part.clone())).into();
        schemas.insert("users".to_owned(), Arc::new(Schema::new(users)));
        schemas.insert("items".to_owned(), Arc::new(Schema::new(items)));
        Ok(schemas)
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        let table = ctx.collect("input").await?;
        let (rule, seed) = (self.rule, ctx.seed);
        ctx.cancel.check()?;
        let result = tokio::task::spawn_blocking(move || split_table(&table, &rule, seed)).await??;
        let count = |key: &str| result.counters.get(key).and_then(Value::as_u64).unwrap_or(0);
        if result.counters.get("order") == Some(&json!("random")) {
            ctx.observer.note("the log has no timestamps: each user's order is a seeded random one");
        }
        if count("users_tied") > 0 {
            ctx.observer.note(&format!(
                "{} of {} evaluated users have a test interaction that only `row_id` tells from the one before it",
                count("users_tied"),
                count("users_evaluated")
            ));
        }
        Ok(result)
    }
}

/// The outputs and counters of one split, without a stage around it.
pub(super) fn split_table(table: &Table, rule: &SplitRule, seed: u64) -> Result<StageResult> {
    let ordered = clean(table, seed)?;
    let split = split(&ordered, rule)?;
    let input = table.to_batch()?;
    let part = |keep: &dyn Fn(usize) -> bool| part_table(&input, &ordered, &split, keep);
    let result = StageResult::default()
        .with_table("train", part(&|r| split.parts[r] == Part::Train)?)
        .with_table("valid", part(&|r| split.parts[r] == Part::Valid)?)
        .with_table("test", part(&|r| split.parts[r] == Part::Test)?)
        .with_table("history", part(&|r| split.in_history[r])?)
        .with_table("users", users_table(&ordered, &split)?)
        .with_table("items", items_table(&ordered, &split)?);
    Ok(with_counters(result, &ordered, &split))
}

/// Rows of the input for which `keep(row of ordered)` holds, and their position.
fn part_table(input: &RecordBatch, ordered: &Ordered, split: &Split, keep: &dyn Fn(usize) -> bool) -> Result<Table> {
    let kept: Vec<usize> = (0..ordered.rows.len()).filter(|&r| keep(r)).collect();
    let rows: UInt32Array = kept.iter().map(|&r| ordered.rows[r]).collect();
    let positions: Int32Array = kept.iter().map(|&r| split.positions[r]).collect();
    let schema = input.schema();
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in schema.fields().iter().zip(input.columns()) {
        let (field, column): (Field, ArrayRef) = match field.name().as_str() {
            // Ids leave in the one type that every stage expects, without the nulls that `clean` excluded.
            name @ (USER_ID | ITEM_ID) => {
                let (map, dense) = match name {
                    USER_ID => (&ordered.user_map, &ordered.users),
                    _ => (&ordered.item_map, &ordered.items),
                };
                let ids = map.ids().take(kept.iter().map(|&r| dense[r] as usize)).to_array();
                (Field::new(name, ids.data_type().clone(), false), ids)
            }
            POSITION => continue,
            _ => (field.as_ref().clone(), arrow::compute::take(column.as_ref(), &rows, None)?),
        };
        fields.push(field);
        columns.push(column);
    }
    fields.push(Field::new(POSITION, DataType::Int32, false));
    columns.push(Arc::new(positions));
    Ok(Table::from_batch(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?))
}

fn users_table(ordered: &Ordered, split: &Split) -> Result<Table> {
    Table::from_columns(vec![
        (USER_ID, ordered.user_map.ids().to_array(), false),
        (INTERACTIONS, Arc::new(Int64Array::from(split.interactions.clone())), false),
        (EVALUATED, Arc::new(BooleanArray::from(split.evaluated.clone())), false),
    ])
}

fn items_table(ordered: &Ordered, split: &Split) -> Result<Table> {
    let mut interactions = vec![0i64; ordered.item_map.len()];
    for (&item, &part) in ordered.items.iter().zip(&split.parts) {
        interactions[item as usize] += i64::from(part == Part::Train);
    }
    Table::from_columns(vec![
        (ITEM_ID, ordered.item_map.ids().to_array(), false),
        (INTERACTIONS, Arc::new(Int64Array::from(interactions)), false),
    ])
}

fn with_counters(result: StageResult, ordered: &Ordered, split: &Split) -> StageResult {
    let evaluated = split.evaluated.iter().filter(|&&e| e).count();
    let result = result
        .with_counter("rows", ordered.report.rows)
        .with_counter("duplicates_dropped", ordered.report.duplicates)
        .with_counter("re_ratings_dropped", ordered.report.re_ratings)
        .with_counter("interactions", ordered.rows.len())
        .with_counter("order", if ordered.timestamps.is_some() { "timestamp" } else { "random" })
        .with_counter("users", ordered.user_map.len())
        .with_counter("items", ordered.item_map.len())
        .with_counter("users_evaluated", evaluated)
        .with_counter("users_too_few", split.users_too_few)
        .with_counter("users_tied", split.users_tied)
        .with_counter("train", split.count(Part::Train))
        .with_counter("valid", split.count(Part::Valid))
        .with_counter("test", split.count(Part::Test))
        .with_counter("set_aside", split.count(Part::SetAside));
    match split.cuts {
        None => result,
        Some((valid_from, test_from)) => {
            result.with_counter("valid_from", valid_from).with_counter("test_from", test_from)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arrow::array::{AsArray, StringArray};
    use arrow::datatypes::Int64Type;

    use super::super::context::OutputTable;
    use super::*;
    use crate::columns::{RATING, TIMESTAMP};

    fn stage(config: Value) -> Result<Box<dyn Stage>> {
        resolve(config, &ResolveContext { root: Path::new("."), history_at_test: "train" })
    }

    fn memory<'a>(result: &'a StageResult, name: &str) -> &'a Table {
        match &result.tables[name] {
            OutputTable::Memory(table) => table,
            OutputTable::Stream(_) => panic!("a stream"),
        }
    }

    fn names(table: &Table) -> Vec<String> {
        table.schema().fields().iter().map(|f| f.name().clone()).collect()
    }

    const LOO: SplitRule =
        SplitRule { method: Method::LeaveOneOut, min_interactions: 3, history_at_test: HistoryAtTest::TrainAndValid };

    #[test]
    fn tables_keep_all_columns_and_are_sorted() {
        let ids = |v: Vec<&str>| Arc::new(StringArray::from(v)) as ArrayRef;
        let ints = |v: Vec<i64>| Arc::new(Int64Array::from(v)) as ArrayRef;
        let table = Table::from_columns(vec![
            ("shop", ids(vec!["x", "y", "x", "y", "x", "x"]), false),
            (USER_ID, ids(vec!["u2", "u2", "u1", "u2", "u1", "u2"]), true),
            (ITEM_ID, ids(vec!["c", "a", "a", "b", "b", "c"]), false),
            (TIMESTAMP, ints(vec![3, 1, 7, 2, 8, 3]), false),
            (POSITION, ints(vec![9; 6]), false),
            (ROW_ID, ints(vec![0, 1, 2, 3, 4, 5]), false),
        ])
        .unwrap();
        let result = split_table(&table, &LOO, 0).unwrap();
        let train = memory(&result, "train");
        assert_eq!(names(train), ["shop", "user_id", "item_id", "timestamp", "row_id", "position"]);
        assert_eq!(train.strings(USER_ID).unwrap().into_iter().flatten().collect::<Vec<_>>(), ["u1", "u1", "u2"]);
        assert_eq!(train.i32s(POSITION).unwrap(), [0, 1, 0]);
        assert_eq!(memory(&result, "valid").i64s(ROW_ID).unwrap(), [3]);
        // Rows 0 and 5 are exact duplicates; the later one stays.
        assert_eq!(memory(&result, "test").i64s(ROW_ID).unwrap(), [5]);
        assert_eq!(memory(&result, "history").i64s(ROW_ID).unwrap(), [2, 4, 1, 3]);
        let users = memory(&result, "users");
        assert_eq!(users.i64s(INTERACTIONS).unwrap(), [2, 2]);
        let evaluated = users.column(EVALUATED).unwrap();
        assert_eq!(evaluated.as_boolean(), &BooleanArray::from(vec![false, true]));
        let items = memory(&result, "items");
        assert_eq!(items.column(INTERACTIONS).unwrap().as_primitive::<Int64Type>().values(), &[2, 1, 0]);
        assert_eq!(result.counters["duplicates_dropped"], 1);
        assert_eq!(result.counters["users_too_few"], 1);
        assert_eq!(result.counters["order"], "timestamp");
        assert!(!memory(&result, "train").has(RATING));
    }

    #[test]
    fn every_output_that_is_promised_is_there() {
        let stage = stage(json!({ "input": "x" })).unwrap();
        let rows: Vec<_> = (0..6).map(|t| (t % 2, t, 1., t)).collect();
        let result = split_table(&crate::interactions::clean::tests::log(&rows), &LOO, 0).unwrap();
        for output in stage.outputs() {
            assert!(result.tables.contains_key(output.name), "{}", output.name);
        }
        assert_eq!(result.tables.len(), stage.outputs().len());
    }

    #[test]
    fn identity_holds_defaults_and_the_history_switch() {
        let identity = stage(json!({ "input": "x", "strategy": "global-time" })).unwrap().identity();
        assert_eq!(identity["method"], json!({ "valid_share": 0.1, "test_share": 0.1 }));
        assert_eq!(identity["history_at_test"], "train");
        assert_eq!(identity["min_interactions"], 3);
    }

    #[test]
    fn configs_that_contradict_themselves_are_refused() {
        for (config, word) in [
            (json!({ "input": "x", "valid_share": 0.2 }), "valid_share"),
            (json!({ "input": "x", "strategy": "none", "test_share": 0.2 }), "test_share"),
            (json!({ "input": "x", "strategy": "global-time", "valid_share": 0.6, "test_share": 0.4 }), "less than 1"),
            (json!({ "input": "x", "strategy": "global-time", "valid_from": 3 }), "test_from"),
            (json!({ "input": "x", "strategy": "global-time", "valid_from": 3, "test_from": 3 }), "not before"),
            (
                json!({ "input": "x", "strategy": "global-time", "valid_from": 3, "test_from": 4, "test_share": 0.1 }),
                "exclude",
            ),
            (json!({ "input": "x", "min_interactions": 2 }), "min_interactions"),
            (json!({ "input": "x", "minimum": 2 }), "minimum"),
        ] {
            let error = stage(config.clone()).err().unwrap_or_else(|| panic!("{config} was taken"));
            assert_eq!(error.fault.exit_code(), 78);
            assert!(error.message.contains(word), "{error}");
        }
        assert!(HistoryAtTest::parse("test").is_err());
    }

    #[test]
    fn the_sample_parses() {
        let sample: Value = serde_json::to_value(toml::from_str::<toml::Table>(KIND.sample).unwrap()).unwrap();
        assert_eq!(stage(sample).unwrap().inputs().len(), 1);
    }
}
