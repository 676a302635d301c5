//! The stage kinds: glue from config and tables to the modules that do the work.
//!
//! A stage is a pure function: named inputs + its own config + a seed -> named output
//! tables and artifacts. It does not know other stages, or where its inputs came from.
//! In: [`StageContext`]. Out: [`StageResult`]. Adding a kind: one file here, one `pub mod`
//! line and one entry in [`registry::KINDS`].

pub mod audit;
pub mod calibrate;
pub mod context;
pub mod evaluate;
pub mod finetune;
pub mod fuse;
pub mod instruct;
pub mod popular;
pub mod predict;
pub mod prompt;
pub mod prompt_ratings;
pub mod recommend;
pub mod registry;
pub mod rerank;
pub mod rerank_items;
pub mod search;
pub mod similar;
pub mod split;
pub mod sql;
pub mod train;
pub mod train_items;
pub mod write;
pub mod write_artifact;

pub use context::{
    Artifact, Claim, InputSlot, ModelFile, Observer, OutputSlot, OutputTable, Publishing, ResolveContext, Stage,
    StageContext, StageInput, StageResult, What,
};
pub use registry::{KINDS, StageKind};
