//! Losses over (user, item) pairs for models that score by the product of two embeddings.
//!
//! In: a [`View`] of user and item embeddings, the pairs of a batch and what was drawn for it. Out: the mean loss
//! per pair. With `s(u, i) = <user, item> / temperature` (`<,>` the cosine where `cosine` is set):
//!
//! * `bpr` (Rendle et al. 2009, arXiv 1205.2618; arXiv 2401.13870, eq. 2 and 3): `-ln sigmoid(s(u, i) - s(u, j))`, the
//!   mean over the pair's negatives `j`, uniform among what `u` has not seen in train.
//! * `softmax`: `-ln(exp s(u, i) / sum over all items j of exp s(u, j))`.
//! * `sampled-softmax`: the same over the items of the batch and uniform draws. Each is weighted by 1 over the
//!   probability that a batch holds it (the logQ correction of Yi et al. 2019, "Sampling-bias-corrected neural
//!   modeling for large corpus item recommendations"), so that popular items are not pushed down for being there often.

use burn::tensor::activation::log_sigmoid;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use rand::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ops::{row_dots, weighted_cross_entropy};
use super::sparse::{Csr, SparseMatrix};
use crate::device::ModelBackend;
use crate::error::{Error, Result};
use crate::interactions::sampler::NegativeSampler;

/// The loss over pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// A train item against items that the user has not seen.
    Bpr,
    /// A train item against all items.
    Softmax,
    /// A train item against the batch's items and uniform draws.
    SampledSoftmax,
}

/// The hyper-parameters of the loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LossHyper {
    /// `softmax` (each train item against all items; the default: no other comes near it on MovieLens-100K), `bpr`
    /// (against sampled ones; SELFRec's only loss) or `sampled-softmax` (against the batch's items and uniform draws,
    /// for catalogues too large for `softmax`). Other defaults depend on it.
    pub loss: Loss,
    /// Of `bpr` and `sampled-softmax`. `bpr`: negatives per train pair, default 1 (SELFRec `next_batch_pairwise`).
    /// `sampled-softmax`: items drawn uniformly for a whole batch besides the batch's own, default 1024.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub negatives: Option<u32>,
    /// Of the softmax losses and of cosine scores: what scores are divided by in the loss. Default 1 for plain
    /// products, 0.2 for cosines (the temperature of SELFRec `conf/SGL.yaml`).
    #[schemars(range(min = 0.001, max = 100.0))]
    pub temperature: Option<f64>,
    /// Scores are cosines: user and item embeddings are scaled to length 1. SELFRec has plain products.
    pub cosine: bool,
}

impl LossHyper {
    /// That loss with its own defaults.
    pub fn new(loss: Loss) -> Self {
        LossHyper { loss, negatives: None, temperature: None, cosine: false }
    }

    /// The loss that a JSON object asks for, if it names one.
    pub fn asked(given: &serde_json::Value) -> Option<Loss> {
        given.get("loss").and_then(|loss| serde_json::from_value(loss.clone()).ok())
    }

    /// Fills in the defaults of what this loss uses.
    ///
    /// # Errors
    /// Something is set that it does not use (exit 78).
    pub fn resolve(&mut self, model: &str) -> Result<()> {
        let unused = |name: &str, why: &str, way_out: &str| {
            Err(Error::spec(format!("hyper-parameter `{name}` of `{model}` is not used {why}")).with_help(way_out))
        };
        match (self.loss, self.negatives) {
            (Loss::Softmax, Some(_)) => {
                let way_out = "leave it out, or set `loss = \"sampled-softmax\"`";
                return unused("negatives", "by `loss = \"softmax\"`, which takes all items", way_out);
            }
            (Loss::Bpr, None) => self.negatives = Some(1),
            (Loss::SampledSoftmax, None) => self.negatives = Some(1024),
            _ => {}
        }
        match (self.loss, self.cosine, self.temperature) {
            (Loss::Bpr, false, Some(_)) => {
                let way_out = "leave it out, set `cosine = true`, or take a softmax loss";
                return unused("temperature", "by `loss = \"bpr\"` with plain products", way_out);
            }
            (Loss::Bpr, false, None) => {}
            (_, true, None) => self.temperature = Some(0.2),
            (_, false, None) => self.temperature = Some(1.0),
            _ => {}
        }
        Ok(())
    }
}

