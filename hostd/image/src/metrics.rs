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
    /// Age of the oldest read that is not answered yet, in milliseconds.
    pub oldest_unanswered_ms: u64,
}

impl ImageMetrics {
    /// Of the bytes that were needed early, the part that the boot pack brought before they were asked for. `None` before any.
    #[must_use]
    pub fn push_hit_rate(&self) -> Option<f64> {
        let all = self.bytes_pushed.checked_add(self.bytes_read).filter(|all| *all > 0)?;
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        Some(self.bytes_pushed as f64 / all as f64)
    }
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// The same, as they are counted.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
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
    disk_write_failures, reads, reads_boot, bytes_read, eio, bytes_pushed,
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
