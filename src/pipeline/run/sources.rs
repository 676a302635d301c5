//! The sources of a run: rows that are cleaned and kept, artifacts of other pipelines, and what was written again meanwhile.
//!
//! In: a source's config. Out: its record, from the cache or read now; a note where an earlier partition was written again.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::Value;

use super::{Done, FetchLines, Run};
use crate::error::{Error, Result};
use crate::pipeline::artifact_source;
use crate::pipeline::cache::{RECORD_FILE, table_record};
use crate::pipeline::events::NodePlace;
use crate::pipeline::fingerprint::Identity;
use crate::pipeline::journal;
use crate::pipeline::nodes::{source_identity, source_store};
use crate::stages::{Observer, StageResult};
use crate::tables::source::{SourceReport, SourceTarget, read_source};
use crate::tables::source_config::SourceConfig;
use crate::tables::{SqlMemory, Store};

impl Run<'_> {
    pub(super) async fn source(&self, place: &NodePlace, config: &SourceConfig, forced: bool) -> Result<Done> {
        let observer = self.events.started(place);
        let fetch = FetchLines(self.events.as_ref(), observer.clone());
        let store = source_store(self.pipeline, config, self.around, Some(&fetch)).await?;
        let store = store.ok_or_else(|| Error::internal("a fetched source has no place"))?;
        if artifact_source::is_artifact(config) {
            return self.artifact(place, config, &store, forced).await;
        }
        let identity = source_identity(&place.name, config, &store).await?;
        let fingerprint = identity.fingerprint();
        self.journal.at_work(&fingerprint).await?;
        let restated = self.restated(place, &identity, observer.as_ref()).await;
        if !forced && let Some(record) = self.cache.find(&fingerprint).await? {
            return Ok(Done::found(record));
        }
        let began = Instant::now();
        let folder = self.cache.folder(&fingerprint);
        folder.delete(RECORD_FILE).await?;
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
        let SourceReport { table, bad_rows, mut counters } = read_source(&place.name, config, &store, &target).await?;
        if restated > 0 {
            counters.insert("restated_partitions".into(), restated.into());
        }
        let outputs = BTreeMap::from([
            ("rows".to_owned(), table_record(&folder, "rows.parquet", &table).await?),
            ("bad_rows".to_owned(), table_record(&folder, "bad_rows.parquet", &bad_rows).await?),
        ]);
        let record = self.record(&identity, place, began, counters, outputs);
        self.cache.complete(&folder, &record).await?;
        Ok(Done::made(record))
    }

    /// Notes the files that the source reads, and says which of them the last night read in another version: an earlier
    /// partition was written again. Returns how many.
    async fn restated(&self, place: &NodePlace, identity: &Identity, observer: &dyn Observer) -> usize {
        let files = files_of(identity);
        let last = journal::nights(&self.nights, &self.pipeline.name, 1).next();
        let before = last.and_then(|night| night.inputs.get(&place.name));
        // A source of one file is written whole every night.
        let changed = match before {
            Some(before) if files.len() > 1 => changed_parts(before, &files),
            _ => Vec::new(),
        };
        if let Some(first) = changed.first() {
            observer.note(&format!(
                "{} earlier partitions or files were written again since the last run, {first} first; what depends on them is computed again",
                changed.len()
            ));
        }
        let n = changed.len();
        self.journal.source(&place.name, files).await;
        n
    }

    /// A source that is an artifact. Its age is looked at in every run.
    async fn artifact(&self, place: &NodePlace, config: &SourceConfig, store: &Store, forced: bool) -> Result<Done> {
        let began = Instant::now();
        let (found, identity) = artifact_source::find(&place.name, config, store).await?;
        self.journal.at_work(&identity.fingerprint()).await?;
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
        Ok(Done { record, cached, budget: None })
    }
}

/// File -> version of what a source reads, out of its identity.
fn files_of(identity: &Identity) -> BTreeMap<String, String> {
    let objects = identity.config["objects"].as_array().into_iter().flatten().filter_map(Value::as_str);
    objects
        .filter_map(|object| {
            let mut parts = object.rsplitn(3, ' ');
            let (stamp, size, file) = (parts.next()?, parts.next()?, parts.next()?);
            Some((file.to_owned(), format!("{size} {stamp}")))
        })
        .collect()
}

/// Partitions (folders of files; files, where there are no folders) that were there before and hold something else now.
fn changed_parts(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    fn parts(files: &BTreeMap<String, String>) -> BTreeMap<&str, Vec<(&str, &str)>> {
        let mut parts: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        for (file, version) in files {
            let part = file.rsplit_once('/').map_or(file.as_str(), |(folder, _)| folder);
            parts.entry(part).or_default().push((file, version));
        }
        parts
    }
    let (before, now) = (parts(before), parts(now));
    let changed = now.iter().filter(|(part, files)| before.get(*part).is_some_and(|b| b != *files));
    changed.map(|(part, _)| (*part).to_owned()).collect()
}
