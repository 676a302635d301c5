//! What the models share that score an item by its relations to the items of the user's history: the incidence of
//! users and items, products `X^T X`, recency weights, and the scorer over a dense matrix `[items, items]`.
//!
//! A pair counts once, however often it occurs in the log. A user without history gets each item's share of users,
//! which is the order of popularity.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::saved::{NamedTensor, Tensors};
use super::sparse::Csr;
use super::sparse::csr_matmul;
use super::{Interactions, Scorer};
use crate::error::{Error, Result};
use crate::interactions::Histories;

/// Who has which item, each pair once, both ways, indices ascending.
pub struct Incidence {
    /// Items of each user.
    pub by_user: Histories,
    /// Users of each item.
    pub by_item: Histories,
}

impl Incidence {
    /// Of the train interactions.
    pub fn new(data: &Interactions<'_>) -> Self {
        let mut pairs = Vec::with_capacity(data.train.n_interactions());
        let mut items = Vec::new();
        for user in 0..data.n_users {
            items.clear();
            items.extend_from_slice(data.train.of(user));
            items.sort_unstable();
            items.dedup();
            pairs.extend(items.iter().map(|&item| (user as u32, item)));
        }
        let by_user = Histories::from_pairs(data.n_users, &pairs);
        pairs.iter_mut().for_each(|p| *p = (p.1, p.0));
        Incidence { by_user, by_item: Histories::from_pairs(data.n_items, &pairs) }
    }

    /// Number of users of each item `[items]`.
    pub fn users_of_items(&self) -> Vec<usize> {
        (0..self.by_item.n_users()).map(|i| self.by_item.of(i).len()).collect()
    }

    /// Share of all users that have each item `[items]`.
    pub fn popularity(&self) -> Vec<f32> {
        let all = self.by_user.n_users().max(1) as f64;
        self.users_of_items().into_iter().map(|n| (n as f64 / all) as f32).collect()
    }

    /// One row of `X^T W X`: `out[j] = sum of weights[u]` over the users `u` that have both `item` and `j`. `out
    /// [items]` is overwritten.
    pub fn co_occurrence(&self, item: usize, weights: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for &user in self.by_item.of(item) {
            let weight = weights[user as usize];
            for &other in self.by_user.of(user as usize) {
                out[other as usize] += weight;
            }
        }
    }
}

/// Weights of the items of a history by how long ago they were taken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Recency {
    /// What the weight of an item is multiplied with for each later item of the history, in the part above `floor`:
    /// the item that lies `t` items back weighs `floor + (1 - floor) * decay^t`. 1 weighs all alike, and order
    /// does not matter then. Default 1; with `l2 = 300` and `floor = 0.1`, 0.9 was best on MovieLens 100K.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub decay: f64,
    /// The weight that the oldest items keep, 0 to 1; without a meaning where `decay` is 1. Default 0.1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub floor: f64,
}

impl Recency {
    /// All items of a history weigh 1.
    pub const NONE: Recency = Recency { decay: 1.0, floor: 1.0 };

    /// `(item, weight)` of a history, oldest first: each item once, ascending, by its latest occurrence. Items
    /// that are not below `n_items` are left out.
    pub fn weights(&self, history: &[u32], n_items: usize) -> Vec<(u32, f32)> {
        let mut out = Vec::with_capacity(history.len());
        let mut fading = 1.0f64;
        for &item in history.iter().rev() {
            if (item as usize) < n_items {
                out.push((item, (self.floor + (1.0 - self.floor) * fading) as f32));
            }
            fading *= self.decay;
        }
        // Stable: of an item that occurs twice the later occurrence comes first and is the one that stays.
        out.sort_by_key(|w| w.0);
        out.dedup_by_key(|w| w.0);
        out
    }
}

/// Name of the tensor with each item's share of users.
const POPULARITY: &str = "item_popularity";
const WEIGHTS: &str = "item_weights";
/// `[users, 0]`: nothing is learned of a user, but their number is part of a model.
const USERS: &str = "users";

