//! The tables of a pipeline by their names, as `tailfuse sql` and the examples address them.
//!
//! In: sources, stage outputs, and the warehouse of published tables. Out: a session in which
//! - a source is `NAME`;
//! - an output of a stage is `STAGE.OUTPUT`, and the stage's first output also `STAGE`;
//! - a published table is `published.NAME`, and also `NAME` where no source or stage is called
//!   so; its Hive partitions are columns of type string, and a filter on them prunes files;
//! - other folders of Parquet, such as the LLM's ledger, have the name of the folder.

use std::collections::BTreeSet;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::{MemorySchemaProvider, SchemaProvider, TableProvider};
use datafusion::common::TableReference;
use datafusion::prelude::SessionContext;
use futures::{StreamExt, TryStreamExt};

use crate::error::{Error, Result};
use crate::tables::delta;
use crate::tables::delta::At;
use crate::tables::delta::read::Snapshot;
use crate::tables::parquet::plain_type;
use crate::tables::partitions::PartitionValues;
use crate::tables::scan::ParquetScan;
use crate::tables::sql_errors::from_datafusion;
use crate::tables::{Store, StoredTable};

/// Schema of the published tables.
pub const PUBLISHED: &str = "published";
/// Files of a published table that are opened at a time.
const OPEN_AT_ONCE: usize = 16;

/// A table and what it is called.
#[derive(Clone, Debug)]
pub enum NamedTable {
    /// `NAME`.
    Source {
        /// The source's name in the pipeline file.
        name: String,
        /// Its normalised table.
        table: StoredTable,
    },
    /// `STAGE.OUTPUT`.
    Output {
        /// The stage's name in the pipeline file.
        stage: String,
        /// The output's name.
        output: String,
        /// Whether it is the stage's first output, and so also `STAGE`.
        default: bool,
        /// The table.
        table: StoredTable,
    },
}

/// Registers tables in a session.
pub struct Catalog<'a> {
    ctx: &'a SessionContext,
    bare: BTreeSet<String>,
}

impl<'a> Catalog<'a> {
    /// A catalogue of the session `ctx`.
    pub fn new(ctx: &'a SessionContext) -> Self {
        Catalog { ctx, bare: BTreeSet::new() }
    }

    /// Registers a source or a stage output.
    pub fn add(&mut self, table: &NamedTable) -> Result<()> {
        match table {
            NamedTable::Source { name, table } => self.add_bare(name, table.provider()?),
            NamedTable::Output { stage, output, default, table } => {
                let provider = table.provider()?;
                self.add_qualified(stage, output, provider.clone())?;
                match default {
                    true => self.add_bare(stage, provider),
                    false => Ok(()),
                }
            }
        }
    }

    /// Registers every published table of `warehouse`: a folder with Parquet objects below it,
    /// in Hive partitions or not. Returns their names. Call it after all [`Catalog::add`]s.
    pub async fn add_published(&mut self, warehouse: &Store) -> Result<Vec<String>> {
        let names = published_tables(warehouse).await?;
        for name in &names {
            let Some(table) = open_published(warehouse, name).await? else { continue };
            self.add_qualified(PUBLISHED, name, table.clone())?;
            if !self.bare.contains(name) {
                self.add_bare(name, table)?;
            }
        }
        Ok(names)
    }

    /// Registers the Parquet objects below `folder` of a store as the table `folder`, unless something else has that name or
    /// there are none. Call it after all [`Catalog::add`]s.
    ///
    /// # Errors
    /// Where an object cannot be read: its name and why.
    pub async fn add_folder(&mut self, store: &Store, folder: &str) -> Result<()> {
        if self.bare.contains(folder) {
            return Ok(());
        }
        match open_published(store, folder).await? {
            Some(table) => self.add_bare(folder, table),
            None => Ok(()),
        }
    }

    fn add_bare(&mut self, name: &str, provider: Arc<dyn TableProvider>) -> Result<()> {
        self.bare.insert(name.to_owned());
        self.ctx.register_table(TableReference::bare(name), provider).map(|_| ()).map_err(from_datafusion)
    }

