//! One host in a shard: 112 bytes, so that a million hosts and their index stay below 128 bytes each.
//!
//! Only the key of the epoch that the host used last is kept. While a fleet moves from one key epoch to the next a host
//! changes over once, which costs one derivation; two keys a host would cost 32 MB a million for ever.

use wire::{
    CapacityWord, HostId, Incarnation, Seq,
    heartbeat::Heartbeat,
    limits::{HEARTBEAT_INTERVAL_MS, HEARTBEAT_INTERVAL_MS_RANGE, REPLAY_WINDOW, SHAPES_MAX},
    map::HostAddr,
    seal::{KeyEpoch, SenderKey},
};

use crate::row::Row;

/// Times are kept in units of this many milliseconds: 32 bits last two years of uptime.
const TICK_MS: u64 = 16;
const INTERVAL_UNIT_MS: u32 = 4;
/// What is supposed of a host of which only the map is known.
const LISTED_INTERVAL_MS: u32 = 15_000;

const _: () = assert!(LISTED_INTERVAL_MS as u64 == HEARTBEAT_INTERVAL_MS);
const _: () = assert!(*HEARTBEAT_INTERVAL_MS_RANGE.end() / 4 < u16::MAX as u64);
const _: () = assert!(REPLAY_WINDOW == u64::BITS as u64, "the window is one word");
const _: () = assert!(size_of::<Record>() <= 112);

/// What is up with a record, one bit each.
pub(crate) mod mark {
    /// Changed since the store acknowledged it.
    pub(crate) const DIRTY: u16 = 1;
    /// Stands in the list of what the feed is to say.
    pub(crate) const NEWS: u16 = 1 << 1;
    /// Stands in the list of what is to be written.
    pub(crate) const LISTED: u16 = 1 << 2;
    /// On its way to the store.
    pub(crate) const IN_FLIGHT: u16 = 1 << 3;
    /// The fleet wants it drained.
    pub(crate) const DRAIN: u16 = 1 << 4;
    /// Quarantined.
    pub(crate) const QUARANTINED: u16 = 1 << 5;
    /// A placer reported its health.
    pub(crate) const REPORTED: u16 = 1 << 6;
    /// Known from the store, not from its own heartbeats here.
    pub(crate) const FOREIGN: u16 = 1 << 7;
    /// Runs no real sandboxes.
    pub(crate) const NO_BOXES: u16 = 1 << 8;
    /// No host: the slot waits for one.
    pub(crate) const VACANT: u16 = 1 << 9;
    /// Came or moved, and the store has no row that says so yet: other aggregators cannot know.
    pub(crate) const UNTOLD: u16 = 1 << 10;
    /// The revision counter, whose carry must not reach the totals.
    pub(crate) const REVISION_MAX: u8 = u8::MAX - 1;
}

#[derive(Clone)]
pub(crate) struct Record {
    pub(crate) host: u64,
    key: [u8; 32],
    pub(crate) incarnation: u64,
    pub(crate) seq: u64,
    /// Bit i: `seq - 1 - i` was seen.
    window: u64,
    ip: [u8; 16],
    /// As the host said it: flags of its own only.
    pub(crate) word: CapacityWord,
    /// Four times ten bits of totals.
    total: [u8; 5],
    pub(crate) revision: u8,
    pub(crate) marks: u16,
    pub(crate) running: u32,
    heard: u32,
    pub(crate) key_epoch: u32,
    interval: u16,
    port: u16,
}

/// How a verified heartbeat stands to what is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Newer: taken.
    Newer,
    /// Older, inside the window, not seen before: proves nothing new.
    Late,
    /// Seen before.
    Replayed,
    /// Older than the window, or of an earlier incarnation.
    Stale,
}

impl Record {
    pub(crate) fn vacant() -> Self {
        Self {
            host: 0,
            key: [0; 32],
            incarnation: 0,
            seq: 0,
            window: 0,
            ip: [0; 16],
            word: CapacityWord(0),
            total: [0; 5],
            revision: 0,
            marks: mark::VACANT,
            running: 0,
            heard: 0,
            key_epoch: 0,
            interval: 0,
            port: 0,
        }
    }

    /// A host of which nothing is known yet.
    pub(crate) fn of(host: HostId) -> Self {
        Self { host: host.0, marks: 0, ..Self::vacant() }
    }

    pub(crate) fn is(&self, marks: u16) -> bool {
        self.marks & marks != 0
    }

    pub(crate) fn set(&mut self, marks: u16, up: bool) {
        self.marks = if up { self.marks | marks } else { self.marks & !marks };
    }

    pub(crate) fn key(&self, epoch: KeyEpoch) -> Option<SenderKey> {
        (self.key_epoch == epoch.0 && self.key != [0; 32]).then_some(SenderKey(self.key))
    }

    pub(crate) fn set_key(&mut self, epoch: KeyEpoch, key: &SenderKey) {
        (self.key_epoch, self.key) = (epoch.0, key.0);
    }

    pub(crate) fn forget_key(&mut self) {
        self.key = [0; 32];
    }

