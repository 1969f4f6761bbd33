//! The only door to atomics and locks in this crate.
//!
//! The capacity table lies in memory that the daemon mapped, so that the table cannot own its atomics: it is generic over
//! the [`Cell`] and over who holds the [`Words`]. Under `--cfg loom` the same code runs over loom's atomics, and the
//! loom tests put broken cells in to show that the models would notice.

use core::sync::atomic::AtomicU64;
pub use core::sync::atomic::Ordering;

/// An atomic word of 64 bits.
pub trait Cell: Send + Sync {
    /// Reads it.
    fn load(&self, order: Ordering) -> u64;
    /// Writes it.
    fn store(&self, value: u64, order: Ordering);
    /// Replaces `current` by `new`, or gives back what was there instead. May fail spuriously.
    ///
    /// # Errors
    /// The value found.
    fn exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64>;
}

macro_rules! cell {
    ($atomic:ty) => {
        impl Cell for $atomic {
            #[inline]
            fn load(&self, order: Ordering) -> u64 {
                <$atomic>::load(self, order)
            }

            #[inline]
            fn store(&self, value: u64, order: Ordering) {
                <$atomic>::store(self, value, order);
            }

            #[inline]
            fn exchange(
                &self,
                current: u64,
                new: u64,
                success: Ordering,
                failure: Ordering,
            ) -> Result<u64, u64> {
                self.compare_exchange_weak(current, new, success, failure)
            }
        }
    };
}

cell!(AtomicU64);
#[cfg(loom)]
cell!(loom::sync::atomic::AtomicU64);

/// Whoever holds the words of a table: a mapping, a vector, an arena.
///
/// Gives the same slice each time, for as long as it lives.
pub trait Words {
    /// What a word is.
    type Cell: Cell;
    /// The words.
    fn words(&self) -> &[Self::Cell];
}

impl<C: Cell> Words for Vec<C> {
    type Cell = C;
    #[inline]
    fn words(&self) -> &[C] {
        self
    }
}

impl<C: Cell> Words for Box<[C]> {
    type Cell = C;
    #[inline]
    fn words(&self) -> &[C] {
        self
    }
}

impl<C: Cell> Words for &[C] {
    type Cell = C;
    #[inline]
    fn words(&self) -> &[C] {
        self
    }
}

/// Words of zero in private memory, for tables that no other process reads.
#[must_use]
pub fn zeroed(words: usize) -> Vec<AtomicU64> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Mutex, atomic::AtomicU64 as Version};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Mutex, atomic::AtomicU64 as Version};
