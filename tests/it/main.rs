//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

// The generated reference of tables against the code.
mod docs_tables;
// Metrics of hand-made tables, the choice of weights, the terminal's tables.
mod evaluation;
// The fused table: every column, source and reason.
mod fusion;
// `calibrate`, `fuse` and `evaluate` over Parquet files; the long-tail query against the code.
mod fusion_stages;
