//! SQL over our tables: what it computes, what it refuses, how its errors are mapped, and how
//! rows are written.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Float64Array, Int32Array, Int64Array, ListArray, StringArray};
use arrow::datatypes::{Float32Type, Float64Type};
use serde_json::json;
use tailfuse::error::{Fault, Result};
use tailfuse::query::library::{EXAMPLES, stage_sql};
use tailfuse::query::{Catalog, Format, NamedTable, open_session, plan_against, plan_query, register, write_rows};
use tailfuse::stages::registry::find;
use tailfuse::stages::{ResolveContext, Stage};
use tailfuse::tables::sql_errors::{as_usage, from_datafusion};
use tailfuse::tables::{SqlMemory, Store, StoredTable, Table};

use crate::table_support::{all, lines, memory, output, query, stage_context, stored};

fn ints(values: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(values.to_vec()))
}

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn stage(kind: &str, config: serde_json::Value) -> Result<Box<dyn Stage>> {
    let root = std::env::current_dir().unwrap();
    let ctx = ResolveContext { root: &root, history_at_test: "train+valid" };
    (find(kind).unwrap().resolve)(config, &ctx)
}

/// Six interactions of three users.
async fn log() -> StoredTable {
    stored(vec![
        ("row_id", ints(&[0, 1, 2, 3, 4, 5])),
        ("user_id", texts(&["a", "a", "a", "b", "b", "c"])),
        ("item_id", ints(&[1, 2, 3, 1, 2, 1])),
        ("timestamp", ints(&[10, 20, 30, 10, 20, 10])),
    ])
    .await
}

#[tokio::test]
async fn long_tail_by_hand() {
    // N: a 3, b 1, c 1, d 2, e 7. In order of (N, id): b c d a e; five in three: 2, 2, 1.
    let users: Vec<&str> = ["a"; 3].into_iter().chain(["b", "c", "d", "d"]).chain(["e"; 7]).collect();
    let table = stored(vec![("user_id", texts(&users))]).await;
    let sql = stage_sql("long_tail").unwrap();
    let rows = query(&[("history", &table)], sql).await.unwrap();
    let ln = |n: f64| format!("{}", (n + 1.0).ln());
    assert_eq!(
        rows,
        [
            format!("a|3|{}|torso", ln(3.0)),
            format!("b|1|{}|tail", ln(1.0)),
            format!("c|1|{}|tail", ln(1.0)),
            format!("d|2|{}|torso", ln(2.0)),
            format!("e|7|{}|head", ln(7.0)),
        ]
    );
    for (n, sizes) in [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (8, [3, 3, 2])] {
        let table = stored(vec![("user_id", ints(&(0..n).collect::<Vec<_>>()))]).await;
        let counted = format!(
            "select count(*) filter (where bucket = 'tail'), count(*) filter (where bucket = 'torso'), count(*) filter (where bucket = 'head') from ({sql})"
        );
        let rows = query(&[("history", &table)], &counted).await.unwrap();
        assert_eq!(rows, [format!("{}|{}|{}", sizes[0], sizes[1], sizes[2])], "{n} users");
    }
}

#[tokio::test]
async fn the_other_stage_files_by_hand() {
    let log = log().await;
    let sql = |name: &str| stage_sql(name).unwrap();
    let popularity = query(&[("input", &log)], sql("popularity")).await.unwrap();
    assert_eq!(popularity, ["1|3|3|0.5|1", "2|2|2|0.3333333333333333|2", "3|1|1|0.16666666666666666|3"]);

    // Users of item 1: a b c; of 2: a b; of 3: a. Only 1 and 2 share two users.
    let pairs = query(&[("input", &log)], sql("co_occurrence")).await.unwrap();
    let cosine = 2.0 / 6f64.sqrt();
    assert_eq!(pairs, [format!("1|2|1|2|{cosine}"), format!("2|1|1|2|{cosine}")]);

    let items = stored(vec![("item_id", ints(&[1, 3]))]).await;
    let kept = query(&[("interactions", &log), ("items", &items)], sql("filters")).await.unwrap();
    assert_eq!(kept, ["0|a|1|10", "2|a|3|30", "3|b|1|10", "5|c|1|10"]);

    let twice = stored(vec![
        ("row_id", ints(&[0, 1, 2, 3])),
        ("user_id", ints(&[1, 1, 1, 2])),
        ("item_id", ints(&[5, 5, 5, 5])),
        ("timestamp", ints(&[3, 9, 9, 1])),
    ])
    .await;
    assert_eq!(query(&[("input", &twice)], sql("dedup")).await.unwrap(), ["2|1|5|9", "3|2|5|1"]);
}

