//! Parquet on a store: tables that are written once and read in row order or scanned.
//!
//! In: a store and a file name, a [`Table`] or a stream of batches. Out: [`StoredTable`], whose
//! footer has been read and checked, so that every later reader may rely on its offsets.
//! Damaged files are errors that name the file (exit 65), never panics.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::compute::{BatchCoalescer, cast};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::execution::SendableRecordBatchStream;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::arrow::{AsyncArrowWriter, ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::properties::WriterProperties;

use crate::error::{Error, Result};
use crate::tables::object_io::{ObjectReader, ObjectWriter};
use crate::tables::scan::ParquetScan;
use crate::tables::sql_errors::{damaged, from_datafusion, from_parquet};
use crate::tables::{Store, Table};

/// Rows that reach the encoder at a time. Fixed, so that the bytes of a file depend on its rows
/// and not on how they arrived.
const ENCODE_ROWS: usize = 8192;
/// Rows of a row group: the unit of parallel scans and of what the writer holds in memory.
const GROUP_ROWS: usize = 256 * 1024;
/// Rows of a batch when a table is read in order.
const READ_ROWS: usize = 32 * 1024;

/// Record batches in row order, errors in the terms of the house.
pub type BatchStream = BoxStream<'static, Result<RecordBatch>>;

/// A Parquet file on a store; row order is the file's.
#[derive(Clone, Debug)]
pub struct StoredTable {
    store: Store,
    file: String,
    meta: ObjectMeta,
    reader: ArrowReaderMetadata,
    schema: SchemaRef,
    rows: u64,
}

impl StoredTable {
    /// Opens `file` on `store` and checks its footer. Errors: it is absent, truncated or corrupt
    /// (exit 65, the file named), the store does not answer (exit 75).
    pub async fn open(store: &Store, file: &str) -> Result<StoredTable> {
        let meta =
            store.head(file).await?.ok_or_else(|| Error::data(format!("there is no file {}", store.display(file))))?;
        StoredTable::open_object(store, file, meta).await
    }

    /// Opens the object that a listing found; `file` is its name below `store`.
    pub async fn open_object(store: &Store, file: &str, meta: ObjectMeta) -> Result<StoredTable> {
        let name = store.display(file);
        let reader = read_footer(store, &meta, &name).await?;
        let rows = u64::try_from(reader.metadata().file_metadata().num_rows())
            .map_err(|_| damaged(&name, "its number of rows is negative"))?;
        let schema = Arc::new(Schema::new(reader.schema().fields().clone()));
        Ok(StoredTable { store: store.clone(), file: file.to_owned(), meta, reader, schema, rows })
    }

    /// Writes a table in memory. The object appears whole; the same rows give the same bytes.
    pub async fn write(store: &Store, file: &str, table: &Table) -> Result<StoredTable> {
        let batches: Vec<_> = table.batches().iter().cloned().map(Ok).collect();
        write_batches(store, file, table.schema(), futures::stream::iter(batches).boxed()).await?;
        StoredTable::open(store, file).await
    }

    /// Writes what a query gives, as it comes: a row group at most is in memory.
    pub async fn write_stream(store: &Store, file: &str, stream: SendableRecordBatchStream) -> Result<StoredTable> {
        let schema = stream.schema();
        write_batches(store, file, schema, stream.map_err(from_datafusion).boxed()).await?;
        StoredTable::open(store, file).await
    }

    /// All rows in file order.
    pub async fn collect(&self) -> Result<Table> {
        let batches = self.batches(None)?.try_collect().await?;
        Ok(Table::new(self.schema(), batches))
    }

    /// All rows in file order, the named columns only, in the order of `columns`.
    /// Error (exit 65): a column that is not there, with those that are.
    pub async fn collect_columns(&self, columns: &[&str]) -> Result<Table> {
        let indices = self.indices(columns)?;
        let batches = self.batches(Some(columns))?.try_collect().await?;
        Ok(Table::new(Arc::new(self.schema.project(&indices)?), batches))
    }

