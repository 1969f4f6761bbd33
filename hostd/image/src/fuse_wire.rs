//! The FUSE protocol's bytes: the requests that a read-only server of objects gets, and its answers. Source: the kernel's
//! `include/uapi/linux/fuse.h`, protocol 7.41 and what came before since 7.31.

use bytes::Bytes;

/// Bytes before each request.
const IN_HEAD_BYTES: usize = 40;
/// Bytes before each answer.
const OUT_HEAD_BYTES: usize = 16;
/// Pages of one read: 1 MiB.
const PAGES_MAX: u16 = 256;
/// A request is read into this: names and heads only, for nothing is ever written.
pub(crate) const REQUEST_BYTES_MAX: usize = 128 << 10;
/// Reads that the kernel sends ahead of need, at most.
const BACKGROUND_MAX: u16 = 256;

/// A file's flag, as a read carries it.
const O_DIRECT: u32 = libc::O_DIRECT.cast_unsigned();

const ASYNC_READ: u64 = 1;
const NO_OPEN_SUPPORT: u64 = 1 << 17;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;
const WANTED: u64 = ASYNC_READ
    | NO_OPEN_SUPPORT
    | PARALLEL_DIROPS
    | MAX_PAGES
    | NO_OPENDIR_SUPPORT
    | INIT_EXT
    | HAS_RESEND;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ask {
    Init {
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Lookup(Vec<u8>),
    GetAttr,
    Read {
        at: u64,
        len: u32,
        /// By `O_DIRECT`: past the page cache, and never ahead of need.
        direct: bool,
    },
    ReadDir,
    StatFs,
    Forget,
    BatchForget(Vec<u64>),
    Destroy,
    /// Of no consequence here: reads end by themselves.
    Interrupt,
    /// What the kernel need not ask again: opens, flushes, xattrs.
    Unneeded,
    /// What a read-only file system refuses.
    Change,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) ask: Ask,
}

/// An answer.
#[derive(Debug)]
pub(crate) enum Answer {
    /// None is wanted.
    Silence,
    /// An errno.
    Error(i32),
    Head(Vec<u8>),
    Data(Vec<Bytes>),
}

/// What a node is, as far as the kernel wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attr {
    pub(crate) node: u64,
    pub(crate) dir: bool,
    pub(crate) size: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl Request {
    /// Out of what was read from the device; `None` if that makes no sense, which no kernel sends.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let body = bytes.get(IN_HEAD_BYTES..)?;
        if u32_at(bytes, 0)? as usize != bytes.len() {
            return None;
        }
        let ask = match u32_at(bytes, 4)? {
            1 => Ask::Lookup(body.strip_suffix(&[0])?.to_vec()),
            2 => Ask::Forget,
            3 => Ask::GetAttr,
            15 => Ask::Read {
                at: u64_at(body, 8)?,
                len: u32_at(body, 16)?,
                direct: u32_at(body, 32).is_some_and(|flags| flags & O_DIRECT != 0),
            },
            17 => Ask::StatFs,
            26 => Ask::Init {
                minor: u32_at(body, 4)?,
                max_readahead: u32_at(body, 8)?,
                flags: u64::from(u32_at(body, 12)?)
                    | u64::from(u32_at(body, 16).unwrap_or(0)) << 32,
            },
            28 | 44 => Ask::ReadDir,
            36 => Ask::Interrupt,
            38 => Ask::Destroy,
            42 => {
                let count = u32_at(body, 0)? as usize;
                let nodes = (0..count).map(|i| u64_at(body, 8 + 16 * i));
                Ask::BatchForget(nodes.collect::<Option<_>>()?)
            }
            4 | 6 | 8..=13 | 16 | 20 | 21 | 24 | 35 | 43 | 45 => Ask::Change,
            _ => Ask::Unneeded,
        };
        Some(Self { unique: u64_at(bytes, 8)?, node: u64_at(bytes, 16)?, ask })
    }
}

