//! The CPU kernel of attention: one sequence after the other, each head in a working space that fits the cache.
//!
//! In: slices `[batch, length, dim]`. Out: such slices. Threads take sequences, and every sum stays within a sequence, so
//! the result is the same to the bit for any number of them. Of the weights `[length, length]` those of one
//! head are held at a time; the backward pass makes them again from the logarithm of their sums, as in
//! FlashAttention (arXiv 2205.14135).

use rayon::prelude::*;

use super::dropout::Choice;
use super::exp::{exponentials, greatest};
use super::products::{COLUMNS, Left, Part, ROWS, padded, product};

/// Shape and mask.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// Numbers from one sequence's beginning to the next one's, in positions.
    pub length: usize,
    /// Numbers of a position.
    pub dim: usize,
    /// Divides `dim`.
    pub heads: usize,
    /// Real positions of each sequence.
    pub lengths: &'a [u32],
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
    /// Which weights are dropped.
    pub dropout: Option<Choice>,
    /// What each position of distance takes off a score, one number per head; empty = nothing.
    pub slopes: &'a [f32],
}

/// Queries, keys and values `[batch, length, dim]`.
pub type Operands<'a> = [&'a [f32]; 3];

impl Plan<'_> {
    fn size(&self) -> usize {
        self.dim / self.heads
    }

    /// Positions of a sequence that take part.
    fn real(&self, sequence: usize) -> usize {
        (self.lengths[sequence] as usize).clamp(1, self.length)
    }

    /// Positions that query `row` of `n` sees.
    fn seen(&self, row: usize, n: usize) -> usize {
        if self.causal { row + 1 } else { n }
    }

    fn part(&self, part: Part) -> Part {
        if self.causal { part } else { Part::All }
    }

    /// The number of a row of weights in the whole `[batch, heads, length]`.
    fn place(&self, sequence: usize, head: usize, row: usize) -> u64 {
        ((sequence * self.heads + head) * self.length + row) as u64
    }
}

/// Working space of a thread: matrices of one head with padded rows.
#[derive(Default)]
struct Space {
    /// Rows `[n]` of `size`.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    result: Vec<f32>,
    /// Rows `[size]` of `n`.
    turned: Vec<f32>,
    /// Rows `[n]` of `n`.
    weights: Vec<f32>,
    d_weights: Vec<f32>,
    factors: Vec<f32>,
}

/// Padded sizes of one head: positions as rows, positions as columns, `size` as columns.
#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    size: usize,
    rows: usize,
    columns: usize,
    width: usize,
}

impl Sizes {
    fn of(n: usize, size: usize) -> Sizes {
        Sizes { n, size, rows: padded(n, ROWS), columns: padded(n, COLUMNS), width: padded(size, COLUMNS) }
    }

    /// A head's part of a sequence `[length, dim]` into rows of `width`, scaled.
    fn gather(&self, to: &mut Vec<f32>, from: &[f32], dim: usize, head: usize, scale: f32) {
        to.clear();
        to.resize(self.rows * self.width, 0.0);
        for (to, from) in to.chunks_exact_mut(self.width).zip(from.chunks_exact(dim)).take(self.n) {
            for (t, f) in to.iter_mut().zip(&from[head * self.size..][..self.size]) {
                *t = f * scale;
            }
        }
    }

    /// Rows of `width` back into a head's part of a sequence.
    fn scatter(&self, from: &[f32], to: &mut [f32], dim: usize, head: usize) {
        for (to, from) in to.chunks_exact_mut(dim).zip(from.chunks_exact(self.width)).take(self.n) {
            to[head * self.size..][..self.size].copy_from_slice(&from[..self.size]);
        }
    }

    /// `[n]` rows of `width` as `[size]` rows of `columns`.
    fn turn(&self, to: &mut Vec<f32>, from: &[f32]) {
        to.clear();
        to.resize(self.size * self.columns, 0.0);
        for (n, from) in from.chunks_exact(self.width).take(self.n).enumerate() {
            for (d, x) in from[..self.size].iter().enumerate() {
                to[d * self.columns + n] = *x;
            }
        }
    }
}

