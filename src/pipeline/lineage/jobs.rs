//! The events of one run: its own, and those of every source and stage as jobs of their own.
//!
//! In: what happened. Out: events as JSON. A stage's outputs are datasets named `PIPELINE.STAGE.OUTPUT`, the same every
//! night; what sources read and what `write` publishes have the names of their places.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde_json::{Map, Value, json};

use super::columns::{How, column_origins};
use super::config::Settings;
use super::facets::{self, Dataset, dataset_of};
use crate::error::Result;
use crate::pipeline::Pipeline;
use crate::pipeline::cache::{Cache, Record};
use crate::pipeline::events::NodePlace;
use crate::query::plan_against;
use crate::stages::StageInput;
use crate::tables::Store;

/// What a node reads.
#[derive(Clone, Debug)]
struct Read {
    slot: String,
    node: String,
    output: String,
}

/// A node of the pipeline, as far as lineage goes.
#[derive(Clone, Debug, Default)]
struct Job {
    kind: String,
    reads: Vec<Read>,
    /// Of a source: its place, and our column -> theirs.
    place: Option<(Dataset, BTreeMap<String, String>)>,
    /// Of an `sql` stage: the query.
    query: Option<String>,
}

/// Where a column comes from: dataset, field and how.
type Fields = BTreeMap<String, Vec<(Dataset, String, How)>>;

/// All jobs of a run.
pub struct Jobs {
    namespace: String,
    pipeline: String,
    run_id: String,
    parent: Option<super::config::Parent>,
    nominal: Option<Value>,
    warehouse: String,
    root: PathBuf,
    cache: Cache,
    jobs: BTreeMap<String, Job>,
    /// (node, output) -> columns, of tables that are there.
    schemas: BTreeMap<(String, String), SchemaRef>,
    /// Nodes that started and have not ended.
    open: BTreeSet<String>,
    /// Datasets of the run as a whole, as they were told of their nodes.
    inputs: Vec<Value>,
    outputs: Vec<Value>,
}

impl Jobs {
    /// For a pipeline's run. Error: the artifacts folder has no usable name.
    pub fn new(pipeline: &Pipeline, run_id: &str, settings: &Settings) -> Result<Self> {
        let mut jobs = BTreeMap::new();
        for (name, config) in &pipeline.sources {
            let place = Some((dataset_of(&config.uri, &pipeline.root), config.columns.clone()));
            jobs.insert(name.clone(), Job { kind: "source".to_owned(), place, ..Job::default() });
        }
        for stage in &pipeline.stages {
            let reads = stage.inputs.iter().map(|i| Read {
                slot: i.slot.slot.clone(),
                node: i.from.name().to_owned(),
                output: i.output.clone(),
            });
            let identity = stage.stage.identity();
            let query = identity.get("sql").and_then(Value::as_str).filter(|_| stage.kind.name == "sql");
            let job = Job {
                kind: stage.kind.name.to_owned(),
                reads: reads.collect(),
                place: None,
                query: query.map(str::to_owned),
            };
            jobs.insert(stage.name.clone(), job);
        }
        Ok(Jobs {
            namespace: settings.namespace.clone(),
            pipeline: pipeline.name.clone(),
            run_id: run_id.to_owned(),
            parent: settings.parent.clone(),
            nominal: facets::nominal_time(&crate::pipeline::summary::day(pipeline)),
            warehouse: pipeline.warehouse.clone(),
            root: pipeline.root.clone(),
            cache: Cache::new(Store::open(&pipeline.artifacts, &pipeline.root)?),
            jobs,
            schemas: BTreeMap::new(),
            open: BTreeSet::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        })
    }

    /// The run begins.
    pub fn run_started(&self, time: &str) -> Value {
        let sources = self.jobs.values().filter_map(|j| j.place.as_ref());
        let inputs = sources.map(|(dataset, _)| dataset.with(Map::new())).collect();
        facets::event("START", time, self.run(None), self.job(), inputs, Vec::new())
    }

    /// A node begins.
    pub fn started(&mut self, time: &str, place: &NodePlace) -> Value {
        self.open.insert(place.name.clone());
        let inputs = self.inputs_of(&place.name);
        facets::event("START", time, self.node_run(&place.name, None), self.node_job(&place.name), inputs, Vec::new())
    }

