//! The sparse product out of a back end's ordinary operations: gather, multiply, sum.
//!
//! A scatter-add would be slow or random on a GPU (atomics). Instead the entries of a row are
//! laid out in groups of [`WIDTH`], padded with zeros; each level gathers the groups' inputs
//! `[groups, WIDTH, dim]` and sums over the middle, until a row has one group left. The order
//! of every sum is fixed, so the result is too.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive};

use super::Csr;

/// Inputs per group: wide enough for few levels, narrow enough for little padding.
const WIDTH: usize = 16;

/// A sparse matrix as levels of gathers; see the module. Takes about
/// `nonzeros * dim` numbers of working memory per product.
#[derive(Clone, Debug)]
pub struct RowTree<B: Backend> {
    levels: Vec<Level<B>>,
}

#[derive(Clone, Debug)]
struct Level<B: Backend> {
    /// `[groups * WIDTH]`: which row of the level's input.
    inputs: Tensor<B, 1, Int>,
    /// `[groups, WIDTH, 1]`: its weight; 0 for padding.
    weights: Tensor<B, 3>,
}

impl<B: Backend> RowTree<B> {
    /// Lays `csr` out on `device`.
    pub fn new(csr: &Csr, device: &B::Device) -> Self {
        let mut rows: Vec<Vec<(u32, f32)>> = (0..csr.rows())
            .map(|r| {
                let (columns, values) = csr.row(r);
                columns.iter().copied().zip(values.iter().copied()).collect()
            })
            .collect();
        let mut levels = Vec::new();
        loop {
            let (mut inputs, mut weights) = (Vec::<i64>::new(), Vec::<f32>::new());
            let mut groups = 0u32;
            for row in &mut rows {
                let mut sums = Vec::with_capacity(row.len().div_ceil(WIDTH).max(1));
                // A row without entries gets one group of padding: its sum is the row of zeros.
                for first in (0..row.len().max(1)).step_by(WIDTH) {
                    for n in first..first + WIDTH {
                        let (input, weight) = row.get(n).copied().unwrap_or((0, 0.0));
                        inputs.push(i64::from(input));
                        weights.push(weight);
                    }
                    sums.push((groups, 1.0));
                    groups += 1;
                }
                *row = sums;
            }
            let n = groups as usize;
            levels.push(Level {
                inputs: Tensor::from_data(TensorData::new(inputs, [n * WIDTH]), device),
                weights: Tensor::from_data(TensorData::new(weights, [n, WIDTH, 1]), device),
            });
            if rows.iter().all(|r| r.len() == 1) {
                return RowTree { levels };
            }
        }
    }

    /// `[rows, cols] x dense [cols, dim] -> [rows, dim]`.
    pub fn matmul(&self, dense: FloatTensor<B>) -> FloatTensor<B> {
        let mut x = Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(dense));
        let dim = x.dims()[1];
        for level in &self.levels {
            let groups = level.weights.dims()[0];
            let gathered = x.select(0, level.inputs.clone()).reshape([groups, WIDTH, dim]);
            x = (gathered * level.weights.clone()).sum_dim(1).reshape([groups, dim]);
        }
        x.into_primitive().tensor()
    }
}
