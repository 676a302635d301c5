//! Hive partitions: `ds=2026-11-22/` in a path is a column `ds` of every row below it.
//!
//! In: object paths, a predicate. Out: the values, and which files a predicate may find rows in
//! without any of them being opened. Row groups of one file are pruned by the same rule, from
//! the footer's statistics.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, StringArray, UInt64Array, new_null_array};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::common::pruning::PruningStatistics;
use datafusion::common::{Column, ScalarValue};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_optimizer::pruning::PruningPredicateBuilder;
use object_store::path::Path as ObjectPath;
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::file::metadata::ParquetMetaData;

/// What Hive writes for null.
const HIVE_NULL: &str = "__HIVE_DEFAULT_PARTITION__";

/// Column -> value, in path order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionValues(Vec<(String, Option<String>)>);

impl PartitionValues {
    /// From the folders of `path` below `root` (its last part, the file, is none).
    pub fn of(root: &ObjectPath, path: &ObjectPath) -> Self {
        let below: Vec<_> = match path.prefix_match(root) {
            Some(parts) => parts.map(|p| p.as_ref().to_owned()).collect(),
            None => Vec::new(),
        };
        let folders = below.len().saturating_sub(1);
        let value = |part: &String| {
            let (name, value) = part.split_once('=')?;
            let value = percent_decoded(value);
            Some((percent_decoded(name), (value != HIVE_NULL).then_some(value)))
        };
        PartitionValues(below[..folders].iter().filter_map(value).collect())
    }

    /// Column and value, outermost first.
    pub fn from_pairs(pairs: Vec<(String, Option<String>)>) -> Self {
        PartitionValues(pairs)
    }

    /// The partition columns, outermost first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(n, _)| n.as_str())
    }

    /// The value of a column; `None` where it is null or no partition column.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).and_then(|(_, v)| v.as_deref())
    }

    /// Whether the path has no partitions.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Hive and the object store write what cannot stand in a path as `%XX`; either may have done so.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |at: usize| bytes.get(at).and_then(|b| (*b as char).to_digit(16));
        match (bytes[i], hex(i + 1), hex(i + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                i += 3;
            }
            (byte, ..) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

/// Which of the files with these partition values `predicate` may find rows in. True where
/// nothing is known: the predicate is applied to the rows all the same.
pub fn may_match(predicate: &Arc<dyn PhysicalExpr>, schema: &SchemaRef, files: &[&PartitionValues]) -> Vec<bool> {
    prune(predicate, schema, &Folders { schema, files })
}

/// Which row groups of a file `predicate` may find rows in, by the statistics of its footer and
/// the values of its folders.
pub fn row_groups_that_may_match(
    predicate: &Arc<dyn PhysicalExpr>,
    schema: &SchemaRef,
    file_schema: &Schema,
    footer: &ParquetMetaData,
    folders: &PartitionValues,
) -> Vec<bool> {
    prune(predicate, schema, &Groups { schema, file_schema, footer, folders })
}

fn prune(predicate: &Arc<dyn PhysicalExpr>, schema: &SchemaRef, of: &dyn PruningStatistics) -> Vec<bool> {
    PruningPredicateBuilder::new()
        .with_file_schema(schema.clone())
        .try_build(predicate.clone())
        .and_then(|p| p.prune(of))
        .unwrap_or_else(|_| vec![true; of.num_containers()])
}

/// Files as containers of one value for each partition column.
struct Folders<'a> {
    schema: &'a SchemaRef,
    files: &'a [&'a PartitionValues],
}

impl PruningStatistics for Folders<'_> {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        if !self.files.iter().any(|f| f.names().any(|n| n == column.name)) {
            return None;
        }
        let values: StringArray = self.files.iter().map(|f| f.get(&column.name)).collect();
        typed(self.schema, column, Arc::new(values))
    }

    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        self.min_values(column)
    }

    fn num_containers(&self) -> usize {
        self.files.len()
    }

    fn null_counts(&self, _column: &Column) -> Option<ArrayRef> {
        None
    }

    fn row_counts(&self) -> Option<ArrayRef> {
        None
    }

    fn contained(&self, _column: &Column, _values: &HashSet<ScalarValue>) -> Option<BooleanArray> {
        None
    }
}

/// The row groups of one file.
struct Groups<'a> {
    schema: &'a SchemaRef,
    file_schema: &'a Schema,
    footer: &'a ParquetMetaData,
    folders: &'a PartitionValues,
}

impl Groups<'_> {
    fn folder(&self, column: &Column) -> Option<ArrayRef> {
        self.folders.names().find(|n| *n == column.name)?;
        let value = self.folders.get(&column.name);
        let values: StringArray = std::iter::repeat_n(value, self.num_containers()).collect();
        typed(self.schema, column, Arc::new(values))
    }

    fn converter(&self, column: &Column) -> Option<StatisticsConverter<'_>> {
        StatisticsConverter::try_new(&column.name, self.file_schema, self.footer.file_metadata().schema_descr()).ok()
    }
}

impl PruningStatistics for Groups<'_> {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        if let Some(values) = self.folder(column) {
            return Some(values);
        }
        typed(self.schema, column, self.converter(column)?.row_group_mins(self.footer.row_groups()).ok()?)
    }

    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        if let Some(values) = self.folder(column) {
            return Some(values);
        }
        typed(self.schema, column, self.converter(column)?.row_group_maxes(self.footer.row_groups()).ok()?)
    }

    fn num_containers(&self) -> usize {
        self.footer.num_row_groups()
    }

    fn null_counts(&self, column: &Column) -> Option<ArrayRef> {
        Some(Arc::new(self.converter(column)?.row_group_null_counts(self.footer.row_groups()).ok()?))
    }

    fn row_counts(&self) -> Option<ArrayRef> {
        let rows = self.footer.row_groups().iter().map(|g| g.num_rows().unsigned_abs());
        Some(Arc::new(UInt64Array::from_iter_values(rows)))
    }

    fn contained(&self, _column: &Column, _values: &HashSet<ScalarValue>) -> Option<BooleanArray> {
        None
    }
}

/// Statistics in the type that the predicate compares in.
fn typed(schema: &SchemaRef, column: &Column, values: ArrayRef) -> Option<ArrayRef> {
    let to: &DataType = schema.field_with_name(&column.name).ok()?.data_type();
    match values.data_type() == to {
        true => Some(values),
        false if values.null_count() == values.len() => Some(new_null_array(to, values.len())),
        false => arrow::compute::cast(&values, to).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_columns() {
        let root = ObjectPath::from("warehouse/events");
        let path = ObjectPath::parse(
            "warehouse/events/ds=2026-11-22/country=d%C3%A9/x=__HIVE_DEFAULT_PARTITION__/a=b.parquet",
        );
        let values = PartitionValues::of(&root, &path.unwrap());
        assert_eq!(values.names().collect::<Vec<_>>(), ["ds", "country", "x"]);
        assert_eq!(values.get("ds"), Some("2026-11-22"));
        assert_eq!(values.get("country"), Some("dé"));
        assert_eq!(values.get("x"), None);
    }

    #[test]
    fn a_lone_percent_sign_stays() {
        assert_eq!(percent_decoded("100%"), "100%");
        assert_eq!(percent_decoded("a%2Fb%zz"), "a/b%zz");
    }
}
