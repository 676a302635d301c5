//! The pipeline file: its language, its graph, and what is made of it.
//!
//! In: a TOML file, `--param` and `--set` arguments. Out: a [`Pipeline`] whose stages stand in
//! the order to run, or every mistake of the file with line and caret. The steps, a file each:
//! `parse` (text -> tree with places), `params` (templates), `validate` with `schema_walk`
//! (tree -> configs), `graph` (references -> order), `spec` (all of it: [`load`]).

pub mod artifact_source;
pub mod cache;
pub mod check;
pub mod cost;
pub mod current;
pub mod diagnostics;
pub mod document;
pub mod events;
pub mod fingerprint;
pub mod gc;
pub mod graph;
pub mod init;
pub mod journal;
pub mod json_schema;
pub mod lease;
pub mod lineage;
pub mod minutes;
pub mod nodes;
pub mod options;
pub mod params;
pub mod parse;
pub mod plan;
pub mod process;
pub mod reference_docs;
pub mod run;
pub mod sandbox;
pub mod schema_walk;
pub mod spec;
pub mod summary;
pub mod tables_of;
pub mod unit_diff;
pub mod unit_tests;
pub mod validate;

pub use document::Origin;
pub use graph::{BAD_ROWS, Node, ROWS, ResolvedInput, StageNode};
pub use json_schema::json_schema;
pub use reference_docs::pipeline_markdown;
pub use spec::{HistoryAtTest, LoadOptions, Pipeline, load, load_text, load_with};
