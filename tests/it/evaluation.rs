//! Metrics of tables made by hand, and the choice of the fused weights.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float32Array, Float64Array, Int32Array, Int64Array, StringArray};
use arrow::datatypes::Float64Type;
use tailfuse::eval::terminal::render;
use tailfuse::eval::{EvaluateOptions, Evaluation, Protocol, evaluate};
use tailfuse::fusion::{FuseInputs, FuseOptions, Weights, fuse_tables};
use tailfuse::stages::calibrate::{CalibrateConfig, calibrate};
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

fn options(ks: &[usize]) -> EvaluateOptions {
    EvaluateOptions {
        ks: ks.to_vec(),
        system: "fused".to_owned(),
        protocol: Protocol {
            history_at_test: "train+valid".to_owned(),
            weights_fit_on: "train".to_owned(),
            ranking: "full".to_owned(),
            tie_rule: "file order".to_owned(),
        },
    }
}

fn pairs(rows: &[(i64, i64)]) -> Table {
    Table::from_columns(vec![
        ("user_id", ints(rows.iter().map(|r| r.0)), false),
        ("item_id", ints(rows.iter().map(|r| r.1)), false),
    ])
    .unwrap()
}

/// Users 1 to 5 with the items 10 to 13 at the recommender's places 1 to 4. The LLM was asked
/// for users 1 and 2 and turns their lists round; the fused order is `fused`.
fn ranked() -> Table {
    type Row<'a> = (i64, i64, i32, i32, Option<i32>, &'a str);
    let mut rows: Vec<Row<'_>> = Vec::new();
    for (user, bucket, fused, asked) in [
        (1, "tail", [4, 3, 2, 1], true),
        (2, "tail", [2, 1, 3, 4], true),
        (3, "torso", [1, 2, 3, 4], false),
        (4, "torso", [1, 2, 3, 4], false),
        (5, "head", [1, 2, 3, 4], false),
    ] {
        for (place, rank) in fused.into_iter().enumerate() {
            let rec = place as i32 + 1;
            rows.push((user, 9 + i64::from(rec), rank, rec, asked.then_some(5 - rec), bucket));
        }
    }
    Table::from_columns(vec![
        ("user_id", ints(rows.iter().map(|r| r.0)), false),
        ("item_id", ints(rows.iter().map(|r| r.1)), false),
        ("rank", ranks(rows.iter().map(|r| r.2)), false),
        ("rec_rank", ranks(rows.iter().map(|r| r.3)), false),
        ("llm_rank", Arc::new(rows.iter().map(|r| r.4).collect::<Int32Array>()), true),
        ("bucket", words(&rows.iter().map(|r| r.5).collect::<Vec<_>>()), false),
    ])
    .unwrap()
}

/// Held out: item 13 of user 1 (fourth), 11 of user 2 (second), 12 of user 3 (third), 99 of
/// user 5 (not on the list), 10 of user 6 (who has no list). User 4 has none.
fn test_items() -> Table {
    pairs(&[(6, 10), (1, 13), (2, 11), (3, 12), (5, 99)])
}

fn value(e: &Evaluation, system: &str, users: &str, bucket: &str, metric: &str) -> Option<(f64, i64)> {
    let m = &e.metrics;
    let [a, b, c, d] = ["system", "users", "bucket", "metric"].map(|n| m.strings(n).unwrap());
    let is = |x: &Option<String>, y: &str| x.as_deref() == Some(y);
    let row =
        (0..m.num_rows()).find(|&r| is(&a[r], system) && is(&b[r], users) && is(&c[r], bucket) && is(&d[r], metric))?;
    Some((m.f64s("value").unwrap()[row], m.i64s("n").unwrap()[row]))
}

#[track_caller]
fn close(got: Option<(f64, i64)>, value: f64, n: i64) {
    let got = got.unwrap();
    assert!((got.0 - value).abs() < 1e-12 && got.1 == n, "{got:?}, not ({value}, {n})");
}

