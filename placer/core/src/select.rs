//! Selection: the best of a few uniform picks, reserved without a lock.
//!
//! `k` distinct slots are drawn; the one with most free slots of the shape, less what is reserved, wins, and the first
//! drawn wins a tie. It is reserved by one exchange of the word beside. When no candidate has room others are drawn, a bounded
//! number of times; then a window of neighbouring slots is read once in order, which finds room that random draws
//! would miss in a full or a small fleet. Nothing here locks, allocates or enters the kernel.
//!
//! A [`Picker`] draws its candidates some picks ahead and asks for their cache lines then, so that a pick seldom waits for
//! memory. A batch reads all its candidates before it reserves the first.

use rand::{RngCore, SeedableRng, rngs::SmallRng};
use wire::{CapacityWord, HostId, ShapeId, limits::CHOICES_MAX};

use crate::{
    prefetch::prefetch,
    reserved::Reserved,
    sync::{Cell, Ordering, Words},
    table::{CapacityTable, ID, Reservation, WORD, is_unheard, is_vacant},
};

/// Draws of `k` candidates before the window is read.
pub const ROUNDS_MAX: usize = 8;

/// Slots of that window.
pub const WINDOW_SLOTS: usize = 512;
#[expect(clippy::cast_possible_truncation, reason = "512")]
const WINDOW: u32 = WINDOW_SLOTS as u32;

/// Picks that a [`Picker`] draws ahead: enough to hide memory behind the picks between, few enough to stay in the
/// nearest cache (two lines each).
pub const AHEAD: usize = 16;

/// What a pick found.
#[derive(Debug, PartialEq, Eq)]
pub enum Pick {
    /// A host, with one slot of the shape reserved.
    Picked(Picked),
    /// Nobody that was looked at has room.
    NoRoom,
    /// Nobody that was looked at is there at all.
    NoHosts,
}

/// A host that was picked.
#[derive(Debug, PartialEq, Eq)]
pub struct Picked {
    /// Who, and the slot that is held for the launch. [`crate::MapView::addr_of`] says where.
    pub reservation: Reservation,
    /// The candidate that came second: its slot. [`Select::pick_other`] tries it.
    pub other: Option<u32>,
}

/// How picks are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Select {
    /// Candidates a draw, `k`: from 1 to [`CHOICES_MAX`].
    pub choices: usize,
}

impl Default for Select {
    fn default() -> Self {
        Self { choices: 2 }
    }
}

/// A candidate as it was read.
#[derive(Clone, Copy)]
struct Candidate {
    slot: u32,
    room: u16,
    reserved: Reserved,
    host: HostId,
}

impl Candidate {
    const fn nobody(slot: u32) -> Self {
        Self { slot, room: 0, reserved: Reserved(0), host: HostId(0) }
    }
}

/// Room of a slot for a shape, as far as is known.
#[inline]
fn room(word: CapacityWord, reserved: Reserved, shape: ShapeId) -> u16 {
    word.usable(shape).saturating_sub(reserved.count(shape))
}

/// A uniform number below `below`, out of 32 random bits.
#[inline]
const fn scale(bits: u32, below: u32) -> u32 {
    ((bits as u64 * below as u64) >> 32) as u32
}

/// Two distinct uniform slots out of 64 random bits.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
const fn draw_two(bits: u64, len: u32) -> [u32; 2] {
    let first = scale(bits as u32, len);
    let second = scale((bits >> 32) as u32, len - 1);
    [first, if second >= first { second + 1 } else { second }]
}

/// `k` distinct uniform slots in the order drawn; all of them if there are not more than `k`.
fn draw(rng: &mut impl RngCore, len: u32, choices: usize) -> ([u32; CHOICES_MAX], usize) {
    let count = choices.clamp(1, CHOICES_MAX).min(len as usize);
    let mut drawn = [0; CHOICES_MAX];
    let mut sorted = [0; CHOICES_MAX];
    for (at, drawn) in drawn[..count].iter_mut().enumerate() {
        #[expect(clippy::cast_possible_truncation, reason = "at most CHOICES_MAX")]
        let mut slot = scale(rng.next_u32(), len - at as u32);
        // The slot-th of those not yet drawn.
        let mut place = 0;
        while place < at && sorted[place] <= slot {
            slot += 1;
            place += 1;
        }
        sorted.copy_within(place..at, place + 1);
        sorted[place] = slot;
        *drawn = slot;
    }
    (drawn, count)
}

