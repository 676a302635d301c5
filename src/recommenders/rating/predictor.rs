//! A fitted rating model.
//!
//! In: the weights as named tensors, the fields. Out: ratings, in blocks of rows so that memory is bounded, on the
//! CPU; the same numbers for any number of threads.

use burn::backend::Flex;

use super::Predictor;
use super::layers::Pass;
use super::layout::{Layout, RecentOf, Source};
use super::learner::{Network, RatingModel};
use crate::error::Result;
use crate::interactions::fields::{Entities, FieldSet, Rows};
use crate::recommenders::Embeddings;
use crate::recommenders::saved::{NamedTensor, Tensors};

/// Rows that are predicted at a time.
const BLOCK: usize = 4096;

/// A model with its weights, ready to predict.
pub struct Fitted<M: RatingModel> {
    fields: FieldSet,
    layout: Layout,
    network: Network<M, Flex>,
    /// Lowest and highest rating in train; in files `rating_range`.
    range: [f32; 2],
    /// How each user has rated of late, `[users + 1]`, if the model has that field; in files `recent`.
    recent: Option<Vec<f32>>,
    /// Length of an embedding.
    dim: usize,
    /// Embeddings of the ids, `[(users + 1 + items + 1) * dim]`: the network's own copy cannot be lent.
    ids: Vec<f32>,
}

impl<M: RatingModel> Fitted<M> {
    /// From the tensors of a network and `rating_range`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape (exit 65).
    pub fn load(model: &M, fields: &FieldSet, tensors: &Tensors) -> Result<Self> {
        let recent = model.common().recent_decay > 0.0;
        let layout = Layout::new(fields, recent);
        let mut network = Network::blank(model, &layout, &Default::default());
        network.params.set(tensors)?;
        let range = tensors.shaped("rating_range", &[2])?;
        let dim = model.common().embedding_dim as usize;
        let ids = tensors.get("embeddings")?.values[..(fields.n_users + fields.n_items + 2) * dim].to_vec();
        let recent = recent.then(|| tensors.shaped("recent", &[fields.n_users + 1])).transpose()?.map(<[f32]>::to_vec);
        Ok(Fitted { fields: fields.clone(), layout, network, range: [range[0], range[1]], recent, dim, ids })
    }

    fn ids(&self, first: usize, n: usize) -> Embeddings<'_> {
        Embeddings { dim: self.dim, values: &self.ids[first * self.dim..(first + n) * self.dim] }
    }
}

impl<M: RatingModel> Predictor for Fitted<M> {
    fn fields(&self) -> &FieldSet {
        &self.fields
    }

    fn predict(&self, users: &Entities, items: &Entities, rows: &Rows) -> Result<Vec<f32>> {
        self.fields.check(users, items, rows)?;
        let vars = self.network.params.constants();
        let [low, high] = self.range;
        let mut all = Vec::with_capacity(rows.len());
        let places: Vec<u32> = (0..rows.len() as u32).collect();
        let mut scratch = self.layout.scratch();
        for block in places.chunks(BLOCK) {
            let recent = self.recent.as_deref().map_or(RecentOf::None, RecentOf::Users);
            let source = Source { users, items, rows, recent };
            let batch = self.layout.batch(source, block, &mut scratch);
            let (predicted, _) = self.network.forward(&vars, &batch, &mut Pass::prediction());
            all.extend(predicted.into_data().iter::<f32>().map(|x| x.clamp(low, high)));
        }
        Ok(all)
    }

    fn user_embeddings(&self) -> Embeddings<'_> {
        self.ids(1, self.fields.n_users)
    }

    fn item_embeddings(&self) -> Embeddings<'_> {
        self.ids(self.layout.first_item() + 1, self.fields.n_items)
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let mut tensors = self.network.params.tensors();
        tensors.push(NamedTensor::new("rating_range", vec![2], self.range.to_vec()));
        if let Some(recent) = &self.recent {
            tensors.push(NamedTensor::new("recent", vec![recent.len()], recent.clone()));
        }
        tensors
    }
}
