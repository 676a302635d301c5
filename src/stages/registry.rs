//! All stage kinds, ordered and greppable. Adding one: a file, a `pub mod` line, an entry here.

use schemars::Schema;

use super::context::{ResolveContext, Stage};
use crate::error::Result;

/// One stage kind.
pub struct StageKind {
    /// `kind = "..."` in the pipeline file; also the file's name in `src/stages/`.
    pub name: &'static str,
    /// Raise it when the same config and inputs would give another result: old artifacts are no longer used then.
    pub version: u32,
    /// One line for the docs.
    pub about: &'static str,
    /// A config that parses (without `kind`), for the docs and the meta-tests.
    pub sample: &'static str,
    /// JSON Schema of the config, from the same type that `resolve` reads.
    pub schema: fn() -> Schema,
    /// Config (already checked against `schema`) -> stage. Errors are about values only.
    pub resolve: fn(toml: serde_json::Value, ctx: &ResolveContext<'_>) -> Result<Box<dyn Stage>>,
}

/// The stage kinds in the order of the docs.
pub static KINDS: &[StageKind] = &[
    super::sql::KIND,
    super::split::KIND,
    super::search::KIND,
    super::train::KIND,
    super::recommend::KIND,
    super::popular::KIND,
    super::predict::KIND,
    super::similar::KIND,
    super::prompt::KIND,
    super::prompt_ratings::KIND,
    super::instruct::KIND,
    super::finetune::KIND,
    super::rerank::KIND,
    super::train_items::KIND,
    super::rerank_items::KIND,
    super::calibrate::KIND,
    super::fuse::KIND,
    super::evaluate::KIND,
    super::audit::KIND,
    super::write::KIND,
    super::write_artifact::KIND,
];

/// The kind of that name.
pub fn find(name: &str) -> Option<&'static StageKind> {
    KINDS.iter().find(|k| k.name == name)
}
