//! Unit tests of the stage: without an executor, a store or a checkpoint.

use std::path::Path;
use std::sync::Mutex;

use arrow::array::{Array, AsArray, Int64Array, StringArray};
use arrow::datatypes::Float32Type;

use super::*;
use crate::columns::EMBEDDING;
use crate::error::Fault;
use crate::recommenders::saved::TrainedModel;
use crate::tables::Table;

fn resolved(config: Value) -> Result<Box<dyn Stage>> {
    resolve(config, &ResolveContext { root: Path::new("."), history_at_test: "train" })
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Observer for Heard {
    fn begin(&self, unit: &str, total: u64) {
        self.note(&format!("begin {unit} {total}"));
    }
    fn advance(&self, n: u64) {
        self.note(&format!("advance {n}"));
    }
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

fn work(model: &str, epochs: u32) -> (Work, Arc<Heard>) {
    let heard = Arc::new(Heard::default());
    let backbone = registry::find(model).unwrap();
    let hyper =
        backbone.hyper(&json!({"epochs": epochs, "embedding_dim": 4, "batch_size": 8, "eval_every": 2})).unwrap();
    let embeds = fit::embeds_of(backbone, &hyper).unwrap();
    let work = Work {
        backbone,
        hyper,
        fields: None,
        refit: false,
        device: DeviceChoice::Cpu,
        seed: 7,
        embeds,
        savings: None,
        warm_start: None,
        warm_epochs: None,
        observer: heard.clone(),
        cancel: Cancel::default(),
    };
    (work, heard)
}

fn tables(train: &Table, valid: Option<&Table>, items: Option<&Table>) -> Tables {
    Tables { train: train.clone(), valid: valid.cloned(), items: items.cloned(), users: None }
}

fn log(pairs: &[(&str, i64)]) -> Table {
    Table::from_columns(vec![
        (USER_ID, Arc::new(StringArray::from_iter_values(pairs.iter().map(|p| p.0))), false),
        (ITEM_ID, Arc::new(Int64Array::from_iter_values(pairs.iter().map(|p| p.1))), false),
    ])
    .unwrap()
}

fn items(ids: &[i64]) -> Table {
    Table::from_columns(vec![(ITEM_ID, Arc::new(Int64Array::from(ids.to_vec())), false)]).unwrap()
}

fn memory(result: &StageResult, name: &str) -> Table {
    match &result.tables[name] {
        super::super::context::OutputTable::Memory(table) => table.clone(),
        super::super::context::OutputTable::Stream(_) => panic!("a table in memory was expected"),
    }
}

#[test]
fn all_outputs_are_made_and_indices_stand_for_sorted_ids() {
    let train = log(&[("b", 10), ("b", 30), ("a", 10), ("a", 10), ("c", 20)]);
    let valid = log(&[("a", 30), ("d", 10)]);
    let (work, heard) = work("lightgcn", 4);
    let result = work.run(&tables(&train, Some(&valid), Some(&items(&[40, 10, 20, 30])))).unwrap();
    for (name, value) in [
        ("users", json!(4)),
        ("items", json!(4)),
        ("interactions", json!(4)),
        ("epochs", json!(4)),
        ("valid_users", json!(1)),
        ("valid_cold", json!(1)), // user d has no train interactions
        ("weights_fit_on", json!("train")),
        ("device", json!("cpu")),
    ] {
        assert_eq!(result.counters[name], value, "{name}");
    }
    assert!(result.counters["valid_ndcg_10"].is_number() && result.counters["seconds_per_epoch"].is_number());

    let model = TrainedModel::from_files(&result.artifacts["model"].files).unwrap();
    assert_eq!((model.card.model.as_str(), model.card.seed, model.card.users), ("lightgcn", 7, 4));
    assert_eq!(model.card.hyper["layers"], 3);
    let users = memory(&result, "user_embeddings");
    assert_eq!(users.strings(USER_ID).unwrap().into_iter().flatten().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
    assert_eq!(memory(&result, "item_embeddings").i64s(ITEM_ID).unwrap(), [10, 20, 30, 40]);
    let vectors = users.column(EMBEDDING).unwrap();
    let of_b = vectors.as_list::<i32>().value(1);
    let embeddings = model.scorer.user_embeddings().unwrap();
    assert_eq!(of_b.as_primitive::<Float32Type>().values(), &embeddings.values[4..8]);

    let epochs = memory(&result, "epochs");
    assert_eq!(epochs.schema(), outputs::epochs_schema(Task::Direct));
    assert_eq!(epochs.i32s("epoch").unwrap(), [1, 2, 3, 4]);
    assert_eq!(epochs.column("valid_ndcg_10").unwrap().null_count(), 2); // measured every second epoch
    let heard = heard.0.lock().unwrap();
    assert_eq!(heard[1], "begin epochs 4");
    assert!(heard[0].contains("cpu") && heard.last().unwrap().contains("validation NDCG@10"), "{heard:?}");
    assert_eq!(heard.iter().filter(|h| *h == "advance 1").count(), 4);
}

#[test]
fn without_validation_no_figure_is_invented() {
    let (work, _) = work("mf", 2);
    let result = work.run(&tables(&log(&[("a", 1), ("b", 2)]), None, None)).unwrap();
    assert_eq!(result.counters["valid_ndcg_10"], Value::Null);
    assert_eq!(result.counters["best_epoch"], json!(2));
}

#[test]
fn input_that_is_wrong_is_named() {
    let (work, _) = work("mf", 2);
    let error = work.run(&tables(&log(&[]), None, None)).err().unwrap();
    assert_eq!((error.fault, error.message.contains("`train`")), (Fault::Data, true));
    let error = work.run(&tables(&items(&[1]), None, None)).err().unwrap();
    assert!(error.message.contains("`train`") && error.message.contains("`user_id`"), "{error}");
    let strings = Table::from_columns(vec![(ITEM_ID, Arc::new(StringArray::from(vec!["1"])), false)]).unwrap();
    let error = work.run(&tables(&log(&[("a", 1)]), None, Some(&strings))).err().unwrap();
    assert_eq!((error.fault, error.message.contains("`item_id`")), (Fault::Data, true));
}

#[test]
fn a_stop_request_ends_the_fit() {
    let (work, _) = work("mf", 2);
    work.cancel.request(15);
    let error = work.run(&tables(&log(&[("a", 1), ("b", 2)]), None, None)).err().unwrap();
    assert_eq!(error.fault, Fault::Terminated);
}

#[test]
fn the_ids_of_a_split_are_found_beside_its_train_part() {
    let slots = |config: Value| {
        let stage = resolved(config).unwrap();
        stage.inputs().into_iter().map(|i| format!("{}={}", i.slot, i.reference)).collect::<Vec<_>>()
    };
    assert_eq!(
        slots(json!({"model": "mf", "train": "parts.train", "valid": "parts.valid"})),
        ["train=parts.train", "valid=parts.valid", "items=parts.items", "users=parts.users"]
    );
    assert_eq!(slots(json!({"model": "mf", "train": "log"})), ["train=log"]);
    assert_eq!(
        slots(json!({"model": "mf", "train": "parts.train", "items": "catalogue", "users": ""})),
        ["train=parts.train", "items=catalogue"]
    );
}

#[test]
fn the_identity_holds_every_hyper_parameter() {
    let identity = resolved(json!({"model": "lightgcn", "train": "x", "hyper": {"layers": 2}})).unwrap().identity();
    assert_eq!(identity["hyper"]["layers"], 2);
    let defaults = registry::find("lightgcn").unwrap().hyper(&json!({})).unwrap();
    assert_eq!(identity["hyper"]["embedding_dim"], defaults["embedding_dim"]);
    let error = resolved(json!({"model": "mf", "train": "x", "hyper": {"layers": 2}})).err().unwrap();
    assert_eq!((error.fault, error.message.contains("`layers`")), (Fault::Spec, true));
    assert_eq!(resolved(json!({"model": "gcn", "train": "x"})).err().unwrap().fault, Fault::Spec);
}

#[test]
fn a_refit_sees_both_tables_and_says_so() {
    let train = log(&[("b", 10), ("b", 30), ("a", 10), ("a", 20), ("c", 20), ("c", 30)]);
    let valid = log(&[("a", 30), ("d", 10)]);
    let (mut work, heard) = work("mf", 6);
    let plain = work.run(&tables(&train, Some(&valid), None)).unwrap();
    work.refit = true;
    let refitted = work.run(&tables(&train, Some(&valid), None)).unwrap();
    assert_eq!(refitted.counters["weights_fit_on"], json!("train+valid"));
    assert_eq!(refitted.counters["interactions"], json!(8));
    for same in ["best_epoch", "epochs", "valid_ndcg_10", "valid_users"] {
        assert_eq!(refitted.counters[same], plain.counters[same], "{same}");
    }
    let model = |r: &StageResult| TrainedModel::from_files(&r.artifacts["model"].files).unwrap();
    let (first, second) = (model(&plain), model(&refitted));
    assert_eq!((first.card.weights_fit_on.as_str(), second.card.weights_fit_on.as_str()), ("train", "train+valid"));
    assert_ne!(first.card.data_sha256, second.card.data_sha256);
    assert_eq!(first.card.metrics, second.card.metrics);
    assert!(first.card.metrics["valid_ndcg_10"] > 0.0);
    // The same as a straight fit on both tables for so many epochs.
    let both = log(&[("b", 10), ("b", 30), ("a", 10), ("a", 20), ("c", 20), ("c", 30), ("a", 30), ("d", 10)]);
    work.refit = false;
    work.hyper["epochs"] = json!(second.card.best_epoch);
    let straight = model(&work.run(&tables(&both, None, None)).unwrap());
    assert_eq!(straight.scorer.tensors(), second.scorer.tensors());
    assert_eq!(straight.card.data_sha256, second.card.data_sha256);
    assert!(heard.0.lock().unwrap().iter().any(|h| h.contains("fitted again")));
    let error = resolved(json!({"model": "mf", "train": "x", "refit": "train+valid"})).err().unwrap();
    assert!(error.fault == Fault::Spec && error.message.contains("`valid`"), "{error}");
}

#[test]
fn outputs_are_those_that_the_model_has() {
    for backbone in registry::BACKBONES {
        let stage = resolved(json!({"model": backbone.name, "train": "x"})).unwrap();
        let names: Vec<&str> = stage.outputs().iter().map(|o| o.name).collect();
        assert_eq!((names[0], *names.last().unwrap()), ("model", "epochs"), "{}", backbone.name);
    }
    let error = resolved(json!({"model": "mf", "train": "x", "fields": {"user": ["age"]}})).err().unwrap();
    assert!(error.message.contains("`fields`"), "{error}");
}
