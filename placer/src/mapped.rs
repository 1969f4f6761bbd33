//! Files in memory: the host map read-only, the capacity table as atomic words.
//!
//! The one module with `unsafe`. Both files are the placer's own: made under a private name, complete before they are
//! renamed to the name that others open, in a directory that only the placers of this machine may write. What is not
//! caught: a person who truncates such a file while it is mapped kills the placer with SIGBUS.
#![expect(unsafe_code, reason = "mapping files is what this module is for")]

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::AtomicU64,
};

use memmap2::{Mmap, MmapRaw};
use placer_core::sync::Words;

/// A file's bytes, for reading.
#[derive(Debug)]
pub struct MappedBytes(Mmap);

impl MappedBytes {
    /// Maps a file that nobody writes any more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the bytes must not change while they are borrowed. The loader writes a map to a file of its own name with
        // mode 0600, renames it, and never opens it for writing again; a newer map is another inode.
        Ok(Self(unsafe { Mmap::map(&file) }?))
    }
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A file's bytes as atomic words, shared with whoever maps the file as well.
#[derive(Debug)]
pub struct MappedWords(MmapRaw);

impl MappedWords {
    /// Makes a file of so many words of zero and maps it.
    ///
    /// # Errors
    /// What the kernel says; the file must not exist.
    pub fn create(path: &Path, words: usize) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(words as u64 * 8)?;
        Ok(Self(MmapRaw::map_raw(&file)?))
    }

    /// Maps a table that is there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self(MmapRaw::map_raw(&file)?))
    }
}

impl Words for MappedWords {
    type Cell = AtomicU64;

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `MmapRaw` keeps `len` bytes mapped, readable and writable, at a page's start (so aligned for words) for as
        // long as `self` lives, which bounds the slice. Every bit pattern is an `AtomicU64`. Other threads and
        // processes change the words only by atomic accesses: this function is the one way to them, here and there.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<AtomicU64>(), self.0.len() / 8) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_are_shared_by_all_who_map_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words");
        let ours = MappedWords::create(&path, 1_000).unwrap();
        let theirs = MappedWords::open(&path).unwrap();
        assert_eq!((ours.words().len(), theirs.words().len()), (1_000, 1_000));
        ours.words()[999].store(7, Ordering::Relaxed);
        assert_eq!(theirs.words()[999].load(Ordering::Relaxed), 7);
        assert!(MappedWords::create(&path, 1).is_err(), "a table is never made over another");
    }
}
