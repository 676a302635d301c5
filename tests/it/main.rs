//! All integration tests, one binary.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

/// The catalog against a local HTTP server and a stand-in for pip: good and bad sources, locks, files placed by hand.
mod catalog;
