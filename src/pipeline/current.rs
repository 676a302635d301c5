//! Whether a pipeline's published tables are what a run would publish now (`--skip-current`).
//!
//! In: a plan. Out: yes, where every stage is in the cache, and each `write` stage has published exactly this before and the
//! table still holds it.

use super::Pipeline;
use super::cache::Cache;
use super::plan::{PlannedNode, State};
use super::run::output_table;
use crate::error::Result;
use crate::tables::Store;
use crate::tables::delta::read::Snapshot;
use crate::tables::delta::{self, At};

/// Whether nothing would change. A pipeline that publishes nothing is current where all of it is cached.
///
/// # Errors
/// Exit 75 where a store fails.
pub async fn is_current(pipeline: &Pipeline, nodes: &[PlannedNode]) -> Result<bool> {
    let cache = Cache::new(Store::open(&pipeline.artifacts, &pipeline.root)?);
    for node in nodes {
        match (&node.state, node.kind.as_str(), &node.fingerprint) {
            (State::Cached, ..) => {}
            (_, "write", Some(fingerprint)) => match cache.find(fingerprint).await? {
                Some(record) => {
                    let published = output_table(pipeline, &record, "published").await?;
                    let warehouse = Store::open(&pipeline.warehouse, &pipeline.root)?;
                    let text = |name: &str| published.strings(name);
                    let all = text("format")?.into_iter().zip(text("uri")?).zip(text("sha256")?);
                    let stage = pipeline.stage(&node.name).map(|s| s.stage.identity()).unwrap_or_default();
                    for ((format, uri), sha256) in all {
                        // A rehearsal published nothing, and has no digest.
                        let Some(sha256) = sha256 else { return Ok(false) };
                        let there = match format.as_deref() {
                            Some("delta") => delta_holds(&warehouse, &stage, &sha256).await?,
                            _ => holds(&warehouse, &uri.unwrap_or_default(), &sha256).await?,
                        };
                        if !there {
                            return Ok(false);
                        }
                    }
                }
                None => return Ok(false),
            },
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// Whether the object that a person calls `uri` is there with this content.
async fn holds(warehouse: &Store, uri: &str, sha256: &str) -> Result<bool> {
    let top = warehouse.display("");
    let Some(file) = uri.strip_prefix(top.trim_end_matches('/')) else { return Ok(false) };
    let bytes = warehouse.get_opt(file.trim_start_matches('/')).await?;
    Ok(bytes.is_some_and(|bytes| super::fingerprint::sha256_hex(&bytes) == sha256))
}

/// Whether the partition of a Delta table that a `write` stage of this identity replaces is one file of this content.
async fn delta_holds(warehouse: &Store, identity: &serde_json::Value, sha256: &str) -> Result<bool> {
    let table = warehouse.child(identity["table"].as_str().unwrap_or_default());
    if !delta::is_table(&table).await? {
        return Ok(false);
    }
    let partition: Vec<(&String, Option<&str>)> =
        identity["partition"].as_object().into_iter().flatten().map(|(c, v)| (c, v.as_str())).collect();
    let snapshot = Snapshot::open(&table, At::Latest).await?;
    let ours: Vec<_> = snapshot.files.iter().filter(|f| partition.iter().all(|(c, v)| f.values.get(c) == *v)).collect();
    let [file] = ours.as_slice() else { return Ok(false) };
    let bytes = table.get_opt(&file.file).await?;
    Ok(bytes.is_some_and(|bytes| super::fingerprint::sha256_hex(&bytes) == sha256))
}

/// The days or other partitions that a pipeline would publish, for the message.
pub fn partitions(pipeline: &Pipeline) -> String {
    let of = |stage: &super::StageNode| {
        let identity = stage.stage.identity();
        let parts: Vec<String> = (identity["partition"].as_object().into_iter().flatten())
            .map(|(c, v)| format!("{c}={}", v.as_str().map_or_else(|| v.to_string(), str::to_owned)))
            .collect();
        format!("{}/{}", identity["table"].as_str().unwrap_or_default(), parts.join("/"))
    };
    let all: Vec<String> = pipeline.stages.iter().filter(|s| s.kind.name == "write").map(of).collect();
    match all.is_empty() {
        true => pipeline.name.clone(),
        false => all.join(", "),
    }
}
