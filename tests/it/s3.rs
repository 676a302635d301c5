//! Sources and published tables on a real S3 server, driven by the binary.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array};

use crate::delta::{TOP, ask_python, log_columns, python};
use crate::fixtures::{World, stage, write_parquet};
use crate::s3_server::{KEY, S3Server, SECRET};

fn world_on(server: &S3Server) -> World {
    let mut world = World::empty();
    world.variables = server.variables();
    // Nothing of the machine's own profiles.
    world.variables.push(("HOME".into(), world.path("home").display().to_string()));
    world
}

/// The pipeline with everything on `s3://lake`.
fn on_s3() -> String {
    let places = "artifacts = \"s3://lake/artifacts\"\nwarehouse = \"s3://lake/warehouse\"\n\n[params]";
    TOP.replace("[params]", places).replace("data/log.parquet", "s3://lake/events/")
}

const READ: &str = r#"
import json, os, sys, deltalake, duckdb
options = {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"], "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
    "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"], "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
table = deltalake.DeltaTable("s3://lake/warehouse/top", storage_options=options)
folder = sys.argv[1]
files = [folder + "/" + f.split("/warehouse/top/")[1] for f in table.file_uris()]
rows = duckdb.sql(f"select sum(n), count(*), sum(product) from read_parquet({files})").fetchall()
print(json.dumps({"version": table.version(), "rows": [float(v) for v in rows[0]], "run": table.history()[0]["runId"]}))
"#;

#[test]
fn a_pipeline_lives_on_s3() {
    let server = S3Server::start(&["lake"]);
    let world = world_on(&server);
    for (ds, n) in [("2026-11-20", 7), ("2026-11-21", 35), ("2026-11-22", 70)] {
        write_parquet(&server.file("lake", &format!("events/ds={ds}/part.parquet")), log_columns(n));
    }
    world.write("pipeline.toml", &on_s3());
    let filter = ["--set", "log.filter=ds >= '2026-11-21'", "--set", "log.role=table"];
    let (out, _) = world.expect(0, &[&["validate", "pipeline.toml"], &filter[..]].concat());
    assert!(out.contains("valid"), "{out}");
    world.run(&[&["pipeline.toml", "--param", "ds=2026-11-21"], &filter[..]].concat());
    let document = world.run(&[&["pipeline.toml"], &filter[..]].concat());
    let log = stage(&document, "log");
    assert_eq!(
        (&log["cached"], &log["counters"]["files"], &log["counters"]["rows"]),
        (&true.into(), &2.into(), &105.into())
    );
    let table = &document["tables"][0];
    assert_eq!(
        (&table["uri"], &table["version"], &table["rows"]),
        (&"s3://lake/warehouse/top".into(), &1.into(), &70.into())
    );
    let days = world.sql("select ds, sum(n) n from top group by 1 order by 1");
    assert_eq!(
        days,
        [serde_json::json!({"ds": "2026-11-21", "n": 105}), serde_json::json!({"ds": "2026-11-22", "n": 105})]
    );
    assert_eq!(world.sql("select count(*) n from runs")[0]["n"], 2);

    // Plain files beside it.
    world.run(
        &[&["pipeline.toml", "--set", "publish.format=parquet", "--set", "publish.table=plain"], &filter[..]].concat(),
    );
    assert!(server.file("lake", "warehouse/plain/ds=2026-11-22/part-0.parquet").is_file());
    assert_eq!(world.sql("select count(*) n from plain")[0]["n"], 70);

    // A refusal leaves the partition as it was.
    let wrong = "counts.query=select 1 as customer, item_id as product, 1 as n from log";
    world.expect(65, &[&["run", "pipeline.toml", "--set", wrong], &filter[..]].concat());
    assert_eq!(world.sql("select count(*) n from top")[0]["n"], 140);

    let Some(python) = python() else { return };
    let folder = server.file("lake", "warehouse/top");
    let theirs = ask_python(&python, READ, &[folder.to_str().unwrap()], &world.variables);
    let sums = world.sql("select sum(n) a, count(*) b, sum(product) c from top");
    assert_eq!(theirs["rows"], serde_json::json!([210.0, 140.0, sums[0]["c"].as_f64().unwrap()]));
    assert_eq!((&theirs["version"], &theirs["run"]), (&1.into(), &document["run_id"]));
}

