//! The reader of sources: whatever lies at a URI becomes ONE table with our names and types.
//!
//! In: a file, a folder of files or Hive partitions (Parquet or CSV) on an object store, and
//! the source's config. Out: a Parquet table in which
//! - mapped columns have our names, the rest pass through under their own;
//! - `row_id` counts files in path order, then rows in the file, before any row is left out: the
//!   tie rule, stable as long as the files that the filter leaves are the same;
//! - ids are int64 or utf8, ratings float32, timestamps int64;
//!
//! and a table `bad_rows` with the rows that cannot be used. Rows stream through: memory is
//! bounded by a batch, a row group, and what [`SqlMemory`] allows for finding repeated rows.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray, new_null_array};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{DataType, Int64Type, SchemaRef};
use datafusion::physical_expr::PhysicalExpr;
use futures::TryStreamExt;
use serde_json::{Map, Value, json};

use crate::columns::ROW_ID;
use crate::error::Result;
use crate::tables::cleaning::{Problem, Rule, clean, safe_cast};
use crate::tables::parquet::TableWriter;
use crate::tables::repeats::{self, Key, Repeats};
use crate::tables::source_config::{SourceConfig, SourceRole};
use crate::tables::source_files::{Content, SourceFile, Unified, predicate};
use crate::tables::source_plan::{Plan, is_simple};
use crate::tables::source_tally::{Place, Tally};
use crate::tables::sql_errors::from_datafusion;
use crate::tables::sql_memory::SqlMemory;
use crate::tables::{Store, StoredTable};

pub use crate::tables::source_listing::{SourceObject, source_objects};

/// Columns of `bad_rows` that come before the row's own.
pub(super) const FILE: &str = "file";
pub(super) const ROW_IN_FILE: &str = "row_in_file";

/// Where a source's tables go.
pub struct SourceTarget<'a> {
    /// The store that both are written to.
    pub store: &'a Store,
    /// Name of the table's object.
    pub table_file: &'a str,
    /// Name of the object with the bad rows.
    pub bad_rows_file: &'a str,
    /// Memory for finding repeated rows.
    pub memory: SqlMemory,
    /// Hears of rows as they are read; an error stops the reading (a stop request, say).
    pub tick: &'a (dyn Fn(u64) -> Result<()> + Sync),
}

/// What came of reading a source.
#[derive(Clone, Debug)]
pub struct SourceReport {
    /// The normalised table.
    pub table: StoredTable,
    /// The rows that were set aside: `row_id`, `file`, `row_in_file` (0-based), `reason`, and
    /// their own columns as text.
    pub bad_rows: StoredTable,
    /// What was counted: `files`, `rows_read`, `rows_filtered`, `bad_rows` and each reason of
    /// them, `exact_duplicates`, `re_ratings` or `duplicate_items`, `items_without_title`, `rows`.
    pub counters: Map<String, Value>,
}

/// Reads the source `name` from `store`, which is opened at its URI.
///
/// Errors (exit 65): nothing at the URI; a damaged file; a mapped column that is missing or of a
/// wrong type; a mapping onto a name that is taken; more bad rows than `max_bad_rows`; no row
/// left. Each names the file, the column and the way out.
pub async fn read_source(
    name: &str,
    config: &SourceConfig,
    store: &Store,
    target: &SourceTarget<'_>,
) -> Result<SourceReport> {
    let objects = source_objects(name, config, store).await?;
    let files = SourceFile::open_all(config, store, objects).await?;
    let columns = Unified::of(name, config, &files)?.with_guessed_types(config, store, &files).await?;
    let plan = Plan::new(name, config, &files, &columns)?;
    let filter = config.filter.as_deref().map(|f| predicate(name, f, &columns.schema)).transpose()?;

    let mut good = TableWriter::begin(target.store, target.table_file, &plan.schema)?;
    let mut bad = TableWriter::begin(target.store, target.bad_rows_file, &plan.bad_schema)?;
    let mut tally = Tally::default();
    let read = Reading { config, store, columns: &columns, plan: &plan, filter: filter.as_ref(), tick: target.tick };
    let done = match read.all(&files, &mut good, &mut bad, &mut tally).await {
        Ok(()) => tally.judge(name, config, store, &files),
        Err(e) => Err(e),
    };
    if let Err(e) = done {
        good.abort().await;
        bad.abort().await;
        return Err(e);
    }
    bad.finish().await?;
    good.finish().await?;

    let mut table = StoredTable::open(target.store, target.table_file).await?;
    let mut counters = tally.counters(files.len());
    if let Some(table) = files.first().and_then(|f| f.object.table.as_ref()) {
        counters.insert("delta_version".into(), json!(table.version));
    }
    if !columns.filled.is_empty() {
        counters.insert("columns_filled_with_null".into(), json!(columns.filled));
    }
    if let Some(key) = plan.key {
        let found = repeats::find(&table, key, &target.memory).await?;
        count_repeats(&mut counters, key, &found);
        if !found.rows.is_empty() {
            table = without(&table, &found.rows, target).await?;
        }
    }
    if plan.role == SourceRole::Items {
        let untitled = tally.untitled;
        counters.insert("items_without_title".into(), json!(untitled));
    }
    counters.insert("rows".into(), json!(table.num_rows()));
    let bad_rows = StoredTable::open(target.store, target.bad_rows_file).await?;
    Ok(SourceReport { table, bad_rows, counters })
}

