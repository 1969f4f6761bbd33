//! Host id to slot: open addressing over words of two entries each.
//!
//! An entry is a slot plus one, under ten bits of the id's hash, so that few wrong slots are looked at. One adopter
//! writes; feed threads read at the same time. A reader that misses an entry while it moves drops one feed word, which
//! the host's next heartbeat repairs. Picks do not come here at all.

use wire::HostId;

use crate::{
    prefetch::prefetch,
    sync::{Cell, Ordering},
    table::{INDEX, Slot},
};

const ENTRY_BITS: u32 = 32;
const SLOT_BITS: u32 = 22;
const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;
const TOMB: u32 = u32::MAX;

/// Words looked at for one id. At half load the longest run is far below; more means that the index must be rebuilt.
pub const PROBE_MAX: usize = 64;

const _: () = assert!(wire::limits::HOSTS_MAX + 1 < SLOT_MASK as usize);

/// The index part of a table's words.
pub(crate) struct Index<'a, C> {
    pub(crate) slots: &'a [Slot<C>],
}

/// No room within [`PROBE_MAX`] words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crowded;

const fn hash(host: HostId) -> u64 {
    // Ids are random already; the multiplication keeps a fleet of chosen ids from lining up.
    let mixed = (host.0 ^ (host.0 >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

const fn entry(hash: u64, slot: u32) -> u32 {
    (((hash & 0x3fe) as u32) << SLOT_BITS) | (slot + 1)
}

const fn halves(word: u64) -> [u32; 2] {
    [(word & 0xffff_ffff) as u32, (word >> ENTRY_BITS) as u32]
}

impl<C: Cell> Index<'_, C> {
    #[expect(clippy::cast_possible_truncation, reason = "below the number of words")]
    fn home(&self, hash: u64) -> usize {
        ((u128::from(hash) * self.slots.len() as u128) >> 64) as usize
    }

    fn probes(&self, hash: u64) -> impl Iterator<Item = &C> {
        let home = self.home(hash);
        let (before, from) = self.slots.split_at(home.min(self.slots.len()));
        from.iter().chain(before).take(PROBE_MAX).map(|slot| &slot[INDEX])
    }

    /// The slot of a host; `is` says whether a slot is that host's.
    pub(crate) fn find(&self, host: HostId, is: impl Fn(u32) -> bool) -> Option<u32> {
        let hash = hash(host);
        let tag = entry(hash, 0) & !SLOT_MASK;
        for cell in self.probes(hash) {
            // Acquire: pairs with the release in `write`, so that the id of the slot is seen.
            for half in halves(cell.load(Ordering::Acquire)) {
                if half == 0 {
                    return None;
                }
                if half != TOMB && half & !SLOT_MASK == tag && is((half & SLOT_MASK) - 1) {
                    return Some((half & SLOT_MASK) - 1);
                }
            }
        }
        None
    }

    /// Asks for the cache line where a host's entry is, or will be.
    pub(crate) fn prefetch(&self, host: HostId) {
        if let Some(slot) = self.slots.get(self.home(hash(host))) {
            prefetch(slot);
        }
    }

    /// Enters a host that is not there yet. One writer at a time.
    pub(crate) fn insert(&self, host: HostId, slot: u32) -> Result<(), Crowded> {
        let hash = hash(host);
        for cell in self.probes(hash) {
            let word = cell.load(Ordering::Relaxed);
            for (at, half) in halves(word).into_iter().enumerate() {
                if half == 0 || half == TOMB {
                    Self::write(cell, word, at, entry(hash, slot));
                    return Ok(());
                }
            }
        }
        Err(Crowded)
    }

    /// Takes a host out. One writer at a time.
    pub(crate) fn remove(&self, host: HostId, slot: u32) {
        let hash = hash(host);
        for cell in self.probes(hash) {
            let word = cell.load(Ordering::Relaxed);
            for (at, half) in halves(word).into_iter().enumerate() {
                if half == entry(hash, slot) {
                    return Self::write(cell, word, at, TOMB);
                }
            }
        }
    }

    /// Empties it.
    pub(crate) fn clear(&self) {
        self.slots.iter().for_each(|slot| slot[INDEX].store(0, Ordering::Relaxed));
    }

    fn write(cell: &C, word: u64, at: usize, half: u32) {
        #[expect(clippy::cast_possible_truncation, reason = "0 or 1")]
        let shift = ENTRY_BITS * at as u32;
        let word = word & !(0xffff_ffff << shift) | (u64::from(half) << shift);
        // Release: whoever finds the entry sees the slot's id, which was written before.
        cell.store(word, Ordering::Release);
    }
}
