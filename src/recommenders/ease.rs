//! EASE (Steck 2019, arXiv 1905.03375): a linear model from items to items without a diagonal, in closed form.
//!
//! `G = X^T X`, `P = (G + l2 I)^-1`, `B_ij = -P_ij / P_jj` for `i != j` and 0 on the diagonal (eq. 8); a user's scores
//! are `x_u B`. With `decay` below 1 the entries of `x_u` are weighted by recency when scores are made (not in `G`),
//! and the model is sequential: the latest items say most about the next one.
//!
//! `G` holds whole numbers and is inverted in f64; what is saved is `B` in f32. Both take items squared, so a
//! catalogue above `max_items` is refused.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idle::Idle;
use super::item_item::{Incidence, ItemItemScorer, Recency, Sizes, check_catalogue};
use super::linear_algebra::inverse::invert;
use super::registry::{Backbone, Make, Task};
use super::{Fit, FitContext, Interactions, Recommender, hyper};
use crate::error::Result;

/// Hyper-parameters of `ease`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EaseHyper {
    /// Weight of the L2 term on the item weights, in users: what is added to the diagonal of `X^T X`. Above 0.
    /// Default 100, the best on MovieLens 100K (the paper: 200 to 1000 on larger data).
    #[schemars(range(min = 0.001, max = 1e9))]
    pub l2: f64,
    /// Recency.
    #[serde(flatten)]
    pub recency: Recency,
    /// The largest catalogue that is accepted, in items: fitting takes 12 bytes for each pair of items, 10 GiB for
    /// 30,000 items, and the saved model a third of that. Default 30,000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_items: u32,
}

impl Default for EaseHyper {
    fn default() -> Self {
        EaseHyper { l2: 100.0, recency: Recency { decay: 1.0, floor: 0.1 }, max_items: 30_000 }
    }
}

/// `ease` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "ease",
    about: "EASE: a linear item-to-item model in closed form; with `decay` below 1 recent items weigh more and it is sequential",
    task: Task::Direct,
    schema: || schemars::schema_for!(EaseHyper),
    idle: &[Idle {
        keys: &["floor"],
        when: |full| full["decay"].as_f64() == Some(1.0),
        why: "with `decay = 1`, which weighs the whole history alike",
    }],
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<EaseHyper>("ease", given)?)),
        load: |given, tensors| {
            let own: EaseHyper = hyper::parse("ease", given.clone())?;
            Ok(Box::new(ItemItemScorer::load(tensors, own.recency)?))
        },
    },
};

impl Recommender for EaseHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        check_catalogue("ease", data.n_items, self.max_items, 12)?;
        ctx.watch.begin(0);
        ctx.watch.check()?;
        let incidence = Incidence::new(data);
        let weights = item_weights(&incidence, self.l2, &|| ctx.watch.check())?;
        let scorer = ItemItemScorer::new(Sizes::new(&incidence), self.recency, weights);
        Ok(Fit { scorer: Box::new(scorer), epochs: Vec::new(), best_epoch: 0 })
    }
}

/// `B [items, items]`: row `i` is what item `i` of a history adds to each item's score.
fn item_weights(incidence: &Incidence, l2: f64, check: &dyn Fn() -> Result<()>) -> Result<Vec<f32>> {
    let n = incidence.by_item.n_users();
    let mut p = vec![0f64; n * n];
    p.par_chunks_mut(n.max(1)).enumerate().for_each(|(item, out)| {
        for &user in incidence.by_item.of(item) {
            // Items ascend, and the lower triangle is all that is needed.
            for &other in incidence.by_user.of(user as usize).iter().take_while(|&&other| other as usize <= item) {
                out[other as usize] += 1.0;
            }
        }
        out[item] += l2;
    });
    invert(&mut p, n, check)?;
    let scale: Vec<f64> = (0..n).map(|j| -1.0 / p[j * n + j]).collect();
    let mut weights = vec![0f32; n * n];
    weights.par_chunks_mut(n.max(1)).zip(p.par_chunks(n.max(1))).enumerate().for_each(|(item, (out, p))| {
        for ((o, x), s) in out.iter_mut().zip(p).zip(&scale) {
            *o = (x * s) as f32;
        }
        out[item] = 0.0;
    });
    Ok(weights)
}
