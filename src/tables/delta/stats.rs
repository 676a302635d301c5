//! The statistics that a Delta log keeps of a file, from the file's own footer.
//!
//! In: schema and footer. Out: JSON with `numRecords`, and per column `nullCount`, `minValues` and `maxValues`, as far as
//! they are exact enough for readers to skip files by: numbers, days and short texts. Times are left out: the log keeps
//! milliseconds, the file microseconds.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, Date32Type, Field, Float32Type, Float64Type, Int64Type, Schema};
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::file::metadata::ParquetMetaData;
use serde_json::{Map, Value, json};

/// Texts longer than this are no bound worth keeping.
const LONGEST_TEXT: usize = 64;

/// The statistics as the `stats` of an `add` action.
pub(super) fn of(schema: &Schema, footer: &ParquetMetaData) -> String {
    let (mut nulls, mut low, mut high) = (Map::new(), Map::new(), Map::new());
    for field in schema.fields().iter().filter(|f| !f.data_type().is_nested()) {
        let descr = footer.file_metadata().schema_descr();
        let Ok(converter) = StatisticsConverter::try_new(field.name(), schema, descr) else { continue };
        if let Ok(counts) = converter.row_group_null_counts(footer.row_groups())
            && counts.null_count() == 0
        {
            nulls.insert(field.name().clone(), json!(counts.iter().flatten().sum::<u64>()));
        }
        let mins = converter.row_group_mins(footer.row_groups()).ok().and_then(|a| bound(field, &a, false));
        let maxes = converter.row_group_maxes(footer.row_groups()).ok().and_then(|a| bound(field, &a, true));
        if let (Some(min), Some(max)) = (mins, maxes) {
            low.insert(field.name().clone(), min);
            high.insert(field.name().clone(), max);
        }
    }
    let rows = footer.file_metadata().num_rows();
    json!({ "numRecords": rows, "minValues": low, "maxValues": high, "nullCount": nulls }).to_string()
}

/// The least or the greatest of the row groups' bounds; `None` where one of them is not known.
fn bound(field: &Field, values: &ArrayRef, greatest: bool) -> Option<Value> {
    if values.is_empty() || values.null_count() > 0 {
        return None;
    }
    fn pick<T: PartialOrd>(values: impl Iterator<Item = T>, greatest: bool) -> Option<T> {
        values.reduce(|a, b| if (b > a) == greatest { b } else { a })
    }
    match field.data_type() {
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => {
            let wide = arrow::compute::cast(values, &DataType::Int64).ok()?;
            pick(wide.as_primitive::<Int64Type>().values().iter().copied(), greatest).map(Value::from)
        }
        DataType::Float32 => {
            let all = values.as_primitive::<Float32Type>().values();
            all.iter()
                .all(|v| v.is_finite())
                .then(|| pick(all.iter().map(|v| f64::from(*v)), greatest))?
                .map(Value::from)
        }
        DataType::Float64 => {
            let all = values.as_primitive::<Float64Type>().values();
            all.iter().all(|v| v.is_finite()).then(|| pick(all.iter().copied(), greatest))?.map(Value::from)
        }
        DataType::Date32 => {
            let days = pick(values.as_primitive::<Date32Type>().values().iter().copied(), greatest)?;
            Some(Value::from(Date32Type::to_naive_date_opt(days)?.format("%Y-%m-%d").to_string()))
        }
        DataType::Utf8 => {
            let text = pick(values.as_string::<i32>().iter().flatten(), greatest)?;
            (text.len() < LONGEST_TEXT).then(|| Value::from(text))
        }
        _ => None,
    }
}
