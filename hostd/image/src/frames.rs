//! Frames by hash: out of memory, else off the disk, else from storage, and only with the right hash.
//!
//! A frame is fetched once however many wait for it, and frames that lie together in a pack come by one GET. A GET that is
//! slower than 95 of 100 before it gets a twin, and the first answer wins. What fails is an error to all who wait, and is
//! not remembered: the next reader tries again.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Either, Shared};
use object_store::ObjectStoreExt;
use tokio::runtime::Handle;

use crate::disk::{DiskFrames, DiskLook};
use crate::id::Hash;
use crate::index::{Damaged, FrameRef};
use crate::lru::Lru;
use crate::metrics::{Counters, Latencies, count, count_bytes};
use crate::store::{DomainStore, ImageError, pack_path, runs, unpack_frame};

/// Where a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameAt {
    pub(crate) pack: Hash,
    pub(crate) frame: FrameRef,
}

type Fetched = Result<Arc<Vec<Bytes>>, Arc<ImageError>>;

/// A GET that is under way.
type Run = Shared<BoxFuture<'static, Fetched>>;

/// Which frame of a GET is meant.
#[derive(Clone)]
struct Flight {
    run: Run,
    nth: usize,
}

/// The frames of a domain.
pub(crate) struct Frames {
    at: DomainStore,
    disk: DiskFrames,
    memory: Mutex<Lru<Bytes>>,
    memory_bytes_max: u64,
    flights: Mutex<HashMap<Hash, Flight>>,
    latencies: Mutex<Latencies>,
    pub(crate) counters: Counters,
    runtime: Handle,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole between any two statements that hold them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Frames {
    pub(crate) fn new(
        at: DomainStore,
        disk: DiskFrames,
        memory_bytes_max: u64,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new(Self {
            at,
            disk,
            memory: Mutex::default(),
            memory_bytes_max,
            flights: Mutex::default(),
            latencies: Mutex::new(Latencies::new()),
            counters: Counters::default(),
            runtime,
        })
    }

    pub(crate) fn at(&self) -> &DomainStore {
        &self.at
    }

    /// Learns which frames are on disk.
    pub(crate) fn scan_disk(&self) -> std::io::Result<()> {
        self.disk.scan()
    }

    pub(crate) fn disk_bytes(&self) -> u64 {
        self.disk.bytes()
    }

    /// The frame if no storage has to be asked.
    fn look(&self, frame: &FrameRef) -> Option<Bytes> {
        if let Some(bytes) = lock(&self.memory).get(&frame.hash) {
            count(&self.counters.frames_memory);
            return Some(bytes.clone());
        }
        match self.disk.read(&frame.hash, frame.bytes) {
            DiskLook::Found(bytes) => {
                count(&self.counters.frames_disk);
                self.remember(frame.hash, bytes.clone());
                Some(bytes)
            }
            DiskLook::Absent => None,
            DiskLook::Damaged => {
                count(&self.counters.frames_disk_damaged);
                None
            }
        }
    }

    fn remember(&self, hash: Hash, bytes: Bytes) {
        let mut memory = lock(&self.memory);
        let weight = bytes.len() as u64;
        while memory.pop_over(self.memory_bytes_max, weight).is_some() {}
        memory.insert(hash, weight, bytes);
    }

    /// Frames in the order in which they are asked for.
    pub(crate) async fn get_all(
        self: &Arc<Self>,
        wanted: &[FrameAt],
    ) -> Result<Vec<Bytes>, Arc<ImageError>> {
        let mut out: Vec<Option<Bytes>> = wanted.iter().map(|at| self.look(&at.frame)).collect();
        let missing = wanted.iter().zip(&out).filter(|(_, got)| got.is_none());
        let flights = self.start(missing.map(|(at, _)| *at).collect());
        for (at, got) in wanted.iter().zip(&mut out).filter(|(_, got)| got.is_none()) {
            let flight = flights.get(&at.frame.hash).cloned();
            let flight =
                flight.ok_or_else(|| Arc::new(Damaged("a frame without a flight").into()))?;
            *got = Some(flight.run.await?[flight.nth].clone());
        }
        Ok(out.into_iter().flatten().collect())
    }

    /// Starts to fetch those that are neither here nor on their way.
    pub(crate) fn prefetch(self: &Arc<Self>, wanted: &[FrameAt]) {
        self.start(wanted.iter().filter(|at| self.look(&at.frame).is_none()).copied().collect());
    }

    /// The flights of frames that are not here, begun if they are not under way.
    fn start(self: &Arc<Self>, wanted: Vec<FrameAt>) -> HashMap<Hash, Flight> {
        let (flights, begun) = self.flights_for(wanted);
        for run in begun {
            // The request goes out from this thread: a hop to another takes as long as unpacking a frame. What does not come
            // at once lands on the runtime, even when who asked for it is gone.
            if run.clone().now_or_never().is_none() {
                self.runtime.spawn(run);
            }
        }
        flights
    }

    /// Flights of these frames, and the runs of those that are new.
    fn flights_for(
        self: &Arc<Self>,
        mut wanted: Vec<FrameAt>,
    ) -> (HashMap<Hash, Flight>, Vec<Run>) {
        if wanted.is_empty() {
            return Default::default();
        }
        let mut flights = lock(&self.flights);
        let known = |at: &FrameAt| Some((at.frame.hash, flights.get(&at.frame.hash)?.clone()));
        let mut found: HashMap<_, _> = wanted.iter().filter_map(known).collect();
        wanted.retain(|at| !found.contains_key(&at.frame.hash));
        wanted.sort_unstable_by_key(|at| (at.pack, at.frame.offset));
        wanted.dedup_by_key(|at| at.frame.hash);
        let mut begun = Vec::new();
        // Ordinals of packs are an image's own; the runs are cut per pack hash.
        for of_pack in wanted.chunk_by(|a, b| a.pack == b.pack) {
            let frames: Vec<FrameRef> =
                of_pack.iter().map(|at| FrameRef { pack: 0, ..at.frame }).collect();
            for run in runs(&frames) {
                let (this, pack, run) = (self.clone(), of_pack[0].pack, run.to_vec());
                let hashes: Vec<Hash> = run.iter().map(|frame| frame.hash).collect();
                let fetch = AssertUnwindSafe(async move { this.fetch(pack, run).await });
                let lost = |_| Err(Arc::new(ImageError::from(Damaged("a fetch that panicked"))));
                let run = fetch.catch_unwind().map(move |done| done.unwrap_or_else(lost));
                let run = run.boxed().shared();
                for (nth, hash) in hashes.into_iter().enumerate() {
                    let flight = Flight { run: run.clone(), nth };
                    flights.insert(hash, flight.clone());
                    found.insert(hash, flight);
                }
                begun.push(run);
            }
        }
        (found, begun)
    }

    /// Fetches frames that lie one after another, checks them, and keeps them.
    async fn fetch(self: Arc<Self>, pack: Hash, run: Vec<FrameRef>) -> Fetched {
        let got = self.fetch_checked(&pack, &run).await;
        if let Ok(frames) = &got {
            for (frame, bytes) in run.iter().zip(frames) {
                count(&self.counters.frames_fetched);
                self.remember(frame.hash, bytes.clone());
            }
        }
        {
            // After they are remembered: who finds no flight finds the frame.
            let mut flights = lock(&self.flights);
            run.iter().for_each(|frame| {
                flights.remove(&frame.hash);
            });
        }
        let frames = Arc::new(got.map_err(Arc::new)?);
        self.keep_on_disk(run, frames.clone());
        Ok(frames)
    }

    /// Writes behind: a reader does not wait for the disk.
    fn keep_on_disk(self: &Arc<Self>, run: Vec<FrameRef>, frames: Arc<Vec<Bytes>>) {
        let this = self.clone();
        self.runtime.spawn_blocking(move || {
            for (frame, bytes) in run.iter().zip(frames.iter()) {
                if this.disk.write(&frame.hash, bytes).is_err() {
                    count(&this.counters.disk_write_failures);
                }
            }
        });
    }

    async fn fetch_checked(&self, pack: &Hash, run: &[FrameRef]) -> Result<Vec<Bytes>, ImageError> {
        let start = u64::from(run[0].offset);
        let end = run.iter().fold(start, |end, frame| end + u64::from(frame.stored));
        let got = self.get_hedged(pack, start..end).await.map_err(ImageError::Store)?;
        count_bytes(&self.counters.bytes_fetched, got.len());
        let mut at = 0;
        let mut out = Vec::with_capacity(run.len());
        for frame in run {
            let next = at + frame.stored as usize;
            let stored = got.get(at..next).ok_or(Damaged("a pack that breaks off"))?;
            out.push(unpack_frame(&self.at.domain, frame, stored)?);
            at = next;
        }
        Ok(out)
    }

    async fn get_once(&self, pack: &Hash, range: Range<u64>) -> object_store::Result<Bytes> {
        count(&self.counters.gets);
        let started = Instant::now();
        let got = self.at.store.get_range(&pack_path(pack), range).await;
        if got.is_ok() {
            lock(&self.latencies).add(started);
        }
        got
    }

    /// One GET, and a second one when the first is slow. An error of one waits for the other.
    async fn get_hedged(&self, pack: &Hash, range: Range<u64>) -> object_store::Result<Bytes> {
        let patience = lock(&self.latencies).hedge_after();
        let first = Box::pin(self.get_once(pack, range.clone()));
        let first =
            match futures::future::select(first, Box::pin(tokio::time::sleep(patience))).await {
                Either::Left((got, _)) => return got,
                Either::Right(((), first)) => first,
            };
        count(&self.counters.gets_hedged);
        let second = Box::pin(self.get_once(pack, range));
        match futures::future::select(first, second).await {
            Either::Left((Ok(got), _)) | Either::Right((Ok(got), _)) => Ok(got),
            Either::Left((Err(_), second)) => second.await,
            Either::Right((Err(_), first)) => first.await,
        }
    }
}
