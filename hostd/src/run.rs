//! From settings to running hosts, and back to nothing.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    rc::Rc,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use futures::StreamExt as _;
use hostd_core::{Beat, BeatConfig, HostConfig as CoreConfig};
use rand::{TryRngCore, rngs::OsRng};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use wire::{
    Code, Fault, HostId, Seq, heartbeat::Heartbeat, limits::SEQ_RESERVE, map::HostAddr, rendezvous,
    seal::Role,
};
use wire_net::{
    NetError, ops, quic,
    tls::{Identity, Peer},
};

use crate::{
    accept,
    beats::{Timer, reserve},
    clock,
    config::{Boxes, Config, Engine, HostConfig},
    host::{Backend, Core, Defaults, HostCell},
    metrics::Metrics,
    persist::Kept,
    real::Real,
    runtime::{self, spawn},
};

/// How long a stop waits for what is under way.
const STOP_WAIT: Duration = Duration::from_millis(500);

/// Runs the hosts of a process until `stop`. Blocks. Prints `ready hostd <addr>` once all take launches.
///
/// # Errors
/// Why a host could not start (then none serves), or broke down.
pub fn run(config: Config, stop: CancellationToken) -> Result<(), Fault> {
    wire_net::tls::install_provider();
    config.check()?;
    // Without boxes no file is read, and plain tokio waits with one system call less.
    let wanted = match (config.engine, config.boxes) {
        (Engine::Auto, Boxes::None) => Engine::Tokio,
        (engine, _) => engine,
    };
    let engine = runtime::probe(wanted).map_err(|error| {
        Fault::new(Code::Unsupported, format!("io_uring does not work here: {error}"))
    })?;
    tracing::info!(engine = engine.name(), boxes = ?config.boxes, "hostd starts");
    let (metrics, registry) = Metrics::new(engine.name());
    let ready = ops::Ready::default();
    let ops_thread = match config.ops {
        Some(addr) => Some(serve_ops(addr, registry, ready.clone(), stop.clone())?),
        None => None,
    };
    let process = Process { config: &config, engine, metrics, stop: stop.clone() };
    let result = process.run_threads(&ready);
    ready.set(false);
    stop.cancel();
    if let Some(thread) = ops_thread {
        let _ = thread.join();
    }
    result
}

fn serve_ops(
    addr: SocketAddr,
    registry: Arc<prometheus_client::registry::Registry>,
    ready: ops::Ready,
    stop: CancellationToken,
) -> Result<std::thread::JoinHandle<()>, Fault> {
    let internal = |error: std::io::Error| {
        Fault::new(Code::Internal, format!("the ops port has no thread: {error}"))
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(internal)?;
    let listener = runtime.block_on(ops::bind(addr))?;
    let serve = move || {
        if let Err(fault) = runtime.block_on(ops::serve_on(listener, registry, ready, stop)) {
            tracing::error!(%fault, "the ops port broke down");
        }
    };
    std::thread::Builder::new().name("hostd-ops".into()).spawn(serve).map_err(internal)
}

/// What all threads of the process share.
struct Process<'a> {
    config: &'a Config,
    engine: Engine,
    metrics: Metrics,
    stop: CancellationToken,
}

