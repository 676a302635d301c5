//! Where a row of the fused table comes from, and the words for why it is not fused.
//!
//! In: the names that tables carry. Out: the closed set of them.

use crate::columns::SOURCE;
use crate::error::{Error, Result};

/// Where a recommendation's place comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The recommender and an order that the LLM gave for this shortlist.
    Fused,
    /// The recommender and an earlier order of the LLM.
    Reused,
    /// The recommender alone: the LLM was not asked.
    Recommender,
    /// The recommender alone: the LLM was asked and failed.
    Fallback,
    /// What is popular: nothing is known of the user.
    Popularity,
}

impl Source {
    /// All of them, as the docs list them.
    pub const ALL: [Source; 5] =
        [Source::Fused, Source::Reused, Source::Recommender, Source::Fallback, Source::Popularity];

    /// Its name in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Fused => "fused",
            Source::Reused => "reused",
            Source::Recommender => "recommender",
            Source::Fallback => "fallback",
            Source::Popularity => "popularity",
        }
    }

    /// Whether the LLM had a say.
    pub fn by_llm(self) -> bool {
        matches!(self, Source::Fused | Source::Reused)
    }

    /// The source of that name; another word is an error (exit 65).
    pub fn parse(name: &str) -> Result<Source> {
        Source::ALL.into_iter().find(|s| s.as_str() == name).ok_or_else(|| {
            let known: Vec<&str> = Source::ALL.iter().map(|s| s.as_str()).collect();
            Error::data(format!("column `{SOURCE}` holds `{name}`"))
                .with_help(format!("it is one of {}", known.join(", ")))
        })
    }
}

/// Reason: the item has no title, so the LLM was not shown it.
pub const NO_TITLE: &str = "no_title";
/// Reason: the LLM ranked others of the user's items, and this one it was not shown.
pub const NOT_SHOWN: &str = "not_shown";
/// Reason: nothing says why the LLM was not asked for the user.
pub const NOT_ASKED: &str = "not_asked";
/// Reason: the pipeline asks no LLM.
pub const NO_LLM: &str = "no_llm";
/// Reason: the user has no known interaction.
pub const COLD_USER: &str = "cold_user";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_and_others_are_refused() {
        for s in Source::ALL {
            assert_eq!(Source::parse(s.as_str()).unwrap(), s);
        }
        let e = Source::parse("fusd").unwrap_err();
        assert!(e.to_string().contains("fusd") && e.to_string().contains("popularity"), "{e}");
        assert_eq!(e.fault.exit_code(), 65);
    }
}
