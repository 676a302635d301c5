//! From a parsed pipeline to what can be cached: the identity of every node.
//!
//! In: the pipeline, what is known of upstream outputs. Out: identities (what a fingerprint is
//! made of) of sources and stages, and the places of the files that sources read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::json;

use super::fingerprint::Identity;
use super::{Pipeline, StageNode};
use crate::catalog::{Catalog, FetchProgress};
use crate::error::Result;
use crate::stages::{ModelFile, Stage};
use crate::tables::Store;
use crate::tables::source::source_objects;
use crate::tables::source_config::{OnMissing, SourceConfig};

/// Where a run finds what is not in the pipeline file.
pub struct Surroundings {
    /// The catalogue of data sets and models.
    pub catalog: Catalog,
    /// Where fetched things are kept.
    pub cache: PathBuf,
}

impl Surroundings {
    /// The catalogue that ships and the cache folder `data/cache` below the pipeline's root
    /// (or `TAILFUSE_CACHE`).
    pub fn of(pipeline: &Pipeline) -> Result<Self> {
        Ok(Surroundings { catalog: Catalog::load()?, cache: crate::catalog::cache_folder(&pipeline.root) })
    }
}

/// sha256 of what each finished output holds: (node, output) -> digest.
pub type Digests = BTreeMap<(String, String), String>;

/// What a source reads: the store at its file or folder.
pub async fn source_store(
    pipeline: &Pipeline,
    config: &SourceConfig,
    around: &Surroundings,
    progress: Option<&dyn FetchProgress>,
) -> Result<Option<Store>> {
    let file = match (config.uri.strip_prefix(crate::catalog::SCHEME), progress) {
        (None, _) => return Store::open(&config.uri, &pipeline.root).map(Some),
        (Some(table), Some(progress)) => Some(around.catalog.ensure_table(table, &around.cache, progress).await?),
        (Some(table), None) => around.catalog.fetched_table(table, &around.cache)?,
    };
    file.map(|file| Store::local(&file)).transpose()
}

/// Raise it when the reader would make another table of the same files.
const SOURCE_VERSION: u32 = 1;

/// Identity of a source: its config and the name, size and tag (or time) of every file that it reads.
pub async fn source_identity(name: &str, config: &SourceConfig, store: &Store) -> Result<Identity> {
    let objects: Vec<String> = source_objects(name, config, store).await?.iter().map(|o| o.version()).collect();
    // Whether absence is a failure changes nothing of what is read.
    let config = SourceConfig { on_missing: OnMissing::default(), needs: BTreeMap::new(), ..config.clone() };
    Ok(Identity {
        kind: "source".into(),
        version: SOURCE_VERSION,
        config: json!({ "source": config, "objects": objects }),
        inputs: BTreeMap::new(),
        models: BTreeMap::new(),
        seed: 0,
    })
}

/// Identity of a node that does what `stage` does (its own, or its own with a budget filled in), or the name of the first input whose content is not known yet.
pub fn stage_identity(
    node: &StageNode,
    stage: &dyn Stage,
    known: &Digests,
    models: &BTreeMap<String, ModelFile>,
) -> std::result::Result<Identity, String> {
    let mut inputs = BTreeMap::new();
    for input in &node.inputs {
        let from = input.from.name().to_owned();
        match known.get(&(from.clone(), input.output.clone())) {
            Some(digest) => inputs.insert(input.slot.slot.clone(), digest.clone()),
            None => return Err(from),
        };
    }
    Ok(Identity {
        kind: node.kind.name.to_owned(),
        version: node.kind.version,
        config: stage.identity(),
        inputs,
        models: models.iter().map(|(name, file)| (name.clone(), file.digest.clone())).collect(),
        seed: node.seed,
    })
}
