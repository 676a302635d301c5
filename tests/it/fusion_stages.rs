//! `calibrate`, `fuse` and `evaluate` as stages, over Parquet files: what one writes the next reads.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, Float32Array, Float64Array, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::SchemaRef;
use serde_json::{Value, json};
use tailfuse::fusion::{Calibration, LongTail, long_tail};
use tailfuse::stages::context::Cancel;
use tailfuse::stages::registry::find;
use tailfuse::stages::{
    ModelFile, Observer, OutputTable, ResolveContext, Stage, StageContext, StageInput, StageResult, What,
};
use tailfuse::tables::schemas::CALIBRATION_GRID;
use tailfuse::tables::{Store, StoredTable, Table};

struct Silent;

impl Observer for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
}

/// A folder, and what stages have put there.
struct House {
    _folder: tempfile::TempDir,
    store: Store,
    inputs: BTreeMap<&'static str, StageInput>,
}

impl House {
    fn new() -> House {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::local(folder.path()).unwrap();
        House { _folder: folder, store, inputs: BTreeMap::new() }
    }

    async fn put(&mut self, name: &'static str, table: &Table) {
        let stored = StoredTable::write(&self.store, &format!("{name}.parquet"), table).await.unwrap();
        self.inputs.insert(name, StageInput::Table(stored));
    }

    fn resolve(kind: &str, config: Value) -> Box<dyn Stage> {
        let around = ResolveContext { root: Path::new("."), history_at_test: "train+valid" };
        (find(kind).unwrap().resolve)(config, &around).unwrap()
    }

    /// Runs a stage whose references are names of what was put here.
    async fn run(&self, kind: &str, config: Value) -> StageResult {
        let stage = House::resolve(kind, config);
        let inputs = stage
            .inputs()
            .into_iter()
            .map(|slot| (slot.slot, self.inputs[slot.reference.as_str()].clone()))
            .collect::<BTreeMap<String, StageInput>>();
        let schemas: BTreeMap<String, SchemaRef> = inputs
            .iter()
            .filter_map(|(slot, input)| match input {
                StageInput::Table(t) => Some((slot.clone(), t.schema())),
                StageInput::Artifact { .. } => None,
            })
            .collect();
        let models = stage.models().into_iter().map(|name| {
            let digest = format!("sha-of-{name}");
            (name, ModelFile { path: "x.gguf".into(), digest })
        });
        let ctx = StageContext {
            name: kind.to_owned(),
            seed: 1,
            device: Default::default(),
            inputs,
            models: models.collect(),
            savings: self.store.child("savings"),
            warehouse: self.store.child("warehouse"),
            publishing: Default::default(),
            run_id: "run-1".to_owned(),
            memory_limit: 1 << 30,
            spill_dir: None,
            observer: Arc::new(Silent),
            cancel: Cancel::default(),
        };
        let result = stage.run(&ctx).await.unwrap();
        // Every output that was promised is there, in the schema that was promised.
        let planned = stage.plan_schemas(&schemas).await.unwrap();
        for output in stage.outputs() {
            match output.what {
                What::Artifact => assert!(result.artifacts.contains_key(output.name), "{kind}.{}", output.name),
                What::Table => {
                    let made = result.tables.get(output.name).unwrap_or_else(|| panic!("{kind}.{}", output.name));
                    if let (OutputTable::Memory(table), Some(planned)) = (made, planned.get(output.name)) {
                        assert_eq!(*planned, table.schema(), "{kind}.{}", output.name);
                    }
                }
            }
        }
        result
    }
}

fn memory<'a>(result: &'a StageResult, name: &str) -> &'a Table {
    match &result.tables[name] {
        OutputTable::Memory(table) => table,
        OutputTable::Stream(_) => panic!("{name} is a stream"),
    }
}

fn words(v: impl IntoIterator<Item = String>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(v))
}