    /// A node has ended well.
    pub async fn ended(&mut self, time: &str, place: &NodePlace, record: Record, cached: bool) -> Value {
        self.open.remove(&place.name);
        let job = self.jobs.get(&place.name).cloned().unwrap_or_default();
        for (output, recorded) in &record.outputs {
            if recorded.what == "table"
                && let Ok(StageInput::Table(table)) = self.cache.open(&record, output).await
            {
                self.schemas.insert((place.name.clone(), output.clone()), table.schema());
            }
        }
        let mut outputs = Vec::new();
        if job.kind == "write" {
            outputs.extend(self.published(&job, &record).await);
            self.outputs.extend(outputs.iter().cloned());
        } else {
            for (output, recorded) in &record.outputs {
                let mut facets = Map::new();
                if let Some(schema) = self.schemas.get(&(place.name.clone(), output.clone())) {
                    facets.insert("schema".into(), facets::schema(schema));
                }
                let fields = self.fields(&place.name, &job, output).await;
                if !fields.is_empty() {
                    facets.insert("columnLineage".into(), column_lineage(&fields));
                }
                let folder = self.cache.folder(&record.fingerprint);
                facets.insert("dataSource".into(), facets::data_source(&self.pipeline, &folder.display("")));
                let mut dataset = self.dataset(&place.name, output).with(facets);
                if !cached {
                    let bytes = recorded.files.values().sum();
                    dataset["outputFacets"] =
                        json!({"outputStatistics": facets::output_statistics(recorded.rows, bytes)});
                }
                outputs.push(dataset);
            }
        }
        let inputs = self.inputs_of(&place.name);
        if job.place.is_some() {
            self.inputs.extend(inputs.iter().cloned());
        }
        facets::event("COMPLETE", time, self.node_run(&place.name, None), self.node_job(&place.name), inputs, outputs)
    }

    /// The run is over, and with it what had started: their events, the run's last.
    pub fn over(&mut self, time: &str, kind: &str, message: Option<&str>) -> Vec<Value> {
        // A node that is open at a good end was left out on purpose; it is told as what the run is.
        let open: Vec<String> = std::mem::take(&mut self.open).into_iter().collect();
        let mut events: Vec<Value> = open
            .iter()
            .map(|node| {
                let inputs = self.inputs_of(node);
                facets::event(kind, time, self.node_run(node, message), self.node_job(node), inputs, Vec::new())
            })
            .collect();
        let outputs = if kind == "COMPLETE" { self.outputs.clone() } else { Vec::new() };
        events.push(facets::event(kind, time, self.run(message), self.job(), self.inputs.clone(), outputs));
        events
    }

    /// Whether an event is the run's own last one.
    pub fn is_last(&self, event: &Value) -> bool {
        event["eventType"] != "START" && event["job"]["name"] == self.pipeline.as_str()
    }

    fn run(&self, message: Option<&str>) -> Value {
        let parent = self.parent.as_ref().map(|p| facets::parent(&p.namespace, &p.job, &p.run_id));
        self.run_with(&facets::uuid_of(&self.run_id), parent, message)
    }

    fn node_run(&self, node: &str, message: Option<&str>) -> Value {
        let parent = facets::parent(&self.namespace, &self.pipeline, &facets::uuid_of(&self.run_id));
        self.run_with(&facets::uuid_of(&format!("{}/{node}", self.run_id)), Some(parent), message)
    }

    fn run_with(&self, id: &str, parent: Option<Value>, message: Option<&str>) -> Value {
        let mut all = Map::new();
        all.insert("processing_engine".into(), facets::processing_engine());
        all.extend(self.nominal.clone().map(|n| ("nominalTime".to_owned(), n)));
        all.extend(parent.map(|p| ("parent".to_owned(), p)));
        all.extend(message.map(|m| ("errorMessage".to_owned(), facets::error_message(m))));
        // Joins the events with the table `runs`.
        all.insert(
            "tailfuse".into(),
            json!({
                "_producer": facets::PRODUCER,
                "_schemaURL": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunFacet",
                "runId": self.run_id,
            }),
        );
        json!({"runId": id, "facets": all})
    }

    fn job(&self) -> Value {
        json!({
            "namespace": self.namespace, "name": self.pipeline,
            "facets": {"jobType": facets::job_type("pipeline")},
        })
    }

    fn node_job(&self, node: &str) -> Value {
        let job = self.jobs.get(node).cloned().unwrap_or_default();
        let mut all = Map::new();
        all.insert("jobType".into(), facets::job_type(&job.kind));
        all.extend(job.query.as_deref().map(|q| ("sql".to_owned(), facets::sql(q))));
        json!({"namespace": self.namespace, "name": format!("{}.{node}", self.pipeline), "facets": all})
    }

    fn dataset(&self, node: &str, output: &str) -> Dataset {
        Dataset { namespace: self.namespace.clone(), name: format!("{}.{node}.{output}", self.pipeline) }
    }

    fn inputs_of(&self, node: &str) -> Vec<Value> {
        let Some(job) = self.jobs.get(node) else { return Vec::new() };
        if let Some((dataset, columns)) = &job.place {
            let mut facets = Map::new();
            if let Some(schema) = self.schemas.get(&(node.to_owned(), "rows".to_owned())) {
                facets.insert("schema".into(), facets::schema(&their_schema(schema, columns)));
            }
            return vec![dataset.with(facets)];
        }
        let mut told = BTreeSet::new();
        let once = job.reads.iter().filter(|r| told.insert((r.node.clone(), r.output.clone())));
        once.map(|read| {
            let mut facets = Map::new();
            if let Some(schema) = self.schemas.get(&(read.node.clone(), read.output.clone())) {
                facets.insert("schema".into(), facets::schema(schema));
            }
            self.dataset(&read.node, &read.output).with(facets)
        })
        .collect()
    }

