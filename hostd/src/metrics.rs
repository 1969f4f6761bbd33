//! What hostd counts. Each host counts in plain cells on its own thread; its timer adds them to the shared
//! counters once a second, so that threads do not pass a cache line to and fro with each launch.

use std::{cell::Cell, collections::BTreeMap, sync::Arc, sync::atomic::AtomicU64};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident: $help:literal;)*) => {
        /// One host's counts since they were last published.
        #[derive(Debug, Default)]
        pub(crate) struct Counts {
            $($(#[$doc])* pub(crate) $name: Cell<u64>,)*
        }

        /// The process's counters.
        #[derive(Clone, Debug, Default)]
        pub(crate) struct Metrics {
            $($name: Counter<u64, AtomicU64>,)*
            running: Gauge,
            hosts: Family<Vec<(String, String)>, Gauge>,
            images: Arc<BTreeMap<String, Gauge>>,
        }

        impl Metrics {
            fn register(&self, registry: &mut Registry) {
                $(registry.register(stringify!($name), $help, self.$name.clone());)*
            }

            /// Takes over what a host has counted.
            pub(crate) fn publish(&self, counts: &Counts) {
                $(self.$name.inc_by(counts.$name.take());)*
            }
        }
    };
}

counts! {
    /// Started.
    started: "Launches started";
    /// Answered again.
    again: "Launches that came again and got the same answer";
    /// Refused.
    refused: "Launches refused for want of room or for a drain";
    /// Failed.
    failed: "Launches that failed, or were no launch";
    /// Ended.
    ended: "Sandboxes that ended";
    /// Calls.
    calls: "Calls answered";
    /// Heartbeats.
    heartbeats: "Heartbeats sent";
    /// Heartbeats that the kernel refused.
    heartbeats_unsent: "Heartbeats that the kernel did not send";
    /// Datagrams of sandboxes' records.
    records: "Datagrams of sandboxes' records sent beside heartbeats";
    /// Directives.
    directives: "Directives obeyed";
    /// Directives ignored.
    directives_ignored: "Directives ignored as forged or stale";
    /// Lost output.
    log_lost_bytes: "Output bytes dropped for want of room";
    /// Reaped.
    undelivered: "Answers that reached nobody";
}

/// Adds one.
pub(crate) fn count(cell: &Cell<u64>) {
    cell.set(cell.get() + 1);
}

impl Metrics {
    /// The counters, and the registry that shows them.
    pub(crate) fn new(engine: &str) -> (Self, Arc<Registry>) {
        let rows = hostd_image::ImageMetrics::default().rows();
        let images = rows.into_iter().map(|(name, _)| (name, Gauge::default())).collect();
        let metrics = Self { images: Arc::new(images), ..Self::default() };
        let mut registry = Registry::with_prefix("hostd");
        metrics.register(&mut registry);
        registry.register("running", "Sandboxes that take a slot", metrics.running.clone());
        registry.register("hosts", "Hosts served, by runtime", metrics.hosts.clone());
        for (name, gauge) in metrics.images.iter() {
            let help = "Of images, since their server was started; see hostd_image::ImageMetrics";
            registry.register(format!("image_{name}"), help, gauge.clone());
        }
        metrics.hosts.get_or_create(&vec![("engine".to_owned(), engine.to_owned())]).set(0);
        (metrics, Arc::new(registry))
    }

    /// What the image servers of this process's host counted.
    pub(crate) fn set_images(&self, images: &hostd_image::ImageMetrics) {
        for (name, value) in images.rows() {
            if let Some(gauge) = self.images.get(&name) {
                gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        }
    }

    /// One host more.
    pub(crate) fn add_host(&self, engine: &str) {
        self.hosts.get_or_create(&vec![("engine".to_owned(), engine.to_owned())]).inc();
    }

    /// Sandboxes more (or less) than this host told before.
    pub(crate) fn add_running(&self, change: i64) {
        self.running.inc_by(change);
    }
}
