//! The item model: vectors of items, layers over a history, scores of all items.
//!
//! In: [`TitleTable`], a [`Decoder`] of some layers, the weights in [`Params`]. Out: the item table `[items, dim]`, states
//! `[positions, dim]`.
//!
//! `item = project(title) + residual`; `score(history, item) = scale * hidden(history) . item`. The projection starts as the
//! identity and residuals as 0, so that at the start an item is its title; items without one start from a random residual. `scale` is a
//! constant that gives the first logits a deviation of about 1.
//!
//! An item with a title and no train interaction keeps a residual of 0: as a wrong answer of every position it would only be pushed
//! away from all users, and what its title says would be unlearned.

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use rand::Rng;

use super::config::{Init, ItemHyper};
use super::text::{TitleTable, root_mean_square};
use crate::error::Result;
use crate::llm::LlamaConfig;
use crate::llm::tune::decoder::{Decoder, Packed, Parts, Reads};
use crate::llm::weights::{FINAL_NORM, Weights};
use crate::recommenders::ops::{FusedBackend, dropout, project};
use crate::recommenders::optim::{ParamId, Params, Vars, normal};

/// Name of the residuals' tensor.
pub const RESIDUAL: &str = "item_residuals";
/// Name of the projection's tensor.
pub const PROJECTION: &str = "item_projection";

/// Deviation of random layers (transformers' `initializer_range`).
const DEVIATION: f32 = 0.02;

/// Shape of an item model, and where its weights are.
#[derive(Clone)]
pub struct ItemModel {
    decoder: Decoder,
    residual: ParamId,
    projection: ParamId,
    titles: Arc<TitleTable>,
    /// `[items]`: 0 where an item is its title and nothing else.
    learned: Arc<[f32]>,
    /// What states are multiplied by.
    pub scale: f32,
}

