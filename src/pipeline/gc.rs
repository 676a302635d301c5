//! What no run needs any more, below the artifacts of a pipeline.
//!
//! In: pipelines that share an artifacts folder, the journal, ages. Out: [`Removal`]s, which are done unless it is a dry run.
//! Kept are: what the pipelines as they stand now find in the cache, what the last runs of every pipeline in the journal made
//! or read, what a run at work has named, whatever is young, answers of the LLM and figures of fits (unless an age is given
//! for them), and everything published. The reasons are in `docs/decisions/0025-what-may-be-forgotten.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use object_store::ObjectMeta;
use serde::Serialize;

use super::Pipeline;
use super::cache::{RECORD_FILE, Record};
use super::journal::{self, JOURNAL, RunEntry};
use super::nodes::Surroundings;
use super::plan::plan;
use super::run::RunOptions;
use crate::error::{Error, Result};
use crate::tables::Store;

/// Folders of answers that were paid for: a ledger's, and figures of fits.
const ANSWERS: [&str; 4] = ["ledger", "ledger_orders", "fits", "ties"];
/// Folder of the checkpoints of fits that were stopped.
const CHECKPOINTS: &str = "checkpoints";
/// What a write that was cut off left behind is not kept longer than this many days.
const DEBRIS_DAYS: f64 = 1.0;

/// How much is kept.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Only lists.
    pub dry_run: bool,
    /// Days that a thing is kept though nothing needs it: other pipelines may, which this one does not know.
    pub older_than: f64,
    /// Runs of each pipeline whose artifacts are kept.
    pub keep_runs: usize,
    /// Age in days beyond which answers are removed too; never where it is `None`.
    pub answers_older_than: Option<f64>,
    /// The time that ages are counted from.
    pub now: DateTime<Utc>,
}

