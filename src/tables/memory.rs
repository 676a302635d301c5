//! A table in memory: a schema and record batches, with typed access by column name.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tables::ids::IdColumn;

/// A table in memory. Row order is part of its value.
#[derive(Clone, Debug)]
pub struct Table {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
}

impl Table {
    /// From batches of one schema.
    pub fn new(schema: SchemaRef, batches: Vec<RecordBatch>) -> Self {
        Table { schema, batches }
    }

    /// From one batch.
    pub fn from_batch(batch: RecordBatch) -> Self {
        Table { schema: batch.schema(), batches: vec![batch] }
    }

    /// From named columns of equal length; `nullable` per column.
    pub fn from_columns(columns: Vec<(&str, ArrayRef, bool)>) -> Result<Self> {
        let fields: Vec<Field> =
            columns.iter().map(|(name, a, null)| Field::new(*name, a.data_type().clone(), *null)).collect();
        let arrays = columns.into_iter().map(|(_, a, _)| a).collect();
        Ok(Table::from_batch(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?))
    }

    /// The schema.
    pub fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    /// The batches, in row order.
    pub fn batches(&self) -> &[RecordBatch] {
        &self.batches
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    /// All rows as one batch (copies when there are several).
    pub fn to_batch(&self) -> Result<RecordBatch> {
        match self.batches.as_slice() {
            [one] => Ok(one.clone()),
            many => Ok(concat_batches(&self.schema, many)?),
        }
    }

    /// Whether the table has the column.
    pub fn has(&self, name: &str) -> bool {
        self.schema.index_of(name).is_ok()
    }

    /// One column over all rows. Error (exit 65) names the column and those there are.
    pub fn column(&self, name: &str) -> Result<ArrayRef> {
        let index = self.schema.index_of(name).map_err(|_| {
            let there: Vec<&str> = self.schema.fields().iter().map(|f| f.name().as_str()).collect();
            Error::data(format!("column `{name}` is missing")).with_help(format!("the table has: {}", there.join(", ")))
        })?;
        match self.batches.as_slice() {
            [one] => Ok(one.column(index).clone()),
            [] => Ok(arrow::array::new_empty_array(self.schema.field(index).data_type())),
            many => {
                let parts: Vec<&dyn Array> = many.iter().map(|b| b.column(index).as_ref()).collect();
                Ok(arrow::compute::concat(&parts)?)
            }
        }
    }

    /// One column cast to `to`; error (exit 65) names column, type and the type that was wanted.
    pub fn column_as(&self, name: &str, to: &DataType) -> Result<ArrayRef> {
        let column = self.column(name)?;
        if column.data_type() == to {
            return Ok(column);
        }
        let from = column.data_type().clone();
        let options = arrow::compute::CastOptions { safe: false, ..Default::default() };
        arrow::compute::cast_with_options(&column, to, &options)
            .map_err(|e| Error::data(format!("column `{name}` has type {from}, {to} is wanted")).because(e))
    }

    /// A column of ids (int64 or string, no nulls).
    pub fn ids(&self, name: &str) -> Result<IdColumn> {
        IdColumn::try_from_array(name, &self.column(name)?)
    }

    /// A column as `Vec<i64>`; nulls are an error.
    pub fn i64s(&self, name: &str) -> Result<Vec<i64>> {
        let a = self.column_as(name, &DataType::Int64)?;
        no_nulls(name, a.as_ref())?;
        Ok(a.as_primitive::<arrow::datatypes::Int64Type>().values().to_vec())
    }

    /// A column as `Vec<i32>`; nulls are an error.
    pub fn i32s(&self, name: &str) -> Result<Vec<i32>> {
        let a = self.column_as(name, &DataType::Int32)?;
        no_nulls(name, a.as_ref())?;
        Ok(a.as_primitive::<arrow::datatypes::Int32Type>().values().to_vec())
    }

    /// A column as `Vec<f64>`; nulls are an error.
    pub fn f64s(&self, name: &str) -> Result<Vec<f64>> {
        let a = self.column_as(name, &DataType::Float64)?;
        no_nulls(name, a.as_ref())?;
        Ok(a.as_primitive::<arrow::datatypes::Float64Type>().values().to_vec())
    }

    /// A column as `Vec<f32>`; nulls are an error.
    pub fn f32s(&self, name: &str) -> Result<Vec<f32>> {
        let a = self.column_as(name, &DataType::Float32)?;
        no_nulls(name, a.as_ref())?;
        Ok(a.as_primitive::<arrow::datatypes::Float32Type>().values().to_vec())
    }

    /// A column of strings, nulls kept.
    pub fn strings(&self, name: &str) -> Result<Vec<Option<String>>> {
        let a = self.column_as(name, &DataType::Utf8)?;
        Ok(a.as_string::<i32>().iter().map(|s| s.map(str::to_owned)).collect())
    }
}

fn no_nulls(name: &str, a: &dyn Array) -> Result<()> {
    match (0..a.len()).find(|&i| a.is_null(i)) {
        None => Ok(()),
        Some(row) => Err(Error::data(format!("column `{name}` is null in row {row} (0-based)"))
            .with_help("filter such rows out in a `sql` stage, or map another column")),
    }
}
