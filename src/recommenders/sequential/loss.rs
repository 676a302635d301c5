//! The loss of a step, and the negatives that it needs.
//!
//! In: an [`Encoder`] with its weights, a [`Step`] (sequences, targets, negatives, views). Out: one number.
//!
//! * `bce`: mean over targets of `-ln sigmoid(y_t) - ln sigmoid(-y_j)`, j a negative of its own (arXiv 1808.09781, eq. 7).
//! * `softmax`: mean over targets of `-ln softmax(y)_t` over all items (arXiv 1904.06690, eq. 8), or over those that
//!   the user has not seen, which are those that are ranked.
//! * `sampled-softmax`: the same over the target and shared negatives j with logits `y - ln(n q)`, n draws from the
//!   distribution q (Bengio and Senecal 2008). A negative that is the target itself is left out for that target.
//! * views: NT-Xent with cosine similarity, over the 2N views of a batch (arXiv 2010.14395, eq. 2 and 9).

use burn::tensor::activation::{log_sigmoid, log_softmax};
use burn::tensor::{Int, Tensor, TensorData};
use rand::Rng;

use super::super::ops::{Excluded, linear_cross_entropy_excluding};
use super::super::optim::Vars;
use super::batches::Batch;
use super::encoder::{Dropout, Encoder};
use crate::device::ModelBackend;
use crate::interactions::Histories;

/// Logits of pairs that are left out.
const LEFT_OUT: f32 = -1e9;

/// Items that stand against the targets.
#[derive(Clone, Debug, PartialEq)]
pub enum Negatives {
    /// The whole catalogue, but what is excluded for a target.
    All(Option<Excluded>),
    /// One of its own for each target, `[targets]`.
    Own(Vec<u32>),
    /// The same ones for all targets.
    Shared {
        /// `[negatives]`, repeats allowed.
        items: Vec<u32>,
        /// `ln(n q)` of each of them.
        negative_logs: Vec<f32>,
        /// `ln(n q)` of each target.
        target_logs: Vec<f32>,
    },
}

/// Two views of each sequence of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Contrast {
    /// `[2 N]` sequences: those of the first view, then those of the second.
    pub views: Batch,
    /// Weight of the term.
    pub weight: f64,
    /// Temperature: similarities are divided by it.
    pub temperature: f64,
}

/// What one step learns from.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Sequences and targets.
    pub batch: Batch,
    /// What stands against the targets.
    pub negatives: Negatives,
    /// The contrastive term, if any.
    pub contrast: Option<Contrast>,
    /// Weight of the L2 term.
    pub l2: f64,
}

/// Item embeddings as a step reads them.
enum Items<B: ModelBackend> {
    Whole(Tensor<B, 2>),
    /// The rows of these items (ascending), so that a step costs what it touches and not what the catalogue is.
    Rows(Vec<u32>, Tensor<B, 2>),
}

impl<B: ModelBackend> Items<B> {
    fn read(encoder: &Encoder, vars: &Vars<B>, step: &Step) -> Self {
        let more: &[u32] = match &step.negatives {
            Negatives::All(_) => return Items::Whole(vars.get::<2>(encoder.items)),
            Negatives::Own(items) | Negatives::Shared { items, .. } => items,
        };
        let views = step.contrast.as_ref().map_or(&[][..], |c| &c.views.inputs);
        let read = [&step.batch.inputs[..], &step.batch.targets, more, views];
        let mut rows = read.concat();
        rows.sort_unstable();
        rows.dedup();
        let values = vars.rows(encoder.items, &rows);
        Items::Rows(rows, values)
    }

    fn of(&self, items: &[u32]) -> Tensor<B, 2> {
        match self {
            Items::Whole(table) => select(table.clone(), items),
            Items::Rows(rows, table) => {
                let place = |i: &u32| rows.binary_search(i).expect("all items of the step were read") as u32;
                select(table.clone(), &items.iter().map(place).collect::<Vec<u32>>())
            }
        }
    }
}

/// Rows of a matrix.
pub fn select<B: ModelBackend>(table: Tensor<B, 2>, rows: &[u32]) -> Tensor<B, 2> {
    let index: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
    let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [rows.len()]), &table.device());
    table.select(0, index)
}

