//! The files of a source: which there are, which the filter leaves, and the one schema that
//! they have together.
//!
//! In: the store opened at the source's URI and the source's config. Out: [`SourceObject`]s in
//! path order, opened [`SourceFile`]s, and [`Unified`] columns. Files may have their columns in
//! any order, and later ones columns that earlier ones lack.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray, new_null_array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use datafusion::common::DFSchema;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::prelude::{SessionConfig, SessionContext};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;

use crate::error::{Error, Fault, Result};
use crate::tables::cleaning::safe_cast;
use crate::tables::csv::{self, Guess, Layout};
use crate::tables::delta::read::{ActiveFile, Declared, Snapshot};
use crate::tables::delta::{self, At};
use crate::tables::parquet::{BatchStream, plain_type, stream_row_groups};
use crate::tables::partitions::{PartitionValues, may_match, row_groups_that_may_match};
use crate::tables::source_config::{OnMissing, SourceConfig, SourceFormat};
use crate::tables::{Store, StoredTable};

/// Files that are opened at a time.
const OPEN_AT_ONCE: usize = 16;

/// A data file of a source.
#[derive(Clone, Debug)]
pub struct SourceObject {
    /// Path, size, time and tag.
    pub meta: ObjectMeta,
    /// Its name below the source's URI; empty where the URI is the file itself.
    pub file: String,
    /// The values of its Hive folders, or of its partition in a Delta table.
    pub folders: PartitionValues,
    /// What the Delta table declares that it is a file of.
    pub table: Option<Arc<Declared>>,
}

impl SourceObject {
    /// What changes when the object does: name, size, and the store's tag or time.
    pub fn version(&self) -> String {
        let stamp = match &self.meta.e_tag {
            Some(tag) => tag.clone(),
            None => self.meta.last_modified.timestamp_micros().to_string(),
        };
        let columns = self.table.as_ref().map_or_else(String::new, |t| format!("-{}", t.digest));
        format!("{} {} {stamp}{columns}", self.file, self.meta.size)
    }
}

/// The data files of a source in path order, without those that the filter excludes by their
/// folders. `store` is opened at the source's URI, a file or a folder. Errors: nothing is there,
/// or nothing that the filter leaves (exit 65); the store does not answer (exit 75).
pub async fn source_objects(name: &str, config: &SourceConfig, store: &Store) -> Result<Vec<SourceObject>> {
    let found = present_objects(name, config, store).await.and_then(|objects| {
        check_needs(name, config, store, &objects)?;
        Ok(objects)
    });
    // What is not there is bad input, or nothing to do, as the config says.
    found.map_err(|absent| match absent {
        Absent::Nothing(e) if config.on_missing == OnMissing::Skip => Error { fault: Fault::NothingToDo, ..e },
        Absent::Nothing(e) | Absent::Failed(e) => e,
    })
}

/// Why there are no files to read.
enum Absent {
    /// They are not there.
    Nothing(Error),
    /// It could not be found out.
    Failed(Error),
}

impl From<Error> for Absent {
    fn from(e: Error) -> Self {
        Absent::Failed(e)
    }
}

/// The partition that the run is about must be among the files.
fn check_needs(name: &str, config: &SourceConfig, store: &Store, objects: &[SourceObject]) -> Result<(), Absent> {
    let has = |o: &SourceObject| config.needs.iter().all(|(c, v)| o.folders.get(c) == Some(v.as_str()));
    if config.needs.is_empty() || objects.iter().any(has) {
        return Ok(());
    }
    let needed: Vec<String> = config.needs.iter().map(|(c, v)| format!("{c}={v}")).collect();
    let last = objects.last().map(|o| store.display(&o.file)).unwrap_or_default();
    Err(Absent::Nothing(
        Error::data(format!(
            "source `{name}` has no file of the partition {} (the last one is {last})",
            needed.join("/")
        ))
        .with_help("wait for the job that writes it, or set on_missing = \"skip\""),
    ))
}

