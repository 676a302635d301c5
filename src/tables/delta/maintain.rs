//! What a table needs besides reading and publishing: back to an earlier version, and old files away.
//!
//! In: the table's store. Out: one commit that restores, or the files that a vacuum removes.

use chrono::TimeDelta;
use serde_json::json;

use deltalake_core::kernel::transaction::CommitProperties;

use super::{At, from_delta, not_a_table, open};
use crate::error::{Error, Result};
use crate::tables::Store;

/// What a restore came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The version that was the latest.
    pub from: u64,
    /// The version whose files are the table's again.
    pub to: u64,
    /// The version that says so.
    pub version: u64,
    /// Files that are back.
    pub files_restored: usize,
    /// Files that are gone.
    pub files_removed: usize,
}

/// Makes the files of the state `at` the table's again, in one commit; what came after it stays in the history.
/// Errors (exit 65): no table, no such state, or files of it that a vacuum has removed; (exit 75) another commit came between.
pub async fn restore(store: &Store, at: At) -> Result<Restored> {
    let name = store.display("");
    let missing = || not_a_table(&name);
    let state_of = |table: &deltalake_core::DeltaTable| table.version().ok_or_else(missing);
    let to = state_of(&open(store, at).await?.ok_or_else(missing)?)?;
    let latest = open(store, At::Latest).await?.ok_or_else(missing)?;
    let from = state_of(&latest)?;
    if to == from {
        return Err(Error::usage(format!("version {to} of {name} is the latest already")));
    }
    let properties =
        CommitProperties::default().with_metadata([("tailfuse".to_owned(), json!(env!("CARGO_PKG_VERSION")))]);
    let restored = latest.restore().with_version_to_restore(to).with_commit_properties(properties).await;
    let (table, metrics) = restored.map_err(|e| match e.to_string().contains("missing file") {
        true => Error::data(format!("{name} cannot go back to version {to}")).because(e),
        false => from_delta(e, &name),
    })?;
    Ok(Restored {
        from,
        to,
        version: state_of(&table)?,
        files_restored: metrics.num_restored_file,
        files_removed: metrics.num_removed_file,
    })
}

/// Removes the data files that no version of the last `days` days needs, those of killed runs among them; with `dry`, only
/// says which. Restores and reads of older versions end with it. Returns the files' names.
pub async fn vacuum(store: &Store, days: u32, dry: bool) -> Result<Vec<String>> {
    let name = store.display("");
    let table = open(store, At::Latest).await?.ok_or_else(|| not_a_table(&name))?;
    let (_, metrics) = table
        .vacuum()
        .with_retention_period(TimeDelta::days(i64::from(days)))
        .with_enforce_retention_duration(false)
        .with_mode(deltalake_core::operations::vacuum::VacuumMode::Full)
        .with_dry_run(dry)
        .await
        .map_err(|e| from_delta(e, &name))?;
    let mut files = metrics.files_deleted;
    files.sort();
    Ok(files)
}
