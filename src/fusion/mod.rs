//! Adaptive aggregation: the LLM's order of a shortlist and the recommender's become one,
//! the LLM trusted more for users with little history (arXiv 2401.13870, section 4.4).
//!
//! In: shortlists, the LLM's orders of them, the users' long-tail coefficients. Out: fused
//! orders, the fused table, and the choice of weights that serving takes from an evaluation.

pub mod calibration;
pub mod fused;
pub mod long_tail;
pub mod shortlists;
pub mod source;
pub mod utility;

pub use calibration::{Calibration, GridCell};
pub use fused::{FuseInputs, FuseOptions, FusedTables, fuse_tables};
pub use long_tail::{Bounds, Bucket, LongTail, Weights};
pub use shortlists::{Entry, Shortlists};
pub use source::Source;