/// Loss `[1]` of a step that has at least one target.
pub fn step_loss<B: ModelBackend>(
    encoder: &Encoder,
    vars: &Vars<B>,
    step: &Step,
    mut dropout: Option<&mut Dropout>,
) -> Tensor<B, 1> {
    let items = Items::read(encoder, vars, step);
    let batch = &step.batch;
    let states = encoder.encode(vars, items.of(&batch.inputs), &batch.lengths, dropout.as_deref_mut());
    let states = encoder.project(vars, select(states, &batch.places));
    let n = batch.targets.len();
    let bias_of = |rows: &[u32]| {
        let bias = encoder.bias.map(|bias| vars.get::<1>(bias).unsqueeze_dim::<2>(1));
        bias.map(|bias| select(bias, rows).reshape([rows.len()]))
    };
    let score = |of: &[u32]| {
        let y = (states.clone() * items.of(of)).sum_dim(1).reshape([n]);
        match bias_of(of) {
            Some(bias) => y + bias,
            None => y,
        }
    };
    let mut loss = match &step.negatives {
        Negatives::All(excluded) => {
            // The mask, if there is one, is the last row and no item.
            let table = match encoder.shape().mask_row {
                true => vars.get::<2>(encoder.items).narrow(0, 0, encoder.shape().n_items),
                false => vars.get::<2>(encoder.items),
            };
            let bias = encoder.bias.map(|bias| vars.get::<1>(bias));
            linear_cross_entropy_excluding(states.clone(), table, bias, &batch.targets, excluded.clone()).mean()
        }
        Negatives::Own(negatives) => {
            let (yes, no) = (score(&batch.targets), score(negatives));
            (log_sigmoid(yes) + log_sigmoid(no.neg())).mean().neg()
        }
        Negatives::Shared { items: drawn, negative_logs, target_logs } => {
            let device = states.device();
            let row = |values: &[f32], shape: [usize; 2]| {
                Tensor::<B, 2>::from_data(TensorData::new(values.to_vec(), shape), &device)
            };
            let m = drawn.len();
            let mut no = states.clone().matmul(items.of(drawn).transpose()) - row(negative_logs, [1, m]);
            if let Some(bias) = bias_of(drawn) {
                no = no + bias.reshape([1, m]);
            }
            let yes = score(&batch.targets).reshape([n, 1]) - row(target_logs, [n, 1]);
            let same =
                batch.targets.iter().flat_map(|t| drawn.iter().map(move |j| if t == j { LEFT_OUT } else { 0.0 }));
            let no = no + row(&same.collect::<Vec<f32>>(), [n, m]);
            log_softmax(Tensor::cat(vec![yes, no], 1), 1).slice([0..n, 0..1]).mean().neg()
        }
    };
    if step.l2 > 0.0 {
        let squares = items.of(&batch.targets).powi_scalar(2).sum();
        loss = loss + squares * (step.l2 / (2.0 * n as f64)) as f32;
    }
    if let Some(contrast) = &step.contrast {
        let views = &contrast.views;
        let states = encoder.encode(vars, items.of(&views.inputs), &views.lengths, dropout);
        let last = select(states, &views.last_places());
        loss = loss + nt_xent(last, contrast.temperature) * contrast.weight as f32;
    }
    loss
}

/// NT-Xent `[1]` of views `[2 N, dim]`, the n-th of the first half belonging to the n-th of the second half.
pub fn nt_xent<B: ModelBackend>(views: Tensor<B, 2>, temperature: f64) -> Tensor<B, 1> {
    let [both, _] = views.dims();
    let (half, device) = (both / 2, views.device());
    let norm = (views.clone() * views.clone()).sum_dim(1).sqrt().clamp_min(1e-12);
    let unit = views / norm;
    // A view is not compared to itself.
    let own: Vec<f32> = (0..both * both).map(|at| if at / both == at % both { LEFT_OUT } else { 0.0 }).collect();
    let own = Tensor::<B, 2>::from_data(TensorData::new(own, [both, both]), &device);
    let similarity = unit.clone().matmul(unit.transpose()) / temperature as f32 + own;
    let partner: Vec<i32> = (0..both).map(|n| ((n + half) % both) as i32).collect();
    let partner = Tensor::<B, 1, Int>::from_data(TensorData::new(partner, [both]), &device).reshape([both, 1]);
    log_softmax(similarity, 1).gather(1, partner).mean().neg()
}

