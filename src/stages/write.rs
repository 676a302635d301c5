//! `kind = "write"`: publishes a table to the warehouse, one partition in one step.
//!
//! In: a table. Out: a commit of the Delta table `WAREHOUSE/TABLE`, or (`format = "parquet"`) the object
//! `WAREHOUSE/TABLE/ds=2026-11-22/part-0.parquet`, which appears whole. Either way readers see the partition as it was or as
//! it is, and running the same partition again replaces it. `published` says what was written.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Int64Array, StringArray};
use async_trait::async_trait;
use futures::{FutureExt, StreamExt, TryStreamExt};
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::audit;
use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::error::{Error, Result};
use crate::fault;
use crate::tables::delta::{self, write::Publication};
use crate::tables::parquet::{BatchStream, put_table};
use crate::tables::{StoredTable, Table};

/// Config of a `write` stage.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WriteConfig {
    /// The table to publish.
    pub input: String,
    /// Its name in the warehouse: letters, digits, `_` and `-`.
    #[schemars(length(min = 1))]
    pub table: String,
    /// The partition: column = value, for example `{ ds = "{{ ds }}" }`. Readers get the columns back as columns of type
    /// string.
    #[schemars(extend("minProperties" = 1))]
    pub partition: BTreeMap<String, String>,
    /// `audit` stages: where an audit of one of them failed nothing is published, and the run ends with exit code 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub audits: Vec<String>,
    /// What the table is: `delta`, or `parquet` for those who need plain files.
    #[serde(default)]
    pub format: TableFormat,
}

/// What a published table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TableFormat {
    /// A Delta table: columns are enforced, older versions stay readable, two writers do not undo each other.
    #[default]
    Delta,
    /// Hive partitions of one Parquet object each, which is put whole.
    Parquet,
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "write",
    version: 2,
    about: "Publishes a table in the warehouse: a Delta table, or one Parquet object a partition.",
    sample: "input = \"fused\"\ntable = \"recommendations\"\npartition = { ds = \"2026-11-22\" }\n",
    schema: || schema_for!(WriteConfig),
    resolve,
};

const PUBLISHED: OutputSlot = OutputSlot {
    name: "published",
    what: What::Table,
    about: "One row: `table`, `format`, `uri`, `version` (of a Delta table), `rows`, `bytes` and `sha256` of the data file; `published` is false after `--no-publish`, and the figures of the file are null then.",
};
const SLOT: &str = "input";
/// The one object of a partition.
const OBJECT: &str = "part-0.parquet";

fn resolve(config: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: WriteConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `write` stage").because(e))?;
    check_name("table", &config.table)?;
    if config.partition.is_empty() {
        return Err(Error::spec("`partition` is empty").with_help("name one: partition = { ds = \"{{ ds }}\" }"));
    }
    for (column, value) in &config.partition {
        check_name("partition", column)?;
        let safe = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '+' | ' ');
        let dots = value.chars().all(|c| c == '.');
        if dots || !value.chars().all(safe) {
            return Err(Error::spec(format!("the partition `{column} = \"{value}\"` cannot be part of a path"))
                .with_help("use letters, digits, spaces and _ - . : +"));
        }
    }
    Ok(Box::new(WriteStage { config }))
}

/// Names are words: they are parts of a path, and of SQL.
fn check_name(key: &str, name: &str) -> Result<()> {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    // Folders whose names begin with `_` are no tables to any reader.
    let hidden = name.starts_with('-') || (key == "table" && name.starts_with('_'));
    match !name.is_empty() && name.chars().all(word) && !hidden {
        true => Ok(()),
        false => Err(Error::spec(format!("`{key}` has the name `{name}`, which is not a word"))
            .with_help("use letters, digits, `_` and `-`; a table's name begins with a letter or digit")),
    }
}

struct WriteStage {
    config: WriteConfig,
}

/// What came of it; nothing of the last three in a rehearsal.
struct Outcome {
    uri: String,
    rows: u64,
    bytes: Option<u64>,
    sha256: Option<String>,
    version: Option<u64>,
}

impl WriteStage {
    /// Slots and stages of the audits.
    fn audits(&self) -> impl Iterator<Item = (String, &str)> {
        self.config.audits.iter().enumerate().map(|(n, stage)| (format!("audits.{n}"), stage.as_str()))
    }

    /// `TABLE/ds=2026-11-22`.
    fn place(&self) -> String {
        let folders: Vec<String> = self.config.partition.iter().map(|(c, v)| format!("{c}={v}")).collect();
        format!("{}/{}", self.config.table, folders.join("/"))
    }

    async fn delta(&self, ctx: &StageContext, input: &StoredTable) -> Result<Outcome> {
        let store = ctx.warehouse.child(&self.config.table);
        let publication = Publication {
            store: &store,
            table: &self.config.table,
            partition: &self.config.partition,
            run_id: &ctx.run_id,
            pipeline: &ctx.publishing.pipeline,
            fingerprint: &ctx.publishing.fingerprint,
        };
        let (schema, rows, uri) = (input.schema(), stream(ctx, input)?, store.display(""));
        if ctx.publishing.dry {
            let rows = publication.rehearse(&schema, rows).await?;
            return Ok(Outcome { uri, rows, bytes: None, sha256: None, version: None });
        }
        let claim = ctx.publishing.claim.clone();
        let may_commit = move || {
            let claim = claim.clone();
            async move {
                match &claim {
                    Some(claim) => claim.check().await,
                    None => Ok(()),
                }
            }
            .boxed()
        };
        let done = publication.publish(&schema, rows, &may_commit).await?;
        Ok(Outcome {
            uri,
            rows: done.rows,
            bytes: Some(done.bytes),
            sha256: Some(done.sha256),
            version: Some(done.version),
        })
    }

