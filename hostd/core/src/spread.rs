//! A map that grows a little at a time.
//!
//! A hash table that is full moves all its entries at once. For a host that remembers a hundred thousand launches that is
//! some milliseconds in which it answers nobody, and hosts of like age would do it at the same time. So there are many small
//! tables, and each fills up at a moment of its own. Left out: iteration; whoever wants order keeps it.

use std::{collections::HashMap, hash::BuildHasher};

use wire::{LaunchId, hash::Seeded};

/// Tables. With 64 of them a move takes a sixty-fourth of the time, and they come one after another.
const PARTS: u64 = 64;

/// Values by launch id.
#[derive(Debug)]
pub(crate) struct Spread<T> {
    parts: Box<[HashMap<LaunchId, T, Seeded>]>,
    /// Draws the part; not the seed of the parts themselves, whose buckets would else go unused.
    draw: Seeded,
    len: usize,
}

impl<T> Spread<T> {
    /// Empty, under a secret seed.
    pub(crate) fn new(seed: u64) -> Self {
        let part = |_| HashMap::with_hasher(Seeded::new(seed));
        Self { parts: (0..PARTS).map(part).collect(), draw: Seeded::new(!seed), len: 0 }
    }

    fn part(&self, id: &LaunchId) -> usize {
        usize::try_from(self.draw.hash_one(id) % PARTS).unwrap_or_default()
    }

    pub(crate) fn get(&self, id: &LaunchId) -> Option<&T> {
        self.parts[self.part(id)].get(id)
    }

    pub(crate) fn get_mut(&mut self, id: &LaunchId) -> Option<&mut T> {
        self.parts[self.part(id)].get_mut(id)
    }

    pub(crate) fn insert(&mut self, id: LaunchId, value: T) {
        let before = self.parts[self.part(&id)].insert(id, value);
        self.len += usize::from(before.is_none());
    }

    pub(crate) fn remove(&mut self, id: &LaunchId) {
        let before = self.parts[self.part(id)].remove(id);
        self.len -= usize::from(before.is_some());
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((any::<u8>(), any::<bool>(), any::<u32>()), 0..500)) {
            let (mut spread, mut plain) = (Spread::new(7), HashMap::new());
            for (id, insert, value) in steps {
                let id = LaunchId([id; 16]);
                if insert {
                    spread.insert(id, value);
                    plain.insert(id, value);
                } else {
                    spread.remove(&id);
                    plain.remove(&id);
                }
                prop_assert_eq!(spread.get(&id), plain.get(&id));
                prop_assert_eq!(spread.len(), plain.len());
            }
        }
    }

    #[test]
    fn no_part_gets_much_more_than_its_share() {
        let mut spread = Spread::new(7);
        (0..64_000u128).for_each(|id| spread.insert(LaunchId(id.to_le_bytes()), ()));
        let most = spread.parts.iter().map(HashMap::len).max();
        assert!(most.is_some_and(|most| (1_000..1_200).contains(&most)), "{most:?}");
    }
}
