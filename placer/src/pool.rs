//! Warm connections to hosts, one thread's own.
//!
//! A host is dialled when something first goes there; those who come meanwhile wait for the same dial. A host that cannot
//! be reached rests, longer with each failure. A connection on which something is outstanding and nothing comes in is
//! probed after [`PROBE`] and given up after [`DEAF`], if not even an acknowledgement came: what was on it is then of unknown
//! outcome, asked again over a fresh connection, and what comes after it is not sent to a dead host at all. A host that
//! is merely slow acknowledges the probe. Above the bound the connections idle for longest are closed; their hosts'
//! session tickets are kept by the endpoint, so that a dial of one of them is cheaper.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use futures::{
    FutureExt,
    future::{LocalBoxFuture, Shared},
};
use quinn::{Connection, Endpoint};
use wire::{Code, Fault, HostId, call::Call};
use wire_net::{
    lane::{Landed, LandedReplies, Lane},
    quic, stream,
    tls::{Identity, Peer},
};

use crate::metrics::WorkerMetrics;

/// A dial gives up after this: a host in the same data centre answers in a millisecond.
const DIAL: Duration = Duration::from_secs(1);
/// First rest of a host that was not reached, and the longest.
const REST: Duration = Duration::from_millis(100);
const REST_MAX: Duration = Duration::from_secs(2);
/// So long without any packet although something is outstanding: then something is sent that must be acknowledged.
const PROBE: Duration = Duration::from_millis(250);
/// And so long in all until the connection is given up. Acknowledgements come within milliseconds.
const DEAF: Duration = Duration::from_millis(750);

type Dial = Shared<LocalBoxFuture<'static, Result<Rc<Link>, Fault>>>;

/// A connection to a host.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) connection: Connection,
    pub(crate) lane: Lane,
    addr: SocketAddr,
    outstanding: Cell<u32>,
    /// Streams that are passed through: they may be silent for hours.
    held: Cell<u32>,
    /// Looked at and set by [`Pool::tend`] only: a launch reads no clock for it.
    used: Cell<Instant>,
    touched: Cell<bool>,
    /// Packets that had come, and since when none has; none before the first look after something was sent.
    heard: Cell<Option<(u64, Instant)>>,
    probed: Cell<bool>,
    /// The lane has broken, or the connection was closed here.
    dead: Cell<bool>,
}

/// A stream of the link is in use for as long as this lives.
#[derive(Debug)]
pub(crate) struct Held(Rc<Link>);

/// Something is outstanding on a link for as long as this lives.
#[derive(Debug)]
pub(crate) struct Outstanding(Rc<Link>);

impl Link {
    /// Something is sent that will be answered.
    pub(crate) fn outstanding(self: &Rc<Self>) -> Outstanding {
        if self.outstanding.get() == 0 {
            self.heard.set(None);
            self.probed.set(false);
        }
        self.touched.set(true);
        self.outstanding.set(self.outstanding.get() + 1);
        Outstanding(Rc::clone(self))
    }

    /// A stream is passed through.
    pub(crate) fn hold(self: &Rc<Self>) -> Held {
        self.held.set(self.held.get() + 1);
        Held(Rc::clone(self))
    }

    fn is_idle(&self) -> bool {
        self.outstanding.get() == 0 && self.held.get() == 0
    }

    fn received(&self) -> u64 {
        self.connection.stats().udp_rx.datagrams
    }

    fn is_alive(&self) -> bool {
        !self.dead.get() && self.connection.close_reason().is_none() && self.lane.is_open()
    }

    fn close(&self, why: &[u8]) {
        self.dead.set(true);
        self.connection.close(0u32.into(), why);
    }

