//! Serving: a calibration travels to the nightly pipeline, audits guard what is published, new users get what is popular.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arrow::array::{ArrayRef, Float32Array, Float64Array, Int32Array, Int64Array, StringArray};
use serde_json::{Value, json};
use tailfuse::stages::registry::find;
use tailfuse::stages::{OutputTable, ResolveContext};
use tailfuse::tables::{StoredTable, Table};

use crate::fixtures::{World, stage, write_parquet};
use crate::table_support::{memory, stage_context};

/// One recommendation.
#[derive(Clone)]
struct Row {
    user: i64,
    item: Option<i64>,
    rank: i32,
    score: f64,
    rec_score: f32,
    alpha: f64,
    interactions: i64,
    source: &'static str,
}

/// A night: what is recommended, known, and who there is.
#[derive(Clone)]
struct Night {
    rows: Vec<Row>,
    /// user, item, time.
    history: Vec<(i64, i64, i64)>,
    users: Vec<i64>,
    /// user, item.
    train: Vec<(i64, i64)>,
    test: Vec<(i64, i64)>,
}

/// Twenty users with three items each of thirty; each user knows item 40, others know the thirty in differing numbers.
fn good() -> Night {
    let rows = (1..=20).flat_map(|user| {
        (0..3).map(move |place| {
            let item = (user * 3 + place * 7) % 30 + 1;
            Row {
                user,
                item: Some(item),
                rank: place as i32 + 1,
                score: -(place as f64),
                rec_score: (30 - item) as f32 / 10.0 + user as f32 / 100.0,
                alpha: (user % 10) as f64 / 10.0,
                interactions: user,
                source: if user % 2 == 0 { "fused" } else { "recommender" },
            }
        })
    });
    let others = (1..=30).flat_map(|item| (0..=item % 5).map(move |n| (100 + n, item, 5)));
    let own = (1..=20).map(|user| (user, 40, 7));
    Night {
        rows: rows.collect(),
        history: own.chain(others).collect(),
        users: (1..=20).collect(),
        train: vec![(1, 2), (2, 3)],
        test: vec![(1, 3), (2, 4)],
    }
}

fn ints(values: impl IntoIterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(values))
}

fn recommendations(rows: &[Row]) -> Table {
    let reals = |of: fn(&Row) -> f64| -> ArrayRef { Arc::new(Float64Array::from_iter_values(rows.iter().map(of))) };
    Table::from_columns(vec![
        ("user_id", ints(rows.iter().map(|r| r.user)), false),
        ("item_id", Arc::new(Int64Array::from_iter(rows.iter().map(|r| r.item))) as ArrayRef, true),
        ("rank", Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.rank))), false),
        ("score", reals(|r| r.score), false),
        ("rec_score", Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.rec_score))), false),
        ("alpha", reals(|r| r.alpha), false),
        ("interactions", ints(rows.iter().map(|r| r.interactions)), false),
        ("source", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.source))), false),
    ])
    .unwrap()
}

fn pairs(pairs: &[(i64, i64)]) -> Table {
    Table::from_columns(vec![
        ("user_id", ints(pairs.iter().map(|p| p.0)), false),
        ("item_id", ints(pairs.iter().map(|p| p.1)), false),
    ])
    .unwrap()
}

impl Night {
    async fn tables(&self) -> BTreeMap<String, StoredTable> {
        let store = memory();
        let history = Table::from_columns(vec![
            ("user_id", ints(self.history.iter().map(|h| h.0)), false),
            ("item_id", ints(self.history.iter().map(|h| h.1)), false),
            ("timestamp", ints(self.history.iter().map(|h| h.2)), false),
        ]);
        let users = Table::from_columns(vec![("user_id", ints(self.users.iter().copied()), false)]);
        let mut stored = BTreeMap::new();
        for (name, table) in [
            ("recommendations", recommendations(&self.rows)),
            ("history", history.unwrap()),
            ("users", users.unwrap()),
            ("train", pairs(&self.train)),
            ("test", pairs(&self.test)),
        ] {
            let table = StoredTable::write(&store, &format!("{name}.parquet"), &table).await.unwrap();
            stored.insert(name.to_owned(), table);
        }
        stored
    }

