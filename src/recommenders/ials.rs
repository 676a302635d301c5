//! iALS (Hu, Koren and Volinsky 2008, "Collaborative Filtering for Implicit Feedback Datasets"): matrix factorisation
//! of all pairs, seen or not, by alternating least squares.
//!
//! Loss: `sum over all (u, i) of c_ui (p_ui - x_u y_i)^2 + reg (sum |x_u|^2 + sum |y_i|^2)`, with `p` 1 and `c` =
//! `alpha` for a pair that was seen (once, however often it occurs), `p` 0 and `c` 1 for all others. This is the
//! convention of the package `implicit`; the paper's `1 + alpha r` is `alpha` here.
//!
//! How a row is solved: with `M = Y^T Y + reg I = L L^T` and whitened items `Z = Y L^-T` the row's system is
//! `(I + (alpha - 1) Z_u^T Z_u) w = alpha Z_u^T 1`, which needs the row's own items only. Its eigenvalues lie between
//! `alpha` and 1 (or 1 and about `alpha`), so conjugate gradients take a few steps, and `x y_i = w z_i`.
//!
//! A user's vector is solved anew from the history that scores are asked for, so a model that was fitted on train sees
//! the validation item at test time.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::item_item::{Incidence, Recency, Sizes};
use super::linear_algebra::inverse::{cholesky, invert_lower};
use super::linear_algebra::{Matrix, gram, tall_product, to_f32};
use super::optim::normal;
use super::registry::{Backbone, Make, Task};
use super::saved::{NamedTensor, Tensors};
use super::{Embeddings, Embeds, Factors, Fit, FitContext, Interactions, Recommender, Scorer, hyper, product};
use crate::error::{Error, Result};
use crate::interactions::Histories;

mod solve;

/// Hyper-parameters of `ials`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IalsHyper {
    /// Length of the users' and items' vectors. Default 128, the best on MovieLens 100K (`implicit`: 100).
    #[schemars(range(min = 1, max = 2048))]
    pub factors: u32,
    /// Weight of the L2 term on each vector, against a weight of 1 for a pair that was not seen. Above 0. Default 3,
    /// the best on MovieLens 100K (`implicit`: 0.01).
    #[schemars(range(min = 1e-6, max = 1e6))]
    pub reg: f64,
    /// Weight of a pair that was seen, against 1 for the others; Hu et al.'s `1 + alpha` for an event that occurs
    /// once. Below 1 a seen pair weighs less than one that was not, which suits dense logs. Default 0.25, the best
    /// on MovieLens 100K (`implicit`: 1; Hu et al.: 41).
    #[schemars(range(min = 1e-4, max = 1e6))]
    pub alpha: f64,
    /// Rounds of solving all users, then all items. Default 15 (`implicit`: 15; Hu et al.: 10).
    #[schemars(range(min = 1, max = 10_000))]
    pub iterations: u32,
}

impl Default for IalsHyper {
    fn default() -> Self {
        IalsHyper { factors: 128, reg: 3.0, alpha: 0.25, iterations: 15 }
    }
}

/// `ials` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "ials",
    about: "implicit-feedback matrix factorisation by alternating least squares; users are solved from their history",
    task: Task::Direct,
    schema: || schemars::schema_for!(IalsHyper),
    idle: &[],
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<IalsHyper>("ials", given)?)),
        load: |given, tensors| Ok(Box::new(IalsScorer::load(&hyper::parse("ials", given.clone())?, tensors)?)),
    },
};

/// Conjugate gradients stop when the residual is below this share of the right hand side: in training, where the
/// next round starts from what this one found, and for scores.
const TOLERANCE: Tolerance = Tolerance { training: 1e-3, scoring: 1e-6 };

struct Tolerance {
    training: f32,
    scoring: f32,
}

/// Standard deviation of the initial item vectors, as in `implicit`'s 0.01 scale.
const START: f32 = 0.01;

