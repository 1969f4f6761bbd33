//! Every bound of the protocol, once, with its reason.
//!
//! A limit that two parts must agree on stands here and nowhere else; `const` assertions tie related ones.

use core::mem::size_of;

/// Shapes a fleet can offer. Four fit into one capacity word with ten bits each.
pub const SHAPES_MAX: usize = 4;

/// Largest free count of one shape that a capacity word can say; more is said as this.
///
/// It also bounds what a lying host can claim.
pub const FREE_MAX: u16 = (1 << 10) - 1;

/// Bytes of a datagram that surely cross any path unfragmented (IPv6 minimum MTU 1,280 less headers).
pub const DATAGRAM_BYTES_MAX: usize = 1_200;

/// Bytes of the tag that ends each sealed datagram: half of a BLAKE3 hash, 2^-128 to guess.
pub const TAG_BYTES: usize = 16;

/// Bits of the host id that name its bucket: 4,096 partitions, about 250 hosts each at a million.
pub const BUCKET_BITS: u32 = 12;

/// Buckets of a fleet.
pub const BUCKETS: u16 = 1 << BUCKET_BITS;

/// Hosts in one fleet. The capacity table and the map size their indices by it.
pub const HOSTS_MAX: usize = 4_000_000;

/// Default time between heartbeats of a host, in milliseconds.
pub const HEARTBEAT_INTERVAL_MS: u64 = 15_000;

/// Bounds of the interval that a directive may set, in milliseconds: below, the fleet floods its
/// aggregators; above, capacity is older than any placer should believe.
pub const HEARTBEAT_INTERVAL_MS_RANGE: core::ops::RangeInclusive<u64> = 100..=120_000;

/// Intervals without a heartbeat after which the slow scan calls a host dead.
pub const DEAD_AFTER_INTERVALS: u64 = 4;

/// Sequence numbers a host skips at each start, so that none is ever used twice (PROTOCOL 2.6).
pub const SEQ_RESERVE: u64 = 4_096;

/// Sequence numbers below the newest that are remembered one by one. FAULTS H3 reorders by 64.
pub const REPLAY_WINDOW: u64 = 64;

/// Hosts in one page of the map. At 12 bytes each a page is 48 KiB: one GET, and a change costs little.
pub const MAP_PAGE_HOSTS_MAX: usize = 4_096;

/// Pages of one map: enough for [`HOSTS_MAX`] with pages a quarter full.
pub const MAP_PAGES_MAX: usize = 4 * HOSTS_MAX / MAP_PAGE_HOSTS_MAX;

/// Time between two rounds in which a host says the records of all its sandboxes again, in milliseconds: what repairs
/// lost datagrams. Twenty heartbeats: at a hundred sandboxes a host about as many datagrams as heartbeats.
pub const RECORDS_ROUND_MS: u64 = 300_000;

/// Milliseconds that a sandbox's record lives after its host last said it: three rounds, so that two lost ones lose nothing.
pub const RECORD_LIVES_MS: u64 = 3 * RECORDS_ROUND_MS;

/// Bytes of a frame's payload. A launch request fits; bulk data is cut into frames of this size.
pub const FRAME_BYTES_MAX: usize = 256 * 1024;

/// Bytes of a call (the first frame of a stream). Bounds what an unknown peer can make us buffer.
pub const CALL_BYTES_MAX: usize = 64 * 1024;

/// Bytes of a name: tenant, image name, shape, label key, user.
pub const NAME_BYTES_MAX: usize = 128;

/// Arguments plus environment entries plus labels of one launch or exec.
pub const STRINGS_MAX: usize = 1_024;

/// Egress rules of one launch: each connection is judged by all of them.
pub const RULES_MAX: usize = 64;

/// Bytes of one egress rule: the longest name, protocol and ports.
pub const RULE_BYTES_MAX: usize = 300;

/// Ports that one launch may have published on its host.
pub const PUBLISH_MAX: usize = 16;

/// Milliseconds that a launch may spend over all its attempts, at most.
pub const BUDGET_MS_MAX: u32 = 120_000;

/// Milliseconds that a launch may spend when its caller did not say.
pub const BUDGET_MS_DEFAULT: u32 = 10_000;

/// Attempts of one launch, over all hosts.
pub const ATTEMPTS_MAX: u32 = 5;

/// Candidates of one pick (k of the k choices).
pub const CHOICES_MAX: usize = 8;

/// Bidirectional streams that a peer may have open on one connection. NUMBERS: larger windows cost memory
/// for every idle connection and halve handshakes.
pub const STREAMS_MAX: u32 = 64;

/// Streams that a host grants a placer, which is trusted and multiplexes everybody's launches.
pub const PLACER_STREAMS_MAX: u32 = 4_096;

/// Launches outstanding on one lane: bounds what a host buffers for one placer.
pub const LANE_LAUNCHES_MAX: usize = 8_192;

const _: () = assert!(CALL_BYTES_MAX <= FRAME_BYTES_MAX);
const _: () = assert!(BUCKET_BITS <= 16);
const _: () = assert!(ATTEMPTS_MAX as usize >= 2 && CHOICES_MAX >= 2);
const _: () = assert!(HEARTBEAT_INTERVAL_MS <= *HEARTBEAT_INTERVAL_MS_RANGE.end());
const _: () = assert!(HEARTBEAT_INTERVAL_MS >= *HEARTBEAT_INTERVAL_MS_RANGE.start());
const _: () = assert!(MAP_PAGE_HOSTS_MAX * MAP_PAGES_MAX >= HOSTS_MAX);
const _: () = assert!(size_of::<usize>() >= 8, "tables of a million hosts want a 64-bit machine");
