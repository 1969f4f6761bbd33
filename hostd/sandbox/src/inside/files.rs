//! File operations and port connections inside a box, each in a short-lived child of its init.
//!
//! A child, so that a lazy read or a hostile file that blocks holds up nobody else. It runs as the
//! box's root with the box's capabilities, below the box's filters and landlock. Descriptors go out
//! only for regular files of the root itself or of a tmpfs: a file of `/proc` that the (powerful)
//! host then wrote to would be a way out. Left out: extended attributes.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::watch::{self, Watch};
use crate::error::Fault;
use crate::msg::FileResult;
use crate::spec::{FileKind, FileOp, FileStat};

/// Most entries of a listing; a directory of more is refused (`E2BIG`).
pub const ENTRIES_MAX: usize = 65_536;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const OVERLAY_MAGIC: u64 = 0x794c_7630;
const TMPFS_MAGIC: u64 = 0x0102_1994;

fn os<T>(what: &str, result: io::Result<T>) -> Result<T, Fault> {
    result.map_err(|e| Fault::os(what, &e))
}

/// Does one operation. A watch goes on after its answer.
pub(super) fn operate(op: &FileOp) -> Result<(FileResult, Option<OwnedFd>, Option<Watch>), Fault> {
    if let FileOp::Watch { path } = op {
        let (watch, reader) = os("watch", watch::begin(&absolute(path)))?;
        return Ok((FileResult::Open, Some(reader), Some(watch)));
    }
    let (result, fd) = operate_once(op)?;
    Ok((result, fd, None))
}

fn operate_once(op: &FileOp) -> Result<(FileResult, Option<OwnedFd>), Fault> {
    match op {
        FileOp::Read { path } => {
            let file = os("read", open(path, OFlags::RDONLY, 0))?;
            Ok((FileResult::Open, Some(file)))
        }
        FileOp::Write { path, mode, append } => {
            let how = if *append { OFlags::APPEND } else { OFlags::empty() };
            let flags = OFlags::WRONLY | OFlags::CREATE | how;
            let file = os("write", open(path, flags, *mode))?;
            if !append {
                // Only once it is known to be a regular file of the root.
                os("write", rustix::fs::ftruncate(&file, 0).map_err(Into::into))?;
            }
            Ok((FileResult::Open, Some(file)))
        }
        FileOp::Stat { path } => {
            Ok((FileResult::Stat(os("stat", stat(&absolute(path), path))?), None))
        }
        FileOp::List { path } => {
            let listing = os("list", list(path))?;
            Ok((FileResult::List, Some(listing)))
        }
        FileOp::MakeDirectory { path, mode } => {
            let mut builder = std::fs::DirBuilder::new();
            os("make directory", builder.recursive(true).mode(*mode).create(absolute(path)))?;
            Ok((FileResult::Done, None))
        }
        FileOp::Remove { path, recursive } => {
            os("remove", remove(&absolute(path), *recursive))?;
            Ok((FileResult::Done, None))
        }
        FileOp::Watch { .. } => Ok((FileResult::Done, None)),
        FileOp::Rename { from, to } => {
            os("rename", std::fs::rename(absolute(from), absolute(to)))?;
            Ok((FileResult::Done, None))
        }
    }
}

/// Connects to a port of the box's own loopback.
pub(super) fn connect(port: u16) -> Result<OwnedFd, Fault> {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into();
    let stream = os("connect", TcpStream::connect_timeout(&address, CONNECT_TIMEOUT))?;
    Ok(stream.into())
}

fn absolute(path: &str) -> PathBuf {
    Path::new("/").join(path)
}

fn open(path: &str, flags: OFlags, mode: u32) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(absolute(path), flags, Mode::from_raw_mode(mode & 0o7777))?;
    let stat = rustix::fs::fstat(&fd)?;
    match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::RegularFile => {}
        rustix::fs::FileType::Directory => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
    let magic = u64::try_from(rustix::fs::fstatfs(&fd)?.f_type).unwrap_or(0);
    if magic != OVERLAY_MAGIC && magic != TMPFS_MAGIC {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(fd)
}

fn stat(path: &Path, name: &str) -> io::Result<FileStat> {
    let meta = std::fs::symlink_metadata(path)?;
    let kind = if meta.is_symlink() {
        FileKind::Symlink
    } else if meta.is_dir() {
        FileKind::Directory
    } else if meta.is_file() {
        FileKind::File
    } else {
        FileKind::Other
    };
    let target = (kind == FileKind::Symlink)
        .then(|| std::fs::read_link(path).map(|t| t.to_string_lossy().into_owned()).ok())
        .flatten();
    Ok(FileStat {
        name: name.to_owned(),
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        size: meta.size(),
        mtime_ns: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        target,
    })
}

fn list(path: &str) -> io::Result<OwnedFd> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(absolute(path))? {
        let entry = entry?;
        if entries.len() == ENTRIES_MAX {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        // One that has just been removed is no error of the listing.
        if let Ok(stat) = stat(&entry.path(), &entry.file_name().to_string_lossy()) {
            entries.push(stat);
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&entries)
        .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    crate::packet::memory_file(&bytes)
}

fn remove(path: &Path, recursive: bool) -> io::Result<()> {
    let meta = std::fs::symlink_metadata(path)?;
    match (meta.is_dir(), recursive) {
        (true, true) => std::fs::remove_dir_all(path),
        (true, false) => std::fs::remove_dir(path),
        (false, _) => std::fs::remove_file(path),
    }
}
