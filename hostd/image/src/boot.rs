//! Boot packs: what the first run of an image read, in the order in which it did, as one object that streams.
//!
//! `boot/<image>/<entry>` is a head and parts. The head says which bytes of which objects (or of the metadata) are in which
//! part; head and parts have hashes, so that a boot pack which is damaged is not used and nothing else happens: it only
//! makes early what would come anyway.

use std::collections::HashSet;

use bytes::Bytes;
use wire::ImageId;

use crate::id::{Domain, Hash};
use crate::index::Damaged;
use crate::node::Node;

/// Bytes of one part before compression.
pub(crate) const PART_BYTES: usize = 4 << 20;
/// Bytes of all parts before compression: a boot pack is held in memory while it is pushed.
pub(crate) const BOOT_BYTES_MAX: usize = 256 << 20;
/// Bytes of a head, before and after compression.
const HEAD_BYTES_MAX: usize = 16 << 20;
/// Bytes before the head: magic, its stored and its full length, its hash.
pub(crate) const LEAD_BYTES: usize = 48;
const MAGIC: &[u8; 8] = b"VLYBOT\x01\0";
const PAGE: u64 = 4096;
/// The object number that means the metadata.
const META: u32 = u32::MAX;

/// Where bytes belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Meta,
    Object { id: Hash, size: u64 },
}

/// Some bytes of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) place: Place,
    pub(crate) at: u64,
    pub(crate) len: u32,
}

/// A part: which spans, one after another, and what they must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) stored: u32,
    pub(crate) bytes: u32,
    pub(crate) hash: Hash,
    pub(crate) spans: Vec<Span>,
}

/// Where a boot pack lies in the store.
pub(crate) fn boot_path(id: ImageId, entry: &str) -> object_store::path::Path {
    object_store::path::Path::from(format!("boot/{id}/{entry}"))
}

/// Whether an entry's name is one: it is a part of a path.
pub(crate) fn is_entry(entry: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=64).contains(&entry.len()) && entry.bytes().all(good) && !entry.starts_with('.')
}

/// Reads as they come, each page once.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    seen: HashSet<(u64, u64)>,
    reads: Vec<(Node, u64, u32)>,
    bytes: usize,
}

impl Recorder {
    pub(crate) fn read(&mut self, node: Node, at: u64, len: usize) {
        let first = at / PAGE;
        let end = (at + len as u64).div_ceil(PAGE);
        for page in first..end {
            if self.bytes >= BOOT_BYTES_MAX || !self.seen.insert((node.number(), page)) {
                continue;
            }
            self.bytes += 4096;
            // Grows the last span where this page follows it.
            match self.reads.last_mut() {
                Some((last, at, len))
                    if *last == node
                        && *at + u64::from(*len) == page * PAGE
                        && (*len as usize) < PART_BYTES / 4 =>
                {
                    *len += 4096;
                }
                _ => self.reads.push((node, page * PAGE, 4096)),
            }
        }
    }

    /// Spans in the order of their first touch; the last one of a file may pass its end.
    pub(crate) fn into_reads(self) -> Vec<(Node, u64, u32)> {
        self.reads
    }
}

/// Writes a boot pack.
pub(crate) struct BootWriter {
    domain: Domain,
    parts: Vec<Part>,
    body: Vec<u8>,
    spans: Vec<Span>,
    open: Vec<u8>,
}

impl BootWriter {
    pub(crate) fn new(domain: &Domain) -> Self {
        let domain = domain.clone();
        Self { domain, parts: Vec::new(), body: Vec::new(), spans: Vec::new(), open: Vec::new() }
    }

    pub(crate) fn add(&mut self, place: Place, at: u64, bytes: &[u8]) -> std::io::Result<()> {
        if !self.open.is_empty() && self.open.len() + bytes.len() > PART_BYTES {
            self.close_part()?;
        }
        let len = u32::try_from(bytes.len()).unwrap_or(0);
        self.spans.push(Span { place, at, len });
        self.open.extend_from_slice(bytes);
        Ok(())
    }

