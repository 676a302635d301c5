//! `top_similar` as SQL and as a stage, against DataFusion's own cosine.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ArrayRef, Int64Array, ListArray, StringArray};
use arrow::datatypes::Float32Type;
use futures::StreamExt;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tailfuse::error::{Fault, Result};
use tailfuse::query::{open_session, plan_query, register};
use tailfuse::stages::ResolveContext;
use tailfuse::stages::registry::find;
use tailfuse::tables::sql_errors::from_datafusion;
use tailfuse::tables::{SqlMemory, StoredTable};

use crate::table_support::{all, output, query, stage_context, stored};

fn lists(rows: Vec<Option<Vec<f32>>>) -> ArrayRef {
    let rows = rows.into_iter().map(|r| r.map(|r| r.into_iter().map(Some).collect::<Vec<_>>()));
    Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows))
}

async fn random(rows: i64, dim: usize) -> StoredTable {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    let embeddings = (0..rows).map(|_| Some((0..dim).map(|_| rng.random_range(-1.0f32..1.0)).collect())).collect();
    stored(vec![("user_id", Arc::new(Int64Array::from_iter_values(0..rows))), ("embedding", lists(embeddings))]).await
}

#[tokio::test]
async fn agrees_with_the_cross_join() {
    let users = random(120, 9).await;
    let ours =
        "select user_id, neighbour_id, rank, round(similarity, 9) from top_similar('users', 4) order by user_id, rank";
    let theirs = "select * from (
        select a.user_id, b.user_id, row_number() over (partition by a.user_id order by cosine_similarity(a.embedding, b.embedding) desc, b.user_id) as rank,
               round(cosine_similarity(a.embedding, b.embedding), 9)
        from users a cross join users b where a.user_id <> b.user_id)
        where rank <= 4 order by 1, 3";
    let ours = query(&[("users", &users)], ours).await.unwrap();
    assert_eq!(ours, query(&[("users", &users)], theirs).await.unwrap());
    assert_eq!(ours.len(), 480);
}

#[tokio::test]
async fn filters_limits_and_projections() {
    let users = random(600, 5).await;
    let tables = [("users", &users)];
    let one = "select user_id, rank from top_similar('users', 3) where user_id = 17";
    assert_eq!(query(&tables, one).await.unwrap(), ["17|1", "17|2", "17|3"]);
    let ranked = "select count(*) from top_similar('users', 3) where user_id in (3, 5) and rank < 3";
    assert_eq!(query(&tables, ranked).await.unwrap(), ["4"]);
    assert_eq!(query(&tables, "select rank from top_similar('users', 2) limit 3").await.unwrap(), ["1", "2", "1"]);
    assert_eq!(query(&tables, "select count(*) from top_similar('users', 1)").await.unwrap(), ["600"]);
    // The filter is applied to the query rows, not to what was computed for all.
    let plan = query(&tables, &format!("explain {one}")).await.unwrap().join("\n");
    assert!(!plan.contains("FilterExec"), "{plan}");
    for wrong in ["top_similar('users', 0)", "top_similar('users', 1001)", "top_similar(users, 1)"] {
        let e = query(&tables, &format!("select * from {wrong}")).await.unwrap_err();
        assert_eq!(e.fault, Fault::Spec, "{wrong}: {e}");
    }
}

#[tokio::test]
async fn rows_without_an_embedding_have_no_neighbours() {
    let ids: ArrayRef = Arc::new(StringArray::from(vec!["z", "y", "x", "w"]));
    let rows = vec![None, Some(vec![1.0, 0.0]), Some(vec![0.0, 0.0]), Some(vec![1.0, 1.0])];
    let items = stored(vec![("embedding", lists(rows)), ("item_id", ids)]).await;
    let sql = "select item_id, neighbour_id, rank, round(similarity, 6) from top_similar('items', 2)";
    assert_eq!(query(&[("items", &items)], sql).await.unwrap(), ["y|w|1|0.707107", "w|y|1|0.707107"]);
    let ragged = stored(vec![
        ("item_id", Arc::new(Int64Array::from(vec![1, 2]))),
        ("embedding", lists(vec![Some(vec![1.0]), Some(vec![1.0, 2.0])])),
    ])
    .await;
    let e = query(&[("items", &ragged)], sql).await.unwrap_err();
    assert!(e.fault == Fault::Data && e.message.contains("differ in length"), "{e}");
}