    fn add_qualified(&self, schema: &str, name: &str, provider: Arc<dyn TableProvider>) -> Result<()> {
        let options = self.ctx.copied_config();
        let catalog = self
            .ctx
            .catalog(&options.options().catalog.default_catalog)
            .ok_or_else(|| Error::internal("the session has no catalogue"))?;
        let tables: Arc<dyn SchemaProvider> = match catalog.schema(schema) {
            Some(tables) => tables,
            None => {
                let tables = Arc::new(MemorySchemaProvider::new());
                catalog.register_schema(schema, tables.clone()).map_err(from_datafusion)?;
                tables
            }
        };
        tables.register_table(name.to_owned(), provider).map(|_| ()).map_err(from_datafusion)
    }
}

/// The names of the published tables: the first folders below the warehouse that hold Parquet.
pub async fn published_tables(warehouse: &Store) -> Result<Vec<String>> {
    let root = warehouse.path("");
    let names: BTreeSet<String> = warehouse
        .list("")
        .await?
        .iter()
        .filter(|o| o.location.as_ref().ends_with(".parquet"))
        .filter_map(|o| {
            let mut parts = o.location.prefix_match(&root)?;
            let first = parts.next()?.as_ref().to_owned();
            // A Parquet file directly in the warehouse belongs to no table.
            parts.next().map(|_| first)
        })
        .collect();
    Ok(names.into_iter().collect())
}

/// The published table `name`, all its partitions; `None` where it has no files. Columns are the
/// union over its files, so that a column that a later version added is null in older days. Of a Delta table, the files are
/// those of its latest version.
pub async fn open_published(warehouse: &Store, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
    let folder = warehouse.child(name);
    if delta::is_table(&folder).await? {
        let snapshot =
            Snapshot::open(&folder, At::Latest).await.map_err(|e| e.at(format!("published table `{name}`")))?;
        return snapshot.provider(&folder).await.map(Some);
    }
    let root = folder.path("");
    let objects = folder.list("").await?;
    let objects = objects.into_iter().filter(|o| o.size > 0 && o.location.as_ref().ends_with(".parquet"));
    let open = |meta: object_store::ObjectMeta| {
        let folder = folder.clone();
        let root = root.clone();
        async move {
            let parts = meta.location.prefix_match(&root).map(|p| p.map(|p| p.as_ref().to_owned()).collect::<Vec<_>>());
            let file = parts.unwrap_or_default().join("/");
            let values = PartitionValues::of(&root, &meta.location);
            Ok::<_, Error>((StoredTable::open_object(&folder, &file, meta).await?, values))
        }
    };
    let files: Vec<(StoredTable, PartitionValues)> =
        futures::stream::iter(objects).map(open).buffered(OPEN_AT_ONCE).try_collect().await?;
    if files.is_empty() {
        return Ok(None);
    }
    let schema = union(name, &files)?;
    Ok(Some(Arc::new(ParquetScan::new(schema, files)?)))
}

fn union(name: &str, files: &[(StoredTable, PartitionValues)]) -> Result<SchemaRef> {
    let mut fields: Vec<Field> = Vec::new();
    for (table, _) in files {
        for field in table.schema().fields() {
            let own = plain_type(field.data_type());
            match fields.iter_mut().find(|f| f.name() == field.name()) {
                None => fields.push(Field::new(field.name(), own, true)),
                Some(so_far) if *so_far.data_type() == own || own == DataType::Null => {}
                Some(so_far) if *so_far.data_type() == DataType::Null => *so_far = Field::new(field.name(), own, true),
                Some(so_far) => {
                    return Err(Error::data(format!(
                        "published table `{name}`: column `{}` has type {own} in {} and {} in another file",
                        field.name(),
                        table.display(),
                        so_far.data_type()
                    ))
                    .with_help("publish the older partitions again"));
                }
            }
        }
    }
    Ok(Arc::new(Schema::new(fields)))
}
