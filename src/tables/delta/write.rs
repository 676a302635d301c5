//! One commit that replaces a partition of a Delta table.
//!
//! In: rows as they come, the table's store, the partition, who publishes. Out: one data file and one entry of the log that
//! removes the partition's files and adds this one: readers see the partition as it was or as it is. A commit that came in
//! between is let pass where it left our partition alone, and ends ours with exit 75 where it did not.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use deltalake_core::kernel::transaction::{CommitBuilder, CommitProperties, TableReference};
use deltalake_core::kernel::{Action, Add, MetadataExt, Remove, StructType};
use deltalake_core::operations::create::CreateBuilder;
use deltalake_core::protocol::{DeltaOperation, SaveMode};
use deltalake_core::{DeltaTable, DeltaTableError};
use futures::TryStreamExt;
use serde_json::{Value, json};

use super::read::refuse_mapped;
use super::schema::{Plan, conform, plan};
use super::{At, from_delta, log_store, open, stats, unsupported};
use crate::error::{Error, Result};
use crate::tables::Store;
use crate::tables::parquet::{BatchStream, TableWriter, Written};
use arrow::datatypes::SchemaRef;

/// Commits of others that are let pass before ours is given up.
const ATTEMPTS: usize = 100;

/// What is published, and by whom.
pub struct Publication<'a> {
    /// The table's folder.
    pub store: &'a Store,
    /// The table's name.
    pub table: &'a str,
    /// Partition column = value.
    pub partition: &'a BTreeMap<String, String>,
    /// Id of the run.
    pub run_id: &'a str,
    /// Name of the pipeline.
    pub pipeline: &'a str,
    /// Fingerprint of what was published: the stage's config and inputs.
    pub fingerprint: &'a str,
}

/// What a commit came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The table's version.
    pub version: u64,
    /// Rows of the partition.
    pub rows: u64,
    /// Bytes of its data file.
    pub bytes: u64,
    /// sha256 (hex) of the data file.
    pub sha256: String,
    /// Name of the data file below the table.
    pub file: String,
}

/// The table as it was when the writing began.
struct Base {
    version: Option<u64>,
    /// The partition's files.
    files: BTreeSet<String>,
}