    fn close_part(&mut self) -> std::io::Result<()> {
        if self.open.is_empty() {
            return Ok(());
        }
        let packed = zstd::bulk::compress(&self.open, 3)?;
        self.parts.push(Part {
            stored: u32::try_from(packed.len()).unwrap_or(0),
            bytes: u32::try_from(self.open.len()).unwrap_or(0),
            hash: self.domain.hash(&self.open),
            spans: std::mem::take(&mut self.spans),
        });
        self.body.extend_from_slice(&packed);
        self.open.clear();
        Ok(())
    }

    /// The whole pack.
    pub(crate) fn finish(mut self) -> std::io::Result<Vec<u8>> {
        self.close_part()?;
        let head = encode_head(&self.parts);
        let packed = zstd::bulk::compress(&head, 3)?;
        let mut out = MAGIC.to_vec();
        for len in [packed.len(), head.len()] {
            out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        }
        out.extend_from_slice(&self.domain.hash(&head));
        out.extend_from_slice(&packed);
        out.extend_from_slice(&self.body);
        Ok(out)
    }
}

fn encode_head(parts: &[Part]) -> Vec<u8> {
    let mut objects: Vec<(Hash, u64)> = Vec::new();
    let mut numbers = std::collections::HashMap::new();
    let mut spans = Vec::new();
    for span in parts.iter().flat_map(|part| &part.spans) {
        let number = match span.place {
            Place::Meta => META,
            Place::Object { id, size } => *numbers.entry(id).or_insert_with(|| {
                objects.push((id, size));
                u32::try_from(objects.len() - 1).unwrap_or(0)
            }),
        };
        spans.extend_from_slice(&number.to_le_bytes());
        spans.extend_from_slice(&span.len.to_le_bytes());
        spans.extend_from_slice(&span.at.to_le_bytes());
    }
    let mut out = Vec::new();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    out.extend_from_slice(&count(parts.len()));
    out.extend_from_slice(&count(objects.len()));
    for part in parts {
        out.extend_from_slice(&part.stored.to_le_bytes());
        out.extend_from_slice(&part.bytes.to_le_bytes());
        out.extend_from_slice(&count(part.spans.len()));
        out.extend_from_slice(&part.hash);
    }
    for (id, size) in objects {
        out.extend_from_slice(&id);
        out.extend_from_slice(&size.to_le_bytes());
    }
    out.extend_from_slice(&spans);
    out
}

/// Takes bytes from the front of a slice.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Damaged> {
        let (front, rest) =
            self.0.split_at_checked(len).ok_or(Damaged("a boot pack that breaks off"))?;
        self.0 = rest;
        Ok(front)
    }

    fn u32(&mut self) -> Result<u32, Damaged> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64, Damaged> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    fn hash(&mut self) -> Result<Hash, Damaged> {
        let mut hash = [0; 32];
        hash.copy_from_slice(self.take(32)?);
        Ok(hash)
    }
}

/// Stored length, full length and hash of the head, out of the first [`LEAD_BYTES`].
pub(crate) fn decode_lead(bytes: &[u8]) -> Result<(usize, usize, Hash), Damaged> {
    let mut cursor = Cursor(bytes);
    if cursor.take(8)? != MAGIC {
        return Err(Damaged("a boot pack without its magic"));
    }
    let (stored, len) = (cursor.u32()? as usize, cursor.u32()? as usize);
    if stored > HEAD_BYTES_MAX || len > HEAD_BYTES_MAX {
        return Err(Damaged("a boot pack with too long a head"));
    }
    Ok((stored, len, cursor.hash()?))
}

