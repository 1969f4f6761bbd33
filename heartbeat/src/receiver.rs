//! A receiver thread: a socket, a shard, and nothing that another thread could hold.
//!
//! Each turn takes a batch of datagrams, sends the directives that answer it, and then looks at what else there is: the
//! inbox, the tick on which changes leave for the hub and rows for the writer. A datagram takes no lock and allocates
//! nothing. Full channels make changes wait in the shard, never in a queue.

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use crossbeam::queue::ArrayQueue;
use heartbeat_core::{
    Heard, Shard,
    flush::Flush,
    limits::RELAYS_A_SECOND_MAX,
    shard::{
        gathered::{GATHERED_BYTES, Gathered},
        upkeep::{Census, Seen},
        writes::Batch,
    },
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use wire::{
    CapacityWord, Fault, HostId,
    datagram::PREFIX_BYTES,
    feed::Subscribe,
    limits::{DATAGRAM_BYTES_MAX, TAG_BYTES},
    map::HostAddr,
    report::FailureReport,
    seal::KeyEpoch,
};
use wire_net::udp::{Receiver, Sender};

use crate::recorded::HeardRecords;
use crate::shards::{Ask, Clock, Figures};

/// How long a receiver waits for datagrams before it looks at its inbox.
const PATIENCE: Duration = Duration::from_millis(5);
/// Records that one turn walks for an ask.
const PIECE: usize = 16_384;
/// Changes that leave for the hub in one message.
const NEWS_MAX: usize = 8_192;
/// Heartbeats that wait for their own shard's thread.
const HANDED_ON_MAX: usize = 4_096;

/// What a placer said, for the hub.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    Report { placer: u64, report: FailureReport },
    Subscribe { placer: u64, addr: SocketAddr, key_epoch: KeyEpoch, subscribe: Subscribe },
}

/// A heartbeat that arrived at another shard's socket.
pub(crate) struct HandedOn {
    bytes: [u8; GATHERED_BYTES],
    len: usize,
    from: SocketAddr,
}

/// Where a receiver's heartbeats for other shards go; shared by all of them.
pub(crate) type Handover = Arc<Vec<ArrayQueue<HandedOn>>>;

pub(crate) fn handover(shards: u32) -> Handover {
    Arc::new((0..shards).map(|_| ArrayQueue::new(HANDED_ON_MAX)).collect())
}

/// Heartbeats that other aggregators are to hear of before the store tells them (PROTOCOL 2.10).
pub(crate) struct Relay {
    peers: Arc<Vec<SocketAddr>>,
    /// Rows do not land: then every heartbeat is sent on, so that nobody dies for it in another's view.
    store_away: bool,
    second: u64,
    left: u32,
    relayed: u64,
    held_back: u64,
}

impl Relay {
    pub(crate) const fn new(peers: Arc<Vec<SocketAddr>>) -> Self {
        Self { peers, store_away: false, second: 0, left: 0, relayed: 0, held_back: 0 }
    }

    fn send(&mut self, now_ms: u64, sender: &mut Sender, bytes: &[u8]) {
        if self.peers.is_empty() {
            return;
        }
        if self.second != now_ms / 1_000 {
            (self.second, self.left) = (now_ms / 1_000, RELAYS_A_SECOND_MAX);
        }
        let Some(left) = self.left.checked_sub(1) else {
            self.held_back += 1;
            return;
        };
        self.left = left;
        self.relayed += 1;
        for peer in &*self.peers {
            // A peer that is dead loses it, as it loses all else.
            let _ = sender.push(bytes, *peer);
        }
    }
}

/// What one receiver thread is given.
pub(crate) struct Outlets {
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) news: mpsc::Sender<Vec<(HostId, CapacityWord)>>,
    pub(crate) batches: mpsc::Sender<(usize, Batch)>,
    pub(crate) records: mpsc::Sender<HeardRecords>,
}

