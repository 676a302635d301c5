//! What the engine asks of a model, whatever it runs on.
//!
//! In: a [`Pack`] of tokens, and [`Decoder::Segment`]s: keys and values of tokens that were computed before. Out: what is
//! wanted of the pack's read positions, and segments of the runs that are kept. A segment never changes after
//! it was made, so any number of prompts can continue it at the same time without a copy.

use super::config::LlamaConfig;
use super::pack::Pack;
use crate::error::Result;

/// What is wanted of a position. The head is multiplied by what this needs, and by no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The logits of the whole vocabulary, `[vocab]`.
    Vocabulary,
    /// The logits of these ids, `[ids]`, which costs their rows of the head only.
    Logits(Vec<u32>),
    /// The log-probabilities of these ids, `[ids]`, natural logarithms over the whole vocabulary.
    LogProbs(Vec<u32>),
    /// The hidden state after the last norm, `[hidden]`, without the head.
    Hidden,
}

/// How large a pass is at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassSize {
    /// Tokens that are computed; each of them may be read.
    pub tokens: usize,
    /// Tokens that one of them sees.
    pub seen: usize,
    /// Tokens of the segments that they continue.
    pub past: usize,
}

/// A decoder with its weights on a device.
pub trait Decoder: Send + Sync {
    /// Keys and values of consecutive tokens of a sequence, in all layers.
    type Segment: Send + Sync;

    /// The shape of the model.
    fn config(&self) -> &LlamaConfig;

    /// Tokens that are best given at once, where the options do not say.
    fn batch_tokens(&self) -> usize;

    /// Bytes that the weights take.
    fn weight_bytes(&self) -> usize;

    /// Bytes that keys and values of one token take, in all layers.
    fn token_bytes(&self) -> usize;

    /// Bytes that one pass takes at most besides weights and segments.
    fn pass_bytes(&self, size: PassSize) -> usize;

    /// Copies the tokens `from .. from + len` of a segment.
    fn slice(&self, segment: &Self::Segment, from: usize, len: usize) -> Self::Segment;

    /// Runs the tokens of `pack`, whose runs continue the segments `past` as each says, and calls `each` with
    /// every read position (its index in [`Pack::read`]) and what is wanted of it. Gives back the segments of the runs of
    /// which something is kept, in the order of the runs.
    ///
    /// What a position gives depends on the tokens before it only: not on the rest of the pack, and not on how the
    /// tokens before it are divided into segments and runs.
    fn forward(
        &self,
        pack: &Pack,
        past: &[&Self::Segment],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Vec<Self::Segment>>;
}

/// A decoder that is lent to an engine.
impl<D: Decoder> Decoder for &D {
    type Segment = D::Segment;

    fn config(&self) -> &LlamaConfig {
        (**self).config()
    }
    fn batch_tokens(&self) -> usize {
        (**self).batch_tokens()
    }
    fn weight_bytes(&self) -> usize {
        (**self).weight_bytes()
    }
    fn token_bytes(&self) -> usize {
        (**self).token_bytes()
    }
    fn pass_bytes(&self, size: PassSize) -> usize {
        (**self).pass_bytes(size)
    }
    fn slice(&self, segment: &D::Segment, from: usize, len: usize) -> D::Segment {
        (**self).slice(segment, from, len)
    }
    fn forward(
        &self,
        pack: &Pack,
        past: &[&D::Segment],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Vec<D::Segment>> {
        (**self).forward(pack, past, each)
    }
}
