//! EROFS on disk: the constants and the two records that the writer and the reader share.
//!
//! Only what a metadata-only image needs: extended inodes, flat directories, inline data, inline xattrs, and files that are
//! one hole, whose bytes come from elsewhere. Left out: compression, shared xattrs, several devices. Source: the kernel's
//! `fs/erofs/erofs_fs.h`.

/// Block size; the page size of every machine that this runs on.
pub(crate) const BLOCK: u64 = 4096;
/// The same for lengths in memory.
pub(crate) const BLOCK_LEN: usize = 4096;
/// Where the superblock lies.
pub(crate) const SUPER_AT: usize = 1024;
pub(crate) const SUPER_BYTES: usize = 128;
pub(crate) const MAGIC: u32 = 0xe0f5_e1e2;
/// Files made of chunks: those of ours are one hole.
pub(crate) const INCOMPAT_CHUNKED: u32 = 4;
/// Inodes are addressed in units of this.
pub(crate) const SLOT: u64 = 32;
pub(crate) const INODE_BYTES: u64 = 64;
pub(crate) const DIRENT_BYTES: usize = 12;
/// Bytes before the first xattr.
pub(crate) const XATTR_HEAD_BYTES: u64 = 12;
/// The address of a hole.
pub(crate) const HOLE: u32 = u32::MAX;

/// Where an inode's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In blocks.
    Plain,
    /// In blocks, but for the last part, which follows the inode.
    Inline,
    /// In chunks, which are all holes here.
    Chunks,
}

impl Layout {
    pub(crate) fn code(self) -> u16 {
        match self {
            Self::Plain => 0,
            Self::Inline => 2,
            Self::Chunks => 4,
        }
    }

    pub(crate) fn from_code(code: u16) -> Option<Self> {
        [Self::Plain, Self::Inline, Self::Chunks].into_iter().find(|l| l.code() == code)
    }
}

pub(crate) const S_IFMT: u16 = 0o170_000;
pub(crate) const S_IFIFO: u16 = 0o010_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;

/// The kind of a directory entry, by the mode of its inode.
pub(crate) fn dirent_kind(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// Xattr namespaces that EROFS has a number for.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// The number of a name's namespace, and the rest of the name.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    let with = |(index, prefix): &(u8, &[u8])| Some((*index, name.strip_prefix(*prefix)?));
    PREFIXES.iter().find_map(with).filter(|(index, rest)| {
        // The two lists have no name beyond their prefix; the others must have one.
        matches!(index, 2 | 3) == rest.is_empty()
    })
}

/// The prefix with that number.
pub(crate) fn xattr_prefix_name(index: u8) -> Option<&'static [u8]> {
    PREFIXES.iter().find(|(i, _)| *i == index).map(|(_, prefix)| *prefix)
}

/// Whether an xattr of a source image stays. What steers overlayfs would let an image point at other files; what EROFS has
/// no namespace for cannot be said.
pub(crate) fn keeps_xattr(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.overlay.")
        && !name.starts_with(b"user.overlay.")
        && xattr_prefix(name).is_some()
}

/// Linux's 32-bit form of a device number.
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Back from it.
pub(crate) fn decode_device(dev: u32) -> (u32, u32) {
    ((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & !0xff))
}

pub(crate) fn round_up(n: u64, to: u64) -> u64 {
    n.div_ceil(to) * to
}
