//! Interaction logs in the form that models take: dense indices, time-ordered histories.
//!
//! In: tables with `user_id`, `item_id`, perhaps `rating`, `timestamp`, `row_id`.
//! Out: [`IdMap`]s (id <-> dense index), [`Histories`] (items per user, oldest first),
//! splits and samplers. What dirty logs hold (duplicates, re-ratings, ties of time) is settled in
//! [`clean`], and counted.

pub mod clean;
pub mod fields;
pub mod histories;
pub mod id_map;
pub mod polars;
pub mod sampler;
pub mod split;
pub mod user_rng;

pub use histories::Histories;
pub use id_map::IdMap;
pub use user_rng::user_rng;
