//! Kills at named points and at random times: the result is that of an undisturbed run, nothing is paid twice, readers see whole
//! tables, and what is left behind is bounded. `just torture N` makes N kills; the suite a dozen.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use arrow::datatypes::TimestampMicrosecondType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::fixtures::{Line, PIPELINE, USERS, World, log, stage};

/// One object a partition: what a reader of plain files sees.
const TABLE: &str = "warehouse/recommendations/ds=2026-11-22/part-0.parquet";
/// All that depends on the moment or on the run.
const ROWS: &str = "select user_id, item_id, title, rank, score, rec_rank, rec_score, llm_rank, llm_score, alpha, \
    long_tail_coefficient, interactions, bucket, source, reason, prompt_digest, rec_model, llm_model, ds \
    from recommendations order by user_id, rank";
/// Answers of one segment of the ledger: what a kill may cost.
const SEGMENT: usize = 16;

/// A world whose training keeps a checkpoint after every epoch, and whose table is plain files.
fn world() -> World {
    let world = delta_world();
    let pipeline = std::fs::read_to_string(world.path("pipeline.toml")).unwrap();
    let publish = "table = \"recommendations\"\n";
    assert!(pipeline.contains(publish));
    world.write("pipeline.toml", &pipeline.replace(publish, &format!("{publish}format = \"parquet\"\n")));
    world
}

/// The same with a Delta table.
fn delta_world() -> World {
    let world = World::new();
    let often = "model = \"lightgcn\"\n";
    assert!(PIPELINE.contains(often));
    let pipeline = PIPELINE.replace(often, "model = \"lightgcn\"\ncheckpoint_seconds = 0.0\n");
    world.write("pipeline.toml", &pipeline.replace("users = 10 }", "users = 24 }"));
    world
}

fn command(world: &World, args: &[&str], fault: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tailfuse"));
    command.args(args).current_dir(world.folder.path()).env("TAILFUSE_CACHE", world.path("cache"));
    // One thread: then the weights are the same bits in every run.
    command.env("RAYON_NUM_THREADS", "1").env_remove("RUST_LOG").env_remove("TAILFUSE_FAULT");
    if !fault.is_empty() {
        command.env("TAILFUSE_FAULT", fault);
    }
    command
}

fn start(world: &World, fault: &str) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(world.path("log.txt")).unwrap();
    let mut command = command(world, &["run", "pipeline.toml"], fault);
    command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn run_with(world: &World, fault: &str) -> ExitStatus {
    start(world, fault).wait().unwrap()
}

fn killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(9)
}

fn log_of(world: &World) -> String {
    std::fs::read_to_string(world.path("log.txt")).unwrap_or_default()
}

/// Runs undisturbed to the end.
fn finish(world: &World) {
    let status = run_with(world, "");
    assert!(status.success(), "{status}\n{}", log_of(world));
}

