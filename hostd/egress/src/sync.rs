//! Counters that a link writes and the worker's doorkeeper reads: the crate's only atomics.
//!
//! Each is a plain sum that nothing else depends on, so that no ordering is needed (`Relaxed`).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes of one box.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    received: AtomicU64,
    sent: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    /// The box got so many bytes.
    pub(crate) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Relaxed);
    }

    /// The box sent so many.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
    }

    /// Something of it was refused.
    pub(crate) fn refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// Received, sent, refused.
    pub(crate) fn read(&self) -> (u64, u64, u64) {
        (self.received.load(Relaxed), self.sent.load(Relaxed), self.refused.load(Relaxed))
    }
}