/// One thing that goes.
#[derive(Clone, Debug, Serialize)]
pub struct Removal {
    /// Where it is.
    pub place: String,
    /// What it is: `unused result`, `unfinished result`, `old checkpoint`, `cut-off write`, `old answers`, `old run`, `unpublished data`.
    pub what: &'static str,
    /// Stage that made it, where that is known.
    pub stage: Option<String>,
    /// Number of files.
    pub files: usize,
    /// Their size.
    pub bytes: u64,
    /// Days since the last of them was written.
    pub age_days: f64,
    #[serde(skip)]
    objects: Vec<String>,
    #[serde(skip)]
    fingerprint: Option<String>,
    #[serde(skip)]
    local: Vec<PathBuf>,
    /// An object outside of the artifacts.
    #[serde(skip)]
    outside: Option<(Store, String)>,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GcReport {
    /// Whether nothing was removed.
    pub dry_run: bool,
    /// What goes, or went, in path order.
    pub removed: Vec<Removal>,
    /// Sum of their sizes.
    pub bytes: u64,
    /// Size of what stays below the artifacts.
    pub kept_bytes: u64,
    /// Runs at work, whose artifacts stay.
    pub runs_at_work: Vec<String>,
}

/// Looks through the artifacts of `pipelines`, which must have the same place for them, and removes what nothing needs.
///
/// # Errors
/// The pipelines keep their artifacts in different places (exit 78); a store fails (exit 75).
pub async fn gc(pipelines: &[(Pipeline, Surroundings)], options: &GcOptions) -> Result<GcReport> {
    let Some((first, _)) = pipelines.first() else { return Ok(GcReport::default()) };
    let artifacts = Store::open(&first.artifacts, &first.root)?;
    let mut warehouses: BTreeMap<String, Store> = BTreeMap::new();
    let mut tables: BTreeMap<String, Store> = BTreeMap::new();
    let mut needed = BTreeSet::new();
    for (pipeline, around) in pipelines {
        let own = Store::open(&pipeline.artifacts, &pipeline.root)?;
        if own.display("") != artifacts.display("") {
            return Err(Error::spec(format!(
                "`{}` keeps its artifacts at {}, `{}` at {}",
                first.name,
                artifacts.display(""),
                pipeline.name,
                own.display("")
            ))
            .with_help("name pipelines together that share their artifacts, and call `gc` once for each place"));
        }
        let warehouse = Store::open(&pipeline.warehouse, &pipeline.root)?;
        for stage in &pipeline.stages {
            if let (true, Some(table)) = (stage.stage.publishes().is_some(), stage.stage.identity()["table"].as_str()) {
                let store = warehouse.child(table);
                tables.insert(store.display(""), store);
            }
        }
        warehouses.insert(warehouse.display(""), warehouse);
        needed.extend(plan(pipeline, around, &RunOptions::default()).await?.into_iter().filter_map(|n| n.fingerprint));
    }
    let runs = journal::read(&artifacts).await?;
    let live: Vec<&RunEntry> = runs.iter().filter(|r| r.lives(options.now)).collect();
    let kept = kept_runs(&runs, options);
    for run in runs.iter().filter(|r| kept.contains(r.run_id.as_str())) {
        needed.extend(run.nodes.iter().map(|n| n.fingerprint.clone()).chain(run.at_work.iter().cloned()));
    }
    let since = live.iter().filter_map(|r| r.started_at.parse::<DateTime<Utc>>().ok()).min();
    let look = Look { options, since, artifacts: &artifacts };
    let objects = artifacts.list("").await?;
    let all_bytes: u64 = objects.iter().map(|o| o.size).sum();
    let mut removed = look.below(objects, &needed, &kept).await?;
    removed.extend(look.cut_off(&artifacts)?);
    for warehouse in warehouses.values() {
        removed.extend(look.cut_off(warehouse)?);
    }
    for (table, store) in &tables {
        removed.extend(look.never_published(table, store).await?);
    }
    removed.sort_by(|a, b| a.place.cmp(&b.place));
    if !options.dry_run {
        let mut done = Vec::with_capacity(removed.len());
        for removal in removed {
            if remove(&artifacts, &removal, options.now).await? {
                done.push(removal);
            }
        }
        removed = done;
    }
    let of_artifacts: u64 = removed.iter().filter(|r| r.local.is_empty() && r.outside.is_none()).map(|r| r.bytes).sum();
    Ok(GcReport {
        dry_run: options.dry_run,
        bytes: removed.iter().map(|r| r.bytes).sum(),
        kept_bytes: all_bytes.saturating_sub(of_artifacts),
        runs_at_work: live.iter().map(|r| r.run_id.clone()).collect(),
        removed,
    })
}

/// Ids of the runs whose artifacts stay: those at work, and the last ones of each pipeline that ended well.
fn kept_runs<'a>(runs: &'a [RunEntry], options: &GcOptions) -> BTreeSet<&'a str> {
    let mut kept: BTreeSet<&str> = runs.iter().filter(|r| r.lives(options.now)).map(|r| r.run_id.as_str()).collect();
    let pipelines: BTreeSet<&str> = runs.iter().map(|r| r.pipeline.as_str()).collect();
    for pipeline in pipelines {
        kept.extend(journal::nights(runs, pipeline, options.keep_runs).map(|r| r.run_id.as_str()));
    }
    kept
}

/// A look at what there is.
struct Look<'a> {
    options: &'a GcOptions,
    /// Start of the oldest run at work: what is younger may be its.
    since: Option<DateTime<Utc>>,
    artifacts: &'a Store,
}