/// Every file below a folder with its size.
fn files(folder: &Path) -> BTreeMap<String, u64> {
    fn walk(top: &Path, folder: &Path, found: &mut BTreeMap<String, u64>) {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => walk(top, &path, found),
                false => {
                    let name = path.strip_prefix(top).unwrap().to_string_lossy().into_owned();
                    found.insert(name, path.metadata().map_or(0, |m| m.len()));
                }
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

/// Prompt -> when it was answered, over all segments of the ledger.
fn answered(world: &World) -> BTreeMap<String, i64> {
    let mut found = BTreeMap::new();
    let top = world.path("artifacts/ledger");
    for name in files(&top).keys().filter(|f| f.ends_with(".parquet")) {
        let file = std::fs::File::open(top.join(name)).unwrap();
        for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
            let batch = batch.unwrap();
            let digests = batch.column_by_name("prompt_digest").unwrap().as_string::<i32>();
            let asked = batch.column_by_name("llm_asked_at").unwrap().as_primitive::<TimestampMicrosecondType>();
            for row in 0..batch.num_rows() {
                let newest = found.entry(digests.value(row).to_owned()).or_insert(0);
                *newest = (*newest).max(asked.value(row));
            }
        }
    }
    found
}

/// The digests of everything that does not depend on the moment: stage -> output -> sha256.
fn digests(world: &World) -> BTreeMap<(String, String), String> {
    let (out, _) = world.expect(0, &["plan", "pipeline.toml", "--json"]);
    let plan: serde_json::Value = serde_json::from_str(&out).unwrap();
    let mut found = BTreeMap::new();
    for node in plan.as_array().unwrap() {
        // Answers carry the time at which they were given, and what is made of them does.
        let timed = ["rerank", "calibrate", "fuse", "evaluate", "write"].contains(&node["kind"].as_str().unwrap());
        let Some(fingerprint) = node["fingerprint"].as_str().filter(|_| !timed) else { continue };
        let record = std::fs::read(world.path(&format!("artifacts/{fingerprint}/stage.json"))).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        for (output, o) in record["outputs"].as_object().unwrap() {
            // The training log has seconds.
            if output != "epochs" {
                let key = (node["name"].as_str().unwrap().to_owned(), output.clone());
                found.insert(key, o["sha256"].as_str().unwrap().to_owned());
            }
        }
    }
    assert!(found.len() > 10, "{found:?}");
    found
}

/// Metrics of the last run, without the run.
fn metrics(world: &World) -> Vec<serde_json::Value> {
    world.sql(
        "select stage, system, users, bucket, metric, value, n from metrics m join \
         (select run_id from runs order by started_at desc limit 1) r on m.run_id = r.run_id order by 1, 2, 3, 4, 5",
    )
}

/// What a killed world must have in common with one that was left alone.
fn same(world: &World, twin: &World) {
    assert_eq!(digests(world), digests(twin), "tables");
    assert_eq!(world.sql(ROWS), twin.sql(ROWS), "published rows");
    assert_eq!(metrics(world), metrics(twin));
}

/// After `gc` nothing is left that the twin has not, but the segments of the ledger, which may be cut otherwise, and the twin's
/// journal and `runs`.
fn no_debris(world: &World, twin: &World) {
    for w in [world, twin] {
        w.expect(0, &["gc", "pipeline.toml", "--older-than", "0", "--keep-runs", "1"]);
    }
    let names = |w: &World| -> Vec<String> {
        let counts = |name: &String| !name.starts_with("ledger/") && !name.starts_with("journal/");
        let artifacts = files(&w.path("artifacts")).into_keys().filter(counts);
        // Where answers carry times, folders have names of their own: how many there are counts.
        let mut kinds: Vec<String> =
            artifacts.map(|n| n.split_once('/').map_or(n.clone(), |x| x.1.to_owned())).collect();
        let of_log = |n: &String| !n.contains("part-0-") && !n.starts_with("_delta_log/");
        kinds.extend(files(&w.path("warehouse/recommendations")).into_keys().filter(of_log));
        kinds.sort();
        kinds
    };
    assert_eq!(names(world), names(twin));
    // Of a Delta table: each data file is named by a commit.
    let table = world.path("warehouse/recommendations");
    let log: String = files(&table)
        .keys()
        .filter(|f| f.starts_with("_delta_log/") && f.ends_with(".json"))
        .map(|f| std::fs::read_to_string(table.join(f)).unwrap())
        .collect();
    let unnamed: Vec<String> =
        files(&table).into_keys().filter(|f| f.contains("part-0-") && !log.contains(f)).collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
    let segments = |w: &World| files(&w.path("artifacts/ledger")).len();
    assert!(segments(world) <= segments(twin) + 64, "{} and {}", segments(world), segments(twin));
    let staged = |w: &World| files(w.folder.path()).into_keys().filter(|n| n.contains('#')).collect::<Vec<_>>();
    assert_eq!(staged(world), Vec::<String>::new());
}

/// Reads a partition again and again while others publish it.
struct Reader {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicUsize>,
    wrong: Arc<Mutex<Vec<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Reader {
    fn of(path: PathBuf) -> Reader {
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
        let (stop_of, looks_of, wrong_of) = (stop.clone(), looks.clone(), wrong.clone());
        let thread = std::thread::spawn(move || {
            let mut there = false;
            while !stop_of.load(Ordering::SeqCst) {
                match look(&path) {
                    Ok(seen) => there |= seen,
                    Err(why) => wrong_of.lock().unwrap().push(why),
                }
                if there && !path.exists() {
                    wrong_of.lock().unwrap().push("the partition was gone".into());
                }
                looks_of.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        Reader { stop, looks, wrong, thread: Some(thread) }
    }

    fn end(mut self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
        let wrong = self.wrong.lock().unwrap();
        assert!(wrong.is_empty(), "{wrong:?}");
        self.looks.load(Ordering::SeqCst)
    }
}

/// The files of a partition of a Delta table, by its log alone (the tests here make fewer commits than a checkpoint takes);
/// `None` where there is no table yet. A reader of the log sees a commit whole or not at all.
fn active(table: &Path) -> Option<Vec<PathBuf>> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(table.join("_delta_log")).ok()?.flatten().map(|e| e.path()).collect();
    entries.retain(|p| p.extension().is_some_and(|e| e == "json"));
    entries.sort();
    let mut files = std::collections::BTreeSet::new();
    for entry in entries {
        for line in std::fs::read_to_string(entry).ok()?.lines() {
            let action: serde_json::Value = serde_json::from_str(line).unwrap();
            if let Some(path) = action["remove"]["path"].as_str() {
                files.remove(path);
            }
            if let Some(path) = action["add"]["path"].as_str() {
                files.insert(path.to_owned());
            }
        }
    }
    (!files.is_empty()).then(|| files.iter().map(|f| table.join(f)).collect())
}

/// One look: a whole table of one run, or nothing yet.
fn look(path: &Path) -> Result<bool, String> {
    if path.is_dir() || path.ends_with("recommendations") {
        return match active(path).as_deref() {
            None => Ok(false),
            Some([file]) => look(file),
            Some(files) => Err(format!("{} files make the partition", files.len())),
        };
    }
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e.to_string()),
    };
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).and_then(|b| b.build()).map_err(|e| e.to_string())?;
    let (mut rows, mut runs, mut per_user) = (0, std::collections::BTreeSet::new(), BTreeMap::new());
    for batch in reader {
        let batch = batch.map_err(|e| e.to_string())?;
        let ids = batch.column_by_name("run_id").ok_or("no run_id")?.as_string::<i32>();
        let users = batch.column_by_name("user_id").ok_or("no user_id")?.as_string::<i32>();
        for row in 0..batch.num_rows() {
            runs.insert(ids.value(row).to_owned());
            *per_user.entry(users.value(row).to_owned()).or_insert(0) += 1;
        }
        rows += batch.num_rows();
    }
    match rows == USERS * 5 && runs.len() == 1 && per_user.values().all(|n| *n == 5) {
        true => Ok(true),
        false => Err(format!("{rows} rows of the runs {runs:?}")),
    }
}

#[test]
fn a_kill_at_every_point_costs_nothing() {
    let (world, twin) = (delta_world(), delta_world());
    finish(&twin);
    let reader = Reader::of(world.path("warehouse/recommendations"));
    // In the order in which a run comes by, each start going on from where the one before was killed.
    let kills = [
        "source-row:1",
        "stage-data:1",
        "table-batch:2",
        "train-epoch:2",
        "checkpoint-data:2",
        "checkpoint-done:1",
        "stage-data:3",
        "rerank-row:3",
        "ledger-put:1",
        "rerank-row:18",
        "stage-done:2",
        "write-row:1",
        "write-data:1",
        "write-commit:1",
        "write-done:1",
        "runs-row:1",
    ];
    let mut before: BTreeMap<String, i64> = BTreeMap::new();
    let mut epochs = BTreeMap::new();
    for point in kills {
        let status = run_with(&world, &format!("{point}=kill"));
        assert!(killed(status), "{point}: {status}\n{}", log_of(&world));
        before.extend(answered(&world));
        epochs.extend(checkpoint_epochs(&world));
    }
    assert!(before.len() >= SEGMENT, "{}", before.len());
    assert!(!epochs.is_empty());
    finish(&world);
    // What was answered before a kill was not asked again, and an epoch that a checkpoint had was not run again.
    let after = answered(&world);
    assert!(before.iter().all(|(prompt, time)| after[prompt] == *time));
    let ran = world.sql("select epoch, seconds from model.epochs order by epoch");
    for (number, seconds) in epochs {
        let row = ran.iter().find(|r| r["epoch"] == number).unwrap();
        assert!((row["seconds"].as_f64().unwrap() - seconds).abs() < 1e-12, "epoch {number} was run again");
    }
    same(&world, &twin);
    no_debris(&world, &twin);
    assert!(reader.end() > 0);
}

/// Epoch -> seconds, of the checkpoint of a fit that was stopped.
fn checkpoint_epochs(world: &World) -> BTreeMap<i64, f64> {
    let top = world.path("artifacts/checkpoints");
    let mut found = BTreeMap::new();
    for last in files(&top).keys().filter(|f| f.ends_with("last.json")) {
        let pointer: serde_json::Value = serde_json::from_slice(&std::fs::read(top.join(last)).unwrap()).unwrap();
        let log = top.join(last).with_file_name(pointer["number"].to_string()).join("checkpoint.json");
        let log: serde_json::Value = serde_json::from_slice(&std::fs::read(log).unwrap()).unwrap();
        for epoch in log["epochs"].as_array().unwrap() {
            found.insert(epoch["number"].as_i64().unwrap(), f64::from_bits(epoch["seconds_bits"].as_u64().unwrap()));
        }
    }
    found
}

/// The log with a few lines more, so that everything is computed anew.
fn grown(night: u64) -> Vec<Line> {
    let mut lines = log();
    for u in 0..3 {
        let (user, item) = (format!("u{u:02}"), format!("m{:02}", 30 + (night as usize + u) % 10));
        lines.push((Some(user), Some(item), 4.0, 5_000 + night as i64));
    }
    lines
}

/// Kills until `total` are made, night after night into the same partition; every night must end as its twin's.
fn torture(total: usize, seed: u64, delta: bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (make, table): (fn() -> World, _) = match delta {
        true => (delta_world, "warehouse/recommendations"),
        false => (world, TABLE),
    };
    let (world, twin) = (make(), make());
    let reader = Reader::of(world.path(table));
    let (mut kills, mut night, mut answers, mut attempts) = (0, 0, 0, 0);
    while kills < total {
        night += 1;
        for w in [&world, &twin] {
            w.write_log(&grown(night));
        }
        let began = Instant::now();
        finish(&twin);
        let whole = began.elapsed();
        let mut before: BTreeMap<String, i64> = BTreeMap::new();
        // A night is killed so often at most; then it may end.
        for _ in 0..rng.random_range(3..12) {
            attempts += 1;
            let status = match rng.random_bool(0.5) {
                true => {
                    let points = tailfuse::fault::POINTS;
                    let point = points[rng.random_range(0..points.len())];
                    run_with(&world, &format!("{point}:{}=kill", rng.random_range(1..12)))
                }
                false => {
                    let mut child = start(&world, "");
                    std::thread::sleep(whole.mul_f64(rng.random_range(0.0..1.0)));
                    let _ = child.kill();
                    child.wait().unwrap()
                }
            };
            before.extend(answered(&world));
            match (killed(status), status.success()) {
                (true, _) => kills += 1,
                (false, true) => {}
                (false, false) => panic!("night {night}: {status}\n{}", log_of(&world)),
            }
            if kills >= total {
                break;
            }
        }
        finish(&world);
        let after = answered(&world);
        assert!(before.iter().all(|(prompt, time)| after[prompt] == *time), "night {night}: asked again");
        answers = after.len();
        assert_eq!(answers, answered(&twin).len(), "night {night}");
        same(&world, &twin);
        no_debris(&world, &twin);
    }
    let looks = reader.end();
    let format = if delta { "delta" } else { "parquet" };
    eprintln!(
        "{format}: {kills} kills in {attempts} starts over {night} nights (seed {seed}): every night equal to its twin's, \
         {answers} answers paid once each, {looks} looks of a reader"
    );
}

#[test]
#[ignore = "minutes; `just torture 100`"]
fn many_kills() {
    let of = |name: &str, otherwise: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(otherwise);
    let (kills, seed) = (of("TAILFUSE_TORTURE", 100) as usize, of("TAILFUSE_TORTURE_SEED", 1));
    torture(kills - kills / 2, seed, true);
    torture(kills / 2, seed, false);
}

/// Starts with every passing of a point slowed, sends SIGTERM when the log says that a stage is at work, and measures.
fn terminated(world: &World, fault: &str, stage: &str) -> Duration {
    std::fs::write(world.path("log.txt"), "").unwrap();
    let mut child = start(world, fault);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log_of(world).lines().any(|l| l.contains(stage)) {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{stage}\n{}", log_of(world));
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(60));
    let began = Instant::now();
    // SAFETY: a plain number for a process that this test has started and not yet waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(143), "{stage}: {status}\n{}", log_of(world));
    began.elapsed()
}

#[test]
fn sigterm_ends_every_long_stage_soon_and_the_same_command_resumes() {
    let (world, twin) = (world(), world());
    finish(&twin);
    for (fault, stage) in [("train-epoch=slow:400", "model (train)"), ("rerank-row=slow:150", "rerank (rerank)")] {
        let took = terminated(&world, fault, stage);
        assert!(took < Duration::from_secs(10), "{stage}: {took:?}");
        assert!(!world.path(TABLE).exists(), "{stage}");
    }
    // The signal comes while a batch is on its way to the writer, who would need no other.
    let status = run_with(&world, "write-row:1=term,write-row:1=slow:500");
    assert_eq!(status.code(), Some(143), "{status}\n{}", log_of(&world));
    assert!(!world.path(TABLE).exists());
    finish(&world);
    same(&world, &twin);
}

#[test]
fn gc_lists_and_removes_what_no_run_needs_and_nothing_else() {
    let world = world();
    finish(&world);
    let first = files(&world.path("artifacts"));
    let published = std::fs::read(world.path(TABLE)).unwrap();
    // Nothing is old enough, and all of it is needed.
    let report = gc(&world, &["--dry-run"]);
    assert!(report["removed"].as_array().unwrap().is_empty(), "{report}");
    // Other data: the first night's results are needed by no pipeline as it stands, but by its last run.
    world.write_log(&grown(1));
    let report = gc(&world, &["--older-than", "0", "--dry-run", "--keep-runs", "1"]);
    assert!(report["removed"].as_array().unwrap().is_empty(), "{report}");
    finish(&world);
    world.write("artifacts/0123456789abcdef0123456789abcdef/rows.parquet", "half");
    world.write("artifacts/checkpoints/abc/0/checkpoint.json", "{}");
    world.write("warehouse/recommendations/ds=2026-11-22/part-0.parquet#1", "half");
    let all = files(world.folder.path());
    let report = gc(&world, &["--older-than", "0", "--dry-run", "--keep-runs", "1"]);
    assert_eq!(files(world.folder.path()), all, "a dry run removes nothing");
    let mut whats: BTreeMap<&str, usize> = BTreeMap::new();
    for removal in report["removed"].as_array().unwrap() {
        *whats.entry(removal["what"].as_str().unwrap()).or_default() += 1;
    }
    for what in ["unused result", "unfinished result", "old checkpoint", "cut-off write", "old run"] {
        assert!(whats.contains_key(what), "{what} is missing: {whats:?}");
    }
    let (out, _) = world.expect(0, &["gc", "pipeline.toml", "--older-than", "0", "--keep-runs", "1"]);
    assert!(out.contains("removed"), "{out}");
    let left = files(&world.path("artifacts"));
    assert!(left.keys().all(|f| !f.starts_with("checkpoints/") && !f.starts_with("0123456789abcdef")));
    assert!(!world.path(&format!("{TABLE}#1")).exists() && world.path(TABLE).exists());
    let of_ledger = |f: &BTreeMap<String, u64>| f.keys().filter(|k| k.starts_with("ledger/")).count();
    assert!(of_ledger(&left) >= of_ledger(&first));
    // All of the second night is there still: nothing is computed again.
    let document = world.run(&["pipeline.toml"]);
    for s in document["stages"].as_array().unwrap() {
        assert_eq!(s["cached"], s["kind"] != "write", "{}", s["name"]);
    }
    assert_ne!(published, std::fs::read(world.path(TABLE)).unwrap());
    // Answers go where an age is given for them.
    gc(&world, &["--older-than", "0", "--answers-older-than", "0"]);
    assert!(files(&world.path("artifacts")).keys().all(|f| !f.starts_with("ledger/")));
}

fn gc(world: &World, args: &[&str]) -> serde_json::Value {
    let (out, _) = world.expect(0, &[&["gc", "pipeline.toml", "--json"], args].concat());
    serde_json::from_str(&out).unwrap()
}

#[test]
fn gc_spares_what_a_run_at_work_uses() {
    let world = world();
    let mut child = start(&world, "rerank-row=slow:60");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log_of(&world).lines().any(|l| l.contains("rerank (rerank)")) {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", log_of(&world));
        std::thread::sleep(Duration::from_millis(5));
    }
    // Even as another pipeline would see it, which needs none of that.
    let settings = ["--set", "model.hyper.embedding_dim=4", "--older-than", "0", "--keep-runs", "0"];
    let report = gc(&world, &settings);
    assert_eq!(report["runs_at_work"].as_array().unwrap().len(), 1, "{report}");
    assert!(report["removed"].as_array().unwrap().is_empty(), "{report}");
    assert!(child.wait().unwrap().success(), "{}", log_of(&world));
}

#[test]
fn skip_current_and_on_missing_are_skips() {
    let world = world();
    let document = world.run(&["pipeline.toml", "--skip-current"]);
    assert_eq!(document["status"], "ok");
    let runs = world.sql("select count(*) n from runs")[0]["n"].clone();
    let (out, err) = world.expect(99, &["run", "pipeline.toml", "--skip-current"]);
    let document: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&document["status"], &document["error"]["code"]), (&"skipped".into(), &"nothing_to_do".into()));
    assert!(err.contains("recommendations/ds=2026-11-22 is current"), "{err}");
    assert_eq!(world.sql("select count(*) n from runs")[0]["n"], runs);
    // Somebody else wrote the partition: it is not what this run would publish.
    let bytes = std::fs::read(world.path(TABLE)).unwrap();
    std::fs::write(world.path(TABLE), &bytes[..bytes.len() - 1]).unwrap();
    world.run(&["pipeline.toml", "--skip-current"]);
    assert_eq!(std::fs::read(world.path(TABLE)).unwrap(), bytes);
    // Other data is not current either.
    world.write_log(&grown(1));
    world.run(&["pipeline.toml", "--skip-current"]);

    let source = "[sources.events]\nuri = \"data/events.parquet\"\n";
    let pipeline = std::fs::read_to_string(world.path("pipeline.toml")).unwrap();
    assert!(pipeline.contains(source));
    let elsewhere =
        |more: &str| pipeline.replace(source, &format!("[sources.events]\nuri = \"data/nothing/\"\n{more}"));
    world.write("pipeline.toml", &elsewhere(""));
    world.expect(65, &["run", "pipeline.toml"]);
    world.write("pipeline.toml", &elsewhere("on_missing = \"skip\"\n"));
    let (_, err) = world.expect(99, &["run", "pipeline.toml"]);
    assert!(err.contains("nothing to do"), "{err}");
    // Earlier days are there, this one is not.
    let day = world.path("data/days/ds=2026-11-21/events.parquet");
    std::fs::create_dir_all(day.parent().unwrap()).unwrap();
    std::fs::copy(world.path("data/events.parquet"), &day).unwrap();
    let days = |more: &str| {
        let needs = "needs = { ds = \"{{ ds }}\" }\n";
        pipeline.replace(source, &format!("[sources.events]\nuri = \"data/days/\"\n{needs}{more}"))
    };
    world.write("pipeline.toml", &days(""));
    let (_, err) = world.expect(65, &["run", "pipeline.toml"]);
    assert!(err.contains("ds=2026-11-22"), "{err}");
    world.write("pipeline.toml", &days("on_missing = \"skip\"\n"));
    world.expect(99, &["run", "pipeline.toml"]);
    world.run(&["pipeline.toml", "--param", "ds=2026-11-21"]);
}

