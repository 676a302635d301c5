//! Sources: whatever a warehouse holds becomes one table with our names and types, and what is
//! wrong with it is named.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{
    ArrayRef, DictionaryArray, Float32Array, Float64Array, Int32Array, Int64Array, LargeStringArray, StringArray,
    StringViewArray, TimestampMillisecondArray, UInt64Array,
};
use arrow::datatypes::{DataType, Int32Type};
use proptest::prelude::*;
use tailfuse::error::Fault;
use tailfuse::tables::source_config::{ColumnType, SourceFormat, SourceRole};
use tailfuse::tables::{SourceConfig, SourceTarget, SqlMemory, Store, StoredTable, Table, read_source, source_objects};

use crate::table_support::{all, config, memory, parquet_bytes, put_parquet, query, read};

fn ints(values: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(values.to_vec()))
}

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

async fn put_text(store: &Store, file: &str, text: &str) {
    store.put(file, text.as_bytes().to_vec().into()).await.unwrap();
}

#[tokio::test]
async fn ids_of_any_type_become_int64_or_text() {
    let dictionary: DictionaryArray<Int32Type> = vec!["b", "a", "b"].into_iter().collect();
    let cases: Vec<(ArrayRef, DataType)> = vec![
        (Arc::new(Int32Array::from(vec![2, 1, 2])), DataType::Int64),
        (Arc::new(UInt64Array::from(vec![2, 1, 2])), DataType::Int64),
        (texts(&["b", "a", "b"]), DataType::Utf8),
        (Arc::new(LargeStringArray::from(vec!["b", "a", "b"])), DataType::Utf8),
        (Arc::new(StringViewArray::from(vec!["b", "a", "b"])), DataType::Utf8),
        (Arc::new(dictionary), DataType::Utf8),
    ];
    for (ids, wanted) in cases {
        let store = memory();
        let from = ids.data_type().clone();
        put_parquet(&store, "a.parquet", vec![("user_id", ids), ("item_id", ints(&[7, 8, 9]))]).await;
        let report = read(&store, &SourceConfig::default()).await.unwrap();
        let table = report.table.collect().await.unwrap();
        assert_eq!(table.column("user_id").unwrap().data_type(), &wanted, "{from}");
        let users = table.ids("user_id").unwrap();
        assert_eq!(users.get(0), users.get(2), "{from}");
        assert_ne!(users.get(0), users.get(1), "{from}");
    }
}

#[tokio::test]
async fn columns_are_mapped_and_rows_numbered_over_files_in_path_order() {
    let store = memory();
    let columns = |u: &[i64], m: &[&str]| vec![("uid", ints(u)), ("movie", texts(m)), ("extra", ints(u))];
    put_parquet(&store, "b/part-1.parquet", columns(&[3], &["z"])).await;
    put_parquet(&store, "a/part-0.parquet", columns(&[1, 2], &["x", "y"])).await;
    put_text(&store, "a/_SUCCESS", "").await;
    let report = read(&store, &config(&[("user_id", "uid"), ("item_id", "movie")])).await.unwrap();
    let names: Vec<String> = report.table.schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(names, ["row_id", "user_id", "item_id", "extra"]);
    assert_eq!(all(&report.table).await, ["0|1|x|1", "1|2|y|2", "2|3|z|3"]);
    assert_eq!(report.counters["files"], 2);
    assert_eq!(report.counters["rows"], 3);
}