#[tokio::test]
async fn cosine_similarity_by_hand() {
    let select = |a: &str, b: &str| format!("select cosine_similarity({a}, {b})");
    for (a, b, wanted) in [
        ("[1.0, 0.0]", "[0.0, 2.0]", "0.0"),
        ("[1.0, 2.0]", "[2.0, 4.0]", "1.0"),
        ("[1, 0]", "[-3, 0]", "-1.0"),
        ("[3.0, 4.0]", "[4.0, 3.0]", "0.96"),
        ("[0.0, 0.0]", "[1.0, 1.0]", "-"),
        ("null", "[1.0]", "-"),
        ("[1.0, null]", "[1.0, 1.0]", "-"),
    ] {
        let rows = query(&[], &select(a, b)).await.unwrap();
        match wanted.parse::<f64>() {
            Ok(wanted) => assert!((rows[0].parse::<f64>().unwrap() - wanted).abs() < 1e-12, "{a} {b}: {rows:?}"),
            Err(_) => assert_eq!(rows, ["-"], "{a} {b}"),
        }
    }
    let e = query(&[], &select("[1.0]", "[1.0, 2.0]")).await.unwrap_err();
    assert_eq!(e.fault, Fault::Data, "{e}");
    assert_eq!(query(&[], &select("'x'", "[1.0]")).await.unwrap_err().fault, Fault::Spec);
    // Columns of float32 and float64.
    let lists = |v: [[f64; 2]; 2]| v.map(|r| Some(r.map(Some)));
    let wide: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(lists([[1.0, 0.0], [3.0, 4.0]])));
    let narrow: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
        [[1f32, 0.0], [4.0, 3.0]].map(|r| Some(r.map(Some))),
    ));
    let table = stored(vec![("a", wide), ("b", narrow)]).await;
    let rows = query(&[("t", &table)], "select round(cosine_similarity(a, b), 9) from t").await.unwrap();
    assert_eq!(rows, ["1.0", "0.96"]);
}

#[tokio::test]
async fn mistakes_in_sql_suggest_the_right_name() {
    let log = log().await;
    for (sql, part) in [
        ("select user_ids from log", "user_id"),
        ("select * from logs", "logs"),
        ("select cosine_similar([1.0], [1.0])", "cosine_similarity"),
        ("select * from top_similar('nobody', 3)", "nobody"),
        ("select * from top_similar('log', 3)", "embedding"),
        ("select * from top_similar('log')", "top_similar"),
        ("select * from log where", "SQL"),
    ] {
        let e = query(&[("log", &log)], sql).await.unwrap_err();
        assert_eq!(e.fault, Fault::Spec, "{sql}: {e}");
        assert!(e.to_string().contains(part), "{sql}: {e}");
        assert_eq!(as_usage(e).fault.exit_code(), 2);
    }
    let e = query(&[("log", &log)], "select cast(user_id as bigint) from log").await.unwrap_err();
    assert_eq!(e.fault, Fault::Data, "{e}");
    let e = query(&[("log", &log)], "create table x as select 1").await.unwrap_err();
    assert!(e.fault == Fault::Usage && e.message.contains("CREATE TABLE"), "{e}");
}