/// Scores of a user without history, and the sizes of a model without user vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    /// Number of users that the model was fitted on.
    pub n_users: usize,
    /// `[items]`: share of the users that have the item.
    pub popularity: Vec<f32>,
}

impl Sizes {
    /// Of the data that a model is fitted on.
    pub fn new(incidence: &Incidence) -> Self {
        Sizes { n_users: incidence.by_user.n_users(), popularity: incidence.popularity() }
    }

    /// For a file.
    pub fn tensors(&self) -> Vec<NamedTensor> {
        vec![
            NamedTensor::new(USERS, vec![self.n_users, 0], Vec::new()),
            NamedTensor::new(POPULARITY, vec![self.popularity.len()], self.popularity.clone()),
        ]
    }

    /// From a file.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn load(tensors: &Tensors) -> Result<Self> {
        let n_users = tensors.get(USERS)?.shape.first().copied().unwrap_or(0);
        let popularity = tensors.get(POPULARITY)?.values.clone();
        tensors.shaped(USERS, &[n_users, 0])?;
        tensors.shaped(POPULARITY, &[popularity.len()])?;
        Ok(Sizes { n_users, popularity })
    }

    /// Writes the scores `out [users, items]` of the users without a history.
    pub fn fill_unknown(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        let n = self.popularity.len();
        for (&user, out) in users.iter().zip(out.chunks_exact_mut(n.max(1))) {
            if history.of(user as usize).is_empty() {
                out.copy_from_slice(&self.popularity);
            }
        }
    }
}

/// A model that is one dense matrix: `score(u, j) = sum over i of w_ui * weights[i, j]`, with `w_ui` the recency
/// weight of item `i` in the user's history.
pub struct ItemItemScorer {
    sizes: Sizes,
    recency: Recency,
    /// `[items, items]`: row `i` is what an item `i` in the history adds to each item's score.
    weights: Vec<f32>,
}

impl ItemItemScorer {
    /// From its parts.
    ///
    /// # Panics
    /// When the matrix is not `[items, items]` (our bug).
    pub fn new(sizes: Sizes, recency: Recency, weights: Vec<f32>) -> Self {
        assert_eq!(weights.len(), sizes.popularity.len().pow(2), "item weights do not have the shape [items, items]");
        ItemItemScorer { sizes, recency, weights }
    }

    /// From the tensors of a saved model.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn load(tensors: &Tensors, recency: Recency) -> Result<Self> {
        let sizes = Sizes::load(tensors)?;
        let n = sizes.popularity.len();
        let weights = tensors.shaped(WEIGHTS, &[n, n])?.to_vec();
        Ok(ItemItemScorer { sizes, recency, weights })
    }

    /// The matrix `[items, items]`.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }
}

impl Scorer for ItemItemScorer {
    fn n_users(&self) -> usize {
        self.sizes.n_users
    }

    fn n_items(&self) -> usize {
        self.sizes.popularity.len()
    }

    fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        let n = self.n_items();
        let matrix = weighted_histories(users, history, self.recency, n);
        csr_matmul(&matrix, &self.weights, n, out);
        self.sizes.fill_unknown(users, history, out);
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let n = self.n_items();
        let mut tensors = self.sizes.tensors();
        tensors.push(NamedTensor::new(WEIGHTS, vec![n, n], self.weights.clone()));
        tensors
    }
}

/// The recency weights of a block of users, `[users, n_items]`.
pub fn weighted_histories(users: &[u32], history: &Histories, recency: Recency, n_items: usize) -> Csr {
    let entries: Vec<(u32, u32, f32)> = users
        .iter()
        .enumerate()
        .flat_map(|(row, &user)| {
            let weights = recency.weights(history.of(user as usize), n_items);
            weights.into_iter().map(move |(item, weight)| (row as u32, item, weight))
        })
        .collect();
    Csr::from_entries(users.len(), n_items, &entries).expect("items beyond the matrix were left out")
}

