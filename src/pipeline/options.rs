//! What a person asks of a run: which nodes run again, which are left out, how long the LLM may take.
//!
//! In: options of the command line and a pipeline. Out: sets of node names, or an error (exit 2) that names the nearest node.

use std::collections::BTreeSet;

use super::Pipeline;
use crate::error::{Error, Result};
use crate::stages::context::Shard;

/// What a person asks of a run.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Runs this node and all that read from it again.
    pub from: Option<String>,
    /// Runs everything again.
    pub fresh: bool,
    /// Does everything but the commits of what is published.
    pub no_publish: bool,
    /// Runs this node and what it reads from, nothing else; nothing is published.
    pub until: Option<String>,
    /// Asks this share of the users; stages that read what the LLM said do not run, and nothing is published.
    pub shard: Option<Shard>,
    /// Minutes of the LLM, in place of those of the pipeline file.
    pub minutes: Option<f64>,
}

/// A node that is named on the command line, or an error (exit 2) with the nearest name.
fn check_node(pipeline: &Pipeline, option: &str, name: &str) -> Result<()> {
    let names = || pipeline.sources.iter().map(|(n, _)| n).chain(pipeline.stages.iter().map(|s| &s.name));
    if names().any(|n| n == name) {
        return Ok(());
    }
    let near = names().max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    Err(Error::usage(format!("{option} names `{name}`, which is no stage or source of this pipeline"))
        .with_help(near.map_or_else(String::new, |n| format!("did you mean `{n}`?"))))
}

impl RunOptions {
    /// The nodes that must run whatever the cache holds.
    pub fn forced(&self, pipeline: &Pipeline) -> Result<BTreeSet<String>> {
        let names = || pipeline.sources.iter().map(|(n, _)| n).chain(pipeline.stages.iter().map(|s| &s.name));
        if self.fresh {
            return Ok(names().cloned().collect());
        }
        let Some(from) = &self.from else { return Ok(BTreeSet::new()) };
        check_node(pipeline, "--from", from)?;
        let mut forced = BTreeSet::from([from.clone()]);
        for stage in &pipeline.stages {
            if stage.inputs.iter().any(|i| forced.contains(i.from.name())) {
                forced.insert(stage.name.clone());
            }
        }
        Ok(forced)
    }

    /// The nodes that are left out: all that `until` does not need; those that read what a share of the users cannot give, and
    /// all that publish.
    pub fn left_out(&self, pipeline: &Pipeline) -> Result<BTreeSet<String>> {
        let mut out = BTreeSet::new();
        if let Some(until) = &self.until {
            check_node(pipeline, "--until", until)?;
            let mut needed = BTreeSet::from([until.clone()]);
            // The stages stand in the order to run, so from the last to the first each is met after all that read from it.
            for stage in pipeline.stages.iter().rev() {
                if needed.contains(&stage.name) {
                    needed.extend(stage.inputs.iter().map(|i| i.from.name().to_owned()));
                }
            }
            let names = pipeline.sources.iter().map(|(n, _)| n).chain(pipeline.stages.iter().map(|s| &s.name));
            out.extend(names.filter(|n| !needed.contains(*n)).cloned());
        }
        if let Some(shard) = self.shard {
            let mut divided: BTreeSet<&str> = BTreeSet::new();
            for stage in &pipeline.stages {
                let reads = stage.inputs.iter().map(|i| i.from.name());
                if reads.into_iter().any(|from| divided.contains(from) || out.contains(from)) {
                    out.insert(stage.name.clone());
                } else if stage.stage.shard(shard).is_some() {
                    divided.insert(&stage.name);
                }
            }
        }
        if self.until.is_some() || self.shard.is_some() {
            out.extend(pipeline.stages.iter().filter(|s| !s.stage.cacheable()).map(|s| s.name.clone()));
        }
        Ok(out)
    }

    /// Whether the run is a part of one: nothing is published.
    pub fn partial(&self) -> bool {
        self.until.is_some() || self.shard.is_some()
    }
}
