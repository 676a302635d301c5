//! A token budget: which titles of the history stay in the prompt.
//!
//! In: how many titles there are, how to render and how to count. Out: the longest prompt within the
//! budget. The history loses its oldest titles first; only when nothing of it is left does
//! the similar user's history lose its own oldest; candidates and prediction always stay.

use crate::error::Result;

/// What bounds a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Tokens that the model takes, prompt and answer together.
    pub context: usize,
    /// Tokens kept free for the answer.
    pub answer: usize,
    /// The user's own limit for a prompt.
    pub max_tokens: Option<usize>,
}

impl Budget {
    /// Tokens that a whole chat may have.
    pub fn tokens(&self) -> usize {
        self.context.saturating_sub(self.answer).min(self.max_tokens.unwrap_or(usize::MAX))
    }

    /// What would make room for `tokens`.
    pub fn way_out(&self, tokens: usize) -> String {
        if tokens + self.answer > self.context {
            format!(
                "use a model with a context of {} tokens or more (this one has {})",
                tokens + self.answer,
                self.context
            )
        } else {
            format!("raise `max_tokens` to {tokens} or more")
        }
    }
}

/// A prompt within its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// The user message.
    pub text: String,
    /// Tokens of the whole chat.
    pub tokens: usize,
    /// Titles of the history that stay: the latest ones.
    pub history: usize,
    /// Titles of the similar user's history that stay: the latest ones.
    pub similar: usize,
}

/// A prompt that no trimming fits into the budget: tokens without any history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    /// Tokens of the whole chat without either history.
    pub tokens: usize,
}