/// What `validate` does: no table is there, its schema is.
#[tokio::test]
async fn sql_is_planned_against_schemas_alone() {
    let log = log().await;
    let tables = [("log", log.schema())];
    let frame = plan_against(&tables, "select user_id, count(*) as n from log group by user_id").await.unwrap();
    let columns: Vec<String> =
        frame.schema().fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect();
    assert_eq!(columns, ["user_id: Utf8", "n: Int64"]);
    let e = plan_against(&tables, "select rating from log").await.unwrap_err();
    assert!(e.fault == Fault::Spec && e.message.contains("rating"), "{e}");
}

#[tokio::test]
async fn a_memory_limit_spills_or_says_what_to_raise() {
    let n = 1_500_000i64;
    let table = stored(vec![("a", ints(&(0..n).map(|i| i * 7919 % n).collect::<Vec<_>>()))]).await;
    let run = async |limit: usize| -> Result<u64> {
        let ctx = open_session(&SqlMemory { limit, spill_dir: None })?;
        register(&ctx, "t", &table)?;
        let frame = plan_query(&ctx, "select a, a + 1 as b, a * 2 as c from t order by a").await?;
        let sorted = frame.collect().await.map_err(from_datafusion)?;
        Ok(sorted.iter().map(|b| b.num_rows() as u64).sum())
    };
    // 36 MB of rows in 24 MB: the sort spills.
    assert_eq!(run(24 << 20).await.unwrap(), n as u64);
    let e = run(10 << 10).await.unwrap_err();
    assert_eq!(e.fault, Fault::Spec, "{e}");
    assert!(e.to_string().contains("memory_limit"), "{e}");
}

/// Two days of a small published table.
async fn publish(warehouse: &Store, ds: &str, items: [i64; 4], rec_ranks: [i32; 4]) {
    publish_as(warehouse, "recommendations", "delta", ds, items, rec_ranks).await;
}

async fn publish_as(warehouse: &Store, name: &str, format: &str, ds: &str, items: [i64; 4], rec_ranks: [i32; 4]) {
    let n = |v: f64| -> ArrayRef { Arc::new(Float64Array::from(vec![v; 4])) };
    let table = stored(vec![
        ("user_id", texts(&["a", "a", "b", "b"])),
        ("item_id", ints(&items)),
        ("title", texts(&["One", "Two", "One", "Two"])),
        ("rank", Arc::new(Int32Array::from(vec![1, 2, 1, 2]))),
        ("rec_rank", Arc::new(Int32Array::from(rec_ranks.to_vec()))),
        ("rec_score", Arc::new(Float32Array::from(vec![1.0, 0.5, 1.0, 0.5]))),
        ("alpha", n(0.5)),
        ("interactions", ints(&[1, 1, 9, 9])),
        ("bucket", texts(&["tail", "tail", "head", "head"])),
        ("source", texts(&["fused", "fused", "recommender", "recommender"])),
    ])
    .await;
    let write =
        stage("write", json!({ "input": "x", "table": name, "format": format, "partition": { "ds": ds } })).unwrap();
    let mut ctx = stage_context(&[("input", &table)]);
    ctx.warehouse = warehouse.clone();
    let published = output(write.run(&ctx).await.unwrap(), "published").await.unwrap();
    assert_eq!(published.num_rows(), 1);
}

async fn analyst(warehouse: &Store) -> datafusion::prelude::SessionContext {
    let ctx = open_session(&SqlMemory::default()).unwrap();
    let items = stored(vec![("item_id", ints(&[1, 2, 3, 4]))]).await;
    let train = log().await;
    let runs = stored(vec![("a", ints(&[1]))]).await;
    let mut catalog = Catalog::new(&ctx);
    catalog.add(&NamedTable::Source { name: "items".into(), table: items }).unwrap();
    let output = |stage: &str, output: &str, default, table| NamedTable::Output {
        stage: stage.into(),
        output: output.into(),
        default,
        table,
    };
    catalog.add(&output("parts", "train", true, train.clone())).unwrap();
    catalog.add(&output("parts", "test", false, train)).unwrap();
    catalog.add(&output("runs", "result", true, runs)).unwrap();
    assert_eq!(catalog.add_published(warehouse).await.unwrap(), ["recommendations"]);
    ctx
}

