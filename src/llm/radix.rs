//! What is known of prompts that were computed before: a radix tree over token ids whose nodes own keys and values.
//!
//! In: token ids and the segments that a decoder made of them. Out: for a prompt, the segments of the longest
//! beginning that the tree holds. Its segments never take more bytes than its budget: the leaf that was used
//! longest ago goes first, and nothing goes that a running batch holds, since that would free no memory.
//!
//! The tree only saves work. What a position gives does not depend on how the tokens before it are divided into
//! segments, so results are the same with any budget, and whatever was asked before.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::pack::common_prefix;

/// The first tokens of a segment, shared with whoever else uses it.
#[derive(Debug)]
pub struct Held<S> {
    /// Keys and values.
    pub segment: Arc<S>,
    /// Its first tokens that are meant.
    pub len: usize,
}

impl<S> Clone for Held<S> {
    fn clone(&self) -> Self {
        Held { segment: self.segment.clone(), len: self.len }
    }
}

/// Tokens that follow those of the parent.
struct Node<S> {
    ids: Vec<u32>,
    segment: Arc<S>,
    /// By first token.
    children: BTreeMap<u32, usize>,
    parent: Option<usize>,
    used: u64,
}

/// A radix tree within a budget of bytes.
pub struct Radix<S> {
    nodes: Vec<Option<Node<S>>>,
    free: Vec<usize>,
    /// By first token.
    roots: BTreeMap<u32, usize>,
    token_bytes: usize,
    tokens: usize,
    budget: usize,
    clock: u64,
}

/// Where a sequence leaves the tree.
struct Place {
    /// The last node that it shares a token with.
    node: Option<usize>,
    /// Tokens of that node that it shares.
    within: usize,
    /// Tokens that it shares with the tree.
    depth: usize,
}

impl<S> Radix<S> {
    /// An empty tree; a token's keys and values take `token_bytes`.
    pub fn new(token_bytes: usize, budget: usize) -> Self {
        let (nodes, free, roots) = (Vec::new(), Vec::new(), BTreeMap::new());
        Radix { nodes, free, roots, token_bytes: token_bytes.max(1), tokens: 0, budget, clock: 0 }
    }

    /// Tokens in the tree.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of the tree's segments.
    pub fn bytes(&self) -> usize {
        self.tokens * self.token_bytes
    }

    /// Changes the budget, and drops what is beyond it and not in use.
    pub fn set_budget(&mut self, bytes: usize) {
        self.budget = bytes;
        self.make_room(0, None);
    }

    /// The segments of the longest beginning of `ids` that the tree holds.
    pub fn lookup(&mut self, ids: &[u32]) -> Vec<Held<S>> {
        let mut out = Vec::new();
        self.clock += 1;
        self.walk(ids, &mut |node, len, clock| {
            node.used = clock;
            out.push(Held { segment: node.segment.clone(), len });
        });
        out
    }

    /// Adds `segment`, the tokens of `ids` from `from` on, where the tree holds those before and has room; `slice`
    /// copies a part of a segment (first token, tokens). Says whether the tree holds all of `ids` now.
    pub fn insert(&mut self, ids: &[u32], from: usize, segment: Arc<S>, slice: &dyn Fn(&S, usize, usize) -> S) -> bool {
        self.clock += 1;
        let place = self.walk(ids, &mut |node, _, clock| node.used = clock);
        if place.depth == ids.len() {
            return true;
        }
        if place.depth < from || !self.make_room(ids.len() - place.depth, place.node) {
            return false;
        }
        let segment = if place.depth == from {
            segment
        } else {
            Arc::new(slice(&segment, place.depth - from, ids.len() - place.depth))
        };
        if let Some(node) = place.node {
            self.split(node, place.within, slice);
        }
        let tail = ids[place.depth..].to_vec();
        self.tokens += tail.len();
        let first = tail[0];
        let child =
            self.add(Node { ids: tail, segment, children: BTreeMap::new(), parent: place.node, used: self.clock });
        match place.node {
            Some(parent) => self.node(parent).children.insert(first, child),
            None => self.roots.insert(first, child),
        };
        true
    }

