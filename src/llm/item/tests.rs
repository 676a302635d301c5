//! The item model on a tiny LLM: it learns, resumes, is saved and loaded, and gives cold items their titles' place.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::model::{PROJECTION, RESIDUAL};
use super::*;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::interactions::Histories;
use crate::llm::weights::Weights;
use crate::recommenders::optim::normal;
use crate::recommenders::saved::Tensors;
use crate::recommenders::trainer::Checkpoints;
use crate::recommenders::{FitContext, Interactions, Scorer, Unwatched, Watch, topk};

const ITEMS: usize = 24;
const USERS: usize = 60;

fn weights() -> Weights {
    Weights::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llm/tiny"))).unwrap()
}

/// Item n is followed by item n + 1; the last two items are in no history.
fn log() -> (Histories, Vec<(u32, u32)>) {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (mut pairs, mut valid) = (Vec::new(), Vec::new());
    let warm = ITEMS as u32 - 2;
    for user in 0..USERS as u32 {
        let (first, n) = (rng.random_range(0..warm), rng.random_range(3..9));
        pairs.extend((0..n).map(|k| (user, (first + k) % warm)));
        valid.push((user, (first + n) % warm));
    }
    (Histories::from_pairs(USERS, &pairs), valid)
}

/// Titles as random vectors. Item 22 has the title of item 5, item 23 has none.
fn titles() -> TitleTable {
    let dim = 32;
    let mut values = normal(ITEMS * dim, 1.0, &mut ChaCha8Rng::seed_from_u64(9));
    values.copy_within(5 * dim..6 * dim, 22 * dim);
    let known = (0..ITEMS).map(|item| item != 23).collect();
    TitleTable::standardised(dim, values, known, 0.2)
}

fn hyper() -> ItemHyper {
    ItemHyper {
        layers: 2,
        max_len: 6,
        learning_rate: Some(3e-3),
        item_learning_rate: 1e-2,
        batch_tokens: 64,
        epochs: 8,
        warmup_epochs: 1.0,
        dropout: 0.1,
        patience: 100,
        ..ItemHyper::default()
    }
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
    fn every(&self) -> Duration {
        Duration::ZERO
    }
}

/// Stops after so many steps.
struct Stop(AtomicUsize);
impl Watch for Stop {
    fn check(&self) -> Result<()> {
        match self.0.fetch_sub(1, Ordering::SeqCst) {
            0 => Err(Error::internal("stopped")),
            _ => Ok(()),
        }
    }
}

fn run(hyper: &ItemHyper, watch: &dyn Watch, kept: Option<&Kept>) -> Result<ItemFit> {
    let (train, valid) = log();
    let data = Interactions { n_users: USERS, n_items: ITEMS, train: &train, valid: &valid };
    let checkpoints = kept.map(|k| k as &dyn Checkpoints);
    let ctx = FitContext { seed: 5, device: &Device::Cpu, watch, checkpoints, warm: None };
    fit(hyper, &weights(), titles(), &data, &ctx)
}

fn hit_at_1(scorer: &ItemScorer) -> f64 {
    let (train, valid) = log();
    let ranks = topk::ranks(scorer, &valid, &train, &train);
    ranks.iter().filter(|rank| **rank == Some(1)).count() as f64 / ranks.len() as f64
}

fn tensor(scorer: &ItemScorer, name: &str) -> Vec<f32> {
    Tensors::new(scorer.tensors()).get(name).unwrap().values.clone()
}

#[test]
fn it_learns_what_comes_next_from_the_llms_layers_and_from_random_ones() {
    for (init, epochs) in [(Init::Llm, 16), (Init::Random, 16)] {
        let fit = run(&ItemHyper { init, epochs, ..hyper() }, &Unwatched, None).unwrap();
        let first = fit.epochs[0].loss;
        let last = fit.epochs.last().unwrap().loss;
        assert!(last < 0.5 * first, "{init:?}: loss {first} to {last}");
        assert!(hit_at_1(&fit.scorer) > 0.6, "{init:?}: {}", hit_at_1(&fit.scorer));
        let best = fit.epochs.iter().filter_map(|e| e.valid).fold(0.0, f64::max);
        assert_eq!(fit.epochs[fit.best_epoch - 1].valid, Some(best));
    }
}

#[test]
fn a_sampled_softmax_learns_too() {
    let sampled = ItemHyper { full_softmax_items: 4, negatives: 8, epochs: 16, ..hyper() };
    let fit = run(&sampled, &Unwatched, None).unwrap();
    assert!(hit_at_1(&fit.scorer) > 0.4, "{}", hit_at_1(&fit.scorer));
}

#[test]
fn an_item_without_interactions_is_its_title() {
    let fit = run(&hyper(), &Unwatched, None).unwrap();
    let residuals = tensor(&fit.scorer, RESIDUAL);
    let row = |values: &[f32], item: usize| values[item * 32..][..32].to_vec();
    assert!(row(&residuals, 22).iter().all(|&x| x == 0.0), "nothing was learned of it");
    assert!(row(&residuals, 5).iter().any(|&x| x != 0.0));
    assert!(row(&residuals, 23).iter().any(|&x| x != 0.0), "without a title it starts somewhere");
    // Its vector is the projected title.
    let (projection, table) = (tensor(&fit.scorer, PROJECTION), fit.scorer.item_embeddings().unwrap());
    let title = row(&titles().values, 22);
    for (out, got) in row(table.values, 22).iter().enumerate() {
        let want: f32 = projection[out * 32..][..32].iter().zip(&title).map(|(w, x)| w * x).sum();
        assert!((want - got).abs() < 1e-5);
    }
    // Whoever would be shown item 5 next is shown its twin as well.
    let history = Histories::from_pairs(USERS, &[(0, 2), (0, 3), (0, 4)]);
    let mut scores = vec![0f32; ITEMS];
    fit.scorer.score(&[0], &history, &mut scores);
    let better = (0..ITEMS).filter(|&item| scores[item] > scores[22]).count();
    assert!(better < ITEMS / 2, "{better} of {ITEMS}: {scores:?}");
}

