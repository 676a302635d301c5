//! `audit`: SQL questions about what is to be published, each with bounds for its answer.
//!
//! In: tables under the names that the queries use, and the latest earlier partition of a published table as `previous`.
//! Out: `audits`, one row per question: value, bounds, whether it passed, what offends. A `write` stage that names this
//! one in `audits` publishes nothing where a question did not pass ([`refuse`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{ScalarValue, TableReference};
use datafusion::dataframe::DataFrame;
use datafusion::datasource::MemTable;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::{SessionContext, col, lit};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use super::sql::as_spec;
use crate::columns::{AUDIT, DETAIL, PASSED, VALUE};
use crate::error::{Error, Fault, Result};
use crate::query::catalog::open_published;
use crate::query::library::{BUILTIN, audit_sql};
use crate::query::session::plan_against;
use crate::query::{open_session, plan_query, read_only, register};
use crate::tables::schemas::{AUDITS, RECOMMENDATIONS};
use crate::tables::sql_errors::from_datafusion;
use crate::tables::{SqlMemory, Table};

/// The name by which queries read the earlier partition.
const PREVIOUS: &str = "previous";
/// Rows of a query that are looked at: the value is in the first, all of them name offenders.
const ROWS: usize = 20;
/// Offenders that `detail` names.
const NAMED: usize = 5;

/// Config of an `audit` stage.
///
/// An audit is a query with a number in its column `value`, the same in all rows; where the rows have other columns they name
/// what offends, and the first of them are told in `detail`. No row means 0, a value of null that there was nothing to look
/// at (`passed` is null, and nothing is refused). A query that reads `previous` is not asked in the first night, when there is
/// none.
///
/// Counters: `audits`, `failed`, `skipped`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditConfig {
    /// The tables that the queries read: name in the query = source or stage output. The audits that ship read
    /// `recommendations` (the table to be published), `history`, `users`, `train` and `test`.
    pub inputs: BTreeMap<String, String>,
    /// The earlier partition that the queries read as `previous`. Without it, audits that read it are skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<PreviousConfig>,
    /// The audits by name, for example `coverage = { min = 0.99 }`. A name without `file` is one that ships: `coverage`,
    /// `k_items`, `repeats`, `nulls`, `seen`, `leakage`, `future`, `fallback`, `churn`, `concentration`, `gini`,
    /// `drift_rec_score`, `drift_alpha`, `drift_interactions`, `drift_popularity` (what each asks stands at its top, in
    /// `sql/audits/`).
    pub checks: BTreeMap<String, CheckConfig>,
}

/// Where the earlier partition is.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PreviousConfig {
    /// Name of the published table in the warehouse.
    pub table: String,
    /// The partition of this run, for example `{ ds = "{{ ds }}" }`: the greatest one that is less, as text, is taken.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
    pub before: BTreeMap<String, String>,
}

/// One audit.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckConfig {
    /// A query of your own: a path from the pipeline's `root`. By default the one that ships under the audit's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Least value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Greatest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Numbers that the query reads as `$NAME`, for example `{ k = 10 }`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub values: BTreeMap<String, f64>,
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "audit",
    version: 1,
    about: "Asks SQL questions about what is to be published, each with bounds for its answer.",
    sample: r#"inputs = { recommendations = "fused", users = "parts.users" }
previous = { table = "recommendations", before = { ds = "2026-11-22" } }
checks = { coverage = { min = 0.99 }, k_items = { max = 0, values = { k = 10 } }, churn = { min = 0.2 } }
"#,
    schema: || schema_for!(AuditConfig),
    resolve,
};

const OUTPUT: OutputSlot = OutputSlot {
    name: "audits",
    what: What::Table,
    about: "One row per audit: `audit`, `value`, `min`, `max`, `passed`, `detail`.",
};

/// A check with its query.
struct Check {
    name: String,
    sql: String,
    config: CheckConfig,
}

struct AuditStage {
    /// Name in the query -> (slot, reference).
    inputs: BTreeMap<String, (String, String)>,
    previous: Option<(String, String, String)>,
    checks: Vec<Check>,
}

