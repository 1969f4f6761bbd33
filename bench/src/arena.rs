//! Words in anonymous memory, with huge pages if the kernel gives them: as a placer holds its capacity table.

use std::{io, ptr, slice, sync::atomic::AtomicU64};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Words of zero. Unmapped when dropped.
#[derive(Debug)]
pub struct Arena {
    start: *mut AtomicU64,
    words: usize,
}

// SAFETY: the memory belongs to this value alone and is reached by shared references to atomics only.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

const HUGE: usize = 2 << 20;

impl Arena {
    /// Maps so many words; asks for huge pages, or forbids them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(words: usize, huge: bool) -> io::Result<Self> {
        let bytes = Self::bytes(words);
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory in use.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // SAFETY: advice about the mapping just made; it changes no contents.
        let _ = unsafe { madvise(start, bytes, advice) };
        Ok(Self { start: start.cast(), words })
    }

    fn bytes(words: usize) -> usize {
        (words * size_of::<AtomicU64>()).next_multiple_of(HUGE).max(HUGE)
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, zeroed by the kernel (a valid value), at least this long, and lives as
        // long as `self`.
        unsafe { slice::from_raw_parts(self.start, self.words) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no reference outlives `self`.
        let _ = unsafe { munmap(self.start.cast(), Self::bytes(self.words)) };
    }
}
