//! The records of the hosts that one receiver thread hears: verified, newest wins, changes marked.
//!
//! A shard belongs to one thread and has no lock. Which host belongs to which shard follows from its id
//! ([`shard_of`]), so that a host has one record however its datagrams arrive. A datagram allocates nothing, unless it
//! registers a host. Nothing of a record moves before the tag has verified (PROTOCOL 2.4), and nothing is answered to a
//! datagram that does not verify (PROTOCOL 1.6): it is counted by reason.
//!
//! Left out: sockets and the store. [`writes`] says what leaves for them, [`upkeep`] what comes back.

use std::collections::{BTreeMap, BTreeSet};

use wire::{
    HostId,
    datagram::{Datagram, Kind},
    feed::Subscribe,
    heartbeat::{self, Directive, Heartbeat},
    limits::{DATAGRAM_BYTES_MAX, HOSTS_MAX},
    report::FailureReport,
    seal::{KeyEpoch, Role, SenderKey},
};

use crate::{
    index::Index,
    keys::KeyRing,
    record::{Order, Record, mark},
};

pub mod gathered;
pub mod upkeep;
pub mod writes;

/// What a datagram was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing to do: taken, or dropped and counted.
    Nothing,
    /// Taken, and these first bytes of `out` go back to the sender.
    Directive(usize),
    /// A placer's report.
    Report {
        /// The placer.
        placer: u64,
        /// What it says.
        report: FailureReport,
    },
    /// A placer wants the feed.
    Subscribe {
        /// The placer.
        placer: u64,
        /// The epoch of the key that it uses.
        key_epoch: KeyEpoch,
        /// What it wants.
        subscribe: Subscribe,
    },
    /// Records of this host's sandboxes; the tag verified, and the body is still to be read.
    Records(HostId),
    /// A host of another shard: hand the bytes to that one. Nothing was verified.
    Elsewhere(u32),
}

/// Datagrams by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Heartbeats that were newest.
    pub accepted: u64,
    /// Newest too, but sent on by another aggregator.
    pub relayed: u64,
    /// Of both, first ones of a host.
    pub registered: u64,
    /// Older, but not seen before.
    pub late: u64,
    /// Seen before.
    pub replayed: u64,
    /// Below the window, or of an earlier incarnation.
    pub stale: u64,
    /// Not a datagram, or a record out of bounds.
    pub malformed: u64,
    /// Not for an aggregator.
    pub unexpected: u64,
    /// A key epoch that is not accepted.
    pub unknown_epoch: u64,
    /// The tag is another's.
    pub forged: u64,
    /// The host was revoked.
    pub revoked: u64,
    /// No room for another host.
    pub full: u64,
    /// Directives written.
    pub directives: u64,
    /// Reports and subscriptions that verified.
    pub placers: u64,
    /// Datagrams of sandboxes' records that verified.
    pub records: u64,
}

/// Until when what still runs on a draining host may run, by the caller's clock; `None` for ever.
pub type DrainUntil = Option<u64>;

/// Which of `shards` a host belongs to. The same arithmetic on the datagram's bytes 8 to 11, read big-endian, steers
/// it in the kernel.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is used")]
pub const fn shard_of(host: HostId, shards: u32) -> u32 {
    (host.0 as u32).swap_bytes() % shards
}

/// The records of one receiver thread's hosts.
pub struct Shard {
    at: u32,
    of: u32,
    keys: KeyRing,
    interval_ms: Option<u32>,
    hosts_max: usize,
    records: Vec<Record>,
    vacant: Vec<u32>,
    index: Index,
    drains: Option<BTreeMap<HostId, DrainUntil>>,
    revoked: BTreeSet<HostId>,
    news: Vec<u32>,
    gone: Vec<(HostId, wire::CapacityWord)>,
    listed: Vec<u32>,
    round: Vec<u32>,
    membership: u64,
    dirty: usize,
    /// The last datagram was a heartbeat that was newest, and its host is [`mark::UNTOLD`].
    last: (bool, bool),
    /// The datagram at hand comes from another aggregator.
    relayed: bool,
    counters: Counters,
}

impl Shard {
    /// Shard `at` of `of`. Hosts are told `interval_ms`, if any, and keep their own else.
    ///
    /// # Panics
    /// If `at` is not below `of`.
    #[must_use]
    pub fn new(at: u32, of: u32, keys: KeyRing, interval_ms: Option<u32>) -> Self {
        assert!(at < of, "a shard is one of its number");
        Self {
            at,
            of,
            keys,
            interval_ms,
            hosts_max: HOSTS_MAX,
            records: Vec::new(),
            vacant: Vec::new(),
            index: Index::new(),
            drains: None,
            revoked: BTreeSet::new(),
            news: Vec::new(),
            gone: Vec::new(),
            listed: Vec::new(),
            round: Vec::new(),
            membership: 0,
            dirty: 0,
            last: (false, false),
            relayed: false,
            counters: Counters::default(),
        }
    }