    /// audit -> (value, passed, detail), with the given earlier partitions.
    async fn audits(
        &self,
        checks: Value,
        earlier: &[(&str, &Night)],
    ) -> BTreeMap<String, (Option<f64>, Option<bool>, String)> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("own.sql"),
            "select count(*) as value from recommendations where user_id = $who",
        )
        .unwrap();
        let tables = self.tables().await;
        let inputs: BTreeMap<&String, &String> = tables.keys().map(|name| (name, name)).collect();
        let config = json!({
            "inputs": inputs,
            "previous": { "table": "recommendations", "before": { "ds": "2026-11-22" } },
            "checks": checks,
        });
        let around = ResolveContext { root: folder.path(), history_at_test: "train" };
        let stage = (find("audit").unwrap().resolve)(config, &around).unwrap_or_else(|e| panic!("{e}"));
        let slots: Vec<(String, &StoredTable)> = tables.iter().map(|(n, t)| (format!("inputs.{n}"), t)).collect();
        let given: Vec<(&str, &StoredTable)> = slots.iter().map(|(n, t)| (n.as_str(), *t)).collect();
        let ctx = stage_context(&given);
        for (ds, night) in earlier {
            let file = format!("recommendations/ds={ds}/part-0.parquet");
            StoredTable::write(&ctx.warehouse, &file, &recommendations(&night.rows)).await.unwrap();
        }
        // Planned against the schemas as they are.
        let schemas = slots.iter().map(|(n, t)| (n.clone(), t.schema())).collect();
        stage.plan_schemas(&schemas).await.unwrap_or_else(|e| panic!("{e}"));
        let mut result = stage.run(&ctx).await.unwrap_or_else(|e| panic!("{e}"));
        let Some(OutputTable::Memory(audits)) = result.tables.remove("audits") else { panic!("no table") };
        let column = |name: &str| audits.column(name).unwrap();
        let value = column("value");
        let value = arrow::array::AsArray::as_primitive::<arrow::datatypes::Float64Type>(&value);
        let passed = column("passed");
        let passed = arrow::array::AsArray::as_boolean(&passed);
        let (names, details) = (audits.strings("audit").unwrap(), audits.strings("detail").unwrap());
        let names = names.into_iter().flatten().zip(value.iter().zip(passed.iter()));
        names.zip(details).map(|((name, (v, p)), d)| (name, (v, p, d.unwrap_or_default()))).collect()
    }
}

/// The audits with bounds that a good night keeps.
fn bounds() -> Value {
    json!({
        "coverage": { "min": 0.99 }, "k_items": { "max": 0, "values": { "k": 3 } }, "repeats": { "max": 0 },
        "nulls": { "max": 0 }, "seen": { "max": 0 }, "leakage": { "max": 0 },
        "future": { "max": 0, "values": { "until": 10 } }, "fallback": { "max": 0.05 }, "churn": { "min": 0.3 },
        "concentration": { "max": 0.2 }, "gini": { "max": 0.5 }, "drift_rec_score": { "max": 0.25 },
        "drift_alpha": { "max": 0.25 }, "drift_interactions": { "max": 0.25 }, "drift_popularity": { "max": 0.25 },
    })
}

#[tokio::test]
async fn a_good_night_passes_every_audit() {
    let found = good().audits(bounds(), &[("2026-11-20", &good())]).await;
    assert_eq!(found.len(), 15);
    for (name, (value, passed, detail)) in &found {
        assert_eq!((*passed, detail.as_str()), (Some(true), ""), "{name}: {value:?}");
    }
    assert_eq!((found["coverage"].0, found["churn"].0), (Some(1.0), Some(1.0)));
    for drift in ["rec_score", "alpha", "interactions", "popularity"] {
        assert!(found[&format!("drift_{drift}")].0.unwrap().abs() < 1e-9, "{drift}");
    }
}

/// A defect of a night.
type Defect = fn(&mut Night);

