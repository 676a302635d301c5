//! Golden values of `peers/golden_direct.py` against the models that learn from pairs.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use burn::backend::{Autodiff, Flex};
use burn::tensor::Tensor;
use bytes::Bytes;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde_json::Value;

use super::optim::{Params, Vars};
use super::pairwise::{PairModel, PairRecommender};
use super::saved::{NamedTensor, Tensors};
use super::trainer::Checkpoints;
use super::{BACKBONES, Epoch, FitContext, Interactions, Recommender, Scorer, Unwatched, Watch, registry, topk};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::interactions::Histories;
use crate::interactions::sampler::NegativeSampler;

/// A tiny data set with weights.
#[derive(Deserialize)]
pub struct Golden {
    users: usize,
    items: usize,
    train: Vec<(u32, u32)>,
    later: Vec<(u32, u32)>,
    /// The batch.
    pub pairs: Vec<(u32, u32)>,
    weights: BTreeMap<String, Vec<f32>>,
    cases: Vec<Case>,
}

/// What one setting gives.
#[derive(Deserialize)]
pub struct Case {
    hyper: Value,
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
    /// The negatives.
    #[serde(default)]
    pub draw: Vec<u32>,
    /// `[negatives][pairs * candidates]`.
    #[serde(default)]
    pub candidates: Vec<Vec<u32>>,
    /// `[negatives][pairs * hops]`.
    #[serde(default)]
    pub mixing_weights: Vec<Vec<f32>>,
    /// `[views][layers][edges]`.
    #[serde(default)]
    pub keep: Vec<Vec<Vec<bool>>>,
    #[serde(rename = "final")]
    train_final: Option<Vec<f32>>,
    later: Option<Vec<f32>>,
}

type Loss = Tensor<Autodiff<Flex>, 1>;

