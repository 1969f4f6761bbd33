//! Frames on the host's disk: a file a frame, named by its hash, uncompressed, checked each time it is read.
//!
//! A file appears whole or not at all (`O_TMPFILE`, then `link`), so that a crash leaves nothing to repair. Nothing is synced:
//! a frame lost or torn by a power cut fails its hash and is fetched again. The least recently used go first when the bound
//! is reached. Disk errors cost speed, never an answer.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use crate::id::{Domain, Hash, hash_from_hex, to_hex};
use crate::limits::FRAME_BYTES_MAX;
use crate::lru::Lru;

/// The disk tier of the frame cache.
#[derive(Debug)]
pub(crate) struct DiskFrames {
    dir: PathBuf,
    bytes_max: u64,
    domain: Domain,
    table: Mutex<Lru<()>>,
}

/// What a look on disk gave.
pub(crate) enum DiskLook {
    Found(Bytes),
    Absent,
    /// It was there and wrong, and is not there any more.
    Damaged,
}

impl DiskFrames {
    /// Opens a directory of frames, made if it is not there. What is in it is known after [`DiskFrames::scan`].
    pub(crate) fn open(dir: &Path, bytes_max: u64, domain: &Domain) -> io::Result<Self> {
        (0..=255u8).try_for_each(|n| fs::create_dir_all(dir.join(to_hex(&[n]))))?;
        let table = Mutex::default();
        Ok(Self { dir: dir.to_owned(), bytes_max, domain: domain.clone(), table })
    }

    /// Learns what is there. Frames may be read and written meanwhile: one that is not known yet is fetched once more.
    pub(crate) fn scan(&self) -> io::Result<()> {
        let mut found = Vec::new();
        for n in 0..=255u8 {
            for entry in fs::read_dir(self.dir.join(to_hex(&[n])))? {
                let entry = entry?;
                let hash = entry.file_name().to_str().and_then(hash_from_hex);
                let meta = entry.metadata()?;
                match (hash, u32::try_from(meta.len())) {
                    (Some(hash), Ok(bytes)) => found.push((meta.modified()?, hash, bytes)),
                    _ => fs::remove_file(entry.path())?,
                }
            }
        }
        found.sort_unstable();
        for (_, hash, bytes) in found {
            let mut table = self.table();
            if table.get(&hash).is_none() {
                table.insert(hash, bytes.into(), ());
            }
        }
        self.make_room(0);
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Lru<()>> {
        // The table is whole between any two statements that hold the lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, hash: &Hash) -> PathBuf {
        let hex = to_hex(hash);
        self.dir.join(&hex[..2]).join(hex)
    }

    /// Bytes of all frames.
    pub(crate) fn bytes(&self) -> u64 {
        self.table().weight()
    }

    /// The frame, if it is here and what its hash says.
    pub(crate) fn read(&self, hash: &Hash, bytes: u32) -> DiskLook {
        if self.table().get(hash).is_none() {
            return DiskLook::Absent;
        }
        let path = self.path(hash);
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(&path)?;
            let len = usize::try_from(bytes).unwrap_or(FRAME_BYTES_MAX).min(FRAME_BYTES_MAX);
            let mut out = vec![0; len];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut out, 0)?;
            Ok(out)
        };
        match read() {
            Ok(out) if self.domain.hash(&out) == *hash => DiskLook::Found(out.into()),
            _ => {
                self.table().remove(hash);
                let _ = fs::remove_file(&path);
                DiskLook::Damaged
            }
        }
    }

    /// Keeps a frame. An error means that it is not kept, and nothing else.
    pub(crate) fn write(&self, hash: &Hash, bytes: &[u8]) -> io::Result<()> {
        let Ok(len) = u32::try_from(bytes.len()) else { return Ok(()) };
        self.make_room(u64::from(len));
        let path = self.path(hash);
        let dir = path.parent().unwrap_or(&self.dir);
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(fd);
        file.write_all(bytes)?;
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        match rustix::fs::linkat(CWD, from, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {
                self.table().insert(*hash, len.into(), ());
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Removes the longest unused until so many bytes fit.
    fn make_room(&self, bytes: u64) {
        loop {
            let Some(victim) = self.table().pop_over(self.bytes_max, bytes) else { return };
            // A reader that has it open goes on reading.
            let _ = fs::remove_file(self.path(&victim));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, bytes_max: u64) -> DiskFrames {
        let disk = DiskFrames::open(dir, bytes_max, &Domain::new("d").unwrap()).unwrap();
        disk.scan().unwrap();
        disk
    }

    fn add(disk: &DiskFrames, n: u8) -> Hash {
        let bytes = [n; 1000];
        let hash = disk.domain.hash(&bytes);
        disk.write(&hash, &bytes).unwrap();
        hash
    }

    #[test]
    fn the_longest_unused_go_first_and_the_rest_outlives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let disk = open(dir.path(), 3000);
        let hashes: Vec<_> = (0..3).map(|n| add(&disk, n)).collect();
        assert!(matches!(disk.read(&hashes[0], 1000), DiskLook::Found(_)));
        let last = add(&disk, 9);
        assert_eq!(disk.bytes(), 3000);
        drop(disk);
        let disk = open(dir.path(), 3000);
        let there = |hash| matches!(disk.read(hash, 1000), DiskLook::Found(_));
        assert!(there(&hashes[0]) && there(&hashes[2]) && there(&last));
        assert!(!there(&hashes[1]));
    }

    #[test]
    fn a_damaged_frame_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let disk = open(dir.path(), 1 << 20);
        for damage in [&[1u8; 1000][..], &[0u8; 999][..], &[][..]] {
            let hash = add(&disk, 0);
            fs::write(disk.path(&hash), damage).unwrap();
            assert!(matches!(disk.read(&hash, 1000), DiskLook::Damaged));
            assert!(matches!(disk.read(&hash, 1000), DiskLook::Absent));
        }
    }
}
