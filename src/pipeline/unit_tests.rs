//! `[[test]]` blocks: rows in, rows expected, one stage run on them and nothing else.
//!
//! In: a pipeline and one of its tests. Out: an [`Outcome`] whose mistakes a person can read. Rows become tables in
//! memory; neither sources nor artifacts nor the warehouse are touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float32Array, Float64Array, Int64Array, StringArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, TimeUnit};
use arrow::json::LineDelimitedWriter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::diagnostics::Diagnostic;
use super::document::Item;
use super::events::Silent;
use super::graph::{Node, StageNode};
use super::nodes::Surroundings;
use super::{Pipeline, unit_diff};
use crate::catalog::FetchProgress;
use crate::columns::{RATING, ROW_ID};
use crate::error::{Error, Result};
use crate::stages::context::Cancel;
use crate::stages::{OutputTable, Publishing, StageContext, StageInput, What};
use crate::tables::source_config::ColumnType;
use crate::tables::{Store, StoredTable, Table};

/// A row: column = value. What TOML has no word for, null, is a column that is left out.
pub type Row = Map<String, Value>;

/// One `[[test]]` block.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UnitTest {
    /// What it shows, in a few words.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The stage that is run on the rows.
    pub stage: String,
    /// Rows in: input of the stage = a list of rows, each `{ column = value, ... }`. The input has the name of its key
    /// (of an `sql` stage: of the table in the query). Columns that a row leaves out are null there. Where an input is a
    /// source, `row_id` is counted up as the reader does, unless the rows have it.
    pub given: BTreeMap<String, Vec<Row>>,
    /// Types of columns of `given`, where the values don't show them: `column = "timestamp"`. Without it, integers are
    /// int64, other numbers float64 (`rating` float32), and the rest strings or booleans.
    #[serde(default)]
    pub types: BTreeMap<String, ColumnType>,
    /// The output that is compared; the stage's first one by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// The rows that must come out. Only columns that one of them names are compared; one that a row leaves out must be
    /// null in it.
    pub expect: Vec<Row>,
    /// Whether the order of the rows counts.
    #[serde(default)]
    pub ordered: bool,
}

/// How a test ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Differences, a line or more each; none where it passed.
    pub mistakes: Vec<String>,
    /// Rows that were compared.
    pub rows: usize,
}

/// The names that `given` may use, by slot: `inputs.log` is called `log`.
fn short(slot: &str) -> &str {
    slot.strip_prefix("inputs.").unwrap_or(slot)
}

/// Tests that name what is not there: a stage, an input, an output.
pub fn check(tests: &[(UnitTest, Item)], stages: &[StageNode], out: &mut Vec<Diagnostic>) {
    for (test, item) in tests {
        let place = |key: &str| item.get(key).map_or_else(|| item.origin.clone(), |i| i.origin.clone());
        let Some(stage) = stages.iter().find(|s| s.name == test.stage) else {
            out.push(
                Diagnostic::new(
                    format!("test `{}`: there is no stage `{}`", test.name, test.stage),
                    place("stage"),
                    "there is no such stage",
                )
                .with_suggestion(&test.stage, stages.iter().map(|s| s.name.as_str()), "the stages are"),
            );
            continue;
        };
        let slots: Vec<&str> = stage.inputs.iter().map(|i| short(&i.slot.slot)).collect();
        for entry in item.get("given").map(Item::entries).unwrap_or_default() {
            if !slots.contains(&entry.key.as_str()) {
                out.push(
                    Diagnostic::new(
                        format!("test `{}`: stage `{}` has no input `{}`", test.name, test.stage, entry.key),
                        entry.key_origin.clone(),
                        "there is no such input",
                    )
                    .with_suggestion(&entry.key, slots.iter().copied(), "its inputs are"),
                );
            }
        }
        for slot in slots.iter().filter(|s| !test.given.contains_key(**s)) {
            out.push(
                Diagnostic::new(
                    format!("test `{}`: the input `{slot}` of stage `{}` has no rows", test.name, test.stage),
                    place("given"),
                    format!("`{slot}` is missing"),
                )
                .with_help(format!("add `{slot} = [...]` to `given`; an empty list will do")),
            );
        }
        if let Some(output) = &test.output
            && !stage.outputs.iter().any(|o| o.name == output)
        {
            out.push(
                Diagnostic::new(
                    format!("test `{}`: stage `{}` has no output `{output}`", test.name, test.stage),
                    place("output"),
                    "there is no such output",
                )
                .with_suggestion(output, stage.outputs.iter().map(|o| o.name), "its outputs are"),
            );
        }
    }
}

/// Models that a stage needs are fetched without a word.
struct Quietly;

