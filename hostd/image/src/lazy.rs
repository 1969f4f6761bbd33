//! An image that is read piece by piece: its metadata, its index, and the frames of its objects, each fetched when it is
//! first needed. What opening one costs does not depend on how much is in it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OnceCell;
use wire::ImageId;

use crate::frames::{FrameAt, Frames};
use crate::id::Hash;
use crate::index::{
    CHUNK_RECORD_BYTES, Damaged, FRAME_RECORD_BYTES, FrameRef, HEAD_BYTES, Head,
    OBJECT_RECORD_BYTES, ObjectRef, PACK_RECORD_BYTES, PackRef,
};
use crate::limits::{CHUNK_BYTES, FRAME_BYTES};
use crate::manifest::Manifest;
use crate::store::ImageError;

/// An index up to this is fetched at once when the image is opened: one GET instead of several in a row.
const WARM_INDEX_BYTES: u64 = 4 << 20;

type Result<T> = std::result::Result<T, Arc<ImageError>>;

/// An image, open.
pub(crate) struct LazyImage {
    pub(crate) id: ImageId,
    pub(crate) manifest: Manifest,
    frames: Arc<Frames>,
    meta: Vec<FrameAt>,
    index: Vec<FrameAt>,
    head: Head,
}

/// An object. Its place is looked up in the index when it is first read.
pub(crate) struct LazyObject {
    image: Arc<LazyImage>,
    id: Hash,
    size: u64,
    place: OnceCell<Place>,
}

/// Where an object's bytes are.
struct Place {
    object: ObjectRef,
    /// The frame of an object that is not cut.
    whole: Option<FrameAt>,
}

/// A part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    at: FrameAt,
    start: usize,
    len: usize,
}

fn damaged<T>(what: &'static str) -> Result<T> {
    Err(Arc::new(Damaged(what).into()))
}

fn check<T>(result: std::result::Result<T, Damaged>) -> Result<T> {
    result.map_err(|damage| Arc::new(damage.into()))
}

impl LazyImage {
    pub(crate) async fn open(frames: &Arc<Frames>, id: ImageId) -> Result<Self> {
        let at = frames.at();
        let manifest = at.manifest(id).await.map_err(Arc::new)?;
        let tables = futures::try_join!(
            at.table(&manifest, &manifest.meta),
            at.table(&manifest, &manifest.index)
        );
        let (meta, index) = tables.map_err(Arc::new)?;
        let place = |frame: FrameRef| FrameAt { pack: manifest.packs[frame.pack as usize], frame };
        let meta: Vec<_> = meta.into_iter().map(place).collect();
        let index: Vec<_> = index.into_iter().map(place).collect();
        let warm = if manifest.index.bytes <= WARM_INDEX_BYTES { index.len() } else { 1 };
        // The superblock and the root directory are in the first frame.
        let first_meta = meta.get(..1).unwrap_or_default();
        let (index_frames, _) =
            futures::try_join!(frames.get_all(&index[..warm]), frames.get_all(first_meta))?;
        let head = index_frames.first().and_then(|b| b.get(..HEAD_BYTES));
        let head = head.ok_or_else(|| Arc::new(Damaged("the index has no head").into()))?;
        let head = check(Head::parse(head, manifest.index.bytes))?;
        Ok(Self { id, manifest, frames: frames.clone(), meta, index, head })
    }

    /// Bytes of the metadata image.
    pub(crate) async fn read_meta(&self, at: u64, len: usize) -> Result<Vec<Bytes>> {
        self.read_blob(&self.meta, self.manifest.meta.bytes, at, len).await
    }

    async fn read_blob(
        &self,
        blob: &[FrameAt],
        bytes: u64,
        at: u64,
        len: usize,
    ) -> Result<Vec<Bytes>> {
        let end = at.saturating_add(len as u64).min(bytes);
        let mut parts = Vec::new();
        let mut at = at;
        while at < end {
            let nth = usize::try_from(at / FRAME_BYTES as u64).unwrap_or(usize::MAX);
            let Some(frame) = blob.get(nth) else { return damaged("a blob too short") };
            let start = usize::try_from(at % FRAME_BYTES as u64).unwrap_or(0);
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(FRAME_BYTES - start);
            parts.push(Part { at: *frame, start, len });
            at += len as u64;
        }
        read_parts(&self.frames, &parts).await
    }

