//! What a fit leaves between runs: checkpoints of one that was stopped, and figures of those that ended.
//!
//! In: the pipeline's store, from a thread that may wait for it. Out: [`StoredCheckpoints`], which the
//! trainer reads and writes, and kept JSON documents by key. A key names everything that a result depends on.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::recommenders::trainer::Checkpoints;
use crate::tables::Store;

/// The pipeline's store of savings, for threads outside the async runtime.
#[derive(Clone, Debug)]
pub(in crate::stages) struct Savings {
    store: Store,
    handle: Handle,
}

/// sha256 (hex) of a JSON document: the name of what depends on it alone.
pub(in crate::stages) fn key_of(document: &Value) -> String {
    hex(Sha256::digest(document.to_string().as_bytes()).as_slice())
}

/// Bytes as lower-case hex.
pub(in crate::stages) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl Savings {
    /// Below `store`; to be called inside the runtime.
    pub fn new(store: &Store) -> Self {
        Savings { store: store.clone(), handle: Handle::current() }
    }

    /// The kept document `kind/key`; one that cannot be read counts as none.
    ///
    /// # Errors
    /// The store fails (exit 75).
    pub fn kept(&self, kind: &str, key: &str) -> Result<Option<Value>> {
        let bytes = self.handle.block_on(self.store.get_opt(&format!("{kind}/{key}.json")))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Keeps a document.
    ///
    /// # Errors
    /// The store fails (exit 75).
    pub fn keep(&self, kind: &str, key: &str, document: &Value) -> Result<()> {
        self.handle.block_on(self.store.put(&format!("{kind}/{key}.json"), document.to_string().into()))
    }

    /// Where the fit of that key keeps its checkpoints, at most one in `every`.
    pub fn checkpoints(&self, key: &str, every: Duration) -> StoredCheckpoints {
        let store = self.store.child(&format!("checkpoints/{key}"));
        StoredCheckpoints { store, handle: self.handle.clone(), every, number: Mutex::new(None) }
    }
}

/// The file that says which checkpoint is the last whole one.
const LAST: &str = "last.json";

/// Checkpoints of one fit. Each has a folder of its own, and `last.json`, put last, names it: a kill between two
/// files leaves the checkpoint before it in place.
#[derive(Debug)]
pub(in crate::stages) struct StoredCheckpoints {
    store: Store,
    handle: Handle,
    every: Duration,
    /// Number of the last checkpoint, once it is known.
    number: Mutex<Option<u64>>,
}

impl StoredCheckpoints {
    /// Takes everything away.
    ///
    /// # Errors
    /// The store fails (exit 75).
    pub fn clear(&self) -> Result<()> {
        // The pointer first: without it nothing else is read.
        self.handle.block_on(self.store.delete(LAST))?;
        self.clear_except(None)
    }

    fn clear_except(&self, kept: Option<u64>) -> Result<()> {
        self.handle.block_on(async {
            for object in self.store.list("").await? {
                let below: Vec<String> = object.location.parts().map(|p| p.as_ref().to_owned()).collect();
                let [.., folder, file] = below.as_slice() else { continue };
                if kept.is_none_or(|number| *folder != number.to_string()) && *file != LAST {
                    self.store.delete(&format!("{folder}/{file}")).await?;
                }
            }
            Ok(())
        })
    }

    fn last(&self) -> Result<Option<Last>> {
        let bytes = self.handle.block_on(self.store.get_opt(LAST))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    fn set_number(&self, number: Option<u64>) -> Result<()> {
        let mut known = self.number.lock().map_err(|_| Error::internal("a checkpoint was left half-way"))?;
        *known = number;
        Ok(())
    }
}

/// `last.json`.
#[derive(serde::Serialize, serde::Deserialize)]
struct Last {
    number: u64,
    files: Vec<String>,
}

impl Checkpoints for StoredCheckpoints {
    fn load(&self) -> Result<Option<BTreeMap<String, Bytes>>> {
        let Some(last) = self.last()? else { return Ok(None) };
        let mut files = BTreeMap::new();
        for name in last.files {
            match self.handle.block_on(self.store.get_opt(&format!("{}/{name}", last.number)))? {
                Some(bytes) => files.insert(name, bytes),
                None => return Ok(None),
            };
        }
        self.set_number(Some(last.number))?;
        Ok(Some(files))
    }

    fn save(&self, files: BTreeMap<String, Bytes>) -> Result<()> {
        let known = *self.number.lock().map_err(|_| Error::internal("a checkpoint was left half-way"))?;
        let number = match known {
            Some(number) => number + 1,
            None => self.last()?.map_or(0, |last| last.number + 1),
        };
        let last = Last { number, files: files.keys().cloned().collect() };
        let pointer = serde_json::to_vec(&last).map_err(|e| Error::internal("a checkpoint is no JSON").because(e))?;
        self.handle.block_on(async {
            for (name, bytes) in files {
                self.store.put(&format!("{number}/{name}"), bytes).await?;
            }
            crate::fault::point("checkpoint-data");
            self.store.put(LAST, pointer.into()).await
        })?;
        crate::fault::point("checkpoint-done");
        self.set_number(Some(number))?;
        self.clear_except(Some(number))
    }

    fn every(&self) -> Duration {
        self.every
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn files(text: &'static str) -> BTreeMap<String, Bytes> {
        BTreeMap::from([("a".to_owned(), Bytes::from(text)), ("b".to_owned(), Bytes::from("b"))])
    }

    /// Runs `work` where it may wait for the store, with the number of objects in it.
    fn with_savings(work: impl FnOnce(&Savings, &dyn Fn() -> usize) + Send + 'static) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async move {
            let savings = Savings::new(&store);
            let handle = Handle::current();
            tokio::task::spawn_blocking(move || {
                work(&savings, &|| handle.block_on(store.list("")).unwrap().len());
            })
            .await
            .unwrap();
        });
    }

    #[test]
    fn the_last_checkpoint_is_found_and_no_other_is_left() {
        with_savings(|savings, count| {
            let first = savings.checkpoints("k", Duration::ZERO);
            assert_eq!(first.load().unwrap(), None);
            first.save(files("1")).unwrap();
            first.save(files("2")).unwrap();
            assert_eq!(count(), 3);
            // Another process finds it, and goes on counting.
            let second = savings.checkpoints("k", Duration::ZERO);
            assert_eq!(second.load().unwrap(), Some(files("2")));
            second.save(files("3")).unwrap();
            assert_eq!(first.load().unwrap(), Some(files("3")));
            assert_eq!(savings.checkpoints("other", Duration::ZERO).load().unwrap(), None);
            second.clear().unwrap();
            assert_eq!((second.load().unwrap(), count()), (None, 0));
        });
    }

    #[test]
    fn a_checkpoint_that_was_cut_short_is_not_read() {
        with_savings(|savings, _| {
            let checkpoints = savings.checkpoints("k", Duration::ZERO);
            checkpoints.save(files("1")).unwrap();
            // A kill after the first file of the next one.
            let store = &checkpoints.store;
            checkpoints.handle.block_on(store.put("1/a", Bytes::from("torn"))).unwrap();
            assert_eq!(savings.checkpoints("k", Duration::ZERO).load().unwrap(), Some(files("1")));
            checkpoints.handle.block_on(store.put(LAST, Bytes::from("{"))).unwrap();
            assert_eq!(savings.checkpoints("k", Duration::ZERO).load().unwrap(), None);
        });
    }

    #[test]
    fn documents_are_kept_by_key() {
        with_savings(|savings, _| {
            assert_eq!(savings.kept("search", "x").unwrap(), None);
            savings.keep("search", "x", &json!({"a": 1})).unwrap();
            assert_eq!(savings.kept("search", "x").unwrap(), Some(json!({"a": 1})));
        });
        assert_ne!(key_of(&json!({"a": 1})), key_of(&json!({"a": 2})));
    }
}
