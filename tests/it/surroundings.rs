//! What surrounds a run: lineage events at a real receiver and in a file, JSON logs, secrets that stay secret, the
//! sandbox.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::fixtures::{PIPELINE, World};
use crate::remote_server::{Fault, by_heart_server, faulty_server};

const AWS: &str = "aws-planted-secret/4711+x";
const LINEAGE: &str = "lineage-planted-secret-4712";
const LLM: &str = "llm-planted-secret-4713";

fn command(world: &World, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailfuse"));
    command.args(args).current_dir(world.folder.path()).env("TAILFUSE_CACHE", world.path("cache"));
    command.env_remove("RUST_LOG").env_remove("TAILFUSE_PIPELINE").env("NO_PROXY", "127.0.0.1");
    command
}

fn text(output: &Output) -> (String, String) {
    let utf8 = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (utf8(&output.stdout), utf8(&output.stderr))
}

/// A receiver: (address, requests so far). It answers each with `status`.
fn receiver(status: u16) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let heard: Arc<Mutex<Vec<String>>> = Arc::default();
    let kept = heard.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut raw = Vec::new();
            let mut buffer = [0u8; 8192];
            loop {
                let n = stream.read(&mut buffer).unwrap_or(0);
                raw.extend_from_slice(&buffer[..n]);
                let text = String::from_utf8_lossy(&raw).into_owned();
                let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                    let length = head.lines().find_map(|l| {
                        l.to_lowercase().strip_prefix("content-length: ").map(|n| n.trim().parse::<usize>().unwrap())
                    });
                    body.len() >= length.unwrap_or(0)
                });
                if whole || n == 0 {
                    kept.lock().unwrap().push(text);
                    break;
                }
            }
            let _ = write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (address, heard)
}

/// A short pipeline: no training, no LLM.
const SHORT: &str = r#"name = "short"
[params]
ds = "2026-11-22"
[sources.events]
uri = "data/events.parquet"
columns = { user_id = "uid", item_id = "movie", rating = "stars", timestamp = "ts" }
[sources.films]
uri = "data/films.parquet"
columns = { item_id = "movie", title = "name" }
[stages.liked]
kind = "sql"
inputs = { log = "events", films = "films" }
query = "select l.user_id, l.item_id, f.title, l.rating * 2 as twice, l.row_id from log l join films f on l.item_id = f.item_id"
[stages.publish]
kind = "write"
input = "liked"
table = "liked"
partition = { ds = "{{ ds }}" }
"#;

fn short() -> World {
    let world = World::new();
    world.write("pipeline.toml", SHORT);
    world
}

fn events(lines: &[String]) -> Vec<Value> {
    lines.iter().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn of<'a>(events: &'a [Value], job: &str, kind: &str) -> &'a Value {
    let found = events.iter().find(|e| e["job"]["name"] == job && e["eventType"] == kind);
    found.unwrap_or_else(|| panic!("no {kind} of {job} in {events:#?}"))
}