#[test]
fn shards_fill_the_ledger_and_one_run_publishes() {
    let (world, twin) = (world(), world());
    finish(&twin);
    let mut asked = 0;
    for shard in ["0/3", "1/3", "2/3"] {
        let document = world.run(&["pipeline.toml", "--shard", shard]);
        asked += stage(&document, "rerank")["counters"]["users_asked"].as_u64().unwrap();
        let names: Vec<&str> =
            document["stages"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
        assert!(!names.contains(&"fused") && !names.contains(&"publish"), "{names:?}");
        assert!(document["tables"].as_array().unwrap().is_empty());
    }
    assert!(!world.path("warehouse").exists(), "a share publishes nothing");
    assert_eq!(asked as usize, USERS);
    let document = world.run(&["pipeline.toml"]);
    let counters = &stage(&document, "rerank")["counters"];
    assert_eq!(counters["prompts_reused"], counters["prompts"], "{counters}");
    same(&world, &twin);
    world.expect(2, &["run", "pipeline.toml", "--shard", "3/3"]);
    // Only what a stage needs, and nothing published.
    let other = self::world();
    let document = other.run(&["pipeline.toml", "--until", "shortlist"]);
    assert!(document["stages"].as_array().unwrap().iter().all(|s| s["kind"] != "rerank" && s["kind"] != "write"));
    other.expect(2, &["run", "pipeline.toml", "--until", "shortlisst"]);
}

#[test]
fn minutes_become_users_by_the_recorded_rate_and_are_kept() {
    use crate::remote_server::by_heart_server;
    let server = by_heart_server(None, 100);
    let world = world();
    let pipeline = std::fs::read_to_string(world.path("pipeline.toml")).unwrap();
    let here = "model = \"llm\"\nprompts = \"prompts\"\nskipped = \"prompts.skipped\"\n";
    assert!(pipeline.contains(here));
    let engine = format!(
        "prompts = \"prompts\"\nskipped = \"prompts.skipped\"\n\
         engine = {{ kind = \"openai\", url = \"{}\", model = \"m\", concurrency = 1 }}\n",
        server.url()
    );
    let pipeline = pipeline.replace(here, &engine).replace("llm = \"llm\"\n", "");
    world.write("pipeline.toml", &pipeline.replace("budget = { users = 24 }\n", ""));
    let run = |more: &[&str]| {
        let mut all = vec!["run", "pipeline.toml"];
        all.extend(more);
        let output = command(&world, &all, "").env("NO_PROXY", "127.0.0.1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let document: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        (document, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // The first night records a rate.
    let (first, _) = run(&[]);
    let counters = &stage(&first, "rerank")["counters"];
    assert_eq!(counters["users_asked"], USERS);
    let seconds = counters["llm_seconds"].as_f64().unwrap();
    // The second one may take half of that.
    world.write_log(&grown(1));
    let budget = seconds / 2.0 / 60.0;
    let text = format!("{budget}");
    let (out, _) = world.expect(0, &["plan", "pipeline.toml", "--budget", &text]);
    assert!(out.contains("last night: ") && out.contains("LLM tokens"), "{out}");
    let (second, said) = run(&["--budget", &text]);
    let counters = &stage(&second, "rerank")["counters"];
    let took = counters["llm_seconds"].as_f64().unwrap() / 60.0;
    let users = counters["users_asked"].as_u64().unwrap() as usize;
    assert!(users > 4 && users < USERS, "{users} users\n{said}");
    // Who was answered in the first night counts against the budget, so that a run that was killed asks the same users again,
    // and takes no time.
    let count = |name: &str| counters[name].as_f64().unwrap();
    let budget = budget * (count("prompts") - count("prompts_reused")) / count("prompts");
    // By whole users: one of them is the least that a budget can miss.
    let one = budget / users as f64;
    assert!((took - budget).abs() <= 0.15 * budget + one, "{took} of {budget} minutes\n{said}");
    // The same night again keeps its number, whatever the rate is by now.
    let (again, _) = run(&["--budget", &text]);
    assert_eq!(stage(&again, "rerank")["cached"], true);
    // A machine that knows no rate asks a few users to measure one.
    std::fs::remove_dir_all(world.path("artifacts/journal")).unwrap();
    world.write_log(&grown(2));
    let (_, said) = run(&["--budget", &text]);
    assert!(said.contains("prompt tokens per second"), "{said}");
}

#[test]
fn a_partition_that_was_written_again_is_noticed_and_a_new_column_breaks_nothing() {
    use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray};
    let world = World::new();
    let source = "uri = \"data/events.parquet\"\n";
    assert!(PIPELINE.contains(source));
    world.write("pipeline.toml", &PIPELINE.replace(source, "uri = \"data/days/\"\nfilter = \"ds <= '{{ ds }}'\"\n"));
    let day = |ds: &str, lines: &[Line], device: bool| {
        let mut columns: Vec<(&str, ArrayRef)> = vec![
            ("uid", Arc::new(StringArray::from_iter(lines.iter().map(|l| l.0.clone())))),
            ("movie", Arc::new(StringArray::from_iter(lines.iter().map(|l| l.1.clone())))),
            ("stars", Arc::new(Float64Array::from_iter_values(lines.iter().map(|l| l.2)))),
            ("ts", Arc::new(Int64Array::from_iter_values(lines.iter().map(|l| l.3)))),
        ];
        if device {
            columns.push(("device", Arc::new(StringArray::from(vec!["phone"; lines.len()]))));
        }
        crate::fixtures::write_parquet(&world.path(&format!("data/days/ds={ds}/events.parquet")), columns);
    };
    let lines = log();
    let (first, second) = lines.split_at(lines.len() / 2);
    let (second, third) = second.split_at(second.len() / 2);
    day("2026-11-20", first, false);
    day("2026-11-21", second, false);
    let days = ["run", "pipeline.toml", "--until", "parts", "--param"];
    let whole = |ds: &str| world.expect(0, &["run", "pipeline.toml", "--param", &format!("ds={ds}")]);
    let (_, said) = whole("2026-11-21");
    assert!(!said.contains("written again"), "{said}");
    // A day more, with a column more: nothing was written again.
    day("2026-11-22", third, true);
    let (_, said) = whole("2026-11-22");
    assert!(!said.contains("written again"), "{said}");
    assert_eq!(
        world.sql("select count(distinct user_id) n from recommendations where ds = '2026-11-22'")[0]["n"],
        USERS
    );
    // The first day is corrected.
    day("2026-11-20", &first[1..], false);
    let (out, said) = world.expect(0, &[&days[..], &["ds=2026-11-22"]].concat());
    assert!(said.contains("ds=2026-11-20") && said.contains("written again"), "{said}");
    let document: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(stage(&document, "events")["counters"]["restated_partitions"], 1);
}
