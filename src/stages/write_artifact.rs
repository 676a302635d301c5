//! `write_artifact`: publishes an artifact in the warehouse, where another pipeline reads it as a source.
//!
//! In: an artifact. Out: one object put whole, or a folder whose `artifact.json` is put last
//! ([`crate::tables::artifact_files`]). `published` says what was written.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Int64Array, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::audit;
use super::context::{InputSlot, OutputSlot, ResolveContext, Stage, StageContext, StageResult, What};
use super::registry::StageKind;
use crate::error::{Error, Result};
use crate::tables::{Table, artifact_files};

/// Config of a `write_artifact` stage.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WriteArtifactConfig {
    /// The artifact to publish, for example `calibration` or `recommender.model`.
    pub input: String,
    /// Where, below the warehouse. An artifact of one file whose ending is that of `path` is that file
    /// (`"calibration/calibration.json"`), any other one a folder (`"models/recommender"`). What was there is replaced at
    /// once. Another pipeline reads it as a source with `role = "artifact"`.
    #[schemars(length(min = 1))]
    pub path: String,
    /// `audit` stages: where an audit of one of them failed nothing is published, and the run ends with exit code 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub audits: Vec<String>,
}

/// The stage kind.
pub(super) const KIND: StageKind = StageKind {
    name: "write_artifact",
    version: 1,
    about: "Publishes an artifact, such as a calibration or a model, in the warehouse for other pipelines.",
    sample: "input = \"calibration\"\npath = \"calibration/calibration.json\"\n",
    schema: || schema_for!(WriteArtifactConfig),
    resolve,
};

const PUBLISHED: OutputSlot = OutputSlot {
    name: "published",
    what: What::Table,
    about: "One row: `path`, `uri`, `files`, `bytes`, `sha256` (over names and contents).",
};
const SLOT: &str = "input";

fn resolve(config: Value, _: &ResolveContext<'_>) -> Result<Box<dyn Stage>> {
    let config: WriteArtifactConfig =
        serde_json::from_value(config).map_err(|e| Error::spec("the config of a `write_artifact` stage").because(e))?;
    let safe = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '=' | ':' | '+');
    let part = |p: &str| !p.is_empty() && p.chars().all(safe) && !p.chars().all(|c| c == '.');
    if !config.path.split('/').all(part) {
        return Err(Error::spec(format!("`path` is `{}`, which is no place below the warehouse", config.path))
            .with_help("write names with `/` between them: letters, digits and _ - . = : +"));
    }
    Ok(Box::new(WriteArtifact { config }))
}

struct WriteArtifact {
    config: WriteArtifactConfig,
}

impl WriteArtifact {
    fn audits(&self) -> impl Iterator<Item = (String, &str)> {
        self.config.audits.iter().enumerate().map(|(n, stage)| (format!("audits.{n}"), stage.as_str()))
    }
}

fn ending(name: &str) -> Option<&str> {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.rsplit_once('.').map(|(_, ending)| ending)
}

#[async_trait]
impl Stage for WriteArtifact {
    fn inputs(&self) -> Vec<InputSlot> {
        let mut slots = vec![InputSlot::artifact(SLOT, &self.config.input)];
        slots.extend(self.audits().map(|(slot, stage)| InputSlot::table(&slot, stage, &audit::COLUMNS)));
        slots
    }

    fn outputs(&self) -> Vec<OutputSlot> {
        vec![PUBLISHED]
    }

    fn identity(&self) -> Value {
        json!({ "path": self.config.path })
    }

    /// It acts on the outside.
    fn cacheable(&self) -> bool {
        false
    }

    fn publishes(&self) -> Option<String> {
        Some(self.config.path.clone())
    }

    async fn plan_schemas(&self, _: &BTreeMap<String, SchemaRef>) -> Result<BTreeMap<String, SchemaRef>> {
        let text = |name: &str| Field::new(name, DataType::Utf8, false);
        let count = |name: &str| Field::new(name, DataType::Int64, false);
        let fields = vec![text("path"), text("uri"), count("files"), count("bytes"), text("sha256")];
        Ok(BTreeMap::from([(PUBLISHED.name.to_owned(), Arc::new(Schema::new(fields)) as SchemaRef)]))
    }

    async fn run(&self, ctx: &StageContext) -> Result<StageResult> {
        ctx.cancel.check()?;
        for (slot, stage) in self.audits() {
            audit::refuse(stage, &ctx.table(&slot)?.display(), &ctx.collect(&slot).await?)?;
        }
        let (digest, artifact) = ctx.artifact(SLOT)?;
        let path = self.config.path.as_str();
        let one = artifact
            .files
            .iter()
            .next()
            .filter(|(name, _)| artifact.files.len() == 1 && ending(path).is_some_and(|e| ending(name) == Some(e)));
        if let Some(claim) = ctx.publishing.claim.as_ref().filter(|_| !ctx.publishing.dry) {
            claim.check().await?;
        }
        match one {
            _ if ctx.publishing.dry => {}
            Some((_, bytes)) => artifact_files::put_file(&ctx.warehouse, path, bytes.clone()).await?,
            None => artifact_files::put_folder(&ctx.warehouse.child(path), &ctx.run_id, &artifact.files).await?,
        }
        let bytes = artifact.files.values().map(|b| b.len() as i64).sum::<i64>();
        let uri = ctx.warehouse.display(path);
        let said = if ctx.publishing.dry { "not published:" } else { "published" };
        ctx.observer.note(&format!("{said} {uri}"));
        let count = |n: i64| Arc::new(Int64Array::from(vec![n]));
        let text = |t: &str| Arc::new(StringArray::from(vec![t]));
        let published = Table::from_columns(vec![
            ("path", text(path), false),
            ("uri", text(&uri), false),
            ("files", count(artifact.files.len() as i64), false),
            ("bytes", count(bytes), false),
            ("sha256", text(digest), false),
        ])?;
        Ok(StageResult::default().with_table(PUBLISHED.name, published).with_counter("bytes", bytes))
    }
}