fn resolve(config: Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: AuditConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of an `audit` stage").because(e))?;
    if config.checks.is_empty() {
        return Err(Error::spec("`checks` is empty").with_help("name an audit: checks = { coverage = { min = 0.99 } }"));
    }
    if config.inputs.contains_key(PREVIOUS) {
        return Err(Error::spec(format!("`{PREVIOUS}` cannot be a name in `inputs`"))
            .with_help("it is the earlier partition of the published table that the key `previous` names"));
    }
    let previous = match config.previous {
        None => None,
        Some(PreviousConfig { table, before }) => match before.into_iter().collect::<Vec<_>>().as_slice() {
            [(column, value)] => Some((table, column.clone(), value.clone())),
            _ => {
                return Err(Error::spec("`before` names one partition column")
                    .with_help("for example: before = { ds = \"{{ ds }}\" }"));
            }
        },
    };
    let mut checks = Vec::new();
    for (name, check) in config.checks {
        if check.min.is_none() && check.max.is_none() {
            return Err(Error::spec(format!("audit `{name}` has neither `min` nor `max`"))
                .with_help("give a bound, or the audit cannot fail"));
        }
        let sql = match &check.file {
            None => audit_sql(&name)?.to_owned(),
            Some(file) => match file.strip_prefix(BUILTIN) {
                Some(ours) => audit_sql(ours)?.to_owned(),
                None => fs_err::read_to_string(ctx.root.join(file))
                    .map_err(|e| Error::spec(format!("the `file` of audit `{name}` cannot be read")).because(e))?,
            },
        };
        read_only::check(&sql).map_err(|e| as_spec(e).at(format!("audit `{name}`")))?;
        checks.push(Check { name, sql, config: check });
    }
    let slot = |(name, reference): (String, String)| (name.clone(), (format!("inputs.{name}"), reference));
    Ok(Box::new(AuditStage { inputs: config.inputs.into_iter().map(slot).collect(), previous, checks }))
}

#[async_trait]
impl Stage for AuditStage {
    fn inputs(&self) -> Vec<InputSlot> {
        self.inputs.values().map(|(slot, reference)| InputSlot::table(slot, reference, &[])).collect()
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![OUTPUT]
    }

    fn identity(&self) -> Value {
        let checks: Vec<Value> =
            self.checks.iter().map(|c| json!([c.name, c.sql, c.config.min, c.config.max, c.config.values])).collect();
        json!({ "inputs": self.inputs.keys().collect::<Vec<_>>(), "previous": self.previous, "checks": checks })
    }

    /// The earlier partition is in no fingerprint.
    fn cacheable(&self) -> bool {
        false
    }

