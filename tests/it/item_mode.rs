//! The item model through the binary: trained, recommended from, compared, and fused as an LLM's order is.

use serde_json::Value;

use crate::fixtures::{World, stage};

const PIPELINE: &str = concat!(
    head!(),
    r#"
[stages.popular]
kind = "train"
model = "popularity"
train = "parts.train"

[stages.shortlist]
kind = "recommend"
model = "popular.model"
history = "parts.history"
k = 8

[stages.tail]
kind = "sql"
file = "builtin:long_tail"
inputs = { history = "parts.history" }

[stages.item_llm]
kind = "train_items"
train = "parts.train"
valid = "parts.valid"
items = "films"
model = "llm"
hyper = { layers = 2, epochs = 3, batch_tokens = 64, max_len = 8, learning_rate = 1e-3 }

[stages.own_list]
kind = "recommend"
model = "item_llm.model"
history = "parts.history"
k = 5

[stages.quality]
kind = "evaluate"
shortlist = "own_list"
test = "parts.test"
model = "item_llm.model"

[stages.alike]
kind = "similar"
embeddings = "item_llm.item_embeddings"
n = 2

[stages.users_alike]
kind = "similar"
embeddings = "item_llm.user_embeddings"
n = 1

[stages.reordered]
kind = "rerank_items"
model = "item_llm.model"
shortlist = "shortlist"
history = "parts.history"

[stages.fused]
kind = "fuse"
shortlist = "shortlist"
rerank = "reordered.reranked"
not_asked = "reordered.not_asked"
long_tail = "tail"
items = "films"
a1 = 0.5
a2 = 0.3
k = 5
"#
);

#[test]
fn the_item_model_is_a_recommender_and_orders_shortlists() {
    let world = World::new();
    world.write("pipeline.toml", PIPELINE);
    let done = world.run(&["pipeline.toml"]);
    let fit = &stage(&done, "item_llm")["counters"];
    assert_eq!((&fit["users"], &fit["items"], &fit["items_with_title"]), (&24.into(), &40.into(), &39.into()));
    assert_eq!(fit["epochs"], 3);
    assert!(fit["valid_ndcg_10"].as_f64().unwrap() >= 0.0);

    let epochs = world.sql("select epoch, loss from item_llm.epochs order by epoch");
    let loss = |at: usize| epochs[at]["loss"].as_f64().unwrap();
    assert!(epochs.len() == 3 && loss(2) < loss(0), "{epochs:?}");
    // All items of the item table, also those that nobody has chosen.
    let sizes = world.sql(
        "select (select count(*) from item_llm.item_embeddings) items, (select count(*) from alike) pairs, \
         (select count(*) from users_alike) users, (select count(*) from quality.metrics) metrics, \
         (select array_length(embedding) from item_llm.item_embeddings limit 1) dim",
    );
    assert_eq!(sizes[0]["items"], 40);
    assert_eq!(sizes[0]["pairs"], 80);
    assert_eq!(sizes[0]["users"], 24);
    assert_eq!(sizes[0]["dim"], 32);
    assert!(sizes[0]["metrics"].as_i64().unwrap() > 0);

    // The order of a shortlist: the same items, each once, by score.
    let rows = world.sql(
        "select s.user_id, s.item_id, s.rec_rank, r.llm_rank, r.llm_score, r.source, r.prompt_digest from shortlist s \
         join reordered r on s.user_id = r.user_id and s.item_id = r.item_id order by s.user_id, r.llm_rank",
    );
    let all = world.sql("select count(*) n from shortlist");
    assert_eq!(all[0]["n"], rows.len());
    let moved = rows.iter().filter(|r| r["llm_rank"] != r["rec_rank"]).count();
    assert!(moved > 0);
    for pair in rows.windows(2) {
        let same = pair[0]["user_id"] == pair[1]["user_id"];
        let score = |r: &Value| r["llm_score"].as_f64().unwrap();
        assert!(!same || score(&pair[0]) >= score(&pair[1]));
        assert!(!same || pair[0]["llm_rank"].as_i64().unwrap() + 1 == pair[1]["llm_rank"].as_i64().unwrap());
        assert_eq!(same, pair[0]["prompt_digest"] == pair[1]["prompt_digest"]);
    }
    let fused = world.sql("select count(*) n, sum(case when source = 'fused' then 1 else 0 end) f from fused");
    assert_eq!(fused[0]["n"], fused[0]["f"]);

    // The score of an item that is in both lists is the same: one model.
    let twice = world.sql(
        "select max(abs(o.rec_score - r.llm_score)) d from own_list o join reordered r \
         on o.user_id = r.user_id and o.item_id = r.item_id",
    );
    assert!(twice[0]["d"].as_f64().is_none_or(|d| d < 1e-4), "{twice:?}");

    let (_, err) = world.expect(78, &["run", "pipeline.toml", "--set", "item_llm.hyper.layers=9"]);
    assert!(err.contains("2 layers"), "{err}");
}
