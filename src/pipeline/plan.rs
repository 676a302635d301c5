//! The plan: which nodes are cached and which will run, without running or fetching anything.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::Pipeline;
use super::artifact_source;
use super::cache::{Cache, Record};
use super::cost::nights;
use super::graph::ResolvedInput;
use super::journal::{self, RunEntry, tokens_per_second};
use super::minutes::{minutes_of, remembered};
use super::nodes::{Digests, Surroundings, source_identity, source_store, stage_identity};
use super::run::RunOptions;
use crate::error::{Fault, Result};
use crate::stages::context::Estimate;
use crate::tables::Store;

/// What will happen to a node.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum State {
    /// Its result is in the artifacts folder.
    Cached,
    /// It will run; why.
    WillRun {
        /// In words.
        why: String,
    },
}

/// One node of the plan.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedNode {
    /// Name in the pipeline file.
    pub name: String,
    /// Stage kind, or `source`.
    pub kind: String,
    /// Names of the nodes that it reads.
    pub reads: Vec<String>,
    /// Cached or not.
    #[serde(flatten)]
    pub state: State,
    /// The folder below `artifacts`, where it can be known already.
    pub fingerprint: Option<String>,
    /// Seconds that it took, where it is cached.
    pub seconds: Option<f64>,
    /// Seconds that the stage of this name took in the last night.
    pub last_seconds: Option<f64>,
    /// Prompt tokens that it asked the LLM in the last night.
    pub last_tokens: Option<f64>,
    /// Seconds that it will take, where it will run: as long as last, or its tokens by the rate of the last nights.
    pub expected_seconds: Option<f64>,
    /// Output -> rows, where it is cached.
    pub rows: BTreeMap<String, u64>,
    /// What the work will take, as far as that is known; nothing where it is cached.
    pub estimate: Estimate,
    /// The record, where it is cached.
    #[serde(skip)]
    pub record: Option<Record>,
}

/// Looks up every node in topological order: sources first, then stages.
pub async fn plan(pipeline: &Pipeline, around: &Surroundings, options: &RunOptions) -> Result<Vec<PlannedNode>> {
    let cache = Cache::new(Store::open(&pipeline.artifacts, &pipeline.root)?);
    let forced = options.forced(pipeline)?;
    let runs = nights(pipeline).await?;
    let mut known = Digests::new();
    let mut nodes: Vec<PlannedNode> = Vec::new();
    for (name, config) in &pipeline.sources {
        let mut node = PlannedNode::new(name, "source", Vec::new());
        match source_store(pipeline, config, around, None).await? {
            None => node.state = will_run("not fetched yet"),
            Some(store) if artifact_source::is_artifact(config) => {
                match artifact_source::find(name, config, &store).await {
                    Ok((_, identity)) => {
                        look_up(&cache, &forced, &mut node, identity.fingerprint(), "new or published again").await?;
                    }
                    Err(e) if e.fault == Fault::Data => node.state = will_run("there is nothing at its `uri` yet"),
                    Err(e) => return Err(e),
                }
            }
            Some(store) => {
                let fingerprint = source_identity(name, config, &store).await?.fingerprint();
                look_up(&cache, &forced, &mut node, fingerprint, "new or changed files or settings").await?;
            }
        }
        node.expect(&runs, &pipeline.name);
        node.learn(&mut known);
        nodes.push(node);
    }
    for stage in &pipeline.stages {
        let reads: BTreeSet<&str> = stage.inputs.iter().map(|i| i.from.name()).collect();
        let mut node = PlannedNode::new(&stage.name, stage.kind.name, reads.into_iter().map(str::to_owned).collect());
        let mut models = BTreeMap::new();
        for model in stage.outside_models() {
            let file = around.catalog.model_digest(&model, &pipeline.root, &around.cache)?;
            models.insert(model, file);
        }
        let minutes = minutes_of(stage.stage.as_ref(), options.minutes);
        match stage_identity(stage, stage.stage.as_ref(), &known, &models) {
            Err(upstream) => node.state = will_run(&format!("after `{upstream}`")),
            Ok(identity) if !stage.stage.cacheable() => {
                let publishes = stage.kind.name.starts_with("write");
                node.state = will_run(if publishes { "publishes in every run" } else { "asked in every run" });
                // What it gave last time can be read all the same.
                node.record = cache.find(&identity.fingerprint()).await?;
                node.fingerprint = Some(identity.fingerprint());
            }
            Ok(_) if let Some(minutes) = minutes => {
                match remembered(&cache, &runs, &pipeline.name, stage, (&known, &models), minutes).await? {
                    Some((record, _)) => {
                        let fingerprint = record.fingerprint.clone();
                        look_up(&cache, &forced, &mut node, fingerprint, "").await?;
                    }
                    None => node.state = will_run("its minutes become users when it starts"),
                }
            }
            Ok(identity) => {
                look_up(&cache, &forced, &mut node, identity.fingerprint(), "new or changed settings or inputs")
                    .await?;
            }
        }
        if matches!(node.state, State::WillRun { .. }) {
            let counters = |input: &ResolvedInput| {
                let from = nodes.iter().find(|n| n.name == input.from.name())?;
                Some((input.slot.slot.clone(), from.record.as_ref()?.counters.clone()))
            };
            node.estimate = stage.stage.estimate(&stage.inputs.iter().filter_map(counters).collect(), &models);
            let rate = tokens_per_second(&runs, &pipeline.name, &stage.name);
            if let (Some(minutes), Some(rate)) = (minutes, rate) {
                let most = (rate * minutes * 60.0) as u64;
                node.estimate.tokens = Some(node.estimate.tokens.map_or(most, |tokens| tokens.min(most)));
            }
        }
        node.expect(&runs, &pipeline.name);
        node.learn(&mut known);
        nodes.push(node);
    }
    Ok(nodes)
}

