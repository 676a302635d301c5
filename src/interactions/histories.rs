//! What each user did, oldest first, as one flat array with offsets (CSR).

/// Items per user in time order.
///
/// `offsets` is `[users + 1]`, `items` is `[interactions]` of dense item indices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histories {
    offsets: Vec<usize>,
    items: Vec<u32>,
}

impl Histories {
    /// From `(user, item)` pairs that are in time order within each user
    /// (users may be interleaved): a stable counting sort by user.
    pub fn from_pairs(n_users: usize, pairs: &[(u32, u32)]) -> Self {
        let mut offsets = vec![0usize; n_users + 1];
        for &(u, _) in pairs {
            offsets[u as usize + 1] += 1;
        }
        for u in 0..n_users {
            offsets[u + 1] += offsets[u];
        }
        let mut next = offsets.clone();
        let mut items = vec![0u32; pairs.len()];
        for &(u, i) in pairs {
            items[next[u as usize]] = i;
            next[u as usize] += 1;
        }
        Histories { offsets, items }
    }

    /// Number of users.
    pub fn n_users(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Number of interactions.
    pub fn n_interactions(&self) -> usize {
        self.items.len()
    }

    /// The items of one user, oldest first.
    pub fn of(&self, user: usize) -> &[u32] {
        &self.items[self.offsets[user]..self.offsets[user + 1]]
    }

    /// `[users + 1]`: where each user's items begin in [`Histories::items`].
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// `[interactions]`: all items, user after user.
    pub fn items(&self) -> &[u32] {
        &self.items
    }
}
