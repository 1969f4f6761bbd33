//! Where things lie in the object store, and how they are fetched whole.
//!
//! `image/<id>` manifests, `pack/<hash>` packs, `name/<domain>/<name>` names, `boot/<id>/<entry>` boot packs, `gc/<domain>/`
//! marks of the sweeper. Nothing is ever overwritten with other bytes but a name, and nothing is believed before its hash.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use wire::ImageId;

use crate::id::{Domain, Hash, NameError, check_image_name, to_hex};
use crate::index::{Damaged, FrameRef, Index};
use crate::limits::{FRAME_BYTES_MAX, MANIFEST_BYTES_MAX};
use crate::manifest::{BlobRef, Manifest, Table, parse_table};

/// Why an image could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No such name or id in this domain.
    #[error("no image {0:?} in this domain; see `volley image ls`, or prepare it first")]
    NotFound(String),
    /// A name that is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// What is stored is not what its hash says, or makes no sense.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The object store failed.
    #[error("object store: {0}; nothing was changed, try again")]
    Store(object_store::Error),
    /// The host could not do it.
    #[error("could not {what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another caller was mounting the same image, and failed with this.
    #[error("{0}")]
    Shared(Arc<ImageError>),
}

impl ImageError {
    pub(crate) fn host(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Host { what: what.into(), source }
    }

    /// There is no such image, as opposed to one that cannot be read now.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::NotFound(_) => true,
            Self::Shared(error) => error.is_not_found(),
            _ => false,
        }
    }
}

/// What a name points at.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NameRecord {
    pub(crate) name: String,
    pub(crate) image: String,
}

pub(crate) fn image_path(id: ImageId) -> Path {
    Path::from(format!("image/{id}"))
}

pub(crate) fn pack_path(hash: &Hash) -> Path {
    Path::from(format!("pack/{}", to_hex(hash)))
}

pub(crate) fn names_path(domain: &Domain) -> Path {
    Path::from(format!("name/{}", domain.name()))
}

/// A name is one path segment: `/` becomes `+`, which no name has, so that `a` and `a/b` do not collide in a directory.
pub(crate) fn name_path(domain: &Domain, name: &str) -> Path {
    names_path(domain).join(name.replace('/', "+"))
}

/// A host's note that it uses an image.
pub(crate) fn use_path(domain: &Domain, id: ImageId, host: &str) -> Path {
    Path::from(format!("use/{}/{id}/{host}", domain.name()))
}

/// A domain's part of a store.
#[derive(Debug, Clone)]
pub(crate) struct DomainStore {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) domain: Domain,
}

