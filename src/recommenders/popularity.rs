//! Popularity: every user is given what most users took. The baseline below all others.
//!
//! The score of an item is its number of train users (or of train interactions), the same for everyone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::registry::{Backbone, Make, Task};
use super::saved::{NamedTensor, Tensors};
use super::{Fit, FitContext, Interactions, Recommender, Scorer, hyper};
use crate::error::Result;
use crate::interactions::Histories;

/// What [`PopularityHyper`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Count {
    /// A user counts once for an item.
    #[default]
    Users,
    /// A user counts as often as the pair occurs.
    Interactions,
}

/// Hyper-parameters of `popularity`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PopularityHyper {
    /// What is counted: `users` (each user once for an item; the default) or `interactions`. The two differ only in
    /// logs where a pair can occur more than once.
    pub count: Count,
}

/// `popularity` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "popularity",
    about: "the most popular items, the same for everyone: the baseline below all others",
    task: Task::Direct,
    schema: || schemars::schema_for!(PopularityHyper),
    idle: &[],
    make: Make::Ranking {
        build: |given| Ok(Box::new(hyper::parse::<PopularityHyper>("popularity", given)?)),
        load: |_, tensors| Ok(Box::new(PopularityScorer::load(tensors)?)),
    },
};

impl Recommender for PopularityHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        ctx.watch.begin(0);
        ctx.watch.check()?;
        let mut counts = vec![0f32; data.n_items];
        let mut items = Vec::new();
        for user in 0..data.n_users {
            items.clear();
            items.extend_from_slice(data.train.of(user));
            if self.count == Count::Users {
                items.sort_unstable();
                items.dedup();
            }
            items.iter().for_each(|&item| counts[item as usize] += 1.0);
        }
        let scorer = PopularityScorer { n_users: data.n_users, counts };
        Ok(Fit { scorer: Box::new(scorer), epochs: Vec::new(), best_epoch: 0 })
    }
}

const COUNTS: &str = "item_counts";
const USERS: &str = "users";

/// The counts.
struct PopularityScorer {
    n_users: usize,
    /// `[items]`; exact up to 16.7 million.
    counts: Vec<f32>,
}

impl PopularityScorer {
    fn load(tensors: &Tensors) -> Result<Self> {
        let n_users = tensors.get(USERS)?.shape.first().copied().unwrap_or(0);
        tensors.shaped(USERS, &[n_users, 0])?;
        let counts = tensors.get(COUNTS)?.values.clone();
        tensors.shaped(COUNTS, &[counts.len()])?;
        Ok(PopularityScorer { n_users, counts })
    }
}

impl Scorer for PopularityScorer {
    fn n_users(&self) -> usize {
        self.n_users
    }

    fn n_items(&self) -> usize {
        self.counts.len()
    }

    fn score(&self, _users: &[u32], _history: &Histories, out: &mut [f32]) {
        out.chunks_exact_mut(self.counts.len().max(1)).for_each(|out| out.copy_from_slice(&self.counts));
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        vec![
            NamedTensor::new(USERS, vec![self.n_users, 0], Vec::new()),
            NamedTensor::new(COUNTS, vec![self.counts.len()], self.counts.clone()),
        ]
    }
}
