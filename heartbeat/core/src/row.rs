//! What is kept of a host outside a shard: the row of the store, and the durable wish that it drain.

use std::net::Ipv6Addr;

use wire::{CapacityWord, HostId, Incarnation, Seq, limits::SHAPES_MAX, map::HostAddr};

/// A host as the store keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its name; the bucket follows from it.
    pub host: HostId,
    /// Of its newest heartbeat.
    pub incarnation: Incarnation,
    /// Of its newest heartbeat.
    pub seq: Seq,
    /// Counts what changed besides heartbeats (a drain, a quarantine) since the newest one.
    pub revision: u8,
    /// Where launches go: an IPv6 address, or an IPv4 one mapped into it.
    pub ip: [u8; 16],
    /// Where launches go.
    pub port: u16,
    /// What placers are told: the host's own word, with the fleet's flags added.
    pub word: CapacityWord,
    /// Slots a shape of the empty host.
    pub total: [u16; SHAPES_MAX],
    /// Sandboxes that run.
    pub running: u32,
    /// Milliseconds between heartbeats.
    pub interval_ms: u32,
    /// Whether the host itself says that it takes no work, not just the fleet.
    pub says_draining: bool,
    /// Runs no real sandboxes.
    pub no_boxes: bool,
}

impl Row {
    /// Orders all writes of one host, so that the database itself keeps an older one from overwriting a newer
    /// (`USING TIMESTAMP`): seq never goes back (PROTOCOL 2.6), and revisions count between two of them.
    #[must_use]
    pub fn written(&self) -> i64 {
        written(self.seq, self.revision)
    }

    /// Where launches go.
    #[must_use]
    pub fn addr(&self) -> HostAddr {
        HostAddr { ip: Ipv6Addr::from(self.ip).to_canonical(), port: self.port }
    }
}

/// See [`Row::written`]. Saturates: a host that claims seqs near 2^55 orders no better than by its last.
#[must_use]
pub fn written(seq: Seq, revision: u8) -> i64 {
    let seq = i64::try_from(seq.0).unwrap_or(i64::MAX);
    seq.saturating_mul(256).saturating_add(i64::from(revision))
}

/// The timestamp of a removal of all that was heard up to `seq`: a later heartbeat brings the host back.
#[must_use]
pub fn removed(seq: Seq) -> i64 {
    written(seq, u8::MAX)
}

/// The durable wish that a host take no new work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Which host.
    pub host: HostId,
    /// Milliseconds, counted from `since_ms`, until what still runs is stopped; zero for never.
    pub deadline_ms: u64,
    /// When it was asked for, by the clock of who took the order: milliseconds since 1970. The deadline is counted
    /// from it by aggregators that hear of the drain from the store, so their clocks should agree to a second or so.
    pub since_ms: u64,
    /// For those who look later.
    pub message: String,
}
