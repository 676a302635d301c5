//! `init` on files of many sorts: what it writes validates and runs. `[[test]]` blocks: pass, fail with a diff, mistakes.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray, TimestampMillisecondArray};

use crate::fixtures::{World, log, titles, write_parquet};

/// A folder without a pipeline.
fn empty() -> World {
    let world = World { folder: tempfile::tempdir().unwrap(), variables: Vec::new() };
    crate::fixtures::write_tiny_llm(&world.path("llm"));
    world
}

/// The small log as CSV lines `user,item,rating,time`.
fn lines(user: &str, time: impl Fn(i64) -> String) -> String {
    log()
        .into_iter()
        .map(|(u, i, r, t)| format!("{}{},{},{r},{}\n", user, &u.unwrap()[1..], i.unwrap(), time(t)))
        .collect()
}

/// Runs init, validate and run, quickly; gives the file, what init said, and the result document.
fn through(world: &World, args: &[&str], settings: &[&str]) -> (String, String, serde_json::Value) {
    let (out, said) = world.expect(0, &[&["init"], args].concat());
    let file = out.lines().last().unwrap().to_owned();
    world.expect(0, &["validate", &file]);
    let quick = ["--set", "recommender.hyper.epochs=2", "--set", "recommender.hyper.embedding_dim=8"];
    let document = world.run(&[&[file.as_str()], &quick[..], settings].concat());
    (std::fs::read_to_string(world.path(&file)).unwrap(), said, document)
}

fn mapped(text: &str, source: &str) -> String {
    let (_, after) = text.split_once(&format!("[sources.{source}]\n")).unwrap();
    after.lines().take_while(|l| !l.is_empty()).find(|l| l.starts_with("columns")).unwrap_or_default().to_owned()
}

#[test]
fn csv_and_an_item_table_end_in_a_fused_table() {
    let world = empty();
    let csv = format!("uid,movie,stars,ts\n{}", lines("u", |t| (1_700_000_000 + t).to_string()));
    world.write("logs/events.csv", &csv);
    let films: String = titles().into_iter().map(|(id, t)| format!("{id},{},1990\n", t.unwrap_or_default())).collect();
    world.write("logs/films.csv", &format!("movie,name,year\n{films}"));
    let args = [
        "--interactions",
        "logs/events.csv",
        "--items",
        "logs/films.csv",
        "--llm",
        "llm",
        "--out",
        "pipelines/club.toml",
    ];
    let (text, said, document) = through(&world, &args, &["--set", "rerank.budget.users=4"]);
    assert_eq!(
        mapped(&text, "interactions"),
        r#"columns = { item_id = "movie", rating = "stars", timestamp = "ts", user_id = "uid" }"#
    );
    assert_eq!(mapped(&text, "items"), r#"columns = { item_id = "movie", title = "name" }"#);
    assert!(text.contains("root = \"..\"") && text.contains("noun = \"movies\""), "{text}");
    assert!(said.contains("seconds since 1970, 2023-11-14 to"), "{said}");
    assert!(!said.contains("[unsure]"), "{said}");
    assert_eq!(document["tables"][0]["table"], "recommendations");
    let asked = document["stages"].as_array().unwrap().iter().find(|s| s["name"] == "rerank").unwrap();
    assert_eq!(asked["counters"]["users_asked"], 4);

    // A second time it touches nothing, unless told so.
    let again = world.expect(2, &[&["init"], &args[..]].concat()).1;
    assert!(again.contains("is there already") && again.contains("--force"), "{again}");
    world.expect(0, &[&["init", "--force"], &args[..]].concat());
}

#[test]
fn parquet_without_item_texts_ends_in_a_top_k() {
    let world = empty();
    let rows = log();
    let hash = |s: &Option<String>| s.clone().unwrap();
    write_parquet(
        &world.path("lake/ds=2026-11-21/part-0.parquet"),
        vec![
            (
                "event_time",
                Arc::new(TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.3 * 1000))) as ArrayRef,
            ),
            ("customerId", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| hash(&r.0)))) as ArrayRef),
            ("product_code", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| hash(&r.1)))) as ArrayRef),
            ("row_id", Arc::new(Int64Array::from_iter_values(0..rows.len() as i64)) as ArrayRef),
        ],
    );
    let (text, said, document) = through(&world, &["--interactions", "lake", "--out", "mine.toml"], &[]);
    assert_eq!(
        mapped(&text, "interactions"),
        r#"columns = { item_id = "product_code", other_row_id = "row_id", timestamp = "event_time", user_id = "customerId" }"#
    );
    assert!(!text.contains("kind = \"rerank\"") && text.contains("root = \".\""), "{text}");
    assert!(said.contains("every row counts the same"), "{said}");
    assert!(document["metrics"].as_array().unwrap().len() > 3);
}

