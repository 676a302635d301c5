//! Each exit code of the table in `docs/operations.md`, by the binary: the code, the word for it in the result document, and
//! whether a retry can help.
//!
//! More ways to the same codes: 65 in `sources.rs` and `corrupt_tables.rs`, 75 in `rerank.rs` (a server that is down),
//! `catalog.rs` (downloads), `faulty_places.rs` (stores and disks), 78 in `pipeline_file.rs`, 99 and 143 in `kills.rs`.

use std::process::{Command, Stdio};

use crate::fixtures::World;

/// The result document of a run with these arguments and faults, which must end with `code`.
fn document(world: &World, code: i32, args: &[&str], fault: &str) -> serde_json::Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailfuse"));
    command.args(["run", "pipeline.toml", "--result", "result.json"]).args(args).current_dir(world.folder.path());
    command.env("TAILFUSE_CACHE", world.path("cache")).env_remove("RUST_LOG");
    if !fault.is_empty() {
        command.env("TAILFUSE_FAULT", fault);
    }
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "stdout:\n{out}\nstderr:\n{err}");
    let line = out.lines().last().unwrap_or_default();
    // The file has the same document.
    assert_eq!(std::fs::read_to_string(world.path("result.json")).unwrap(), line);
    let document: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(document["exit_code"], code);
    document
}

fn fails(world: &World, code: i32, args: &[&str], fault: &str, word: &str, retry: bool) {
    let document = document(world, code, args, fault);
    assert_eq!((&document["error"]["code"], &document["error"]["retry"]), (&word.into(), &retry.into()), "{document}");
    assert!(!document["error"]["message"].as_str().unwrap().is_empty());
}

#[test]
fn every_code_by_the_binary() {
    let world = World::new();
    // 2: the command line. What clap refuses ends before there is a run, and so without a document.
    assert_eq!(world.tailfuse(&["run"]).status.code(), Some(2));
    assert_eq!(world.tailfuse(&["run", "pipeline.toml", "--budget", "-1"]).status.code(), Some(2));
    fails(&world, 2, &["--from", "nothing"], "", "usage", false);
    // 78: the pipeline file; nothing ran.
    fails(&world, 78, &["--set", "model.hyper.epochs=-3"], "", "pipeline_file", false);
    assert!(!world.path("artifacts").exists());
    // 65: the data.
    let log = std::fs::read(world.path("data/events.parquet")).unwrap();
    std::fs::write(world.path("data/events.parquet"), &log[..log.len() / 2]).unwrap();
    fails(&world, 65, &[], "", "input_data", false);
    std::fs::write(world.path("data/events.parquet"), &log).unwrap();
    // 70: our bug; what is finished is kept.
    fails(&world, 70, &[], "stage-done:3=panic", "internal", false);
    assert!(std::fs::read_dir(world.path("artifacts")).unwrap().count() >= 3);
    // 75: a place that cannot be written.
    std::fs::write(world.path("blocked"), "a file where a folder should be").unwrap();
    fails(&world, 75, &["--set", "artifacts=blocked/artifacts"], "", "environment", true);
    // 143 and 130: asked to stop. Anew, since a fit of milliseconds may have ended before the request was seen, and is kept then.
    fails(&world, 143, &["--fresh"], "train-epoch:2=term", "terminated", true);
    fails(&world, 130, &["--fresh"], "train-epoch:1=int", "interrupted", true);
    // 0, and 99 where there is nothing left to do.
    assert_eq!(document(&world, 0, &[], "")["status"], "ok");
    fails(&world, 99, &["--skip-current"], "", "nothing_to_do", false);
}

#[test]
fn a_second_signal_ends_a_run_that_does_not_stop() {
    use std::os::unix::process::ExitStatusExt;
    let world = World::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_tailfuse"))
        .args(["run", "pipeline.toml"])
        .current_dir(world.folder.path())
        .env("TAILFUSE_CACHE", world.path("cache"))
        // A stage that looks at nothing for a minute.
        .env("TAILFUSE_FAULT", "train-epoch:1=slow:60000")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = std::time::Instant::now();
    while !world.path("artifacts").exists() || began.elapsed().as_millis() < 1500 {
        assert!(began.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let interrupt = |n: i32| {
        // SAFETY: plain numbers, and a process that this test has started and not yet waited for.
        unsafe { libc::kill(child.id() as i32, n) };
        std::thread::sleep(std::time::Duration::from_millis(200));
    };
    interrupt(libc::SIGINT);
    interrupt(libc::SIGINT);
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGINT), "{status}");
}
