//! Columns between a stage's rows and a Delta table.
//!
//! In: the schema of the rows, the table's columns where there is a table, the partition. Out: a [`Plan`]: the table's
//! columns after the commit and those of its files, or an error that names the column (exit 65). A column may be added; none
//! may change its type, and none that must not be null may go.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit};
use deltalake_core::kernel::engine::arrow_conversion::{TryIntoArrow, TryIntoKernel};
use deltalake_core::kernel::{DataType as DeltaType, PrimitiveType, StructField, StructType};

use crate::error::{Error, Result};
use crate::tables::parquet::plain_type;

/// Columns of a commit.
#[derive(Debug)]
pub(super) struct Plan {
    /// The table's columns after it, partition columns included.
    pub(super) table: StructType,
    /// The columns of its data files.
    pub(super) file: SchemaRef,
    /// Whether the table gets columns that it has not had.
    pub(super) evolves: bool,
}

/// Plans the commit of rows with the schema `rows` into the table called `name`, whose columns and partition columns are
/// `existing`, where it is there.
pub(super) fn plan(
    name: &str,
    existing: Option<(&StructType, &[String])>,
    rows: &Schema,
    partition: &BTreeMap<String, String>,
) -> Result<Plan> {
    if let Some(column) = partition.keys().find(|c| rows.index_of(c).is_ok()) {
        return Err(Error::data(format!("column `{column}` is in the table and in the partition of `{name}`"))
            .with_help("leave it out of the table: readers get it from the partition"));
    }
    let rows = rows.fields().iter().map(|f| storable(name, f)).collect::<Result<Vec<Field>>>()?;
    let mut fields: Vec<StructField> = Vec::new();
    let mut evolves = false;
    if let Some((table, partitions)) = existing {
        if !partitions.iter().eq(partition.keys()) && {
            let mut sorted = partitions.to_vec();
            sorted.sort();
            !sorted.iter().eq(partition.keys())
        } {
            let wanted: Vec<&str> = partition.keys().map(String::as_str).collect();
            return Err(Error::data(format!(
                "the published table `{name}` is partitioned by {}, and this stage's partition is {}",
                partitions.join(", "),
                wanted.join(", ")
            ))
            .with_help("publish under another name, or give the table's own partition columns"));
        }
        for field in table.fields() {
            match partition.get(field.name()) {
                Some(value) => fits(name, field, value)?,
                None => kept(name, field, &rows)?,
            }
            fields.push(field.clone());
        }
    }
    for row in &rows {
        if fields.iter().any(|f| f.name() == row.name()) {
            continue;
        }
        evolves = existing.is_some();
        // Older partitions lack it, so it may be null, whatever today's rows say.
        let field: StructField = row.try_into_kernel().map_err(|e| cannot(name, row, &e.to_string()))?;
        fields.push(StructField::new(row.name(), field.data_type().clone(), row.is_nullable() || evolves));
    }
    for column in partition.keys().filter(|_| existing.is_none()) {
        fields.push(StructField::new(column, DeltaType::STRING, true));
    }
    let table = StructType::try_new(fields)
        .map_err(|e| Error::data(format!("`{name}` cannot be a Delta table with these columns")).because(e))?;
    let arrow: Schema = (&table)
        .try_into_arrow()
        .map_err(|e| Error::data(format!("the columns of the Delta table `{name}` cannot be written")).because(e))?;
    let own = arrow.fields().iter().filter(|f| !partition.contains_key(f.name())).cloned().collect::<Vec<FieldRef>>();
    Ok(Plan { table, file: Arc::new(Schema::new(own)), evolves })
}

/// A partition value that readers can parse in the column's type.
fn fits(name: &str, field: &StructField, value: &str) -> Result<()> {
    match field.data_type() {
        DeltaType::Primitive(t) if t.parse_scalar(value).is_ok() => Ok(()),
        other => Err(Error::data(format!(
            "the partition `{} = \"{value}\"` does not fit the type {other} of that column in the published table `{name}`",
            field.name()
        ))
        .with_help("give a value of that type, or publish under another name")),
    }
}

