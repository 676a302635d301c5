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

/// Scores of candidates from label log-probabilities under several orders of the candidates.
///
/// Each entry is one prompt: which candidate each label stood for, and the log-probability of
/// each label. A candidate's score is the mean, over the prompts that had it, of its label's
/// log-probability among that prompt's labels, which takes out how likely labels are at all.
/// Candidates that no prompt had get negative infinity. Returns `[candidates]`.
pub fn average_over_orders(prompts: &[(Vec<usize>, Vec<f32>)], candidates: usize) -> Vec<f64> {
    let mut totals = vec![(0f64, 0usize); candidates];
    for (order, logprobs) in prompts {
        let among = normalizer(logprobs);
        for (candidate, logprob) in order.iter().zip(logprobs) {
            if let Some((total, n)) = totals.get_mut(*candidate) {
                *total += f64::from(*logprob) - among;
                *n += 1;
            }
        }
    }
    totals.into_iter().map(|(total, n)| if n == 0 { f64::NEG_INFINITY } else { total / n as f64 }).collect()
}

/// How often the order of the candidates decided which one came first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct OrderBias {
    /// Pairs of prompts that showed the same candidates in different orders.
    pub pairs: usize,
    /// Pairs of which the two prompts put different candidates first.
    pub changed: usize,
}

impl OrderBias {
    /// Share of pairs whose first place changed; 0 without pairs. A model that looks at the candidates only has 0, one that
    /// always takes the first line of `n` shuffled candidates has about 1 - 1 / n.
    pub fn share(&self) -> f64 {
        if self.pairs == 0 { 0.0 } else { self.changed as f64 / self.pairs as f64 }
    }

    /// Adds what was counted elsewhere, such as for another user.
    pub fn add(&mut self, other: OrderBias) {
        self.pairs += other.pairs;
        self.changed += other.changed;
    }
}

/// Compares the first places of every pair of one user's prompts. Each entry is one prompt, as in
/// [`average_over_orders`]; the label that comes first is the likeliest, the first shown of equal ones.
pub fn first_place_changes(prompts: &[(Vec<usize>, Vec<f32>)]) -> OrderBias {
    let first = |(order, logprobs): &(Vec<usize>, Vec<f32>)| order.get(argmax(logprobs) as usize).copied();
    let firsts: Vec<Option<usize>> = prompts.iter().map(first).collect();
    let mut out = OrderBias::default();
    for (i, a) in firsts.iter().enumerate() {
        for b in &firsts[i + 1..] {
            out.pairs += 1;
            out.changed += usize::from(a != b);
        }
    }
    out
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
    fn orders_cancel_a_position_bias() {
        // The model always likes the first label by 2, and candidate 1 by 1.
        let prompts = [(vec![0, 1], vec![-5.0, -6.0]), (vec![1, 0], vec![-4.0, -7.0])];
        let scores = average_over_orders(&prompts, 3);
        assert!(scores[1] > scores[0]);
        assert!((scores[1] - scores[0] - 1.0).abs() < 1e-5, "{scores:?}");
        assert_eq!(scores[2], f64::NEG_INFINITY);
    }

    #[test]
    fn the_first_place_of_a_biased_model_changes_with_the_order() {
        let prompts = [(vec![0, 1], vec![-1.0, -2.0]), (vec![1, 0], vec![-1.0, -2.0]), (vec![0, 1], vec![-1.0, -9.0])];
        let mut bias = first_place_changes(&prompts);
        assert_eq!(bias, OrderBias { pairs: 3, changed: 2 });
        bias.add(first_place_changes(&prompts[..1]));
        assert_eq!(bias.pairs, 3);
        assert!((bias.share() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(OrderBias::default().share(), 0.0);
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
