//! The publisher: leads if the lease is ours, and puts the map into the object store.
//!
//! Pages first, then the head by compare-and-swap (PROTOCOL 5.1, 5.2). What each outcome means is decided in
//! `heartbeat_core::leader`. A map is built when hosts came, went or moved, and at least once a minute, so that the
//! head's age tells whether anybody publishes. Pages that no head has named for ten minutes are deleted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use heartbeat_core::{
    leader::{LEASE_MS, Leader, Put, Want},
    map::{Built, MapBuilder, NewPage},
};
use rand::{TryRngCore as _, rngs::OsRng};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use wire::{
    limits::{DEAD_AFTER_INTERVALS, HEARTBEAT_INTERVAL_MS},
    map::{Digest, Head, MapVersion, Page, PageRef, path},
};
use wire_net::objects::{
    self, Swap, UpdateVersion,
    object_store::{ObjectStore, ObjectStoreExt as _, path::Path},
};

use crate::{
    shards::{Clock, Shards, wall_ms},
    store::Store,
};

/// A head is written again after this even if nothing changed.
const REPUBLISH_MS: u64 = 60_000;
/// A page is deleted when no head has named it for so long: readers of an old head have it by then.
const KEEP_PAGES_MS: u64 = 600_000;
/// For so long after its start an aggregator publishes no map that has lost more of its hosts than the brake allows: its
/// store may be new or empty while the fleet is not. By then every host that lives has spoken several times.
const SETTLE_MS: u64 = DEAD_AFTER_INTERVALS * HEARTBEAT_INTERVAL_MS;
/// Pages on their way at once, to the object store or from it.
const PAGES: usize = 16;

/// Figures that other tasks read.
#[derive(Debug, Default)]
pub(crate) struct PublishFigures {
    pub(crate) epoch: AtomicU64,
    pub(crate) version: AtomicU64,
    pub(crate) hosts: AtomicU64,
    pub(crate) published: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) unknown: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) leads: AtomicU64,
    pub(crate) build_ms: AtomicU64,
    pub(crate) put_ms: AtomicU64,
}

pub(crate) struct Publisher {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) objects: Arc<dyn ObjectStore>,
    pub(crate) shards: Shards,
    pub(crate) clock: Clock,
    pub(crate) aggregator: u64,
    pub(crate) publish_ms: u64,
    pub(crate) brake_percent: u64,
    pub(crate) leads: watch::Sender<bool>,
    /// When the scanner's last complete look at the store began, and how it is asked for one at once.
    pub(crate) looked_ms: watch::Receiver<u64>,
    pub(crate) hurry: Arc<Notify>,
    pub(crate) figures: Arc<PublishFigures>,
}

/// What this publisher knows of what is published.
#[derive(Default)]
struct Known {
    leader: Leader<UpdateVersion>,
    builder: MapBuilder,
    pages: Vec<PageRef>,
    membership: Option<u64>,
    published_ms: u64,
    looked_ms: u64,
    proposed: Option<(Vec<PageRef>, u64)>,
    retired: BTreeMap<Digest, u64>,
    /// The version whose hosts were taken.
    listed: Option<MapVersion>,
}