impl Recommender for IalsHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn embeds(&self) -> Embeds {
        Embeds::Both
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        ctx.watch.begin(0);
        ctx.watch.check()?;
        let incidence = Incidence::new(data);
        let start = normal(data.n_items * self.factors as usize, START, &mut ChaCha8Rng::seed_from_u64(ctx.seed));
        let items = self.items(&incidence, start, TOLERANCE.training, &|| ctx.watch.check())?;
        let scorer = IalsScorer::new(self, Sizes::new(&incidence), items, |scorer| {
            let rows = Vec::from_iter(0..data.n_users as u32);
            scorer.side.plain(&scorer.whitened_users(&rows, &incidence.by_user))
        })?;
        Ok(Fit { scorer: Box::new(scorer), epochs: Vec::new(), best_epoch: 0 })
    }
}

impl IalsHyper {
    /// The item vectors after all rounds, from those at the start, both `[items, factors]`.
    fn items(
        &self,
        incidence: &Incidence,
        start: Vec<f32>,
        tolerance: f32,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<f32>> {
        let k = self.factors as usize;
        let mut items = start;
        let mut users = vec![0f32; incidence.by_user.n_users() * k];
        for _ in 0..self.iterations {
            check()?;
            users = Side::new(items.clone(), self)?.solve(&incidence.by_user, &users, tolerance);
            check()?;
            items = Side::new(users.clone(), self)?.solve(&incidence.by_item, &items, tolerance);
        }
        Ok(items)
    }
}

/// One side's vectors, ready to solve rows of the other side.
struct Side {
    k: usize,
    alpha: f32,
    /// `[rows, k]`: whitened vectors Z.
    whitened: Vec<f32>,
    /// `[k, k]`: L, lower triangular.
    factor: Vec<f32>,
    /// `[k, k]`: its inverse.
    inverse: Vec<f32>,
}

impl Side {
    fn new(vectors: Vec<f32>, hyper: &IalsHyper) -> Result<Self> {
        let k = hyper.factors as usize;
        let mut m = gram(&vectors, k, &vectors, k);
        m.iter_mut().step_by(k + 1).for_each(|x| *x += hyper.reg);
        let Some(factor) = cholesky(&m, k) else {
            return Err(Error::spec("`ials` diverged: its vectors are no longer finite")
                .with_help("raise `reg` or lower `alpha` in the stage's `hyper` table"));
        };
        let inverse = to_f32(&invert_lower(&factor, k));
        let whitened = tall_product(&vectors, Matrix::new(&inverse, k, k).transposed());
        Ok(Side { k, alpha: hyper.alpha as f32, whitened, factor: to_f32(&factor), inverse })
    }

    /// The vectors `[rows, k]` of rows with those columns, starting from `start [rows, k]`.
    fn solve(&self, rows: &Histories, start: &[f32], tolerance: f32) -> Vec<f32> {
        // w = L^T x, for rows: w = x L.
        let mut w = tall_product(start, Matrix::new(&self.factor, self.k, self.k));
        w.par_chunks_mut(64 * self.k).enumerate().for_each(|(block, w)| {
            for (n, w) in w.chunks_exact_mut(self.k).enumerate() {
                solve::row(&self.whitened, rows.of(block * 64 + n), self.alpha, tolerance, w);
            }
        });
        self.plain(&w)
    }

    /// `x = L^-T w` for rows `[rows, k]`.
    fn plain(&self, whitened: &[f32]) -> Vec<f32> {
        tall_product(whitened, Matrix::new(&self.inverse, self.k, self.k))
    }
}

const USERS: &str = "user_embeddings";
const ITEMS: &str = "item_embeddings";

struct IalsScorer {
    sizes: Sizes,
    /// `[users, k]`: solved from train.
    users: Vec<f32>,
    /// `[items, k]`
    items: Vec<f32>,
    side: Side,
}

impl IalsScorer {
    fn new(hyper: &IalsHyper, sizes: Sizes, items: Vec<f32>, users: impl Fn(&Self) -> Vec<f32>) -> Result<Self> {
        let side = Side::new(items.clone(), hyper)?;
        let mut scorer = IalsScorer { sizes, users: Vec::new(), items, side };
        scorer.users = users(&scorer);
        Ok(scorer)
    }

    fn load(hyper: &IalsHyper, tensors: &Tensors) -> Result<Self> {
        let sizes = Sizes::load(tensors)?;
        let k = hyper.factors as usize;
        let items = tensors.shaped(ITEMS, &[sizes.popularity.len(), k])?.to_vec();
        let users = tensors.shaped(USERS, &[sizes.n_users, k])?.to_vec();
        IalsScorer::new(hyper, sizes, items, |_| users.clone())
    }

