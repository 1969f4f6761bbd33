//! Host id -> record: an open-addressed table of indices, four bytes a slot.
//!
//! Ids are random by design, but one may be chosen by whoever holds its key, so they are mixed with a multiplier before
//! use. Linear probing with backward-shift deletion: no tombstones, so that a lookup stays short for ever.

const FREE: u32 = u32::MAX;
const SLOTS_MIN: usize = 64;

pub(crate) struct Index {
    slots: Vec<u32>,
    len: usize,
}

impl Index {
    pub(crate) fn new() -> Self {
        Self { slots: vec![FREE; SLOTS_MIN], len: 0 }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.slots.len() * size_of::<u32>()
    }

    fn home(&self, id: u64) -> usize {
        let mixed = (id ^ (id >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize & (self.slots.len() - 1)
    }

    /// The record in the first slot of `id`: most likely its own. For prefetching.
    pub(crate) fn first(&self, id: u64) -> u32 {
        self.slots[self.home(id)]
    }

    /// The record of `id`, where `id_at` tells the id of each record.
    pub(crate) fn get(&self, id: u64, id_at: impl Fn(u32) -> u64) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = self.home(id);
        loop {
            match self.slots[at] {
                FREE => return None,
                record if id_at(record) == id => return Some(record),
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// Adds `id`, which must not be there, as `record`.
    pub(crate) fn insert(&mut self, id: u64, record: u32, id_at: impl Fn(u32) -> u64) {
        if (self.len + 1) * 4 > self.slots.len() * 3 {
            self.grow(&id_at);
        }
        self.put(id, record);
        self.len += 1;
    }

    fn put(&mut self, id: u64, record: u32) {
        let mask = self.slots.len() - 1;
        let mut at = self.home(id);
        while self.slots[at] != FREE {
            at = (at + 1) & mask;
        }
        self.slots[at] = record;
    }

    fn grow(&mut self, id_at: &impl Fn(u32) -> u64) {
        let doubled = vec![FREE; self.slots.len() * 2];
        let old = std::mem::replace(&mut self.slots, doubled);
        for record in old.into_iter().filter(|&record| record != FREE) {
            self.put(id_at(record), record);
        }
    }

    /// Takes `id` out.
    pub(crate) fn remove(&mut self, id: u64, id_at: impl Fn(u32) -> u64) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = self.home(id);
        let removed = loop {
            match self.slots[at] {
                FREE => return None,
                record if id_at(record) == id => break record,
                _ => at = (at + 1) & mask,
            }
        };
        let mut hole = at;
        loop {
            at = (at + 1) & mask;
            let record = self.slots[at];
            if record == FREE {
                break;
            }
            // Moves back what may stand in the hole: its home is not between the hole and itself.
            let home = self.home(id_at(record));
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.slots[hole] = record;
                hole = at;
            }
        }
        self.slots[hole] = FREE;
        self.len -= 1;
        Some(removed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a map of the standard library, with ids that collide.
        #[test]
        fn it_is_a_map(steps in proptest::collection::vec((0u64..200, any::<bool>()), 1..600)) {
            let mut ids: Vec<u64> = Vec::new();
            let (mut index, mut model) = (Index::new(), HashMap::new());
            for (id, add) in steps {
                let id_at = |record: u32| ids[record as usize];
                prop_assert_eq!(index.get(id, id_at), model.get(&id).copied());
                if add && !model.contains_key(&id) {
                    let record = u32::try_from(ids.len()).unwrap();
                    ids.push(id);
                    index.insert(id, record, |record| ids[record as usize]);
                    model.insert(id, record);
                } else if !add {
                    prop_assert_eq!(index.remove(id, id_at), model.remove(&id));
                }
            }
            for (id, record) in &model {
                prop_assert_eq!(index.get(*id, |record| ids[record as usize]), Some(*record));
            }
            prop_assert_eq!(index.len, model.len());
        }
    }
}
