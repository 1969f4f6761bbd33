//! How the rest of the process talks with the receiver threads: by asking, never by locking.
//!
//! A receiver looks at its inbox between batches of datagrams, so an answer takes some milliseconds. Asks that walk a
//! whole shard are answered in pieces by the receiver, which goes on hearing hosts meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use heartbeat_core::{
    KeyRing, Row,
    shard::{
        Counters, DrainUntil,
        upkeep::{Census, Seen, Silent},
    },
};
use tokio::sync::{mpsc, oneshot};
use wire::{CapacityWord, HostId, map::HostAddr};

/// Asks that wait at one shard, at most.
pub(crate) const INBOX: usize = 256;

/// Milliseconds since this process began: the only clock that decides anything here.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that begins now.
    #[must_use]
    pub fn new() -> Self {
        Self(Instant::now())
    }

    /// Milliseconds since then.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// A moment for people and for the store: milliseconds since 1970. Never compared with another machine's.
#[must_use]
pub fn wall_ms() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Figures of one shard.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Datagrams by outcome.
    pub counters: Counters,
    /// Hosts held.
    pub hosts: u64,
    /// Bytes of records and index.
    pub bytes: u64,
    /// Datagrams that the kernel dropped for want of room.
    pub kernel_drops: u64,
    /// Bytes of receive buffer.
    pub rcvbuf_bytes: u64,
    /// Rows that the store does not have yet.
    pub dirty: u64,
    /// Batches that failed since the last that did not.
    pub flush_failures: u64,
    /// Changes whenever the map would.
    pub membership: u64,
    /// Heartbeats that arrived at another shard's socket.
    pub handed_on: u64,
    /// Heartbeats that were sent on to the other aggregators.
    pub relayed: u64,
    /// Those that were not, for want of budget: they wait for the next heartbeat or the store.
    pub held_back: u64,
    /// Reports and subscriptions that the hub had no room for.
    pub events_lost: u64,
}

/// What a shard is asked.
pub(crate) enum Ask {
    Rows(Vec<Row>),
    /// Hosts that the published map names.
    Listed(Vec<(HostId, HostAddr)>),
    Drains(BTreeMap<HostId, DrainUntil>, oneshot::Sender<()>),
    Quarantine(HostId, bool),
    Suspect(HostId, bool),
    Correct(HostId, CapacityWord),
    Keys(KeyRing),
    Revoked(BTreeSet<HostId>, oneshot::Sender<Vec<Silent>>),
    Remove(Vec<Silent>, oneshot::Sender<Vec<Silent>>),
    Written(Vec<(HostId, i64)>, bool),
    /// As of this time: see `Shard::sweep_as_of`.
    Census(u64, oneshot::Sender<Census>),
    Addresses(oneshot::Sender<Vec<(HostId, HostAddr)>>),
    Seen(oneshot::Sender<Vec<Seen>>),
    SeenOf(HostId, oneshot::Sender<Option<Seen>>),
    Words(usize, usize, oneshot::Sender<Words>),
    Figures(oneshot::Sender<Figures>),
    /// Write what is dirty now, whatever the time.
    Flush,
}

/// Some words of a shard, and where to go on.
pub(crate) type Words = (Vec<(HostId, CapacityWord)>, Option<usize>);

/// All receiver threads of this process.
#[derive(Clone)]
pub struct Shards {
    inboxes: Vec<mpsc::Sender<Ask>>,
}

impl Shards {
    pub(crate) fn new(inboxes: Vec<mpsc::Sender<Ask>>) -> Self {
        Self { inboxes }
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inboxes.len()
    }

