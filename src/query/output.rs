//! Rows for people and programs: a text table, CSV, JSON or Parquet.
//!
//! In: a stream of batches. Out: bytes, written as they come except for the text table (its
//! column widths need all rows, so it shows a number of them at most).

use std::io::Write;
use std::str::FromStr;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::json::WriterBuilder as JsonBuilder;
use arrow::json::writer::JsonArray;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use arrow::util::pretty::pretty_format_batches_with_options;
use datafusion::execution::SendableRecordBatchStream;
use futures::StreamExt;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::error::{Error, Result};
use crate::tables::parquet::{plain_batch, plain_schema};
use crate::tables::sql_errors::from_datafusion;

/// How rows are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// A text table with borders, for people.
    #[default]
    Table,
    /// Comma-separated, with a header; lists and structs as text.
    Csv,
    /// One array of objects; nulls are written.
    Json,
    /// One Parquet file.
    Parquet,
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "table" => Ok(Format::Table),
            "csv" => Ok(Format::Csv),
            "json" => Ok(Format::Json),
            "parquet" => Ok(Format::Parquet),
            other => {
                Err(Error::usage(format!("`{other}` is not a format")).with_help("use table, csv, json or parquet"))
            }
        }
    }
}

/// Writes the rows of `stream` and returns how many there were. A text table shows `shown` rows
/// at most and says when there are more. Errors: of the query; the writer (exit 75).
pub async fn write_rows<W: Write + Send>(
    mut stream: SendableRecordBatchStream,
    format: Format,
    shown: usize,
    out: W,
) -> Result<u64> {
    let schema = plain_schema(&stream.schema());
    let mut sink = Sink::open(format, &schema, shown, out)?;
    let mut rows = 0;
    while let Some(batch) = stream.next().await {
        let batch = plain_batch(&batch.map_err(from_datafusion)?, &schema)?;
        rows += batch.num_rows() as u64;
        if !sink.push(&batch)? {
            break;
        }
    }
    sink.close()?;
    Ok(rows)
}

/// A format under way.
enum Sink<W: Write + Send> {
    Table { schema: SchemaRef, batches: Vec<RecordBatch>, rows: usize, shown: usize, out: W },
    Csv { schema: SchemaRef, writer: Box<arrow::csv::Writer<W>> },
    Json(arrow::json::Writer<W, JsonArray>),
    Parquet(Box<ArrowWriter<W>>),
}

impl<W: Write + Send> Sink<W> {
    fn open(format: Format, schema: &SchemaRef, shown: usize, out: W) -> Result<Self> {
        Ok(match format {
            Format::Table => Sink::Table { schema: schema.clone(), batches: Vec::new(), rows: 0, shown, out },
            Format::Csv => {
                let schema = flat_schema(schema);
                let mut writer = arrow::csv::WriterBuilder::new().with_header(true).build(out);
                // The header is written even when no row follows.
                writer.write(&RecordBatch::new_empty(schema.clone())).map_err(write_error)?;
                Sink::Csv { schema, writer: Box::new(writer) }
            }
            Format::Json => Sink::Json(JsonBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(out)),
            Format::Parquet => {
                let level = ZstdLevel::try_new(3).map_err(|e| Error::internal("zstd level").because(e))?;
                let properties = WriterProperties::builder()
                    .set_compression(Compression::ZSTD(level))
                    .set_created_by("tailfuse".to_owned())
                    .build();
                let writer = ArrowWriter::try_new(out, schema.clone(), Some(properties))
                    .map_err(|e| Error::usage("Parquet cannot hold these columns").because(e))?;
                Sink::Parquet(Box::new(writer))
            }
        })
    }

    /// Takes rows; false once no more are wanted.
    fn push(&mut self, batch: &RecordBatch) -> Result<bool> {
        match self {
            Sink::Table { batches, rows, shown, .. } => {
                batches.push(batch.clone());
                *rows += batch.num_rows();
                return Ok(*rows <= *shown);
            }
            Sink::Csv { schema, writer } => writer.write(&flat_batch(batch, schema)?).map_err(write_error)?,
            Sink::Json(writer) => writer.write(batch).map_err(write_error)?,
            Sink::Parquet(writer) => {
                writer.write(batch).map_err(|e| Error::environment("cannot write the rows").because(e))?;
            }
        }
        Ok(true)
    }

    fn close(self) -> Result<()> {
        match self {
            Sink::Table { schema, batches, rows, shown, mut out } => {
                let mut left = shown;
                let mut visible = vec![RecordBatch::new_empty(schema)];
                for batch in &batches {
                    visible.push(batch.slice(0, batch.num_rows().min(left)));
                    left = left.saturating_sub(batch.num_rows());
                }
                let options = FormatOptions::default().with_null("null");
                let text = pretty_format_batches_with_options(&visible, &options)?;
                let more = match rows > shown {
                    true => format!("({shown} rows shown; there are more)\n"),
                    false => String::new(),
                };
                write!(out, "{text}\n{more}").and_then(|()| out.flush()).map_err(io_error)
            }
            Sink::Csv { writer, .. } => writer.into_inner().flush().map_err(io_error),
            Sink::Json(mut writer) => {
                writer.finish().map_err(write_error)?;
                let mut out = writer.into_inner();
                out.write_all(b"\n").and_then(|()| out.flush()).map_err(io_error)
            }
            Sink::Parquet(writer) => {
                let mut out =
                    writer.into_inner().map_err(|e| Error::environment("cannot write the rows").because(e))?;
                out.flush().map_err(io_error)
            }
        }
    }
}

fn write_error(e: arrow::error::ArrowError) -> Error {
    Error::environment("cannot write the rows").because(e)
}

fn io_error(e: std::io::Error) -> Error {
    Error::environment("cannot write the rows").because(e)
}

/// CSV has no lists: they become text.
fn flat_schema(schema: &Schema) -> SchemaRef {
    let flat = |f: &Arc<Field>| match f.data_type().is_nested() {
        true => Field::new(f.name(), DataType::Utf8, true),
        false => f.as_ref().clone(),
    };
    Arc::new(Schema::new(schema.fields().iter().map(flat).collect::<Vec<_>>()))
}

fn flat_batch(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let flat = |column: &ArrayRef| -> Result<ArrayRef> {
        if !column.data_type().is_nested() {
            return Ok(column.clone());
        }
        let options = FormatOptions::default();
        let text = ArrayFormatter::try_new(column.as_ref(), &options)?;
        let value = |r| (!column.is_null(r)).then(|| text.value(r).to_string());
        Ok(Arc::new((0..column.len()).map(value).collect::<StringArray>()))
    };
    let columns = batch.columns().iter().map(flat).collect::<Result<Vec<_>>>()?;
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}