#[tokio::test]
async fn folders_are_columns_and_a_filter_on_them_opens_no_other_file() {
    let store = memory();
    let columns = |u: i64| vec![("user_id", ints(&[u])), ("item_id", ints(&[u * 10]))];
    put_parquet(&store, "ds=2026-11-20/a.parquet", columns(1)).await;
    put_parquet(&store, "ds=2026-11-21/a.parquet", columns(2)).await;
    // Not even its footer may be read.
    put_text(&store, "ds=2026-11-22/a.parquet", "this is no Parquet").await;
    let cfg = SourceConfig { filter: Some("ds <= '2026-11-21'".into()), ..SourceConfig::default() };
    let report = read(&store, &cfg).await.unwrap();
    assert_eq!(all(&report.table).await, ["0|1|10|2026-11-20", "1|2|20|2026-11-21"]);
    let objects = source_objects("log", &cfg, &store).await.unwrap();
    let files: Vec<&str> = objects.iter().map(|o| o.file.as_str()).collect();
    assert_eq!(files, ["ds=2026-11-20/a.parquet", "ds=2026-11-21/a.parquet"]);

    let none = SourceConfig { filter: Some("ds = '2027-01-01'".into()), ..SourceConfig::default() };
    let e = read(&store, &none).await.unwrap_err();
    assert_eq!(e.fault, Fault::Data);
    assert!(e.message.contains("excludes all 3 files"), "{e}");
}

#[tokio::test]
async fn a_folder_can_be_an_id() {
    let store = memory();
    put_parquet(&store, "country=de/a.parquet", vec![("item_id", ints(&[1]))]).await;
    put_parquet(&store, "country=fr/a.parquet", vec![("item_id", ints(&[2]))]).await;
    let report = read(&store, &config(&[("user_id", "country")])).await.unwrap();
    assert_eq!(
        query(&[("t", &report.table)], "select user_id, item_id from t order by row_id").await.unwrap(),
        ["de|1", "fr|2"]
    );
}

#[tokio::test]
async fn a_filter_skips_row_groups_and_row_ids_stay() {
    let store = memory();
    let n: Vec<i64> = (0..100).collect();
    let columns = vec![("user_id", ints(&n)), ("item_id", ints(&n)), ("timestamp", ints(&n))];
    store.put("a.parquet", parquet_bytes(columns, 10).into()).await.unwrap();
    let out = memory();
    let read_rows = AtomicU64::new(0);
    let target = SourceTarget {
        store: &out,
        table_file: "t.parquet",
        bad_rows_file: "b.parquet",
        memory: SqlMemory::default(),
        tick: &|rows| {
            read_rows.fetch_add(rows, Ordering::Relaxed);
            Ok(())
        },
    };
    let cfg = SourceConfig { filter: Some("timestamp >= 25 and timestamp < 42".into()), ..SourceConfig::default() };
    let report = read_source("log", &cfg, &store, &target).await.unwrap();
    assert_eq!(read_rows.load(Ordering::Relaxed), 30);
    let ids = report.table.collect().await.unwrap().i64s("row_id").unwrap();
    assert_eq!(ids, (25..42).collect::<Vec<i64>>());
    assert_eq!(report.counters["rows_read"], 100);
    assert_eq!(report.counters["rows_filtered"], 83);
}

#[tokio::test]
async fn bad_rows_are_set_aside_with_their_reasons() {
    let store = memory();
    let users: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some(""), Some("d"), Some("e"), Some("f")]));
    let ratings: ArrayRef =
        Arc::new(Float32Array::from(vec![Some(1.0), Some(2.0), Some(3.0), Some(f32::NAN), None, Some(5.0)]));
    let times = texts(&["2026-11-22", "2026-11-22", "2026-11-22", "2026-11-22", "2026-11-22", "soon"]);
    let columns =
        vec![("uid", users), ("item_id", ints(&[1, 2, 3, 4, 5, 6])), ("rating", ratings), ("timestamp", times)];
    put_parquet(&store, "a.parquet", columns).await;
    let cfg = SourceConfig { max_bad_rows: 0.9, ..config(&[("user_id", "uid")]) };
    let report = read(&store, &cfg).await.unwrap();
    assert_eq!(all(&report.table).await, ["0|a|1|1.0|1795305600000000"]);
    let bad =
        query(&[("b", &report.bad_rows)], "select row_id, row_in_file, reason, uid, rating from b").await.unwrap();
    assert_eq!(
        bad,
        [
            "1|1|uid is null|-|2.0",
            "2|2|uid is empty||3.0",
            "3|3|rating is not a finite number|d|NaN",
            "4|4|rating is null|e|-",
            "5|5|timestamp is not a time|f|5.0",
        ]
    );
    assert_eq!(report.counters["bad_rows"], 5);
    assert_eq!(report.counters["bad_rows_by_reason"]["uid is empty"], 1);

    let e = read(&store, &config(&[("user_id", "uid")])).await.unwrap_err();
    assert_eq!(e.fault, Fault::Data);
    for part in ["5 of 6 rows", "max_bad_rows = 0.01", "uid is empty: 1 (first in", "a.parquet, row 2"] {
        assert!(e.message.contains(part), "{part}: {e}");
    }
}