/// The result `[batch, length, dim]`, 0 at padding, and the logarithms of each query's sum of exponentials
/// `[batch, heads, length]`.
pub fn forward(plan: Plan<'_>, operands: Operands<'_>) -> (Vec<f32>, Vec<f32>) {
    let stride = plan.length * plan.dim;
    let mut out = vec![0f32; operands[0].len()];
    let mut logs = vec![0f32; plan.lengths.len() * plan.heads * plan.length];
    if out.is_empty() {
        return (out, logs);
    }
    let sequences = out.par_chunks_exact_mut(stride).zip(logs.par_chunks_exact_mut(plan.heads * plan.length));
    sequences.enumerate().for_each_init(Space::default, |space, (sequence, (out, logs))| {
        let [q, k, v] = operands.map(|x| &x[sequence * stride..][..stride]);
        let sizes = Sizes::of(plan.real(sequence), plan.size());
        for (head, logs) in logs.chunks_exact_mut(plan.length).enumerate() {
            scores(plan, sizes, space, [q, k], head);
            sizes.gather(&mut space.v, v, plan.dim, head, 1.0);
            for (row, log) in logs[..sizes.n].iter_mut().enumerate() {
                let all = &mut space.weights[row * sizes.columns..][..sizes.columns];
                let (seen, hidden) = all.split_at_mut(plan.seen(row, sizes.n));
                let top = greatest(seen);
                let sum = exponentials(seen, top);
                *log = top + sum.ln();
                hidden.fill(0.0);
                let share = 1.0 / sum;
                if let Some(choice) = plan.dropout {
                    space.factors.resize(sizes.n, 0.0);
                    choice.factors(plan.place(sequence, head, row), &mut space.factors[..seen.len()]);
                    seen.iter_mut().zip(&space.factors).for_each(|(w, f)| *w *= share * f);
                } else {
                    seen.iter_mut().for_each(|w| *w *= share);
                }
            }
            space.result.resize(sizes.rows * sizes.width, 0.0);
            product(
                (&mut space.result, sizes.width),
                Left(&space.weights, sizes.columns, 1),
                (&space.v, sizes.width),
                [sizes.rows, sizes.width, sizes.n],
                plan.part(Part::DepthToRow),
            );
            sizes.scatter(&space.result, out, plan.dim, head);
        }
    });
    (out, logs)
}

/// Scores of one head into `space.weights`; leaves scaled queries and the keys there too.
fn scores(plan: Plan<'_>, sizes: Sizes, space: &mut Space, [q, k]: [&[f32]; 2], head: usize) {
    sizes.gather(&mut space.q, q, plan.dim, head, 1.0 / (sizes.size as f32).sqrt());
    sizes.gather(&mut space.k, k, plan.dim, head, 1.0);
    sizes.turn(&mut space.turned, &space.k);
    space.weights.clear();
    space.weights.resize(sizes.rows * sizes.columns, 0.0);
    product(
        (&mut space.weights, sizes.columns),
        Left(&space.q, sizes.width, 1),
        (&space.turned, sizes.columns),
        [sizes.rows, sizes.columns, sizes.size],
        plan.part(Part::ColumnsToRow),
    );
    let Some(&slope) = plan.slopes.get(head) else { return };
    for (row, scores) in space.weights.chunks_exact_mut(sizes.columns).take(sizes.n).enumerate() {
        let seen = scores[..plan.seen(row, sizes.n)].iter_mut().enumerate();
        seen.for_each(|(column, x)| *x -= slope * row.abs_diff(column) as f32);
    }
}

