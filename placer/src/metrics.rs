//! What a placer counts, under `/metrics`.
//!
//! Each dispatching thread has metrics of its own, told apart by a label, so that counting shares no cache line and no
//! lock between them.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// How a launch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Ended {
    /// It runs.
    Started,
    /// It was not started.
    Failed,
    /// Nobody knows.
    Unknown,
    /// It was not tried: a wrong request, a wrong tenant, too many at once.
    Denied,
    /// It was known already, and got the same answer.
    Known,
}

/// Labels of a thread's metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Thread {
    worker: u32,
}

/// Labels of launches.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Launches {
    worker: u32,
    outcome: Ended,
}

/// The metrics of all dispatching threads.
#[derive(Clone, Debug)]
pub struct WorkersMetrics {
    launches: Family<Launches, Counter>,
    attempts: Family<Thread, Counter>,
    refusals: Family<Thread, Counter>,
    calls: Family<Thread, Counter>,
    connections: Family<Thread, Gauge>,
    clients: Family<Thread, Gauge>,
    dials_failed: Family<Thread, Counter>,
    reports_dropped: Family<Thread, Counter>,
    latency: Family<Thread, Histogram>,
}

/// Of one dispatching thread.
#[derive(Clone, Debug)]
pub struct WorkerMetrics {
    /// Launches that run.
    pub started: Counter,
    /// Launches that were not started.
    pub failed: Counter,
    /// Launches of which nobody knows.
    pub unknown: Counter,
    /// Launches that were not tried.
    pub denied: Counter,
    /// Launches that were known already.
    pub known: Counter,
    /// Launches sent to hosts.
    pub attempts: Counter,
    /// Refusals of hosts.
    pub refusals: Counter,
    /// Calls passed on to hosts.
    pub calls: Counter,
    /// Connections to hosts.
    pub connections: Gauge,
    /// Connections from clients.
    pub clients: Gauge,
    /// Dials of hosts that failed.
    pub dials_failed: Counter,
    /// Reports dropped because the queue was full.
    pub reports_dropped: Counter,
    /// Seconds from a launch's arrival to its reply.
    pub latency: Histogram,
}

impl WorkersMetrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        fn family<M: Clone + Default>() -> Family<Thread, M> {
            Family::default()
        }
        let latency: fn() -> Histogram = || Histogram::new(exponential_buckets(0.000_1, 2.0, 18));
        let all = Self {
            launches: Family::default(),
            attempts: family(),
            refusals: family(),
            calls: family(),
            connections: family(),
            clients: family(),
            dials_failed: family(),
            reports_dropped: family(),
            latency: Family::new_with_constructor(latency),
        };
        registry.register("placer_launches", "Launches by outcome", all.launches.clone());
        let mut counter = |name: &str, help: &str, family: &Family<Thread, Counter>| {
            registry.register(name, help, family.clone());
        };
        counter("placer_attempts", "Launches sent to hosts", &all.attempts);
        counter("placer_refusals", "Launches that hosts refused", &all.refusals);
        counter("placer_calls", "Calls passed on to hosts", &all.calls);
        counter("placer_dials_failed", "Dials of hosts that failed", &all.dials_failed);
        counter("placer_reports_dropped", "Failure reports not sent", &all.reports_dropped);
        let connections = all.connections.clone();
        registry.register("placer_host_connections", "Connections to hosts", connections);
        let clients = all.clients.clone();
        registry.register("placer_client_connections", "Connections from clients", clients);
        let latency = all.latency.clone();
        registry.register("placer_launch_seconds", "From arrival to reply", latency);
        all
    }

    /// Those of one thread.
    #[must_use]
    pub fn worker(&self, index: usize) -> WorkerMetrics {
        let worker = u32::try_from(index).unwrap_or(u32::MAX);
        let thread = Thread { worker };
        let ended =
            |outcome| Counter::clone(&self.launches.get_or_create(&Launches { worker, outcome }));
        let counter =
            |family: &Family<Thread, Counter>| Counter::clone(&family.get_or_create(&thread));
        let gauge = |family: &Family<Thread, Gauge>| Gauge::clone(&family.get_or_create(&thread));
        WorkerMetrics {
            started: ended(Ended::Started),
            failed: ended(Ended::Failed),
            unknown: ended(Ended::Unknown),
            denied: ended(Ended::Denied),
            known: ended(Ended::Known),
            attempts: counter(&self.attempts),
            refusals: counter(&self.refusals),
            calls: counter(&self.calls),
            connections: gauge(&self.connections),
            clients: gauge(&self.clients),
            dials_failed: counter(&self.dials_failed),
            reports_dropped: counter(&self.reports_dropped),
            latency: Histogram::clone(&self.latency.get_or_create(&thread)),
        }
    }
}

/// Of the feed thread.
#[derive(Clone, Debug, Default)]
pub struct FeedMetrics {
    /// Words received.
    pub words: Counter,
    /// Datagrams lost on the way, by their sequence numbers.
    pub lost: Counter,
    /// Datagrams refused: malformed, or not sealed under our key.
    pub refused: Counter,
    /// Datagrams that the kernel dropped.
    pub kernel_drops: Gauge,
    /// Failure reports sent.
    pub reports: Counter,
}

/// Of the map and the table.
#[derive(Clone, Debug, Default)]
pub struct FleetMetrics {
    /// Seconds since the map in use was confirmed to be the newest.
    pub map_age_seconds: Gauge<f64, AtomicU64>,
    /// Its epoch.
    pub map_epoch: Gauge,
    /// Its version.
    pub map_version: Gauge,
    /// Hosts in it.
    pub hosts: Gauge,
    /// Refreshes that failed.
    pub refreshes_failed: Counter,
    /// Pages fetched.
    pub pages_fetched: Counter,
    /// Hosts that the capacity table has room for.
    pub table_slots: Gauge,
}

impl FeedMetrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let mut counter = |name: &str, help: &str, counter: &Counter| {
            registry.register(name, help, counter.clone());
        };
        counter("placer_feed_words", "Capacity words received", &metrics.words);
        counter("placer_feed_lost", "Feed datagrams lost on the way", &metrics.lost);
        counter("placer_feed_refused", "Datagrams refused", &metrics.refused);
        counter("placer_reports", "Failure reports sent", &metrics.reports);
        let name = "placer_feed_kernel_drops";
        registry.register(name, "Datagrams dropped by the kernel", metrics.kernel_drops.clone());
        metrics
    }
}

impl FleetMetrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let age = metrics.map_age_seconds.clone();
        registry.register(
            "placer_map_age_seconds",
            "Since the map was known to be the newest",
            age,
        );
        let mut gauge = |name: &str, help: &str, gauge: &Gauge| {
            registry.register(name, help, gauge.clone());
        };
        gauge("placer_map_epoch", "Epoch of the map in use", &metrics.map_epoch);
        gauge("placer_map_version", "Version of the map in use", &metrics.map_version);
        gauge("placer_hosts", "Hosts of the map in use", &metrics.hosts);
        gauge("placer_table_slots", "Hosts the capacity table has room for", &metrics.table_slots);
        let failed = metrics.refreshes_failed.clone();
        registry.register("placer_map_refreshes_failed", "Refreshes that failed", failed);
        let fetched = metrics.pages_fetched.clone();
        registry.register("placer_map_pages_fetched", "Pages of maps fetched", fetched);
        metrics
    }
}