/// All ends of one receiver thread.
pub(crate) struct Ends {
    pub(crate) receiver: Receiver,
    pub(crate) handover: Handover,
    pub(crate) relay: Relay,
    pub(crate) inbox: mpsc::Receiver<Ask>,
    pub(crate) outlets: Outlets,
}

/// Pauses of one receiver thread, in milliseconds.
#[derive(Clone, Copy)]
pub(crate) struct Pauses {
    pub(crate) feed_ms: u64,
    pub(crate) flush_ms: u64,
}

/// An ask that is answered in pieces.
enum Walk {
    Census(usize, u64, Census, oneshot::Sender<Census>),
    Addresses(usize, Vec<(HostId, HostAddr)>, oneshot::Sender<Vec<(HostId, HostAddr)>>),
    Seen(usize, Vec<Seen>, oneshot::Sender<Vec<Seen>>),
}

/// The part of a thread that takes datagrams.
struct Taker {
    shard: Shard,
    sender: Sender,
    handover: Handover,
    events: mpsc::Sender<Event>,
    relay: Relay,
    records: mpsc::Sender<HeardRecords>,
    events_lost: u64,
    handed_on: u64,
}

impl Taker {
    /// Takes a datagram that is too long to be gathered: records of sandboxes, or nothing of ours.
    fn take_long(&mut self, now_ms: u64, bytes: &[u8]) {
        let mut out = [0; DATAGRAM_BYTES_MAX];
        if let Heard::Records(host) = self.shard.handle_datagram(now_ms, bytes, &mut out) {
            let body = bytes[PREFIX_BYTES..bytes.len() - TAG_BYTES].to_vec();
            self.events_lost += u64::from(self.records.try_send((host, body)).is_err());
        }
    }

    fn take(&mut self, now_ms: u64, gathered: &mut Gathered<SocketAddr>) {
        let Self { shard, sender, handover, events, relay, events_lost, handed_on, .. } = self;
        let store_away = relay.store_away;
        let peers = Arc::clone(&relay.peers);
        let relayed = |from: &SocketAddr| peers.contains(from);
        shard.handle_gathered(
            now_ms,
            gathered,
            store_away,
            relayed,
            |heard, news, bytes, answer, from| {
                if news {
                    relay.send(now_ms, sender, bytes);
                }
                let event = match heard {
                    // Records never come here: the shortest is longer than what is gathered.
                    Heard::Nothing | Heard::Records(_) => return,
                    Heard::Directive(_) => {
                        let _ = sender.push(answer, from);
                        return;
                    }
                    Heard::Elsewhere(to) => {
                        *handed_on += 1;
                        hand_on(&handover[to as usize], bytes, from);
                        return;
                    }
                    Heard::Report { placer, report } => Event::Report { placer, report },
                    Heard::Subscribe { placer, key_epoch, subscribe } => {
                        Event::Subscribe { placer, addr: from, key_epoch, subscribe }
                    }
                };
                *events_lost += u64::from(events.try_send(event).is_err());
            },
        );
    }
}

struct Thread {
    at: usize,
    receiver: Receiver,
    taker: Taker,
    gathered: Gathered<SocketAddr>,
    inbox: mpsc::Receiver<Ask>,
    outlets: Outlets,
    pauses: Pauses,
    clock: Clock,
    flush: Flush,
    walks: Vec<Walk>,
    news_at_ms: u64,
    round_at_ms: u64,
}