/// 24 users of 20 candidates. The LLM ranked for the first 12, the other way round.
async fn filled() -> House {
    let mut house = House::new();
    let rows: Vec<(i64, i32)> = (1..=24).flat_map(|u| (1..=20).map(move |r| (u, r))).collect();
    let user = |u: i64| format!("u{u:02}");
    let table = |columns| Table::from_columns(columns).unwrap();
    house
        .put(
            "shortlist",
            &table(vec![
                ("user_id", words(rows.iter().map(|x| user(x.0))), false),
                (
                    "item_id",
                    Arc::new(Int64Array::from_iter_values(rows.iter().map(|x| i64::from(x.1)))) as ArrayRef,
                    false,
                ),
                ("rec_rank", Arc::new(Int32Array::from_iter_values(rows.iter().map(|x| x.1))), false),
                ("rec_score", Arc::new(Float32Array::from_iter_values(rows.iter().map(|x| -x.1 as f32))), false),
            ]),
        )
        .await;
    let asked: Vec<(i64, i32)> = rows.iter().copied().filter(|x| x.0 <= 12).collect();
    let n = asked.len();
    house
        .put(
            "ranks",
            &table(vec![
                ("user_id", words(asked.iter().map(|x| user(x.0))), false),
                ("item_id", Arc::new(Int64Array::from_iter_values(asked.iter().map(|x| i64::from(x.1)))), false),
                ("llm_rank", Arc::new(Int32Array::from_iter_values(asked.iter().map(|x| 21 - x.1))), false),
                ("llm_score", Arc::new(Float32Array::from(vec![0.1; n])), false),
                ("prompt_digest", words(asked.iter().map(|x| format!("d{}", x.0))), false),
                ("llm_asked_at", Arc::new(TimestampMicrosecondArray::from(vec![7; n]).with_timezone("UTC")), false),
                ("source", words(vec!["fused".to_owned(); n]), false),
            ]),
        )
        .await;
    house
        .put(
            "not_asked",
            &table(vec![
                ("user_id", words((13..=24).map(user)), false),
                ("source", words(vec!["recommender".to_owned(); 12]), false),
                ("reason", words(vec!["budget".to_owned(); 12]), false),
            ]),
        )
        .await;
    house
        .put(
            "long_tail",
            &table(vec![
                ("user_id", words((1..=24).map(user)), false),
                ("interactions", Arc::new(Int64Array::from_iter_values(1..=24)), false),
                (
                    "long_tail_coefficient",
                    Arc::new(Float64Array::from_iter_values((1..=24).map(|u| (u as f64 + 1.0).ln()))),
                    false,
                ),
                ("bucket", words((1..=24).map(|u| ["tail", "torso", "head"][(u - 1) / 8].to_owned())), false),
            ]),
        )
        .await;
    // The LLM is right for those that it was asked for: items 16 to 20 are the recommender's last.
    house
        .put(
            "held_out",
            &table(vec![
                ("user_id", words((1..=24).map(user)), false),
                ("item_id", Arc::new(Int64Array::from_iter_values((1..=24).map(|u| 16 + u % 5))), false),
            ]),
        )
        .await;
    house
        .put(
            "items",
            &table(vec![
                ("item_id", Arc::new(Int64Array::from_iter_values(1..=20)), false),
                ("title", words((1..=20).map(|i| format!("Film {i}"))), false),
            ]),
        )
        .await;
    house
}

#[tokio::test]
async fn from_calibration_to_metrics() {
    let mut house = filled().await;
    let calibrated = house
        .run(
            "calibrate",
            json!({"shortlist": "shortlist", "rerank": "ranks", "valid": "held_out", "long_tail": "long_tail"}),
        )
        .await;
    let artifact = calibrated.artifacts["calibration"].clone();
    let calibration = Calibration::from_bytes(artifact.file("calibration.json").unwrap()).unwrap();
    assert!(calibration.a1 > 0.0 && calibration.n_users == 12, "{calibration:?}");
    assert_eq!(memory(&calibrated, "grid").num_rows(), 26);
    assert_eq!(memory(&calibrated, "grid").schema(), CALIBRATION_GRID.plain_schema());
    house.inputs.insert("calibration", StageInput::Artifact { digest: "c".to_owned(), artifact });
    house
        .inputs
        .insert("model", StageInput::Artifact { digest: "sha-of-rec".to_owned(), artifact: Default::default() });

    let fused = house
        .run(
            "fuse",
            json!({
                "shortlist": "shortlist", "rerank": "ranks", "not_asked": "not_asked", "long_tail": "long_tail",
                "items": "items", "calibration": "calibration", "model": "model", "llm": "small-llm", "k": 5
            }),
        )
        .await;
    assert_eq!(fused.counters["users_fused"], 12);
    assert_eq!(fused.counters["a1"], calibration.a1);
    let first = memory(&fused, "recommendations");
    assert_eq!(first.num_rows(), 24 * 5);
    assert_eq!(first.strings("rec_model").unwrap()[0].as_deref(), Some("sha-of-rec"));
    assert_eq!(first.strings("llm_model").unwrap()[0].as_deref(), Some("sha-of-small-llm"));
    assert_eq!(first.strings("llm_model").unwrap()[119], None);
    assert_eq!(first.strings("reason").unwrap()[119].as_deref(), Some("budget"));

    house.put("whole", memory(&fused, "shortlist")).await;
    house.put("first", first).await;
    let whole = house.run("evaluate", json!({"shortlist": "whole", "test": "held_out"})).await;
    assert_eq!(whole.counters["users_evaluated"], 24);
    assert_eq!(whole.counters["users_asked"], 12);
    // The published rows give the same figures of the fused order, to the last bit.
    let published = house.run("evaluate", json!({"shortlist": "first", "test": "held_out", "ks": [3, 5]})).await;
    let figures = |result: &StageResult| -> Vec<(Vec<Option<String>>, f64)> {
        let m = memory(result, "metrics");
        let keys = ["system", "users", "bucket", "metric"].map(|c| m.strings(c).unwrap());
        let values = m.f64s("value").unwrap();
        (0..m.num_rows())
            .map(|row| (keys.iter().map(|k| k[row].clone()).collect::<Vec<_>>(), values[row]))
            .filter(|(key, _)| key[0].as_deref() == Some("fused") && !key[3].as_deref().unwrap().ends_with("@10"))
            .collect()
    };
    assert_eq!(figures(&whole), figures(&published));
    assert_eq!(figures(&whole).len(), 4 * (4 + 3));
    assert!(figures(&whole).iter().any(|(_, value)| *value > 0.0));
}

