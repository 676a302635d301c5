//! Sources with `role = "artifact"`: what another pipeline published with a `write_artifact` stage.
//!
//! In: the source's config and the store at its URI. Out: an artifact, its identity, and a warning where it is old. An artifact
//! that is absent or damaged ends the run with exit 65 and the command that makes it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::cache::Record;
use super::fingerprint::Identity;
use crate::error::{Error, Result};
use crate::fusion::{Calibration, calibration};
use crate::stages::Artifact;
use crate::tables::Store;
use crate::tables::artifact_files::{self, Found};
use crate::tables::source_config::{SourceConfig, SourceRole};

/// The one output of such a source.
pub const FILES: &str = "files";
/// Counter with a text that the result document repeats under `warnings`.
pub const WARNING: &str = "warning";
/// Counter with the age in days.
const AGE: &str = "age_days";

/// Whether a source is an artifact.
pub fn is_artifact(config: &SourceConfig) -> bool {
    config.role == Some(SourceRole::Artifact)
}

fn way_out(config: &SourceConfig) -> String {
    match &config.made_by {
        Some(command) => format!("make it: {command}"),
        None => "run the pipeline that publishes it with a `write_artifact` stage, or correct `uri`".to_owned(),
    }
}

/// What lies at the URI, if anything, and the identity of the source.
///
/// # Errors
/// There is nothing, and the source is not optional (exit 65); the store fails (exit 75).
pub async fn find(name: &str, config: &SourceConfig, store: &Store) -> Result<(Option<Found>, Identity)> {
    let found = artifact_files::find(store).await?;
    if found.is_none() && !config.optional {
        return Err(Error::data(format!("source `{name}`: there is no artifact at {}", store.display("")))
            .with_help(way_out(config)));
    }
    let identity = Identity {
        kind: "source".into(),
        version: 1,
        // How old it may be, and how it is made, are no part of what it is.
        config: json!({ "artifact": config.uri, "version": found.as_ref().map(|f| &f.version) }),
        inputs: BTreeMap::new(),
        models: BTreeMap::new(),
        seed: 0,
    };
    Ok((found, identity))
}

/// Reads the artifact; one without files where there is none.
///
/// # Errors
/// It is damaged (exit 65); the store fails (exit 75).
pub async fn read(name: &str, config: &SourceConfig, store: &Store, found: Option<&Found>) -> Result<Artifact> {
    let Some(found) = found else { return Ok(Artifact::default()) };
    let place = |e: Error| match e.fault {
        crate::error::Fault::Data => {
            Error::data(format!("source `{name}`: {}: {}", store.display(""), e.message)).with_help(way_out(config))
        }
        _ => e.at(format!("source `{name}`")),
    };
    let files = artifact_files::read(store, found).await.map_err(place)?;
    for (file, bytes) in &files {
        if file == calibration::FILE {
            Calibration::from_bytes(bytes).map_err(place)?;
        } else if file.ends_with(".json") {
            serde_json::from_slice::<Value>(bytes)
                .map_err(|e| place(Error::data(format!("`{file}` is no JSON")).because(e)))?;
        }
    }
    Ok(Artifact { files })
}

/// Figures of such a source at the time `now`: its age, and a warning where that is more than the config allows.
pub fn counters(name: &str, config: &SourceConfig, found: Option<&Found>, now: DateTime<Utc>) -> Map<String, Value> {
    let mut counters = Map::new();
    let Some(found) = found else {
        counters.insert("absent".to_owned(), Value::Bool(true));
        return counters;
    };
    let days = (now - found.published).num_seconds().max(0) as f64 / 86_400.0;
    counters.insert(AGE.to_owned(), json!((days * 100.0).round() / 100.0));
    if let Some(most) = config.max_age_days
        && days > most
    {
        let text =
            format!("source `{name}` was published {days:.1} days ago, at most {most} are wanted; {}", way_out(config));
        counters.insert(WARNING.to_owned(), Value::String(text));
    }
    counters
}

/// The warning of a node, where it has one.
pub fn warning(record: &Record) -> Option<&str> {
    record.counters.get(WARNING).and_then(Value::as_str)
}
