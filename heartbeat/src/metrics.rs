//! `/metrics`: figures of all parts, gathered when they are asked for once a second.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use prometheus_client::{
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio_util::sync::CancellationToken;

use crate::{
    hub::HubFigures,
    publisher::PublishFigures,
    recorded::RecordFigures,
    scanner::ScanFigures,
    shards::{Figures, Shards},
};

type What = [(&'static str, &'static str); 1];
type Gauges = Family<What, Gauge>;

/// Everything that this role tells.
pub(crate) struct Metrics {
    pub(crate) registry: Arc<Registry>,
    datagrams: Gauges,
    hosts: Gauges,
    store: Gauges,
    feed: Gauges,
    map: Gauges,
    records: Gauges,
}

/// Where the figures are.
#[derive(Clone)]
pub(crate) struct Sources {
    pub(crate) shards: Shards,
    pub(crate) hub: Arc<HubFigures>,
    pub(crate) scan: Arc<ScanFigures>,
    pub(crate) publish: Arc<PublishFigures>,
    pub(crate) records_kept: Arc<RecordFigures>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("volley_heartbeatd");
        let mut family = |name: &str, help: &str| {
            let family = Gauges::default();
            registry.register(name, help, family.clone());
            family
        };
        let (datagrams, hosts, store, feed, map, records) = (
            family("datagrams", "Datagrams since the start, by what became of them"),
            family("hosts", "Hosts by standing, and what their records take"),
            family("store", "Rows that wait, and how the store does"),
            family("feed", "Placers that are fed, what they were sent and what they reported"),
            family("map", "The map that was published here last"),
            family(
                "sandbox_records",
                "Records of sandboxes since the start, by what became of them",
            ),
        );
        Self { registry: Arc::new(registry), datagrams, hosts, store, feed, map, records }
    }

    /// Keeps the figures fresh until `stop`.
    pub(crate) async fn run(self, sources: Sources, stop: CancellationToken) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let shards = sources.shards.figures().await;
            self.set_shards(&shards);
            self.set_others(&sources);
        }
    }

    fn set_shards(&self, shards: &[Figures]) {
        let sum = |figure: fn(&Figures) -> u64| shards.iter().map(figure).sum::<u64>();
        for (what, value) in [
            ("accepted", sum(|f| f.counters.accepted)),
            ("registered", sum(|f| f.counters.registered)),
            ("late", sum(|f| f.counters.late)),
            ("replayed", sum(|f| f.counters.replayed)),
            ("stale", sum(|f| f.counters.stale)),
            ("malformed", sum(|f| f.counters.malformed)),
            ("unexpected", sum(|f| f.counters.unexpected)),
            ("unknown_epoch", sum(|f| f.counters.unknown_epoch)),
            ("forged", sum(|f| f.counters.forged)),
            ("revoked", sum(|f| f.counters.revoked)),
            ("full", sum(|f| f.counters.full)),
            ("directives_sent", sum(|f| f.counters.directives)),
            ("from_placers", sum(|f| f.counters.placers)),
            ("records", sum(|f| f.counters.records)),
            ("placers_dropped", sum(|f| f.events_lost)),
            ("handed_on", sum(|f| f.handed_on)),
            ("relayed", sum(|f| f.relayed)),
            ("from_peers", sum(|f| f.counters.relayed)),
            ("relays_held_back", sum(|f| f.held_back)),
            ("kernel_dropped", sum(|f| f.kernel_drops)),
            ("receive_buffer_bytes", sum(|f| f.rcvbuf_bytes)),
        ] {
            set(&self.datagrams, what, value);
        }
        set(&self.hosts, "held", sum(|f| f.hosts));
        set(&self.hosts, "record_bytes", sum(|f| f.bytes));
        set(&self.store, "rows_waiting", sum(|f| f.dirty));
        set(&self.store, "batches_failed_in_a_row", sum(|f| f.flush_failures));
    }

    fn set_others(&self, sources: &Sources) {
        let load = |figure: &std::sync::atomic::AtomicU64| figure.load(Ordering::Relaxed);
        let Sources { hub, scan, publish, records_kept, .. } = sources;
        for (what, figure) in [
            ("heard", &records_kept.heard),
            ("refused", &records_kept.refused),
            ("dropped", &records_kept.dropped),
            ("written", &records_kept.written),
            ("failed", &records_kept.failed),
        ] {
            set(&self.records, what, load(figure));
        }
        set(&self.hosts, "alive", load(&scan.alive));
        set(&self.hosts, "suspect", load(&scan.suspect));
        set(&self.hosts, "draining", load(&scan.draining));
        set(&self.hosts, "silent", load(&scan.silent));
        set(&self.hosts, "old_key", load(&scan.old_key));
        set(&self.hosts, "removed", load(&scan.removed));
        set(&self.hosts, "brake", u64::from(scan.brake.load(Ordering::Relaxed)));
        set(&self.hosts, "quarantined", load(&hub.quarantined));
        set(&self.hosts, "quarantine_capped", load(&hub.quarantine_capped));
        set(&self.store, "away", u64::from(scan.store_away.load(Ordering::Relaxed)));
        set(&self.store, "scan_ms", load(&scan.scan_ms));
        set(&self.feed, "subscribers", load(&hub.subscribers));
        set(&self.feed, "entries", load(&hub.feed_entries));
        set(&self.feed, "reports", load(&hub.reports));
        set(&self.feed, "reports_replayed", load(&hub.reports_replayed));
        for (what, figure) in [
            ("epoch", &publish.epoch),
            ("version", &publish.version),
            ("hosts", &publish.hosts),
            ("published", &publish.published),
            ("puts_lost", &publish.lost),
            ("puts_unknown", &publish.unknown),
            ("leads", &publish.leads),
            ("failed", &publish.failed),
            ("build_ms", &publish.build_ms),
            ("put_ms", &publish.put_ms),
        ] {
            set(&self.map, what, load(figure));
        }
    }
}

fn set(gauges: &Gauges, what: &'static str, value: u64) {
    gauges.get_or_create(&[("what", what)]).set(i64::try_from(value).unwrap_or(i64::MAX));
}