/// Scores of a softmax over all items that are computed in one step: beyond it a step takes minutes.
const MOST_SCORES: usize = 1 << 30;

/// A loss over the pairs of one data set.
#[derive(Clone, Debug)]
pub struct RankingLoss {
    kind: Loss,
    negatives: usize,
    inverse_temperature: f32,
    cosine: bool,
    n_items: usize,
    /// `[items]`: share of the train pairs; for `sampled-softmax` only.
    item_share: Vec<f64>,
}

/// What was drawn for a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// `bpr`: `[pairs * negatives]`, those of a pair side by side. `sampled-softmax`: `[negatives]`, repeats allowed.
    pub negatives: Vec<u32>,
}

impl RankingLoss {
    /// From resolved hyper-parameters and the train data.
    ///
    /// # Errors
    /// `softmax` over so many items that a step would take minutes (exit 78).
    pub fn new(hyper: &LossHyper, batch_size: usize, n_items: usize, seen: &NegativeSampler) -> Result<Self> {
        let scores = batch_size.min(seen.n_users()).saturating_mul(n_items);
        if hyper.loss == Loss::Softmax && scores > MOST_SCORES {
            return Err(Error::spec(format!(
                "`loss = \"softmax\"` would score {n_items} items for each user of a batch, {scores} scores a step"
            ))
            .with_help("set `loss = \"sampled-softmax\"`, or a smaller `batch_size`"));
        }
        let mut item_share = Vec::new();
        if hyper.loss == Loss::SampledSoftmax {
            item_share = vec![0f64; n_items];
            let pairs = (0..seen.n_users()).flat_map(|u| seen.seen(u));
            pairs.for_each(|&i| item_share[i as usize] += 1.0);
            let n = item_share.iter().sum::<f64>().max(1.0);
            item_share.iter_mut().for_each(|share| *share /= n);
        }
        Ok(RankingLoss {
            kind: hyper.loss,
            negatives: hyper.negatives.unwrap_or(0) as usize,
            inverse_temperature: (1.0 / hyper.temperature.unwrap_or(1.0)) as f32,
            cosine: hyper.cosine,
            n_items,
            item_share,
        })
    }

    /// Whether scores are cosines.
    pub fn cosine(&self) -> bool {
        self.cosine
    }

    /// Whether the loss needs all item embeddings.
    pub fn reads_all_items(&self) -> bool {
        self.kind == Loss::Softmax
    }

    /// Draws the negatives of a batch of users who have not seen everything.
    pub fn draw(&self, pairs: &[(u32, u32)], sampler: &NegativeSampler, rng: &mut impl Rng) -> Draw {
        let negatives = match self.kind {
            Loss::Softmax => Vec::new(),
            Loss::SampledSoftmax => (0..self.negatives).map(|_| rng.random_range(0..self.n_items as u32)).collect(),
            Loss::Bpr => pairs
                .iter()
                .flat_map(|&(user, _)| std::iter::repeat_n(user, self.negatives))
                .map(|user| sampler.sample(user as usize, rng).expect("users without negatives are in no batch"))
                .collect(),
        };
        Draw { negatives }
    }

    /// The items whose embeddings the loss of a batch reads (unless it reads all): sorted, distinct.
    pub fn items(&self, pairs: &[(u32, u32)], draw: &Draw) -> Vec<u32> {
        distinct(pairs.iter().map(|p| p.1).chain(draw.negatives.iter().copied()))
    }

    /// The users and items of a batch that L2 counts, with repeats: those of its pairs and, for `bpr`, the negatives.
    /// (The classes of a softmax are no examples: most of them are there in every batch.)
    pub fn regularised(&self, pairs: &[(u32, u32)], draw: &Draw) -> (Vec<u32>, Vec<u32>) {
        let mut items: Vec<u32> = pairs.iter().map(|p| p.1).collect();
        if self.kind == Loss::Bpr {
            items.extend_from_slice(&draw.negatives);
        }
        (pairs.iter().map(|p| p.0).collect(), items)
    }