    /// `[users, k]`: whitened vectors solved from their histories.
    fn whitened_users(&self, users: &[u32], history: &Histories) -> Vec<f32> {
        let (k, n) = (self.side.k, self.n_items());
        let mut w = vec![0f32; users.len() * k];
        w.par_chunks_mut(8 * k).zip(users.par_chunks(8)).for_each(|(w, users)| {
            for (w, &user) in w.chunks_exact_mut(k).zip(users) {
                let items: Vec<u32> =
                    Recency::NONE.weights(history.of(user as usize), n).into_iter().map(|w| w.0).collect();
                solve::row(&self.side.whitened, &items, self.side.alpha, TOLERANCE.scoring, w);
            }
        });
        w
    }
}

impl Scorer for IalsScorer {
    fn n_users(&self) -> usize {
        self.sizes.n_users
    }

    fn n_items(&self) -> usize {
        self.sizes.popularity.len()
    }

    fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        product::scores(&self.whitened_users(users, history), &self.side.whitened, self.side.k, out);
        self.sizes.fill_unknown(users, history, out);
    }

    fn factors(&self, users: &[u32], history: &Histories) -> Option<Factors<'_>> {
        // Who has no history is not scored by a product.
        let known = users.iter().all(|&user| !history.of(user as usize).is_empty());
        known.then(|| Factors {
            dim: self.side.k,
            users: self.whitened_users(users, history),
            items: &self.side.whitened,
        })
    }

    fn user_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.side.k, values: &self.users })
    }

    fn item_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.side.k, values: &self.items })
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let k = self.side.k;
        let mut tensors = self.sizes.tensors();
        tensors.push(NamedTensor::new(USERS, vec![self.sizes.n_users, k], self.users.clone()));
        tensors.push(NamedTensor::new(ITEMS, vec![self.n_items(), k], self.items.clone()));
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::super::closed_form_tests::{assert_close, cases, log_of, numbers};
    use super::*;

    /// Conjugate gradients in f32 are this far from an exact solve.
    const NEAR_ZERO: f32 = 2e-5;

    #[test]
    fn rounds_and_scores_are_those_of_exact_solves() {
        for case in cases("ials") {
            let train = log_of(&case);
            let data = Interactions { n_users: train.n_users(), n_items: 20, train: &train, valid: &[] };
            let own: IalsHyper = hyper::parse("ials", case["hyper"].clone()).unwrap();
            let what = case["hyper"].to_string();
            let incidence = Incidence::new(&data);
            let items = own.items(&incidence, numbers(&case["start"]), 1e-6, &|| Ok(())).unwrap();
            assert_close(&items, &numbers(&case["item_vectors"]), NEAR_ZERO, &what);
            let everyone: Vec<u32> = (0..30).collect();
            let scorer = IalsScorer::new(&own, Sizes::new(&incidence), items, |s| {
                s.side.plain(&s.whitened_users(&everyone, &train))
            })
            .unwrap();
            assert_close(&scorer.users, &numbers(&case["user_vectors"]), NEAR_ZERO, &what);
            let mut out = vec![0f32; 30 * 20];
            scorer.score(&everyone, &train, &mut out);
            let want: Vec<f32> = case["scores"].as_array().unwrap().iter().flat_map(numbers).collect();
            assert_close(&out, &want, NEAR_ZERO, &what);
        }
    }

    #[test]
    fn the_number_of_threads_and_the_seed_decide_what_they_should() {
        let train = log_of(&cases("ials")[0]);
        let data = Interactions { n_users: 30, n_items: 20, train: &train, valid: &[] };
        let items = |seed| {
            let start = normal(20 * 8, START, &mut ChaCha8Rng::seed_from_u64(seed));
            let own = IalsHyper { factors: 8, ..IalsHyper::default() };
            own.items(&Incidence::new(&data), start, 1e-3, &|| Ok(())).unwrap()
        };
        assert_eq!(items(1), items(1));
        assert_ne!(items(1), items(2));
    }
}