impl Process<'_> {
    /// Deals the hosts over the threads, waits until all serve, says so, and waits for the end.
    fn run_threads(&self, ready: &ops::Ready) -> Result<(), Fault> {
        let hosts = self.config.hosts();
        let threads = self.config.threads.min(hosts.len());
        let (started, starts) = mpsc::channel::<Result<SocketAddr, Fault>>();
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for thread in 0..threads {
                let own: Vec<HostConfig> =
                    hosts.iter().skip(thread).step_by(threads).cloned().collect();
                let started = started.clone();
                let builder = std::thread::Builder::new().name(format!("hostd-{thread}"));
                let spawned = builder.spawn_scoped(scope, move || self.thread(&own, &started));
                match spawned {
                    Ok(handle) => running.push(handle),
                    Err(error) => {
                        self.stop.cancel();
                        return Err(Fault::new(Code::Internal, format!("no thread: {error}")));
                    }
                }
            }
            drop(started);
            let result = self.announce(hosts.len(), &starts, ready);
            if result.is_err() {
                self.stop.cancel();
            }
            running.into_iter().for_each(|thread| drop(thread.join()));
            result
        })
    }

    fn announce(
        &self,
        hosts: usize,
        starts: &mpsc::Receiver<Result<SocketAddr, Fault>>,
        ready: &ops::Ready,
    ) -> Result<(), Fault> {
        let mut first = None;
        for _ in 0..hosts {
            // A thread that ends without a word was stopped.
            let Ok(started) = starts.recv() else { return Ok(()) };
            first = first.or(Some(started?));
        }
        if let Some(addr) = first {
            ready.set(true);
            println!("ready hostd {addr}");
        }
        // Blocks until every thread has ended.
        while starts.recv().is_ok() {}
        Ok(())
    }

    /// One thread: its hosts, from start to end.
    fn thread(&self, own: &[HostConfig], started: &mpsc::Sender<Result<SocketAddr, Fault>>) {
        let served = runtime::block_on(self.engine, async {
            let mut timers = Vec::new();
            let mut endpoints = Vec::new();
            let mut cells = Vec::new();
            // Their files are synced side by side: one after the other, a thousand hosts would take half a minute.
            let wanted = self.config.host_id.as_deref();
            let opened = own.iter().map(|host| {
                let (host, wanted) = (host.clone(), wanted.map(str::to_owned));
                async move {
                    let open = move || Opened::of(&host, wanted.as_deref());
                    tokio::task::spawn_blocking(open).await.unwrap_or_else(|_| {
                        Err(Fault::new(Code::Internal, "opening a host's state ended in a panic"))
                    })
                }
            });
            let mut opened = futures::stream::iter(opened).buffered(OPENED_AT_ONCE);
            for host in own {
                let Some(opened) = opened.next().await else { break };
                let started_host = match opened {
                    Ok(opened) => self.start(host, opened).await,
                    Err(fault) => Err(fault),
                };
                match started_host {
                    Ok((cell, endpoint, timer)) => {
                        let addr = endpoint.local_addr().unwrap_or(host.listen);
                        timers.push(spawn(timer.run()));
                        spawn(accept::endpoint(Rc::clone(&cell), endpoint.clone()));
                        endpoints.push(endpoint);
                        cells.push(cell);
                        let _ = started.send(Ok(addr));
                    }
                    Err(fault) => {
                        let _ = started.send(Err(fault));
                        break;
                    }
                }
            }
            self.stop.cancelled().await;
            // The last heartbeat says that this host stops; only then are its doors shut.
            for timer in timers {
                let _ = timer.await;
            }
            endpoints.iter().for_each(|endpoint| endpoint.close(0u32.into(), b"stopping"));
            for cell in &cells {
                if let Backend::Real(real) = &cell.backend {
                    real.stop(self.config.stop_ends_sandboxes).await;
                }
            }
            let idle = futures::future::join_all(endpoints.iter().map(quinn::Endpoint::wait_idle));
            let _ = tokio::time::timeout(STOP_WAIT, idle).await;
        });
        if let Err(error) = served {
            let text = format!("no runtime for a thread of hosts: {error}");
            let _ = started.send(Err(Fault::new(Code::Internal, text)));
        }
    }

    async fn start(
        &self,
        host: &HostConfig,
        opened: Opened,
    ) -> Result<(Rc<HostCell>, quinn::Endpoint, Timer), Fault> {
        let Opened { identity, id, kept, first_seq, incarnation, reserved_to } = opened;
        let endpoint = quic::listen(host.listen, &identity, &[Role::Placer, Role::Operator])?;
        let bound = endpoint.local_addr().unwrap_or(host.listen);
        let socket =
            UdpSocket::bind(SocketAddr::new(host.listen.ip(), 0)).await.map_err(|error| {
                Fault::from(NetError::Bind(SocketAddr::new(host.listen.ip(), 0), error))
            })?;
        let Some(keys) = identity.beat.clone() else {
            let text = format!("{} holds no beat.key", host.identity.display());
            return Err(Fault::new(Code::Config, text));
        };
        let none = self.config.boxes == Boxes::None;
        let beat = Beat::new(
            clock::now_ms(),
            BeatConfig {
                host: id,
                incarnation,
                first_seq,
                reserved_to,
                addr: advertised(host.advertise.unwrap_or(bound))?,
                flags: if none { Heartbeat::NO_BOXES } else { 0 },
                interval_ms: self.config.interval_ms,
                key_epoch: keys.epoch,
                key: keys.key,
                aggregators: rendezvous::ranked(id.bucket(), &self.config.aggregators),
            },
        );
        let shapes = self.config.shapes()?;
        let seed = OsRng.try_next_u64().map_err(|error| {
            Fault::new(Code::Internal, format!("the kernel gives no randomness: {error}"))
        })?;
        let mut core = Core::new(&CoreConfig {
            host: id,
            incarnation,
            shapes: shapes.clone(),
            whole: self.config.whole(),
            boxes_max: self.config.boxes_max,
            margin_percent: self.config.margin_percent,
            seed,
        });
        core.set_ended_max(self.config.ended_max);
        let backend = match self.config.boxes {
            Boxes::None => Backend::None { noop_ms: self.config.noop_ms },
            Boxes::Real => Backend::Real(Box::new(Real::open(self.config, host, id).await?)),
        };
        let Config { hard_ms, log_bytes, .. } = *self.config;
        let defaults = Defaults { hard_ms, log_bytes, shapes };
        let cell = Rc::new(HostCell::new(id, core, beat, backend, defaults));
        crate::real::adopt(&cell).await?;
        self.metrics.add_host(self.engine.name());
        let timer = Timer {
            cell: Rc::clone(&cell),
            socket,
            kept,
            identity: host.identity.clone(),
            metrics: self.metrics.clone(),
            records_ms: self.config.records_ms(),
            stop: self.stop.clone(),
        };
        Ok((cell, endpoint, timer))
    }
}

