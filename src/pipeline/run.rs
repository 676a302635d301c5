//! The executor: nodes in topological order, each from the cache or run and stored.
//!
//! In: a parsed pipeline. Out: artifacts, published tables, a [`RunReport`]. A node that fails
//! leaves everything that was complete before it as it was; the same command resumes there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};

use super::artifact_source;
use super::cache::{Cache, Record, table_record};
use super::events::{Events, NodePlace};
use super::fingerprint::Identity;
use super::nodes::{Digests, Surroundings, source_identity, source_store, stage_identity};
use super::{Pipeline, StageNode};
use crate::catalog::FetchProgress;
use crate::error::{Error, Result};
use crate::stages::context::Cancel;
use crate::stages::{ModelFile, StageContext, StageInput, StageResult, What};
use crate::tables::source::{SourceReport, SourceTarget, read_source};
use crate::tables::source_config::SourceConfig;
use crate::tables::{SqlMemory, Store, Table};

/// What a person asks of a run.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Runs this node and all that read from it again.
    pub from: Option<String>,
    /// Runs everything again.
    pub fresh: bool,
}

impl RunOptions {
    /// The nodes that must run whatever the cache holds.
    pub fn forced(&self, pipeline: &Pipeline) -> Result<BTreeSet<String>> {
        let names = || pipeline.sources.iter().map(|(n, _)| n).chain(pipeline.stages.iter().map(|s| &s.name));
        if self.fresh {
            return Ok(names().cloned().collect());
        }
        let Some(from) = &self.from else { return Ok(BTreeSet::new()) };
        if !names().any(|n| n == from) {
            let near = names().max_by(|a, b| strsim::jaro_winkler(a, from).total_cmp(&strsim::jaro_winkler(b, from)));
            return Err(Error::usage(format!("--from names `{from}`, which is no stage or source of this pipeline"))
                .with_help(near.map_or_else(String::new, |n| format!("did you mean `{n}`?"))));
        }
        let mut forced = BTreeSet::from([from.clone()]);
        for stage in &pipeline.stages {
            if stage.inputs.iter().any(|i| forced.contains(i.from.name())) {
                forced.insert(stage.name.clone());
            }
        }
        Ok(forced)
    }
}

/// One node of a finished run.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Name in the pipeline file.
    pub name: String,
    /// Stage kind, or `source`.
    pub kind: String,
    /// Whether the result was found in the cache.
    pub cached: bool,
    /// What `stage.json` holds.
    pub record: Record,
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct RunReport {
    /// Id of the run.
    pub run_id: String,
    /// Nodes in the order in which they ran.
    pub nodes: Vec<NodeReport>,
    /// Wall seconds.
    pub seconds: f64,
    /// When the run began, RFC 3339.
    pub started_at: String,
}

impl RunReport {
    /// A node by name.
    pub fn node(&self, name: &str) -> Option<&NodeReport> {
        self.nodes.iter().find(|n| n.name == name)
    }
}

/// A run at work.
struct Run<'a> {
    pipeline: &'a Pipeline,
    around: &'a Surroundings,
    events: &'a Arc<dyn Events>,
    cache: Cache,
    savings: Store,
    warehouse: Store,
    run_id: String,
    cancel: Cancel,
    known: Digests,
    records: BTreeMap<String, Record>,
}

/// Runs the pipeline. `run_id` comes from the caller, so that tests can fix it.
pub async fn run(
    pipeline: &Pipeline,
    around: &Surroundings,
    options: &RunOptions,
    run_id: &str,
    events: &Arc<dyn Events>,
    cancel: &Cancel,
) -> Result<RunReport> {
    let began = Instant::now();
    let started_at = now();
    let forced = options.forced(pipeline)?;
    let artifacts = Store::open(&pipeline.artifacts, &pipeline.root)?;
    let mut run = Run {
        pipeline,
        around,
        events,
        savings: artifacts.clone(),
        cache: Cache::new(artifacts),
        warehouse: Store::open(&pipeline.warehouse, &pipeline.root)?,
        run_id: run_id.to_owned(),
        cancel: cancel.clone(),
        known: Digests::new(),
        records: BTreeMap::new(),
    };
    let total = pipeline.sources.len() + pipeline.stages.len();
    let mut nodes = Vec::with_capacity(total);
    for (name, config) in &pipeline.sources {
        cancel.check()?;
        let place = NodePlace { index: nodes.len() + 1, total, name: name.clone(), kind: "source".into() };
        let (record, cached) = run.source(&place, config, forced.contains(name)).await?;
        nodes.push(run.finish(place, record, cached));
    }
    for stage in &pipeline.stages {
        cancel.check()?;
        let place = NodePlace { index: nodes.len() + 1, total, name: stage.name.clone(), kind: stage.kind.name.into() };
        let (record, cached) = run
            .stage(&place, stage, forced.contains(&stage.name))
            .await
            .map_err(|e| e.at(format!("stage `{}`", stage.name)))?;
        nodes.push(run.finish(place, record, cached));
    }
    Ok(RunReport { run_id: run_id.to_owned(), nodes, seconds: began.elapsed().as_secs_f64(), started_at })
}

fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

/// Fetch progress as lines of the run.
struct FetchLines<'a>(&'a dyn Events, Arc<dyn crate::stages::Observer>);

impl FetchProgress for FetchLines<'_> {
    fn begin(&self, _name: &str, total_bytes: Option<u64>) {
        self.1.begin("bytes", total_bytes.unwrap_or(0));
    }
    fn advance(&self, bytes: u64) {
        self.1.advance(bytes);
    }
    fn line(&self, text: &str) {
        self.0.line(text);
    }
}

impl Run<'_> {
    fn finish(&mut self, place: NodePlace, record: Record, cached: bool) -> NodeReport {
        for (output, o) in &record.outputs {
            self.known.insert((place.name.clone(), output.clone()), o.sha256.clone());
        }
        match cached {
            true => self.events.cached(&place, &record),
            false => self.events.finished(&place, &record),
        }
        self.records.insert(place.name.clone(), record.clone());
        NodeReport { name: place.name, kind: place.kind, cached, record }
    }

    async fn source(&self, place: &NodePlace, config: &SourceConfig, forced: bool) -> Result<(Record, bool)> {
        let observer = self.events.started(place);
        let fetch = FetchLines(self.events.as_ref(), observer.clone());
        let store = source_store(self.pipeline, config, self.around, Some(&fetch)).await?;
        let store = store.ok_or_else(|| Error::internal("a fetched source has no place"))?;
        if artifact_source::is_artifact(config) {
            return self.artifact(place, config, &store, forced).await;
        }
        let identity = source_identity(&place.name, config, &store).await?;
        let fingerprint = identity.fingerprint();
        if !forced && let Some(record) = self.cache.find(&fingerprint).await? {
            return Ok((record, true));
        }
        let began = Instant::now();
        let folder = self.cache.folder(&fingerprint);
        folder.delete(super::cache::RECORD_FILE).await?;
        observer.begin("rows", 0);
        let tick = |n: u64| {
            observer.advance(n);
            self.cancel.check()
        };
        let target = SourceTarget {
            store: &folder,
            table_file: "rows.parquet",
            bad_rows_file: "bad_rows.parquet",
            memory: SqlMemory { limit: self.pipeline.memory_limit, spill_dir: self.pipeline.spill_dir.clone() },
            tick: &tick,
        };
        let SourceReport { table, bad_rows, counters } = read_source(&place.name, config, &store, &target).await?;
        let outputs = BTreeMap::from([
            ("rows".to_owned(), table_record(&folder, "rows.parquet", &table).await?),
            ("bad_rows".to_owned(), table_record(&folder, "bad_rows.parquet", &bad_rows).await?),
        ]);
        let record = self.record(&identity, place, began, counters, outputs);
        self.cache.complete(&folder, &record).await?;
        Ok((record, false))
    }

    /// A source that is an artifact. Its age is looked at in every run.
    async fn artifact(
        &self,
        place: &NodePlace,
        config: &SourceConfig,
        store: &Store,
        forced: bool,
    ) -> Result<(Record, bool)> {
        let began = Instant::now();
        let (found, identity) = artifact_source::find(&place.name, config, store).await?;
        let known = match forced {
            true => None,
            false => self.cache.find(&identity.fingerprint()).await?,
        };
        let cached = known.is_some();
        let mut record = match known {
            Some(record) => record,
            None => {
                let artifact = artifact_source::read(&place.name, config, store, found.as_ref()).await?;
                let result = StageResult::default().with_artifact(artifact_source::FILES, artifact);
                self.cache.store(&identity, &place.name, &self.run_id, began, result).await?
            }
        };
        record.counters = artifact_source::counters(&place.name, config, found.as_ref(), chrono::Utc::now());
        if let Some(warning) = artifact_source::warning(&record) {
            self.events.line(&format!("warning: {warning}"));
        }
        Ok((record, cached))
    }

    fn record(
        &self,
        identity: &Identity,
        place: &NodePlace,
        began: Instant,
        counters: Map<String, Value>,
        outputs: BTreeMap<String, super::cache::OutputRecord>,
    ) -> Record {
        Record {
            fingerprint: identity.fingerprint(),
            identity: identity.document(),
            stage: place.name.clone(),
            run_id: self.run_id.clone(),
            seconds: began.elapsed().as_secs_f64(),
            finished_at: now(),
            counters,
            outputs,
        }
    }

    async fn stage(&self, place: &NodePlace, node: &StageNode, forced: bool) -> Result<(Record, bool)> {
        let observer = self.events.started(place);
        let mut models: BTreeMap<String, ModelFile> = BTreeMap::new();
        for name in node.outside_models() {
            let fetch = FetchLines(self.events.as_ref(), observer.clone());
            let file =
                self.around.catalog.resolve_model(&name, &self.pipeline.root, &self.around.cache, &fetch).await?;
            models.insert(name, file);
        }
        let identity = stage_identity(node, &self.known, &models)
            .map_err(|upstream| Error::internal(format!("`{upstream}` has not run before this stage")))?;
        if !forced
            && node.stage.cacheable()
            && let Some(record) = self.cache.find(&identity.fingerprint()).await?
            && !record.ask_again()
        {
            return Ok((record, true));
        }
        let began = Instant::now();
        let inputs = self.inputs(node, &mut models).await?;
        let ctx = StageContext {
            name: node.name.clone(),
            seed: node.seed,
            device: self.pipeline.device,
            inputs,
            models,
            savings: self.savings.clone(),
            warehouse: self.warehouse.clone(),
            run_id: self.run_id.clone(),
            fingerprint: identity.fingerprint(),
            memory_limit: self.pipeline.memory_limit,
            spill_dir: self.pipeline.spill_dir.clone(),
            observer,
            cancel: self.cancel.clone(),
        };
        let result = node.stage.run(&ctx).await?;
        drop(ctx);
        let record = self.cache.store(&identity, &node.name, &self.run_id, began, result).await?;
        Ok((record, false))
    }

    /// The stage's inputs; LLMs that other stages made go to `models`, as folders.
    async fn inputs(
        &self,
        node: &StageNode,
        models: &mut BTreeMap<String, ModelFile>,
    ) -> Result<BTreeMap<String, StageInput>> {
        let mut inputs = BTreeMap::new();
        for input in &node.inputs {
            let record = self
                .records
                .get(input.from.name())
                .ok_or_else(|| Error::internal(format!("`{}` has not run", input.from.name())))?;
            let opened = self.cache.open(record, &input.output).await?;
            if let (StageInput::Artifact { digest, artifact }, true) = (&opened, node.is_model(input)) {
                let (digest, files, cache) = (digest.clone(), artifact.files.clone(), self.around.cache.clone());
                let place = tokio::task::spawn_blocking(move || ModelFile::of_files(&files, &digest, &cache)).await?;
                models.insert(input.slot.reference.clone(), place?);
                continue;
            }
            if let (StageInput::Table(table), What::Table) = (&opened, input.slot.what) {
                check_columns(&input.slot.slot, &input.slot.reference, &input.slot.columns, &table.schema())?;
            }
            inputs.insert(input.slot.slot.clone(), opened);
        }
        Ok(inputs)
    }
}

/// Columns that a stage reads must be there (exit 65).
pub fn check_columns(slot: &str, reference: &str, wanted: &[&str], schema: &arrow::datatypes::Schema) -> Result<()> {
    let missing: Vec<&str> = wanted.iter().copied().filter(|c| schema.index_of(c).is_err()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let there: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    let missing = missing.iter().map(|c| format!("`{c}`")).collect::<Vec<_>>().join(", ");
    Err(Error::data(format!("input `{slot}` (`{reference}`) lacks the column {missing}")).with_help(format!(
        "it has: {}; map names with `columns = {{ ... }}` in the source, or rename them in a `sql` stage",
        there.join(", ")
    )))
}

/// A cached or fresh output as a table in memory, for reports.
pub async fn output_table(pipeline: &Pipeline, record: &Record, output: &str) -> Result<Table> {
    let cache = Cache::new(Store::open(&pipeline.artifacts, &pipeline.root)?);
    match cache.open(record, output).await? {
        StageInput::Table(table) => table.collect().await,
        StageInput::Artifact { .. } => Err(Error::internal(format!("`{output}` is an artifact, not a table"))),
    }
}
