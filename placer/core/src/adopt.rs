//! Adoption: the table's slots follow the map's hosts, and the table grows.
//!
//! One adopter a table (the daemon holds the file's lock for it); feeds, picks and corrections go on meanwhile.
//! A host keeps its slot while it stays in the map. A host that leaves makes its slot vacant, and hosts that come fill
//! vacant slots first, so that holes are never more than those who left and picks stay near to uniform.

use wire::{CapacityWord, HostId, map::MapVersion};

use crate::{
    index::Crowded,
    map::MapView,
    reserved::Reserved,
    sync::{Cell, Ordering, Words},
    table::{
        ADOPTING_AT, CapacityTable, EPOCH_AT, LEN_AT, LIVE_AT, RESERVED, VACANT, VERSION_AT, WORD,
        is_unheard, is_vacant, unheard,
    },
};

/// Hosts that are entered after the one whose place is asked for now.
const AHEAD: usize = 16;

/// The one who changes a table's hosts.
#[derive(Debug)]
pub struct Adopter {
    holes: Vec<u32>,
    /// Vacant since this adoption. They are filled in the next one, unless the table is full: a thread that stood still
    /// between its look at a slot and its exchange must not find a new host with the very word of the old one.
    fresh: Vec<u32>,
    len: usize,
    live: u64,
}

/// What an adoption changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Hosts that came.
    pub added: usize,
    /// Hosts that left.
    pub removed: usize,
}

/// More hosts than the table has slots: make a bigger one and [`Adopter::grow`] into it. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the map has {hosts} hosts and the capacity table {capacity} slots; a bigger table is made"
)]
pub struct Full {
    /// Hosts of the map.
    pub hosts: usize,
    /// Slots of the table.
    pub capacity: usize,
}

impl Adopter {
    /// Takes over a table, as left by an earlier adopter. If that one crashed in mid-adoption, the index is made anew.
    #[must_use]
    pub fn new<W: Words>(table: &CapacityTable<W>) -> Self {
        let parts = table.parts();
        let len = table.len();
        let vacant = |slot: &u32| {
            is_vacant(CapacityWord(parts.slots[*slot as usize][WORD].load(Ordering::Acquire)))
        };
        let holes: Vec<u32> = slots(len).filter(vacant).collect();
        let live = (len - holes.len()) as u64;
        let adopter = Self { live, len, holes, fresh: Vec::new() };
        if parts.header[ADOPTING_AT].load(Ordering::Relaxed) != 0 {
            adopter.rebuild_index(table);
        }
        adopter.end(table, table.map_version());
        adopter
    }

    /// Makes the table's hosts those of `map`. With `old`, the map that the table follows now, just the difference costs
    /// anything; without, each host is looked up.
    ///
    /// # Errors
    /// [`Full`].
    pub fn adopt<W: Words, A: AsRef<[u8]>, B: AsRef<[u8]>>(
        &mut self,
        table: &CapacityTable<W>,
        old: Option<&MapView<A>>,
        map: &MapView<B>,
    ) -> Result<Adopted, Full> {
        if map.len() > table.capacity() {
            return Err(Full { hosts: map.len(), capacity: table.capacity() });
        }
        self.holes.append(&mut self.fresh);
        table.parts().header[ADOPTING_AT].store(1, Ordering::Relaxed);
        let known = old.filter(|old| old.version() == table.map_version());
        let adopted = match known {
            Some(old) => self.adopt_difference(table, old, map),
            None => self.adopt_all(table, map),
        };
        self.end(table, map.version());
        Ok(adopted)
    }

    fn adopt_difference<W: Words, A: AsRef<[u8]>, B: AsRef<[u8]>>(
        &mut self,
        table: &CapacityTable<W>,
        old: &MapView<A>,
        map: &MapView<B>,
    ) -> Adopted {
        let mut adopted = Adopted::default();
        let mut added = Vec::new();
        let (mut at, mut new_ids) = (0, map.ids().peekable());
        // Both ascend. Those who left go first, so that those who come find their slots.
        while at < old.len() || new_ids.peek().is_some() {
            let old_id = (at < old.len()).then(|| old.id(at));
            match (old_id, new_ids.peek().copied()) {
                (Some(was), Some(is)) if was == is => {
                    at += 1;
                    new_ids.next();
                }
                (Some(was), is) if is.is_none_or(|is| was < is) => {
                    if let Some(slot) = table.slot_of(was) {
                        self.vacate(table, was, slot);
                        adopted.removed += 1;
                    }
                    at += 1;
                }
                (_, Some(is)) => {
                    added.push(is);
                    new_ids.next();
                }
                (_, None) => unreachable!("one of the two has a host left"),
            }
        }
        adopted.added = self.assign_all(table, &added);
        adopted
    }

    /// Gives those of `hosts` a slot that have none. Ids are random, so that each one's place in the index is a cache miss:
    /// they are asked for ahead, and waited for together.
    fn assign_all<W: Words>(&mut self, table: &CapacityTable<W>, hosts: &[HostId]) -> usize {
        let mut added = 0;
        for (at, host) in hosts.iter().enumerate() {
            if let Some(ahead) = hosts.get(at + AHEAD) {
                table.parts().index.prefetch(*ahead);
            }
            if table.slot_of(*host).is_none() {
                self.assign(table, *host, None);
                added += 1;
            }
        }
        added
    }

