//! Boot packs: what the first run of an image read, in the order in which it did, as one object that streams.
//!
//! `boot/<image>/<entry>` is a head and parts. The head says which bytes of which objects (or of the metadata) are in which
//! part, a part has the bytes and the hashes by which each page is proven against the id of its object, or against the
//! image's own table of metadata frames. Hosts write boot packs, so nothing in one is believed: one that is damaged or
//! forged is not used, and nothing else happens, for it only makes early what would come anyway. How pages are proven is in
//! `proof`, how a pack is filled in `boot_write`.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use bytes::Bytes;
use wire::ImageId;

use crate::id::{Domain, Hash};
use crate::index::Damaged;
use crate::limits::{CHUNK_BYTES, FRAME_BYTES};
use crate::node::Node;
use crate::proof::{self, GROUP};
use crate::store::decompress;

/// Bytes of a part before compression. The first parts are shorter, for a mount waits for the first.
pub(crate) const PART_BYTES: usize = 1 << 20;
/// Bytes of the first part; each after it has twice as many.
pub(crate) const FIRST_PART_BYTES: usize = 64 << 10;
/// Bytes of pages of one boot pack: it is held in memory while it is pushed.
pub(crate) const BOOT_BYTES_MAX: usize = 128 << 20;
/// Bytes of a head, before and after compression.
const HEAD_BYTES_MAX: usize = 4 << 20;
/// Bytes before the head: magic, its stored and its full length, its hash.
pub(crate) const LEAD_BYTES: usize = 48;
/// Bytes of the object's name in the store, at most.
const ENTRY_BYTES_MAX: usize = 64;
/// zstd level of parts: written once, beside a program that has its bytes already, and waited for by each host after.
const LEVEL: i32 = 9;
const MAGIC: &[u8; 8] = b"VLYBOT\x02\0";
/// The object number that means the metadata.
pub(crate) const META: u32 = u32::MAX;
/// Chunk hashes in a group of a list.
pub(crate) const LIST_GROUP: u64 = (GROUP / 32) as u64;

/// Some bytes of an object, or of the metadata: all within one unit (a chunk, a whole object, a frame of metadata).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    /// Its number in the pack's table, or [`META`].
    pub(crate) object: u32,
    pub(crate) at: u64,
    pub(crate) len: u32,
}

impl Span {
    /// Bytes of one unit of what the span is of.
    fn unit_bytes(self) -> u64 {
        if self.object == META { FRAME_BYTES as u64 } else { CHUNK_BYTES as u64 }
    }

    /// Which unit it lies in.
    pub(crate) fn unit(self) -> (u32, u64) {
        (self.object, self.at / self.unit_bytes())
    }

    /// Cuts a run of bytes where units end.
    pub(crate) fn cut(object: u32, at: u64, len: u64) -> impl Iterator<Item = Self> {
        let end = at + len;
        let mut at = at;
        std::iter::from_fn(move || {
            let unit = Self { object, at, len: 0 }.unit_bytes();
            let next = end.min((at / unit + 1) * unit);
            let len = u32::try_from(next.checked_sub(at)?).ok().filter(|len| *len > 0)?;
            let span = Self { object, at, len };
            at = next;
            Some(span)
        })
    }
}

/// An object of which a pack has bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackObject {
    pub(crate) id: Hash,
    pub(crate) size: u64,
    /// Hashes of chunks of a cut object, as far as the pack needs them. Proven.
    pub(crate) chunks: HashMap<u64, Hash>,
}

impl PackObject {
    pub(crate) fn is_cut(&self) -> bool {
        self.size > CHUNK_BYTES as u64
    }

    fn chunk_count(&self) -> u64 {
        self.size.div_ceil(CHUNK_BYTES as u64)
    }
}

/// A part: how long, and of which spans, in the order of their objects and places.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Part {
    pub(crate) stored: u32,
    pub(crate) bytes: u32,
    pub(crate) spans: Vec<Span>,
}

