//! Operations that models share and that a back end may do in one piece, without the large tensors between.
//!
//! In: tensors. Out: tensors with gradients. Each has a form in Burn's own operations, which every back end
//! has, and a fused one for the CPU.

mod attention;
mod cross_entropy;
mod dropout;
mod exp;
mod fused;
mod gelu;
mod gemm;
mod layer_norm;
mod linear;
mod linear_softmax;
mod pair_products;
mod products;
mod row_dots;
mod sequence_attention;
mod widest;

#[cfg(test)]
mod checks;

pub use attention::{AttentionMask, attention, attention_by_distance};
pub use cross_entropy::{linear_cross_entropy, linear_cross_entropy_excluding, weighted_cross_entropy};
pub use dropout::dropout;
pub use fused::{FusedBackend, Operation, Pass, Tape};
pub use gelu::gelu;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use linear_softmax::Excluded;
pub use pair_products::pair_products;
pub use row_dots::row_dots;
