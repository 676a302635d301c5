//! Parquet objects as one table of DataFusion: a stage output, or a published table whose
//! Hive partitions come back as columns.
//!
//! In: [`StoredTable`]s with the values of their partition folders. Out: a table provider that
//! brings its own object store, prunes partitions, and leaves row groups to DataFusion.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::stats::Precision;
use datafusion::common::{DFSchema, Result as SqlResult, ScalarValue, Statistics};
use datafusion::datasource::TableType;
use datafusion::datasource::file_format::FileFormat;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder};
use datafusion::datasource::table_schema::TableSchema;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;

use crate::error::{Error, Result};
use crate::tables::partitions::{PartitionValues, may_match};
use crate::tables::sql_errors::from_datafusion;
use crate::tables::{Store, StoredTable};

/// One or more Parquet objects of one schema on one store.
#[derive(Debug)]
pub struct ParquetScan {
    store: Store,
    url: ObjectStoreUrl,
    files: Vec<(StoredTable, PartitionValues)>,
    columns: TableSchema,
    partition_names: Vec<String>,
}

impl ParquetScan {
    /// One file, without partitions.
    pub fn single(table: &StoredTable) -> Result<Self> {
        ParquetScan::new(table.schema(), vec![(table.clone(), PartitionValues::default())])
    }

    /// Files on one store whose columns are (a part of) `file_schema`, each with the values of
    /// its partition folders. The partition columns are those of the first file, as strings.
    pub fn new(file_schema: SchemaRef, files: Vec<(StoredTable, PartitionValues)>) -> Result<Self> {
        let (first, values) = files.first().ok_or_else(|| Error::internal("a scan of no files"))?;
        let store = first.store().clone();
        let partition_names: Vec<String> = values.names().map(str::to_owned).collect();
        let partitions: Vec<FieldRef> =
            partition_names.iter().map(|n| Arc::new(Field::new(n, DataType::Utf8, true))).collect();
        let columns = TableSchema::builder(file_schema).with_table_partition_cols(partitions).build();
        let url = store_url(&store)?;
        Ok(ParquetScan { store, url, files, columns, partition_names })
    }

    /// The files that `filters` may find rows in, by their partition values alone.
    fn pruned(&self, state: &dyn Session, filters: &[Expr]) -> SqlResult<Vec<&(StoredTable, PartitionValues)>> {
        let all = self.files.iter();
        let Some(filter) = conjunction(filters.iter().cloned()).filter(|_| !self.partition_names.is_empty()) else {
            return Ok(all.collect());
        };
        let schema = DFSchema::try_from(self.schema())?;
        // A filter that cannot be planned here is applied above the scan all the same.
        let Ok(predicate) = state.create_physical_expr(filter, &schema) else {
            return Ok(all.collect());
        };
        let values: Vec<&PartitionValues> = self.files.iter().map(|(_, v)| v).collect();
        let keep = may_match(&predicate, &self.schema(), &values);
        Ok(all.zip(keep).filter_map(|(f, k)| k.then_some(f)).collect())
    }
}

#[async_trait]
impl TableProvider for ParquetScan {
    fn schema(&self) -> SchemaRef {
        self.columns.table_schema().clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> SqlResult<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> SqlResult<Arc<dyn ExecutionPlan>> {
        let url: &url::Url = self.url.as_ref();
        state.runtime_env().register_object_store(url, self.store.object_store());
        let files = self.pruned(state, filters)?;
        if files.is_empty() {
            let schema = datafusion::common::project_schema(&self.schema(), projection)?;
            return Ok(Arc::new(EmptyExec::new(schema)));
        }
        let rows: u64 = files.iter().map(|(t, _)| t.num_rows()).sum();
        let mut statistics = Statistics::new_unknown(&self.schema());
        statistics.num_rows = Precision::Exact(usize::try_from(rows).unwrap_or(usize::MAX));
        let group: Vec<PartitionedFile> = files
            .into_iter()
            .map(|(table, values)| {
                let values = self.partition_names.iter().map(|n| ScalarValue::Utf8(values.get(n).map(str::to_owned)));
                PartitionedFile::new_from_meta(table.meta().clone()).with_partition_values(values.collect())
            })
            .collect();
        let format = ParquetFormat::new().with_options(state.default_table_options().parquet);
        // A filter pushed down here is not exact, so a limit may only be used without one.
        let limit = limit.filter(|_| filters.is_empty());
        let config = FileScanConfigBuilder::new(self.url.clone(), format.file_source(self.columns.clone()))
            .with_file_group(FileGroup::new(group))
            .with_statistics(statistics)
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        format.create_physical_plan(state, config).await
    }
}

/// DataFusion finds stores by scheme and authority. Stores in memory share these, so each gets
/// an authority of its own.
fn store_url(store: &Store) -> Result<ObjectStoreUrl> {
    let base = store.base_url();
    let url = match base.scheme() {
        "memory" => format!("memory://store-{:x}", Arc::as_ptr(&store.object_store()).cast::<()>() as usize),
        _ => base[..url::Position::BeforePath].to_owned(),
    };
    ObjectStoreUrl::parse(url).map_err(from_datafusion)
}