/// What a head says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Head {
    pub(crate) parts: Vec<Part>,
    pub(crate) objects: Vec<PackObject>,
    /// The table of the metadata's frames, where the manifest has only its hash: a round trip less. Not checked here.
    pub(crate) table: Vec<u8>,
}

/// A list of chunk hashes, as far as a pack needs it: groups of the list, and their proof.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListPart {
    pub(crate) groups: Vec<u32>,
    pub(crate) hashes: Vec<u8>,
    pub(crate) proof: Vec<Hash>,
}

/// Where a boot pack lies in the store.
pub(crate) fn boot_path(id: ImageId, entry: &str) -> object_store::path::Path {
    object_store::path::Path::from(format!("boot/{id}/{entry}"))
}

/// Whether an entry's name is one: it is a part of a path.
pub(crate) fn is_entry(entry: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=ENTRY_BYTES_MAX).contains(&entry.len())
        && entry.bytes().all(good)
        && !entry.starts_with('.')
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
        let page_bytes = GROUP as u64;
        let first = at / page_bytes;
        let end = (at + len as u64).div_ceil(page_bytes);
        for page in first..end {
            if self.bytes >= BOOT_BYTES_MAX || !self.seen.insert((node.number(), page)) {
                continue;
            }
            self.bytes += GROUP;
            // Grows the last span where this page follows it.
            match self.reads.last_mut() {
                Some((last, at, len))
                    if *last == node
                        && *at + u64::from(*len) == page * page_bytes
                        && (*len as usize) < CHUNK_BYTES =>
                {
                    *len += 4096;
                }
                _ => self.reads.push((node, page * page_bytes, 4096)),
            }
        }
    }

    /// Bytes that were read, in whole pages.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Spans in the order of their first touch; the last one of a file may pass its end.
    pub(crate) fn into_reads(self) -> Vec<(Node, u64, u32)> {
        self.reads
    }
}

fn count(n: usize) -> [u8; 4] {
    u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes()
}

fn put_hashes(out: &mut Vec<u8>, hashes: &[Hash]) {
    out.extend_from_slice(&count(hashes.len()));
    hashes.iter().for_each(|hash| out.extend_from_slice(hash));
}

/// A part's stored form: of each unit its proof, then its bytes.
pub(crate) fn encode_part(units: &[(Vec<Hash>, Vec<u8>)]) -> std::io::Result<(u32, Vec<u8>)> {
    let mut open = Vec::new();
    for (proof, bytes) in units {
        put_hashes(&mut open, proof);
        open.extend_from_slice(bytes);
    }
    let len = u32::try_from(open.len()).map_err(std::io::Error::other)?;
    Ok((len, zstd::bulk::compress(&open, LEVEL)?))
}

/// A pack's beginning: its lead and its head.
pub(crate) fn encode_head(
    domain: &Domain,
    head: &Head,
    lists: &[ListPart],
) -> std::io::Result<Vec<u8>> {
    let mut open = Vec::new();
    open.extend_from_slice(&count(head.parts.len()));
    open.extend_from_slice(&count(head.objects.len()));
    open.extend_from_slice(&count(head.table.len()));
    open.extend_from_slice(&head.table);
    for (object, list) in head.objects.iter().zip(lists) {
        open.extend_from_slice(&object.id);
        open.extend_from_slice(&object.size.to_le_bytes());
        open.extend_from_slice(&count(list.groups.len()));
        list.groups.iter().for_each(|group| open.extend_from_slice(&group.to_le_bytes()));
        open.extend_from_slice(&list.hashes);
        put_hashes(&mut open, &list.proof);
    }
    for part in &head.parts {
        open.extend_from_slice(&part.stored.to_le_bytes());
        open.extend_from_slice(&part.bytes.to_le_bytes());
        open.extend_from_slice(&count(part.spans.len()));
        for span in &part.spans {
            open.extend_from_slice(&span.object.to_le_bytes());
            open.extend_from_slice(&span.len.to_le_bytes());
            open.extend_from_slice(&span.at.to_le_bytes());
        }
    }
    if open.len() > HEAD_BYTES_MAX {
        return Err(std::io::Error::other("more pieces than a boot pack may have"));
    }
    let packed = zstd::bulk::compress(&open, 3)?;
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&count(packed.len()));
    out.extend_from_slice(&count(open.len()));
    out.extend_from_slice(&domain.hash(&open));
    out.extend_from_slice(&packed);
    Ok(out)
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

    fn hashes(&mut self) -> Result<Vec<Hash>, Damaged> {
        let count = self.u32()? as usize;
        let bytes = self.take(count.checked_mul(32).ok_or(Damaged("a boot pack too long"))?)?;
        Ok(bytes.chunks_exact(32).map(|b| b.try_into().unwrap_or([0; 32])).collect())
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

/// Neighbours of a sorted list of groups as ranges of bytes.
pub(crate) fn ranges_of(groups: &[u32], len: usize) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for group in groups {
        let start = *group as usize * GROUP;
        let end = (start + GROUP).min(len);
        match out.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => out.push(start..end),
        }
    }
    out
}

