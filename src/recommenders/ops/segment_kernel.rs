//! The CPU kernel of attention within segments: one key head of one segment after the other, in blocks of queries.
//!
//! In: slices of rows. Out: such slices. Threads take (segment, key head) pairs, and no sum is split between them, so
//! the result is the same to the bit for any number of threads. Weights are held for a block of queries at a time; the
//! backward pass makes them again from the logarithm of their sums, as in FlashAttention (arXiv 2205.14135).

use rayon::prelude::*;

use super::exp::{exponentials, greatest};
use super::gemm::multiply;
use super::segment_attention::Heads;

/// Shape and mask.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// Shape of the heads.
    pub heads: Heads,
    /// Lengths of the segments.
    pub segments: &'a [usize],
}

/// Queries that are done at once; keys beyond the last of them are not looked at.
const BLOCK: usize = 64;

/// One segment with one key head.
#[derive(Clone, Copy)]
struct Task {
    start: usize,
    len: usize,
    key_head: usize,
}

/// Part of a task: one query head, queries `from..from + rows` of the segment.
#[derive(Clone, Copy)]
struct Piece {
    head: usize,
    from: usize,
    rows: usize,
}

impl Plan<'_> {
    fn tasks(&self) -> Vec<Task> {
        let mut start = 0;
        let mut all = Vec::new();
        for &len in self.segments.iter().filter(|len| **len > 0) {
            all.extend((0..self.heads.key).map(|key_head| Task { start, len, key_head }));
            start += len;
        }
        all
    }

    fn widths(&self) -> [usize; 2] {
        [self.heads.query * self.heads.size, self.heads.key * self.heads.size]
    }

    fn pieces(&self, task: Task) -> impl Iterator<Item = Piece> {
        let group = self.heads.query / self.heads.key;
        (0..group).flat_map(move |member| {
            (0..task.len).step_by(BLOCK).map(move |from| {
                let head = task.key_head * group + member;
                Piece { head, from, rows: BLOCK.min(task.len - from) }
            })
        })
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.size as f32).sqrt()
    }

    /// Where the first number of a piece's queries lies.
    fn of_queries(&self, task: Task, piece: Piece) -> usize {
        (task.start + piece.from) * self.widths()[0] + piece.head * self.heads.size
    }

    /// Where the first number of a task's keys lies.
    fn of_keys(&self, task: Task) -> usize {
        task.start * self.widths()[1] + task.key_head * self.heads.size
    }

    /// Scaled scores of a piece, `[rows, from + rows]`; what a query does not see is left in.
    fn scores(&self, task: Task, piece: Piece, [q, k]: [&[f32]; 2], out: &mut Vec<f32>) {
        let ([query, key], size) = (self.widths(), self.heads.size);
        let seen = piece.from + piece.rows;
        out.resize(piece.rows * seen, 0.0);
        let q = &q[self.of_queries(task, piece)..];
        multiply(out, [piece.rows, seen, size], (q, query, 1), (&k[self.of_keys(task)..], 1, key), false);
        let scale = self.scale();
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

/// The result `[n, query * size]`, and the logarithms of each query's sum of exponentials `[n, query]`.
pub fn forward(plan: Plan<'_>, [q, k, v]: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
    let ([query, key], size) = (plan.widths(), plan.heads.size);
    let tasks = plan.tasks();
    let parts: Vec<(Vec<f32>, Vec<f32>)> = tasks
        .par_iter()
        .map(|&task| {
            let (mut weights, mut all, mut logs) = (Vec::new(), Vec::new(), Vec::new());
            let mut result = vec![0f32; BLOCK * size];
            for piece in plan.pieces(task) {
                plan.scores(task, piece, [q, k], &mut weights);
                let width = piece.from + piece.rows;
                for (row, weights) in weights.chunks_exact_mut(width).enumerate() {
                    let (seen, hidden) = weights.split_at_mut(piece.from + row + 1);
                    let top = greatest(seen);
                    let sum = exponentials(seen, top);
                    logs.push(top + sum.ln());
                    hidden.fill(0.0);
                    let share = 1.0 / sum;
                    seen.iter_mut().for_each(|w| *w *= share);
                }
                let shape = [piece.rows, size, width];
                let result = &mut result[..piece.rows * size];
                multiply(result, shape, (&weights, width, 1), (&v[plan.of_keys(task)..], key, 1), false);
                all.extend_from_slice(result);
            }
            (all, logs)
        })
        .collect();
    let (mut out, mut logs) = (vec![0f32; q.len()], vec![0f32; q.len() / query.max(1) * plan.heads.query]);
    for (task, (all, of_rows)) in tasks.into_iter().zip(parts) {
        let (mut all, mut of_rows) = (all.chunks_exact(size), of_rows.into_iter());
        for piece in plan.pieces(task) {
            for row in piece.from..piece.from + piece.rows {
                let at = task.start + row;
                let from = all.next().expect("a result per query");
                out[at * query + piece.head * size..][..size].copy_from_slice(from);
                logs[at * plan.heads.query + piece.head] = of_rows.next().expect("a logarithm per query");
            }
        }
    }
    (out, logs)
}

/// Gradients of queries, keys and values from that of the result; `out` and `logs` are what [`forward`] gave.
pub fn backward(plan: Plan<'_>, operands: [&[f32]; 3], results: [&[f32]; 2], logs: &[f32]) -> [Vec<f32>; 3] {
    let ([query, key], size) = (plan.widths(), plan.heads.size);
    let tasks = plan.tasks();
    let parts: Vec<[Vec<f32>; 3]> =
        tasks.par_iter().map(|&task| task_backward(plan, task, operands, results, logs)).collect();
    let mut grads = operands.map(|x| vec![0f32; x.len()]);
    for (task, [dq, dk, dv]) in tasks.into_iter().zip(parts) {
        let mut rows = dq.chunks_exact(size);
        for piece in plan.pieces(task) {
            for row in 0..piece.rows {
                let at = plan.of_queries(task, piece) + row * query;
                grads[0][at..at + size].copy_from_slice(rows.next().expect("a row per query"));
            }
        }
        for (grad, part) in grads[1..].iter_mut().zip([dk, dv]) {
            for (row, from) in part.chunks_exact(size).enumerate() {
                grad[plan.of_keys(task) + row * key..][..size].copy_from_slice(from);
            }
        }
    }
    grads
}

/// Of one task: rows of the queries in the order of the pieces, of keys and of values in theirs.
fn task_backward(
    plan: Plan<'_>,
    task: Task,
    [q, k, v]: [&[f32]; 3],
    [out, d_out]: [&[f32]; 2],
    logs: &[f32],
) -> [Vec<f32>; 3] {
    let ([query, key], size, scale) = (plan.widths(), plan.heads.size, plan.scale());
    let (k_here, v_here) = (&k[plan.of_keys(task)..], &v[plan.of_keys(task)..]);
    let (mut weights, mut d_weights) = (Vec::new(), Vec::new());
    let (mut dk, mut dv) = (vec![0f32; task.len * size], vec![0f32; task.len * size]);
    let (mut dq, mut result) = (Vec::new(), vec![0f32; BLOCK * size]);
    for piece in plan.pieces(task) {
        let width = piece.from + piece.rows;
        let (rows, at) = (piece.rows, plan.of_queries(task, piece));
        plan.scores(task, piece, [q, k], &mut weights);
        d_weights.resize(rows * width, 0.0);
        multiply(&mut d_weights, [rows, width, size], (&d_out[at..], query, 1), (v_here, 1, key), false);
        for (row, (weights, d_weights)) in
            weights.chunks_exact_mut(width).zip(d_weights.chunks_exact_mut(width)).enumerate()
        {
            let (seen, hidden) = weights.split_at_mut(piece.from + row + 1);
            exponentials(seen, logs[(task.start + piece.from + row) * plan.heads.query + piece.head]);
            hidden.fill(0.0);
            // The softmax's rule needs the sum of weight * d weight: the product of the row's result and its gradient.
            let here = at + row * query..at + row * query + size;
            let mean: f32 = out[here.clone()].iter().zip(&d_out[here]).map(|(o, d)| o * d).sum();
            d_weights.iter_mut().zip(weights.iter()).for_each(|(d, w)| *d = w * (*d - mean) * scale);
        }
        // d v += weights' x d out; d k += d scores' x q; d q = d scores x k.
        let back = [width, size, rows];
        multiply(&mut dv[..width * size], back, (&weights, 1, width), (&d_out[at..], query, 1), true);
        multiply(&mut dk[..width * size], back, (&d_weights, 1, width), (&q[at..], query, 1), true);
        let result = &mut result[..rows * size];
        multiply(result, [rows, size, width], (&d_weights, width, 1), (k_here, key, 1), false);
        dq.extend_from_slice(result);
    }
    [dq, dk, dv]
}
