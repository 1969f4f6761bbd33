//! Published ports: TCP ports of the machine that lead to ports of sandboxes.
//!
//! A port is bound before its sandbox starts, so that a launch either has it or fails by name; it goes with the sandbox
//! and comes again with it after a restart. Connections are accepted here and led into the box as a caller's are; their
//! bytes are passed by a thread of their own, so that a busy port costs launches nothing. Left out: UDP, and addresses
//! of single sandboxes (all share the host's).

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    rc::Rc,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use wire::{
    Code, Fault,
    network::{Publish, Published},
};

use crate::{clock, host::HostCell, note::Note, real, runtime::spawn};

/// Connections to the published ports of one sandbox at a time.
const CONNECTIONS_MAX: usize = 256;

/// Ports that are tried where any will do.
const TRIES_MAX: usize = 64;

/// Connections that wait for the passing thread.
const QUEUE_MAX: usize = 1_024;

/// How often it is looked whether bytes have passed, which keeps a sandbox from being idle.
const LOOK: Duration = Duration::from_secs(1);

/// Where an operator lets ports be published.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DoorsConfig {
    /// The address; `None`: nowhere.
    pub(crate) at: Option<IpAddr>,
    /// First and last port.
    pub(crate) ports: [u16; 2],
}

/// A port that is bound, with the sandbox's port that it leads to.
type Bound = (TcpListener, u16);

/// The published ports of one sandbox. Most have none, and then there is nothing here.
#[derive(Debug, Default)]
pub(crate) struct Doors(Option<Box<Open>>);

#[derive(Debug, Default)]
struct Open {
    bound: Vec<Bound>,
    addresses: HashMap<u16, SocketAddr>,
    accepting: Vec<JoinHandle<()>>,
    /// Bytes to and from the sandbox.
    passed: Passed,
    /// Set when the sandbox ends: a connection would keep its network namespace.
    over: CancellationToken,
}

/// Counters that the passing thread writes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Passed {
    received: Counter,
    sent: Counter,
}

impl Doors {
    /// Binds what a launch asks for: all or nothing.
    ///
    /// # Errors
    /// [`Code::Forbidden`] where the operator allows none or not this one, [`Code::Busy`] where it is taken.
    pub(crate) fn bind(config: DoorsConfig, asked: &[Publish]) -> Result<Self, Fault> {
        let mut open = Open::default();
        for one in asked {
            let (listener, at) = config.bind(one)?;
            open.addresses.insert(at.port(), at);
            open.bound.push((listener, one.port));
        }
        Ok(Self::of(open))
    }

    /// Binds again what a restart closed. What another has taken meanwhile is told and left out.
    pub(crate) fn bind_again(config: DoorsConfig, ports: &[(u16, u16)]) -> Self {
        let mut open = Open::default();
        for (host_port, port) in ports {
            match config.bind(&Publish { port: *port, host_port: *host_port }) {
                Ok((listener, at)) => {
                    open.addresses.insert(at.port(), at);
                    open.bound.push((listener, *port));
                }
                Err(fault) => {
                    tracing::warn!(%fault, "a published port is closed since the restart")
                }
            }
        }
        Self::of(open)
    }

    fn of(open: Open) -> Self {
        Self((!open.bound.is_empty()).then(|| Box::new(open)))
    }

    /// The host's ports and the sandbox's, for the journal.
    pub(crate) fn ports(&self) -> Vec<(u16, u16)> {
        let port = |(listener, port): &Bound| Some((listener.local_addr().ok()?.port(), *port));
        self.0.iter().flat_map(|open| &open.bound).filter_map(port).collect()
    }

    /// What callers are told.
    pub(crate) fn published(&self) -> Vec<Published> {
        let one = |(host_port, port): (u16, u16)| {
            let address = self.0.as_ref()?.addresses.get(&host_port)?;
            Some(Published { port, address: address.to_string() })
        };
        self.ports().into_iter().filter_map(one).collect()
    }

    /// Bytes that the sandbox got and sent over its published ports.
    pub(crate) fn passed(&self) -> (u64, u64) {
        self.0.as_ref().map_or((0, 0), |open| (open.passed.received.get(), open.passed.sent.get()))
    }

    /// Closes them all, and what passes through them ends.
    pub(crate) fn close(&mut self) {
        if let Some(open) = &mut self.0 {
            open.accepting.drain(..).for_each(|task| task.abort());
            open.bound.clear();
            open.over.cancel();
        }
    }
}