    /// Whether the host is gone as far as can be told; sends a probe before it says so.
    fn is_deaf(&self, now: Instant) -> bool {
        if self.outstanding.get() == 0 {
            return false;
        }
        let newest = self.received();
        let since = match self.heard.get() {
            Some((received, since)) if received == newest => since,
            _ => {
                self.heard.set(Some((newest, now)));
                self.probed.set(false);
                return false;
            }
        };
        let silent = now.saturating_duration_since(since);
        if silent >= PROBE && !self.probed.replace(true) {
            let connection = self.connection.clone();
            tokio::task::spawn_local(async move { stream::call(&connection, &Call::Ping).await });
        }
        silent >= DEAF
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - 1);
        self.0.touched.set(true);
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        let link = &self.0;
        link.outstanding.set(link.outstanding.get() - 1);
    }
}

enum Entry {
    Open(Rc<Link>),
    Dialling(SocketAddr, Dial),
    Resting { until: Instant, failures: u32, fault: Fault },
}

/// Host ids are drawn at random by the fleet's own authority, so that mixing them once spreads them.
#[derive(Default)]
struct HostHasher(u64);

impl Hasher for HostHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// Takes replies to launches that were sent with a token.
pub(crate) type Deliver = Rc<dyn Fn(&mut Vec<Landed>)>;

/// One thread's connections.
pub(crate) struct Pool {
    identity: Identity,
    endpoints: RefCell<[Option<Endpoint>; 2]>,
    entries: RefCell<HashMap<HostId, Entry, BuildHasherDefault<HostHasher>>>,
    deliver: Deliver,
    links_max: usize,
    metrics: WorkerMetrics,
}

impl Pool {
    /// A pool that keeps up to `links_max` connections warm.
    pub(crate) fn new(
        identity: Identity,
        links_max: usize,
        metrics: WorkerMetrics,
        deliver: Deliver,
    ) -> Self {
        Self {
            deliver,
            identity,
            endpoints: RefCell::default(),
            entries: RefCell::default(),
            links_max,
            metrics,
        }
    }