#[test]
fn every_kind_of_source_is_read_from_s3() {
    let server = S3Server::start(&["lake"]);
    let world = world_on(&server);
    write_parquet(&server.file("lake", "one.parquet"), log_columns(14));
    write_parquet(&server.file("lake", "folder/a.parquet"), log_columns(7));
    write_parquet(&server.file("lake", "folder/b.parquet"), log_columns(14));
    let codes: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    write_parquet(&server.file("lake", "hive/day=1/a.parquet"), vec![("code", codes.clone())]);
    write_parquet(&server.file("lake", "hive/day=2/a.parquet"), vec![("code", codes)]);
    std::fs::write(server.file("lake", "codes.csv"), "code;name;at\n007;Bond;2026-11-22\n008;Nobody;2026-11-23\n")
        .unwrap();
    world.write(
        "pipeline.toml",
        r#"name = "sources"
[sources.one]
uri = "s3://lake/one.parquet"
role = "table"
[sources.folder]
uri = "s3a://lake/folder"
role = "table"
[sources.hive]
uri = "s3://lake/hive/"
filter = "day = '2'"
[sources.codes]
uri = "s3://lake/codes.csv"
delimiter = ";"
types = { code = "string", at = "timestamp" }
[stages.counts]
kind = "sql"
query = "select (select count(*) from one) a, (select count(*) from folder) b, (select count(*) from hive) c, (select max(code) from codes) d, (select cast(max(at) as varchar) from codes) e"
inputs = { one = "one", folder = "folder", hive = "hive", codes = "codes" }
"#,
    );
    let document = world.run(&["pipeline.toml"]);
    assert_eq!(stage(&document, "hive")["counters"]["files"], 1);
    let row = world.sql("select * from counts").remove(0);
    assert_eq!((&row["a"], &row["b"], &row["c"], &row["d"]), (&14.into(), &21.into(), &2.into(), &"008".into()));
    assert!(row["e"].as_str().unwrap().starts_with("2026-11-23"), "{row}");
    assert!(stage(&world.run(&["pipeline.toml"]), "folder")["cached"] == true);
}

#[test]
fn what_s3_refuses_is_said_without_keys() {
    let server = S3Server::start(&["lake"]);
    let mut world = world_on(&server);
    write_parquet(&server.file("lake", "events/part.parquet"), log_columns(70));
    world.write("pipeline.toml", &on_s3());
    let of_server = world.variables.clone();
    let ask = |world: &World, code: i32, words: &[&str]| {
        let (out, err) = world.expect(code, &["-vv", "run", "pipeline.toml"]);
        for word in words {
            assert!(err.contains(word), "`{word}` is not in:\n{err}");
        }
        for secret in [SECRET, "wrong-plant-77"] {
            assert!(!out.contains(secret) && !err.contains(secret), "a secret was printed:\n{out}\n{err}");
        }
    };
    let set = |world: &mut World, pairs: &[(&str, &str)]| {
        world.variables = of_server.clone();
        world.variables.extend(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    };
    set(&mut world, &[("AWS_SECRET_ACCESS_KEY", "wrong-plant-77")]);
    ask(&world, 75, &["SignatureDoesNotMatch", "AWS_ACCESS_KEY_ID"]);
    set(&mut world, &[("AWS_ALLOW_HTTP", "")]);
    ask(&world, 78, &["AWS_ALLOW_HTTP"]);
    set(&mut world, &[("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("TAILFUSE_STORE_RETRIES", "1")]);
    ask(&world, 75, &["127.0.0.1:9"]);
    set(&mut world, &[("TAILFUSE_STORE_RETRIES", "some")]);
    ask(&world, 78, &["TAILFUSE_STORE_RETRIES"]);
    // A profile in place of keys.
    let home = world.path("home/.aws");
    std::fs::create_dir_all(&home).unwrap();
    std::fs::write(
        home.join("credentials"),
        format!("[night]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"),
    )
    .unwrap();
    let no_keys = [("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", ""), ("AWS_PROFILE", "nigth")];
    set(&mut world, &no_keys);
    ask(&world, 78, &["nigth", ".aws/credentials"]);
    set(&mut world, &[&no_keys[..2], &[("AWS_PROFILE", "night")]].concat());
    world.run(&["pipeline.toml"]);
    assert_eq!(world.sql("select count(*) n from top")[0]["n"], 70);
}
