//! Arrow <-> Polars, one column at a time.
//!
//! In: an Arrow array of numbers, or a Polars column. Out: the other one. Polars sorts and
//! groups what the preparation of interactions needs; everything that leaves the process's
//! preparation is Arrow again. Polars columns go to Arrow without a copy: the Arrow buffer
//! borrows Polars' allocation and keeps it alive.

use std::panic::AssertUnwindSafe;
use std::ptr::NonNull;
use std::sync::Arc;

use arrow::alloc::Allocation;
use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray};
use arrow::buffer::{Buffer, NullBuffer, ScalarBuffer};
use arrow::datatypes::{
    ArrowNativeType, ArrowPrimitiveType, DataType, Float32Type, Float64Type, Int32Type, Int64Type, UInt32Type,
    UInt64Type,
};
use polars::prelude::{self as pl, ChunkedArray, Column, IntoColumn, PolarsError, PolarsNumericType};

use crate::error::{Error, Result};

impl From<PolarsError> for Error {
    /// Polars fails on our own wrong assumptions (types, lengths); data was checked before.
    fn from(e: PolarsError) -> Self {
        Error::internal("a Polars operation failed").because(e)
    }
}

/// An Arrow column of numbers as a Polars column. Nulls stay nulls.
/// Errors (exit 70): a type that is no number; cast such columns first.
pub fn to_polars(name: &str, array: &ArrayRef) -> Result<Column> {
    Ok(match array.data_type() {
        DataType::Int32 => import::<Int32Type, pl::Int32Type>(name, array),
        DataType::Int64 => import::<Int64Type, pl::Int64Type>(name, array),
        DataType::UInt32 => import::<UInt32Type, pl::UInt32Type>(name, array),
        DataType::UInt64 => import::<UInt64Type, pl::UInt64Type>(name, array),
        DataType::Float32 => import::<Float32Type, pl::Float32Type>(name, array),
        DataType::Float64 => import::<Float64Type, pl::Float64Type>(name, array),
        other => return Err(Error::internal(format!("column `{name}` of type {other} does not go to Polars"))),
    })
}

/// A Polars column of numbers as an Arrow array over the same memory.
/// Errors (exit 70): a type that is no number.
pub fn to_arrow(column: &Column) -> Result<ArrayRef> {
    let series = column.as_materialized_series();
    Ok(match series.dtype() {
        pl::DataType::Int32 => export::<pl::Int32Type, Int32Type>(series.i32()?),
        pl::DataType::Int64 => export::<pl::Int64Type, Int64Type>(series.i64()?),
        pl::DataType::UInt32 => export::<pl::UInt32Type, UInt32Type>(series.u32()?),
        pl::DataType::UInt64 => export::<pl::UInt64Type, UInt64Type>(series.u64()?),
        pl::DataType::Float32 => export::<pl::Float32Type, Float32Type>(series.f32()?),
        pl::DataType::Float64 => export::<pl::Float64Type, Float64Type>(series.f64()?),
        other => {
            return Err(Error::internal(format!("column `{}` of type {other} does not go to Arrow", column.name())));
        }
    })
}

fn import<A, P>(name: &str, array: &ArrayRef) -> Column
where
    A: ArrowPrimitiveType,
    P: PolarsNumericType<Native = A::Native>,
    ChunkedArray<P>: pl::IntoSeries + FromIterator<Option<A::Native>>,
{
    let array = array.as_primitive::<A>();
    let mut column = match array.null_count() {
        0 => ChunkedArray::<P>::from_vec(name.into(), array.values().to_vec()),
        _ => array.iter().collect::<ChunkedArray<P>>(),
    };
    column.rename(name.into());
    column.into_column()
}

fn export<P, A>(column: &ChunkedArray<P>) -> ArrayRef
where
    P: PolarsNumericType,
    A: ArrowPrimitiveType<Native = P::Native>,
    P::Native: ArrowNativeType,
{
    let whole = column.rechunk();
    // A clone of a chunk shares its buffers.
    let chunk = whole.downcast_as_array().clone();
    let nulls = (whole.null_count() > 0).then(|| NullBuffer::from_iter(chunk.iter().map(|v| v.is_some())));
    let len = chunk.len();
    let bytes = std::mem::size_of_val::<[P::Native]>(chunk.values().as_slice());
    let start = NonNull::from(chunk.values().as_slice()).cast::<u8>();
    let owner: Arc<dyn Allocation> = Arc::new(AssertUnwindSafe(chunk));
    // SAFETY: `start` points to `bytes` initialised bytes on the heap that belong to the buffer
    // of `chunk`. `owner` holds that buffer for as long as Arrow holds `owner`, moving `chunk`
    // into it does not move the heap memory, and neither side writes to a shared buffer.
    let buffer = unsafe { Buffer::from_custom_allocation(start, bytes, owner) };
    Arc::new(PrimitiveArray::<A>::new(ScalarBuffer::new(buffer, 0, len), nulls))
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float32Array, Int64Array, StringArray, UInt32Array};

    use super::*;

    #[test]
    fn values_and_nulls_survive_both_ways() {
        let there: ArrayRef = Arc::new(Int64Array::from(vec![Some(3), None, Some(i64::MIN), Some(0)]));
        let back = to_arrow(&to_polars("x", &there).unwrap()).unwrap();
        assert_eq!(&there, &back);
        let there: ArrayRef = Arc::new(Float32Array::from(vec![1.5, f32::INFINITY, -0.0]));
        let column = to_polars("y", &there).unwrap();
        assert_eq!(column.name().as_str(), "y");
        assert_eq!(&there, &to_arrow(&column).unwrap());
    }

    #[test]
    fn a_slice_and_an_empty_column_survive() {
        let there: ArrayRef = Arc::new(UInt32Array::from(vec![1, 2, 3, 4, 5]).slice(2, 2));
        assert_eq!(&there, &to_arrow(&to_polars("x", &there).unwrap()).unwrap());
        let there: ArrayRef = Arc::new(UInt32Array::from(Vec::<u32>::new()));
        assert_eq!(to_arrow(&to_polars("x", &there).unwrap()).unwrap().len(), 0);
    }

    #[test]
    fn arrow_reads_polars_memory_and_outlives_the_frame() {
        let column = pl::UInt32Chunked::from_vec("x".into(), vec![7, 8, 9]).into_column();
        let before = column.u32().unwrap().cont_slice().unwrap().as_ptr();
        let array = to_arrow(&column).unwrap();
        assert_eq!(array.as_primitive::<UInt32Type>().values().as_ptr(), before);
        drop(column);
        assert_eq!(array.as_primitive::<UInt32Type>().values(), &[7, 8, 9]);
    }

    #[test]
    fn text_is_refused_by_name() {
        let there: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
        let error = to_polars("title", &there).unwrap_err();
        assert!(error.message.contains("`title`"), "{error}");
    }
}
