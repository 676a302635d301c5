//! One run at a time for each place that is published.
//!
//! In: the warehouse, the places that a run will replace (`recommendations/ds=2026-11-22`). Out: [`Leases`], held until
//! they are released, or an error (exit 75) that names the run that holds one.
//!
//! A lease is an object `_leases/PLACE/00000001.json` that was put where there was none; the highest number is the one that
//! counts. To take a stale one over is to put the next number, so that of two who try only one succeeds, with nothing but
//! put-if-absent. The holder renews its expiry; a lease is stale once that is over, or at once where the holder was a process
//! of this machine that is gone. Leases keep two runs from doing the same work; what keeps a table whole is its commit.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::process::Process;
use crate::error::{Error, Result};
use crate::stages::Claim;
use crate::tables::Store;

/// Folder of the leases below the warehouse.
pub const FOLDER: &str = "_leases";
/// Seconds that a lease holds without being renewed; `TAILFUSE_LEASE_SECONDS` is another number.
const SECONDS: u64 = 120;
/// How often an acquisition looks again after somebody else took the number that it wanted.
const TRIES: usize = 5;

/// What a lease says.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Holder {
    run_id: String,
    pipeline: String,
    /// Host name.
    host: String,
    #[serde(flatten)]
    process: Process,
    acquired_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
    /// Whether its run gave it back.
    #[serde(default)]
    released: bool,
}

impl Holder {
    fn new(run_id: &str, pipeline: &str, hold: Duration) -> Holder {
        let now = Utc::now();
        Holder {
            run_id: run_id.to_owned(),
            pipeline: pipeline.to_owned(),
            host: host(),
            process: Process::this(),
            acquired_at: now,
            expires_at: now + hold,
            released: false,
        }
    }

    /// Why nobody need wait for it any more, or `None` while it holds.
    fn stale(&self) -> Option<&'static str> {
        if self.released {
            return Some("released");
        }
        if Utc::now() > self.expires_at {
            return Some("expired");
        }
        self.process.gone().then_some("its process is gone")
    }
}

fn host() -> String {
    let named = |file: &str| fs_err::read_to_string(file).ok().map(|t| t.trim().to_owned());
    named("/proc/sys/kernel/hostname").or_else(|| named("/etc/hostname")).unwrap_or_else(|| "unknown".to_owned())
}

/// One lease that is held.
#[derive(Clone, Debug)]
struct Lease {
    /// `_leases/PLACE/` of the warehouse.
    folder: Store,
    place: String,
    number: u64,
    holder: Holder,
}

impl Lease {
    fn name(number: u64) -> String {
        format!("{number:08}.json")
    }

    async fn latest(folder: &Store) -> Result<Option<(u64, Option<Holder>)>> {
        let numbers = folder.names("").await?;
        let Some(number) = numbers.iter().filter_map(|n| n.strip_suffix(".json")?.parse().ok()).max() else {
            return Ok(None);
        };
        let Some(bytes) = folder.get_opt(&Lease::name(number)).await? else { return Ok(None) };
        // What cannot be read is nobody's.
        Ok(Some((number, serde_json::from_slice(&bytes).ok())))
    }

    async fn acquire(warehouse: &Store, place: &str, holder: &Holder) -> Result<Lease> {
        let folder = warehouse.child(&format!("{FOLDER}/{place}"));
        for _ in 0..TRIES {
            let number = match Lease::latest(&folder).await? {
                None => 1,
                Some((number, Some(other))) => match other.stale() {
                    Some(_) => number + 1,
                    None => return Err(held(place, &other)),
                },
                Some((number, None)) => number + 1,
            };
            let lease = Lease { folder: folder.clone(), place: place.to_owned(), number, holder: holder.clone() };
            if folder.put_new(&Lease::name(number), lease.text()?).await? || lease.is_ours().await? {
                lease.clear_older().await?;
                // Somebody may have begun anew while older numbers were being cleared away.
                lease.check().await?;
                return Ok(lease);
            }
        }
        Err(Error::environment(format!("other runs take the lease of {place} all the time"))
            .with_help("run it again when they are done"))
    }