/// Starts a receiver thread, which ends soon after `stop`.
///
/// # Errors
/// If the kernel gives no thread or no second handle on the socket.
pub(crate) fn spawn(
    at: usize,
    shard: Shard,
    ends: Ends,
    pauses: Pauses,
    clock: Clock,
    stop: CancellationToken,
) -> Result<thread::JoinHandle<()>, Fault> {
    let Ends { receiver, handover, relay, inbox, outlets } = ends;
    let io = |error: std::io::Error| {
        Fault::new(wire::Code::Internal, format!("a receiver thread did not start: {error}"))
    };
    let sender = receiver.sender().map_err(io)?;
    let taker = Taker {
        shard,
        sender,
        handover,
        events: outlets.events.clone(),
        relay,
        records: outlets.records.clone(),
        events_lost: 0,
        handed_on: 0,
    };
    let mut thread = Thread {
        at,
        receiver,
        taker,
        gathered: Gathered::default(),
        inbox,
        outlets,
        pauses,
        clock,
        flush: Flush::default(),
        walks: Vec::new(),
        news_at_ms: 0,
        round_at_ms: 0,
    };
    thread::Builder::new()
        .name(format!("receiver-{at}"))
        .spawn(move || {
            while !stop.is_cancelled() {
                thread.turn();
            }
        })
        .map_err(io)
}

impl Thread {
    fn turn(&mut self) {
        self.taker.relay.store_away = self.flush.failures() > 0;
        self.hear();
        let now_ms = self.clock.now_ms();
        self.take_handed_on(now_ms);
        // A socket that cannot send is said by the figures; receiving goes on.
        let _ = self.taker.sender.flush();
        while let Ok(ask) = self.inbox.try_recv() {
            self.take_ask(now_ms, ask);
        }
        self.walk(now_ms);
        if now_ms >= self.news_at_ms {
            self.news_at_ms = now_ms + self.pauses.feed_ms;
            self.send_news();
        }
        self.send_batches(now_ms);
    }