#[tokio::test]
async fn exact_duplicates_and_re_ratings_leave_the_last_row() {
    let store = memory();
    let columns = vec![
        ("user_id", ints(&[1, 1, 1, 2, 2, 1])),
        ("item_id", ints(&[5, 5, 5, 5, 5, 6])),
        ("rating", Arc::new(Float64Array::from(vec![3.0, 4.0, 4.0, 1.0, 2.0, 5.0])) as ArrayRef),
        // User 1 rates item 5 at 10 and twice, the same way, at 20; user 2 twice at 30.
        ("timestamp", ints(&[10, 20, 20, 30, 30, 5])),
    ];
    put_parquet(&store, "a.parquet", columns).await;
    let report = read(&store, &SourceConfig::default()).await.unwrap();
    assert_eq!(all(&report.table).await, ["2|1|5|4.0|20", "4|2|5|2.0|30", "5|1|6|5.0|5"]);
    assert_eq!(report.counters["exact_duplicates"], 1);
    assert_eq!(report.counters["re_ratings"], 2);

    let table = SourceConfig { role: Some(SourceRole::Table), ..SourceConfig::default() };
    assert_eq!(read(&store, &table).await.unwrap().table.num_rows(), 6);
}

#[tokio::test]
async fn items_are_unique_and_may_lack_a_title() {
    let store = memory();
    let titles: ArrayRef = Arc::new(StringArray::from(vec![Some("old"), None, Some(" "), Some("new")]));
    put_parquet(&store, "items.parquet", vec![("movie", ints(&[1, 2, 3, 1])), ("name", titles)]).await;
    let report = read(&store, &config(&[("item_id", "movie"), ("title", "name")])).await.unwrap();
    assert_eq!(all(&report.table).await, ["1|2|-", "2|3| ", "3|1|new"]);
    assert_eq!(report.counters["duplicate_items"], 1);
    assert_eq!(report.counters["items_without_title"], 2);
}

#[tokio::test]
async fn a_column_that_later_files_add_is_null_in_earlier_ones() {
    let store = memory();
    put_parquet(&store, "1.parquet", vec![("user_id", ints(&[1])), ("item_id", ints(&[1]))]).await;
    let later = vec![("device", texts(&["tv"])), ("item_id", ints(&[2])), ("user_id", ints(&[2]))];
    put_parquet(&store, "2.parquet", later).await;
    let report = read(&store, &SourceConfig::default()).await.unwrap();
    assert_eq!(all(&report.table).await, ["0|1|1|-", "1|2|2|tv"]);
    assert_eq!(report.counters["columns_filled_with_null"][0], "device");
}

#[tokio::test]
async fn arrow_timestamps_become_microseconds() {
    let store = memory();
    let times: ArrayRef = Arc::new(TimestampMillisecondArray::from(vec![1500]).with_timezone("+02:00"));
    put_parquet(&store, "a.parquet", vec![("user_id", ints(&[1])), ("item_id", ints(&[1])), ("at", times)]).await;
    let report = read(&store, &config(&[("timestamp", "at")])).await.unwrap();
    assert_eq!(all(&report.table).await, ["0|1|1|1500000"]);
}

