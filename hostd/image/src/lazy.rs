//! An image that is read piece by piece: its metadata, its index, and the frames of its objects, each fetched when it is
//! first needed. What opening one costs does not depend on how much is in it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OnceCell;
use wire::ImageId;

use crate::frames::{FrameAt, Frames};
use crate::id::Hash;
use crate::index::{
    CHUNK_RECORD_BYTES, Damaged, FRAME_RECORD_BYTES, FrameRef, Head, OBJECT_RECORD_BYTES,
    ObjectRef, PACK_RECORD_BYTES, PackRef,
};
use crate::limits::{CHUNK_BYTES, FRAME_BYTES};
use crate::manifest::{BlobRef, Manifest, Table, parse_table};
use crate::store::ImageError;

/// An index up to this is fetched whole when it is first asked: one GET instead of several in a row.
const WARM_INDEX_BYTES: u64 = 4 << 20;

/// A table of metadata frames up to this is carried by boot packs: two million small files.
const CARRIED_TABLE_BYTES_MAX: usize = 128 << 10;

type Result<T> = std::result::Result<T, Arc<ImageError>>;

/// An image, open. Opening one is one GET, of its manifest; the rest comes when it is asked for.
pub(crate) struct LazyImage {
    pub(crate) id: ImageId,
    pub(crate) manifest: Manifest,
    frames: Arc<Frames>,
    meta: Blob,
    index: Blob,
    index_is_warm: OnceCell<()>,
    head: Head,
}

/// Where a blob's frames are.
struct Blob {
    bytes: u64,
    /// Known before the table, so that a mount need not wait for that.
    first: FrameAt,
    table: OnceCell<Vec<FrameAt>>,
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

fn blob(manifest: &Manifest, blob: &BlobRef) -> Result<Blob> {
    let place =
        |frame: &FrameRef| FrameAt { pack: manifest.packs[frame.pack as usize], frame: *frame };
    let first = blob.first().ok_or_else(|| Arc::new(Damaged("a blob without frames").into()))?;
    let table = match &blob.table {
        Table::Inline(frames) => OnceCell::new_with(Some(frames.iter().map(place).collect())),
        Table::Stored { .. } => OnceCell::new(),
    };
    Ok(Blob { bytes: blob.bytes, first: place(first), table })
}

impl LazyImage {
    pub(crate) async fn open(frames: &Arc<Frames>, id: ImageId) -> Result<Self> {
        let manifest = frames.at().manifest(id).await.map_err(Arc::new)?;
        Ok(Self {
            id,
            frames: frames.clone(),
            meta: blob(&manifest, &manifest.meta)?,
            index: blob(&manifest, &manifest.index)?,
            index_is_warm: OnceCell::new(),
            head: manifest.index_head,
            manifest,
        })
    }

    /// Starts to fetch what a mount without a boot pack reads first.
    pub(crate) fn warm(self: &Arc<Self>) {
        self.frames.prefetch(&[self.meta.first, self.index.first]);
    }