fn decode_object(domain: &Domain, cursor: &mut Cursor<'_>) -> Result<PackObject, Damaged> {
    let (id, size) = (cursor.hash()?, cursor.u64()?);
    let mut object = PackObject { id, size, chunks: HashMap::new() };
    let group_count = cursor.u32()? as usize;
    let bytes = cursor.take(group_count.saturating_mul(4))?;
    let groups: Vec<u32> =
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let list_len = usize::try_from(object.chunk_count() * 32).unwrap_or(usize::MAX);
    let last = list_len.div_ceil(GROUP);
    if groups.iter().any(|group| *group as usize >= last) {
        return Err(Damaged("a boot pack of chunks that are not there"));
    }
    let ranges = ranges_of(&groups, list_len);
    let hashes = cursor.take(ranges.iter().map(ExactSizeIterator::len).sum())?;
    let list_proof = cursor.hashes()?;
    if groups.is_empty() {
        return Ok(object);
    }
    if !proof::holds(domain.list_key(), &object.id, list_len, &ranges, hashes, &list_proof) {
        return Err(Damaged("a boot pack whose chunks are not the object's"));
    }
    let places = ranges.into_iter().flat_map(|range| range.step_by(32));
    for (place, hash) in places.zip(hashes.chunks_exact(32)) {
        object.chunks.insert(place as u64 / 32, hash.try_into().unwrap_or([0; 32]));
    }
    Ok(object)
}

/// The parts, out of the stored head.
pub(crate) fn decode_head(
    domain: &Domain,
    stored: &[u8],
    len: usize,
    hash: &Hash,
) -> Result<Head, Damaged> {
    let open = decompress(stored, len)
        .map_err(|_| Damaged("a boot pack whose head does not decompress"))?;
    if domain.hash(&open) != *hash {
        return Err(Damaged("a boot pack whose head is not what its hash says"));
    }
    let mut cursor = Cursor(&open);
    let (part_count, object_count) = (cursor.u32()?, cursor.u32()?);
    let table_len = cursor.u32()? as usize;
    let mut head = Head { table: cursor.take(table_len)?.to_vec(), ..Head::default() };
    for _ in 0..object_count {
        head.objects.push(decode_object(domain, &mut cursor)?);
    }
    let mut pages = 0;
    for _ in 0..part_count {
        let (stored, bytes, span_count) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
        let too_long = |len: u32| len as usize > 4 * PART_BYTES;
        if too_long(stored) || too_long(bytes) {
            return Err(Damaged("a boot pack with too long a part"));
        }
        let mut part = Part { stored, bytes, spans: Vec::new() };
        for _ in 0..span_count {
            let (object, len, at) = (cursor.u32()?, cursor.u32()?, cursor.u64()?);
            let span = Span { object, at, len };
            check_span(span, part.spans.last().copied(), &head.objects)?;
            pages += len as usize;
            part.spans.push(span);
        }
        head.parts.push(part);
    }
    if pages > 2 * BOOT_BYTES_MAX {
        return Err(Damaged("a boot pack of too many pages"));
    }
    Ok(head)
}

