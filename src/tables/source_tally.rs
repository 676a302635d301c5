//! What is counted while a source is read, and the judgement of it.
//!
//! In: batches with the problems of their rows. Out: counters, and an error where too many rows are bad.

use std::collections::BTreeMap;

use arrow::array::BooleanArray;
use arrow::datatypes::SchemaRef;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::tables::Store;
use crate::tables::cleaning::Problem;
use crate::tables::source_config::SourceConfig;
use crate::tables::source_files::SourceFile;

/// Where a batch begins.
pub(super) struct Place<'a> {
    pub(super) file: &'a SourceFile,
    /// Place of the file among the files.
    pub(super) index: usize,
    /// Row in the file, 0-based.
    pub(super) row: u64,
    pub(super) row_id: u64,
}

/// What was counted while reading.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) rows_read: u64,
    pub(super) filtered: u64,
    pub(super) bad: u64,
    pub(super) untitled: u64,
    /// Reason -> number of rows, and the first (file, row in file).
    reasons: BTreeMap<String, (u64, usize, u64)>,
}

impl Tally {
    pub(super) fn judge(&self, name: &str, config: &SourceConfig, store: &Store, files: &[SourceFile]) -> Result<()> {
        let kept = self.rows_read - self.filtered;
        let place = store.display("");
        if self.rows_read == 0 {
            return Err(Error::data(format!("source `{name}`: {place} has no rows"))
                .with_help("check `uri`, and that the job before wrote its output"));
        }
        if kept == 0 {
            let filter = config.filter.as_deref().unwrap_or_default();
            return Err(Error::data(format!(
                "source `{name}`: the filter `{filter}` leaves none of the {} rows of {place}",
                self.rows_read
            )));
        }
        let share = self.bad as f64 / kept as f64;
        let listed: Vec<String> = self
            .reasons
            .iter()
            .map(|(reason, (n, file, row))| {
                let file = files.get(*file).map(|f| f.name.as_str()).unwrap_or_default();
                format!("{reason}: {n} (first in {file}, row {row}, 0-based)")
            })
            .collect();
        if share > config.max_bad_rows {
            return Err(Error::data(format!(
                "source `{name}`: {} of {kept} rows ({:.2}%) cannot be used, more than max_bad_rows = {} allows: {}",
                self.bad,
                100.0 * share,
                config.max_bad_rows,
                listed.join("; ")
            ))
            .with_help("mend the data, exclude the rows with `filter`, map other columns, or raise `max_bad_rows`"));
        }
        match self.bad == kept {
            true => {
                Err(Error::data(format!("source `{name}`: none of the {kept} rows can be used: {}", listed.join("; "))))
            }
            false => Ok(()),
        }
    }

    /// Counts the rows of `bad` by their reasons.
    pub(super) fn note(
        &mut self,
        problems: &[Option<(usize, Problem)>],
        bad: &BooleanArray,
        place: &Place<'_>,
        columns: &SchemaRef,
    ) {
        for (row, problem) in problems.iter().enumerate().filter(|(row, _)| bad.value(*row)) {
            if let Some((column, problem)) = problem {
                let first = (0, place.index, place.row + row as u64);
                self.reasons.entry(problem.reason(columns.field(*column).name())).or_insert(first).0 += 1;
                self.bad += 1;
            }
        }
    }

    pub(super) fn counters(&self, files: usize) -> Map<String, Value> {
        let mut counters = Map::new();
        counters.insert("files".into(), json!(files));
        counters.insert("rows_read".into(), json!(self.rows_read));
        counters.insert("rows_filtered".into(), json!(self.filtered));
        counters.insert("bad_rows".into(), json!(self.bad));
        if !self.reasons.is_empty() {
            let reasons: Map<String, Value> = self.reasons.iter().map(|(r, (n, ..))| (r.clone(), json!(n))).collect();
            counters.insert("bad_rows_by_reason".into(), Value::Object(reasons));
        }
        counters
    }
}