async fn ask(ctx: &datafusion::prelude::SessionContext, sql: &str) -> Vec<String> {
    let frame = plan_query(ctx, sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
    lines(&frame.collect().await.unwrap_or_else(|e| panic!("{sql}: {e}")))
}

#[tokio::test]
async fn tables_have_their_names() {
    let warehouse = memory();
    publish(&warehouse, "2026-11-21", [1, 2, 1, 2], [1, 2, 1, 2]).await;
    publish(&warehouse, "2026-11-22", [2, 1, 1, 3], [2, 1, 1, 2]).await;
    let ctx = analyst(&warehouse).await;
    for (sql, rows) in [
        ("select count(*) from parts.train", "6"),
        ("select count(*) from parts", "6"),
        ("select count(*) from parts.test", "6"),
        ("select count(*) from items", "4"),
        ("select count(*) from recommendations", "8"),
        ("select count(*) from published.recommendations where ds = '2026-11-22'", "4"),
        ("select max(ds) from recommendations where ds < '2026-11-22'", "2026-11-21"),
        ("select arrow_typeof(ds) from recommendations limit 1", "Utf8"),
    ] {
        assert_eq!(ask(&ctx, sql).await, [rows], "{sql}");
    }
    let tables = ask(&ctx, "show tables").await.join("\n");
    assert!(tables.contains("parts|train") && tables.contains("published|recommendations"), "{tables}");
    let plan = ask(&ctx, "explain select * from recommendations where ds = '2026-11-22'").await.join("\n");
    assert!(plan.contains("ds=2026-11-22") && !plan.contains("ds=2026-11-21"), "not pruned: {plan}");
}

#[tokio::test]
async fn a_partition_published_twice_is_there_once() {
    let warehouse = memory();
    publish(&warehouse, "2026-11-22", [1, 2, 1, 2], [1, 2, 1, 2]).await;
    publish(&warehouse, "2026-11-22", [1, 2, 1, 2], [1, 2, 1, 2]).await;
    let ctx = analyst(&warehouse).await;
    assert_eq!(ask(&ctx, "select count(*) from recommendations").await, ["4"]);
    let table = warehouse.child("plain");
    for _ in 0..2 {
        publish_as(&warehouse, "plain", "parquet", "2026-11-22", [1, 2, 1, 2], [1, 2, 1, 2]).await;
    }
    let objects = table.list("").await.unwrap();
    let paths: Vec<&str> = objects.iter().map(|o| o.location.as_ref()).collect();
    assert_eq!(paths, ["plain/ds=2026-11-22/part-0.parquet"]);
}

#[tokio::test]
async fn the_example_questions_by_hand() {
    let warehouse = memory();
    publish(&warehouse, "2026-11-21", [1, 2, 1, 2], [1, 2, 1, 2]).await;
    // User a: the LLM changed the first place; user b: item 3 took the place of item 2.
    publish(&warehouse, "2026-11-22", [2, 1, 1, 3], [2, 1, 1, 2]).await;
    let ctx = analyst(&warehouse).await;
    let example = |name: &str| EXAMPLES.iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!(
        ask(&ctx, example("tail_users")).await,
        [
            "2026-11-21|tail|1|1|1|0.5|1",
            "2026-11-21|head|1|9|9|0.5|0",
            "2026-11-22|tail|1|1|1|0.5|1",
            "2026-11-22|head|1|9|9|0.5|0",
        ]
    );
    assert_eq!(ask(&ctx, example("changed_first_place")).await, ["2026-11-22|a|tail|0.5|2|One|2|1|Two|2"]);
    assert_eq!(
        ask(&ctx, example("coverage")).await,
        ["2026-11-21|head|2|0.5", "2026-11-21|tail|2|0.5", "2026-11-22|head|2|0.5", "2026-11-22|tail|2|0.5",]
    );
    // Interactions in parts.train: item 1 three, 2 two, 3 one.
    assert_eq!(
        ask(&ctx, example("popularity_of_recommended")).await,
        [
            "2026-11-21|head|2.5|3.0|3.0",
            "2026-11-21|tail|2.5|3.0|3.0",
            "2026-11-22|head|2.0|3.0|3.0",
            "2026-11-22|tail|2.5|2.0|3.0",
        ]
    );
    assert_eq!(ask(&ctx, example("drift")).await, ["head|1|0.5|0.0|0.0", "tail|1|1.0|0.0|0.0"]);
}

#[tokio::test]
async fn rows_as_table_csv_json_and_parquet() {
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>([Some([Some(0.5f32)]), None]));
    let names: ArrayRef = Arc::new(StringArray::from(vec![Some("a \"b\", c"), None]));
    let table = stored(vec![("id", ints(&[1, 2])), ("name", names), ("list", lists)]).await;
    let ctx = open_session(&SqlMemory::default()).unwrap();
    register(&ctx, "t", &table).unwrap();
    let written = async |format: Format, sql: &str, shown: usize| {
        let mut bytes = Vec::new();
        let stream = plan_query(&ctx, sql).await.unwrap().execute_stream().await.unwrap();
        let rows = write_rows(stream, format, shown, &mut bytes).await.unwrap();
        (rows, bytes)
    };
    let sql = "select * from t order by id";
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (rows, csv) = written(Format::Csv, sql, 0).await;
    assert_eq!((rows, text(csv).as_str()), (2, "id,name,list\n1,\"a \"\"b\"\", c\",[0.5]\n2,,\n"));
    let (_, json) = written(Format::Json, sql, 0).await;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(
        json,
        json!([{ "id": 1, "name": "a \"b\", c", "list": [0.5] }, { "id": 2, "name": null, "list": null }])
    );
    let (_, shown) = written(Format::Table, sql, 1).await;
    let shown = text(shown);
    assert!(shown.contains("| 1 ") && !shown.contains("| 2 ") && shown.contains("there are more"), "{shown}");
    let (_, parquet) = written(Format::Parquet, sql, 0).await;
    let store = memory();
    store.put("x.parquet", parquet.into()).await.unwrap();
    assert_eq!(all(&StoredTable::open(&store, "x.parquet").await.unwrap()).await, ["1|a \"b\", c|[0.5]", "2|-|-"]);

    let none = "select id from t where id > 5";
    assert_eq!(text(written(Format::Csv, none, 0).await.1), "id\n");
    assert_eq!(text(written(Format::Json, none, 0).await.1), "[]\n");
    assert!(text(written(Format::Table, none, 9).await.1).contains("| id |"));
    assert!("yaml".parse::<Format>().is_err());
}

