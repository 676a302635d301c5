//! Delta tables: published by the binary, read by it and by Python's deltalake with DuckDB; commits that race; columns that
//! come and go; versions; `--no-publish`; one run at a time.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use futures::{FutureExt, StreamExt};
use tailfuse::error::{Error, Fault};
use tailfuse::tables::Store;
use tailfuse::tables::delta::At;
use tailfuse::tables::delta::maintain::{restore, vacuum};
use tailfuse::tables::delta::read::Snapshot;
use tailfuse::tables::delta::write::{Committed, Publication};
use tailfuse::tables::parquet::BatchStream;

use crate::fixtures::{World, stage, write_parquet};

/// A log of its own and one query over it, published as `top`.
pub const TOP: &str = r#"name = "top"

[params]
ds = "2026-11-22"

[sources.log]
uri = "data/log.parquet"

[stages.counts]
kind = "sql"
query = "select user_id as customer, item_id as product, count(*) as n, avg(rating) as mean from log group by 1, 2 order by 1, 2"
inputs = { log = "log" }

[stages.publish]
kind = "write"
input = "counts"
table = "top"
partition = { ds = "{{ ds }}" }
"#;

/// The columns of a log of `n` rows.
pub fn log_columns(n: i64) -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("user_id", Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("u{}", i % 7)))) as ArrayRef),
        ("item_id", Arc::new(Int64Array::from_iter_values((0..n).map(|i| i / 7)))),
        ("rating", Arc::new(Float64Array::from_iter_values((0..n).map(|i| (i % 5 + 1) as f64)))),
        ("timestamp", Arc::new(Int64Array::from_iter_values(0..n))),
    ]
}

pub fn top_world() -> World {
    let world = World::empty();
    write_parquet(&world.path("data/log.parquet"), log_columns(70));
    world.write("pipeline.toml", TOP);
    world
}