/// Every mistake is exit 65, and says what, where, and what to do.
#[tokio::test]
async fn mistakes_are_named() {
    let store = memory();
    let columns = || {
        let stars: ArrayRef = Arc::new(Float64Array::from(vec![1.5]));
        vec![("userId", ints(&[1])), ("movieId", ints(&[2])), ("rating", ints(&[3])), ("stars", stars)]
    };
    put_parquet(&store, "a.parquet", columns()).await;
    let cases: Vec<(SourceConfig, Vec<&str>)> = vec![
        (
            config(&[("user_id", "userid"), ("item_id", "movieId")]),
            vec![
                "column `userid` (mapped to `user_id`) is missing in",
                "a.parquet",
                "did you mean `userId`",
                "movieId",
            ],
        ),
        (
            config(&[("user_id", "stars"), ("item_id", "movieId")]),
            vec!["`stars`", "Float64", "ids are integers or strings"],
        ),
        (
            config(&[("user_id", "userId"), ("item_id", "movieId"), ("rating", "stars")]),
            vec!["`rating` is mapped from `stars`", "also have a column `rating`", "other_rating"],
        ),
        (config(&[("row_id", "userId")]), vec!["row_id", "the reader adds"]),
        (
            SourceConfig { role: Some(SourceRole::Interactions), ..SourceConfig::default() },
            vec!["column `user_id` is missing", "map it"],
        ),
    ];
    for (cfg, parts) in cases {
        let e = read(&store, &cfg).await.unwrap_err();
        assert_eq!(e.fault, Fault::Data, "{e}");
        for part in parts {
            assert!(e.to_string().contains(part), "{part}: {e}");
        }
    }
    let filter = SourceConfig { filter: Some("users > 3".into()), ..SourceConfig::default() };
    let e = read(&store, &filter).await.unwrap_err();
    assert!(e.fault == Fault::Spec && e.to_string().contains("userId"), "{e}");

    let nothing = read(&memory(), &SourceConfig::default()).await.unwrap_err();
    assert!(nothing.fault == Fault::Data && nothing.message.contains("there is nothing at"), "{nothing}");
    let empty = memory();
    put_parquet(&empty, "a.parquet", vec![("user_id", ints(&[])), ("item_id", ints(&[]))]).await;
    let e = read(&empty, &SourceConfig::default()).await.unwrap_err();
    assert!(e.fault == Fault::Data && e.message.contains("has no rows"), "{e}");
    let differing = memory();
    put_parquet(&differing, "1.parquet", vec![("user_id", ints(&[1])), ("item_id", ints(&[1]))]).await;
    put_parquet(&differing, "2.parquet", vec![("user_id", texts(&["x"])), ("item_id", ints(&[1]))]).await;
    let e = read(&differing, &SourceConfig::default()).await.unwrap_err();
    for part in ["`user_id` has type Int64 in", "1.parquet", "Utf8 in", "2.parquet"] {
        assert!(e.message.contains(part), "{part}: {e}");
    }
}

#[tokio::test]
async fn csv_gets_the_types_that_all_values_fit() {
    let store = memory();
    // The header of a RecBole file, a byte order mark, a quoted field, an ISBN that begins with 0.
    let text = "\u{feff}user_id:token\titem_id:token\trating:float\ttimestamp:float\tnote\n\
                12\t0345451045\t4\t881250949\t\"a\ttab\"\n\
                7\t034545104X\t3.5\t881250950\t\n";
    put_text(&store, "log.inter", text).await;
    let mapped = config(&[
        ("user_id", "user_id:token"),
        ("item_id", "item_id:token"),
        ("rating", "rating:float"),
        ("timestamp", "timestamp:float"),
    ]);
    let cfg = SourceConfig { format: Some(SourceFormat::Csv), delimiter: "\t".into(), ..mapped };
    let report = read(&store, &cfg).await.unwrap();
    assert_eq!(all(&report.table).await, ["0|12|0345451045|4.0|881250949|a\ttab", "1|7|034545104X|3.5|881250950|-"]);
}

