//! The client and its connections to placers.
//!
//! One connection a placer, dialled when first needed and again when it broke. A placer that cannot be reached is passed
//! over for a while that grows with each failure. Calls go to placers in turn; any of them serves any call.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use quinn::{Connection, Endpoint};
use wire::{
    Code, Fault, HostId, LaunchId, SandboxId,
    call::{Answer, Call, HostRecord, SandboxRecord},
    limits::BUDGET_MS_DEFAULT,
    records::Listed,
    seal::Role,
};
use wire_net::{lane::Lane, listing::HostList, quic, stream, tls};

use crate::{CallError, Sandbox, draw_id};

/// First wait before a placer that could not be reached is tried again, and the longest.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// How to reach a fleet.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Addresses of placers; one is enough, more survive the loss of one.
    pub placers: Vec<SocketAddr>,
    /// Directory with `cert.pem`, `key.pem` and `ca.pem`, as `volley init` writes it.
    pub identity: PathBuf,
    /// In whose name to launch. A tenant's certificate says it and allows no other; an operator must choose.
    pub tenant: Option<String>,
    /// Time that a launch may take unless its spec says otherwise.
    pub budget: Duration,
    /// Connections a placer. One carries tens of thousands of launches a second, but to one core of the placer; a
    /// program that needs more takes a few.
    pub connections: usize,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            placers: Vec::new(),
            identity: PathBuf::new(),
            tenant: None,
            budget: Duration::from_millis(u64::from(BUDGET_MS_DEFAULT)),
            connections: 1,
        }
    }
}

/// A list as hosts last said it: [`Client::list_recorded`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Sandboxes, newest first.
    pub listed: Vec<Listed>,
    /// Whether older ones were left out for want of room.
    pub more: bool,
}

/// A fleet as a program sees it. Cheap to clone; all clones share the connections.
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// One an address family in use: IPv4, IPv6.
    endpoints: [Option<Endpoint>; 2],
    links: Vec<Link>,
    pub(crate) tenant: String,
    pub(crate) budget: Duration,
    turn: AtomicUsize,
}

/// A connection, and the lane on it that all launches share.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) connection: Connection,
    pub(crate) lane: Lane,
}

/// One way to a placer.
#[derive(Debug)]
pub(crate) struct Link {
    addr: SocketAddr,
    dialled: Mutex<Dialled>,
    /// One dial at a time; others wait for its connection.
    dialling: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Dialled {
    open: Option<Open>,
    failures: u32,
    not_before: Option<Instant>,
}

impl Link {
    fn new(addr: SocketAddr) -> Self {
        Self { addr, dialled: Mutex::default(), dialling: tokio::sync::Mutex::default() }
    }

    fn dialled(&self) -> std::sync::MutexGuard<'_, Dialled> {
        // Nothing panics under this lock; and its value is whole after each statement.
        self.dialled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alive(&self) -> Option<Open> {
        let dialled = self.dialled();
        let alive = |open: &&Open| open.connection.close_reason().is_none() && open.lane.is_open();
        dialled.open.as_ref().filter(alive).cloned()
    }

    fn rests(&self, now: Instant) -> bool {
        self.dialled().not_before.is_some_and(|at| now < at)
    }
}

impl Client {
    /// Connects to the first placer that answers; the others are dialled when needed.
    ///
    /// # Errors
    /// [`Code::Config`] without placers or tenant, [`Code::Unauthenticated`] and [`Code::Clock`] by certificate,
    /// [`Code::Unreachable`] if no placer answers.
    pub async fn connect(options: ConnectOptions) -> Result<Self, Fault> {
        tls::install_provider();
        let identity = tls::Identity::load(&options.identity)?;
        Self::connect_as(&identity, options).await
    }

    /// As [`Client::connect`], with an identity that is at hand; `options.identity` is not read.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_as(
        identity: &tls::Identity,
        options: ConnectOptions,
    ) -> Result<Self, Fault> {
        let client = Self::over(identity, options)?;
        client.open_link().await?;
        Ok(client)
    }

