//! The top-k prompts of one user.
//!
//! In: [`UserCase`] (titles only), [`TopkOptions`], templates, a token counter. Out: one
//! [`TopkPrompt`] per permutation of the candidates, within the budget.

use rand::seq::SliceRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::budget::{Budget, fit};
use super::templates::{CandidateStyle, Fields, LETTERS, Templates};
use crate::error::{Error, Result};
use crate::interactions::user_rng;
use crate::tables::Id;

/// In which order the first prompt of a user lists the candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateOrder {
    /// A random order per user, from the seed. Small models prefer places (the first, the last) to titles; in a
    /// random order that is noise, in the recommender's it would pass for the LLM's agreement.
    #[default]
    Shuffled,
    /// The recommender's order, best first.
    Recommender,
}

/// What all users' prompts have in common.
#[derive(Clone, Debug)]
pub struct TopkOptions {
    /// What the items are, in the plural.
    pub noun: String,
    /// How candidates are listed.
    pub style: CandidateStyle,
    /// Titles of the history at most, the latest ones.
    pub history_items: usize,
    /// Titles of the similar user's history at most, the latest ones.
    pub similar_items: usize,
    /// Titles of the recommender's prediction at most, the best ones.
    pub prediction_items: usize,
    /// Prompts per user, each with its own order of the candidates.
    pub permutations: u32,
    /// Order of permutation 0; all others are shuffled.
    pub order: CandidateOrder,
    /// Seed of the shuffles.
    pub seed: u64,
    /// What bounds a prompt.
    pub budget: Budget,
}

/// One user, as titles.
#[derive(Clone, Copy, Debug)]
pub struct UserCase<'a> {
    /// The user.
    pub user: &'a Id,
    /// The shortlist, in the recommender's order.
    pub shortlist: &'a [&'a str],
    /// What is known of the user, oldest first.
    pub history: &'a [&'a str],
    /// What is known of the most similar user, oldest first; empty where there is none.
    pub similar: &'a [&'a str],
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopkPrompt {
    /// Which order of the candidates.
    pub permutation: u32,
    /// Places in the shortlist (0-based), in the order shown.
    pub order: Vec<usize>,
    /// The user message.
    pub text: String,
    /// Tokens of the whole chat.
    pub tokens: usize,
    /// Titles of the history that are shown.
    pub history_shown: usize,
    /// Titles of both histories that were left out for the budget.
    pub titles_trimmed: usize,
}

/// The prompts of one user. `count` gives the tokens of the whole chat around a user message.
///
/// Errors (exit 78): more candidates than letters, a shortlist that cannot fit the budget.
pub fn prompts_of(
    case: &UserCase<'_>,
    options: &TopkOptions,
    templates: &Templates,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<Vec<TopkPrompt>> {
    if options.style == CandidateStyle::Letters && case.shortlist.len() > LETTERS {
        return Err(Error::spec(format!(
            "a shortlist of {} candidates has more than the {LETTERS} letters that can name them (user `{}`)",
            case.shortlist.len(),
            case.user
        ))
        .with_help(format!("recommend at most {LETTERS} items, or set candidate_style = \"titles\"")));
    }
    let history = latest(case.history, options.history_items);
    let similar = latest(case.similar, options.similar_items);
    let prediction = &case.shortlist[..options.prediction_items.min(case.shortlist.len())];
    (0..options.permutations)
        .map(|permutation| {
            let order = candidate_order(case, options, permutation);
            let candidates: Vec<&str> = order.iter().map(|&place| case.shortlist[place]).collect();
            let render = |candidates: &[&str], h: usize, s: usize| {
                templates.user(&Fields {
                    noun: &options.noun,
                    style: options.style,
                    history: latest(history, h),
                    candidates,
                    similar: latest(similar, s),
                    prediction,
                })
            };
            let budget = options.budget.tokens();
            let fitted = fit(history.len(), similar.len(), budget, &|h, s| render(&candidates, h, s), count)?;
            match fitted {
                Ok(f) => Ok(TopkPrompt {
                    permutation,
                    order,
                    text: f.text,
                    tokens: f.tokens,
                    history_shown: f.history,
                    titles_trimmed: history.len() - f.history + similar.len() - f.similar,
                }),
                Err(too_long) => {
                    let fits = |k: usize| Ok::<_, Error>(count(&render(&candidates[..k], 0, 0)?)? <= budget);
                    Err(cannot_fit(case, &options.budget, too_long.tokens, &fits)?)
                }
            }
        })
        .collect()
}

/// The last `n` titles.
fn latest<'a, 'b>(titles: &'b [&'a str], n: usize) -> &'b [&'a str] {
    &titles[titles.len().saturating_sub(n)..]
}

