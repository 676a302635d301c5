//! What every sequential backbone must do; each calls these from its own tests.

use std::collections::BTreeMap;
use std::sync::Mutex;

use burn::backend::{Autodiff, Flex};
use bytes::Bytes;
use serde_json::{Value, json};

use super::super::ops::Excluded;
use super::super::optim::Params;
use super::super::saved::{NamedTensor, Tensors};
use super::super::trainer::Checkpoints;
use super::super::{Epoch, Fit, FitContext, Interactions, Scorer, Unwatched, Watch, registry, topk};
use super::batches::Batch;
use super::config::EncoderHyper;
use super::encoder::{Encoder, Shape};
use super::loss::{Contrast, Negatives, Step, step_loss};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::interactions::Histories;

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn excluded(lists: &Value) -> Excluded {
    let mut all = Excluded::default();
    for list in list::<Vec<Vec<u32>>>(lists) {
        let from = all.classes.len() as u32;
        all.classes.extend(list);
        all.ranges.push((from, all.classes.len() as u32));
    }
    all
}

fn tensors(of: &Value) -> Vec<NamedTensor> {
    let one = |(name, t): (&String, &Value)| NamedTensor::new(name, list(&t["shape"]), list(&t["values"]));
    of.as_object().unwrap().iter().map(one).collect()
}

/// Loss and gradients of every case in `tests/golden/recommenders/<model>.json` (made by `peers/golden_sequential.py`).
pub fn golden(model: &str) {
    let path = format!("{}/tests/golden/recommenders/{model}.json", env!("CARGO_MANIFEST_DIR"));
    let file: Value = serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap();
    let sizes = &file["sizes"];
    for case in file["cases"].as_array().unwrap() {
        let hyper: EncoderHyper = list(&json!({
            "embedding_dim": sizes["dim"], "max_len": sizes["max_len"], "blocks": sizes["blocks"],
            "heads": sizes["heads"], "feed_forward_dim": sizes["inner"], "activation": case["activation"],
            "norm": case["norm"], "positions": case["positions"], "recency": case.get("recency").cloned().unwrap_or(json!(0.0)), "embedding_dropout": 0.0, "attention_dropout": 0.0,
            "hidden_dropout": 0.0, "initial_deviation": 0.1,
        }));
        let causal = case["causal"].as_bool().unwrap();
        let shape = Shape { n_items: list(&sizes["items"]), causal, mask_row: case["mask_row"] == 1, head: !causal };
        let mut params = Params::<Flex>::new(&Default::default());
        let encoder = Encoder::new(&hyper, shape, &mut params, None);
        params.set(&Tensors::new(tensors(&case["weights"]))).unwrap();

        let mut batch = Batch::padded(&list::<Vec<Vec<u32>>>(&case["sequences"]));
        for (n, places) in list::<Vec<Vec<u32>>>(&case["places"]).iter().enumerate() {
            batch.places.extend(places.iter().map(|p| (n * batch.length) as u32 + p));
        }
        batch.targets = list(&case["targets"]);
        let negatives = match case["loss"].as_str().unwrap() {
            "softmax" => Negatives::All(case.get("excluded").map(excluded)),
            "bce" => Negatives::Own(list(&case["negatives"])),
            _ => Negatives::Shared {
                items: list(&case["negatives"]),
                negative_logs: list(&case["negative_logs"]),
                target_logs: list(&case["target_logs"]),
            },
        };
        let contrast = case.get("views").map(|views| Contrast {
            views: Batch::padded(&list::<Vec<Vec<u32>>>(views)),
            weight: list(&case["cl_rate"]),
            temperature: list(&case["temperature"]),
        });
        let step = Step { batch, negatives, contrast, l2: list(&case["l2"]) };

        let vars = params.tracked();
        let loss = step_loss::<Autodiff<Flex>>(&encoder, &vars, &step, None);
        let (got, want): (f32, f64) = (loss.clone().into_scalar(), list(&case["value"]));
        assert!((f64::from(got) - want).abs() < 1e-5 * want, "{model}, {}: {got} is not {want}", case["name"]);
        let want = Tensors::new(tensors(&case["gradients"]));
        for gradient in params.gradients(loss, vars) {
            let want = want.shaped(&gradient.name, &gradient.shape).unwrap();
            let size = want.iter().fold(1e-3f32, |size, x| size.max(x.abs()));
            for (n, (got, want)) in gradient.values.iter().zip(want).enumerate() {
                let what = format!("{model}, {}: gradient of {}[{n}]", case["name"], gradient.name);
                assert!((got - want).abs() < 1e-4 * size, "{what} is {got}, not {want}");
            }
        }
    }
}

