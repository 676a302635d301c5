//! The executor: nodes in topological order, each from the cache or run and stored.
//!
//! In: a parsed pipeline. Out: artifacts, published tables, a [`RunReport`]. A node that fails
//! leaves everything that was complete before it as it was; the same command resumes there.

mod budget;
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::cache::{Cache, Record};
use super::events::{Events, NodePlace};
use super::fingerprint::Identity;
use super::journal::{self, Journal, RunEntry};
use super::lease::Leases;
use super::minutes::minutes_of;
use super::nodes::{Digests, Surroundings, stage_identity};
pub use super::options::RunOptions;
use super::{Pipeline, StageNode};
use crate::catalog::FetchProgress;
use crate::error::{Error, Result};
use crate::stages::context::{Cancel, Shard};
use crate::stages::{ModelFile, Observer, Publishing, Stage, StageContext, StageInput, What};
use crate::tables::{Store, Table};

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
    publishing: Publishing,
    run_id: String,
    cancel: Cancel,
    known: Digests,
    records: BTreeMap<String, Record>,
    /// Earlier runs.
    nights: Vec<RunEntry>,
    journal: Journal,
    minutes: Option<f64>,
    shard: Option<Shard>,
}

/// What a node gave, and whether it was there already.
struct Done {
    record: Record,
    cached: bool,
    /// The budget in minutes and the users that it became.
    budget: Option<(f64, u64)>,
}

impl Done {
    fn found(record: Record) -> Self {
        Done { record, cached: true, budget: None }
    }
    fn made(record: Record) -> Self {
        Done { record, cached: false, budget: None }
    }
}

/// How long a stage that was asked to stop may take to reach a row boundary.
const GRACE: Duration = Duration::from_secs(6);

