//! What each of our columns must be, and what is done to a source's column to make it so.
//!
//! In: one column of a source. Out: the column in our type, with a note of each row that cannot
//! be used and why. Ids become int64 or utf8, ratings float32, timestamps int64.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, StringArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Float32Type, Float64Type, Int64Type, TimeUnit, TimestampMicrosecondType};

use crate::error::{Error, Result};

/// What is done to a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// An id that every row needs: int64 or utf8, not null, not empty.
    Id,
    /// An id brought to int64 or utf8 where it is of a fitting type; nulls stay.
    LooseId,
    /// float32, finite.
    Rating,
    /// int64; integers keep their unit, times become microseconds.
    Timestamp,
    /// utf8; nulls and empty ones stay and are counted.
    Title,
    /// As it is, in a plain type.
    Pass,
}

/// Why a row cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Problem {
    /// Null where a value is needed.
    Null,
    /// An empty string where an id is needed.
    Empty,
    /// A number beyond int64, or bytes that are no text.
    Unfit,
    /// Text or a number that is no time.
    NoTime,
    /// NaN, an infinity or text where a number is needed.
    NoNumber,
    /// Text that does not parse as the column's type (CSV).
    NoParse,
}

impl Problem {
    /// The reason as `bad_rows` and the counts give it.
    pub(super) fn reason(self, column: &str) -> String {
        match self {
            Problem::Null => format!("{column} is null"),
            Problem::Empty => format!("{column} is empty"),
            Problem::Unfit => format!("{column} does not fit int64 or text"),
            Problem::NoTime => format!("{column} is not a time"),
            Problem::NoNumber => format!("{column} is not a finite number"),
            Problem::NoParse => format!("{column} does not parse as its type"),
        }
    }
}

/// The type of the result, or why no column of type `from` can be used.
pub(super) fn type_after(rule: Rule, from: &DataType) -> std::result::Result<DataType, &'static str> {
    match rule {
        Rule::Id => match id_type(from) {
            Some(to) => Ok(to),
            None => Err("ids are integers or strings"),
        },
        Rule::LooseId => Ok(id_type(from).unwrap_or_else(|| from.clone())),
        Rule::Rating if from.is_numeric() || *from == DataType::Utf8 => Ok(DataType::Float32),
        Rule::Rating => Err("ratings are numbers"),
        Rule::Timestamp => match from {
            t if t.is_integer() || t.is_floating() => Ok(DataType::Int64),
            DataType::Utf8 | DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => Ok(DataType::Int64),
            _ => Err("timestamps are integers, Arrow timestamps, dates or ISO-8601 text"),
        },
        Rule::Title if arrow::compute::can_cast_types(from, &DataType::Utf8) && !from.is_nested() => Ok(DataType::Utf8),
        Rule::Title => Err("titles are text"),
        Rule::Pass => Ok(from.clone()),
    }
}

/// int64 for whole numbers, utf8 for text; `from` is a plain type.
fn id_type(from: &DataType) -> Option<DataType> {
    match from {
        t if t.is_integer() => Some(DataType::Int64),
        DataType::Decimal32(_, 0) | DataType::Decimal64(_, 0) | DataType::Decimal128(_, 0) => Some(DataType::Int64),
        DataType::Utf8 | DataType::Binary => Some(DataType::Utf8),
        _ => None,
    }
}

