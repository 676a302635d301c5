//! One contract for every backbone of the registry: whoever adds one gets these tests for free.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tailfuse::device::{Device, DeviceChoice};
use tailfuse::error::{Error, Result};
use tailfuse::eval::metrics::ndcg_at;
use tailfuse::interactions::{Histories, IdMap};
use tailfuse::recommenders::saved::{ModelCard, TrainedModel};
use tailfuse::recommenders::{
    BACKBONES, Backbone, Embeds, Epoch, Fit, FitContext, Interactions, Task, Unwatched, Watch, topk,
};
use tailfuse::tables::IdColumn;

fn device() -> Device {
    DeviceChoice::Cpu.open().unwrap().device
}

/// Hyper-parameters that learn toy data in a moment, as far as a model has and allows them.
fn quick(backbone: &Backbone) -> Value {
    let wanted = json!({
        "embedding_dim": 16, "learning_rate": 0.02, "l2": 0.0, "batch_size": 64, "epochs": 40, "dropout": 0.0,
        "contrast_weight": 0.0, "loss": "bpr", "cosine": false,
    });
    // A name that the model does not have, or a value that it does not take, is left at its default.
    let taken = |(name, value): &(&String, &Value)| backbone.hyper(&json!({ name.as_str(): value })).is_ok();
    wanted.as_object().unwrap().iter().filter(taken).map(|(n, v)| (n.clone(), v.clone())).collect()
}

/// The models that rank items; those that predict ratings have a contract of their own beside them.
fn ranking() -> impl Iterator<Item = &'static Backbone> {
    BACKBONES.iter().filter(|b| b.task != Task::Rating)
}

/// Whether a model learns in epochs; a closed form does not depend on the seed either.
fn hyper_has_epochs(backbone: &Backbone) -> bool {
    quick(backbone).get("epochs").is_some()
}

/// Those of them that learn in epochs.
fn trained() -> impl Iterator<Item = &'static Backbone> {
    ranking().filter(|b| hyper_has_epochs(b))
}

/// Those that must learn a toy by heart whatever the order of the histories.
fn direct() -> impl Iterator<Item = &'static Backbone> {
    trained().filter(|b| b.task == Task::Direct)
}

fn fit_watched(
    backbone: &Backbone,
    hyper: &Value,
    data: &Interactions<'_>,
    seed: u64,
    watch: &dyn Watch,
) -> Result<Fit> {
    backbone
        .recommender(hyper)?
        .fit(data, &FitContext { seed, device: &device(), watch, checkpoints: None, warm: None })
}

fn fit(backbone: &Backbone, hyper: &Value, data: &Interactions<'_>, seed: u64) -> Fit {
    fit_watched(backbone, hyper, data, seed, &Unwatched).unwrap()
}

fn saved(backbone: &Backbone, fit: Fit) -> TrainedModel {
    let numbers = |n: usize| IdMap::new(&[&IdColumn::Int((0..n as i64).collect())]).unwrap();
    let (users, items) = (fit.scorer.n_users(), fit.scorer.n_items());
    TrainedModel {
        card: ModelCard::new(backbone.name, backbone.recommender(&quick(backbone)).unwrap().hyper(), users, items),
        users: numbers(users),
        items: numbers(items),
        scorer: fit.scorer,
    }
}

/// Even users take even items, odd users odd ones; each user has seen all of their colour but one, `hidden`.
fn checkerboard(n: u32) -> (Histories, Vec<(u32, u32)>) {
    let hidden: Vec<(u32, u32)> = (0..n).map(|u| (u, (u * 6 + u % 2) % n)).collect();
    let pairs: Vec<(u32, u32)> = (0..n)
        .flat_map(|u| (0..n).map(move |i| (u, i)))
        .filter(|p| p.0 % 2 == p.1 % 2 && !hidden.contains(p))
        .collect();
    assert!(hidden.iter().all(|(u, i)| u % 2 == i % 2));
    (Histories::from_pairs(n as usize, &pairs), hidden)
}

fn all(train: &Histories, n_items: usize) -> Interactions<'_> {
    Interactions { n_users: train.n_users(), n_items, train, valid: &[] }
}

#[test]
fn the_missing_square_of_the_checkerboard_comes_first() {
    let (train, hidden) = checkerboard(20);
    for backbone in direct() {
        let fit = fit(backbone, &quick(backbone), &all(&train, 20), 1);
        let users: Vec<u32> = (0..20).collect();
        let lists = topk::top_k(fit.scorer.as_ref(), &users, &train, 1, &|_| Ok(())).unwrap();
        for (user, item) in &hidden {
            assert_eq!(lists[*user as usize][0].item, *item, "{}: user {user}", backbone.name);
        }
    }
}

