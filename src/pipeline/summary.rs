//! What a run leaves behind besides its tables: a row in `runs`, the rows of `metrics`, and the
//! texts that end it on the terminal.
//!
//! In: a finished run. Out: rows, Parquet objects below the warehouse, plain text.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
use serde_json::{Value, json};

use super::Pipeline;
use super::cache::Cache;
use super::run::{NodeReport, RunReport, output_table};
use crate::columns::*;
use crate::error::{Error, Result};
use crate::stages::StageInput;
use crate::tables::schemas::{METRIC_ROWS, RUNS};
use crate::tables::{Store, StoredTable, Table};

/// One row of `metrics`.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricRow {
    /// Name of the `evaluate` stage.
    pub stage: String,
    /// `recommender`, `llm` or `fused`.
    pub system: String,
    /// `all` or `asked`.
    pub users: String,
    /// `all`, `tail`, `torso` or `head`.
    pub bucket: String,
    /// `Hit@3`, ...
    pub metric: String,
    /// Mean over users.
    pub value: f64,
    /// Number of users.
    pub n: i64,
}

impl MetricRow {
    /// As in the result document.
    pub fn to_json(&self) -> Value {
        json!({
            "stage": self.stage, "system": self.system, "users": self.users, "bucket": self.bucket,
            "metric": self.metric, "value": self.value, "n": self.n,
        })
    }
}

fn of_kind<'a>(report: &'a RunReport, kind: &'a str) -> impl Iterator<Item = &'a NodeReport> {
    report.nodes.iter().filter(move |n| n.kind == kind)
}

/// The metrics of all `evaluate` stages.
pub async fn metrics(pipeline: &Pipeline, report: &RunReport) -> Result<Vec<MetricRow>> {
    let mut rows = Vec::new();
    for node in of_kind(report, "evaluate") {
        let table = output_table(pipeline, &node.record, "metrics").await?;
        let text = |name: &str| -> Result<Vec<String>> {
            Ok(table.strings(name)?.into_iter().map(Option::unwrap_or_default).collect())
        };
        let (systems, users, buckets, names) = (text(SYSTEM)?, text(USERS)?, text(BUCKET)?, text(METRIC)?);
        let (values, ns) = (table.f64s(VALUE)?, table.i64s(N)?);
        for i in 0..values.len() {
            rows.push(MetricRow {
                stage: node.name.clone(),
                system: systems[i].clone(),
                users: users[i].clone(),
                bucket: buckets[i].clone(),
                metric: names[i].clone(),
                value: values[i],
                n: ns[i],
            });
        }
    }
    Ok(rows)
}

/// What the `write` stages published: table, format, uri, version, rows, bytes, sha256, and whether it is there.
pub async fn published(pipeline: &Pipeline, report: &RunReport) -> Result<Vec<Value>> {
    use arrow::array::AsArray;
    use arrow::datatypes::Int64Type;
    let mut tables = Vec::new();
    for node in of_kind(report, "write") {
        let table = output_table(pipeline, &node.record, "published").await?;
        let text = |name: &str| table.strings(name);
        let whole = |name: &str| -> Result<Vec<Option<i64>>> {
            Ok(table.column(name)?.as_primitive::<Int64Type>().iter().collect())
        };
        let (names, formats, uris, digests) = (text("table")?, text("format")?, text("uri")?, text("sha256")?);
        let (versions, rows, bytes) = (whole("version")?, whole("rows")?, whole("bytes")?);
        let done = table.column("published")?;
        for i in 0..rows.len() {
            tables.push(json!({
                "table": names[i], "format": formats[i], "uri": uris[i], "version": versions[i], "rows": rows[i],
                "bytes": bytes[i], "sha256": digests[i], "published": done.as_boolean().value(i),
            }));
        }
    }
    Ok(tables)
}

/// Day of the run: the parameter `ds`, else today (UTC).
pub fn day(pipeline: &Pipeline) -> String {
    match pipeline.params.get("ds") {
        Some(Value::String(ds)) => ds.clone(),
        Some(ds) => ds.to_string(),
        None => chrono::Utc::now().format("%Y-%m-%d").to_string(),
    }
}