    fn hear(&mut self) {
        let Self { receiver, clock, gathered, taker, .. } = self;
        // The clock is read once a batch, when its first datagram is there.
        let mut now_ms = None;
        let heard = receiver.recv(PATIENCE, |bytes, from| {
            let now_ms = *now_ms.get_or_insert_with(|| clock.now_ms());
            if bytes.len() > GATHERED_BYTES {
                taker.take_long(now_ms, bytes);
            } else if gathered.push(bytes, from) {
                taker.take(now_ms, gathered);
            }
        });
        if let Some(now_ms) = now_ms {
            taker.take(now_ms, gathered);
        }
        if let Err(error) = heard {
            tracing::error!(%error, "a receiver's socket failed; trying again");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn take_handed_on(&mut self, now_ms: u64) {
        while let Some(handed) = self.taker.handover[self.at].pop() {
            if self.gathered.push(&handed.bytes[..handed.len], handed.from) {
                self.taker.take(now_ms, &mut self.gathered);
            }
        }
        self.taker.take(now_ms, &mut self.gathered);
    }

    fn take_ask(&mut self, now_ms: u64, ask: Ask) {
        let shard = &mut self.taker.shard;
        match ask {
            Ask::Rows(rows) => rows.iter().for_each(|row| {
                shard.handle_row(now_ms, row);
            }),
            Ask::Listed(hosts) => hosts.iter().for_each(|(host, addr)| {
                shard.handle_listed(now_ms, *host, *addr);
            }),
            Ask::Drains(drains, done) => {
                shard.handle_drains(drains);
                let _ = done.send(());
            }
            Ask::Quarantine(host, on) => shard.handle_quarantine(host, on),
            Ask::Suspect(host, on) => shard.handle_suspicion(host, on),
            Ask::Correct(host, word) => shard.handle_correction(host, word),
            Ask::Keys(keys) => shard.handle_keys(keys),
            Ask::Revoked(revoked, reply) => {
                let _ = reply.send(shard.handle_revoked(revoked));
            }
            Ask::Remove(mut silent, reply) => {
                silent.retain(|silent| shard.handle_remove(silent));
                let _ = reply.send(silent);
            }
            Ask::Written(rows, acknowledged) => {
                shard.handle_written(&rows, acknowledged);
                self.flush.handle_done(now_ms, acknowledged);
            }
            Ask::Census(judged_ms, reply) => {
                self.walks.push(Walk::Census(0, judged_ms, Census::default(), reply));
            }
            Ask::Addresses(reply) => self.walks.push(Walk::Addresses(0, Vec::new(), reply)),
            Ask::Seen(reply) => self.walks.push(Walk::Seen(0, Vec::new(), reply)),
            Ask::SeenOf(host, reply) => drop(reply.send(shard.seen_of(now_ms, host))),
            Ask::Words(from, max, reply) => {
                let mut words = Vec::new();
                let next = shard.words(from, max, &mut words);
                let _ = reply.send((words, next));
            }
            Ask::Figures(reply) => {
                let _ = reply.send(self.figures());
            }
            Ask::Flush => self.round_at_ms = 0,
        }
    }

    fn figures(&self) -> Figures {
        Figures {
            counters: *self.taker.shard.counters(),
            hosts: self.taker.shard.len() as u64,
            bytes: self.taker.shard.bytes() as u64,
            kernel_drops: self.receiver.kernel_drops(),
            rcvbuf_bytes: self.receiver.rcvbuf_bytes() as u64,
            dirty: self.taker.shard.dirty() as u64,
            flush_failures: self.flush.failures(),
            membership: self.taker.shard.membership(),
            events_lost: self.taker.events_lost,
            handed_on: self.taker.handed_on,
            relayed: self.taker.relay.relayed,
            held_back: self.taker.relay.held_back,
        }
    }

    /// One piece of the oldest walk.
    fn walk(&mut self, now_ms: u64) {
        let Some(walk) = self.walks.first_mut() else { return };
        let shard = &self.taker.shard;
        let next = match walk {
            Walk::Census(from, judged_ms, census, _) => {
                let next = shard.sweep_as_of(now_ms, *judged_ms, *from, PIECE, census);
                next.inspect(|&next| *from = next)
            }
            Walk::Addresses(from, hosts, _) => {
                let next = shard.addresses(*from, PIECE, hosts);
                next.inspect(|&next| *from = next)
            }
            Walk::Seen(from, seen, _) => {
                let next = shard.seen(now_ms, *from, PIECE, seen);
                next.inspect(|&next| *from = next)
            }
        };
        if next.is_some() {
            return;
        }
        // Nobody may be waiting any more; then the answer is dropped.
        match self.walks.remove(0) {
            Walk::Census(_, _, census, reply) => drop(reply.send(census)),
            Walk::Addresses(_, hosts, reply) => drop(reply.send(hosts)),
            Walk::Seen(_, seen, reply) => drop(reply.send(seen)),
        }
    }

    fn send_news(&mut self) {
        while let Ok(room) = self.outlets.news.try_reserve() {
            let mut news = Vec::new();
            self.taker.shard.take_news(NEWS_MAX, &mut news);
            if news.is_empty() {
                break;
            }
            room.send(news);
        }
    }

    fn send_batches(&mut self, now_ms: u64) {
        if self.taker.shard.round_left() == 0 {
            if now_ms < self.round_at_ms {
                return;
            }
            self.round_at_ms = now_ms + self.pauses.flush_ms;
            if !self.taker.shard.begin_round() {
                return;
            }
        }
        while self.flush.room(now_ms) > 0 {
            let Ok(room) = self.outlets.batches.try_reserve() else { return };
            let Some(batch) = self.taker.shard.take_batch() else { return };
            self.flush.handle_sent();
            room.send((self.at, batch));
        }
    }
}

fn hand_on(queue: &ArrayQueue<HandedOn>, bytes: &[u8], from: SocketAddr) {
    if bytes.len() > GATHERED_BYTES {
        return;
    }
    let mut handed = HandedOn { bytes: [0; GATHERED_BYTES], len: bytes.len(), from };
    handed.bytes[..bytes.len()].copy_from_slice(bytes);
    // A full queue loses a heartbeat, as a full socket does.
    let _ = queue.push(handed);
}
