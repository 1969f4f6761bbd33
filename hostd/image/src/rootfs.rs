//! A root file system from a directory: walked without following a symlink, and without leaving its file system.
//!
//! Sockets are left out, as tar leaves them out. What cannot be read (another user's file) is an error: an image with a file
//! missing is worse than none.

use std::collections::HashMap;
use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom};

use crate::apply::Applier;
use crate::erofs::keeps_xattr;
use crate::limits::DEPTH_MAX;
use crate::pack::FileBytes;
use crate::progress::Progress;
use crate::refuse::{PrepareError, Refusal, Rule};
use crate::tree::{Children, Kind, Meta, Node, Time, Xattr};

/// Adds a directory's tree.
pub(crate) fn add(
    root: &Path,
    applier: &mut Applier<'_, '_>,
    progress: &dyn Progress,
) -> Result<(), PrepareError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty())
        .map_err(|e| PrepareError::read(root.display().to_string(), e.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| PrepareError::read("the root", e.into()))?;
    applier.tree.begin_layer();
    let meta = meta_of(&stat, &fd, b"")?;
    applier.node(b"", Node { meta, kind: Kind::Dir(Children::new()) })?;
    let mut walk = Walk { applier, progress, links: HashMap::new(), device: stat.st_dev };
    walk.dir(fd, &mut Vec::new(), 0)
}

struct Walk<'a, 'p, 's> {
    applier: &'a mut Applier<'p, 's>,
    progress: &'a dyn Progress,
    /// First path of each inode that has several.
    links: HashMap<u64, Vec<u8>>,
    device: u64,
}

impl Walk<'_, '_, '_> {
    fn dir(&mut self, fd: OwnedFd, path: &mut Vec<u8>, depth: usize) -> Result<(), PrepareError> {
        if depth > DEPTH_MAX {
            return Err(Refusal::new(Rule::Path, path, "deeper than 1,024 names").into());
        }
        let failed = |path: &[u8], e: rustix::io::Errno| {
            PrepareError::read(path.escape_ascii().to_string(), e.into())
        };
        let mut names: Vec<CString> = Vec::new();
        for entry in Dir::read_from(&fd).map_err(|e| failed(path, e))? {
            let entry = entry.map_err(|e| failed(path, e))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable();
        for name in names {
            if self.progress.stopped() {
                return Err(PrepareError::Stopped);
            }
            let len = path.len();
            if len > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            self.entry(&fd, &name, path, depth)?;
            path.truncate(len);
        }
        Ok(())
    }

    fn entry(
        &mut self,
        dir: &OwnedFd,
        name: &CString,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<(), PrepareError> {
        let failed = |e: rustix::io::Errno, path: &[u8]| {
            PrepareError::read(path.escape_ascii().to_string(), e.into())
        };
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| failed(e, path))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(());
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                return Ok(self.applier.tree.hardlink(path, first)?);
            }
            self.links.insert(stat.st_ino, path.clone());
        }
        if kind == FileType::Symlink {
            let target = rustix::fs::readlinkat(dir, name, Vec::new());
            let target = target.map_err(|e| failed(e, path))?.into_bytes();
            let meta = Meta { mode: 0o777, ..meta_without_xattrs(&stat) };
            return self.applier.node(path, Node { meta, kind: Kind::Symlink(target.into()) });
        }
        let device = |block| {
            let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            (block || major != 0 || minor != 0).then_some(Kind::Device { block, major, minor })
        };
        let special = match kind {
            FileType::Directory | FileType::RegularFile => None,
            FileType::CharacterDevice => Some(device(false)),
            FileType::BlockDevice => Some(device(true)),
            FileType::Fifo => Some(Some(Kind::Fifo)),
            _ => return Err(Refusal::new(Rule::Kind, path, "a file of an unknown kind").into()),
        };
        if let Some(special) = special {
            let Some(kind) = special else {
                self.applier.dropped += 1;
                return Ok(());
            };
            return self.applier.node(path, Node { meta: meta_without_xattrs(&stat), kind });
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd =
            rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(|e| failed(e, path))?;
        let meta = meta_of(&stat, &fd, path)?;
        if kind == FileType::Directory {
            self.applier.node(path, Node { meta, kind: Kind::Dir(Children::new()) })?;
            // What is mounted there belongs to this machine and not to the image.
            if stat.st_dev != self.device {
                return Ok(());
            }
            return self.dir(fd, path, depth + 1);
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let mut bytes = HoleyFile { fd, at: 0, size };
        let kind = self.applier.pack(path, size, &mut bytes)?;
        self.progress.advance(size);
        self.applier.node(path, Node { meta, kind })
    }
}

/// A file that knows its holes.
struct HoleyFile {
    fd: OwnedFd,
    at: u64,
    size: u64,
}

impl Read for HoleyFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = rustix::io::pread(&self.fd, buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl FileBytes for HoleyFile {
    fn zeros_ahead(&mut self) -> u64 {
        let end = match rustix::fs::seek(&self.fd, SeekFrom::Data(self.at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => self.size,
            Err(_) => self.at,
        };
        end.min(self.size).saturating_sub(self.at)
    }

    fn skip_zeros(&mut self, bytes: u64) -> io::Result<()> {
        self.at += bytes;
        Ok(())
    }
}

fn meta_without_xattrs(stat: &rustix::fs::Stat) -> Meta {
    Meta {
        mode: u16::try_from(stat.st_mode & 0o7777).unwrap_or(0),
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: Time { secs: stat.st_mtime, nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) },
        xattrs: Vec::new(),
    }
}

fn meta_of(stat: &rustix::fs::Stat, fd: &OwnedFd, path: &[u8]) -> Result<Meta, PrepareError> {
    let xattrs = xattrs(fd, path)?;
    Ok(Meta { xattrs, ..meta_without_xattrs(stat) })
}

fn xattrs(fd: &OwnedFd, path: &[u8]) -> Result<Vec<Xattr>, PrepareError> {
    let failed =
        |e: rustix::io::Errno| PrepareError::read(path.escape_ascii().to_string(), e.into());
    let mut list = vec![0; 64 << 10];
    let len = match rustix::fs::flistxattr(fd.as_fd(), &mut list) {
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        len => len.map_err(failed)?,
    };
    let mut out: Vec<Xattr> = Vec::new();
    for name in list[..len].split(|b| *b == 0).filter(|name| keeps_xattr(name)) {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::fgetxattr(fd.as_fd(), name, &mut value).map_err(failed)?;
        value.truncate(len);
        out.push((name.into(), value.into()));
    }
    out.sort_unstable();
    let bytes: usize = out.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
    if bytes > crate::limits::XATTR_BYTES_MAX {
        return Err(Refusal::new(Rule::Xattr, path, "too many extended attributes").into());
    }
    Ok(out)
}