    /// Follows `ids` down the tree, and calls `each` with every node on the way, the tokens of it that are shared, and the clock.
    fn walk(&mut self, ids: &[u32], each: &mut dyn FnMut(&mut Node<S>, usize, u64)) -> Place {
        let clock = self.clock;
        let mut place = Place { node: None, within: 0, depth: 0 };
        let mut next = ids.first().and_then(|id| self.roots.get(id)).copied();
        while let Some(index) = next {
            let node = self.node(index);
            let shared = common_prefix(&node.ids, &ids[place.depth..]);
            each(node, shared, clock);
            place = Place { node: Some(index), within: shared, depth: place.depth + shared };
            let whole = shared == node.ids.len();
            next = ids.get(place.depth).filter(|_| whole).and_then(|id| node.children.get(id)).copied();
        }
        place
    }

    /// Makes the first `at` tokens of a node a node of their own, in its place; the others become its child.
    fn split(&mut self, index: usize, at: usize, slice: &dyn Fn(&S, usize, usize) -> S) {
        let node = self.node(index);
        let len = node.ids.len();
        if at == len {
            return;
        }
        let (head, tail) = (slice(&node.segment, 0, at), slice(&node.segment, at, len - at));
        let ids = node.ids.split_off(at);
        node.segment = Arc::new(head);
        let (first, children, used) = (ids[0], std::mem::take(&mut node.children), node.used);
        let grandchildren: Vec<usize> = children.values().copied().collect();
        let child = self.add(Node { ids, segment: Arc::new(tail), children, parent: Some(index), used });
        for grandchild in grandchildren {
            self.node(grandchild).parent = Some(child);
        }
        self.node(index).children.insert(first, child);
    }

    /// Drops leaves until `tokens` more fit; `except` stays. Says whether they fit.
    fn make_room(&mut self, tokens: usize, except: Option<usize>) -> bool {
        let room = self.budget / self.token_bytes;
        if tokens > room {
            return false;
        }
        while self.tokens + tokens > room {
            let unused = |(i, node): (usize, &Option<Node<S>>)| {
                let node = node.as_ref()?;
                let free = node.children.is_empty() && Some(i) != except && Arc::strong_count(&node.segment) == 1;
                free.then_some((node.used, i))
            };
            let Some((_, oldest)) = self.nodes.iter().enumerate().filter_map(unused).min() else { return false };
            self.remove(oldest);
        }
        true
    }

    fn remove(&mut self, index: usize) {
        let Some(node) = self.nodes[index].take() else { return };
        self.free.push(index);
        self.tokens -= node.ids.len();
        match node.parent {
            Some(parent) => self.node(parent).children.remove(&node.ids[0]),
            None => self.roots.remove(&node.ids[0]),
        };
    }

    fn add(&mut self, node: Node<S>) -> usize {
        match self.free.pop() {
            Some(index) => {
                self.nodes[index] = Some(node);
                index
            }
            None => {
                self.nodes.push(Some(node));
                self.nodes.len() - 1
            }
        }
    }