async fn present_objects(name: &str, config: &SourceConfig, store: &Store) -> Result<Vec<SourceObject>, Absent> {
    let objects = list(name, config, store).await?;
    let Some(filter) = config.filter.as_deref().filter(|_| objects.iter().any(|o| !o.folders.is_empty())) else {
        return Ok(objects);
    };
    // The filter needs column types; those of the first file stand for all. Where it names a
    // column that only other files have, nothing is pruned here and the reader has the last word.
    let first = SourceFile::open(config, store, objects[0].clone()).await?;
    let columns = Unified::of(name, config, std::slice::from_ref(&first))?;
    let Ok(predicate) = predicate(name, filter, &columns.schema) else { return Ok(objects) };
    let folders: Vec<&PartitionValues> = objects.iter().map(|o| &o.folders).collect();
    let keep = may_match(&predicate, &columns.schema, &folders);
    let left: Vec<SourceObject> = objects.iter().zip(keep).filter(|(_, k)| *k).map(|(o, _)| o.clone()).collect();
    if left.is_empty() {
        let last = objects.last().map(|o| store.display(&o.file)).unwrap_or_default();
        return Err(Absent::Nothing(
            Error::data(format!(
                "source `{name}` has no rows: its filter `{filter}` excludes all {} files (the last one is {last})",
                objects.len()
            ))
            .with_help("check the parameters of the run against the partitions that are there"),
        ));
    }
    Ok(left)
}

async fn list(name: &str, config: &SourceConfig, store: &Store) -> Result<Vec<SourceObject>, Absent> {
    let file = match config.format {
        Some(SourceFormat::Delta) => None,
        // Not every server of objects can say of a folder's name that there is no such object.
        _ if store.is_prefix().await? => None,
        _ => store.head("").await?,
    };
    if let Some(at) = delta_state(name, config, store, file.is_none()).await? {
        return list_delta(name, store, at).await;
    }
    if let Some(meta) = file {
        return Ok(vec![SourceObject { meta, file: String::new(), folders: PartitionValues::default(), table: None }]);
    }
    let root = store.path("");
    let found = store.list("").await?;
    let any = !found.is_empty();
    let mut objects = Vec::new();
    for meta in found {
        let file = match meta.location.prefix_match(&root) {
            Some(parts) => parts.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>().join("/"),
            None => continue,
        };
        if is_data_file(&file) && meta.size > 0 {
            let folders = PartitionValues::of(&root, &meta.location);
            objects.push(SourceObject { meta, file, folders, table: None });
        }
    }
    // A folder without `format` is read as what its first file is; the rest must agree.
    let format = match (config.format, objects.first()) {
        (Some(format), _) => Some(format),
        (None, Some(first)) => format_of_name(&first.file),
        (None, None) => None,
    };
    objects.retain(|o| format.is_none() || format_of_name(&o.file).is_none_or(|f| Some(f) == format));
    match (objects.is_empty(), any) {
        (false, _) => Ok(objects),
        (true, true) => Err(Absent::Nothing(Error::data(format!("source `{name}`: there is no data file below {}", store.display("")))
            .with_help("data files end in .parquet or .csv, .tsv, .txt; names that begin with `_` or `.` are left out; set `format` for others"))),
        (true, false) => Err(Absent::Nothing(Error::data(format!("source `{name}`: there is nothing at {}", store.display("")))
            .with_help("check `uri`: a path without a scheme starts from the pipeline's `root`"))),
    }
}

/// Which state of a Delta table the source means; `None` where it is none.
async fn delta_state(name: &str, config: &SourceConfig, store: &Store, folder: bool) -> Result<Option<At>> {
    let at = match (config.version, &config.timestamp) {
        (None, None) => None,
        (Some(version), None) => Some(At::Version(version)),
        (None, Some(text)) => Some(At::time(text).ok_or_else(|| {
            Error::spec(format!("source `{name}`: `timestamp` is `{text}`, which is not a time"))
                .with_help("write 2026-11-22T03:00:00Z, \"2026-11-22 03:00:00\" or 2026-11-22 (UTC)")
        })?),
        (Some(_), Some(_)) => {
            return Err(Error::spec(format!("source `{name}` has both `version` and `timestamp`"))
                .with_help("keep the one that is meant"));
        }
    };
    let wanted = config.format == Some(SourceFormat::Delta);
    let found = || async { Ok::<_, Error>(folder && config.format.is_none() && delta::is_table(store).await?) };
    match (wanted || found().await?, at) {
        (true, at) => Ok(Some(at.unwrap_or_default())),
        (false, None) => Ok(None),
        (false, Some(_)) => Err(Error::data(format!(
            "source `{name}` has a `version` or `timestamp`, but {} is not a Delta table",
            store.display("")
        ))
        .with_help("check `uri` and `format`, or leave them out: files have no versions")),
    }
}

