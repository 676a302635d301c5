//! Tables: Arrow in memory, Parquet on an object store, the readers of sources.
//!
//! In: URIs and source specs. Out: [`Table`]s (in memory), [`StoredTable`]s (Parquet
//! that can be collected in row order or scanned by DataFusion).

pub mod ids;
pub mod memory;
pub mod parquet;
pub mod schemas;
pub mod source;
pub mod source_config;
pub mod store;

pub use ids::{Id, IdColumn};
pub use memory::Table;
pub use parquet::StoredTable;
pub use source_config::SourceConfig;
pub use store::Store;
