//! The fused table from tables made by hand: every column, every source and reason.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Float32Array, Float64Array, Int32Array, Int64Array, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Float32Type, Int32Type, TimestampMicrosecondType};
use tailfuse::fusion::{Bounds, FuseInputs, FuseOptions, FusedTables, Weights, fuse_tables};
use tailfuse::tables::Table;

fn ints(v: impl IntoIterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(v))
}
fn ranks(v: impl IntoIterator<Item = i32>) -> ArrayRef {
    Arc::new(Int32Array::from_iter_values(v))
}
fn words(v: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(v.to_vec()))
}

/// Users 1 to 4 with the items a b c (user 4: a alone), in a jumbled order of rows.
fn shortlist() -> Table {
    let rows = [
        (2, "b", 2),
        (2, "a", 1),
        (2, "c", 3),
        (1, "c", 3),
        (1, "a", 1),
        (1, "b", 2),
        (3, "a", 1),
        (3, "b", 2),
        (3, "c", 3),
        (4, "a", 1),
    ];
    Table::from_columns(vec![
        ("user_id", ints(rows.map(|r| r.0)), false),
        ("item_id", words(&rows.map(|r| r.1)), false),
        ("rec_rank", ranks(rows.map(|r| r.2)), false),
        ("rec_score", Arc::new(Float32Array::from_iter_values(rows.map(|r| 10.0 * r.0 as f32 - r.2 as f32))), false),
    ])
    .unwrap()
}

/// The LLM's order for user 1: c a b; for user 2: b a, c was not shown.
fn rerank(source: Option<&str>) -> Table {
    let rows = [(1, "c", 1), (1, "a", 2), (1, "b", 3), (2, "a", 2), (2, "b", 1)];
    let mut columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("user_id", ints(rows.map(|r| r.0)), false),
        ("item_id", words(&rows.map(|r| r.1)), false),
        ("llm_rank", ranks(rows.map(|r| r.2)), false),
        ("llm_score", Arc::new(Float32Array::from_iter_values(rows.map(|r| -(r.2 as f32)))), false),
        ("prompt_digest", words(&rows.map(|r| if r.0 == 1 { "d1" } else { "d2" })), false),
        (
            "llm_asked_at",
            Arc::new(TimestampMicrosecondArray::from_iter_values(rows.map(|r| r.0 * 1000)).with_timezone("UTC")),
            false,
        ),
    ];
    if let Some(source) = source {
        columns.push(("source", words(&[source; 5]), false));
    }
    Table::from_columns(columns).unwrap()
}

/// N = 1, 3, 7 for users 1 to 3: l = ln 2, ln 4, ln 8, so the tail ratios are 1, .5, 0. User 4 is new.
fn long_tail() -> Table {
    let n = [1, 3, 7];
    Table::from_columns(vec![
        ("user_id", ints([1, 2, 3]), false),
        ("interactions", ints(n), false),
        ("long_tail_coefficient", Arc::new(Float64Array::from_iter_values(n.map(|n| (n as f64 + 1.0).ln()))), false),
        ("bucket", words(&["tail", "torso", "head"]), false),
    ])
    .unwrap()
}

fn without_llm(rows: &[(i64, &str, &str)]) -> Table {
    Table::from_columns(vec![
        ("user_id", ints(rows.iter().map(|r| r.0)), false),
        ("source", words(&rows.iter().map(|r| r.1).collect::<Vec<_>>()), false),
        ("reason", words(&rows.iter().map(|r| r.2).collect::<Vec<_>>()), false),
    ])
    .unwrap()
}

fn items() -> Table {
    Table::from_columns(vec![
        ("item_id", words(&["a", "b", "c", "zz"]), false),
        ("title", Arc::new(StringArray::from(vec![Some("Alien"), Some("Brazil"), Some(" "), None])), true),
    ])
    .unwrap()
}