async fn list_delta(name: &str, store: &Store, at: At) -> Result<Vec<SourceObject>, Absent> {
    let Snapshot { declared, files } = Snapshot::open(store, at).await.map_err(|e| e.at(format!("source `{name}`")))?;
    if files.is_empty() {
        let error = Error::data(format!(
            "source `{name}`: the Delta table {} has no rows in version {}",
            store.display(""),
            declared.version
        ));
        return Err(Absent::Nothing(error.with_help("check `uri`, `version` and `timestamp`")));
    }
    let object =
        |f: ActiveFile| SourceObject { meta: f.meta, file: f.file, folders: f.values, table: Some(declared.clone()) };
    Ok(files.into_iter().map(object).collect())
}

/// Spark, Hive and editors leave files beside the data, whose names begin with `_` or `.`.
fn is_data_file(file: &str) -> bool {
    let hidden = |part: &str| (part.starts_with('_') && !part.contains('=')) || part.starts_with('.');
    !file.split('/').any(hidden) && !file.ends_with(".crc")
}

fn format_of_name(file: &str) -> Option<SourceFormat> {
    let name = file.rsplit('/').next().unwrap_or(file).to_ascii_lowercase();
    match name.rsplit_once('.')?.1 {
        "parquet" | "parq" | "pq" => Some(SourceFormat::Parquet),
        "csv" | "tsv" | "txt" => Some(SourceFormat::Csv),
        _ => None,
    }
}

/// One opened file.
#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    pub(super) object: SourceObject,
    pub(super) content: Content,
    /// How a person names it.
    pub(super) name: String,
    /// Its own columns, in plain types; those of CSV are text until the types are known.
    pub(super) columns: Vec<(String, DataType)>,
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    Parquet(Box<StoredTable>),
    Csv,
}

impl SourceFile {
    async fn open(config: &SourceConfig, store: &Store, object: SourceObject) -> Result<Self> {
        let name = store.display(&object.file);
        let format = match (config.format, format_of_name(&name)) {
            _ if object.table.is_some() => SourceFormat::Parquet,
            (Some(format), _) | (None, Some(format)) => format,
            (None, None) if object.file.is_empty() => {
                return Err(Error::spec(format!("the format of {name} does not follow from its name"))
                    .with_help("set `format = \"parquet\"` or `format = \"csv\"` in the source"));
            }
            // `part-00000` in a folder is what Spark calls a Parquet file without an ending.
            (None, None) => SourceFormat::Parquet,
        };
        let (content, columns) = match format {
            SourceFormat::Parquet | SourceFormat::Delta => {
                let table = StoredTable::open_object(store, &object.file, object.meta.clone()).await?;
                let columns =
                    table.schema().fields().iter().map(|f| (f.name().clone(), plain_type(f.data_type()))).collect();
                (Content::Parquet(Box::new(table)), columns)
            }
            SourceFormat::Csv => {
                let names = csv::column_names(store, &object.meta, &name, layout(config)?).await?;
                (Content::Csv, names.into_iter().map(|n| (n, DataType::Utf8)).collect())
            }
        };
        Ok(SourceFile { object, content, name, columns })
    }

    /// Opens all, in order.
    pub(super) async fn open_all(
        config: &SourceConfig,
        store: &Store,
        objects: Vec<SourceObject>,
    ) -> Result<Vec<Self>> {
        futures::stream::iter(objects)
            .map(|object| SourceFile::open(config, store, object))
            .buffered(OPEN_AT_ONCE)
            .try_collect()
            .await
    }

