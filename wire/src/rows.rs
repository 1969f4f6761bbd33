//! Rows by launch id, which grow without a stall and are reached with few cache misses.
//!
//! Hosts and placers remember the launches of the last minutes: rows that no cache holds, and of which every launch looks
//! one up, adds one and drops one. What costs is memory, not work, so that
//! - an index holds eight bytes a row (half a hash and the row's place), so that an id that is new is known to be after one line;
//! - rows lie in chunks that never move, and a caller keeps a row's [`Place`] instead of looking it up again;
//! - the order in which rows go lies in the rows themselves, and the room of a row that went is the next one's;
//! - an index that is full grows by a few entries a row: a table that moves at once holds up whoever asks (hosts of like age would
//!   all do it at the same moment).
//!
//! Left out: iteration, and giving memory back: what was needed once is needed again.

use alloc::{boxed::Box, vec::Vec};
use core::hash::BuildHasher;

use crate::{LaunchId, hash::Seeded};

/// Rows of a chunk: small enough that taking a new one is no stall, even for many tables at once.
const CHUNK: usize = 64;

/// Where a row lies, until it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u32);

/// Beyond either end of the queue.
const END: u32 = u32::MAX;
/// In place of a neighbour: the row is not in the queue.
const LOOSE: u32 = u32::MAX - 1;

#[derive(Debug)]
struct Row<T> {
    id: LaunchId,
    /// Neighbours in the queue. Of a free row, `newer` is the next free one.
    older: u32,
    newer: u32,
    value: Option<T>,
}

/// Values by launch id, and a queue of those that go one day.
#[derive(Debug)]
pub struct Rows<T> {
    chunks: Vec<Box<[Row<T>]>>,
    index: Index,
    seed: Seeded,
    /// First free row, rows that were ever used, and rows in use.
    free: u32,
    used: u32,
    len: usize,
    oldest: u32,
    newest: u32,
}

impl<T> Rows<T> {
    /// None yet; `seed` is secret, since strangers draw the ids.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            chunks: Vec::new(),
            index: Index::default(),
            seed: Seeded::new(seed),
            free: END,
            used: 0,
            len: 0,
            oldest: END,
            newest: END,
        }
    }

    /// Rows that there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn row(&self, at: u32) -> &Row<T> {
        &self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    fn row_mut(&mut self, at: u32) -> &mut Row<T> {
        &mut self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    /// Where the row of an id lies.
    #[must_use]
    pub fn find(&self, id: &LaunchId) -> Option<Place> {
        let hash = self.seed.hash_one(id);
        self.index.find(hash, |at| self.row(at).id == *id).map(Place)
    }

    /// Has the memory on its way in which an id will be looked up: useful when there is something else to do before that.
    #[inline]
    pub fn warm(&self, id: &LaunchId) {
        self.index.warm(self.seed.hash_one(id));
    }

    /// The row there, if one still is: the place of a row that was removed may be another's.
    #[must_use]
    pub fn get(&self, place: Place) -> Option<&T> {
        self.row(place.0).value.as_ref()
    }

    /// The row there, to be changed.
    #[must_use]
    pub fn get_mut(&mut self, place: Place) -> Option<&mut T> {
        self.row_mut(place.0).value.as_mut()
    }

    /// Adds a row, in no queue. The id must have none yet.
    ///
    /// # Panics
    /// With 2^32 rows, which no memory holds.
    pub fn insert(&mut self, id: LaunchId, value: T) -> Place {
        debug_assert!(self.find(&id).is_none(), "one row an id");
        let row = Row { id, older: LOOSE, newer: LOOSE, value: Some(value) };
        let at = self.free;
        let at = if at == END {
            let at = self.used;
            assert!(at < LOOSE, "fewer than 2^32 rows");
            if at as usize / CHUNK == self.chunks.len() {
                self.chunks.push((0..CHUNK).map(|_| Row::free()).collect());
            }
            self.used += 1;
            at
        } else {
            self.free = self.row(at).newer;
            at
        };
        *self.row_mut(at) = row;
        self.index.insert(self.seed.hash_one(id), at);
        self.len += 1;
        Place(at)
    }

    /// Removes a row.
    pub fn remove(&mut self, place: Place) -> Option<T> {
        self.step_out(place);
        let free = self.free;
        let row = self.row_mut(place.0);
        let value = row.value.take()?;
        row.newer = free;
        let id = row.id;
        let hash = self.seed.hash_one(id);
        self.free = place.0;
        self.index.remove(hash, place.0);
        self.len -= 1;
        Some(value)
    }

    /// Puts a row at the end of the queue, from wherever it was.
    pub fn line_up(&mut self, place: Place) {
        self.step_out(place);
        let newest = core::mem::replace(&mut self.newest, place.0);
        let row = self.row_mut(place.0);
        debug_assert!(row.value.is_some(), "only rows that are there wait");
        (row.older, row.newer) = (newest, END);
        if newest == END {
            self.oldest = place.0;
        } else {
            self.row_mut(newest).newer = place.0;
        }
    }

    /// Takes a row out of the queue, if it is there.
    pub fn step_out(&mut self, place: Place) {
        let row = self.row_mut(place.0);
        if row.older == LOOSE {
            return;
        }
        let (older, newer) = (row.older, row.newer);
        (row.older, row.newer) = (LOOSE, LOOSE);
        if older == END {
            self.oldest = newer;
        } else {
            self.row_mut(older).newer = newer;
        }
        if newer == END {
            self.newest = older;
        } else {
            self.row_mut(newer).older = older;
        }
    }

    /// The first row of the queue: the one that has been in it for longest.
    #[must_use]
    pub const fn oldest(&self) -> Option<Place> {
        if self.oldest == END { None } else { Some(Place(self.oldest)) }
    }
}

