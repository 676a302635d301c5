//! The tables of a pipeline for `tailfuse sql`: sources, stage outputs, published tables.
//!
//! In: a pipeline. Out: a DataFusion session in which everything that is there has its name, and
//! the names of what is not there yet.

use super::Pipeline;
use super::cache::Cache;
use super::graph::ROWS;
use super::nodes::Surroundings;
use super::plan::plan;
use super::run::RunOptions;
use crate::error::Result;
use crate::llm::ledger::LEDGER;
use crate::llm::ledger::orders::ORDERS;
use crate::query::{Catalog, NamedTable, open_session};
use crate::stages::StageInput;
use crate::tables::{SqlMemory, Store};

/// A session over the pipeline's tables, and the sources and stages whose result is not in the cache.
pub async fn session(
    pipeline: &Pipeline,
    around: &Surroundings,
) -> Result<(datafusion::prelude::SessionContext, Vec<String>)> {
    let memory = SqlMemory { limit: pipeline.memory_limit, spill_dir: pipeline.spill_dir.clone() };
    let ctx = open_session(&memory)?;
    let cache = Cache::new(Store::open(&pipeline.artifacts, &pipeline.root)?);
    let mut catalog = Catalog::new(&ctx);
    let mut missing = Vec::new();
    for node in plan(pipeline, around, &RunOptions::default()).await? {
        let Some(record) = &node.record else {
            // What publishes in every run is found in the warehouse.
            if !node.kind.starts_with("write") {
                missing.push(node.name);
            }
            continue;
        };
        let default = match pipeline.stage(&node.name) {
            Some(stage) => stage.outputs.first().map(|o| o.name),
            None => Some(ROWS),
        };
        for (output, recorded) in &record.outputs {
            if recorded.what != "table" {
                continue;
            }
            if let StageInput::Table(table) = cache.open(record, output).await? {
                let default = default == Some(output.as_str());
                let stage = node.name.clone();
                catalog.add(&NamedTable::Output { stage, output: output.clone(), default, table })?;
            }
        }
    }
    catalog.add_published(&Store::open(&pipeline.warehouse, &pipeline.root)?).await?;
    let artifacts = Store::open(&pipeline.artifacts, &pipeline.root)?;
    for folder in [LEDGER, ORDERS] {
        // A run may merge segments between the list and the look at them; a damaged one must not keep the other tables away.
        let mut tried = catalog.add_folder(&artifacts, folder).await;
        for _ in 0..2 {
            if tried.is_err() {
                tried = catalog.add_folder(&artifacts, folder).await;
            }
        }
        if let Err(error) = tried {
            missing.push(format!("{folder} ({})", error.message));
        }
    }
    Ok((ctx, missing))
}
