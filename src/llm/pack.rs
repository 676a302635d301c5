//! Sequences of one batch, merged into a tree of their common prefixes and laid out in one row.
//!
//! In: token sequences, which of their first tokens are cached, and the positions that are read. Out: [`Pack`]: every
//! distinct prefix that is not cached appears once, as a run of tokens; a token attends to the cached segments and runs
//! above its own and to the earlier tokens of its own. So prompts of different length need no padding, the continuations
//! of one prompt share it, and the linear layers see one matrix of `[tokens, hidden]`.

use super::decoder::Wanted;

/// The first tokens of a cached segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seen {
    /// Index of the segment in what the decoder is given.
    pub segment: usize,
    /// Its first tokens that are seen, at least 1.
    pub len: usize,
}

/// Consecutive tokens with a common past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of its first token in [`Pack::ids`].
    pub start: usize,
    /// Its tokens, at least 1.
    pub len: usize,
    /// Cached tokens that it continues, the first ones first.
    pub past: Vec<Seen>,
    /// Runs that it continues after the cached tokens, the root first.
    pub parents: Vec<usize>,
    /// Position of its first token in its sequence.
    pub position: usize,
    /// Its first tokens whose keys and values are given back.
    pub keep: usize,
}

/// A position whose result is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Index of the token in [`Pack::ids`].
    pub at: usize,
    /// What is wanted of it.
    pub wanted: Wanted,
}

/// One batch for a decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pack {
    /// Token ids of all runs, one after the other.
    pub ids: Vec<u32>,
    /// The runs; parents come before their children.
    pub runs: Vec<Run>,
    /// What is wanted; no position twice with the same kind of [`Wanted`].
    pub read: Vec<Read>,
}

/// A sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// All its tokens, the cached ones too; more than are cached.
    pub ids: &'a [u32],
    /// Its cached tokens.
    pub past: &'a [Seen],
    /// How many they are: the sum of their lengths.
    pub cached: usize,
    /// The keys and values of its tokens up to here are given back.
    pub keep: usize,
    /// Positions, from `cached` on, and what is wanted of each.
    pub reads: &'a [(usize, Wanted)],
}

/// Who gets the result of a read position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    /// Index of the sequence.
    pub sequence: usize,
    /// Index of the position in its `reads`.
    pub read: usize,
    /// Where its ids are among those of the pack's [`Read`]; `None` where all of the result is meant.
    pub picks: Option<Vec<usize>>,
}

/// A pack and what came of each sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// The batch.
    pub pack: Pack,
    /// Per entry of [`Pack::read`]: who wanted it.
    pub readers: Vec<Vec<Reader>>,
    /// Per sequence: its runs, the root first.
    pub paths: Vec<Vec<usize>>,
    /// Per run: a sequence that goes through it.
    pub owners: Vec<usize>,
}

/// Tokens that two sequences begin with.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