/// Trims to `budget` tokens. `render(h, s)` gives the user message with the latest `h` of `history` titles and the
/// latest `s` of `similar` ones; `count` gives the tokens of the whole chat around a user message.
/// Counts once where nothing must be trimmed, else about log2(`history`) + log2(`similar`) times.
pub fn fit(
    history: usize,
    similar: usize,
    budget: usize,
    render: &dyn Fn(usize, usize) -> Result<String>,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<std::result::Result<Fitted, TooLong>> {
    let attempt = |history: usize, similar: usize| -> Result<Fitted> {
        let text = render(history, similar)?;
        let tokens = count(&text)?;
        Ok(Fitted { text, tokens, history, similar })
    };
    let whole = attempt(history, similar)?;
    if whole.tokens <= budget {
        return Ok(Ok(whole));
    }
    if history > 0
        && let Some(fitted) = longest(history, budget, &|h| attempt(h, similar))?
    {
        return Ok(Ok(fitted));
    }
    if similar > 0
        && let Some(fitted) = longest(similar, budget, &|s| attempt(0, s))?
    {
        return Ok(Ok(fitted));
    }
    let bare = if history == 0 && similar == 0 { whole } else { attempt(0, 0)? };
    Ok(Err(TooLong { tokens: bare.tokens }))
}

/// The attempt with the largest number of titles below `titles` that fits. What is returned was counted, so
/// a tokenizer that does not grow evenly can cost a title, never exceed the budget.
fn longest(titles: usize, budget: usize, attempt: &dyn Fn(usize) -> Result<Fitted>) -> Result<Option<Fitted>> {
    let none = attempt(0)?;
    if none.tokens > budget {
        return Ok(None);
    }
    let mut best = none;
    // Invariant: `fits` titles fit (they are `best`), `too_many` do not.
    let (mut fits, mut too_many) = (0, titles);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        let tried = attempt(middle)?;
        if tried.tokens <= budget {
            fits = middle;
            best = tried;
        } else {
            too_many = middle;
        }
    }
    Ok(Some(best))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    /// Words as tokens: history `h0 h1 ...`, similar `s0 ...`, then `fixed` candidates.
    fn render(lengths: &[usize], similar: &[usize], fixed: usize, h: usize, s: usize) -> String {
        let mut words = Vec::new();
        for (kind, lengths, keep) in [("h", lengths, h), ("s", similar, s)] {
            for (index, &length) in lengths.iter().enumerate().skip(lengths.len() - keep) {
                words.extend(std::iter::repeat_n(format!("{kind}{index}"), length));
            }
        }
        words.extend((0..fixed).map(|c| format!("c{c}")));
        words.join(" ")
    }

    fn words(text: &str) -> usize {
        text.split_whitespace().count()
    }

    #[test]
    fn oldest_titles_go_first_then_the_similar_users() {
        let (history, similar) = ([2, 3, 4], [5, 6]);
        let run =
            |budget| fit(3, 2, budget, &|h, s| Ok(render(&history, &similar, 2, h, s)), &|t| Ok(words(t))).unwrap();
        let kept = |budget| run(budget).map(|f| (f.history, f.similar, f.tokens));
        assert_eq!(kept(22), Ok((3, 2, 22)));
        assert_eq!(kept(21), Ok((2, 2, 20)));
        assert_eq!(kept(17), Ok((1, 2, 17)));
        assert_eq!(kept(16), Ok((0, 2, 13)));
        assert_eq!(kept(12), Ok((0, 1, 8)));
        assert_eq!(kept(7), Ok((0, 0, 2)));
        assert_eq!(kept(1), Err(TooLong { tokens: 2 }));
        assert!(run(17).unwrap().text.starts_with("h2 h2 h2 h2 s0"));
    }

    #[test]
    fn the_smaller_limit_counts_and_is_the_one_to_raise() {
        let both = Budget { context: 2048, answer: 48, max_tokens: Some(500) };
        assert_eq!(both.tokens(), 500);
        assert_eq!(both.way_out(812), "raise `max_tokens` to 812 or more");
        assert!(both.way_out(2001).contains("context of 2049 tokens"));
        assert_eq!(Budget { max_tokens: None, ..both }.tokens(), 2000);
        assert_eq!(Budget { context: 10, ..both }.tokens(), 0);
    }

    #[test]
    fn counts_seldom() {
        let counted = Cell::new(0);
        let count = |text: &str| {
            counted.set(counted.get() + 1);
            Ok(words(text))
        };
        let history = vec![1; 1000];
        let render = |h: usize, s: usize| Ok(render(&history, &[], 5, h, s));
        assert_eq!(fit(1000, 0, 2000, &render, &count).unwrap().unwrap().history, 1000);
        assert_eq!(counted.take(), 1);
        assert_eq!(fit(1000, 0, 300, &render, &count).unwrap().unwrap().history, 295);
        assert!(counted.take() <= 12);
    }

    proptest! {
        #[test]
        fn within_budget_with_all_candidates_and_the_latest_titles(
            history in prop::collection::vec(1usize..6, 0..30),
            similar in prop::collection::vec(1usize..6, 0..10),
            fixed in 1usize..20,
            budget in 0usize..150,
        ) {
            let (h, s) = (history.len(), similar.len());
            let fitted = fit(h, s, budget, &|h, s| Ok(render(&history, &similar, fixed, h, s)), &|t| Ok(words(t))).unwrap();
            match fitted {
                Err(TooLong { tokens }) => {
                    prop_assert_eq!(tokens, fixed);
                    prop_assert!(fixed > budget);
                }
                Ok(f) => {
                    prop_assert!(f.tokens <= budget);
                    prop_assert_eq!(words(&f.text), f.tokens);
                    prop_assert_eq!(&f.text, &render(&history, &similar, fixed, f.history, f.similar));
                    for candidate in 0..fixed {
                        let word = format!("c{candidate}");
                        prop_assert!(f.text.split(' ').any(|w| w == word));
                    }
                    // Nothing is dropped without need: one title more would be too long.
                    if f.history < h && f.similar == s {
                        prop_assert!(words(&render(&history, &similar, fixed, f.history + 1, s)) > budget);
                    }
                    if f.similar < s {
                        prop_assert_eq!(f.history, 0);
                        prop_assert!(words(&render(&history, &similar, fixed, 0, f.similar + 1)) > budget);
                    }
                }
            }
        }
    }
}