async fn look_up(
    cache: &Cache,
    forced: &BTreeSet<String>,
    node: &mut PlannedNode,
    fingerprint: String,
    otherwise: &str,
) -> Result<()> {
    node.state = if forced.contains(&node.name) {
        will_run("asked for by --fresh or --from")
    } else if let Some(record) = cache.find(&fingerprint).await? {
        node.seconds = Some(record.seconds);
        node.rows = record.outputs.iter().filter_map(|(n, o)| Some((n.clone(), o.rows?))).collect();
        let again = record.ask_again();
        // Its tables are there to be read all the same.
        node.record = Some(record);
        if again { will_run("some got no answer last time") } else { State::Cached }
    } else {
        will_run(otherwise)
    };
    node.fingerprint = Some(fingerprint);
    Ok(())
}

fn will_run(why: &str) -> State {
    State::WillRun { why: why.to_owned() }
}

impl PlannedNode {
    fn new(name: &str, kind: &str, reads: Vec<String>) -> Self {
        PlannedNode {
            name: name.to_owned(),
            kind: kind.to_owned(),
            reads,
            state: will_run(""),
            fingerprint: None,
            seconds: None,
            last_seconds: None,
            last_tokens: None,
            expected_seconds: None,
            rows: BTreeMap::new(),
            estimate: Estimate::default(),
            record: None,
        }
    }

    /// What earlier nights say of the time.
    fn expect(&mut self, runs: &[RunEntry], pipeline: &str) {
        let last = journal::nights(runs, pipeline, 1).next().and_then(|run| run.node(&self.name));
        self.last_seconds = last.map(|n| n.seconds);
        self.last_tokens = last.and_then(|n| n.llm_tokens);
        if matches!(self.state, State::WillRun { .. }) {
            let by_rate = self.estimate.tokens.zip(tokens_per_second(runs, pipeline, &self.name));
            self.expected_seconds = by_rate.map(|(tokens, rate)| tokens as f64 / rate).or(self.last_seconds);
        }
    }

    fn learn(&self, known: &mut Digests) {
        for (output, o) in self.record.iter().flat_map(|r| &r.outputs) {
            known.insert((self.name.clone(), output.clone()), o.sha256.clone());
        }
    }
}