/// A column of the table against today's rows.
fn kept(name: &str, field: &StructField, rows: &[Field]) -> Result<()> {
    for key in ["delta.generationExpression", "delta.invariants", "delta.identity.start"] {
        if field.metadata().contains_key(key) {
            return Err(super::unsupported(name, &format!("column `{}` has `{key}`", field.name())));
        }
    }
    let Some(row) = rows.iter().find(|r| r.name() == field.name()) else {
        return match field.is_nullable() {
            true => Ok(()),
            false => Err(Error::data(format!(
                "column `{}` of the published table `{name}` is missing in today's rows, and it must not be null there",
                field.name()
            ))
            .with_help("bring it back in the stage that makes the rows, or publish under another name")),
        };
    };
    let today: StructField = row.try_into_kernel().map_err(|e| cannot(name, row, &e.to_string()))?;
    match same_or_wider(field.data_type(), today.data_type()) {
        true => Ok(()),
        false => Err(Error::data(format!(
            "column `{}` has type {} in today's rows and {} in the published table `{name}`",
            field.name(),
            today.data_type(),
            field.data_type()
        ))
        .with_help("cast it in a `sql` stage to the table's type, or publish under another name")),
    }
}

/// Whether the table's type holds every value of today's.
fn same_or_wider(table: &DeltaType, today: &DeltaType) -> bool {
    use PrimitiveType::{Byte, Double, Float, Integer, Long, Short};
    match (table, today) {
        (DeltaType::Primitive(a), DeltaType::Primitive(b)) => {
            a == b
                || matches!(
                    (a, b),
                    (Short, Byte) | (Integer, Byte | Short) | (Long, Byte | Short | Integer) | (Double, Float)
                )
        }
        (DeltaType::Array(a), DeltaType::Array(b)) => same_or_wider(a.element_type(), b.element_type()),
        (DeltaType::Map(a), DeltaType::Map(b)) => {
            same_or_wider(a.key_type(), b.key_type()) && same_or_wider(a.value_type(), b.value_type())
        }
        (DeltaType::Struct(a), DeltaType::Struct(b)) => {
            a.num_fields() == b.num_fields()
                && a.fields().all(|f| b.field(f.name()).is_some_and(|g| same_or_wider(f.data_type(), g.data_type())))
        }
        _ => false,
    }
}

fn cannot(name: &str, field: &Field, why: &str) -> Error {
    Error::data(format!(
        "column `{}` has type {}, which a Delta table such as `{name}` cannot hold: {why}",
        field.name(),
        field.data_type()
    ))
    .with_help("cast it in a `sql` stage, or publish with `format = \"parquet\"`")
}

/// The column in a type that Delta has.
fn storable(name: &str, field: &FieldRef) -> Result<Field> {
    let to =
        delta_type(&plain_type(field.data_type())).ok_or_else(|| cannot(name, field, "it is none of Delta's types"))?;
    Ok(Field::new(field.name(), to, field.is_nullable()))
}

/// Unsigned integers become the next wider signed ones (the widest: int64, checked), times microseconds in UTC, a column of
/// nothing but nulls text.
fn delta_type(from: &DataType) -> Option<DataType> {
    let inner = |f: &FieldRef| Some(Arc::new(f.as_ref().clone().with_data_type(delta_type(f.data_type())?)));
    Some(match from {
        DataType::Null => DataType::Utf8,
        DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 | DataType::UInt64 => DataType::Int64,
        DataType::Float16 => DataType::Float32,
        DataType::Timestamp(..) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        DataType::Date64 => DataType::Date32,
        DataType::FixedSizeBinary(_) | DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        DataType::List(f) | DataType::LargeList(f) | DataType::FixedSizeList(f, _) => DataType::List(inner(f)?),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(inner).collect::<Option<_>>()?),
        DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::Binary
        | DataType::Date32
        | DataType::Decimal128(..)
        | DataType::Map(..) => from.clone(),
        _ => return None,
    })
}