    /// The frames of a blob.
    async fn table<'a>(&self, blob: &'a Blob, of: &BlobRef) -> Result<&'a Vec<FrameAt>> {
        let fetch = || async {
            let table = self.frames.at().table(&self.manifest, of).await.map_err(Arc::new)?;
            let place =
                |frame: FrameRef| FrameAt { pack: self.manifest.packs[frame.pack as usize], frame };
            Ok(table.into_iter().map(place).collect())
        };
        blob.table.get_or_try_init(fetch).await
    }

    /// The table of the metadata's frames as it is stored, where that is beside the manifest, and if it is not too long to
    /// be carried along.
    pub(crate) async fn table_bytes(&self) -> Result<Vec<u8>> {
        match &self.manifest.meta.table {
            Table::Stored { table, .. } if table.bytes as usize <= CARRIED_TABLE_BYTES_MAX => {
                let pack = &self.manifest.packs[table.pack as usize];
                let bytes = self.frames.at().frame(pack, table).await.map_err(Arc::new)?;
                Ok(bytes.to_vec())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Takes a table that a boot pack carried, if it is the one whose hash the manifest has.
    pub(crate) fn adopt_table(&self, bytes: &[u8]) {
        let Table::Stored { table, .. } = &self.manifest.meta.table else { return };
        if self.frames.at().domain.hash(bytes) != table.hash {
            return;
        }
        let packs = u32::try_from(self.manifest.packs.len()).unwrap_or(u32::MAX);
        if let Ok(frames) = parse_table(bytes, packs, self.meta.bytes) {
            let place =
                |frame: FrameRef| FrameAt { pack: self.manifest.packs[frame.pack as usize], frame };
            // Another task may have fetched it meanwhile: the same.
            let _ = self.meta.table.set(frames.into_iter().map(place).collect());
        }
    }

    /// Lengths and hashes of the metadata's frames, in order.
    pub(crate) async fn meta_frames(&self) -> Result<Vec<(usize, Hash)>> {
        let table = self.table(&self.meta, &self.manifest.meta).await?;
        Ok(table.iter().map(|at| (at.frame.bytes as usize, at.frame.hash)).collect())
    }

    /// Bytes of the metadata image.
    pub(crate) async fn read_meta(&self, at: u64, len: usize) -> Result<Vec<Bytes>> {
        self.read_blob(&self.meta, &self.manifest.meta, at, len).await
    }

    async fn read_blob(
        &self,
        blob: &Blob,
        of: &BlobRef,
        at: u64,
        len: usize,
    ) -> Result<Vec<Bytes>> {
        let end = at.saturating_add(len as u64).min(blob.bytes);
        let mut parts = Vec::new();
        let mut at = at;
        while at < end {
            let nth = usize::try_from(at / FRAME_BYTES as u64).unwrap_or(usize::MAX);
            let frame = if nth == 0 {
                blob.first
            } else {
                let Some(frame) = self.table(blob, of).await?.get(nth) else {
                    return damaged("a blob too short");
                };
                *frame
            };
            let start = usize::try_from(at % FRAME_BYTES as u64).unwrap_or(0);
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(FRAME_BYTES - start);
            parts.push(Part { at: frame, start, len });
            at += len as u64;
        }
        read_parts(&self.frames, &parts).await
    }

    /// Fetches an index that is small as a whole, once.
    async fn warm_index(&self) -> Result<()> {
        let fetch = || async {
            if self.index.bytes <= WARM_INDEX_BYTES {
                let table = self.table(&self.index, &self.manifest.index).await?;
                self.frames.get_all(table).await?;
            }
            Ok(())
        };
        self.index_is_warm.get_or_try_init(fetch).await.copied()
    }

    /// A record of the index.
    async fn record<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        self.warm_index().await?;
        let parts = self.read_blob(&self.index, &self.manifest.index, at, N).await?;
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

    /// The frame of a chunk, by the chunk's place in the chunk table.
    async fn chunk(&self, n: u32) -> Result<FrameAt> {
        if n >= self.head.chunks {
            return damaged("a chunk out of range");
        }
        let record = self.record::<CHUNK_RECORD_BYTES>(self.head.chunk_at(n)).await?;
        let ordinal = u32::from_le_bytes(record);
        if ordinal >= self.head.frames {
            return damaged("a chunk out of range");
        }
        self.frame(ordinal).await
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

    /// The hash of a chunk of an object that is cut.
    pub(crate) async fn chunk_hash(&self, nth: u64) -> Result<Hash> {
        let first = self.look_up().await?.object.first;
        let nth = u32::try_from(nth).unwrap_or(u32::MAX);
        Ok(self.image.chunk(first.saturating_add(nth)).await?.frame.hash)
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
            let frame = image.chunk(object.first.saturating_add(nth)).await?;
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