/// Hosts whose files are opened and synced at once.
const OPENED_AT_ONCE: usize = 64;

/// What a host has on disk, opened: all that blocks at a start.
struct Opened {
    identity: Identity,
    id: HostId,
    kept: Arc<Mutex<Kept>>,
    first_seq: Seq,
    incarnation: wire::Incarnation,
    reserved_to: Seq,
}

impl Opened {
    fn of(host: &HostConfig, wanted: Option<&str>) -> Result<Self, Fault> {
        let identity = Identity::load(&host.identity)?;
        let id = host_id(wanted, &host.identity, &identity)?;
        let kept = Kept::open(&host.state, id)?;
        let (first_seq, incarnation) = (kept.reserved, kept.incarnation);
        let reserved_to = Seq(first_seq.0 + SEQ_RESERVE);
        let kept = Arc::new(Mutex::new(kept));
        reserve(&kept, reserved_to)?;
        Ok(Self { identity, id, kept, first_seq, incarnation, reserved_to })
    }
}

fn host_id(wanted: Option<&str>, dir: &Path, identity: &Identity) -> Result<HostId, Fault> {
    let Peer::Host(id) = identity.peer else {
        let text = format!("{} is the identity of {}, not of a host", dir.display(), identity.peer);
        return Err(Fault::new(Code::Config, text));
    };
    if wanted.is_some_and(|wanted| wanted.parse() != Ok(id)) {
        let text = format!("host_id is not {id}, the host of {}", dir.display());
        return Err(Fault::new(Code::Config, text));
    }
    Ok(id)
}

/// The address that placers dial.
fn advertised(addr: SocketAddr) -> Result<HostAddr, Fault> {
    let ip = addr.ip();
    let unspecified = match ip {
        IpAddr::V4(ip) => ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    if unspecified || addr.port() == 0 {
        let text = format!("{addr} is no address that placers can dial: set advertise");
        return Err(Fault::new(Code::Config, text));
    }
    Ok(HostAddr { ip, port: addr.port() })
}