#[test]
fn metrics_by_hand() {
    let e = evaluate(&ranked(), &test_items(), None, &options(&[3, 10])).unwrap();
    assert_eq!((e.users_evaluated, e.users_not_evaluated, e.users_without_list, e.users_asked), (5, 1, 1, 2));
    assert!(e.incomplete.is_empty());
    let second = 1.0 / 3f64.log2();
    let fourth = 1.0 / 5f64.log2();
    // Recommender: places 4, 2, 3, none, none. Fused: 1, 1, 3, none, none.
    close(value(&e, "recommender", "all", "all", "Hit@3"), 2.0 / 5.0, 5);
    close(value(&e, "recommender", "all", "all", "NDCG@3"), (second + 0.5) / 5.0, 5);
    close(value(&e, "recommender", "all", "all", "NDCG@10"), (fourth + second + 0.5) / 5.0, 5);
    close(value(&e, "fused", "all", "all", "Hit@3"), 3.0 / 5.0, 5);
    close(value(&e, "fused", "all", "all", "NDCG@3"), 2.5 / 5.0, 5);
    // The LLM: places 1 and 3 of the users asked, the same users for all three.
    assert!(value(&e, "llm", "all", "all", "Hit@3").is_none());
    close(value(&e, "recommender", "asked", "all", "NDCG@3"), second / 2.0, 2);
    close(value(&e, "llm", "asked", "all", "NDCG@3"), (1.0 + 0.5) / 2.0, 2);
    close(value(&e, "fused", "asked", "all", "NDCG@3"), 1.0, 2);
    // By bucket; user 6 has no bucket, so that it is in `all` alone; nobody asked is in the torso.
    close(value(&e, "fused", "all", "tail", "Hit@3"), 1.0, 2);
    close(value(&e, "fused", "all", "torso", "Hit@3"), 1.0, 1);
    close(value(&e, "fused", "all", "head", "Hit@3"), 0.0, 1);
    assert!(value(&e, "fused", "asked", "torso", "Hit@3").is_none());
}

#[test]
fn the_long_tail_table_gives_the_bucket_of_users_without_a_list() {
    let long_tail =
        Table::from_columns(vec![("user_id", ints([6, 1]), false), ("bucket", words(&["head", "head"]), false)])
            .unwrap();
    let e = evaluate(&ranked(), &test_items(), Some(&long_tail), &options(&[3])).unwrap();
    close(value(&e, "fused", "all", "head", "Hit@3"), 0.0, 2);
    // The table's own bucket comes first.
    close(value(&e, "fused", "all", "tail", "Hit@3"), 1.0, 2);
}

#[test]
fn the_comparison_is_paired_over_the_same_users() {
    let e = evaluate(&ranked(), &test_items(), None, &options(&[3])).unwrap();
    let c = &e.comparison;
    let [system, users, bucket, metric] = ["system", "users", "bucket", "metric"].map(|n| c.strings(n).unwrap());
    let find = |s: &str, u: &str, b: &str, m: &str| {
        let want = [s, u, b, m];
        (0..c.num_rows()).find(|&r| {
            [&system, &users, &bucket, &metric].iter().zip(want).all(|(col, w)| col[r].as_deref() == Some(w))
        })
    };
    let row = find("fused", "all", "all", "Hit@3").unwrap();
    // Differences 1, 0, 0, 0, 0: mean .2, sd sqrt(.2), t = .2 / (sqrt(.2) / sqrt(5)) = 1.
    assert!((c.f64s("mean_difference").unwrap()[row] - 0.2).abs() < 1e-12);
    let t = c.column("t").unwrap();
    let p = c.column("p").unwrap();
    assert!((t.as_primitive::<Float64Type>().value(row) - 1.0).abs() < 1e-12);
    // Student's t, 4 degrees of freedom, two-sided at 1.
    assert!((p.as_primitive::<Float64Type>().value(row) - 0.373900966300059).abs() < 1e-9);
    // One user in the head: a difference, no test.
    let one = find("fused", "all", "head", "Hit@3").unwrap();
    assert!(t.is_null(one) && p.is_null(one));
    assert!(find("llm", "asked", "all", "NDCG@3").is_some());
    assert!(find("llm", "all", "all", "NDCG@3").is_none());
    assert!(find("recommender", "all", "all", "Hit@3").is_none());
}

