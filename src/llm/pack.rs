//! Sequences of one batch, merged into a tree of their common prefixes and laid out in one row.
//!
//! In: token sequences and the positions whose logits are wanted. Out: [`Pack`]: every distinct
//! prefix appears once, as a run of tokens; a token attends to the runs above its own and to the earlier
//! tokens of its own. So prompts of different length need no padding, the continuations of
//! one prompt share it, and the linear layers see one matrix of `[tokens, hidden]`.

/// Consecutive tokens with a common past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of its first token in [`Pack::ids`].
    pub start: usize,
    /// Its tokens, at least 1.
    pub len: usize,
    /// Runs that it continues, the root first.
    pub parents: Vec<usize>,
    /// Position of its first token in its sequence, counted from the end of the cache.
    pub position: usize,
}

/// One batch for a decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pack {
    /// Token ids of all runs, one after the other.
    pub ids: Vec<u32>,
    /// The runs; parents come before their children.
    pub runs: Vec<Run>,
    /// Indices into `ids` whose logits are wanted.
    pub read: Vec<usize>,
}

/// A sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Its tokens, at least 1.
    pub ids: &'a [u32],
    /// The logits of this position and all after it are wanted.
    pub read_from: usize,
}

/// Tokens that two sequences begin with.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

impl Pack {
    /// A single run, of which the logits from `read_from` on are wanted.
    pub fn chain(ids: &[u32], read_from: usize) -> Self {
        let run = Run { start: 0, len: ids.len(), parents: Vec::new(), position: 0 };
        Pack { ids: ids.to_vec(), runs: vec![run], read: (read_from..ids.len()).collect() }
    }

    /// Merges sequences, which must be sorted by their ids. `read` holds the wanted positions of
    /// the first sequence, then of the second, and so on.
    pub fn merge(sequences: &[Sequence<'_>]) -> Self {
        let mut pack = Pack::default();
        let mut paths = vec![Vec::new(); sequences.len()];
        pack.grow(sequences, 0, &[], &mut paths, 0);
        for (sequence, path) in sequences.iter().zip(&paths) {
            for position in sequence.read_from..sequence.ids.len() {
                let run = path.iter().map(|r| &pack.runs[*r]).rfind(|r| r.position <= position);
                let run = run.expect("a sequence's path covers its positions: grow() walks to its end");
                pack.read.push(run.start + position - run.position);
            }
        }
        pack
    }

    /// Adds the runs of sorted sequences that agree on their first `depth` tokens, which `parents` hold.
    fn grow(&mut self, all: &[Sequence<'_>], depth: usize, parents: &[usize], paths: &mut [Vec<usize>], first: usize) {
        let Some(last) = all.last() else { return };
        // Sorted: what the first and the last have in common, all have.
        let shared = common_prefix(all[0].ids, last.ids);
        let mut here = parents.to_vec();
        if shared > depth {
            here.push(self.runs.len());
            let run = Run { start: self.ids.len(), len: shared - depth, parents: parents.to_vec(), position: depth };
            self.runs.push(run);
            self.ids.extend_from_slice(&all[0].ids[depth..shared]);
        }
        // Those that end here come first in sorted order.
        let mut from = all.iter().take_while(|s| s.ids.len() == shared).count();
        for path in &mut paths[first..first + from] {
            path.clone_from(&here);
        }
        while from < all.len() {
            let next = all[from].ids[shared];
            let to = from + all[from..].iter().take_while(|s| s.ids[shared] == next).count();
            self.grow(&all[from..to], shared, &here, paths, first + from);
            from = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_prompts_share_their_beginning() {
        let (a, b) = ([1, 2, 3, 4], [1, 2, 5]);
        let pack = Pack::merge(&[Sequence { ids: &a, read_from: 3 }, Sequence { ids: &b, read_from: 2 }]);
        assert_eq!(pack.ids, [1, 2, 3, 4, 5]);
        assert_eq!(pack.runs.len(), 3);
        assert_eq!(pack.runs[2], Run { start: 4, len: 1, parents: vec![0], position: 2 });
        assert_eq!(pack.read, [3, 4]);
    }

    #[test]
    fn one_inside_the_other_and_twice_the_same() {
        let (a, b) = ([7, 8], [7, 8, 9]);
        let sequences = [
            Sequence { ids: &a, read_from: 0 },
            Sequence { ids: &a, read_from: 1 },
            Sequence { ids: &b, read_from: 1 },
        ];
        let pack = Pack::merge(&sequences);
        assert_eq!(pack.ids, [7, 8, 9]);
        assert_eq!(pack.read, [0, 1, 1, 1, 2]);
    }

    proptest! {
        /// Following a read token's run and its parents gives back the sequence up to there.
        #[test]
        fn every_path_spells_its_sequence(mut lists in prop::collection::vec(prop::collection::vec(0u32..3, 1..7), 1..12)) {
            lists.sort();
            let sequences: Vec<_> = lists.iter().map(|l| Sequence { ids: l, read_from: l.len() / 2 }).collect();
            let pack = Pack::merge(&sequences);
            let mut read = pack.read.iter();
            for s in &sequences {
                for position in s.read_from..s.ids.len() {
                    let at = *read.next().unwrap();
                    let run = pack.runs.iter().find(|r| (r.start..r.start + r.len).contains(&at)).unwrap();
                    let mut spelled = Vec::new();
                    for parent in &run.parents {
                        let p = &pack.runs[*parent];
                        prop_assert_eq!(p.position, spelled.len());
                        spelled.extend_from_slice(&pack.ids[p.start..p.start + p.len]);
                    }
                    spelled.extend_from_slice(&pack.ids[run.start..=at]);
                    prop_assert_eq!(&spelled[..], &s.ids[..=position]);
                }
            }
            prop_assert!(read.next().is_none());
            let mut prefixes: Vec<&[u32]> = lists.iter().flat_map(|l| (1..=l.len()).map(move |n| &l[..n])).collect();
            prefixes.sort();
            prefixes.dedup();
            prop_assert_eq!(pack.ids.len(), prefixes.len());
        }
    }
}