    /// What became of the datagrams so far.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Hosts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len() - self.vacant.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes whenever the map of these hosts would: one came, went, or moved.
    #[must_use]
    pub const fn membership(&self) -> u64 {
        self.membership
    }

    /// Bytes that records and index take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.records.len() * size_of::<Record>() + self.index.bytes()
    }

    /// Whether the last datagram should go to the other aggregators (PROTOCOL 2.10): it brought a host or an address
    /// that they cannot read in the store yet, or `store_away` keeps them from reading anything.
    #[must_use]
    pub const fn is_news_to_peers(&self, store_away: bool) -> bool {
        self.last.0 && (store_away || self.last.1)
    }

    /// Takes one datagram; writes an answer to `out` if it says so.
    pub fn handle_datagram(
        &mut self,
        now_ms: u64,
        bytes: &[u8],
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> Heard {
        self.take_one(now_ms, bytes, out, false)
    }

    /// Takes a datagram that another aggregator sent on (PROTOCOL 2.10): its host is heard there, written from there and
    /// directed from there.
    pub fn handle_relayed(&mut self, now_ms: u64, bytes: &[u8]) {
        let mut unused = [0; DATAGRAM_BYTES_MAX];
        self.take_one(now_ms, bytes, &mut unused, true);
    }

    fn take_one(
        &mut self,
        now_ms: u64,
        bytes: &[u8],
        out: &mut [u8; DATAGRAM_BYTES_MAX],
        relayed: bool,
    ) -> Heard {
        (self.last, self.relayed) = ((false, false), relayed);
        let datagram = match Datagram::parse(bytes) {
            Ok(datagram) => datagram,
            Err(_) => return count(&mut self.counters.malformed),
        };
        match (datagram.kind, datagram.sender.role) {
            (Kind::Heartbeat, Role::Host) => {
                let shard = shard_of(HostId(datagram.sender.id), self.of);
                if shard == self.at {
                    self.handle_beat(now_ms, &datagram, out)
                } else {
                    Heard::Elsewhere(shard)
                }
            }
            (Kind::Records, Role::Host) => self.handle_records(&datagram),
            (Kind::FailureReport | Kind::Subscribe, Role::Placer) => self.handle_placer(&datagram),
            _ => count(&mut self.counters.unexpected),
        }
    }

    /// Of any shard's host: nothing of a host's record here changes by it.
    fn handle_records(&mut self, datagram: &Datagram<'_>) -> Heard {
        let host = HostId(datagram.sender.id);
        let epoch = datagram.sender.key_epoch;
        let cached = self.find(host).and_then(|at| self.records[at as usize].key(epoch));
        let derive = || self.keys.sender(Role::Host, host.0, epoch);
        let Some(key) = cached.or_else(derive) else {
            return count(&mut self.counters.unknown_epoch);
        };
        if datagram.verify(&key).is_none() {
            return count(&mut self.counters.forged);
        }
        if self.revoked.contains(&host) {
            return count(&mut self.counters.revoked);
        }
        self.counters.records += 1;
        Heard::Records(host)
    }

    fn handle_placer(&mut self, datagram: &Datagram<'_>) -> Heard {
        let sender = datagram.sender;
        let Some(key) = self.keys.sender(Role::Placer, sender.id, sender.key_epoch) else {
            return count(&mut self.counters.unknown_epoch);
        };
        let Some(verified) = datagram.verify(&key) else {
            return count(&mut self.counters.forged);
        };
        let heard = if datagram.kind == Kind::FailureReport {
            FailureReport::open(&verified).map(|(placer, report)| Heard::Report { placer, report })
        } else {
            Subscribe::open(&verified).map(|(placer, subscribe)| Heard::Subscribe {
                placer,
                key_epoch: sender.key_epoch,
                subscribe,
            })
        };
        match heard {
            Ok(heard) => {
                self.counters.placers += 1;
                heard
            }
            Err(_) => count(&mut self.counters.malformed),
        }
    }

    fn handle_beat(
        &mut self,
        now_ms: u64,
        datagram: &Datagram<'_>,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> Heard {
        let (id, epoch) = (datagram.sender.id, datagram.sender.key_epoch);
        let at = self.find(HostId(id));
        let cached = at.and_then(|at| self.records[at as usize].key(epoch));
        let derive = || self.keys.sender(Role::Host, id, epoch);
        let Some(key) = cached.clone().or_else(derive) else {
            return count(&mut self.counters.unknown_epoch);
        };
        let Some(verified) = datagram.verify(&key) else {
            return count(&mut self.counters.forged);
        };
        let Ok((host, beat)) = heartbeat::open(&verified) else {
            return count(&mut self.counters.malformed);
        };
        if self.revoked.contains(&host) {
            return count(&mut self.counters.revoked);
        }
        let new = at.is_none();
        let Some(at) = at.or_else(|| self.register(host)) else {
            return count(&mut self.counters.full);
        };
        self.counters.registered += u64::from(new);
        let record = &mut self.records[at as usize];
        match record.order(beat.incarnation, beat.seq) {
            Order::Newer => {}
            Order::Late => {
                record.note_late(beat.seq);
                return count(&mut self.counters.late);
            }
            Order::Replayed => return count(&mut self.counters.replayed),
            Order::Stale => return count(&mut self.counters.stale),
        }
        let before = record.addr();
        record.take(now_ms, &beat);
        if cached.is_none() {
            record.set_key(epoch, &key);
        }
        let moved = before != record.addr();
        self.membership += u64::from(moved);
        if self.relayed {
            record.set(mark::FOREIGN, true);
            self.counters.relayed += 1;
            self.tell_placers(at);
            return Heard::Nothing;
        }
        if moved {
            record.set(mark::UNTOLD, true);
        }
        self.last = (true, record.is(mark::UNTOLD));
        self.counters.accepted += 1;
        self.changed(at);
        self.answer(now_ms, at, &beat, &key, out)
    }

    fn find(&self, host: HostId) -> Option<u32> {
        self.index.get(host.0, |at| self.records[at as usize].host)
    }

    /// A slot for a host that is not known, before its first heartbeat or row is taken.
    fn register(&mut self, host: HostId) -> Option<u32> {
        if self.len() >= self.hosts_max {
            return None;
        }
        let at = match self.vacant.pop() {
            Some(at) => at,
            None => {
                let at = u32::try_from(self.records.len()).ok()?;
                self.records.push(Record::vacant());
                at
            }
        };
        let wanted = self.drains.as_ref().is_some_and(|drains| drains.contains_key(&host));
        let record = &mut self.records[at as usize];
        *record = Record::of(host);
        record.set(mark::DRAIN, wanted);
        let records = &self.records;
        self.index.insert(host.0, at, |at| records[at as usize].host);
        self.membership += 1;
        Some(at)
    }

    /// The directive that answers a heartbeat, if there is something to say or the host asks (PROTOCOL 3.5).
    fn answer(
        &mut self,
        now_ms: u64,
        at: u32,
        beat: &Heartbeat,
        key: &SenderKey,
        out: &mut [u8; DATAGRAM_BYTES_MAX],
    ) -> Heard {
        let record = &self.records[at as usize];
        let mut directive = Directive::answering(beat.incarnation, beat.seq);
        let says_draining = beat.flags & Heartbeat::DRAINING != 0;
        if record.is(mark::DRAIN) {
            let until = self.drains.as_ref().and_then(|drains| drains.get(&HostId(record.host)));
            if !says_draining {
                directive.drain = Directive::DRAIN;
                // A deadline that has passed is said as one millisecond: zero means never.
                directive.drain_deadline_ms =
                    until.copied().flatten().map_or(0, |until| until.saturating_sub(now_ms).max(1));
            }
        } else if says_draining && self.drains.is_some() {
            directive.drain = Directive::RESUME;
        }
        if let Some(interval_ms) = self.interval_ms.filter(|&wanted| wanted != beat.interval_ms) {
            directive.interval_ms = interval_ms;
        }
        let (epoch, target) = (KeyEpoch(record.key_epoch), self.keys.target());
        if epoch < target
            && let Some(next) = self.keys.sender(Role::Host, record.host, target)
        {
            directive.key_epoch = target.0;
            directive.wrapped_key = key.wrap(target, &next.0);
        }
        if directive.is_empty() && beat.flags & Heartbeat::ASK == 0 {
            return Heard::Nothing;
        }
        self.counters.directives += 1;
        Heard::Directive(directive.seal(HostId(record.host), epoch, key, out))
    }
}

fn count(counter: &mut u64) -> Heard {
    *counter += 1;
    Heard::Nothing
}
