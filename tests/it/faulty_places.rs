//! Places that fail: a store behind a proxy that resets, throttles and stalls, and a disk that is full. A run ends well or
//! with 75, yesterday's table stays, and the same command completes once the place is well again.

use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::fixtures::{USERS, World};
use crate::remote_server::{Fault, proxy};
use crate::s3_server::S3Server;

const ROWS: &str =
    "select user_id, item_id, rank, rec_rank, llm_rank, source from recommendations order by user_id, rank";

/// The binary against the S3 server, or against what stands before it.
fn on_s3(world: &World, server: &S3Server, endpoint: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailfuse"));
    command.args(args).current_dir(world.folder.path()).env("TAILFUSE_CACHE", world.path("cache"));
    command.envs(server.variables()).env("AWS_ENDPOINT_URL", endpoint).env("NO_PROXY", "127.0.0.1");
    command.env("TAILFUSE_STORE_TIMEOUT_SECONDS", "2").env("RAYON_NUM_THREADS", "1").env_remove("RUST_LOG");
    command.output().unwrap()
}

const PLACES: [&str; 4] = ["--set", "artifacts=s3://lake/artifacts", "--set", "warehouse=s3://lake/warehouse"];

fn run(world: &World, server: &S3Server, endpoint: &str, more: &[&str]) -> (i32, String) {
    let output = on_s3(world, server, endpoint, &[&["run", "pipeline.toml"], &PLACES[..], more].concat());
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

fn rows(world: &World, server: &S3Server) -> Vec<serde_json::Value> {
    let args = [&["sql", "-p", "pipeline.toml", "--format", "json"], &PLACES[..], &[ROWS]].concat();
    let output = on_s3(world, server, &server.endpoint, &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn address(server: &S3Server) -> std::net::SocketAddr {
    server.endpoint.trim_start_matches("http://").parse().unwrap()
}

#[test]
fn a_store_with_faults_costs_time_and_nothing_else() {
    let (world, twin) = (World::new(), World::new());
    twin.run(&["pipeline.toml"]);
    let server = S3Server::start(&["lake"]);
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    // Every seventh request meets something else; the next try passes.
    let proxy = proxy(address(&server), move |_, _| match counted.fetch_add(1, Ordering::SeqCst) {
        n if n % 7 != 3 => Fault::Pass,
        n => match n / 7 % 5 {
            0 => Fault::Status(503, None),
            1 => Fault::Reset,
            2 => Fault::Slow(150),
            3 => Fault::Status(429, None),
            _ => Fault::Status(500, None),
        },
    });
    let (code, text) = run(&world, &server, &format!("http://{}", proxy.address), &[]);
    assert_eq!(code, 0, "{text}");
    assert!(requests.load(Ordering::SeqCst) > 50);
    assert_eq!(rows(&world, &server), twin.sql(ROWS));
}

#[test]
fn a_store_that_goes_down_leaves_yesterday_and_the_rerun_completes() {
    let (world, twin) = (World::new(), World::new());
    let server = S3Server::start(&["lake"]);
    assert_eq!(run(&world, &server, &server.endpoint, &[]).0, 0);
    let yesterday = rows(&world, &server);
    assert_eq!(yesterday.len(), USERS * 5);
    let mut lines = crate::fixtures::log();
    lines.truncate(lines.len() - 4);
    for w in [&world, &twin] {
        w.write_log(&lines);
    }
    twin.run(&["pipeline.toml"]);
    // It goes down for good after a number of requests: while reading, in the middle, and when the table is published.
    for (after, fault) in
        [(3, Fault::Status(503, None)), (40, Fault::Reset), (90, Fault::Status(503, None)), (150, Fault::Hang)]
    {
        let seen = AtomicUsize::new(0);
        let down = AtomicBool::new(false);
        let proxy = proxy(address(&server), move |_, _| {
            if seen.fetch_add(1, Ordering::SeqCst) >= after {
                down.store(true, Ordering::SeqCst);
            }
            if down.load(Ordering::SeqCst) { fault.clone() } else { Fault::Pass }
        });
        let (code, text) = run(&world, &server, &format!("http://{}", proxy.address), &[]);
        // The last of them may have come to its end.
        assert!(code == 75 || code == 0, "after {after}: {code}\n{text}");
        let now = rows(&world, &server);
        assert!(now == yesterday || (code == 0 && now == twin.sql(ROWS)), "after {after} requests");
    }
    assert_eq!(run(&world, &server, &server.endpoint, &[]).0, 0);
    assert_eq!(rows(&world, &server), twin.sql(ROWS));
}

/// Runs where no file may become larger than `bytes`, which the system refuses as it refuses to write on a full disk.
fn with_small_files(world: &World, bytes: u64) -> Output {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailfuse"));
    command.args(["run", "pipeline.toml"]).current_dir(world.folder.path()).env("TAILFUSE_CACHE", world.path("cache"));
    command.env("RAYON_NUM_THREADS", "1").env_remove("RUST_LOG");
    // SAFETY: both calls are allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // Ignored, the signal leaves the error to the write.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    command.output().unwrap()
}

#[test]
fn a_write_that_the_disk_refuses_is_75_names_the_file_and_loses_nothing() {
    let (world, twin) = (World::new(), World::new());
    twin.run(&["pipeline.toml"]);
    let mut failures = 0;
    for bytes in [500, 3_000, 6_000, 9_000] {
        let output = with_small_files(&world, bytes);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            Some(75) => {
                failures += 1;
                assert!(
                    text.contains("cannot write") && text.contains(&world.path("").display().to_string()),
                    "{text}"
                );
            }
            Some(0) => break,
            code => panic!("{bytes}: {code:?}\n{text}"),
        }
    }
    assert!(failures >= 2, "{failures}");
    world.run(&["pipeline.toml"]);
    assert_eq!(world.sql(ROWS), twin.sql(ROWS));
}

/// A file system of its own for a folder, gone when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: &std::path::Path, size: &str) -> Option<SmallDisk> {
        std::fs::create_dir_all(path).unwrap();
        let done =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(path).output();
        match done {
            Ok(output) if output.status.success() => Some(SmallDisk(path.to_owned())),
            _ => None,
        }
    }

    fn resize(&self, size: &str) {
        let option = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &option]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_75_and_the_rerun_completes() {
    let (world, twin) = (World::new(), World::new());
    let Some(disk) = SmallDisk::mount(&world.path("artifacts"), "48k") else {
        eprintln!("SKIPPED: a_full_disk_is_75_and_the_rerun_completes: no file system may be mounted here");
        return;
    };
    twin.run(&["pipeline.toml"]);
    for size in ["48k", "96k", "160k"] {
        disk.resize(size);
        let output = world.tailfuse(&["run", "pipeline.toml"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(75), "{size}\n{text}");
        assert!(text.contains("artifacts/") && text.to_lowercase().contains("no space"), "{text}");
        assert!(!world.path("warehouse/recommendations").exists());
    }
    disk.resize("16m");
    world.run(&["pipeline.toml"]);
    assert_eq!(world.sql(ROWS), twin.sql(ROWS));
}
