//! The published files, read by DuckDB or pyarrow, give the metrics that `evaluate` reported.

use std::process::Command;

use crate::fixtures::{World, stage};

/// A Python that has one of the readers: `TAILFUSE_TEST_PYTHON`, else `python3`.
fn python_with_a_reader() -> Option<String> {
    let python = std::env::var("TAILFUSE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has = |module: &str| {
        let output = Command::new(&python).args(["-c", &format!("import {module}")]).output();
        output.is_ok_and(|o| o.status.success())
    };
    (has("duckdb") || has("pyarrow")).then_some(python)
}

#[test]
fn another_reader_finds_the_same_metrics() {
    let Some(python) = python_with_a_reader() else {
        eprintln!("SKIPPED: no Python with duckdb or pyarrow (`pip install duckdb`)");
        return;
    };
    let world = World::new();
    let document = world.run(&["pipeline.toml"]);
    let parts = stage(&document, "parts")["fingerprint"].as_str().unwrap().to_owned();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/read_export.py");
    let output = Command::new(&python)
        .arg(script)
        .arg("--export")
        .arg(world.path("warehouse/recommendations"))
        .arg("--test")
        .arg(world.path("artifacts").join(parts).join("test.parquet"))
        .args(["--k", "3", "5"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(theirs["problems"], serde_json::json!([]));

    let ours =
        world.sql("select bucket, metric, value, n from quality.metrics where system = 'fused' and users = 'all'");
    let mut compared = 0;
    for row in &ours {
        let metric = row["metric"].as_str().unwrap().to_lowercase();
        let bucket = row["bucket"].as_str().unwrap_or("all");
        let part = if bucket == "all" { &theirs["metrics"] } else { &theirs["by_bucket"][bucket] };
        // The world exports five items a user, so a cut-off of ten says nothing here.
        let Some(value) = part[&metric].as_f64() else { continue };
        assert!((value - row["value"].as_f64().unwrap()).abs() < 1e-12, "{bucket} {metric}: {value} and {row}");
        compared += 1;
    }
    assert!(compared >= 4, "only {compared} figures were compared: {ours:?}");
}