/// A batch of rows in the columns of the data files. Errors (exit 65): a value that the type does not hold, a null where the
/// table has none.
pub(super) fn conform(name: &str, batch: &RecordBatch, file: &SchemaRef) -> Result<RecordBatch> {
    let rows = batch.num_rows();
    let options = CastOptions { safe: false, ..Default::default() };
    let column = |field: &FieldRef| -> Result<ArrayRef> {
        let Some(given) = batch.column_by_name(field.name()) else {
            return Ok(new_null_array(field.data_type(), rows));
        };
        let cast = match given.data_type() == field.data_type() {
            true => given.clone(),
            false => cast_with_options(given, field.data_type(), &options).map_err(|e| {
                Error::data(format!(
                    "column `{}` of `{name}` has a value that does not fit the type {} of the table",
                    field.name(),
                    field.data_type()
                ))
                .because(e)
            })?,
        };
        match field.is_nullable() || cast.null_count() == 0 {
            true => Ok(cast),
            false => Err(Error::data(format!(
                "column `{}` is null in a row for the published table `{name}`, where it must not be",
                field.name()
            ))
            .with_help("leave such rows out, or fill them, in a `sql` stage")),
        }
    };
    let columns = file.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    Ok(RecordBatch::try_new_with_options(file.clone(), columns, &options)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fault;

    fn ds() -> BTreeMap<String, String> {
        BTreeMap::from([("ds".to_owned(), "2026-11-22".to_owned())])
    }

    fn schema(fields: &[(&str, DataType, bool)]) -> Schema {
        Schema::new(fields.iter().map(|(n, t, null)| Field::new(*n, t.clone(), *null)).collect::<Vec<_>>())
    }

    fn after(table: &StructType, rows: &Schema) -> Result<Plan> {
        plan("t", Some((table, &["ds".to_owned()])), rows, &ds())
    }

    #[test]
    fn a_new_table_has_the_rows_columns_and_the_partition() {
        let made =
            plan("t", None, &schema(&[("u", DataType::UInt32, false), ("x", DataType::Null, true)]), &ds()).unwrap();
        let text: Vec<String> =
            made.table.fields().map(|f| format!("{} {} {}", f.name(), f.data_type(), f.is_nullable())).collect();
        assert_eq!(text, ["u long false", "x string true", "ds string true"]);
        assert!(!made.evolves && made.file.fields().len() == 2);
        let e = plan("t", None, &schema(&[("ds", DataType::Utf8, true)]), &ds()).unwrap_err();
        assert!(e.message.contains("`ds`"), "{e}");
        let e = plan("t", None, &schema(&[("d", DataType::Duration(TimeUnit::Second), true)]), &ds()).unwrap_err();
        assert!(e.fault == Fault::Data && e.message.contains("`d`"), "{e}");
    }

    #[test]
    fn columns_come_and_may_be_absent_but_none_changes() {
        let first = schema(&[("u", DataType::Int64, false), ("note", DataType::Utf8, true)]);
        let table = plan("t", None, &first, &ds()).unwrap().table;
        let more = schema(&[("u", DataType::Int32, false), ("new", DataType::Float64, false)]);
        let grown = after(&table, &more).unwrap();
        assert!(grown.evolves);
        let names: Vec<&str> = grown.file.fields().iter().map(|f| f.name().as_str()).collect();
        assert_eq!(names, ["u", "note", "new"]);
        assert!(grown.table.field("new").unwrap().is_nullable());
        assert_eq!(grown.file.field(0).data_type(), &DataType::Int64);

        let e = after(&table, &schema(&[("note", DataType::Utf8, true)])).unwrap_err();
        assert!(e.fault == Fault::Data && e.message.contains("`u`") && e.message.contains("missing"), "{e}");
        let e = after(&table, &schema(&[("u", DataType::Utf8, false)])).unwrap_err();
        assert!(e.message.contains("`u`") && e.message.contains("string") && e.message.contains("long"), "{e}");
        let other = BTreeMap::from([("day".to_owned(), "1".to_owned())]);
        let e = plan("t", Some((&table, &["ds".to_owned()])), &first, &other).unwrap_err();
        assert!(e.message.contains("partitioned by ds"), "{e}");
    }

    #[test]
    fn values_are_checked_on_the_way() {
        let file: SchemaRef = Arc::new(schema(&[("u", DataType::Int64, false), ("note", DataType::Utf8, true)]));
        let batch = |values: Vec<Option<u64>>| {
            let column: ArrayRef = Arc::new(arrow::array::UInt64Array::from(values));
            RecordBatch::try_from_iter([("u", column)]).unwrap()
        };
        let good = conform("t", &batch(vec![Some(1)]), &file).unwrap();
        assert_eq!((good.num_columns(), good.column(1).null_count()), (2, 1));
        for wrong in [vec![Some(u64::MAX)], vec![None]] {
            let e = conform("t", &batch(wrong), &file).unwrap_err();
            assert!(e.fault == Fault::Data && e.message.contains("`u`"), "{e}");
        }
    }
}
