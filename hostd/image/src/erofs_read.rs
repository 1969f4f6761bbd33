//! Reads the EROFS images that [`crate::erofs_write`] writes, where the kernel does not do it: for the unpacked mount and in
//! tests. Every offset comes from storage and is checked; a directory that contains itself ends at the depth limit.

use crate::erofs::{
    BLOCK, DIRENT_BYTES, INODE_BYTES, Layout, MAGIC, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK,
    S_IFMT, S_IFREG, SLOT, SUPER_AT, SUPER_BYTES, XATTR_HEAD_BYTES, decode_device, round_up,
    xattr_prefix_name,
};
use crate::erofs_write::{METACOPY, REDIRECT};
use crate::id::{Hash, hash_from_hex};
use crate::index::Damaged;
use crate::limits::NAME_BYTES_MAX;
use crate::tree::{Meta, Time, Xattr};

/// An image in memory.
pub(crate) struct ErofsImage<'a> {
    bytes: &'a [u8],
    root: u64,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum InodeKind {
    Dir,
    /// Bytes in the image itself.
    File(Vec<u8>),
    /// Bytes elsewhere.
    Object {
        id: Hash,
        size: u64,
    },
    Symlink(Vec<u8>),
    Device {
        block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// One inode, its steering xattrs taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) nid: u64,
    pub(crate) meta: Meta,
    pub(crate) nlink: u32,
    pub(crate) kind: InodeKind,
    layout: Layout,
    size: u64,
    block: u32,
    after: u64,
}

impl<'a> ErofsImage<'a> {
    /// Checks the superblock.
    pub(crate) fn open(bytes: &'a [u8]) -> Result<Self, Damaged> {
        let sb = bytes.get(SUPER_AT..SUPER_AT + SUPER_BYTES);
        let sb = sb.ok_or(Damaged("the metadata is too short"))?;
        if u32_at(sb, 0) != MAGIC || sb[12] != 12 || u32_at(sb, 40) != 0 {
            return Err(Damaged("the metadata is no EROFS image of ours"));
        }
        Ok(Self { bytes, root: u64::from(u16_at(sb, 14)) })
    }

    /// The root directory.
    pub(crate) fn root(&self) -> Result<Inode, Damaged> {
        self.inode(self.root)
    }

    fn slice(&self, at: u64, len: u64) -> Result<&'a [u8], Damaged> {
        let range = || {
            let start = usize::try_from(at).ok()?;
            let end = start.checked_add(usize::try_from(len).ok()?)?;
            self.bytes.get(start..end)
        };
        range().ok_or(Damaged("the metadata points beyond its end"))
    }

    /// The inode of that number.
    pub(crate) fn inode(&self, nid: u64) -> Result<Inode, Damaged> {
        let at = nid.checked_mul(SLOT).ok_or(Damaged("an inode out of range"))?;
        let raw = self.slice(at, INODE_BYTES)?;
        let format = u16_at(raw, 0);
        let layout = Layout::from_code(format >> 1 & 7).filter(|_| format & 1 == 1);
        let layout = layout.ok_or(Damaged("an inode of an unknown form"))?;
        let icount = u64::from(u16_at(raw, 2));
        let xattr_len = if icount == 0 { 0 } else { XATTR_HEAD_BYTES + 4 * (icount - 1) };
        let xattrs = self.xattrs(at + INODE_BYTES, xattr_len)?;
        let mode = u16_at(raw, 4);
        let union = u32_at(raw, 16);
        let mut inode = Inode {
            nid,
            meta: Meta {
                mode: mode & 0o7777,
                uid: u32_at(raw, 24),
                gid: u32_at(raw, 28),
                mtime: Time { secs: u64_at(raw, 32).cast_signed(), nanos: u32_at(raw, 40) },
                xattrs: Vec::new(),
            },
            nlink: u32_at(raw, 44),
            kind: InodeKind::Fifo,
            layout,
            size: u64_at(raw, 8),
            block: union,
            after: at + INODE_BYTES + xattr_len,
        };
        let (major, minor) = decode_device(union);
        inode.kind = match mode & S_IFMT {
            S_IFDIR => InodeKind::Dir,
            S_IFREG if layout == Layout::Chunks => {
                InodeKind::Object { id: object_of(&xattrs)?, size: inode.size }
            }
            S_IFREG => InodeKind::File(self.data(&inode)?),
            S_IFLNK => InodeKind::Symlink(self.data(&inode)?),
            S_IFCHR => InodeKind::Device { block: false, major, minor },
            S_IFBLK => InodeKind::Device { block: true, major, minor },
            S_IFIFO => InodeKind::Fifo,
            _ => return Err(Damaged("an inode of an unknown kind")),
        };
        inode.meta.xattrs = xattrs;
        inode.meta.xattrs.retain(|(name, _)| **name != *METACOPY && **name != *REDIRECT);
        Ok(inode)
    }

    fn xattrs(&self, at: u64, len: u64) -> Result<Vec<Xattr>, Damaged> {
        let mut out: Vec<Xattr> = Vec::new();
        let mut pos = at + XATTR_HEAD_BYTES.min(len);
        while pos < at + len {
            let head = self.slice(pos, 4)?;
            let (name_len, value_len) = (u64::from(head[0]), u64::from(u16_at(head, 2)));
            let prefix = xattr_prefix_name(head[1]).ok_or(Damaged("an xattr of no namespace"))?;
            let body = self.slice(pos + 4, name_len + value_len)?;
            let (rest, value) = body.split_at(usize::from(head[0]));
            out.push(([prefix, rest].concat().into(), value.into()));
            pos = round_up(pos + 4 + name_len + value_len, 4);
        }
        if pos > at + len { Err(Damaged("xattrs beyond their end")) } else { Ok(out) }
    }

    fn data(&self, inode: &Inode) -> Result<Vec<u8>, Damaged> {
        let tail = if inode.layout == Layout::Inline { inode.size % BLOCK } else { 0 };
        let blocks = self.slice(u64::from(inode.block) * BLOCK, inode.size - tail)?;
        let tail = self.slice(inode.after, tail)?;
        Ok([blocks, tail].concat())
    }

    /// The entries of a directory but `.` and `..`: names with their inode numbers.
    pub(crate) fn entries(&self, dir: &Inode) -> Result<Vec<(Vec<u8>, u64)>, Damaged> {
        if dir.kind != InodeKind::Dir || dir.layout == Layout::Chunks {
            return Err(Damaged("entries of what is no directory"));
        }
        let data = self.data(dir)?;
        let mut out = Vec::new();
        for block in data.chunks(usize::try_from(BLOCK).unwrap_or(4096)) {
            parse_dir_block(block, &mut out)?;
        }
        Ok(out)
    }
}

