//! Bounds of one host's memory, each with its reason. They are hostd's own: nobody else must agree on them.

use wire::limits::BUDGET_MS_MAX;

/// Milliseconds for which a launch id is remembered after its sandbox ended, failed or was cancelled. No retry
/// inside a budget comes later than [`BUDGET_MS_MAX`] (PROTOCOL 6.6); the rest is slack for the network.
pub const REMEMBER_MS: u64 = BUDGET_MS_MAX as u64 + 30_000;

/// Launch ids that one host remembers. At the limit it refuses new launches rather than forget an old one early:
/// forgetting could start a sandbox twice. Some 160 bytes each, index included.
pub const LAUNCHES_MAX: usize = 1 << 21;

/// Refusals of named launches that are remembered. At the limit further ones are answered by `overloaded`, which
/// placers ask again after: forgetting one early could start a sandbox twice (PROTOCOL 6.12).
pub const REFUSALS_MAX: usize = 1 << 16;

/// Ended sandboxes whose full records (and logs) are kept for those who look later.
pub const ENDED_MAX: usize = 1_024;

/// Milliseconds for which they are kept.
pub const ENDED_MS: u64 = 600_000;

/// Milliseconds that a delivered-to-nobody sandbox may live beyond its launch's budget before it is reaped.
pub const LAPSE_GRACE_MS: u64 = 2_000;

/// Least milliseconds between two heartbeats: capacity that flickers does not flood an aggregator.
pub const BEAT_GAP_MS: u64 = 100;

/// Every how many heartbeats one asks for an answer. A dead aggregator is noticed within two intervals; the answers
/// cost it half of a datagram a heartbeat.
pub const ASK_EVERY: u32 = 2;

/// Milliseconds after which an unanswered ask is sent again.
pub const ASK_WAIT_MS: u64 = 1_000;

/// Unanswered asks after which the next aggregator is taken.
pub const ASK_TRIES: u32 = 3;

/// Intervals, at least, before the first aggregator of the order is tried again; at most twice as many, so that
/// hosts come back one by one.
pub const HOME_INTERVALS: u64 = 8;

const _: () = assert!(REMEMBER_MS > BUDGET_MS_MAX as u64);
