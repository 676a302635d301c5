//! What a stage is given and what it gives back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use bytes::Bytes;
use datafusion::execution::SendableRecordBatchStream;

pub use crate::catalog::ModelFile;
use crate::error::{Error, Fault, Result};
use crate::tables::{Store, StoredTable, Table};

/// What crosses a stage boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// An Arrow table.
    Table,
    /// A folder of files in standard formats (safetensors + JSON).
    Artifact,
}

/// An input that a stage's config names.
#[derive(Clone, Debug)]
pub struct InputSlot {
    /// The config key that names it, e.g. `train`. For lists, `inputs.NAME`.
    pub slot: String,
    /// `source`, `stage` (its first output) or `stage.output`, as typed.
    pub reference: String,
    /// Table or artifact.
    pub what: What,
    /// Columns that the stage reads, checked before it runs (exit 65 where one is missing).
    pub columns: Vec<&'static str>,
}

impl InputSlot {
    /// A table input.
    pub fn table(slot: &str, reference: &str, columns: &[&'static str]) -> Self {
        InputSlot { slot: slot.into(), reference: reference.into(), what: What::Table, columns: columns.to_vec() }
    }
    /// An artifact input.
    pub fn artifact(slot: &str, reference: &str) -> Self {
        InputSlot { slot: slot.into(), reference: reference.into(), what: What::Artifact, columns: Vec::new() }
    }
}

/// An output that a stage of this config always makes. The first one is the default.
#[derive(Clone, Copy, Debug)]
pub struct OutputSlot {
    /// Its name, e.g. `train` in `parts.train`.
    pub name: &'static str,
    /// Table or artifact.
    pub what: What,
    /// One line for the docs.
    pub about: &'static str,
}

/// An artifact: named files, each put whole.
#[derive(Clone, Debug, Default)]
pub struct Artifact {
    /// File name -> content.
    pub files: BTreeMap<String, Bytes>,
}

impl Artifact {
    /// A file of this artifact; its absence is our bug or a damaged folder.
    pub fn file(&self, name: &str) -> Result<&Bytes> {
        self.files.get(name).ok_or_else(|| {
            Error::data(format!("the artifact has no file `{name}`"))
                .with_help("run the stage that makes it again: `tailfuse run PIPELINE --from STAGE`")
        })
    }
}

/// A table that a stage gives back: in memory, or a stream that need not fit there.
pub enum OutputTable {
    /// Rows in memory.
    Memory(Table),
    /// Rows as they come (the executor writes them to Parquet).
    Stream(SendableRecordBatchStream),
}

/// An input as the stage gets it. There are a handful of them, so the difference in size costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Clone)]
pub enum StageInput {
    /// A table on a store.
    Table(StoredTable),
    /// An artifact, read whole, with the sha256 of its files as digest.
    Artifact {
        /// sha256 (hex) over names and contents.
        digest: String,
        /// The files.
        artifact: Artifact,
    },
}

/// Hears of a stage's progress. The terminal draws a bar, a log gets a line each 10%.
pub trait Observer: Send + Sync {
    /// Work of `total` units begins, e.g. (`"users"`, 943).
    fn begin(&self, unit: &str, total: u64);
    /// `n` more units are done.
    fn advance(&self, n: u64);
    /// How the work stands, in place of what was said before: beside the bar, or in the next line of a log.
    fn status(&self, _text: &str) {}
    /// Something a person would want to know, one line.
    fn note(&self, text: &str);
}

/// Set by a signal; stages look at it at row boundaries.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicI32>);

impl Cancel {
    /// Asks everything to stop; `signal` is the number of the signal (2 or 15).
    pub fn request(&self, signal: i32) {
        self.0.store(signal, Ordering::SeqCst);
    }
    /// Errors (exit 130 or 143) once a stop was asked for.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::SeqCst) {
            0 => Ok(()),
            15 => Err(Error::new(Fault::Terminated, "stopped by SIGTERM; the same command resumes")),
            _ => Err(Error::new(Fault::Interrupted, "interrupted; the same command resumes")),
        }
    }
}

/// A run's claim on the places that it publishes.
#[async_trait]
pub trait Claim: Send + Sync {
    /// Error (exit 75) where another run has taken a place over.
    async fn check(&self) -> Result<()>;
}

/// What a stage that publishes knows of its run.
#[derive(Clone, Default)]
pub struct Publishing {
    /// `--no-publish`: everything but the commit.
    pub dry: bool,
    /// Name of the pipeline.
    pub pipeline: String,
    /// Fingerprint of the stage, the digest of all that its result depends on: kind, config, contents of the inputs, weights, seed.
    pub fingerprint: String,
    /// Asked right before a commit.
    pub claim: Option<Arc<dyn Claim>>,
}