/// Gradients of queries, keys and values from that of the result. `out` and `logs` are what [`forward`] gave.
pub fn backward(plan: Plan<'_>, operands: Operands<'_>, out: &[f32], logs: &[f32], d_out: &[f32]) -> [Vec<f32>; 3] {
    let stride = plan.length * plan.dim;
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0f32; out.len()]);
    if out.is_empty() {
        return [dq, dk, dv];
    }
    let sequences = dq.par_chunks_exact_mut(stride).zip(dk.par_chunks_exact_mut(stride));
    let sequences = sequences.zip(dv.par_chunks_exact_mut(stride)).enumerate();
    sequences.for_each_init(Space::default, |space, (sequence, ((dq, dk), dv))| {
        let part = |x: &[f32]| -> std::ops::Range<usize> { sequence * stride..sequence * stride + stride.min(x.len()) };
        let [q, k, v] = operands.map(|x| &x[part(x)]);
        let (out, d_out) = (&out[part(out)], &d_out[part(d_out)]);
        for head in 0..plan.heads {
            let logs = &logs[(sequence * plan.heads + head) * plan.length..][..plan.length];
            head_backward(plan, space, (sequence, head), [q, k, v], [out, d_out], logs, [&mut *dq, &mut *dk, &mut *dv]);
        }
    });
    [dq, dk, dv]
}

fn head_backward(
    plan: Plan<'_>,
    space: &mut Space,
    (sequence, head): (usize, usize),
    [q, k, v]: Operands<'_>,
    [out, d_out]: [&[f32]; 2],
    logs: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let sizes = Sizes::of(plan.real(sequence), plan.size());
    let (n, dim) = (sizes.n, plan.dim);
    scores(plan, sizes, space, [q, k], head);
    sizes.gather(&mut space.d_out, d_out, dim, head, 1.0);
    sizes.gather(&mut space.v, v, dim, head, 1.0);
    sizes.turn(&mut space.turned, &space.v);
    space.d_weights.clear();
    space.d_weights.resize(sizes.rows * sizes.columns, 0.0);
    // d weights = d out x v'.
    product(
        (&mut space.d_weights, sizes.columns),
        Left(&space.d_out, sizes.width, 1),
        (&space.turned, sizes.columns),
        [sizes.rows, sizes.columns, sizes.size],
        plan.part(Part::ColumnsToRow),
    );
    space.factors.resize(n, 0.0);
    space.factors.fill(1.0);
    for (row, &log) in logs[..n].iter().enumerate() {
        let at = row * sizes.columns;
        let seen = plan.seen(row, n);
        let (weights, hidden) = space.weights[at..at + sizes.columns].split_at_mut(seen);
        let (d_weights, d_hidden) = space.d_weights[at..at + sizes.columns].split_at_mut(seen);
        hidden.fill(0.0);
        d_hidden.fill(0.0);
        exponentials(weights, log);
        if let Some(choice) = plan.dropout {
            choice.factors(plan.place(sequence, head, row), &mut space.factors[..seen]);
        }
        // The softmax's rule needs the sum of weight * d weight, which is the product of the row's result and its
        // gradient.
        let columns = row * dim + head * sizes.size..row * dim + (head + 1) * sizes.size;
        let mean: f32 = out[columns.clone()].iter().zip(&d_out[columns]).map(|(o, d)| o * d).sum();
        for ((w, d), f) in weights.iter_mut().zip(d_weights).zip(&space.factors) {
            *d = *w * (*d * f - mean);
            *w *= f;
        }
    }
    space.result.resize(sizes.rows * sizes.width, 0.0);
    let Space { q, k, d_out, weights, d_weights, result, .. } = space;
    let shape = [sizes.rows, sizes.width, n];
    let (from_row, to_row) = (plan.part(Part::DepthFromRow), plan.part(Part::DepthToRow));
    // d v = weights' x d out; d k = d scores' x q / sqrt(size), the scaled queries; d q = d scores x k / sqrt(size).
    product((result, sizes.width), Left(weights, 1, sizes.columns), (d_out, sizes.width), shape, from_row);
    sizes.scatter(result, dv, dim, head);
    product((result, sizes.width), Left(d_weights, 1, sizes.columns), (q, sizes.width), shape, from_row);
    sizes.scatter(result, dk, dim, head);
    product((result, sizes.width), Left(d_weights, sizes.columns, 1), (k, sizes.width), shape, to_row);
    let scale = 1.0 / (sizes.size as f32).sqrt();
    result.iter_mut().for_each(|x| *x *= scale);
    sizes.scatter(result, dq, dim, head);
}