    /// Whether there is none, which is never so.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inboxes.is_empty()
    }

    /// Tells one shard. A receiver that has stopped hears nothing any more, which is as it should be.
    pub(crate) async fn tell(&self, shard: usize, ask: Ask) {
        let _ = self.inboxes[shard].send(ask).await;
    }

    /// Tells every shard.
    pub(crate) async fn tell_all(&self, ask: impl Fn() -> Ask) {
        for shard in 0..self.len() {
            self.tell(shard, ask()).await;
        }
    }

    /// Tells the shard of a host.
    pub(crate) async fn tell_host(&self, host: HostId, ask: Ask) {
        let shards = u32::try_from(self.len()).unwrap_or(1);
        self.tell(heartbeat_core::shard::shard_of(host, shards) as usize, ask).await;
    }

    /// Asks every shard at once and gathers what comes back; a stopped one is left out.
    pub(crate) async fn ask_all<T>(&self, ask: impl Fn(oneshot::Sender<T>) -> Ask) -> Vec<T> {
        let mut replies = Vec::with_capacity(self.len());
        for shard in 0..self.len() {
            let (send, reply) = oneshot::channel();
            self.tell(shard, ask(send)).await;
            replies.push(reply);
        }
        let mut answers = Vec::with_capacity(replies.len());
        for reply in replies {
            answers.extend(reply.await);
        }
        answers
    }

    /// Some words of one shard.
    pub(crate) async fn words(&self, shard: usize, from: usize, max: usize) -> Words {
        let (send, reply) = oneshot::channel();
        self.tell(shard, Ask::Words(from, max, send)).await;
        reply.await.unwrap_or_default()
    }

    /// Rows of the store, each to its shard.
    pub(crate) async fn restore(&self, rows: Vec<Row>) {
        let shards = u32::try_from(self.len()).unwrap_or(1);
        let mut parts = vec![Vec::new(); self.len()];
        for row in rows {
            parts[heartbeat_core::shard::shard_of(row.host, shards) as usize].push(row);
        }
        for (shard, part) in parts.into_iter().enumerate() {
            // In pieces, so that no receiver is away from its socket for long.
            for piece in part.chunks(4_096) {
                self.tell(shard, Ask::Rows(piece.to_vec())).await;
            }
        }
    }

    /// Hosts that the published map names, each to its shard.
    pub(crate) async fn list(&self, hosts: impl Iterator<Item = (HostId, HostAddr)>) {
        let shards = u32::try_from(self.len()).unwrap_or(1);
        let mut parts = vec![Vec::new(); self.len()];
        for (host, addr) in hosts {
            parts[heartbeat_core::shard::shard_of(host, shards) as usize].push((host, addr));
        }
        for (shard, part) in parts.into_iter().enumerate() {
            self.tell(shard, Ask::Listed(part)).await;
        }
    }

    /// Counts all hosts, as of now.
    pub async fn census(&self) -> Census {
        self.census_of(u64::MAX).await
    }

    /// Counts all hosts; who is silent is judged as of then.
    pub(crate) async fn census_of(&self, judged_ms: u64) -> Census {
        let mut census = Census::default();
        for part in self.ask_all(|reply| Ask::Census(judged_ms, reply)).await {
            census.add(part);
        }
        census
    }

    /// All hosts as an operator sees them, by id.
    pub async fn seen(&self) -> Vec<Seen> {
        let mut seen: Vec<Seen> = self.ask_all(Ask::Seen).await.into_iter().flatten().collect();
        seen.sort_unstable_by_key(|seen| seen.row.host);
        seen
    }

    /// One host as an operator sees it.
    pub(crate) async fn seen_of(&self, host: HostId) -> Option<Seen> {
        let (send, reply) = oneshot::channel();
        self.tell_host(host, Ask::SeenOf(host, send)).await;
        reply.await.ok().flatten()
    }

    /// All hosts and addresses, by id.
    pub async fn addresses(&self) -> Vec<(HostId, HostAddr)> {
        let mut hosts: Vec<_> = self.ask_all(Ask::Addresses).await.into_iter().flatten().collect();
        hosts.sort_unstable_by_key(|(host, _)| *host);
        hosts.dedup_by_key(|(host, _)| *host);
        hosts
    }

    /// Figures of every shard.
    pub async fn figures(&self) -> Vec<Figures> {
        self.ask_all(Ask::Figures).await
    }
}
