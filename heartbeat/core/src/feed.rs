//! Which placers are told of changes, and what goes to each.
//!
//! A placer subscribes and renews; one that is silent for [`SUBSCRIPTION_MS`] is forgotten. Whoever asks for everything
//! gets every host once, in pieces between the changes, and an empty datagram answers each subscription, so that a
//! placer knows its aggregator lives even when nothing changes. Seqs grow per placer: it counts what was lost.

use std::{collections::BTreeMap, net::SocketAddr};

use wire::{
    CapacityWord, HostId,
    feed::{self, ENTRIES_MAX, SUBSCRIPTION_MS, Subscribe},
    limits::DATAGRAM_BYTES_MAX,
    seal::{KeyEpoch, Role, SenderKey},
};

use crate::{keys::KeyRing, limits::SUBSCRIBERS_MAX};

/// Where a snapshot has got to: the shard, and the record in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Which shard.
    pub shard: usize,
    /// Where in it.
    pub record: usize,
}

#[derive(Debug)]
struct Subscriber {
    addr: SocketAddr,
    key_epoch: KeyEpoch,
    key: SenderKey,
    seq: u64,
    sent: u64,
    until_ms: u64,
    snapshot: Option<Cursor>,
}

/// The placers that one aggregator feeds.
#[derive(Debug)]
pub struct Subscriptions {
    aggregator: u64,
    placers: BTreeMap<u64, Subscriber>,
    /// Newest seq of placers that ended or lapsed: replays of theirs must not bring them back.
    ended: BTreeMap<u64, u64>,
    /// Subscriptions that were replays, or over the bound.
    pub refused: u64,
}

impl Subscriptions {
    /// None yet, of this aggregator.
    #[must_use]
    pub const fn new(aggregator: u64) -> Self {
        Self { aggregator, placers: BTreeMap::new(), ended: BTreeMap::new(), refused: 0 }
    }

    /// Placers that are fed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.placers.len()
    }

    /// Whether nobody is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.placers.is_empty()
    }

    /// Takes a subscription that verified and came from `addr`; returns whether an answer is due ([`Self::greet`]).
    pub fn handle_subscribe(
        &mut self,
        now_ms: u64,
        placer: u64,
        addr: SocketAddr,
        key_epoch: KeyEpoch,
        subscribe: &Subscribe,
        keys: &KeyRing,
    ) -> bool {
        let known = self.placers.get(&placer).map(|known| known.seq);
        let last = known.or_else(|| self.ended.get(&placer).copied());
        let full = known.is_none() && self.placers.len() >= SUBSCRIBERS_MAX;
        let key = keys.sender(Role::Placer, placer, key_epoch);
        // PROTOCOL 4.4: "One whose seq is not above the last of that placer MUST be ignored."
        let (false, true, Some(key)) = (full, last.is_none_or(|last| subscribe.seq > last), key)
        else {
            self.refused += 1;
            return false;
        };
        self.ended.remove(&placer);
        if subscribe.want == Subscribe::END {
            self.placers.remove(&placer);
            self.end(placer, subscribe.seq);
            return false;
        }
        let until_ms = now_ms + SUBSCRIPTION_MS;
        let entry = self.placers.entry(placer).or_insert_with(|| Subscriber {
            addr,
            key_epoch,
            key: key.clone(),
            seq: 0,
            sent: 0,
            until_ms,
            snapshot: None,
        });
        (entry.addr, entry.seq, entry.until_ms) = (addr, subscribe.seq, until_ms);
        (entry.key_epoch, entry.key) = (key_epoch, key);
        if subscribe.want == Subscribe::EVERYTHING {
            entry.snapshot = Some(Cursor::default());
        }
        true
    }

    fn end(&mut self, placer: u64, seq: u64) {
        if self.ended.len() >= SUBSCRIBERS_MAX {
            self.ended.pop_first();
        }
        self.ended.insert(placer, seq);
    }

    /// Forgets placers that did not renew.
    pub fn poll(&mut self, now_ms: u64) {
        let lapsed: Vec<_> = self
            .placers
            .iter()
            .filter(|(_, placer)| placer.until_ms <= now_ms)
            .map(|(&id, placer)| (id, placer.seq))
            .collect();
        for (id, seq) in lapsed {
            self.placers.remove(&id);
            self.end(id, seq);
        }
    }

    /// Says `entries` to every placer.
    pub fn say(
        &mut self,
        entries: &[(HostId, CapacityWord)],
        mut send: impl FnMut(SocketAddr, &[u8]),
    ) {
        let aggregator = self.aggregator;
        for (&id, placer) in &mut self.placers {
            for part in entries.chunks(ENTRIES_MAX) {
                placer.say(aggregator, id, part, &mut send);
            }
        }
    }

    /// Answers a subscription with no entries.
    pub fn greet(&mut self, placer: u64, mut send: impl FnMut(SocketAddr, &[u8])) {
        if let Some(subscriber) = self.placers.get_mut(&placer) {
            subscriber.say(self.aggregator, placer, &[], &mut send);
        }
    }

    /// Placers that still want everything, and where each has got to.
    pub fn snapshots(&self) -> impl Iterator<Item = (u64, Cursor)> + '_ {
        self.placers.iter().filter_map(|(&id, placer)| placer.snapshot.map(|cursor| (id, cursor)))
    }

    /// Says a piece of everything to one placer, which goes on at `next`, or has had it all.
    pub fn say_piece(
        &mut self,
        placer: u64,
        entries: &[(HostId, CapacityWord)],
        next: Option<Cursor>,
        mut send: impl FnMut(SocketAddr, &[u8]),
    ) {
        let Some(subscriber) = self.placers.get_mut(&placer) else { return };
        subscriber.snapshot = next;
        for part in entries.chunks(ENTRIES_MAX) {
            subscriber.say(self.aggregator, placer, part, &mut send);
        }
    }
}

