//! `kind = "sql"`: one query over the stage's inputs, run by DataFusion within a memory limit.
//!
//! In: tables under the names that the config gives them. Out: `result`, streamed. Rows have an
//! order here, which SQL tables do not: the query's own `order by` where it ends in one, else
//! `row_id` where the result has it, else all columns from left to right.

use std::collections::BTreeMap;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::dataframe::DataFrame;
use datafusion::logical_expr::{LogicalPlan, SortExpr};
use datafusion::prelude::ident;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{InputSlot, OutputSlot, OutputTable, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{ITEM_ID, ROW_ID, USER_ID};
use crate::error::{Error, Result};
use crate::query::library::{BUILTIN, stage_sql};
use crate::query::session::plan_against;
use crate::query::{open_session, parse_bytes, plan_query, read_only, register};
use crate::tables::SqlMemory;
use crate::tables::parquet::plain_schema;
use crate::tables::sql_errors::from_datafusion;

/// Config of an `sql` stage.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlConfig {
    /// The one table that the query reads; it is called `input` there. Use this or `inputs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The tables that the query reads: name in the query = source or stage output, for example
    /// `{ ratings = "interactions", movies = "items" }`.
    #[serde(default)]
    pub inputs: BTreeMap<String, String>,
    /// The SQL file: a path from the pipeline's `root`, or `builtin:NAME` for one that ships:
    /// `filters`, `dedup`, `long_tail`, `popularity`, `co_occurrence`. Use this or `query`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The query itself. A log's `row_id` must be kept where the result is a log again: it is
    /// the rule for ties. Without an `order by`, rows are sorted by `row_id`, or else by all
    /// columns from left to right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Memory that the query may use before it spills to disk, for example `"512MB"`. By default
    /// the pipeline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<String>,
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "sql",
    version: 1,
    about: "Runs one SQL query over its inputs.",
    sample: "inputs = { log = \"interactions\" }\nquery = \"select * from log where rating >= 1\"\n",
    schema: || schema_for!(SqlConfig),
    resolve,
};

const RESULT: OutputSlot = OutputSlot { name: "result", what: What::Table, about: "The rows of the query." };

fn resolve(config: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: SqlConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of an `sql` stage").because(e))?;
    let inputs: BTreeMap<String, (String, String)> = match (&config.input, config.inputs.is_empty()) {
        (Some(reference), true) => [("input".to_owned(), ("input".to_owned(), reference.clone()))].into(),
        (None, false) => {
            config.inputs.iter().map(|(name, r)| (name.clone(), (format!("inputs.{name}"), r.clone()))).collect()
        }
        (Some(_), false) => return Err(Error::spec("`input` and `inputs` are both given").with_help("use one of them")),
        (None, true) => {
            return Err(Error::spec("`input` or `inputs` is missing").with_help(
                "name what the query reads: input = \"interactions\", or inputs = { log = \"interactions\" }",
            ));
        }
    };
    let (sql, place) = match (&config.file, &config.query) {
        (Some(file), None) => (read_file(file, ctx)?, format!("`{file}`")),
        (None, Some(query)) => (query.clone(), "`query`".to_owned()),
        (Some(_), Some(_)) => return Err(Error::spec("`file` and `query` are both given").with_help("use one of them")),
        (None, None) => return Err(Error::spec("`file` or `query` is missing").with_help("give the SQL of the stage")),
    };
    read_only::check(&sql).map_err(|e| as_spec(e).at(&place))?;
    let memory_limit =
        config.memory_limit.as_deref().map(parse_bytes).transpose().map_err(|e| e.at("`memory_limit`"))?;
    Ok(Box::new(SqlStage { inputs, sql, place, memory_limit }))
}

fn read_file(file: &str, ctx: &ResolveContext<'_>) -> Result<String> {
    match file.strip_prefix(BUILTIN) {
        Some(name) => Ok(stage_sql(name)?.to_owned()),
        None => fs_err::read_to_string(ctx.root.join(file)).map_err(|e| {
            Error::spec("the SQL file of the stage cannot be read").because(e).with_help(format!(
                "`file` is a path from the pipeline's `root` ({}), or {BUILTIN}NAME",
                ctx.root.display()
            ))
        }),
    }
}

/// A statement that writes is a mistake of the pipeline file here (exit 78), not of the command line.
pub(super) fn as_spec(mut e: Error) -> Error {
    if e.fault == crate::error::Fault::Usage {
        e.fault = crate::error::Fault::Spec;
    }
    e
}

