//! A fitted rating model.
//!
//! In: the weights as named tensors, the fields. Out: ratings, in blocks of rows so that memory is bounded, on the
//! CPU; the same numbers for any number of threads.

use burn::backend::Flex;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::Predictor;
use super::layers::Pass;
use super::layout::Layout;
use super::learner::{Network, RatingModel};
use crate::error::Result;
use crate::interactions::fields::{Entities, FieldSet, Rows};
use crate::recommenders::Embeddings;
use crate::recommenders::saved::{NamedTensor, Tensors};

/// Rows that are predicted at a time.
const BLOCK: usize = 4096;

/// A model with its weights on the host.
pub struct Fitted<M: RatingModel> {
    model: M,
    fields: FieldSet,
    layout: Layout,
    /// Those of the network, and `rating_range` (lowest and highest rating in train).
    tensors: Vec<NamedTensor>,
    range: [f32; 2],
    embeddings: usize,
}

impl<M: RatingModel> Fitted<M> {
    /// From the tensors of a network and `rating_range`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape (exit 65).
    pub fn new(model: &M, fields: &FieldSet, tensors: Vec<NamedTensor>) -> Result<Self> {
        Self::load(model, fields, &Tensors::new(tensors))
    }

    /// From named tensors; those that the model does not have are left out.
    ///
    /// # Errors
    /// A tensor is missing or has another shape (exit 65).
    pub fn load(model: &M, fields: &FieldSet, tensors: &Tensors) -> Result<Self> {
        let layout = Layout::new(fields);
        let mut network = blank(model, &layout);
        network.params.set(tensors)?;
        let range = tensors.shaped("rating_range", &[2])?;
        let range = [range[0], range[1]];
        let mut own = network.params.tensors();
        let embeddings = own.iter().position(|t| t.name == "embeddings").expect("every network has embeddings");
        own.push(NamedTensor::new("rating_range", vec![2], range.to_vec()));
        Ok(Fitted { model: model.clone(), fields: fields.clone(), layout, tensors: own, range, embeddings })
    }

    fn ids(&self, first: usize, n: usize) -> Embeddings<'_> {
        let table = &self.tensors[self.embeddings];
        let dim = table.shape[1];
        Embeddings { dim, values: &table.values[first * dim..(first + n) * dim] }
    }
}

/// A network whose weights are to be replaced.
fn blank<M: RatingModel>(model: &M, layout: &Layout) -> Network<M, Flex> {
    Network::new(model, layout, 0.0, &mut ChaCha8Rng::seed_from_u64(0), &Default::default())
}

impl<M: RatingModel> Predictor for Fitted<M> {
    fn fields(&self) -> &FieldSet {
        &self.fields
    }

    fn predict(&self, users: &Entities, items: &Entities, rows: &Rows) -> Result<Vec<f32>> {
        self.fields.check(users, items, rows)?;
        let mut network = blank(&self.model, &self.layout);
        network.params.set(&Tensors::new(self.tensors.clone()))?;
        let vars = network.params.constants();
        let [low, high] = self.range;
        let mut all = Vec::with_capacity(rows.len());
        let places: Vec<u32> = (0..rows.len() as u32).collect();
        let mut scratch = self.layout.scratch();
        for block in places.chunks(BLOCK) {
            let batch = self.layout.batch((users, items, rows), block, &mut scratch);
            let (predicted, _) = network.forward(&vars, &batch, &mut Pass::prediction());
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
        self.tensors.clone()
    }
}
