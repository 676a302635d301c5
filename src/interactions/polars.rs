//! Arrow <-> Polars through the Arrow C data interface, one column at a time, without copying values.
//!
//! In: an Arrow array, or a Polars column. Out: the other one, over the same memory, which stays
//! alive as long as either side holds it. Polars sorts and groups what the preparation of
//! interactions needs; everything that leaves the preparation is Arrow again.

use std::mem::transmute;

use arrow::array::{Array, ArrayRef, make_array};
use arrow::ffi::{FFI_ArrowArray, FFI_ArrowSchema, from_ffi, to_ffi};
use polars::prelude::{ArrowField, Column, CompatLevel, IntoColumn, PolarsError, Series};
use polars_arrow::ffi::{
    ArrowArray, ArrowSchema, export_array_to_c, export_field_to_c, import_array_from_c, import_field_from_c,
};

use crate::error::{Error, Result};

// Both crates lay the structs of the C data interface out as its specification says; a
// release that did not would stop here.
const _: () = assert!(size_of::<FFI_ArrowArray>() == size_of::<ArrowArray>());
const _: () = assert!(size_of::<FFI_ArrowSchema>() == size_of::<ArrowSchema>());

impl From<PolarsError> for Error {
    /// Polars fails on our own wrong assumptions (types, lengths); data was checked before.
    fn from(e: PolarsError) -> Self {
        Error::internal("a Polars operation failed").because(e)
    }
}

/// An Arrow column as a Polars column over the same memory. (Polars rewrites the offsets of `Utf8`
/// as views; `Utf8View` and numbers stay as they are.)
/// Errors (exit 70): a type that this build of Polars lacks.
pub fn to_polars(name: &str, array: &ArrayRef) -> Result<Column> {
    let (array, schema) = to_ffi(&array.to_data())?;
    // SAFETY: the structs are the same C struct (see the assertions above), moved, so that
    // exactly one side calls `release`. `to_ffi` filled both from one valid array, and Arrow arrays are
    // immutable, as Polars requires of what it imports.
    let chunk = unsafe {
        let array = transmute::<FFI_ArrowArray, ArrowArray>(array);
        let schema = transmute::<FFI_ArrowSchema, ArrowSchema>(schema);
        let field = import_field_from_c(&schema)?;
        import_array_from_c(array, field.dtype)?
    };
    Ok(Series::from_arrow(name.into(), chunk)?.into_column())
}

/// A Polars column as an Arrow array over the same memory (joined first where it has several chunks).
/// Errors (exit 70): a type that Arrow lacks.
pub fn to_arrow(column: &Column) -> Result<ArrayRef> {
    let series = column.as_materialized_series().rechunk();
    let chunk = series.to_arrow(0, CompatLevel::newest());
    let field = ArrowField::new(series.name().clone(), chunk.dtype().clone(), true);
    // SAFETY: as in `to_polars`; the array and the schema were exported from one valid column.
    let data = unsafe {
        let schema = transmute::<ArrowSchema, FFI_ArrowSchema>(export_field_to_c(&field));
        let array = transmute::<ArrowArray, FFI_ArrowArray>(export_array_to_c(chunk));
        from_ffi(array, &schema)?
    };
    Ok(make_array(data))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{AsArray, Float32Array, Int64Array, StringViewArray, UInt32Array};
    use arrow::datatypes::{Int64Type, UInt32Type};
    use polars::prelude::UInt32Chunked;

    use super::*;

    #[test]
    fn values_and_nulls_survive_both_ways() {
        let there: ArrayRef = Arc::new(Int64Array::from(vec![Some(3), None, Some(i64::MIN), Some(0)]));
        assert_eq!(&there, &to_arrow(&to_polars("x", &there).unwrap()).unwrap());
        let there: ArrayRef = Arc::new(Float32Array::from(vec![1.5, f32::INFINITY, -0.0]));
        let column = to_polars("y", &there).unwrap();
        assert_eq!(column.name().as_str(), "y");
        assert_eq!(&there, &to_arrow(&column).unwrap());
        let there: ArrayRef = Arc::new(StringViewArray::from(vec![Some("a"), None, Some("longer than twelve bytes")]));
        assert_eq!(&there, &to_arrow(&to_polars("z", &there).unwrap()).unwrap());
    }

    #[test]
    fn slices_and_empty_columns_survive() {
        let whole = UInt32Array::from(vec![Some(1), None, Some(3), None, Some(5)]);
        let there: ArrayRef = Arc::new(whole.slice(1, 3));
        assert_eq!(&there, &to_arrow(&to_polars("x", &there).unwrap()).unwrap());
        let there: ArrayRef = Arc::new(UInt32Array::from(Vec::<u32>::new()));
        assert_eq!(&there, &to_arrow(&to_polars("x", &there).unwrap()).unwrap());
    }

    #[test]
    fn memory_is_shared_and_outlives_the_giver() {
        let there: ArrayRef = Arc::new(Int64Array::from(vec![7, 8, 9]));
        let start = there.as_primitive::<Int64Type>().values().as_ptr();
        let column = to_polars("x", &there).unwrap();
        assert_eq!(column.i64().unwrap().cont_slice().unwrap().as_ptr(), start);
        drop(there);
        let back = to_arrow(&column).unwrap();
        drop(column);
        assert_eq!(back.as_primitive::<Int64Type>().values().as_ptr(), start);
        assert_eq!(back.as_primitive::<Int64Type>().values(), &[7, 8, 9]);

        let column = UInt32Chunked::from_vec("x".into(), vec![7, 8, 9]).into_column();
        let start = column.u32().unwrap().cont_slice().unwrap().as_ptr();
        let array = to_arrow(&column).unwrap();
        drop(column);
        assert_eq!(array.as_primitive::<UInt32Type>().values().as_ptr(), start);
        assert_eq!(array.as_primitive::<UInt32Type>().values(), &[7, 8, 9]);
    }
}