impl Answer {
    /// The answer to the first request, which settles what both sides can do.
    pub(crate) fn init(minor: u32, max_readahead: u32, flags: u64) -> Self {
        let flags = flags & WANTED;
        let low = u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0);
        let high = u32::try_from(flags >> 32).unwrap_or(0);
        let mut out = Vec::with_capacity(64);
        for n in [7, minor.min(41), max_readahead.max(1 << 20), low] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&BACKGROUND_MAX.to_le_bytes());
        out.extend_from_slice(&(BACKGROUND_MAX / 4 * 3).to_le_bytes());
        out.extend_from_slice(&4096u32.to_le_bytes()); // max_write, the least allowed
        out.extend_from_slice(&1u32.to_le_bytes()); // times in nanoseconds
        out.extend_from_slice(&PAGES_MAX.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&high.to_le_bytes());
        out.resize(64, 0);
        Self::Head(out)
    }

    pub(crate) fn entry(attr: &Attr) -> Self {
        let mut out = Vec::with_capacity(128);
        // What a node is never changes: valid for ever.
        for n in [attr.node, 0, u64::MAX >> 1, u64::MAX >> 1, 0] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        push_attr(&mut out, attr);
        Self::Head(out)
    }

    pub(crate) fn attr(attr: &Attr) -> Self {
        let mut out = Vec::with_capacity(104);
        for n in [u64::MAX >> 1, 0] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        push_attr(&mut out, attr);
        Self::Head(out)
    }

    pub(crate) fn statfs() -> Self {
        let mut out = vec![0; 80];
        out[40..44].copy_from_slice(&4096u32.to_le_bytes());
        out[44..48].copy_from_slice(&255u32.to_le_bytes());
        out[48..52].copy_from_slice(&4096u32.to_le_bytes());
        Self::Head(out)
    }

    /// The head of this answer to that request, and how many bytes follow it.
    pub(crate) fn head(&self, unique: u64) -> [u8; OUT_HEAD_BYTES] {
        let (error, len) = match self {
            Self::Silence => (0, 0),
            Self::Error(errno) => (-errno, 0),
            Self::Head(bytes) => (0, bytes.len()),
            Self::Data(parts) => (0, parts.iter().map(Bytes::len).sum()),
        };
        out_head(len, error, unique)
    }
}

fn out_head(len: usize, error: i32, unique: u64) -> [u8; OUT_HEAD_BYTES] {
    let mut out = [0; OUT_HEAD_BYTES];
    let len = u32::try_from(OUT_HEAD_BYTES + len).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&len.to_le_bytes());
    out[4..8].copy_from_slice(&error.to_le_bytes());
    out[8..].copy_from_slice(&unique.to_le_bytes());
    out
}

/// Bytes for a node's page cache that nobody asked for yet.
pub(crate) fn store_head(node: u64, at: u64, len: u32) -> Vec<u8> {
    const NOTIFY_STORE: i32 = 4;
    let mut out = out_head(24 + len as usize, NOTIFY_STORE, 0).to_vec();
    out.extend_from_slice(&node.to_le_bytes());
    out.extend_from_slice(&at.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out
}

/// Asks the kernel to send again all that was read and not answered by whoever served before.
pub(crate) fn resend() -> [u8; OUT_HEAD_BYTES] {
    const NOTIFY_RESEND: i32 = 7;
    out_head(0, NOTIFY_RESEND, 0)
}

fn push_attr(out: &mut Vec<u8>, attr: &Attr) {
    for n in [attr.node, attr.size, attr.size.div_ceil(512), 0, 0, 0] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    let (mode, nlink) = if attr.dir { (0o040_555, 2) } else { (0o100_444, 1u32) };
    for n in [0, 0, 0, mode, nlink, 0, 0, 0, 4096, 0] {
        out.extend_from_slice(&n.to_le_bytes());
    }
}