#[test]
fn a_table_with_one_rank_is_evaluated_under_its_own_name() {
    let t = Table::from_columns(vec![
        ("user_id", ints([1, 1, 2]), false),
        ("item_id", ints([7, 8, 7]), false),
        ("rank", ints([2, 1, 1]), false),
    ])
    .unwrap();
    let own = EvaluateOptions { system: "popularity".to_owned(), ..options(&[1, 5]) };
    let e = evaluate(&t, &pairs(&[(1, 7), (2, 7)]), None, &own).unwrap();
    close(value(&e, "popularity", "all", "all", "Hit@1"), 0.5, 2);
    close(value(&e, "popularity", "all", "all", "Hit@5"), 1.0, 2);
    assert_eq!(e.comparison.num_rows(), 0);
    assert_eq!(e.users_asked, 0);
    let mut systems = e.metrics.strings("system").unwrap();
    systems.dedup();
    assert_eq!(systems.len(), 1);
}

#[test]
fn several_held_out_items_of_a_user_count_together() {
    let e = evaluate(&ranked(), &pairs(&[(3, 11), (3, 13), (3, 11)]), None, &options(&[3])).unwrap();
    // Places 2 and 4, cut-off 3, the ideal has both: .6309 / 1.6309.
    let second = 1.0 / 3f64.log2();
    close(value(&e, "fused", "all", "all", "NDCG@3"), second / (1.0 + second), 1);
    close(value(&e, "fused", "all", "all", "Hit@3"), 1.0, 1);
}

#[test]
fn what_cannot_be_evaluated_is_refused() {
    let refuse = |table: &Table, test: &Table, word: &str| {
        let e = evaluate(table, test, None, &options(&[3])).unwrap_err();
        assert_eq!(e.fault.exit_code(), 65);
        assert!(e.to_string().contains(word), "`{word}` is not in: {e}");
    };
    refuse(&pairs(&[(1, 2)]), &test_items(), "rec_rank");
    refuse(&ranked(), &pairs(&[]), "held-out items");
    let with_rank = |rank: i64| {
        Table::from_columns(vec![
            ("user_id", ints([1]), false),
            ("item_id", ints([7]), false),
            ("rank", ints([rank]), false),
        ])
        .unwrap()
    };
    refuse(&with_rank(0), &pairs(&[(1, 7)]), "column `rank` is 0");
    refuse(&with_rank(5), &pairs(&[(1, 7)]), "places are missing");
}

/// A shortlist of `n` items for each of `users` users; the LLM turns it round for those up to `asked`.
fn lists(users: i64, asked: i64, n: i32) -> (Table, Table, Table) {
    let rows: Vec<(i64, i32)> = (1..=users).flat_map(|u| (1..=n).map(move |r| (u, r))).collect();
    let item = |r: i32| i64::from(100 + r);
    let rec = Table::from_columns(vec![
        ("user_id", ints(rows.iter().map(|x| x.0)), false),
        ("item_id", ints(rows.iter().map(|x| item(x.1))), false),
        ("rec_rank", ranks(rows.iter().map(|x| x.1)), false),
        ("rec_score", Arc::new(Float32Array::from_iter_values(rows.iter().map(|x| -(x.1 as f32)))), false),
    ]);
    let by_llm: Vec<&(i64, i32)> = rows.iter().filter(|x| x.0 <= asked).collect();
    let m = by_llm.len();
    let llm = Table::from_columns(vec![
        ("user_id", ints(by_llm.iter().map(|x| x.0)), false),
        ("item_id", ints(by_llm.iter().map(|x| item(x.1))), false),
        ("llm_rank", ranks(by_llm.iter().map(|x| n + 1 - x.1)), false),
        ("llm_score", Arc::new(Float32Array::from(vec![0.5; m])), false),
        ("prompt_digest", words(&vec!["d"; m]), false),
        ("llm_asked_at", Arc::new(Int64Array::from(vec![1; m])), false),
    ]);
    let long_tail = Table::from_columns(vec![
        ("user_id", ints(1..=users), false),
        ("interactions", ints(1..=users), false),
        (
            "long_tail_coefficient",
            Arc::new(Float64Array::from_iter_values((1..=users).map(|u| (u as f64 + 1.0).ln()))),
            false,
        ),
        (
            "bucket",
            words(&(1..=users).map(|u| if u * 3 <= users { "tail" } else { "head" }).collect::<Vec<_>>()),
            false,
        ),
    ]);
    (rec.unwrap(), llm.unwrap(), long_tail.unwrap())
}