/// The parts, out of the stored head.
pub(crate) fn decode_head(
    domain: &Domain,
    stored: &[u8],
    len: usize,
    hash: &Hash,
) -> Result<Vec<Part>, Damaged> {
    let head = zstd::bulk::decompress(stored, len)
        .map_err(|_| Damaged("a boot pack whose head does not decompress"))?;
    if domain.hash(&head) != *hash {
        return Err(Damaged("a boot pack whose head is not what its hash says"));
    }
    let mut cursor = Cursor(&head);
    let (part_count, object_count) = (cursor.u32()? as usize, cursor.u32()? as usize);
    let mut parts = Vec::new();
    for _ in 0..part_count {
        let (stored, bytes, spans) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
        if stored as usize > 2 * PART_BYTES || bytes as usize > PART_BYTES {
            return Err(Damaged("a boot pack with too long a part"));
        }
        parts.push((spans, Part { stored, bytes, hash: cursor.hash()?, spans: Vec::new() }));
    }
    let mut objects = Vec::new();
    for _ in 0..object_count {
        objects.push(Place::Object { id: cursor.hash()?, size: cursor.u64()? });
    }
    for (count, part) in &mut parts {
        let mut left = part.bytes;
        for _ in 0..*count {
            let (number, len, at) = (cursor.u32()?, cursor.u32()?, cursor.u64()?);
            let object = || objects.get(number as usize).copied();
            let place = if number == META { Some(Place::Meta) } else { object() };
            let place = place.ok_or(Damaged("a boot pack of unknown objects"))?;
            left = left.checked_sub(len).ok_or(Damaged("a boot pack with long spans"))?;
            part.spans.push(Span { place, at, len });
        }
    }
    Ok(parts.into_iter().map(|(_, part)| part).collect())
}

/// The bytes of a part, cut into its spans.
pub(crate) fn decode_part(
    domain: &Domain,
    part: &Part,
    stored: &[u8],
) -> Result<Vec<(Span, Bytes)>, Damaged> {
    let bytes = zstd::bulk::decompress(stored, part.bytes as usize)
        .map_err(|_| Damaged("a boot part that does not decompress"))?;
    if domain.hash(&bytes) != part.hash {
        return Err(Damaged("a boot part that is not what its hash says"));
    }
    let bytes = Bytes::from(bytes);
    let mut at = 0;
    let cut = |span: &Span| {
        let start = at;
        at += span.len as usize;
        // `decode_head` saw that the spans fit into the part, and the part has the length that it says.
        (*span, bytes.slice(start.min(bytes.len())..at.min(bytes.len())))
    };
    Ok(part.spans.iter().map(cut).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_pack_reads_back_and_no_flipped_bit_passes() {
        let domain = Domain::new("d").unwrap();
        let mut writer = BootWriter::new(&domain);
        let place = Place::Object { id: [7; 32], size: 9000 };
        writer.add(place, 4096, &[1; 4904]).unwrap();
        writer.add(Place::Meta, 0, &[2; 4096]).unwrap();
        writer.add(place, 0, &[3; 4096]).unwrap();
        let pack = writer.finish().unwrap();
        let read = |pack: &[u8]| -> Result<Vec<(Span, Bytes)>, Damaged> {
            let (stored, len, hash) = decode_lead(pack.get(..LEAD_BYTES).unwrap_or_default())?;
            let body = &pack[LEAD_BYTES..];
            let head = body.get(..stored).ok_or(Damaged("short"))?;
            let parts = decode_head(&domain, head, len, &hash)?;
            decode_part(&domain, &parts[0], &body[stored..])
        };
        let good = read(&pack).unwrap();
        assert_eq!(good[0].0, Span { place, at: 4096, len: 4904 });
        assert_eq!(good[1].1, vec![2; 4096]);
        assert_eq!(good[2].1, vec![3; 4096]);
        for bit in 0..pack.len() * 8 {
            let mut bad = pack.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // A flipped bit that zstd does not care about leaves all as it was.
            assert!(read(&bad).is_err_and(|_| true) || read(&bad).unwrap() == good, "bit {bit}");
        }
    }

    #[test]
    fn a_page_is_recorded_once_and_neighbours_together() {
        let mut recorder = Recorder::default();
        let (a, b) = (Node::Objects, Node::Metas);
        recorder.read(a, 0, 4096);
        recorder.read(a, 4096, 8192);
        recorder.read(b, 100, 1);
        recorder.read(a, 0, 20_000);
        assert_eq!(recorder.into_reads(), [(a, 0, 12288), (b, 0, 4096), (a, 12288, 8192)]);
    }
}
