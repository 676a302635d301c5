//! Matrix factorisation: a user's score of an item is the product of their embeddings, without biases.
//!
//! Trained with BPR (Rendle et al. 2009, arXiv 1205.2618) or a softmax ([`super::ranking_loss`]). A step reads and
//! updates only the rows of its batch (with `softmax`: all items).
//!
//! L2, part of the loss: `l2 / 2 * mean over the batch of (|e_u|^2 + |e_i|^2 + sum of |e_j|^2)` over a pair's user,
//! item and, for `bpr`, negatives.
//!
//! Reference implementations: SELFRec `model/graph/MF.py` and RecBole's `BPR`. We differ in the L2 term (SELFRec takes
//! norms, not squares) and in Adam's moments, which stand still for rows that are in no batch.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::embedding_scorer::EmbeddingScorer;
use super::optim::{ParamId, Params, Vars, xavier_uniform};
use super::pairwise::{self, Batch, LARGE_BATCHES, PairModel, PairRecommender, host};
use super::ranking_loss::{Draw, Loss, LossHyper, RankingLoss, Rows, View, distinct, weighted_squares};
use super::registry::{Backbone, Make, Task};
use super::saved::Tensors;
use super::trainer::Schedule;
use super::{Embeds, Fit, FitContext, Interactions, Recommender, hyper};
use crate::device::ModelBackend;
use crate::error::Result;
use crate::interactions::sampler::NegativeSampler;

/// Hyper-parameters of `mf`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MfHyper {
    /// Length of the users' and items' embeddings. Default 128, with `bpr` 64 (SELFRec `conf/MF.yaml`: 64).
    #[schemars(range(min = 1, max = 4096))]
    pub embedding_dim: u32,
    /// Weight of the L2 term on the embeddings of a batch. Default 0.1, with `bpr` 0.004 (SELFRec `conf/MF.yaml`:
    /// 0.0001, of norms that are not squared).
    #[schemars(range(min = 0.0, max = 10.0))]
    pub l2: f64,
    /// The loss.
    #[serde(flatten)]
    pub loss: LossHyper,
    /// Steps and epochs.
    #[serde(flatten)]
    pub schedule: Schedule,
}

impl Default for MfHyper {
    fn default() -> Self {
        MfHyper::defaults(Loss::Softmax)
    }
}

/// `mf` in the registry.
pub const BACKBONE: Backbone = Backbone {
    name: "mf",
    about: "matrix factorisation with a softmax loss or BPR: fast, no graph",
    task: Task::Direct,
    schema: || schemars::schema_for!(MfHyper),
    idle: &[],
    make: Make::Ranking {
        build: |given| Ok(Box::new(MfHyper::build(given)?)),
        load: |_, tensors| Ok(Box::new(EmbeddingScorer::load(tensors)?)),
    },
};

impl MfHyper {
    /// Tuned on the validation part of MovieLens-100K. SELFRec has batches of 2,048, a learning rate of 0.001 and 100
    /// epochs. A softmax is done once per user and not once per pair, so the larger the batch the less a pair costs;
    /// with 100 thousand pairs or fewer an epoch is one step.
    fn defaults(loss: Loss) -> Self {
        let (embedding_dim, l2, schedule) = match loss {
            Loss::Bpr => {
                (64, 4e-3, Schedule { learning_rate: 2e-3, batch_size: 2048, epochs: 200, eval_every: 2, patience: 10 })
            }
            Loss::Softmax | Loss::SampledSoftmax => (128, 0.1, LARGE_BATCHES),
        };
        MfHyper { embedding_dim, l2, loss: LossHyper::new(loss), schedule }
    }

    fn build(given: serde_json::Value) -> Result<Self> {
        let defaults = MfHyper::defaults(LossHyper::asked(&given).unwrap_or(Loss::Softmax));
        let mut hyper: MfHyper = hyper::parse_over("mf", &defaults, given)?;
        hyper.loss.resolve("mf")?;
        Ok(hyper)
    }
}

impl Recommender for MfHyper {
    fn hyper(&self) -> serde_json::Value {
        hyper::to_json(self)
    }

    fn embeds(&self) -> Embeds {
        Embeds::Both
    }