/// A Python with deltalake and DuckDB: `TAILFUSE_TEST_PYTHON`, else `python3`. Says so where there is none.
pub fn python() -> Option<String> {
    let python = std::env::var("TAILFUSE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let output = Command::new(&python).args(["-c", "import deltalake, duckdb"]).output();
    match output.is_ok_and(|o| o.status.success()) {
        true => Some(python),
        false => {
            eprintln!("SKIPPED: no Python with deltalake and duckdb (`pip install deltalake duckdb`)");
            None
        }
    }
}

/// Runs a script; its output as JSON.
pub fn ask_python(python: &str, script: &str, args: &[&str], variables: &[(String, String)]) -> serde_json::Value {
    let output = Command::new(python)
        .args(["-c", script])
        .args(args)
        .envs(variables.iter().map(|(k, v)| (k, v)))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

const READ: &str = r#"
import json, sys, duckdb, deltalake
table = deltalake.DeltaTable(sys.argv[1])
files = table.file_uris()
con = duckdb.connect()
rows = con.sql(f"select customer, product, n, mean from read_parquet({files}, hive_partitioning = true) where ds = '2026-11-22' order by 1, 2").fetchall()
history = table.history()
fields = [[f.name, f.type.type, f.nullable] for f in table.schema().fields]
print(json.dumps({"version": table.version(), "rows": rows, "fields": fields, "last": history[0], "files": len(files),
    "partitions": table.partitions()}, default=str))
"#;

#[test]
fn another_reader_sees_what_was_published() {
    let world = top_world();
    world.run(&["pipeline.toml", "--param", "ds=2026-11-21"]);
    let document = world.run(&["pipeline.toml"]);
    let again = world.run(&["pipeline.toml"]);
    let table = &again["tables"][0];
    assert_eq!(
        (&table["table"], &table["format"], &table["version"], &table["rows"], &table["published"]),
        (&"top".into(), &"delta".into(), &2.into(), &70.into(), &true.into())
    );
    assert_eq!(document["tables"][0]["version"], 1);
    let ours = world.sql("select customer, product, n, mean from top where ds = '2026-11-22' order by 1, 2");
    assert_eq!(ours.len(), 70);
    let days = world.sql("select ds, count(*) n from published.top group by 1 order by 1");
    assert_eq!(
        days,
        [serde_json::json!({"ds": "2026-11-21", "n": 70}), serde_json::json!({"ds": "2026-11-22", "n": 70})]
    );

    let Some(python) = python() else { return };
    let theirs = ask_python(&python, READ, &[world.path("warehouse/top").to_str().unwrap()], &[]);
    assert_eq!((&theirs["version"], &theirs["files"]), (&2.into(), &2.into()));
    for (row, theirs) in ours.iter().zip(theirs["rows"].as_array().unwrap()) {
        let row: Vec<&serde_json::Value> = ["customer", "product", "n", "mean"].iter().map(|c| &row[*c]).collect();
        assert_eq!(row, theirs.as_array().unwrap().iter().collect::<Vec<_>>());
    }
    let last = &theirs["last"];
    assert_eq!(last["operation"], "WRITE");
    assert_eq!((&last["runId"], &last["pipeline"]), (&again["run_id"], &"top".into()));
    assert_eq!(last["operationParameters"]["predicate"], "ds = '2026-11-22'");
    assert_eq!(last["fingerprint"].as_str().unwrap().len(), 32);
    let fields: Vec<&str> = theirs["fields"].as_array().unwrap().iter().map(|f| f[0].as_str().unwrap()).collect();
    assert_eq!(fields, ["customer", "product", "n", "mean", "ds"]);
}

#[test]
fn columns_come_but_do_not_change_and_the_old_partition_stands() {
    let world = top_world();
    world.run(&["pipeline.toml", "--param", "ds=2026-11-21"]);
    let query = |select: &str| {
        ["run".to_owned(), "pipeline.toml".into(), "--set".into(), format!("counts.query=select {select} from log")]
    };
    let run = |code: i32, select: &str| {
        let args = query(select);
        world.expect(code, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    // A column more; one that may be null is left out.
    run(0, "user_id as customer, item_id as product, 1 as n, 'x' as note");
    let rows = world.sql("select ds, count(note) notes, count(mean) means from top group by 1 order by 1");
    assert_eq!(
        rows,
        [
            serde_json::json!({"ds": "2026-11-21", "notes": 0, "means": 70}),
            serde_json::json!({"ds": "2026-11-22", "notes": 70, "means": 0}),
        ]
    );
    let before = world.sql("select * from top order by ds, customer, product");
    // A type that changed; a column that must be there; rows that fail half-way.
    let (out, err) = run(65, "user_id as customer, cast(item_id as varchar) as product, 1 as n");
    assert!(err.contains("`product`") && err.contains("string") && err.contains("long"), "{err}");
    let document: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&document["exit_code"], &document["error"]["retry"]), (&65.into(), &false.into()));
    let (_, err) = run(65, "item_id as product, 1 as n");
    assert!(err.contains("`customer`") && err.contains("missing"), "{err}");
    run(65, "user_id as customer, item_id as product, 1 as n, 'day' as ds");
    let (_, err) = world.expect(65, &["run", "pipeline.toml", "--set", "publish.partition.hour=noon"]);
    assert!(err.contains("partitioned by ds"), "{err}");
    assert_eq!(world.sql("select * from top order by ds, customer, product"), before);
    // One format for a table.
    let (_, err) = world.expect(78, &["run", "pipeline.toml", "--set", "publish.format=parquet"]);
    assert!(err.contains("Delta table"), "{err}");
    world.run(&["pipeline.toml", "--set", "publish.format=parquet", "--set", "publish.table=plain"]);
    let (_, err) = world.expect(78, &["run", "pipeline.toml", "--set", "publish.table=plain"]);
    assert!(err.contains("plain Parquet"), "{err}");
    assert!(world.path("warehouse/plain/ds=2026-11-22/part-0.parquet").is_file());
}

#[test]
fn a_rehearsal_checks_everything_and_leaves_nothing() {
    let world = top_world();
    let document = world.run(&["pipeline.toml", "--no-publish"]);
    let table = &document["tables"][0];
    assert_eq!(
        (&table["published"], &table["rows"], &table["version"]),
        (&false.into(), &70.into(), &serde_json::Value::Null)
    );
    assert!(!world.path("warehouse").exists(), "something was written");
    world.run(&["pipeline.toml"]);
    let runs = world.sql("select count(*) n from runs");
    let (_, err) = world.expect(
        65,
        &[
            "run",
            "pipeline.toml",
            "--no-publish",
            "--set",
            "counts.query=select 1 as customer, item_id as product, 1 as n from log",
        ],
    );
    assert!(err.contains("`customer`"), "{err}");
    let document = world.run(&["pipeline.toml", "--no-publish", "--param", "ds=2026-11-23"]);
    assert_eq!(stage(&document, "counts")["cached"], true);
    assert_eq!(world.sql("select count(*) n from runs"), runs);
    assert_eq!(world.sql("select distinct ds from top").len(), 1);
}

#[test]
fn a_source_is_a_table_at_a_version() {
    let world = top_world();
    world.run(&["pipeline.toml", "--param", "ds=2026-11-21"]);
    write_parquet(&world.path("data/log.parquet"), log_columns(35));
    world.run(&["pipeline.toml", "--param", "ds=2026-11-22"]);
    world.write(
        "reader.toml",
        r#"name = "reader"
warehouse = "elsewhere"
[sources.top]
uri = "warehouse/top"
columns = { score = "mean" }
[stages.days]
kind = "sql"
query = "select ds, count(*) as n, min(row_id) as first from top group by 1 order by 1"
inputs = { top = "top" }
"#,
    );
    let days = |args: &[&str]| {
        let document = world.run(&[&["reader.toml"], args].concat());
        let (out, _) = world.expect(
            0,
            &[&["sql", "-p", "reader.toml", "--format", "json", "select * from days order by ds"], args].concat(),
        );
        let rows: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
        let text =
            rows.iter().map(|r| format!("{} {} {}", r["ds"].as_str().unwrap(), r["n"], r["first"])).collect::<Vec<_>>();
        (document, text)
    };
    let (document, rows) = days(&[]);
    assert_eq!(rows, ["2026-11-21 70 0", "2026-11-22 35 70"]);
    assert_eq!(stage(&document, "top")["counters"]["delta_version"], 1);
    assert_eq!(stage(&days(&[]).0, "top")["cached"], true);
    assert_eq!(days(&["--set", "top.version=0"]).1, ["2026-11-21 70 0"]);
    assert_eq!(days(&["--set", "top.format=delta", "--set", "top.timestamp='2999-01-01'"]).1.len(), 2);
    let (document, rows) = days(&["--set", "top.filter=ds > '2026-11-21'"]);
    assert_eq!(rows, ["2026-11-22 35 0"]);
    assert_eq!(stage(&document, "top")["counters"]["files"], 1);
    for (set, code, words) in [
        ("top.version=7", 65, &["no version 7", "latest is 1"][..]),
        ("top.timestamp='2001-01-01'", 65, &["no version as old"]),
        ("top.timestamp=tonight", 78, &["tonight"]),
        ("top.uri=data", 65, &["not a Delta table"]),
    ] {
        let version = if set.contains("uri") { "top.version=0" } else { "top.role=table" };
        let (_, err) = world.expect(code, &["run", "reader.toml", "--set", set, "--set", version]);
        assert!(words.iter().all(|w| err.contains(w)), "{set}: {err}");
    }
    // Back to what it was, and that can be undone too.
    let (out, _) = world.expect(0, &["restore", "top", "--version", "0", "-p", "pipeline.toml"]);
    assert!(out.contains("\"restored_to\":0") && out.contains("\"version\":2"), "{out}");
    assert_eq!(days(&[]).1, ["2026-11-21 70 0"]);
    world.expect(0, &["restore", "top", "--version", "1", "-p", "pipeline.toml"]);
    assert_eq!(days(&[]).1, ["2026-11-21 70 0", "2026-11-22 35 70"]);
    world.expect(65, &["restore", "top", "--version", "9", "-p", "pipeline.toml"]);
    world.expect(2, &["restore", "top", "-p", "pipeline.toml"]);
}

const FOREIGN: &str = r#"
import sys, deltalake, duckdb
path = sys.argv[1]
def rows(n, day, more):
    return duckdb.sql(f"""select * from (select unnest(['a', 'b', 'c'][:{n}]) as uid, unnest(range(1, {n} + 1))::int as item,
        date '{day}' as day, 'd é/%' as country {more})""")
deltalake.write_deltalake(path, rows(3, "2026-11-21", ""), partition_by=["day", "country"])
deltalake.write_deltalake(path, rows(2, "2026-11-22", ", 2.5::float as stars"), mode="append", schema_mode="merge")
print("{}")
"#;

#[test]
fn a_table_that_others_wrote_is_a_source() {
    let Some(python) = python() else { return };
    let world = World::empty();
    ask_python(&python, FOREIGN, &[world.path("events").to_str().unwrap()], &[]);
    world.write(
        "pipeline.toml",
        r#"name = "foreign"
[sources.log]
uri = "events"
columns = { user_id = "uid", item_id = "item", rating = "stars" }
max_bad_rows = 1.0
role = "table"
[stages.all]
kind = "sql"
query = "select user_id, item_id, rating, cast(day as varchar) as day, country, row_id from log order by row_id"
inputs = { log = "log" }
"#,
    );
    world.run(&["pipeline.toml"]);
    let rows = world.sql("select * from \"all\" order by row_id");
    let text: Vec<String> = rows
        .iter()
        .map(|r| {
            format!("{} {} {} {} {}", r["user_id"], r["item_id"], r["rating"], r["day"], r["country"]).replace('"', "")
        })
        .collect();
    assert_eq!(text.len(), 5);
    assert_eq!(text[0], "a 1 null 2026-11-21 d é/%");
    assert_eq!(text[4], "b 2 2.5 2026-11-22 d é/%");
    let document = world.run(&["pipeline.toml", "--set", "log.filter=day >= date '2026-11-22'"]);
    assert_eq!(
        (&stage(&document, "log")["rows"]["rows"], &stage(&document, "log")["counters"]["files"]),
        (&2.into(), &1.into())
    );
}

// Races, on the local store, whose put-if-absent is one system call.

fn partition(ds: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("ds".to_owned(), ds.to_owned())])
}

