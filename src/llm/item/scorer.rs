//! The fitted item model: reads the end of a history, scores the whole catalogue.
//!
//! In: weights, and a history per user. Out: scores `[users, items]`: the product of the state at the last position and the
//! item table. What a user gets does not depend on which other users are asked for.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::config::{ItemHyper, Saved};
use super::model::{ItemModel, Source, select};
use super::text::TitleTable;
use crate::error::{Error, Result};
use crate::interactions::Histories;
use crate::llm::LlamaConfig;
use crate::recommenders::optim::Params;
use crate::recommenders::pairwise::host;
use crate::recommenders::saved::{NamedTensor, Tensors};
use crate::recommenders::{Embeddings, Factors, Scorer, product};

const TITLES: &str = "item_titles";
const KNOWN: &str = "item_has_title";
const POPULARITY: &str = "item_popularity";
const USERS: &str = "user_embeddings";

/// Positions of one pass.
const TOGETHER: usize = 1024;

/// A fitted item model.
pub struct ItemScorer {
    hyper: ItemHyper,
    model: ItemModel,
    params: Params<Flex>,
    /// `ln(1 + train interactions)`, `[items]`.
    popularity: Vec<f32>,
    n_users: usize,
    /// `[users, dim]`; empty until [`ItemScorer::with_users`].
    users: Vec<f32>,
    /// `[items, dim]`
    items: Vec<f32>,
    /// `[items, dim + 1]`: vector, popularity. A state with 0 after it gives the score of a history, 0 with 1 that of none.
    table: Vec<f32>,
}

impl ItemScorer {
    /// From the weights; `config` is that of the layers.
    ///
    /// # Errors
    /// A tensor is missing or has a wrong shape (exit 65).
    pub fn new(
        hyper: &ItemHyper,
        config: &LlamaConfig,
        scale: f32,
        (n_users, n_items): (usize, usize),
        tensors: &Tensors,
    ) -> Result<Self> {
        let dim = config.hidden;
        let known = tensors.shaped(KNOWN, &[n_items])?.iter().map(|&x| x > 0.0).collect();
        let values = tensors.shaped(TITLES, &[n_items, dim])?.to_vec();
        let titles = Arc::new(TitleTable { dim, values, known, size: 1.0 });
        let mut params = Params::<Flex>::new(&Default::default());
        let mut model = ItemModel::new(hyper, titles, Source::<ChaCha8Rng>::Saved(config), &mut params)?;
        model.scale = scale;
        params.set(tensors)?;
        let popularity = tensors.shaped(POPULARITY, &[n_items])?.to_vec();
        let items: Vec<f32> = host(model.table(&params.constants()));
        let mut table = Vec::with_capacity(n_items * (dim + 1));
        for (item, popularity) in items.chunks_exact(dim.max(1)).zip(&popularity) {
            table.extend_from_slice(item);
            table.push(*popularity);
        }
        Ok(ItemScorer { hyper: hyper.clone(), model, params, popularity, n_users, users: Vec::new(), items, table })
    }

    /// From the card and the tensors of a saved model.
    ///
    /// # Errors
    /// The card is none of an item model, a tensor is missing or has a wrong shape (exit 65).
    pub fn load(card: &serde_json::Value, tensors: &Tensors) -> Result<Self> {
        let saved: Saved = serde_json::from_value(card.clone())
            .map_err(|e| Error::data("the card of the item model cannot be read").because(e))?;
        let config = LlamaConfig::from_hf_bytes(saved.config.to_string().as_bytes())
            .map_err(|what| Error::data(format!("the card of the item model: {what}")))?;
        let (users, popularity) = (tensors.get(USERS)?, tensors.get(POPULARITY)?);
        let (&[n_users, width], &[n_items]) = (users.shape.as_slice(), popularity.shape.as_slice()) else {
            return Err(Error::data(format!("the model's `{USERS}` and `{POPULARITY}` are no matrix and vector")));
        };
        if width != config.hidden {
            return Err(Error::data(format!(
                "the model's `{USERS}` have {width} columns, {} are wanted",
                config.hidden
            )));
        }
        let scorer = Self::new(&saved.hyper, &config, saved.scale, (n_users, n_items), tensors)?;
        Ok(ItemScorer { users: users.values.clone(), ..scorer })
    }

    /// What a card keeps of this model.
    ///
    /// # Errors
    /// As [`super::config::config_json`].
    pub fn card(&self) -> Result<serde_json::Value> {
        let config = super::config::config_json(self.model.config(), self.hyper.layers as usize)?;
        let saved = Saved { hyper: self.hyper.clone(), config, scale: self.model.scale };
        serde_json::to_value(saved).map_err(|e| Error::internal("a model card is no JSON").because(e))
    }