#[test]
fn a_toy_log_can_be_learned_by_heart() {
    let pairs: Vec<(u32, u32)> = (0..12u32)
        .flat_map(|u| (0..15u32).map(move |i| (u, i)))
        .filter(|(u, i)| (u * 7 + i * i * 3 + u * i) % 4 == 0)
        .collect();
    let train = Histories::from_pairs(12, &pairs);
    let nothing = Histories::from_pairs(12, &[]);
    for backbone in direct() {
        let mut hyper = quick(backbone);
        hyper["epochs"] = 600.into();
        let fit = fit(backbone, &hyper, &all(&train, 15), 3);
        let (first, last) = (fit.epochs.first().unwrap().loss, fit.epochs.last().unwrap().loss);
        assert!(first > 0.5 && last < 0.1, "{}: loss {first} to {last}", backbone.name);
        // Every train item ranks above every other one.
        for user in 0..12u32 {
            let n = train.of(user as usize).len();
            let best = topk::top_k(fit.scorer.as_ref(), &[user], &nothing, n, &|_| Ok(())).unwrap().remove(0);
            let right = best.iter().filter(|s| train.of(user as usize).contains(&s.item)).count();
            assert_eq!(right, n, "{}: user {user}", backbone.name);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
    let (train, hidden) = checkerboard(40);
    for backbone in ranking() {
        let data = Interactions { valid: &hidden, ..all(&train, 40) };
        let bytes = |threads: usize, seed: u64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut hyper = quick(backbone);
            if hyper.get("epochs").is_some() {
                hyper["epochs"] = 6.into();
            }
            pool.install(|| saved(backbone, fit(backbone, &hyper, &data, seed)).to_files().unwrap())
        };
        let one = bytes(1, 5);
        assert!(one == bytes(1, 5), "{}: one thread, twice", backbone.name);
        assert!(one == bytes(3, 5), "{}: one thread and three", backbone.name);
        if hyper_has_epochs(backbone) {
            assert!(one != bytes(1, 6), "{}: another seed", backbone.name);
        }
    }
}

#[test]
fn saving_and_loading_changes_nothing() {
    let (train, _) = checkerboard(12);
    for backbone in ranking() {
        let model = saved(backbone, fit(backbone, &quick(backbone), &all(&train, 12), 2));
        let files = model.to_files().unwrap();
        let loaded = TrainedModel::from_files(&files).unwrap();
        assert_eq!(loaded.card, model.card);
        let scores = |m: &TrainedModel| {
            let mut out = vec![0f32; 12 * 12];
            m.scorer.score(&(0..12).collect::<Vec<u32>>(), &train, &mut out);
            out
        };
        assert_eq!(scores(&loaded), scores(&model), "{}", backbone.name);
        assert!(scores(&model).iter().all(|s| s.is_finite()));
        assert!(loaded.to_files().unwrap() == files);
    }
}

#[test]
fn small_inputs_do_not_break_anything() {
    for backbone in ranking() {
        // users, items, interactions
        type Case<'a> = (usize, usize, &'a [(u32, u32)]);
        let cases: [Case<'_>; 6] = [
            (0, 0, &[]),
            (2, 3, &[]),
            (1, 1, &[(0, 0)]), // has seen everything: no negative, nothing to learn
            (1, 2, &[(0, 1)]),
            (3, 2, &[(0, 0), (0, 1), (2, 1)]),
            (2, 4, &[(1, 3), (1, 3), (1, 3)]),
        ];
        for (users, items, pairs) in cases {
            let train = Histories::from_pairs(users, pairs);
            let model = saved(backbone, fit(backbone, &quick(backbone), &all(&train, items), 1));
            let loaded = TrainedModel::from_files(&model.to_files().unwrap()).unwrap();
            let everyone: Vec<u32> = (0..users as u32).collect();
            // k is larger than the catalogue: everything that was not seen comes, once.
            let lists = topk::top_k(loaded.scorer.as_ref(), &everyone, &train, 99, &|_| Ok(())).unwrap();
            for (user, list) in lists.iter().enumerate() {
                let mut got: Vec<u32> = list.iter().map(|s| s.item).collect();
                got.sort_unstable();
                let want: Vec<u32> = (0..items as u32).filter(|i| !train.of(user).contains(i)).collect();
                assert_eq!(got, want, "{}: user {user} of {users} x {items}", backbone.name);
            }
        }
    }
}

