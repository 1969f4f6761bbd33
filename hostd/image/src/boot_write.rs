//! Fills a boot pack: pages that a run read, and those of the pack that it had, cut into parts and proven.
//!
//! Of each object the last page comes along with its first, for only with it the object's size is proven (`proof`).

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use wire::ImageId;

use crate::boot::{
    BOOT_BYTES_MAX, FIRST_PART_BYTES, Head, LIST_GROUP, ListPart, META, PART_BYTES, PackObject,
    Part, Span, encode_head, encode_part, ranges_of,
};
use crate::id::{Domain, Hash};
use crate::lazy::{LazyImage, LazyObject};
use crate::limits::{CHUNK_BYTES, FRAME_BYTES};
use crate::node::{ImageKey, Node, ObjectKey};
use crate::proof::{self, GROUP};
use crate::push::BootSummary;
use crate::store::ImageError;

/// A run of pages: of which object (or [`META`]), from where, how long.
type Run = (u32, u64, u64);

/// What is to be in a pack.
struct Wanted {
    image: Arc<LazyImage>,
    objects: Vec<Arc<LazyObject>>,
    numbers: HashMap<Hash, u32>,
    runs: Vec<Run>,
}

impl Wanted {
    fn number(&mut self, object: LazyObject) -> u32 {
        let next = u32::try_from(self.objects.len()).unwrap_or(META - 1);
        let number = *self.numbers.entry(*object.id()).or_insert(next);
        if number == next {
            self.objects.push(Arc::new(object));
        }
        number
    }

    /// What another pack of the image holds.
    async fn add_pack(&mut self, head: &Head) -> Outcome<()> {
        let mut numbers = HashMap::new();
        for span in head.parts.iter().flat_map(|part| &part.spans) {
            let number = match (head.objects.get(span.object as usize), numbers.get(&span.object)) {
                (None, _) => META,
                (Some(_), Some(number)) => *number,
                (Some(known), None) => {
                    // A pack may have been made for another image.
                    let found = self.image.find(&known.id, |id| *id == known.id).await?;
                    let Some(object) = found else { continue };
                    let number = self.number(object);
                    numbers.insert(span.object, number);
                    number
                }
            };
            self.runs.push((number, span.at, span.len.into()));
        }
        Ok(())
    }

    /// What was read. What was read through other images meanwhile is left out.
    async fn add_reads(
        &mut self,
        id: ImageId,
        reads: Vec<(Node, u64, u32)>,
    ) -> Result<(), Arc<ImageError>> {
        for (node, at, len) in reads {
            let (number, size) = match node {
                Node::Meta(key) if key == ImageKey::of(id) => {
                    (META, self.image.manifest.meta.bytes)
                }
                Node::Object(key) => {
                    let first = key.first();
                    let found = self.image.find(&first, |id| ObjectKey::of(id) == key).await?;
                    let Some(object) = found else { continue };
                    let size = object.size();
                    (self.number(object), size)
                }
                _ => continue,
            };
            let len = u64::from(len).min(size.saturating_sub(at));
            if len > 0 {
                self.runs.push((number, at, len));
            }
        }
        Ok(())
    }

    /// The runs as spans, each page once, in parts.
    fn parts(&self) -> Vec<Vec<Span>> {
        let mut seen = HashSet::new();
        let mut known = HashSet::new();
        let (mut parts, mut open, mut open_bytes) = (Vec::new(), Vec::new(), 0);
        let (mut bytes, mut limit) = (0, FIRST_PART_BYTES);
        for &(number, at, len) in &self.runs {
            let mut runs = vec![(number, at, len)];
            if number != META && known.insert(number) {
                let size = self.objects[number as usize].size();
                let last = (size - 1) / GROUP as u64 * GROUP as u64;
                runs.insert(0, (number, last, size - last));
            }
            for span in runs.into_iter().flat_map(|(n, at, len)| fresh(&mut seen, n, at, len)) {
                open_bytes += span.len as usize;
                open.push(span);
            }
            if open_bytes >= limit {
                bytes += open_bytes;
                parts.push(std::mem::take(&mut open));
                (open_bytes, limit) = (0, (2 * limit).min(PART_BYTES));
            }
            if bytes >= BOOT_BYTES_MAX {
                break;
            }
        }
        if !open.is_empty() {
            parts.push(open);
        }
        parts.iter_mut().for_each(|part| part.sort_unstable());
        parts
    }

    /// All bytes of the unit that a span lies in.
    async fn unit(&self, span: Span) -> Result<(u64, Vec<u8>), Arc<ImageError>> {
        let (object, nth) = span.unit();
        if object == META {
            let base = nth * FRAME_BYTES as u64;
            return Ok((base, self.image.read_meta(base, FRAME_BYTES).await?.concat()));
        }
        let base = nth * CHUNK_BYTES as u64;
        Ok((base, self.objects[object as usize].read(base, CHUNK_BYTES).await?.concat()))
    }

