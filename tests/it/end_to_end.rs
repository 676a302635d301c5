//! The whole path through the binary, on the small world of `fixtures.rs`.

use std::collections::BTreeMap;

use crate::fixtures::{ITEMS, Line, USERS, World, log, stage, write_parquet};

#[test]
fn a_run_publishes_and_a_second_one_finds_everything_cached() {
    let world = World::new();
    let first = world.run(&["pipeline.toml"]);
    assert_eq!(first["status"], "ok");
    assert_eq!(first["stages"].as_array().unwrap().iter().filter(|s| s["cached"] == true).count(), 0);

    let rows = || world.sql("select * exclude run_id from recommendations order by user_id, rank");
    let before = rows();
    let second = world.run(&["pipeline.toml"]);
    for s in second["stages"].as_array().unwrap() {
        assert_eq!(s["cached"], s["kind"] != "write", "{}", s["name"]);
    }
    // The same partition twice leaves one copy, in the table's next version.
    assert_eq!(rows(), before);
    let version = |document: &serde_json::Value| document["tables"][0]["version"].as_u64();
    assert_eq!((version(&first), version(&second)), (Some(0), Some(1)));
    let digest = |document: &serde_json::Value| document["tables"][0]["sha256"].clone();
    assert_eq!(digest(&first), digest(&second));
    assert_eq!(second["metrics"], first["metrics"]);

    let runs = world.sql("select run_id, pipeline, status from runs order by started_at");
    assert_eq!(runs.len(), 2);
    assert_eq!(runs[1]["run_id"], second["run_id"]);
}

