//! Tables: Arrow in memory, Parquet on an object store, the readers of sources.
//!
//! In: URIs and source specs. Out: [`Table`]s (in memory), [`StoredTable`]s (Parquet
//! that can be collected in row order or scanned by DataFusion).

pub mod artifact_files;
mod cleaning;
mod csv;
pub mod delta;
pub mod ids;
pub mod memory;
pub mod object_io;
pub mod parquet;
pub mod partitions;
pub mod peek;
mod repeats;
mod s3;
pub mod scan;
pub mod schemas;
pub mod source;
pub mod source_config;
mod source_files;
mod source_listing;
mod source_plan;
mod source_tally;
pub mod sql_errors;
pub mod sql_memory;
pub mod store;
pub mod store_errors;

pub use ids::{Id, IdColumn};
pub use memory::Table;
pub use parquet::StoredTable;
pub use source::{SourceReport, SourceTarget, read_source, source_objects};
pub use source_config::SourceConfig;
pub use sql_memory::SqlMemory;
pub use store::Store;