    fn over(identity: &tls::Identity, options: ConnectOptions) -> Result<Self, Fault> {
        if options.placers.is_empty() {
            return Err(Fault::new(Code::Config, "no placer's address was given"));
        }
        let tenant = match (identity.peer.tenant(), options.tenant) {
            (Some(own), None) => own.to_owned(),
            (Some(own), Some(said)) if own == said => said,
            (Some(own), Some(said)) => {
                let message = format!("the certificate is tenant {own}'s, not {said}'s");
                return Err(Fault::new(Code::Forbidden, message));
            }
            (None, Some(said)) => said,
            (None, None) => String::new(),
        };
        let endpoint = |v6: bool| -> Result<Option<Endpoint>, Fault> {
            let wanted = options.placers.iter().any(|addr| addr.is_ipv6() == v6);
            let any =
                if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
            wanted
                .then(|| quic::dialer(SocketAddr::new(any, 0), identity))
                .transpose()
                .map_err(Fault::from)
        };
        let inner = Inner {
            endpoints: [endpoint(false)?, endpoint(true)?],
            // Clients that start together do not all begin with the first.
            turn: AtomicUsize::new(usize::from(draw_id().0[15])),
            links: (0..options.connections.max(1))
                .flat_map(|_| options.placers.iter().copied().map(Link::new))
                .collect(),
            tenant,
            budget: options.budget,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The tenant in whose name this client launches; empty for an operator who did not choose.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.inner.tenant
    }

    /// A sandbox by its id. Nothing is sent until something is asked of it.
    #[must_use]
    pub fn sandbox(&self, id: SandboxId) -> Sandbox {
        Sandbox::of(self.clone(), id)
    }

    /// The tenant's sandboxes that have all of `labels`, newest first, as their hosts last said them; those that have ended
    /// too, if `ended`. Eventually right: what changed a second or two ago may be missing, and each record says how long
    /// ago it was heard. No host is asked, however large the fleet is.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list_recorded(
        &self,
        labels: &[(String, String)],
        ended: bool,
    ) -> Result<Recorded, CallError> {
        let (tenant, labels) = (self.inner.tenant.clone(), labels.to_vec());
        match self.ask(&Call::ListRecorded { tenant, labels, ended }).await? {
            Answer::Listed { listed, more } => Ok(Recorded { listed, more }),
            _ => Err(CallError::protocol("a list was not answered by a list")),
        }
    }

