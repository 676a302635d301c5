//! Evaluation: metrics, buckets, the paired test.

pub mod metrics;
