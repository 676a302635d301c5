//! SQL over our tables: the session, what is registered in it, and our own functions.
//!
//! In: [`StoredTable`](crate::tables::StoredTable)s and published tables, SQL text. Out: rows
//! (as a stream, or written as a table, CSV, JSON or Parquet). Only statements that read are
//! ever run.

pub mod catalog;
pub mod cosine_similarity;
pub mod library;
pub mod neighbours;
pub mod output;
pub mod read_only;
pub mod session;
pub mod top_similar;

pub use catalog::{Catalog, NamedTable};
pub use output::{Format, write_rows};
pub use read_only::plan_query;
pub use session::{open_session, parse_bytes, plan_against, register};
