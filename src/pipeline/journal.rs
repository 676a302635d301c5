//! The journal of runs below the artifacts: one JSON document a run, `journal/RUN_ID.json`.
//!
//! In: a run as it goes: begun, a node done, ended. Out: which folders runs need, for `gc`; what earlier nights took, for
//! `plan` and for budgets in minutes. A run that lives puts its document again every minute, so one that was killed is known
//! by the age of the object. The journal decides nothing that is published, and may be deleted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex;

use super::cache::Record;
use super::events::NodePlace;
use super::process::Process;
use crate::error::{Error, Result};
use crate::stages::context::ASKED_TOKENS;
use crate::tables::Store;

/// Folder of the journal below the artifacts.
pub const JOURNAL: &str = "journal";
/// How often a run says that it lives.
const BEAT: Duration = Duration::from_secs(60);
/// A run that has said nothing for so long is dead.
const SILENCE: Duration = Duration::from_secs(10 * 60);

/// One node of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeEntry {
    /// Name in the pipeline file.
    pub name: String,
    /// Stage kind, or `source`.
    pub kind: String,
    /// Its folder below the artifacts.
    pub fingerprint: String,
    /// Whether the result was there already.
    pub cached: bool,
    /// Seconds that the work took, in this run or in the one that did it.
    pub seconds: f64,
    /// Prompt tokens that the LLM was asked in this run, as budgets count them; `None` for nodes without an LLM.
    pub llm_tokens: Option<f64>,
    /// Seconds that this took.
    pub llm_seconds: Option<f64>,
    /// The budget in minutes that held, and the users that it was turned into.
    pub minutes: Option<f64>,
    /// See `minutes`.
    pub budget_users: Option<u64>,
}

/// One run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunEntry {
    /// Id of the run.
    pub run_id: String,
    /// Name of the pipeline.
    pub pipeline: String,
    /// Start, RFC 3339.
    pub started_at: String,
    /// End, RFC 3339; absent while it runs, and for ever where it was killed.
    pub finished_at: Option<String>,
    /// Whether it ended well.
    pub ok: bool,
    /// Wall seconds.
    pub seconds: f64,
    /// The most memory that the process held, in bytes, where the system says it.
    pub peak_memory_bytes: Option<u64>,
    /// What has ended so far, in order.
    pub nodes: Vec<NodeEntry>,
    /// Folders that are being written or read.
    pub at_work: Vec<String>,
    /// Source -> file -> version, of the files that it read.
    pub inputs: BTreeMap<String, BTreeMap<String, String>>,
    /// The process that it is.
    pub process: Process,
    /// When the document was put last, as the store says; not part of the document.
    #[serde(skip)]
    pub last_seen: Option<DateTime<Utc>>,
}

impl RunEntry {
    /// Whether the run may still be at work at `now`.
    pub fn lives(&self, now: DateTime<Utc>) -> bool {
        let silence = chrono::Duration::from_std(SILENCE).unwrap_or(chrono::Duration::zero());
        self.finished_at.is_none() && !self.process.gone() && self.last_seen.is_none_or(|seen| now - seen < silence)
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Option<&NodeEntry> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// Prompt tokens and seconds of the LLM in this run.
    pub fn llm(&self) -> (f64, f64) {
        let sum = |of: fn(&NodeEntry) -> Option<f64>| self.nodes.iter().filter_map(of).sum::<f64>() + 0.0;
        (sum(|n| n.llm_tokens), sum(|n| n.llm_seconds))
    }
}

/// All runs that the journal knows, oldest first. Documents that cannot be read are left out.
///
/// # Errors
/// Exit 75 where the store fails.
pub async fn read(artifacts: &Store) -> Result<Vec<RunEntry>> {
    let mut runs = Vec::new();
    for object in artifacts.list(JOURNAL).await? {
        let Some(file) = object.location.filename().filter(|f| f.ends_with(".json")) else { continue };
        let Some(bytes) = artifacts.get_opt(&format!("{JOURNAL}/{file}")).await? else { continue };
        let Ok(mut run) = serde_json::from_slice::<RunEntry>(&bytes) else { continue };
        run.last_seen = Some(object.last_modified);
        runs.push(run);
    }
    runs.sort_by(|a, b| (&a.started_at, &a.run_id).cmp(&(&b.started_at, &b.run_id)));
    Ok(runs)
}

/// The journal of the run at work.
pub struct Journal {
    store: Store,
    entry: Arc<Mutex<RunEntry>>,
    beat: tokio::task::JoinHandle<()>,
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.beat.abort();
    }
}

async fn put(store: &Store, entry: &RunEntry) -> Result<()> {
    let text = serde_json::to_vec_pretty(entry).map_err(|e| Error::internal("the journal").because(e))?;
    store.put(&format!("{JOURNAL}/{}.json", entry.run_id), text.into()).await
}

