//! Operations that models share and that a back end may do in one piece, without the large tensors between.
//!
//! In: tensors. Out: tensors with gradients. Each has a form in Burn's own operations, which every back end
//! has, and a fused one for the CPU.

mod attention;
mod cross_entropy;
mod dropout;
mod exp;
mod layer_norm;
mod linear_softmax;
mod products;
mod sequence_attention;

pub use attention::{Attention, AttentionBackend, AttentionMask, Setting, attend, attention};
pub use cross_entropy::{
    CrossEntropyBackend, LinearSoftmax, LossAndGradients, linear_cross_entropy, linear_cross_entropy_excluding,
};
pub use dropout::{DropoutBackend, dropout};
pub use layer_norm::{LayerNormBackend, layer_norm};
pub use linear_softmax::Excluded;