/// The column cleaned; `bad(row, problem)` is called for every row that cannot be used.
///
/// `text_is_number` remembers, for a timestamp column of text, whether its first value was an
/// integer: then all must be, since a mixture of units would order nothing.
pub(super) fn clean(
    rule: Rule,
    column: &ArrayRef,
    text_is_number: &mut Option<bool>,
    bad: &mut dyn FnMut(usize, Problem),
) -> Result<ArrayRef> {
    let to = type_after(rule, column.data_type())
        .map_err(|why| Error::internal(format!("a column of type {} was let through: {why}", column.data_type())))?;
    match rule {
        Rule::Pass => Ok(column.clone()),
        Rule::Title | Rule::LooseId => safe_cast(column, &to),
        Rule::Id => {
            let ids = safe_cast(column, &to)?;
            for row in 0..ids.len() {
                match (column.is_null(row), ids.is_null(row)) {
                    (true, _) => bad(row, Problem::Null),
                    (false, true) => bad(row, Problem::Unfit),
                    _ => {}
                }
            }
            if let Some(text) = ids.as_string_opt::<i32>() {
                (0..text.len())
                    .filter(|&r| text.is_valid(r) && text.value(r).is_empty())
                    .for_each(|r| bad(r, Problem::Empty));
            }
            Ok(ids)
        }
        Rule::Rating => {
            let ratings = safe_cast(column, &DataType::Float32)?;
            let values = ratings.as_primitive::<Float32Type>();
            for row in 0..values.len() {
                match (column.is_null(row), values.is_null(row)) {
                    (true, _) => bad(row, Problem::Null),
                    (false, true) => bad(row, Problem::NoNumber),
                    _ if !values.value(row).is_finite() => bad(row, Problem::NoNumber),
                    _ => {}
                }
            }
            Ok(ratings)
        }
        Rule::Timestamp => {
            let times = timestamps(column, text_is_number)?;
            for row in 0..times.len() {
                match (column.is_null(row), times.is_null(row)) {
                    (true, _) => bad(row, Problem::Null),
                    (false, true) => bad(row, Problem::NoTime),
                    _ => {}
                }
            }
            Ok(times)
        }
    }
}

fn timestamps(column: &ArrayRef, text_is_number: &mut Option<bool>) -> Result<ArrayRef> {
    match column.data_type() {
        t if t.is_integer() => safe_cast(column, &DataType::Int64),
        t if t.is_floating() => {
            let seconds = safe_cast(column, &DataType::Float64)?;
            Ok(Arc::new(whole_numbers(seconds.as_primitive::<Float64Type>())))
        }
        DataType::Utf8 => {
            let text = column.as_string::<i32>();
            let first = text.iter().flatten().map(str::trim).find(|t| !t.is_empty());
            let number = match (*text_is_number, first) {
                (Some(known), _) => known,
                (None, Some(first)) => *text_is_number.insert(first.parse::<i64>().is_ok()),
                (None, None) => false,
            };
            let trimmed: StringArray = text.iter().map(|t| t.map(str::trim)).collect();
            match number {
                true => safe_cast(&(Arc::new(trimmed) as ArrayRef), &DataType::Int64),
                false => microseconds(&(Arc::new(trimmed) as ArrayRef)),
            }
        }
        _ => microseconds(column),
    }
}

/// Microseconds since 1970 in UTC; text without a zone is taken as UTC.
fn microseconds(column: &ArrayRef) -> Result<ArrayRef> {
    let zone = match column.data_type() {
        DataType::Utf8 => Some("UTC".into()),
        DataType::Timestamp(_, zone) => zone.clone(),
        _ => None,
    };
    let times = safe_cast(column, &DataType::Timestamp(TimeUnit::Microsecond, zone))?;
    Ok(Arc::new(times.as_primitive::<TimestampMicrosecondType>().reinterpret_cast::<Int64Type>()))
}

/// Floats that are whole numbers and exact as such; null for all others.
fn whole_numbers(values: &Float64Array) -> Int64Array {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    values.iter().map(|v| v.filter(|v| v.fract() == 0.0 && v.abs() <= EXACT).map(|v| v as i64)).collect()
}