impl Publisher {
    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut known = Known::default();
        loop {
            let pause = tokio::select! {
                () = stop.cancelled() => return,
                pause = self.step(&mut known) => pause,
            };
            let leads = known.leader.leads(self.clock.now_ms());
            let changed = self.leads.send_if_modified(|led| std::mem::replace(led, leads) != leads);
            self.figures.leads.store(u64::from(leads), Ordering::Relaxed);
            self.figures.lost.store(known.leader.lost, Ordering::Relaxed);
            self.figures.unknown.store(known.leader.unknown, Ordering::Relaxed);
            if changed {
                tracing::info!(leads, "publishing");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Does one thing; returns how long to rest.
    async fn step(&self, known: &mut Known) -> Duration {
        let now_ms = self.clock.now_ms();
        match known.leader.poll(now_ms) {
            Want::Lease => {
                let held = self.lease().await;
                known.leader.handle_lease(now_ms, self.clock.now_ms(), held);
                Duration::ZERO
            }
            Want::Head => {
                self.read_head(known).await;
                Duration::ZERO
            }
            Want::Scan => self.look(known).await,
            Want::Publish => self.propose(known, now_ms).await,
            Want::Put { head, expected } => {
                self.put(known, &head, expected).await;
                Duration::ZERO
            }
            Want::Wait(until_ms) => {
                Duration::from_millis(until_ms.saturating_sub(now_ms).clamp(1, 1_000))
            }
        }
    }

    async fn lease(&self) -> Option<bool> {
        let asked = self.store.lease(self.aggregator, LEASE_MS);
        match tokio::time::timeout(Duration::from_millis(LEASE_MS / 4), asked).await {
            Ok(Ok(held)) => Some(held),
            Ok(Err(error)) => {
                tracing::debug!(%error, "the lease was not asked for");
                None
            }
            Err(_) => None,
        }
    }

    async fn read_head(&self, known: &mut Known) {
        let read = objects::read(&*self.objects, &Path::from(path::HEAD)).await;
        let now_ms = self.clock.now_ms();
        let found = match read {
            Ok(found) => found,
            Err(fault) => {
                tracing::warn!(%fault, "the map's head was not read");
                self.figures.failed.fetch_add(1, Ordering::Relaxed);
                return known.leader.handle_head(now_ms, Err(()));
            }
        };
        let Some((bytes, token)) = found else {
            return known.leader.handle_head(now_ms, Ok(None));
        };
        match Head::from_bytes(&bytes) {
            Ok(head) => {
                known.leader.handle_head(now_ms, Ok(Some((&head, token))));
                if known.leader.published_here()
                    && let Some((_, membership)) = known.proposed.take()
                {
                    known.membership = Some(membership);
                    self.note_published(known, now_ms, head.version, head.count);
                }
                known.builder.handle_published(&head.pages);
                known.pages = head.pages;
            }
            Err(error) => {
                // Never written over: whoever broke it may hold the newest version.
                tracing::error!(%error, "the map's head is broken: nothing is published until it is removed");
                self.figures.failed.fetch_add(1, Ordering::Relaxed);
                known.leader.handle_head(now_ms, Err(()));
            }
        }
    }

    /// Learns of every host before the first publication over another's head: those that the head names, whose pages are
    /// read once, and all rows of the store. Nothing is published before, however long the store is away.
    async fn look(&self, known: &mut Known) -> Duration {
        if known.listed != known.leader.version() {
            let pages = known.pages.clone();
            let reads = stream::iter(pages).map(|named| self.take_page(named));
            if let Err(error) = reads.buffer_unordered(PAGES).try_collect::<()>().await {
                tracing::warn!(%error, "a page of the map was not read; nothing is published yet");
                self.figures.failed.fetch_add(1, Ordering::Relaxed);
                return Duration::from_millis(500);
            }
            known.listed = known.leader.version();
        }
        if known.leader.handle_scan(*self.looked_ms.borrow()) {
            return Duration::ZERO;
        }
        self.hurry.notify_one();
        Duration::from_millis(20)
    }

    async fn take_page(&self, named: PageRef) -> Result<(), objects::object_store::Error> {
        let at = Path::from(path::page(&named.digest));
        let bytes = match self.objects.get(&at).await {
            Ok(found) => found.bytes().await?,
            // Waiting does not bring it back. Its hosts are in the store, or speak within an interval.
            Err(objects::object_store::Error::NotFound { .. }) => {
                tracing::error!(page = %at, "a page that the map names is gone");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match Page::parse(&bytes, &named) {
            Ok(page) => self.shards.list(page.hosts()).await,
            Err(error) => {
                tracing::error!(page = %at, %error, "a page that the map names is broken")
            }
        }
        Ok(())
    }

    async fn propose(&self, known: &mut Known, now_ms: u64) -> Duration {
        let due_ms = known.looked_ms + self.publish_ms;
        if known.looked_ms > 0 && now_ms < due_ms {
            return Duration::from_millis((due_ms - now_ms).min(1_000));
        }
        known.looked_ms = now_ms.max(1);
        let membership = self.membership().await;
        let old = now_ms >= known.published_ms + REPUBLISH_MS;
        if known.membership == Some(membership) && known.leader.published_here() && !old {
            return Duration::ZERO;
        }
        let began = Instant::now();
        let hosts = self.shards.addresses().await;
        let mut builder = std::mem::take(&mut known.builder);
        let built = tokio::task::spawn_blocking(move || {
            let built = builder.build(&hosts);
            (builder, built)
        });
        let Ok((builder, built)) = built.await else { return Duration::from_secs(1) };
        known.builder = builder;
        self.figures.build_ms.store(millis(began), Ordering::Relaxed);
        let built = match built {
            Ok(built) => built,
            Err(error) => {
                tracing::error!(%error, "no map was built");
                self.figures.failed.fetch_add(1, Ordering::Relaxed);
                return Duration::from_secs(1);
            }
        };
        if built.pages == known.pages && known.leader.published_here() && !old {
            known.membership = Some(membership);
            return Duration::ZERO;
        }
        let before: u64 = known.pages.iter().map(|page| u64::from(page.count)).sum();
        let shrunk = built.count * 100 < before * (100 - self.brake_percent);
        if shrunk && now_ms < SETTLE_MS {
            tracing::warn!(before, now = built.count, "brake: the map waits for hosts to speak");
            return Duration::from_secs(1);
        }
        self.put_pages(known, built, membership).await
    }

    async fn membership(&self) -> u64 {
        self.shards.figures().await.iter().map(|figures| figures.membership).sum()
    }

    async fn put_pages(&self, known: &mut Known, built: Built, membership: u64) -> Duration {
        let began = Instant::now();
        let names: BTreeSet<Digest> = built.pages.iter().map(|page| page.digest).collect();
        known.retired.retain(|digest, _| !names.contains(digest));
        let puts = stream::iter(built.new).map(|page| self.put_page(page)).buffer_unordered(PAGES);
        let puts: Vec<Result<(), _>> = puts.collect().await;
        let failed = puts.iter().filter(|put| put.is_err()).count();
        if let Some(Err(error)) = puts.iter().find(|put| put.is_err()) {
            tracing::warn!(%error, failed, "pages were not put; the map stays as it was");
            self.figures.failed.fetch_add(1, Ordering::Relaxed);
            return Duration::from_millis(500);
        }
        self.figures.put_ms.store(millis(began), Ordering::Relaxed);
        let mut nonce = [0; 16];
        if OsRng.try_fill_bytes(&mut nonce).is_err() {
            return Duration::from_secs(1);
        }
        let pages = built.pages.clone();
        if known.leader.propose(built.pages, built.count, nonce, wall_ms()).is_some() {
            known.proposed = Some((pages, membership));
        }
        Duration::ZERO
    }

    async fn put_page(&self, page: NewPage) -> Result<(), objects::object_store::Error> {
        let at = Path::from(path::page(&page.digest));
        self.objects.put(&at, page.bytes.into()).await.map(drop)
    }

    async fn put(&self, known: &mut Known, head: &Head, expected: Option<UpdateVersion>) {
        let at = Path::from(path::HEAD);
        let put = match objects::swap(&*self.objects, &at, expected, head.to_bytes().into()).await {
            Ok(Swap::Won(token)) => Put::Won(token),
            Ok(Swap::Lost) => Put::Lost,
            Err(unknown) => {
                tracing::warn!(%unknown, "the head's PUT has no outcome; it is read again");
                Put::Unknown
            }
        };
        let now_ms = self.clock.now_ms();
        let won = known.leader.handle_put(now_ms, put);
        if let Some(version) = won
            && let Some((pages, membership)) = known.proposed.take()
        {
            self.retire(known, &pages, now_ms).await;
            known.builder.handle_published(&pages);
            (known.pages, known.membership) = (pages, Some(membership));
            self.note_published(known, now_ms, version, head.count);
        }
    }

    fn note_published(&self, known: &mut Known, now_ms: u64, version: MapVersion, count: u64) {
        known.published_ms = now_ms;
        self.figures.epoch.store(version.epoch, Ordering::Relaxed);
        self.figures.version.store(version.version, Ordering::Relaxed);
        self.figures.hosts.store(count, Ordering::Relaxed);
        self.figures.published.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(epoch = version.epoch, version = version.version, count, "map published");
    }

    /// Notes pages that the new head does not name, and deletes those that none has named for long.
    async fn retire(&self, known: &mut Known, pages: &[PageRef], now_ms: u64) {
        let names: BTreeSet<Digest> = pages.iter().map(|page| page.digest).collect();
        for page in known.pages.iter().filter(|page| !names.contains(&page.digest)) {
            known.retired.entry(page.digest).or_insert(now_ms);
        }
        let old: Vec<Digest> = known
            .retired
            .iter()
            .filter(|&(_, &since_ms)| since_ms + KEEP_PAGES_MS <= now_ms)
            .map(|(digest, _)| *digest)
            .take(PAGES)
            .collect();
        for digest in old {
            // One that stays costs 48 KiB and nothing else.
            let _ = self.objects.delete(&Path::from(path::page(&digest))).await;
            known.retired.remove(&digest);
        }
    }
}

fn millis(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}
