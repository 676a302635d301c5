//! The user's files as columns with figures: type, distinct values, range, length of texts.
//!
//! In: a path or URI. Out: [`Looked`]: how the files are to be read (delimiter, header, format), and for every column what
//! a guess of its meaning can be made from. At most [`ROWS`] rows are looked at.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Float64Type, Int64Type, TimeUnit};
use object_store::ObjectStoreExt;

use crate::error::{Error, Result};
use crate::tables::peek::peek;
use crate::tables::source::source_objects;
use crate::tables::source_config::{SourceConfig, SourceFormat, SourceRole};
use crate::tables::{Store, Table};

/// So many rows are looked at.
pub const ROWS: usize = 200_000;
/// Bytes of a text file from which its layout is guessed.
const HEAD: u64 = 1 << 16;
/// Values of a column that are shown.
const EXAMPLES: usize = 3;

/// What sort of values a column has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Integers.
    Whole,
    /// Other numbers.
    Number,
    /// Strings.
    Text,
    /// Points in time with a type of their own, or ISO-8601 text.
    Time,
    /// Anything else: true or false, lists, structs.
    Other,
}

/// A column and its figures, over the rows that were looked at.
#[derive(Clone, Debug)]
pub struct Column {
    /// As in the file.
    pub name: String,
    /// As in the file, in plain types.
    pub data_type: DataType,
    /// Its sort.
    pub shape: Shape,
    /// Values that are there.
    pub values: usize,
    /// Nulls.
    pub nulls: usize,
    /// Hashes of the distinct values as text.
    pub distinct: HashSet<u64>,
    /// Smallest number, or time in microseconds since 1970; NaN for text.
    pub least: f64,
    /// Largest.
    pub most: f64,
    /// Whether all numbers are whole.
    pub whole: bool,
    /// Mean number of characters.
    pub characters: f64,
    /// The first values, as text.
    pub examples: Vec<String>,
}

/// Files that were looked at.
#[derive(Clone, Debug)]
pub struct Looked {
    /// As the user typed it.
    pub uri: String,
    /// How they are read.
    pub config: SourceConfig,
    /// Their columns, in the order of the files.
    pub columns: Vec<Column>,
    /// The rows themselves, for questions about pairs of columns.
    pub rows: Table,
    /// Rows of all files, where known.
    pub total_rows: Option<u64>,
    /// Whether all rows were looked at.
    pub whole: bool,
    /// Number of files.
    pub files: usize,
    /// Whether the files are text.
    pub csv: bool,
}

impl Looked {
    /// A column by its name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.name == name)
    }
}

/// Looks at the files at `uri` (relative to `folder`). Errors: nothing there, unreadable (exit 65); the store (75).
pub async fn look(what: &str, uri: &str, folder: &Path) -> Result<Looked> {
    let store = Store::open(uri, folder)?;
    let mut config = SourceConfig { uri: uri.to_owned(), role: Some(SourceRole::Table), ..SourceConfig::default() };
    layout(what, &mut config, &store).await?;
    let seen = peek(what, &config, &store, ROWS).await?;
    if seen.rows.num_rows() == 0 {
        return Err(Error::data(format!("{what}: there are no rows in {}", store.display("")))
            .with_help("name a file or a folder that has some"));
    }
    let fields = seen.rows.schema().fields().clone();
    let columns = fields.iter().map(|f| figures(f.name(), &seen.rows.column(f.name())?)).collect::<Result<_>>()?;
    Ok(Looked {
        uri: uri.to_owned(),
        config,
        columns,
        rows: seen.rows,
        total_rows: seen.total_rows,
        whole: seen.whole,
        files: seen.files,
        csv: seen.csv,
    })
}

/// Delimiter, header and format, by the first lines of the first file.
async fn layout(what: &str, config: &mut SourceConfig, store: &Store) -> Result<()> {
    // A Delta table's files must not be read without its log.
    if store.head("").await?.is_none() && !store.list("_delta_log").await?.is_empty() {
        let delta = serde_json::from_value::<SourceFormat>("delta".into());
        config.format = Some(delta.map_err(|_| {
            Error::data(format!("{what}: {} is a Delta table, which `init` cannot look at", store.display("")))
                .with_help("export a few of its rows as Parquet and name those; the pipeline can read the table later")
        })?);
        return Ok(());
    }
    let objects = source_objects(what, config, store).await?;
    let Some(first) = objects.first() else { return Ok(()) };
    let name = first.meta.location.as_ref().to_ascii_lowercase();
    if [".parquet", ".parq", ".pq"].iter().any(|e| name.ends_with(e)) {
        return Ok(());
    }
    let head = store.object_store().get_range(&first.meta.location, 0..first.meta.size.min(HEAD)).await;
    let head =
        head.map_err(|e| Error::environment(format!("cannot read {}", store.display(&first.file))).because(e))?;
    if head.starts_with(b"PAR1") {
        config.format = Some(SourceFormat::Parquet);
        return Ok(());
    }
    if ![".csv", ".tsv", ".txt"].iter().any(|e| name.ends_with(e)) {
        config.format = Some(SourceFormat::Csv);
    }
    let text = String::from_utf8_lossy(&head);
    let text = text.trim_start_matches('\u{feff}');
    let lines: Vec<&str> = text.lines().filter(|l| !l.is_empty()).take(6).collect();
    (config.delimiter, config.header) = text_layout(&lines);
    Ok(())
}