    /// The rows of this file that `predicate` may be true for, as (row in file, stream) spans: a
    /// row group that it excludes is not read, but its rows count.
    pub(super) async fn spans(
        &self,
        config: &SourceConfig,
        store: &Store,
        columns: &Unified,
        predicate: Option<&Arc<dyn PhysicalExpr>>,
    ) -> Result<Vec<(u64, BatchStream)>> {
        match &self.content {
            Content::Csv => {
                let names: Vec<String> = self.columns.iter().map(|(n, _)| n.clone()).collect();
                let rows = csv::batches(store, &self.object.meta, &self.name, layout(config)?, &names).await?;
                Ok(vec![(0, rows)])
            }
            Content::Parquet(table) => {
                let footer = table.footer();
                let keep = match predicate {
                    Some(predicate) => row_groups_that_may_match(
                        predicate,
                        &columns.schema,
                        &table.schema(),
                        footer,
                        &self.object.folders,
                    ),
                    None => vec![true; footer.num_row_groups()],
                };
                let mut spans: Vec<(u64, Vec<usize>)> = Vec::new();
                let (mut row, mut adjacent) = (0, false);
                for (group, keep) in keep.into_iter().enumerate() {
                    match (keep, adjacent, spans.last_mut()) {
                        (true, true, Some((_, groups))) => groups.push(group),
                        (true, ..) => spans.push((row, vec![group])),
                        _ => {}
                    }
                    adjacent = keep;
                    row += footer.row_group(group).num_rows().unsigned_abs();
                }
                spans.into_iter().map(|(row, groups)| Ok((row, stream_row_groups(table, groups)?))).collect()
            }
        }
    }

    /// Rows that the footer promises; unknown for CSV.
    pub(super) fn known_rows(&self) -> Option<u64> {
        match &self.content {
            Content::Parquet(table) => Some(table.num_rows()),
            Content::Csv => None,
        }
    }
}

fn layout(config: &SourceConfig) -> Result<Layout> {
    match config.delimiter.as_bytes() {
        [delimiter] => Ok(Layout { delimiter: *delimiter, header: config.header }),
        _ => Err(Error::spec(format!("`delimiter` is `{}`, which is not one ASCII character", config.delimiter))),
    }
}

/// The columns of all files together: the files' own, then those of the Hive folders.
#[derive(Clone, Debug)]
pub(super) struct Unified {
    pub(super) schema: SchemaRef,
    /// Columns that some file lacks; they are null there.
    pub(super) filled: Vec<String>,
}

impl Unified {
    /// The union of the columns. Error (exit 65): a column whose types do not go together, with
    /// both files.
    pub(super) fn of(name: &str, config: &SourceConfig, files: &[SourceFile]) -> Result<Self> {
        // A Delta table says what its columns are: files may lack some, or hold them in an older type.
        let declared = files.first().and_then(|f| f.object.table.as_deref());
        let is_declared = |column: &str| declared.is_some_and(|d| d.schema.index_of(column).is_ok());
        let mut columns: Vec<(String, DataType, &str)> = Vec::new();
        for field in declared.iter().flat_map(|d| d.schema.fields()) {
            columns.push((field.name().clone(), field.data_type().clone(), "the table"));
        }
        for file in files {
            for (column, own) in file.columns.iter().filter(|(c, _)| !is_declared(c)) {
                let own = match (&file.content, config.types.get(column)) {
                    (Content::Csv, Some(declared)) => csv::data_type(*declared),
                    _ => own.clone(),
                };
                match columns.iter_mut().find(|(c, ..)| c == column) {
                    None => columns.push((column.clone(), own, &file.name)),
                    Some((_, so_far, first)) => {
                        *so_far = together(so_far, &own).ok_or_else(|| {
                            Error::data(format!(
                                "source `{name}`: column `{column}` has type {so_far} in {first} and {own} in {}",
                                file.name
                            ))
                            .with_help("write one of them again in the other's type, or read them as two sources")
                        })?;
                    }
                }
            }
        }
        let lacks = |column: &String| {
            let has = |f: &SourceFile| {
                f.columns.iter().any(|(c, _)| c == column)
                    || (is_declared(column) && f.object.folders.names().any(|n| n == column))
            };
            !files.iter().all(has)
        };
        let filled = columns.iter().map(|(c, ..)| c.clone()).filter(lacks).collect();
        for folder in files.iter().flat_map(|f| f.object.folders.names()) {
            // Some writers repeat the folder's value in the file: then the file has the word.
            if !columns.iter().any(|(c, ..)| c == folder) {
                columns.push((folder.to_owned(), DataType::Utf8, ""));
            }
        }
        let fields: Vec<Field> = columns.into_iter().map(|(c, t, _)| Field::new(c, t, true)).collect();
        Ok(Unified { schema: Arc::new(Schema::new(fields)), filled })
    }

