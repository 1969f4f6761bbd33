//! An object store as far away and as broken as one likes: for figures that are honest about storage, and for faults.
//!
//! Used by the image bench and by tests. One link is shared by all GETs, as a host's network card is.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// Bytes that go over the link at a time.
const TURN_BYTES: usize = 64 << 10;
/// How far a link goes on ahead of a reader that does not come: a socket's buffer, in time.
const BUFFERED: Duration = Duration::from_millis(20);

/// A store behind a slow link that may fail.
#[derive(Debug)]
pub struct FarStore {
    inner: Arc<dyn ObjectStore>,
    /// Time to a GET's first byte.
    pub latency_us: AtomicU64,
    /// Bytes a second over the link; 0 for no bound.
    pub bytes_per_second: AtomicU64,
    /// Every GET of a pack fails.
    pub fails: AtomicBool,
    /// Every GET of a pack says that there is none.
    pub loses: AtomicBool,
    /// Every GET of a pack has a bit flipped in its middle.
    pub flips: AtomicBool,
    /// Every GET of a pack ends one byte early.
    pub truncates: AtomicBool,
    /// Boot packs end in a silence after their first 64 KiB.
    pub stalls_boot: AtomicBool,
    /// GETs.
    pub gets: AtomicU64,
    /// Bytes of all GETs.
    pub bytes: Arc<AtomicU64>,
    /// When the link is free again.
    link: Arc<Mutex<Instant>>,
}

impl FarStore {
    /// `inner` at no distance.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            latency_us: AtomicU64::new(0),
            bytes_per_second: AtomicU64::new(0),
            fails: AtomicBool::new(false),
            loses: AtomicBool::new(false),
            flips: AtomicBool::new(false),
            truncates: AtomicBool::new(false),
            stalls_boot: AtomicBool::new(false),
            gets: AtomicU64::new(0),
            bytes: Arc::default(),
            link: Arc::new(Mutex::new(Instant::now())),
        })
    }

    /// Sets the distance.
    pub fn set_distance(&self, latency: Duration, bytes_per_second: u64) {
        let latency = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.latency_us.store(latency, Ordering::Relaxed);
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    fn broken(&self, location: &Path) -> Option<object_store::Error> {
        if !location.as_ref().starts_with("pack/") {
            return None;
        }
        let path = location.to_string();
        if self.loses.load(Ordering::Relaxed) {
            return Some(object_store::Error::NotFound { path, source: "lost".into() });
        }
        let fails = self.fails.load(Ordering::Relaxed);
        fails.then(|| object_store::Error::Generic { store: "far", source: "503".into() })
    }

    fn damaged(&self, location: &Path, bytes: Bytes) -> Bytes {
        if !location.as_ref().starts_with("pack/") || bytes.is_empty() {
            return bytes;
        }
        if self.truncates.load(Ordering::Relaxed) {
            return bytes.slice(..bytes.len() - 1);
        }
        if self.flips.load(Ordering::Relaxed) {
            let mut bad = bytes.to_vec();
            let middle = bad.len() / 2;
            bad[middle] ^= 0x10;
            return bad.into();
        }
        bytes
    }
}

/// Waits for a part's turn on the link, and gives the time at which it was through.
///
/// `ready` is when the part could go: the end of the one before it. Timers wake late, by a millisecond and more; a link does
/// not stand still meanwhile, and what came through waits in the receiver's buffer.
async fn take_turn(
    link: Arc<Mutex<Instant>>,
    bytes: usize,
    bytes_per_second: u64,
    ready: Instant,
) -> Instant {
    if bytes_per_second == 0 {
        return ready;
    }
    let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
    let done = {
        let mut free = link.lock().unwrap_or_else(PoisonError::into_inner);
        *free = (*free).max(ready) + takes;
        *free
    };
    // One that is through already needs no timer.
    if done > Instant::now() {
        tokio::time::sleep_until(done.into()).await;
    }
    done
}

impl fmt::Display for FarStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "far {}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FarStore {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.inner.put_opts(at, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        let latency = Duration::from_micros(self.latency_us.load(Ordering::Relaxed));
        let ready = Instant::now() + latency;
        if !latency.is_zero() {
            tokio::time::sleep_until(ready.into()).await;
        }
        if let Some(error) = self.broken(at) {
            return Err(error);
        }
        let got = self.inner.get_opts(at, options).await?;
        let (meta, range, attributes) =
            (got.meta.clone(), got.range.clone(), got.attributes.clone());
        let extensions = got.extensions.clone();
        let rate = self.bytes_per_second.load(Ordering::Relaxed);
        // Cut small, so that a long GET does not hold the link for its whole length.
        let bytes = self.damaged(at, got.bytes().await?);
        let parts: Vec<Bytes> = (0..bytes.len())
            .step_by(TURN_BYTES)
            .map(|start| bytes.slice(start..bytes.len().min(start + TURN_BYTES)))
            .collect();
        let stalls = self.stalls_boot.load(Ordering::Relaxed) && at.as_ref().starts_with("boot/");
        let (link, counted) = (self.link.clone(), self.bytes.clone());
        let begun = (parts.into_iter(), ready);
        let stream = futures::stream::unfold(begun, move |(mut parts, ready)| {
            let (link, counted) = (link.clone(), counted.clone());
            async move {
                let part = parts.next()?;
                let earliest = Instant::now().checked_sub(BUFFERED).unwrap_or(ready);
                let ready = take_turn(link, part.len(), rate, ready.max(earliest)).await;
                counted.fetch_add(part.len() as u64, Ordering::Relaxed);
                Some((Ok(part), (parts, ready)))
            }
        });
        let stream = if stalls {
            stream.take(1).chain(futures::stream::pending()).boxed()
        } else {
            stream.boxed()
        };
        let payload = GetResultPayload::Stream(stream);
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let mut out = Vec::new();
        for range in ranges {
            let options = GetOptions { range: Some(range.clone().into()), ..GetOptions::default() };
            out.push(self.get_opts(at, options).await?.bytes().await?);
        }
        Ok(out)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