#[test]
fn a_file_without_header_is_read_by_its_values() {
    let world = empty();
    // MovieLens' form: user, item, rating and time in tabs, all numbers.
    let text = lines("1", |t| (880_000_000 + t * 1000).to_string()).replace(",m", ",2").replace(',', "\t");
    world.write("u.tsv", &text);
    let (text, said, _) = through(&world, &["--interactions", "u.tsv"], &[]);
    assert!(text.contains("header = false") && text.contains("delimiter = \"\\t\""), "{text}");
    assert_eq!(
        mapped(&text, "interactions"),
        r#"columns = { item_id = "column_2", rating = "column_3", timestamp = "column_4", user_id = "column_1" }"#
    );
    // What only the values say is not sure, and told so.
    assert!(said.contains("Unsure of user_id, item_id, timestamp, rating"), "{said}");
    assert!(text.contains("<- look at this one"), "{text}");
}

#[test]
fn odd_files_are_made_to_fit() {
    let world = empty();
    let rows = log();
    let number = |s: &Option<String>| s.clone().unwrap()[1..].parse::<i64>().unwrap();
    // Items are numbers here and text there; seconds have fractions; `rating` is a word, `timestamp` a remark.
    write_parquet(
        &world.path("log.parquet"),
        vec![
            ("member", Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| number(&r.0)))) as ArrayRef),
            ("thing", Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| 100 + number(&r.1)))) as ArrayRef),
            ("rating", Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "good"))) as ArrayRef),
            (
                "at",
                Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| 1.7e9 + r.3 as f64 + 0.25))) as ArrayRef,
            ),
        ],
    );
    let things: Vec<String> = (0..40).map(|i| (100 + i).to_string()).collect();
    write_parquet(
        &world.path("things.parquet"),
        vec![
            ("id", Arc::new(StringArray::from_iter_values(things.iter())) as ArrayRef),
            ("label", Arc::new(StringArray::from_iter_values(things.iter().map(|t| format!("Thing {t}")))) as ArrayRef),
        ],
    );
    let args = ["--interactions", "log.parquet", "--items", "things.parquet", "--llm", "none"];
    let (text, said, _) = through(&world, &args, &[]);
    assert!(text.contains("cast(item_id as varchar) as item_id"), "{text}");
    assert!(text.contains("cast(floor(seconds * 1000) as bigint) as timestamp"), "{text}");
    assert!(mapped(&text, "interactions").contains("other_rating = \"rating\""), "{text}");
    assert!(said.contains("numbers in one table and text in the other"), "{said}");
    let published =
        world.expect(0, &["sql", "-p", "pipelines/mine.toml", "select count(title) n from recommendations"]).0;
    assert!(!published.contains(" 0 "), "{published}");
}

#[test]
fn what_cannot_be_guessed_is_asked_for() {
    let world = empty();
    world.write("x.csv", "a,b\n1.5,2.5\n2.5,3.5\n");
    let said = world.expect(65, &["init", "--interactions", "x.csv"]).1;
    assert!(said.contains("--map") && said.contains("a (Float64; e.g. 1.5, 2.5)"), "{said}");
    assert!(!world.path("pipelines/mine.toml").exists());
    world.expect(65, &["init", "--interactions", "nothing.csv"]);
    let csv = format!("who,what,r,t\n{}", lines("u", |t| t.to_string()));
    world.write("log.csv", &csv);
    let said = world.expect(2, &["init", "--interactions", "log.csv", "--map", "user_id=wo"]).1;
    assert!(said.contains("there is no column `wo`") && said.contains("who, what"), "{said}");
    let args = ["--interactions", "log.csv", "--map", "user_id=who", "--map", "item_id=what", "--map", "timestamp=t"];
    let (text, said, _) = through(&world, &args, &[]);
    assert!(mapped(&text, "interactions").contains("timestamp = \"t\", user_id = \"who\""), "{text}");
    assert!(said.contains("you said so"), "{said}");
    // `-` prints and writes nothing.
    let printed = world.expect(0, &[&["init", "--out", "-"], &args[..]].concat()).0;
    assert!(printed.starts_with("# Made by `tailfuse init`"), "{printed}");
}

