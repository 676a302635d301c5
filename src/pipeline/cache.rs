//! The artifacts folder: one folder per fingerprint, complete only when its `stage.json`,
//! written last, is there and every file that it names has the size that it names.
//!
//! In: a node's identity and its results. Out: a [`Record`] and handles to its outputs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::fingerprint::{Identity, hex, sha256_hex};
use crate::error::{Error, Result};
use crate::stages::{Artifact, OutputTable, StageInput, StageResult};
use crate::tables::{Store, StoredTable};

/// The file that makes a folder complete.
pub const RECORD_FILE: &str = "stage.json";

/// One output as `stage.json` names it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OutputRecord {
    /// `table` or `artifact`.
    pub what: String,
    /// Files below the folder, with their sizes in bytes.
    pub files: BTreeMap<String, u64>,
    /// Rows, for a table.
    pub rows: Option<u64>,
    /// sha256 of the content: the file of a table; names and contents of an artifact.
    pub sha256: String,
}

/// `stage.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The folder's name.
    pub fingerprint: String,
    /// What was hashed.
    pub identity: Value,
    /// Name of the stage in the pipeline that ran it first.
    pub stage: String,
    /// Run that made it.
    pub run_id: String,
    /// Seconds of work.
    pub seconds: f64,
    /// End of the work, RFC 3339.
    pub finished_at: String,
    /// Figures of the stage.
    pub counters: serde_json::Map<String, Value>,
    /// Outputs by name.
    pub outputs: BTreeMap<String, OutputRecord>,
}

impl Record {
    /// Whether another run may find what this one could not.
    pub fn ask_again(&self) -> bool {
        self.counters.get(crate::stages::context::ASK_AGAIN) == Some(&Value::Bool(true))
    }
}

/// The cache at the pipeline's `artifacts` URI.
#[derive(Clone, Debug)]
pub struct Cache {
    store: Store,
}

impl Cache {
    /// On a store.
    pub fn new(store: Store) -> Self {
        Cache { store }
    }

    /// The folder of a fingerprint.
    pub fn folder(&self, fingerprint: &str) -> Store {
        self.store.child(fingerprint)
    }

    /// The record of a complete node, else `None`. A folder whose files are gone or have
    /// another size is not complete; a `stage.json` that cannot be read counts as absent.
    pub async fn find(&self, fingerprint: &str) -> Result<Option<Record>> {
        let folder = self.folder(fingerprint);
        let Some(bytes) = folder.get_opt(RECORD_FILE).await? else { return Ok(None) };
        let Ok(record) = serde_json::from_slice::<Record>(&bytes) else { return Ok(None) };
        for output in record.outputs.values() {
            for (file, size) in &output.files {
                match folder.head(file).await? {
                    Some(meta) if meta.size == *size => {}
                    _ => return Ok(None),
                }
            }
        }
        Ok(Some(record))
    }

    /// A handle to one output of a complete node.
    pub async fn open(&self, record: &Record, output: &str) -> Result<StageInput> {
        let folder = self.folder(&record.fingerprint);
        let found = record
            .outputs
            .get(output)
            .ok_or_else(|| Error::internal(format!("stage `{}` recorded no output `{output}`", record.stage)))?;
        if found.what == "table" {
            let file = format!("{output}.parquet");
            return Ok(StageInput::Table(StoredTable::open(&folder, &file).await?));
        }
        let mut artifact = Artifact::default();
        for file in found.files.keys() {
            let name = file.strip_prefix(&format!("{output}/")).unwrap_or(file).to_owned();
            artifact.files.insert(name, folder.get(file).await?);
        }
        if artifact_digest(&artifact) != found.sha256 {
            return Err(Error::data(format!(
                "the artifact at {} was changed after it was made",
                folder.display(output)
            ))
            .with_help(format!("run `tailfuse run PIPELINE --from {}` to make it again", record.stage)));
        }
        Ok(StageInput::Artifact { digest: found.sha256.clone(), artifact })
    }

    /// Writes a stage's results, `stage.json` last.
    pub async fn store(
        &self,
        identity: &Identity,
        stage: &str,
        run_id: &str,
        started: std::time::Instant,
        result: StageResult,
    ) -> Result<Record> {
        let fingerprint = identity.fingerprint();
        let folder = self.folder(&fingerprint);
        // An earlier, damaged folder must not look complete while its files are replaced.
        folder.delete(RECORD_FILE).await?;
        let mut outputs = BTreeMap::new();
        for (name, table) in result.tables {
            let file = format!("{name}.parquet");
            let stored = match table {
                OutputTable::Memory(table) => StoredTable::write(&folder, &file, &table).await?,
                OutputTable::Stream(stream) => StoredTable::write_stream(&folder, &file, stream).await?,
            };
            outputs.insert(name.to_owned(), table_record(&folder, &file, &stored).await?);
        }
        for (name, artifact) in result.artifacts {
            let mut files = BTreeMap::new();
            for (file, bytes) in &artifact.files {
                let path = format!("{name}/{file}");
                folder.put(&path, bytes.clone()).await?;
                files.insert(path, bytes.len() as u64);
            }
            let sha256 = artifact_digest(&artifact);
            outputs.insert(name.to_owned(), OutputRecord { what: "artifact".into(), files, rows: None, sha256 });
        }
        let record = Record {
            fingerprint,
            identity: identity.document(),
            stage: stage.to_owned(),
            run_id: run_id.to_owned(),
            seconds: started.elapsed().as_secs_f64(),
            finished_at: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            counters: result.counters,
            outputs,
        };
        self.complete(&folder, &record).await?;
        Ok(record)
    }

    /// Writes `stage.json` for files that are already in the folder (sources stream theirs).
    pub async fn complete(&self, folder: &Store, record: &Record) -> Result<()> {
        crate::fault::point("stage-data");
        let text = serde_json::to_vec_pretty(record).map_err(|e| Error::internal("stage.json").because(e))?;
        folder.put(RECORD_FILE, text.into()).await?;
        crate::fault::point("stage-done");
        Ok(())
    }
}

/// Size and digest of a table's file, read back in chunks: what counts is what lies on the store.
pub async fn table_record(folder: &Store, file: &str, stored: &StoredTable) -> Result<OutputRecord> {
    use futures::StreamExt;
    use object_store::ObjectStoreExt;
    let fail = |e| Error::environment(format!("cannot read back {}", folder.display(file))).because(e);
    let mut chunks = folder.object_store().get(&folder.path(file)).await.map_err(fail)?.into_stream();
    let mut hasher = Sha256::new();
    let mut size = 0u64;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(fail)?;
        size += chunk.len() as u64;
        hasher.update(&chunk);
    }
    Ok(OutputRecord {
        what: "table".into(),
        files: BTreeMap::from([(file.to_owned(), size)]),
        rows: Some(stored.num_rows()),
        sha256: hex(&hasher.finalize()),
    })
}

/// sha256 over the names and digests of an artifact's files.
pub fn artifact_digest(artifact: &Artifact) -> String {
    let listing: String =
        artifact.files.iter().map(|(name, bytes)| format!("{name} {}\n", sha256_hex(bytes))).collect();
    sha256_hex(listing.as_bytes())
}