    fn node(&mut self, index: usize) -> &mut Node<S> {
        self.nodes[index].as_mut().expect("children and parents are removed from each other with the node")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A segment that is its own tokens.
    type Tokens = Vec<u32>;

    fn slice(segment: &Tokens, from: usize, len: usize) -> Tokens {
        segment[from..from + len].to_vec()
    }

    fn spell(held: &[Held<Tokens>]) -> Vec<u32> {
        held.iter().flat_map(|h| h.segment[..h.len].iter().copied()).collect()
    }

    fn add(tree: &mut Radix<Tokens>, ids: &[u32]) -> bool {
        let known: usize = tree.lookup(ids).iter().map(|h| h.len).sum();
        tree.insert(ids, known, Arc::new(ids[known..].to_vec()), &slice)
    }

    #[test]
    fn the_longest_known_beginning_is_found() {
        let mut tree = Radix::new(1, 100);
        assert!(add(&mut tree, &[1, 2, 3, 4]));
        assert!(add(&mut tree, &[1, 2, 5]));
        assert_eq!(tree.tokens(), 5);
        assert_eq!(spell(&tree.lookup(&[1, 2, 3, 9])), [1, 2, 3]);
        assert_eq!(spell(&tree.lookup(&[1, 2, 5, 6])), [1, 2, 5]);
        assert_eq!(tree.lookup(&[1, 2, 5, 6]).len(), 2);
        assert!(tree.lookup(&[2]).is_empty());
        // A segment that begins earlier than what is missing is cut.
        assert!(tree.insert(&[1, 2, 3, 4, 7], 2, Arc::new(vec![3, 4, 7]), &slice));
        assert_eq!(tree.tokens(), 6);
        // Nothing is known of what comes before.
        assert!(!tree.insert(&[8, 8, 8], 1, Arc::new(vec![8, 8]), &slice));
    }

    #[test]
    fn the_leaf_that_was_used_longest_ago_goes_first() {
        let mut tree = Radix::new(10, 60);
        for leaf in [3, 4, 5, 6] {
            add(&mut tree, &[1, 2, leaf]);
        }
        assert_eq!(tree.tokens(), 6);
        tree.lookup(&[1, 2, 3]);
        add(&mut tree, &[1, 2, 7]);
        assert_eq!(spell(&tree.lookup(&[1, 2, 3])), [1, 2, 3]);
        assert_eq!(spell(&tree.lookup(&[1, 2, 4])), [1, 2]);
        assert!(!add(&mut tree, &[9; 7]), "larger than the budget");
        tree.set_budget(20);
        assert_eq!(tree.bytes(), 20);
        assert_eq!(spell(&tree.lookup(&[1, 2, 3])), [1, 2]);
    }

    #[test]
    fn what_is_in_use_stays() {
        let mut tree = Radix::new(1, 4);
        add(&mut tree, &[1, 2, 3]);
        let held = tree.lookup(&[1, 2, 3]);
        assert!(!add(&mut tree, &[5, 6]));
        assert_eq!(spell(&tree.lookup(&[1, 2, 3])), [1, 2, 3]);
        drop(held);
        assert!(add(&mut tree, &[5, 6]));
        assert_eq!(tree.tokens(), 2);
    }

    proptest! {
        /// Whatever was added, used and dropped before: what is found spells the prompt, and the budget holds.
        #[test]
        fn any_order_of_additions_and_budgets(
            steps in prop::collection::vec(
                (prop::collection::vec(0u32..3, 1..9), 0usize..40, any::<bool>(), any::<bool>()), 1..60),
        ) {
            let mut tree = Radix::new(1, 30);
            let mut held: Vec<(Vec<u32>, Vec<Held<Tokens>>)> = Vec::new();
            for (ids, budget, hold, change) in steps {
                if change {
                    tree.set_budget(budget);
                } else {
                    let known = tree.lookup(&ids);
                    prop_assert!(ids.starts_with(&spell(&known)));
                    let from = spell(&known).len();
                    if from < ids.len() && tree.insert(&ids, from, Arc::new(ids[from..].to_vec()), &slice) {
                        prop_assert_eq!(spell(&tree.lookup(&ids)), ids.clone());
                    }
                    if hold {
                        held.push((ids.clone(), tree.lookup(&ids)));
                    } else {
                        held.clear();
                    }
                }
                for (ids, held) in &held {
                    prop_assert!(ids.starts_with(&spell(held)));
                }
                let counted: usize = tree.nodes.iter().flatten().map(|n| n.ids.len()).sum();
                prop_assert_eq!(counted, tree.tokens());
                for node in tree.nodes.iter().flatten() {
                    prop_assert_eq!(&node.ids, &*node.segment);
                }
                if held.is_empty() {
                    tree.make_room(0, None);
                    prop_assert!(tree.tokens() <= tree.budget);
                }
            }
        }
    }
}