    async fn plan_schemas(&self, inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let tables: Option<Vec<(&str, SchemaRef)>> =
            self.inputs.iter().map(|(name, (slot, _))| Some((name.as_str(), inputs.get(slot)?.clone()))).collect();
        if let Some(mut tables) = tables {
            let same = tables.iter().find(|(name, _)| *name == "recommendations").map(|(_, schema)| schema.clone());
            tables.extend(same.map(|schema| (PREVIOUS, schema)));
            for check in &self.checks {
                let frame = plan_against(&tables, &check.sql).await.map_err(|e| check.at(e))?;
                check.with_values(frame)?;
            }
        }
        Ok(BTreeMap::from([(OUTPUT.name.to_owned(), AUDITS.plain_schema())]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        ctx.cancel.check()?;
        let session = open_session(&SqlMemory { limit: ctx.memory_limit, spill_dir: ctx.spill_dir.clone() })?;
        for (name, (slot, _)) in &self.inputs {
            register(&session, name, ctx.table(slot)?)?;
        }
        let none = self.previous(ctx, &session).await?;
        let mut rows = Rows::default();
        ctx.observer.begin("audits", self.checks.len() as u64);
        for check in &self.checks {
            ctx.cancel.check()?;
            let answer = check.ask(&session, none.as_deref()).await.map_err(|e| check.at(e))?;
            if let Some(text) = rows.push(check, answer) {
                ctx.observer.note(&text);
            }
            ctx.observer.advance(1);
        }
        let count = |wanted: Option<bool>| rows.passed.iter().filter(|p| **p == wanted).count();
        Ok(StageResult::default()
            .with_counter("audits", self.checks.len())
            .with_counter("failed", count(Some(false)))
            .with_counter("skipped", count(None))
            .with_table(OUTPUT.name, rows.into_table()?))
    }
}

impl AuditStage {
    /// Registers the earlier partition. Where there is none, a table without rows in its place, and why.
    async fn previous(&self, ctx: &StageContext, session: &SessionContext) -> Result<Option<String>> {
        let mut why = "the stage names no `previous`".to_owned();
        if let Some((table, column, value)) = &self.previous {
            why = format!("`{table}` has no partition before `{column}={value}`");
            if let Some(provider) = open_published(&ctx.warehouse, table).await? {
                let all = session.read_table(provider).map_err(from_datafusion)?;
                let earlier = all.clone().filter(col(column).lt(lit(value.as_str()))).map_err(from_datafusion)?;
                let latest = earlier
                    .aggregate(vec![], vec![datafusion::functions_aggregate::expr_fn::max(col(column))])
                    .map_err(from_datafusion)?
                    .collect()
                    .await
                    .map_err(from_datafusion)?;
                let latest = latest.first().map(|b| ScalarValue::try_from_array(b.column(0), 0)).transpose();
                if let Some(latest) = latest.map_err(from_datafusion)?
                    && !latest.is_null()
                {
                    let before = all.filter(col(column).eq(lit(latest))).map_err(from_datafusion)?;
                    session
                        .register_table(TableReference::bare(PREVIOUS), before.into_view())
                        .map_err(from_datafusion)?;
                    return Ok(None);
                }
            }
        }
        let like = self.inputs.get("recommendations").map(|(slot, _)| ctx.table(slot)).transpose()?;
        let schema = like.map_or_else(|| RECOMMENDATIONS.plain_schema(), |t| t.schema());
        let empty = MemTable::try_new(schema, vec![vec![]]).map_err(from_datafusion)?;
        session.register_table(TableReference::bare(PREVIOUS), Arc::new(empty)).map_err(from_datafusion)?;
        Ok(Some(why))
    }
}

/// What a query gave.
enum Answer {
    Value(f64, Option<String>),
    Skipped(String),
}

impl Check {
    fn at(&self, e: Error) -> Error {
        as_spec(e).at(format!("audit `{}`", self.name))
    }

    fn with_values(&self, frame: DataFrame) -> Result<DataFrame> {
        if frame.schema().fields().iter().all(|f| f.name() != VALUE) {
            return Err(
                self.at(Error::spec(format!("the query has no column `{VALUE}`")).with_help("select ... as value"))
            );
        }
        // Whole numbers are compared with counts, which are no floats.
        let scalar = |v: f64| match v.fract() == 0.0 && v.abs() < 9e15 {
            true => ScalarValue::Int64(Some(v as i64)),
            false => ScalarValue::Float64(Some(v)),
        };
        let values: Vec<(&str, ScalarValue)> =
            self.config.values.iter().map(|(name, v)| (name.as_str(), scalar(*v))).collect();
        frame.with_param_values(values).map_err(|e| {
            self.at(from_datafusion(e)).with_help("numbers that a query reads as `$NAME` are in `values`: { k = 10 }")
        })
    }

    /// `none` says why there is no earlier partition.
    async fn ask(&self, session: &SessionContext, none: Option<&str>) -> Result<Answer> {
        let frame = self.with_values(plan_query(session, &self.sql).await?)?;
        if let Some(why) = none
            && reads(frame.logical_plan(), PREVIOUS).map_err(from_datafusion)?
        {
            return Ok(Answer::Skipped(why.to_owned()));
        }
        let rows = frame.limit(0, Some(ROWS)).map_err(from_datafusion)?.collect().await.map_err(from_datafusion)?;
        let rows: Vec<RecordBatch> = rows.into_iter().filter(|b| b.num_rows() > 0).collect();
        let Some(first) = rows.first() else { return Ok(Answer::Value(0.0, None)) };
        let value = first.column_by_name(VALUE).ok_or_else(|| Error::internal("an audit lost its value"))?;
        let value = arrow::compute::cast(value, &DataType::Float64).map_err(|e| {
            Error::spec(format!("the column `{VALUE}` is {}, which is no number", value.data_type())).because(e)
        })?;
        match ScalarValue::try_from_array(&value, 0).map_err(from_datafusion)? {
            ScalarValue::Float64(Some(value)) => Ok(Answer::Value(value, offenders(&rows)?)),
            _ => Ok(Answer::Skipped("there was nothing to look at".to_owned())),
        }
    }
}

/// Whether a plan scans a table of that name, subqueries included.
fn reads(plan: &LogicalPlan, table: &str) -> datafusion::common::Result<bool> {
    let mut found = false;
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node
            && scan.table_name.table() == table
        {
            found = true;
            return Ok(TreeNodeRecursion::Stop);
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(found)
}

/// The other columns of the first rows, `user_id=7, items=9; ...`. None where there are no other columns.
fn offenders(rows: &[RecordBatch]) -> Result<Option<String>> {
    let mut told = Vec::new();
    for batch in rows {
        let schema = batch.schema();
        let others: Vec<(&Field, &ArrayRef)> = schema
            .fields()
            .iter()
            .map(AsRef::as_ref)
            .zip(batch.columns())
            .filter(|(field, _)| field.name() != VALUE)
            .collect();
        if others.is_empty() {
            return Ok(None);
        }
        let options = FormatOptions::default().with_null("null");
        let shown = others
            .iter()
            .map(|(field, column)| Ok((field.name(), ArrayFormatter::try_new(column.as_ref(), &options)?)))
            .collect::<Result<Vec<_>>>()?;
        for row in 0..batch.num_rows() {
            let cells: Vec<String> = shown.iter().map(|(name, f)| format!("{name}={}", f.value(row))).collect();
            told.push(cells.join(", "));
        }
    }
    let more = told.len().saturating_sub(NAMED);
    told.truncate(NAMED);
    let more = if more > 0 { "; ..." } else { "" };
    Ok(Some(format!("{}{more}", told.join("; "))))
}

/// The rows of `audits`.
#[derive(Default)]
struct Rows {
    audit: Vec<String>,
    value: Vec<Option<f64>>,
    min: Vec<Option<f64>>,
    max: Vec<Option<f64>>,
    passed: Vec<Option<bool>>,
    detail: Vec<Option<String>>,
}

impl Rows {
    /// Adds an audit; gives a line for a person where it did not pass.
    fn push(&mut self, check: &Check, answer: Answer) -> Option<String> {
        let CheckConfig { min, max, .. } = check.config;
        let (value, passed, detail) = match answer {
            // A value that is not a number lies within no bounds.
            Answer::Value(v, detail) => {
                let within = !v.is_nan() && min.is_none_or(|min| v >= min) && max.is_none_or(|max| v <= max);
                (Some(v), Some(within), detail.filter(|_| !within))
            }
            Answer::Skipped(why) => (None, None, Some(format!("skipped: {why}"))),
        };
        self.audit.push(check.name.clone());
        self.value.push(value);
        self.min.push(min);
        self.max.push(max);
        self.passed.push(passed);
        self.detail.push(detail.clone());
        match (passed, value) {
            (Some(true), _) => None,
            (_, Some(value)) => Some(format!("failed: {}", told(&check.name, value, min, max, detail.as_deref()))),
            _ => Some(format!("{} {}", check.name, detail.unwrap_or_default())),
        }
    }

    fn into_table(self) -> Result<Table> {
        let numbers = |v: Vec<Option<f64>>| Arc::new(Float64Array::from(v)) as ArrayRef;
        let arrays: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(self.audit)),
            numbers(self.value),
            numbers(self.min),
            numbers(self.max),
            Arc::new(BooleanArray::from(self.passed)),
            Arc::new(StringArray::from(self.detail)),
        ];
        AUDITS.table(&DataType::Utf8, &DataType::Utf8, arrays)
    }
}

/// `coverage is 0.91, at least 0.99 is wanted (user_id=7)`.
fn told(audit: &str, value: f64, min: Option<f64>, max: Option<f64>, detail: Option<&str>) -> String {
    let bound = match (min, max) {
        (Some(min), _) if value.is_nan() || value < min => format!("at least {min}"),
        (_, Some(max)) => format!("at most {max}"),
        (Some(min), None) => format!("at least {min}"),
        (None, None) => "another value".to_owned(),
    };
    let detail = detail.map_or_else(String::new, |d| format!(" ({d})"));
    format!("{audit} is {value}, {bound} is wanted{detail}")
}

/// Columns that [`refuse`] reads.
pub(super) const COLUMNS: [&str; 3] = [AUDIT, VALUE, PASSED];

/// Refuses to publish where an audit of the table did not pass.
///
/// `stage` made the audits, `place` is where their table lies.
///
/// # Errors
/// An audit did not pass (exit 1).
pub(super) fn refuse(stage: &str, place: &str, audits: &Table) -> Result<()> {
    let (names, details) = (audits.strings(AUDIT)?, audits.strings(DETAIL)?);
    let passed = audits.column_as(PASSED, &DataType::Boolean)?;
    let passed: Vec<Option<bool>> = arrow::array::AsArray::as_boolean(&passed).iter().collect();
    let numbers = |name: &str| -> Result<Vec<Option<f64>>> {
        let column = audits.column_as(name, &DataType::Float64)?;
        Ok(arrow::array::AsArray::as_primitive::<arrow::datatypes::Float64Type>(&column).iter().collect())
    };
    let (values, min, max) = (numbers(VALUE)?, numbers(crate::columns::MIN)?, numbers(crate::columns::MAX)?);
    let failed: Vec<String> = (0..names.len())
        .filter(|&row| passed[row] == Some(false))
        .map(|row| {
            let name = names[row].as_deref().unwrap_or_default();
            told(name, values[row].unwrap_or(f64::NAN), min[row], max[row], details[row].as_deref())
        })
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(Fault::Audit, format!("nothing was published, an audit of `{stage}` failed: {}", failed.join("; ")))
        .with_help(format!(
            "what was published before stands; all audits are in {place}, or: tailfuse sql --pipeline FILE \"select * from {stage}\""
        )))
}