    /// Rows in file order as a stream; `columns` as in [`StoredTable::collect_columns`].
    pub fn batches(&self, columns: Option<&[&str]>) -> Result<BatchStream> {
        let name = self.display();
        let reader = ObjectReader::new(self.store.object_store(), self.meta.location.clone(), self.meta.size);
        let mut builder =
            ParquetRecordBatchStreamBuilder::new_with_metadata(reader, self.reader.clone()).with_batch_size(READ_ROWS);
        let mut order = None;
        if let Some(columns) = columns {
            let indices = self.indices(columns)?;
            let mut sorted = indices.clone();
            sorted.sort_unstable();
            // The reader gives columns in file order; this brings them into the order asked for.
            order = Some(indices.iter().map(|i| sorted.partition_point(|s| s < i)).collect::<Vec<_>>());
            builder = builder.with_projection(ProjectionMask::roots(self.reader.parquet_schema(), indices));
        }
        let stream = guarded(builder, name)?;
        Ok(stream
            .map(move |batch| match &order {
                Some(order) => Ok(batch?.project(order)?),
                None => batch,
            })
            .boxed())
    }

    /// The schema, without metadata.
    pub fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    /// Number of rows.
    pub fn num_rows(&self) -> u64 {
        self.rows
    }

    /// Size, time and tag of the object.
    pub fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    /// The store that holds it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its name below the store.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The footer.
    pub fn footer(&self) -> &Arc<ParquetMetaData> {
        self.reader.metadata()
    }

    /// How a person names it: an absolute path or a URI.
    pub fn display(&self) -> String {
        self.store.display(&self.file)
    }

    /// The table as DataFusion scans it: in parallel, with filters pushed down to row groups, in
    /// no order. The provider brings its object store along when it is scanned.
    pub fn provider(&self) -> Result<Arc<dyn TableProvider>> {
        Ok(Arc::new(ParquetScan::single(self)?))
    }

    fn indices(&self, columns: &[&str]) -> Result<Vec<usize>> {
        let index = |name: &&str| {
            self.schema.index_of(name).map_err(|_| {
                let there: Vec<&str> = self.schema.fields().iter().map(|f| f.name().as_str()).collect();
                Error::data(format!("column `{name}` is missing in {}", self.display()))
                    .with_help(format!("the table has: {}", there.join(", ")))
            })
        };
        columns.iter().map(index).collect()
    }
}

/// A stream over chosen row groups of a file whose footer is known (for the source reader).
pub(super) fn stream_row_groups(table: &StoredTable, groups: Vec<usize>) -> Result<BatchStream> {
    let reader = ObjectReader::new(table.store.object_store(), table.meta.location.clone(), table.meta.size);
    let builder = ParquetRecordBatchStreamBuilder::new_with_metadata(reader, table.reader.clone())
        .with_batch_size(READ_ROWS)
        .with_row_groups(groups);
    guarded(builder, table.display())
}

/// Decoding damaged pages is the one place where another crate's arithmetic meets bytes that
/// nobody vouches for: a panic there is reported as damage, not as our bug.
fn guarded(builder: ParquetRecordBatchStreamBuilder<ObjectReader>, name: String) -> Result<BatchStream> {
    let stream = std::panic::catch_unwind(AssertUnwindSafe(|| builder.build()))
        .unwrap_or_else(|_| Err(parquet::errors::ParquetError::General("it cannot be decoded".into())))
        .map_err(|e| from_parquet(e, &name))?;
    let state = Some((stream, name));
    Ok(futures::stream::unfold(state, |state| async {
        let (mut stream, name) = state?;
        match AssertUnwindSafe(stream.next()).catch_unwind().await {
            Ok(None) => None,
            Ok(Some(Ok(batch))) => Some((strip_metadata(batch), Some((stream, name)))),
            Ok(Some(Err(e))) => Some((Err(from_parquet(e, &name)), None)),
            Err(_) => Some((Err(damaged(&name, "its pages cannot be decoded")), None)),
        }
    })
    .boxed())
}

fn strip_metadata(batch: RecordBatch) -> Result<RecordBatch> {
    let schema = Arc::new(Schema::new(batch.schema_ref().fields().clone()));
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema, batch.columns().to_vec(), &options)?)
}