/// Refuses a catalogue whose matrices `[items, items]` would take more memory than the user allowed for.
///
/// # Errors
/// `n_items` is above `max_items` (exit 78).
pub fn check_catalogue(model: &str, n_items: usize, max_items: u32, bytes_per_pair: usize) -> Result<()> {
    if n_items <= max_items as usize {
        return Ok(());
    }
    let gib = n_items as f64 * n_items as f64 * bytes_per_pair as f64 / (1u64 << 30) as f64;
    Err(Error::spec(format!(
        "`{model}` keeps a number for every pair of items: {n_items} items would take {gib:.1} GiB, and `max_items` is {max_items}"
    ))
    .with_help("raise `max_items` in the stage's `hyper` table if there is the memory, or use `item_knn` or `ials`"))
}

/// Makes a matrix `[items, items]` by rows, in parallel; `row(item, out)` writes one.
pub fn item_rows(n_items: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0f32; n_items * n_items];
    out.par_chunks_mut(n_items.max(1)).enumerate().for_each(|(item, out)| row(item, out));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_weight_is_that_of_the_latest_occurrence() {
        let recency = Recency { decay: 0.5, floor: 0.2 };
        let got = recency.weights(&[3, 1, 3, 9, 0], 4);
        let at = |t: i32| (0.2 + 0.8 * 0.5f64.powi(t)) as f32;
        assert_eq!(got, [(0, at(0)), (1, at(3)), (3, at(2))]);
        assert!(Recency::NONE.weights(&[5, 2, 5], 9).iter().all(|w| w.1 == 1.0));
        assert!(Recency { decay: 0.0, floor: 0.0 }.weights(&[1, 2], 9) == [(1, 0.0), (2, 1.0)]);
    }

    #[test]
    fn a_catalogue_that_is_too_large_is_refused_with_its_size() {
        let error = check_catalogue("ease", 40_000, 30_000, 12).unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("17.9 GiB") && error.help.unwrap().contains("`max_items`"));
        check_catalogue("ease", 30_000, 30_000, 12).unwrap();
    }

    proptest! {
        #[test]
        fn weights_are_between_floor_and_one_and_newer_is_never_less(
            history in prop::collection::vec(0u32..20, 0..30), decay in 0.0f64..=1.0, floor in 0.0f64..=1.0,
        ) {
            let weights = Recency { decay, floor }.weights(&history, 15);
            let last = |item: u32| history.iter().rposition(|&i| i == item);
            for pair in weights.windows(2) {
                prop_assert!(pair[0].0 < pair[1].0);
                let newer = last(pair[0].0) > last(pair[1].0);
                let ordered = if newer { pair[0].1 >= pair[1].1 } else { pair[0].1 <= pair[1].1 };
                prop_assert!(ordered);
            }
            prop_assert!(weights.iter().all(|w| w.1 >= floor as f32 - 1e-6 && w.1 <= 1.0 + 1e-6));
            let distinct: std::collections::BTreeSet<u32> = history.iter().copied().filter(|&i| i < 15).collect();
            prop_assert_eq!(weights.iter().map(|w| w.0).collect::<Vec<_>>(), distinct.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn co_occurrences_are_those_of_the_definition(
            pairs in prop::collection::vec((0u32..6, 0u32..5), 0..40),
        ) {
            let train = Histories::from_pairs(6, &pairs);
            let incidence = Incidence::new(&Interactions { n_users: 6, n_items: 5, train: &train, valid: &[] });
            let has = |u: u32, i: u32| f32::from(u8::from(pairs.contains(&(u, i))));
            let mut row = vec![f32::NAN; 5];
            for i in 0..5u32 {
                incidence.co_occurrence(i as usize, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &mut row);
                for j in 0..5u32 {
                    let want: f32 = (0..6).map(|u| (u + 1) as f32 * has(u, i) * has(u, j)).sum();
                    prop_assert_eq!(row[j as usize], want);
                }
            }
        }
    }
}
