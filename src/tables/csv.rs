//! CSV objects as record batches of strings, and the types that their columns have.
//!
//! In: an object, the delimiter, whether there is a header. Out: batches in file order with every
//! column as text (empty = null), and for columns without a declared type the narrowest of int64,
//! float64, boolean and string that ALL their values fit. A number with a leading zero is text:
//! `034545104X` and `0345451045` are ids of the same kind, and neither may lose its zero.

use std::io::Cursor;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, StringArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::csv::ReaderBuilder;
use arrow::csv::reader::{Decoder, Format};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use bytes::{Buf, Bytes};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};

use crate::error::{Error, Result};
use crate::tables::Store;
use crate::tables::parquet::BatchStream;
use crate::tables::source_config::ColumnType;

/// The first bytes of a file, in which its header must end.
const HEADER_BYTES: u64 = 1 << 20;
/// Rows of a batch.
const READ_ROWS: usize = 8192;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// How the text is laid out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Between two fields.
    pub(super) delimiter: u8,
    /// Whether the first line names the columns.
    pub(super) header: bool,
}

/// The names of the columns: the header, or `column_1` and so on.
pub(super) async fn column_names(store: &Store, meta: &ObjectMeta, name: &str, layout: Layout) -> Result<Vec<String>> {
    if meta.size == 0 {
        return Err(
            Error::data(format!("{name} is empty")).with_help("leave it out of the source, or give it a header")
        );
    }
    let head = store.object_store().get_range(&meta.location, 0..meta.size.min(HEADER_BYTES)).await;
    let head = head.map_err(|e| Error::environment(format!("cannot read {name}")).because(e))?;
    let head = head.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&head);
    let (schema, _) = Format::default()
        .with_header(layout.header)
        .with_delimiter(layout.delimiter)
        .infer_schema(Cursor::new(head), Some(0))
        .map_err(|e| unreadable(name, &e.to_string()))?;
    let names: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
    if let Some(twice) = names.iter().enumerate().find_map(|(i, n)| names[..i].contains(n).then_some(n)) {
        return Err(Error::data(format!("{name} has two columns called `{twice}`")).with_help("rename one of them"));
    }
    Ok(names)
}

/// The rows, every column a string.
pub(super) async fn batches(
    store: &Store,
    meta: &ObjectMeta,
    name: &str,
    layout: Layout,
    columns: &[String],
) -> Result<BatchStream> {
    let fields: Vec<Field> = columns.iter().map(|c| Field::new(c, DataType::Utf8, true)).collect();
    let decoder = ReaderBuilder::new(Arc::new(Schema::new(fields)))
        .with_header(layout.header)
        .with_delimiter(layout.delimiter)
        .with_batch_size(READ_ROWS)
        .build_decoder();
    let object: Arc<dyn ObjectStore> = store.object_store();
    let found = object.get(&meta.location).await;
    let fail_name = name.to_owned();
    let bytes = found
        .map_err(|e| Error::environment(format!("cannot read {name}")).because(e))?
        .into_stream()
        .map_err(move |e| Error::environment(format!("cannot read {fail_name}")).because(e))
        .boxed();
    let state = Reading { decoder, bytes, rest: Bytes::new(), begun: false, ended: false, name: name.to_owned() };
    Ok(futures::stream::try_unfold(state, |mut state| async move {
        Ok(state.next_batch().await?.map(|batch| (batch, state)))
    })
    .boxed())
}

struct Reading {
    decoder: Decoder,
    bytes: BoxStream<'static, Result<Bytes>>,
    rest: Bytes,
    begun: bool,
    ended: bool,
    name: String,
}

impl Reading {
    async fn next_batch(&mut self) -> Result<Option<arrow::array::RecordBatch>> {
        loop {
            // An empty slice would tell the decoder that the file ends here.
            while self.rest.is_empty() && !self.ended {
                match self.bytes.next().await.transpose()? {
                    Some(chunk) => self.rest = chunk,
                    None => self.ended = true,
                }
                if !self.begun && self.rest.starts_with(BYTE_ORDER_MARK) {
                    self.rest.advance(BYTE_ORDER_MARK.len());
                }
                self.begun = true;
            }
            let decoded = self.decoder.decode(&self.rest).map_err(|e| unreadable(&self.name, &e.to_string()))?;
            self.rest.advance(decoded);
            // A full batch, or the end of the file (told to the decoder by the empty slice).
            if self.decoder.capacity() == 0 || (self.ended && decoded == 0) {
                return self.decoder.flush().map_err(|e| unreadable(&self.name, &e.to_string()));
            }
        }
    }
}

