//! What is learned from: token ids, some of which are to be predicted.
//!
//! In: [`Example`]s. Out: [`Batch`]es, examples packed one after the other, with the positions that predict.

/// One text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Whether each token is learned, given those before it; the first one never is, since nothing is before it.
    pub learned: Vec<bool>,
}

impl Example {
    /// A prompt and its response: of the response every token is learned, of the prompt none.
    pub fn response(prompt: &[u32], response: &[u32]) -> Self {
        Example {
            ids: [prompt, response].concat(),
            learned: [vec![false; prompt.len()], vec![true; response.len()]].concat(),
        }
    }

    /// Learned tokens.
    pub fn targets(&self) -> usize {
        self.learned.iter().skip(1).filter(|l| **l).count()
    }

    /// Tokens that go through the layers: what comes after the last prediction does not.
    pub fn inputs(&self) -> usize {
        self.learned.iter().rposition(|l| *l).unwrap_or(0)
    }
}

/// Packed examples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Tokens that go through the layers, example after example.
    pub ids: Vec<u32>,
    /// How many of them each example has.
    pub lengths: Vec<usize>,
    /// Places in `ids` that predict.
    pub positions: Vec<usize>,
    /// What they are to predict.
    pub targets: Vec<u32>,
}

impl Batch {
    /// Packs examples; those without a learned token are left out.
    pub fn of<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Batch::default();
        for example in examples {
            let (n, start) = (example.inputs(), batch.ids.len());
            if n == 0 {
                continue;
            }
            batch.ids.extend_from_slice(&example.ids[..n]);
            batch.lengths.push(n);
            for at in (1..=n).filter(|&at| example.learned[at]) {
                batch.positions.push(start + at - 1);
                batch.targets.push(example.ids[at]);
            }
        }
        batch
    }

    /// Packs examples in their order into batches of at most `tokens` input tokens each; a longer example gets one of its own.
    pub fn split<'a>(examples: impl IntoIterator<Item = &'a Example>, tokens: usize) -> Vec<Self> {
        let mut groups: Vec<Vec<&Example>> = Vec::new();
        let mut room = 0;
        for example in examples.into_iter().filter(|e| e.targets() > 0) {
            let n = example.inputs();
            match groups.last_mut() {
                Some(group) if n <= room => group.push(example),
                _ => {
                    groups.push(vec![example]);
                    room = tokens;
                }
            }
            room = room.saturating_sub(n);
        }
        groups.into_iter().map(Batch::of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(ids: std::ops::Range<u32>, learned: &[usize]) -> Example {
        let ids: Vec<u32> = ids.collect();
        Example { learned: (0..ids.len()).map(|n| learned.contains(&n)).collect(), ids }
    }

    #[test]
    fn what_predicts_nothing_is_not_computed() {
        // Token 0 is never learned, tokens after the last learned one are no inputs.
        let a = example(10..16, &[0, 2, 3]);
        assert_eq!((a.targets(), a.inputs()), (2, 3));
        let batch = Batch::of([&a, &example(20..23, &[]), &example(30..32, &[1])]);
        assert_eq!(batch.ids, [10, 11, 12, 30]);
        assert_eq!(batch.lengths, [3, 1]);
        assert_eq!((batch.positions, batch.targets), (vec![1, 2, 3], vec![12, 13, 31]));
    }

    #[test]
    fn batches_keep_the_order_and_the_budget() {
        let all: Vec<Example> = [3u32, 4, 9, 1].iter().map(|&n| example(0..n + 1, &[n as usize])).collect();
        let lengths: Vec<Vec<usize>> = Batch::split(&all, 8).into_iter().map(|b| b.lengths).collect();
        assert_eq!(lengths, [vec![3, 4], vec![9], vec![1]]);
    }

    #[test]
    fn of_a_response_every_token_is_learned() {
        let example = Example::response(&[1, 2], &[3, 4]);
        assert_eq!(example.learned, [false, false, true, true]);
        assert_eq!((example.targets(), example.inputs()), (2, 3));
    }
}