/// Work that a stop request ends: at the next row boundary where the work looks for one, and after [`GRACE`] wherever it is.
/// What it had not stored by then counts as not done, which a run that starts again can stand at any point.
async fn stoppable<T>(cancel: &Cancel, work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = async {
        let stopped = loop {
            match cancel.check() {
                Ok(()) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(stopped) => break stopped,
            }
        };
        tokio::time::sleep(GRACE).await;
        stopped
    };
    tokio::select! {
        biased;
        done = work => done,
        stopped = late => Err(stopped),
    }
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
    let left_out = options.left_out(pipeline)?;
    let artifacts = Store::open(&pipeline.artifacts, &pipeline.root)?;
    let warehouse = Store::open(&pipeline.warehouse, &pipeline.root)?;
    // A part of a run publishes nothing, and so holds nobody up.
    let places: Vec<String> = match options.no_publish || options.partial() {
        true => Vec::new(),
        false => {
            let runs = pipeline.stages.iter().filter(|s| !left_out.contains(&s.name));
            runs.filter_map(|s| s.stage.publishes()).collect()
        }
    };
    let leases = Leases::acquire(&warehouse, &places, run_id, &pipeline.name).await?;
    let publishing = Publishing {
        dry: options.no_publish,
        pipeline: pipeline.name.clone(),
        fingerprint: String::new(),
        claim: Some(leases.claim()),
    };
    let nights = journal::read(&artifacts).await?;
    let journal = Journal::begin(&artifacts, run_id, &pipeline.name, &started_at).await?;
    let mut run = Run {
        pipeline,
        around,
        events,
        savings: artifacts.clone(),
        cache: Cache::new(artifacts),
        warehouse,
        publishing,
        run_id: run_id.to_owned(),
        cancel: cancel.clone(),
        known: Digests::new(),
        records: BTreeMap::new(),
        nights,
        journal,
        minutes: options.minutes,
        shard: options.shard,
    };
    let nodes = run.all(&forced, &left_out).await;
    // A lease that stays ends by itself; what the run came to is what counts.
    if let Err(e) = leases.release().await {
        events.line(&format!("the run's lease was not given back: {}", e.message));
    }
    let seconds = began.elapsed().as_secs_f64();
    // What ended the run is what is reported, also where the journal cannot be written then.
    let whole = nodes.is_ok() && !options.partial() && !options.no_publish;
    let ended = run.journal.end(whole, seconds).await;
    let nodes = nodes?;
    ended?;
    Ok(RunReport { run_id: run_id.to_owned(), nodes, seconds, started_at })
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
    /// All nodes in order.
    async fn all(&mut self, forced: &BTreeSet<String>, left_out: &BTreeSet<String>) -> Result<Vec<NodeReport>> {
        let (pipeline, cancel) = (self.pipeline, self.cancel.clone());
        let total = pipeline.sources.len() + pipeline.stages.len() - left_out.len();
        let mut nodes = Vec::with_capacity(total);
        for (name, config) in pipeline.sources.iter().filter(|(name, _)| !left_out.contains(name)) {
            cancel.check()?;
            let place = NodePlace { index: nodes.len() + 1, total, name: name.clone(), kind: "source".into() };
            let done = stoppable(&cancel, self.source(&place, config, forced.contains(name))).await?;
            nodes.push(self.finish(place, done).await);
        }
        for stage in pipeline.stages.iter().filter(|s| !left_out.contains(&s.name)) {
            cancel.check()?;
            let kind = stage.kind.name.into();
            let place = NodePlace { index: nodes.len() + 1, total, name: stage.name.clone(), kind };
            let done = stoppable(&cancel, self.stage(&place, stage, forced.contains(&stage.name)))
                .await
                .map_err(|e| e.at(format!("stage `{}`", stage.name)))?;
            nodes.push(self.finish(place, done).await);
        }
        Ok(nodes)
    }

    async fn finish(&mut self, place: NodePlace, done: Done) -> NodeReport {
        let Done { record, cached, budget } = done;
        self.journal.node(&place, &record, cached, budget).await;
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

    async fn stage(&self, place: &NodePlace, node: &StageNode, forced: bool) -> Result<Done> {
        let observer = self.events.started(place);
        let mut models: BTreeMap<String, ModelFile> = BTreeMap::new();
        for name in node.outside_models() {
            let fetch = FetchLines(self.events.as_ref(), observer.clone());
            let file =
                self.around.catalog.resolve_model(&name, &self.pipeline.root, &self.around.cache, &fetch).await?;
            models.insert(name, file);
        }
        let minutes = minutes_of(node.stage.as_ref(), self.minutes);
        if let Some(minutes) = minutes {
            return self.within(node, minutes, (models, observer), forced).await;
        }
        let identity = self.identity(node, node.stage.as_ref(), &models)?;
        let cacheable = node.stage.cacheable();
        if !forced
            && cacheable
            && let Some(record) = self.found(&identity).await?
        {
            return Ok(Done::found(record));
        }
        let mut ctx = self.context(node, models, observer).await?;
        ctx.publishing.fingerprint = identity.fingerprint();
        self.work(node, node.stage.as_ref(), &ctx).await.map(Done::made)
    }

    fn identity(&self, node: &StageNode, stage: &dyn Stage, models: &BTreeMap<String, ModelFile>) -> Result<Identity> {
        stage_identity(node, stage, &self.known, models)
            .map_err(|upstream| Error::internal(format!("`{upstream}` has not run before this stage")))
    }

    /// The cached result, where it may stand for another.
    async fn found(&self, identity: &Identity) -> Result<Option<Record>> {
        let fingerprint = identity.fingerprint();
        self.journal.at_work(&fingerprint).await?;
        Ok(self.cache.find(&fingerprint).await?.filter(|record| !record.ask_again()))
    }

    async fn context(
        &self,
        node: &StageNode,
        mut models: BTreeMap<String, ModelFile>,
        observer: Arc<dyn Observer>,
    ) -> Result<StageContext> {
        let inputs = self.inputs(node, &mut models).await?;
        Ok(StageContext {
            name: node.name.clone(),
            seed: node.seed,
            device: self.pipeline.device,
            inputs,
            models,
            savings: self.savings.clone(),
            warehouse: self.warehouse.clone(),
            publishing: self.publishing.clone(),
            run_id: self.run_id.clone(),
            memory_limit: self.pipeline.memory_limit,
            spill_dir: self.pipeline.spill_dir.clone(),
            observer,
            cancel: self.cancel.clone(),
        })
    }

    /// The work itself. A share of the users gives answers for the ledger and no tables, and is not kept as a result.
    async fn work(&self, node: &StageNode, stage: &dyn Stage, ctx: &StageContext) -> Result<Record> {
        let began = Instant::now();
        let known_models: BTreeMap<String, ModelFile> =
            node.outside_models().into_iter().filter_map(|m| Some((m.clone(), ctx.models.get(&m)?.clone()))).collect();
        let identity = self.identity(node, stage, &known_models)?;
        if let Some(shard) = self.shard.and_then(|shard| stage.shard(shard)) {
            let result = shard.run(ctx).await?;
            let place = NodePlace { index: 0, total: 0, name: node.name.clone(), kind: node.kind.name.into() };
            return Ok(self.record(&identity, &place, began, result.counters, BTreeMap::new()));
        }
        let result = stage.run(ctx).await?;
        self.cache.store(&identity, &node.name, &self.run_id, began, result).await
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