/// A small model of the backbone.
pub fn small(more: &Value) -> Value {
    let mut hyper = json!({
        "embedding_dim": 16, "max_len": 8, "blocks": 1, "heads": 2, "feed_forward_dim": 16, "embedding_dropout": 0.0,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "learning_rate": 0.01, "batch_size": 8, "epochs": 60,
        "eval_every": 10, "decay": "none", "warmup_epochs": 0.0,
    });
    hyper.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    hyper
}

/// Fits on `data` from `seed`.
pub fn fit(model: &str, hyper: &Value, data: &Interactions<'_>, seed: u64) -> Fit {
    fit_watched(model, hyper, data, seed, &Unwatched, None).unwrap()
}

fn fit_watched(
    model: &str,
    hyper: &Value,
    data: &Interactions<'_>,
    seed: u64,
    watch: &dyn Watch,
    checkpoints: Option<&dyn Checkpoints>,
) -> Result<Fit> {
    let recommender = registry::find(model).unwrap().recommender(hyper).unwrap();
    recommender.fit(data, &FitContext { seed, device: &Device::Cpu, watch, checkpoints, warm: None })
}

/// Items on a ring: each user walks on by one from some item. What comes next is certain.
fn walks(n_items: u32, steps: u32) -> Histories {
    let pairs: Vec<(u32, u32)> = (0..n_items).flat_map(|u| (0..steps).map(move |t| (u, (u + t) % n_items))).collect();
    Histories::from_pairs(n_items as usize, &pairs)
}

/// Learns what follows what on a ring, with each of the losses.
pub fn over_fits(model: &str, more: &Value) {
    let n = 12;
    let train = walks(n, 7);
    let valid: Vec<(u32, u32)> = (0..n).map(|u| (u, (u + 7) % n)).collect();
    let data = Interactions { n_users: n as usize, n_items: n as usize, train: &train, valid: &valid };
    for loss in ["softmax", "bce", "sampled-softmax"] {
        let mut hyper = small(more);
        hyper["loss"] = json!(loss);
        if loss == "sampled-softmax" {
            hyper["negatives"] = json!(8);
        }
        let fit = fit(model, &hyper, &data, 1);
        let ranks = topk::ranks(fit.scorer.as_ref(), &valid, &train, &train);
        let first = ranks.iter().filter(|&&rank| rank == Some(1)).count();
        assert!(first >= 11, "{model} with {loss}: {first} of {n} users have the right item first");
        assert!(fit.epochs.last().unwrap().loss < fit.epochs[0].loss);
    }
}

fn numbers(scorer: &dyn Scorer) -> Vec<Vec<u32>> {
    scorer.tensors().iter().map(|t| t.values.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Histories of 0, 1, 2 and more items than `max_len`, the items in no order.
fn ragged() -> Histories {
    let lengths = [0u32, 1, 2, 5, 9, 23, 40, 3];
    let pairs = lengths.iter().enumerate();
    let pairs: Vec<(u32, u32)> =
        pairs.flat_map(|(u, &n)| (0..n).map(move |t| (u as u32, (t * 7 + u as u32 * 3) % 41))).collect();
    Histories::from_pairs(lengths.len(), &pairs)
}

fn dropped(more: &Value) -> Value {
    let mut hyper = small(more);
    for name in ["embedding_dropout", "attention_dropout", "hidden_dropout"] {
        hyper[name] = json!(0.3);
    }
    hyper["epochs"] = json!(3);
    hyper["eval_every"] = json!(1);
    hyper
}

/// The same seed gives the same bits on any number of threads, another seed others.
pub fn repeats(model: &str, more: &Value) {
    let train = ragged();
    let data = Interactions { n_users: 8, n_items: 41, train: &train, valid: &[(3, 40), (7, 2)] };
    let hyper = dropped(more);
    let on = |threads: usize, seed| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| numbers(fit(model, &hyper, &data, seed).scorer.as_ref()))
    };
    let one = on(1, 5);
    assert!(one == on(1, 5) && one == on(3, 5), "{model}");
    assert!(one != on(1, 6), "{model}");
}

