//! The capacity table: what is free on each host, in words that every placer of the machine shares.
//!
//! ```text
//! header, 32 words | slots: (capacity word, reserved word, host id, a word of the index) ...     32 bytes a host
//! ```
//! A host has a dense slot for as long as it is in the map, so that picks are uniform over slots and a new map moves
//! nobody. All that a pick needs of a candidate is in one cache line: one miss. A word is *vacant* (nobody's slot),
//! *unheard* (a host without news yet) or *heard*; only an adopter ([`crate::adopt`]) makes slots vacant or
//! unheard, and any thread may hear. See `DESIGN.md` for why each ordering is enough.
//!
//! Left out: where hosts are ([`crate::map`]). The file may be damaged by whoever can write it: the worst that
//! follows is a bad pick, since every index is checked.

use wire::{
    CapacityWord, HostId, ShapeId, Stamp,
    launch::{Refused, Started},
    limits::HOSTS_MAX,
    map::MapVersion,
};

use crate::{
    index::Index,
    reserved::{Reserved, generation_of},
    sync::{Cell, Ordering, Words},
};

/// First word of a table, the format in its last byte.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VLYCAP\0\x01");

/// Words before the slots.
pub const HEADER_WORDS: usize = 32;

/// Words a slot takes. The fourth is a word of the index (two entries, so half load), which has nothing to do with the
/// slot; it lies there because three words would straddle cache lines.
pub const SLOT_WORDS: usize = 4;

/// Heartbeats after which reservations that nobody took off are forgotten: their placer crashed. At 15 s a beat
/// this is two minutes, the longest budget that a launch has; live ones end long before.
pub const FORGOTTEN_AFTER_BEATS: u16 = 8;

const MAGIC_AT: usize = 0;
const CAPACITY_AT: usize = 1;
const GENERATION_AT: usize = 2;
pub(crate) const LEN_AT: usize = 8;
pub(crate) const LIVE_AT: usize = 9;
pub(crate) const EPOCH_AT: usize = 10;
pub(crate) const VERSION_AT: usize = 11;
pub(crate) const ADOPTING_AT: usize = 12;
const SUCCESSOR_AT: usize = 13;
const DECAYED_AT: usize = 16; // On a cache line of its own: the only header word written at any rate.

/// All flags up: a host without news. No host says this of itself; the other 60 bits are the host's id.
const UNHEARD: u64 = CapacityWord::FLAGS;

/// Words of memory that are no table of this build, or not of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Not a table, or another format: make a new one.
    #[error("not a capacity table of this version; it is rebuilt from the feed")]
    Format,
    /// Shorter than it says.
    #[error("capacity table is truncated; it is rebuilt from the feed")]
    Truncated,
}

/// What is free on each host. Cheap to share: every method takes `&self`.
#[derive(Debug)]
pub struct CapacityTable<W> {
    words: W,
    capacity: usize,
    generation: u64,
}

/// A launch under way, as the table counts it. Give it back to [`CapacityTable::settle`], [`CapacityTable::refuse`]
/// or [`CapacityTable::release`]; one that is lost is forgotten after [`FORGOTTEN_AFTER_BEATS`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a reservation that is dropped keeps its slot until it is forgotten"]
pub struct Reservation {
    /// The host.
    pub host: HostId,
    /// Its slot in the table that was picked from.
    pub slot: u32,
    /// The shape.
    pub shape: ShapeId,
    generation: u16,
    table: u8, // Low bits of its generation: tells tables apart while a launch lasts.
}

/// Where the parts of a table lie.
pub(crate) struct Parts<'a, C> {
    pub(crate) header: &'a [C],
    pub(crate) slots: &'a [Slot<C>],
    pub(crate) index: Index<'a, C>,
}

/// Capacity word, reserved word, host id, a word of the index.
pub(crate) type Slot<C> = [C; SLOT_WORDS];
pub(crate) const WORD: usize = 0;
pub(crate) const RESERVED: usize = 1;
pub(crate) const ID: usize = 2;
pub(crate) const INDEX: usize = 3;

/// Words of a table for so many hosts.
#[must_use]
pub const fn words_for(hosts: usize) -> usize {
    HEADER_WORDS + hosts * SLOT_WORDS
}

pub(crate) const fn unheard(host: HostId) -> u64 {
    (host.0 & ((1 << 40) - 1)) | UNHEARD | (((host.0 >> 40) & 0xf_ffff) << 44)
}

/// What a slot's word says.
pub(crate) fn is_vacant(word: CapacityWord) -> bool {
    word.has(CapacityWord::ABSENT) && !is_unheard(word)
}

