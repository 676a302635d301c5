//! Parquet on a store: tables that are written once and read in row order or scanned.

use arrow::datatypes::SchemaRef;

use crate::error::Result;
use crate::tables::{Store, Table};

/// A Parquet file on a store; row order is the file's.
#[derive(Clone, Debug)]
pub struct StoredTable {
    store: Store,
    file: String,
    schema: SchemaRef,
    rows: u64,
}

impl StoredTable {
    /// All rows in file order.
    pub async fn collect(&self) -> Result<Table> {
        todo!()
    }
}
