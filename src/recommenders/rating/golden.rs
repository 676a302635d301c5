//! Golden values of the rating models against `tests/golden/recommenders/*.json`, which `peers/golden_rating.py` makes.

use burn::backend::{Autodiff, Flex};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::layers::Pass;
use super::layout::{Layout, RecentOf, Source};
use super::learner::{Network, RatingModel};
use crate::error::Result;
use crate::interactions::fields::{Column, Entities, Field, FieldSet, Rows, Side};
use crate::recommenders::NamedTensor;
use crate::recommenders::saved::Tensors;

/// Users, items and rows of the script.
pub fn tiny() -> (FieldSet, Entities, Entities, Rows, Vec<f32>) {
    let ages = Column::Int(vec![Some(20), None, Some(10)]);
    let all_ages = Column::Int(vec![Some(10), Some(20), Some(30)]);
    let list = |l: &[&str]| l.iter().map(|&g| g.to_owned()).collect::<Vec<String>>();
    let genres = Column::Lists(vec![list(&["a", "c"]), list(&[]), list(&["b"]), list(&["c", "b", "a"])]);
    let hours = Column::Number([1.0, 3.0, 2.0, 6.0, 3.0].map(Some).to_vec());
    let age = Field::learn("age", Side::User, &all_ages).unwrap();
    let genre = Field::learn("genres", Side::Item, &genres).unwrap();
    let hour = Field::learn("hour", Side::Row, &hours).unwrap();
    let users = Entities::all(3, vec![age.encode(&ages).unwrap()]);
    let items = Entities::all(4, vec![genre.encode(&genres).unwrap()]);
    let rows =
        Rows { user: vec![0, 1, 2, 0, 0], item: vec![3, 0, 1, 2, 3], values: vec![hour.encode(&hours).unwrap()] };
    let set = FieldSet { n_users: 3, n_items: 4, fields: vec![age, genre, hour] };
    (set, users, items, rows, vec![5.0, 3.0, 1.0, 4.0, 2.0])
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// Within 1e-4 of the largest value.
fn near(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-2f32, |a, b| a.max(b.abs()));
    for (n, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-4 * largest, "{what}, element {n}: {g} is not {w}");
    }
}

/// Every case of the file.
pub fn check<M: RatingModel>(name: &str, parse: fn(Value) -> Result<M>) {
    let path = format!("{}/tests/golden/recommenders/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (set, users, items, rows, ratings) = tiny();
    let layout = Layout::new(&set, false);
    let source = Source { users: &users, items: &items, rows: &rows, recent: RecentOf::None };
    let batch = layout.batch(source, &[0, 1, 2, 3, 4], &mut layout.scratch());
    for (n, case) in cases.iter().enumerate() {
        let what = format!("{name}, case {n}");
        let mut hyper = case["hyper"].clone();
        hyper["recent_decay"] = 0.0.into();
        let model = parse(hyper).unwrap();
        let rng = &mut ChaCha8Rng::seed_from_u64(0);
        let mut network = Network::<M, Flex>::new(&model, &layout, 0.0, rng, &Default::default());
        let golden = case["tensors"].as_object().unwrap();
        let mut tensors = network.params.tensors();
        for tensor in &mut tensors {
            if let Some(known) = golden.get(&tensor.name) {
                let shape: Vec<usize> =
                    known["shape"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect();
                *tensor = NamedTensor::new(&tensor.name, shape, floats(&known["values"]));
            } else {
                assert!(tensor.name.ends_with("bn.mean") || tensor.name.ends_with("bn.variance"), "{}", tensor.name);
            }
        }
        network.params.set(&Tensors::new(tensors)).unwrap();
        let pass = || Pass::<Autodiff<Flex>>::training(1, 1, 1);
        let vars = network.params.tracked();
        let (predicted, _) = network.forward(&vars, &batch, &mut pass());
        near(&what, &predicted.into_data().to_vec::<f32>().unwrap(), &floats(&case["predicted"]));
        let vars = network.params.tracked();
        let loss = network.loss(&vars, &batch, ratings.clone(), &mut pass());
        near(&what, &loss.to_data().to_vec::<f32>().unwrap(), &[case["loss"].as_f64().unwrap() as f32]);
        let gradients = network.params.gradients(loss, vars);
        for (name, known) in golden {
            let got = gradients.iter().find(|t| &t.name == name).unwrap_or_else(|| panic!("{what} has no `{name}`"));
            near(&format!("{what}, gradient of `{name}`"), &got.values, &floats(&known["gradient"]));
        }
    }
}
