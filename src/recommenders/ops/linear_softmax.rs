//! The CPU kernel of the softmax cross-entropy of a linear layer: blocks of rows, each with its logits in cache.
//!
//! In: slices. Out: a loss per row, and the gradients. Rows are cut into groups by the shapes alone; each group sums
//! its part of the table's gradient block after block, and the groups' parts are added in their order: the
//! result is the same to the bit for any number of threads. One thread holds the logits of one block.

use rayon::prelude::*;

use super::exp::{exponentials, greatest};
use super::gemm::multiply;

/// What goes in; row-major.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// `[rows, dim]`.
    pub states: &'a [f32],
    /// `[classes, dim]`.
    pub table: &'a [f32],
    /// `[classes]`.
    pub bias: Option<&'a [f32]>,
    /// `[rows]`, each below `classes`.
    pub targets: &'a [u32],
    /// Classes that are left out of a row's softmax, unless they are its target.
    pub excluded: Option<&'a Excluded>,
    /// At least 1.
    pub dim: usize,
    /// Whether the table's gradient is not wanted; it is empty then.
    pub fixed: bool,
}

/// Classes that are left out, per row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excluded {
    /// Lists of classes one after another; rows may share one.
    pub classes: Vec<u32>,
    /// `[rows]`: where in `classes` each row's list begins and ends.
    pub ranges: Vec<(u32, u32)>,
}

impl Excluded {
    /// The classes that are left out of a row.
    pub fn of(&self, row: usize) -> &[u32] {
        let (from, to) = self.ranges[row];
        &self.classes[from as usize..to as usize]
    }
}

/// Logit of a class that is left out.
pub const LEFT_OUT: f32 = -1e9;

/// What comes out beside the losses.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[rows, dim]`.
    pub states: Vec<f32>,
    /// `[classes, dim]`.
    pub table: Vec<f32>,
    /// `[classes]`; empty without a bias.
    pub bias: Vec<f32>,
}

/// Numbers of a block's logits: 1 MiB, about half of a second-level cache.
const BLOCK: usize = 1 << 18;

/// Rows of a block: enough to make up for packing the table, and few enough for many blocks.
const BLOCK_ROWS: std::ops::RangeInclusive<usize> = 16..=128;

/// Numbers of all groups' tables together: 256 MiB. A table takes part at least twice.
const GROUPS_MEMORY: usize = 1 << 26;

/// Groups at most, so threads at most.
const GROUPS: usize = 16;

impl Layer<'_> {
    fn classes(&self) -> usize {
        self.table.len() / self.dim
    }

    fn block_rows(&self) -> usize {
        (BLOCK / self.classes().max(1)).clamp(*BLOCK_ROWS.start(), *BLOCK_ROWS.end())
    }

    /// Rows of a group; a whole number of blocks.
    fn group_rows(&self) -> usize {
        let blocks = self.targets.len().div_ceil(self.block_rows());
        let groups = (GROUPS_MEMORY / self.table.len().max(1)).clamp(2, GROUPS);
        blocks.div_ceil(groups).max(1) * self.block_rows()
    }

    /// Logits of rows `first..first + targets.len()` into `logits`, made their exponentials less the greatest. Calls
    /// `row(n, row, sum, loss)` for each.
    fn block(&self, first: usize, logits: &mut [f32], mut row: impl FnMut(usize, &mut [f32], f32, f32)) {
        let (dim, classes) = (self.dim, self.classes());
        let rows = logits.len() / classes;
        let states = &self.states[first * dim..][..rows * dim];
        multiply(logits, [rows, classes, dim], (states, dim, 1), (self.table, 1, dim), false);
        for (n, logits) in logits.chunks_exact_mut(classes).enumerate() {
            if let Some(bias) = self.bias {
                logits.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
            let target = logits[self.targets[first + n] as usize];
            if let Some(excluded) = self.excluded {
                excluded.of(first + n).iter().for_each(|&class| logits[class as usize] = LEFT_OUT);
                logits[self.targets[first + n] as usize] = target;
            }
            let top = greatest(logits);
            let sum = exponentials(logits, top);
            row(n, logits, sum, sum.ln() + (top - target));
        }
    }
}

