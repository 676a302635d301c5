//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]
