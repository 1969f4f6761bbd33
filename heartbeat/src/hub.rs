//! Between placers and the fleet: the feed out, reports in, drains to the shards.
//!
//! One task owns the subscriptions and the quarantine. Feed datagrams leave from the first receiver's socket, so that
//! they come from the address that placers send to.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use heartbeat_core::{
    Drain, KeyRing,
    feed::{Cursor, Subscriptions},
    quarantine::{Act, Quarantine},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use wire::{CapacityWord, HostId, report::FailureReport};
use wire_net::udp::Sender;

use crate::{
    receiver::Event,
    shards::{Ask, Clock, Shards, wall_ms},
    store::{Store, StoreError},
};

/// Entries of a snapshot that one placer gets a tick: a million hosts take about 5 s.
const PIECE: usize = 4_096;
const TICK: Duration = Duration::from_millis(20);

/// Figures that other tasks read.
#[derive(Debug, Default)]
pub(crate) struct HubFigures {
    pub(crate) subscribers: AtomicU64,
    pub(crate) feed_entries: AtomicU64,
    pub(crate) reports: AtomicU64,
    pub(crate) reports_replayed: AtomicU64,
    pub(crate) quarantined: AtomicU64,
    pub(crate) quarantine_capped: AtomicU64,
    /// Hosts of the last census: what the quarantine's cap is a share of.
    pub(crate) hosts: AtomicU64,
}

pub(crate) struct Hub {
    pub(crate) shards: Shards,
    pub(crate) clock: Clock,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) quarantine: Quarantine,
    pub(crate) keys: watch::Receiver<KeyRing>,
    pub(crate) sender: Sender,
    pub(crate) figures: Arc<HubFigures>,
}

impl Hub {
    /// Runs until `stop`.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut news: mpsc::Receiver<Vec<(HostId, CapacityWord)>>,
        stop: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut polled_ms = 0;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(event) = events.recv() => self.take_event(event).await,
                Some(entries) = news.recv() => self.say(&entries),
                _ = tick.tick() => {
                    self.say_pieces().await;
                    let now_ms = self.clock.now_ms();
                    if now_ms >= polled_ms + 500 {
                        polled_ms = now_ms;
                        self.poll(now_ms).await;
                    }
                }
            }
        }
    }

    async fn take_event(&mut self, event: Event) {
        let now_ms = self.clock.now_ms();
        match event {
            Event::Report { placer, report } => self.take_report(now_ms, placer, report).await,
            Event::Subscribe { placer, addr, key_epoch, subscribe } => {
                let Self { subscriptions, keys, sender, .. } = self;
                let keys = keys.borrow();
                let due = subscriptions
                    .handle_subscribe(now_ms, placer, addr, key_epoch, &subscribe, &keys);
                if due {
                    subscriptions.greet(placer, |to, bytes| drop(sender.push(bytes, to)));
                    let _ = sender.flush();
                }
            }
        }
    }

    async fn take_report(&mut self, now_ms: u64, placer: u64, report: FailureReport) {
        if !self.quarantine.admit(placer, &report) {
            return;
        }
        self.figures.reports.fetch_add(1, Ordering::Relaxed);
        if report.about == FailureReport::CAPACITY {
            self.shards.tell_host(report.host, Ask::Correct(report.host, report.word)).await;
            return;
        }
        let total = self.figures.hosts.load(Ordering::Relaxed);
        let act = self.quarantine.handle_report(now_ms, total, placer, report.host);
        if let Some(act) = act {
            self.act(act).await;
        }
    }

    async fn act(&mut self, act: Act) {
        let (host, ask) = match act {
            Act::Suspect(host) => (host, Ask::Suspect(host, true)),
            Act::Clear(host) => (host, Ask::Suspect(host, false)),
            Act::Quarantine(host) => {
                tracing::warn!(%host, "quarantined: several placers reported that launches fail");
                (host, Ask::Quarantine(host, true))
            }
            Act::Release(host) => {
                tracing::info!(%host, "quarantine over: it is tried again");
                (host, Ask::Quarantine(host, false))
            }
        };
        self.shards.tell_host(host, ask).await;
    }

    fn say(&mut self, entries: &[(HostId, CapacityWord)]) {
        let Self { subscriptions, sender, figures, .. } = self;
        if subscriptions.is_empty() {
            return;
        }
        subscriptions.say(entries, |to, bytes| drop(sender.push(bytes, to)));
        let _ = sender.flush();
        figures.feed_entries.fetch_add(entries.len() as u64, Ordering::Relaxed);
    }

    async fn say_pieces(&mut self) {
        let wanted: Vec<_> = self.subscriptions.snapshots().collect();
        for (placer, cursor) in wanted {
            let (words, next) = self.shards.words(cursor.shard, cursor.record, PIECE).await;
            let next = match next {
                Some(record) => Some(Cursor { record, ..cursor }),
                None if cursor.shard + 1 < self.shards.len() => {
                    Some(Cursor { shard: cursor.shard + 1, record: 0 })
                }
                None => None,
            };
            let Self { subscriptions, sender, .. } = self;
            subscriptions.say_piece(placer, &words, next, |to, bytes| drop(sender.push(bytes, to)));
        }
        let _ = self.sender.flush();
    }

    async fn poll(&mut self, now_ms: u64) {
        self.subscriptions.poll(now_ms);
        let mut acts = Vec::new();
        self.quarantine.poll(now_ms, &mut acts);
        for act in acts {
            self.act(act).await;
        }
        let figures = &self.figures;
        figures.subscribers.store(self.subscriptions.len() as u64, Ordering::Relaxed);
        figures.quarantined.store(self.quarantine.len(), Ordering::Relaxed);
        figures.quarantine_capped.store(self.quarantine.capped, Ordering::Relaxed);
        figures.reports_replayed.store(self.quarantine.replayed, Ordering::Relaxed);
    }
}