async fn read_footer(store: &Store, meta: &ObjectMeta, name: &str) -> Result<ArrowReaderMetadata> {
    let mut reader = ObjectReader::new(store.object_store(), meta.location.clone(), meta.size);
    let load = ArrowReaderMetadata::load_async(&mut reader, ArrowReaderOptions::new());
    let footer = match AssertUnwindSafe(load).catch_unwind().await {
        Ok(footer) => footer.map_err(|e| from_parquet(e, name))?,
        Err(_) => return Err(damaged(name, "its footer cannot be decoded")),
    };
    check_footer(footer.metadata(), meta.size).map_err(|why| damaged(name, &why))?;
    Ok(footer)
}

/// Offsets, lengths and counts against the file's size, before anything is allocated for them.
fn check_footer(footer: &ParquetMetaData, size: u64) -> std::result::Result<(), String> {
    let mut rows = 0i64;
    for (g, group) in footer.row_groups().iter().enumerate() {
        if group.num_rows() < 0 {
            return Err(format!("row group {g} has a negative number of rows"));
        }
        rows = rows.checked_add(group.num_rows()).ok_or("its number of rows overflows")?;
        for column in group.columns() {
            let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
            let end = start.checked_add(column.compressed_size());
            let inside = start >= 0
                && column.data_page_offset() >= 0
                && column.compressed_size() >= 0
                && column.num_values() >= 0
                && end.and_then(|e| u64::try_from(e).ok()).is_some_and(|e| e <= size);
            if !inside {
                return Err(format!("column `{}` of row group {g} lies outside the file", column.column_path()));
            }
        }
    }
    match footer.file_metadata().num_rows() == rows {
        true => Ok(()),
        false => Err(format!("its footer says {} rows, its row groups {rows}", footer.file_metadata().num_rows())),
    }
}

/// What a [`TableWriter`] put.
pub(super) struct Written {
    /// Rows of the object.
    pub(super) rows: u64,
    /// Its bytes.
    pub(super) bytes: u64,
    /// Their sha256 (hex).
    pub(super) sha256: String,
    /// Its footer.
    pub(super) footer: ParquetMetaData,
}

/// The writer of all tables: zstd, fixed sizes, no metadata that could differ between two runs.
pub(super) struct TableWriter {
    writer: Option<AsyncArrowWriter<ObjectWriter>>,
    coalescer: BatchCoalescer,
    schema: SchemaRef,
    name: String,
    rows: u64,
}

impl TableWriter {
    /// Begins the object `file`; `schema` with views, dictionaries and large strings made plain.
    pub(super) fn begin(store: &Store, file: &str, schema: &SchemaRef) -> Result<Self> {
        let schema = plain_schema(schema);
        let name = store.display(file);
        let level = ZstdLevel::try_new(3).map_err(|e| Error::internal("zstd level").because(e))?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(level))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_created_by("tailfuse".to_owned())
            .build();
        let writer = AsyncArrowWriter::try_new_with_options(
            ObjectWriter::new(store.object_store(), store.path(file)),
            schema.clone(),
            ArrowWriterOptions::new().with_properties(properties),
        )
        .map_err(|e| Error::spec(format!("{name} cannot hold these columns")).because(e))?;
        Ok(TableWriter {
            writer: Some(writer),
            coalescer: BatchCoalescer::new(schema.clone(), ENCODE_ROWS),
            schema,
            name,
            rows: 0,
        })
    }

    /// Appends rows.
    pub(super) async fn push(&mut self, batch: &RecordBatch) -> Result<()> {
        self.rows += batch.num_rows() as u64;
        self.coalescer.push_batch(plain_batch(batch, &self.schema)?)?;
        self.drain().await
    }

    /// Rows so far.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// Makes the object visible.
    pub(super) async fn finish(mut self) -> Result<Written> {
        let done = async {
            self.coalescer.finish_buffered_batch()?;
            self.drain().await?;
            match &mut self.writer {
                Some(writer) => writer.finish().await.map_err(|e| write_error(&self.name, e)),
                None => Err(Error::internal(format!("{} was finished twice", self.name))),
            }
        }
        .await;
        match (done, self.writer.take()) {
            (Ok(footer), Some(writer)) => {
                let (bytes, sha256) = writer.into_inner().digest();
                Ok(Written { rows: self.rows, bytes, sha256, footer })
            }
            (done, writer) => {
                self.writer = writer;
                self.abort().await;
                Err(done.err().unwrap_or_else(|| Error::internal("a table's writer is gone")))
            }
        }
    }

    /// Takes back what was written; nothing becomes visible.
    pub(super) async fn abort(mut self) {
        if let Some(writer) = self.writer.take() {
            writer.into_inner().abort().await;
        }
    }

    async fn drain(&mut self) -> Result<()> {
        while let Some(batch) = self.coalescer.next_completed_batch() {
            if let Some(writer) = &mut self.writer {
                writer.write(&batch).await.map_err(|e| write_error(&self.name, e))?;
                crate::fault::point("table-batch");
            }
        }
        Ok(())
    }
}

