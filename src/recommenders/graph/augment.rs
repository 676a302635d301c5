//! Random subgraphs for contrastive learning (Wu et al. 2021, "Self-supervised graph learning for recommendation",
//! arXiv 2010.10783, section 3.1).
//!
//! In: a [`Bipartite`], a share, a generator. Out: a mark per edge, for [`Bipartite::normalised_kept`]. A subgraph has
//! edges of the train graph only, so nothing held out can enter it.

use rand::Rng;

use super::Bipartite;

/// Leaves out a share of the edges: exactly `floor(edges * (1 - share))` stay, all sets of that size being equally
/// likely.
pub fn drop_edges(graph: &Bipartite, share: f64, rng: &mut impl Rng) -> Vec<bool> {
    let n = graph.n_edges();
    chosen(n, (n as f64 * (1.0 - share)) as usize, rng)
}

/// Leaves out `floor(users * share)` users and `floor(items * share)` items with all their edges.
pub fn drop_nodes(graph: &Bipartite, share: f64, rng: &mut impl Rng) -> Vec<bool> {
    let mut gone = |n: usize| chosen(n, (n as f64 * share) as usize, rng);
    let (users, items) = (gone(graph.n_users()), gone(graph.n_items()));
    graph.edges().map(|(u, i)| !users[u as usize] && !items[i as usize]).collect()
}

/// Marks `k` of `n` (Knuth's selection sampling: one pass, no permutation).
fn chosen(n: usize, k: usize, rng: &mut impl Rng) -> Vec<bool> {
    let mut left = k.min(n);
    (0..n)
        .map(|at| {
            let take = left > 0 && rng.random_range(0..n - at) < left;
            left -= usize::from(take);
            take
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interactions::Histories;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use std::collections::BTreeSet;

    const USERS: usize = 6;
    const ITEMS: usize = 9;

    /// The edges of a normalised adjacency, with the value that the degrees in it ask for.
    fn edges_of(csr: &crate::recommenders::sparse::Csr) -> BTreeSet<(u32, u32)> {
        let mut edges = BTreeSet::new();
        let degree = |node: usize| csr.row(node).0.len() as f64;
        for user in 0..USERS {
            let (columns, values) = csr.row(user);
            for (&c, &v) in columns.iter().zip(values) {
                let want = 1.0 / (degree(user) * degree(c as usize)).sqrt();
                assert!((f64::from(v) - want).abs() < 1e-6, "{v} is not {want}");
                edges.insert((user as u32, c - USERS as u32));
            }
        }
        edges
    }

    proptest! {
        #[test]
        fn an_edge_drop_keeps_a_subset_of_the_right_size_and_renormalises(
            pairs in prop::collection::vec((0u32..USERS as u32, 0u32..ITEMS as u32), 0..50),
            share in 0.0f64..1.0, seed in any::<u64>(),
        ) {
            let train: BTreeSet<(u32, u32)> = pairs.iter().copied().collect();
            let graph = Bipartite::new(USERS, ITEMS, &Histories::from_pairs(USERS, &pairs));
            let keep = drop_edges(&graph, share, &mut ChaCha8Rng::seed_from_u64(seed));
            let csr = graph.normalised_kept(&keep);
            prop_assert_eq!(csr.transpose(), csr.clone());
            let kept = edges_of(&csr);
            prop_assert_eq!(kept.len(), (train.len() as f64 * (1.0 - share)) as usize);
            prop_assert!(kept.is_subset(&train), "an edge that is not in train");
        }

        #[test]
        fn a_node_drop_takes_whole_nodes(
            pairs in prop::collection::vec((0u32..USERS as u32, 0u32..ITEMS as u32), 0..50),
            share in 0.0f64..1.0, seed in any::<u64>(),
        ) {
            let train: BTreeSet<(u32, u32)> = pairs.iter().copied().collect();
            let graph = Bipartite::new(USERS, ITEMS, &Histories::from_pairs(USERS, &pairs));
            let keep = drop_nodes(&graph, share, &mut ChaCha8Rng::seed_from_u64(seed));
            let kept = edges_of(&graph.normalised_kept(&keep));
            prop_assert!(kept.is_subset(&train));
            // Some choice of that many users and items explains exactly what is missing: a node is untouched, or it
            // has lost edges to the dropped nodes of the other side only.
            let whole_users: BTreeSet<u32> = kept.iter().map(|e| e.0).collect();
            let whole_items: BTreeSet<u32> = kept.iter().map(|e| e.1).collect();
            for edge in &train {
                let both_stay = whole_users.contains(&edge.0) && whole_items.contains(&edge.1);
                prop_assert_eq!(kept.contains(edge), both_stay, "edge {:?}", edge);
            }
            let gone = |n: usize| (n as f64 * share) as usize;
            prop_assert!(whole_users.len() <= USERS - gone(USERS) && whole_items.len() <= ITEMS - gone(ITEMS));
        }
    }

    #[test]
    fn every_edge_is_dropped_as_often_as_any_other() {
        let pairs: Vec<(u32, u32)> = (0..6).flat_map(|u| (0..9).map(move |i| (u, i))).collect();
        let graph = Bipartite::new(USERS, ITEMS, &Histories::from_pairs(USERS, &pairs));
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut dropped = [0usize; 54];
        for _ in 0..4000 {
            for (edge, keep) in drop_edges(&graph, 0.25, &mut rng).into_iter().enumerate() {
                dropped[edge] += usize::from(!keep);
            }
        }
        // 14 of 54 each time: 1037 expected, standard deviation 28.
        assert!(dropped.iter().all(|&n| (920..1160).contains(&n)), "{dropped:?}");
    }

    #[test]
    fn nothing_and_everything_can_be_kept() {
        let graph = Bipartite::new(2, 2, &Histories::from_pairs(2, &[(0, 0), (1, 1)]));
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(drop_edges(&graph, 0.0, &mut rng), [true, true]);
        assert_eq!(drop_nodes(&graph, 0.0, &mut rng), [true, true]);
        assert_eq!(drop_edges(&graph, 1.0, &mut rng), [false, false]);
        let empty = Bipartite::new(0, 0, &Histories::default());
        assert!(drop_edges(&empty, 0.5, &mut rng).is_empty() && drop_nodes(&empty, 0.5, &mut rng).is_empty());
    }
}
