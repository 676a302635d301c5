//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

/// The leave-one-out split of MovieLens-100K has the reference's contents.
mod split_ml100k;
