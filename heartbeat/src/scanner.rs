//! The slow scan: what other aggregators heard, and who has been silent too long.
//!
//! Every aggregator forgets the dead of its own view; only the leader takes them out of the store. Rows of a shared
//! store are read part by part, so that a million of them neither stall the store nor this process.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use heartbeat_core::{
    KeyRing,
    liveness::{Liveness, Verdict},
    shard::upkeep::Silent,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use wire::{Code, Fault, HostId};

use crate::{
    hub::{Drains, HubFigures},
    shards::{Ask, Clock, Shards},
    store::{Store, StoreError},
};

/// Figures that other tasks read.
#[derive(Debug, Default)]
pub(crate) struct ScanFigures {
    pub(crate) alive: AtomicU64,
    pub(crate) suspect: AtomicU64,
    pub(crate) draining: AtomicU64,
    pub(crate) silent: AtomicU64,
    pub(crate) old_key: AtomicU64,
    pub(crate) removed: AtomicU64,
    pub(crate) brake: AtomicBool,
    pub(crate) store_away: AtomicBool,
    pub(crate) scan_ms: AtomicU64,
}

pub(crate) struct Scanner {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) shards: Shards,
    pub(crate) clock: Clock,
    pub(crate) liveness: Liveness,
    pub(crate) leads: watch::Receiver<bool>,
    pub(crate) figures: Arc<ScanFigures>,
    pub(crate) hub: Arc<HubFigures>,
    pub(crate) scan_ms: u64,
    /// When the last complete look at the store began.
    pub(crate) looked_ms: watch::Sender<u64>,
    /// Somebody waits for a look that begins now.
    pub(crate) hurry: Arc<Notify>,
}

/// Reads the whole store into the shards; how many rows there were.
pub(crate) async fn restore(store: &dyn Store, shards: &Shards) -> Result<usize, StoreError> {
    let mut rows = 0;
    for part in 0..store.scan_parts() {
        let read = store.scan(part).await?;
        rows += read.len();
        shards.restore(read).await;
    }
    Ok(rows)
}

impl Scanner {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let began_ms = self.clock.now_ms();
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.scan() => {}
            }
            // The leader's map needs what others hear; a scan has one page under way, which a store hardly feels. The
            // others look a quarter as often, and at once when they come to lead.
            let leads = *self.leads.borrow_and_update();
            let pause_ms = self.scan_ms.max(self.clock.now_ms() - began_ms);
            let pause_ms = if leads || !self.store.shared() { pause_ms } else { 4 * pause_ms };
            tokio::select! {
                () = stop.cancelled() => return,
                Ok(()) = self.leads.changed() => {}
                () = self.hurry.notified() => {}
                () = tokio::time::sleep(Duration::from_millis(pause_ms)) => {}
            }
        }
    }

    async fn scan(&mut self) {
        if self.store.shared() {
            let began_ms = self.clock.now_ms();
            let read = restore(&*self.store, &self.shards).await;
            let now_ms = self.clock.now_ms();
            self.liveness.handle_scan(now_ms, read.is_ok());
            let was_away = self.figures.store_away.swap(read.is_err(), Ordering::Relaxed);
            if let Err(error) = &read
                && !was_away
            {
                tracing::warn!(%error, "the store was not scanned: nobody is called dead");
            }
            self.figures.scan_ms.store(now_ms - began_ms, Ordering::Relaxed);
            if read.is_ok() {
                self.looked_ms.send_replace(began_ms);
            }
        } else {
            self.looked_ms.send_replace(self.clock.now_ms());
        }
        let looked_ms = *self.looked_ms.borrow();
        let census = self.shards.census_of(looked_ms).await;
        let figures = &self.figures;
        self.hub.hosts.store(census.total, Ordering::Relaxed);
        figures.alive.store(census.alive, Ordering::Relaxed);
        figures.suspect.store(census.suspect, Ordering::Relaxed);
        figures.draining.store(census.draining, Ordering::Relaxed);
        figures.old_key.store(census.old_key, Ordering::Relaxed);
        figures.silent.store(census.silent.len() as u64, Ordering::Relaxed);
        let verdict = self.liveness.judge(self.clock.now_ms(), census);
        let was_braking = figures.brake.swap(self.liveness.alarm(), Ordering::Relaxed);
        match verdict {
            Verdict::Remove(silent) if !silent.is_empty() => self.remove(silent).await,
            Verdict::Brake { silent, total } if !was_braking => tracing::error!(
                silent,
                total,
                "brake: too many hosts are silent at once; nobody is removed"
            ),
            _ => {}
        }
    }

    async fn remove(&self, silent: Vec<Silent>) {
        let removed = self.shards.ask_all(|reply| Ask::Remove(silent.clone(), reply)).await;
        let removed: Vec<Silent> = removed.into_iter().flatten().collect();
        for silent in removed.iter().take(20) {
            tracing::info!(host = %silent.host, "dead: silent for too long; it leaves the map");
        }
        self.figures.removed.fetch_add(removed.len() as u64, Ordering::Relaxed);
        if *self.leads.borrow()
            && let Err(error) = self.store.remove(&removed).await
        {
            // They come back with the next scan, and leave again.
            tracing::warn!(%error, "the dead were not removed from the store");
        }
    }
}