impl Subscriber {
    fn say(
        &mut self,
        aggregator: u64,
        id: u64,
        entries: &[(HostId, CapacityWord)],
        send: &mut impl FnMut(SocketAddr, &[u8]),
    ) {
        self.sent += 1;
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let to = (id, self.key_epoch, &self.key);
        let len = feed::seal(aggregator, self.sent, entries, to, &mut out);
        send(self.addr, &out[..len]);
    }
}

#[cfg(test)]
mod tests {
    use wire::{datagram::Datagram, seal::FleetKey};

    use super::*;

    fn keys() -> KeyRing {
        KeyRing::new(vec![FleetKey { epoch: KeyEpoch(1), secret: [3; 32] }]).unwrap()
    }

    fn subscribe(subs: &mut Subscriptions, now_ms: u64, placer: u64, seq: u64, want: u8) -> bool {
        let addr = SocketAddr::from(([127, 0, 0, 1], 9_000));
        let subscribe = Subscribe { seq, want };
        subs.handle_subscribe(now_ms, placer, addr, KeyEpoch(1), &subscribe, &keys())
    }

    #[test]
    fn entries_arrive_sealed_for_each_placer_with_growing_seqs() {
        let mut subs = Subscriptions::new(77);
        assert!(subscribe(&mut subs, 0, 5, 1, Subscribe::EVERYTHING));
        let entries: Vec<_> = (0..200u64).map(|at| (HostId(at), CapacityWord(at))).collect();
        let mut got = Vec::new();
        subs.say(&entries, |_, bytes| {
            let datagram = Datagram::parse(bytes).unwrap();
            let key = keys().sender(Role::Placer, 5, KeyEpoch(1)).unwrap();
            let verified = datagram.verify(&key).unwrap();
            let feed = feed::Feed::open(&verified).unwrap();
            assert_eq!(feed.aggregator, 77);
            got.push((feed.seq, feed.entries().collect::<Vec<_>>()));
        });
        assert_eq!(got.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(got.into_iter().flat_map(|(_, part)| part).collect::<Vec<_>>(), entries);
    }

    #[test]
    fn a_subscription_lapses_ends_and_is_not_replayed() {
        let mut subs = Subscriptions::new(1);
        assert!(subscribe(&mut subs, 0, 5, 10, Subscribe::CHANGES));
        assert!(!subscribe(&mut subs, 1, 5, 10, Subscribe::CHANGES), "a replay");
        assert!(subscribe(&mut subs, 10_000, 5, 11, Subscribe::CHANGES));
        subs.poll(39_999);
        assert_eq!(subs.len(), 1);
        subs.poll(40_000);
        assert!(subs.is_empty());
        assert!(
            !subscribe(&mut subs, 50_000, 5, 11, Subscribe::CHANGES),
            "a replay after it lapsed"
        );
        assert!(subscribe(&mut subs, 50_000, 5, 12, Subscribe::CHANGES));
        assert!(!subscribe(&mut subs, 50_001, 5, 13, Subscribe::END));
        assert!(subs.is_empty());
        assert_eq!(subs.refused, 2);
    }

    #[test]
    fn a_snapshot_goes_on_where_it_was_and_ends() {
        let mut subs = Subscriptions::new(1);
        subscribe(&mut subs, 0, 5, 1, Subscribe::EVERYTHING);
        let next = Cursor { shard: 1, record: 4 };
        subs.say_piece(5, &[(HostId(1), CapacityWord(2))], Some(next), |_, _| {});
        assert_eq!(subs.snapshots().collect::<Vec<_>>(), [(5, next)]);
        subs.say_piece(5, &[], None, |_, _| {});
        assert_eq!(subs.snapshots().count(), 0);
    }
}
