//! The object index: which object lies in which frames of which packs. One a image, sorted by object id.
//!
//! Fixed-size little-endian records in fixed order, so that a reader finds any of them by arithmetic and a binary search,
//! without reading the rest: an image of a million files mounts without its 60 MB index. Everything read here comes from
//! storage and is checked: an ordinal out of range is an error, never a panic.

use crate::id::Hash;
use crate::limits::{CHUNK_BYTES, FRAME_BYTES_MAX, INDEX_BYTES_MAX, PACK_BYTES};

const MAGIC: &[u8; 8] = b"VLYIDX\x01\0";
/// Bytes of the head.
pub(crate) const HEAD_BYTES: usize = 64;
/// Bytes of a pack's record.
pub(crate) const PACK_RECORD_BYTES: usize = 40;
/// Bytes of a frame's record.
pub(crate) const FRAME_RECORD_BYTES: usize = 48;
/// Bytes of an object's record.
pub(crate) const OBJECT_RECORD_BYTES: usize = 48;
/// Bytes of a chunk's record.
pub(crate) const CHUNK_RECORD_BYTES: usize = 4;

/// Stored bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stored image is damaged: {0}; prepare it again")]
pub struct Damaged(pub(crate) &'static str);

/// A pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackRef {
    pub(crate) hash: Hash,
    pub(crate) bytes: u32,
}

/// A frame: where its stored bytes are, and what they must hash to once decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameRef {
    pub(crate) hash: Hash,
    pub(crate) pack: u32,
    pub(crate) offset: u32,
    /// Bytes in the pack; as many as `bytes` means that they are not compressed.
    pub(crate) stored: u32,
    /// Bytes once decompressed.
    pub(crate) bytes: u32,
}

/// An object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ObjectRef {
    pub(crate) id: Hash,
    pub(crate) size: u64,
    /// Its frame's ordinal; of a cut object the place of its first chunk in the chunk table.
    pub(crate) first: u32,
    /// Where it begins in its frame; 0 for a cut one.
    pub(crate) offset: u32,
}

impl ObjectRef {
    /// Cut into chunks of [`CHUNK_BYTES`], a frame each.
    pub(crate) fn is_cut(&self) -> bool {
        self.size > CHUNK_BYTES as u64
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.size.div_ceil(CHUNK_BYTES as u64)
    }
}

/// How many of each, and thereby where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) packs: u32,
    pub(crate) frames: u32,
    pub(crate) objects: u32,
    pub(crate) chunks: u32,
}

impl Head {
    pub(crate) fn parse(bytes: &[u8], blob_bytes: u64) -> Result<Self, Damaged> {
        if bytes.len() < HEAD_BYTES || &bytes[..8] != MAGIC {
            return Err(Damaged("the index has no head"));
        }
        let head = Self {
            packs: u32_at(bytes, 8),
            frames: u32_at(bytes, 12),
            objects: u32_at(bytes, 16),
            chunks: u32_at(bytes, 20),
        };
        if blob_bytes > INDEX_BYTES_MAX || head.end() != blob_bytes {
            return Err(Damaged("the index has another length than its head says"));
        }
        Ok(head)
    }

    pub(crate) fn pack_at(&self, n: u32) -> u64 {
        HEAD_BYTES as u64 + u64::from(n) * PACK_RECORD_BYTES as u64
    }

    pub(crate) fn frame_at(&self, n: u32) -> u64 {
        self.pack_at(self.packs) + u64::from(n) * FRAME_RECORD_BYTES as u64
    }

    pub(crate) fn object_at(&self, n: u32) -> u64 {
        self.frame_at(self.frames) + u64::from(n) * OBJECT_RECORD_BYTES as u64
    }

    pub(crate) fn chunk_at(&self, n: u32) -> u64 {
        self.object_at(self.objects) + u64::from(n) * CHUNK_RECORD_BYTES as u64
    }

    fn end(&self) -> u64 {
        self.chunk_at(self.chunks)
    }

    /// Its stored form.
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(MAGIC);
        for n in [self.packs, self.frames, self.objects, self.chunks] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.resize(out.len() + HEAD_BYTES - 24, 0);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn hash_at(bytes: &[u8], at: usize) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(&bytes[at..at + 32]);
    hash
}

impl PackRef {
    /// From [`PACK_RECORD_BYTES`] bytes.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Damaged> {
        let pack = Self { hash: hash_at(bytes, 0), bytes: u32_at(bytes, 32) };
        // A pack is closed by the frame that fills it, which may pass the mark.
        if pack.bytes as usize > PACK_BYTES + FRAME_BYTES_MAX {
            return Err(Damaged("a pack too long"));
        }
        Ok(pack)
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.hash);
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }
}