impl Publication<'_> {
    fn place(&self) -> String {
        let partition: Vec<String> = self.partition.iter().map(|(c, v)| format!("{c}={v}")).collect();
        format!("{}/{}", self.table, partition.join("/"))
    }

    /// `ds=2026-11-22/part-0-RUN-1a2b3c4d.parquet`. Names are never used twice, since the log may still know the old one.
    fn new_file(&self) -> String {
        let safe = |text: &str| -> String {
            text.chars().map(|c| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '_' }).collect()
        };
        let folders: String = self.partition.iter().map(|(c, v)| format!("{}={}/", safe(c), safe(v))).collect();
        format!("{folders}part-0-{}-{:08x}.parquet", safe(self.run_id), rand::random::<u32>())
    }

    fn predicate(&self) -> String {
        let terms: Vec<String> =
            self.partition.iter().map(|(c, v)| format!("{c} = '{}'", v.replace('\'', "''"))).collect();
        terms.join(" AND ")
    }

    fn holds(&self, values: &HashMap<String, Option<String>>) -> bool {
        self.partition.iter().all(|(c, v)| values.get(c).is_some_and(|have| have.as_deref() == Some(v)))
    }

    /// The table, checked for what our writer does not do; `None` where there is none yet.
    async fn table(&self) -> Result<Option<DeltaTable>> {
        let Some(table) = open(self.store, At::Latest).await? else {
            let others = self.store.list("").await?;
            return match others.iter().find(|o| o.location.as_ref().ends_with(".parquet") && o.size > 0) {
                Some(_) if !self.only_debris(&others) => Err(Error::spec(format!(
                    "`{}` is published as plain Parquet files so far ({})",
                    self.table,
                    self.store.display("")
                ))
                .with_help("set `format = \"parquet\"` in this stage to go on so, publish under another name, or make a Delta table of it once (see `docs/operations.md`)")),
                _ => Ok(None),
            };
        };
        let name = self.store.display("");
        let state = table.snapshot().map_err(|e| from_delta(e, &name))?;
        let configuration = state.metadata().configuration();
        refuse_mapped(&name, configuration)?;
        if let Some(key) = configuration.keys().find(|k| k.starts_with("delta.constraints.")) {
            return Err(unsupported(&name, &format!("the check `{key}`")));
        }
        Ok(Some(table))
    }

    /// Data files of a first run that was killed before its commit are no table.
    fn only_debris(&self, objects: &[object_store::ObjectMeta]) -> bool {
        let ours = |name: &str| name.starts_with("part-0-") && name.ends_with(".parquet");
        objects.iter().all(|o| o.location.filename().is_some_and(ours))
    }

    fn plan(&self, table: Option<&DeltaTable>, rows: &SchemaRef) -> Result<Plan> {
        let Some(table) = table else { return plan(self.table, None, rows, self.partition) };
        let state = table.snapshot().map_err(|e| from_delta(e, &self.store.display("")))?;
        let partitions = state.metadata().partition_columns().to_vec();
        plan(self.table, Some((state.schema().as_ref(), &partitions)), rows, self.partition)
    }

    fn base(&self, table: Option<&DeltaTable>) -> Result<Base> {
        let Some(table) = table else { return Ok(Base { version: None, files: BTreeSet::new() }) };
        let state = table.snapshot().map_err(|e| from_delta(e, &self.store.display("")))?;
        let files = state.log_data().into_iter().filter(|f| self.holds(&f.partition_values_map()));
        Ok(Base { version: Some(state.version()), files: files.map(|f| f.object_store_path().to_string()).collect() })
    }

    /// Checks the rows against the table and counts them; nothing is written.
    pub async fn rehearse(&self, schema: &SchemaRef, mut rows: BatchStream) -> Result<u64> {
        let plan = self.plan(self.table().await?.as_ref(), schema)?;
        let mut n = 0;
        while let Some(batch) = rows.try_next().await? {
            n += conform(self.table, &batch, &plan.file)?.num_rows() as u64;
        }
        Ok(n)
    }

    /// Writes the rows and commits them. `may_commit` is asked right before each try, and its error ends it.
    ///
    /// Errors (exit 65): the rows do not fit the table, which is then as it was; (exit 75) another run published the same
    /// partition in the meantime, or the store failed: the same run may be tried again, and nothing of this try is visible.
    pub async fn publish(
        &self,
        schema: &SchemaRef,
        rows: BatchStream,
        may_commit: &(dyn Fn() -> futures::future::BoxFuture<'static, Result<()>> + Sync),
    ) -> Result<Committed> {
        let mut table = self.table().await?;
        let base = self.base(table.as_ref())?;
        let mut plan = self.plan(table.as_ref(), schema)?;
        let file = self.new_file();
        let written = self.write(&file, &plan.file, rows).await?;
        let kept = plan.file.clone();
        let mut refused = None;
        for _ in 0..ATTEMPTS {
            if let Err(e) = may_commit().await {
                self.store.delete(&file).await?;
                return Err(e);
            }
            crate::fault::point("write-commit");
            let done = self.commit(table.as_ref(), &plan, &file, &written).await;
            let error = match done {
                Ok(version) => return Ok(self.committed(version, file, written)),
                Err(e) => e,
            };
            // A commit whose answer was lost may be there all the same: the log has the word.
            let lost = is_race(&error);
            let name = self.store.display("");
            let now = match self.table().await {
                Ok(now) => now,
                Err(_) => return Err(from_delta(error, &name)),
            };
            let state = self.base(now.as_ref())?;
            if state.files.contains(&file) {
                let version = self.version_with(&file, &base, &state).await?;
                return Ok(self.committed(version, file, written));
            }
            if state.files != base.files {
                let winner = self.winner(&base, &state).await;
                self.store.delete(&file).await?;
                return Err(conflict(&self.place(), winner));
            }
            if !lost {
                return Err(from_delta(error, &name));
            }
            // Another partition's commit: the columns may be others now, and ours must still fit them.
            plan = self.plan(now.as_ref(), schema)?;
            let fits = |f: &arrow::datatypes::FieldRef| {
                plan.file.field_with_name(f.name()).is_ok_and(|g| g.data_type() == f.data_type())
            };
            if !kept.fields().iter().all(fits) {
                self.store.delete(&file).await?;
                return Err(conflict(&self.place(), None).at("the table's columns were changed"));
            }
            table = now;
            refused = Some(error);
        }
        self.store.delete(&file).await?;
        let why = refused.map_or_else(String::new, |e| format!(": {e}"));
        Err(Error::environment(format!("the table `{}` is committed to by others all the time{why}", self.table))
            .with_help("run it again at a quieter time"))
    }

    fn committed(&self, version: u64, file: String, written: Written) -> Committed {
        Committed { version, rows: written.rows, bytes: written.bytes, sha256: written.sha256, file }
    }

    async fn write(&self, file: &str, schema: &SchemaRef, mut rows: BatchStream) -> Result<Written> {
        let mut writer = TableWriter::begin(self.store, file, schema)?;
        loop {
            let pushed = match rows.try_next().await {
                Ok(None) => return writer.finish().await,
                Ok(Some(batch)) => match conform(self.table, &batch, schema) {
                    Ok(batch) => writer.push(&batch).await,
                    Err(e) => Err(e),
                },
                Err(e) => Err(e),
            };
            if let Err(e) = pushed {
                writer.abort().await;
                return Err(e);
            }
        }
    }

    async fn commit(
        &self,
        table: Option<&DeltaTable>,
        plan: &Plan,
        file: &str,
        written: &Written,
    ) -> Result<u64, DeltaTableError> {
        let now = chrono::Utc::now().timestamp_millis();
        let add = Add {
            path: file.to_owned(),
            partition_values: self.partition.iter().map(|(c, v)| (c.clone(), Some(v.clone()))).collect(),
            size: i64::try_from(written.bytes).unwrap_or(i64::MAX),
            modification_time: now,
            data_change: true,
            stats: Some(stats::of(&plan.file, &written.footer)),
            ..Add::default()
        };
        // One try: what came in between is looked at here, by the files of our partition alone.
        let properties = CommitProperties::default().with_max_retries(0).with_metadata(self.metadata(written));
        let Some(table) = table else {
            let made = CreateBuilder::new()
                .with_log_store(log_store(self.store))
                .with_table_name(self.table)
                .with_columns(plan.table.fields().cloned())
                .with_partition_columns(self.partition.keys().cloned())
                .with_save_mode(SaveMode::ErrorIfExists)
                .with_actions([Action::Add(add)])
                .with_commit_properties(properties)
                .await?;
            return made.version().ok_or(DeltaTableError::NotInitialized);
        };
        let state = table.snapshot()?;
        let mut actions = Vec::new();
        if plan.evolves {
            let schema: &StructType = &plan.table;
            actions.push(Action::Metadata(state.metadata().clone().with_schema(schema)?));
        }
        for old in state.log_data().into_iter().filter(|f| self.holds(&f.partition_values_map())) {
            let gone: Remove = old.remove_action(true);
            actions.push(Action::Remove(gone));
        }
        actions.push(Action::Add(add));
        let operation = DeltaOperation::Write {
            mode: SaveMode::Overwrite,
            partition_by: Some(self.partition.keys().cloned().collect()),
            predicate: Some(self.predicate()),
        };
        let table_data: &dyn TableReference = state;
        let commit = CommitBuilder::from(properties).with_actions(actions);
        Ok(commit.build(Some(table_data), table.log_store(), operation).await?.version())
    }

    /// What `describe history` shows of the commit.
    fn metadata(&self, written: &Written) -> Vec<(String, Value)> {
        vec![
            ("tailfuse".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
            ("runId".to_owned(), json!(self.run_id)),
            ("pipeline".to_owned(), json!(self.pipeline)),
            ("fingerprint".to_owned(), json!(self.fingerprint)),
            ("replaced".to_owned(), json!(self.predicate())),
            (
                "operationMetrics".to_owned(),
                json!({
                    "numFiles": "1",
                    "numOutputRows": written.rows.to_string(),
                    "numOutputBytes": written.bytes.to_string(),
                }),
            ),
        ]
    }

    /// The version between the two states whose entry names the file.
    async fn version_with(&self, file: &str, base: &Base, state: &Base) -> Result<u64> {
        let latest = state.version.unwrap_or_default();
        for (version, entry) in self.entries(base, state).await {
            if entry.iter().any(|action| action["add"]["path"].as_str() == Some(file)) {
                return Ok(version);
            }
        }
        Ok(latest)
    }

    /// The run that published our partition in the meantime, as its commit says.
    async fn winner(&self, base: &Base, state: &Base) -> Option<String> {
        let entries = self.entries(base, state).await;
        entries.iter().rev().find_map(|(version, entry)| {
            let ours = |action: &Value| {
                let values = action["add"].get("partitionValues").or(action["remove"].get("partitionValues"));
                values.is_some_and(|v| self.partition.iter().all(|(c, want)| v[c].as_str() == Some(want)))
            };
            entry.iter().any(ours).then(|| {
                let info = entry.iter().find_map(|action| action.get("commitInfo"));
                let run = info.and_then(|i| i["runId"].as_str()).map_or_else(String::new, |r| format!(" by run {r}"));
                format!("in version {version}{run}")
            })
        })
    }

    /// The entries of the log after `base` up to `state`, as far as they can be read.
    async fn entries(&self, base: &Base, state: &Base) -> Vec<(u64, Vec<Value>)> {
        let mut entries = Vec::new();
        let first = base.version.map_or(0, |v| v + 1);
        for version in first..=state.version.unwrap_or_default() {
            if let Ok(Some(bytes)) = log_store(self.store).read_commit_entry(version).await {
                let lines = bytes.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
                entries.push((version, lines.collect()));
            }
        }
        entries
    }
}

/// Whether somebody else's commit took the version that ours wanted.
fn is_race(e: &DeltaTableError) -> bool {
    use deltalake_core::kernel::transaction::TransactionError::{
        CommitConflict, MaxCommitAttempts, VersionAlreadyExists,
    };
    match e {
        DeltaTableError::VersionAlreadyExists(_) => true,
        DeltaTableError::Transaction { source } => {
            matches!(source, MaxCommitAttempts(_) | VersionAlreadyExists(_) | CommitConflict(_))
        }
        // What the builder of a new table says where there is one by now.
        DeltaTableError::GenericError { source } => source.to_string().contains("already exists"),
        _ => false,
    }
}

fn conflict(place: &str, winner: Option<String>) -> Error {
    let winner = winner.unwrap_or_else(|| "by another run".to_owned());
    Error::environment(format!("{place} was published {winner} while this run was at work"))
        .with_help("nothing of this run is visible; run it again if its rows are to replace those")
}
