//! Item-based nearest neighbours (Sarwar et al. 2001; Deshpande and Karypis 2004): an item's score is the sum of its
//! similarities to those items of the history that are among its nearest neighbours.
//!
//! `sim(i, j) = n_ij / (sqrt(n_i n_j) + shrink)`, n_ij the users that have both, n_i those that have `i`: the cosine
//! of the items' columns, drawn to 0 where little is known. Of each item the `k` largest similarities above 0 are
//! kept, ties by item index; the item itself is no neighbour of its own. Nothing of size items squared is held.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::item_item::{Incidence, Recency, Sizes};
use super::registry::{Backbone, Make, Task};
use super::saved::{NamedTensor, Tensors};
use super::sparse::Csr;
use super::{Fit, FitContext, Interactions, Recommender, Scorer, hyper};
use crate::error::{Error, Result};
use crate::interactions::Histories;

/// Hyper-parameters of `item_knn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ItemKnnHyper {
    /// Nearest neighbours that are kept of each item. Default 800, the best on MovieLens 100K; smaller values take
    /// less memory (8 bytes for each neighbour) on large catalogues.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub k: u32,
    /// What is added to the denominator of the cosine, in users: the larger, the less similarities count that rest
    /// on few users. Default 0, the best on MovieLens 100K.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub shrink: f64,
}

impl Default for ItemKnnHyper {
    fn default() -> Self {
        ItemKnnHyper { k: 800, shrink: 0.0 }
    }
}

/// `item_knn` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "item_knn",
    about: "item-based nearest neighbours: cosine with shrinkage, no training",
    task: Task::Direct,
    schema: || schemars::schema_for!(ItemKnnHyper),
    idle: &[],
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<ItemKnnHyper>("item_knn", given)?)),
        load: |_, tensors| Ok(Box::new(ItemKnnScorer::load(tensors)?)),
    },
};

/// Item indices are saved as f32, which holds whole numbers up to here.
const MOST_ITEMS: usize = 1 << 24;

impl Recommender for ItemKnnHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        if data.n_items > MOST_ITEMS {
            return Err(Error::spec(format!("`item_knn` takes at most {MOST_ITEMS} items, here are {}", data.n_items)));
        }
        ctx.watch.begin(0);
        ctx.watch.check()?;
        let incidence = Incidence::new(data);
        let counts = incidence.users_of_items();
        let ones = vec![1f32; data.n_users];
        let lists: Vec<Vec<(u32, f32)>> = (0..data.n_items)
            .into_par_iter()
            .map_init(
                || vec![0f32; data.n_items],
                |row, item| {
                    incidence.co_occurrence(item, &ones, row);
                    self.neighbours(item, row, &counts)
                },
            )
            .collect();
        let scorer = ItemKnnScorer::new(Sizes::new(&incidence), &lists);
        Ok(Fit { scorer: Box::new(scorer), epochs: Vec::new(), best_epoch: 0 })
    }
}

impl ItemKnnHyper {
    /// The nearest neighbours of `item`, by index, out of its row of `X^T X`.
    fn neighbours(&self, item: usize, row: &[f32], counts: &[usize]) -> Vec<(u32, f32)> {
        let own = counts[item] as f64;
        let mut list: Vec<(u32, f32)> = row
            .iter()
            .enumerate()
            .filter(|&(other, &both)| both > 0.0 && other != item)
            .map(|(other, &both)| {
                let norm = (own * counts[other] as f64).sqrt() + self.shrink;
                (other as u32, (f64::from(both) / norm) as f32)
            })
            .collect();
        let k = self.k as usize;
        if k < list.len() {
            list.select_nth_unstable_by(k, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            list.truncate(k);
            list.sort_unstable_by_key(|n| n.0);
        }
        list
    }
}

const NEIGHBOURS: &str = "neighbours";
const SIMILARITIES: &str = "similarities";

/// The neighbours, by the item of the history.
struct ItemKnnScorer {
    sizes: Sizes,
    /// `[items, items]`: row `i` has the similarity to `i` of all items that `i` is a neighbour of.
    by_history: Csr,
}

impl ItemKnnScorer {
    fn new(sizes: Sizes, lists: &[Vec<(u32, f32)>]) -> Self {
        let n = lists.len();
        let entries: Vec<(u32, u32, f32)> = lists
            .iter()
            .enumerate()
            .flat_map(|(item, list)| list.iter().map(move |&(other, similarity)| (other, item as u32, similarity)))
            .collect();
        let by_history = Csr::from_entries(n, n, &entries).expect("neighbours are items");
        ItemKnnScorer { sizes, by_history }
    }

    fn load(tensors: &Tensors) -> Result<Self> {
        let sizes = Sizes::load(tensors)?;
        let n = sizes.popularity.len();
        let width = tensors.get(NEIGHBOURS)?.shape.get(1).copied().unwrap_or(0);
        let others = tensors.shaped(NEIGHBOURS, &[n, width])?;
        let similarities = tensors.shaped(SIMILARITIES, &[n, width])?;
        let mut lists = vec![Vec::new(); n];
        for (at, (&other, &similarity)) in others.iter().zip(similarities).enumerate() {
            if other < 0.0 {
                continue;
            }
            if other >= n as f32 || other.fract() != 0.0 {
                return Err(Error::data(format!("the model's tensor `{NEIGHBOURS}` names item {other} of {n}")));
            }
            lists[at / width].push((other as u32, similarity));
        }
        Ok(ItemKnnScorer::new(sizes, &lists))
    }
}

impl Scorer for ItemKnnScorer {
    fn n_users(&self) -> usize {
        self.sizes.n_users
    }

    fn n_items(&self) -> usize {
        self.sizes.popularity.len()
    }

    fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        let n = self.n_items();
        out.fill(0.0);
        for (&user, out) in users.iter().zip(out.chunks_exact_mut(n.max(1))) {
            for (item, _) in Recency::NONE.weights(history.of(user as usize), n) {
                let (others, similarities) = self.by_history.row(item as usize);
                for (&other, &similarity) in others.iter().zip(similarities) {
                    out[other as usize] += similarity;
                }
            }
        }
        self.sizes.fill_unknown(users, history, out);
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let n = self.n_items();
        let lists = self.by_history.transpose();
        let width = (0..n).map(|i| lists.row(i).0.len()).max().unwrap_or(0);
        // Places that are not used hold item -1.
        let (mut others, mut similarities) = (vec![-1f32; n * width], vec![0f32; n * width]);
        for item in 0..n {
            let (columns, values) = lists.row(item);
            for (at, (&other, &similarity)) in columns.iter().zip(values).enumerate() {
                (others[item * width + at], similarities[item * width + at]) = (other as f32, similarity);
            }
        }
        let mut tensors = self.sizes.tensors();
        tensors.push(NamedTensor::new(NEIGHBOURS, vec![n, width], others));
        tensors.push(NamedTensor::new(SIMILARITIES, vec![n, width], similarities));
        tensors
    }
}