/// A span lies in one unit of something that is there, behind the one before it.
fn check_span(span: Span, before: Option<Span>, objects: &[PackObject]) -> Result<(), Damaged> {
    let bad = Err(Damaged("a boot pack with spans that make no sense"));
    let Some(end) = span.at.checked_add(u64::from(span.len)) else { return bad };
    let one_unit = span.len > 0 && Span { at: end - 1, ..span }.unit() == span.unit();
    let inside = span.object == META
        || objects.get(span.object as usize).is_some_and(|object| end <= object.size);
    let behind = before.is_none_or(|before| {
        before.object < span.object
            || before.object == span.object && before.at + u64::from(before.len) <= span.at
    });
    if one_unit && inside && behind { Ok(()) } else { bad }
}

/// Length and hash of a frame of metadata by its number, as the image's own table says.
pub(crate) type MetaFrames<'a> = &'a dyn Fn(u64) -> Option<(usize, Hash)>;

/// The bytes of a part, each page proven.
pub(crate) fn decode_part(
    domain: &Domain,
    head: &Head,
    part: &Part,
    meta: MetaFrames<'_>,
    stored: &[u8],
) -> Result<Vec<(Span, Bytes)>, Damaged> {
    let open = decompress(stored, part.bytes as usize)
        .map_err(|_| Damaged("a boot part that does not decompress"))?;
    let open = Bytes::from(open);
    let mut cursor = Cursor(&open);
    let mut out = Vec::with_capacity(part.spans.len());
    for spans in part.spans.chunk_by(|a, b| a.unit() == b.unit()) {
        let (object, nth) = spans[0].unit();
        let unit = if object == META {
            meta(nth).map(|(len, hash)| (nth * FRAME_BYTES as u64, len, hash))
        } else {
            head.objects.get(object as usize).and_then(|object| unit_of(object, nth))
        };
        let (base, len, hash) = unit.ok_or(Damaged("a boot part of bytes that are not there"))?;
        let hashes = cursor.hashes()?;
        let ranges: Vec<Range<usize>> = spans
            .iter()
            .map(|span| {
                let start = usize::try_from(span.at - base).unwrap_or(usize::MAX);
                start..start.saturating_add(span.len as usize)
            })
            .collect();
        let at = open.len() - cursor.0.len();
        let pages = cursor.take(ranges.iter().map(ExactSizeIterator::len).sum())?;
        if !proof::holds(domain.key(), &hash, len, &ranges, pages, &hashes) {
            return Err(Damaged("a boot part with other bytes than the image has"));
        }
        let mut at = at;
        for span in spans {
            out.push((*span, open.slice(at..at + span.len as usize)));
            at += span.len as usize;
        }
    }
    Ok(out)
}

/// Where the unit of an object begins, its length and its hash.
fn unit_of(object: &PackObject, nth: u64) -> Option<(u64, usize, Hash)> {
    let base = nth * CHUNK_BYTES as u64;
    let len = usize::try_from(object.size.checked_sub(base)?.min(CHUNK_BYTES as u64)).ok()?;
    let hash = if object.is_cut() { *object.chunks.get(&nth)? } else { object.id };
    Some((base, len, hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_recorded_once_and_neighbours_together() {
        let mut recorder = Recorder::default();
        let (a, b) = (Node::Objects, Node::Metas);
        recorder.read(a, 0, 4096);
        recorder.read(a, 4096, 8192);
        recorder.read(b, 100, 1);
        recorder.read(a, 0, 20_000);
        assert_eq!(recorder.bytes(), 6 * 4096);
        assert_eq!(recorder.into_reads(), [(a, 0, 12288), (b, 0, 4096), (a, 12288, 8192)]);
    }

    #[test]
    fn spans_are_cut_where_units_end() {
        let cut: Vec<_> = Span::cut(0, (1 << 20) - 4096, 8192).map(|s| (s.at, s.len)).collect();
        assert_eq!(cut, [((1 << 20) - 4096, 4096), (1 << 20, 4096)]);
        assert_eq!(Span::cut(META, 0, 300 << 10).count(), 2);
        assert_eq!(Span::cut(0, 0, 0).count(), 0);
    }
}
