//! Random numbers of one purpose: a function of the seed and the purpose's name, so that one draw more of one does not move another.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// The numbers of a purpose.
pub fn stream(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // FNV-1a.
    let hash = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    rng.set_stream(purpose.bytes().fold(0xcbf2_9ce4_8422_2325, hash));
    rng
}

/// A seed of a seed and a number.
pub fn derived(seed: u64, number: u64) -> u64 {
    // SplitMix64.
    let mut x = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