pub(crate) fn is_unheard(word: CapacityWord) -> bool {
    word.has(CapacityWord::FLAGS)
}

pub(crate) const VACANT: u64 = CapacityWord::ABSENT;

fn revised(old: CapacityWord, by: CapacityWord) -> CapacityWord {
    let mut free = old.free_all();
    free.iter_mut().zip(by.free_all()).for_each(|(free, by)| *free = by.min(*free));
    CapacityWord::new(free, by.flags(), by.stamp())
}

fn less_one(word: CapacityWord, shape: ShapeId) -> CapacityWord {
    let mut free = word.free_all();
    free[shape.index()] = free[shape.index()].saturating_sub(1);
    CapacityWord::new(free, word.flags(), word.stamp())
}

impl<W: Words> CapacityTable<W> {
    /// Makes an empty table out of words of zero. `generation` tells it from every other table of this machine: it grows
    /// with each that is made.
    ///
    /// # Panics
    /// If there are fewer words than [`words_for`] one host, or more than for [`HOSTS_MAX`].
    #[must_use]
    pub fn create(words: W, generation: u64) -> Self {
        let cells = words.words();
        let capacity = (cells.len().saturating_sub(HEADER_WORDS)) / SLOT_WORDS;
        assert!((1..=HOSTS_MAX).contains(&capacity), "a table holds from one host to the limit");
        let put = |at: usize, value: u64| cells[at].store(value, Ordering::Relaxed);
        put(CAPACITY_AT, capacity as u64);
        put(GENERATION_AT, generation);
        // Release: another process that sees the magic sees the rest of the header.
        cells[MAGIC_AT].store(MAGIC, Ordering::Release);
        Self { words, capacity, generation }
    }

    /// Takes up a table that another process, or this one before a restart, has made.
    ///
    /// # Errors
    /// [`TableError`]; then a new one is made, and the feed fills it.
    pub fn open(words: W) -> Result<Self, TableError> {
        let cells = words.words();
        if cells.len() < words_for(1) {
            return Err(TableError::Truncated);
        }
        if cells[MAGIC_AT].load(Ordering::Acquire) != MAGIC {
            return Err(TableError::Format);
        }
        let said = cells[CAPACITY_AT].load(Ordering::Relaxed);
        let capacity = usize::try_from(said).map_err(|_| TableError::Format)?;
        if !(1..=HOSTS_MAX).contains(&capacity) {
            return Err(TableError::Format);
        }
        if cells.len() < words_for(capacity) {
            return Err(TableError::Truncated);
        }
        let generation = cells[GENERATION_AT].load(Ordering::Relaxed);
        Ok(Self { words, capacity, generation })
    }