#[tokio::test]
async fn each_audit_finds_its_defect() {
    let defects: [(&str, Defect, &str); 18] = [
        ("coverage", |n| n.rows.retain(|r| r.user != 5), ""),
        ("k_items", |n| drop(n.rows.remove(0)), "user_id=1, items=2"),
        ("repeats", |n| n.rows[2].item = n.rows[0].item, "user_id=1"),
        ("nulls", |n| n.rows[4].score = f64::NAN, "user_id=2"),
        ("nulls", |n| n.rows[4].item = None, "item_id=null"),
        ("nulls", |n| n.rows[4].rank = 0, "rank=0"),
        ("seen", |n| n.rows[3].item = Some(40), "user_id=2, item_id=40"),
        ("leakage", |n| n.train.push((2, 4)), "user_id=2, item_id=4"),
        ("future", |n| n.history.push((3, 9, 10)), "timestamp=10"),
        ("fallback", |n| n.rows.iter_mut().filter(|r| r.user <= 2).for_each(|r| r.source = "fallback"), ""),
        ("churn", |n| n.rows.iter_mut().for_each(|r| r.item = r.item.map(|i| i + 100)), ""),
        ("concentration", |n| n.rows.iter_mut().filter(|r| r.rank == 1).for_each(|r| r.item = Some(1)), ""),
        ("gini", |n| n.rows.iter_mut().for_each(|r| r.item = Some(i64::from(r.rank))), ""),
        ("drift_rec_score", |n| n.rows.iter_mut().for_each(|r| r.rec_score += 5.0), ""),
        ("drift_rec_score", |n| n.rows.iter_mut().for_each(|r| r.rec_score -= 5.0), ""),
        ("drift_alpha", |n| n.rows.iter_mut().for_each(|r| r.alpha = 0.0), ""),
        ("drift_interactions", |n| n.rows.iter_mut().for_each(|r| r.interactions += 9), ""),
        ("drift_popularity", |n| n.rows.iter_mut().for_each(|r| r.item = Some(4 + 5 * i64::from(r.rank))), ""),
    ];
    for (name, spoil, told) in defects {
        let mut night = good();
        spoil(&mut night);
        let only = json!({ name: bounds()[name] });
        let found = night.audits(only, &[("2026-11-20", &good())]).await;
        let (value, passed, detail) = &found[name];
        assert_eq!(*passed, Some(false), "{name}: {value:?}");
        assert!(detail.contains(told), "{name}: {detail}");
    }
}

#[tokio::test]
async fn equal_values_before_do_not_hide_a_shift() {
    let flat = |alpha: f64| {
        let mut night = good();
        night.rows.iter_mut().for_each(|r| r.alpha = alpha);
        night
    };
    let check = || json!({ "drift_alpha": { "max": 0.25 } });
    for (before, now, passes) in [(0.3, 0.3, true), (0.3, 0.2, false), (0.3, 0.4, false), (0.0, 0.0, true)] {
        let found = flat(now).audits(check(), &[("2026-11-21", &flat(before))]).await;
        assert_eq!(found["drift_alpha"].1, Some(passes), "{before} {now}: {:?}", found["drift_alpha"]);
    }
}

#[tokio::test]
async fn the_latest_earlier_partition_is_compared_and_the_first_night_has_none() {
    let mut other = good();
    other.rows.iter_mut().for_each(|r| r.item = r.item.map(|i| i + 100));
    let check = || json!({ "churn": { "min": 0.3 }, "coverage": { "min": 0.9 } });
    // Those of the same day and later ones do not count.
    let found =
        good().audits(check(), &[("2026-11-19", &good()), ("2026-11-21", &other), ("2026-11-22", &good())]).await;
    assert_eq!((found["churn"].0, found["churn"].1), (Some(0.0), Some(false)));
    let first = good().audits(check(), &[("2026-11-22", &good()), ("2026-11-23", &good())]).await;
    assert_eq!((first["churn"].0, first["churn"].1), (None, None));
    assert!(first["churn"].2.contains("skipped") && first["churn"].2.contains("ds=2026-11-22"), "{:?}", first["churn"]);
    assert_eq!(first["coverage"].1, Some(true));
}

#[tokio::test]
async fn a_query_of_ones_own_is_an_audit() {
    let check = |max: f64| json!({ "mine": { "file": "own.sql", "max": max, "values": { "who": 3 } } });
    assert_eq!(good().audits(check(3.0), &[]).await["mine"].1, Some(true));
    let found = good().audits(check(2.0), &[]).await;
    assert_eq!((found["mine"].0, found["mine"].1), (Some(3.0), Some(false)));
}

