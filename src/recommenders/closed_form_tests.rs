//! Tests that the closed forms share: golden files of `peers/golden_closed.py`, and what holds for each of them.

use serde_json::{Value, json};

use super::saved::{Tensors, read_f32, write_f32};
use super::{Fit, FitContext, Interactions, Scorer, Unwatched, Watch, registry, topk};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::interactions::Histories;

/// Those that read the user's history.
const PERSONAL: [&str; 4] = ["item_knn", "ials", "gf_cf", "ease"];
const ALL: [&str; 5] = ["popularity", "item_knn", "ials", "gf_cf", "ease"];

/// The cases of a golden file.
pub fn cases(name: &str) -> Vec<Value> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/recommenders/");
    let text = fs_err::read_to_string(format!("{folder}{name}.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Numbers of a JSON array.
pub fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// The log of a case.
pub fn log_of(case: &Value) -> Histories {
    let number = |v: &Value| v.as_u64().unwrap() as u32;
    let pairs: Vec<(u32, u32)> =
        case["pairs"].as_array().unwrap().iter().map(|p| (number(&p[0]), number(&p[1]))).collect();
    Histories::from_pairs(case["users"].as_u64().unwrap() as usize, &pairs)
}

/// Equal to 1e-4 relative; numbers near 0 to `near_zero` of the largest.
pub fn assert_close(got: &[f32], want: &[f32], near_zero: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (at, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-4 * w.abs() + near_zero * largest, "{what}, place {at}: {g}, {w} is wanted");
    }
}

fn fit_watched(name: &str, hyper: &Value, data: &Interactions<'_>, seed: u64, watch: &dyn Watch) -> Result<Fit> {
    let recommender = registry::find(name)?.recommender(hyper)?;
    recommender.fit(data, &FitContext { seed, device: &Device::Cpu, watch, checkpoints: None, warm: None })
}

fn fit(name: &str, hyper: &Value, train: &Histories, n_items: usize) -> Box<dyn Scorer> {
    let data = Interactions { n_users: train.n_users(), n_items, train, valid: &[] };
    fit_watched(name, hyper, &data, 1, &Unwatched).unwrap().scorer
}

fn scores(scorer: &dyn Scorer, history: &Histories) -> Vec<f32> {
    let users: Vec<u32> = (0..scorer.n_users() as u32).collect();
    let mut out = vec![f32::NAN; users.len() * scorer.n_items()];
    scorer.score(&users, history, &mut out);
    out
}

#[test]
fn scores_are_those_of_the_formulas() {
    for name in ["popularity", "item_knn", "gf_cf", "ease"] {
        for case in cases(name) {
            let train = log_of(&case);
            let scorer = fit(name, &case["hyper"], &train, case["items"].as_u64().unwrap() as usize);
            let want: Vec<f32> = case["scores"].as_array().unwrap().iter().flat_map(numbers).collect();
            assert_close(&scores(scorer.as_ref(), &train), &want, 1e-6, &format!("{name} {}", case["hyper"]));
        }
    }
}

/// Even users take even items and odd users odd ones, all but one; `hidden` is that one.
fn checkerboard(n: u32) -> (Histories, Vec<u32>) {
    let hidden: Vec<u32> = (0..n).map(|u| (u * 6 + u % 2) % n).collect();
    let pairs: Vec<(u32, u32)> = (0..n)
        .flat_map(|u| (0..n).map(move |i| (u, i)))
        .filter(|&(u, i)| u % 2 == i % 2 && hidden[u as usize] != i)
        .collect();
    (Histories::from_pairs(n as usize, &pairs), hidden)
}

/// Hyper-parameters for toy logs.
fn small(name: &str) -> Value {
    match name {
        "ials" => json!({"factors": 2, "reg": 1.0, "alpha": 4.0}),
        "gf_cf" => json!({"rank": 2}),
        "ease" => json!({"l2": 1.0}),
        _ => json!({}),
    }
}

#[test]
fn the_missing_square_of_the_checkerboard_comes_first() {
    let (train, hidden) = checkerboard(20);
    for name in PERSONAL {
        let scorer = fit(name, &small(name), &train, 20);
        let users: Vec<u32> = (0..20).collect();
        let lists = topk::top_k(scorer.as_ref(), &users, &train, 1, &|_| Ok(())).unwrap();
        for (user, item) in hidden.iter().enumerate() {
            assert_eq!(lists[user][0].item, *item, "{name}: user {user}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits_and_a_file_the_same_scores() {
    for name in ALL {
        let case = cases(name).remove(0);
        let train = log_of(&case);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let scorer = fit(name, &case["hyper"], &train, 20);
                (scorer.tensors(), scores(scorer.as_ref(), &train))
            })
        };
        let (tensors, out) = run(1);
        assert_eq!(run(3), (tensors.clone(), out.clone()), "{name}");
        let backbone = registry::find(name).unwrap();
        let hyper = backbone.recommender(&case["hyper"]).unwrap().hyper();
        let loaded = backbone.scorer(&hyper, &Tensors::new(tensors.clone())).unwrap();
        assert_eq!((loaded.n_users(), loaded.n_items()), (30, 20));
        assert_eq!(scores(loaded.as_ref(), &train), out, "{name}");
        let reread = backbone.scorer(&hyper, &Tensors::new(read_f32(&write_f32(&tensors).unwrap(), "x").unwrap()));
        assert_eq!(scores(reread.unwrap().as_ref(), &train), out, "{name}");
        for left_out in 0..tensors.len() {
            let mut less = tensors.clone();
            less.remove(left_out);
            let error = backbone.scorer(&hyper, &Tensors::new(less)).err().unwrap();
            assert_eq!(error.fault.exit_code(), 65, "{name}");
        }
    }
}

#[test]
fn a_user_without_history_gets_the_order_of_popularity() {
    let train = Histories::from_pairs(4, &[(0, 2), (1, 2), (1, 0), (0, 1), (3, 2), (3, 1)]);
    for name in ALL {
        let scorer = fit(name, &small(name), &train, 5);
        let list = topk::top_k(scorer.as_ref(), &[2], &train, 5, &|_| Ok(())).unwrap().remove(0);
        assert_eq!(list.iter().map(|s| s.item).collect::<Vec<_>>(), [2, 1, 0, 3, 4], "{name}");
    }
}

#[test]
fn a_history_that_is_longer_than_in_train_counts() {
    let case = cases("ease").remove(0);
    let train = log_of(&case);
    let mut pairs: Vec<(u32, u32)> = (0..30).flat_map(|u| train.of(u).iter().map(move |&i| (u as u32, i))).collect();
    let new = (0..20).find(|i| !train.of(3).contains(i)).unwrap();
    pairs.push((3, new));
    let longer = Histories::from_pairs(30, &pairs);
    for name in PERSONAL {
        let scorer = fit(name, &small(name), &train, 20);
        let (before, after) = (scores(scorer.as_ref(), &train), scores(scorer.as_ref(), &longer));
        assert_ne!(before[60..80], after[60..80], "{name}");
        assert_eq!((&before[..60], &before[80..]), (&after[..60], &after[80..]), "{name}");
    }
}

#[test]
fn small_and_odd_logs_give_finite_scores() {
    // users, items, interactions
    type Case<'a> = (usize, usize, &'a [(u32, u32)]);
    let logs: [Case<'_>; 6] = [
        (0, 0, &[]),
        (2, 3, &[]),
        (1, 1, &[(0, 0)]),
        (3, 0, &[]),
        (3, 2, &[(0, 0), (0, 1), (2, 1)]),
        (2, 4, &[(1, 3), (1, 3), (1, 3)]),
    ];
    for name in ALL {
        for hyper in [json!({}), small(name)] {
            for (users, items, pairs) in logs {
                let train = Histories::from_pairs(users, pairs);
                let scorer = fit(name, &hyper, &train, items);
                let out = scores(scorer.as_ref(), &train);
                assert!(out.iter().all(|s| s.is_finite()), "{name}: {users} x {items}");
                assert_eq!(out.len(), users * items);
            }
        }
    }
}

#[test]
fn a_fit_can_be_stopped() {
    struct Stop;
    impl Watch for Stop {
        fn check(&self) -> Result<()> {
            Err(Error::internal("stopped"))
        }
    }
    let train = Histories::from_pairs(1, &[(0, 0)]);
    let data = Interactions { n_users: 1, n_items: 2, train: &train, valid: &[] };
    for name in ALL {
        assert_eq!(fit_watched(name, &json!({}), &data, 1, &Stop).err().unwrap().message, "stopped");
    }
}

#[test]
fn a_catalogue_beyond_the_bound_is_refused_before_anything_is_allocated() {
    let train = Histories::from_pairs(1, &[(0, 0)]);
    let data = Interactions { n_users: 1, n_items: 5_000_000, train: &train, valid: &[] };
    for name in ["ease", "gf_cf"] {
        let error = fit_watched(name, &json!({}), &data, 1, &Unwatched).err().unwrap();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("GiB") && error.help.unwrap().contains("max_items"), "{name}");
    }
}
