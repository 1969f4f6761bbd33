//! How fast one box may send and receive: a bucket of bytes that fills with time.

use std::time::{Duration, Instant};

/// A tenth of a second's bytes, so that a pause is short and a burst small.
const DEPTH: u32 = 10;

/// Least depth: one window, or small rates would pass a few bytes at a time.
const DEPTH_MIN: u64 = 64 * 1024;

/// The bucket of one box, both directions together.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes a second; zero for no bound.
    rate: u64,
    left: u64,
    filled: Instant,
}

impl Bucket {
    pub(crate) fn new(now: Instant) -> Self {
        Self { rate: 0, left: 0, filled: now }
    }

    fn depth(&self) -> u64 {
        (self.rate / u64::from(DEPTH)).max(DEPTH_MIN)
    }

    /// Fills it for the time that has passed, at this rate.
    pub(crate) fn fill(&mut self, rate: u64, now: Instant) {
        if rate != self.rate {
            self.rate = rate;
            self.left = self.depth();
            self.filled = now;
        }
        let passed = now.saturating_duration_since(self.filled);
        let bytes = u128::from(self.rate) * passed.as_micros() / 1_000_000;
        if bytes > 0 {
            self.filled = now;
            let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
            self.left = self.left.saturating_add(bytes).min(self.depth());
        }
    }

    /// Whether anything may pass.
    pub(crate) const fn has_any(&self) -> bool {
        self.rate == 0 || self.left > 0
    }

    /// How many of so many bytes.
    pub(crate) fn at_most(&self, length: usize) -> usize {
        if self.rate == 0 {
            return length;
        }
        length.min(usize::try_from(self.left).unwrap_or(usize::MAX))
    }

    /// So many have passed.
    pub(crate) fn take(&mut self, length: usize) {
        self.left = self.left.saturating_sub(length as u64);
    }

    /// How long until something may pass again, if nothing may now.
    pub(crate) fn wait(&self) -> Option<Duration> {
        (!self.has_any()).then_some(Duration::from_millis(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_passes_its_rate_and_no_more() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(begun);
        assert!(bucket.has_any() && bucket.at_most(9_999_999) == 9_999_999);
        let mut passed = 0;
        for ms in 0..1_000 {
            bucket.fill(10_000_000, begun + Duration::from_millis(ms));
            while bucket.has_any() {
                let length = bucket.at_most(50_000);
                bucket.take(length);
                passed += length;
            }
            assert!(bucket.wait().is_some());
        }
        // A second's bytes, and what the bucket held at the beginning.
        assert!((10_000_000..=11_000_000).contains(&passed), "{passed}");
    }
}