#[test]
fn audits_that_cannot_be_are_refused_with_exit_78() {
    let around = ResolveContext { root: std::path::Path::new("."), history_at_test: "train" };
    for (checks, inputs, word) in [
        (json!({}), json!({ "recommendations": "x" }), "`checks`"),
        (json!({ "coverage": {} }), json!({ "recommendations": "x" }), "neither"),
        (json!({ "coverrage": { "max": 0 } }), json!({ "recommendations": "x" }), "coverrage"),
        (json!({ "x": { "file": "nowhere.sql", "max": 0 } }), json!({ "recommendations": "x" }), "`x`"),
        (json!({ "coverage": { "min": 1 } }), json!({ "previous": "x" }), "previous"),
    ] {
        let config = json!({ "inputs": inputs, "checks": checks });
        let error = (find("audit").unwrap().resolve)(config.clone(), &around).err().unwrap();
        assert!(error.fault.exit_code() == 78 && error.to_string().contains(word), "{config}: {error}");
    }
}

const CALIBRATE: &str = r#"name = "calibrate"
seed = 7

[sources.events]
uri = "data/events.parquet"
columns = { user_id = "uid", item_id = "movie", rating = "stars", timestamp = "ts" }

[sources.films]
uri = "data/films.parquet"
columns = { item_id = "movie", title = "name" }

[stages.parts]
kind = "split"
input = "events"
strategy = "global-time"
valid_share = 0.2
test_share = 0.2

[stages.model]
kind = "train"
model = "lightgcn"
train = "parts.train"
valid = "parts.valid"
[stages.model.hyper]
embedding_dim = 8
epochs = 6
eval_every = 1

[stages.tail]
kind = "sql"
file = "builtin:long_tail"
inputs = { history = "parts.train" }

[stages.shortlist]
kind = "recommend"
model = "model.model"
history = "parts.train"
k = 8

[stages.prompts]
kind = "prompt"
model = "llm"
shortlist = "shortlist"
history = "parts.train"
items = "films"
users = "parts.valid"

[stages.titles]
kind = "prompt"
model = "llm"
shortlist = "shortlist"
history = "parts.train"
items = "films"
users = "parts.valid"
candidate_style = "titles"

[stages.label]
kind = "rerank"
model = "llm"
prompts = "prompts"
long_tail = "tail"
order = "random"
seed = 1
budget = { users = 6 }

[stages.likelihood]
kind = "rerank"
model = "llm"
prompts = "titles"
long_tail = "tail"
mode = "likelihood"
order = "random"
seed = 1
budget = { users = 6 }

[stages.calibration]
kind = "calibrate"
model = "model.model"
shortlist = "shortlist"
rerank = { label = "label", likelihood = "likelihood" }
valid = "parts.valid"
long_tail = "tail"

[stages.publish]
kind = "write_artifact"
input = "calibration"
path = "calibration/calibration.json"
"#;

const NIGHTLY: &str = r#"name = "nightly"
seed = 7

[params]
ds = "2026-11-22"

[sources.calibration]
uri = "warehouse/calibration/calibration.json"
role = "artifact"
max_age_days = 10
made_by = "tailfuse run calibrate.toml"

[sources.last]
uri = "warehouse/models/recommender"
role = "artifact"
optional = true

[sources.events]
uri = "data/events.parquet"
columns = { user_id = "uid", item_id = "movie", rating = "stars", timestamp = "ts" }

[sources.films]
uri = "data/films.parquet"
columns = { item_id = "movie", title = "name" }

[sources.people]
uri = "data/people.parquet"

[stages.parts]
kind = "split"
input = "events"
strategy = "none"

[stages.model]
kind = "train"
model = "lightgcn"
train = "parts.train"
hyper_from = "calibration"

[stages.tail]
kind = "sql"
file = "builtin:long_tail"
inputs = { history = "parts.history" }

[stages.shortlist]
kind = "recommend"
model = "model.model"
history = "parts.history"
k = 8

[stages.newcomers]
kind = "popular"
history = "parts.history"
users = "people"
by = ["country"]
min_users = 3
k = 8

[stages.prompts]
kind = "prompt"
model = "llm"
shortlist = "shortlist"
history = "parts.history"
items = "films"
calibration = "calibration"

[stages.rerank]
kind = "rerank"
model = "llm"
prompts = "prompts"
skipped = "prompts.skipped"
long_tail = "tail"
calibration = "calibration"
budget = { users = 5 }

[stages.fused]
kind = "fuse"
shortlist = "shortlist"
popular = "newcomers"
rerank = "rerank.reranked"
not_asked = "rerank.not_asked"
long_tail = "tail"
items = "films"
calibration = "calibration"
model = "model.model"
llm = "llm"
k = 5