    /// What a `write` stage has published: its rows are the input's.
    async fn published(&self, job: &Job, record: &Record) -> Option<Value> {
        let table = record.identity.pointer("/config/table").and_then(Value::as_str)?;
        let warehouse = dataset_of(&self.warehouse, &self.root);
        let name =
            [warehouse.name.as_str(), table].iter().filter(|p| !p.is_empty()).copied().collect::<Vec<_>>().join("/");
        let dataset = Dataset { name, ..warehouse };
        let read = job.reads.first()?;
        let mut facets = Map::new();
        if let Some(schema) = self.schemas.get(&(read.node.clone(), read.output.clone())) {
            facets.insert("schema".into(), facets::schema(schema));
            let from = self.dataset(&read.node, &read.output);
            let same =
                |f: &std::sync::Arc<Field>| (f.name().clone(), vec![(from.clone(), f.name().clone(), How::Identity)]);
            facets.insert("columnLineage".into(), column_lineage(&schema.fields().iter().map(same).collect()));
        }
        let figure = |name: &str| record.counters.get(name).and_then(Value::as_u64);
        let mut told = dataset.with(facets);
        let statistics = facets::output_statistics(figure("rows"), figure("bytes").unwrap_or(0));
        told["outputFacets"] = json!({"outputStatistics": statistics});
        Some(told)
    }

    /// Where the columns of an output come from, where that is known: of a source by its mapping, of an `sql` stage by
    /// its plan.
    async fn fields(&self, node: &str, job: &Job, output: &str) -> Fields {
        let schema = self.schemas.get(&(node.to_owned(), output.to_owned()));
        if let (Some((dataset, columns)), Some(schema), "rows") = (&job.place, schema, output) {
            let own = |f: &&std::sync::Arc<Field>| f.name() != crate::columns::ROW_ID;
            let from = |f: &std::sync::Arc<Field>| {
                let theirs = columns.get(f.name()).unwrap_or(f.name()).clone();
                (f.name().clone(), vec![(dataset.clone(), theirs, How::Identity)])
            };
            return schema.fields().iter().filter(own).map(from).collect();
        }
        let Some(query) = &job.query else { return Fields::new() };
        let mut tables: Vec<(&str, SchemaRef)> = Vec::new();
        let mut places: BTreeMap<&str, Dataset> = BTreeMap::new();
        for read in &job.reads {
            let Some(schema) = self.schemas.get(&(read.node.clone(), read.output.clone())) else {
                return Fields::new();
            };
            let name = read.slot.strip_prefix("inputs.").unwrap_or(&read.slot);
            tables.push((name, schema.clone()));
            places.insert(name, self.dataset(&read.node, &read.output));
        }
        let Ok(frame) = plan_against(&tables, query).await else { return Fields::new() };
        let mut fields = Fields::new();
        for (column, origins) in column_origins(frame.logical_plan()) {
            let from: Vec<(Dataset, String, How)> = origins
                .into_iter()
                .filter_map(|((table, field), how)| Some((places.get(table.as_str())?.clone(), field, how)))
                .collect();
            if !from.is_empty() {
                fields.insert(column, from);
            }
        }
        fields
    }
}

/// The columns of a source under the names that they have there.
fn their_schema(schema: &Schema, columns: &BTreeMap<String, String>) -> Schema {
    let own = schema.fields().iter().filter(|f| f.name() != crate::columns::ROW_ID);
    let fields: Vec<Field> = own
        .map(|f| {
            let name = columns.get(f.name()).unwrap_or(f.name());
            // Cleaned types; the files' own are not kept.
            let data_type: DataType = f.data_type().clone();
            Field::new(name, data_type, f.is_nullable())
        })
        .collect();
    Schema::new(fields)
}

fn column_lineage(fields: &Fields) -> Value {
    let told: Map<String, Value> = fields
        .iter()
        .map(|(column, from)| {
            let inputs: Vec<Value> = from
                .iter()
                .map(|(dataset, field, how)| {
                    json!({
                        "namespace": dataset.namespace,
                        "name": dataset.name,
                        "field": field,
                        "transformations": [
                            {"type": "DIRECT", "subtype": how.as_str(), "description": "", "masking": false},
                        ],
                    })
                })
                .collect();
            (column.clone(), json!({"inputFields": inputs}))
        })
        .collect();
    facets::facet("1-2-0", "ColumnLineageDatasetFacet", json!({"fields": told}))
}