#[tokio::test]
async fn csv_without_a_header_and_with_declared_types() {
    let store = memory();
    put_text(&store, "a.csv", "1,10,3\n2,eleven,4\n,12,5\n").await;
    let cfg = SourceConfig {
        header: false,
        max_bad_rows: 0.7,
        types: [("column_2".to_owned(), ColumnType::Int64), ("column_1".to_owned(), ColumnType::String)].into(),
        ..config(&[("user_id", "column_1"), ("item_id", "column_2")])
    };
    let report = read(&store, &cfg).await.unwrap();
    assert_eq!(all(&report.table).await, ["0|1|10|3"]);
    let bad = query(&[("b", &report.bad_rows)], "select row_in_file, reason, column_2 from b").await.unwrap();
    assert_eq!(bad, ["1|column_2 does not parse as its type|eleven", "2|column_1 is null|12"]);
}

#[tokio::test]
async fn broken_csv_is_named_with_its_line() {
    let store = memory();
    put_text(&store, "a.csv", "user_id,item_id\n1,2\n3,4,5\n").await;
    let e = read(&store, &SourceConfig::default()).await.unwrap_err();
    assert!(e.fault == Fault::Data && e.message.contains("a.csv") && e.message.contains("line 3"), "{e}");
    put_text(&store, "a.csv", "user_id,user_id\n1,2\n").await;
    assert!(read(&store, &SourceConfig::default()).await.unwrap_err().message.contains("two columns called `user_id`"));
}

#[tokio::test]
async fn a_large_csv_arrives_whole() {
    let store = memory();
    let rows = 30_000;
    let text: String =
        std::iter::once("user_id,item_id\n".to_owned()).chain((0..rows).map(|i| format!("{i},{}\n", i % 97))).collect();
    put_text(&store, "a.csv", &text).await;
    let table = read(&store, &SourceConfig::default()).await.unwrap().table;
    assert_eq!(table.num_rows(), rows);
    let sums = query(&[("t", &table)], "select sum(user_id), sum(item_id), max(row_id) from t").await.unwrap();
    let expected: u64 = (0..rows).map(|i| i % 97).sum();
    assert_eq!(sums, [format!("{}|{expected}|{}", rows * (rows - 1) / 2, rows - 1)]);
}

#[tokio::test]
async fn local_files_and_folders() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("with space/ds=2026-11-22");
    fs_err::create_dir_all(&folder).unwrap();
    let bytes = parquet_bytes(vec![("user_id", ints(&[1])), ("item_id", ints(&[2]))], 10);
    fs_err::write(folder.join("a.parquet"), bytes).unwrap();
    let store = Store::open("with space", dir.path()).unwrap();
    assert_eq!(all(&read(&store, &SourceConfig::default()).await.unwrap().table).await, ["0|1|2|2026-11-22"]);
    let store = Store::open("with space/ds=2026-11-22/a.parquet", dir.path()).unwrap();
    let table = read(&store, &SourceConfig::default()).await.unwrap().table;
    assert_eq!(all(&table).await, ["0|1|2"]);
    assert_eq!(query(&[("t", &table)], "select count(*) from t").await.unwrap(), ["1"]);
    let absent = Store::open("elsewhere", dir.path()).unwrap();
    let e = read(&absent, &SourceConfig::default()).await.unwrap_err();
    assert!(e.fault == Fault::Data && e.message.contains("elsewhere"), "{e}");
}

