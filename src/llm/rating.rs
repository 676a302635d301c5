//! Pointwise rating: how a model that is asked for a number spreads its probability over the numbers that are allowed.
//!
//! In: log-probabilities of the written ratings. Out: the expected rating, and the one that greedy writing gives (the
//! paper's, arXiv 2401.13870, section 5: inference is greedy).

use super::chat::ChatTokenizer;
use super::scoring::{normalizer, sum};
use super::trie::{Next, Trie};
use crate::error::{Error, Result};

/// The ratings that may be given.
#[derive(Clone, Debug, PartialEq)]
pub struct RatingScale {
    values: Vec<f64>,
    /// Token ids of each as it is written, with the end where one is the beginning of another.
    tokens: Vec<Vec<u32>>,
}

/// A rating.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Rating {
    /// Sum of value times probability.
    pub expected: f64,
    /// What greedy writing gives: at every token the likeliest one that leads to a rating.
    pub greedy: f64,
    /// Of each value, in the order of the scale; their sum is 1.
    pub probabilities: Vec<f64>,
}

impl RatingScale {
    /// Ratings by their token ids. `end` is what ends an answer; it is written after every rating where the tokens of
    /// one rating are the beginning of another's ("1" and "10").
    ///
    /// # Errors
    /// Exit 78 where there is no rating, one is not a number, or two are written the same.
    pub fn from_tokens(ratings: Vec<(f64, Vec<u32>)>, end: &[u32]) -> Result<Self> {
        let (values, mut tokens): (Vec<f64>, Vec<Vec<u32>>) = ratings.into_iter().unzip();
        if values.is_empty() || tokens.iter().any(Vec::is_empty) || values.iter().any(|v| !v.is_finite()) {
            return Err(Error::spec("a rating scale needs at least one rating, each a number with a text"));
        }
        let begins = |i: usize| tokens.iter().enumerate().any(|(j, other)| i != j && other.starts_with(&tokens[i]));
        if (0..tokens.len()).any(begins) {
            tokens.iter_mut().for_each(|t| t.extend_from_slice(end));
        }
        let mut sorted: Vec<&Vec<u32>> = tokens.iter().collect();
        sorted.sort();
        if sorted.windows(2).any(|w| w[1].starts_with(w[0])) {
            return Err(Error::spec("two ratings of the scale cannot be told apart")
                .with_help("give each rating once, in a way that the model's tokenizer tells from the others"));
        }
        Ok(RatingScale { values, tokens })
    }

    /// Ratings as text: whole numbers without a point ("4"), others with what they need ("3.5").
    ///
    /// # Errors
    /// As [`RatingScale::from_tokens`].
    pub fn new(chat: &ChatTokenizer, values: &[f64]) -> Result<Self> {
        let ratings = values.iter().map(|v| (*v, chat.encode_text(&v.to_string()))).collect();
        let end = chat.end_of_text().first().copied().map_or_else(|| chat.encode_text("\n"), |end| vec![end]);
        Self::from_tokens(ratings, &end)
    }

    /// The ratings, in the order given.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// What is scored after a prompt, in the same order.
    pub fn tokens(&self) -> &[Vec<u32>] {
        &self.tokens
    }

    /// The first token of each rating where one token is all that each has; then one logit each is enough.
    pub fn single_tokens(&self) -> Option<Vec<u32>> {
        self.tokens.iter().map(|t| if t.len() == 1 { Some(t[0]) } else { None }).collect()
    }

    /// The rating, given per value the log-probability of each of its tokens after the prompt and the tokens before
    /// (any constant may be added to all of those of the same position after the same tokens).
    pub fn rating(&self, logprobs: &[Vec<f32>]) -> Rating {
        let sums: Vec<f32> = logprobs.iter().map(|l| sum(l) as f32).collect();
        let all = normalizer(&sums);
        let probabilities: Vec<f64> = sums.iter().map(|s| (f64::from(*s) - all).exp()).collect();
        let expected = self.values.iter().zip(&probabilities).map(|(v, p)| v * p).sum();
        Rating { expected, greedy: self.values[self.greedy(logprobs)], probabilities }
    }

    /// The rating that greedy writing ends at: an index into the values.
    fn greedy(&self, logprobs: &[Vec<f32>]) -> usize {
        let mut trie = Trie::new(self.tokens.iter().map(Vec::as_slice));
        let mut written: Vec<u32> = Vec::new();
        loop {
            let token = match trie.next() {
                Next::Complete(rating) => return rating,
                Next::Empty => return 0,
                Next::Forced(token) => token,
                Next::Choice(allowed) => {
                    let logprob = |token: &u32| {
                        let through = |t: &Vec<u32>| t.starts_with(&written) && t.get(written.len()) == Some(token);
                        let rating = self.tokens.iter().position(through);
                        rating.map_or(f32::NEG_INFINITY, |r| logprobs[r][written.len()])
                    };
                    let best = |a: u32, b: u32| if logprob(&b) > logprob(&a) { b } else { a };
                    allowed.into_iter().reduce(best).unwrap_or_default()
                }
            };
            trie.write(token);
            written.push(token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_ratings_are_averaged_by_probability() {
        let scale = RatingScale::from_tokens((1..=5).map(|v| (f64::from(v), vec![v as u32])).collect(), &[0]).unwrap();
        assert_eq!(scale.single_tokens(), Some(vec![1, 2, 3, 4, 5]));
        let p = [0.1f32, 0.1, 0.2, 0.4, 0.2];
        // A constant for all changes nothing.
        let rating = scale.rating(&p.map(|p| vec![p.ln() + 7.0]));
        assert!((rating.expected - 3.5).abs() < 1e-5, "{rating:?}");
        assert_eq!(rating.greedy, 4.0);
        assert!((rating.probabilities[2] - 0.2).abs() < 1e-6);
    }

    #[test]
    fn ratings_of_several_tokens_are_ended() {
        // "1", "10" as [1], [1, 0]; 9 ends an answer.
        let scale = RatingScale::from_tokens(vec![(1.0, vec![1]), (2.0, vec![2]), (10.0, vec![1, 0])], &[9]).unwrap();
        assert_eq!(scale.tokens(), [vec![1, 9], vec![2, 9], vec![1, 0, 9]]);
        assert_eq!(scale.single_tokens(), None);
        let ln = |p: &[f32]| p.iter().map(|p| p.ln()).collect::<Vec<_>>();
        // 1 begins .6 of the answers and is followed by 0 in .9 of them.
        let rating = scale.rating(&[ln(&[0.6, 0.1]), ln(&[0.4, 1.0]), ln(&[0.6, 0.9, 1.0])]);
        assert!((rating.expected - (0.06 + 0.8 + 5.4)).abs() < 1e-5, "{rating:?}");
        assert_eq!(rating.greedy, 10.0);
    }

    #[test]
    fn a_scale_has_different_ratings() {
        assert!(RatingScale::from_tokens(vec![], &[9]).is_err());
        assert!(RatingScale::from_tokens(vec![(1.0, vec![])], &[9]).is_err());
        assert!(RatingScale::from_tokens(vec![(f64::NAN, vec![1])], &[9]).is_err());
        let same = RatingScale::from_tokens(vec![(1.0, vec![3]), (2.0, vec![3])], &[9]).unwrap_err();
        assert_eq!(same.fault.exit_code(), 78);
    }
}
