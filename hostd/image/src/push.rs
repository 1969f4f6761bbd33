//! Boot packs at work: fetched as one stream when an image is mounted, kept for reads that come, and pushed into the page
//! cache before they do. Recorded from a run, and written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use object_store::{ObjectStoreExt, PutPayload};
use wire::ImageId;

use crate::boot::{
    BootWriter, LEAD_BYTES, Part, Place, Recorder, Span, boot_path, decode_head, decode_lead,
    decode_part, is_entry,
};
use crate::device::Device;
use crate::index::Damaged;
use crate::lazy::LazyImage;
use crate::metrics::count_bytes;
use crate::node::{ImageKey, Node, ObjectKey};
use crate::server::Server;
use crate::store::ImageError;

/// How long what a boot pack brought is kept for reads; after that, it is in the page cache or was not needed.
const KEPT: Duration = Duration::from_secs(30);

/// What a recorded boot pack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BootSummary {
    /// Runs of pages.
    pub spans: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the pack.
    pub stored: u64,
}

/// Bytes that were brought before they were asked for, by node and offset.
#[derive(Debug, Default)]
pub(crate) struct Brought {
    nodes: Mutex<HashMap<u64, BTreeMap<u64, Bytes>>>,
}

impl Brought {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, BTreeMap<u64, Bytes>>> {
        // The table is whole between any two statements that hold the lock.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, node: u64, at: u64, bytes: Bytes) {
        self.lock().entry(node).or_default().insert(at, bytes);
    }

    fn remove(&self, node: u64, at: u64) {
        let mut nodes = self.lock();
        if let Some(spans) = nodes.get_mut(&node) {
            spans.remove(&at);
            if spans.is_empty() {
                nodes.remove(&node);
            }
        }
    }

    /// All of the bytes from `at` up to `end`, or nothing.
    pub(crate) fn get(&self, node: u64, at: u64, end: u64) -> Option<Vec<Bytes>> {
        let nodes = self.lock();
        let spans = nodes.get(&node)?;
        let mut out = Vec::new();
        let mut at = at;
        while at < end {
            let (start, bytes) = spans.range(..=at).next_back()?;
            let skip = usize::try_from(at - start).ok().filter(|skip| *skip < bytes.len())?;
            let want = usize::try_from(end - at).unwrap_or(usize::MAX);
            let part = bytes.slice(skip..bytes.len().min(skip.saturating_add(want)));
            at += part.len() as u64;
            out.push(part);
        }
        Some(out)
    }
}

/// Brings an image's boot pack.
pub(crate) struct Pusher {
    pub(crate) server: Arc<Server>,
    pub(crate) device: Device,
    /// The FUSE mount.
    pub(crate) fuse: PathBuf,
}

