//! Evaluation: metrics of ranked tables against held-out items, by bucket, with a paired test.
//!
//! In: a ranked table (a stage's output or the published file, the same code) or predicted ratings, and the
//! held-out items. Out: the `metrics` and `comparison` tables, and their terminal form.

pub mod buckets;
pub mod evaluate;
pub mod metrics;
pub mod paired;
pub mod ranking;
pub mod ratings;
pub mod terminal;

pub use buckets::Slice;
pub use evaluate::{EvaluateOptions, Evaluation, Protocol, evaluate};
pub use metrics::{Direction, METRICS, Metric, MetricFn};
pub use paired::{PairedTest, paired_t_test};