fn options() -> FuseOptions {
    FuseOptions {
        weights: Weights { a1: 0.8, a2: 0.1 },
        c: 1.0,
        bounds: None,
        k: 2,
        run_id: "run-7".to_owned(),
        rec_model: Some("rec".to_owned()),
        llm_model: Some("llm".to_owned()),
    }
}

fn fuse(
    rerank: Option<&Table>,
    not_asked: Option<&Table>,
    items: Option<&Table>,
    options: &FuseOptions,
) -> FusedTables {
    let inputs =
        FuseInputs { shortlist: &shortlist(), popular: None, rerank, not_asked, long_tail: &long_tail(), items };
    fuse_tables(&inputs, options).unwrap()
}

fn text(table: &Table, name: &str) -> Vec<String> {
    table.strings(name).unwrap().into_iter().map(|s| s.unwrap_or("-".to_owned())).collect()
}

/// (user, item) in the order of the rows.
fn order(table: &Table) -> Vec<(i64, String)> {
    table.i64s("user_id").unwrap().into_iter().zip(text(table, "item_id")).collect()
}

#[test]
fn every_column_by_hand() {
    let llm = rerank(None);
    let not_asked = without_llm(&[(3, "fallback", "timeout")]);
    let titles = items();
    let fused = fuse(Some(&llm), Some(&not_asked), Some(&titles), &options());
    let t = &fused.shortlist;

    // User 1, alpha .8: a -(.8*2 + .2*1) = -1.8, b -(.8*3 + .2*2) = -2.8, c -(.8*1 + .2*3) = -1.4.
    // User 2, alpha .8 * .5 = .4: a -(.4*2 + .6*1) = -1.4, b -(.4*1 + .6*2) = -1.6, c keeps place 3.
    // User 3 failed, user 4 is new: the recommender's order.
    let want = [
        (1, "c", 1, -1.4, 3, Some(1), 0.8, "fused", "-"),
        (1, "a", 2, -1.8, 1, Some(2), 0.8, "fused", "-"),
        (1, "b", 3, -2.8, 2, Some(3), 0.8, "fused", "-"),
        (2, "a", 1, -1.4, 1, Some(2), 0.4, "fused", "-"),
        (2, "b", 2, -1.6, 2, Some(1), 0.4, "fused", "-"),
        (2, "c", 3, -3.0, 3, None, 0.0, "recommender", "no_title"),
        (3, "a", 1, -1.0, 1, None, 0.0, "fallback", "timeout"),
        (3, "b", 2, -2.0, 2, None, 0.0, "fallback", "timeout"),
        (3, "c", 3, -3.0, 3, None, 0.0, "fallback", "timeout"),
        (4, "a", 1, -1.0, 1, None, 0.0, "popularity", "cold_user"),
    ];
    assert_eq!(t.num_rows(), want.len());
    let (users, items) = (t.i64s("user_id").unwrap(), text(t, "item_id"));
    let (rank, score, rec_rank) = (t.i32s("rank").unwrap(), t.f64s("score").unwrap(), t.i32s("rec_rank").unwrap());
    let llm_rank = t.column("llm_rank").unwrap();
    let llm_rank = llm_rank.as_primitive::<Int32Type>();
    let (alpha, source, reason) = (t.f64s("alpha").unwrap(), text(t, "source"), text(t, "reason"));
    for (row, w) in want.iter().enumerate() {
        let llm = (!llm_rank.is_null(row)).then(|| llm_rank.value(row));
        assert_eq!((users[row], items[row].as_str(), rank[row]), (w.0, w.1, w.2), "row {row}");
        assert!((score[row] - w.3).abs() < 1e-9, "row {row}: {}", score[row]);
        assert_eq!((rec_rank[row], llm), (w.4, w.5), "row {row}");
        assert!((alpha[row] - w.6).abs() < 1e-12, "row {row}: {}", alpha[row]);
        assert_eq!((source[row].as_str(), reason[row].as_str()), (w.7, w.8), "row {row}");
        // The score can be had from the row alone.
        let u = -(alpha[row] * f64::from(llm.unwrap_or(rec_rank[row])) + (1.0 - alpha[row]) * f64::from(rec_rank[row]));
        assert!((score[row] - u).abs() < 1e-9, "row {row}");
    }

    assert_eq!(t.f32s("rec_score").unwrap(), [7.0, 9.0, 8.0, 19.0, 18.0, 17.0, 29.0, 28.0, 27.0, 39.0]);
    let llm_score = t.column("llm_score").unwrap();
    let llm_score: Vec<Option<f32>> = llm_score.as_primitive::<Float32Type>().iter().collect();
    assert_eq!(llm_score[..6], [Some(-1.0), Some(-2.0), Some(-3.0), Some(-2.0), Some(-1.0), None]);
    assert_eq!(text(t, "title"), ["-", "Alien", "Brazil", "Alien", "Brazil", "-", "Alien", "Brazil", "-", "Alien"]);
    assert_eq!(t.i64s("interactions").unwrap(), [1, 1, 1, 3, 3, 3, 7, 7, 7, 0]);
    assert_eq!(t.f64s("long_tail_coefficient").unwrap()[9], 0.0);
    assert_eq!(text(t, "bucket")[9], "tail");
    assert_eq!(text(t, "prompt_digest"), ["d1", "d1", "d1", "d2", "d2", "-", "-", "-", "-", "-"]);
    let at = t.column("llm_asked_at").unwrap();
    let at: Vec<Option<i64>> = at.as_primitive::<TimestampMicrosecondType>().iter().collect();
    assert_eq!((at[0], at[3], at[5]), (Some(1000), Some(2000), None));
    assert_eq!(text(t, "run_id"), ["run-7"; 10]);
    // What is popular is no model's doing.
    assert_eq!(text(t, "rec_model"), [&["rec"; 9][..], &["-"]].concat());
    assert_eq!(text(t, "llm_model"), ["llm", "llm", "llm", "llm", "llm", "-", "-", "-", "-", "-"]);

    let n = fused.counts;
    assert_eq!((n.users, n.users_fused, n.users_fallback), (4, 2, 1));
    assert_eq!((n.users_first_place_changed, n.users_top_k_changed), (1, 1));
    assert_eq!((n.candidates_without_title, n.llm_rows_outside), (3, 0));
}

