//! The fitted sequential model: reads the end of a history, scores the whole catalogue.
//!
//! In: weights, and a history per user. Out: scores `[users, items]`: the product of the state at the last position
//! and the item embeddings (plus the items' bias where the model has one).
//!
//! * The last `max_len` items of a history are read, oldest first (in a Cloze model `max_len - 1` and the mask).
//! * A user with an empty history gets the items' popularity, `ln(1 + train interactions)`.
//! * User embeddings are the states after the train history; those of users without one are 0.

use burn::backend::Flex;
use rayon::prelude::*;

use super::super::optim::{Params, Vars};
use super::super::saved::{NamedTensor, Tensors};
use super::super::{Embeddings, Factors, Scorer, product};
use super::batches::Batch;
use super::config::EncoderHyper;
use super::encoder::{Encoder, Shape};
use super::loss::select;
use crate::error::{Error, Result};
use crate::interactions::Histories;

const POPULARITY: &str = "item_popularity";
const USERS: &str = "user_embeddings";

/// Sequences of one forward pass: few, so that sorting by length leaves little padding.
const TOGETHER: usize = 16;

/// A fitted sequential model.
pub struct SequentialScorer {
    encoder: Encoder,
    params: Params<Flex>,
    /// `ln(1 + train interactions)`, `[items]`.
    popularity: Vec<f32>,
    n_users: usize,
    /// `[users, dim]`; empty until [`SequentialScorer::with_users`].
    users: Vec<f32>,
    /// `[items, dim]`
    items: Vec<f32>,
    /// `[items, dim + 2]`: embedding, bias, popularity. A state with 1 and 0 after it gives the score of a history,
    /// 0 with 0 and 1 that of none.
    table: Vec<f32>,
}