    /// Gives the CSV columns that no type was declared for the narrowest that all values fit, by
    /// reading the files once.
    pub(super) async fn with_guessed_types(
        mut self,
        config: &SourceConfig,
        store: &Store,
        files: &[SourceFile],
    ) -> Result<Self> {
        let mut guesses: Vec<Option<Guess>> = vec![None; self.schema.fields().len()];
        for file in files.iter().filter(|f| matches!(f.content, Content::Csv)) {
            let open = |(i, (c, _)): (usize, &(String, DataType))| {
                let at = self.schema.index_of(c).ok().filter(|_| !config.types.contains_key(c))?;
                Some((i, at))
            };
            let open: Vec<(usize, usize)> = file.columns.iter().enumerate().filter_map(open).collect();
            if open.is_empty() {
                continue;
            }
            for (_, mut rows) in file.spans(config, store, &self, None).await? {
                while let Some(batch) = rows.try_next().await? {
                    for (own, at) in &open {
                        guesses[*at].get_or_insert_default().look(batch.column(*own));
                    }
                }
            }
        }
        let typed = |(field, guess): (&Arc<Field>, &Option<Guess>)| match guess {
            Some(guess) => Arc::new(field.as_ref().clone().with_data_type(guess.data_type())),
            None => field.clone(),
        };
        let fields: Vec<_> = self.schema.fields().iter().zip(&guesses).map(typed).collect();
        self.schema = Arc::new(Schema::new(fields));
        Ok(self)
    }

    /// A batch of `file` in these columns. Text of CSV that does not parse becomes null and is
    /// reported as (column, row).
    pub(super) fn adapt(
        &self,
        file: &SourceFile,
        batch: &RecordBatch,
        unparsed: &mut dyn FnMut(usize, usize),
    ) -> Result<RecordBatch> {
        let rows = batch.num_rows();
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.schema.fields().len());
        for (at, field) in self.schema.fields().iter().enumerate() {
            let own = file.columns.iter().position(|(c, _)| c == field.name());
            let column = match (own, &file.content) {
                (Some(own), Content::Parquet(_)) => {
                    let column = batch.column(own);
                    let cast = safe_cast(column, field.data_type())?;
                    if let Some(row) = lost(column, &cast) {
                        return Err(Error::data(format!(
                            "column `{}` of {} has a value (row {row} of a batch) that does not fit {}, its type in the other files",
                            field.name(),
                            file.name,
                            field.data_type()
                        )));
                    }
                    cast
                }
                (Some(own), Content::Csv) => {
                    let column = batch.column(own);
                    let typed = csv::typed(column, field.data_type())?;
                    if typed.null_count() != column.null_count() {
                        (0..rows).filter(|&r| typed.is_null(r) && column.is_valid(r)).for_each(|r| unparsed(at, r));
                    }
                    typed
                }
                (None, _) => match file.object.folders.get(field.name()) {
                    Some(value) => {
                        let values = StringArray::from_iter_values(std::iter::repeat_n(value, rows));
                        safe_cast(&(Arc::new(values) as ArrayRef), field.data_type())?
                    }
                    None => new_null_array(field.data_type(), rows),
                },
            };
            columns.push(column);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        Ok(RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?)
    }
}