/// Everything a stage may know.
pub struct StageContext {
    /// The stage's name in the pipeline file.
    pub name: String,
    /// Seed of every random choice in this stage.
    pub seed: u64,
    /// `auto`, `cpu` or `cuda`, as in the pipeline file.
    pub device: crate::device::DeviceChoice,
    /// Slot -> input.
    pub inputs: BTreeMap<String, StageInput>,
    /// Model name as typed -> its file.
    pub models: BTreeMap<String, ModelFile>,
    /// Where work that is already paid for is kept between runs (LLM ledger, checkpoints).
    pub savings: Store,
    /// Where published tables live (the pipeline's `warehouse`).
    pub warehouse: Store,
    /// Whether and for whom it publishes.
    pub publishing: Publishing,
    /// Id of this run.
    pub run_id: String,
    /// Memory that SQL may use, in bytes, and where it spills.
    pub memory_limit: usize,
    /// Where SQL spills what exceeds `memory_limit`; the system's temporary folder when `None`.
    pub spill_dir: Option<PathBuf>,
    /// Progress.
    pub observer: Arc<dyn Observer>,
    /// Stop requests.
    pub cancel: Cancel,
}

impl StageContext {
    /// A table input, which the executor has checked to be there.
    pub fn table(&self, slot: &str) -> Result<&StoredTable> {
        match self.inputs.get(slot) {
            Some(StageInput::Table(t)) => Ok(t),
            _ => Err(Error::internal(format!("stage `{}` has no table input `{slot}`", self.name))),
        }
    }

    /// A table input in memory, in row order.
    pub async fn collect(&self, slot: &str) -> Result<Table> {
        self.table(slot)?.collect().await.map_err(|e| e.at(format!("input `{slot}`")))
    }

    /// A table input in memory, where the config named one.
    pub async fn collect_opt(&self, slot: &str) -> Result<Option<Table>> {
        match self.inputs.contains_key(slot) {
            true => Ok(Some(self.collect(slot).await?)),
            false => Ok(None),
        }
    }

    /// An artifact input: digest and files.
    pub fn artifact(&self, slot: &str) -> Result<(&str, &Artifact)> {
        match self.inputs.get(slot) {
            Some(StageInput::Artifact { digest, artifact }) => Ok((digest, artifact)),
            _ => Err(Error::internal(format!("stage `{}` has no artifact input `{slot}`", self.name))),
        }
    }

    /// The weights that the config calls `name`.
    pub fn model(&self, name: &str) -> Result<&ModelFile> {
        self.models
            .get(name)
            .ok_or_else(|| Error::internal(format!("stage `{}` was not given the model `{name}`", self.name)))
    }
}

/// Counter of a result that another run of the same inputs may better: an answer was not to be had this time. Where it is
/// `true`, the result is used in this run and not taken from the cache in the next.
pub const ASK_AGAIN: &str = "ask_again";

/// Counter of the prompt tokens that were asked in this run, as budgets count them; with `llm_seconds` it is the rate that a
/// budget in minutes is turned into users by.
pub const ASKED_TOKENS: &str = "prompt_tokens_asked";

/// What a stage gives back.
#[derive(Default)]
pub struct StageResult {
    /// Output name -> table; every table that [`Stage::outputs`] lists.
    pub tables: BTreeMap<&'static str, OutputTable>,
    /// Output name -> artifact; every artifact that [`Stage::outputs`] lists.
    pub artifacts: BTreeMap<&'static str, Artifact>,
    /// Figures for the result document and the terminal (`rows_dropped`, `tokens`, ...), kept in `stage.json`.
    pub counters: serde_json::Map<String, serde_json::Value>,
}

impl StageResult {
    /// Adds an in-memory table.
    pub fn with_table(mut self, name: &'static str, table: Table) -> Self {
        self.tables.insert(name, OutputTable::Memory(table));
        self
    }
    /// Adds an artifact.
    pub fn with_artifact(mut self, name: &'static str, artifact: Artifact) -> Self {
        self.artifacts.insert(name, artifact);
        self
    }
    /// Adds a figure.
    pub fn with_counter(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.counters.insert(name.to_owned(), value.into());
        self
    }
}