    /// A record of the index.
    async fn record<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let parts = self.read_blob(&self.index, self.manifest.index.bytes, at, N).await?;
        let mut out = [0; N];
        if parts.iter().map(Bytes::len).sum::<usize>() != N {
            return damaged("an index too short");
        }
        let mut filled = 0;
        for part in parts {
            out[filled..filled + part.len()].copy_from_slice(&part);
            filled += part.len();
        }
        Ok(out)
    }

    async fn object(&self, n: u32) -> Result<ObjectRef> {
        let bytes = self.record::<OBJECT_RECORD_BYTES>(self.head.object_at(n)).await?;
        check(ObjectRef::parse(&bytes, &self.head))
    }

    async fn frame(&self, n: u32) -> Result<FrameAt> {
        let bytes = self.record::<FRAME_RECORD_BYTES>(self.head.frame_at(n)).await?;
        let frame = check(FrameRef::parse(&bytes, self.head.packs))?;
        let bytes = self.record::<PACK_RECORD_BYTES>(self.head.pack_at(frame.pack)).await?;
        Ok(FrameAt { pack: check(PackRef::parse(&bytes))?.hash, frame })
    }

    /// The first object whose id is not below `from`. Ids are hashes and so lie evenly: where one should be is guessed,
    /// and the guess is mostly in the right frame.
    async fn first_from(&self, from: &Hash) -> Result<Option<ObjectRef>> {
        let key = |id: &Hash| {
            u64::from_be_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]])
        };
        let (mut low, mut high) = (0u32, self.head.objects);
        let (mut low_key, mut high_key) = (0, u64::MAX);
        let mut guesses = 0;
        let mut found = None;
        while low < high {
            let span = u128::from(high - low);
            let middle = if guesses < 6 && high_key > low_key {
                let part = u128::from(key(from).clamp(low_key, high_key) - low_key) * span;
                let guess = part / (u128::from(high_key - low_key) + 1);
                low + u32::try_from(guess).unwrap_or(0).min(high - low - 1)
            } else {
                low + (high - low) / 2
            };
            guesses += 1;
            let object = self.object(middle).await?;
            if object.id < *from {
                (low, low_key) = (middle + 1, key(&object.id));
            } else {
                (high, high_key) = (middle, key(&object.id));
                found = Some(object);
            }
        }
        Ok(found)
    }

    /// The object with the smallest id from `from` on for which `fits`.
    pub(crate) async fn find(
        self: &Arc<Self>,
        from: &Hash,
        fits: impl Fn(&Hash) -> bool,
    ) -> Result<Option<LazyObject>> {
        let found = self.first_from(from).await?.filter(|object| fits(&object.id));
        let Some(object) = found else { return Ok(None) };
        let place = OnceCell::new_with(Some(self.place(object).await?));
        Ok(Some(LazyObject { image: self.clone(), id: object.id, size: object.size, place }))
    }

    /// An object of which a boot pack said that it is here.
    pub(crate) fn known_object(self: &Arc<Self>, id: &Hash, size: u64) -> LazyObject {
        LazyObject { image: self.clone(), id: *id, size, place: OnceCell::new() }
    }

    async fn place(&self, object: ObjectRef) -> Result<Place> {
        let whole = if object.is_cut() { None } else { Some(self.frame(object.first).await?) };
        if let Some(at) = whole
            && u64::from(object.offset) + object.size > u64::from(at.frame.bytes)
        {
            return damaged("an object that passes the end of its frame");
        }
        Ok(Place { object, whole })
    }
}

impl LazyObject {
    /// The image through which it is read.
    pub(crate) fn image_id(&self) -> ImageId {
        self.image.id
    }

    pub(crate) fn id(&self) -> &Hash {
        &self.id
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    async fn look_up(&self) -> Result<&Place> {
        let look = || async {
            let found = self.image.first_from(&self.id).await?;
            match found.filter(|object| object.id == self.id && object.size == self.size) {
                Some(object) => self.image.place(object).await,
                None => damaged("a boot pack of another image"),
            }
        };
        self.place.get_or_try_init(look).await
    }

    /// Bytes of the object, fewer only at its end.
    pub(crate) async fn read(&self, at: u64, len: usize) -> Result<Vec<Bytes>> {
        let end = at.saturating_add(len as u64).min(self.size);
        if at >= end {
            return Ok(Vec::new());
        }
        let image = &self.image;
        let Place { object, whole } = self.look_up().await?;
        if let Some(whole) = *whole {
            let start = object.offset as usize + usize::try_from(at).unwrap_or(usize::MAX);
            let len = usize::try_from(end - at).unwrap_or(0);
            return read_parts(&image.frames, &[Part { at: whole, start, len }]).await;
        }
        let chunk_bytes = CHUNK_BYTES as u64;
        let mut parts = Vec::new();
        let mut at = at;
        while at < end {
            let nth = u32::try_from(at / chunk_bytes).unwrap_or(u32::MAX);
            let place = image.head.chunk_at(object.first.saturating_add(nth));
            let record = image.record::<CHUNK_RECORD_BYTES>(place).await?;
            let ordinal = u32::from_le_bytes(record);
            if ordinal >= image.head.frames {
                return damaged("a chunk out of range");
            }
            let frame = image.frame(ordinal).await?;
            let start = usize::try_from(at % chunk_bytes).unwrap_or(0);
            let len = usize::try_from((end - at).min(chunk_bytes - start as u64)).unwrap_or(0);
            parts.push(Part { at: frame, start, len });
            at += len as u64;
        }
        read_parts(&image.frames, &parts).await
    }
}

async fn read_parts(frames: &Arc<Frames>, parts: &[Part]) -> Result<Vec<Bytes>> {
    let wanted: Vec<FrameAt> = parts.iter().map(|part| part.at).collect();
    let got = frames.get_all(&wanted).await?;
    let mut out = Vec::with_capacity(parts.len());
    for (part, bytes) in parts.iter().zip(got) {
        if part.start + part.len > bytes.len() {
            return damaged("a frame shorter than what lies in it");
        }
        out.push(bytes.slice(part.start..part.start + part.len));
    }
    Ok(out)
}
