//! The user-item graph and the propagation of embeddings over it.
//!
//! In: histories. Out: [`Bipartite`], its normalised adjacency `[users + items, users + items]` whole or
//! augmented ([`augment`]), and [`Propagation`]: ego embeddings `[nodes, dim]` to final ones.
//! Nodes are the users, then the items.

pub mod augment;
mod propagation;

use super::sparse::Csr;
use crate::interactions::Histories;

pub use propagation::{Pooling, Propagation};

/// Who has interacted with what, each pair once. Edges are numbered by user, then by item.
#[derive(Clone, Debug, PartialEq)]
pub struct Bipartite {
    n_users: usize,
    n_items: usize,
    /// `[users + 1]`: where each user's edges begin.
    offsets: Vec<usize>,
    /// `[edges]`: the item, ascending within a user.
    items: Vec<u32>,
}

impl Bipartite {
    /// From histories; users of `0..n_users` that `histories` does not know have no edges.
    ///
    /// # Panics
    /// When a history names an item outside `0..n_items` (our bug).
    pub fn new(n_users: usize, n_items: usize, histories: &Histories) -> Self {
        let mut offsets = vec![0];
        let mut items = Vec::with_capacity(histories.n_interactions());
        let mut mine = Vec::new();
        for user in 0..n_users {
            if user < histories.n_users() {
                mine.clear();
                mine.extend_from_slice(histories.of(user));
                mine.sort_unstable();
                mine.dedup();
                assert!(
                    mine.last().is_none_or(|&i| (i as usize) < n_items),
                    "user {user} has an item of another model"
                );
                items.extend_from_slice(&mine);
            }
            offsets.push(items.len());
        }
        Bipartite { n_users, n_items, offsets, items }
    }

    /// Number of users and items.
    pub fn nodes(&self) -> usize {
        self.n_users + self.n_items
    }

    /// Number of users.
    pub fn n_users(&self) -> usize {
        self.n_users
    }

    /// Number of items.
    pub fn n_items(&self) -> usize {
        self.n_items
    }

    /// Number of distinct pairs.
    pub fn n_edges(&self) -> usize {
        self.items.len()
    }

    /// All edges `(user, item)` in the order of their numbers.
    pub fn edges(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        (0..self.n_users)
            .flat_map(move |u| self.items[self.offsets[u]..self.offsets[u + 1]].iter().map(move |&i| (u as u32, i)))
    }

    /// `D^-1/2 A D^-1/2`, symmetric; D is the diagonal of the degrees.
    pub fn normalised(&self) -> Csr {
        self.normalised_where(|_| true)
    }

    /// The same of the graph that has only the edges which `keep [edges]` marks: degrees are those of that graph.
    ///
    /// # Panics
    /// When `keep` has another length (our bug).
    pub fn normalised_kept(&self, keep: &[bool]) -> Csr {
        assert_eq!(keep.len(), self.n_edges(), "one mark per edge is wanted");
        self.normalised_where(|edge| keep[edge])
    }

    /// One pass counts, one fills: a row of a user has its items in order, and a row of an item gets its users in
    /// order because users come in order; nothing is sorted.
    fn normalised_where(&self, keep: impl Fn(usize) -> bool) -> Csr {
        let (n_users, nodes) = (self.n_users, self.nodes());
        let mut degrees = vec![0usize; nodes];
        for (edge, (user, item)) in self.edges().enumerate() {
            if keep(edge) {
                degrees[user as usize] += 1;
                degrees[n_users + item as usize] += 1;
            }
        }
        let mut offsets = vec![0usize; nodes + 1];
        for node in 0..nodes {
            offsets[node + 1] = offsets[node] + degrees[node];
        }
        let (mut columns, mut values) = (vec![0u32; offsets[nodes]], vec![0f32; offsets[nodes]]);
        let mut next = offsets.clone();
        for (edge, (user, item)) in self.edges().enumerate() {
            if keep(edge) {
                let (u, i) = (user as usize, n_users + item as usize);
                let value = (1.0 / (degrees[u] as f64 * degrees[i] as f64).sqrt()) as f32;
                for (row, column) in [(u, i), (i, u)] {
                    (columns[next[row]], values[next[row]]) = (column as u32, value);
                    next[row] += 1;
                }
            }
        }
        Csr::from_parts(nodes, nodes, offsets, columns, values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacency_is_symmetric_and_normalised_by_degrees() {
        // User 0: items 0, 1 (item 0 twice in the log); user 1: item 1; user 2 is unknown; item 2 unseen.
        let train = Histories::from_pairs(2, &[(0, 0), (0, 1), (1, 1), (0, 0)]);
        let graph = Bipartite::new(3, 3, &train).normalised();
        assert_eq!((graph.rows(), graph.cols(), graph.nonzeros()), (6, 6, 6));
        assert_eq!(graph.transpose(), graph);
        let half = 0.5f32; // degrees: user 0 and item 1 have 2, user 1 and item 0 have 1
        assert_eq!(graph.row(0), (&[3u32, 4][..], &[half.sqrt(), half][..]));
        assert_eq!(graph.row(1), (&[4u32][..], &[half.sqrt()][..]));
        assert_eq!(graph.row(2), (&[][..], &[][..]));
        assert_eq!(graph.row(5), (&[][..], &[][..]));
    }

    #[test]
    fn degrees_are_those_of_the_kept_graph() {
        let train = Histories::from_pairs(2, &[(0, 0), (0, 1), (1, 1)]);
        let graph = Bipartite::new(2, 2, &train);
        assert_eq!(graph.edges().collect::<Vec<_>>(), [(0, 0), (0, 1), (1, 1)]);
        let kept = graph.normalised_kept(&[true, false, true]);
        // Two single edges are left: every degree is 1.
        assert_eq!(kept.row(0), (&[2u32][..], &[1.0f32][..]));
        assert_eq!(kept.row(1), (&[3u32][..], &[1.0f32][..]));
        assert_eq!(kept, Bipartite::new(2, 2, &Histories::from_pairs(2, &[(0, 0), (1, 1)])).normalised());
    }
}
