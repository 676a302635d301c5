//! What every rating backbone must do, tested over the registry.

use serde_json::{Value, json};

use super::golden::tiny;
use super::{RatingFit, Ratings, rmse};
use crate::device::Device;
use crate::error::Result;
use crate::interactions::fields::{Entities, FieldSet, Rows, Values};
use crate::recommenders::saved::Tensors;
use crate::recommenders::trainer::Checkpoints;
use crate::recommenders::{BACKBONES, Backbone, FitContext, Task, Unwatched};

fn backbones() -> impl Iterator<Item = &'static Backbone> {
    BACKBONES.iter().filter(|b| b.task == Task::Rating)
}

/// Small and quick settings that fit a toy set, without regularisation.
fn quick() -> Value {
    json!({"embedding_dim": 6, "l2_reg_embedding": 0.0, "l2_reg_linear": 0.0, "init_std": 0.1,
        "recent_decay": 0.0, "bi_dropout": 0.0, "afm_dropout": 0.0, "dnn_dropout": 0.0, "learning_rate": 0.02, "batch_size": 16, "epochs": 120, "patience": 1000})
}

fn with(hyper: Value, more: Value) -> Value {
    let mut hyper = hyper;
    hyper.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    hyper
}

/// Ids only: every user rates every item, 5 where the parities of user and item agree and 1 where they do not.
struct Toy {
    set: FieldSet,
    users: Entities,
    items: Entities,
    rows: Rows,
    ratings: Vec<f32>,
    none: Rows,
}

fn checkerboard() -> Toy {
    let (n, m) = (6u32, 8u32);
    let pairs: Vec<(u32, u32)> = (0..n).flat_map(|u| (0..m).map(move |i| (u, i))).collect();
    Toy {
        set: FieldSet { n_users: n as usize, n_items: m as usize, fields: vec![] },
        users: Entities::all(n as usize, vec![]),
        items: Entities::all(m as usize, vec![]),
        rows: Rows {
            user: pairs.iter().map(|p| p.0).collect(),
            item: pairs.iter().map(|p| p.1).collect(),
            values: vec![],
        },
        ratings: pairs.iter().map(|p| if p.0 % 2 == p.1 % 2 { 5.0 } else { 1.0 }).collect(),
        none: Rows::default(),
    }
}

impl Toy {
    fn data(&self) -> Ratings<'_> {
        Ratings {
            fields: &self.set,
            users: &self.users,
            items: &self.items,
            train: &self.rows,
            train_ratings: &self.ratings,
            valid: &self.none,
            valid_ratings: &[],
        }
    }
}

fn has(backbone: &Backbone, key: &str) -> bool {
    (backbone.schema)().get("properties").is_some_and(|p| p.get(key).is_some())
}

/// The given settings with layers that are quick to train.
fn small(backbone: &Backbone, hyper: &Value) -> Value {
    let layers = [("dnn_hidden_units", json!([16, 8])), ("cin_layer_size", json!([8, 4])), ("att_layer_num", json!(1))];
    let mut hyper = hyper.clone();
    hyper.as_object_mut().unwrap().retain(|key, _| !key.ends_with("dropout") || has(backbone, key));
    for (key, value) in layers.into_iter().filter(|(key, _)| has(backbone, key)) {
        hyper[key] = value;
    }
    hyper
}

fn fit(
    backbone: &Backbone,
    hyper: &Value,
    data: &Ratings<'_>,
    checkpoints: Option<&dyn Checkpoints>,
) -> Result<RatingFit> {
    let hyper = &small(backbone, hyper);
    let ctx = FitContext { seed: 3, device: &Device::Cpu, watch: &Unwatched, checkpoints, warm: None };
    backbone.rating_recommender(hyper)?.fit(data, &ctx)
}