fn parse_dir_block(block: &[u8], out: &mut Vec<(Vec<u8>, u64)>) -> Result<(), Damaged> {
    let bad = Damaged("a directory block that makes no sense");
    let name_at = |i: usize| {
        let at = i * DIRENT_BYTES + 8;
        block.get(at..at + 2).map(|b| usize::from(u16_at(b, 0))).ok_or(bad.clone())
    };
    let names_from = name_at(0)?;
    if names_from == 0 || !names_from.is_multiple_of(DIRENT_BYTES) {
        return Err(bad);
    }
    let count = names_from / DIRENT_BYTES;
    for i in 0..count {
        let start = name_at(i)?;
        let end = if i + 1 < count { name_at(i + 1)? } else { block.len() };
        let name = block.get(start..end).ok_or(bad.clone())?;
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        let good = !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.contains(&b'/');
        if !good {
            return Err(bad);
        }
        if name != b"." && name != b".." {
            out.push((name.to_vec(), u64_at(block, i * DIRENT_BYTES)));
        }
    }
    Ok(())
}

/// The object that a file's xattrs name.
fn object_of(xattrs: &[Xattr]) -> Result<Hash, Damaged> {
    let redirect = xattrs.iter().find(|(name, _)| **name == *REDIRECT).map(|(_, value)| value);
    let hash = || {
        let hex = std::str::from_utf8(redirect?.get(4..)?).ok()?;
        hash_from_hex(hex)
    };
    hash().ok_or(Damaged("a file without its object"))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