    fn fit(&self, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
        pairwise::fit(self, data, ctx)
    }
}

impl PairRecommender for MfHyper {
    type Model<B: ModelBackend> = Mf;

    fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    fn model<B: ModelBackend>(
        &self,
        data: &Interactions<'_>,
        params: &mut Params<B>,
        sampler: &NegativeSampler,
        rng: &mut ChaCha8Rng,
    ) -> Result<Mf> {
        let (n_users, n_items, dim) = (data.n_users, data.n_items, self.embedding_dim as usize);
        let users = params.add("user_embeddings", &[n_users, dim], xavier_uniform(n_users, dim, rng));
        let items = params.add("item_embeddings", &[n_items, dim], xavier_uniform(n_items, dim, rng));
        let loss = RankingLoss::new(&self.loss, self.schedule.batch_size as usize, n_items, sampler)?;
        Ok(Mf { n_users, n_items, dim, l2: self.l2, loss, users, items })
    }
}

/// The model: embeddings of users and items.
pub struct Mf {
    n_users: usize,
    n_items: usize,
    dim: usize,
    l2: f64,
    loss: RankingLoss,
    /// `[users, dim]`
    users: ParamId,
    /// `[items, dim]`
    items: ParamId,
}

impl Mf {
    fn loss_of<B: ModelBackend>(&self, vars: &Vars<B>, pairs: &[(u32, u32)], draw: &Draw) -> Tensor<B, 1> {
        let index = distinct(pairs.iter().map(|p| p.0));
        let users = Rows::Some { table: vars.rows(self.users, &index), index };
        let items = match self.loss.reads_all_items() {
            true => Rows::All { table: vars.get::<2>(self.items), first: 0, len: self.n_items },
            false => {
                let index = self.loss.items(pairs, draw);
                Rows::Some { table: vars.rows(self.items, &index), index }
            }
        };
        let view = View { users, items };
        let loss = self.loss.value(&view, pairs, draw);
        if self.l2 == 0.0 {
            return loss;
        }
        let weight = (self.l2 / (2.0 * pairs.len() as f64)) as f32;
        let (users, items) = self.loss.regularised(pairs, draw);
        let term = |rows: &Rows<B>, read: &mut dyn Iterator<Item = u32>| {
            weighted_squares(rows.stored(), rows.counts(read).into_iter().map(|n| n * weight).collect())
        };
        loss + term(&view.users, &mut users.into_iter()) + term(&view.items, &mut items.into_iter())
    }
}

impl<B: ModelBackend> PairModel<B> for Mf {
    fn loss(&self, vars: &Vars<Autodiff<B>>, batch: &Batch<'_>, rng: &mut ChaCha8Rng) -> Tensor<Autodiff<B>, 1> {
        let draw = self.loss.draw(batch.pairs, batch.sampler, rng);
        self.loss_of(vars, batch.pairs, &draw)
    }

    fn scorer(&self, vars: &Vars<B>) -> EmbeddingScorer {
        let mut all = host(vars.get::<2>(self.users));
        all.extend(host(vars.get::<2>(self.items)));
        let mut scorer = EmbeddingScorer::plain(self.n_users, self.n_items, self.dim, all);
        if self.loss.cosine() {
            scorer.scale_to_unit();
        }
        scorer
    }

    fn load(&self, tensors: &Tensors) -> Result<EmbeddingScorer> {
        EmbeddingScorer::load(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pairwise_golden::{Golden, contract};
    use super::*;

    #[test]
    fn loss_gradient_and_embeddings_equal_golden_values() {
        let golden = Golden::read("mf");
        golden.check(
            |given| MfHyper::build(given.clone()).unwrap(),
            |model, vars, golden, case| model.loss_of(vars, &golden.pairs, &Draw { negatives: case.draw.clone() }),
        );
    }

    #[test]
    fn it_fits_a_toy_set_again_and_again_alike() {
        for loss in ["bpr", "softmax", "sampled-softmax"] {
            contract("mf", serde_json::json!({"loss": loss}));
            contract("mf", serde_json::json!({"loss": loss, "cosine": true}));
        }
    }
}