/// Looks each second at what changes outside this process: keys, revoked hosts, drains of other aggregators.
pub(crate) struct Watcher {
    pub(crate) fleet: PathBuf,
    pub(crate) keys: watch::Sender<KeyRing>,
    pub(crate) shards: Shards,
    pub(crate) drains: Arc<Drains>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) revoked: BTreeSet<HostId>,
}

/// The fleet's keys, for an aggregator.
pub(crate) fn load_keys(fleet: &std::path::Path) -> Result<KeyRing, Fault> {
    let keys = wire_net::tls::load_fleet_keys(fleet)?;
    KeyRing::new(keys)
        .ok_or_else(|| Fault::new(Code::Config, format!("{} holds no fleet key", fleet.display())))
}

/// The hosts of `revoked`, one id a line; none if there is no such file.
pub(crate) fn load_revoked(fleet: &std::path::Path) -> Result<BTreeSet<HostId>, Fault> {
    let path = fleet.join("revoked");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => {
            return Err(Fault::new(Code::Config, format!("{}: {error}", path.display())));
        }
    };
    let lines = text.lines().map(str::trim).enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(at, line)| {
            line.parse().map_err(|_| {
                let said = format!("{}:{}: {line:?} is no host id", path.display(), at + 1);
                Fault::new(Code::Config, said)
            })
        })
        .collect()
}

impl Watcher {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => self.look().await,
            }
        }
    }

    pub(crate) async fn look(&mut self) {
        match load_keys(&self.fleet) {
            Ok(keys) if keys != *self.keys.borrow() => {
                tracing::info!(epoch = keys.target().0, "fleet keys changed");
                self.keys.send_replace(keys.clone());
                self.shards.tell_all(|| Ask::Keys(keys.clone())).await;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "fleet keys stay as they were"),
        }
        match load_revoked(&self.fleet) {
            Ok(revoked) if revoked != self.revoked => {
                let gone = self.shards.ask_all(|reply| Ask::Revoked(revoked.clone(), reply)).await;
                let gone: Vec<Silent> = gone.into_iter().flatten().collect();
                tracing::info!(revoked = revoked.len(), gone = gone.len(), "hosts are revoked");
                if let Err(error) = self.store.remove(&gone).await {
                    tracing::warn!(%error, "revoked hosts were not removed from the store");
                }
                self.revoked = revoked;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the list of revoked hosts stays as it was"),
        }
        if self.store.shared()
            && let Err(error) = self.drains.reload().await
        {
            tracing::debug!(%error, "drains stay as they were");
        }
    }
}
