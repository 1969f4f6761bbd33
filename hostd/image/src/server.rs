//! Answers the kernel: looks names up, gives bytes, and says EIO when it has none. It never says zeros.
//!
//! It keeps nothing that it could not find again: images are files of a directory, nodes are numbers that say what they
//! are. So a server may die between any two requests, and the next one goes on.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::OnceCell;
use wire::ImageId;

use crate::ahead::Refusals;
use crate::boot::Recorder;
use crate::brought::{Brought, Cover, Wait};
use crate::frames::Frames;
use crate::fuse_wire::{Answer, Ask, Attr, Request};
use crate::id::{Hash, from_hex, hash_from_hex};
use crate::lazy::{LazyImage, LazyObject};
use crate::metrics::{ImageMetrics, count, count_bytes};
use crate::node::{ImageKey, Node, ObjectKey};
use crate::proof::GROUP;
use crate::store::ImageError;

/// How long a read that is most likely nobody's waits for a pack to be through: about what a GET takes.
const HOLE_WAITS: Duration = Duration::from_millis(50);

/// An image that may be asked for.
struct Slot {
    id: ImageId,
    image: OnceCell<Arc<LazyImage>>,
}

/// The server of one domain's objects.
pub(crate) struct Server {
    pub(crate) frames: Arc<Frames>,
    /// Holds a file named by its id for each image that may be asked for.
    images_dir: PathBuf,
    images: Mutex<HashMap<ImageKey, Arc<Slot>>>,
    objects: Mutex<HashMap<ObjectKey, Arc<LazyObject>>>,
    /// What boot packs brought.
    pub(crate) brought: Brought,
    /// Reads of runs that are watched, by the number of the recording.
    recorders: Mutex<HashMap<u64, Recorder>>,
    /// Reads ahead of need that were turned away.
    refusals: Refusals,
    /// Requests that wait for storage.
    waiting: Mutex<HashMap<u64, Instant>>,
}

