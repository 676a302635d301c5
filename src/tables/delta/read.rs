//! A snapshot of a Delta table: its files with their partition values, and its columns.
//!
//! In: the table's store and which state of it. Out: [`Snapshot`], which the reader of sources takes in place of a listing,
//! and `tailfuse sql` as a table that streams. Deletion vectors and mapped columns are refused, not misread.

use std::sync::Arc;

use arrow::datatypes::{Field, FieldRef, Schema, SchemaRef};
use chrono::DateTime;
use datafusion::catalog::TableProvider;
use datafusion::datasource::empty::EmptyTable;
use deltalake_core::DeltaTable;
use deltalake_core::kernel::engine::arrow_conversion::TryIntoArrow;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use object_store::path::Path as ObjectPath;
use sha2::{Digest, Sha256};

use super::{At, from_delta, not_a_table, open, unsupported};
use crate::error::{Error, Result};
use crate::tables::parquet::plain_type;
use crate::tables::partitions::PartitionValues;
use crate::tables::scan::ParquetScan;
use crate::tables::{Store, StoredTable};

/// Files of a table that are opened at a time.
const OPEN_AT_ONCE: usize = 16;

/// What a table declares at a version.
#[derive(Debug)]
pub struct Declared {
    /// The version.
    pub version: u64,
    /// All columns in the table's order, partition columns included, in plain types.
    pub schema: SchemaRef,
    /// The partition columns.
    pub partitions: Vec<String>,
    /// 16 hex digits that change with the columns.
    pub digest: String,
}

/// One data file of a version.
#[derive(Clone, Debug)]
pub struct ActiveFile {
    /// Where it lies on the store, its size and time.
    pub meta: ObjectMeta,
    /// Its name below the table.
    pub file: String,
    /// Its partition values, in the order of the table's partition columns.
    pub values: PartitionValues,
}

/// A table at a version.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Columns and version.
    pub declared: Arc<Declared>,
    /// Its files in path order.
    pub files: Vec<ActiveFile>,
}

impl Snapshot {
    /// The state `at` of the table at `store`. Errors (exit 65): no table, no such state, deletion vectors or mapped columns.
    pub async fn open(store: &Store, at: At) -> Result<Snapshot> {
        match open(store, at).await? {
            Some(table) => Snapshot::of(store, &table),
            None => Err(not_a_table(&store.display(""))),
        }
    }

    pub(super) fn of(store: &Store, table: &DeltaTable) -> Result<Snapshot> {
        let name = store.display("");
        let state = table.snapshot().map_err(|e| from_delta(e, &name))?;
        refuse_mapped(&name, state.metadata().configuration())?;
        let schema: Schema = state
            .schema()
            .as_ref()
            .try_into_arrow()
            .map_err(|e| Error::data(format!("the columns of the Delta table {name} cannot be read")).because(e))?;
        let plain = |f: &FieldRef| Field::new(f.name(), plain_type(f.data_type()), f.is_nullable());
        let schema: SchemaRef = Arc::new(Schema::new(schema.fields().iter().map(plain).collect::<Vec<_>>()));
        let partitions = state.metadata().partition_columns().to_vec();
        let mut files = Vec::new();
        for view in state.log_data().iter() {
            let path = view.object_store_path();
            if view.path().contains("://") {
                return Err(unsupported(&name, &format!("its file {} lies outside its folder", view.path())));
            }
            if view.deletion_vector_descriptor().is_some() {
                return Err(unsupported(
                    &name,
                    "deletion vectors (`reorg table ... apply (purge)` writes its files without them)",
                ));
            }
            let mut values = view.partition_values_map();
            let values = partitions.iter().map(|p| (p.clone(), values.remove(p).flatten())).collect();
            let size =
                u64::try_from(view.size()).map_err(|_| Error::data(format!("{name}: {path} has a negative size")))?;
            let location: ObjectPath = store.path("").parts().chain(path.parts()).collect();
            files.push(ActiveFile {
                meta: ObjectMeta {
                    location,
                    last_modified: DateTime::from_timestamp_millis(view.modification_time()).unwrap_or_default(),
                    size,
                    e_tag: None,
                    version: None,
                },
                file: path.to_string(),
                values: PartitionValues::from_pairs(values),
            });
        }
        files.sort_by(|a, b| a.meta.location.cmp(&b.meta.location));
        let text: String = schema.fields().iter().map(|f| format!("{} {}\n", f.name(), f.data_type())).collect();
        let digest = Sha256::digest(text.as_bytes()).iter().take(8).map(|b| format!("{b:02x}")).collect();
        let version = state.version();
        Ok(Snapshot { declared: Arc::new(Declared { version, schema, partitions, digest }), files })
    }

    /// The table as DataFusion scans it: in parallel, as a stream, partitions pruned. Partition columns are strings.
    pub async fn provider(&self, store: &Store) -> Result<Arc<dyn TableProvider>> {
        let is_partition = |name: &str| self.declared.partitions.iter().any(|p| p == name);
        let own: Vec<FieldRef> =
            self.declared.schema.fields().iter().filter(|f| !is_partition(f.name())).cloned().collect();
        if self.files.is_empty() {
            return Ok(Arc::new(EmptyTable::new(self.declared.schema.clone())));
        }
        let files = futures::stream::iter(self.files.clone()).map(|f| async move {
            Ok::<_, Error>((StoredTable::open_object(store, &f.file, f.meta).await?, f.values))
        });
        let files: Vec<_> = files.buffered(OPEN_AT_ONCE).try_collect().await?;
        Ok(Arc::new(ParquetScan::new(Arc::new(Schema::new(own)), files)?))
    }
}

/// Files of a table with mapped columns have other names inside.
pub(super) fn refuse_mapped(name: &str, configuration: &std::collections::HashMap<String, String>) -> Result<()> {
    match configuration.get("delta.columnMapping.mode").map(String::as_str) {
        None | Some("none") => Ok(()),
        Some(mode) => Err(unsupported(name, &format!("column mapping by {mode}"))),
    }
}
