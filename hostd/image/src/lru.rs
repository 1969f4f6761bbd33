//! A table that knows what was used longest ago, and how much everything in it weighs.

use std::collections::{BTreeMap, HashMap};

use crate::id::Hash;

/// Values by hash, with weights.
#[derive(Debug)]
pub(crate) struct Lru<V> {
    values: HashMap<Hash, Held<V>>,
    /// By last use.
    order: BTreeMap<u64, Hash>,
    weight: u64,
    clock: u64,
}

#[derive(Debug)]
struct Held<V> {
    used: u64,
    weight: u64,
    value: V,
}

impl<V> Default for Lru<V> {
    fn default() -> Self {
        Self { values: HashMap::new(), order: BTreeMap::new(), weight: 0, clock: 0 }
    }
}

impl<V> Lru<V> {
    /// The weight of all.
    pub(crate) fn weight(&self) -> u64 {
        self.weight
    }

    /// The value, which counts as used now.
    pub(crate) fn get(&mut self, hash: &Hash) -> Option<&V> {
        let held = self.values.get_mut(hash)?;
        self.clock += 1;
        self.order.remove(&held.used);
        held.used = self.clock;
        self.order.insert(self.clock, *hash);
        Some(&held.value)
    }

    /// Puts a value in, in place of the one that was there.
    pub(crate) fn insert(&mut self, hash: Hash, weight: u64, value: V) {
        self.remove(&hash);
        self.clock += 1;
        self.values.insert(hash, Held { used: self.clock, weight, value });
        self.order.insert(self.clock, hash);
        self.weight += weight;
    }

    /// Takes a value out.
    pub(crate) fn remove(&mut self, hash: &Hash) -> Option<V> {
        let held = self.values.remove(hash)?;
        self.order.remove(&held.used);
        self.weight -= held.weight;
        Some(held.value)
    }

    /// Takes out what was used longest ago, if all together with `more` would weigh more than `max`.
    pub(crate) fn pop_over(&mut self, max: u64, more: u64) -> Option<Hash> {
        if self.weight.saturating_add(more) <= max {
            return None;
        }
        let (_, hash) = self.order.pop_first()?;
        self.remove(&hash);
        Some(hash)
    }
}