    /// Mean loss `[1]` of a batch.
    pub fn value<B: ModelBackend>(&self, view: &View<B>, pairs: &[(u32, u32)], draw: &Draw) -> Tensor<B, 1> {
        match self.kind {
            Loss::Bpr => self.bpr(view, pairs, &draw.negatives),
            Loss::Softmax => {
                let table = self.ready(view.items.whole());
                self.softmax(view, table, |item| item, None, pairs)
            }
            Loss::SampledSoftmax => {
                let classes = self.items(pairs, draw);
                let bias: Vec<f32> =
                    classes.iter().map(|&item| -self.log_inclusion(item, pairs.len(), draw.negatives.len())).collect();
                let place = |item: u32| classes.binary_search(&item).expect("a batch's items are classes") as u32;
                let table = self.ready(view.items.select(&classes));
                self.softmax(view, table, place, Some(bias), pairs)
            }
        }
    }

    /// ln of the probability that a batch of `pairs` random train pairs and `draws` uniform ones holds `item`.
    fn log_inclusion(&self, item: u32, pairs: usize, draws: usize) -> f32 {
        let missed = |share: f64, times: usize| (-share).ln_1p() * times as f64;
        let share = self.item_share[item as usize].min(1.0 - 1e-12);
        let uniform = (1.0 / self.n_items as f64).min(1.0 - 1e-12);
        (-(missed(share, pairs) + missed(uniform, draws)).exp_m1()).ln() as f32
    }

    fn ready<B: Backend>(&self, rows: Tensor<B, 2>) -> Tensor<B, 2> {
        if self.cosine { unit_rows(rows) } else { rows }
    }

    fn bpr<B: ModelBackend>(&self, view: &View<B>, pairs: &[(u32, u32)], negatives: &[u32]) -> Tensor<B, 1> {
        let (n, k) = (pairs.len(), self.negatives);
        let mut users: Vec<u32> = pairs.iter().map(|p| view.users.place(p.0) as u32).collect();
        let repeated: Vec<u32> = users.iter().flat_map(|&u| std::iter::repeat_n(u, k)).collect();
        users.extend(repeated);
        let mut items: Vec<u32> = pairs.iter().map(|p| view.items.place(p.1) as u32).collect();
        items.extend(negatives.iter().map(|&j| view.items.place(j) as u32));
        let (a, b) = (self.ready(view.users.stored()), self.ready(view.items.stored()));
        let scores = row_dots(a, b, (&users, &items)) * self.inverse_temperature;
        let positive = scores.clone().narrow(0, 0, n).reshape([n, 1]);
        let negative = scores.narrow(0, n, n * k).reshape([n, k]);
        log_sigmoid(positive - negative).mean().neg()
    }

    /// A user's softmax is the same for all of its pairs, so it is done once per user. With any class `t` of the user,
    /// `ln sum exp s(u, j) = CE(u, t) + s(u, t)`, and the mean of `CE(u, t) + s(u, t) - s(u, i)` over the pairs is the
    /// loss; the products `s(u, t) - s(u, i)` are one sparse product `[users, classes] x [classes, dim]`.
    fn softmax<B: ModelBackend>(
        &self,
        view: &View<B>,
        table: Tensor<B, 2>,
        class: impl Fn(u32) -> u32,
        bias: Option<Vec<f32>>,
        pairs: &[(u32, u32)],
    ) -> Tensor<B, 1> {
        let (classes, device) = (table.dims()[0], table.device());
        let mut sorted: Vec<(u32, u32)> = pairs.iter().map(|&(user, item)| (user, class(item))).collect();
        sorted.sort_unstable();
        let (mut users, mut first, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let (mut offsets, mut columns, mut values) = (vec![0], Vec::new(), Vec::<f32>::new());
        // The constant part of the loss: correction of the positives' own scores.
        let mut offset = 0f64;
        for mine in sorted.chunk_by(|a, b| a.0 == b.0) {
            let (user, t) = mine[0];
            users.push(user);
            first.push(t);
            counts.push(mine.len() as f32);
            for repeats in mine.chunk_by(|a, b| a.1 == b.1) {
                columns.push(repeats[0].1);
                values.push(-(repeats.len() as f32));
            }
            values[offsets[offsets.len() - 1]] += mine.len() as f32;
            offsets.push(columns.len());
            if let Some(bias) = &bias {
                offset += mine.iter().map(|p| f64::from(bias[t as usize] - bias[p.1 as usize])).sum::<f64>();
            }
        }
        let n = users.len();
        let differences = Csr::from_parts(n, classes, offsets, columns, values);
        let differences = SparseMatrix::<B>::new(differences, &device);
        let rows = self.ready(view.users.select(&users)) * self.inverse_temperature;
        let bias = bias.map(|bias| Tensor::from_data(TensorData::new(bias, [classes]), &device));
        let scores = (rows.clone() * differences.matmul(table.clone())).sum();
        let entropies = weighted_cross_entropy(rows, table, bias, &first, &counts).sum();
        (entropies + scores + offset as f32) / pairs.len() as f32
    }
}

/// User and item embeddings of a batch, or of everybody.
pub struct View<B: Backend> {
    /// Users.
    pub users: Rows<B>,
    /// Items.
    pub items: Rows<B>,
}

/// Rows of a table by their user or item index.
pub enum Rows<B: Backend> {
    /// Row `first + n` of the table belongs to index `n < len`.
    All {
        /// `[first + len or more, dim]`.
        table: Tensor<B, 2>,
        /// The row of index 0.
        first: usize,
        /// Number of indices.
        len: usize,
    },
    /// Row `n` belongs to `index[n]`.
    Some {
        /// `[index.len(), dim]`.
        table: Tensor<B, 2>,
        /// Sorted, distinct.
        index: Vec<u32>,
    },
}

impl<B: Backend> Rows<B> {
    /// The table as it is.
    pub fn stored(&self) -> Tensor<B, 2> {
        let (Rows::All { table, .. } | Rows::Some { table, .. }) = self;
        table.clone()
    }

