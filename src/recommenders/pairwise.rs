//! Models that learn from (user, item) pairs in training.
//!
//! In: a [`PairRecommender`] (hyper-parameters that make a [`PairModel`]), [`Interactions`]. Out: a [`Fit`] by the
//! shared [`trainer`].
//!
//! * An epoch has every train pair once, in an order and with draws that depend on seed and epoch alone.
//! * Users who have seen every item are left out: there is nothing that they could prefer their items to.
//! * Validation: full ranking of all items minus the user's train items, ties by item index.

use burn::backend::Autodiff;
use burn::tensor::{ElementConversion, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::embedding_scorer::EmbeddingScorer;
use super::optim::{Adam, Params, Vars};
use super::saved::{NamedTensor, Tensors};
use super::trainer::{self, Learner, Schedule, epoch_rng};
use super::{Fit, FitContext, Interactions, Scorer, Watch, topk};
use crate::device::{ModelBackend, OnBackend};
use crate::error::Result;
use crate::eval::metrics::ndcg_at;
use crate::interactions::sampler::NegativeSampler;

/// The default schedule of the softmax losses.
pub const LARGE_BATCHES: Schedule =
    Schedule { learning_rate: 0.05, batch_size: 131_072, epochs: 500, eval_every: 5, patience: 20 };

/// Hyper-parameters of a model that learns from pairs.
pub trait PairRecommender: Sync {
    /// The model on a back end.
    type Model<B: ModelBackend>: PairModel<B>;

    /// Epochs, steps, patience.
    fn schedule(&self) -> &Schedule;

    /// The model with its initial weights in `params`.
    ///
    /// # Errors
    /// The hyper-parameters do not suit the data (exit 78).
    fn model<B: ModelBackend>(
        &self,
        data: &Interactions<'_>,
        params: &mut Params<B>,
        sampler: &NegativeSampler,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self::Model<B>>;
}

/// A model that learns from pairs.
pub trait PairModel<B: ModelBackend> {
    /// Called before the batches of an epoch.
    fn start_epoch(&mut self, _rng: &mut ChaCha8Rng) {}

    /// Mean loss `[1]` of a batch, regularisation included.
    fn loss(&self, vars: &Vars<Autodiff<B>>, batch: &Batch<'_>, rng: &mut ChaCha8Rng) -> Tensor<Autodiff<B>, 1>;

    /// The model as it is saved and used.
    fn scorer(&self, vars: &Vars<B>) -> EmbeddingScorer;

    /// The model that its tensors were made of.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    fn load(&self, tensors: &Tensors) -> Result<EmbeddingScorer>;
}

/// The pairs of a step.
pub struct Batch<'a> {
    /// `(user, item)`.
    pub pairs: &'a [(u32, u32)],
    /// What users have seen.
    pub sampler: &'a NegativeSampler,
}

/// Fits a model.
///
/// # Errors
/// As [`trainer::run`] and [`PairRecommender::model`].
pub fn fit<R: PairRecommender>(recommender: &R, data: &Interactions<'_>, ctx: &FitContext<'_>) -> Result<Fit> {
    ctx.device.run(Task { recommender, data, ctx })
}

struct Task<'a, R> {
    recommender: &'a R,
    data: &'a Interactions<'a>,
    ctx: &'a FitContext<'a>,
}

impl<R: PairRecommender> OnBackend for Task<'_, R> {
    type Output = Result<Fit>;

    fn on<B: ModelBackend>(self, device: &B::Device) -> Result<Fit> {
        let Task { recommender, data, ctx } = self;
        let schedule = recommender.schedule();
        let mut params = Params::<B>::new(device);
        let sampler = NegativeSampler::new(data.train, data.n_items);
        let model = recommender.model(data, &mut params, &sampler, &mut ChaCha8Rng::seed_from_u64(ctx.seed))?;
        if let Some(warm) = ctx.warm {
            warm.apply(&mut params)?;
        }
        let pairs = Pairs::new(sampler);
        // With nothing to learn from the initial weights are the model.
        let epochs = if pairs.is_empty() { 0 } else { schedule.epochs };
        let adam = Adam::new(schedule.learning_rate);
        let batch_size = schedule.batch_size as usize;
        let mut learner = PairLearner { model, data, seed: ctx.seed, batch_size, pairs, adam, params };
        let trained = trainer::run(&mut learner, &Schedule { epochs, ..schedule.clone() }, ctx)?;
        Ok(Fit { scorer: Box::new(trained.fitted), epochs: trained.epochs, best_epoch: trained.best_epoch })
    }
}

struct PairLearner<'a, M, B: ModelBackend> {
    model: M,
    data: &'a Interactions<'a>,
    seed: u64,
    batch_size: usize,
    pairs: Pairs,
    adam: Adam,
    params: Params<B>,
}