#[test]
fn the_best_epoch_by_validation_is_kept() {
    let (train, hidden) = checkerboard(30);
    for backbone in trained() {
        let data = Interactions { valid: &hidden, ..all(&train, 30) };
        let mut hyper = quick(backbone);
        hyper["eval_every"] = 3.into();
        hyper["patience"] = 2.into();
        hyper["epochs"] = 200.into();
        let fit = fit(backbone, &hyper, &data, 4);
        assert!(fit.epochs.len() < 200, "{}: training should stop early", backbone.name);
        for epoch in &fit.epochs {
            assert_eq!(epoch.valid.is_some(), epoch.number % 3 == 0, "{}: {epoch:?}", backbone.name);
        }
        let measured: Vec<(usize, f64)> = fit.epochs.iter().filter_map(|e| Some((e.number, e.valid?))).collect();
        let best = measured.iter().map(|m| m.1).fold(0.0, f64::max);
        // The first epoch that reached the best value, then `patience` more validations.
        let (at, _) = *measured.iter().find(|m| m.1 == best).unwrap();
        assert_eq!(fit.best_epoch, at, "{}", backbone.name);
        assert_eq!(fit.epochs.len(), at + 2 * 3, "{}", backbone.name);
        let ranks = topk::ranks(fit.scorer.as_ref(), &hidden, &train, &train);
        let again = ranks.iter().map(|&r| ndcg_at(r, 10)).sum::<f64>() / ranks.len() as f64;
        assert_eq!(again, best, "{}: the scorer is not that of the best epoch", backbone.name);
    }
}

#[test]
fn without_validation_all_epochs_are_run_and_the_last_is_kept() {
    let (train, _) = checkerboard(10);
    for backbone in trained() {
        let mut hyper = quick(backbone);
        hyper["epochs"] = 7.into();
        let fit = fit(backbone, &hyper, &all(&train, 10), 4);
        assert_eq!((fit.epochs.len(), fit.best_epoch), (7, 7), "{}", backbone.name);
        assert!(fit.epochs.iter().all(|e| e.valid.is_none()));
    }
}

/// Stops a fit in its third epoch.
#[derive(Default)]
struct StopInThird {
    announced: AtomicUsize,
    done: AtomicUsize,
}

impl Watch for StopInThird {
    fn begin(&self, epochs: usize) {
        self.announced.store(epochs, Ordering::SeqCst);
    }
    fn epoch(&self, epoch: &Epoch) {
        self.done.store(epoch.number, Ordering::SeqCst);
    }
    fn check(&self) -> Result<()> {
        match self.done.load(Ordering::SeqCst) {
            2 => Err(Error::internal("stopped by the test")),
            _ => Ok(()),
        }
    }
}

#[test]
fn a_fit_tells_its_progress_and_can_be_stopped() {
    let (train, _) = checkerboard(10);
    for backbone in trained() {
        let watch = StopInThird::default();
        let error = fit_watched(backbone, &quick(backbone), &all(&train, 10), 1, &watch).err().unwrap();
        assert_eq!(error.message, "stopped by the test", "{}", backbone.name);
        assert_eq!((watch.announced.into_inner(), watch.done.into_inner()), (40, 2));
    }
}

#[test]
fn embeddings_have_a_row_for_everyone() {
    let (train, _) = checkerboard(10);
    for backbone in ranking() {
        let mut hyper = quick(backbone);
        if hyper.get("epochs").is_some() {
            hyper["epochs"] = 2.into();
        }
        let declared = backbone.recommender(&hyper).unwrap().embeds();
        let scorer = fit(backbone, &hyper, &all(&train, 13), 1).scorer;
        let (users, items) = (scorer.user_embeddings(), scorer.item_embeddings());
        let found = match (users.is_some(), items.is_some()) {
            (false, false) => Embeds::None,
            (false, true) => Embeds::Items,
            (true, true) => Embeds::Both,
            (true, false) => panic!("{}: embeddings of users alone", backbone.name),
        };
        assert_eq!(found, declared, "{}: what `embeds` declares", backbone.name);
        let (Some(users), Some(items)) = (users, items) else { continue };
        assert_eq!(users.dim, items.dim, "{}", backbone.name);
        assert_eq!((users.values.len(), items.values.len()), (10 * users.dim, 13 * items.dim), "{}", backbone.name);
        if backbone.name != "mf" && backbone.name != "lightgcn" {
            continue;
        }
        // A score is the product of the two.
        let mut scores = vec![0f32; 13];
        scorer.score(&[7], &train, &mut scores);
        let dot: f32 = (0..16).map(|d| users.values[7 * 16 + d] * items.values[5 * 16 + d]).sum();
        assert!((scores[5] - dot).abs() < 1e-5, "{}", backbone.name);
    }
}