impl Golden {
    /// `tests/golden/recommenders/NAME.json`.
    pub fn read(name: &str) -> Self {
        let path = format!("{}/tests/golden/recommenders/{name}.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap()
    }

    /// Holds every case's loss, gradients and embeddings against what the model gives.
    pub fn check<R: PairRecommender + Recommender>(
        &self,
        recommender: impl Fn(&Value) -> R,
        loss: impl Fn(&mut R::Model<Flex>, &Vars<Autodiff<Flex>>, &Golden, &Case) -> Loss,
    ) {
        let train = Histories::from_pairs(self.users, &self.train);
        let later = Histories::from_pairs(self.users, &self.later);
        let data = Interactions { n_users: self.users, n_items: self.items, train: &train, valid: &[] };
        let sampler = NegativeSampler::new(&train, self.items);
        for case in &self.cases {
            let what = case.hyper.to_string();
            let recommender = recommender(&case.hyper);
            let mut params = Params::<Flex>::new(&Default::default());
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let mut model = recommender.model(&data, &mut params, &sampler, &mut rng).unwrap();
            let weights = params.tensors().into_iter().map(|t| {
                let values = self.weights[&t.name].clone();
                NamedTensor::new(&t.name, t.shape, values)
            });
            params.set(&Tensors::new(weights.collect())).unwrap();
            let vars = params.tracked();
            let loss = loss(&mut model, &vars, self, case);
            close(&format!("loss, {what}"), &[loss.clone().into_scalar()], &[case.loss as f32]);
            for gradient in params.gradients(loss, vars) {
                let name = &gradient.name;
                close(&format!("gradient of {name}, {what}"), &gradient.values, &case.gradients[name]);
            }
            let scorer = model.scorer(&params.constants());
            let all = |scorer: &dyn Scorer| {
                let (users, items) = (scorer.user_embeddings().unwrap(), scorer.item_embeddings().unwrap());
                [users.values, items.values].concat()
            };
            if let Some(want) = &case.train_final {
                close(&format!("embeddings, {what}"), &all(&scorer), want);
            }
            if let Some(want) = &case.later {
                let scorer = scorer.with_history(&later).unwrap();
                close(&format!("embeddings of later, {what}"), &all(scorer.as_ref()), want);
            }
        }
        assert!(self.cases.len() > 1);
    }
}

/// Equal to 1e-4 of the largest.
fn close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (n, (x, y)) in got.iter().zip(want).enumerate() {
        assert!((x - y).abs() <= 1e-4 * scale, "{what}: element {n} is {x}, not {y}");
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

/// Stops a fit after that many epochs.
struct Stop(AtomicUsize);

impl Watch for Stop {
    fn epoch(&self, _: &Epoch) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
    fn check(&self) -> Result<()> {
        match self.0.load(Ordering::SeqCst) {
            0 => Err(Error::internal("stopped")),
            _ => Ok(()),
        }
    }
}

/// What every model that learns from pairs must do on a checkerboard: users like the items of their own parity, and the
/// one pair of each that was left out comes first; the same seed gives the same model, also on several threads and after an
/// interruption; a saved model scores alike; data without anything to learn does no harm.
pub fn contract(name: &str, given: Value) {
    let mut full = serde_json::json!({"embedding_dim": 16, "learning_rate": 0.05, "batch_size": 32, "epochs": 60, "eval_every": 10, "l2": 1e-5});
    full.as_object_mut().unwrap().extend(given.as_object().unwrap().clone());
    let backbone = registry::find(name).unwrap();
    assert!(BACKBONES.iter().any(|b| b.name == name));
    let recommender = backbone.recommender(&full).unwrap();
    let fit = |train: &Histories, n_items, valid: &[(u32, u32)], seed| {
        let data = Interactions { n_users: train.n_users(), n_items, train, valid };
        recommender
            .fit(&data, &FitContext { seed, device: &Device::Cpu, watch: &Unwatched, checkpoints: None, warm: None })
            .unwrap()
    };
    const N: u32 = 12;
    let all = (0..N).flat_map(|u| (0..N).filter(move |i| (u + i) % 2 == 0).map(move |i| (u, i)));
    let held_out = |&(u, i): &(u32, u32)| i == (u + 4) % N;
    let (test, train): (Vec<_>, Vec<_>) = all.partition(held_out);
    let train = Histories::from_pairs(N as usize, &train);
    let first = fit(&train, N as usize, &[], 3);
    let ranks = topk::ranks(first.scorer.as_ref(), &test, &train, &train);
    assert!(ranks.iter().all(|&rank| rank == Some(1)), "{name} {full}: {ranks:?}");
    let losses: Vec<f64> = first.epochs.iter().map(|e| e.loss).collect();
    assert!(losses[59] < losses[0], "{name} {full}: {losses:?}");
    let again =
        rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(|| fit(&train, N as usize, &[], 3));
    assert_eq!(again.scorer.tensors(), first.scorer.tensors(), "{name} {full}");
    assert_ne!(fit(&train, N as usize, &[], 4).scorer.tensors(), first.scorer.tensors());
    // Stopped in its 21st epoch and resumed.
    let data = Interactions { n_users: N as usize, n_items: N as usize, train: &train, valid: &[] };
    let (kept, stop) = (Kept::default(), Stop(AtomicUsize::new(20)));
    let context = |watch, checkpoints| FitContext { seed: 3, device: &Device::Cpu, watch, checkpoints, warm: None };
    assert!(recommender.fit(&data, &context(&stop, Some(&kept))).is_err());
    let resumed = recommender.fit(&data, &context(&Unwatched, Some(&kept))).unwrap();
    assert_eq!(resumed.epochs.len(), 60);
    assert_eq!(resumed.scorer.tensors(), first.scorer.tensors(), "{name} {full}, resumed");
    let loaded = backbone.scorer(&recommender.hyper(), &Tensors::new(first.scorer.tensors())).unwrap();
    let scores = |scorer: &dyn Scorer| {
        let scorer = scorer.with_history(&train);
        let mut out = vec![0f32; (N * N) as usize];
        let users: Vec<u32> = (0..N).collect();
        match &scorer {
            Some(scorer) => scorer.score(&users, &train, &mut out),
            None => first.scorer.score(&users, &train, &mut out),
        }
        out
    };
    assert_eq!(scores(loaded.as_ref()), scores(first.scorer.as_ref()));
    // No data, one pair, a user who has seen everything, an item that nobody has seen.
    for (pairs, n_items, valid) in [
        (vec![], 3, vec![]),
        (vec![(0, 0)], 2, vec![(1, 0)]),
        (vec![(0, 0), (0, 1), (1, 1)], 2, vec![(1, 0)]),
        (vec![(0, 0)], 1, vec![]),
    ] {
        let train = Histories::from_pairs(2, &pairs);
        let fit = fit(&train, n_items, &valid, 1);
        let scorer = fit.scorer.with_history(&Histories::from_pairs(2, &[])).unwrap_or(fit.scorer);
        let mut out = vec![f32::NAN; 2 * n_items];
        scorer.score(&[0, 1], &train, &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "{name} {full} {pairs:?}: {out:?}");
    }
}