impl<T> Row<T> {
    const fn free() -> Self {
        Self { id: LaunchId([0; 16]), older: LOOSE, newer: END, value: None }
    }
}

/// Slots of a new index.
const SLOTS_LEAST: usize = 16;
/// Slots of the smaller table that are moved with each new row. It is empty long before the larger one is full.
const MOVED_EACH: usize = 4;

/// Places by hash: open addressing, the next slot after a full one. A slot is the upper half of the hash and the place plus one.
#[derive(Debug, Default)]
struct Index {
    slots: Vec<u64>,
    len: usize,
    /// The smaller table that came before, as far as it was not moved yet; what was is [`GONE`].
    before: Vec<u64>,
    moved: usize,
}

/// An empty slot.
const EMPTY: u64 = 0;
/// A slot of the table before whose entry has left it. No entry looks like it: it is of no place.
const GONE: u64 = 1 << 32;

const HASH: u64 = !0 << 32;

const fn place_in(slot: u64) -> Option<u32> {
    ((slot & !HASH) as u32).checked_sub(1)
}

/// The slot where an entry is looked for first.
const fn home(slot: u64, slots: usize) -> usize {
    (slot >> 32) as usize & (slots - 1)
}

fn find_in(slots: &[u64], hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<usize> {
    if slots.is_empty() {
        return None;
    }
    let mut at = home(hash, slots.len());
    loop {
        let slot = slots[at];
        if slot == EMPTY {
            return None;
        }
        if (slot ^ hash) & HASH == 0 && place_in(slot).is_some_and(&mut is) {
            return Some(at);
        }
        at = (at + 1) & (slots.len() - 1);
    }
}

impl Index {
    fn find(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        if let Some(at) = find_in(&self.slots, hash, &mut is) {
            return place_in(self.slots[at]);
        }
        find_in(&self.before, hash, is).and_then(|at| place_in(self.before[at]))
    }

    /// Reads the slot and waits for nothing: the processor goes on until somebody needs what was read.
    fn warm(&self, hash: u64) {
        if !self.slots.is_empty() {
            core::hint::black_box(self.slots[home(hash, self.slots.len())]);
        }
    }

    fn insert(&mut self, hash: u64, place: u32) {
        self.move_some();
        // Five eighths full, of which half may still lie in the table before.
        if (self.len + 1) * 8 > self.slots.len() * 5 {
            self.grow();
        }
        self.put(hash & HASH | u64::from(place + 1));
        self.len += 1;
    }

    fn put(&mut self, entry: u64) {
        let mut at = home(entry, self.slots.len());
        while self.slots[at] != EMPTY {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = entry;
    }

    fn grow(&mut self) {
        debug_assert!(self.before.is_empty(), "moved before the next one is full");
        let slots = alloc::vec![EMPTY; (2 * self.slots.len()).max(SLOTS_LEAST)];
        self.before = core::mem::replace(&mut self.slots, slots);
        self.moved = 0;
    }

    /// Moves a few entries of the table before.
    fn move_some(&mut self) {
        if self.before.is_empty() {
            return;
        }
        let end = (self.moved + MOVED_EACH).min(self.before.len());
        for at in self.moved..end {
            let slot = self.before[at];
            // Empty ones stay so: they end the search of those that are still here.
            if place_in(slot).is_some() {
                self.before[at] = GONE;
                self.put(slot);
            }
        }
        self.moved = end;
        if end == self.before.len() {
            self.before = Vec::new();
        }
    }

    fn remove(&mut self, hash: u64, place: u32) {
        if let Some(at) = find_in(&self.before, hash, |other| other == place) {
            self.before[at] = GONE;
            self.len -= 1;
        } else if let Some(at) = find_in(&self.slots, hash, |other| other == place) {
            self.close_gap(at);
            self.len -= 1;
        }
    }

    /// Empties a slot, and moves those after it nearer to their homes: no slot is ever only marked.
    fn close_gap(&mut self, mut gap: usize) {
        let mask = self.slots.len() - 1;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let slot = self.slots[at];
            if slot == EMPTY {
                break;
            }
            // It may move if its home is not behind the gap.
            let from_home = at.wrapping_sub(home(slot, self.slots.len())) & mask;
            if from_home >= at.wrapping_sub(gap) & mask {
                self.slots[gap] = slot;
                gap = at;
            }
        }
        self.slots[gap] = EMPTY;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    fn id(n: u32) -> LaunchId {
        LaunchId(u128::from(n).to_le_bytes())
    }

    /// What a table of rows is: a map and a queue.
    #[derive(Default)]
    struct Plain {
        map: HashMap<LaunchId, u32>,
        queue: VecDeque<LaunchId>,
    }

    impl Plain {
        fn step(&mut self, rows: &mut Rows<u32>, deed: u8, id: LaunchId, value: u32) {
            match (deed % 5, rows.find(&id)) {
                (0 | 1, None) => {
                    rows.insert(id, value);
                    self.map.insert(id, value);
                }
                (2, Some(place)) => {
                    assert_eq!(rows.remove(place), self.map.remove(&id));
                    self.queue.retain(|other| *other != id);
                }
                (3, Some(place)) => {
                    rows.line_up(place);
                    self.queue.retain(|other| *other != id);
                    self.queue.push_back(id);
                }
                (4, Some(place)) => {
                    rows.step_out(place);
                    self.queue.retain(|other| *other != id);
                }
                (_, place) => assert_eq!(place.is_some(), self.map.contains_key(&id)),
            }
            let oldest = rows.oldest().and_then(|place| rows.get(place));
            assert_eq!(oldest, self.queue.front().map(|id| &self.map[id]));
            assert_eq!(rows.len(), self.map.len());
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_a_queue(
            steps in prop::collection::vec((any::<u8>(), 0..200u32), 0..2_000),
        ) {
            let (mut rows, mut plain) = (Rows::new(7), Plain::default());
            for (value, (deed, n)) in (0..).zip(steps) {
                plain.step(&mut rows, deed, id(n), value);
            }
            for n in 0..200 {
                let found = rows.find(&id(n)).and_then(|place| rows.get(place));
                prop_assert_eq!(found, plain.map.get(&id(n)));
            }
        }
    }

    #[test]
    fn many_come_and_go_at_every_size() {
        let mut rows = Rows::new(7);
        for n in 0..100_000u32 {
            let place = rows.insert(id(n), n);
            rows.line_up(place);
            if n % 3 == 0
                && let Some(oldest) = rows.oldest()
            {
                assert_eq!(rows.remove(oldest), Some(n / 3));
            }
            let first = n / 3 + 1;
            let some = first + (n - n / 3) / 2;
            if some <= n {
                assert_eq!(rows.find(&id(some)).and_then(|place| rows.get(place)), Some(&some));
            }
            assert!(rows.find(&id(n / 3)).is_none(), "{n}");
        }
        while let Some(oldest) = rows.oldest() {
            rows.remove(oldest);
        }
        assert!(rows.is_empty());
        assert!(rows.index.slots.iter().all(|slot| *slot == EMPTY), "nothing is only marked");
    }

    #[test]
    fn a_table_that_keeps_its_size_takes_no_more_memory() {
        let mut rows = Rows::new(7);
        for n in 0..100_000u32 {
            let place = rows.insert(id(n), n);
            rows.line_up(place);
            if rows.len() > 1_000
                && let Some(oldest) = rows.oldest()
            {
                rows.remove(oldest);
            }
        }
        assert_eq!(rows.chunks.len(), 1_001usize.div_ceil(CHUNK));
        assert!(rows.index.slots.len() <= 2_048 && rows.index.before.is_empty());
    }

    #[test]
    fn the_table_before_is_empty_when_the_next_is_full() {
        let mut rows = Rows::new(7);
        for n in 0..1_000_000u32 {
            // `grow` asserts it.
            rows.insert(id(n), ());
        }
        assert!((0..1_000_000).all(|n| rows.find(&id(n)).is_some()));
    }
}
