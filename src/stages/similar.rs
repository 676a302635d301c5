//! `kind = "similar"`: the most similar users (or items) by the cosine of their embeddings, eq. 4
//! of arXiv 2401.13870.
//!
//! In: `embeddings`, a table with an id and `embedding`. Out: `neighbours`. The work is the table
//! function `top_similar`, run by DataFusion as an analyst would run it.

use async_trait::async_trait;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::{InputSlot, OutputSlot, OutputTable, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::columns::{EMBEDDING, ITEM_ID, NEIGHBOUR_ID, RANK, SIMILARITY, USER_ID};
use crate::error::{Error, Result};
use crate::query::top_similar::TOP_SIMILAR;
use crate::query::{open_session, plan_query, register};
use crate::tables::SqlMemory;
use crate::tables::sql_errors::from_datafusion;

/// Config of a `similar` stage.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SimilarConfig {
    /// Table of embeddings: `user_id` or `item_id`, and `embedding`; for example the user table
    /// of a `train` stage.
    pub embeddings: String,
    /// Neighbours for each row, best first. The paper uses the most similar one (1).
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub n: u32,
    /// Leaves out neighbours with a smaller cosine, -1 to 1. By default none is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1.0, max = 1.0))]
    pub min_similarity: Option<f64>,
}

fn one() -> u32 {
    1
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "similar",
    version: 1,
    about: "Finds the most similar users by the cosine of their embeddings.",
    sample: "embeddings = \"lightgcn.users\"\nn = 1\n",
    schema: || schema_for!(SimilarConfig),
    resolve,
};

const NEIGHBOURS: OutputSlot = OutputSlot {
    name: "neighbours",
    what: What::Table,
    about: "The id, `neighbour_id`, `rank` (from 1) and `similarity`, ordered by id and rank.",
};
const SLOT: &str = "embeddings";

fn resolve(config: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: SimilarConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `similar` stage").because(e))?;
    if config.min_similarity.is_some_and(f64::is_nan) {
        return Err(Error::spec("`min_similarity` is not a number"));
    }
    Ok(Box::new(SimilarStage { config }))
}

struct SimilarStage {
    config: SimilarConfig,
}

#[async_trait]
impl Stage for SimilarStage {
    fn inputs(&self) -> Vec<InputSlot> {
        vec![InputSlot::table(SLOT, &self.config.embeddings, &[EMBEDDING])]
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![NEIGHBOURS]
    }

    fn identity(&self) -> Value {
        json!({ "n": self.config.n, "min_similarity": self.config.min_similarity })
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        ctx.cancel.check()?;
        let table = ctx.table(SLOT)?;
        let id = [USER_ID, ITEM_ID].into_iter().find(|c| table.schema().index_of(c).is_ok()).ok_or_else(|| {
            Error::data(format!("{} has neither `{USER_ID}` nor `{ITEM_ID}`", table.display()))
                .with_help("name a table of embeddings, such as the `users` output of a `train` stage")
        })?;
        let memory = SqlMemory { limit: ctx.memory_limit, spill_dir: ctx.spill_dir.clone() };
        let session = open_session(&memory)?;
        register(&session, SLOT, table)?;
        let enough = match self.config.min_similarity {
            Some(least) => format!("where {SIMILARITY} >= {least:?}"),
            None => String::new(),
        };
        let sql = format!(
            "select {id}, {NEIGHBOUR_ID}, {RANK}, {SIMILARITY} from {TOP_SIMILAR}('{SLOT}', {}) {enough} order by {id}, {RANK}",
            self.config.n
        );
        let frame = plan_query(&session, &sql).await?;
        let stream = frame.execute_stream().await.map_err(from_datafusion)?;
        let mut result = StageResult::default().with_counter("rows_in", table.num_rows());
        result.tables.insert(NEIGHBOURS.name, OutputTable::Stream(stream));
        Ok(result)
    }
}