#[test]
fn the_fused_table_keeps_its_contract() {
    let world = World::new();
    world.run(&["pipeline.toml"]);
    let rows = world.sql("select * from recommendations order by user_id, rank");
    assert_eq!(rows.len(), USERS * 5);
    let columns: Vec<&str> = rows[0].as_object().unwrap().keys().map(String::as_str).collect();
    for column in [
        "user_id",
        "item_id",
        "title",
        "rank",
        "score",
        "rec_rank",
        "rec_score",
        "alpha",
        "long_tail_coefficient",
        "interactions",
        "bucket",
        "source",
        "run_id",
        "rec_model",
        "llm_model",
        "ds",
    ] {
        assert!(columns.contains(&column), "{column} is missing in {columns:?}");
    }
    let seen: std::collections::HashSet<(String, String)> =
        world.sql("select user_id, item_id from parts.history").iter().map(pair).collect();
    let mut sources: BTreeMap<String, usize> = BTreeMap::new();
    for user in rows.chunks(5) {
        let items: std::collections::HashSet<String> = user.iter().map(|r| pair(r).1).collect();
        assert_eq!(items.len(), 5, "an item twice for {}", user[0]["user_id"]);
        for (place, row) in user.iter().enumerate() {
            assert_eq!(row["rank"], place as i64 + 1);
            assert!(!seen.contains(&pair(row)), "{row} was seen before");
            let l = (row["interactions"].as_f64().unwrap() + 1.0).ln();
            assert!((row["long_tail_coefficient"].as_f64().unwrap() - l).abs() < 1e-12);
            if row["source"] == "recommender" {
                assert_eq!(row["alpha"], 0.0);
                assert_eq!(row["rank"], row["rec_rank"]);
                assert_eq!(row["reason"], "budget");
            }
        }
        *sources.entry(user[0]["source"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(sources, BTreeMap::from([("fused".into(), 10), ("recommender".into(), USERS - 10)]));
    // Tail first: nobody who was left out has a shorter history than somebody who was asked.
    let asked = world.sql("select max(interactions) m from recommendations where source = 'fused'");
    let left = world.sql("select min(interactions) m from recommendations where source = 'recommender'");
    assert!(asked[0]["m"].as_i64() <= left[0]["m"].as_i64());
    // An item without a title is ranked by the recommender and never shown.
    let shown =
        world.sql("select count(*) n from \"fused\".\"shortlist\" where item_id = 'm07' and llm_rank is not null");
    assert_eq!(shown[0]["n"], 0);
}

fn pair(row: &serde_json::Value) -> (String, String) {
    (row["user_id"].as_str().unwrap().to_owned(), row["item_id"].as_str().unwrap().to_owned())
}

#[test]
fn a_changed_setting_runs_what_depends_on_it_and_nothing_else() {
    let world = World::new();
    world.run(&["pipeline.toml"]);
    let (out, _) = world.expect(0, &["plan", "pipeline.toml", "--set", "rerank.budget.users=12"]);
    for line in out.lines() {
        let will_run = line.contains("will run:");
        if line.starts_with(' ') {
            let name = line.split_whitespace().next().unwrap();
            let expected = ["rerank", "fused", "quality", "publish"].contains(&name);
            if name != "node" {
                assert_eq!(will_run, expected, "{line}");
            }
        }
    }
    let document = world.run(&["pipeline.toml", "--set", "rerank.budget.users=12"]);
    let rerank = stage(&document, "rerank");
    // Ten of the twelve users were answered before: only two prompts are paid for.
    assert_eq!(rerank["counters"]["users_asked"], 12);
    assert_eq!(rerank["counters"]["prompts_reused"], 10);
    assert_eq!(stage(&document, "model")["cached"], true);
}

#[test]
fn from_and_fresh_run_again() {
    let world = World::new();
    world.run(&["pipeline.toml"]);
    let document = world.run(&["pipeline.toml", "--from", "fused"]);
    for s in document["stages"].as_array().unwrap() {
        let again = ["fused", "quality", "publish"].contains(&s["name"].as_str().unwrap());
        assert_eq!(s["cached"], !again, "{}", s["name"]);
    }
    let document = world.run(&["pipeline.toml", "--fresh"]);
    assert!(document["stages"].as_array().unwrap().iter().all(|s| s["cached"] == false));
    // The ledger still holds: no prompt is paid for twice.
    assert_eq!(stage(&document, "rerank")["counters"]["llm_tokens"], 0);
    let (_, err) = world.expect(2, &["run", "pipeline.toml", "--from", "fusd"]);
    assert!(err.contains("did you mean `fused`?"), "{err}");
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let (one, two) = (World::new(), World::new());
    let (first, second) = (one.run(&["pipeline.toml"]), two.run(&["pipeline.toml"]));
    assert_eq!(first["metrics"], second["metrics"]);
    for name in ["events", "parts", "model", "shortlist", "neighbours", "prompts", "tail"] {
        let folder = |d: &serde_json::Value| stage(d, name)["fingerprint"].as_str().unwrap().to_owned();
        // Files have other times in the two worlds, so sources differ in name; their content does not.
        let a = one.path("artifacts").join(folder(&first));
        let b = two.path("artifacts").join(folder(&second));
        for entry in std::fs::read_dir(&a).unwrap() {
            let file = entry.unwrap().file_name();
            // `epochs` has the seconds that each epoch took.
            if a.join(&file).is_file() && file != "stage.json" && file != "epochs.parquet" {
                let same = std::fs::read(a.join(&file)).unwrap() == std::fs::read(b.join(&file)).unwrap();
                assert!(same, "{name}: {file:?} differs");
            }
        }
    }
}

#[test]
fn a_damaged_artifact_is_made_again() {
    let world = World::new();
    let first = world.run(&["pipeline.toml"]);
    let folder = world.path("artifacts").join(stage(&first, "tail")["fingerprint"].as_str().unwrap());
    std::fs::remove_file(folder.join("result.parquet")).unwrap();
    let second = world.run(&["pipeline.toml"]);
    assert_eq!(stage(&second, "tail")["cached"], false);
    assert_eq!(stage(&second, "fused")["cached"], true, "the content is the same, so nothing after it runs");
}

#[test]
fn what_real_logs_are_full_of_is_counted() {
    let world = World::new();
    let mut lines = log();
    let repeat = lines[3].clone();
    lines.push(repeat); // an exact duplicate
    let mut rerated: Line = lines[4].clone();
    rerated.2 = 6.0 - rerated.2;
    rerated.3 += 1;
    lines.push(rerated); // a re-rating
    lines.push((None, Some("m01".into()), 3.0, 5)); // a null id
    lines.push((Some(String::new()), Some("m01".into()), 3.0, 5)); // an empty id
    lines.push((Some("once".into()), Some("m02".into()), 3.0, 5)); // too few for the split
    lines.push((Some("u01".into()), Some("unlisted".into()), 3.0, 2)); // not in the item table
    world.write_log(&lines);
    let document = world.run(&["pipeline.toml"]);
    let (events, parts) = (&stage(&document, "events")["counters"], &stage(&document, "parts")["counters"]);
    assert_eq!(stage(&document, "events")["rows"]["bad_rows"], 2, "{events}");
    assert_eq!(world.sql("select count(*) n from events.bad_rows")[0]["n"], 2);
    assert_eq!(world.sql("select count(*) n from recommendations where user_id = 'once'")[0]["n"], 5);
    assert_eq!(world.sql("select count(*) n from parts.test where user_id = 'once'")[0]["n"], 0);
    assert_eq!((&events["exact_duplicates"], &events["re_ratings"]), (&1.into(), &1.into()), "{events}");
    assert_eq!(events["bad_rows_by_reason"], serde_json::json!({"uid is empty": 1, "uid is null": 1}));
    assert_eq!((&parts["users_too_few"], &parts["users_evaluated"]), (&1.into(), &USERS.into()), "{parts}");
    let prompts = &stage(&document, "prompts")["counters"];
    assert_eq!(prompts["history_not_in_item_table"], 1, "{prompts}");
}

#[test]
fn bad_input_has_its_exit_code_and_names_the_thing() {
    let world = World::new();
    let refuse = |code: i32, args: &[&str], words: &[&str]| {
        let (out, err) = world.expect(code, &[&["run", "pipeline.toml"], args].concat());
        let document: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        assert_eq!(document["exit_code"], code);
        for word in words {
            assert!(err.contains(word), "`{word}` is not in:\n{err}");
        }
    };
    refuse(65, &["--set", "events.columns.user_id=usr"], &["usr", "events", "uid"]);
    refuse(65, &["--set", "events.uri=data/nothing.parquet"], &["nothing.parquet"]);
    refuse(78, &["--set", "rerank.modle=label"], &["modle", "model"]);
    refuse(78, &["--set", "shortlist.history=parts.hist"], &["parts.hist", "history"]);
    refuse(78, &["--set", "prompts.max_tokens=120"], &["120", "prompts"]);
    world.write_log(&[]);
    refuse(65, &[], &["events", "no rows"]);
    let mut lines = log();
    lines.iter_mut().take(30).for_each(|l| l.0 = None);
    world.write_log(&lines);
    refuse(65, &[], &["max_bad_rows", "uid is null: 30"]);
    let whole = std::fs::read(world.path("data/films.parquet")).unwrap();
    world.write_log(&log());
    std::fs::write(world.path("data/films.parquet"), &whole[..whole.len() / 2]).unwrap();
    refuse(65, &[], &["films.parquet"]);
    std::fs::write(world.path("data/films.parquet"), &whole).unwrap();
    let weights = std::fs::read(world.path("llm/model.safetensors")).unwrap();
    std::fs::write(world.path("llm/model.safetensors"), &weights[..weights.len() - 100]).unwrap();
    refuse(65, &[], &["model.safetensors"]);
}

#[test]
fn sql_reads_and_does_not_write() {
    let world = World::new();
    world.run(&["pipeline.toml"]);
    let ask = |args: &[&str]| world.expect(0, &[&["sql", "-p", "pipeline.toml"], args].concat()).0;
    assert!(ask(&["show tables"]).contains("recommendations"));
    assert!(ask(&["--format", "csv", "select count(*) as items from films"]).contains(&ITEMS.to_string()));
    ask(&["--format", "parquet", "--output", "tail.parquet", "select * from tail"]);
    assert!(world.path("tail.parquet").exists());
    let similar = world.sql("select * from top_similar('model.user_embeddings', 2)");
    assert_eq!(similar.len(), USERS * 2);
    for write in [
        "create table t as select 1",
        "insert into films values ('a', 'b')",
        "copy films to 'x.csv'",
        "drop table films",
    ] {
        let (_, err) = world.expect(2, &["sql", "-p", "pipeline.toml", write]);
        assert!(err.contains("read"), "{err}");
    }
    let (_, err) = world.expect(2, &["sql", "-p", "pipeline.toml", "select nothing from films"]);
    assert!(err.contains("nothing"), "{err}");
}

#[test]
fn integer_ids_and_a_log_without_time_work_too() {
    let world = World::new();
    let lines = log();
    let number = |s: &Option<String>| s.as_ref().unwrap()[1..].parse::<i32>().unwrap();
    use arrow::array::{ArrayRef, Int32Array};
    use std::sync::Arc;
    write_parquet(
        &world.path("data/events.parquet"),
        vec![
            ("uid", Arc::new(Int32Array::from_iter_values(lines.iter().map(|l| number(&l.0)))) as ArrayRef),
            ("movie", Arc::new(Int32Array::from_iter_values(lines.iter().map(|l| number(&l.1))))),
        ],
    );
    let titles = crate::fixtures::titles();
    write_parquet(
        &world.path("data/films.parquet"),
        vec![
            (
                "movie",
                Arc::new(Int32Array::from_iter_values(titles.iter().map(|t| number(&Some(t.0.clone()))))) as ArrayRef,
            ),
            ("name", Arc::new(arrow::array::StringArray::from_iter(titles.iter().map(|t| t.1.clone())))),
        ],
    );
    let pipeline = crate::fixtures::PIPELINE.replace(", rating = \"stars\", timestamp = \"ts\"", "");
    world.write("pipeline.toml", &pipeline);
    world.run(&["pipeline.toml"]);
    let rows = world.sql("select user_id, item_id from recommendations order by user_id limit 1");
    assert_eq!(rows[0]["user_id"], 0);
}

#[test]
fn every_mode_orders_the_candidates() {
    let world = World::new();
    let likelihood = ["--set", "rerank.mode=likelihood", "--set", "prompts.candidate_style=titles"];
    for normalise in ["sum", "mean", "unconditional"] {
        let set = format!("rerank.normalise={normalise}");
        let document = world.run(&[&["pipeline.toml", "--set", &set], &likelihood[..]].concat());
        assert_eq!(stage(&document, "rerank")["counters"]["users_asked"], 10, "{normalise}");
    }
    // Three orders of the candidates are three prompts, of which one was asked before in none of the runs above.
    let document = world.run(&["pipeline.toml", "--set", "prompts.permutations=3"]);
    let counters = &stage(&document, "rerank")["counters"];
    assert_eq!((&counters["prompts"], &counters["users_asked"]), (&30.into(), &10.into()));
    // Letters and titles are not mixed up.
    let wrong = ["run", "pipeline.toml", "--set", "rerank.mode=likelihood"];
    let (_, err) = world.expect(78, &wrong);
    assert!(err.contains("candidate_style = \"titles\""), "{err}");
}