impl Merged {
    /// Merges sequences, which must be sorted by (past, ids).
    pub fn new(sequences: &[Sequence<'_>]) -> Self {
        let mut out = Merged { paths: vec![Vec::new(); sequences.len()], ..Merged::default() };
        let mut from = 0;
        while from < sequences.len() {
            let first = sequences[from];
            let to = from + sequences[from..].iter().take_while(|s| s.past == first.past).count();
            out.grow(&sequences[from..to], first.cached, &[], from);
            from = to;
        }
        for (s, sequence) in sequences.iter().enumerate() {
            for run in &out.paths[s] {
                let run = &mut out.pack.runs[*run];
                run.keep = run.keep.max(sequence.keep.saturating_sub(run.position).min(run.len));
            }
        }
        out.collect_reads(sequences);
        out
    }

    /// Adds the runs of sorted sequences that agree on their first `depth` tokens: the cached ones and those of `parents`.
    fn grow(&mut self, all: &[Sequence<'_>], depth: usize, parents: &[usize], first: usize) {
        let Some(last) = all.last() else { return };
        // Sorted: what the first and the last have in common, all have.
        let shared = common_prefix(all[0].ids, last.ids);
        let mut here = parents.to_vec();
        if shared > depth {
            here.push(self.pack.runs.len());
            self.owners.push(first);
            self.pack.runs.push(Run {
                start: self.pack.ids.len(),
                len: shared - depth,
                past: all[0].past.to_vec(),
                parents: parents.to_vec(),
                position: depth,
                keep: 0,
            });
            self.pack.ids.extend_from_slice(&all[0].ids[depth..shared]);
        }
        // Those that end here come first in sorted order.
        let mut from = all.iter().take_while(|s| s.ids.len() == shared).count();
        for path in &mut self.paths[first..first + from] {
            path.clone_from(&here);
        }
        while from < all.len() {
            let next = all[from].ids[shared];
            let to = from + all[from..].iter().take_while(|s| s.ids[shared] == next).count();
            self.grow(&all[from..to], shared, &here, first + from);
            from = to;
        }
    }

    /// Brings together what is wanted of each position.
    fn collect_reads(&mut self, sequences: &[Sequence<'_>]) {
        let mut wishes: Vec<(usize, u8, usize, usize)> = Vec::new();
        for (s, sequence) in sequences.iter().enumerate() {
            for (r, (position, wanted)) in sequence.reads.iter().enumerate() {
                let run = self.paths[s].iter().map(|run| &self.pack.runs[*run]).rfind(|run| run.position <= *position);
                let run =
                    run.expect("a sequence's path covers its positions from `cached` on: grow() walks to its end");
                wishes.push((run.start + position - run.position, wanted.kind(), s, r));
            }
        }
        wishes.sort_unstable();
        for same in wishes.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let wish = |w: &(usize, u8, usize, usize)| &sequences[w.2].reads[w.3].1;
            let mut wanted = wish(&same[0]).clone();
            if let Some(ids) = wanted.ids_mut() {
                *ids = same.iter().flat_map(|w| wish(w).ids().iter().copied()).collect();
                ids.sort_unstable();
                ids.dedup();
            }
            let readers = same.iter().map(|w| Reader {
                sequence: w.2,
                read: w.3,
                picks: match wish(w) {
                    Wanted::Vocabulary | Wanted::Hidden => None,
                    Wanted::Logits(mine) | Wanted::LogProbs(mine) => {
                        let find = |id: &u32| wanted.ids().binary_search(id);
                        Some(mine.iter().map(|id| find(id).expect("the union was made of these")).collect())
                    }
                },
            });
            self.readers.push(readers.collect());
            self.pack.read.push(Read { at: same[0].0, wanted });
        }
    }
}

impl Wanted {
    /// The ids that are asked for; none where all are, or a hidden state is.
    pub fn ids(&self) -> &[u32] {
        match self {
            Wanted::Vocabulary | Wanted::Hidden => &[],
            Wanted::Logits(ids) | Wanted::LogProbs(ids) => ids,
        }
    }

    fn ids_mut(&mut self) -> Option<&mut Vec<u32>> {
        match self {
            Wanted::Vocabulary | Wanted::Hidden => None,
            Wanted::Logits(ids) | Wanted::LogProbs(ids) => Some(ids),
        }
    }

    /// A number for each kind.
    pub(super) fn kind(&self) -> u8 {
        match self {
            Wanted::Vocabulary => 0,
            Wanted::Logits(_) => 1,
            Wanted::LogProbs(_) => 2,
            Wanted::Hidden => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fresh<'a>(ids: &'a [u32], reads: &'a [(usize, Wanted)]) -> Sequence<'a> {
        Sequence { ids, past: &[], cached: 0, keep: 0, reads }
    }

    fn all(positions: std::ops::Range<usize>) -> Vec<(usize, Wanted)> {
        positions.map(|p| (p, Wanted::Vocabulary)).collect()
    }

    fn places(merged: &Merged) -> Vec<usize> {
        merged.pack.read.iter().map(|r| r.at).collect()
    }

    #[test]
    fn two_prompts_share_their_beginning() {
        let (a, b) = ([1, 2, 3, 4], [1, 2, 5]);
        let (read_a, read_b) = (all(3..4), all(2..3));
        let merged = Merged::new(&[fresh(&a, &read_a), fresh(&b, &read_b)]);
        let pack = &merged.pack;
        assert_eq!(pack.ids, [1, 2, 3, 4, 5]);
        assert_eq!(pack.runs.len(), 3);
        assert_eq!(pack.runs[2], Run { start: 4, len: 1, past: vec![], parents: vec![0], position: 2, keep: 0 });
        assert_eq!(places(&merged), [3, 4]);
        assert_eq!(merged.paths, [vec![0, 1], vec![0, 2]]);
        assert_eq!(merged.owners, [0, 0, 1]);
    }

    #[test]
    fn one_inside_the_other_and_twice_the_same() {
        let (a, b) = ([7, 8], [7, 8, 9]);
        let (whole, last, tail) = (all(0..2), all(1..2), all(1..3));
        let merged = Merged::new(&[fresh(&a, &whole), fresh(&a, &last), fresh(&b, &tail)]);
        assert_eq!(merged.pack.ids, [7, 8, 9]);
        // Each position once, whoever wants it.
        assert_eq!(places(&merged), [0, 1, 2]);
        let who = |r: &Vec<Reader>| r.iter().map(|r| (r.sequence, r.read)).collect::<Vec<_>>();
        assert_eq!(who(&merged.readers[1]), [(0, 1), (1, 0), (2, 0)]);
    }

    #[test]
    fn the_ids_that_are_wanted_of_a_position_are_brought_together() {
        let ids = [1, 2];
        let want = |w: Wanted| vec![(1, w)];
        let (a, b) = (want(Wanted::LogProbs(vec![9, 4])), want(Wanted::LogProbs(vec![4, 6])));
        let c = want(Wanted::Logits(vec![4]));
        let merged = Merged::new(&[fresh(&ids, &a), fresh(&ids, &b), fresh(&ids, &c)]);
        assert_eq!(merged.pack.read[0], Read { at: 1, wanted: Wanted::Logits(vec![4]) });
        assert_eq!(merged.pack.read[1], Read { at: 1, wanted: Wanted::LogProbs(vec![4, 6, 9]) });
        assert_eq!(merged.readers[1][0].picks, Some(vec![2, 0]));
        assert_eq!(merged.readers[1][1].picks, Some(vec![0, 1]));
    }

    #[test]
    fn what_is_kept_is_the_longest_that_anyone_wants() {
        let (a, b) = ([1, 2, 3, 4], [1, 2, 5]);
        let past = [Seen { segment: 0, len: 1 }];
        let none = Vec::new();
        let keep = |ids, keep| Sequence { ids, past: &past, cached: 1, keep, reads: &none };
        let merged = Merged::new(&[keep(&a[..], 3), keep(&b[..], 2)]);
        assert_eq!(merged.pack.ids, [2, 3, 4, 5]);
        assert_eq!(merged.pack.runs.iter().map(|r| (r.position, r.keep)).collect::<Vec<_>>(), [(1, 1), (2, 1), (2, 0)]);
    }

    proptest! {
        /// Following a read token's run, its parents and the cached tokens gives back the sequence up to there.
        #[test]
        fn every_path_spells_its_sequence(
            mut lists in prop::collection::vec((0usize..3, prop::collection::vec(0u32..3, 3..9)), 1..12),
        ) {
            // Cached: nothing, the segment [0], or the first two tokens of [1, 1, 1].
            let segments = [vec![0u32], vec![1, 1, 1]];
            let pasts = [vec![], vec![Seen { segment: 0, len: 1 }], vec![Seen { segment: 1, len: 2 }]];
            for (kind, ids) in &mut lists {
                for seen in &pasts[*kind] {
                    ids.splice(0..0, segments[seen.segment][..seen.len].iter().copied());
                }
            }
            lists.sort_by(|a, b| (&pasts[a.0], &a.1).cmp(&(&pasts[b.0], &b.1)));
            let reads: Vec<_> = lists.iter().map(|(_, l)| all(2 + l.len() % 3..l.len())).collect();
            let sequences: Vec<_> = lists.iter().zip(&reads).map(|((kind, ids), reads)| Sequence {
                ids, past: &pasts[*kind], cached: *kind, keep: 0, reads,
            }).collect();
            let merged = Merged::new(&sequences);
            let pack = &merged.pack;
            let mut seen = 0;
            for (read, readers) in pack.read.iter().zip(&merged.readers) {
                for reader in readers {
                    let run = pack.runs.iter().find(|r| (r.start..r.start + r.len).contains(&read.at)).unwrap();
                    let mut spelled = Vec::new();
                    for s in &run.past {
                        spelled.extend_from_slice(&segments[s.segment][..s.len]);
                    }
                    for parent in &run.parents {
                        let p = &pack.runs[*parent];
                        prop_assert_eq!(p.position, spelled.len());
                        spelled.extend_from_slice(&pack.ids[p.start..p.start + p.len]);
                    }
                    spelled.extend_from_slice(&pack.ids[run.start..=read.at]);
                    let position = reads[reader.sequence][reader.read].0;
                    prop_assert_eq!(&spelled[..], &lists[reader.sequence].1[..=position]);
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, reads.iter().map(Vec::len).sum::<usize>());
            let mut prefixes: Vec<(usize, &[u32])> = lists.iter()
                .flat_map(|(kind, l)| (kind + 1..=l.len()).map(move |n| (*kind, &l[..n]))).collect();
            prefixes.sort();
            prefixes.dedup();
            prop_assert_eq!(pack.ids.len(), prefixes.len());
        }
    }
}