    /// With the users' embeddings: their states after `train`; 0 for those without a history.
    pub fn with_users(self, train: &Histories) -> Self {
        let dim = self.dim();
        let mut users = vec![0f32; self.n_users * dim];
        let all: Vec<u32> = (0..self.n_users as u32).collect();
        let parts = all.par_chunks(64).zip(users.par_chunks_mut((64 * dim).max(1)));
        parts.for_each(|(block, out)| self.states(block, train, out));
        ItemScorer { users, ..self }
    }

    /// The tensors that are not learned by gradients.
    pub fn constants(titles: &TitleTable, train: &Histories) -> Vec<NamedTensor> {
        let n_items = titles.known.len();
        let mut counts = vec![0u32; n_items];
        train.items().iter().for_each(|&item| counts[item as usize] += 1);
        let popularity = counts.iter().map(|&c| f64::from(c).ln_1p() as f32).collect();
        let known = titles.known.iter().map(|&k| if k { 1.0 } else { 0.0 }).collect();
        vec![
            NamedTensor::new(TITLES, vec![n_items, titles.dim], titles.values.clone()),
            NamedTensor::new(KNOWN, vec![n_items], known),
            NamedTensor::new(POPULARITY, vec![n_items], popularity),
        ]
    }

    /// The tensors without those of users.
    pub fn weights(&self) -> Vec<NamedTensor> {
        let (titles, n_items) = (self.model.titles(), self.popularity.len());
        let known = titles.known.iter().map(|&k| if k { 1.0 } else { 0.0 }).collect();
        let mut all = self.params.tensors();
        all.extend([
            NamedTensor::new(TITLES, vec![n_items, titles.dim], titles.values.clone()),
            NamedTensor::new(KNOWN, vec![n_items], known),
            NamedTensor::new(POPULARITY, vec![n_items], self.popularity.clone()),
        ]);
        all
    }

    fn dim(&self) -> usize {
        self.model.dim()
    }

    /// States of users `[users, dim]`; those without a history are left as they are.
    pub fn states(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        let (dim, max_len) = (self.dim(), self.hyper.max_len as usize);
        let read = |n: usize| {
            let all = history.of(users[n] as usize);
            &all[all.len().saturating_sub(max_len)..]
        };
        let mut order: Vec<usize> = (0..users.len()).filter(|&n| !read(n).is_empty()).collect();
        // Long ones first: the pass at the end is then the small one.
        order.sort_by_key(|&n| std::cmp::Reverse(read(n).len()));
        let vars = self.params.constants();
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let (mut n, mut positions) = (0, 0);
            while n < rest.len() && positions < TOGETHER {
                positions += read(rest[n]).len();
                n += 1;
            }
            let (some, later) = rest.split_at(n);
            rest = later;
            let lengths: Vec<usize> = some.iter().map(|&n| read(n).len()).collect();
            let items: Vec<f32> = some
                .iter()
                .flat_map(|&n| read(n))
                .flat_map(|&item| &self.items[item as usize * dim..][..dim])
                .copied()
                .collect();
            let data = TensorData::new(items, [lengths.iter().sum(), dim]);
            let history = Tensor::<Flex, 2>::from_data(data, &Default::default());
            let states = self.model.states(&vars, history, &self.model.packed(&lengths), None);
            let mut last = Vec::with_capacity(lengths.len());
            let mut end = 0;
            for len in &lengths {
                end += len;
                last.push(end as u32 - 1);
            }
            let states = host(select(states, &last));
            for (&n, state) in some.iter().zip(states.chunks_exact(dim)) {
                out[n * dim..][..dim].copy_from_slice(state);
            }
        }
    }

    /// What meets the table, `[users, dim + 1]`.
    fn vectors(&self, users: &[u32], history: &Histories) -> Vec<f32> {
        let dim = self.dim();
        let mut states = vec![0f32; users.len() * dim];
        self.states(users, history, &mut states);
        let mut vectors = Vec::with_capacity(users.len() * (dim + 1));
        for (user, state) in users.iter().zip(states.chunks_exact(dim)) {
            vectors.extend_from_slice(state);
            vectors.push(if history.of(*user as usize).is_empty() { 1.0 } else { 0.0 });
        }
        vectors
    }
}

impl Scorer for ItemScorer {
    fn n_users(&self) -> usize {
        self.n_users
    }

    fn n_items(&self) -> usize {
        self.popularity.len()
    }

    fn score(&self, users: &[u32], history: &Histories, out: &mut [f32]) {
        product::scores(&self.vectors(users, history), &self.table, self.dim() + 1, out);
    }

    fn factors(&self, users: &[u32], history: &Histories) -> Option<Factors<'_>> {
        Some(Factors { dim: self.dim() + 1, users: self.vectors(users, history), items: &self.table })
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
