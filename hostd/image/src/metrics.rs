//! What the image side counts, for `/metrics`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counters of one trust domain's mounts on this host. All grow from the server's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct ImageMetrics {
    /// Bytes fetched from the object store.
    pub bytes_fetched: u64,
    /// GETs of the object store.
    pub gets: u64,
    /// Second GETs sent because the first was slow.
    pub gets_hedged: u64,
    /// Frames found in memory.
    pub frames_memory: u64,
    /// Frames found on disk.
    pub frames_disk: u64,
    /// Frames that had to be fetched.
    pub frames_fetched: u64,
    /// Frames on disk whose hash was wrong; they were thrown away and fetched.
    pub frames_disk_damaged: u64,
    /// Frames that could not be written to disk, for instance because it is full.
    pub disk_write_failures: u64,
    /// Bytes of frames on disk.
    pub disk_bytes: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Reads that were answered out of a boot pack.
    pub reads_boot: u64,
    /// Bytes that the kernel asked for.
    pub bytes_read: u64,
    /// Reads and lookups answered with an error, for the bytes could not be had or were damaged.
    pub eio: u64,
    /// Bytes pushed into the page cache before they were asked for.
    pub bytes_pushed: u64,
    /// First runs of a host that had nothing of their image, which were watched to their end.
    pub first_runs: u64,
    /// Those of them that had a boot pack.
    pub boot_packs_used: u64,
    /// Bytes that those packs had.
    pub boot_bytes_had: u64,
    /// Bytes that those runs read and the packs had not.
    pub boot_bytes_missed: u64,
    /// Boot packs recorded where there was none.
    pub boot_packs_recorded: u64,
    /// Boot packs made anew because they missed too much.
    pub boot_packs_renewed: u64,
    /// Age of the oldest read that is not answered yet, in milliseconds.
    pub oldest_unanswered_ms: u64,
}

impl ImageMetrics {
    /// Of what first runs with a boot pack needed, the part that the pack had. What a pack had and nobody needed counts as
    /// needed, for the kernel does not say. `None` before any such run.
    #[must_use]
    pub fn push_hit_rate(&self) -> Option<f64> {
        let all = self.boot_bytes_had.checked_add(self.boot_bytes_missed).filter(|all| *all > 0)?;
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        Some(self.boot_bytes_had as f64 / all as f64)
    }

    /// Adds another domain's figures; of the oldest read the older one stays.
    pub fn add(&mut self, other: &Self) {
        let oldest = self.oldest_unanswered_ms.max(other.oldest_unanswered_ms);
        self.disk_bytes += other.disk_bytes;
        self.add_counters(other);
        self.oldest_unanswered_ms = oldest;
    }

    /// Every figure with its name, for a page of metrics.
    #[must_use]
    pub fn rows(&self) -> Vec<(String, u64)> {
        let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(self) else {
            return Vec::new();
        };
        fields.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect()
    }
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// The same, as they are counted.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl ImageMetrics {
            fn add_counters(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }
        }

        impl Counters {
            /// What was counted so far. The counters are read one after another, not at one instant.
            pub(crate) fn read(&self) -> ImageMetrics {
                ImageMetrics { $($name: self.$name.load(Ordering::Relaxed),)* ..ImageMetrics::default() }
            }
        }
    };
}

counters! {
    bytes_fetched, gets, gets_hedged, frames_memory, frames_disk, frames_fetched, frames_disk_damaged,
    disk_write_failures, reads, reads_boot, bytes_read, eio, bytes_pushed, boot_packs_used,
    first_runs, boot_bytes_had, boot_bytes_missed, boot_packs_recorded, boot_packs_renewed,
}

/// Counts one. Nothing is ordered by a counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Counts bytes.
pub(crate) fn count_bytes(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// The 95th percentile of the last GETs, which a hedge waits for.
#[derive(Debug)]
pub(crate) struct Latencies {
    last: [Duration; Self::LAST],
    count: usize,
    p95: Duration,
}

impl Latencies {
    const LAST: usize = 128;

    pub(crate) fn new() -> Self {
        // Until something is known, a hedge waits for long.
        Self { last: [Duration::ZERO; Self::LAST], count: 0, p95: Duration::from_secs(2) }
    }

    pub(crate) fn add(&mut self, started: Instant) {
        self.last[self.count % Self::LAST] = started.elapsed();
        self.count += 1;
        if self.count >= 20 && self.count.is_multiple_of(16) {
            let mut sorted = self.last[..self.count.min(Self::LAST)].to_vec();
            sorted.sort_unstable();
            self.p95 = sorted[sorted.len() * 95 / 100];
        }
    }

    /// When to send a second GET.
    pub(crate) fn hedge_after(&self) -> Duration {
        // Below that, a second GET costs more than it saves.
        self.p95.max(Duration::from_millis(5))
    }
}
