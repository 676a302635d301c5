//! The candidates that are left, as a trie over their token ids: what a constrained generation may say next.
//!
//! In: the token ids of candidates, each with its terminator. Out: the allowed next tokens, and the candidate that was
//! written once it is complete; it is then taken out. So a list cannot repeat, invent or drop a candidate.
//! Candidates may be equal (two items of one title: the one that was given first comes first) and one may be the
//! beginning of another: with a terminator that no candidate contains, such as the end of the line, it is
//! the model that chooses between "Alien" and "Aliens". Without one, the shorter comes first.

/// A node: the tokens from the root to it are the beginning of `left` candidates.
#[derive(Clone, Debug, Default)]
struct Node {
    /// By token, ascending.
    children: Vec<(u32, usize)>,
    /// Candidates that end here and are left; the last one is written first.
    ends: Vec<usize>,
    left: usize,
}

/// What may follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// A candidate is complete.
    Complete(usize),
    /// One token only.
    Forced(u32),
    /// One of these, ascending, at least two.
    Choice(Vec<u32>),
    /// No candidate is left.
    Empty,
}

/// Candidates that are left, and how far the current one is written.
#[derive(Clone, Debug)]
pub struct Trie {
    nodes: Vec<Node>,
    /// Nodes from the root to where the writing is.
    path: Vec<usize>,
}

impl Trie {
    /// A trie over candidates. A candidate may be empty.
    pub fn new<'a>(candidates: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut nodes = vec![Node::default()];
        for (index, ids) in candidates.into_iter().enumerate() {
            let mut at = 0;
            nodes[at].left += 1;
            for id in ids {
                at = match nodes[at].children.binary_search_by_key(id, |c| c.0) {
                    Ok(found) => nodes[at].children[found].1,
                    Err(place) => {
                        let fresh = nodes.len();
                        nodes[at].children.insert(place, (*id, fresh));
                        nodes.push(Node::default());
                        fresh
                    }
                };
                nodes[at].left += 1;
            }
            nodes[at].ends.push(index);
        }
        nodes.iter_mut().for_each(|n| n.ends.reverse());
        Trie { nodes, path: vec![0] }
    }

    /// Candidates that are left.
    pub fn left(&self) -> usize {
        self.nodes[0].left
    }

    /// What may follow what was written of the current candidate.
    pub fn next(&self) -> Next {
        let node = &self.nodes[self.here()];
        if node.left == 0 {
            return Next::Empty;
        }
        if let Some(candidate) = node.ends.last() {
            return Next::Complete(*candidate);
        }
        let mut allowed = node.children.iter().filter(|c| self.nodes[c.1].left > 0).map(|c| c.0);
        match (allowed.next(), allowed.next()) {
            (Some(only), None) => Next::Forced(only),
            (Some(first), Some(second)) => Next::Choice([first, second].into_iter().chain(allowed).collect()),
            // Counted above: something is left below this node.
            (None, _) => Next::Empty,
        }
    }

    /// Writes a token of the current candidate; says whether it was allowed.
    pub fn write(&mut self, token: u32) -> bool {
        let children = &self.nodes[self.here()].children;
        let Ok(found) = children.binary_search_by_key(&token, |c| c.0) else { return false };
        let child = children[found].1;
        let allowed = self.nodes[child].left > 0;
        if allowed {
            self.path.push(child);
        }
        allowed
    }

    /// Takes the complete candidate out and begins the next one.
    pub fn take(&mut self) -> Option<usize> {
        let here = self.here();
        let candidate = self.nodes[here].ends.pop()?;
        for node in self.path.drain(..) {
            self.nodes[node].left -= 1;
        }
        self.path.push(0);
        Some(candidate)
    }

    fn here(&self) -> usize {
        self.path.last().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes all candidates; of several tokens takes the one that `choose` points to.
    fn write_all(trie: &mut Trie, choose: &mut dyn FnMut(usize) -> usize) -> Vec<usize> {
        let mut order = Vec::new();
        loop {
            match trie.next() {
                Next::Empty => return order,
                Next::Complete(candidate) => {
                    assert_eq!(trie.take(), Some(candidate));
                    order.push(candidate);
                }
                Next::Forced(token) => assert!(trie.write(token)),
                Next::Choice(tokens) => {
                    assert!(tokens.len() > 1);
                    assert!(trie.write(tokens[choose(tokens.len())]));
                }
            }
        }
    }

    /// 0 ends a line; "Alien" and "Aliens" begin alike, and the model decides at the end of the shorter.
    #[test]
    fn a_title_that_begins_another_ends_by_its_terminator() {
        let candidates: [&[u32]; 3] = [&[5, 0], &[5, 6, 0], &[7, 0]];
        let mut trie = Trie::new(candidates);
        assert_eq!(trie.next(), Next::Choice(vec![5, 7]));
        assert!(trie.write(5));
        assert_eq!(trie.next(), Next::Choice(vec![0, 6]));
        assert!(!trie.write(7));
        assert!(trie.write(6));
        assert_eq!(trie.next(), Next::Forced(0));
        assert!(trie.write(0));
        assert_eq!(trie.take(), Some(1));
        // What was written is not offered again.
        assert_eq!(trie.next(), Next::Choice(vec![5, 7]));
        assert!(trie.write(5));
        assert_eq!(trie.next(), Next::Forced(0));
    }

    #[test]
    fn equal_titles_keep_their_order_and_a_bare_prefix_comes_first() {
        let candidates: [&[u32]; 4] = [&[4, 0], &[4], &[4, 0], &[]];
        let mut trie = Trie::new(candidates);
        assert_eq!(write_all(&mut trie, &mut |_| 0), [3, 1, 0, 2]);
        assert_eq!((trie.next(), trie.left(), trie.take()), (Next::Empty, 0, None));
    }

    proptest! {
        #[test]
        fn every_candidate_is_written_once(
            candidates in prop::collection::vec(prop::collection::vec(0u32..4, 0..5), 0..20),
            choices in prop::collection::vec(0usize..1000, 200),
        ) {
            let mut trie = Trie::new(candidates.iter().map(Vec::as_slice));
            let mut next = choices.into_iter().cycle();
            let mut order = write_all(&mut trie, &mut |n| next.next().unwrap() % n);
            for same in (0..order.len()).filter_map(|i| {
                order[i + 1..].iter().find(|o| candidates[**o] == candidates[order[i]]).map(|o| (order[i], *o))
            }) {
                prop_assert!(same.0 < same.1);
            }
            order.sort_unstable();
            prop_assert_eq!(order, (0..candidates.len()).collect::<Vec<_>>());
        }
    }
}