    /// The endpoint that dials addresses of this family.
    pub(crate) fn endpoint(&self, to: SocketAddr) -> Result<Endpoint, Fault> {
        let mut endpoints = self.endpoints.borrow_mut();
        let slot = &mut endpoints[usize::from(to.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let v4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let any = if to.is_ipv6() { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { v4 };
        Ok(slot.insert(quic::dialer(SocketAddr::new(any, 0), &self.identity)?).clone())
    }

    /// The connection to a host, if there is one.
    #[inline]
    pub(crate) fn open(&self, host: HostId, addr: SocketAddr) -> Option<Rc<Link>> {
        match self.entries.borrow().get(&host) {
            Some(Entry::Open(link)) if link.addr == addr && !link.dead.get() => {
                Some(Rc::clone(link))
            }
            _ => None,
        }
    }

    /// The connection to a host, dialled if need be within `patience`.
    pub(crate) async fn get(
        self: &Rc<Self>,
        host: HostId,
        addr: SocketAddr,
        patience: Duration,
    ) -> Result<Rc<Link>, Fault> {
        if let Some(link) = self.open(host, addr) {
            return Ok(link);
        }
        let dial = self.dial(host, addr)?;
        tokio::time::timeout(patience.min(DIAL), dial).await.unwrap_or_else(|_| {
            let message =
                format!("host {host} at {addr} was not reached in time, nothing was sent");
            Err(Fault::new(Code::Unreachable, message))
        })
    }

    /// A dial of the host: the one under way, or a new one.
    fn dial(self: &Rc<Self>, host: HostId, addr: SocketAddr) -> Result<Dial, Fault> {
        let mut entries = self.entries.borrow_mut();
        let failures = match entries.get(&host) {
            Some(Entry::Dialling(to, dial)) if *to == addr => return Ok(dial.clone()),
            Some(Entry::Resting { until, fault, .. }) if Instant::now() < *until => {
                return Err(fault.clone());
            }
            Some(Entry::Resting { failures, .. }) => *failures,
            _ => 0,
        };
        let endpoint = self.endpoint(addr)?;
        let pool = Rc::clone(self);
        let dial = async move {
            let peer = Peer::Host(host);
            let connect = async {
                let connection = quic::connect(&endpoint, addr, &peer).await?;
                let (lane, replies) = Lane::open_direct(&connection).await?;
                Ok((connection, lane, replies))
            };
            let dialled = tokio::time::timeout(DIAL, connect).await.unwrap_or_else(|_| {
                let message = format!("host {host} at {addr} did not answer a dial");
                Err(Fault::new(Code::Unreachable, message))
            });
            pool.dialled(host, addr, failures, dialled)
        };
        let dial = dial.boxed_local().shared();
        entries.insert(host, Entry::Dialling(addr, dial.clone()));
        // It goes on when all who wait for it have gone.
        tokio::task::spawn_local(dial.clone());
        Ok(dial)
    }

    fn dialled(
        &self,
        host: HostId,
        addr: SocketAddr,
        failures: u32,
        dialled: Result<(Connection, Lane, LandedReplies), Fault>,
    ) -> Result<Rc<Link>, Fault> {
        let now = Instant::now();
        let (entry, result) = match dialled {
            Ok((connection, lane, replies)) => {
                let link = Rc::new(Link {
                    connection,
                    lane,
                    addr,
                    outstanding: Cell::new(0),
                    held: Cell::new(0),
                    probed: Cell::new(false),
                    used: Cell::new(now),
                    touched: Cell::new(false),
                    heard: Cell::new(None),
                    dead: Cell::new(false),
                });
                let read = read(Rc::downgrade(&link), replies, Rc::clone(&self.deliver));
                tokio::task::spawn_local(read);
                (Entry::Open(Rc::clone(&link)), Ok(link))
            }
            Err(fault) => {
                self.metrics.dials_failed.inc();
                let rest = REST.saturating_mul(1 << failures.min(5)).min(REST_MAX);
                let failures = failures.saturating_add(1);
                let until = now + rest;
                (Entry::Resting { until, failures, fault: fault.clone() }, Err(fault))
            }
        };
        self.entries.borrow_mut().insert(host, entry);
        result
    }

    /// Gives up dead connections, forgets hosts that rested, and closes what is above the bound. Called every tenth of
    /// a second or so.
    pub(crate) fn tend(&self, now: Instant) {
        let mut idle = Vec::new();
        let mut open = 0;
        self.entries.borrow_mut().retain(|host, entry| match entry {
            Entry::Open(link) => {
                if link.touched.replace(false) || !link.is_idle() {
                    link.used.set(now);
                }
                if link.is_deaf(now) {
                    tracing::debug!(%host, addr = %link.addr, "host is deaf, connection given up");
                    link.close(b"deaf");
                }
                let alive = link.is_alive();
                open += usize::from(alive);
                if alive && link.is_idle() {
                    idle.push((link.used.get(), *host));
                }
                alive
            }
            Entry::Dialling(..) => true,
            Entry::Resting { until, .. } => now < *until + REST_MAX,
        });
        self.metrics.connections.set(i64::try_from(open).unwrap_or(i64::MAX));
        if open > self.links_max {
            idle.sort_unstable();
            let mut entries = self.entries.borrow_mut();
            for (_, host) in idle.into_iter().take(open - self.links_max) {
                if let Some(Entry::Open(link)) = entries.remove(&host) {
                    link.close(b"idle");
                }
            }
        }
    }

    /// Closes all connections.
    pub(crate) async fn close(&self) {
        let endpoints = self.endpoints.borrow().clone();
        for endpoint in endpoints.into_iter().flatten() {
            endpoint.close(0u32.into(), b"stopped");
            let _ = tokio::time::timeout(Duration::from_millis(200), endpoint.wait_idle()).await;
        }
    }
}

/// Hands on a link's replies until its lane breaks.
async fn read(link: Weak<Link>, mut replies: LandedReplies, deliver: Deliver) {
    let mut landed = Vec::new();
    while replies.next(&mut landed).await {
        deliver(&mut landed);
    }
    if let Some(link) = link.upgrade() {
        link.dead.set(true);
    }
    deliver(&mut landed);
}
