//! OpenLineage 2-0-2 as JSON: events, and the facets that we fill.
//!
//! In: names, schemas, counts. Out: `serde_json` values with `_producer` and `_schemaURL`. The versions are those of
//! openlineage-python 1.54, against whose classes `peers/check_lineage.py` reads a file of events.

use std::path::Path;

use arrow::datatypes::Schema;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use url::Url;

/// Who made the events.
pub const PRODUCER: &str = concat!("urn:tailfuse:", env!("CARGO_PKG_VERSION"));
const SPEC: &str = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent";
/// Characters of an error message, and of a query, that are sent.
const LONGEST: usize = 10_000;

/// A dataset's place in the lineage graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// `file`, `s3://bucket`, or the namespace of the jobs for what only stages see.
    pub namespace: String,
    /// A path, or `PIPELINE.STAGE.OUTPUT`.
    pub name: String,
}

impl Dataset {
    /// A dataset with facets.
    pub fn with(&self, facets: Map<String, Value>) -> Value {
        json!({"namespace": self.namespace, "name": self.name, "facets": facets})
    }
}

/// The dataset of a URI or path, by OpenLineage's rules for names.
pub fn dataset_of(uri: &str, root: &Path) -> Dataset {
    if let Some(table) = uri.strip_prefix(crate::catalog::SCHEME) {
        return Dataset { namespace: "catalog".to_owned(), name: table.to_owned() };
    }
    let local = |path: &Path| Dataset {
        namespace: "file".to_owned(),
        name: path.display().to_string().trim_end_matches('/').to_owned(),
    };
    match Url::parse(uri).ok().filter(|_| uri.contains("://")) {
        Some(url) if url.scheme() == "file" => local(&url.to_file_path().unwrap_or_else(|()| uri.into())),
        Some(url) => Dataset {
            // s3a is Hadoop's word for s3.
            namespace: format!("{}://{}", url.scheme().replace("s3a", "s3"), url.host_str().unwrap_or_default()),
            name: url.path().trim_matches('/').to_owned(),
        },
        None => {
            let path = root.join(uri);
            local(&std::path::absolute(&path).unwrap_or(path))
        }
    }
}

/// A facet of a version and name.
pub fn facet(version: &str, class: &str, mut body: Value) -> Value {
    if let Some(map) = body.as_object_mut() {
        map.insert("_producer".into(), PRODUCER.into());
        let url = format!("https://openlineage.io/spec/facets/{version}/{class}.json#/$defs/{class}");
        map.insert("_schemaURL".into(), url.into());
    }
    body
}

/// Names and types of columns.
pub fn schema(schema: &Schema) -> Value {
    let fields: Vec<Value> = schema
        .fields()
        .iter()
        .map(|f| json!({"name": f.name(), "type": f.data_type().to_string().to_ascii_lowercase()}))
        .collect();
    facet("1-2-0", "SchemaDatasetFacet", json!({"fields": fields}))
}

/// Rows and bytes that were written.
pub fn output_statistics(rows: Option<u64>, bytes: u64) -> Value {
    facet("1-0-2", "OutputStatisticsOutputDatasetFacet", json!({"rowCount": rows, "size": bytes}))
}

/// Where a dataset lies.
pub fn data_source(name: &str, uri: &str) -> Value {
    facet("1-0-1", "DatasourceDatasetFacet", json!({"name": name, "uri": uri}))
}

/// What the message of a failure is.
pub fn error_message(message: &str) -> Value {
    let message: String = message.chars().take(LONGEST).collect();
    facet("1-0-1", "ErrorMessageRunFacet", json!({"message": message, "programmingLanguage": "Rust"}))
}

/// The day that a run is for, from midnight to midnight (UTC); `None` where `ds` is no date.
pub fn nominal_time(ds: &str) -> Option<Value> {
    let day = chrono::NaiveDate::parse_from_str(ds, "%Y-%m-%d").ok()?;
    let next = day.succ_opt()?;
    let body = json!({
        "nominalStartTime": format!("{day}T00:00:00Z"),
        "nominalEndTime": format!("{next}T00:00:00Z"),
    });
    Some(facet("1-0-1", "NominalTimeRunFacet", body))
}

/// Us.
pub fn processing_engine() -> Value {
    let version = env!("CARGO_PKG_VERSION");
    let body = json!({"version": version, "name": "tailfuse", "openlineageAdapterVersion": version});
    facet("1-1-1", "ProcessingEngineRunFacet", body)
}

/// The run above.
pub fn parent(namespace: &str, job: &str, run_id: &str) -> Value {
    let body = json!({"run": {"runId": run_id}, "job": {"namespace": namespace, "name": job}});
    facet("1-2-0", "ParentRunFacet", body)
}

/// What sort of job it is: `PIPELINE`, or a stage's kind in capitals.
pub fn job_type(kind: &str) -> Value {
    let body = json!({"processingType": "BATCH", "integration": "TAILFUSE", "jobType": kind.to_ascii_uppercase()});
    facet("2-0-4", "JobTypeJobFacet", body)
}

/// The query of an `sql` stage.
pub fn sql(query: &str) -> Value {
    let query: String = query.chars().take(LONGEST).collect();
    facet("1-1-0", "SQLJobFacet", json!({"query": query, "dialect": "datafusion"}))
}

/// An event. `job` and `run` come with their facets.
pub fn event(kind: &str, time: &str, run: Value, job: Value, inputs: Vec<Value>, outputs: Vec<Value>) -> Value {
    json!({
        "eventType": kind,
        "eventTime": time,
        "run": run,
        "job": job,
        "inputs": inputs,
        "outputs": outputs,
        "producer": PRODUCER,
        "schemaURL": SPEC,
    })
}

/// A UUID (version 8: of our own making) that is the same for the same text: run and stage.
pub fn uuid_of(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Whether a text has the form of a UUID.
pub fn is_uuid(text: &str) -> bool {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    lengths == [8, 4, 4, 4, 12] && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_datasets() {
        let of = |uri: &str| {
            let found = dataset_of(uri, Path::new("/data"));
            (found.namespace, found.name)
        };
        assert_eq!(of("events/"), ("file".into(), "/data/events".into()));
        assert_eq!(of("file:///x/y.parquet"), ("file".into(), "/x/y.parquet".into()));
        assert_eq!(of("s3://lake/events/"), ("s3://lake".into(), "events".into()));
        assert_eq!(of("s3a://lake/events"), ("s3://lake".into(), "events".into()));
        assert_eq!(of("catalog:ml-100k/items"), ("catalog".into(), "ml-100k/items".into()));
    }

    #[test]
    fn uuids_are_stable() {
        assert!(is_uuid(&uuid_of("a")) && uuid_of("a") != uuid_of("b") && uuid_of("a") == uuid_of("a"));
        assert!(!is_uuid("20261124T061200Z-1a2b3c"));
        assert!(nominal_time("2026-12-31").unwrap()["nominalEndTime"] == "2027-01-01T00:00:00Z");
        assert!(nominal_time("today").is_none());
    }
}
