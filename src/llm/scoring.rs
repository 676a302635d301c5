//! From logits to scores: pure functions of numbers.
//!
//! Modes of the reranker that score: *label*, one token per candidate, whose log-probability after the prompt is its
//! score; and *likelihood*, the log-probability of a candidate's text given the prompt, summed, averaged or less its
//! unconditional one (as in "surface form competition", arXiv 2104.08315). Written lists are `ranking.rs`, ratings
//! `rating.rs`.

use super::cpu::kernels::{Isa, log_sum_exp};

/// log(sum(exp(logits))).
pub fn normalizer(logits: &[f32]) -> f64 {
    log_sum_exp(Isa::detect(), logits)
}

/// Log-probabilities of tokens, given the logits of the whole vocabulary. Ids must be below its size.
pub fn log_probabilities(logits: &[f32], ids: &[u32]) -> Vec<f32> {
    let normalizer = normalizer(logits);
    ids.iter().map(|id| (f64::from(logits[*id as usize]) - normalizer) as f32).collect()
}

/// Log-probabilities of tokens among themselves, given their logits (or their log-probabilities over anything larger).
pub fn among(logits: &[f32]) -> Vec<f32> {
    let normalizer = normalizer(logits);
    logits.iter().map(|l| (f64::from(*l) - normalizer) as f32).collect()
}

/// Log-probability of a text from those of its tokens; 0 for no tokens.
pub fn sum(token_logprobs: &[f32]) -> f64 {
    token_logprobs.iter().map(|p| f64::from(*p)).sum()
}

/// Log-probability per token, so that long titles do not lose by their length; 0 for no tokens.
pub fn mean(token_logprobs: &[f32]) -> f64 {
    if token_logprobs.is_empty() { 0.0 } else { sum(token_logprobs) / token_logprobs.len() as f64 }
}

/// What the prompt adds to a text's log-probability: with the prompt, less without it, so that
/// common titles do not win by being common.
pub fn less_unconditional(given_prompt: &[f32], without: &[f32]) -> f64 {
    sum(given_prompt) - sum(without)
}

/// The token with the largest logit; the smallest id of equal ones.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Ids and logits of the `n` largest logits, largest first, equal ones by id.
pub fn top(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let n = n.min(ids.len());
    if n > 0 && n < ids.len() {
        ids.select_nth_unstable_by(n - 1, by_logit);
    }
    ids.truncate(n);
    ids.sort_unstable_by(by_logit);
    ids.into_iter().map(|id| (id, logits[id as usize])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_of_a_fair_coin() {
        let p = log_probabilities(&[3.0, 3.0], &[1, 0]);
        assert!(p.iter().all(|p| (p - 0.5f32.ln()).abs() < 1e-6), "{p:?}");
    }

    #[test]
    fn three_ways_to_score_a_text() {
        let (given, without) = ([-1.0, -3.0], [-2.0, -4.0]);
        assert_eq!(sum(&given), -4.0);
        assert_eq!(mean(&given), -2.0);
        assert_eq!(less_unconditional(&given, &without), 2.0);
        assert_eq!((sum(&[]), mean(&[])), (0.0, 0.0));
    }

    #[test]
    fn labels_among_themselves_sum_to_one() {
        let p = among(&[2.0, 1.0, 4.0]);
        assert!((p.iter().map(|p| p.exp()).sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((p[0] - p[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_largest_come_first_and_ties_by_id() {
        let logits = [1.0, 4.0, 2.0, 4.0, -1.0];
        assert_eq!(argmax(&logits), 1);
        assert_eq!(top(&logits, 3), [(1, 4.0), (3, 4.0), (2, 2.0)]);
        assert_eq!(top(&logits, 9).len(), 5);
        assert!(top(&logits, 0).is_empty());
    }
}