#[tokio::test]
async fn fusion_without_an_llm_is_the_recommender() {
    let house = filled().await;
    let fused = house.run("fuse", json!({"shortlist": "shortlist", "long_tail": "long_tail"})).await;
    let whole = memory(&fused, "shortlist");
    assert_eq!(whole.i32s("rank").unwrap(), whole.i32s("rec_rank").unwrap());
    assert!(whole.strings("reason").unwrap().iter().all(|r| r.as_deref() == Some("no_llm")));
    assert_eq!(memory(&fused, "recommendations").num_rows(), 240);
}

#[test]
fn configs_out_of_range_are_refused_with_exit_78() {
    let around = ResolveContext { root: Path::new("."), history_at_test: "train" };
    let tables = json!({"shortlist": "s", "rerank": "r", "valid": "v", "long_tail": "l", "test": "t"});
    for (kind, own, extra, word) in [
        ("fuse", &["shortlist", "long_tail"][..], json!({"a1": 1.2}), "`a1`"),
        ("fuse", &["shortlist", "long_tail"], json!({"a2": 1.0}), "`a2`"),
        ("fuse", &["shortlist", "long_tail"], json!({"k": 0}), "`k`"),
        ("fuse", &["shortlist", "long_tail"], json!({"c": 0.0}), "`c`"),
        ("calibrate", &["shortlist", "rerank", "valid", "long_tail"], json!({"a1": [1.5]}), "`a1`"),
        ("calibrate", &["shortlist", "rerank", "valid", "long_tail"], json!({"a2": []}), "`a2`"),
        ("evaluate", &["shortlist", "test"], json!({"ks": [3, 0]}), "`ks`"),
        ("evaluate", &["shortlist", "test"], json!({"ks": [3, 3]}), "`ks`"),
        ("evaluate", &["shortlist", "test"], json!({"system": "llm"}), "`system`"),
    ] {
        let mut config = extra.clone();
        for key in own {
            config[*key] = tables[*key].clone();
        }
        let error = (find(kind).unwrap().resolve)(config, &around).err().unwrap();
        assert_eq!(error.fault.exit_code(), 78, "{kind} {extra}: {error}");
        assert!(error.to_string().contains(word), "{kind} {extra}: {error}");
    }
}

#[test]
fn the_names_of_inputs_do_not_change_what_a_stage_is() {
    for (kind, config) in [
        ("fuse", json!({"shortlist": "s1", "long_tail": "l1"})),
        ("calibrate", json!({"shortlist": "s1", "rerank": "r1", "valid": "v1", "long_tail": "l1"})),
        ("evaluate", json!({"shortlist": "s1", "test": "t1"})),
    ] {
        let identity = |config: Value| House::resolve(kind, config).identity();
        let renamed: Value = serde_json::from_str(&config.to_string().replace("1\"", "2\"")).unwrap();
        assert_ne!(config, renamed);
        assert_eq!(identity(config), identity(renamed), "{kind}");
    }
    let weights = |a1: f64| House::resolve("fuse", json!({"shortlist": "s", "long_tail": "l", "a1": a1})).identity();
    assert_ne!(weights(0.3), weights(0.5));
}

#[tokio::test]
async fn the_long_tail_query_is_eq_5_with_the_terciles_of_the_code() {
    let mut house = House::new();
    // User u has (7 u) mod 5 + 1 interactions, so that numbers repeat across the edges of the thirds.
    let of = |u: i64| 7 * u % 5 + 1;
    let users: Vec<i64> = (0..20).flat_map(|u| std::iter::repeat_n(u, of(u) as usize)).collect();
    let log = Table::from_columns(vec![("user_id", Arc::new(Int64Array::from(users)) as ArrayRef, false)]).unwrap();
    house.put("log", &log).await;
    let mut result = house.run("sql", json!({"inputs": {"history": "log"}, "file": "sql/long_tail.sql"})).await;
    let table = match result.tables.remove("result").unwrap() {
        OutputTable::Memory(table) => table,
        OutputTable::Stream(stream) => {
            StoredTable::write_stream(&house.store, "tail.parquet", stream).await.unwrap().collect().await.unwrap()
        }
    };
    let n: Vec<i64> = (0..20).map(of).collect();
    let buckets: Vec<Option<String>> =
        long_tail::buckets(&n).into_iter().map(|b| Some(b.as_str().to_owned())).collect();
    assert_eq!(table.i64s("user_id").unwrap(), (0..20).collect::<Vec<_>>());
    assert_eq!(table.i64s("interactions").unwrap(), n);
    assert_eq!(table.strings("bucket").unwrap(), buckets);
    for (l, n) in table.f64s("long_tail_coefficient").unwrap().into_iter().zip(n) {
        assert!((l - long_tail::long_tail_coefficient(n)).abs() < 1e-15, "{l} for {n}");
    }
    // And the stages read it.
    assert_eq!(LongTail::from_table(&table).unwrap().users().len(), 20);
}