#[test]
fn every_backbone_fits_a_checkerboard() {
    let toy = checkerboard();
    for backbone in backbones() {
        let fit = fit(backbone, &quick(), &toy.data(), None).unwrap();
        let predicted = fit.predictor.predict(&toy.users, &toy.items, &toy.rows).unwrap();
        let error = rmse(&predicted, &toy.ratings).unwrap();
        assert!(error < 0.2, "{}: RMSE {error}", backbone.name);
        assert!(predicted.iter().all(|r| (1.0..=5.0).contains(r)));
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_and_files_give_the_same_model() {
    let (set, users, items, rows, ratings) = tiny();
    let data = Ratings {
        fields: &set,
        users: &users,
        items: &items,
        train: &rows,
        train_ratings: &ratings,
        valid: &rows,
        valid_ratings: &ratings,
    };
    for backbone in backbones() {
        let mut hyper = with(quick(), json!({"epochs": 4, "batch_size": 2, "recent_decay": 0.7}));
        for key in ["dnn_dropout", "bi_dropout", "afm_dropout"].into_iter().filter(|k| has(backbone, k)) {
            hyper[key] = json!(0.3);
        }
        if has(backbone, "dnn_use_bn") {
            hyper["dnn_use_bn"] = json!(true);
        }
        let run = || fit(backbone, &hyper, &data, None).unwrap();
        let (a, b) = (run(), run());
        assert_eq!(a.predictor.tensors(), b.predictor.tensors(), "{}", backbone.name);
        let curve = |f: &RatingFit| f.epochs.iter().map(|e| (e.loss, e.valid)).collect::<Vec<_>>();
        assert_eq!(curve(&a), curve(&b));
        let full = backbone.hyper(&small(backbone, &hyper)).unwrap();
        let loaded = backbone.predictor(&full, &set, &Tensors::new(a.predictor.tensors())).unwrap();
        let predict = |p: &dyn super::Predictor| p.predict(&users, &items, &rows).unwrap();
        let predicted = predict(a.predictor.as_ref());
        assert_eq!(predict(loaded.as_ref()), predicted, "{}", backbone.name);
        assert!(predicted.iter().all(|x| x.is_finite()));
        assert_eq!(loaded.user_embeddings().values.len(), 3 * 6);
        assert_eq!(loaded.item_embeddings().values.len(), 4 * 6);
        let error = backbone.predictor(&full, &set, &Tensors::new(vec![])).err().unwrap();
        assert_eq!(error.fault.exit_code(), 65);
    }
}

#[test]
fn a_resumed_fit_equals_a_straight_one() {
    use crate::recommenders::{Epoch, Watch};
    use bytes::Bytes;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
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
    /// Stops the fit in epoch 3.
    struct Stop(Mutex<usize>);
    impl Watch for Stop {
        fn epoch(&self, epoch: &Epoch) {
            *self.0.lock().unwrap() = epoch.number;
        }
        fn check(&self) -> Result<()> {
            match *self.0.lock().unwrap() {
                2 => Err(crate::error::Error::internal("stopped")),
                _ => Ok(()),
            }
        }
    }
    let toy = checkerboard();
    for backbone in backbones() {
        let hyper = with(quick(), json!({"epochs": 5}));
        let straight = fit(backbone, &hyper, &toy.data(), None).unwrap();
        let kept = Kept(Mutex::new(None));
        let stop = Stop(Mutex::new(0));
        let ctx = FitContext { seed: 3, device: &Device::Cpu, watch: &stop, checkpoints: Some(&kept), warm: None };
        let stopped = backbone.rating_recommender(&small(backbone, &hyper)).unwrap().fit(&toy.data(), &ctx);
        assert_eq!(stopped.err().unwrap().message, "stopped");
        let resumed = fit(backbone, &hyper, &toy.data(), Some(&kept)).unwrap();
        assert_eq!(resumed.predictor.tensors(), straight.predictor.tensors(), "{}", backbone.name);
    }
}

#[test]
fn nothing_known_of_a_row_gives_the_bias_and_side_values_of_a_new_user_count() {
    let (set, users, items, rows, ratings) = tiny();
    let empty = Rows { values: vec![Values::Dense(vec![])], ..Rows::default() };
    let data = Ratings {
        fields: &set,
        users: &users,
        items: &items,
        train: &rows,
        train_ratings: &ratings,
        valid: &empty,
        valid_ratings: &[],
    };
    for backbone in backbones() {
        let fit = fit(backbone, &with(quick(), json!({"epochs": 20})), &data, None).unwrap();
        assert!(fit.epochs.iter().all(|e| e.valid.is_none() && e.loss.is_finite()));
        // Two new users, of whom the second has a known age; an item that is not known.
        let strangers = Entities { ids: vec![0, 0], values: vec![Values::Single(vec![0, 2])] };
        let goods =
            Entities { ids: vec![0, 3], values: vec![Values::Multi { offsets: vec![0, 1, 2], values: vec![0, 2] }] };
        let rows = Rows { user: vec![0, 1, 1], item: vec![0, 0, 1], values: vec![Values::Dense(vec![0.0; 3])] };
        let predicted = fit.predictor.predict(&strangers, &goods, &rows).unwrap();
        assert!(predicted.iter().all(|x| (1.0..=5.0).contains(x)), "{}: {predicted:?}", backbone.name);
        assert_ne!(predicted[0], predicted[2]);
        let none = Rows { values: vec![Values::Dense(vec![])], ..Rows::default() };
        assert!(fit.predictor.predict(&strangers, &goods, &none).unwrap().is_empty());
        let bad = Rows { item: vec![9, 0, 1], ..rows };
        assert_eq!(fit.predictor.predict(&strangers, &goods, &bad).unwrap_err().fault.exit_code(), 65);
    }
}

#[test]
fn ratings_that_are_no_numbers_are_named_and_constant_ones_learned() {
    let mut toy = checkerboard();
    for (bad, row) in [(f32::NAN, 7), (f32::INFINITY, 0)] {
        let kept = std::mem::replace(&mut toy.ratings[row], bad);
        for backbone in backbones() {
            let error = fit(backbone, &quick(), &toy.data(), None).err().unwrap();
            assert_eq!(error.fault.exit_code(), 65);
            assert!(error.message.contains(&format!("row {row} ")), "{}", error.message);
        }
        toy.ratings[row] = kept;
    }
    toy.ratings.fill(4.0);
    for backbone in backbones() {
        let fit = fit(backbone, &with(quick(), json!({"epochs": 2})), &toy.data(), None).unwrap();
        let predicted = fit.predictor.predict(&toy.users, &toy.items, &toy.rows).unwrap();
        assert!(predicted.iter().all(|&r| r == 4.0), "{}", backbone.name);
    }
}

#[test]
fn without_train_rows_every_prediction_is_finite() {
    let toy = checkerboard();
    let data = Ratings { train: &toy.none, train_ratings: &[], ..toy.data() };
    for backbone in backbones() {
        let fit = fit(backbone, &quick(), &data, None).unwrap();
        assert!(fit.epochs.is_empty());
        let predicted = fit.predictor.predict(&toy.users, &toy.items, &toy.rows).unwrap();
        assert!(predicted.iter().all(|r| r.is_finite()), "{}", backbone.name);
    }
}

#[test]
fn a_ranking_stage_cannot_take_a_rating_model_and_the_other_way_round() {
    for backbone in BACKBONES {
        let error = match backbone.task {
            Task::Rating => backbone.recommender(&json!({})).err().unwrap(),
            _ => backbone.rating_recommender(&json!({})).err().unwrap(),
        };
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains(backbone.name) && error.help.is_some());
    }
}