/// A value that a cast made null. Bytes that are no text may: ids are checked later.
fn lost(before: &ArrayRef, after: &ArrayRef) -> Option<usize> {
    if before.null_count() == after.null_count() {
        return None;
    }
    (0..before.len()).find(|&r| before.is_valid(r) && after.is_null(r))
}

/// The type that holds both, or `None`.
fn together(a: &DataType, b: &DataType) -> Option<DataType> {
    match (a, b) {
        _ if a == b => Some(a.clone()),
        (DataType::Null, t) | (t, DataType::Null) => Some(t.clone()),
        _ if a.is_integer() && b.is_integer() => Some(DataType::Int64),
        _ if (a.is_integer() || a.is_floating()) && (b.is_integer() || b.is_floating()) => Some(DataType::Float64),
        (DataType::Timestamp(_, z), DataType::Timestamp(_, y)) if z == y => {
            Some(DataType::Timestamp(TimeUnit::Microsecond, z.clone()))
        }
        (DataType::Date32, DataType::Date64) | (DataType::Date64, DataType::Date32) => Some(DataType::Date64),
        _ => None,
    }
}

/// The filter as an expression over the source's columns, names as typed first (`userId`),
/// then in SQL's own way (lower case unless quoted).
pub(super) fn predicate(name: &str, filter: &str, schema: &SchemaRef) -> Result<Arc<dyn PhysicalExpr>> {
    let plan = |lower: bool| {
        let mut config = SessionConfig::new();
        config.options_mut().sql_parser.enable_ident_normalization = lower;
        let ctx = SessionContext::new_with_config(config);
        let columns = DFSchema::try_from(schema.as_ref().clone())?;
        let expr = ctx.parse_sql_expr(filter, &columns)?;
        ctx.create_physical_expr(expr, &columns)
    };
    let predicate = plan(false).or_else(|_| plan(true)).map_err(|e| {
        let there: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        Error::spec(format!("source `{name}`: the filter `{filter}` cannot be used: {}", e.strip_backtrace()))
            .with_help(format!("it is an SQL predicate over the source's own columns: {}", there.join(", ")))
    })?;
    match predicate.data_type(schema) {
        Ok(DataType::Boolean) => Ok(predicate),
        Ok(t) => Err(Error::spec(format!("source `{name}`: the filter `{filter}` is of type {t}, not true or false"))),
        Err(e) => Err(Error::spec(format!("source `{name}`: the filter `{filter}` cannot be used")).because(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_beside_the_data_are_left_out() {
        for file in ["_SUCCESS", "a/_temporary/0/x.parquet", ".hidden.parquet", "a/.x/b.csv", "x.parquet.crc"] {
            assert!(!is_data_file(file), "{file}");
        }
        for file in ["x.parquet", "_ds=1/x.parquet", "part-00000", "ds=2026/x_1.csv"] {
            assert!(is_data_file(file), "{file}");
        }
    }

    #[test]
    fn types_that_go_together() {
        use DataType::*;
        assert_eq!(together(&Int32, &Int64), Some(Int64));
        assert_eq!(together(&Int64, &Float32), Some(Float64));
        assert_eq!(together(&Null, &Utf8), Some(Utf8));
        assert_eq!(together(&Utf8, &Int64), None);
    }

    #[test]
    fn filters_take_names_as_typed_or_lower_case() {
        let schema: SchemaRef = Arc::new(Schema::new(vec![
            Field::new("userId", DataType::Int64, true),
            Field::new("ds", DataType::Utf8, true),
        ]));
        assert!(predicate("s", "userId > 3", &schema).is_ok());
        assert!(predicate("s", "DS <= '2026-11-22'", &schema).is_ok());
        assert!(predicate("s", "\"userId\" > 3 and ds like '2026%'", &schema).is_ok());
        let e = predicate("s", "user > 3", &schema).unwrap_err();
        assert!(e.to_string().contains("userId"), "{e}");
        assert!(predicate("s", "userId", &schema).is_err());
    }
}
