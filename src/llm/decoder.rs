//! What the engine asks of a model, whatever it runs on.

use super::config::LlamaConfig;
use super::pack::Pack;
use crate::error::Result;

/// A decoder with its weights on a device.
pub trait Decoder: Send + Sync {
    /// Keys and values of the tokens of one sequence, per layer.
    type Cache: Send;

    /// The shape of the model.
    fn config(&self) -> &LlamaConfig;

    /// Tokens that are best given at once (a pack may have more where a sequence cannot be cut).
    fn batch_tokens(&self) -> usize;

    /// A cache without tokens.
    fn empty(&self) -> Self::Cache;

    /// Forgets the tokens from `len` on.
    fn truncate(&self, cache: &mut Self::Cache, len: usize);

    /// Runs the tokens of `pack`, all of which continue the tokens of `cache`, and calls `each`
    /// with every wanted position (its index in [`Pack::read`]) and its logits, `[vocab]`.
    /// With `keep`, which is for packs of a single run, the tokens are added to the cache.
    fn forward(
        &self,
        cache: &mut Self::Cache,
        pack: &Pack,
        keep: bool,
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()>;
}