    pub(crate) fn order(&self, incarnation: Incarnation, seq: Seq) -> Order {
        if incarnation.0 != self.incarnation {
            return if incarnation.0 > self.incarnation { Order::Newer } else { Order::Stale };
        }
        if seq.0 > self.seq {
            return Order::Newer;
        }
        match self.seq - seq.0 {
            0 => Order::Replayed,
            behind if behind > REPLAY_WINDOW => Order::Stale,
            behind if self.window >> (behind - 1) & 1 == 1 => Order::Replayed,
            _ => Order::Late,
        }
    }

    /// Remembers a late one, so that it is not late twice.
    pub(crate) fn note_late(&mut self, seq: Seq) {
        let behind = self.seq - seq.0;
        debug_assert!((1..=REPLAY_WINDOW).contains(&behind));
        self.window |= 1 << (behind - 1);
    }

    /// Takes a newer heartbeat.
    pub(crate) fn take(&mut self, now_ms: u64, beat: &Heartbeat) {
        let same = beat.incarnation.0 == self.incarnation;
        let ahead = if same { beat.seq.0 - self.seq } else { 0 };
        self.window = match ahead {
            0 => 0,
            1..=63 => (self.window << ahead) | 1 << (ahead - 1),
            64 => 1 << 63,
            _ => 0,
        };
        (self.incarnation, self.seq, self.revision) = (beat.incarnation.0, beat.seq.0, 0);
        (self.ip, self.port, self.running) = (beat.ip, beat.port, beat.running);
        self.word = beat.word();
        self.set_total(beat.total);
        self.set_interval(beat.interval_ms);
        self.set(mark::NO_BOXES, beat.flags & Heartbeat::NO_BOXES != 0);
        self.set(mark::FOREIGN, false);
        self.hear(now_ms);
    }

    /// Takes a newer row of the store.
    pub(crate) fn take_row(&mut self, now_ms: u64, row: &Row) {
        (self.incarnation, self.seq, self.window) = (row.incarnation.0, row.seq.0, u64::MAX);
        self.revision = row.revision;
        (self.ip, self.port, self.running) = (row.ip, row.port, row.running);
        // A quarantine is kept by the aggregator that hears the host: its word stands until the host speaks here.
        self.word = row.word.without(CapacityWord::ABSENT);
        if !row.says_draining {
            self.word = self.word.without(CapacityWord::DRAINING);
        }
        self.set_total(row.total);
        self.set_interval(row.interval_ms);
        self.set(mark::NO_BOXES, row.no_boxes);
        self.set(mark::FOREIGN, true);
        self.hear(now_ms);
    }

    /// Takes what a published map says of a host: its address. Any heartbeat and any row is newer.
    pub(crate) fn take_listed(&mut self, now_ms: u64, addr: HostAddr) {
        (self.ip, self.port) = (Heartbeat::ip_bytes(addr.ip), addr.port);
        self.set_interval(LISTED_INTERVAL_MS);
        self.set(mark::FOREIGN, true);
        self.hear(now_ms);
    }

    /// Whether the host has spoken, here or to another: else there is no word of it to pass on, not even its stamp.
    pub(crate) const fn spoke(&self) -> bool {
        self.incarnation != 0
    }

    #[expect(clippy::cast_possible_truncation, reason = "clamped to 32 bits: two years of uptime")]
    pub(crate) fn hear(&mut self, now_ms: u64) {
        self.heard = (now_ms / TICK_MS).min(u64::from(u32::MAX)) as u32;
    }

    /// When it was heard of last, rounded down.
    pub(crate) fn heard_ms(&self) -> u64 {
        u64::from(self.heard) * TICK_MS
    }

    fn set_interval(&mut self, interval_ms: u32) {
        let units = interval_ms.div_ceil(INTERVAL_UNIT_MS);
        self.interval = u16::try_from(units).unwrap_or(u16::MAX);
    }

    pub(crate) fn interval_ms(&self) -> u32 {
        u32::from(self.interval) * INTERVAL_UNIT_MS
    }

    fn set_total(&mut self, total: [u16; SHAPES_MAX]) {
        let packed = CapacityWord::new(total, 0, wire::Stamp::default()).0.to_le_bytes();
        self.total.copy_from_slice(&packed[..5]);
    }

    fn total(&self) -> [u16; SHAPES_MAX] {
        let mut bytes = [0; 8];
        bytes[..5].copy_from_slice(&self.total);
        CapacityWord(u64::from_le_bytes(bytes)).free_all()
    }

    /// What placers are told: the host's own word with the fleet's flags.
    pub(crate) fn said(&self) -> CapacityWord {
        let mut word = self.word;
        if self.is(mark::DRAIN) {
            word = word.with(CapacityWord::DRAINING);
        }
        if self.is(mark::QUARANTINED) {
            word = word.with(CapacityWord::QUARANTINED);
        }
        word
    }

    pub(crate) fn row(&self) -> Row {
        Row {
            host: HostId(self.host),
            incarnation: Incarnation(self.incarnation),
            seq: Seq(self.seq),
            revision: self.revision,
            ip: self.ip,
            port: self.port,
            word: self.said(),
            total: self.total(),
            running: self.running,
            interval_ms: self.interval_ms(),
            says_draining: self.word.has(CapacityWord::DRAINING),
            no_boxes: self.is(mark::NO_BOXES),
        }
    }

    /// A change that no heartbeat brought.
    pub(crate) fn revise(&mut self) {
        self.revision = (self.revision + 1).min(mark::REVISION_MAX);
    }
}