    /// The chunk hashes that the pack needs of a cut object.
    async fn list(&self, domain: &Domain, number: u32, parts: &[Part]) -> Outcome<ListPart> {
        let object = &self.objects[number as usize];
        if object.size() <= CHUNK_BYTES as u64 {
            return Ok(ListPart::default());
        }
        let spans = parts.iter().flat_map(|part| &part.spans);
        let chunks = spans.filter(|span| span.object == number).map(|span| span.unit().1);
        let mut groups: Vec<u32> =
            chunks.filter_map(|chunk| u32::try_from(chunk / LIST_GROUP).ok()).collect();
        groups.sort_unstable();
        groups.dedup();
        let count = object.size().div_ceil(CHUNK_BYTES as u64);
        let mut list = Vec::new();
        for nth in 0..count {
            list.extend_from_slice(&object.chunk_hash(nth).await?);
        }
        let ranges = ranges_of(&groups, list.len());
        let hashes = ranges.iter().flat_map(|range| list[range.clone()].to_vec()).collect();
        let proof = proof::prove(domain.list_key(), &list, &ranges);
        Ok(ListPart { groups, hashes, proof })
    }
}

type Outcome<T> = Result<T, Arc<ImageError>>;

/// The pages of a run that were not seen yet, as spans.
fn fresh(seen: &mut HashSet<(u32, u64)>, number: u32, at: u64, len: u64) -> Vec<Span> {
    let page_bytes = GROUP as u64;
    let end = at + len;
    let mut out: Vec<Span> = Vec::new();
    for page in at / page_bytes..end.div_ceil(page_bytes) {
        if !seen.insert((number, page)) {
            continue;
        }
        let start = page * page_bytes;
        let bytes = page_bytes.min(end - start);
        for span in Span::cut(number, start, bytes) {
            match out.last_mut() {
                Some(last)
                    if last.unit() == span.unit() && last.at + u64::from(last.len) == span.at =>
                {
                    last.len += span.len;
                }
                _ => out.push(span),
            }
        }
    }
    out
}

/// A part's spans, made one where they follow each other.
fn joined(spans: Vec<Span>) -> Vec<Span> {
    let mut out: Vec<Span> = Vec::new();
    for span in spans {
        match out.last_mut() {
            Some(last)
                if last.unit() == span.unit() && last.at + u64::from(last.len) == span.at =>
            {
                last.len += span.len;
            }
            _ => out.push(span),
        }
    }
    out
}

/// A boot pack of `image` that holds what `base` does and what `reads` noted.
pub(crate) async fn fill(
    domain: &Domain,
    image: &Arc<LazyImage>,
    base: Option<&Head>,
    reads: Vec<(Node, u64, u32)>,
) -> Outcome<(BootSummary, Vec<u8>)> {
    let failed = |e| Arc::new(ImageError::host("pack the boot pack", e));
    let mut wanted = Wanted {
        image: image.clone(),
        objects: Vec::new(),
        numbers: HashMap::new(),
        runs: Vec::new(),
    };
    if let Some(base) = base {
        wanted.add_pack(base).await?;
    }
    wanted.add_reads(image.id, reads).await?;
    let table = image.table_bytes().await?;
    let (mut head, mut body) = (Head { table, ..Head::default() }, Vec::new());
    let mut summary = BootSummary::default();
    for spans in wanted.parts() {
        let spans = joined(spans);
        let mut units = Vec::new();
        for of_unit in spans.chunk_by(|a, b| a.unit() == b.unit()) {
            let (base, all) = wanted.unit(of_unit[0]).await?;
            let range = |span: &Span| -> Range<usize> {
                let start = usize::try_from(span.at - base).unwrap_or(usize::MAX);
                start..start.saturating_add(span.len as usize)
            };
            let ranges: Vec<_> = of_unit.iter().map(range).collect();
            if ranges.last().is_none_or(|range| range.end > all.len()) {
                return Err(Arc::new(
                    crate::index::Damaged("an object shorter than it says").into(),
                ));
            }
            let pages: Vec<u8> = ranges.iter().flat_map(|r| all[r.clone()].to_vec()).collect();
            summary.spans += of_unit.len() as u64;
            summary.bytes += pages.len() as u64;
            units.push((proof::prove(domain.key(), &all, &ranges), pages));
        }
        let (bytes, packed) = encode_part(&units).map_err(failed)?;
        let stored = u32::try_from(packed.len()).unwrap_or(u32::MAX);
        body.extend_from_slice(&packed);
        head.parts.push(Part { stored, bytes, spans });
    }
    let mut lists = Vec::new();
    for (number, object) in (0..).zip(&wanted.objects) {
        lists.push(wanted.list(domain, number, &head.parts).await?);
        let (id, size) = (*object.id(), object.size());
        head.objects.push(PackObject { id, size, chunks: HashMap::new() });
    }
    let mut pack = encode_head(domain, &head, &lists).map_err(failed)?;
    pack.extend_from_slice(&body);
    summary.stored = pack.len() as u64;
    Ok((summary, pack))
}
