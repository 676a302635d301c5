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
mod project;
mod rms_norm;
mod rotary;
mod row_dots;
mod segment_attention;
mod segment_kernel;
mod sequence_attention;
mod swiglu;
mod widest;

#[cfg(test)]
mod checks;

pub use attention::{AttentionMask, attention, attention_by_distance};
pub use cross_entropy::{
    fixed_cross_entropy, linear_cross_entropy, linear_cross_entropy_excluding, weighted_cross_entropy,
};
pub use dropout::dropout;
pub use fused::{FusedBackend, Operation, Pass, Tape};
pub use gelu::gelu;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use linear_softmax::Excluded;
pub use pair_products::pair_products;
pub use project::project;
pub use rms_norm::rms_norm;
pub use rotary::{Angles, rotary};
pub use row_dots::row_dots;
pub use segment_attention::{Heads, segment_attention};
pub use swiglu::swiglu;