#[tokio::test]
async fn an_sql_stage_orders_its_rows() {
    let log = log().await;
    let run = async |sql: &str| -> Result<Vec<String>> {
        let stage = stage("sql", json!({ "input": "x", "query": sql }))?;
        let result = stage.run(&stage_context(&[("input", &log)])).await?;
        Ok(all(&output(result, "result").await?).await)
    };
    // By row_id where there is one, else by all columns, else as the query says.
    assert_eq!(run("select row_id, item_id from input where item_id > 1").await.unwrap(), ["1|2", "2|3", "4|2"]);
    assert_eq!(run("select count(*) as n, user_id from input group by user_id").await.unwrap(), ["1|c", "2|b", "3|a"]);
    assert_eq!(
        run("select user_id from input group by user_id order by user_id desc limit 2").await.unwrap(),
        ["c", "b"]
    );
    let e = run("select user_id, item_id from input").await.unwrap_err();
    assert!(e.fault == Fault::Spec && e.to_string().contains("lost `row_id`"), "{e}");
    let e = run("select a.user_id, b.user_id from input a join input b on a.row_id = b.row_id").await.unwrap_err();
    assert!(e.fault == Fault::Spec && e.message.contains("two columns called `user_id`"), "{e}");
    let e = run("select nothing from input").await.unwrap_err();
    assert_eq!(e.fault, Fault::Spec, "{e}");
    let e = run("select cast(user_id as bigint) as n from input").await.unwrap_err();
    assert_eq!(e.fault, Fault::Data, "{e}");
}