impl DoorsConfig {
    fn bind(&self, asked: &Publish) -> Result<(TcpListener, SocketAddr), Fault> {
        let Some(ip) = self.at else {
            let text =
                "this host's operator publishes no ports (publish is not set); nothing was started";
            return Err(Fault::new(Code::Forbidden, text));
        };
        let [first, last] = self.ports;
        if asked.host_port != 0 {
            if !(first..=last).contains(&asked.host_port) {
                let text = format!(
                    "port {} is not one that this host publishes ({first}-{last}); nothing was started",
                    asked.host_port
                );
                return Err(Fault::new(Code::Forbidden, text));
            }
            let at = SocketAddr::new(ip, asked.host_port);
            return listen(at).map(|listener| (listener, at)).map_err(|error| {
                let code = match error.kind() {
                    io::ErrorKind::AddrInUse => Code::Busy,
                    _ => Code::Internal,
                };
                let text = format!("{at} cannot be published: {error}; nothing was started");
                Fault::new(code, text)
            });
        }
        let mut draw = SmallRng::from_os_rng();
        for _ in 0..TRIES_MAX {
            let at = SocketAddr::new(ip, draw.random_range(first..=last));
            if let Ok(listener) = listen(at) {
                return Ok((listener, at));
            }
        }
        let text = format!("no port of {first}-{last} was found free; nothing was started");
        Err(Fault::new(Code::Overloaded, text))
    }
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    // With the address in use by nothing but connections of a sandbox that has ended (std sets SO_REUSEADDR).
    let listener = std::net::TcpListener::bind(at)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Leads connections to a sandbox's published ports into it, until it ends.
pub(crate) fn serve(cell: &Rc<HostCell>, note: &Rc<Note>) {
    let mut doors = note.doors.borrow_mut();
    let Some(doors) = &mut doors.0 else { return };
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let bound = doors.bound.len();
    for index in 0..bound {
        let (listener, port) = &doors.bound[index];
        let Some(listener) = listener_of(listener) else { continue };
        let way = Way {
            cell: Rc::clone(cell),
            note: Rc::clone(note),
            port: *port,
            free: Arc::clone(&free),
            passed: doors.passed.clone(),
            over: doors.over.clone(),
        };
        doors.accepting.push(spawn(way.accept(listener)));
    }
    let passed = doors.passed.clone();
    let (cell, local) = (Rc::clone(cell), note.id.local);
    // A port in use is use of the sandbox.
    doors.accepting.push(spawn(async move {
        let mut before = 0;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = passed.received.get() + passed.sent.get();
            if now != before {
                before = now;
                cell.core.borrow_mut().handle_used(clock::now_ms(), local);
            }
        }
    }));
}

/// A second handle on a listening socket, for the task that accepts.
fn listener_of(listener: &TcpListener) -> Option<TcpListener> {
    use std::os::fd::AsFd;
    let copy = listener.as_fd().try_clone_to_owned().ok()?;
    TcpListener::from_std(copy.into()).ok()
}

struct Way {
    cell: Rc<HostCell>,
    note: Rc<Note>,
    port: u16,
    free: Arc<Semaphore>,
    passed: Passed,
    over: CancellationToken,
}

impl Way {
    async fn accept(self, listener: TcpListener) {
        // Held here so that it closes with the sandbox: tasks of connections are told by their permits.
        let this = Rc::new(self);
        loop {
            let Ok(permit) = Arc::clone(&this.free).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((outer, _)) => drop(spawn(Rc::clone(&this).lead(outer, permit))),
                // Out of descriptors: they come back as connections end.
                Err(error) => {
                    tracing::warn!(%error, "a published port could not accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn lead(self: Rc<Self>, outer: TcpStream, permit: OwnedSemaphorePermit) {
        self.cell.core.borrow_mut().handle_used(clock::now_ms(), self.note.id.local);
        // Nothing listens inside, or it is paused: the caller sees its connection end.
        let Ok(inner) = real::connect_fd(&self.cell, &self.note, self.port).await else { return };
        let Ok(outer) = outer.into_std() else { return };
        let _ = outer.set_nodelay(true);
        let (passed, over) = (self.passed.clone(), self.over.clone());
        let pair = Pair { outer, inner, passed, over, permit };
        if passer().try_send(pair).is_err() {
            tracing::warn!("a connection to a published port was dropped: too many at once");
        }
    }
}

/// Two sockets whose bytes are to be passed.
struct Pair {
    outer: std::net::TcpStream,
    inner: OwnedFd,
    passed: Passed,
    over: CancellationToken,
    permit: OwnedSemaphorePermit,
}

/// The thread that passes bytes, started with the first pair.
fn passer() -> &'static mpsc::Sender<Pair> {
    static PASSER: OnceLock<mpsc::Sender<Pair>> = OnceLock::new();
    PASSER.get_or_init(|| {
        let (sender, pairs) = mpsc::channel(QUEUE_MAX);
        let thread = std::thread::Builder::new().name("hostd-doors".into());
        if let Err(error) = thread.spawn(move || pass_all(pairs)) {
            tracing::error!(%error, "no thread for published ports: their connections end at once");
        }
        sender
    })
}

fn pass_all(mut pairs: mpsc::Receiver<Pair>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async move {
        while let Some(pair) = pairs.recv().await {
            tokio::spawn(async move {
                // A connection that breaks is the affair of its two ends.
                let _ = pass(pair).await;
            });
        }
    });
}

async fn pass(pair: Pair) -> io::Result<()> {
    let inner = std::net::TcpStream::from(pair.inner);
    pair.outer.set_nonblocking(true)?;
    inner.set_nonblocking(true)?;
    let (outer, inner) = (TcpStream::from_std(pair.outer)?, TcpStream::from_std(inner)?);
    let (outer_read, outer_write) = outer.into_split();
    let (inner_read, inner_write) = inner.into_split();
    let inward = one_way(outer_read, inner_write, pair.passed.received.clone());
    let outward = one_way(inner_read, outer_write, pair.passed.sent.clone());
    tokio::select! {
        _ = futures::future::join(inward, outward) => {}
        () = pair.over.cancelled() => {}
    }
    drop(pair.permit);
    Ok(())
}

async fn one_way(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    count: Counter,
) -> io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut bytes).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&bytes[..length]).await?;
        count.inc_by(length as u64);
    }
}
