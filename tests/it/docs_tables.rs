//! `docs/tables.md` is what the code's own schemas say.

use tailfuse::tables::schemas::tables_markdown;

#[test]
fn the_reference_of_tables_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/tables.md");
    let there = fs_err::read_to_string(path).unwrap_or_default();
    assert!(there == tables_markdown(), "docs/tables.md differs from src/tables/schemas.rs; mend it with: just docs");
}