#[test]
fn a_receiver_hears_of_the_run_and_of_each_stage() {
    let world = short();
    let (address, heard) = receiver(201);
    let parent = "airflow/dag.task/0197a6b4-6f3e-7a3b-8d2e-000000000001";
    let mut run = command(&world, &["run", "pipeline.toml"]);
    run.env("OPENLINEAGE_URL", &address).env("OPENLINEAGE_API_KEY", LINEAGE);
    let output = run.env("OPENLINEAGE_NAMESPACE", "prod").env("OPENLINEAGE_PARENT_ID", parent).output().unwrap();
    assert!(output.status.success(), "{:?}", text(&output));
    let heard = heard.lock().unwrap();
    assert!(heard.iter().all(|r| r.starts_with("POST /api/v1/lineage ")), "{heard:?}");
    assert!(heard.iter().all(|r| r.to_lowercase().contains(&format!("authorization: bearer {LINEAGE}"))));
    let bodies: Vec<String> = heard.iter().map(|r| r.split_once("\r\n\r\n").unwrap().1.to_owned()).collect();
    let events = events(&bodies);
    // START and COMPLETE of the run and of its four nodes, in order.
    assert_eq!(events.len(), 10);
    assert_eq!((&events[0]["eventType"], &events[0]["job"]["name"]), (&"START".into(), &"short".into()));
    let run = of(&events, "short", "COMPLETE");
    assert_eq!(run, events.last().unwrap());
    assert_eq!(run["job"]["namespace"], "prod");
    assert_eq!(run["run"]["facets"]["parent"]["job"]["name"], "dag.task");
    assert_eq!(run["run"]["facets"]["nominalTime"]["nominalStartTime"], "2026-11-22T00:00:00Z");
    assert_eq!(run["inputs"].as_array().unwrap().len(), 2);
    assert_eq!(run["inputs"][0]["namespace"], "file");
    let table = &run["outputs"][0];
    assert!(table["name"].as_str().unwrap().ends_with("/warehouse/liked"), "{table}");
    assert!(table["outputFacets"]["outputStatistics"]["rowCount"].as_u64().unwrap() > 100, "{table}");

    let liked = of(&events, "short.liked", "COMPLETE");
    assert_eq!(liked["run"]["facets"]["parent"]["run"]["runId"], run["run"]["runId"]);
    let fields = &liked["outputs"][0]["facets"]["columnLineage"]["fields"];
    assert_eq!(fields["title"]["inputFields"][0]["name"], "short.films.rows");
    assert_eq!(fields["title"]["inputFields"][0]["transformations"][0]["subtype"], "IDENTITY");
    assert_eq!(fields["twice"]["inputFields"][0]["field"], "rating");
    assert_eq!(fields["twice"]["inputFields"][0]["transformations"][0]["subtype"], "TRANSFORMATION");
    let source = of(&events, "short.events", "COMPLETE");
    let rows = source["outputs"].as_array().unwrap().iter().find(|o| o["name"] == "short.events.rows").unwrap();
    assert_eq!(rows["facets"]["columnLineage"]["fields"]["user_id"]["inputFields"][0]["field"], "uid");
    assert!(liked["job"]["facets"]["sql"]["query"].as_str().unwrap().starts_with("select l.user_id"));
}

#[test]
fn a_receiver_that_fails_is_one_warning_and_no_more() {
    let world = short();
    let (refusing, _) = receiver(500);
    // A socket that accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = (format!("http://{}", silent.local_addr().unwrap()), silent);
    for address in [refusing.as_str(), "http://127.0.0.1:9", silent.0.as_str(), "no address"] {
        let began = std::time::Instant::now();
        let output = command(&world, &["run", "pipeline.toml"]).env("OPENLINEAGE_URL", address).output().unwrap();
        let (out, err) = text(&output);
        assert!(output.status.success(), "{address}: {err}");
        assert_eq!(err.matches("warning:").count(), 1, "{address}: {err}");
        assert!(out.lines().last().unwrap().starts_with("{\"status\":\"ok\""), "{out}");
        assert!(began.elapsed().as_secs_f64() < 8.0, "{address} held the run up for {:?}", began.elapsed());
    }
}

/// Events of a good run, a failed and a stopped one, from a file; also what `peers/check_lineage.py` reads.
#[test]
fn failures_are_told_too_and_a_file_keeps_all() {
    let world = short();
    world.write("lineage.toml", &format!("{SHORT}[lineage]\nfile = \"events.jsonl\"\nnamespace = \"test\"\n"));
    world.run(&["lineage.toml"]);
    // A run that fails at its second stage.
    let broken = SHORT.replace("select l.user_id", "select arrow_cast(l.user_id, 'Int64') as user_id");
    world.write("broken.toml", &format!("{broken}[lineage]\nfile = \"events.jsonl\"\nnamespace = \"test\"\n"));
    let output = command(&world, &["run", "broken.toml"]).output().unwrap();
    assert!(!output.status.success());
    let lines: Vec<String> =
        std::fs::read_to_string(world.path("events.jsonl")).unwrap().lines().map(str::to_owned).collect();
    let events = events(&lines);
    let failed = of(&events, "short", "FAIL");
    let message = failed["run"]["facets"]["errorMessage"]["message"].as_str().unwrap();
    assert!(message.contains("stage `liked`"), "{message}");
    assert_eq!(of(&events, "short.liked", "FAIL")["run"]["facets"]["parent"]["run"]["runId"], failed["run"]["runId"]);
    of(&events, "short", "COMPLETE");

    let python = std::env::var("TAILFUSE_OPENLINEAGE_PYTHON");
    match python {
        Err(_) => {
            eprintln!("skipped: no TAILFUSE_OPENLINEAGE_PYTHON (a Python with openlineage-python) to check the events")
        }
        Ok(python) => {
            let script = format!("{}/peers/check_lineage.py", env!("CARGO_MANIFEST_DIR"));
            let checked = Command::new(python).arg(script).arg(world.path("events.jsonl")).output().unwrap();
            let (out, err) = text(&checked);
            assert!(checked.status.success(), "{out}\n{err}");
            assert!(out.contains("all right"), "{out}");
        }
    }
}

