//! `train`, `search`, `predict` and `evaluate` as stages, on small logs: interruption and resumption, a second fit on
//! train and validation, the space of a search, bad input. What loops over the registry covers new backbones too.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, StringArray};
use arrow::datatypes::Float64Type;
use serde_json::{Value, json};
use tailfuse::device::DeviceChoice;
use tailfuse::error::{Fault, Result};
use tailfuse::recommenders::{BACKBONES, Backbone, Task};
use tailfuse::stages::context::Cancel;
use tailfuse::stages::registry::find;
use tailfuse::stages::{Artifact, Observer, OutputTable, ResolveContext, Stage, StageContext, StageInput, StageResult};
use tailfuse::tables::{Store, StoredTable, Table};

/// A place for inputs and savings, and what was said.
struct Bench {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

/// Counts epochs (or fits), and asks for a stop after some.
struct Counting {
    done: AtomicUsize,
    stop_after: Option<usize>,
    cancel: Cancel,
}

impl Observer for Counting {
    fn begin(&self, _: &str, _: u64) {
        self.done.store(0, Ordering::SeqCst);
    }
    fn advance(&self, n: u64) {
        let done = self.done.fetch_add(n as usize, Ordering::SeqCst) + n as usize;
        if self.stop_after == Some(done) {
            self.cancel.request(15);
        }
    }
    fn note(&self, _: &str) {}
}

type Inputs<'a> = &'a [(&'a str, Input<'a>)];

#[derive(Clone, Copy)]
enum Input<'a> {
    Table(&'a Table),
    Artifact(&'a Artifact),
}

impl Bench {
    fn new() -> Bench {
        Bench { folder: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Runtime::new().unwrap() }
    }

    fn stage(kind: &str, config: Value) -> Result<Box<dyn Stage>> {
        let context = ResolveContext { root: Path::new("."), history_at_test: "train+valid" };
        (find(kind).unwrap().resolve)(config, &context)
    }

    fn saved_files(&self) -> usize {
        let store = Store::local(&self.folder.path().join("savings")).unwrap();
        self.runtime.block_on(store.list("")).unwrap().len()
    }

    fn run(&self, kind: &str, config: Value, inputs: Inputs<'_>) -> Result<StageResult> {
        self.run_until(kind, config, inputs, None)
    }

    /// Runs; after `stop_after` units of work a stop is asked for.
    fn run_until(
        &self,
        kind: &str,
        config: Value,
        inputs: Inputs<'_>,
        stop_after: Option<usize>,
    ) -> Result<StageResult> {
        let stage = Bench::stage(kind, config)?;
        let store = Store::local(&self.folder.path().join("inputs")).unwrap();
        let cancel = Cancel::default();
        let observer = Counting { done: AtomicUsize::new(0), stop_after, cancel: cancel.clone() };
        self.runtime.block_on(async {
            let mut given = BTreeMap::new();
            for (slot, input) in inputs {
                let input = match input {
                    Input::Table(table) => {
                        StageInput::Table(StoredTable::write(&store, &format!("{slot}.parquet"), table).await.unwrap())
                    }
                    Input::Artifact(artifact) => {
                        StageInput::Artifact { digest: "d".to_owned(), artifact: (*artifact).clone() }
                    }
                };
                given.insert((*slot).to_owned(), input);
            }
            let ctx = StageContext {
                name: "x".to_owned(),
                seed: 11,
                device: DeviceChoice::Cpu,
                inputs: given,
                models: BTreeMap::new(),
                savings: Store::local(&self.folder.path().join("savings")).unwrap(),
                warehouse: Store::local(&self.folder.path().join("warehouse")).unwrap(),
                publishing: Default::default(),
                run_id: "r".to_owned(),
                memory_limit: 1 << 28,
                spill_dir: None,
                observer: Arc::new(observer),
                cancel,
            };
            stage.run(&ctx).await
        })
    }
}

fn memory(result: &StageResult, name: &str) -> Table {
    match &result.tables[name] {
        OutputTable::Memory(table) => table.clone(),
        OutputTable::Stream(_) => panic!("a table in memory was expected"),
    }
}

fn strings(table: &Table, name: &str) -> Vec<String> {
    table.strings(name).unwrap().into_iter().map(Option::unwrap_or_default).collect()
}

fn optional(table: &Table, name: &str) -> Vec<Option<f64>> {
    let column = table.column_as(name, &arrow::datatypes::DataType::Float64).unwrap();
    column.as_primitive::<Float64Type>().iter().collect()
}

/// A log line: user, item, rating, time.
type Line = (i64, i64, f64, i64);

fn log(lines: &[Line]) -> Table {
    let ints = |of: fn(&Line) -> i64| Arc::new(lines.iter().map(of).collect::<Int64Array>()) as ArrayRef;
    Table::from_columns(vec![
        ("user_id", ints(|l| l.0), false),
        ("item_id", ints(|l| l.1), false),
        ("rating", Arc::new(Float64Array::from_iter_values(lines.iter().map(|l| l.2))), false),
        ("timestamp", ints(|l| l.3), false),
        ("row_id", Arc::new((0..lines.len() as i64).collect::<Int64Array>()), false),
    ])
    .unwrap()
}

/// Users of two tastes, each with the last two interactions apart: (train, valid, test, history, all).
struct Parts {
    train: Table,
    valid: Table,
    test: Table,
    history: Table,
    all: Table,
}

fn lines(users: i64, each: i64) -> Vec<Line> {
    (0..users)
        .flat_map(|u| {
            (0..each).map(move |n| {
                let item = 2 * ((u * 3 + n * 5) % 12) + u % 2;
                let rating = 1.0 + ((u + item) % 5) as f64;
                // Two at a time have the same time.
                (u, item, rating, 100 + n / 2)
            })
        })
        .collect()
}

fn parts(users: i64, each: i64) -> Parts {
    let all = lines(users, each);
    let of = |keep: &dyn Fn(i64) -> bool| {
        let kept: Vec<Line> = all.iter().enumerate().filter(|(n, _)| keep(*n as i64 % each)).map(|(_, l)| *l).collect();
        log(&kept)
    };
    Parts {
        train: of(&|n| n < each - 2),
        valid: of(&|n| n == each - 2),
        test: of(&|n| n == each - 1),
        history: of(&|n| n < each - 1),
        all: log(&all),
    }
}

/// Hyper-parameters that are quick, as far as a model has them.
fn quick(backbone: &Backbone, epochs: u32) -> Value {
    let wanted = json!({
        "embedding_dim": 4, "factors": 4, "learning_rate": 0.01, "batch_size": 16, "epochs": epochs, "max_len": 6,
        "dnn_hidden_units": [8], "eval_every": 1, "patience": 100, "heads": 2, "warmup_epochs": 0,
    });
    let schema = (backbone.schema)();
    let known = schema.get("properties").unwrap().as_object().unwrap();
    wanted
        .as_object()
        .unwrap()
        .iter()
        .filter(|(n, _)| known.contains_key(*n))
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect()
}

fn has_epochs(backbone: &Backbone) -> bool {
    quick(backbone, 1).get("epochs").is_some()
}

/// Epoch, loss and validation of each row: all but the seconds.
fn curve(result: &StageResult, task: Task) -> Vec<(i32, u64, Option<u64>)> {
    let table = memory(result, "epochs");
    let valid = if task == Task::Rating { "valid_rmse" } else { "valid_ndcg_10" };
    let bits = |v: Vec<Option<f64>>| v.into_iter().map(|x| x.map(f64::to_bits)).collect::<Vec<_>>();
    let (loss, valid) = (bits(optional(&table, "loss")), bits(optional(&table, valid)));
    table.i32s("epoch").unwrap().into_iter().zip(loss).zip(valid).map(|((e, l), v)| (e, l.unwrap(), v)).collect()
}

#[test]
fn a_run_that_was_stopped_ends_with_the_same_model_as_one_that_was_not() {
    let parts = parts(12, 8);
    for backbone in BACKBONES.iter().filter(|b| has_epochs(b)) {
        let config = json!({
            "model": backbone.name, "train": "train", "valid": "valid", "hyper": quick(backbone, 5),
            "refit": "train+valid", "checkpoint_seconds": 0.0,
        });
        let inputs = [("train", Input::Table(&parts.train)), ("valid", Input::Table(&parts.valid))];
        let straight = Bench::new().run("train", config.clone(), &inputs).unwrap();
        let bench = Bench::new();
        let error = bench.run_until("train", config.clone(), &inputs, Some(3)).err().unwrap();
        assert_eq!(error.fault, Fault::Terminated, "{}: {error}", backbone.name);
        assert!(bench.saved_files() > 0, "{}: no checkpoint", backbone.name);
        let resumed = bench.run("train", config, &inputs).unwrap();
        assert!(resumed.artifacts["model"].files == straight.artifacts["model"].files, "{}", backbone.name);
        assert_eq!(curve(&resumed, backbone.task), curve(&straight, backbone.task), "{}", backbone.name);
        assert_eq!(resumed.counters["weights_fit_on"], "train+valid");
        assert_eq!(bench.saved_files(), 0, "{}: a checkpoint was left", backbone.name);
    }
}

/// A figure that is there is a number.
fn check_figures(name: &str, case: &str, result: &StageResult) {
    for (key, value) in &result.counters {
        assert!(!value.is_f64() || value.as_f64().unwrap().is_finite(), "{name}, {case}: {key} is {value}");
    }
    for output in result.tables.keys() {
        let table = memory(result, output);
        for field in table.schema().fields() {
            if matches!(field.data_type(), arrow::datatypes::DataType::Float64 | arrow::datatypes::DataType::Float32) {
                let finite = optional(&table, field.name()).into_iter().flatten().all(f64::is_finite);
                assert!(finite, "{name}, {case}: {output}.{}", field.name());
            }
        }
    }
}

/// Fits, then ranks or predicts for everyone in `history`, and evaluates.
fn whole_path(bench: &Bench, backbone: &Backbone, case: &str, train: &Table, valid: Option<&Table>, parts: &Parts) {
    let name = backbone.name;
    let mut config = json!({"model": name, "train": "train", "hyper": quick(backbone, 2)});
    let mut inputs = vec![("train", Input::Table(train))];
    if let Some(valid) = valid {
        config["valid"] = "valid".into();
        inputs.push(("valid", Input::Table(valid)));
    }
    let fitted = bench.run("train", config, &inputs).unwrap_or_else(|e| panic!("{name}, {case}: {e}"));
    check_figures(name, case, &fitted);
    let model = Input::Artifact(&fitted.artifacts["model"]);
    let (kind, config, slots, evaluate) = match backbone.task {
        Task::Rating => (
            "predict",
            json!({"model": "m", "pairs": "pairs"}),
            vec![("model", model), ("pairs", Input::Table(&parts.test))],
            json!({"predictions": "predictions", "test": "test", "model": "model"}),
        ),
        Task::Direct | Task::Sequential => (
            "recommend",
            json!({"model": "m", "history": "h", "k": 10}),
            vec![("model", model), ("history", Input::Table(&parts.history))],
            json!({"shortlist": "shortlist", "test": "test", "model": "model"}),
        ),
    };
    let given = bench.run(kind, config, &slots).unwrap_or_else(|e| panic!("{name}, {case}: {e}"));
    check_figures(name, case, &given);
    let slot = if backbone.task == Task::Rating { "predictions" } else { "shortlist" };
    let ranked = memory(&given, slot);
    let inputs = [(slot, Input::Table(&ranked)), ("test", Input::Table(&parts.test)), ("model", model)];
    let found = bench.run("evaluate", evaluate, &inputs).unwrap_or_else(|e| panic!("{name}, {case}: {e}"));
    check_figures(name, case, &found);
    let fit_on = strings(&memory(&found, "metrics"), "weights_fit_on");
    assert!(!fit_on.is_empty() && fit_on.iter().all(|f| f == "train"), "{name}, {case}");
}

#[test]
fn whatever_the_log_holds_no_backbone_panics_or_gives_a_figure_that_is_no_number() {
    let bench = Bench::new();
    let parts = parts(10, 7);
    let mut once = lines(10, 5);
    // Users with one interaction; one who rates an item that nobody else has seen.
    once.extend([(100, 3, 4.0, 1), (101, 999, 2.0, 1)]);
    let constant: Vec<Line> = lines(10, 5).into_iter().map(|(u, i, _, t)| (u, i, 3.0, t)).collect();
    // Longer than any `max_len` of these tests.
    let long: Vec<Line> = (0..40).map(|n| (1, n % 24, 2.0, n)).chain(lines(6, 5)).collect();
    let nobody = log(&[]);
    for backbone in BACKBONES {
        whole_path(&bench, backbone, "a small log", &parts.train, Some(&parts.valid), &parts);
        whole_path(&bench, backbone, "users with one interaction", &log(&once), Some(&parts.valid), &parts);
        whole_path(&bench, backbone, "constant ratings", &log(&constant), Some(&parts.valid), &parts);
        whole_path(&bench, backbone, "a long history", &log(&long), Some(&parts.valid), &parts);
        whole_path(&bench, backbone, "empty validation", &parts.train, Some(&nobody), &parts);
        whole_path(&bench, backbone, "no validation", &parts.train, None, &parts);
        // Most users and items of the test are unknown to this one.
        whole_path(&bench, backbone, "one user", &log(&lines(1, 4)), Some(&parts.valid), &parts);
    }
}

#[test]
fn a_rating_that_is_no_number_is_named_with_its_row() {
    let bench = Bench::new();
    let mut lines = lines(4, 5);
    lines[3].2 = f64::NAN;
    for backbone in BACKBONES.iter().filter(|b| b.task == Task::Rating) {
        let config = json!({"model": backbone.name, "train": "train", "hyper": quick(backbone, 1)});
        let error = bench.run("train", config, &[("train", Input::Table(&log(&lines)))]).err().unwrap();
        assert_eq!(error.fault, Fault::Data, "{error}");
        assert!(error.message.contains("`rating`") && error.message.contains("row 3"), "{error}");
    }
}

#[test]
fn a_training_that_diverges_stops_with_a_clear_error() {
    let bench = Bench::new();
    let parts = parts(10, 7);
    let mut diverged = 0;
    for backbone in BACKBONES.iter().filter(|b| has_epochs(b) && b.task == Task::Rating) {
        let mut hyper = quick(backbone, 40);
        hyper["learning_rate"] = json!(1.0);
        let lines: Vec<Line> = lines(10, 5).into_iter().map(|(u, i, r, t)| (u, i, r * 1e30, t)).collect();
        let config = json!({"model": backbone.name, "train": "train", "hyper": hyper});
        match bench.run("train", config, &[("train", Input::Table(&log(&lines)))]) {
            Ok(result) => check_figures(backbone.name, "ratings of 1e30", &result),
            Err(error) => {
                assert_eq!(error.fault, Fault::Spec, "{error}");
                assert!(error.message.contains("diverged in epoch"), "{error}");
                assert!(error.help.unwrap().contains("learning_rate"));
                diverged += 1;
            }
        }
    }
    assert!(diverged > 0, "no model diverged on ratings of 1e30");
    drop(parts);
}

fn search_config(model: &str) -> Value {
    json!({
        "model": model, "train": "train", "valid": "valid", "test": "test", "history": "history", "trials": 4,
        "space": {"learning_rate": {"log": [0.001, 0.1]}, "embedding_dim": [2, 4]},
        "fixed": {"epochs": 3, "batch_size": 16, "eval_every": 1}, "seeds": 2, "confirm_seeds": 3,
    })
}

#[test]
fn a_search_that_was_stopped_repeats_no_fit_and_ends_the_same() {
    let parts = parts(12, 8);
    let inputs = [
        ("train", Input::Table(&parts.train)),
        ("valid", Input::Table(&parts.valid)),
        ("test", Input::Table(&parts.test)),
        ("history", Input::Table(&parts.history)),
    ];
    let without_seconds = |result: &StageResult| {
        let rows = memory(result, "trials");
        let text = |name: &str| strings(&rows, name);
        (rows.i32s("trial").unwrap(), text("setting"), text("status"), optional(&rows, "valid"), text("hyper"))
    };
    let straight = Bench::new().run("search", search_config("mf"), &inputs).unwrap();
    let bench = Bench::new();
    let error = bench.run_until("search", search_config("mf"), &inputs, Some(5)).err().unwrap();
    assert_eq!(error.fault, Fault::Terminated);
    let resumed = bench.run("search", search_config("mf"), &inputs).unwrap();
    assert_eq!((&resumed.counters["fits"], &resumed.counters["fits_kept"]), (&json!(11), &json!(5)));
    assert_eq!(straight.counters["fits_kept"], json!(0));
    assert_eq!(without_seconds(&resumed), without_seconds(&straight));
    assert!(resumed.artifacts["best"].files == straight.artifacts["best"].files);
    let figures =
        |r: &StageResult| (strings(&memory(r, "confirmed"), "metric"), optional(&memory(r, "confirmed"), "value"));
    assert_eq!(figures(&resumed), figures(&straight));

    // What was chosen has the best mean on validation, over both seeds.
    let trials = memory(&straight, "trials");
    let valid: Vec<f64> = optional(&trials, "valid").into_iter().flatten().collect();
    let means: Vec<f64> = valid.chunks(2).map(|v| (v[0] + v[1]) / 2.0).collect();
    let best = means.iter().copied().fold(0.0, f64::max);
    let chosen = straight.counters["best_trial"].as_u64().unwrap() as usize;
    assert_eq!(means[chosen - 1], best);
    let flags = trials.column("chosen").unwrap();
    let flagged: Vec<usize> = (0..8).filter(|&n| flags.as_boolean().value(n)).collect();
    assert_eq!(flagged, [2 * chosen - 2, 2 * chosen - 1]);
    let metrics = strings(&memory(&straight, "confirmed"), "metric");
    assert_eq!(metrics.len(), 3 * 6);
    assert_eq!(metrics[..6], ["Hit@3", "NDCG@3", "Hit@5", "NDCG@5", "Hit@10", "NDCG@10"]);

    // More trials pay for the new ones only: the first are the same.
    let mut more = search_config("mf");
    more["trials"] = json!(5);
    let more = bench.run("search", more, &inputs).unwrap();
    let new = more.counters["fits"].as_u64().unwrap() - more.counters["fits_kept"].as_u64().unwrap();
    assert!((2..=5).contains(&new), "{new} new fits");
}

#[test]
fn what_a_search_found_is_what_train_takes_and_evaluate_measures() {
    let bench = Bench::new();
    let parts = parts(12, 8);
    let history = [("history", Input::Table(&parts.history)), ("test", Input::Table(&parts.test))];
    let data = [("train", Input::Table(&parts.train)), ("valid", Input::Table(&parts.valid))];
    let all = [data, history].concat();
    let mut config = search_config("lightgcn");
    config["confirm_seeds"] = json!(1);
    let search = bench.run("search", config, &all).unwrap();
    // The stage's seed is that of the first confirmed fit.
    let config = json!({"model": "lightgcn", "train": "train", "valid": "valid", "hyper_from": "search.best"});
    let best = [("hyper_from", Input::Artifact(&search.artifacts["best"]))];
    let fitted = bench.run("train", config, &[&data[..], &best[..]].concat()).unwrap();
    let model = Input::Artifact(&fitted.artifacts["model"]);
    let shortlist =
        bench.run("recommend", json!({"model": "m", "history": "h"}), &[("model", model), history[0]]).unwrap();
    let shortlist = memory(&shortlist, "shortlist");
    let config = json!({
        "shortlist": "s", "test": "t", "model": "m", "tie_orders": {"interactions": "all", "draws": 3},
    });
    let inputs = [
        ("shortlist", Input::Table(&shortlist)),
        history[1],
        ("model", model),
        ("tie_orders.interactions", Input::Table(&parts.all)),
    ];
    let found = bench.run("evaluate", config.clone(), &inputs).unwrap();
    // Three ways to the same figures: the search, the evaluation, and the file order of the tie orders.
    let confirmed = optional(&memory(&search, "confirmed"), "value");
    let metrics = memory(&found, "metrics");
    let all_users: Vec<Option<f64>> = strings(&metrics, "bucket")
        .iter()
        .zip(optional(&metrics, "value"))
        .filter(|(bucket, _)| *bucket == "all")
        .map(|(_, v)| v)
        .collect();
    assert_eq!(all_users, confirmed);
    let ties = memory(&found, "tie_orders");
    assert_eq!(optional(&ties, "file_order"), confirmed);
    assert_eq!(ties.i32s("draws").unwrap(), [3; 6]);
    let (mean, low, high) = (optional(&ties, "mean"), optional(&ties, "min"), optional(&ties, "max"));
    for n in 0..6 {
        assert!(low[n] <= mean[n] && mean[n] <= high[n]);
    }
    // Every user's last two have one time, so the draws differ.
    assert!(optional(&ties, "sd").into_iter().any(|sd| sd.unwrap() > 0.0));
    let again = bench.run("evaluate", config, &inputs).unwrap();
    assert_eq!((&found.counters["draws_kept"], &again.counters["draws_kept"]), (&json!(0), &json!(4)));
    assert_eq!(optional(&memory(&again, "tie_orders"), "mean"), mean);
}

#[test]
fn a_trial_that_diverges_is_a_row_and_no_end() {
    let bench = Bench::new();
    let lines: Vec<Line> = lines(10, 6).into_iter().map(|(u, i, r, t)| (u, i, r * 1e18, t)).collect();
    let inputs = [("train", Input::Table(&log(&lines))), ("valid", Input::Table(&log(&lines[..8])))];
    let config = json!({
        "model": "deepfm", "train": "train", "valid": "valid", "trials": 2, "space": {"learning_rate": [0.0, 1.0]},
        "fixed": {"epochs": 30, "dnn_hidden_units": [4], "embedding_dim": 2, "batch_size": 8},
    });
    match bench.run("search", config, &inputs) {
        Ok(result) => {
            let rows = memory(&result, "trials");
            for (status, valid) in strings(&rows, "status").iter().zip(optional(&rows, "valid")) {
                assert_eq!(status == "ok", valid.is_some(), "{status}");
            }
        }
        Err(error) => assert!(error.fault == Fault::Spec && error.message.contains("no trial"), "{error}"),
    }
}

#[test]
fn an_empty_space_is_one_trial_and_every_backbone_can_be_confirmed() {
    let bench = Bench::new();
    let parts = parts(10, 7);
    for backbone in BACKBONES {
        let mut config = json!({
            "model": backbone.name, "train": "train", "valid": "valid", "test": "test", "trials": 9,
            "fixed": quick(backbone, 2), "confirm_seeds": 2,
        });
        let mut inputs = vec![
            ("train", Input::Table(&parts.train)),
            ("valid", Input::Table(&parts.valid)),
            ("test", Input::Table(&parts.test)),
        ];
        if backbone.task != Task::Rating {
            config["history"] = "history".into();
            inputs.push(("history", Input::Table(&parts.history)));
        }
        let result = bench.run("search", config, &inputs).unwrap_or_else(|e| panic!("{}: {e}", backbone.name));
        assert_eq!(result.counters["trials"], json!(1), "{}", backbone.name);
        // The trial's fit is the first one on test too.
        assert_eq!((&result.counters["fits"], &result.counters["fits_kept"]), (&json!(3), &json!(1)));
        assert!(result.counters["best_valid"].is_number(), "{}: nothing was measured", backbone.name);
        check_figures(backbone.name, "search", &result);
    }
}

#[test]
fn side_columns_reach_the_model_and_the_prediction() {
    let bench = Bench::new();
    let parts = parts(12, 8);
    let users = Table::from_columns(vec![
        ("user_id", Arc::new((0..14).collect::<Int64Array>()) as ArrayRef, false),
        ("age", Arc::new((0..14).map(|u| 20 + u).collect::<Int64Array>()), false),
        ("job", Arc::new((0..14).map(|u| (u != 3).then(|| format!("j{}", u % 2))).collect::<StringArray>()), true),
    ])
    .unwrap();
    let items = Table::from_columns(vec![
        ("item_id", Arc::new((0..30).collect::<Int64Array>()) as ArrayRef, false),
        ("genres", Arc::new((0..30).map(|i| Some(format!("g{}|g{}", i % 2, i % 3))).collect::<StringArray>()), false),
    ])
    .unwrap();
    for backbone in BACKBONES.iter().filter(|b| b.task == Task::Rating) {
        let config = json!({
            "model": backbone.name, "train": "train", "valid": "valid", "users": "users", "items": "items",
            "hyper": quick(backbone, 3),
            "fields": {"user": ["age", "job"], "item": ["genres"], "row": ["timestamp"],
                "multi": ["genres"], "dense": ["age", "timestamp"]},
        });
        let inputs = [
            ("train", Input::Table(&parts.train)),
            ("valid", Input::Table(&parts.valid)),
            ("users", Input::Table(&users)),
            ("items", Input::Table(&items)),
        ];
        let fitted = bench.run("train", config, &inputs).unwrap_or_else(|e| panic!("{}: {e}", backbone.name));
        assert!(fitted.counters["valid_rmse"].as_f64().unwrap() > 0.0);
        // Users 12 and 13 and some items are in the side tables alone, 99 is nowhere.
        let pairs = log(&[(0, 0, 0.0, 100), (13, 29, 0.0, 101), (99, 99, 0.0, 102), (0, 0, 0.0, 100)]);
        let model = Input::Artifact(&fitted.artifacts["model"]);
        let config = json!({"model": "m", "pairs": "p", "users": "u", "items": "i"});
        let slots = [("model", model), ("pairs", Input::Table(&pairs)), inputs[2], inputs[3]];
        let predicted = bench.run("predict", config, &slots).unwrap_or_else(|e| panic!("{}: {e}", backbone.name));
        let table = memory(&predicted, "predictions");
        assert_eq!(table.i64s("user_id").unwrap(), [0, 13, 99]);
        let ratings = table.f64s("predicted_rating").unwrap();
        assert!(ratings.iter().all(|r| (1.0..=5.0).contains(r)), "{}: {ratings:?}", backbone.name);
        let count = |name: &str| predicted.counters[name].as_u64().unwrap();
        assert_eq!((count("rows"), count("repeats_dropped"), count("rows_unknown")), (3, 1, 1));
        // Without the side tables their values are missing, and the prediction is still there.
        let bare = bench
            .run("predict", json!({"model": "m", "pairs": "p"}), &[("model", model), ("pairs", Input::Table(&pairs))])
            .unwrap_or_else(|e| panic!("{}: {e}", backbone.name));
        check_figures(backbone.name, "without side tables", &bare);
    }
}

#[test]
fn tasks_are_not_mixed_up() {
    let bench = Bench::new();
    let parts = parts(10, 7);
    let mf = BACKBONES.iter().find(|b| b.name == "mf").unwrap();
    let config = json!({"model": "mf", "train": "train", "hyper": quick(mf, 1)});
    let fitted = bench.run("train", config, &[("train", Input::Table(&parts.train))]).unwrap();
    let model = Input::Artifact(&fitted.artifacts["model"]);
    let pairs = [("model", model), ("pairs", Input::Table(&parts.test))];
    let error = bench.run("predict", json!({"model": "m", "pairs": "p"}), &pairs).err().unwrap();
    assert!(error.message.contains("`mf` ranks items"), "{error}");
    for (kind, config, word) in [
        ("search", json!({"model": "mf", "train": "t", "valid": "v", "test": "x"}), "`history`"),
        ("search", json!({"model": "mf", "train": "t", "valid": "v", "refit": "train+valid"}), "`refit`"),
        ("search", json!({"model": "deepfm", "train": "t", "valid": "v", "test": "x", "history": "h"}), "`history`"),
        ("search", json!({"model": "mf", "train": "t", "valid": "v", "space": {"layers": [1]}}), "`layers`"),
        ("train", json!({"model": "mf", "train": "t", "fields": {}}), "`fields`"),
        ("evaluate", json!({"test": "t"}), "nothing to evaluate"),
        ("evaluate", json!({"test": "t", "shortlist": "s", "predictions": "p"}), "exclude"),
        ("evaluate", json!({"test": "t", "shortlist": "s", "tie_orders": {"interactions": "i"}}), "`model`"),
        (
            "evaluate",
            json!({"test": "t", "predictions": "s", "model": "m", "tie_orders": {"interactions": "i"}}),
            "`tie_orders`",
        ),
    ] {
        let error = Bench::stage(kind, config.clone()).err().unwrap_or_else(|| panic!("{config} was taken"));
        assert!(error.fault == Fault::Spec && error.message.contains(word), "{config}: {error}");
    }
    let shortlist = log(&[(0, 1, 0.0, 1)]);
    let shortlist = Table::from_columns(vec![
        ("user_id", shortlist.column("user_id").unwrap(), false),
        ("item_id", shortlist.column("item_id").unwrap(), false),
        ("rank", Arc::new(Int64Array::from(vec![1])), false),
    ])
    .unwrap();
    let inputs = [("shortlist", Input::Table(&shortlist)), ("test", Input::Table(&parts.test)), ("model", model)];
    let config = json!({"test": "t", "shortlist": "s", "model": "m", "weights_fit_on": "train+valid"});
    let error = bench.run("evaluate", config, &inputs).err().unwrap();
    assert!(error.fault == Fault::Spec && error.message.contains("card"), "{error}");
}
