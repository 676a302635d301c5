//! Products of pairs of rows: what BPR scores, without gathering the rows.
//!
//! In: tables `[n, dim]` and `[m, dim]` and pairs of their rows. Out: a product per pair. On the CPU the gradient of a
//! table is one sparse product, each row summed in the order of its pairs whatever the number of threads.

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Shape, Tensor, TensorData};
use rayon::prelude::*;

use super::fused::{FusedBackend, Operation, Pass, lift, lower};
use super::widest::{Work, multiply_add, widest};
use crate::recommenders::sparse::{Csr, csr_matmul};

/// `<a[rows.0[n]], b[rows.1[n]]>` for each pair n: `[pairs]`. Gradients flow to `a [n, dim]` and `b [m, dim]`.
///
/// # Panics
/// When the shapes do not fit or there is no such row (our bug).
pub fn row_dots<B: FusedBackend>(a: Tensor<B, 2>, b: Tensor<B, 2>, rows: (&[u32], &[u32])) -> Tensor<B, 1> {
    let ([n, dim], [m, width]) = (a.dims(), b.dims());
    assert!(dim == width && dim > 0 && rows.0.len() == rows.1.len(), "tables of {dim} and {width} columns");
    let inside = |rows: &[u32], n: usize| rows.iter().all(|&r| (r as usize) < n);
    assert!(inside(rows.0, n) && inside(rows.1, m), "a row that is none of {n} or of {m}");
    let operation = RowDots { rows: [rows.0.into(), rows.1.into()], dim };
    lift(B::fused(operation, [lower(a), lower(b)]))
}

#[derive(Clone, Debug)]
struct RowDots {
    rows: [Arc<[u32]>; 2],
    dim: usize,
}

/// Pairs that a thread takes at once.
const CHUNK: usize = 4096;

/// Products of one chunk.
struct Chunk<'a> {
    a: &'a [f32],
    b: &'a [f32],
    rows: (&'a [u32], &'a [u32]),
    dim: usize,
    out: &'a mut [f32],
}

impl Work for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for ((out, &i), &j) in self.out.iter_mut().zip(self.rows.0).zip(self.rows.1) {
            let x = &self.a[i as usize * self.dim..][..self.dim];
            let y = &self.b[j as usize * self.dim..][..self.dim];
            // Sixteen sums, so that they fit registers of any width.
            let mut sums = [0f32; 16];
            let (x, y) = (x.chunks_exact(16), y.chunks_exact(16));
            let rest: f32 = x.remainder().iter().zip(y.remainder()).map(|(x, y)| x * y).sum();
            for (x, y) in x.zip(y) {
                #[allow(clippy::needless_range_loop)] // the form that becomes vector code
                for n in 0..16 {
                    sums[n] = multiply_add::<FMA>(x[n], y[n], sums[n]);
                }
            }
            *out = sums.iter().sum::<f32>() + rest;
        }
    }
}

/// `[rows, dim]`: `sum over the pairs of a row of upstream * other[its row there]`.
fn gradient(of: &[u32], n_rows: usize, others: (&[u32], &[f32]), upstream: &[f32], dim: usize) -> Vec<f32> {
    let mut offsets = vec![0usize; n_rows + 1];
    of.iter().for_each(|&row| offsets[row as usize + 1] += 1);
    for row in 0..n_rows {
        offsets[row + 1] += offsets[row];
    }
    let mut next = offsets.clone();
    let (mut columns, mut values) = (vec![0u32; of.len()], vec![0f32; of.len()]);
    for ((&row, &other), &weight) in of.iter().zip(others.0).zip(upstream) {
        let at = next[row as usize];
        (columns[at], values[at]) = (other, weight);
        next[row as usize] += 1;
    }
    let mut out = vec![0f32; n_rows * dim];
    csr_matmul(&Csr::from_parts(n_rows, others.1.len() / dim, offsets, columns, values), others.1, dim, &mut out);
    out
}

impl Operation<2> for RowDots {
    type Saved = ();