    /// The table's row of an index.
    ///
    /// # Panics
    /// When there is none (our bug).
    fn place(&self, n: u32) -> usize {
        match self {
            Rows::All { first, .. } => first + n as usize,
            Rows::Some { index, .. } => index.binary_search(&n).expect("a loss reads rows that it has asked for"),
        }
    }

    /// How often each row of the table occurs among `read`.
    pub fn counts(&self, read: &mut dyn Iterator<Item = u32>) -> Vec<f32> {
        let (Rows::All { table, .. } | Rows::Some { table, .. }) = self;
        let mut counts = vec![0f32; table.dims()[0]];
        read.for_each(|n| counts[self.place(n)] += 1.0);
        counts
    }

    /// The rows of `which`, repeats allowed: `[which.len(), dim]`.
    ///
    /// # Panics
    /// When there is no such row (our bug).
    pub fn select(&self, which: &[u32]) -> Tensor<B, 2> {
        let (Rows::All { table, .. } | Rows::Some { table, .. }) = self;
        if matches!(self, Rows::Some { index, .. } if index == which) {
            return table.clone();
        }
        let places: Vec<i32> = which.iter().map(|&n| self.place(n) as i32).collect();
        table.clone().select(0, Tensor::<B, 1, Int>::from_data(TensorData::new(places, [which.len()]), &table.device()))
    }