fn unreadable(name: &str, why: &str) -> Error {
    let why = why.trim_start_matches("Csv error: ").trim_start_matches("Parser error: ");
    Error::data(format!("{name} cannot be read as CSV: {why}")).with_help(
        "check `delimiter` and `header` of the source; the text must be UTF-8, and every line have the same number of fields",
    )
}

/// The Arrow type of a declared type.
pub(super) fn data_type(declared: ColumnType) -> DataType {
    match declared {
        ColumnType::Int64 => DataType::Int64,
        ColumnType::Float64 => DataType::Float64,
        ColumnType::Float32 => DataType::Float32,
        ColumnType::String => DataType::Utf8,
        ColumnType::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        ColumnType::Boolean => DataType::Boolean,
    }
}

/// A column of text in its type; null where the text does not parse. Spaces around numbers,
/// times and booleans are no part of them.
pub(super) fn typed(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    if column.data_type() == to {
        return Ok(column.clone());
    }
    let trimmed: StringArray = column.as_string::<i32>().iter().map(|s| s.map(str::trim)).collect();
    let options = CastOptions { safe: true, ..Default::default() };
    Ok(cast_with_options(&(Arc::new(trimmed) as ArrayRef), to, &options)?)
}

/// What all values of a column so far fit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guess {
    any: bool,
    int64: bool,
    float64: bool,
    boolean: bool,
}

impl Default for Guess {
    fn default() -> Self {
        Guess { any: false, int64: true, float64: true, boolean: true }
    }
}

impl Guess {
    /// Looks at more values.
    pub(super) fn look(&mut self, column: &ArrayRef) {
        for text in column.as_string::<i32>().iter().flatten() {
            let text = text.trim();
            self.any = true;
            let padded = has_leading_zero(text);
            self.int64 = self.int64 && !padded && !text.starts_with('+') && text.parse::<i64>().is_ok();
            self.float64 = self.float64 && !padded && is_number(text);
            self.boolean = self.boolean && matches!(text, "true" | "false" | "True" | "False" | "TRUE" | "FALSE");
            if !(self.int64 || self.float64 || self.boolean) {
                return;
            }
        }
    }

    /// The narrowest type; a column without values is a string.
    pub(super) fn data_type(&self) -> DataType {
        match self {
            Guess { any: false, .. } => DataType::Utf8,
            Guess { int64: true, .. } => DataType::Int64,
            Guess { float64: true, .. } => DataType::Float64,
            Guess { boolean: true, .. } => DataType::Boolean,
            _ => DataType::Utf8,
        }
    }
}

fn has_leading_zero(text: &str) -> bool {
    let digits = text.trim_start_matches('-').as_bytes();
    digits.len() > 1 && digits[0] == b'0' && digits[1].is_ascii_digit()
}

/// A decimal number; `nan`, `inf` and hexadecimal are text.
fn is_number(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'+' | b'e' | b'E'))
        && text.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(values: &[&str]) -> DataType {
        let mut g = Guess::default();
        g.look(&(Arc::new(StringArray::from(values.to_vec())) as ArrayRef));
        g.data_type()
    }

    #[test]
    fn types_are_those_that_all_values_fit() {
        assert_eq!(guess(&["1", "-20", "0"]), DataType::Int64);
        assert_eq!(guess(&["1", "2.5", "1e3"]), DataType::Float64);
        assert_eq!(guess(&["true", "False"]), DataType::Boolean);
        assert_eq!(guess(&["1", "x"]), DataType::Utf8);
        assert_eq!(guess(&["99999999999999999999"]), DataType::Float64);
        assert_eq!(guess(&["1", "nan"]), DataType::Utf8);
        assert_eq!(guess(&[]), DataType::Utf8);
    }

    #[test]
    fn a_leading_zero_makes_an_id_text() {
        assert_eq!(guess(&["0345451045", "12"]), DataType::Utf8);
        assert_eq!(guess(&["0.5", "-0.5"]), DataType::Float64);
    }

    #[test]
    fn text_that_does_not_parse_is_null() {
        let column: ArrayRef = Arc::new(StringArray::from(vec![Some(" 7 "), Some("seven"), None]));
        let ints = typed(&column, &DataType::Int64).unwrap();
        assert_eq!(ints.as_primitive::<arrow::datatypes::Int64Type>().value(0), 7);
        assert!(ints.is_null(1) && ints.is_null(2));
    }
}