/// Where the layers' weights come from.
pub enum Source<'a, R: Rng> {
    /// The LLM, or random ones of its shape, as [`ItemHyper::init`] says; and the items with train interactions, `[items]`.
    Fresh(&'a Weights, &'a mut R, &'a [bool]),
    /// They will be set from a saved model.
    Saved(&'a LlamaConfig),
}

impl ItemModel {
    /// A model with its initial weights in `params`.
    ///
    /// # Errors
    /// The LLM has fewer layers (exit 78); a tensor cannot be read (exit 65).
    pub fn new<B: Backend, R: Rng>(
        hyper: &ItemHyper,
        titles: Arc<TitleTable>,
        source: Source<'_, R>,
        params: &mut Params<B>,
    ) -> Result<Self> {
        let (dim, n_items) = (titles.dim, titles.known.len());
        let parts = Parts { layers: Some(hyper.layers as usize), text: false };
        let mut residuals = vec![0f32; n_items * dim];
        let mut learned = vec![1f32; n_items];
        let (decoder, norm) = match source {
            Source::Saved(config) => {
                let mut zeros = |_: &str, shape: &[usize]| Ok(vec![0f32; shape.iter().product()]);
                (Decoder::build(config, parts, params, &mut zeros)?, 1.0)
            }
            Source::Fresh(weights, rng, warm) => {
                for (item, row) in residuals.chunks_exact_mut(dim.max(1)).enumerate() {
                    if !(titles.known[item] && hyper.text) {
                        row.copy_from_slice(&normal(dim, titles.size, rng));
                    } else if !warm[item] {
                        learned[item] = 0.0;
                    }
                }
                let decoder = match hyper.init {
                    Init::Llm => Decoder::load(weights, parts, params)?,
                    Init::Random => Decoder::build(weights.config(), parts, params, &mut |name, shape| {
                        let n = shape.iter().product();
                        Ok(match (shape.len(), name.ends_with("bias")) {
                            (1, true) => vec![0.0; n],
                            (1, false) => vec![1.0; n],
                            _ => normal(n, DEVIATION, rng),
                        })
                    })?,
                };
                let norm = params.tensors().into_iter().find(|t| t.name == FINAL_NORM);
                (decoder, norm.map_or(1.0, |t| root_mean_square(&t.values)))
            }
        };
        let mut identity = vec![0f32; dim * dim];
        (0..dim).for_each(|d| identity[d * dim + d] = 1.0);
        let projection = params.add(PROJECTION, &[dim, dim], identity);
        let residual = params.add(RESIDUAL, &[n_items, dim], residuals);
        params.set_rate(residual, hyper.item_learning_rate / hyper.rate().max(f64::MIN_POSITIVE));
        let scale = 1.0 / ((dim as f32).sqrt() * norm * titles.size).max(f32::MIN_POSITIVE);
        // Without text the table of titles is nothing.
        let titles = if hyper.text { titles } else { Arc::new(without_text(&titles)) };
        Ok(ItemModel { decoder, residual, projection, titles, learned: learned.into(), scale })
    }

    /// Number of items.
    pub fn n_items(&self) -> usize {
        self.titles.known.len()
    }

    /// Length of a vector.
    pub fn dim(&self) -> usize {
        self.titles.dim
    }

    /// The titles' vectors.
    pub fn titles(&self) -> &TitleTable {
        &self.titles
    }

    /// The LLM's shape.
    pub fn config(&self) -> &LlamaConfig {
        self.decoder.config()
    }

    /// Histories of these lengths, one after another.
    pub fn packed(&self, lengths: &[usize]) -> Packed {
        self.decoder.packed(lengths)
    }

    /// The item table, `[items, dim]`.
    pub fn table<B: FusedBackend>(&self, vars: &Vars<B>) -> Tensor<B, 2> {
        let residual = vars.get::<2>(self.residual);
        let learned = TensorData::new(self.learned.to_vec(), [self.n_items(), 1]);
        let residual = residual.clone() * Tensor::from_data(learned, &residual.device());
        let titles = TensorData::new(self.titles.values.clone(), [self.n_items(), self.dim()]);
        let titles = Tensor::<B, 2>::from_data(titles, &residual.device());
        project(titles, vars.get::<2>(self.projection), None) + residual
    }

    /// Rows of the item table; in a step only these residuals are updated.
    pub fn rows<B: FusedBackend>(&self, vars: &Vars<B>, rows: &[u32]) -> Tensor<B, 2> {
        let (residual, dim) = (vars.rows(self.residual, rows), self.dim());
        let learned: Vec<f32> = rows.iter().map(|&row| self.learned[row as usize]).collect();
        let learned = Tensor::<B, 2>::from_data(TensorData::new(learned, [rows.len(), 1]), &residual.device());
        let residual = residual * learned;
        let titles: Vec<f32> =
            rows.iter().flat_map(|&row| &self.titles.values[row as usize * dim..][..dim]).copied().collect();
        let titles = Tensor::<B, 2>::from_data(TensorData::new(titles, [rows.len(), dim]), &residual.device());
        project(titles, vars.get::<2>(self.projection), None) + residual
    }

    /// States `[positions, dim]` that are compared with the items, of histories as vectors `[positions, dim]`. `dropped` is
    /// the share of inputs and results that is dropped, and a seed.
    pub fn states<B: FusedBackend>(
        &self,
        vars: &Vars<B>,
        history: Tensor<B, 2>,
        packed: &Packed,
        dropped: Option<(f32, u64)>,
    ) -> Tensor<B, 2> {
        let drop = |x: Tensor<B, 2>, place: u64| match dropped {
            Some((share, seed)) => dropout(x, share, seed ^ place.wrapping_mul(0xD6E8_FEB8_6659_FD93)),
            None => x,
        };
        let hidden = self.decoder.hidden(&Reads::whole(vars), drop(history, 1), packed);
        drop(hidden, 2).mul_scalar(self.scale)
    }
}

fn without_text(titles: &TitleTable) -> TitleTable {
    TitleTable { values: vec![0.0; titles.values.len()], ..titles.clone() }
}

/// Rows of a matrix.
pub fn select<B: Backend>(table: Tensor<B, 2>, rows: &[u32]) -> Tensor<B, 2> {
    let index: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [rows.len()]), &table.device());
    table.select(0, index)
}
