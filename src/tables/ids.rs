//! Ids of users and items: int64 or string, as in the source, and nothing else.
//!
//! In: an Arrow column. Out: values that sort (numbers by value, strings by bytes)
//! and go back to Arrow in the type that they came in.

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, StringArray};
use arrow::datatypes::{DataType, Int64Type};
use std::sync::Arc;

use crate::error::{Error, Result};

/// One id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Id {
    /// A number.
    Int(i64),
    /// A string.
    Str(String),
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Id::Int(n) => write!(f, "{n}"),
            Id::Str(s) => f.write_str(s),
        }
    }
}

/// A column of ids, without nulls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdColumn {
    /// All numbers.
    Int(Vec<i64>),
    /// All strings.
    Str(Vec<String>),
}

impl IdColumn {
    /// From an Arrow column of any integer or string type (dictionaries and views too).
    /// Errors (exit 65): another type, or a null.
    pub fn try_from_array(name: &str, array: &ArrayRef) -> Result<Self> {
        let value_type = match array.data_type() {
            DataType::Dictionary(_, v) => v.as_ref().clone(),
            t => t.clone(),
        };
        let to = match value_type {
            t if t.is_integer() => DataType::Int64,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
            t => {
                return Err(Error::data(format!("column `{name}` has type {t}; ids are integers or strings"))
                    .with_help("cast it in a `sql` stage"));
            }
        };
        let options = arrow::compute::CastOptions { safe: false, ..Default::default() };
        let a = arrow::compute::cast_with_options(array, &to, &options)
            .map_err(|e| Error::data(format!("column `{name}` does not fit {to}")).because(e))?;
        if let Some(row) = (0..a.len()).find(|&i| a.is_null(i)) {
            return Err(Error::data(format!("column `{name}` is null in row {row} (0-based)")));
        }
        Ok(match to {
            DataType::Int64 => IdColumn::Int(a.as_primitive::<Int64Type>().values().to_vec()),
            _ => IdColumn::Str(a.as_string::<i32>().iter().flatten().map(str::to_owned).collect()),
        })
    }

    /// Back to Arrow: int64 or utf8.
    pub fn to_array(&self) -> ArrayRef {
        match self {
            IdColumn::Int(v) => Arc::new(Int64Array::from(v.clone())),
            IdColumn::Str(v) => Arc::new(StringArray::from_iter_values(v)),
        }
    }

    /// The Arrow type of [`IdColumn::to_array`].
    pub fn data_type(&self) -> DataType {
        match self {
            IdColumn::Int(_) => DataType::Int64,
            IdColumn::Str(_) => DataType::Utf8,
        }
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        match self {
            IdColumn::Int(v) => v.len(),
            IdColumn::Str(v) => v.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The id in row `row`.
    pub fn get(&self, row: usize) -> Id {
        match self {
            IdColumn::Int(v) => Id::Int(v[row]),
            IdColumn::Str(v) => Id::Str(v[row].clone()),
        }
    }

    /// The ids of the given rows, in that order.
    pub fn take(&self, rows: impl IntoIterator<Item = usize>) -> IdColumn {
        match self {
            IdColumn::Int(v) => IdColumn::Int(rows.into_iter().map(|r| v[r]).collect()),
            IdColumn::Str(v) => IdColumn::Str(rows.into_iter().map(|r| v[r].clone()).collect()),
        }
    }
}