impl Pusher {
    /// Fetches the boot pack and pushes it as it comes. That there is none is fine; one that is damaged is not used.
    pub(crate) async fn bring(self: Arc<Self>, id: ImageId, entry: String) {
        match self.stream(id, &entry).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => tracing::warn!(%error, image = %id, entry, "boot pack not used"),
        }
    }

    async fn stream(self: &Arc<Self>, id: ImageId, entry: &str) -> Result<(), ImageError> {
        let at = self.server.frames.at().clone();
        let got = match at.store.get(&boot_path(id, entry)).await {
            Err(object_store::Error::NotFound { .. }) => {
                return Err(ImageError::NotFound(entry.to_owned()));
            }
            got => got.map_err(ImageError::Store)?,
        };
        let mut stream =
            Incoming { stream: got.into_stream(), server: &self.server, buffer: BytesMut::new() };
        let (stored, len, hash) = decode_lead(&stream.take(LEAD_BYTES).await?)?;
        let head = stream.take(stored).await?;
        let parts = decode_head(&at.domain, &head, len, &hash)?;
        let image = self.server.open(id).await.map_err(ImageError::Shared)?;
        let mut pushes = Vec::new();
        for part in parts {
            let stored = stream.take(part.stored as usize).await?;
            let (this, image) = (self.clone(), image.clone());
            let push = move || this.push(&image, &part, &stored);
            pushes.push(tokio::task::spawn_blocking(push));
        }
        for push in pushes {
            push.await.map_err(|_| Damaged("a push that was stopped"))??;
        }
        Ok(())
    }

    /// Makes a part's bytes known, then pushes them.
    fn push(
        self: &Arc<Self>,
        image: &Arc<LazyImage>,
        part: &Part,
        stored: &[u8],
    ) -> Result<(), ImageError> {
        let spans = decode_part(&self.server.frames.at().domain, part, stored)?;
        let key = ImageKey::of(image.id);
        let node_of = |place: Place| match place {
            Place::Meta => Node::Meta(key).number(),
            Place::Object { id, .. } => Node::Object(ObjectKey::of(&id)).number(),
        };
        for (span, bytes) in &spans {
            if let Place::Object { id, size } = span.place {
                self.server.learn(image, &id, size);
            }
            self.server.brought.add(node_of(span.place), span.at, bytes.clone());
        }
        let done: Vec<(u64, u64)> = spans.iter().map(|(s, _)| (node_of(s.place), s.at)).collect();
        self.push_spans(image.id, &spans, node_of);
        let server = self.server.clone();
        tokio::runtime::Handle::current().spawn(async move {
            tokio::time::sleep(KEPT).await;
            done.into_iter().for_each(|(node, at)| server.brought.remove(node, at));
        });
        Ok(())
    }

    fn push_spans(&self, id: ImageId, spans: &[(Span, Bytes)], node_of: impl Fn(Place) -> u64) {
        let objects = self.fuse.join("o").join(id.to_string());
        let mut looked_up = None;
        for (span, bytes) in spans {
            // The kernel takes pages for inodes that it has: a lookup makes it have them.
            if let Place::Object { id, .. } = span.place
                && looked_up != Some(id)
            {
                looked_up = Some(id);
                let path = crate::erofs_write::object_path(&id);
                let _ = rustix::fs::stat(objects.join(Path::new(&path[1..])));
            }
            match self.device.push(node_of(span.place), span.at, bytes) {
                Ok(true) => count_bytes(&self.server.frames.counters.bytes_pushed, bytes.len()),
                Ok(false) => {}
                // The mount is gone.
                Err(_) => return,
            }
        }
    }
}

/// A stream of which exact lengths are taken.
struct Incoming<'a, S> {
    stream: S,
    server: &'a Server,
    buffer: BytesMut,
}

impl<S: futures::Stream<Item = object_store::Result<Bytes>> + Unpin> Incoming<'_, S> {
    async fn take(&mut self, len: usize) -> Result<Bytes, ImageError> {
        while self.buffer.len() < len {
            let next = self.stream.next().await.ok_or(Damaged("a boot pack that breaks off"))?;
            let next = next.map_err(ImageError::Store)?;
            count_bytes(&self.server.frames.counters.bytes_fetched, next.len());
            self.buffer.extend_from_slice(&next);
        }
        Ok(self.buffer.split_to(len).freeze())
    }
}

/// Writes what was recorded as the boot pack of an image's entry.
pub(crate) async fn write_boot(
    server: &Arc<Server>,
    id: ImageId,
    entry: &str,
    recorder: Recorder,
) -> Result<BootSummary, ImageError> {
    if !is_entry(entry) {
        return Err(crate::NameError::Image(entry.to_owned()).into());
    }
    let at = server.frames.at().clone();
    let image = server.open(id).await.map_err(ImageError::Shared)?;
    let failed = |e| ImageError::host("pack the boot pack", e);
    let mut writer = BootWriter::new(&at.domain);
    let mut summary = BootSummary::default();
    for (node, offset, len) in recorder.into_reads() {
        let (place, parts) = match node {
            Node::Meta(key) if key == ImageKey::of(id) => {
                (Place::Meta, image.read_meta(offset, len as usize).await)
            }
            Node::Object(key) => {
                let found = image.find(&key.first(), |id| ObjectKey::of(id) == key).await;
                // Read through another image that was mounted at the same time.
                let Some(object) = found.map_err(ImageError::Shared)? else { continue };
                let place = Place::Object { id: *object.id(), size: object.size() };
                (place, object.read(offset, len as usize).await)
            }
            _ => continue,
        };
        let bytes = parts.map_err(ImageError::Shared)?.concat();
        if bytes.is_empty() {
            continue;
        }
        summary.spans += 1;
        summary.bytes += bytes.len() as u64;
        writer.add(place, offset, &bytes).map_err(failed)?;
    }
    let pack = writer.finish().map_err(failed)?;
    summary.stored = pack.len() as u64;
    let put = at.store.put(&boot_path(id, entry), PutPayload::from(pack)).await;
    put.map_err(ImageError::Store)?;
    Ok(summary)
}