impl SequentialScorer {
    /// From the encoder's weights.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn new(hyper: &EncoderHyper, shape: Shape, n_users: usize, tensors: &Tensors) -> Result<Self> {
        let mut params = Params::<Flex>::new(&Default::default());
        let encoder = Encoder::new(hyper, shape, &mut params, None);
        params.set(tensors)?;
        let popularity = tensors.shaped(POPULARITY, &[shape.n_items])?.to_vec();
        let dim = hyper.embedding_dim as usize;
        let items = tensors.get("item_embeddings")?.values[..shape.n_items * dim].to_vec();
        let bias = encoder.bias.map(|_| tensors.shaped("item_bias", &[shape.n_items])).transpose()?;
        let mut table = Vec::with_capacity(shape.n_items * (dim + 2));
        for (n, (item, popularity)) in items.chunks_exact(dim).zip(&popularity).enumerate() {
            table.extend_from_slice(item);
            table.extend([bias.map_or(0.0, |b| b[n]), *popularity]);
        }
        Ok(SequentialScorer { encoder, params, popularity, n_users, users: Vec::new(), items, table })
    }

    /// From the tensors of a saved model; the sizes are theirs.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn load(hyper: &EncoderHyper, shape: Shape, tensors: &Tensors) -> Result<Self> {
        let (users, popularity) = (tensors.get(USERS)?, tensors.get(POPULARITY)?);
        let dim = hyper.embedding_dim as usize;
        let (&[n_users, width], &[n_items]) = (users.shape.as_slice(), popularity.shape.as_slice()) else {
            return Err(Error::data(format!("the model's `{USERS}` and `{POPULARITY}` are no matrix and vector")));
        };
        if width != dim {
            return Err(Error::data(format!("the model's `{USERS}` have {width} columns, {dim} are wanted")));
        }
        let scorer = Self::new(hyper, Shape { n_items, ..shape }, n_users, tensors)?;
        Ok(SequentialScorer { users: users.values.clone(), ..scorer })
    }

    /// With the users' embeddings, made of `train`.
    pub fn with_users(self, train: &Histories) -> Self {
        let dim = self.dim();
        let mut users = vec![0f32; self.n_users * dim];
        let all: Vec<u32> = (0..self.n_users as u32).collect();
        let parts = all.par_chunks(64).zip(users.par_chunks_mut(64 * dim));
        parts.for_each(|(block, out)| self.states(block, train, out));
        SequentialScorer { users, ..self }
    }

    /// The popularity tensor of train histories.
    pub fn popularity(train: &Histories, n_items: usize) -> NamedTensor {
        let mut counts = vec![0u32; n_items];
        for &item in train.items() {
            counts[item as usize] += 1;
        }
        let logs = counts.iter().map(|&c| f64::from(c).ln_1p() as f32);
        NamedTensor::new(POPULARITY, vec![n_items], logs.collect())
    }

    /// The tensors without those of users.
    pub fn weights(&self) -> Vec<NamedTensor> {
        let mut all = self.params.tensors();
        all.push(NamedTensor::new(POPULARITY, vec![self.popularity.len()], self.popularity.clone()));
        all
    }

    fn dim(&self) -> usize {
        self.encoder.hyper().embedding_dim as usize
    }

    /// Length of a row of the table.
    fn width(&self) -> usize {
        self.dim() + 2
    }

    /// What meets the table, `[users, dim + 2]`.
    fn vectors(&self, users: &[u32], history: &Histories) -> Vec<f32> {
        let dim = self.dim();
        let mut states = vec![0f32; users.len() * dim];
        self.states(users, history, &mut states);
        let mut vectors = Vec::with_capacity(users.len() * (dim + 2));
        for (user, state) in users.iter().zip(states.chunks_exact(dim)) {
            vectors.extend_from_slice(state);
            let known = !history.of(*user as usize).is_empty();
            vectors.extend(if known { [1.0, 0.0] } else { [0.0, 1.0] });
        }
        vectors
    }

    /// What is read of a history.
    fn sequence(&self, history: &[u32]) -> Vec<u32> {
        let max_len = self.encoder.hyper().max_len as usize;
        let shape = self.encoder.shape();
        let tail = |n: usize| history[history.len().saturating_sub(n)..].to_vec();
        match shape.causal {
            true => tail(max_len),
            false => {
                let mut read = tail(max_len - 1);
                read.push(shape.n_items as u32);
                read
            }
        }
    }

    /// States of users `[users, dim]`; those without a history are left as they are.
    fn states(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        let dim = self.dim();
        let mut order: Vec<usize> = (0..users.len()).filter(|&n| !history.of(users[n] as usize).is_empty()).collect();
        order.sort_by_key(|&n| history.of(users[n] as usize).len());
        let vars = self.params.constants();
        for some in order.chunks(TOGETHER) {
            let read: Vec<Vec<u32>> = some.iter().map(|&n| self.sequence(history.of(users[n] as usize))).collect();
            let states = self.forward(&vars, &Batch::padded(&read));
            for (&n, state) in some.iter().zip(states.chunks_exact(dim)) {
                out[n * dim..][..dim].copy_from_slice(state);
            }
        }
    }

    fn forward(&self, vars: &Vars<Flex>, batch: &Batch) -> Vec<f32> {
        let table = vars.get::<2>(self.encoder.items);
        let states = self.encoder.encode(vars, select(table, &batch.inputs), &batch.lengths, None);
        let states = self.encoder.project(vars, select(states, &batch.last_places()));
        states.into_data().to_vec().expect("models are f32 on every back end")
    }
}

impl Scorer for SequentialScorer {
    fn n_users(&self) -> usize {
        self.n_users
    }

    fn n_items(&self) -> usize {
        self.popularity.len()
    }

    fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        // One thread: blocks of users are the parallel unit.
        product::scores(&self.vectors(users, history), &self.table, self.width(), out);
    }

    fn factors(&self, users: &[u32], history: &Histories) -> Option<Factors<'_>> {
        Some(Factors { dim: self.width(), users: self.vectors(users, history), items: &self.table })
    }

    fn user_embeddings(&self) -> Option<Embeddings<'_>> {
        (self.users.len() == self.n_users * self.dim()).then(|| Embeddings { dim: self.dim(), values: &self.users })
    }

    fn item_embeddings(&self) -> Option<Embeddings<'_>> {
        Some(Embeddings { dim: self.dim(), values: &self.items })
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let mut all = self.weights();
        all.push(NamedTensor::new(USERS, vec![self.n_users, self.dim()], self.users.clone()));
        all
    }
}