/// A cast that makes null of what does not fit.
pub(super) fn safe_cast(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    if column.data_type() == to {
        return Ok(column.clone());
    }
    Ok(cast_with_options(column, to, &CastOptions { safe: true, ..Default::default() })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{BinaryArray, Date32Array, Decimal128Array, Float32Array, TimestampSecondArray, UInt64Array};

    fn cleaned(rule: Rule, column: ArrayRef) -> (ArrayRef, Vec<(usize, Problem)>) {
        let mut problems = Vec::new();
        let array = clean(rule, &column, &mut None, &mut |r, p| problems.push((r, p))).unwrap();
        (array, problems)
    }

    fn ints(a: &ArrayRef) -> Vec<Option<i64>> {
        a.as_primitive::<Int64Type>().iter().collect()
    }

    #[test]
    fn ids_become_int64_or_text() {
        let (a, bad) = cleaned(Rule::Id, Arc::new(UInt64Array::from(vec![Some(7), None, Some(u64::MAX)])));
        assert_eq!(ints(&a)[0], Some(7));
        assert_eq!(bad, [(1, Problem::Null), (2, Problem::Unfit)]);

        let (a, bad) = cleaned(Rule::Id, Arc::new(StringArray::from(vec![Some("a"), Some(""), None])));
        assert_eq!(a.data_type(), &DataType::Utf8);
        assert_eq!(bad, [(2, Problem::Null), (1, Problem::Empty)]);

        let decimals = Decimal128Array::from(vec![5, 6]).with_precision_and_scale(38, 0).unwrap();
        assert_eq!(ints(&cleaned(Rule::Id, Arc::new(decimals)).0), [Some(5), Some(6)]);

        let bytes = BinaryArray::from(vec![b"ab".as_ref(), b"\xff\xfe".as_ref()]);
        let (a, bad) = cleaned(Rule::Id, Arc::new(bytes));
        assert_eq!(a.as_string::<i32>().value(0), "ab");
        assert_eq!(bad, [(1, Problem::Unfit)]);
    }

    #[test]
    fn float_ids_are_refused() {
        assert!(type_after(Rule::Id, &DataType::Float64).is_err());
        assert!(type_after(Rule::Id, &DataType::Boolean).is_err());
        assert_eq!(type_after(Rule::LooseId, &DataType::Float64), Ok(DataType::Float64));
    }

    #[test]
    fn ratings_are_finite_numbers() {
        let column = Float32Array::from(vec![Some(4.5), Some(f32::NAN), None, Some(f32::INFINITY)]);
        let (a, bad) = cleaned(Rule::Rating, Arc::new(column));
        assert_eq!(a.as_primitive::<Float32Type>().value(0), 4.5);
        assert_eq!(bad, [(1, Problem::NoNumber), (2, Problem::Null), (3, Problem::NoNumber)]);
        let (a, bad) = cleaned(Rule::Rating, Arc::new(StringArray::from(vec!["3", "three"])));
        assert_eq!(a.as_primitive::<Float32Type>().value(0), 3.0);
        assert_eq!(bad, [(1, Problem::NoNumber)]);
    }

    #[test]
    fn times_become_int64() {
        let (a, bad) = cleaned(Rule::Timestamp, Arc::new(Int64Array::from(vec![881_250_949])));
        assert_eq!((ints(&a), bad.len()), (vec![Some(881_250_949)], 0));

        let (a, bad) = cleaned(Rule::Timestamp, Arc::new(Float64Array::from(vec![881_250_949.0, 0.5, f64::NAN])));
        assert_eq!(ints(&a), [Some(881_250_949), None, None]);
        assert_eq!(bad, [(1, Problem::NoTime), (2, Problem::NoTime)]);

        let (a, _) = cleaned(Rule::Timestamp, Arc::new(TimestampSecondArray::from(vec![3])));
        assert_eq!(ints(&a), [Some(3_000_000)]);
        let (a, _) = cleaned(Rule::Timestamp, Arc::new(Date32Array::from(vec![1])));
        assert_eq!(ints(&a), [Some(86_400_000_000)]);

        let iso =
            ["1970-01-02T00:00:00Z", "1970-01-01T02:00:00+02:00", "1970-01-01", "1970-01-01 00:00:01.5", "yesterday"];
        let (a, bad) = cleaned(Rule::Timestamp, Arc::new(StringArray::from(iso.to_vec())));
        assert_eq!(ints(&a), [Some(86_400_000_000), Some(0), Some(0), Some(1_500_000), None]);
        assert_eq!(bad, [(4, Problem::NoTime)]);
    }

    #[test]
    fn text_timestamps_are_all_numbers_or_all_dates() {
        let (a, bad) = cleaned(Rule::Timestamp, Arc::new(StringArray::from(vec!["12", "1970-01-01", "13"])));
        assert_eq!(ints(&a), [Some(12), None, Some(13)]);
        assert_eq!(bad, [(1, Problem::NoTime)]);
    }
}