fn candidate_order(case: &UserCase<'_>, options: &TopkOptions, permutation: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..case.shortlist.len()).collect();
    if permutation > 0 || options.order == CandidateOrder::Shuffled {
        order.shuffle(&mut user_rng(options.seed, "candidate order", case.user, u64::from(permutation)));
    }
    order
}

/// The error of a shortlist that is too long, with what would fit.
fn cannot_fit(
    case: &UserCase<'_>,
    budget: &Budget,
    tokens: usize,
    fits: &dyn Fn(usize) -> Result<bool>,
) -> Result<Error> {
    let mut most = None;
    for k in (2..case.shortlist.len()).rev() {
        if fits(k)? {
            most = Some(k);
            break;
        }
    }
    let shorter = match most {
        Some(k) => format!("recommend at most {k} items per user, or "),
        None => String::new(),
    };
    Ok(Error::spec(format!(
        "a shortlist of {} can't fit the context: user `{}` needs {tokens} tokens without any history, and a prompt may have {} (context {}, {} of it for the answer{})",
        case.shortlist.len(),
        case.user,
        budget.tokens(),
        budget.context,
        budget.answer,
        budget.max_tokens.map(|m| format!("; `max_tokens` {m}")).unwrap_or_default()
    ))
    .with_help(format!("{shorter}{}; shorter titles (`max_title_chars`) help too", budget.way_out(tokens))))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::templates::{TOPK_SYSTEM, TOPK_USER};
    use super::*;

    fn options() -> TopkOptions {
        TopkOptions {
            noun: "movies".into(),
            style: CandidateStyle::Letters,
            history_items: 3,
            similar_items: 2,
            prediction_items: 1,
            permutations: 1,
            order: CandidateOrder::Recommender,
            seed: 7,
            budget: Budget { context: 4096, answer: 1, max_tokens: None },
        }
    }

    fn words(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    fn run(case: &UserCase<'_>, options: &TopkOptions) -> Result<Vec<TopkPrompt>> {
        prompts_of(case, options, &Templates::new(TOPK_SYSTEM, TOPK_USER).unwrap(), &words)
    }

    const CASE: UserCase<'static> = UserCase {
        user: &Id::Int(5),
        shortlist: &["C1", "C2", "C3", "C4"],
        history: &["H1", "H2", "H3", "H4", "H5"],
        similar: &["S1", "S2", "S3"],
    };

    #[test]
    fn one_whole_prompt() {
        let prompts = run(&CASE, &options()).unwrap();
        insta::assert_snapshot!(prompts[0].text, @r#"
        Instruction: The history lists movies that a user has chosen, the latest last. Which of the candidates is the user most likely to choose next? Answer with its letter only.
        Interaction History: H3; H4; H5
        Candidate Items:
        A. C1
        B. C2
        C. C3
        D. C4
        Similar User Interaction History: S2; S3
        Conventional Model Prediction: C1
        Output:
        "#);
        assert_eq!((prompts[0].history_shown, prompts[0].titles_trimmed), (3, 0));
        assert_eq!(prompts[0].tokens, words(&prompts[0].text).unwrap());
    }

    #[test]
    fn fields_switch_off() {
        let off = TopkOptions { similar_items: 0, prediction_items: 0, ..options() };
        let text = &run(&CASE, &off).unwrap()[0].text;
        assert!(!text.contains("Similar User") && !text.contains("Conventional"), "{text}");
        let alone = UserCase { similar: &[], ..CASE };
        assert!(!run(&alone, &options()).unwrap()[0].text.contains("Similar User"));
    }

    #[test]
    fn permutations_are_seeded_per_user() {
        let shuffled = TopkOptions { order: CandidateOrder::Shuffled, permutations: 6, ..options() };
        let orders = |case: &UserCase<'_>, options: &TopkOptions| -> Vec<Vec<usize>> {
            run(case, options).unwrap().into_iter().map(|p| p.order).collect()
        };
        let base = orders(&CASE, &shuffled);
        assert_eq!(base, orders(&CASE, &shuffled));
        assert!(base.iter().collect::<BTreeSet<_>>().len() > 2, "{base:?}");
        assert_ne!(base, orders(&CASE, &TopkOptions { seed: 8, ..shuffled.clone() }));
        assert_ne!(base, orders(&UserCase { user: &Id::Int(6), ..CASE }, &shuffled));
        // The recommender's order comes first where asked for; the others are the same shuffles.
        let first = orders(&CASE, &TopkOptions { order: CandidateOrder::Recommender, ..shuffled });
        assert_eq!(first[0], [0, 1, 2, 3]);
        assert_eq!(first[1..], base[1..]);
    }

    #[test]
    fn a_shortlist_that_cannot_fit_says_what_would() {
        let bare = UserCase { history: &[], similar: &[], ..CASE };
        let tokens = run(&bare, &options()).unwrap()[0].tokens;
        let tight = |max| TopkOptions { budget: Budget { max_tokens: Some(max), ..options().budget }, ..options() };
        let fits = run(&CASE, &tight(tokens)).unwrap();
        assert_eq!((fits[0].tokens, fits[0].history_shown, fits[0].titles_trimmed), (tokens, 0, 5));
        let error = run(&CASE, &tight(tokens - 1)).unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.message.contains("shortlist of 4 can't fit the context: user `5`"), "{error}");
        assert!(error.message.contains(&format!("needs {tokens} tokens")), "{error}");
        let help = error.help.unwrap();
        assert!(help.contains("at most 3 items") && help.contains(&format!("`max_tokens` to {tokens}")), "{help}");
        let error = run(&CASE, &TopkOptions { budget: Budget { context: 9, ..options().budget }, ..options() });
        let help = error.unwrap_err().help.unwrap();
        assert!(help.contains("a model with a context") && !help.contains("at most"), "{help}");
    }

    #[test]
    fn letters_end_at_26() {
        let titles = vec!["T"; 27];
        let case = UserCase { shortlist: &titles, ..CASE };
        let error = run(&case, &options()).unwrap_err();
        assert!(error.fault.exit_code() == 78 && error.message.contains("27"), "{error}");
        assert!(run(&case, &TopkOptions { style: CandidateStyle::Titles, ..options() }).is_ok());
        assert!(run(&UserCase { shortlist: &titles[..26], ..CASE }, &options()).unwrap()[0].text.contains("\nZ. T\n"));
    }

    proptest! {
        #[test]
        fn every_prompt_is_within_budget_and_shows_every_candidate(
            candidates in 2usize..20,
            history in 0usize..40,
            similar in 0usize..8,
            over in 0usize..60,
            seed in any::<u64>(),
        ) {
            let titles = |kind: &str, n: usize| (0..n).map(|i| format!("{kind}{i} x")).collect::<Vec<_>>();
            let (c, h, s) = (titles("C", candidates), titles("H", history), titles("S", similar));
            let refs = |v: &'_ [String]| v.iter().map(|t| t.clone().leak() as &str).collect::<Vec<&str>>();
            let (c, h, s) = (refs(&c), refs(&h), refs(&s));
            let case = UserCase { shortlist: &c, history: &h, similar: &s, ..CASE };
            let wide = TopkOptions { permutations: 2, history_items: 30, seed, order: CandidateOrder::Shuffled, ..options() };
            let bare = run(&UserCase { history: &[], similar: &[], ..case }, &wide).unwrap()[0].tokens;
            let budget = Budget { max_tokens: Some(bare + over), ..wide.budget };
            for prompt in run(&case, &TopkOptions { budget, ..wide }).unwrap() {
                prop_assert!(prompt.tokens <= bare + over);
                let mut order = prompt.order.clone();
                order.sort_unstable();
                prop_assert_eq!(order, (0..candidates).collect::<Vec<_>>());
                for (shown, &place) in prompt.order.iter().enumerate() {
                    let line = format!("\n{}. {}\n", char::from(b'A' + shown as u8), c[place]);
                    prop_assert!(prompt.text.contains(&line));
                }
                for (age, title) in h.iter().rev().enumerate() {
                    prop_assert_eq!(prompt.text.contains(title), age < prompt.history_shown);
                }
            }
        }
    }
}