fn count_repeats(counters: &mut Map<String, Value>, key: Key, found: &Repeats) {
    let all = found.rows.len() as u64;
    match key {
        Key::UserAndItem => {
            counters.insert("exact_duplicates".into(), json!(found.exact));
            counters.insert("re_ratings".into(), json!(all - found.exact));
        }
        Key::Item => {
            counters.insert("duplicate_items".into(), json!(all));
        }
    }
}

/// Writes the table again without the given row ids (ascending, as the rows of the table are).
/// The new object takes the old one's place when it is complete.
async fn without(table: &StoredTable, rows: &[i64], target: &SourceTarget<'_>) -> Result<StoredTable> {
    let mut writer = TableWriter::begin(target.store, target.table_file, &table.schema())?;
    let mut stream = table.batches(None)?;
    let mut next = 0;
    let at = table.schema().index_of(ROW_ID)?;
    while let Some(batch) = stream.try_next().await? {
        let ids = batch.column(at).as_primitive::<Int64Type>();
        let keep: BooleanArray = ids
            .values()
            .iter()
            .map(|id| {
                let leave_out = rows.get(next) == Some(id);
                next += usize::from(leave_out);
                Some(!leave_out)
            })
            .collect();
        writer.push(&filter_record_batch(&batch, &keep)?).await?;
    }
    writer.finish().await?;
    StoredTable::open(target.store, target.table_file).await
}

/// The loop over files and batches.
struct Reading<'a> {
    config: &'a SourceConfig,
    store: &'a Store,
    columns: &'a Unified,
    plan: &'a Plan,
    filter: Option<&'a Arc<dyn PhysicalExpr>>,
    tick: &'a (dyn Fn(u64) -> Result<()> + Sync),
}