    fn text(&self) -> Result<bytes::Bytes> {
        let text = serde_json::to_vec_pretty(&self.holder).map_err(|e| Error::internal("a lease").because(e))?;
        Ok(text.into())
    }

    fn same(&self, other: &Holder) -> bool {
        let mine = &self.holder;
        (&mine.run_id, &mine.process, mine.acquired_at) == (&other.run_id, &other.process, other.acquired_at)
    }

    async fn is_ours(&self) -> Result<bool> {
        Ok(matches!(Lease::latest(&self.folder).await?, Some((n, Some(h))) if n == self.number && self.same(&h)))
    }

    async fn clear_older(&self) -> Result<()> {
        for name in self.folder.names("").await? {
            if name.strip_suffix(".json").and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n < self.number) {
                self.folder.delete(&name).await?;
            }
        }
        Ok(())
    }

    async fn renew(&mut self, hold: Duration) -> Result<()> {
        self.check().await?;
        self.holder.expires_at = Utc::now() + hold;
        self.folder.put(&Lease::name(self.number), self.text()?).await
    }

    async fn check(&self) -> Result<()> {
        match Lease::latest(&self.folder).await? {
            Some((number, Some(other))) if number == self.number && self.same(&other) => Ok(()),
            Some((_, Some(other))) => Err(held(&self.place, &other).at("this run's lease ended")),
            _ => Err(Error::environment(format!("this run's lease of {} is gone", self.place))
                .with_help("nothing of this run is visible; run it again")),
        }
    }

    async fn release(mut self) -> Result<()> {
        if self.is_ours().await? {
            self.holder.released = true;
            self.folder.put(&Lease::name(self.number), self.text()?).await?;
        }
        Ok(())
    }
}

fn held(place: &str, other: &Holder) -> Error {
    Error::environment(format!(
        "{place} is being published by another run: {} of pipeline `{}`, process {} on {}, since {}",
        other.run_id,
        other.pipeline,
        other.process.pid,
        other.host,
        other.acquired_at.format("%Y-%m-%d %H:%M:%S UTC")
    ))
    .with_help(format!(
        "let it end, and run this again; should it be dead, its lease ends at {} by itself",
        other.expires_at.format("%H:%M:%S UTC")
    ))
}

/// The leases of a run, renewed while they are held.
pub struct Leases {
    held: Arc<Vec<Lease>>,
    heartbeat: Option<JoinHandle<()>>,
}

impl Leases {
    /// Claims all places, or none. Error (exit 75): another run holds one; the store does not answer.
    pub async fn acquire(warehouse: &Store, places: &[String], run_id: &str, pipeline: &str) -> Result<Leases> {
        let hold = Duration::from_secs(
            std::env::var("TAILFUSE_LEASE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SECONDS).max(1),
        );
        let mut places = places.to_vec();
        // In one order everywhere, so that two runs of several places never wait for each other.
        places.sort();
        places.dedup();
        let holder = Holder::new(run_id, pipeline, hold);
        let mut held = Vec::new();
        for place in &places {
            match Lease::acquire(warehouse, place, &holder).await {
                Ok(lease) => held.push(lease),
                Err(e) => {
                    for lease in held {
                        // The error that led here is the one to report; what stays expires.
                        let _ = lease.release().await;
                    }
                    return Err(e);
                }
            }
        }
        let mut beating = held.clone();
        let heartbeat = (!held.is_empty()).then(|| {
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(hold / 4).await;
                    for lease in &mut beating {
                        if let Err(e) = lease.renew(hold).await {
                            // The check before the commit has the last word.
                            tracing::warn!("the lease of {} was not renewed: {e}", lease.place);
                        }
                    }
                }
            })
        });
        Ok(Leases { held: Arc::new(held), heartbeat })
    }

    /// What a stage asks before it commits.
    pub fn claim(&self) -> Arc<dyn Claim> {
        Arc::new(Held(self.held.clone()))
    }

    /// Gives them back.
    pub async fn release(mut self) -> Result<()> {
        if let Some(heartbeat) = self.heartbeat.take() {
            heartbeat.abort();
            // A renewal that is under way must not come after the release.
            let _ = heartbeat.await;
        }
        for lease in self.held.iter() {
            lease.clone().release().await?;
        }
        Ok(())
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        if let Some(heartbeat) = self.heartbeat.take() {
            heartbeat.abort();
        }
    }
}

