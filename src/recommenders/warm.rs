//! Warm start: the weights of an earlier fit as the initial ones of a new fit.
//!
//! In: a fitted model, and the users and items of the new fit. Out: initial weights: rows of users and items that both fits know
//! are taken over by id, new ones keep their random start, and all other weights are taken over where their shape is the
//! same. The optimizer's moments begin anew.

use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::backend::Backend;

use super::optim::Params;
use super::saved::{NamedTensor, Tensors, TrainedModel};
use crate::error::Result;
use crate::interactions::IdMap;

/// What the rows of a weight stand for, which its name tells: weights have one name in all backbones.
const OF_USERS: [&str; 1] = ["user_embeddings"];
/// Items, and perhaps rows for a mask behind them.
const OF_ITEMS: [&str; 2] = ["item_embeddings", "item_bias"];
/// Users, then items.
const OF_BOTH: [&str; 1] = ["ego_embeddings"];

/// The weights of an earlier fit, and where the new fit's users and items are in it.
pub struct WarmStart {
    tensors: Tensors,
    /// `[new users]`: index in the earlier fit.
    users: Vec<Option<u32>>,
    /// `[new items]`.
    items: Vec<Option<u32>>,
    /// Users of the earlier fit.
    old_users: usize,
    /// Items of the earlier fit.
    old_items: usize,
    taken: AtomicUsize,
}

impl WarmStart {
    /// From a fitted model, for a fit on these users and items.
    pub fn new(old: &TrainedModel, users: &IdMap, items: &IdMap) -> Self {
        WarmStart {
            tensors: Tensors::new(old.scorer.tensors()),
            users: old.users.encode(users.ids()),
            items: old.items.encode(items.ids()),
            old_users: old.users.len(),
            old_items: old.items.len(),
            taken: AtomicUsize::new(0),
        }
    }

    /// Users and items of the new fit that the earlier one knows.
    pub fn known(&self) -> (usize, usize) {
        let count = |of: &[Option<u32>]| of.iter().flatten().count();
        (count(&self.users), count(&self.items))
    }

    /// How many weights (tables and vectors) of the last fit began with earlier values; 0 where the backbone has none.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Replaces initial weights.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn apply<B: Backend>(&self, params: &mut Params<B>) -> Result<()> {
        let mut all = params.tensors();
        let mut taken = 0;
        for new in &mut all {
            taken += usize::from(self.fill(new));
        }
        self.taken.store(taken, Ordering::Relaxed);
        params.set(&Tensors::new(all))
    }

    /// Whether anything of the earlier fit was taken over.
    fn fill(&self, new: &mut NamedTensor) -> bool {
        let Ok(old) = self.tensors.get(&new.name) else { return false };
        let name = new.name.as_str();
        if old.shape.get(1..) != new.shape.get(1..) {
            return false;
        }
        let width: usize = new.shape[1..].iter().product();
        let rows: Vec<Option<u32>> = if OF_USERS.contains(&name) {
            self.users.clone()
        } else if OF_ITEMS.contains(&name) {
            let behind = new.shape[0].saturating_sub(self.items.len()).min(old.shape[0].saturating_sub(self.old_items));
            let behind = (self.old_items..self.old_items + behind).map(|row| Some(row as u32));
            self.items.iter().copied().chain(behind).collect()
        } else if OF_BOTH.contains(&name) {
            let items = self.items.iter().map(|i| i.map(|i| i + self.old_users as u32));
            self.users.iter().copied().chain(items).collect()
        } else if old.shape == new.shape {
            (0..new.shape[0] as u32).map(Some).collect()
        } else {
            return false;
        };
        let mut any = false;
        for (to, from) in new.values.chunks_exact_mut(width.max(1)).zip(rows) {
            let Some(from) = from.map(|f| f as usize * width) else { continue };
            if let Some(from) = old.values.get(from..from + width) {
                to.copy_from_slice(from);
                any = true;
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::super::embedding_scorer::EmbeddingScorer;
    use super::super::saved::ModelCard;
    use super::*;
    use crate::tables::IdColumn;

    fn map(ids: &[i64]) -> IdMap {
        IdMap::new(&[&IdColumn::Int(ids.to_vec())]).unwrap()
    }

    #[test]
    fn rows_are_found_by_id_and_new_ones_stay_as_they_were() {
        // Users 1, 3; items 10, 20; dim 2.
        let all: Vec<f32> = (1..=8).map(|x| x as f32).collect();
        let old = TrainedModel {
            card: ModelCard::new("mf", serde_json::json!({}), 2, 2),
            users: map(&[1, 3]),
            items: map(&[10, 20]),
            scorer: Box::new(EmbeddingScorer::new(2, 2, 2, all.clone(), all)),
        };
        let warm = WarmStart::new(&old, &map(&[2, 3]), &map(&[5, 10, 20]));
        assert_eq!(warm.known(), (1, 2));
        let mut params = Params::<Flex>::new(&Default::default());
        params.add("user_embeddings", &[2, 2], vec![-1.0; 4]);
        params.add("item_embeddings", &[4, 2], vec![-1.0; 8]);
        params.add("ego_embeddings", &[5, 2], vec![-1.0; 10]);
        params.add("head.weight", &[2, 2], vec![-1.0; 4]);
        warm.apply(&mut params).unwrap();
        let values: Vec<Vec<f32>> = params.tensors().into_iter().map(|t| t.values).collect();
        assert_eq!(values[0], [-1.0, -1.0, 3.0, 4.0]);
        // The last row, a mask's, has nothing to come from in this model.
        assert_eq!(values[1], [-1.0, -1.0, 5.0, 6.0, 7.0, 8.0, -1.0, -1.0]);
        assert_eq!(values[2], [-1.0, -1.0, 3.0, 4.0, -1.0, -1.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(values[3], [-1.0; 4]);
        assert_eq!(warm.taken(), 3);
    }

    #[test]
    fn weights_of_another_width_are_left() {
        let all = vec![1.0; 4];
        let old = TrainedModel {
            card: ModelCard::new("mf", serde_json::json!({}), 1, 1),
            users: map(&[1]),
            items: map(&[1]),
            scorer: Box::new(EmbeddingScorer::new(1, 1, 2, all.clone(), all)),
        };
        let warm = WarmStart::new(&old, &map(&[1]), &map(&[1]));
        let mut params = Params::<Flex>::new(&Default::default());
        params.add("user_embeddings", &[1, 3], vec![-1.0; 3]);
        warm.apply(&mut params).unwrap();
        assert_eq!((params.tensors()[0].values.clone(), warm.taken()), (vec![-1.0; 3], 0));
    }
}
