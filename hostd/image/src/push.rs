//! First runs: an image's boot pack fetched as one stream when it is launched, kept for reads that come, and pushed into the
//! page cache before they do; what the run read beside it noted, and the pack written again when that was much.
//!
//! Whoever runs an image first on a host that has nothing of it finds out what it reads; from then on every host has that
//! in one stream. A pack that misses more than a tenth of what is read is made anew, of what it had and of what it missed:
//! pages that another image had brought to the recording host's page cache were not asked for there, and a changed command
//! reads other files. What is in a pack is believed only as far as it is proven (`boot`).

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use wire::ImageId;

use crate::boot::{
    Head, LEAD_BYTES, META, Part, Recorder, Span, boot_path, decode_head, decode_lead, decode_part,
    is_entry,
};
use crate::boot_write;
use crate::brought::PATIENCE;
use crate::device::Device;
use crate::index::Damaged;
use crate::lazy_host::DEFAULT_ENTRY;
use crate::manifest::ImageConfig;
use crate::metrics::{count, count_bytes};
use crate::node::{ImageKey, Node, ObjectKey};
use crate::server::Server;
use crate::store::ImageError;

/// How long what a boot pack brought is kept for reads; after that, it is in the page cache or was not needed.
const KEPT: Duration = Duration::from_secs(30);
/// How long a first run is watched, if it does not end before: the start of a program, not its life.
const WATCHED: Duration = Duration::from_secs(10);
/// A pack of which no part comes for so long is given up.
const STALLED: Duration = Duration::from_secs(2);
/// First runs that are watched at once; more are served but not recorded.
const WATCHED_MAX: usize = 4;
/// A pack is made anew when what it missed is more than this part of what it has.
const MISSED_PART: usize = 10;
/// Bytes that nobody makes a pack for.
const MISSED_BYTES_MIN: usize = 64 << 10;
/// Boot packs of one image: commands with ever new arguments must not fill the store.
const ENTRIES_MAX: usize = 16;

/// What a recorded boot pack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BootSummary {
    /// Runs of pages.
    pub spans: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the pack.
    pub stored: u64,
}

/// The first run of an image's entry on a host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FirstRun {
    pub(crate) image: String,
    pub(crate) entry: String,
    /// Nothing of the image was mounted: the image's own pack serves where the entry has none, and what is read is
    /// worth noting.
    pub(crate) cold: bool,
    /// May write a boot pack.
    pub(crate) record: bool,
}

/// Brings and records boot packs.
pub(crate) struct Pusher {
    pub(crate) server: Arc<Server>,
    device: Device,
    /// The FUSE mount.
    fuse: PathBuf,
    runtime: Handle,
    /// Runs that are watched, and how to say that one has ended.
    watched: Mutex<HashMap<(String, String), oneshot::Sender<()>>>,
}

/// A pack of which the head is here.
struct Coming {
    head: Head,
    /// Its entry's own, and not the image's.
    own: bool,
    rest: Incoming,
}

/// What a pack brought.
struct Had {
    /// Its parts that were proven.
    proven: Head,
    own: bool,
    /// All of it was.
    whole: bool,
}