#[test]
fn the_first_k_give_the_same_fused_metrics_as_the_whole_shortlist() {
    let (rec, llm, long_tail) = lists(9, 5, 20);
    let inputs = FuseInputs {
        shortlist: &rec,
        popular: None,
        rerank: Some(&llm),
        not_asked: None,
        long_tail: &long_tail,
        items: None,
    };
    let fused = fuse_tables(
        &inputs,
        &FuseOptions {
            weights: Weights { a1: 0.9, a2: 0.1 },
            c: 1.0,
            bounds: None,
            k: 10,
            run_id: "r".to_owned(),
            rec_model: None,
            llm_model: None,
        },
    )
    .unwrap();
    let test = pairs(&[(1, 120), (2, 119), (3, 101), (4, 110), (5, 107), (6, 103), (7, 111), (8, 101), (9, 105)]);
    let whole = evaluate(&fused.shortlist, &test, None, &options(&[3, 5, 10])).unwrap();
    let first = evaluate(&fused.recommendations, &test, None, &options(&[3, 5, 10])).unwrap();
    for metric in ["Hit@3", "NDCG@3", "Hit@5", "NDCG@5", "Hit@10", "NDCG@10"] {
        for (users, bucket) in [("all", "all"), ("all", "tail"), ("asked", "all")] {
            let of_whole = value(&whole, "fused", users, bucket, metric);
            assert!(of_whole.is_some());
            assert_eq!(of_whole, value(&first, "fused", users, bucket, metric), "{metric} {users} {bucket}");
        }
    }
    // The recommender's first places were pushed out of the first k: its metrics are not made up.
    assert!(first.incomplete.contains(&"recommender@3".to_owned()), "{:?}", first.incomplete);
    assert!(value(&first, "recommender", "all", "all", "Hit@3").is_none());
    assert!(value(&whole, "recommender", "all", "all", "Hit@3").is_some());
}

