//! The files of a source, opened, and the one schema that they have together.
//!
//! In: [`SourceObject`]s and the source's config. Out: opened [`SourceFile`]s, and [`Unified`] columns. Files may have their
//! columns in any order, and later ones columns that earlier ones lack.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray, new_null_array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use datafusion::common::DFSchema;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::prelude::{SessionConfig, SessionContext};
use futures::{StreamExt, TryStreamExt};

use crate::error::{Error, Result};
use crate::tables::cleaning::safe_cast;
use crate::tables::csv::{self, Guess, Layout};
use crate::tables::parquet::{BatchStream, plain_type, stream_row_groups};
use crate::tables::partitions::row_groups_that_may_match;
use crate::tables::source_config::{SourceConfig, SourceFormat};
use crate::tables::source_listing::{SourceObject, format_of_name};
use crate::tables::{Store, StoredTable};

/// Files that are opened at a time.
const OPEN_AT_ONCE: usize = 16;

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
    pub(super) async fn open(config: &SourceConfig, store: &Store, object: SourceObject) -> Result<Self> {
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
    use crate::tables::source_listing::is_data_file;

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