impl Look<'_> {
    fn age(&self, time: DateTime<Utc>) -> f64 {
        (self.options.now - time).num_milliseconds() as f64 / 86_400_000.0
    }

    /// Older than `days`, and not of a run at work.
    fn old(&self, newest: DateTime<Utc>, days: f64) -> bool {
        self.age(newest) >= days && self.since.is_none_or(|since| newest < since)
    }

    fn debris_days(&self) -> f64 {
        self.options.older_than.min(DEBRIS_DAYS)
    }

    fn removal(&self, place: &str, what: &'static str, objects: &[(String, ObjectMeta)]) -> Removal {
        let newest = objects.iter().map(|(_, o)| o.last_modified).max().unwrap_or(self.options.now);
        Removal {
            place: self.artifacts.display(place),
            what,
            stage: None,
            files: objects.len(),
            bytes: objects.iter().map(|(_, o)| o.size).sum(),
            age_days: self.age(newest),
            objects: objects.iter().map(|(file, _)| file.clone()).collect(),
            fingerprint: None,
            local: Vec::new(),
            outside: None,
        }
    }

    /// Data files of a Delta table that no commit ever named: their run was killed before its commit. Files that a commit
    /// replaced stay, since restores and readers of older versions need them; a vacuum of the table removes those.
    async fn never_published(&self, place: &str, table: &Store) -> Result<Vec<Removal>> {
        let top = table.path("");
        let (mut files, mut named) = (Vec::new(), BTreeSet::new());
        let mut oldest: Option<(String, DateTime<Utc>)> = None;
        for object in table.list("").await? {
            let Some(parts) = object.location.prefix_match(&top) else { continue };
            let name = parts.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            let Some(entry) = name.strip_prefix("_delta_log/") else {
                files.push((name, object));
                continue;
            };
            if !entry.ends_with(".json") || entry.starts_with('_') || entry.starts_with('.') {
                continue;
            }
            if oldest.as_ref().is_none_or(|(first, _)| entry < first.as_str()) {
                oldest = Some((entry.to_owned(), object.last_modified));
            }
            let Some(bytes) = table.get_opt(&name).await? else { continue };
            for line in bytes.split(|b| *b == b'\n') {
                let action: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
                for of in ["add", "remove"] {
                    named.extend(action[of]["path"].as_str().map(str::to_owned));
                }
            }
        }
        // Entries before the oldest one that is left may have named a file that is older than it.
        let from_start = oldest.as_ref().is_none_or(|(first, _)| first.trim_start_matches('0') == ".json");
        let known = |written: DateTime<Utc>| from_start || oldest.as_ref().is_some_and(|(_, time)| written > *time);
        let orphan = |(name, object): &(String, ObjectMeta)| {
            let file = name.rsplit('/').next().unwrap_or_default();
            file.starts_with("part-0-")
                && file.ends_with(".parquet")
                && !named.contains(name)
                && known(object.last_modified)
                && self.old(object.last_modified, self.debris_days())
        };
        let removal = |(name, object): (String, ObjectMeta)| Removal {
            place: format!("{}/{name}", place.trim_end_matches('/')),
            what: "unpublished data",
            stage: None,
            files: 1,
            bytes: object.size,
            age_days: self.age(object.last_modified),
            objects: Vec::new(),
            fingerprint: None,
            local: Vec::new(),
            outside: Some((table.clone(), name)),
        };
        Ok(files.into_iter().filter(orphan).map(removal).collect())
    }

    async fn below(
        &self,
        objects: Vec<ObjectMeta>,
        needed: &BTreeSet<String>,
        kept: &BTreeSet<&str>,
    ) -> Result<Vec<Removal>> {
        let top = self.artifacts.path("");
        let mut groups: BTreeMap<String, Vec<(String, ObjectMeta)>> = BTreeMap::new();
        for object in objects {
            let Some(parts) = object.location.prefix_match(&top) else { continue };
            let parts: Vec<String> = parts.map(|p| p.as_ref().to_owned()).collect();
            let group = match parts.as_slice() {
                [first, second, _, ..] if first == CHECKPOINTS => format!("{first}/{second}"),
                // Each document and each segment stands for itself.
                [first, ..] if first == JOURNAL || ANSWERS.contains(&first.as_str()) => parts.join("/"),
                [first, _, ..] => first.clone(),
                _ => continue,
            };
            groups.entry(group).or_default().push((parts.join("/"), object));
        }
        let mut removed = Vec::new();
        for (group, files) in groups {
            let newest = files.iter().map(|(_, o)| o.last_modified).max().unwrap_or(self.options.now);
            let first = group.split('/').next().unwrap_or_default();
            let what = match first {
                CHECKPOINTS => self.old(newest, self.options.older_than).then_some("old checkpoint"),
                JOURNAL => {
                    let run = group.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
                    (!kept.contains(run) && self.old(newest, self.options.older_than)).then_some("old run")
                }
                answers if ANSWERS.contains(&answers) => {
                    let old = self.options.answers_older_than.is_some_and(|days| self.old(newest, days));
                    old.then_some("old answers")
                }
                fingerprint if is_fingerprint(fingerprint) => {
                    let whole = files.iter().any(|(file, _)| *file == format!("{fingerprint}/{RECORD_FILE}"));
                    match whole {
                        _ if whole && needed.contains(fingerprint) => None,
                        true => self.old(newest, self.options.older_than).then_some("unused result"),
                        false => self.old(newest, self.debris_days()).then_some("unfinished result"),
                    }
                }
                // Nothing of ours.
                _ => None,
            };
            let Some(what) = what else { continue };
            let mut removal = self.removal(&group, what, &files);
            if is_fingerprint(first) {
                removal.fingerprint = Some(first.to_owned());
                let record = self.artifacts.get_opt(&format!("{first}/{RECORD_FILE}")).await?;
                let record = record.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
                removal.stage = record.map(|r| r.stage);
            }
            removed.push(removal);
        }
        Ok(removed)
    }

    /// What the local file system has of writes that were cut off: `NAME#1`, which no listing shows. A bucket's own rule for
    /// multipart uploads that were never completed does the same there.
    fn cut_off(&self, store: &Store) -> Result<Vec<Removal>> {
        let Some(top) = store.local_path("") else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        walk(&top, &mut found)?;
        let mut removed = Vec::new();
        for (path, bytes, modified) in found {
            if self.old(modified, self.debris_days()) {
                removed.push(Removal {
                    place: path.display().to_string(),
                    what: "cut-off write",
                    stage: None,
                    files: 1,
                    bytes,
                    age_days: self.age(modified),
                    objects: Vec::new(),
                    fingerprint: None,
                    local: vec![path],
                    outside: None,
                });
            }
        }
        Ok(removed)
    }
}