/// The delimiter that all lines have most of, and whether the first line has no number in it.
fn text_layout(lines: &[&str]) -> (String, bool) {
    // The last line may be cut off.
    let whole = &lines[..lines.len().saturating_sub(usize::from(lines.len() > 2))];
    let fewest = |d: char| whole.iter().map(|l| l.matches(d).count()).min().unwrap_or(0);
    let delimiter = [',', '\t', ';', '|'].into_iter().rev().max_by_key(|d| fewest(*d)).filter(|d| fewest(*d) > 0);
    let delimiter = delimiter.unwrap_or(',');
    let header =
        whole.first().is_none_or(|l| !l.split(delimiter).any(|f| f.trim().trim_matches('"').parse::<f64>().is_ok()));
    (delimiter.to_string(), header)
}

fn safe(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    Ok(cast_with_options(column, to, &CastOptions { safe: true, ..Default::default() })?)
}

fn figures(name: &str, column: &ArrayRef) -> Result<Column> {
    let data_type = column.data_type().clone();
    let mut shape = match &data_type {
        t if t.is_integer() => Shape::Whole,
        DataType::Decimal128(_, 0) => Shape::Whole,
        t if t.is_numeric() => Shape::Number,
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => Shape::Time,
        DataType::Utf8 => Shape::Text,
        _ => Shape::Other,
    };
    let mut seen = Column {
        name: name.to_owned(),
        data_type: data_type.clone(),
        shape,
        values: column.len() - column.null_count(),
        nulls: column.null_count(),
        distinct: HashSet::new(),
        least: f64::NAN,
        most: f64::NAN,
        whole: true,
        characters: 0.0,
        examples: Vec::new(),
    };
    if data_type.is_nested() || !arrow::compute::can_cast_types(&data_type, &DataType::Utf8) {
        return Ok(seen);
    }
    let text = safe(column, &DataType::Utf8)?;
    let mut characters = 0;
    for value in text.as_string::<i32>().iter().flatten() {
        characters += value.chars().count();
        let mut hasher = DefaultHasher::new();
        value.hash(&mut hasher);
        if seen.distinct.insert(hasher.finish()) && seen.examples.len() < EXAMPLES {
            seen.examples.push(value.chars().take(40).collect());
        }
    }
    seen.characters = characters as f64 / seen.values.max(1) as f64;
    let micros = |column: &ArrayRef, zone: Option<&str>| -> Result<ArrayRef> {
        let zone = match column.data_type() {
            DataType::Timestamp(_, zone) => zone.clone(),
            _ => zone.map(Into::into),
        };
        safe(&safe(column, &DataType::Timestamp(TimeUnit::Microsecond, zone))?, &DataType::Int64)
    };
    let numbers = match shape {
        Shape::Whole | Shape::Number => Some(safe(column, &DataType::Float64)?),
        Shape::Time => Some(safe(&micros(column, None)?, &DataType::Float64)?),
        // Text that all parses as dates is a time; a number is one too for the cast, but not for a person.
        Shape::Text if seen.examples.iter().all(|e| e.len() >= 8 && e.contains('-')) => {
            let times = micros(&text, Some("UTC"))?;
            let fits = seen.values > 0 && times.as_primitive::<Int64Type>().null_count() == seen.nulls;
            if fits {
                shape = Shape::Time;
            }
            fits.then(|| safe(&times, &DataType::Float64)).transpose()?
        }
        _ => None,
    };
    seen.shape = shape;
    for x in numbers.iter().flat_map(|n| n.as_primitive::<Float64Type>().iter().flatten()) {
        // `min` takes the number where the other is NaN.
        seen.least = seen.least.min(x);
        seen.most = seen.most.max(x);
        seen.whole &= x.fract() == 0.0;
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Float64Array, StringArray};
    use std::sync::Arc;

    #[test]
    fn layouts_are_seen() {
        assert_eq!(text_layout(&["u,i,t", "1,2,3", "4,5,6"]), (",".into(), true));
        assert_eq!(text_layout(&["196\t242\t3\t881250949", "186\t302\t3\t891717742", "22\t3"]), ("\t".into(), false));
        assert_eq!(text_layout(&["a;b", "1,5;2", "2,5;3"]), (";".into(), true));
        assert_eq!(text_layout(&[]), (",".into(), true));
    }

    #[test]
    fn figures_of_columns() {
        let dates: ArrayRef = Arc::new(StringArray::from(vec!["2026-11-22", "2026-11-23 10:00:00"]));
        let seen = figures("d", &dates).unwrap();
        assert_eq!((seen.shape, seen.most > seen.least), (Shape::Time, true));
        let mixed: ArrayRef = Arc::new(StringArray::from(vec![Some("2026-11-22"), Some("yesterday-1"), None]));
        let seen = figures("d", &mixed).unwrap();
        assert_eq!((seen.shape, seen.nulls, seen.distinct.len()), (Shape::Text, 1, 2));
        let numbers: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 2.5, 2.5]));
        let seen = figures("x", &numbers).unwrap();
        assert_eq!((seen.least, seen.most, seen.whole, seen.distinct.len()), (1.0, 2.5, false, 2));
    }
}
