//! Stage kinds without work behind them, to test the pipeline file's language by itself.

use std::collections::BTreeMap;

use async_trait::async_trait;
use schemars::{JsonSchema, Schema, schema_for};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tailfuse::error::{Error, Result};
use tailfuse::stages::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageKind, StageResult, What};

/// The fake kinds.
pub static FAKES: &[StageKind] = &[
    StageKind {
        name: "sql",
        version: 1,
        about: "Runs a query.",
        sample: "inputs = { log = \"log\" }\nsql = \"select * from log\"",
        schema: || schema_for!(Sql),
        resolve: |json, _| resolve::<Sql>(json),
    },
    StageKind {
        name: "split",
        version: 1,
        about: "Splits a log | in parts.",
        sample: "input = \"log\"",
        schema: || schema_for!(Split),
        resolve: |json, _| resolve::<Split>(json),
    },
    StageKind {
        name: "train",
        version: 1,
        about: "Trains a recommender.",
        sample: "model = \"mf\"\ntrain = \"parts.train\"\n[hyper]\nlayers = 2",
        schema: || schema_for!(Train),
        resolve: |json, _| resolve::<Train>(json),
    },
    StageKind {
        name: "recommend",
        version: 1,
        about: "Makes shortlists.",
        sample: "model = \"lightgcn\"\nseen = \"parts.train\"",
        schema: || schema_for!(Recommend),
        resolve: |json, _| resolve::<Recommend>(json),
    },
    StageKind {
        name: "write",
        version: 1,
        about: "Publishes a table.",
        sample: "input = \"fused\"\ntable = \"recommendations\"",
        schema: || schema_for!(Write),
        resolve: |json, _| resolve::<Write>(json),
    },
];

trait Fake: DeserializeOwned + Serialize + Send + Sync + 'static {
    fn inputs(&self) -> Vec<InputSlot>;
    fn outputs(&self) -> Vec<OutputSlot>;
    fn refuse(&self) -> Option<Error> {
        None
    }
}

struct FakeStage<T>(T);

#[async_trait]
impl<T: Fake> Stage for FakeStage<T> {
    fn inputs(&self) -> Vec<InputSlot> {
        self.0.inputs()
    }
    fn outputs(&self) -> Vec<OutputSlot> {
        self.0.outputs()
    }
    fn identity(&self) -> Value {
        serde_json::to_value(&self.0).unwrap()
    }
    async fn run(&self, _: &StageContext) -> Result<StageResult> {
        Ok(StageResult::default())
    }
}

fn resolve<T: Fake>(json: Value) -> Result<Box<dyn Stage>> {
    let config: T = serde_json::from_value(json).map_err(|e| Error::spec("config").because(e))?;
    match config.refuse() {
        Some(error) => Err(error),
        None => Ok(Box::new(FakeStage(config))),
    }
}

fn table(name: &'static str) -> OutputSlot {
    OutputSlot { name, what: What::Table, about: "A table." }
}

/// A query.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Sql {
    /// Name in the query = reference.
    inputs: BTreeMap<String, String>,
    /// The query.
    sql: Option<String>,
    /// A file with the query.
    file: Option<String>,
}

impl Fake for Sql {
    fn inputs(&self) -> Vec<InputSlot> {
        self.inputs.iter().map(|(k, v)| InputSlot::table(&format!("inputs.{k}"), v, &[])).collect()
    }
    fn outputs(&self) -> Vec<OutputSlot> {
        vec![table("rows")]
    }
    fn refuse(&self) -> Option<Error> {
        let file = self.file.as_ref()?;
        Some(Error::spec(format!("there is no file `{file}`")).with_help("SQL files lie under `sql/`"))
    }
}

/// A split.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Split {
    /// The log that is split.
    input: String,
    /// How it is split.
    #[serde(default)]
    strategy: Strategy,
    /// Users with fewer interactions are not evaluated.
    #[serde(default = "three")]
    #[schemars(range(min = 3, max = 1000))]
    min_interactions: u32,
}

fn three() -> u32 {
    3
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Strategy {
    /// The last interaction is the test.
    #[default]
    LeaveOneOut,
    /// Everything after a moment is the test.
    GlobalTime,
}

impl Fake for Split {
    fn inputs(&self) -> Vec<InputSlot> {
        vec![InputSlot::table("input", &self.input, &["user_id", "item_id"])]
    }
    fn outputs(&self) -> Vec<OutputSlot> {
        vec![table("train"), table("valid"), table("test")]
    }
}

/// A training.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Train {
    /// The backbone.
    model: Backbone,
    /// Training interactions.
    train: String,
    /// Validation interactions.
    valid: Option<String>,
    /// Hyper-parameters.
    #[serde(default)]
    hyper: Hyper,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Backbone {
    Mf,
    LightGcn,
}

/// Hyper-parameters.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Hyper {
    /// Propagation layers.
    #[schemars(range(min = 1, max = 8))]
    layers: u32,
    /// Length of an embedding.
    embedding_dim: u32,
    /// Step length of the optimizer.
    learning_rate: f64,
}

impl Default for Hyper {
    fn default() -> Self {
        Hyper { layers: 3, embedding_dim: 64, learning_rate: 1e-3 }
    }
}

impl Fake for Train {
    fn inputs(&self) -> Vec<InputSlot> {
        let mut inputs = vec![InputSlot::table("train", &self.train, &[])];
        inputs.extend(self.valid.iter().map(|v| InputSlot::table("valid", v, &[])));
        inputs
    }
    fn outputs(&self) -> Vec<OutputSlot> {
        vec![OutputSlot { name: "model", what: What::Artifact, about: "The weights." }, table("curve")]
    }
}

/// Shortlists.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Recommend {
    /// A trained model.
    model: String,
    /// What is not recommended again.
    seen: String,
    /// Items per user.
    #[serde(default = "twenty")]
    k: usize,
}

fn twenty() -> usize {
    20
}

impl Fake for Recommend {
    fn inputs(&self) -> Vec<InputSlot> {
        vec![InputSlot::artifact("model", &self.model), InputSlot::table("seen", &self.seen, &[])]
    }
    fn outputs(&self) -> Vec<OutputSlot> {
        vec![table("shortlist")]
    }
}

/// A publication.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Write {
    /// What is published.
    input: String,
    /// Under which name.
    table: String,
    /// Partition value.
    ds: Option<String>,
}

impl Fake for Write {
    fn inputs(&self) -> Vec<InputSlot> {
        vec![InputSlot::table("input", &self.input, &[])]
    }
    fn outputs(&self) -> Vec<OutputSlot> {
        Vec::new()
    }
}