[stages.audits]
kind = "audit"
inputs = { recommendations = "fused", history = "parts.history", users = "people" }
previous = { table = "recommendations", before = { ds = "{{ ds }}" } }
[stages.audits.checks]
coverage = { min = 1 }
k_items = { max = 0, values = { k = 5 } }
repeats = { max = 0 }
nulls = { max = 0 }
seen = { max = 0 }
fallback = { max = 0 }
churn = { min = 0.3 }
drift_rec_score = { max = 0.25 }

[stages.publish]
kind = "write"
input = "fused"
table = "recommendations"
partition = { ds = "{{ ds }}" }
audits = ["audits"]

[stages.publish_model]
kind = "write_artifact"
input = "model.model"
path = "models/recommender"
audits = ["audits"]
"#;

fn serving_world() -> World {
    let world = World::new();
    let users: Vec<String> = (0..24).map(|u| format!("u{u:02}")).chain(["u90".into(), "u91".into()]).collect();
    let countries = users.iter().enumerate().map(|(n, _)| if n == 25 { None } else { Some(["fr", "pe"][n % 2]) });
    write_parquet(
        &world.path("data/people.parquet"),
        vec![
            ("user_id", Arc::new(StringArray::from_iter_values(&users)) as ArrayRef),
            ("country", Arc::new(countries.collect::<StringArray>())),
        ],
    );
    world.write("calibrate.toml", CALIBRATE);
    world.write("nightly.toml", NIGHTLY);
    world
}

fn ask(world: &World, query: &str) -> Vec<Value> {
    let (out, _) = world.expect(0, &["sql", "-p", "nightly.toml", "--format", "json", query]);
    serde_json::from_str(&out).unwrap()
}

#[test]
fn a_calibration_travels_and_a_refused_night_leaves_the_last_one() {
    let world = serving_world();
    let calibration = world.path("warehouse/calibration/calibration.json");

    // Without a calibration, and with a damaged one: the way out is told.
    let (_, err) = world.expect(65, &["run", "nightly.toml"]);
    assert!(err.contains("`calibration`") && err.contains("tailfuse run calibrate.toml"), "{err}");
    world.write("warehouse/calibration/calibration.json", "{\"version\": 1");
    let (_, err) = world.expect(65, &["run", "nightly.toml"]);
    assert!(err.contains("tailfuse run calibrate.toml"), "{err}");

    world.run(&["calibrate.toml"]);
    let chosen: Value = serde_json::from_slice(&std::fs::read(&calibration).unwrap()).unwrap();
    for key in ["mode", "a1", "a2", "l_min", "l_max", "mean", "se", "recommender_mean"] {
        assert!(chosen.get(key).is_some(), "{key}: {chosen}");
    }
    let epochs = chosen["recommender"]["epochs"].as_u64().unwrap();
    assert!((1..=6).contains(&epochs) && chosen["recommender"]["hyper"]["embedding_dim"] == 8, "{chosen}");
    assert_eq!(chosen["made"]["from"].as_str().unwrap().len(), 32);

    let first = world.run(&["nightly.toml"]);
    assert_eq!(first["warnings"], json!([]));
    assert_eq!(stage(&first, "model")["counters"]["epochs"], epochs);
    assert_eq!(stage(&first, "newcomers")["counters"]["users"], 2);
    if chosen["a1"] == 0.0 {
        assert_eq!(stage(&first, "rerank")["counters"]["users_asked"], 0);
    }
    let newcomers = ask(
        &world,
        "select distinct user_id, source, reason, rec_model, interactions from recommendations where source = 'popularity' order by user_id",
    );
    let row = |user: &str| json!({ "user_id": user, "source": "popularity", "reason": "cold_user", "rec_model": null, "interactions": 0 });
    let nulls: Vec<Value> = newcomers
        .into_iter()
        .map(|mut r| {
            r.as_object_mut().unwrap().entry("rec_model").or_insert(Value::Null);
            r
        })
        .collect();
    assert_eq!(nulls, [row("u90"), row("u91")]);
    let skipped = ask(&world, "select audit from audits where passed is null order by audit");
    assert_eq!(skipped, [json!({ "audit": "churn" }), json!({ "audit": "drift_rec_score" })]);

    // The same day again, refused: the partition that is there stands, to the run.
    let published = || ask(&world, "select distinct ds, run_id from published.recommendations order by ds");
    let before = published();
    let (out, err) = world.expect(1, &["run", "nightly.toml", "--set", "audits.checks.coverage.min=1.5"]);
    assert!(err.contains("coverage is 1, at least 1.5 is wanted") && err.contains("audits.parquet"), "{err}");
    let document: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&document["exit_code"], &document["error"]["retry"]), (&json!(1), &json!(false)));
    assert_eq!(published(), before);
    let place = err.split_whitespace().find(|w| w.contains("audits.parquet")).unwrap();
    assert!(std::path::Path::new(place.trim_matches(|c| c == ',' || c == ';' || c == ':')).exists(), "{place}");

    // The next night has one before it.
    let second = world.run(&["nightly.toml", "--param", "ds=2026-11-23"]);
    assert_eq!(stage(&second, "audits")["counters"]["skipped"], 0);
    assert_eq!(published().len(), 2);

    // An old calibration is used, and said.
    let old = SystemTime::now() - Duration::from_secs(11 * 86_400);
    std::fs::File::options().write(true).open(&calibration).unwrap().set_modified(old).unwrap();
    let third = world.run(&["nightly.toml", "--param", "ds=2026-11-24"]);
    let warning = third["warnings"][0].as_str().unwrap();
    assert!(warning.contains("11.0 days ago") && warning.contains("tailfuse run calibrate.toml"), "{warning}");
}