impl Journal {
    /// Begins the document of a run.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn begin(artifacts: &Store, run_id: &str, pipeline: &str, started_at: &str) -> Result<Self> {
        let entry = RunEntry {
            run_id: run_id.to_owned(),
            pipeline: pipeline.to_owned(),
            started_at: started_at.to_owned(),
            process: Process::this(),
            ..RunEntry::default()
        };
        put(artifacts, &entry).await?;
        let entry = Arc::new(Mutex::new(entry));
        let (store, of_beat) = (artifacts.clone(), entry.clone());
        let beat = tokio::spawn(async move {
            loop {
                tokio::time::sleep(BEAT).await;
                let entry = of_beat.lock().await.clone();
                // A store that does not answer now may answer at the next beat; the run itself reports what fails.
                let _ = put(&store, &entry).await;
            }
        });
        Ok(Journal { store: artifacts.clone(), entry, beat })
    }

    async fn change(&self, change: impl FnOnce(&mut RunEntry)) -> Result<()> {
        let mut entry = self.entry.lock().await;
        change(&mut entry);
        put(&self.store, &entry).await
    }

    /// A folder is about to be written or read: it must not be taken away.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn at_work(&self, fingerprint: &str) -> Result<()> {
        self.change(|e| e.at_work.push(fingerprint.to_owned())).await
    }

    /// The files that a source reads.
    pub async fn source(&self, name: &str, files: BTreeMap<String, String>) {
        self.entry.lock().await.inputs.insert(name.to_owned(), files);
    }

    /// A node has ended.
    pub async fn node(&self, place: &NodePlace, record: &Record, cached: bool, budget: Option<(f64, u64)>) {
        let figure = |key: &str| record.counters.get(key).and_then(Value::as_f64);
        let asked = figure("llm_seconds").is_some();
        let of = |key: &str| asked.then(|| if cached { 0.0 } else { figure(key).unwrap_or(0.0) });
        let node = NodeEntry {
            name: place.name.clone(),
            kind: place.kind.clone(),
            fingerprint: record.fingerprint.clone(),
            cached,
            seconds: record.seconds,
            llm_tokens: of(ASKED_TOKENS),
            llm_seconds: of("llm_seconds"),
            minutes: budget.map(|b| b.0),
            budget_users: budget.map(|b| b.1),
        };
        // It is put with the next folder, or the end.
        self.entry.lock().await.nodes.push(node);
    }

    /// The run has ended.
    ///
    /// # Errors
    /// Exit 75 where the store fails.
    pub async fn end(&self, ok: bool, seconds: f64) -> Result<()> {
        self.beat.abort();
        let now = Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        self.change(|e| {
            e.finished_at = Some(now);
            e.ok = ok;
            e.seconds = seconds;
            e.peak_memory_bytes = peak_memory();
            e.at_work.clear();
        })
        .await
    }
}

/// The most memory that this process held, in bytes; Linux says it.
fn peak_memory() -> Option<u64> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Runs of `pipeline` that ended well, newest first, at most `most`.
pub fn nights<'a>(runs: &'a [RunEntry], pipeline: &'a str, most: usize) -> impl Iterator<Item = &'a RunEntry> {
    runs.iter().rev().filter(move |r| r.ok && r.pipeline == pipeline).take(most)
}

/// Nights that a rate is taken over.
const RATE_NIGHTS: usize = 7;

/// Prompt tokens that the LLM read per second in the stage `stage` in the last nights: all tokens by all seconds, so that a night with few
/// prompts weighs little. `None` where none was recorded.
pub fn tokens_per_second(runs: &[RunEntry], pipeline: &str, stage: &str) -> Option<f64> {
    let asked = |r: &&RunEntry| r.node(stage).and_then(|n| n.llm_tokens).is_some_and(|tokens| tokens > 0.0);
    let nights: Vec<&RunEntry> =
        runs.iter().rev().filter(|r| r.ok && r.pipeline == pipeline).filter(asked).take(RATE_NIGHTS).collect();
    let nodes = || nights.iter().filter_map(|r| r.node(stage));
    let tokens: f64 = nodes().filter_map(|n| n.llm_tokens).sum();
    let seconds: f64 = nodes().filter_map(|n| n.llm_seconds).sum();
    (tokens > 0.0 && seconds > 0.0).then(|| tokens / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn night(run_id: &str, tokens: f64, seconds: f64) -> RunEntry {
        let node = NodeEntry {
            name: "rerank".into(),
            llm_tokens: Some(tokens),
            llm_seconds: Some(seconds),
            ..NodeEntry::default()
        };
        RunEntry { run_id: run_id.into(), pipeline: "p".into(), ok: true, nodes: vec![node], ..RunEntry::default() }
    }

    #[test]
    fn rates_weigh_nights_by_their_work() {
        let runs = [night("a", 1000.0, 10.0), night("b", 0.0, 0.0), night("c", 10.0, 5.0)];
        assert_eq!(tokens_per_second(&runs, "p", "rerank"), Some(1010.0 / 15.0));
        assert_eq!(tokens_per_second(&runs, "q", "rerank"), None);
        assert_eq!(tokens_per_second(&runs[1..2], "p", "rerank"), None);
    }

    #[tokio::test]
    async fn a_killed_run_is_dead_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        let journal = Journal::begin(&store, "r1", "p", "2026-11-22T00:00:00Z").await.unwrap();
        journal.at_work("f1").await.unwrap();
        let runs = read(&store).await.unwrap();
        assert_eq!(runs[0].at_work, ["f1"]);
        assert!(runs[0].lives(Utc::now()) && !runs[0].lives(Utc::now() + chrono::Duration::minutes(11)));
        journal.end(true, 1.0).await.unwrap();
        let runs = read(&store).await.unwrap();
        assert!(!runs[0].lives(Utc::now()) && runs[0].ok && runs[0].at_work.is_empty());
    }
}
