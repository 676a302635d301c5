//! Delta tables on any [`Store`], through `deltalake-core`.
//!
//! In: a store that is opened at the table's folder. Out: snapshots of it (`read`), and one commit that replaces a partition
//! (`write`). The log is read and written through the store's own object store, so that credentials, retries and endpoints
//! are those of [`Store::open`]; a commit is a put of an object that is not there yet, which every store of ours offers.

pub mod maintain;
pub mod read;
mod schema;
mod stats;
pub mod write;

use std::error::Error as StdError;
use std::sync::Arc;

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore};
use deltalake_core::{DeltaTable, DeltaTableError};
use object_store::prefix::PrefixStore;

use crate::error::{Error, Result};
use crate::tables::Store;
use crate::tables::store_errors::failed;

/// The folder that makes a folder a Delta table.
pub const LOG: &str = "_delta_log";

/// Which state of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum At {
    /// The latest.
    #[default]
    Latest,
    /// A version.
    Version(u64),
    /// The latest that was committed at or before a time.
    Time(DateTime<Utc>),
}

impl At {
    /// A time as a person writes it: RFC 3339, or `YYYY-MM-DD[ HH:MM:SS]` in UTC. A day means its first instant.
    pub fn time(text: &str) -> Option<At> {
        let plain = |form| NaiveDateTime::parse_from_str(text, form).ok().map(|t| t.and_utc());
        DateTime::parse_from_rfc3339(text)
            .ok()
            .map(|t| t.to_utc())
            .or_else(|| plain("%Y-%m-%d %H:%M:%S"))
            .or_else(|| plain("%Y-%m-%dT%H:%M:%S"))
            .or_else(|| Some(NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0)?.and_utc()))
            .map(At::Time)
    }
}

/// Whether there is a Delta table at `store`.
pub async fn is_table(store: &Store) -> Result<bool> {
    Ok(!store.names(LOG).await?.is_empty())
}

/// The log of the table at `store`.
fn log_store(store: &Store) -> LogStoreRef {
    let root = store.object_store();
    let table = Arc::new(PrefixStore::new(root.clone(), store.path("")));
    default_logstore(table, root, &store.url(), &StorageConfig::default())
}

/// The table at `store` in the wanted state, or `None` where there is no table. Errors (exit 65): the state is not there, the
/// log is damaged or needs what we cannot read; (exit 75) the store does not answer.
async fn open(store: &Store, at: At) -> Result<Option<DeltaTable>> {
    if !is_table(store).await? {
        return Ok(None);
    }
    let name = store.display("");
    let mut table = DeltaTable::new(log_store(store));
    let loaded = match at {
        At::Latest => table.load().await,
        At::Version(version) => table.load_version(version).await,
        At::Time(time) => table.load_with_datetime(time).await,
    };
    match (loaded, at) {
        (Ok(()), At::Version(version)) if table.version() != Some(version) => Err(no_version(store, version).await),
        (Ok(()), At::Time(time)) => {
            let begun = table.version().and_then(|v| table.snapshot().ok()?.version_timestamp(v));
            match begun.is_some_and(|t| t > time.timestamp_millis()) {
                false => Ok(Some(table)),
                true => Err(Error::data(format!("the Delta table {name} has no version as old as {time}"))
                    .with_help("its first known version is younger; take a later `timestamp`, or a `version`")),
            }
        }
        (Ok(()), _) => Ok(Some(table)),
        (Err(e), At::Version(version)) if is_data(&e) => Err(no_version(store, version).await),
        (Err(e), _) => Err(from_delta(e, &name)),
    }
}

async fn no_version(store: &Store, version: u64) -> Error {
    let mut latest = DeltaTable::new(log_store(store));
    let known = match latest.load().await {
        Ok(()) => latest.version().map_or_else(String::new, |v| format!("; the latest is {v}")),
        Err(_) => String::new(),
    };
    Error::data(format!("the Delta table {} has no version {version}{known}", store.display("")))
        .with_help("old versions end with the table's log retention; leave `version` out to read the latest")
}

/// The error of an object store somewhere below `e`.
fn of_store<'a>(e: &'a (dyn StdError + 'static)) -> Option<&'a object_store::Error> {
    let mut next: Option<&'a (dyn StdError + 'static)> = Some(e);
    while let Some(e) = next {
        if let Some(found) = e.downcast_ref::<object_store::Error>() {
            return Some(found);
        }
        next = e.source();
    }
    None
}

/// Whether the table is at fault, and not the store.
fn is_data(e: &DeltaTableError) -> bool {
    of_store(e).is_none_or(|e| matches!(e, object_store::Error::NotFound { .. }))
}

/// What went wrong with the table called `name`, in the terms of the house.
fn from_delta(e: DeltaTableError, name: &str) -> Error {
    if !is_data(&e) {
        let said = of_store(&e).map(crate::tables::store_errors::text).unwrap_or_default();
        return match e {
            DeltaTableError::ObjectStore { source } => failed(format!("cannot reach the Delta table {name}"), source),
            _ => Error::environment(format!("cannot reach the Delta table {name}: {said}")),
        };
    }
    let said = e.to_string();
    let lower = said.to_ascii_lowercase();
    if ["unsupported", "feature", "reader version", "protocol"].iter().any(|word| lower.contains(word)) {
        return unsupported(name, &said);
    }
    match e {
        DeltaTableError::NotATable(_) => not_a_table(name),
        e => Error::data(format!("the Delta table {name} cannot be used")).because(e),
    }
}

fn not_a_table(name: &str) -> Error {
    Error::data(format!("{name} is not a Delta table: it has no {LOG}"))
        .with_help("check `uri`; for plain Parquet files set `format = \"parquet\"`")
}

/// A table that needs what we do not do.
fn unsupported(name: &str, what: &str) -> Error {
    Error::data(format!("the Delta table {name} needs what tailfuse does not do: {what}")).with_help(
        "make a plain copy of it (`create table ... using delta tblproperties ('delta.minReaderVersion' = 1, 'delta.minWriterVersion' = 2) as select ...`), or export it as Parquet",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        let at = |text: &str| match At::time(text) {
            Some(At::Time(t)) => Some(t.to_rfc3339()),
            _ => None,
        };
        assert_eq!(at("2026-11-22T03:00:00+01:00").as_deref(), Some("2026-11-22T02:00:00+00:00"));
        assert_eq!(at("2026-11-22 03:00:00").as_deref(), Some("2026-11-22T03:00:00+00:00"));
        assert_eq!(at("2026-11-22").as_deref(), Some("2026-11-22T00:00:00+00:00"));
        assert_eq!(at("yesterday"), None);
    }
}