    #[inline]
    pub(crate) fn parts(&self) -> Parts<'_, W::Cell> {
        let (header, rest) = self.words.words().split_at(HEADER_WORDS);
        let slots = &rest.as_chunks().0[..self.capacity];
        Parts { header, slots, index: Index { slots } }
    }

    /// Hosts that it can hold.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tells it from other tables of this machine.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Slots in use, holes among them included: picks draw below this.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        // Acquire: the slots below were made vacant or unheard before the length was raised.
        let len = self.words.words()[LEN_AT].load(Ordering::Acquire);
        usize::try_from(len).map_or(self.capacity, |len| len.min(self.capacity))
    }

    /// Whether no host was ever adopted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hosts in it.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.words.words()[LIVE_AT].load(Ordering::Relaxed)
    }

    /// The map that it follows.
    #[must_use]
    pub fn map_version(&self) -> MapVersion {
        let header = self.words.words();
        MapVersion {
            epoch: header[EPOCH_AT].load(Ordering::Relaxed),
            version: header[VERSION_AT].load(Ordering::Relaxed),
        }
    }

    /// The generation of the table that has taken this one's place, if one has: other processes open that.
    #[must_use]
    pub fn successor(&self) -> Option<u64> {
        let generation = self.words.words()[SUCCESSOR_AT].load(Ordering::Acquire);
        (generation != 0).then_some(generation)
    }

    pub(crate) fn set_successor(&self, generation: u64) {
        self.words.words()[SUCCESSOR_AT].store(generation, Ordering::Release);
    }

    /// A host's slot.
    #[must_use]
    pub fn slot_of(&self, host: HostId) -> Option<u32> {
        let parts = self.parts();
        parts.index.find(host, |slot| {
            let slot = parts.slots.get(slot as usize);
            slot.is_some_and(|slot| slot[ID].load(Ordering::Relaxed) == host.0)
        })
    }

    /// What is known of a host: its word (`None` while unheard), and what is reserved on it.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<(Option<CapacityWord>, Reserved)> {
        let parts = self.parts();
        let [word, reserved, ..] = &parts.slots[self.slot_of(host)? as usize];
        let word = CapacityWord(word.load(Ordering::Acquire));
        let heard = !is_unheard(word) && !is_vacant(word);
        Some((heard.then_some(word), Reserved(reserved.load(Ordering::Relaxed))))
    }

    /// The host of a slot and its word, for those who look at the whole table.
    #[must_use]
    pub fn at(&self, slot: usize) -> Option<(HostId, CapacityWord)> {
        let parts = self.parts();
        let [word, _, id, _] = parts.slots.get(slot)?;
        let word = CapacityWord(word.load(Ordering::Acquire));
        (!is_vacant(word)).then(|| (HostId(id.load(Ordering::Relaxed)), word))
    }

    /// A word from the feed. The newer stamp wins (PROTOCOL 4.2); says whether anything was taken. A word of the same stamp is
    /// the same heartbeat, revised by the aggregator or delayed on the way: its flags count (a quarantine began or ended), and
    /// of each count the lower, since a reply may have told us more.
    pub fn feed(&self, host: HostId, word: CapacityWord) -> bool {
        self.slot_of(host).is_some_and(|slot| {
            self.hear(slot, host, |old| match old {
                Some(old) if word.stamp().is_after(old.stamp()) => Some(word),
                Some(old) if word.stamp() == old.stamp() => {
                    Some(revised(old, word)).filter(|new| *new != old)
                }
                Some(_) => None,
                None => Some(word),
            })
        })
    }

    /// A host's own word, with a refusal or a start: an equal stamp wins too, since the reply is younger than the
    /// heartbeat, and a quarantine stays up, since a host does not know of its own.
    pub fn correct(&self, host: HostId, word: CapacityWord) -> bool {
        self.slot_of(host).is_some_and(|slot| self.correct_slot(slot, host, word))
    }

    fn correct_slot(&self, slot: u32, host: HostId, word: CapacityWord) -> bool {
        self.hear(slot, host, |old| match old {
            Some(old) if old.stamp().is_after(word.stamp()) => None,
            Some(old) => Some(word.with(old.flags() & CapacityWord::QUARANTINED)),
            None => Some(word),
        })
    }

    /// Replaces a host's word by what `newer` makes of it (`None`: unheard so far).
    fn hear(
        &self,
        slot: u32,
        host: HostId,
        newer: impl Fn(Option<CapacityWord>) -> Option<CapacityWord>,
    ) -> bool {
        let parts = self.parts();
        let Some([cell, reserved, id, _]) = parts.slots.get(slot as usize) else { return false };
        // Acquire: pairs with the release by which the adopter published this slot's id.
        let mut old = CapacityWord(cell.load(Ordering::Acquire));
        let new = loop {
            // The id is read after the word: if the slot changes hands in between, the exchange fails, since a hand-over
            // passes through vacant and no two hosts of one slot have the same unheard word.
            if is_vacant(old) || id.load(Ordering::Relaxed) != host.0 {
                return false;
            }
            let Some(new) = newer((!is_unheard(old)).then_some(old)) else { return false };
            // Absent is this table's own flag. A feed that says so means a host that is gone.
            let gone = if new.has(CapacityWord::ABSENT) { CapacityWord::SICK } else { 0 };
            let new = new.without(CapacityWord::ABSENT).with(gone);
            // AcqRel: keeps the chain from the adopter's store to whoever reads this word next.
            match cell.exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break new,
                Err(found) => old = CapacityWord(found),
            }
        };
        Self::forget_old(reserved, host, new.stamp());
        true
    }

    /// Begins a new generation of counts where the last one began long ago: what is left of that belongs to placers that
    /// crashed. What is really under way at this moment is forgotten with it: a few launches every two minutes.
    fn forget_old(reserved: &W::Cell, host: HostId, stamp: Stamp) {
        let old = Reserved(reserved.load(Ordering::Relaxed));
        if old.age(host, stamp) >= FORGOTTEN_AFTER_BEATS {
            let new = old.restarted(generation_of(host, stamp));
            // Lost races are fine: the next heartbeat tries again.
            let _ = reserved.exchange(old.0, new.0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Changes the reserved word of a slot. Release: whoever sees a reservation gone (and reads the capacity word after
    /// it, as picks do) sees the capacity word that was put in before the reservation ended. Acquire carries
    /// that over several changes in a row.
    #[inline]
    pub(crate) fn change_reserved(
        cell: &W::Cell,
        change: impl Fn(Reserved) -> Option<Reserved>,
    ) -> Option<Reserved> {
        let mut old = Reserved(cell.load(Ordering::Relaxed));
        loop {
            let new = change(old)?;
            match cell.exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(new),
                Err(found) => old = Reserved(found),
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low bits")]
    const fn tag(&self) -> u8 {
        self.generation as u8
    }

    #[inline]
    pub(crate) const fn reservation(
        &self,
        host: HostId,
        slot: u32,
        shape: ShapeId,
        reserved: Reserved,
    ) -> Reservation {
        let generation = reserved.generation();
        Reservation { host, slot, shape, generation, table: self.tag() }
    }

    /// The slot of a reservation's host, in this table.
    fn place(&self, reservation: &Reservation) -> Option<u32> {
        if reservation.table == self.tag() {
            return Some(reservation.slot); // Its id is checked where the slot is used.
        }
        self.slot_of(reservation.host)
    }

    /// The launch did not start, and the host said nothing of its capacity.
    #[expect(clippy::needless_pass_by_value, reason = "a reservation is given back once")]
    pub fn release(&self, reservation: Reservation) {
        if reservation.table != self.tag() {
            return; // A table that was grown since began with nothing reserved.
        }
        let parts = self.parts();
        let Some(slot) = parts.slots.get(reservation.slot as usize) else { return };
        Self::change_reserved(&slot[RESERVED], |old| {
            (old.generation() == reservation.generation).then(|| old.minus(reservation.shape))
        });
    }

    /// The host refused: its word corrects the table, then the reservation ends.
    pub fn refuse(&self, reservation: Reservation, refused: &Refused) {
        if let Some(slot) = self.place(&reservation) {
            self.correct_slot(slot, reservation.host, refused.word);
        }
        self.release(reservation);
    }

    /// The launch runs. Its word counts it and carries the stamp of the heartbeat before `visible_at`, so that no
    /// older heartbeat undoes it and `visible_at` replaces it: the slot stays taken until exactly then (PROTOCOL 6.8).
    /// A host whose reply is older than what is known here has one slot taken off what is known instead.
    /// The word goes in before the reservation ends: counted twice for a moment, never not at all.
    pub fn settle(&self, reservation: Reservation, started: &Started) {
        let (host, shape) = (reservation.host, reservation.shape);
        let visible = Stamp::of(started.visible_at.seq);
        if let Some(slot) = self.place(&reservation) {
            self.hear(slot, host, |old| {
                let Some(old) = old else { return Some(started.word) };
                if !visible.is_after(old.stamp()) {
                    return None; // The heartbeat that counts it was here before the reply.
                }
                if old.stamp().is_after(started.word.stamp()) {
                    return Some(less_one(old, shape));
                }
                Some(started.word.with(old.flags() & CapacityWord::QUARANTINED))
            });
        }
        self.release(reservation);
    }

    /// Makes a launch's host less likely to be picked by this machine, by `levels` up to `most`.
    pub fn penalise(&self, on: &Reservation, levels: u8, most: u8) {
        self.change_penalty(on, |penalty| penalty.max(penalty.saturating_add(levels).min(most)));
    }

    /// A launch went well there: half the penalty is taken off.
    pub fn relieve(&self, on: &Reservation) {
        self.change_penalty(on, |penalty| penalty / 2);
    }

    fn change_penalty(&self, on: &Reservation, change: impl Fn(u8) -> u8) {
        let parts = self.parts();
        let Some(slot) = self.place(on).and_then(|slot| parts.slots.get(slot as usize)) else {
            return;
        };
        if slot[ID].load(Ordering::Relaxed) != on.host.0 {
            return; // The slot is another host's by now.
        }
        Self::change_reserved(&slot[RESERVED], |old| {
            let penalty = change(old.penalty());
            (penalty != old.penalty()).then(|| old.with_penalty(penalty))
        });
    }

    /// Takes one level off every penalty, so that hosts are tried again. `tick` counts decay periods: whichever process
    /// comes first in a period does it, for all. A sweep over a million hosts takes milliseconds: call it off the launch path.
    pub fn decay(&self, tick: u64) -> bool {
        let parts = self.parts();
        let last = parts.header[DECAYED_AT].load(Ordering::Relaxed);
        let claim =
            parts.header[DECAYED_AT].exchange(last, tick, Ordering::Relaxed, Ordering::Relaxed);
        if last == tick || claim.is_err() {
            return false;
        }
        for [_, cell, ..] in &parts.slots[..self.len()] {
            Self::change_reserved(cell, |old| {
                let penalty = old.penalty();
                (penalty > 0).then(|| old.with_penalty(penalty - 1))
            });
        }
        true
    }
}