impl Pusher {
    pub(crate) fn new(server: Arc<Server>, device: Device, fuse: PathBuf, runtime: Handle) -> Self {
        Self { server, device, fuse, runtime, watched: Mutex::default() }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<(String, String), oneshot::Sender<()>>> {
        // The table is whole between any two statements that hold the lock.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a first run. What is given back says, when that is known, whether a pack is coming.
    pub(crate) fn begin(self: &Arc<Self>, id: ImageId, run: FirstRun) -> oneshot::Receiver<bool> {
        let (known, when_known) = oneshot::channel();
        let this = self.clone();
        self.runtime.spawn(async move { this.watch(id, run, known).await });
        when_known
    }

    /// Opens an image that is about to be mounted, and begins its first run. Returns when a boot pack's head is here, so
    /// that no read of the mount goes past what is coming.
    pub(crate) async fn open_for(
        self: &Arc<Self>,
        id: ImageId,
        run: Option<FirstRun>,
    ) -> Result<ImageConfig, ImageError> {
        let known = run.map(|run| self.begin(id, run));
        let image = self.server.open(id).await.map_err(ImageError::Shared)?;
        let comes = match known {
            Some(known) => {
                let known = tokio::time::timeout(PATIENCE, known).await;
                known.is_ok_and(|known| known.unwrap_or(false))
            }
            None => false,
        };
        if !comes {
            image.warm();
        }
        Ok(image.manifest.config.clone())
    }

    /// The first run of an entry has ended: what it read is all that there is to note.
    pub(crate) fn end(&self, image: &str, entry: &str) {
        if let Some(end) = self.watched().remove(&(image.to_owned(), entry.to_owned())) {
            let _ = end.send(());
        }
    }

    async fn watch(self: Arc<Self>, id: ImageId, run: FirstRun, known: oneshot::Sender<bool>) {
        // Before anything is read.
        let key = (run.image.clone(), run.entry.clone());
        let mut ended = None;
        if run.cold {
            let mut watched = self.watched();
            if watched.len() < WATCHED_MAX && !watched.contains_key(&key) {
                let (end, when_ended) = oneshot::channel();
                watched.insert(key.clone(), end);
                ended = Some((self.server.record(), when_ended));
            }
        }
        let coming = match self.find(id, &run).await {
            Ok(coming) => coming,
            Err(error) => {
                tracing::warn!(%error, image = %id, entry = run.entry, "boot pack not used");
                None
            }
        };
        let had = match coming {
            Some(coming) => Some(self.clone().bring(id, coming, known).await),
            None => {
                let _ = known.send(false);
                None
            }
        };
        let Some((recording, when_ended)) = ended else { return };
        let _ = tokio::time::timeout(WATCHED, when_ended).await;
        self.watched().remove(&key);
        let recorder = self.server.recorded(recording).unwrap_or_default();
        if let Err(error) = self.settle(id, &run, had, recorder).await {
            tracing::warn!(%error, image = %id, entry = run.entry, "no boot pack was written");
        }
        count(&self.server.frames.counters.first_runs);
    }

    /// The pack of a run's entry; of a cold run whose entry has none, the image's.
    async fn find(&self, id: ImageId, run: &FirstRun) -> Result<Option<Coming>, ImageError> {
        let other = run.cold && run.entry != DEFAULT_ENTRY;
        // Both at once: a round trip is what a cold start is made of.
        let (own, default) = futures::join!(self.open(id, &run.entry, true), async {
            if other { self.open(id, DEFAULT_ENTRY, false).await } else { Ok(None) }
        });
        match own {
            Ok(Some(own)) => Ok(Some(own)),
            Ok(None) => default,
            Err(error) => {
                tracing::warn!(%error, image = %id, entry = run.entry, "boot pack not used");
                default
            }
        }
    }

    async fn open(
        &self,
        id: ImageId,
        entry: &str,
        own: bool,
    ) -> Result<Option<Coming>, ImageError> {
        let at = self.server.frames.at();
        let got = match at.store.get(&boot_path(id, entry)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            got => got.map_err(ImageError::Store)?,
        };
        let (stream, server) = (got.into_stream(), self.server.clone());
        let mut rest = Incoming { stream, server, buffer: BytesMut::new() };
        let (stored, len, hash) = decode_lead(&rest.take(LEAD_BYTES).await?)?;
        let head = rest.take(stored).await?;
        let head = decode_head(&at.domain, &head, len, &hash)?;
        Ok(Some(Coming { head, own, rest }))
    }

    /// Fetches a pack's parts ahead of what is unpacked, by a few.
    fn parts(&self, head: &Head, mut rest: Incoming) -> Parts {
        let (sender, parts) = mpsc::channel(4);
        let lens: Vec<usize> = head.parts.iter().map(|part| part.stored as usize).collect();
        self.runtime.spawn(async move {
            for len in lens {
                let part = rest.take(len).await;
                tracing::trace!(len, "part of a boot pack is here");
                let failed = part.is_err();
                if sender.send(part).await.is_err() || failed {
                    return;
                }
            }
        });
        parts
    }

    /// Takes a pack in.
    async fn bring(
        self: Arc<Self>,
        id: ImageId,
        coming: Coming,
        known: oneshot::Sender<bool>,
    ) -> Had {
        let Coming { head, own, rest } = coming;
        let parts = self.parts(&head, rest);
        let head = Arc::new(head);
        let key = ImageKey::of(id);
        let (done, progress) = watch::channel(0);
        let places = || {
            let parts = head.parts.iter().enumerate();
            parts.flat_map(|(nth, part)| part.spans.iter().map(move |span| (nth, *span)))
        };
        let promised = places().map(|(nth, span)| {
            (node_of(key, &head, span).number(), span.at, span.len as usize, nth)
        });
        let kept = self.server.brought.promise(promised, &progress);
        let _ = known.send(true);
        let taken = self.take_in(id, &head, parts, &done).await;
        if let Err(error) = &taken {
            tracing::warn!(%error, image = %id, "the rest of a boot pack is not used");
        }
        let pieces: Vec<_> =
            places().map(|(_, span)| (node_of(key, &head, span).number(), span.at)).collect();
        let (server, failed) = (self.server.clone(), taken.is_err());
        if kept {
            self.runtime.spawn(async move {
                if !failed {
                    tokio::time::sleep(KEPT).await;
                }
                server.brought.remove(pieces.into_iter());
            });
        }
        let mut proven = Arc::unwrap_or_clone(head);
        proven.parts.truncate(*progress.borrow());
        Had { proven, own, whole: !failed }
    }

    async fn take_in(
        self: &Arc<Self>,
        id: ImageId,
        head: &Arc<Head>,
        mut parts: Parts,
        done: &watch::Sender<usize>,
    ) -> Result<(), ImageError> {
        let image = self.server.open(id).await.map_err(ImageError::Shared)?;
        image.adopt_table(&head.table);
        let of_meta = head.parts.iter().flat_map(|part| &part.spans).any(|s| s.object == META);
        let frames = if of_meta { image.meta_frames().await } else { Ok(Vec::new()) };
        let frames = Arc::new(frames.map_err(ImageError::Shared)?);
        let key = ImageKey::of(id);
        // Room for all: reads that wait for the next part must not wait for pushes.
        let (sender, pushes) = std::sync::mpsc::sync_channel(head.parts.len().max(1));
        let (this, pack) = (self.clone(), head.clone());
        tokio::task::spawn_blocking(move || {
            for spans in pushes {
                this.push(id, &pack, spans);
            }
        });
        let mut proven = HashSet::new();
        for nth in 0..head.parts.len() {
            let next = tokio::time::timeout(STALLED, parts.recv()).await;
            let next = next.map_err(|_| Damaged("a boot pack that stalls"))?;
            let stored = next.ok_or(Damaged("a boot pack that breaks off"))??;
            let (pack, frames) = (head.clone(), frames.clone());
            let domain = self.server.frames.at().domain.clone();
            let unpack = move || {
                let meta = |n: u64| frames.get(usize::try_from(n).ok()?).copied();
                decode_part(&domain, &pack, &pack.parts[nth], &meta, &stored)
            };
            let spans = tokio::task::spawn_blocking(unpack).await;
            let mut spans = spans.map_err(|_| Damaged("a part that was stopped"))??;
            for (span, _) in &spans {
                if let Some(object) = head.objects.get(span.object as usize)
                    && span.at + u64::from(span.len) == object.size
                    && proven.insert(span.object)
                {
                    self.server.learn(&image, &object.id, object.size);
                }
            }
            // An object whose size is not proven is as if it were not there.
            spans.retain(|(span, _)| span.object == META || proven.contains(&span.object));
            for (span, bytes) in &spans {
                let node = node_of(key, head, *span).number();
                self.server.brought.keep(node, span.at, bytes.clone());
            }
            done.send_replace(nth + 1);
            tracing::trace!(nth, "part of a boot pack is proven");
            let _ = sender.send(spans);
        }
        Ok(())
    }

    /// Puts bytes into the page cache.
    fn push(&self, id: ImageId, head: &Head, spans: Vec<(Span, Bytes)>) {
        let objects = self.fuse.join("o").join(id.to_string());
        let mut looked_up = None;
        for (span, bytes) in spans {
            // The kernel takes pages for inodes that it has: a lookup makes it have them.
            if let Some(object) = head.objects.get(span.object as usize)
                && looked_up != Some(span.object)
            {
                looked_up = Some(span.object);
                let path = crate::erofs_write::object_path(&object.id);
                let _ = rustix::fs::stat(objects.join(Path::new(&path[1..])));
            }
            let node = node_of(ImageKey::of(id), head, span).number();
            match self.device.push(node, span.at, &bytes) {
                Ok(true) => count_bytes(&self.server.frames.counters.bytes_pushed, bytes.len()),
                Ok(false) => {}
                // The mount is gone.
                Err(_) => return,
            }
        }
    }

    /// After a run: counts what its pack was worth, and writes a better one if it was not.
    async fn settle(
        &self,
        id: ImageId,
        run: &FirstRun,
        had: Option<Had>,
        recorder: Recorder,
    ) -> Result<(), ImageError> {
        let counters = &self.server.frames.counters;
        let missed = recorder.bytes();
        let bytes = had.as_ref().map_or(0, |had| pages_of(&had.proven));
        if had.is_some() {
            count(&counters.boot_packs_used);
            count_bytes(&counters.boot_bytes_had, bytes);
            count_bytes(&counters.boot_bytes_missed, missed);
        }
        let good = match &had {
            Some(had) => had.whole && (missed < MISSED_BYTES_MIN || missed * MISSED_PART <= bytes),
            None => missed == 0,
        };
        if good || !run.record {
            return Ok(());
        }
        let own = had.as_ref().is_some_and(|had| had.own);
        let entries = self.entries(id).await?;
        let is_new = !entries.contains(&run.entry);
        if is_new && entries.len() >= ENTRIES_MAX {
            tracing::info!(image = %id, entry = run.entry, "boot packs of other entries must do");
            return Ok(());
        }
        let (summary, pack) = self.fill(id, had.as_ref().map(|had| &had.proven), recorder).await?;
        self.publish(id, &run.entry, &entries, pack).await?;
        count(if own { &counters.boot_packs_renewed } else { &counters.boot_packs_recorded });
        tracing::info!(image = %id, entry = run.entry, ?summary, own, missed, "boot pack written");
        Ok(())
    }

    async fn entries(&self, id: ImageId) -> Result<Vec<String>, ImageError> {
        let prefix = object_store::path::Path::from(format!("boot/{id}"));
        let listed = self.server.frames.at().store.list(Some(&prefix));
        let listed: Vec<_> = listed.try_collect().await.map_err(ImageError::Store)?;
        Ok(listed.iter().filter_map(|meta| Some(meta.location.filename()?.to_owned())).collect())
    }

    async fn fill(
        &self,
        id: ImageId,
        base: Option<&Head>,
        recorder: Recorder,
    ) -> Result<(BootSummary, Vec<u8>), ImageError> {
        let image = self.server.open(id).await.map_err(ImageError::Shared)?;
        let domain = &self.server.frames.at().domain;
        let filled = boot_write::fill(domain, &image, base, recorder.into_reads()).await;
        filled.map_err(ImageError::Shared)
    }

    /// Writes a pack, and as the image's own too if that has none.
    async fn publish(
        &self,
        id: ImageId,
        entry: &str,
        entries: &[String],
        pack: Vec<u8>,
    ) -> Result<(), ImageError> {
        let pack = Bytes::from(pack);
        self.put(id, entry, pack.clone()).await?;
        if entry != DEFAULT_ENTRY && !entries.iter().any(|entry| entry == DEFAULT_ENTRY) {
            // For commands that nobody has run yet: most of what an image's programs read first is the same.
            self.put(id, DEFAULT_ENTRY, pack).await?;
        }
        Ok(())
    }

    async fn put(&self, id: ImageId, entry: &str, pack: Bytes) -> Result<(), ImageError> {
        let path = boot_path(id, entry);
        let put = self.server.frames.at().store.put(&path, PutPayload::from(pack)).await;
        put.map(drop).map_err(ImageError::Store)
    }

    /// Writes what was recorded as the boot pack of an image's entry.
    pub(crate) async fn write(
        &self,
        id: ImageId,
        entry: &str,
        recorder: Recorder,
    ) -> Result<BootSummary, ImageError> {
        if !is_entry(entry) {
            return Err(crate::NameError::Image(entry.to_owned()).into());
        }
        let (summary, pack) = self.fill(id, None, recorder).await?;
        let entries = self.entries(id).await?;
        self.publish(id, entry, &entries, pack).await?;
        Ok(summary)
    }
}

fn pages_of(head: &Head) -> usize {
    let spans = |part: &Part| part.spans.iter().map(|span| span.len as usize).sum::<usize>();
    head.parts.iter().map(spans).sum()
}

fn node_of(key: ImageKey, head: &Head, span: Span) -> Node {
    match head.objects.get(span.object as usize) {
        Some(object) => Node::Object(ObjectKey::of(&object.id)),
        None => Node::Meta(key),
    }
}

/// Parts as they come.
type Parts = mpsc::Receiver<Result<Bytes, ImageError>>;

/// A stream of which exact lengths are taken.
struct Incoming {
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    server: Arc<Server>,
    buffer: BytesMut,
}

impl Incoming {
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