/// Appends the run to `runs` and its metrics to `metrics`: one object per run, put whole.
pub async fn append_run(pipeline: &Pipeline, report: &RunReport, published: &[Value]) -> Result<()> {
    let warehouse = Store::open(&pipeline.warehouse, &pipeline.root)?;
    let folder = format!("ds={}", day(pipeline));
    // The rows of `evaluate` as they are, with the run in front. The run's own row comes last: what is in `runs` has its metrics.
    for node in of_kind(report, "evaluate") {
        let table = output_table(pipeline, &node.record, "metrics").await?;
        let batch = table.to_batch()?;
        let run_ids: ArrayRef = Arc::new(StringArray::from(vec![report.run_id.as_str(); batch.num_rows()]));
        let stages: ArrayRef = Arc::new(StringArray::from(vec![node.name.as_str(); batch.num_rows()]));
        let mut arrays = vec![run_ids, stages];
        for field in METRIC_ROWS.plain_schema().fields().iter().skip(2) {
            arrays.push(table.column_as(field.name(), field.data_type())?);
        }
        let none = arrow::datatypes::DataType::Utf8;
        let rows = METRIC_ROWS.table(&none, &none, arrays)?;
        let file = format!("{folder}/{}-{}.parquet", report.run_id, node.name);
        StoredTable::write(&warehouse.child("metrics"), &file, &rows).await?;
    }
    crate::fault::point("runs-row");
    let file = format!("{folder}/{}.parquet", report.run_id);
    StoredTable::write(&warehouse.child("runs"), &file, &run_row(pipeline, report, published).await?).await?;
    Ok(())
}

async fn run_row(pipeline: &Pipeline, report: &RunReport, published: &[Value]) -> Result<Table> {
    let micros = |text: &str| {
        chrono::DateTime::parse_from_rfc3339(text)
            .map(|t| t.timestamp_micros())
            .map_err(|e| Error::internal("a run's start is no time").because(e))
    };
    let started = micros(&report.started_at)?;
    // The LLM's cost in this run: the rerank stages that were not cached.
    let reranks: Vec<&NodeReport> = of_kind(report, "rerank").collect();
    let sum = |key: &str, paid_now: bool| {
        let of = |n: &&NodeReport| n.record.counters.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        // A sum over nothing is -0.0.
        let total = reranks.iter().filter(|n| !(paid_now && n.cached)).map(of).sum::<f64>() + 0.0;
        (!reranks.is_empty()).then_some(total)
    };
    let serving = of_kind(report, "fuse").last();
    let counter = |key: &str| serving.and_then(|n| n.record.counters.get(key));
    let text = |value: Option<&Value>| -> ArrayRef {
        Arc::new(StringArray::from(vec![value.and_then(Value::as_str).map(str::to_owned)]))
    };
    let real = |value: Option<f64>| -> ArrayRef { Arc::new(Float64Array::from(vec![value])) };
    let whole = |value: Option<f64>| -> ArrayRef { Arc::new(Int64Array::from(vec![value.map(|v| v as i64)])) };
    let instant = |t: i64| -> ArrayRef { Arc::new(TimestampMicrosecondArray::from(vec![t]).with_timezone("UTC")) };
    let rows = published.iter().filter_map(|t| t["rows"].as_f64()).sum();
    let prompts = match (sum("prompts", true), sum("prompts_reused", true)) {
        (Some(all), Some(reused)) => Some(all - reused),
        _ => None,
    };
    let string = |s: &str| -> ArrayRef { Arc::new(StringArray::from(vec![s])) };
    let arrays = vec![
        string(&report.run_id),
        string(&pipeline.name),
        string(env!("CARGO_PKG_VERSION")),
        string("published"),
        instant(started),
        instant(started + (report.seconds * 1e6) as i64),
        real(Some(report.seconds)),
        whole(Some(pipeline.seed as f64)),
        whole(counter("users").and_then(Value::as_f64).or(Some(0.0))),
        whole(Some(rows)),
        whole(sum("users_asked", false)),
        whole(sum("users_failed", false)),
        whole(prompts),
        whole(sum("llm_tokens", true)),
        real(sum("llm_seconds", true)),
        real(counter("a1").and_then(Value::as_f64)),
        real(counter("a2").and_then(Value::as_f64)),
        text(counter("rec_model")),
        text(counter("llm_model")),
    ];
    let none = arrow::datatypes::DataType::Utf8;
    RUNS.table(&none, &none, arrays)
}