/// The bytes of a table depend on its rows, not on the batches that they came in.
#[tokio::test]
async fn the_same_rows_give_the_same_bytes() {
    let store = memory();
    let n: Vec<i64> = (0..20_000).map(|i| i * i % 1013).collect();
    let whole = Table::from_columns(vec![("a", ints(&n), false)]).unwrap();
    let batch = whole.to_batch().unwrap();
    let cuts = [0, 1, 17, 9_000, 9_001, 20_000];
    let parts = cuts.windows(2).map(|w| batch.slice(w[0], w[1] - w[0])).collect();
    StoredTable::write(&store, "whole", &whole).await.unwrap();
    let table = StoredTable::write(&store, "parts", &Table::new(batch.schema(), parts)).await.unwrap();
    assert_eq!(store.get("whole").await.unwrap(), store.get("parts").await.unwrap());
    assert_eq!(table.collect().await.unwrap().i64s("a").unwrap(), n);
    assert_eq!(table.collect_columns(&["a"]).await.unwrap().num_rows(), 20_000);
    let e = table.collect_columns(&["b"]).await.unwrap_err();
    assert!(e.fault == Fault::Data && e.to_string().contains("`b` is missing"), "{e}");
}

#[tokio::test]
async fn columns_come_in_the_order_asked_for() {
    let columns = vec![("a", ints(&[1]), false), ("b", ints(&[2]), false), ("c", ints(&[3]), false)];
    let table = StoredTable::write(&memory(), "t", &Table::from_columns(columns).unwrap()).await.unwrap();
    let picked = table.collect_columns(&["c", "a"]).await.unwrap();
    let names: Vec<String> = picked.schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(names, ["c", "a"]);
    assert_eq!((picked.i64s("c").unwrap(), picked.i64s("a").unwrap()), (vec![3], vec![1]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Every row of the source is in exactly one place, and ids are never invented.
    #[test]
    fn every_row_goes_somewhere(rows in proptest::collection::vec((proptest::option::of(0i64..5), 0i64..4, 0i64..9), 1..60), cut in 0usize..60) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let store = memory();
            let cut = cut.min(rows.len());
            for (file, part) in [("1.parquet", &rows[..cut]), ("2.parquet", &rows[cut..])] {
                let users: ArrayRef = Arc::new(part.iter().map(|r| r.0).collect::<Int64Array>());
                let items = ints(&part.iter().map(|r| r.1).collect::<Vec<_>>());
                let times = ints(&part.iter().map(|r| r.2).collect::<Vec<_>>());
                put_parquet(&store, file, vec![("user_id", users), ("item_id", items), ("timestamp", times)]).await;
            }
            let cfg = SourceConfig { filter: Some("timestamp < 7".into()), max_bad_rows: 1.0, ..SourceConfig::default() };
            let wanted: Vec<usize> = (0..rows.len()).filter(|&r| rows[r].2 < 7).collect();
            let good = wanted.iter().filter(|&&r| rows[r].0.is_some()).count();
            let report = read(&store, &cfg).await;
            if good == 0 {
                assert_eq!(report.unwrap_err().fault, Fault::Data);
                return;
            }
            let report = report.unwrap();
            // The last of each (user, item) by (timestamp, row), by brute force.
            let mut last = std::collections::BTreeMap::new();
            for &r in &wanted {
                if let Some(user) = rows[r].0 {
                    let entry = last.entry((user, rows[r].1)).or_insert(r);
                    if (rows[r].2, r) >= (rows[*entry].2, *entry) {
                        *entry = r;
                    }
                }
            }
            let mut expected: Vec<i64> = last.into_values().map(|r| r as i64).collect();
            expected.sort_unstable();
            assert_eq!(report.table.collect().await.unwrap().i64s("row_id").unwrap(), expected);
            let count = |name: &str| report.counters[name].as_u64().unwrap() as usize;
            assert_eq!(count("rows_read"), rows.len());
            assert_eq!(count("rows_filtered"), rows.len() - wanted.len());
            assert_eq!(count("bad_rows"), wanted.len() - good);
            assert_eq!(count("exact_duplicates") + count("re_ratings"), good - expected.len());
        });
    }
}