#[test]
fn recommendations_are_the_first_k_in_the_declared_schema() {
    let llm = rerank(None);
    let fused = fuse(Some(&llm), None, None, &options());
    let first: Vec<(i64, String)> =
        [(1, "c"), (1, "a"), (2, "a"), (2, "b"), (3, "a"), (3, "b"), (4, "a")].map(|(u, i)| (u, i.to_owned())).into();
    assert_eq!(order(&fused.recommendations), first);
    let declared = tailfuse::tables::schemas::RECOMMENDATIONS.schema(&DataType::Int64, &DataType::Utf8);
    assert_eq!(fused.recommendations.schema(), declared);
    assert_eq!(fused.shortlist.schema(), declared);

    let all = fuse(Some(&llm), None, None, &FuseOptions { k: 100, ..options() });
    assert_eq!(all.recommendations.num_rows(), 10);
    assert_eq!(order(&all.recommendations), order(&all.shortlist));
}

#[test]
fn reasons_where_nothing_is_said() {
    let llm = rerank(None);
    let by_user = |fused: &FusedTables| -> BTreeMap<i64, (String, String)> {
        let t = &fused.shortlist;
        t.i64s("user_id").unwrap().into_iter().zip(text(t, "source").into_iter().zip(text(t, "reason"))).collect()
    };
    let s = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    // Not among those not asked for, no item table: c of user 2 was not shown for a reason unknown.
    let found = by_user(&fuse(Some(&llm), None, None, &options()));
    assert_eq!(found[&2], s("recommender", "not_shown"));
    assert_eq!(found[&3], s("recommender", "not_asked"));
    // What is said of a new user counts.
    let said = without_llm(&[(4, "recommender", "budget")]);
    assert_eq!(by_user(&fuse(Some(&llm), Some(&said), None, &options()))[&4], s("recommender", "budget"));
    // No LLM at all.
    let none = fuse(None, None, None, &options());
    assert_eq!(by_user(&none)[&1], s("recommender", "no_llm"));
    assert_eq!(by_user(&none)[&4], s("popularity", "cold_user"));
    assert!(none.shortlist.f64s("alpha").unwrap().iter().all(|&a| a == 0.0));
    assert_eq!(none.counts.users_fused, 0);
    assert!(none.shortlist.column("llm_asked_at").unwrap().null_count() == 10);
}