impl Select {
    /// Picks a host for a launch of `shape`, never one of `excluded`. A [`Picker`] is quicker.
    #[inline]
    pub fn pick<W: Words>(
        self,
        table: &CapacityTable<W>,
        rng: &mut impl RngCore,
        shape: ShapeId,
        excluded: &[HostId],
    ) -> Pick {
        let len = length(table);
        if self.choices == 2 && excluded.is_empty() && len >= 2 {
            let drawn = draw_two(rng.next_u64(), len);
            if let Some(picked) = choose_of_two(table, drawn, rng, shape) {
                return Pick::Picked(picked);
            }
        }
        self.pick_slowly(table, rng, shape, excluded)
    }

    /// One draw of `k` candidates and no more: what a model of every interleaving can afford.
    pub fn pick_once<W: Words>(
        self,
        table: &CapacityTable<W>,
        rng: &mut impl RngCore,
        shape: ShapeId,
    ) -> Pick {
        let len = length(table);
        if len == 0 {
            return Pick::NoHosts;
        }
        let (drawn, count) = draw(rng, len, self.choices);
        let mut candidates = drawn.map(Candidate::nobody);
        for candidate in &mut candidates[..count] {
            *candidate = read(table, candidate.slot, shape);
        }
        choose(table, &candidates[..count], rng, shape).map_or(Pick::NoRoom, Pick::Picked)
    }

    /// A host that is thought to be full, for a launch that found no room: sandboxes end without telling anybody before the next
    /// heartbeat, and the host alone decides. Of a window, the host with the least under way and the least penalty.
    #[cold]
    pub fn pick_hopeful<W: Words>(
        self,
        table: &CapacityTable<W>,
        rng: &mut impl RngCore,
        shape: ShapeId,
        excluded: &[HostId],
    ) -> Option<Picked> {
        let len = length(table);
        let start = scale(rng.next_u32(), len);
        let window = (0..len.min(WINDOW)).map(|step| (start + step) % len);
        let slots = table.parts().slots;
        let hopeful = window.filter_map(|slot| {
            let word = CapacityWord(slots[slot as usize][WORD].load(Ordering::Relaxed));
            let fair = word.flags() == 0 && !is_excluded(table, slot, excluded);
            fair.then(|| read(table, slot, shape))
        });
        let key = |one: &Candidate| (one.reserved.penalty(), one.reserved.count(shape));
        let best = hopeful.min_by_key(key)?;
        let free_max = wire::limits::FREE_MAX;
        (best.reserved.count(shape) < free_max).then(|| reserve(table, best, shape)).flatten()
    }

    /// Takes the candidate that came second, if it has room by now and is not excluded.
    pub fn pick_other<W: Words>(
        self,
        table: &CapacityTable<W>,
        slot: u32,
        shape: ShapeId,
        excluded: &[HostId],
    ) -> Option<Picked> {
        if slot >= length(table) || is_excluded(table, slot, excluded) {
            return None;
        }
        let candidate = read(table, slot, shape);
        (candidate.room > 0).then(|| reserve(table, candidate, shape)).flatten()
    }

    #[cold]
    fn pick_slowly<W: Words>(
        self,
        table: &CapacityTable<W>,
        rng: &mut impl RngCore,
        shape: ShapeId,
        excluded: &[HostId],
    ) -> Pick {
        let len = length(table);
        if len == 0 {
            return Pick::NoHosts;
        }
        for _ in 0..ROUNDS_MAX {
            let (drawn, count) = draw(rng, len, self.choices);
            let mut read = drawn.map(Candidate::nobody);
            for candidate in &mut read[..count] {
                *candidate = self::read(table, candidate.slot, shape);
                if is_excluded(table, candidate.slot, excluded) {
                    candidate.room = 0;
                }
            }
            if let Some(picked) = choose(table, &read[..count], rng, shape) {
                return Pick::Picked(picked);
            }
        }
        pick_in_window(table, rng, shape, excluded, len)
    }
}

/// One thread's way of picking: a generator and the candidates of its next picks.
#[derive(Clone, Debug)]
pub struct Picker {
    /// How picks are made.
    pub select: Select,
    rng: SmallRng,
    ahead: [[u32; 2]; AHEAD],
    at: usize,
}

impl Picker {
    /// A picker with the seed of its choices.
    #[must_use]
    pub fn new(select: Select, seed: u64) -> Self {
        // Slots beyond any table: drawn anew when their turn comes.
        Self { select, rng: SmallRng::seed_from_u64(seed), ahead: [[u32::MAX; 2]; AHEAD], at: 0 }
    }