/// What a node's bytes are fetched from.
enum Origin<'a> {
    Meta(&'a LazyImage),
    Object(&'a LazyObject),
}

/// Why a request is answered with an error.
enum Failure {
    /// There is no such name.
    Absent,
    /// The bytes could not be had.
    Io(Arc<ImageError>),
    /// It is not that kind of node.
    Kind,
    /// A read ahead of need, of which not all is here.
    Ahead,
}

impl From<Arc<ImageError>> for Failure {
    fn from(error: Arc<ImageError>) -> Self {
        if error.is_not_found() { Self::Absent } else { Self::Io(error) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole between any two statements that hold them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub(crate) fn new(frames: Arc<Frames>, images_dir: PathBuf) -> Self {
        Self {
            frames,
            images_dir,
            images: Mutex::default(),
            objects: Mutex::default(),
            brought: Brought::default(),
            recorders: Mutex::default(),
            refusals: Refusals::default(),
            waiting: Mutex::default(),
        }
    }

    /// What was counted so far.
    pub(crate) fn metrics(&self) -> ImageMetrics {
        let oldest = lock(&self.waiting).values().map(Instant::elapsed).max().unwrap_or_default();
        ImageMetrics {
            disk_bytes: self.frames.disk_bytes(),
            oldest_unanswered_ms: u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX),
            ..self.frames.counters.read()
        }
    }

    /// Notes a request that waits for storage, and its end.
    pub(crate) fn begin_waiting(&self, unique: u64) {
        lock(&self.waiting).insert(unique, Instant::now());
    }

    pub(crate) fn end_waiting(&self, unique: u64) {
        lock(&self.waiting).remove(&unique);
    }

    /// The answer to a request.
    pub(crate) async fn answer(&self, request: &Request) -> Answer {
        match &request.ask {
            Ask::Init { minor, max_readahead, flags } => {
                Answer::init(*minor, *max_readahead, *flags)
            }
            Ask::Forget => {
                self.forget(request.node);
                Answer::Silence
            }
            Ask::BatchForget(nodes) => {
                nodes.iter().for_each(|node| self.forget(*node));
                Answer::Silence
            }
            Ask::Interrupt => Answer::Silence,
            Ask::StatFs => Answer::statfs(),
            // The overlay never lists a data-only layer, and nobody else is let in.
            Ask::ReadDir => Answer::Data(Vec::new()),
            Ask::Destroy => Answer::Head(Vec::new()),
            Ask::Unneeded => Answer::Error(libc::ENOSYS),
            Ask::Change => Answer::Error(libc::EROFS),
            Ask::Lookup(name) => self.reply(self.lookup(request.node, name).await, Answer::entry),
            Ask::GetAttr => self.reply(self.attr(request.node).await, Answer::attr),
            Ask::Read { at, len, direct } => {
                count(&self.frames.counters.reads);
                match self.read(request.node, *at, *len as usize, *direct).await {
                    Ok(parts) => {
                        let bytes = parts.iter().map(Bytes::len).sum();
                        count_bytes(&self.frames.counters.bytes_read, bytes);
                        Answer::Data(parts)
                    }
                    Err(failure) => self.fail(&failure),
                }
            }
        }
    }

    fn reply(&self, got: Result<Attr, Failure>, answer: fn(&Attr) -> Answer) -> Answer {
        match got {
            Ok(attr) => answer(&attr),
            Err(failure) => self.fail(&failure),
        }
    }

    fn fail(&self, failure: &Failure) -> Answer {
        match failure {
            Failure::Absent => Answer::Error(libc::ENOENT),
            Failure::Kind => Answer::Error(libc::EINVAL),
            Failure::Ahead => Answer::Error(libc::EAGAIN),
            Failure::Io(error) => {
                count(&self.frames.counters.eio);
                tracing::warn!(%error, "a read was answered with EIO");
                Answer::Error(libc::EIO)
            }
        }
    }

    fn forget(&self, node: u64) {
        if let Some(Node::Object(key)) = Node::from_number(node) {
            // Should the kernel still hold it by another lookup, it is found again by its number.
            lock(&self.objects).remove(&key);
            self.refusals.forget(node);
        }
    }

    async fn lookup(&self, parent: u64, name: &[u8]) -> Result<Attr, Failure> {
        let parent = Node::from_number(parent).ok_or(Failure::Absent)?;
        let text = std::str::from_utf8(name).map_err(|_| Failure::Absent)?;
        let hash = || hash_from_hex(text).ok_or(Failure::Absent);
        let node = match (parent, name) {
            (Node::Root, b"o") => Node::Objects,
            (Node::Root, b"m") => Node::Metas,
            (Node::Objects, _) => Node::ImageDir(self.slot_of(ImageId(hash()?))?.0),
            (Node::Metas, _) => Node::Meta(self.slot_of(ImageId(hash()?))?.0),
            (Node::ImageDir(key), _) => {
                let [xx] = from_hex(text).ok_or(Failure::Absent)?[..] else {
                    return Err(Failure::Absent);
                };
                Node::Shelf(key, xx)
            }
            (Node::Shelf(key, xx), _) => {
                let id = hash()?;
                let object = if id[0] == xx { self.look_up_object(key, &id).await? } else { None };
                let object = object.ok_or(Failure::Absent)?;
                let node = Node::Object(ObjectKey::of(&id)).number();
                return Ok(Attr { node, dir: false, size: object.size() });
            }
            _ => return Err(Failure::Absent),
        };
        self.attr(node.number()).await
    }

    async fn attr(&self, number: u64) -> Result<Attr, Failure> {
        let node = Node::from_number(number).ok_or(Failure::Absent)?;
        let size = match node {
            Node::Meta(key) => self.image(key).await?.manifest.meta.bytes,
            Node::Object(key) => self.object(key).await?.size(),
            _ => 0,
        };
        Ok(Attr { node: number, dir: node.is_dir(), size })
    }

    async fn read(
        &self,
        number: u64,
        at: u64,
        len: usize,
        direct: bool,
    ) -> Result<Vec<Bytes>, Failure> {
        let node = Node::from_number(number).ok_or(Failure::Absent)?;
        let end = |size: u64| at.saturating_add(len as u64).min(size);
        match node {
            Node::Meta(key) => {
                let image = self.image(key).await?;
                let end = end(image.manifest.meta.bytes);
                self.read_from(&Origin::Meta(&image), node, at, end).await
            }
            Node::Object(key) => {
                let object = self.object(key).await?;
                let end = end(object.size());
                if len > GROUP && !direct {
                    self.refuse_ahead(number, at, end)?;
                } else if let Some(wait) = self.hole(number, at, end) {
                    let _ = tokio::time::timeout(HOLE_WAITS, wait.done()).await;
                }
                self.read_from(&Origin::Object(&object), node, at, end).await
            }
            _ => Err(Failure::Kind),
        }
    }

    /// Turns a read ahead of need away, while a first run is watched or this object's pages are on their way: the kernel asks
    /// again for each page that somebody really wants. Whatever is here is given.
    fn refuse_ahead(&self, node: u64, at: u64, end: u64) -> Result<(), Failure> {
        let covers = self.brought.cover(node, at, end);
        let all_here = covers.iter().all(|cover| matches!(cover, Cover::Here(_)));
        let no_pack = matches!(covers[..], [Cover::Gap { .. }]);
        if all_here || no_pack && lock(&self.recorders).is_empty() {
            return Ok(());
        }
        if self.refusals.refuse(node, at..end) { Err(Failure::Ahead) } else { Ok(()) }
    }

    /// What a read of one page waits for that no pack brings, when all around it is here or was turned away: most likely it
    /// is the rest of a read ahead, cut up by pages that were pushed, and a GET for it would only hold up the pack.
    fn hole(&self, node: u64, at: u64, end: u64) -> Option<Wait> {
        let page = GROUP as u64;
        let wait = self.brought.last()?;
        let brought = |at: u64, end: u64| {
            !matches!(self.brought.cover(node, at, end)[..], [Cover::Gap { .. }])
        };
        let known = |at: u64| brought(at, at + page) || self.refusals.met(node, at..at + page);
        let is_hole = !brought(at, end) && known(at.checked_sub(page)?) && known(at + page);
        is_hole.then_some(wait)
    }

    /// Puts an answer together of what a boot pack brought and of what must be fetched.
    async fn read_from(
        &self,
        from: &Origin<'_>,
        node: Node,
        at: u64,
        end: u64,
    ) -> Result<Vec<Bytes>, Failure> {
        if at >= end {
            return Ok(Vec::new());
        }
        let covers = self.brought.cover(node.number(), at, end);
        if let [Cover::Gap { .. }] = covers[..] {
            return self.fetch(from, node, at, end).await;
        }
        let pieces = covers.into_iter().map(|cover| self.piece(from, node, cover));
        let pieces = futures::future::try_join_all(pieces).await?;
        count(&self.frames.counters.reads_boot);
        Ok(pieces.concat())
    }

    async fn piece(
        &self,
        from: &Origin<'_>,
        node: Node,
        cover: Cover,
    ) -> Result<Vec<Bytes>, Failure> {
        let (at, end) = match cover {
            Cover::Here(bytes) => return Ok(vec![bytes]),
            Cover::Gap { at, end } => return self.fetch(from, node, at, end).await,
            Cover::Promised { at, end, wait } => {
                wait.done().await;
                (at, end)
            }
        };
        let mut out = Vec::new();
        let mut at = at;
        // Waited for once: what is still not here is fetched.
        for cover in self.brought.cover(node.number(), at, end) {
            match cover {
                Cover::Here(bytes) => {
                    at += bytes.len() as u64;
                    out.push(bytes);
                }
                Cover::Gap { end, .. } | Cover::Promised { end, .. } => {
                    out.extend(self.fetch(from, node, at, end).await?);
                    at = end;
                }
            }
        }
        Ok(out)
    }

    async fn fetch(
        &self,
        from: &Origin<'_>,
        node: Node,
        at: u64,
        end: u64,
    ) -> Result<Vec<Bytes>, Failure> {
        let len = usize::try_from(end - at).unwrap_or(usize::MAX);
        tracing::trace!(?node, at, len, "a read goes to storage");
        for recorder in lock(&self.recorders).values_mut() {
            recorder.read(node, at, len);
        }
        match from {
            Origin::Meta(image) => Ok(image.read_meta(at, len).await?),
            Origin::Object(object) => Ok(object.read(at, len).await?),
        }
    }

    /// Starts to note reads that no boot pack answers; gives the recording's number.
    pub(crate) fn record(&self) -> u64 {
        let mut recorders = lock(&self.recorders);
        let next = recorders.keys().max().map_or(0, |last| last + 1);
        recorders.insert(next, Recorder::default());
        next
    }

    /// What a recording noted, which ends.
    pub(crate) fn recorded(&self, recording: u64) -> Option<Recorder> {
        lock(&self.recorders).remove(&recording)
    }

    /// Makes an object known of which a boot pack said that an image has it.
    pub(crate) fn learn(&self, image: &Arc<LazyImage>, id: &Hash, size: u64) {
        let mut objects = lock(&self.objects);
        objects.entry(ObjectKey::of(id)).or_insert_with(|| Arc::new(image.known_object(id, size)));
    }

    /// The slot of an image that may be asked for.
    fn slot_of(&self, id: ImageId) -> Result<(ImageKey, Arc<Slot>), Failure> {
        let key = ImageKey::of(id);
        if let Some(slot) = lock(&self.images).get(&key).filter(|slot| slot.id == id) {
            return Ok((key, slot.clone()));
        }
        if !self.images_dir.join(id.to_string()).exists() {
            return Err(Failure::Absent);
        }
        let mut images = lock(&self.images);
        let slot =
            images.entry(key).or_insert_with(|| Arc::new(Slot { id, image: OnceCell::new() }));
        // Two ids with the same 53 bits: the second is refused.
        if slot.id == id { Ok((key, slot.clone())) } else { Err(Failure::Kind) }
    }

    fn slot(&self, key: ImageKey) -> Result<Arc<Slot>, Failure> {
        if let Some(slot) = lock(&self.images).get(&key) {
            return Ok(slot.clone());
        }
        let id = self.listed().into_iter().find(|id| ImageKey::of(*id) == key);
        Ok(self.slot_of(id.ok_or(Failure::Absent)?)?.1)
    }

    fn listed(&self) -> Vec<ImageId> {
        // Those that are open are known even when the directory is gone: roots of sandboxes may outlive it.
        let mut ids: Vec<ImageId> = lock(&self.images).values().map(|slot| slot.id).collect();
        let entries = std::fs::read_dir(&self.images_dir).into_iter().flatten();
        for entry in entries.flatten() {
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(id) = id.filter(|id| !ids.contains(id)) {
                ids.push(id);
            }
        }
        ids
    }

    /// Opens an image, so that what is wrong with it is known by more than an errno.
    pub(crate) async fn open(&self, id: ImageId) -> Result<Arc<LazyImage>, Arc<ImageError>> {
        let failed = |failure| match failure {
            Failure::Io(error) => error,
            Failure::Absent | Failure::Kind | Failure::Ahead => {
                Arc::new(ImageError::NotFound(id.to_string()))
            }
        };
        let (key, _) = self.slot_of(id).map_err(failed)?;
        self.image(key).await.map_err(failed)
    }

    /// An image was unmounted: what is kept for it is let go.
    pub(crate) fn close(&self, id: ImageId) {
        let key = ImageKey::of(id);
        let mut images = lock(&self.images);
        if images.get(&key).is_some_and(|slot| slot.id == id) {
            images.remove(&key);
        }
        drop(images);
        lock(&self.objects).retain(|_, object| object.image_id() != id);
    }

    async fn image(&self, key: ImageKey) -> Result<Arc<LazyImage>, Failure> {
        let slot = self.slot(key)?;
        let open = || async { Ok(Arc::new(LazyImage::open(&self.frames, slot.id).await?)) };
        Ok(slot
            .image
            .get_or_try_init(open)
            .await
            .map_err(|e: Arc<ImageError>| Failure::from(e))?
            .clone())
    }

    async fn look_up_object(
        &self,
        key: ImageKey,
        id: &Hash,
    ) -> Result<Option<Arc<LazyObject>>, Failure> {
        let object_key = ObjectKey::of(id);
        let mut known = lock(&self.objects).get(&object_key).cloned();
        if known.is_none()
            && let Some(wait) = self.brought.first_of(Node::Object(object_key).number())
        {
            // Comes in a moment, and the index need not be asked.
            wait.done().await;
            known = lock(&self.objects).get(&object_key).cloned();
        }
        if let Some(known) = known {
            // Another id with the same number cannot be told apart by the kernel.
            return if known.id() == id { Ok(Some(known)) } else { Err(Failure::Kind) };
        }
        let found = self.image(key).await?.find(id, |found| found == id).await?;
        let Some(object) = found.map(Arc::new) else { return Ok(None) };
        lock(&self.objects).insert(object_key, object.clone());
        Ok(Some(object))
    }

    /// The object of a node, in whichever image has it.
    async fn object(&self, key: ObjectKey) -> Result<Arc<LazyObject>, Failure> {
        let known = lock(&self.objects).get(&key).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let mut failure = Failure::Absent;
        for id in self.listed() {
            let image = match self.image(ImageKey::of(id)).await {
                Ok(image) => image,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            match image.find(&key.first(), |found| ObjectKey::of(found) == key).await {
                Ok(Some(object)) => {
                    let object = Arc::new(object);
                    lock(&self.objects).insert(key, object.clone());
                    return Ok(object);
                }
                Ok(None) => {}
                Err(error) => failure = error.into(),
            }
        }
        Err(failure)
    }
}