    fn plain<B: Backend>(&self, [a, b]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        let n = self.rows[0].len();
        let (a, b): (Tensor<B, 2>, Tensor<B, 2>) = (lift(a), lift(b));
        let index = |rows: &[u32]| {
            let rows: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
            Tensor::<B, 1, Int>::from_data(TensorData::new(rows, [n]), &a.device())
        };
        let (rows, others) = (index(&self.rows[0]), index(&self.rows[1]));
        lower((a.clone().select(0, rows) * b.select(0, others)).sum_dim(1).reshape([n]))
    }

    fn shape(&self, _operands: [Shape; 2]) -> Shape {
        Shape::new([self.rows[0].len()])
    }

    fn forward(&self, [a, b]: [&[f32]; 2]) -> Vec<f32> {
        let mut all = vec![0f32; self.rows[0].len()];
        let rows = self.rows[0].par_chunks(CHUNK).zip(self.rows[1].par_chunks(CHUNK));
        let chunks = all.par_chunks_mut(CHUNK).zip(rows);
        chunks.for_each(|(out, rows)| widest(Chunk { a, b, rows, dim: self.dim, out }));
        all
    }

    fn forward_saved(&self, operands: [&[f32]; 2]) -> (Vec<f32>, ()) {
        (self.forward(operands), ())
    }

    fn backward(&self, pass: Pass<'_, (), 2>) -> [Vec<f32>; 2] {
        let ([a, b], [rows, others], dim) = (pass.operands, &self.rows, self.dim);
        let one = |wanted: bool, of: &[u32], table: &[f32], others: (&[u32], &[f32])| match wanted {
            true => gradient(of, table.len() / dim, others, pass.upstream, dim),
            false => Vec::new(),
        };
        [one(pass.wanted[0], rows, a, (others, b)), one(pass.wanted[1], others, b, (rows, a))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};

    type Ad = Autodiff<Flex>;

    /// Values and gradients, fused or in Burn's operations; `one` table for both sides.
    fn run(dim: usize, one: bool, fused: bool) -> Vec<Vec<f32>> {
        let device = Default::default();
        let values = |n: usize, step: f32| (0..n * dim).map(|k| (k as f32 * step).sin()).collect::<Vec<f32>>();
        let leaf = |n: usize, step| Tensor::<Ad, 2>::from_data(TensorData::new(values(n, step), [n, dim]), &device);
        let a = leaf(5, 0.7).require_grad();
        let b = if one { a.clone() } else { leaf(4, 0.3).require_grad() };
        // Row 4 of the first table and row 2 of the second are in no pair; a pair twice.
        let rows: ([u32; 7], [u32; 7]) = ([0, 1, 1, 3, 2, 0, 1], [3, 0, 1, 1, 0, 3, 1]);
        let products = match fused {
            true => row_dots(a.clone(), b.clone(), (&rows.0, &rows.1)),
            false => {
                let operation = RowDots { rows: [rows.0.as_slice().into(), rows.1.as_slice().into()], dim };
                lift(operation.plain::<Ad>([lower(a.clone()), lower(b.clone())]))
            }
        };
        let upstream = Tensor::<Ad, 1>::from_floats([0.5, -1.0, 2.0, 0.1, 0.7, 1.5, -0.2], &device);
        let grads = (products.clone() * upstream).sum().backward();
        let host = |t: Tensor<Flex, 2>| t.into_data().to_vec().unwrap();
        vec![products.into_data().to_vec().unwrap(), host(a.grad(&grads).unwrap()), host(b.grad(&grads).unwrap())]
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_plain_operations() {
        for dim in [1, 3, 16, 37, 64] {
            for one in [false, true] {
                for (fused, plain) in run(dim, one, true).iter().zip(&run(dim, one, false)) {
                    assert_eq!(fused.len(), plain.len());
                    assert!(fused.iter().zip(plain).all(|(x, y)| (x - y).abs() < 1e-4), "{fused:?} is not {plain:?}");
                }
            }
        }
    }

    #[test]
    fn without_pairs_there_are_no_products() {
        let table = Tensor::<Flex, 2>::zeros([2, 3], &Default::default());
        assert!(row_dots(table.clone(), table, (&[], &[])).into_data().to_vec::<f32>().unwrap().is_empty());
    }
}
