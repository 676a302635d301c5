//! `kind = "write"`: publishes a table to the warehouse, one Parquet object a partition.
//!
//! In: a table. Out: the object `WAREHOUSE/TABLE/ds=2026-11-22/part-0.parquet`, which appears
//! whole: that is the commit. Readers see the partition as it was or as it is, and running the
//! same partition again replaces it. `published` says what was written.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Int64Array, StringArray};
use async_trait::async_trait;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::audit;
use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::error::{Error, Result};
use crate::tables::sql_errors::into_datafusion;
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
    /// The partition: column = value, for example `{ ds = "{{ ds }}" }`. The columns are in the
    /// object's path only, and readers get them back as columns of type string.
    #[schemars(extend("minProperties" = 1))]
    pub partition: BTreeMap<String, String>,
    /// `audit` stages: where an audit of one of them failed nothing is published, and the run ends with exit code 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub audits: Vec<String>,
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "write",
    version: 1,
    about: "Publishes a table in the warehouse as one Parquet object a partition.",
    sample: "input = \"fused\"\ntable = \"recommendations\"\npartition = { ds = \"2026-11-22\" }\n",
    schema: || schema_for!(WriteConfig),
    resolve,
};

const PUBLISHED: OutputSlot = OutputSlot {
    name: "published",
    what: What::Table,
    about: "One row: `table`, `uri`, `rows`, `bytes` and `sha256` of the object.",
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
    match !name.is_empty() && name.chars().all(word) && !name.starts_with('-') {
        true => Ok(()),
        false => Err(Error::spec(format!("`{key}` has the name `{name}`, which is not a word"))
            .with_help("use letters, digits, `_` and `-`")),
    }
}

struct WriteStage {
    config: WriteConfig,
}

impl WriteStage {
    /// Slots and stages of the audits.
    fn audits(&self) -> impl Iterator<Item = (String, &str)> {
        self.config.audits.iter().enumerate().map(|(n, stage)| (format!("audits.{n}"), stage.as_str()))
    }

    /// `TABLE/ds=2026-11-22/part-0.parquet`.
    fn file(&self) -> String {
        let folders: String = self.config.partition.iter().map(|(c, v)| format!("{c}={v}/")).collect();
        format!("{}/{folders}{OBJECT}", self.config.table)
    }
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
        json!({ "table": self.config.table, "partition": self.config.partition })
    }

    /// It acts on the outside: what the warehouse holds now is not known from a fingerprint.
    fn cacheable(&self) -> bool {
        false
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        ctx.cancel.check()?;
        for (slot, stage) in self.audits() {
            audit::refuse(stage, &ctx.table(&slot)?.display(), &ctx.collect(&slot).await?)?;
        }
        let input = ctx.table(SLOT)?;
        if let Some(column) = self.config.partition.keys().find(|c| input.schema().index_of(c).is_ok()) {
            return Err(Error::data(format!(
                "column `{column}` is in the table and in the partition of `{}`",
                self.config.table
            ))
            .with_help("leave it out of the table: readers get it from the partition"));
        }
        let file = self.file();
        let cancel = ctx.cancel.clone();
        let batches = input.batches(None)?.and_then(move |batch| {
            crate::fault::point("write-row");
            futures::future::ready(cancel.check().map(|()| batch))
        });
        let last = futures::stream::once(async { crate::fault::point("write-commit") }).filter_map(async |()| None);
        let batches = batches.map_err(into_datafusion).chain(last);
        let rows = Box::pin(RecordBatchStreamAdapter::new(input.schema(), batches));
        let written = StoredTable::write_stream(&ctx.warehouse, &file, rows).await?;
        crate::fault::point("write-done");
        let sha256 = digest(&written).await?;
        let rows = i64::try_from(written.num_rows()).unwrap_or(i64::MAX);
        let bytes = i64::try_from(written.meta().size).unwrap_or(i64::MAX);
        let published = Table::from_columns(vec![
            ("table", Arc::new(StringArray::from(vec![self.config.table.as_str()])), false),
            ("uri", Arc::new(StringArray::from(vec![written.display()])), false),
            ("rows", Arc::new(Int64Array::from(vec![rows])), false),
            ("bytes", Arc::new(Int64Array::from(vec![bytes])), false),
            ("sha256", Arc::new(StringArray::from(vec![sha256])), false),
        ])?;
        Ok(StageResult::default()
            .with_table(PUBLISHED.name, published)
            .with_counter("rows", rows)
            .with_counter("bytes", bytes))
    }
}

/// sha256 (hex) of the object, read back from the store in parts.
async fn digest(table: &StoredTable) -> Result<String> {
    let fail = |e| Error::environment(format!("cannot read {} back", table.display())).because(e);
    let mut bytes = table.store().object_store().get(&table.meta().location).await.map_err(fail)?.into_stream();
    let mut digest = Sha256::new();
    while let Some(part) = bytes.try_next().await.map_err(fail)? {
        digest.update(&part);
    }
    Ok(digest.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
