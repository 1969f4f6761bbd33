//! A seeded hasher for ids: fast, and not to be steered by whoever draws the ids.
//!
//! Launch ids come from strangers, so that an unkeyed hash would let them pile all entries into one bucket. The
//! seed is given by the caller (a core draws none) and is secret. Each word is multiplied into 128 bits and
//! folded, as wyhash does.

use core::hash::{BuildHasher, Hasher};

/// Makes [`FoldHasher`]s of one seed.
#[derive(Clone, Copy, Debug)]
pub struct Seeded {
    seed: u64,
}

impl Seeded {
    /// Of a secret seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }
}

impl BuildHasher for Seeded {
    type Hasher = FoldHasher;
    fn build_hasher(&self) -> FoldHasher {
        FoldHasher { state: self.seed }
    }
}

/// Folded multiplication over 64-bit words.
#[derive(Clone, Copy, Debug)]
pub struct FoldHasher {
    state: u64,
}

impl FoldHasher {
    #[expect(clippy::cast_possible_truncation, reason = "both halves of the product are used")]
    fn fold(&mut self, word: u64) {
        let product = u128::from(self.state ^ word ^ 0x9e37_79b9_7f4a_7c15)
            * u128::from(self.state.rotate_left(32) ^ 0xd6e8_feb8_6659_fd93);
        self.state = (product as u64) ^ ((product >> 64) as u64);
    }
}

impl Hasher for FoldHasher {
    fn finish(&self) -> u64 {
        self.state
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.fold(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.fold(word);
    }

    fn write_usize(&mut self, word: usize) {
        self.fold(word as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_spread_over_buckets_and_seeds_differ() {
        let one = Seeded::new(7);
        let low: HashSet<u64> = (0..10_000u64).map(|id| one.hash_one(id) & 0xffff).collect();
        assert!(low.len() > 9_000, "{} distinct of 10,000", low.len());
        assert_ne!(one.hash_one([1u8; 16]), Seeded::new(8).hash_one([1u8; 16]));
        assert_ne!(one.hash_one([1u8; 16]), one.hash_one([2u8; 16]));
    }
}
