//! Every bound of this crate, with its reason.

use std::time::Duration;

/// Largest packet between a box and its link: TUN devices go to 65,535, and a multiple of 16 keeps copies aligned.
/// Large packets are what makes a user-space stack fast: one read or write of the device carries 64 KiB.
pub(crate) const MTU: usize = 65_520;

/// Bytes of each direction of one TCP connection that lie in the worker: the window that the box sees. Two packets,
/// so that one can travel while the other is taken.
pub(crate) const WINDOW_BYTES: usize = 2 * 65_536;

/// Connections (TCP, and UDP by source and destination) of one box, unless the operator says otherwise. With
/// `WINDOW_BYTES` it bounds what a box can make the worker hold: 64 MiB.
pub const CONNECTIONS_DEFAULT: u32 = 256;

/// What the operator may set at most: beyond it, looking through a link's sockets for each packet is what costs.
pub const CONNECTIONS_MAX: u32 = 4_096;

/// Packets taken from a device before the rest of the link gets its turn.
pub(crate) const PACKETS_A_TURN: usize = 64;

/// Turns of one link before others get theirs.
pub(crate) const TURNS_MAX: usize = 16;

/// A connection that the far end does not answer. Programs inside give up by themselves, usually earlier.
pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Milliseconds for which a box may leave bytes of a connection unacknowledged: a paused one does, for as long as kernels
/// usually wait.
pub(crate) const SILENCE_MS_MAX: u64 = 900_000;

/// Idle time after which a UDP exchange is forgotten, as NATs do it (RFC 4787 asks for two minutes of those that do not
/// know the service; a host's sockets are dearer).
pub(crate) const UDP_IDLE: Duration = Duration::from_secs(60);

/// Longest UDP payload that is carried: what an IPv4 datagram holds.
pub(crate) const UDP_BYTES_MAX: usize = MTU - 28;

/// Questions of one box to its name server that are being answered.
pub(crate) const QUESTIONS_MAX: usize = 64;

/// How long one name server is waited for, and times that each is asked.
pub(crate) const ANSWER_MAX: Duration = Duration::from_millis(1_500);

/// Rounds over all name servers.
pub(crate) const ROUNDS_MAX: usize = 2;

/// Bytes of an answer that is taken (asked for by EDNS): fits any path unfragmented.
pub(crate) const ANSWER_BYTES_MAX: usize = 1_232;

/// Addresses of one answer that are passed on: the answer to the box then fits 512 bytes.
pub(crate) const ADDRESSES_MAX: usize = 16;

/// Addresses that are open for one box because it resolved a name.
pub(crate) const PINS_MAX: usize = 4_096;

/// Seconds that a box may keep an answer, at most: addresses of names that move come round.
pub(crate) const TTL_S_MAX: u32 = 300;

/// Milliseconds that an address stays open after its answer, at least, whatever its TTL: clients connect a moment after
/// they ask.
pub(crate) const PIN_MS_MIN: u64 = 60_000;

/// Milliseconds beyond the TTL that an address stays open: a client may connect at the end of it.
pub(crate) const PIN_MS_GRACE: u64 = 30_000;

/// Bytes of one message between hostd and the worker: [`wire::limits::RULES_MAX`] rules and an operator's ranges.
pub(crate) const MESSAGE_BYTES_MAX: usize = 128 * 1024;

/// Time without a hostd and without a box after which the worker ends.
pub(crate) const LINGER: Duration = Duration::from_secs(30);

/// Answers of the worker that hostd waits for: it is one thread of another process.
pub(crate) const ASK_MAX: Duration = Duration::from_secs(5);

/// Threads that carry packets, whatever the machine has: links of many boxes share them.
pub(crate) const THREADS_MAX: usize = 4;

const _: () =
    assert!(wire::limits::RULES_MAX * wire::limits::RULE_BYTES_MAX * 2 < MESSAGE_BYTES_MAX);
const _: () = assert!(MTU <= 65_535 && MTU.is_multiple_of(16));
