//! Ratings by the LLM through the binary: a prompt for each pair, expected and greedy ratings, the ledger, precision.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::fixtures::{ITEMS, USERS, World, stage};

const PIPELINE: &str = concat!(
    head!(),
    r#"
[stages.rater]
kind = "train"
model = "deepfm"
train = "parts.train"
valid = "parts.valid"
[stages.rater.hyper]
epochs = 2

[stages.predicted]
kind = "predict"
model = "rater.model"
pairs = "pairs"

[stages.pairs]
kind = "sql"
query = "select * from parts_test union all select * from parts_valid"
inputs = { parts_test = "parts.test", parts_valid = "parts.valid" }

[stages.tail]
kind = "sql"
file = "builtin:long_tail"
inputs = { history = "parts.train" }

[stages.asked]
kind = "prompt_ratings"
model = "llm"
pairs = "pairs"
history = "parts.train"
items = "films"
predictions = "predicted"
noun = "films"

[stages.rated]
kind = "rerank"
model = "llm"
prompts = "asked"
long_tail = "tail"
mode = "rating"
"#
);

fn ratings(world: &World, stage: &str) -> BTreeMap<(String, String), f64> {
    let rows = world.sql(&format!("select user_id, item_id, llm_score from {stage}.reranked"));
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    rows.iter().map(|r| ((text(&r["user_id"]), text(&r["item_id"])), r["llm_score"].as_f64().unwrap())).collect()
}

#[test]
fn every_pair_gets_the_rating_of_its_own_prompt() {
    let world = World::new();
    world.write("pipeline.toml", PIPELINE);
    let done = world.run(&["pipeline.toml"]);
    let counters = &stage(&done, "asked")["counters"];
    let skipped = counters["skipped_no_title"].as_u64().unwrap();
    assert_eq!(counters["pairs"], 2 * USERS);
    assert_eq!(counters["prompts"].as_u64().unwrap() + skipped, 2 * USERS as u64);
    let expected = ratings(&world, "rated");
    assert_eq!(expected.len() as u64, counters["prompts"].as_u64().unwrap());
    assert!(expected.values().all(|r| (1.0..=5.0).contains(r)), "{expected:?}");
    assert!(expected.keys().all(|(_, item)| item.len() == 3 && item[1..].parse::<usize>().unwrap() < ITEMS));
    // Other prompts, other ratings; a user's own come best first.
    let distinct: std::collections::BTreeSet<u64> = expected.values().map(|r| r.to_bits()).collect();
    assert!(distinct.len() > 10, "{expected:?}");
    let wrong = world.sql(
        "select count(*) n from rated.reranked a join rated.reranked b using (user_id) \
         where a.llm_rank < b.llm_rank and a.llm_score < b.llm_score",
    );
    assert_eq!(wrong[0]["n"], 0);
    // The prompt shows ratings and what the recommender predicts.
    let prompt = &world.sql("select prompt from asked.prompts order by user_id limit 1")[0]["prompt"];
    let prompt = prompt.as_str().unwrap();
    assert!(prompt.contains("Rating History: The Film No. ") && prompt.contains("Conventional Model Prediction: "));

    // Greedy ratings are on the scale; they are other answers, so they are asked anew.
    let done = world.run(&["pipeline.toml", "--set", "rated.rated_by=greedy"]);
    assert_eq!(stage(&done, "rated")["counters"]["prompts_reused"], 0);
    let greedy = world
        .expect(
            0,
            &[
                "sql",
                "-p",
                "pipeline.toml",
                "--set",
                "rated.rated_by=greedy",
                "--format",
                "json",
                "select distinct llm_score from rated.reranked",
            ],
        )
        .0;
    let greedy: Vec<Value> = serde_json::from_str(&greedy).unwrap();
    assert!(greedy.iter().all(|r| [1.0, 2.0, 3.0, 4.0, 5.0].contains(&r["llm_score"].as_f64().unwrap())), "{greedy:?}");

    // So is another precision; the same is in the ledger.
    let exact = ["pipeline.toml", "--set", "rated.precision=f32"];
    assert_eq!(stage(&world.run(&exact), "rated")["counters"]["prompts_reused"], 0);
    let again = world.run(&[&exact[..], &["--from", "rated"]].concat());
    assert_eq!(stage(&again, "rated")["counters"]["prompts_reused"], counters["prompts"]);
}

#[test]
fn prompts_for_ratings_are_not_for_orders() {
    let world = World::new();
    world.write("pipeline.toml", &PIPELINE.replace("mode = \"rating\"\n", ""));
    let (_, err) = world.expect(78, &["run", "pipeline.toml"]);
    assert!(err.contains("mode = \"rating\"") && err.contains("asked"), "{err}");
}
