//! The one place where hostd reads clocks.
//!
//! Deadlines are kept in milliseconds of the machine's boot clock: it runs on over a restart of the daemon and while
//! the machine sleeps, and cannot be set. It is never compared with another machine's.

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since the machine's boot.
pub(crate) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec) * 1_000 + part(now.tv_nsec) / 1_000_000
}

/// Nanoseconds of the monotonic clock, which all processes of the machine share.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

/// When a boot-clock time comes, for tokio's timers.
pub(crate) fn instant(at_ms: u64) -> tokio::time::Instant {
    let wait_ms = at_ms.saturating_sub(now_ms()).min(86_400_000);
    tokio::time::Instant::now() + std::time::Duration::from_millis(wait_ms)
}