    /// All rows that there are.
    pub fn whole(&self) -> Tensor<B, 2> {
        match self {
            Rows::All { table, first: 0, len } if table.dims()[0] == *len => table.clone(),
            Rows::All { table, first, len } => table.clone().narrow(0, *first, *len),
            Rows::Some { table, .. } => table.clone(),
        }
    }
}

/// Sorted, each once.
pub fn distinct(values: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut values: Vec<u32> = values.collect();
    values.sort_unstable();
    values.dedup();
    values
}

/// Each row over its length; a row of zeros stays one.
pub fn unit_rows<B: Backend>(rows: Tensor<B, 2>) -> Tensor<B, 2> {
    let lengths = (rows.clone().powi_scalar(2).sum_dim(1) + 1e-12).sqrt();
    rows / lengths
}

/// `sum over rows of weights[row] * |row|^2`, `[1]`.
pub fn weighted_squares<B: Backend>(table: Tensor<B, 2>, weights: Vec<f32>) -> Tensor<B, 1> {
    let n = weights.len();
    let weights = Tensor::<B, 1>::from_data(TensorData::new(weights, [n]), &table.device()).reshape([n, 1]);
    (table.powi_scalar(2) * weights).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interactions::Histories;
    use crate::recommenders::registry;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;

    #[test]
    fn what_a_loss_does_not_use_is_refused_and_null_is_not_set() {
        let build = |given| registry::find("mf").unwrap().recommender(&given);
        let hyper = |given| build(given).unwrap().hyper();
        for (given, name) in [
            (json!({"loss": "softmax", "negatives": 5}), "`negatives`"),
            (json!({"loss": "bpr", "temperature": 0.5}), "`temperature`"),
        ] {
            let error = build(given).err().unwrap();
            assert_eq!(error.fault.exit_code(), 78);
            assert!(error.message.contains(name) && error.message.contains("`mf`") && error.help.is_some(), "{error}");
        }
        assert!(build(json!({"loss": "hinge"})).is_err());
        assert!(build(json!({"loss": "bpr", "negatives": 0})).is_err());
        let full = hyper(json!({"loss": "bpr"}));
        assert_eq!((&full["negatives"], &full["temperature"]), (&json!(1), &json!(null)));
        let full = hyper(json!({"loss": "softmax", "cosine": true, "negatives": null}));
        assert_eq!((&full["negatives"], &full["temperature"]), (&json!(null), &json!(0.2)));
        let full = hyper(json!({"loss": "sampled-softmax"}));
        assert_eq!((&full["negatives"], &full["temperature"]), (&json!(1024), &json!(1.0)));
    }

    fn loss(hyper: serde_json::Value, train: &Histories, n_items: usize) -> Result<RankingLoss> {
        let mut hyper: LossHyper = serde_json::from_value(hyper).unwrap();
        hyper.resolve("mf").unwrap();
        RankingLoss::new(&hyper, 1 << 20, n_items, &NegativeSampler::new(train, n_items))
    }

    #[test]
    fn a_softmax_over_too_many_items_is_refused_with_the_way_out() {
        let train = Histories::from_pairs(3000, &[(0, 0)]);
        let hyper = |name: &str| json!({"loss": name, "negatives": null, "temperature": null, "cosine": false});
        assert!(loss(hyper("softmax"), &train, 300_000).is_ok());
        let error = loss(hyper("softmax"), &train, 400_000).unwrap_err();
        assert!(error.fault.exit_code() == 78 && error.help.unwrap().contains("sampled-softmax"));
        assert!(loss(hyper("sampled-softmax"), &train, 400_000).is_ok());
    }

    #[test]
    fn the_correction_is_the_share_of_batches_that_hold_an_item() {
        // Item 0 has 3 of 4 train pairs, item 1 has one, item 2 none.
        let train = Histories::from_pairs(3, &[(0, 0), (1, 0), (2, 0), (2, 1)]);
        let sampler = NegativeSampler::new(&train, 3);
        let hyper = json!({"loss": "sampled-softmax", "negatives": 2, "temperature": null, "cosine": false});
        let loss = loss(hyper, &train, 3).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let pairs = [(0, 0), (1, 0), (2, 0), (2, 1)];
        let rounds = 20_000;
        let mut held = [0f64; 3];
        for _ in 0..rounds {
            let batch = [pairs[rng.random_range(0..4)], pairs[rng.random_range(0..4)]];
            let draw = loss.draw(&batch, &sampler, &mut rng);
            assert_eq!(draw.negatives.len(), 2);
            loss.items(&batch, &draw).iter().for_each(|&i| held[i as usize] += 1.0 / f64::from(rounds));
        }
        for (item, held) in held.iter().enumerate() {
            let want = f64::from(loss.log_inclusion(item as u32, 2, 2)).exp();
            // Standard deviation below 0.0036.
            assert!((held - want).abs() < 0.015, "item {item}: {held} is not {want}");
        }
    }

    #[test]
    fn negatives_of_bpr_are_unseen_and_held_out_items_occur() {
        let train = Histories::from_pairs(2, &[(0, 0), (0, 1), (1, 3)]);
        let sampler = NegativeSampler::new(&train, 4);
        let hyper = json!({"loss": "bpr", "negatives": 3, "temperature": null, "cosine": false});
        let loss = loss(hyper, &train, 4).unwrap();
        let pairs: Vec<(u32, u32)> = (0..40).map(|n| if n % 2 == 0 { (0, 0) } else { (1, 3) }).collect();
        let draw = loss.draw(&pairs, &sampler, &mut ChaCha8Rng::seed_from_u64(1));
        assert_eq!(draw.negatives.len(), 120);
        for (n, negatives) in draw.negatives.chunks(3).enumerate() {
            let seen = train.of(n % 2);
            assert!(negatives.iter().all(|j| !seen.contains(j)), "pair {n}: {negatives:?}");
        }
        // Items 2 and 3 are held out of user 0, item 2 of user 1.
        assert!(distinct(draw.negatives.chunks(6).flat_map(|c| c[..3].to_vec())) == [2, 3]);
    }
}