#[tokio::test]
async fn an_sql_stage_is_checked_before_it_runs() {
    for (config, part) in [
        (json!({ "input": "x" }), "`file` or `query` is missing"),
        (json!({ "query": "select 1" }), "`input` or `inputs` is missing"),
        (json!({ "input": "x", "inputs": { "a": "y" }, "query": "select 1" }), "both given"),
        (json!({ "input": "x", "query": "select 1", "file": "builtin:dedup" }), "both given"),
        (json!({ "input": "x", "query": "selekt 1" }), "selekt"),
        (json!({ "input": "x", "query": "drop table input" }), "DROP TABLE"),
        (json!({ "input": "x", "file": "builtin:no" }), "long_tail"),
        (json!({ "input": "x", "file": "sql/no.sql" }), "no.sql"),
        (json!({ "input": "x", "query": "select 1", "memory_limit": "lots" }), "memory_limit"),
    ] {
        let e = stage("sql", config.clone()).err().unwrap_or_else(|| panic!("{config} was accepted"));
        assert!(e.fault == Fault::Spec && e.to_string().contains(part), "{config}: {e}");
    }
    let a = stage("sql", json!({ "input": "x", "file": "sql/dedup.sql" })).unwrap();
    let b = stage("sql", json!({ "input": "x", "file": "builtin:dedup", "memory_limit": "1GB" })).unwrap();
    assert_eq!(a.identity(), b.identity());
    assert_eq!(b.inputs()[0].slot, "input");
}

#[tokio::test]
async fn a_write_stage_wants_safe_names_and_no_column_twice() {
    for (table, ds) in [("a/b", "1"), ("", "1"), ("t", "../x"), ("t", ".."), ("t", "a/b"), ("t", "a=b")] {
        let config = json!({ "input": "x", "table": table, "partition": { "ds": ds } });
        let e = stage("write", config).err().expect("it is refused");
        assert_eq!(e.fault, Fault::Spec);
    }
    assert!(stage("write", json!({ "input": "x", "table": "t", "partition": {} })).is_err());
    let table = stored(vec![("ds", texts(&["1"]))]).await;
    let write = stage("write", json!({ "input": "x", "table": "t", "partition": { "ds": "1" } })).unwrap();
    assert!(!write.cacheable());
    let e = write.run(&stage_context(&[("input", &table)])).await.err().unwrap();
    assert!(e.fault == Fault::Data && e.message.contains("`ds`"), "{e}");
}

/// What was published is what its description says.
#[tokio::test]
async fn published_bytes_have_the_digest_that_is_reported() {
    use sha2::Digest;
    let table = Table::from_columns(vec![("user_id", ints(&[3, 1, 2]), false)]).unwrap();
    let table = StoredTable::write(&memory(), "t", &table).await.unwrap();
    let config = json!({ "input": "x", "table": "t", "format": "parquet", "partition": { "ds": "1" } });
    let write = stage("write", config).unwrap();
    let ctx = stage_context(&[("input", &table)]);
    let row = output(write.run(&ctx).await.unwrap(), "published").await.unwrap().collect().await.unwrap();
    let bytes = ctx.warehouse.get("t/ds=1/part-0.parquet").await.unwrap();
    let sha256: String = sha2::Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(row.strings("sha256").unwrap(), [Some(sha256)]);
    assert_eq!(row.i64s("bytes").unwrap(), [bytes.len() as i64]);
    assert_eq!(row.i64s("rows").unwrap(), [3]);
    let read = StoredTable::open(&ctx.warehouse, "t/ds=1/part-0.parquet").await.unwrap();
    assert_eq!(all(&read).await, ["3", "1", "2"]);
}