impl FrameRef {
    /// From [`FRAME_RECORD_BYTES`] bytes; the pack's ordinal must be below `packs`.
    pub(crate) fn parse(bytes: &[u8], packs: u32) -> Result<Self, Damaged> {
        let frame = Self {
            hash: hash_at(bytes, 0),
            pack: u32_at(bytes, 32),
            offset: u32_at(bytes, 36),
            stored: u32_at(bytes, 40),
            bytes: u32_at(bytes, 44),
        };
        let too_long = |n: u32| n as usize > FRAME_BYTES_MAX;
        if frame.pack >= packs || too_long(frame.stored) || too_long(frame.bytes) {
            return Err(Damaged("a frame out of range"));
        }
        if frame.offset as usize > PACK_BYTES || frame.stored > frame.bytes || frame.bytes == 0 {
            return Err(Damaged("a frame out of range"));
        }
        Ok(frame)
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.hash);
        for n in [self.pack, self.offset, self.stored, self.bytes] {
            out.extend_from_slice(&n.to_le_bytes());
        }
    }
}

impl ObjectRef {
    /// From [`OBJECT_RECORD_BYTES`] bytes; ordinals must be in range of `head`.
    pub(crate) fn parse(bytes: &[u8], head: &Head) -> Result<Self, Damaged> {
        let mut size = [0; 8];
        size.copy_from_slice(&bytes[32..40]);
        let object = Self {
            id: hash_at(bytes, 0),
            size: u64::from_le_bytes(size),
            first: u32_at(bytes, 40),
            offset: u32_at(bytes, 44),
        };
        let good = if object.is_cut() {
            object.offset == 0
                && u64::from(object.first)
                    .checked_add(object.chunks())
                    .is_some_and(|end| end <= u64::from(head.chunks))
        } else {
            object.first < head.frames
        };
        if good { Ok(object) } else { Err(Damaged("an object out of range")) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.first.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
    }
}

/// A whole index in memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Index {
    pub(crate) packs: Vec<PackRef>,
    pub(crate) frames: Vec<FrameRef>,
    /// Sorted by id, each once.
    pub(crate) objects: Vec<ObjectRef>,
    pub(crate) chunks: Vec<u32>,
}

impl Index {
    /// How many of what; `None` when there is too much of anything.
    pub(crate) fn head(&self) -> Option<Head> {
        Some(Head {
            packs: u32::try_from(self.packs.len()).ok()?,
            frames: u32::try_from(self.frames.len()).ok()?,
            objects: u32::try_from(self.objects.len()).ok()?,
            chunks: u32::try_from(self.chunks.len()).ok()?,
        })
    }

    /// Its stored form; `None` when there is too much of anything.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let head = self.head()?;
        if head.end() > INDEX_BYTES_MAX {
            return None;
        }
        let mut out = Vec::with_capacity(usize::try_from(head.end()).ok()?);
        head.write(&mut out);
        self.packs.iter().for_each(|pack| pack.write(&mut out));
        self.frames.iter().for_each(|frame| frame.write(&mut out));
        self.objects.iter().for_each(|object| object.write(&mut out));
        self.chunks.iter().for_each(|chunk| out.extend_from_slice(&chunk.to_le_bytes()));
        Some(out)
    }

    /// Out of its stored form, all of it checked.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Damaged> {
        let head = Head::parse(bytes, bytes.len() as u64)?;
        let section = |from: u64, to: u64| {
            let place = |n| usize::try_from(n).map_err(|_| Damaged("an index too long"));
            bytes.get(place(from)?..place(to)?).ok_or(Damaged("an index too short"))
        };
        let packs = section(head.pack_at(0), head.pack_at(head.packs))?;
        let frames = section(head.frame_at(0), head.frame_at(head.frames))?;
        let objects = section(head.object_at(0), head.object_at(head.objects))?;
        let chunks = section(head.chunk_at(0), head.chunk_at(head.chunks))?;
        let index = Self {
            packs: packs
                .chunks_exact(PACK_RECORD_BYTES)
                .map(PackRef::parse)
                .collect::<Result<_, _>>()?,
            frames: frames
                .chunks_exact(FRAME_RECORD_BYTES)
                .map(|b| FrameRef::parse(b, head.packs))
                .collect::<Result<_, _>>()?,
            objects: objects
                .chunks_exact(OBJECT_RECORD_BYTES)
                .map(|b| ObjectRef::parse(b, &head))
                .collect::<Result<_, _>>()?,
            chunks: chunks.chunks_exact(CHUNK_RECORD_BYTES).map(|b| u32_at(b, 0)).collect(),
        };
        if !index.objects.is_sorted_by(|a, b| a.id < b.id) {
            return Err(Damaged("an index out of order"));
        }
        if index.chunks.iter().any(|frame| *frame >= head.frames) {
            return Err(Damaged("a chunk out of range"));
        }
        Ok(index)
    }

    /// The record of an object.
    pub(crate) fn find(&self, id: &Hash) -> Option<&ObjectRef> {
        let at = self.objects.binary_search_by(|object| object.id.cmp(id)).ok()?;
        self.objects.get(at)
    }
}