/// The drains of the fleet: durable in the store, known to every shard.
pub struct Drains {
    store: Arc<dyn Store>,
    shards: Shards,
    clock: Clock,
    known: Mutex<BTreeMap<HostId, Drain>>,
}

impl Drains {
    pub(crate) fn new(store: Arc<dyn Store>, shards: Shards, clock: Clock) -> Self {
        Self { store, shards, clock, known: Mutex::new(BTreeMap::new()) }
    }

    /// What is known of them now.
    #[must_use]
    pub fn known(&self) -> BTreeMap<HostId, Drain> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts one. When this returns it is durable, and this aggregator's feed and directives say so.
    ///
    /// # Errors
    /// [`StoreError`]: it may be durable or not; asking again is safe.
    pub async fn set(&self, drain: Drain) -> Result<(), StoreError> {
        self.store.set_drain(&drain).await?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(drain.host, drain);
        self.apply().await;
        Ok(())
    }

    /// Ends one.
    ///
    /// # Errors
    /// [`StoreError`]: it may have ended or not; asking again is safe.
    pub async fn clear(&self, host: HostId) -> Result<(), StoreError> {
        self.store.clear_drain(host).await?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&host);
        self.apply().await;
        Ok(())
    }

    /// Reads them all: at the start, and to hear of those that other aggregators took.
    ///
    /// # Errors
    /// [`StoreError`]: what was known stays.
    pub async fn reload(&self) -> Result<(), StoreError> {
        let drains = self.store.drains().await?;
        let drains = drains.into_iter().map(|drain| (drain.host, drain)).collect();
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = drains;
        self.apply().await;
        Ok(())
    }

    async fn apply(&self) {
        let (now_ms, wall_ms) = (self.clock.now_ms(), wall_ms());
        let wanted: BTreeMap<HostId, Option<u64>> = self
            .known()
            .into_iter()
            .map(|(host, drain)| {
                let end_ms = drain.since_ms.saturating_add(drain.deadline_ms);
                let left_ms = end_ms.saturating_sub(wall_ms).min(drain.deadline_ms);
                (host, (drain.deadline_ms > 0).then_some(now_ms + left_ms))
            })
            .collect();
        // Done means that the next heartbeat is answered by it: so it is waited for.
        self.shards.ask_all(|done| Ask::Drains(wanted.clone(), done)).await;
    }
}
