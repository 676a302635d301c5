//! The result document: the last line of stdout, and the file that `--result` names.
//!
//! In: a run's report or its error. Out: one JSON object; its fields are a contract
//! (`docs/operations.md`), new ones may come, none may go.

use serde_json::{Map, Value, json};

use crate::error::{Error, Fault};
use crate::pipeline::Pipeline;
use crate::pipeline::artifact_source::warning;
use crate::pipeline::run::RunReport;

/// The document of a run that ended well.
pub fn success(pipeline: &Pipeline, report: &RunReport, metrics: Vec<Value>, tables: Vec<Value>) -> Value {
    let stages: Vec<Value> = report
        .nodes
        .iter()
        .map(|n| {
            let rows: Map<String, Value> =
                n.record.outputs.iter().filter_map(|(k, o)| Some((k.clone(), json!(o.rows?)))).collect();
            json!({
                "name": n.name,
                "kind": n.kind,
                "cached": n.cached,
                "seconds": (n.record.seconds * 1000.0).round() / 1000.0,
                "fingerprint": n.record.fingerprint,
                "rows": rows,
                "counters": n.record.counters,
            })
        })
        .collect();
    let warnings: Vec<&str> = report.nodes.iter().filter_map(|n| warning(&n.record)).collect();
    json!({
        "status": "ok",
        "exit_code": 0,
        "pipeline": pipeline.name,
        "run_id": report.run_id,
        "started_at": report.started_at,
        "seconds": (report.seconds * 1000.0).round() / 1000.0,
        "params": pipeline.params,
        "history_at_test": pipeline.history_at_test,
        "warnings": warnings,
        "metrics": metrics,
        "tables": tables,
        "stages": stages,
    })
}

/// The document of a run that failed.
pub fn failure(pipeline: &str, run_id: &str, error: &Error) -> Value {
    json!({
        "status": if error.fault == Fault::NothingToDo { "skipped" } else { "failed" },
        "exit_code": error.fault.exit_code(),
        "pipeline": pipeline,
        "run_id": run_id,
        "error": {
            "code": error.fault.code(),
            "message": error.message,
            "help": error.help,
            "retry": error.fault.retryable(),
        },
    })
}