#[test]
fn a_warm_start_takes_last_nights_weights_by_id() {
    let world = serving_world();
    world.run(&["calibrate.toml"]);
    let warm = NIGHTLY.replace(
        "hyper_from = \"calibration\"\n",
        "hyper_from = \"calibration\"\nwarm_start = \"last\"\nwarm_epochs = 2\n",
    );
    world.write("nightly.toml", &warm);
    let first = world.run(&["nightly.toml"]);
    assert_eq!(stage(&first, "model")["counters"]["warm_weights"], Value::Null);
    let cold_epochs = stage(&first, "model")["counters"]["epochs"].clone();
    // One more user the next night.
    let mut lines = crate::fixtures::log();
    lines.push((Some("u99".into()), Some("m01".into()), 3.0, 5_000));
    world.write_log(&lines);
    // Weights that are fitted on give other scores than a cold start of so few epochs.
    let second =
        world.run(&["nightly.toml", "--param", "ds=2026-11-23", "--set", "audits.checks.drift_rec_score.max=99"]);
    assert_eq!(stage(&second, "model")["counters"]["warm_weights"], 1);
    assert_eq!(stage(&second, "model")["counters"]["epochs"], 2);
    assert!(cold_epochs.as_u64().unwrap() >= 1);

    // A model of another kind is refused with the way out.
    let other = warm.replace("hyper_from = \"calibration\"\n", "").replace("model = \"lightgcn\"", "model = \"mf\"");
    world.write("nightly.toml", &other);
    let (_, err) = world.expect(65, &["run", "nightly.toml", "--param", "ds=2026-11-24"]);
    assert!(err.contains("`lightgcn`") && err.contains("`mf`"), "{err}");
}

#[test]
fn sources_and_references_of_artifacts_are_checked() {
    let world = serving_world();
    for (from, to, word) in [
        ("max_age_days = 10\n", "max_age_days = 10\nfilter = \"x\"\nrole2 = 1\n", "role2"),
        ("input = \"events\"", "input = \"calibration\"", "artifact"),
        ("[sources.people]\n", "[sources.people]\noptional = true\n", "`optional`"),
        (
            "warehouse/models/recommender\"\nrole = \"artifact\"",
            "warehouse/models/recommender\"\nrole = \"artefact\"",
            "artefact",
        ),
    ] {
        assert!(NIGHTLY.contains(from), "{from}");
        world.write("wrong.toml", &NIGHTLY.replacen(from, to, 1));
        let (_, err) = world.expect(78, &["validate", "wrong.toml"]);
        assert!(err.contains(word), "{err}");
    }
    let (_, err) = world.expect(0, &["validate", "nightly.toml"]);
    assert!(err.contains("there is no artifact at"), "{err}");
    world.expect(0, &["plan", "nightly.toml"]);
}