    /// The generator.
    pub const fn rng(&mut self) -> &mut SmallRng {
        &mut self.rng
    }

    /// Picks a host for a launch of `shape`, never one of `excluded`.
    #[inline]
    pub fn pick<W: Words>(
        &mut self,
        table: &CapacityTable<W>,
        shape: ShapeId,
        excluded: &[HostId],
    ) -> Pick {
        let len = length(table);
        if self.select.choices == 2 && excluded.is_empty() && len >= 2 {
            let drawn = self.draw_ahead(table, len);
            if let Some(picked) = choose_of_two(table, drawn, &mut self.rng, shape) {
                return Pick::Picked(picked);
            }
        }
        self.select.pick_slowly(table, &mut self.rng, shape, excluded)
    }

    /// Picks a host for each of `shapes`, none of which has been tried anywhere. `out` is overwritten.
    ///
    /// # Panics
    /// If `out` is not as long as `shapes`.
    pub fn pick_batch<W: Words>(
        &mut self,
        table: &CapacityTable<W>,
        shapes: &[ShapeId],
        out: &mut [Pick],
    ) {
        assert_eq!(shapes.len(), out.len(), "one pick a shape");
        let len = length(table);
        if self.select.choices != 2 || len < 2 {
            for (shape, out) in shapes.iter().zip(out) {
                *out = self.pick(table, *shape, &[]);
            }
            return;
        }
        for (shapes, out) in shapes.chunks(AHEAD).zip(out.chunks_mut(AHEAD)) {
            // All reads, then all exchanges: an exchange waits for the reads before it, and reads for the exchange.
            let mut best = [(Candidate::nobody(0), 0); AHEAD];
            for (best, shape) in best.iter_mut().zip(shapes) {
                let pair = self.draw_ahead(table, len).map(|slot| read(table, slot, *shape));
                let second = usize::from(pair[1].room > pair[0].room);
                *best = (pair[second], pair[1 - second].slot);
            }
            for (((best, other), shape), out) in best.into_iter().zip(shapes).zip(out) {
                let ordinary = best.room > 0 && best.reserved.penalty() == 0;
                let picked = if ordinary { reserve(table, best, *shape) } else { None };
                *out = match picked {
                    Some(picked) => Pick::Picked(Picked { other: Some(other), ..picked }),
                    None => self.pick(table, *shape, &[]),
                };
            }
        }
    }

    /// Takes the candidates that were drawn [`AHEAD`] picks ago, and draws others in their place.
    #[inline]
    fn draw_ahead<W: Words>(&mut self, table: &CapacityTable<W>, len: u32) -> [u32; 2] {
        let next = draw_two(self.rng.next_u64(), len);
        let slots = table.parts().slots;
        for slot in next {
            prefetch(&slots[slot as usize]);
        }
        let drawn = std::mem::replace(&mut self.ahead[self.at % AHEAD], next);
        self.at = self.at.wrapping_add(1);
        // Drawn from a longer table, or never. A table that has grown since is none the worse for 16 picks.
        if drawn[0].max(drawn[1]) < len { drawn } else { draw_two(self.rng.next_u64(), len) }
    }
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "at most HOSTS_MAX")]
fn length<W: Words>(table: &CapacityTable<W>) -> u32 {
    table.len() as u32
}

/// Reads a slot. The reserved word is read first, with acquire: if a reservation is seen to be gone, the capacity word
/// that took its place is seen too (see [`CapacityTable::settle`]). The id is read after it and before the exchange in
/// [`reserve`]: a slot that changes hands in between has another generation, and the exchange fails.
#[inline]
fn read<W: Words>(table: &CapacityTable<W>, slot: u32, shape: ShapeId) -> Candidate {
    let [word, reserved, id, _] = &table.parts().slots[slot as usize];
    let reserved = Reserved(reserved.load(Ordering::Acquire));
    let word = CapacityWord(word.load(Ordering::Acquire));
    let host = HostId(id.load(Ordering::Relaxed));
    Candidate { slot, room: room(word, reserved, shape), reserved, host }
}

fn is_excluded<W: Words>(table: &CapacityTable<W>, slot: u32, excluded: &[HostId]) -> bool {
    let id = HostId(table.parts().slots[slot as usize][ID].load(Ordering::Relaxed));
    excluded.contains(&id)
}

/// Whether a candidate is considered this time: once in `2^penalty` times.
#[inline]
fn considered(reserved: Reserved, rng: &mut impl RngCore) -> bool {
    let penalty = reserved.penalty();
    penalty == 0 || rng.next_u32().trailing_zeros() >= u32::from(penalty)
}

