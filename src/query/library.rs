//! The SQL files that ship with the binary: stages (`file = "builtin:long_tail"`), audits and example
//! questions.
//!
//! In: a name. Out: the text of `sql/NAME.sql`, as it was when the binary was built.

use crate::error::{Error, Result};

/// What a `file` begins with when it names one of ours.
pub const BUILTIN: &str = "builtin:";

/// SQL files for `sql` stages: name and text.
pub static STAGES: &[(&str, &str)] = &[
    ("filters", include_str!("../../sql/filters.sql")),
    ("dedup", include_str!("../../sql/dedup.sql")),
    ("long_tail", include_str!("../../sql/long_tail.sql")),
    ("popularity", include_str!("../../sql/popularity.sql")),
    ("co_occurrence", include_str!("../../sql/co_occurrence.sql")),
];

/// Audits of what is to be published (`audit` stages): name and text.
pub static AUDITS: &[(&str, &str)] = &[
    ("coverage", include_str!("../../sql/audits/coverage.sql")),
    ("k_items", include_str!("../../sql/audits/k_items.sql")),
    ("repeats", include_str!("../../sql/audits/repeats.sql")),
    ("nulls", include_str!("../../sql/audits/nulls.sql")),
    ("seen", include_str!("../../sql/audits/seen.sql")),
    ("leakage", include_str!("../../sql/audits/leakage.sql")),
    ("future", include_str!("../../sql/audits/future.sql")),
    ("fallback", include_str!("../../sql/audits/fallback.sql")),
    ("churn", include_str!("../../sql/audits/churn.sql")),
    ("concentration", include_str!("../../sql/audits/concentration.sql")),
    ("gini", include_str!("../../sql/audits/gini.sql")),
    ("drift_rec_score", include_str!("../../sql/audits/drift_rec_score.sql")),
    ("drift_alpha", include_str!("../../sql/audits/drift_alpha.sql")),
    ("drift_interactions", include_str!("../../sql/audits/drift_interactions.sql")),
    ("drift_popularity", include_str!("../../sql/audits/drift_popularity.sql")),
];

/// Questions that an analyst would ask of a published table: name and text.
pub static EXAMPLES: &[(&str, &str)] = &[
    ("tail_users", include_str!("../../sql/examples/tail_users.sql")),
    ("changed_first_place", include_str!("../../sql/examples/changed_first_place.sql")),
    ("coverage", include_str!("../../sql/examples/coverage.sql")),
    ("popularity_of_recommended", include_str!("../../sql/examples/popularity_of_recommended.sql")),
    ("drift", include_str!("../../sql/examples/drift.sql")),
];

/// The audit of that name. Error (exit 78) lists those that there are.
pub fn audit_sql(name: &str) -> Result<&'static str> {
    AUDITS.iter().find(|(n, _)| *n == name).map(|(_, sql)| *sql).ok_or_else(|| {
        let names: Vec<&str> = AUDITS.iter().map(|(n, _)| *n).collect();
        Error::spec(format!("no audit `{name}` ships with the program")).with_help(format!(
            "those that do: {}; one of your own needs a `file`: {name} = {{ file = \"sql/{name}.sql\", max = 0 }}",
            names.join(", ")
        ))
    })
}

/// The stage SQL of that name. Error (exit 78) lists those that there are.
pub fn stage_sql(name: &str) -> Result<&'static str> {
    STAGES.iter().find(|(n, _)| *n == name).map(|(_, sql)| *sql).ok_or_else(|| {
        let names: Vec<&str> = STAGES.iter().map(|(n, _)| *n).collect();
        Error::spec(format!("there is no SQL file `{BUILTIN}{name}`"))
            .with_help(format!("there are: {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query::read_only;

    /// Every file of `sql/` is in a list under its own name, reads only, and says what it does.
    #[test]
    fn all_files_are_listed_and_documented() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
        for (folder, list) in [(root.clone(), STAGES), (root.join("examples"), EXAMPLES), (root.join("audits"), AUDITS)]
        {
            let mut files: Vec<String> = fs_err::read_dir(&folder)
                .unwrap()
                .map(|e| e.unwrap().path())
                .filter(|p| p.extension().is_some_and(|e| e == "sql"))
                .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
                .collect();
            files.sort();
            let mut listed: Vec<&str> = list.iter().map(|(n, _)| *n).collect();
            listed.sort_unstable();
            assert_eq!(files, listed);
            for (name, sql) in list {
                assert!(sql.starts_with("-- "), "sql/{name}.sql has no header");
                read_only::check(sql).unwrap_or_else(|e| panic!("sql/{name}.sql: {e}"));
            }
        }
    }

    #[test]
    fn an_unknown_file_lists_those_there_are() {
        assert!(stage_sql("tail").unwrap_err().to_string().contains("long_tail"));
    }
}