#[test]
fn json_logs_are_one_object_a_line() {
    let world = short();
    let output = command(&world, &["--log-format", "json", "-vv", "run", "pipeline.toml"]).output().unwrap();
    let (out, err) = text(&output);
    assert!(output.status.success(), "{err}");
    let lines: Vec<Value> =
        err.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    let document: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    let of_stage = |stage: &str, message: &str| {
        lines
            .iter()
            .find(|l| l["stage"] == stage && l["message"] == message)
            .unwrap_or_else(|| panic!("{stage}: {err}"))
    };
    let done = of_stage("liked", "finished");
    assert_eq!(done["run_id"], document["run_id"]);
    assert!(done["fields"]["rows"]["result"].as_u64().unwrap() > 100, "{done}");
    of_stage("events", "started");
    assert!(lines.iter().all(|l| l["time"].is_string() && l["level"].is_string() && l["fields"].is_object()));

    let mut failing = command(&world, &["run", "pipeline.toml", "--from", "nothing"]);
    let (_, err) = text(&failing.env("TAILFUSE_LOG_FORMAT", "json").output().unwrap());
    let last: Value = serde_json::from_str(err.lines().last().unwrap()).unwrap();
    assert_eq!((&last["level"], &last["fields"]["exit_code"]), (&"error".into(), &2.into()));
}

/// Every byte that a run leaves anywhere.
fn left_behind(world: &World, output: &Output) -> String {
    fn files(folder: &std::path::Path, all: &mut Vec<u8>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => files(&path, all),
                false => all.extend(std::fs::read(&path).unwrap()),
            }
        }
    }
    let mut all = [output.stdout.clone(), output.stderr.clone()].concat();
    files(world.folder.path(), &mut all);
    String::from_utf8_lossy(&all).into_owned()
}

