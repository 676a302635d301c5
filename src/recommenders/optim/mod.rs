//! Weights by name, and Adam.
//!
//! In: [`Params`], which own the weights and Adam's moments, and a loss made from their [`Vars`].
//! Out: updated weights; their values and state as named tensors for files.
//!
//! A model reads a weight whole ([`Vars::get`]), or only some rows of a table ([`Vars::rows`]). Rows get
//! a gradient of their own size, and only they are updated: a step costs what the batch costs, not what the table
//! costs. Moments of rows that are not in a batch stay as they are ("lazy" Adam, as torch's `SparseAdam` does it).
//!
//! ```ignore
//! let mut params = Params::<B>::new(device);
//! let items = params.add("item_embeddings", &[n_items, dim], xavier(&[n_items, dim], &mut rng));
//! let vars = params.tracked();                      // Vars<Autodiff<B>>
//! let loss = model.loss(&vars, &batch);             // any code generic over the back end
//! params.step(loss, vars, &adam);
//! let scores = model.scores(&params.constants());   // Vars<B>: no gradients
//! ```

mod adam;
mod gradients;
mod init;
mod params;

pub use adam::{Adam, AdamBackend, Step};
pub use gradients::Gradients;
pub use init::{normal, truncated_normal, uniform, xavier_normal, xavier_uniform};
pub use params::{ParamId, Params, Vars};