/// The ordinary case: one of two has room and a good name. No branch depends on which.
#[inline]
fn choose_of_two<W: Words>(
    table: &CapacityTable<W>,
    drawn: [u32; 2],
    rng: &mut impl RngCore,
    shape: ShapeId,
) -> Option<Picked> {
    let pair = drawn.map(|slot| read(table, slot, shape));
    let second = usize::from(pair[1].room > pair[0].room);
    let (best, other) = (pair[second], pair[1 - second]);
    if best.room == 0 {
        return None;
    }
    if best.reserved.penalty() > 0 {
        return choose(table, &pair, rng, shape);
    }
    match reserve(table, best, shape) {
        Some(picked) => Some(Picked { other: Some(other.slot), ..picked }),
        None => choose(table, &pair, rng, shape),
    }
}

/// Reserves on the best candidate, then on the others.
#[inline]
fn choose<W: Words>(
    table: &CapacityTable<W>,
    candidates: &[Candidate],
    rng: &mut impl RngCore,
    shape: ShapeId,
) -> Option<Picked> {
    let mut best: Option<&Candidate> = None;
    for candidate in candidates {
        let better = best.map_or(candidate.room > 0, |best| candidate.room > best.room);
        if better && considered(candidate.reserved, rng) {
            best = Some(candidate);
        }
    }
    let best = best?;
    let usable = |one: &&Candidate| one.room > 0 && one.reserved.penalty() == 0;
    let mut others = candidates.iter().filter(|one| one.slot != best.slot).filter(usable);
    match reserve(table, *best, shape) {
        Some(picked) => Some(Picked { other: others.next().map(|one| one.slot), ..picked }),
        None => others.find_map(|one| reserve(table, *one, shape)), // Somebody was quicker.
    }
}

/// Takes a slot of the shape on a host, if there still is one.
#[inline]
fn reserve<W: Words>(
    table: &CapacityTable<W>,
    candidate: Candidate,
    shape: ShapeId,
) -> Option<Picked> {
    let parts = table.parts();
    let [word, cell, id, _] = &parts.slots[candidate.slot as usize];
    let (mut old, mut host) = (candidate.reserved, candidate.host);
    // Bounded, so that a reader makes progress whatever others do: each failure but a spurious one means that another
    // placer took a slot here, and then this host is no better than the next.
    for _ in 0..RESERVE_TRIES_MAX {
        // Relaxed on success: the count publishes nothing. Acquire on failure: as in `read`.
        match cell.exchange(old.0, old.plus(shape).0, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => {
                let reservation = table.reservation(host, candidate.slot, shape, old);
                return Some(Picked { reservation, other: None });
            }
            Err(found) => {
                old = Reserved(found);
                let word = CapacityWord(word.load(Ordering::Acquire));
                host = HostId(id.load(Ordering::Relaxed));
                if room(word, old, shape) == 0 {
                    return None;
                }
            }
        }
    }
    None
}

/// Tries of one reservation.
const RESERVE_TRIES_MAX: usize = 8;

/// Reads a window in order from a random slot on: the host with least penalty wins, among those the one with most room.
#[cold]
fn pick_in_window<W: Words>(
    table: &CapacityTable<W>,
    rng: &mut impl RngCore,
    shape: ShapeId,
    excluded: &[HostId],
    len: u32,
) -> Pick {
    let parts = table.parts();
    let start = scale(rng.next_u32(), len);
    let window = WINDOW.min(len);
    let mut anybody = false;
    let mut best: Option<(u8, Candidate)> = None;
    let mut slot = start;
    for _ in 0..window {
        let here = slot;
        slot = if slot + 1 == len { 0 } else { slot + 1 };
        let word = CapacityWord(parts.slots[here as usize][WORD].load(Ordering::Relaxed));
        if is_vacant(word) || is_unheard(word) || is_excluded(table, here, excluded) {
            anybody |= !is_vacant(word);
            continue;
        }
        anybody = true;
        let candidate = read(table, here, shape);
        let penalty = candidate.reserved.penalty();
        let better = best.is_none_or(|(least, best)| {
            penalty < least || penalty == least && candidate.room > best.room
        });
        if candidate.room > 0 && better {
            best = Some((penalty, candidate));
        }
    }
    match best.and_then(|(_, candidate)| reserve(table, candidate, shape)) {
        Some(picked) => Pick::Picked(picked),
        None if anybody => Pick::NoRoom,
        None => Pick::NoHosts,
    }
}