/// `-ln softmax(states table' + bias)[target]` of each row.
pub fn losses(layer: Layer<'_>) -> Vec<f32> {
    let mut losses = vec![0f32; layer.targets.len()];
    let step = layer.block_rows();
    losses.par_chunks_mut(step).enumerate().for_each_init(
        || vec![0f32; step * layer.classes()],
        |logits, (n, losses)| {
            let logits = &mut logits[..losses.len() * layer.classes()];
            layer.block(n * step, logits, |n, _, _, loss| losses[n] = loss);
        },
    );
    losses
}

/// The losses, and the gradients of their sum weighted by `weights [rows]` (1 each without).
pub fn losses_and_gradients(layer: Layer<'_>, weights: Option<&[f32]>) -> (Vec<f32>, Gradients) {
    let (dim, rows) = (layer.dim, layer.targets.len());
    let step = layer.group_rows();
    let (mut losses, mut states) = (vec![0f32; rows], vec![0f32; rows * dim]);
    let groups = losses.par_chunks_mut(step).zip(states.par_chunks_mut(step * dim)).enumerate();
    let parts: Vec<(Vec<f32>, Vec<f32>)> =
        groups.map(|(n, (losses, states))| group(layer, weights, n * step, losses, states)).collect();
    let mut parts = parts.into_iter();
    let (mut table, mut bias) = parts.next().unwrap_or_default();
    table.resize(if layer.fixed { 0 } else { layer.table.len() }, 0.0);
    bias.resize(layer.bias.map_or(0, <[f32]>::len), 0.0);
    for (t, b) in parts {
        table.par_chunks_mut(1 << 16).zip(t.par_chunks(1 << 16)).for_each(|(sum, x)| add(sum, x));
        add(&mut bias, &b);
    }
    (losses, Gradients { states, table, bias })
}

/// One group of rows from `first` on: writes its losses and its states' gradients, gives its parts of the
/// others.
fn group(
    layer: Layer<'_>,
    weights: Option<&[f32]>,
    first: usize,
    losses: &mut [f32],
    d_states: &mut [f32],
) -> (Vec<f32>, Vec<f32>) {
    let (dim, classes, step) = (layer.dim, layer.classes(), layer.block_rows());
    let mut d_table = vec![0f32; if layer.fixed { 0 } else { classes * dim }];
    let mut d_bias = vec![0f32; layer.bias.map_or(0, <[f32]>::len)];
    let mut logits = vec![0f32; step.min(losses.len()) * classes];
    let (mut scaled, mut scales) = (vec![0f32; step * dim], vec![0f32; step]);
    for (block, (losses, d_states)) in losses.chunks_mut(step).zip(d_states.chunks_mut(step * dim)).enumerate() {
        let (first, rows) = (first + block * step, losses.len());
        let logits = &mut logits[..rows * classes];
        // A row of the softmax's gradient is `(exponentials - sum at the target) * weight / sum`. The factor goes
        // to the narrow operands instead: no pass over the wide one.
        layer.block(first, logits, |n, row, sum, loss| {
            losses[n] = loss;
            row[layer.targets[first + n] as usize] -= sum;
            let scale = weights.map_or(1.0, |w| w[first + n]) / sum;
            scales[n] = scale;
            let state = &layer.states[(first + n) * dim..][..dim];
            scaled[n * dim..][..dim].iter_mut().zip(state).for_each(|(s, x)| *s = x * scale);
            d_bias.iter_mut().zip(row.iter()).for_each(|(d, x)| *d += scale * x);
        });
        multiply(d_states, [rows, dim, classes], (logits, classes, 1), (layer.table, dim, 1), false);
        for (row, scale) in d_states.chunks_exact_mut(dim).zip(&scales) {
            row.iter_mut().for_each(|x| *x *= scale);
        }
        if !layer.fixed {
            multiply(&mut d_table, [classes, dim, rows], (logits, 1, classes), (&scaled[..rows * dim], dim, 1), true);
        }
    }
    (d_table, d_bias)
}

fn add(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(s, x)| *s += x);
}
