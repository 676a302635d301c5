//! `item` mode: one position per item instead of a prompt.
//!
//! In: train histories, the items' titles, an LLM. Out: a [`Fit`](crate::recommenders::Fit) whose [`ItemScorer`] reads a
//! history and scores the whole catalogue in one product.
//!
//! An item is one vector: what the LLM makes of its title ([`text`]: the mean of its final hidden states), projected, plus a
//! residual that is learned of the interactions. The first layers of the LLM, with its weights or with random ones, run over the
//! vectors of a history ([`model`]); the state at each position is compared with all items, and training ([`learner`]) is
//! cross-entropy of the next item. An item without interactions has no residual worth the name: its place is that of its title.
//!
//! This is not the prompting of arXiv 2401.13870: no instruction is read and no text is written. A history of 100 items is 100
//! positions, not 1,000 tokens, and the model can be learned on a CPU.
//!
//! As for the sequential recommenders, a history longer than `max_len` is cut into windows for training, and its end is read for
//! a score; a user without a history gets the items' popularity.

pub mod config;
pub mod learner;
pub mod model;
pub mod scorer;
#[cfg(test)]
mod tests;
pub mod text;

pub use config::{Init, ItemHyper};
pub use learner::{ItemFit, fit};
pub use scorer::ItemScorer;
pub use text::TitleTable;

use crate::recommenders::registry::{Backbone, Make, Task};

/// The fitted model's entry among those that are loaded but not made by `train`.
pub const BACKBONE: Backbone = Backbone {
    name: "item_llm",
    about: "Layers of an LLM over item embeddings made of titles",
    task: Task::Sequential,
    schema: || schemars::schema_for!(ItemHyper),
    make: Make::Ranking {
        build: |_| {
            Err(crate::error::Error::spec("model `item_llm` is fitted by a stage of its own")
                .with_help("use kind = \"train_items\", which reads the item titles and the LLM"))
        },
        load: |hyper, tensors| Ok(Box::new(ItemScorer::load(hyper, tensors)?)),
    },
    idle: &[],
};
