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
                    let (uris, digests) = (published.strings("uri")?, published.strings("sha256")?);
                    for (uri, sha256) in uris.into_iter().zip(digests) {
                        if !holds(&warehouse, &uri.unwrap_or_default(), &sha256.unwrap_or_default()).await? {
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