impl Reading<'_> {
    async fn all(
        &self,
        files: &[SourceFile],
        good: &mut TableWriter,
        bad: &mut TableWriter,
        tally: &mut Tally,
    ) -> Result<()> {
        let mut first_row = 0;
        let mut text_is_number = None;
        for (index, file) in files.iter().enumerate() {
            let mut rows_in_file = 0;
            for (start, mut rows) in file.spans(self.config, self.store, self.columns, self.filter).await? {
                let mut row = start;
                while let Some(batch) = rows.try_next().await? {
                    (self.tick)(batch.num_rows() as u64)?;
                    crate::fault::point("source-row");
                    let place = Place { file, index, row, row_id: first_row + row };
                    let (kept, set_aside) = self.batch(&batch, &place, &mut text_is_number, tally)?;
                    good.push(&kept).await?;
                    if let Some(set_aside) = set_aside {
                        bad.push(&set_aside).await?;
                    }
                    row += batch.num_rows() as u64;
                }
                rows_in_file = row;
            }
            let rows_in_file = file.known_rows().unwrap_or(rows_in_file);
            tally.rows_read += rows_in_file;
            first_row += rows_in_file;
        }
        // Rows that went to neither table: the filter's, whether they were read or skipped.
        tally.filtered = tally.rows_read - good.rows() - tally.bad;
        Ok(())
    }

    /// One batch -> its good rows, and its bad ones if there are any.
    fn batch(
        &self,
        batch: &RecordBatch,
        place: &Place<'_>,
        text_is_number: &mut Option<bool>,
        tally: &mut Tally,
    ) -> Result<(RecordBatch, Option<RecordBatch>)> {
        let rows = batch.num_rows();
        // The first problem of each row, as (column, problem).
        let mut problems: Vec<Option<(usize, Problem)>> = vec![None; rows];
        let original = batch;
        let batch = self.columns.adapt(place.file, original, &mut |column, row| {
            problems[row].get_or_insert((column, Problem::NoParse));
        })?;
        let wanted = self.wanted(&batch)?;
        let row_ids: ArrayRef =
            Arc::new(Int64Array::from_iter_values((0..rows).map(|r| (place.row_id + r as u64) as i64)));
        let mut cleaned = vec![row_ids.clone()];
        for output in &self.plan.outputs {
            let column = batch.column(output.from);
            let mut note = |row: usize, problem| {
                problems[row].get_or_insert((output.from, problem));
            };
            cleaned.push(clean(output.rule, column, text_is_number, &mut note)?);
        }
        let good: BooleanArray = (0..rows).map(|r| Some(wanted.value(r) && problems[r].is_none())).collect();
        let bad: BooleanArray = (0..rows).map(|r| Some(wanted.value(r) && problems[r].is_some())).collect();
        let good = self.good_rows(cleaned, &good)?;
        if let Some(at) = self.plan.outputs.iter().position(|o| o.rule == Rule::Title) {
            let titles = good.column(at + 1).as_string::<i32>();
            let blank = |t: Option<&str>| t.is_none_or(|t| t.trim().is_empty());
            tally.untitled += titles.iter().filter(|t| blank(*t)).count() as u64;
        }
        let set_aside = match bad.true_count() {
            0 => None,
            _ => {
                tally.note(&problems, &bad, place, &self.columns.schema);
                Some(self.bad_rows((original, &batch), row_ids, &problems, &bad, place)?)
            }
        };
        Ok((good, set_aside))
    }

    /// Whether the filter is true for each row (null is not).
    fn wanted(&self, batch: &RecordBatch) -> Result<BooleanArray> {
        let Some(filter) = self.filter else { return Ok(BooleanArray::from(vec![true; batch.num_rows()])) };
        let value = filter.evaluate(batch).and_then(|v| v.into_array(batch.num_rows())).map_err(from_datafusion)?;
        Ok(value.as_boolean().iter().map(|v| Some(v == Some(true))).collect())
    }

    /// Nulls of bad rows are gone once these are left out, so the strict schema holds after it.
    fn good_rows(&self, columns: Vec<ArrayRef>, good: &BooleanArray) -> Result<RecordBatch> {
        let kept = columns.iter().map(|c| arrow::compute::filter(c, good)).collect::<Result<Vec<_>, _>>()?;
        Ok(RecordBatch::try_new(self.plan.schema.clone(), kept)?)
    }

    /// The rows of `bad` with their reasons. Text of CSV is shown as it stands in the file.
    fn bad_rows(
        &self,
        (original, adapted): (&RecordBatch, &RecordBatch),
        row_ids: ArrayRef,
        problems: &[Option<(usize, Problem)>],
        bad: &BooleanArray,
        place: &Place<'_>,
    ) -> Result<RecordBatch> {
        let rows = adapted.num_rows();
        let name_of = |column: usize| self.columns.schema.field(column).name();
        let reasons = problems.iter().map(|p| p.map(|(c, p)| p.reason(name_of(c))).unwrap_or_default());
        let in_file = Int64Array::from_iter_values((0..rows).map(|r| (place.row + r as u64) as i64));
        let mut columns: Vec<ArrayRef> = vec![
            row_ids,
            Arc::new(StringArray::from_iter_values(std::iter::repeat_n(place.file.name.as_str(), rows))),
            Arc::new(in_file),
            Arc::new(StringArray::from_iter_values(reasons)),
        ];
        for (column, field) in adapted.columns().iter().zip(self.columns.schema.fields()) {
            let own = place.file.columns.iter().position(|(c, _)| c == field.name());
            columns.push(match (own, &place.file.content) {
                _ if !is_simple(field.data_type()) => continue,
                (Some(own), Content::Csv) => original.column(own).clone(),
                _ if column.null_count() == rows => new_null_array(&DataType::Utf8, rows),
                _ => safe_cast(column, &DataType::Utf8)?,
            });
        }
        let all = RecordBatch::try_new(self.plan.bad_schema.clone(), columns)?;
        Ok(filter_record_batch(&all, bad)?)
    }
}

/// The schema that the table of a source has, from file headers and footers (and the first rows of
/// CSV files) alone. Errors as in [`read_source`], as far as they show there.
pub async fn source_schema(name: &str, config: &SourceConfig, store: &Store) -> Result<SchemaRef> {
    let objects = source_objects(name, config, store).await?;
    let files = SourceFile::open_all(config, store, objects).await?;
    let columns = Unified::of(name, config, &files)?.with_guessed_types(config, store, &files).await?;
    Ok(Plan::new(name, config, &files, &columns)?.schema)
}