/// What a stage will take, as far as that is known before it runs: bounds, since what was paid for before is not paid again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Estimate {
    /// Users that the LLM is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users: Option<u64>,
    /// Prompts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<u64>,
    /// Tokens of these prompts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Bytes of memory that a model takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let memory = self.memory_bytes.map(|b| format!("{:.1} GiB", b as f64 / f64::from(1 << 30)));
        let counts = [(self.users, "users"), (self.prompts, "prompts"), (self.tokens, "tokens")];
        let counts = counts.into_iter().filter_map(|(n, what)| n.map(|n| format!("{n} {what}")));
        f.write_str(&counts.chain(memory).collect::<Vec<_>>().join(", "))
    }
}

/// A share of the users, for runs that are divided among several processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which share, 0-based.
    pub index: u64,
    /// Of how many.
    pub of: u64,
}

impl Shard {
    /// Whether a user belongs to this share: by sha256 of the id as text, so that a user is in the same one every night.
    pub fn has(&self, user: &str) -> bool {
        use sha2::{Digest, Sha256};
        let digest = Sha256::digest(user.as_bytes());
        let mut first = [0u8; 8];
        first.copy_from_slice(&digest[..8]);
        u64::from_be_bytes(first) % self.of.max(1) == self.index
    }
}

impl std::str::FromStr for Shard {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('/').and_then(|(i, n)| Some((i.trim().parse().ok()?, n.trim().parse().ok()?)));
        match parts {
            Some((index, of)) if index < of => Ok(Shard { index, of }),
            _ => Err("write it as i/n with i from 0 to n - 1, for example 0/4".to_owned()),
        }
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

/// Whether a budget in minutes is for a stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Minutes {
    /// It asks nobody, or a sample that must not depend on how fast a machine is.
    No,
    /// `--budget` may set one.
    Open,
    /// The config sets one, which `--budget` replaces.
    Set(f64),
}

/// What a stage's config may look at while it is resolved, before anything runs.
pub struct ResolveContext<'a> {
    /// Folder that relative paths start from.
    pub root: &'a Path,
    /// `history_at_test` of the pipeline.
    pub history_at_test: &'a str,
}

/// A stage with its config, ready to run.
#[async_trait]
pub trait Stage: Send + Sync {
    /// The inputs that the config names.
    fn inputs(&self) -> Vec<InputSlot>;
    /// The outputs that this config makes; the first one is the default of a reference.
    fn outputs(&self) -> Vec<OutputSlot>;
    /// The resolved config, in full and canonical: with defaults filled in, file contents in
    /// place of file names. It is part of the fingerprint.
    fn identity(&self) -> serde_json::Value;
    /// Catalogue names or paths of the LLM weights that the stage needs.
    fn models(&self) -> Vec<String> {
        Vec::new()
    }
    /// Whether a finished run may stand for another (false for what acts on the outside, like `write`).
    fn cacheable(&self) -> bool {
        true
    }
    /// The place in the warehouse that a run replaces, as `TABLE/COLUMN=VALUE`: one run at a time may claim it.
    fn publishes(&self) -> Option<String> {
        None
    }
    /// What the work will take, for `plan`: given the counters of the finished stages that it reads (slot -> counters) and the
    /// files of its models, which may not have been fetched yet.
    fn estimate(
        &self,
        _counters: &BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
        _models: &BTreeMap<String, ModelFile>,
    ) -> Estimate {
        Estimate::default()
    }
    /// Whether a budget in minutes is for this stage. The executor turns it into users before the stage starts, so that
    /// what the stage does depends on no clock.
    fn minutes(&self) -> Minutes {
        Minutes::No
    }
    /// This stage with a number of users in place of a budget in minutes; `None` where it asks nobody.
    fn for_users(&self, _users: u64) -> Option<Box<dyn Stage>> {
        None
    }
    /// How many users `tokens` prompt tokens are enough for, in the order in which this stage asks them.
    async fn users_within(&self, _ctx: &StageContext, _tokens: f64) -> Result<u64> {
        Err(Error::internal("a stage that asks nobody has no budget"))
    }
    /// This stage, asking its share of the users and giving no tables: answers go to the ledger only. `None` for stages
    /// that cannot be divided.
    fn shard(&self, _shard: Shard) -> Option<Box<dyn Stage>> {
        None
    }
    /// Schemas of the output tables, given those of the input tables (slot -> schema), as far as they
    /// are known before anything runs. `validate` calls it; a `sql` stage plans its query here.
    async fn plan_schemas(&self, _inputs: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        Ok(BTreeMap::new())
    }
    /// The work.
    async fn run(&self, ctx: &StageContext) -> Result<StageResult>;
}