#[derive(Default)]
struct Kept(Mutex<Option<BTreeMap<String, Bytes>>>);
impl Checkpoints for Kept {
    fn load(&self) -> Result<Option<BTreeMap<String, Bytes>>> {
        Ok(self.0.lock().unwrap().clone())
    }
    fn save(&self, files: BTreeMap<String, Bytes>) -> Result<()> {
        *self.0.lock().unwrap() = Some(files);
        Ok(())
    }
    fn every(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

/// Stops a fit once an epoch is done.
struct StopAfter(usize, Mutex<usize>);
impl Watch for StopAfter {
    fn epoch(&self, epoch: &Epoch) {
        *self.1.lock().unwrap() = epoch.number;
    }
    fn check(&self) -> Result<()> {
        match *self.1.lock().unwrap() >= self.0 {
            true => Err(Error::internal("stopped")),
            false => Ok(()),
        }
    }
}

/// A fit that was stopped and taken up again ends as one that was not.
pub fn resumes(model: &str, more: &Value) {
    let train = ragged();
    let data = Interactions { n_users: 8, n_items: 41, train: &train, valid: &[(3, 40), (7, 2)] };
    let hyper = dropped(more);
    let kept = Kept::default();
    let stop = StopAfter(2, Mutex::new(0));
    assert!(fit_watched(model, &hyper, &data, 5, &stop, Some(&kept)).is_err());
    let resumed = fit_watched(model, &hyper, &data, 5, &Unwatched, Some(&kept)).unwrap();
    let straight = fit(model, &hyper, &data, 5);
    assert!(numbers(resumed.scorer.as_ref()) == numbers(straight.scorer.as_ref()), "{model}");
    assert_eq!((resumed.best_epoch, resumed.epochs.len()), (straight.best_epoch, 3));
}

/// A saved model scores as before; damaged tensors are refused.
pub fn loads(model: &str, more: &Value) {
    let train = ragged();
    let data = Interactions { n_users: 8, n_items: 41, train: &train, valid: &[] };
    let backbone = registry::find(model).unwrap();
    let recommender = backbone.recommender(&dropped(more)).unwrap();
    let fit = fit(model, &recommender.hyper(), &data, 5);
    let loaded = backbone.scorer(&recommender.hyper(), &Tensors::new(fit.scorer.tensors())).unwrap();
    let users: Vec<u32> = (0..8).collect();
    let scores = |scorer: &dyn Scorer| {
        let mut out = vec![f32::NAN; 8 * 41];
        scorer.score(&users, &train, &mut out);
        out
    };
    assert_eq!(scores(fit.scorer.as_ref()), scores(loaded.as_ref()));
    assert!(scores(loaded.as_ref()).iter().all(|s| s.is_finite()));
    assert_eq!(loaded.user_embeddings().unwrap().values, fit.scorer.user_embeddings().unwrap().values);
    assert_eq!(loaded.item_embeddings().unwrap().values.len(), 41 * 16);
    for name in fit.scorer.tensors().iter().map(|t| t.name.clone()) {
        let mut less = fit.scorer.tensors();
        less.retain(|t| t.name != name);
        let error = backbone.scorer(&recommender.hyper(), &Tensors::new(less)).err().unwrap();
        assert!(error.fault.exit_code() == 65 && error.message.contains(&name), "{error}");
    }
}

/// Nothing to learn from, nobody to score, histories of any length: no panic, no NaN.
pub fn bears_bad_input(model: &str, more: &Value) {
    let mut hyper = dropped(more);
    for (n_users, n_items, pairs) in
        [(0, 0, vec![]), (3, 4, vec![]), (2, 1, vec![(0, 0)]), (2, 2, vec![(0, 0), (0, 1)])]
    {
        let train = Histories::from_pairs(n_users, &pairs);
        let data = Interactions { n_users, n_items, train: &train, valid: &[] };
        let fit = fit(model, &hyper, &data, 1);
        let users: Vec<u32> = (0..n_users as u32).collect();
        let mut out = vec![f32::NAN; n_users * n_items];
        fit.scorer.score(&users, &train, &mut out);
        assert!(out.iter().all(|s| s.is_finite()), "{model}, {n_users} users, {n_items} items");
        assert!(fit.epochs.iter().all(|e| e.loss.is_finite()));
    }
    // Without a history popularity decides, whatever else is known.
    let train = ragged();
    let data = Interactions { n_users: 8, n_items: 41, train: &train, valid: &[] };
    let fit_one = fit(model, &hyper, &data, 1);
    let mut out = vec![f32::NAN; 2 * 41];
    let history = Histories::from_pairs(8, &[(1, 40)]);
    fit_one.scorer.score(&[0, 1], &history, &mut out);
    let count = train.items().iter().filter(|&&i| i == 3).count();
    assert!((out[3] - (1.0 + count as f32).ln()).abs() < 1e-6);
    assert!(out.iter().all(|s| s.is_finite()));
    // Scores do not depend on who else is in the block.
    let mut alone = vec![f32::NAN; 41];
    fit_one.scorer.score(&[1], &history, &mut alone);
    assert!(alone.iter().zip(&out[41..]).all(|(a, b)| (a - b).abs() < 1e-5));
    // A step size that blows up is told as such.
    hyper["learning_rate"] = json!(1.0);
    hyper["initial_deviation"] = json!(1.0);
    hyper["epochs"] = json!(1);
    if let Err(error) = fit_watched(model, &hyper, &data, 1, &Unwatched, None) {
        assert!(error.fault.exit_code() == 78 && error.message.contains("diverged"), "{error}");
    }
}
