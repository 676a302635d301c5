//! The binary: parses arguments, runs a verb, turns errors into exit codes.

fn main() {}
