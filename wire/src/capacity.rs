//! The capacity word: everything that a placer knows of a host, in eight bytes.
//!
//! One word so that a placer reads and a feed writes it with one atomic access, and never sees half of an
//! update. Layout, from bit 0: four free counts of ten bits (one a shape), four flags, and a stamp of twenty
//! bits: the low bits of the heartbeat's seq, compared as a serial number, so that an older word never
//! overwrites a newer one. Reservations are a placer's own and live beside the word, not in it.

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    id::Seq,
    limits::{FREE_MAX, SHAPES_MAX},
};

const FREE_BITS: u32 = 10;
const FLAGS_SHIFT: u32 = FREE_BITS * 4;
const STAMP_SHIFT: u32 = FLAGS_SHIFT + 4;

/// Which of the fleet's shapes: below [`SHAPES_MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShapeId(u8);

impl ShapeId {
    /// Checks a shape's index.
    #[must_use]
    pub const fn new(index: u8) -> Option<Self> {
        if (index as usize) < SHAPES_MAX { Some(Self(index)) } else { None }
    }

    /// Index into arrays of [`SHAPES_MAX`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// All shapes, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..4).map(Self)
    }
}

const _: () = assert!(SHAPES_MAX == 4 && FREE_BITS as usize * SHAPES_MAX == FLAGS_SHIFT as usize);

/// The low twenty bits of a [`Seq`]: says which of two words of one host is newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stamp(u32);

impl Stamp {
    const BITS: u32 = u64::BITS - STAMP_SHIFT;
    const MASK: u32 = (1 << Self::BITS) - 1;

    /// The stamp of a heartbeat.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "masked to twenty bits")]
    pub const fn of(seq: Seq) -> Self {
        Self(seq.0 as u32 & Self::MASK)
    }

    /// The stamp as a number below 2^20.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Whether `self` comes after `other`, as serial numbers do: the shorter way round the circle counts.
    /// Holds while two stamps compared are less than 2^19 heartbeats apart (91 days at 15 s).
    #[must_use]
    pub const fn is_after(self, other: Self) -> bool {
        let ahead = self.0.wrapping_sub(other.0) & Self::MASK;
        ahead != 0 && ahead < (1 << (Self::BITS - 1))
    }
}

/// Free slots a shape, flags and the stamp of the heartbeat that said so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
#[rkyv(derive(Clone, Copy, Debug))]
pub struct CapacityWord(pub u64);

impl CapacityWord {
    /// The host takes no new work and says so.
    pub const DRAINING: u64 = 1 << FLAGS_SHIFT;
    /// The host found itself unable to start sandboxes.
    pub const SICK: u64 = 2 << FLAGS_SHIFT;
    /// Placers reported it; it is left out until a retest.
    pub const QUARANTINED: u64 = 4 << FLAGS_SHIFT;
    /// No such host: the slot of the table is empty.
    pub const ABSENT: u64 = 8 << FLAGS_SHIFT;
    /// All flags.
    pub const FLAGS: u64 = 0xf << FLAGS_SHIFT;

    /// Packs a word. Counts above [`FREE_MAX`] are said as [`FREE_MAX`]; bits outside
    /// [`Self::FLAGS`] are ignored.
    #[must_use]
    pub fn new(free: [u16; SHAPES_MAX], flags: u64, stamp: Stamp) -> Self {
        let counts = free
            .iter()
            .rev()
            .fold(0u64, |word, &count| (word << FREE_BITS) | u64::from(count.min(FREE_MAX)));
        Self(counts | (flags & Self::FLAGS) | (u64::from(stamp.0) << STAMP_SHIFT))
    }

    /// Free slots of a shape, flags not considered.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "masked to ten bits")]
    pub const fn free(self, shape: ShapeId) -> u16 {
        (self.0 >> (FREE_BITS * shape.0 as u32)) as u16 & FREE_MAX
    }

    /// Free slots of every shape.
    #[must_use]
    pub fn free_all(self) -> [u16; SHAPES_MAX] {
        let mut free = [0; SHAPES_MAX];
        ShapeId::all().for_each(|shape| free[shape.index()] = self.free(shape));
        free
    }

    /// Slots that a placer may hope for: none if any flag is up.
    #[must_use]
    pub const fn usable(self, shape: ShapeId) -> u16 {
        if self.0 & Self::FLAGS == 0 { self.free(shape) } else { 0 }
    }

    /// The flags that are up.
    #[must_use]
    pub const fn flags(self) -> u64 {
        self.0 & Self::FLAGS
    }

    /// Whether all of `flags` are up.
    #[must_use]
    pub const fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// The same word with other flags up as well.
    #[must_use]
    pub const fn with(self, flags: u64) -> Self {
        Self(self.0 | (flags & Self::FLAGS))
    }

    /// The same word with some flags down.
    #[must_use]
    pub const fn without(self, flags: u64) -> Self {
        Self(self.0 & !(flags & Self::FLAGS))
    }

    /// When it was said.
    #[must_use]
    pub const fn stamp(self) -> Stamp {
        Stamp((self.0 >> STAMP_SHIFT) as u32)
    }
}

/// Free slots a shape of a machine with `free` of each resource left, given each shape's need.
/// Shapes share the resources: the counts are alternatives, not a sum. `need` of zero everywhere fits no slot.
#[must_use]
pub fn slots_free(
    cpu_millis: u64,
    memory_bytes: u64,
    need: &[(u64, u64); SHAPES_MAX],
) -> [u16; SHAPES_MAX] {
    need.map(|(cpu, memory)| {
        if cpu == 0 && memory == 0 {
            return 0;
        }
        let by_cpu = cpu_millis.checked_div(cpu).unwrap_or(u64::MAX);
        let by_memory = memory_bytes.checked_div(memory).unwrap_or(u64::MAX);
        u16::try_from(by_cpu.min(by_memory)).unwrap_or(u16::MAX).min(FREE_MAX)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_word_gives_back_what_was_packed(free: [u16; 4], flags in 0u64..16, seq: u64) {
            let flags = flags << FLAGS_SHIFT;
            let stamp = Stamp::of(Seq(seq));
            let word = CapacityWord::new(free, flags, stamp);
            for shape in ShapeId::all() {
                let said = free[shape.index()].min(FREE_MAX);
                prop_assert_eq!(word.free(shape), said);
                prop_assert_eq!(word.usable(shape), if flags == 0 { said } else { 0 });
            }
            prop_assert_eq!(word.flags(), flags);
            prop_assert_eq!(word.stamp(), stamp);
            prop_assert_eq!(word.with(CapacityWord::SICK).without(CapacityWord::FLAGS).flags(), 0);
        }

        #[test]
        fn of_two_stamps_one_is_after(seq in 0u64..u64::MAX / 2, ahead in 1u64..(1 << 19)) {
            let (old, new) = (Stamp::of(Seq(seq)), Stamp::of(Seq(seq + ahead)));
            prop_assert!(new.is_after(old));
            prop_assert!(!old.is_after(new));
            prop_assert!(!old.is_after(old));
        }
    }

    #[test]
    fn slots_are_bounded_by_the_scarcer_resource() {
        let need = [(250, 128), (1_000, 512), (0, 0), (4_000, 1)];
        assert_eq!(slots_free(4_000, 1_024, &need), [8, 2, 0, 1]);
    }
}