#[test]
fn an_earlier_order_of_the_llm_is_fused_and_says_so() {
    let llm = rerank(Some("reused"));
    let fused = fuse(Some(&llm), None, None, &options());
    assert_eq!(text(&fused.shortlist, "source")[..3], ["reused"; 3]);
    assert_eq!(fused.counts.users_fused, 2);
}

#[test]
fn a1_of_0_is_the_recommender_and_its_rows_still_show_the_llms_order() {
    let llm = rerank(None);
    let fused = fuse(Some(&llm), None, None, &FuseOptions { weights: Weights { a1: 0.0, a2: 0.0 }, ..options() });
    let t = &fused.shortlist;
    assert_eq!(t.i32s("rank").unwrap(), t.i32s("rec_rank").unwrap());
    assert_eq!(t.column("llm_rank").unwrap().null_count(), 5);
    assert_eq!(fused.counts.users_top_k_changed, 0);
}

#[test]
fn calibrated_bounds_replace_those_of_today() {
    let llm = rerank(None);
    // l_max = ln 16: user 1 has (ln 16 - ln 2) / (ln 16 - ln 4) > 1, clamped; user 2 has 1.
    let bounds = Some(Bounds { l_min: 4f64.ln(), l_max: 16f64.ln() });
    let fused = fuse(Some(&llm), None, None, &FuseOptions { bounds, ..options() });
    let alpha = fused.shortlist.f64s("alpha").unwrap();
    assert!((alpha[0] - 0.8).abs() < 1e-12 && (alpha[3] - 0.8).abs() < 1e-12, "{alpha:?}");
}

#[test]
fn wrong_tables_are_refused_with_the_place() {
    let llm = rerank(None);
    let long_tail = long_tail();
    let list = shortlist();
    let good = FuseInputs {
        shortlist: &list,
        popular: None,
        rerank: Some(&llm),
        not_asked: None,
        long_tail: &long_tail,
        items: None,
    };
    let refuse = |inputs: &FuseInputs<'_>, words: &[&str]| {
        let e = fuse_tables(inputs, &options()).unwrap_err();
        assert_eq!(e.fault.exit_code(), 65, "{e}");
        for word in words {
            assert!(e.to_string().contains(word), "`{word}` is not in: {e}");
        }
    };
    let twice = without_llm(&[(3, "recommender", "budget"), (3, "fallback", "timeout")]);
    refuse(&FuseInputs { not_asked: Some(&twice), ..good }, &["users not asked", "user `3`"]);
    let fused = without_llm(&[(3, "fused", "budget")]);
    refuse(&FuseInputs { not_asked: Some(&fused), ..good }, &["user `3`", "`fused`"]);
    refuse(&FuseInputs { rerank: Some(&rerank(Some("fallback"))), ..good }, &["LLM ranks", "fallback"]);
    refuse(&FuseInputs { rerank: Some(&rerank(Some("magic"))), ..good }, &["magic"]);
    let nameless = Table::from_columns(vec![("item_id", words(&["a"]), false)]).unwrap();
    refuse(&FuseInputs { items: Some(&nameless), ..good }, &["item table", "`title`"]);
    let numbers = Table::from_columns(vec![("item_id", ints([1]), false), ("title", words(&["x"]), false)]).unwrap();
    refuse(&FuseInputs { items: Some(&numbers), ..good }, &["item table", "`item_id`", "Utf8"]);
}
