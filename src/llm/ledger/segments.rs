//! A folder of Parquet segments: rows are appended as whole objects and never changed.
//!
//! In: tables and the keys of their rows. Out: all rows of all segments. Small segments can be merged into one: the
//! merged one is put before the small ones are deleted, so a kill in between leaves rows twice and never none, and a
//! reader that listed a segment which is gone by the time it opens it looks again.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::tables::{Store, StoredTable, Table};

/// How often a reader looks again while others merge.
const ROUNDS: usize = 20;

/// A folder.
#[derive(Clone, Debug)]
pub(super) struct Segments {
    store: Store,
    /// Segments of so many bytes or more stay as they are when small ones are merged.
    small: u64,
}

/// What a folder holds.
pub(super) struct Found {
    /// Each segment that could be read, and whether it is small.
    pub(super) tables: Vec<(Table, bool)>,
    /// Segments that are there and cannot be read.
    pub(super) unreadable: usize,
    /// Small segments, by file name.
    pub(super) small: Vec<String>,
}

impl Segments {
    pub(super) fn new(store: Store, small: u64) -> Self {
        Segments { store, small }
    }

    async fn list(&self) -> Result<Vec<(String, u64)>> {
        let files = self.store.list("").await?.into_iter();
        Ok(files
            .filter_map(|o| Some((o.location.filename()?.to_owned(), o.size)))
            .filter(|(f, _)| f.ends_with(".parquet"))
            .collect())
    }

    /// Everything that is there.
    ///
    /// # Errors
    /// Exit 75 where the store fails, or others merge without end.
    pub(super) async fn read(&self) -> Result<Found> {
        let mut found = Found { tables: Vec::new(), unreadable: 0, small: Vec::new() };
        let mut done: BTreeSet<String> = BTreeSet::new();
        for _ in 0..ROUNDS {
            let mut failed: Vec<String> = Vec::new();
            for (file, size) in self.list().await? {
                if done.contains(&file) {
                    continue;
                }
                match self.table(&file).await {
                    Ok(table) => {
                        if size < self.small {
                            found.small.push(file.clone());
                        }
                        done.insert(file);
                        found.tables.push((table, size < self.small));
                    }
                    Err(_) => failed.push(file),
                }
            }
            if failed.is_empty() {
                return Ok(found);
            }
            let there: BTreeSet<String> = self.list().await?.into_iter().map(|(file, _)| file).collect();
            let unreadable: Vec<String> = failed.iter().filter(|f| there.contains(*f)).cloned().collect();
            found.unreadable += unreadable.len();
            let vanished = unreadable.len() < failed.len();
            done.extend(unreadable);
            if !vanished {
                return Ok(found);
            }
        }
        Err(Error::environment(format!("{} changes faster than it can be read", self.store.display(""))))
    }

    async fn table(&self, file: &str) -> Result<Table> {
        StoredTable::open(&self.store, file).await?.collect().await
    }

    /// Adds a segment. Its name comes from its keys, so that the same rows twice leave one copy.
    pub(super) async fn append<'a>(&self, keys: impl Iterator<Item = &'a str>, table: &Table) -> Result<String> {
        let mut hasher = Sha256::new();
        keys.for_each(|key| {
            hasher.update(key.as_bytes());
            hasher.update([0]);
        });
        let name: String = hasher.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
        let file = format!("{name}.parquet");
        StoredTable::write(&self.store, &file, table).await?;
        crate::fault::point("ledger-put");
        Ok(file)
    }

    /// Puts `table`, which holds every row of `old` that is still wanted, and then deletes `old`.
    pub(super) async fn replace<'a>(
        &self,
        old: &[String],
        keys: impl Iterator<Item = &'a str>,
        table: &Table,
    ) -> Result<String> {
        let new = self.append(keys, table).await?;
        crate::fault::point("ledger-merged");
        for file in old.iter().filter(|f| **f != new) {
            self.store.delete(file).await?;
        }
        Ok(new)
    }
}
