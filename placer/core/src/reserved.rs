//! The word beside the capacity word: what this machine's placers have under way on a host.
//!
//! ```text
//! bit 0        12       24       36       48        52           64
//! | shape 0   | shape 1 | shape 2 | shape 3 | penalty | generation |
//! ```
//! A count of twelve bits cannot overflow: a reservation needs `free > reserved`, and free is at most 1,023. The
//! penalty is this machine's own judgement of the host ([`crate::dispatch`]): a candidate of penalty `p` is considered once
//! in `2^p` times. The generation says since when the counts are counted; a reservation of another generation is not
//! taken off again, so that a count can neither go below zero nor be charged to the slot's next host.

use wire::{HostId, ShapeId, Stamp, limits::SHAPES_MAX};

const COUNT_BITS: u32 = 12;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const PENALTY_SHIFT: u32 = 48;
const GENERATION_SHIFT: u32 = 52;

const _: () = assert!(COUNT_BITS as usize * SHAPES_MAX == PENALTY_SHIFT as usize);
const _: () = assert!((wire::limits::FREE_MAX as u64) < COUNT_MASK);

#[expect(clippy::cast_possible_truncation, reason = "below SHAPES_MAX")]
const fn shift(shape: ShapeId) -> u32 {
    COUNT_BITS * shape.index() as u32
}

/// Highest penalty: considered once in 32,768 times.
pub const PENALTY_MAX: u8 = 15;

/// Reservations and penalty of one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserved(pub u64);

impl Reserved {
    /// Nothing reserved, no penalty.
    #[must_use]
    pub const fn empty(generation: u16) -> Self {
        Self((generation as u64) << GENERATION_SHIFT)
    }

    /// Launches of `shape` that are under way.
    #[inline]
    #[must_use]
    pub const fn count(self, shape: ShapeId) -> u16 {
        ((self.0 >> (shift(shape))) & COUNT_MASK) as u16
    }

    /// One more of `shape`. The caller has checked `count < FREE_MAX`.
    #[inline]
    #[must_use]
    pub const fn plus(self, shape: ShapeId) -> Self {
        Self(self.0 + (1 << (shift(shape))))
    }

    /// One less of `shape`, if there is one.
    #[inline]
    #[must_use]
    pub const fn minus(self, shape: ShapeId) -> Self {
        if self.count(shape) == 0 { self } else { Self(self.0 - (1 << (shift(shape)))) }
    }

    /// How bad the host's recent outcomes were.
    #[inline]
    #[must_use]
    pub const fn penalty(self) -> u8 {
        ((self.0 >> PENALTY_SHIFT) & 0xf) as u8
    }

    /// The same counts under another penalty, at most [`PENALTY_MAX`].
    #[must_use]
    pub const fn with_penalty(self, penalty: u8) -> Self {
        let penalty = if penalty > PENALTY_MAX { PENALTY_MAX } else { penalty };
        Self(self.0 & !(0xf << PENALTY_SHIFT) | ((penalty as u64) << PENALTY_SHIFT))
    }

    /// Since when the counts are counted (twelve bits).
    #[inline]
    #[must_use]
    pub const fn generation(self) -> u16 {
        (self.0 >> GENERATION_SHIFT) as u16
    }

    /// Nothing reserved under another generation; the penalty stays.
    #[must_use]
    pub const fn restarted(self, generation: u16) -> Self {
        Self::empty(generation & 0xfff).with_penalty(self.penalty())
    }

    /// Heartbeats of `host` since the counts began, if `stamp` is the newest one's.
    #[must_use]
    pub const fn age(self, host: HostId, stamp: Stamp) -> u16 {
        generation_of(host, stamp).wrapping_sub(self.generation()) & 0xfff
    }
}

/// The generation that begins with a heartbeat of a host. The host's id is mixed in, since the stamps of two hosts that
/// have one slot after the other are often alike.
#[must_use]
pub const fn generation_of(host: HostId, stamp: Stamp) -> u16 {
    let salt = host.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    (stamp.get().wrapping_add(salt as u32) & 0xfff) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_do_not_touch_one_another(ops in prop::collection::vec((0u8..4, any::<bool>()), 0..200)) {
            let mut word = Reserved::empty(77).with_penalty(9);
            let mut model = [0u16; 4];
            for (shape, up) in ops {
                let id = ShapeId::new(shape).unwrap();
                let count = &mut model[usize::from(shape)];
                if up { *count += 1 } else { *count = count.saturating_sub(1) }
                word = if up { word.plus(id) } else { word.minus(id) };
            }
            for id in ShapeId::all() {
                prop_assert_eq!(word.count(id), model[id.index()]);
            }
            prop_assert_eq!((word.generation(), word.penalty()), (77, 9));
            prop_assert_eq!(word.restarted(0xfff), Reserved::empty(0xfff).with_penalty(9));
        }
    }
}