struct Held(Arc<Vec<Lease>>);

#[async_trait]
impl Claim for Held {
    async fn check(&self) -> Result<()> {
        for lease in self.0.iter() {
            lease.check().await?;
        }
        Ok(())
    }
}

/// Leases that no run holds and that ended longer than `age` ago, as names below the warehouse; with `remove` they go.
/// A run of such a place begins at number 1 again.
pub async fn old_leases(warehouse: &Store, age: TimeDelta, remove: bool) -> Result<Vec<String>> {
    let root = warehouse.path("");
    let mut old = Vec::new();
    for object in warehouse.list(FOLDER).await? {
        if Utc::now() - object.last_modified < age {
            continue;
        }
        let Some(parts) = object.location.prefix_match(&root) else { continue };
        let name = parts.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>().join("/");
        if remove {
            warehouse.delete(&name).await?;
        }
        old.push(name);
    }
    Ok(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    /// The same of a process that has ended.
    fn gone(mut holder: Holder) -> Holder {
        holder.process.pid = u32::MAX;
        holder
    }

    fn warehouse() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        (folder, store)
    }

    async fn take(store: &Store, run: &str) -> Result<Leases> {
        Leases::acquire(store, &["t/ds=1".to_owned()], run, "p").await
    }

    async fn put(store: &Store, number: u64, holder: &Holder) {
        let text = serde_json::to_vec(holder).unwrap();
        store.put(&format!("{FOLDER}/t/ds=1/{}", Lease::name(number)), text.into()).await.unwrap();
    }

    #[tokio::test]
    async fn one_holds_and_the_next_takes_what_was_released() {
        let (_folder, store) = warehouse();
        let first = take(&store, "one").await.unwrap();
        let e = take(&store, "two").await.err().unwrap();
        assert_eq!(e.fault, Fault::Environment);
        assert!(e.message.contains("t/ds=1") && e.message.contains("one"), "{e}");
        first.claim().check().await.unwrap();
        first.release().await.unwrap();
        let second = take(&store, "two").await.unwrap();
        second.claim().check().await.unwrap();
        second.release().await.unwrap();
        assert_eq!(store.list(FOLDER).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn what_is_stale_is_taken_over_and_its_holder_notices() {
        let (_folder, store) = warehouse();
        let dead = gone(Holder::new("dead", "p", Duration::from_secs(60)));
        put(&store, 4, &dead).await;
        let after = take(&store, "two").await.unwrap();
        assert_eq!(after.held[0].number, 5);
        // Elsewhere a process cannot be looked at: the time decides.
        let mut far = dead;
        far.process.machine = "another".into();
        put(&store, 6, &far).await;
        let e = after.claim().check().await.unwrap_err();
        assert!(e.fault == Fault::Environment && e.message.contains("dead"), "{e}");
        assert!(take(&store, "three").await.is_err());
        far.expires_at = Utc::now() - TimeDelta::seconds(1);
        put(&store, 6, &far).await;
        take(&store, "three").await.unwrap();
    }

    #[tokio::test]
    async fn of_many_at_once_one_succeeds() {
        let (_folder, store) = warehouse();
        let dead = gone(Holder::new("dead", "p", Duration::from_secs(60)));
        put(&store, 1, &dead).await;
        let runs = (0..16).map(|i| {
            let store = store.clone();
            async move { take(&store, &format!("run-{i}")).await }
        });
        let taken = futures::future::join_all(runs).await;
        assert_eq!(taken.iter().filter(|t| t.is_ok()).count(), 1);
    }
}