fn is_fingerprint(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Staged files below a folder: path, size, time.
fn walk(folder: &Path, found: &mut Vec<(PathBuf, u64, DateTime<Utc>)>) -> Result<()> {
    let entries = match fs_err::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::environment("cannot look for what writes left").because(e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::environment("cannot look for what writes left").because(e))?;
        // What goes away meanwhile needs no removal.
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            walk(&entry.path(), found)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let staged = name.rsplit_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        if let (true, Ok(modified)) = (staged, meta.modified()) {
            found.push((entry.path(), meta.len(), modified.into()));
        }
    }
    Ok(())
}

/// Removes one thing; `false` where a run has begun to use it meanwhile.
///
/// A run names a folder in the journal before it looks whether it is whole. So the record goes first, and comes back where the
/// journal names the folder by then: either the run did not find it, or all of it is still there.
async fn remove(artifacts: &Store, removal: &Removal, now: DateTime<Utc>) -> Result<bool> {
    if let Some(fingerprint) = &removal.fingerprint {
        let record_file = format!("{fingerprint}/{RECORD_FILE}");
        let record = artifacts.get_opt(&record_file).await?;
        artifacts.delete(&record_file).await?;
        let runs = journal::read(artifacts).await?;
        if runs.iter().any(|r| r.lives(now) && r.at_work.contains(fingerprint)) {
            if let Some(record) = record {
                artifacts.put(&record_file, record).await?;
            }
            return Ok(false);
        }
    }
    for object in &removal.objects {
        artifacts.delete(object).await?;
    }
    if let Some((table, file)) = &removal.outside {
        table.delete(file).await?;
    }
    for path in &removal.local {
        match fs_err::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::environment("cannot remove what a write left").because(e));
            }
            _ => {}
        }
    }
    // Folders are a matter of the local file system alone; one that is not empty stays.
    let folders: BTreeSet<PathBuf> = (removal.objects.iter())
        .filter_map(|object| Some(artifacts.local_path(object)?.parent()?.to_owned()))
        .collect();
    let top = artifacts.local_path("");
    for folder in folders.iter().rev() {
        let mut folder = folder.as_path();
        while top.as_ref().is_some_and(|top| folder != top && folder.starts_with(top))
            && fs_err::remove_dir(folder).is_ok()
        {
            let Some(above) = folder.parent() else { break };
            folder = above;
        }
    }
    Ok(true)
}