struct SqlStage {
    /// Name in the query -> (slot, reference).
    inputs: BTreeMap<String, (String, String)>,
    sql: String,
    /// How errors call the SQL.
    place: String,
    memory_limit: Option<usize>,
}

#[async_trait]
impl Stage for SqlStage {
    fn inputs(&self) -> Vec<InputSlot> {
        self.inputs.values().map(|(slot, reference)| InputSlot::table(slot, reference, &[])).collect()
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![RESULT]
    }

    /// The memory limit is no part of it: it changes how the result is made, not what it is.
    fn identity(&self) -> Value {
        json!({ "sql": self.sql, "inputs": self.inputs.keys().collect::<Vec<_>>() })
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let tables: Option<Vec<(&str, SchemaRef)>> =
            self.inputs.iter().map(|(name, (slot, _))| Some((name.as_str(), inputs.get(slot)?.clone()))).collect();
        let Some(tables) = tables else { return Ok(BTreeMap::new()) };
        let is_log = tables.iter().any(|(_, schema)| schema.index_of(ROW_ID).is_ok());
        let frame = plan_against(&tables, &self.sql).await.map_err(|e| as_spec(e).at(&self.place))?;
        check_columns(&frame, is_log).map_err(|e| e.at(&self.place))?;
        Ok(BTreeMap::from([(RESULT.name.to_owned(), plain_schema(frame.schema().as_arrow()))]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        ctx.cancel.check()?;
        let memory =
            SqlMemory { limit: self.memory_limit.unwrap_or(ctx.memory_limit), spill_dir: ctx.spill_dir.clone() };
        let session = open_session(&memory)?;
        let mut rows_in = 0;
        let mut is_log = false;
        for (name, (slot, _)) in &self.inputs {
            let table = ctx.table(slot)?;
            rows_in += table.num_rows();
            is_log |= table.schema().index_of(ROW_ID).is_ok();
            register(&session, name, table)?;
        }
        let frame = plan_query(&session, &self.sql).await.map_err(|e| as_spec(e).at(&self.place))?;
        check_columns(&frame, is_log).map_err(|e| e.at(&self.place))?;
        let stream = in_order(frame)?.execute_stream().await.map_err(from_datafusion)?;
        let mut result = StageResult::default().with_counter("rows_in", rows_in);
        result.tables.insert(RESULT.name, OutputTable::Stream(stream));
        Ok(result)
    }
}

/// A result has each name once, and a log keeps its `row_id`.
fn check_columns(frame: &DataFrame, is_log: bool) -> Result<()> {
    let names: Vec<&str> = frame.schema().fields().iter().map(|f| f.name().as_str()).collect();
    if let Some(twice) = names.iter().enumerate().find_map(|(i, n)| names[..i].contains(n).then_some(n)) {
        return Err(Error::spec(format!("the result has two columns called `{twice}`"))
            .with_help("give one of them another name with `as`"));
    }
    let has = |name: &str| names.contains(&name);
    if is_log && has(USER_ID) && has(ITEM_ID) && !has(ROW_ID) {
        return Err(Error::spec(format!("the result has `{USER_ID}` and `{ITEM_ID}` but lost `{ROW_ID}`")).with_help(format!(
            "keep `{ROW_ID}` in the select list (min({ROW_ID}) as {ROW_ID} where rows are grouped): equal timestamps are ordered by it"
        )));
    }
    Ok(())
}

/// The same rows in an order that does not depend on how the query was run.
fn in_order(frame: DataFrame) -> Result<DataFrame> {
    if ends_sorted(frame.logical_plan()) {
        return Ok(frame);
    }
    let by = |name: &str| -> SortExpr { ident(name).sort(true, false) };
    let keys: Vec<SortExpr> = match frame.schema().fields().iter().any(|f| f.name() == ROW_ID) {
        true => vec![by(ROW_ID)],
        false => frame.schema().fields().iter().filter(|f| !f.data_type().is_nested()).map(|f| by(f.name())).collect(),
    };
    match keys.is_empty() {
        true => Ok(frame),
        false => frame.sort(keys).map_err(from_datafusion),
    }
}

/// Whether the query ends in an `order by` (`limit` and the select list may stand above it).
fn ends_sorted(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Sort(_) => true,
        LogicalPlan::Limit(limit) => ends_sorted(&limit.input),
        LogicalPlan::Projection(projection) => ends_sorted(&projection.input),
        _ => false,
    }
}