#[test]
fn a_stopped_fit_goes_on_to_the_same_bytes() {
    let plan = ItemHyper { epochs: 4, ..hyper() };
    let straight = run(&plan, &Unwatched, None).unwrap();
    let kept = Kept::default();
    // Somewhere in the third epoch.
    assert!(run(&plan, &Stop(AtomicUsize::new(14)), Some(&kept)).is_err());
    assert!(kept.0.lock().unwrap().is_some());
    let resumed = run(&plan, &Unwatched, Some(&kept)).unwrap();
    assert_eq!(resumed.scorer.tensors(), straight.scorer.tensors());
    assert_eq!(resumed.best_epoch, straight.best_epoch);
    let curve = |fit: &ItemFit| fit.epochs.iter().map(|e| (e.number, e.loss, e.valid)).collect::<Vec<_>>();
    assert_eq!(curve(&resumed), curve(&straight));
    let again = run(&plan, &Unwatched, None).unwrap();
    assert_eq!(again.scorer.tensors(), straight.scorer.tensors(), "the same seed, the same bytes");
}

#[test]
fn what_a_user_gets_depends_neither_on_the_others_nor_on_saving() {
    let fit = run(&ItemHyper { epochs: 2, ..hyper() }, &Unwatched, None).unwrap();
    let (train, _) = log();
    let users: Vec<u32> = (0..USERS as u32).collect();
    let mut together = vec![0f32; USERS * ITEMS];
    fit.scorer.score(&users, &train, &mut together);
    let loaded = ItemScorer::load(&fit.scorer.card().unwrap(), &Tensors::new(fit.scorer.tensors())).unwrap();
    assert_eq!(loaded.tensors(), fit.scorer.tensors());
    for user in [0, 7, 33] {
        let mut alone = vec![0f32; ITEMS];
        loaded.score(&[user], &train, &mut alone);
        for (a, b) in alone.iter().zip(&together[user as usize * ITEMS..]) {
            assert!((a - b).abs() < 1e-5, "{a} is not {b}");
        }
    }
    // Without a history: the items by their number of train interactions.
    let nothing = Histories::from_pairs(USERS, &[]);
    let mut scores = vec![0f32; ITEMS];
    loaded.score(&[0], &nothing, &mut scores);
    assert_eq!(scores[23], 0.0);
    assert!(scores[0] > 0.0);
    let bad = ItemScorer::load(&serde_json::json!({}), &Tensors::new(fit.scorer.tensors()));
    assert_eq!(bad.err().unwrap().fault.exit_code(), 65);
}

/// `tests/golden/llm/item`: a model that `train_items` fitted, and its scores by transformers (`peers/check_item_model.py`).
#[test]
fn scores_are_those_of_transformers() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llm/item"));
    let read = |name: &str| (name.to_owned(), Bytes::from(std::fs::read(folder.join(name)).unwrap()));
    let files = BTreeMap::from([read("model.json"), read("model.safetensors")]);
    let model = crate::recommenders::saved::TrainedModel::from_files(&files).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&read("golden.json").1).unwrap();
    let rows = golden.as_array().unwrap();
    assert!(rows.len() >= 5);
    for row in rows {
        let history: Vec<u32> = serde_json::from_value(row["history"].clone()).unwrap();
        let want: Vec<f32> = serde_json::from_value(row["scores"].clone()).unwrap();
        let pairs: Vec<(u32, u32)> = history.iter().map(|&item| (3, item)).collect();
        let mut got = vec![0f32; want.len()];
        model.scorer.score(&[3], &Histories::from_pairs(model.users.len(), &pairs), &mut got);
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{got} is not {want}");
        }
    }
}

#[test]
fn titles_are_centred_and_scaled_over_those_there_are() {
    let table = TitleTable::standardised(2, vec![1.0, 5.0, 3.0, 5.0, 9.0, 9.0], vec![true, true, false], 0.5);
    // The second dimension tells the titles nothing apart; the third item has none.
    assert_eq!(table.values, [-0.5, 0.0, 0.5, 0.0, 0.0, 0.0]);
}

#[test]
fn more_layers_than_there_are_is_refused() {
    let error = run(&ItemHyper { layers: 3, ..hyper() }, &Unwatched, None).err().unwrap();
    assert!(error.fault.exit_code() == 78 && error.message.contains("2 layers"), "{error}");
    assert_eq!(ItemHyper { dropout: 1.0, ..hyper() }.check().unwrap_err().fault.exit_code(), 78);
    assert_eq!(ItemHyper::default().rate(), 2e-4);
    assert_eq!(ItemHyper { init: Init::Random, ..ItemHyper::default() }.rate(), 5e-4);
}