/// Draws items in proportion to a power of their frequency in train, for the sampled softmax.
#[derive(Clone, Debug)]
pub struct SharedSampler {
    /// Running sums of the weights.
    sums: Vec<f64>,
}

impl SharedSampler {
    /// From the train histories. Every item counts one more time than it occurs, so that those that
    /// do not occur in train (held-out ones too) can be drawn.
    pub fn new(train: &Histories, n_items: usize, power: f64) -> Self {
        let mut counts = vec![1u64; n_items];
        for &item in train.items() {
            counts[item as usize] += 1;
        }
        let mut sum = 0.0;
        let sums = counts.iter().map(|&c| {
            sum += (c as f64).powf(power);
            sum
        });
        SharedSampler { sums: sums.collect() }
    }

    /// `n` items, with repeats, and what corrects the logits of them and of `targets`.
    pub fn draw(&self, n: usize, targets: &[u32], rng: &mut impl Rng) -> Negatives {
        let total = self.sums.last().copied().unwrap_or(0.0);
        let log = |item: u32| {
            let below = if item == 0 { 0.0 } else { self.sums[item as usize - 1] };
            (n as f64 * (self.sums[item as usize] - below) / total).ln() as f32
        };
        let mut draw = || {
            let at = rng.random::<f64>() * total;
            self.sums.partition_point(|&sum| sum <= at).min(self.sums.len() - 1) as u32
        };
        let items: Vec<u32> = (0..n).map(|_| draw()).collect();
        Negatives::Shared {
            negative_logs: items.iter().map(|&i| log(i)).collect(),
            target_logs: targets.iter().map(|&i| log(i)).collect(),
            items,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn shared_negatives_follow_the_power_of_their_frequency_and_none_is_impossible() {
        // Item 0 occurs 15 times, item 1 three times, item 2 (held out) never.
        let pairs: Vec<(u32, u32)> = (0..18).map(|n| (0, u32::from(n >= 15))).collect();
        let sampler = SharedSampler::new(&Histories::from_pairs(1, &pairs), 3, 0.5);
        let n = 70_000;
        let drawn = sampler.draw(n, &[2, 0], &mut ChaCha8Rng::seed_from_u64(1));
        let Negatives::Shared { items, negative_logs, target_logs } = drawn else { panic!("not shared") };
        // Weights 4, 2 and 1 of 7.
        for (item, share) in [(0u32, 4.0), (1, 2.0), (2, 1.0)] {
            let count = items.iter().filter(|&&i| i == item).count() as f64;
            assert!((count - share * 1e4).abs() < 500.0, "item {item}: {count}");
        }
        for (item, log) in items.iter().zip(&negative_logs) {
            assert!((log - [4e4f32, 2e4, 1e4][*item as usize].ln()).abs() < 1e-4);
        }
        assert!((target_logs[0] - 1e4f32.ln()).abs() < 1e-4 && (target_logs[1] - 4e4f32.ln()).abs() < 1e-4);
    }

    #[test]
    fn equal_views_are_told_from_others() {
        let views = |values: [f32; 8]| {
            let t = Tensor::<Flex, 1>::from_floats(values, &Default::default()).reshape([4, 2]);
            nt_xent(t, 0.1).into_scalar()
        };
        let near = views([1.0, 0.0, 0.0, 1.0, 2.0, 0.1, 0.1, 3.0]);
        let far = views([1.0, 0.0, 0.0, 1.0, 0.1, 3.0, 2.0, 0.1]);
        assert!(near < 0.01 && far > 5.0, "{near} {far}");
        // A state of length 0 gives no NaN.
        assert!(views([0.0; 8]).is_finite());
    }
}