    async fn parquet(&self, ctx: &StageContext, input: &StoredTable) -> Result<Outcome> {
        let folder = ctx.warehouse.child(&self.config.table);
        if delta::is_table(&folder).await? {
            return Err(Error::spec(format!(
                "`{}` is a Delta table ({}), whose readers would not see a plain file",
                self.config.table,
                folder.display("")
            ))
            .with_help("leave `format` out, or publish under another name"));
        }
        if let Some(column) = self.config.partition.keys().find(|c| input.schema().index_of(c).is_ok()) {
            return Err(Error::data(format!(
                "column `{column}` is in the table and in the partition of `{}`",
                self.config.table
            ))
            .with_help("leave it out of the table: readers get it from the partition"));
        }
        let file = format!("{}/{OBJECT}", self.place());
        let uri = ctx.warehouse.display(&file);
        let mut rows = stream(ctx, input)?;
        if ctx.publishing.dry {
            let mut n = 0;
            while let Some(batch) = rows.try_next().await? {
                n += batch.num_rows() as u64;
            }
            return Ok(Outcome { uri, rows: n, bytes: None, sha256: None, version: None });
        }
        // The put at the end is the commit.
        if let Some(claim) = &ctx.publishing.claim {
            claim.check().await?;
        }
        let last = futures::stream::once(async { fault::point("write-commit") }).filter_map(async |()| None);
        let rows = Box::pin(rows.chain(last));
        let (rows, bytes, sha256) = put_table(&ctx.warehouse, &file, &input.schema(), rows).await?;
        Ok(Outcome { uri, rows, bytes: Some(bytes), sha256: Some(sha256), version: None })
    }
}

/// The rows, and a look at stop requests between batches.
fn stream(ctx: &StageContext, input: &StoredTable) -> Result<BatchStream> {
    let (cancel, observer) = (ctx.cancel.clone(), ctx.observer.clone());
    observer.begin("rows", input.num_rows());
    let look = move |batch: arrow::array::RecordBatch| {
        observer.advance(batch.num_rows() as u64);
        fault::point("write-row");
        let go_on = cancel.check();
        futures::future::ready(go_on.map(|()| batch))
    };
    // The end of the rows: the writer has all of them, and nothing of them can be seen.
    let end = futures::stream::once(async { fault::point("write-data") }).filter_map(async |()| None);
    Ok(Box::pin(input.batches(None)?.and_then(look).chain(end)))
}

#[async_trait]
impl Stage for WriteStage {
    fn inputs(&self) -> Vec<InputSlot> {
        let mut slots = vec![InputSlot::table(SLOT, &self.config.input, &[])];
        slots.extend(self.audits().map(|(slot, stage)| InputSlot::table(&slot, stage, &audit::COLUMNS)));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![PUBLISHED]
    }

    fn identity(&self) -> Value {
        json!({ "table": self.config.table, "partition": self.config.partition, "format": self.config.format })
    }

    /// It acts on the outside: what the warehouse holds now is not known from a fingerprint.
    fn cacheable(&self) -> bool {
        false
    }

    fn publishes(&self) -> Option<String> {
        Some(self.place())
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        ctx.cancel.check()?;
        for (slot, stage) in self.audits() {
            audit::refuse(stage, &ctx.table(&slot)?.display(), &ctx.collect(&slot).await?)?;
        }
        let input = ctx.table(SLOT)?;
        let (format, outcome) = match self.config.format {
            TableFormat::Delta => ("delta", self.delta(ctx, input).await?),
            TableFormat::Parquet => ("parquet", self.parquet(ctx, input).await?),
        };
        fault::point("write-done");
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let text = |s: &str| -> ArrayRef { Arc::new(StringArray::from(vec![s])) };
        let whole = |n: Option<u64>| -> ArrayRef { Arc::new(Int64Array::from(vec![n.map(signed)])) };
        let published = Table::from_columns(vec![
            ("table", text(&self.config.table), false),
            ("format", text(format), false),
            ("uri", text(&outcome.uri), false),
            ("version", whole(outcome.version), true),
            ("rows", whole(Some(outcome.rows)), false),
            ("bytes", whole(outcome.bytes), true),
            ("sha256", Arc::new(StringArray::from(vec![outcome.sha256])), true),
            ("published", Arc::new(BooleanArray::from(vec![!ctx.publishing.dry])), false),
        ])?;
        let mut result = StageResult::default()
            .with_table(PUBLISHED.name, published)
            .with_counter("rows", signed(outcome.rows))
            .with_counter("bytes", outcome.bytes.map_or(Value::Null, Value::from));
        if let Some(version) = outcome.version {
            result = result.with_counter("version", version);
        }
        Ok(result)
    }
}
