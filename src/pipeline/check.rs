//! What `validate` checks beyond the file itself: columns along the DAG, SQL planned against
//! declared schemas, storage reachable. Nothing runs and nothing is fetched.
//!
//! In: a parsed pipeline. Out: what was checked and what could not be, as lines.

use std::collections::BTreeMap;

use arrow::datatypes::SchemaRef;

use super::Pipeline;
use super::artifact_source;
use super::nodes::{Surroundings, source_store};
use super::run::check_columns;
use crate::error::{Fault, Result};
use crate::stages::What;
use crate::tables::Store;
use crate::tables::source::source_schema;

/// What was checked.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// One line per thing that could not be checked, and per store that answered.
    pub lines: Vec<String>,
    /// How many tables have a known schema.
    pub schemas: usize,
}

/// Checks storage, sources and the schemas of all stages in topological order.
pub async fn check(pipeline: &Pipeline, around: &Surroundings) -> Result<Checked> {
    let mut checked = Checked::default();
    for (what, uri) in [("artifacts", &pipeline.artifacts), ("warehouse", &pipeline.warehouse)] {
        let store = Store::open(uri, &pipeline.root)?;
        // A look at one object is enough to know that the store answers.
        store.head("tailfuse-validate").await.map_err(|e| e.at(format!("`{what}`")))?;
        checked.lines.push(format!("{what}: {} answers", store.display("")));
    }
    // (node, output) -> schema
    let mut schemas: BTreeMap<(String, String), SchemaRef> = BTreeMap::new();
    for (name, config) in &pipeline.sources {
        match source_store(pipeline, config, around, None).await? {
            Some(store) if artifact_source::is_artifact(config) => {
                if let Err(e) = artifact_source::find(name, config, &store).await {
                    match e.fault {
                        Fault::Data => checked.lines.push(e.to_string()),
                        _ => return Err(e),
                    }
                }
            }
            None => checked.lines.push(format!("source `{name}`: not fetched yet, its columns are not checked")),
            Some(store) => {
                let schema = source_schema(name, config, &store).await?;
                schemas.insert((name.clone(), "rows".to_owned()), schema);
            }
        }
    }
    for stage in &pipeline.stages {
        let mut inputs = BTreeMap::new();
        let mut unknown = Vec::new();
        for input in stage.inputs.iter().filter(|i| i.slot.what == What::Table) {
            match schemas.get(&(input.from.name().to_owned(), input.output.clone())) {
                None => unknown.push(input.slot.reference.clone()),
                Some(schema) => {
                    check_columns(&input.slot.slot, &input.slot.reference, &input.slot.columns, schema)
                        .map_err(|e| e.at(format!("stage `{}`", stage.name)))?;
                    inputs.insert(input.slot.slot.clone(), schema.clone());
                }
            }
        }
        if !unknown.is_empty() {
            let unknown = unknown.join("`, `");
            checked.lines.push(format!("stage `{}`: the columns of `{unknown}` are not known yet", stage.name));
        }
        let planned = stage.stage.plan_schemas(&inputs).await.map_err(|e| e.at(format!("stage `{}`", stage.name)))?;
        for (output, schema) in planned {
            schemas.insert((stage.name.clone(), output), schema);
        }
    }
    checked.schemas = schemas.len();
    Ok(checked)
}