impl DomainStore {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, domain: &str) -> Result<Self, NameError> {
        Ok(Self { store, domain: Domain::new(domain)? })
    }

    /// The manifest, checked against the id.
    pub(crate) async fn manifest(&self, id: ImageId) -> Result<Manifest, ImageError> {
        let got = match self.store.get(&image_path(id)).await {
            Err(object_store::Error::NotFound { .. }) => {
                return Err(ImageError::NotFound(id.to_string()));
            }
            got => got.map_err(ImageError::Store)?,
        };
        if got.meta.size > MANIFEST_BYTES_MAX as u64 {
            return Err(Damaged("a manifest too long").into());
        }
        let bytes = got.bytes().await.map_err(ImageError::Store)?;
        if self.domain.hash(&bytes) == id.0 {
            let manifest = Manifest::decode(&bytes)?;
            if manifest.domain == self.domain.name() {
                return Ok(manifest);
            }
        }
        // An image of another domain is not there for this one; anything else is damage.
        let other = Manifest::decode(&bytes).ok().and_then(|m| Domain::new(&m.domain).ok());
        if other.is_some_and(|other| other != self.domain && other.hash(&bytes) == id.0) {
            return Err(ImageError::NotFound(id.to_string()));
        }
        Err(Damaged("a manifest that is not what its id says").into())
    }

    /// The image that a name or an id says. An id is not looked up here: that it exists is found at its use.
    pub(crate) async fn resolve(&self, name_or_id: &str) -> Result<ImageId, ImageError> {
        if let (64, Ok(id)) = (name_or_id.len(), name_or_id.parse()) {
            return Ok(id);
        }
        check_image_name(name_or_id)?;
        let got = match self.store.get(&name_path(&self.domain, name_or_id)).await {
            Err(object_store::Error::NotFound { .. }) => {
                return Err(ImageError::NotFound(name_or_id.to_owned()));
            }
            got => got.map_err(ImageError::Store)?,
        };
        if got.meta.size > 4096 {
            return Err(Damaged("a name record too long").into());
        }
        let bytes = got.bytes().await.map_err(ImageError::Store)?;
        let record: NameRecord = serde_json::from_slice(&bytes)
            .map_err(|_| Damaged("a name record that does not parse"))?;
        if record.name != name_or_id {
            return Err(Damaged("a name record of another name").into());
        }
        record.image.parse().map_err(|_| Damaged("a name record without an id").into())
    }

    /// One frame out of its pack, decompressed and checked.
    pub(crate) async fn frame(&self, pack: &Hash, frame: &FrameRef) -> Result<Bytes, ImageError> {
        let range = u64::from(frame.offset)..u64::from(frame.offset) + u64::from(frame.stored);
        let stored = self.store.get_range(&pack_path(pack), range).await;
        unpack_frame(&self.domain, frame, &stored.map_err(ImageError::Store)?)
            .map_err(ImageError::Damaged)
    }

    /// The frames of a blob.
    pub(crate) async fn table(
        &self,
        manifest: &Manifest,
        blob: &BlobRef,
    ) -> Result<Vec<FrameRef>, ImageError> {
        match &blob.table {
            Table::Inline(frames) => Ok(frames.clone()),
            Table::Stored { table: at, .. } => {
                let bytes = self.frame(&manifest.packs[at.pack as usize], at).await?;
                let packs = u32::try_from(manifest.packs.len()).unwrap_or(u32::MAX);
                Ok(parse_table(&bytes, packs, blob.bytes)?)
            }
        }
    }

    /// All of a blob.
    pub(crate) async fn blob(
        &self,
        manifest: &Manifest,
        blob: &BlobRef,
    ) -> Result<Vec<u8>, ImageError> {
        let mut out = Vec::new();
        // Frames of a blob lie one after another, so that neighbours are fetched by one GET.
        for run in runs(&self.table(manifest, blob).await?) {
            let pack = &manifest.packs[run[0].pack as usize];
            for bytes in self.run(pack, run).await? {
                out.extend_from_slice(&bytes);
            }
        }
        Ok(out)
    }

    /// Frames that lie one after another in a pack, by one GET.
    pub(crate) async fn run(
        &self,
        pack: &Hash,
        run: &[FrameRef],
    ) -> Result<Vec<Bytes>, ImageError> {
        let start = u64::from(run[0].offset);
        let end = run.iter().fold(start, |end, frame| end + u64::from(frame.stored));
        let got = self.store.get_range(&pack_path(pack), start..end).await;
        let got = got.map_err(ImageError::Store)?;
        let mut at = 0;
        let mut out = Vec::with_capacity(run.len());
        for frame in run {
            let next = at + frame.stored as usize;
            let stored = got.get(at..next).ok_or(Damaged("a pack that breaks off"))?;
            out.push(unpack_frame(&self.domain, frame, stored)?);
            at = next;
        }
        Ok(out)
    }

    /// The index, all of it.
    pub(crate) async fn index(&self, manifest: &Manifest) -> Result<Index, ImageError> {
        Ok(Index::decode(&self.blob(manifest, &manifest.index).await?)?)
    }
}

/// Cuts frames into runs that lie one after another in one pack, of about 8 MiB each.
pub(crate) fn runs(frames: &[FrameRef]) -> Vec<&[FrameRef]> {
    const RUN_BYTES: usize = 8 << 20;
    let mut out = Vec::new();
    let mut start = 0;
    let mut bytes = 0;
    for i in 0..frames.len() {
        let frame = &frames[i];
        let follows = i > start && {
            let before = &frames[i - 1];
            before.pack == frame.pack && before.offset + before.stored == frame.offset
        };
        if i > start && (!follows || bytes >= RUN_BYTES) {
            out.push(&frames[start..i]);
            start = i;
            bytes = 0;
        }
        bytes += frame.stored as usize;
    }
    if start < frames.len() {
        out.push(&frames[start..]);
    }
    out
}

/// Decompresses what is `len` bytes long then, at most.
///
/// A thread keeps its context: making one anew costs 40 us, as long as the work on 64 KB.
pub(crate) fn decompress(stored: &[u8], len: usize) -> std::io::Result<Vec<u8>> {
    thread_local! {
        static CONTEXT: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|context| {
        let context = match context {
            Some(context) => context,
            None => context.insert(zstd::bulk::Decompressor::new()?),
        };
        context.decompress(stored, len)
    })
}

/// A frame's bytes out of what is stored: decompressed, and believed only when the hash is right.
pub(crate) fn unpack_frame(
    domain: &Domain,
    frame: &FrameRef,
    stored: &[u8],
) -> Result<Bytes, Damaged> {
    let len = frame.bytes as usize;
    if stored.len() != frame.stored as usize || len > FRAME_BYTES_MAX {
        return Err(Damaged("a frame of another length than its record says"));
    }
    let bytes = if frame.stored == frame.bytes {
        stored.to_vec()
    } else {
        decompress(stored, len).map_err(|_| Damaged("a frame that does not decompress"))?
    };
    if bytes.len() != len || domain.hash(&bytes) != frame.hash {
        return Err(Damaged("a frame that is not what its hash says"));
    }
    Ok(bytes.into())
}
