//! Metrics of one ranked list with one relevant item, the leave-one-out protocol.
//!
//! In: the 1-based rank of the held-out item among all items the user has not seen
//! (`None` when it is not in the list). Out: the metric of one user; a table's value is the mean.

/// Hit@k: 1 when the held-out item is among the first `k`.
pub fn hit_at(rank: Option<usize>, k: usize) -> f64 {
    match rank {
        Some(r) if r <= k => 1.0,
        _ => 0.0,
    }
}

/// NDCG@k with one relevant item: `1 / log2(rank + 1)` inside the cut-off (the ideal DCG is 1).
pub fn ndcg_at(rank: Option<usize>, k: usize) -> f64 {
    match rank {
        Some(r) if r <= k => 1.0 / ((r + 1) as f64).log2(),
        _ => 0.0,
    }
}