    /// The same of this moment: every host is asked. For fleets of up to the placer's `list_hosts_max` hosts; see
    /// [`Client::list_recorded`] for others.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list(
        &self,
        labels: &[(String, String)],
        ended: bool,
    ) -> Result<Vec<SandboxRecord>, CallError> {
        let call = Call::List { tenant: self.inner.tenant.clone(), labels: labels.to_vec(), ended };
        match self.ask(&call).await? {
            Answer::Sandboxes(records) => Ok(records),
            _ => Err(CallError::protocol("a list was not answered by a list")),
        }
    }

    /// All hosts. For operators.
    ///
    /// # Errors
    /// [`CallError`]; [`Code::Forbidden`] for a tenant.
    pub async fn hosts(&self) -> Result<Vec<HostRecord>, CallError> {
        let (_, open) = self.open_link().await?;
        Ok(HostList::open(&open.connection).await?.all().await?)
    }

    /// One host. For operators.
    ///
    /// # Errors
    /// [`CallError`]; [`Code::HostNotFound`] if the fleet knows no such host, [`Code::Forbidden`] for a tenant.
    pub async fn host(&self, host: HostId) -> Result<HostRecord, CallError> {
        match self.ask(&Call::Host(host)).await? {
            Answer::Hosts(mut records) if records.len() == 1 => Ok(records.swap_remove(0)),
            _ => Err(CallError::protocol("a host was not answered by a host")),
        }
    }

    /// Takes a host out of service: no new work, and what runs is stopped after `deadline`, if one is given. Returns once
    /// the flag is durable. For operators.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn drain(
        &self,
        host: HostId,
        deadline: Option<Duration>,
        message: &str,
    ) -> Result<(), CallError> {
        let deadline_ms = deadline.map_or(0, crate::spec::millis);
        self.ask_done(&Call::Drain { host, deadline_ms, message: message.to_owned() }).await
    }

    /// Puts a host back into service. For operators.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn resume_host(&self, host: HostId) -> Result<(), CallError> {
        self.ask_done(&Call::Undrain(host)).await
    }

    /// Ends a launch, whether it has started or not, and sees to it that it never starts: one of unknown outcome
    /// ([`crate::LaunchError::Unknown`]), or one whose future was dropped.
    ///
    /// # Errors
    /// [`CallError`]: it may run yet. With [`Code::NotFound`] no placer knows it; of a named launch that means that it is
    /// cancelled on its home hosts.
    pub async fn cancel(&self, launch: LaunchId) -> Result<(), CallError> {
        let call = Call::Cancel { launch_id: launch, host: HostId(0) };
        let mut last = None;
        // One of the placers has it, unless it is named: that one decides.
        for at in 0..self.inner.links.len() {
            let answer = match self.open_to(at).await {
                Ok(open) => stream::call(&open.connection, &call).await,
                Err(fault) => Err(fault),
            };
            match answer {
                Ok(_) => return Ok(()),
                Err(fault) if last.is_some() && fault.code == Code::NotFound => {}
                Err(fault) => last = Some(fault),
            }
        }
        Err(last.map_or_else(|| CallError::lost("no placer was asked"), CallError))
    }

    /// Asks a placer for a sign of life.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn ping(&self) -> Result<(), CallError> {
        self.ask_done(&Call::Ping).await
    }

    /// Ends the connections after what was sent has left. Streams still open break.
    pub async fn close(&self) {
        for endpoint in self.inner.endpoints.iter().flatten() {
            endpoint.close(0u32.into(), b"done");
            // A placer that is gone must not hold the program's end up.
            let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
        }
    }

    /// One call, one answer.
    pub(crate) async fn ask(&self, call: &Call) -> Result<Answer, CallError> {
        let (_, open) = self.open_link().await?;
        Ok(stream::call(&open.connection, call).await?)
    }

    pub(crate) async fn ask_done(&self, call: &Call) -> Result<(), CallError> {
        match self.ask(call).await? {
            Answer::Done => Ok(()),
            _ => Err(CallError::protocol("done was expected")),
        }
    }

    /// A connection to the next placer that can be reached, and which one that is.
    pub(crate) async fn open_link(&self) -> Result<(usize, Open), Fault> {
        let links = self.inner.links.len();
        let first = self.inner.turn.fetch_add(1, Ordering::Relaxed);
        let turns = (0..links).map(|turn| first.wrapping_add(turn) % links);
        let now = Instant::now();
        // Those that rest are tried last: they may be all there is.
        let (resting, ready): (Vec<_>, Vec<_>) =
            turns.partition(|&at| self.inner.links[at].rests(now));
        let mut last = Fault::new(Code::Unreachable, "no placer's address was given");
        for at in ready.into_iter().chain(resting) {
            match self.open_to(at).await {
                Ok(open) => return Ok((at, open)),
                Err(fault) => last = fault,
            }
        }
        Err(last)
    }

    /// The connection to one placer, dialled if need be.
    pub(crate) async fn open_to(&self, at: usize) -> Result<Open, Fault> {
        let link = &self.inner.links[at];
        if let Some(open) = link.alive() {
            return Ok(open);
        }
        let _dialling = link.dialling.lock().await;
        if let Some(open) = link.alive() {
            return Ok(open);
        }
        let endpoint = self.inner.endpoints[usize::from(link.addr.is_ipv6())].as_ref();
        let endpoint = endpoint.ok_or_else(|| Fault::new(Code::Internal, "no endpoint"))?;
        let dialled = async {
            let connection = quic::connect(endpoint, link.addr, Role::Placer).await?;
            let lane = Lane::open(&connection).await?;
            Ok(Open { connection, lane })
        };
        let dialled = dialled.await;
        let mut state = link.dialled();
        match dialled {
            Ok(open) => {
                *state = Dialled { open: Some(open.clone()), ..Dialled::default() };
                Ok(open)
            }
            Err(fault) => {
                let wait = BACK_OFF.saturating_mul(1 << state.failures.min(6)).min(BACK_OFF_MAX);
                state.open = None;
                state.failures = state.failures.saturating_add(1);
                state.not_before = Some(Instant::now() + wait);
                Err(fault)
            }
        }
    }
}
