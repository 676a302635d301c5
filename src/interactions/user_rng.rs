//! A random generator per user, from the stage's seed and the user's id alone.
//!
//! In: seed, purpose, id, a counter. Out: a generator that is the same for the same user
//! whoever else is in the table, in whatever order rows come, on however many threads.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::tables::Id;

/// The generator of `id` for one `purpose`; `n` tells several draws of one purpose apart.
pub fn user_rng(seed: u64, purpose: &str, id: &Id, n: u64) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update((purpose.len() as u64).to_le_bytes());
    hash.update(purpose.as_bytes());
    hash.update(n.to_le_bytes());
    match id {
        Id::Int(number) => {
            hash.update([0u8]);
            hash.update(number.to_le_bytes());
        }
        Id::Str(text) => {
            hash.update([1u8]);
            hash.update(text.as_bytes());
        }
    }
    ChaCha8Rng::from_seed(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn every_part_of_the_key_matters() {
        let draw = |seed, purpose: &str, id: Id, n| user_rng(seed, purpose, &id, n).random::<u64>();
        let base = draw(1, "order", Id::Int(7), 0);
        assert_eq!(base, draw(1, "order", Id::Int(7), 0));
        for other in [
            draw(2, "order", Id::Int(7), 0),
            draw(1, "shuffle", Id::Int(7), 0),
            draw(1, "order", Id::Int(8), 0),
            draw(1, "order", Id::Str("7".into()), 0),
            draw(1, "order", Id::Int(7), 1),
        ] {
            assert_ne!(base, other);
        }
    }
}
