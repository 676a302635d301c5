//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

// Damaged Parquet files are named, and never cause a panic.
mod corrupt_tables;
// SQL: functions, shipped files, the names of tables, errors, output, and the stages on it.
mod query_sql;
// `top_similar` as SQL and as a stage.
mod similar;
// Sources: types, partitions, bad rows, repeats.
mod sources;
// What the tests of tables share.
mod table_support;