/// The sample that ships, as docs/your-own-data.md has it.
#[test]
fn the_sample_of_the_guide_is_understood() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let world = empty();
    for file in ["data/sample/events.csv", "data/sample/films.csv"] {
        world.write(file, &std::fs::read_to_string(root.join(file)).unwrap());
    }
    let args =
        ["init", "--interactions", "data/sample/events.csv", "--items", "data/sample/films.csv", "--out", "films.toml"];
    let (_, said) = world.expect(0, &args);
    assert!(!said.contains("[unsure]"), "{said}");
    let text = std::fs::read_to_string(world.path("films.toml")).unwrap();
    assert_eq!(mapped(&text, "items"), r#"columns = { item_id = "movie", title = "name" }"#);
}

const TESTED: &str = r#"name = "tested"
[sources.log]
uri = "nowhere.parquet"
[stages.liked]
kind = "sql"
inputs = { log = "log" }
query = "select * from log where rating >= 4 order by row_id desc"
[stages.parts]
kind = "split"
input = "liked"

[[test]]
name = "low ratings are dropped"
stage = "liked"
given.log = [{ user_id = "a", item_id = 1, rating = 5 }, { user_id = "b", item_id = 2, rating = 1.5 }, { user_id = "c", item_id = 3, rating = 4 }]
expect = [{ user_id = "a", rating = 5 }, { user_id = "c", rating = 4 }]

[[test]]
name = "the latest row comes first"
stage = "liked"
given.log = [{ user_id = "a", item_id = 1, rating = 5 }, { user_id = "c", item_id = 3, rating = 4 }]
expect = [{ user_id = "c" }, { user_id = "a" }]
ordered = true

[[test]]
name = "the last interaction is held out"
stage = "parts"
output = "test"
given.input = [
    { user_id = 1, item_id = 1, timestamp = 3, row_id = 0 },
    { user_id = 1, item_id = 2, timestamp = 2, row_id = 1 },
    { user_id = 1, item_id = 3, timestamp = 1, row_id = 2 },
]
expect = [{ user_id = 1, item_id = 1 }]
"#;

#[test]
fn blocks_are_run_without_any_data() {
    let world = empty();
    world.write("t.toml", TESTED);
    let (out, err) = world.expect(0, &["test", "t.toml"]);
    assert_eq!(out.lines().filter(|l| l.starts_with("ok ")).count(), 3, "{out}");
    assert!(err.contains("3 passed"), "{err}");
    assert_eq!(world.expect(0, &["test", "t.toml", "--only", "parts"]).0.lines().count(), 1);
    // Nothing was read or written.
    assert!(!world.path("artifacts").exists() && !world.path("warehouse").exists());

    world.write("bad.toml", &TESTED.replace("rating >= 4", "rating >= 4.5"));
    let (out, err) = world.expect(1, &["test", "bad.toml"]);
    assert!(out.contains("FAILED  low ratings are dropped"), "{out}");
    assert!(
        out.contains("2 rows expected, 1 came") && out.contains(r#"- missing:    { user_id = "c", rating = 4.0 }"#)
            || out.contains("rating = 4"),
        "{out}"
    );
    assert!(out.contains("~ row 1: `user_id` is \"a\", expected \"c\""), "{out}");
    assert!(err.contains("2 of 3 tests failed"), "{err}");
    world.expect(2, &["test", "t.toml", "--only", "no such"]);

    let mistakes = TESTED.replace("given.log", "given.lgo").replace("stage = \"parts\"", "stage = \"prats\"");
    world.write("mistakes.toml", &mistakes);
    let err = world.expect(78, &["test", "mistakes.toml"]).1;
    assert!(err.contains("did you mean `log`?") && err.contains("did you mean `parts`?"), "{err}");
}

#[test]
fn the_blocks_of_the_demo_pass() {
    let root = env!("CARGO_MANIFEST_DIR");
    let world = empty();
    let (out, _) = world.expect(0, &["test", &format!("{root}/pipelines/demo.toml")]);
    assert!(out.starts_with("ok "), "{out}");
}