#[test]
fn planted_secrets_are_nowhere() {
    let world = World::new();
    let server = by_heart_server(Some(LLM), 0);
    with_key(&world, &server.url());
    let run = |world: &World, extra: &[&str], variables: &[(&str, &str)]| {
        let args = [&["-vv", "run", "pipeline.toml", "--result", "result.json"], extra].concat();
        let mut run = command(world, &args);
        run.env("AWS_SECRET_ACCESS_KEY", AWS).env("AWS_ACCESS_KEY_ID", "AKIAPLANTED4714").env("AWS_REGION", "eu-x-1");
        run.env("OPENLINEAGE_API_KEY", LINEAGE).env("LLM_KEY_OF_TEST", LLM);
        run.env("OPENLINEAGE__TRANSPORT__TYPE", "file").env("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", "events.jsonl");
        run.envs(variables.iter().copied());
        run.output().unwrap()
    };
    let check = |output: &Output, what: &str| {
        let all = left_behind(&world, output);
        for secret in [AWS, LINEAGE, LLM] {
            let at = all.find(secret);
            assert!(at.is_none(), "{what}: ...{}", &all[at.unwrap().saturating_sub(200)..at.unwrap()]);
        }
    };
    let output = run(&world, &[], &[]);
    assert!(output.status.success(), "{}", text(&output).1);
    check(&output, "a good run");
    drop(server);
    let output =
        run(&world, &["--set", "rerank.engine.url=http://127.0.0.1:9/v1", "--set", "rerank.budget.users=20"], &[]);
    check(&output, "no server");
    // A server that repeats the key that it was given in its refusal, as some do.
    let rude = faulty_server(|_, _| Fault::Body(br#"{"error": {"message": "bad key llm-planted-secret-4713"}}"#));
    with_key(&world, &rude.url());
    let output = run(&world, &["--set", "rerank.budget.users=22"], &[]);
    check(&output, "a rude server");
    // An object store that does not answer, at info, debug and trace.
    let nowhere = ("AWS_ENDPOINT", "http://127.0.0.1:9");
    for level in ["info", "trace"] {
        let variables = [nowhere, ("AWS_ALLOW_HTTP", "true"), ("RUST_LOG", level), ("AWS_MAX_RETRIES", "0")];
        let mut run = command(
            &world,
            &[&["--log-format", "json", "validate", "pipeline.toml"], &["--set", "events.uri=s3://bucket/events/"][..]]
                .concat(),
        );
        run.env("AWS_SECRET_ACCESS_KEY", AWS).env("AWS_ACCESS_KEY_ID", "AKIAPLANTED4714").env("AWS_REGION", "eu-x-1");
        run.envs(variables.iter().copied());
        check(&run.output().unwrap(), level);
    }
    let receiver = receiver(401).0;
    let output =
        run(&world, &[], &[("OPENLINEAGE__TRANSPORT__TYPE", "http"), ("OPENLINEAGE__TRANSPORT__URL", &receiver)]);
    assert!(output.status.success());
    check(&output, "a receiver that refuses");
}

/// A server in place of the LLM, with a key.
fn with_key(world: &World, url: &str) {
    let engine = format!(
        "engine = {{ kind = \"openai\", url = \"{url}\", model = \"m\", api_key_env = \"LLM_KEY_OF_TEST\", timeout_seconds = 1.0, retries = 0 }}\n"
    );
    let here = "model = \"llm\"\nprompts = \"prompts\"\nskipped = \"prompts.skipped\"\n";
    let there = format!("prompts = \"prompts\"\nskipped = \"prompts.skipped\"\n{engine}");
    assert!(PIPELINE.contains(here));
    world.write("pipeline.toml", &PIPELINE.replace(here, &there).replace("llm = \"llm\"\n", ""));
}

#[test]
fn sql_sees_no_files_unless_told_to() {
    let world = short();
    world.run(&["pipeline.toml"]);
    let film = world.path("data/films.parquet").display().to_string();
    let relative = "data/films.parquet";
    let ask = |flags: &[&str], query: &str| {
        let args = [&["sql", "-p", "pipeline.toml", "--format", "json"], flags, &[query]].concat();
        text_of(&world, &args)
    };
    for query in [
        format!("select * from '{film}'"),
        format!("select * from '{relative}'"),
        format!("select * from 'file://{film}'"),
        format!("select count(*) from read_parquet('{film}')"),
        format!("select * from read_csv('{film}')"),
        format!("select * from parquet_metadata('{film}')"),
    ] {
        let (code, out, err) = ask(&[], &query);
        assert!(code == Some(2) && out.is_empty(), "{query}: {code:?} {out} {err}");
    }
    for query in [
        format!("create external table t stored as parquet location '{film}'"),
        "copy (select 1) to 'out.parquet'".to_owned(),
        "set datafusion.catalog.location = '/'".to_owned(),
        "create table t as select 1".to_owned(),
        "insert into events select * from events".to_owned(),
        "explain analyze copy (select 1) to 'out.parquet'".to_owned(),
    ] {
        let (code, _, err) = ask(&["--allow-paths"], &query);
        assert!(code == Some(2) && err.contains("is refused"), "{query}: {code:?} {err}");
    }
    assert!(!world.path("out.parquet").exists());
    let (code, out, err) = ask(&["--allow-paths"], &format!("select count(*) n from '{film}'"));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("40"), "{out}");

    // A stage has no such flag.
    let stage = format!("inputs = {{ log = \"events\", films = \"films\" }}\nquery = \"select * from '{film}'\"\n");
    let (head, tail) = SHORT.split_once("inputs = { log").unwrap();
    let tail = tail.split_once("[stages.publish]").unwrap().1;
    world.write("pipeline.toml", &format!("{head}{stage}[stages.publish]{tail}"));
    assert_eq!(text_of(&world, &["validate", "pipeline.toml"]).0, Some(78));
}

#[test]
fn a_sandboxed_pipeline_stays_below_its_root() {
    let world = short();
    world.expect(0, &["validate", "--sandbox", "pipeline.toml"]);
    world.run(&["--sandbox", "pipeline.toml"]);
    let (_, err) = world.expect(78, &["run", "--sandbox", "pipeline.toml", "--set", "events.uri=/etc/passwd"]);
    assert!(err.contains("leaves the sandbox"), "{err}");
    world.expect(78, &["validate", "--sandbox=data", "pipeline.toml"]);
    world.expect(78, &["validate", "--sandbox", "pipeline.toml", "--set", "publish.input=../x"]);
}

fn text_of(world: &World, args: &[&str]) -> (Option<i32>, String, String) {
    let output = command(world, args).output().unwrap();
    let (out, err) = text(&output);
    (output.status.code(), out, err)
}