    fn adopt_all<W: Words, B: AsRef<[u8]>>(
        &mut self,
        table: &CapacityTable<W>,
        map: &MapView<B>,
    ) -> Adopted {
        let mut adopted = Adopted::default();
        let mut kept = vec![false; self.len];
        let mut added = Vec::new();
        let mut ahead = map.ids().skip(AHEAD);
        for host in map.ids() {
            if let Some(ahead) = ahead.next() {
                table.parts().index.prefetch(ahead);
            }
            match table.slot_of(host) {
                Some(slot) if (slot as usize) < kept.len() => kept[slot as usize] = true,
                _ => added.push(host),
            }
        }
        for slot in slots(self.len).filter(|slot| !kept[*slot as usize]) {
            if let Some((host, _)) = table.at(slot as usize) {
                self.vacate(table, host, slot);
                adopted.removed += 1;
            }
        }
        adopted.added = self.assign_all(table, &added);
        adopted
    }

    /// Copies the hosts of `table` into `bigger`, packed, with their words and penalties; nothing is reserved there.
    /// Publish the bigger one, then call [`Adopter::catch_up`] for the words that came meanwhile.
    ///
    /// # Panics
    /// If `bigger` is not empty, or not bigger.
    #[must_use]
    pub fn grow<W: Words, V: Words>(table: &CapacityTable<W>, bigger: &CapacityTable<V>) -> Self {
        assert!(bigger.is_empty() && bigger.capacity() as u64 >= table.live());
        let mut adopter = Self { holes: Vec::new(), fresh: Vec::new(), len: 0, live: 0 };
        bigger.parts().header[ADOPTING_AT].store(1, Ordering::Relaxed);
        for slot in 0..table.len() {
            if let Some((host, word)) = table.at(slot) {
                let penalty = Reserved(table.parts().slots[slot][RESERVED].load(Ordering::Relaxed));
                let heard = (!is_unheard(word)).then_some(word);
                let at = adopter.assign(bigger, host, heard);
                let cell = &bigger.parts().slots[at as usize][RESERVED];
                CapacityTable::<V>::change_reserved(cell, |new| {
                    Some(new.with_penalty(penalty.penalty()))
                });
            }
        }
        adopter.end(bigger, table.map_version());
        adopter
    }

    /// After the bigger table is published: takes over words that reached the old one since, and tells its other
    /// readers where to go.
    pub fn catch_up<W: Words, V: Words>(old: &CapacityTable<W>, bigger: &CapacityTable<V>) {
        old.set_successor(bigger.generation());
        for slot in 0..old.len() {
            if let Some((host, word)) = old.at(slot).filter(|(_, word)| !is_unheard(*word)) {
                bigger.feed(host, word);
            }
        }
    }

    /// Gives a host a slot. The order matters to those who read meanwhile: id, word, index, length.
    fn assign<W: Words>(
        &mut self,
        table: &CapacityTable<W>,
        host: HostId,
        heard: Option<CapacityWord>,
    ) -> u32 {
        let slot = self.free_slot(table.capacity());
        let parts = table.parts();
        let [word, reserved, id, _] = &parts.slots[slot as usize];
        // Another generation: reservations of the slot's last host are not taken off this one's count.
        CapacityTable::<W>::change_reserved(reserved, |old| {
            Some(Reserved::empty(old.generation().wrapping_add(1) & 0xfff))
        });
        id.store(host.0, Ordering::Relaxed);
        // Release: whoever sees this word (or one that was made of it) sees the id above.
        word.store(heard.map_or(unheard(host), |word| word.0), Ordering::Release);
        if parts.index.insert(host, slot) == Err(Crowded) {
            // Tombstones of hosts that left: made anew, it is at most half full. It holds this host as well, whose word
            // is in.
            self.rebuild_index(table);
        }
        // Release: whoever sees the length sees the word.
        parts.header[LEN_AT].store(self.len as u64, Ordering::Release);
        self.live += 1;
        slot
    }

    /// A slot for a host: `adopt` has checked that there is one.
    fn free_slot(&mut self, capacity: usize) -> u32 {
        if let Some(hole) = self.holes.pop() {
            return hole;
        }
        if self.len == capacity {
            return self.fresh.pop().unwrap_or(0); // There is one, unless the file is damaged.
        }
        self.len += 1;
        u32::try_from(self.len - 1).unwrap_or(u32::MAX)
    }

    fn vacate<W: Words>(&mut self, table: &CapacityTable<W>, host: HostId, slot: u32) {
        let parts = table.parts();
        parts.index.remove(host, slot);
        let word = &parts.slots[slot as usize][WORD];
        let mut old = word.load(Ordering::Relaxed);
        // An exchange, not a store: a feed that saw the host a moment ago fails and finds the slot vacant.
        while let Err(found) = word.exchange(old, VACANT, Ordering::AcqRel, Ordering::Relaxed) {
            old = found;
        }
        self.fresh.push(slot);
        self.live = self.live.saturating_sub(1);
    }

    fn rebuild_index<W: Words>(&self, table: &CapacityTable<W>) {
        let parts = table.parts();
        parts.index.clear();
        for slot in slots(self.len) {
            if let Some((host, _)) = table.at(slot as usize) {
                // A host that finds no place in a half-full index gets no feed, so no launch; it stays in the map.
                let _ = parts.index.insert(host, slot);
            }
        }
    }

    fn end<W: Words>(&self, table: &CapacityTable<W>, version: MapVersion) {
        let header = table.parts().header;
        header[LIVE_AT].store(self.live, Ordering::Relaxed);
        header[EPOCH_AT].store(version.epoch, Ordering::Relaxed);
        header[VERSION_AT].store(version.version, Ordering::Relaxed);
        header[ADOPTING_AT].store(0, Ordering::Relaxed);
    }
}

fn slots(len: usize) -> impl Iterator<Item = u32> {
    0..u32::try_from(len).unwrap_or(u32::MAX)
}