fn write_error(name: &str, e: parquet::errors::ParquetError) -> Error {
    match e {
        parquet::errors::ParquetError::External(inner) => match inner.downcast::<object_store::Error>() {
            Ok(e) => crate::tables::store_errors::failed(format!("cannot write {name}"), *e),
            Err(e) => Error::environment(format!("cannot write {name}")).because(e),
        },
        e => Error::internal(format!("cannot encode {name}")).because(e),
    }
}

async fn write_batches(store: &Store, file: &str, schema: SchemaRef, rows: BatchStream) -> Result<()> {
    put_table(store, file, &schema, rows).await.map(|_| ())
}

/// Puts rows as one object, which appears whole. Returns rows, bytes and sha256 (hex) of the object.
pub async fn put_table(
    store: &Store,
    file: &str,
    schema: &SchemaRef,
    mut rows: BatchStream,
) -> Result<(u64, u64, String)> {
    let mut writer = TableWriter::begin(store, file, schema)?;
    while let Some(batch) = rows.next().await {
        let pushed = match batch {
            Ok(batch) => writer.push(&batch).await,
            Err(e) => Err(e),
        };
        if let Err(e) = pushed {
            writer.abort().await;
            return Err(e);
        }
    }
    let written = writer.finish().await?;
    Ok((written.rows, written.bytes, written.sha256))
}

/// The type that a stored table has for `from`: strings are utf8, dictionaries their values.
/// Readers then meet one type of string, whatever a query's functions or a warehouse made.
pub fn plain_type(from: &DataType) -> DataType {
    let inner = |f: &FieldRef| Arc::new(f.as_ref().clone().with_data_type(plain_type(f.data_type())));
    match from {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary => DataType::Binary,
        DataType::Dictionary(_, value) => plain_type(value),
        DataType::RunEndEncoded(_, value) => plain_type(value.data_type()),
        DataType::List(f) | DataType::ListView(f) => DataType::List(inner(f)),
        DataType::LargeList(f) | DataType::LargeListView(f) => DataType::LargeList(inner(f)),
        DataType::FixedSizeList(f, n) => DataType::FixedSizeList(inner(f), *n),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(inner).collect()),
        other => other.clone(),
    }
}

/// A schema with [`plain_type`]s and without metadata.
pub fn plain_schema(schema: &Schema) -> SchemaRef {
    let field = |f: &FieldRef| Field::new(f.name(), plain_type(f.data_type()), f.is_nullable());
    Arc::new(Schema::new(schema.fields().iter().map(field).collect::<Vec<_>>()))
}

/// A batch in the types of `schema`, which is [`plain_schema`] of its own.
pub fn plain_batch(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let plain = |(column, field): (&ArrayRef, &FieldRef)| match column.data_type() == field.data_type() {
        true => Ok(column.clone()),
        false => cast(column, field.data_type()),
    };
    let columns = batch.columns().iter().zip(schema.fields()).map(plain).collect::<Result<_, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}