impl FetchProgress for Quietly {
    fn begin(&self, _name: &str, _total_bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn line(&self, _text: &str) {}
}

/// Runs one test. Errors: the stage itself failed, or the rows make no table (exit 78).
pub async fn run(pipeline: &Pipeline, around: &Surroundings, test: &UnitTest) -> Result<Outcome> {
    run_at(pipeline, around, test).await.map_err(|e| e.at(format!("test `{}`", test.name)))
}

async fn run_at(pipeline: &Pipeline, around: &Surroundings, test: &UnitTest) -> Result<Outcome> {
    let node = pipeline
        .stage(&test.stage)
        .ok_or_else(|| Error::internal(format!("the stage `{}` of a test is gone", test.stage)))?;
    let memory = Store::open("memory:///", &pipeline.root)?;
    let mut inputs = BTreeMap::new();
    for input in &node.inputs {
        let slot = &input.slot.slot;
        if input.slot.what == What::Artifact {
            return Err(Error::spec(format!("stage `{}` reads the artifact `{}`", test.stage, input.slot.reference))
                .with_help("only stages whose inputs are all tables can be tested with rows"));
        }
        let rows = test.given.get(short(slot)).map(Vec::as_slice).unwrap_or_default();
        let counted = matches!(input.from, Node::Source(_));
        let table = table(rows, &test.types, counted).map_err(|e| e.at(format!("`given.{}`", short(slot))))?;
        super::run::check_columns(slot, &input.slot.reference, &input.slot.columns, &table.schema())?;
        let stored = StoredTable::write(&memory, &format!("{}.parquet", inputs.len()), &table).await?;
        inputs.insert(slot.clone(), StageInput::Table(stored));
    }
    let mut models = BTreeMap::new();
    for name in node.outside_models() {
        let file = around.catalog.resolve_model(&name, &pipeline.root, &around.cache, &Quietly).await?;
        models.insert(name, file);
    }
    let ctx = StageContext {
        name: node.name.clone(),
        seed: node.seed,
        device: pipeline.device,
        inputs,
        models,
        savings: memory.child("savings"),
        warehouse: memory.child("warehouse"),
        run_id: "test".to_owned(),
        publishing: Publishing { dry: true, pipeline: pipeline.name.clone(), ..Publishing::default() },
        memory_limit: pipeline.memory_limit,
        spill_dir: pipeline.spill_dir.clone(),
        observer: Arc::new(Silent),
        cancel: Cancel::default(),
    };
    let mut result = node.stage.run(&ctx).await?;
    let wanted = test.output.as_deref().or_else(|| node.outputs.first().map(|o| o.name)).unwrap_or_default();
    let name = node.outputs.iter().map(|o| o.name).find(|o| *o == wanted);
    let table = match name.and_then(|n| result.tables.remove(n)) {
        Some(OutputTable::Memory(table)) => table,
        Some(OutputTable::Stream(rows)) => {
            StoredTable::write_stream(&memory, "result.parquet", rows).await?.collect().await?
        }
        None => {
            return Err(Error::spec(format!("the output `{wanted}` of stage `{}` is no table", test.stage))
                .with_help("name one with `output`"));
        }
    };
    compare(test, &table)
}

fn compare(test: &UnitTest, table: &Table) -> Result<Outcome> {
    let columns = names(&test.expect);
    let schema = table.schema();
    let missing: Vec<&str> = columns.iter().copied().filter(|c| schema.index_of(c).is_err()).collect();
    if !missing.is_empty() {
        let there: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        let mistake = format!("the result has no column `{}`; it has: {}", missing.join("`, `"), there.join(", "));
        return Ok(Outcome { mistakes: vec![mistake], rows: table.num_rows() });
    }
    let actual = json_rows(table, &columns)?;
    let fill = |row: &Row| -> Row {
        columns.iter().map(|c| ((*c).to_owned(), row.get(*c).cloned().unwrap_or(Value::Null))).collect()
    };
    let expected: Vec<Row> = test.expect.iter().map(fill).collect();
    Ok(Outcome { mistakes: unit_diff::differences(&expected, &actual, test.ordered), rows: actual.len() })
}

/// The columns of rows, in the order in which they come up.
fn names(rows: &[Row]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for name in rows.iter().flat_map(Map::keys) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names
}

/// Rows of a table as JSON; where no column is asked for, rows without any.
fn json_rows(table: &Table, columns: &[&str]) -> Result<Vec<Row>> {
    if columns.is_empty() {
        return json_rows_of(table, &table.schema().fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>());
    }
    json_rows_of(table, columns)
}

fn json_rows_of(table: &Table, columns: &[&str]) -> Result<Vec<Row>> {
    let batch = table.to_batch()?;
    let at = columns.iter().map(|c| batch.schema().index_of(c)).collect::<Result<Vec<_>, _>>()?;
    let batch = batch.project(&at)?;
    let mut text = Vec::new();
    let mut writer = LineDelimitedWriter::new(&mut text);
    writer.write(&batch)?;
    writer.finish()?;
    drop(writer);
    let broken = |e: serde_json::Error| Error::internal("rows as JSON").because(e);
    let lines = text.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    lines
        .map(|line| {
            let mut row: Row = serde_json::from_slice(line).map_err(broken)?;
            // The writer leaves nulls out.
            Ok(columns.iter().map(|c| ((*c).to_owned(), row.remove(*c).unwrap_or(Value::Null))).collect())
        })
        .collect()
}

fn table(rows: &[Row], types: &BTreeMap<String, ColumnType>, counted: bool) -> Result<Table> {
    let mut names = names(rows);
    if rows.is_empty() {
        names = types.keys().map(String::as_str).collect();
    }
    let mut columns: Vec<(&str, ArrayRef, bool)> = Vec::new();
    if counted && !names.contains(&ROW_ID) {
        columns.push((ROW_ID, Arc::new(Int64Array::from_iter_values(0..rows.len() as i64)), false));
    }
    for name in names {
        let values: Vec<&Value> = rows.iter().map(|r| r.get(name).unwrap_or(&Value::Null)).collect();
        columns.push((name, column(name, &values, types.get(name).copied())?, true));
    }
    if columns.is_empty() {
        return Err(Error::spec("there is neither a row nor a type, so that no column is known")
            .with_help("name the columns in `types`: types = { item_id = \"int64\" }"));
    }
    Table::from_columns(columns)
}

fn column(name: &str, values: &[&Value], declared: Option<ColumnType>) -> Result<ArrayRef> {
    let there: Vec<&Value> = values.iter().copied().filter(|v| !v.is_null()).collect();
    let kind = declared.unwrap_or_else(|| match () {
        () if there.is_empty() => ColumnType::String,
        () if name == RATING && there.iter().all(|v| v.is_number()) => ColumnType::Float32,
        () if there.iter().all(|v| v.is_i64()) => ColumnType::Int64,
        () if there.iter().all(|v| v.is_number()) => ColumnType::Float64,
        () if there.iter().all(|v| v.is_boolean()) => ColumnType::Boolean,
        () => ColumnType::String,
    });
    let wrong = |what: &str| {
        let odd = there.iter().find(|v| match what {
            "integers" => !v.is_i64(),
            "numbers" => !v.is_number(),
            "booleans" => !v.is_boolean(),
            _ => !v.is_string(),
        });
        odd.map(|v| {
            Error::spec(format!("the column `{name}` has the value {v} among {what}"))
                .with_help("give all its values one type")
        })
    };
    let check = |what: &str| wrong(what).map_or(Ok(()), Err);
    Ok(match kind {
        ColumnType::Int64 => {
            check("integers")?;
            Arc::new(values.iter().map(|v| v.as_i64()).collect::<Int64Array>())
        }
        ColumnType::Float64 => {
            check("numbers")?;
            Arc::new(values.iter().map(|v| v.as_f64()).collect::<Float64Array>())
        }
        ColumnType::Float32 => {
            check("numbers")?;
            Arc::new(values.iter().map(|v| v.as_f64().map(|x| x as f32)).collect::<Float32Array>())
        }
        ColumnType::Boolean => {
            check("booleans")?;
            Arc::new(values.iter().map(|v| v.as_bool()).collect::<BooleanArray>())
        }
        ColumnType::String => {
            check("strings")?;
            Arc::new(values.iter().map(|v| v.as_str()).collect::<StringArray>())
        }
        ColumnType::Timestamp => {
            check("strings")?;
            let text: ArrayRef = Arc::new(values.iter().map(|v| v.as_str()).collect::<StringArray>());
            let to = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
            let options = CastOptions { safe: false, ..Default::default() };
            cast_with_options(&text, &to, &options)
                .map_err(|e| Error::spec(format!("the column `{name}` has a value that is no time")).because(e))?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rows(value: Value) -> Vec<Row> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn rows_become_tables() {
        let given = rows(json!([{"user_id": 1, "rating": 4, "x": 1.5}, {"user_id": 2, "rating": 3.5, "name": "a"}]));
        let made = table(&given, &BTreeMap::new(), true).unwrap();
        let types: Vec<String> =
            made.schema().fields().iter().map(|f| format!("{} {}", f.name(), f.data_type())).collect();
        assert_eq!(types, ["row_id Int64", "user_id Int64", "rating Float32", "x Float64", "name Utf8"]);
        assert_eq!(
            json_rows(&made, &["name", "x"]).unwrap(),
            rows(json!([{"name": null, "x": 1.5}, {"name": "a", "x": null}]))
        );

        let declared = BTreeMap::from([("at".to_owned(), ColumnType::Timestamp)]);
        let made = table(&rows(json!([{"at": "2026-11-22T10:00:00Z"}])), &declared, false).unwrap();
        assert!(matches!(made.schema().field(0).data_type(), DataType::Timestamp(..)));
        let empty = table(&[], &declared, false).unwrap();
        assert_eq!((empty.num_rows(), empty.schema().fields().len()), (0, 1));

        let wrong = table(&rows(json!([{"user_id": 1}, {"user_id": "a"}])), &BTreeMap::new(), false).unwrap_err();
        assert!(wrong.message.contains("`user_id` has the value 1 among strings"), "{wrong}");
        assert!(table(&[], &BTreeMap::new(), false).is_err());
        assert!(table(&rows(json!([{"at": "soon"}])), &declared, false).is_err());
    }
}