fn config() -> CalibrateConfig {
    serde_json::from_str(r#"{"shortlist": "s", "rerank": "r", "valid": "v", "long_tail": "l"}"#).unwrap()
}

#[test]
fn an_llm_that_is_right_is_given_weight() {
    // The validation item is always the LLM's first, the recommender's last but one to tenth.
    let (rec, llm, long_tail) = lists(30, 30, 10);
    let valid = pairs(&(1..=30).map(|u| (u, 110 - u % 3)).collect::<Vec<_>>());
    let found = calibrate(&config(), &rec, &[("label".to_owned(), llm.clone())], &valid, &long_tail).unwrap();
    let c = &found.calibration;
    assert_eq!(found.cells.len(), 26);
    assert_eq!((c.a1, c.a2), (c.best.a1, c.best.a2), "{c:?}");
    assert!(c.a1 > 0.5 && c.mean > 2.0 * c.recommender_mean, "{c:?}");
    assert_eq!(c.n_users, 30);
    assert!((c.l_min - 2f64.ln()).abs() < 1e-12 && (c.l_max - 31f64.ln()).abs() < 1e-12);
    assert_eq!(found.cells.iter().filter(|c| c.chosen).count(), 1);
}

#[test]
fn an_llm_that_is_wrong_is_given_none() {
    let (rec, llm, long_tail) = lists(30, 30, 10);
    let valid = pairs(&(1..=30).map(|u| (u, 101 + u % 3)).collect::<Vec<_>>());
    let c = calibrate(&config(), &rec, &[("label".to_owned(), llm.clone())], &valid, &long_tail).unwrap().calibration;
    assert_eq!((c.a1, c.a2), (0.0, 0.0));
    assert_eq!(c.mean, c.recommender_mean);
}

#[test]
fn a_calibration_is_over_asked_users_with_a_validation_item_and_served_alike() {
    let (rec, llm, long_tail) = lists(30, 12, 10);
    // Two of the twelve have no validation item; users beyond them were not asked for.
    let valid = pairs(&(3..=30).map(|u| (u, 110)).collect::<Vec<_>>());
    let found = calibrate(&config(), &rec, &[("label".to_owned(), llm.clone())], &valid, &long_tail).unwrap();
    assert_eq!((found.calibration.n_users, found.users_without_valid), (10, 2));
    // The mean of the chosen pair is what evaluate finds on what fuse makes with it.
    let inputs = FuseInputs {
        shortlist: &rec,
        popular: None,
        rerank: Some(&llm),
        not_asked: None,
        long_tail: &long_tail,
        items: None,
    };
    let fused = fuse_tables(
        &inputs,
        &FuseOptions {
            weights: found.calibration.weights(),
            c: found.calibration.c,
            bounds: Some(found.calibration.bounds()),
            k: 10,
            run_id: "r".to_owned(),
            rec_model: None,
            llm_model: None,
        },
    )
    .unwrap();
    let e = evaluate(&fused.shortlist, &valid, None, &options(&[10])).unwrap();
    close(value(&e, "fused", "asked", "all", "NDCG@10"), found.calibration.mean, 10);
    close(value(&e, "recommender", "asked", "all", "NDCG@10"), found.calibration.recommender_mean, 10);
}

#[test]
fn of_several_modes_the_better_one_is_chosen_on_the_users_that_all_have() {
    let (rec, right, long_tail) = lists(30, 30, 10);
    // The other mode was asked for fewer users, and has the recommender's own order.
    let rows = right.num_rows() / 30 * 20;
    let same = rec.to_batch().unwrap().slice(0, rows);
    let ranks = same.column_by_name("rec_rank").unwrap().clone();
    let wrong = Table::from_columns(vec![
        ("user_id", same.column_by_name("user_id").unwrap().clone(), false),
        ("item_id", same.column_by_name("item_id").unwrap().clone(), false),
        ("llm_rank", ranks, false),
    ]);
    let valid = pairs(&(1..=30).map(|u| (u, 110 - u % 3)).collect::<Vec<_>>());
    let modes = [("generate".to_owned(), wrong.unwrap()), ("label".to_owned(), right)];
    let found = calibrate(&config(), &rec, &modes, &valid, &long_tail).unwrap();
    let c = &found.calibration;
    assert_eq!((c.mode.as_str(), c.n_users, found.cells.len()), ("label", 20, 51), "{c:?}");
    assert!(c.a1 > 0.0 && c.se.is_some_and(|se| se > 0.0), "{c:?}");
}

#[test]
fn nobody_to_calibrate_on_leaves_the_recommender_alone() {
    let (rec, llm, long_tail) = lists(5, 0, 10);
    let c = calibrate(&config(), &rec, &[("label".to_owned(), llm.clone())], &pairs(&[(1, 101)]), &long_tail)
        .unwrap()
        .calibration;
    assert_eq!((c.a1, c.n_users), (0.0, 0));
}

#[test]
fn the_terminal_shows_systems_by_bucket_within_100_columns() {
    let e = evaluate(&ranked(), &test_items(), None, &options(&[3, 5, 10])).unwrap();
    let text = render(&e.metrics, &e.comparison).unwrap();
    assert!(text.lines().all(|l| l.chars().count() <= 100), "{text}");
    insta::assert_snapshot!(text);
}

#[test]
fn the_terminal_shows_other_cut_offs_where_the_usual_ones_are_not_there() {
    let own = EvaluateOptions { system: "popularity".to_owned(), ..options(&[1]) };
    let t = Table::from_columns(vec![
        ("user_id", ints([1]), false),
        ("item_id", ints([7]), false),
        ("rank", ints([1]), false),
    ]);
    let e = evaluate(&t.unwrap(), &pairs(&[(1, 7)]), None, &own).unwrap();
    let text = render(&e.metrics, &e.comparison).unwrap();
    assert!(text.contains("All 1 user with") && text.contains("Hit@1") && text.contains("1.0000"), "{text}");
    assert!(!text.contains("asked for") && !text.contains("t-test"), "{text}");
}