fn rows(n: i64) -> RecordBatch {
    let n: ArrayRef = Arc::new(Int64Array::from_iter_values(0..n));
    RecordBatch::try_from_iter([("n", n)]).unwrap()
}

fn stream(batches: Vec<tailfuse::error::Result<RecordBatch>>) -> BatchStream {
    futures::stream::iter(batches).boxed()
}

/// Publishes `n` rows; `before` is awaited at each try to commit.
async fn publish(
    store: &Store,
    ds: &str,
    run_id: &str,
    n: i64,
    before: &(dyn Fn() -> futures::future::BoxFuture<'static, tailfuse::error::Result<()>> + Sync),
) -> tailfuse::error::Result<Committed> {
    let partition = partition(ds);
    let publication = Publication { store, table: "t", partition: &partition, run_id, pipeline: "p", fingerprint: "f" };
    let batch = rows(n);
    publication.publish(&batch.schema(), stream(vec![Ok(batch)]), before).await
}

async fn at_once(store: &Store, ds: &str, run_id: &str, n: i64) -> tailfuse::error::Result<Committed> {
    publish(store, ds, run_id, n, &|| async { Ok(()) }.boxed()).await
}

/// All begin, and write their data, before any commits.
async fn together(store: &Store, days: &[&str]) -> Vec<tailfuse::error::Result<Committed>> {
    let barrier = Arc::new(tokio::sync::Barrier::new(days.len()));
    let runs = days.iter().enumerate().map(|(i, ds)| {
        let (store, barrier, ds) = (store.clone(), barrier.clone(), (*ds).to_owned());
        tokio::spawn(async move {
            let tries = Arc::new(AtomicUsize::new(0));
            let wait = move || {
                let (barrier, tries) = (barrier.clone(), tries.clone());
                async move {
                    if tries.fetch_add(1, Ordering::SeqCst) == 0 {
                        barrier.wait().await;
                    }
                    Ok(())
                }
                .boxed()
            };
            publish(&store, &ds, &format!("run-{i}"), 10 + i as i64, &wait).await
        })
    });
    futures::future::join_all(runs).await.into_iter().map(Result::unwrap).collect()
}

/// Files of the latest version, and their partitions.
async fn active(store: &Store) -> Vec<String> {
    let snapshot = Snapshot::open(store, At::Latest).await.unwrap();
    snapshot.files.iter().map(|f| f.values.get("ds").unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_commits_to_a_partition_one_is_there() {
    for first in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(&folder.path().join("t")).unwrap();
        if first {
            at_once(&store, "1", "before", 3).await.unwrap();
        }
        let done = together(&store, &["1", "1", "1", "1"]).await;
        let winners: Vec<&Committed> = done.iter().flatten().collect();
        assert_eq!(winners.len(), 1, "{done:?}");
        for e in done.iter().filter_map(|d| d.as_ref().err()) {
            assert_eq!(e.fault, Fault::Environment);
            assert!(e.message.contains("t/ds=1 was published in version") && e.message.contains("by run run-"), "{e}");
        }
        assert_eq!(active(&store).await, ["1"]);
        // Nothing of the others is left.
        let files = store.list("").await.unwrap();
        let data = files.iter().filter(|o| o.location.as_ref().ends_with(".parquet")).count();
        assert_eq!(data, 1 + usize::from(first));
        assert_eq!(winners[0].version, u64::from(first));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn commits_to_other_partitions_do_no_harm() {
    for first in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(&folder.path().join("t")).unwrap();
        if first {
            at_once(&store, "2", "before", 3).await.unwrap();
        }
        let done = together(&store, &["1", "2", "3", "4", "5", "6"]).await;
        let mut versions: Vec<u64> = done.iter().map(|d| d.as_ref().unwrap().version).collect();
        versions.sort_unstable();
        let from = u64::from(first);
        assert_eq!(versions, (from..from + 6).collect::<Vec<_>>());
        assert_eq!(active(&store).await, ["1", "2", "3", "4", "5", "6"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_leaves_the_table_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::local(&folder.path().join("t")).unwrap();
    at_once(&store, "1", "before", 3).await.unwrap();
    let (partition, batch) = (partition("1"), rows(5));
    let publication =
        Publication { store: &store, table: "t", partition: &partition, run_id: "r", pipeline: "p", fingerprint: "f" };
    let broken = stream(vec![Ok(batch.clone()), Err(Error::data("row 7 is wrong"))]);
    let go: &(dyn Fn() -> futures::future::BoxFuture<'static, tailfuse::error::Result<()>> + Sync) =
        &|| async { Ok(()) }.boxed();
    let e = publication.publish(&batch.schema(), broken, go).await.unwrap_err();
    assert_eq!((e.fault, e.message.as_str()), (Fault::Data, "row 7 is wrong"));
    // A claim that was lost ends it before the commit.
    let lost: &(dyn Fn() -> futures::future::BoxFuture<'static, tailfuse::error::Result<()>> + Sync) =
        &|| async { Err(Error::environment("taken over")) }.boxed();
    publication.publish(&batch.schema(), stream(vec![Ok(batch.clone())]), lost).await.unwrap_err();
    let snapshot = Snapshot::open(&store, At::Latest).await.unwrap();
    assert_eq!((snapshot.declared.version, snapshot.files.len()), (0, 1));
    // A try that was killed leaves a file that nobody sees, and a vacuum takes it away.
    store.put("ds=1/part-0-killed-00000000.parquet", "half".into()).await.unwrap();
    assert_eq!(vacuum(&store, 0, true).await.unwrap().len(), 1);
    assert_eq!(vacuum(&store, 0, false).await.unwrap().len(), 1);
    assert_eq!(store.list("ds=1").await.unwrap().len(), 1);
    let version = at_once(&store, "1", "after", 4).await.unwrap().version;
    let back = restore(&store, At::Version(0)).await.unwrap();
    assert_eq!((back.from, back.to, back.version), (version, 0, version + 1));
}

// One run at a time.

fn signal(child: &std::process::Child, signal: i32) {
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

#[test]
fn two_runs_of_a_partition_do_not_both_publish() {
    let world = top_world();
    let begin = |ds: &str| {
        let mut command = world.command(&["run", "pipeline.toml", "--param", &format!("ds={ds}")]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let lease = world.path("warehouse/_leases/top/ds=2026-11-22");
    // A run that was stopped while it held its lease; on a busy machine one may end before it is stopped.
    let stopped = || {
        for _ in 0..20 {
            let _ = std::fs::remove_dir_all(&lease);
            let mut child = begin("2026-11-22");
            let began = Instant::now();
            while !lease.join("00000001.json").exists() {
                assert!(began.elapsed() < Duration::from_secs(30), "no lease");
                std::thread::sleep(Duration::from_millis(1));
            }
            signal(&child, libc::SIGSTOP);
            let text = std::fs::read_to_string(lease.join("00000001.json")).unwrap();
            if text.contains("\"released\": false") {
                return child;
            }
            signal(&child, libc::SIGCONT);
            child.wait().unwrap();
        }
        panic!("every run ended before it could be stopped");
    };
    let mut first = stopped();
    let (out, err) = world.expect(75, &["run", "pipeline.toml"]);
    assert!(err.contains("top/ds=2026-11-22") && err.contains(&format!("process {}", first.id())), "{err}");
    let document: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&document["exit_code"], &document["error"]["retry"]), (&75.into(), &true.into()));
    // Another day is not held up, nor is a rehearsal.
    world.run(&["pipeline.toml", "--param", "ds=2026-11-23"]);
    world.run(&["pipeline.toml", "--no-publish"]);
    signal(&first, libc::SIGCONT);
    assert_eq!(first.wait().unwrap().code(), Some(0));
    assert_eq!(world.sql("select ds, count(*) n from top group by 1").len(), 2);
    // A run that was killed holds nobody up.
    let mut killed = stopped();
    signal(&killed, libc::SIGKILL);
    killed.wait().unwrap();
    world.run(&["pipeline.toml"]);
}
