//! GF-CF (Shen et al. 2021, "How Powerful is Graph Convolution for Recommendation?", arXiv 2108.07567): two filters of
//! the user's history as a signal over the items, in closed form.
//!
//! With `R = Du^-1/2 X Di^-1/2` (Du, Di: numbers of items of a user and of users of an item) the scores are
//! `x_u (R^T R + alpha * Di^-1/2 V V^T Di^1/2)`: a linear filter, and an ideal low-pass filter that keeps the `rank`
//! leading right singular vectors V of R (the paper's eq. 9 and 10, and the authors' code with alpha .3 and rank
//! 256). The vectors come from a block Krylov space made by products with R alone.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::{self, Idle};
use super::item_item::{Incidence, ItemItemScorer, Recency, Sizes, check_catalogue, item_rows};
use super::linear_algebra::eigen::{leading, outer};
use super::registry::{Backbone, Make, Task};
use super::sparse::Csr;
use super::sparse::csr_matmul;
use super::{Fit, FitContext, Interactions, Recommender, hyper};
use crate::error::Result;

/// Hyper-parameters of `gf_cf`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GfCfHyper {
    /// Number of singular vectors that the ideal low-pass filter keeps, at most the number of items. Default 64, the
    /// best on MovieLens 100K (the authors: 256 on larger data).
    #[schemars(range(min = 1, max = 4096))]
    pub rank: u32,
    /// Weight of the ideal low-pass filter beside the linear filter; 0 leaves it out. Default 3, the best on
    /// MovieLens 100K (the authors: 0.3).
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub alpha: f64,
    /// The largest catalogue that is accepted, in items: the model takes 4 bytes for each pair of items, 3.4 GiB for
    /// 30,000 items. Default 30,000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_items: u32,
}

impl Default for GfCfHyper {
    fn default() -> Self {
        GfCfHyper { rank: 64, alpha: 3.0, max_items: 30_000 }
    }
}

/// `gf_cf` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "gf_cf",
    about: "GF-CF: a linear and an ideal low-pass filter over the graph of items, in closed form",
    task: Task::Direct,
    schema: || schemars::schema_for!(GfCfHyper),
    idle: &[Idle { keys: &["rank"], when: |full| idle::is_zero(full, "alpha"), why: "with `alpha = 0`" }],
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<GfCfHyper>("gf_cf", given)?)),
        load: |_, tensors| Ok(Box::new(ItemItemScorer::load(tensors, Recency::NONE)?)),
    },
};

impl Recommender for GfCfHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        check_catalogue("gf_cf", data.n_items, self.max_items, 4)?;
        ctx.watch.begin(0);
        ctx.watch.check()?;
        let incidence = Incidence::new(data);
        let weights = self.item_weights(&incidence, ctx)?;
        let scorer = ItemItemScorer::new(Sizes::new(&incidence), Recency::NONE, weights);
        Ok(Fit { scorer: Box::new(scorer), epochs: Vec::new(), best_epoch: 0 })
    }
}

/// `1 / sqrt(n)` of each row's number of entries; 1 for a row without any.
fn inverse_roots(rows: &crate::interactions::Histories) -> Vec<f32> {
    (0..rows.n_users()).map(|r| (1.0 / (rows.of(r).len().max(1) as f64).sqrt()) as f32).collect()
}

impl GfCfHyper {
    /// Both filters as one matrix `[items, items]`.
    fn item_weights(&self, incidence: &Incidence, ctx: &FitContext<'_>) -> Result<Vec<f32>> {
        let (n_users, n_items) = (incidence.by_user.n_users(), incidence.by_item.n_users());
        let (users, items) = (inverse_roots(&incidence.by_user), inverse_roots(&incidence.by_item));
        let squares: Vec<f32> = users.iter().map(|x| x * x).collect();
        let mut weights = item_rows(n_items, |item, out| {
            incidence.co_occurrence(item, &squares, out);
            out.iter_mut().zip(&items).for_each(|(x, other)| *x *= items[item] * other);
        });
        ctx.watch.check()?;
        if self.alpha == 0.0 || n_items == 0 {
            return Ok(weights);
        }
        let entries: Vec<(u32, u32, f32)> = (0..n_users)
            .flat_map(|u| incidence.by_user.of(u).iter().map(move |&i| (u as u32, i)))
            .map(|(u, i)| (u, i, users[u as usize] * items[i as usize]))
            .collect();
        let r = Csr::from_entries(n_users, n_items, &entries)?;
        let transposed = r.transpose();
        let product = |x: &[f32], columns: usize| {
            let mut on_users = vec![0f32; n_users * columns];
            csr_matmul(&r, x, columns, &mut on_users);
            let mut out = vec![0f32; n_items * columns];
            csr_matmul(&transposed, &on_users, columns, &mut out);
            out
        };
        let vectors = leading(n_items, self.rank as usize, ctx.seed, &product);
        ctx.watch.check()?;
        // Row i of the low-pass filter is items[i] * V_i V^T / items.
        let rank = vectors.len() / n_items;
        let (mut left, mut right) = (vectors.clone(), vectors);
        left.par_chunks_mut(rank).zip(&items).for_each(|(row, d)| row.iter_mut().for_each(|x| *x *= d));
        right.par_chunks_mut(rank).zip(&items).for_each(|(row, d)| row.iter_mut().for_each(|x| *x /= d));
        outer(&left, &right, rank, self.alpha as f32, &mut weights);
        Ok(weights)
    }
}