#[tokio::test]
async fn memory_is_charged_to_the_session() {
    let users = random(20_000, 8).await;
    let run = async |limit: usize| -> Result<usize> {
        let ctx = open_session(&SqlMemory { limit, spill_dir: None })?;
        register(&ctx, "users", &users)?;
        let sql = "select * from top_similar('users', 1) where user_id < 200";
        let frame = plan_query(&ctx, sql).await?;
        let batches = frame.collect().await.map_err(from_datafusion)?;
        Ok(batches.iter().map(|b| b.num_rows()).sum())
    };
    assert_eq!(run(64 << 20).await.unwrap(), 200);
    let e = run(1 << 20).await.unwrap_err();
    assert!(e.fault == Fault::Spec && e.to_string().contains("top_similar"), "{e}");
}

#[tokio::test]
async fn the_stage_orders_by_id_and_rank() {
    let ids: ArrayRef = Arc::new(StringArray::from(vec!["c", "a", "b"]));
    let rows = vec![Some(vec![1.0, 0.0]), Some(vec![1.0, 0.1]), Some(vec![-1.0, 0.2])];
    let users = stored(vec![("user_id", ids), ("embedding", lists(rows))]).await;
    let root = std::env::current_dir().unwrap();
    let resolve = ResolveContext { root: &root, history_at_test: "train" };
    let run = async |config: serde_json::Value| {
        let stage = (find("similar").unwrap().resolve)(config, &resolve).unwrap();
        let result = stage.run(&stage_context(&[("embeddings", &users)])).await.unwrap();
        output(result, "neighbours").await.unwrap()
    };
    let table = run(json!({ "embeddings": "x", "n": 2 })).await;
    let schema: Vec<String> =
        table.schema().fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect();
    assert_eq!(schema, ["user_id: Utf8", "neighbour_id: Utf8", "rank: Int32", "similarity: Float64"]);
    let pairs: Vec<String> = all(&table).await.iter().map(|l| l.rsplit_once('|').unwrap().0.to_owned()).collect();
    assert_eq!(pairs, ["a|c|1", "a|b|2", "b|a|1", "b|c|2", "c|a|1", "c|b|2"]);
    let close = run(json!({ "embeddings": "x", "n": 2, "min_similarity": 0.5 })).await;
    assert_eq!(close.num_rows(), 2);
    // One neighbour by default: the paper's.
    assert_eq!(run(json!({ "embeddings": "x" })).await.num_rows(), 3);
}

/// A million rows of 64 within 1 GiB. Run it by hand, on an idle machine:
/// `cargo test --release --test it similar::a_million -- --ignored --nocapture`.
/// `TAILFUSE_QUERIES` sets how many rows are asked for (all: 1000000); each costs 0.128 GFLOP.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes of work; a measurement"]
async fn a_million_rows_within_a_gibibyte() {
    let rows = 1_000_000i64;
    let queries: i64 = std::env::var("TAILFUSE_QUERIES").map_or(20_000, |v| v.parse().unwrap());
    let users = random(rows, 64).await;
    let ctx = open_session(&SqlMemory { limit: 1 << 30, spill_dir: None }).unwrap();
    register(&ctx, "users", &users).unwrap();
    let began = Instant::now();
    let sql = format!("select * from top_similar('users', 10) where user_id < {queries}");
    let mut stream = plan_query(&ctx, &sql).await.unwrap().execute_stream().await.unwrap();
    let mut found = 0;
    while let Some(batch) = stream.next().await {
        found += batch.unwrap().num_rows() as i64;
    }
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(found, queries * 10);
    let gflop = 2.0 * 64.0 * rows as f64 * queries as f64 / 1e9;
    eprintln!("{queries} of {rows} rows: {seconds:.1} s, {:.1} GFLOP/s", gflop / seconds);
}
