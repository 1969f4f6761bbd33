//! Bounds of the capacity service that no other part needs to know, each with its reason.

use wire::limits::{BUCKETS, HOSTS_MAX};

/// Rows of one batch. A bucket of a million-host fleet has about 250; at 110 bytes a row a batch stays below
/// Cassandra's `batch_size_fail_threshold` of 50 KiB.
pub const BATCH_ROWS_MAX: usize = 256;

/// Batches that one shard has outstanding at the store, at most.
pub const BATCHES_IN_FLIGHT_MAX: usize = 32;

/// Heartbeats a second that one receiver sends on to each other aggregator. A million hosts on three aggregators of
/// eight cores are 2,800 a second and receiver; what is above waits for the host's next heartbeat, or for the store.
pub const RELAYS_A_SECOND_MAX: u32 = 8_192;

/// Placers that one aggregator feeds. Each costs a copy of every change.
pub const SUBSCRIBERS_MAX: usize = 1_024;

/// Hosts with failure reports that are remembered at once: beyond, new ones wait until old ones lapse.
pub const REPORTED_HOSTS_MAX: usize = 65_536;

/// Placers remembered a reported host. More would not change a decision.
pub const REPORTERS_MAX: usize = 8;

/// Placers whose last report is remembered (replays).
pub const PLACERS_MAX: usize = 4_096;

/// Intervals of silence after which a host is suspect. Every second heartbeat asks for an answer and is repeated until it has
/// one, so that a silence of two happens where a third of all datagrams is lost (FAULTS H8), and one of three does not.
pub const SUSPECT_AFTER_INTERVALS: u64 = 3;

/// Share of the fleet, in percent, that may leave the map in one scan. Above it nobody leaves (DESIGN 4.5).
pub const BRAKE_PERCENT: u64 = 20;

/// Share of the fleet, in percent, that may be quarantined at once.
pub const QUARANTINE_PERCENT: u64 = 10;

/// Hosts above which a page of the map is split: well below the format's bound, so that a page has room to grow.
pub const PAGE_SPLIT_HOSTS: usize = 3_072;

/// Hosts below which two halves are put together again: far below a split, so that no page flaps.
pub const PAGE_MERGE_HOSTS: usize = 1_024;

const _: () = assert!(SUSPECT_AFTER_INTERVALS < wire::limits::DEAD_AFTER_INTERVALS);
const _: () = assert!(PAGE_SPLIT_HOSTS <= wire::limits::MAP_PAGE_HOSTS_MAX);
const _: () = assert!(PAGE_MERGE_HOSTS * 2 < PAGE_SPLIT_HOSTS);
const _: () = assert!(HOSTS_MAX / (BUCKETS as usize) < 4 * BATCH_ROWS_MAX);
