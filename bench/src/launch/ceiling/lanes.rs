//! One long-lived stream a connection; what is ready together is written together.
//!
//! Messages are counted, not parsed: each is as long as the last. Their bytes are written anew at each hop, as a relay must that
//! changes a budget. A relay remembers, for each host's stream, whose
//! requests went there, since an echo answers in order.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::Notify;
use wire::{Code, Fault};

use super::Shape;

const TURN_BYTES: usize = 64 * 1024;
/// Messages of one write at most.
const WRITE_MAX: usize = 1_024;

/// Messages that wait for a stream's writer.
#[derive(Default)]
struct Outgoing {
    count: AtomicUsize,
    ready: Notify,
}

impl Outgoing {
    fn add(&self, count: usize) {
        if self.count.fetch_add(count, Ordering::Relaxed) == 0 {
            self.ready.notify_one();
        }
    }

    async fn write(&self, mut send: SendStream, message: usize) {
        loop {
            // Whoever is ready to run may add to the write.
            tokio::task::yield_now().await;
            let count = self.count.load(Ordering::Relaxed).min(WRITE_MAX);
            if count == 0 {
                self.ready.notified().await;
                continue;
            }
            self.count.fetch_sub(count, Ordering::Relaxed);
            // One copy of each byte, at this hop as at any.
            let bytes = std::hint::black_box(vec![0x5a; count * message]);
            if send.write_chunk(Bytes::from(bytes)).await.is_err() {
                return;
            }
        }
    }
}

/// Whole messages out of a stream.
struct Incoming {
    recv: RecvStream,
    message: usize,
    have: usize,
}

impl Incoming {
    async fn next(&mut self) -> Option<usize> {
        let chunk = self.recv.read_chunk(TURN_BYTES, true).await.ok()??;
        self.have += chunk.bytes.len();
        let count = self.have / self.message;
        self.have %= self.message;
        Some(count)
    }
}

struct Host {
    out: Outgoing,
    /// Whose requests are under way there, oldest first.
    whose: Mutex<VecDeque<Arc<Outgoing>>>,
}

/// Streams to the echoes behind a relay, taken in turn.
pub(super) struct Hosts {
    hosts: Vec<Arc<Host>>,
    turn: AtomicUsize,
}

impl Hosts {
    pub(super) async fn open(connections: &[Connection], shape: Shape) -> Result<Self, Fault> {
        let mut hosts = Vec::new();
        for connection in connections {
            let (send, recv) = connection
                .open_bi()
                .await
                .map_err(|error| Fault::new(Code::Internal, error.to_string()))?;
            let host = Arc::new(Host { out: Outgoing::default(), whose: Mutex::default() });
            let writer = Arc::clone(&host);
            tokio::spawn(async move { writer.out.write(send, shape.request).await });
            tokio::spawn(pass_replies(Arc::clone(&host), recv, shape));
            hosts.push(host);
        }
        Ok(Self { hosts, turn: AtomicUsize::new(0) })
    }

    fn pass(&self, client: &Arc<Outgoing>, count: usize) {
        for _ in 0..count {
            let at = self.turn.fetch_add(1, Ordering::Relaxed) % self.hosts.len();
            let host = &self.hosts[at];
            let mut whose = host.whose.lock().unwrap_or_else(PoisonError::into_inner);
            whose.push_back(Arc::clone(client));
            host.out.add(1);
        }
    }
}

async fn pass_replies(host: Arc<Host>, recv: RecvStream, shape: Shape) {
    let mut incoming = Incoming { recv, message: shape.reply, have: 0 };
    while let Some(count) = incoming.next().await {
        let mut whose = host.whose.lock().unwrap_or_else(PoisonError::into_inner);
        for client in whose.drain(..count) {
            client.add(1);
        }
    }
}

pub(super) async fn answer_all(connection: Connection, hosts: &Hosts, shape: Shape) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        let out = Arc::new(Outgoing::default());
        let mut incoming = Incoming { recv, message: shape.request, have: 0 };
        let writing = out.write(send, shape.reply);
        let reading = async {
            while let Some(count) = incoming.next().await {
                if hosts.hosts.is_empty() {
                    out.add(count);
                } else {
                    hosts.pass(&out, count);
                }
            }
        };
        // A connection has one stream here, so that serving it may hold up the next.
        tokio::select! {
            () = writing => {}
            () = reading => {}
        }
    }
}

/// One connection's share of those in flight; returns when the connection breaks.
pub(super) async fn offer(connection: &Connection, shape: Shape, at: usize, done: &AtomicU64) {
    let share =
        shape.in_flight / shape.connections + usize::from(at < shape.in_flight % shape.connections);
    let Ok((send, recv)) = connection.open_bi().await else { return };
    let out = Outgoing::default();
    out.add(share);
    let mut incoming = Incoming { recv, message: shape.reply, have: 0 };
    let reading = async {
        while let Some(count) = incoming.next().await {
            out.add(count);
            done.fetch_add(count as u64, Ordering::Relaxed);
        }
    };
    // Two tasks' worth of turns in one: the writer yields, so that all replies that are here are answered together.
    tokio::select! {
        () = out.write(send, shape.request) => {}
        () = reading => {}
    }
}