impl<B: ModelBackend, M: PairModel<B>> Learner for PairLearner<'_, M, B> {
    type Fitted = EmbeddingScorer;

    fn epoch(&mut self, number: usize, watch: &dyn Watch) -> Result<f64> {
        let mut rng = epoch_rng(self.seed, number);
        let order = self.pairs.order(&mut rng);
        self.model.start_epoch(&mut rng);
        let mut total = Tensor::<B, 1>::zeros([1], self.params.device());
        let mut pairs = Vec::with_capacity(self.batch_size.min(order.len()));
        for numbers in order.chunks(self.batch_size) {
            watch.check()?;
            pairs.clear();
            pairs.extend(numbers.iter().map(|&n| self.pairs.pair(n)));
            let vars = self.params.tracked();
            let batch = Batch { pairs: &pairs, sampler: &self.pairs.sampler };
            let loss = self.model.loss(&vars, &batch, &mut rng);
            total = total + self.params.step(loss, vars, &self.adam) * pairs.len() as f32;
        }
        Ok(f64::from(total.into_scalar().elem::<f32>()) / order.len() as f64)
    }

    fn fitted(&self) -> Result<EmbeddingScorer> {
        Ok(self.model.scorer(&self.params.constants()))
    }

    fn quality(&self, fitted: &EmbeddingScorer) -> Option<f64> {
        validation_ndcg(fitted, self.data)
    }

    fn tensors(fitted: &EmbeddingScorer) -> Vec<NamedTensor> {
        fitted.tensors()
    }

    fn load(&self, tensors: &Tensors) -> Result<EmbeddingScorer> {
        self.model.load(tensors)
    }

    fn state(&self) -> Vec<NamedTensor> {
        self.params.state()
    }

    fn restore(&mut self, state: &Tensors) -> Result<()> {
        self.params.restore(state)
    }
}

/// Mean NDCG@10 over the held-out pairs, all items but the user's train items ranked; `None` without any.
pub fn validation_ndcg(scorer: &dyn Scorer, data: &Interactions<'_>) -> Option<f64> {
    let ranks = topk::ranks(scorer, data.valid, data.train, data.train);
    let n = ranks.len();
    (n > 0).then(|| ranks.iter().map(|&rank| ndcg_at(rank, 10)).sum::<f64>() / n as f64)
}

/// A tensor's values.
pub fn host<B: ModelBackend>(table: Tensor<B, 2>) -> Vec<f32> {
    table.into_data().to_vec().expect("models are f32 on every back end")
}

/// The distinct train pairs, numbered by user and then by item. Eight bytes a pair: its item is the sampler's.
struct Pairs {
    sampler: NegativeSampler,
    /// `[pairs]`.
    users: Vec<u32>,
}

impl Pairs {
    fn new(sampler: NegativeSampler) -> Self {
        let n = |u: usize| sampler.seen(u).len();
        let users = (0..sampler.n_users()).flat_map(|u| std::iter::repeat_n(u as u32, n(u))).collect();
        Pairs { sampler, users }
    }

    fn is_empty(&self) -> bool {
        (0..self.sampler.n_users()).all(|u| self.sampler.unseen(u) == 0 || self.sampler.seen(u).is_empty())
    }

    fn pair(&self, number: u32) -> (u32, u32) {
        (self.users[number as usize], self.sampler.all_seen()[number as usize])
    }

    /// The numbers of all pairs of users who have something left that they have not seen, shuffled.
    fn order(&self, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let has_unseen = |&n: &u32| self.sampler.unseen(self.users[n as usize] as usize) > 0;
        let mut order: Vec<u32> = (0..self.users.len() as u32).filter(has_unseen).collect();
        order.shuffle(rng);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interactions::Histories;

    #[test]
    fn an_epoch_has_every_pair_once() {
        let train = Histories::from_pairs(3, &[(0, 0), (0, 2), (0, 0), (1, 0), (1, 1), (1, 2), (2, 1)]);
        let pairs = Pairs::new(NegativeSampler::new(&train, 3));
        let order = |seed, epoch| -> Vec<(u32, u32)> {
            pairs.order(&mut epoch_rng(seed, epoch)).iter().map(|&n| pairs.pair(n)).collect()
        };
        // The repeated pair counts once; user 1 has seen everything and is left out.
        let mut seen = order(5, 1);
        seen.sort_unstable();
        assert_eq!(seen, [(0, 0), (0, 2), (2, 1)]);
        assert_eq!(order(5, 1), order(5, 1));
        assert!((2..20).any(|epoch| order(5, epoch) != order(5, 1)));
        assert!(!pairs.is_empty());
    }

    #[test]
    fn with_nothing_to_prefer_there_are_no_pairs() {
        let empty = |pairs: &[(u32, u32)], n_items| {
            Pairs::new(NegativeSampler::new(&Histories::from_pairs(2, pairs), n_items)).is_empty()
        };
        assert!(empty(&[], 3));
        assert!(empty(&[(0, 0)], 1));
        assert!(!empty(&[(0, 0)], 2));
    }
}