/// What is shown at the end: quality, what was noticed in the data, times, and where to go on.
pub async fn texts(pipeline: &Pipeline, report: &RunReport) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for node in of_kind(report, "evaluate") {
        let metrics = output_table(pipeline, &node.record, "metrics").await?;
        let comparison = output_table(pipeline, &node.record, "comparison").await?;
        texts.push(crate::eval::terminal::render(&metrics, &comparison)?);
        if node.record.outputs.contains_key("tie_orders") {
            let ties = output_table(pipeline, &node.record, "tie_orders").await?;
            texts.push(crate::eval::terminal::render_ties(&ties)?);
        }
    }
    let mut confirmed = Vec::new();
    for node in of_kind(report, "search") {
        if node.record.outputs.contains_key("confirmed") {
            confirmed.push((node.name.clone(), output_table(pipeline, &node.record, "confirmed").await?));
        }
    }
    texts.extend(crate::eval::terminal::render_confirmed(&confirmed)?);
    if let Some(text) = noticed(report) {
        texts.push(text);
    }
    for node in of_kind(report, "calibrate") {
        texts.push(calibration(pipeline, node).await?);
    }
    texts.push(times(report));
    let tables = published(pipeline, report).await?;
    let place = |t: &Value| {
        let version = t["version"].as_i64().map_or_else(String::new, |v| format!(", version {v}"));
        let said = if t["published"] == true { "" } else { "not published: " };
        format!("{said}{} rows: {}{version}", t["rows"], t["uri"].as_str().unwrap_or_default())
    };
    let places: Vec<String> = tables.iter().map(place).collect();
    // The last one: what was asked of it may have been published before it.
    if let Some(last) = tables.last() {
        let table = last["table"].as_str().unwrap_or_default();
        let question = match of_kind(report, "fuse").next() {
            Some(_) => format!(
                "select user_id, rank, title, rec_rank, llm_rank, alpha, source from {table} order by alpha desc, user_id, rank limit 10"
            ),
            None => format!("select * from {table} limit 10"),
        };
        texts.push(format!(
            "{}\nTry:\n  tailfuse sql --pipeline {} \\\n    \"{question}\"",
            places.join("\n"),
            pipeline.file.display(),
        ));
    }
    Ok(texts)
}

/// Counters that are not zero and say something about the data.
fn noticed(report: &RunReport) -> Option<String> {
    let mut lines = Vec::new();
    for node in report.nodes.iter().filter(|n| matches!(n.kind.as_str(), "source" | "split" | "prompt" | "recommend")) {
        let figures: Vec<String> = node
            .record
            .counters
            .iter()
            .filter(|(_, v)| v.as_f64().is_some_and(|v| v != 0.0))
            .map(|(k, v)| format!("{} {v}", k.replace('_', " ")))
            .collect();
        if !figures.is_empty() {
            lines.push(format!("  {}: {}", node.name, figures.join(", ")));
        }
    }
    (!lines.is_empty()).then(|| format!("Noticed in the data\n{}", lines.join("\n")))
}

async fn calibration(pipeline: &Pipeline, node: &NodeReport) -> Result<String> {
    let cache = Cache::new(Store::open(&pipeline.artifacts, &pipeline.root)?);
    let StageInput::Artifact { artifact, .. } = cache.open(&node.record, "calibration").await? else {
        return Err(Error::internal("calibration is not an artifact"));
    };
    let chosen: Value = serde_json::from_slice(artifact.file("calibration.json")?)
        .map_err(|e| Error::data("calibration.json cannot be read").because(e))?;
    Ok(format!("Fusion weights chosen on validation (`{}`): a1 = {}, a2 = {}", node.name, chosen["a1"], chosen["a2"]))
}

fn times(report: &RunReport) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING).set_header(["stage", "seconds", ""]);
    for node in &report.nodes {
        let mut remark = if node.cached { "cached; this is what it took".to_owned() } else { String::new() };
        if let Some(rate) = node.record.counters.get("llm_tokens_per_second").and_then(Value::as_f64) {
            let per = node.record.counters.get("prompts_per_second").and_then(Value::as_f64).unwrap_or(0.0);
            let llm = format!("{rate:.0} LLM tokens/s, {per:.2} prompts/s");
            remark = if remark.is_empty() { llm } else { format!("{remark}; {llm}") };
        }
        table.add_row([node.name.clone(), format!("{:.2}", node.record.seconds), remark]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    format!("{table}\nwhole run: {:.1} s", report.seconds)
}
