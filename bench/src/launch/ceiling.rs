//! The bare quinn ceilings of a launch: the same bytes, connections and load in flight, with nothing done.
//!
//! `echo` is one hop; `relay` has a launch's own shape: client, a relay in the placer's place, and echoes in the hosts'
//! place. Client, relay and echoes have a thread each, as the roles do. Both carriers are there: [`streams`] opens a
//! stream a round trip, [`lanes`] keeps one a connection and writes together what is ready together.

mod lanes;
mod streams;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use quinn::Endpoint;
use tokio::sync::watch;
use wire::{
    Code, Fault,
    frame::{HEADER_BYTES, LANE_TAG_BYTES},
    launch::LaunchHead,
    seal::Role,
};
use wire_net::{
    quic,
    tls::{FleetAuthority, Identity, Peer},
};

use super::{Carrier, Ceiling, Load, Options, load::Measured};
use crate::cpu;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Without a reply to copy its size from (nothing was started).
const REPLY_BYTES: usize = 96;
const HOSTS_MAX: usize = 1_000;
const IN_FLIGHT_MAX: usize = 10_000;
const WARM_UP: Duration = Duration::from_millis(500);

/// What goes over the wire, and how much of it at once.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes there, frame and all.
    pub request: usize,
    /// Bytes back.
    pub reply: usize,
    /// Connections of the client.
    pub connections: usize,
    /// Round trips in flight.
    pub in_flight: usize,
    /// Echoes behind a relay, a socket and a connection each.
    pub hosts: usize,
    /// Time that is measured, after a short warm-up.
    pub time: Duration,
    /// What carries them.
    pub carrier: Carrier,
}

pub(super) fn measure(options: &Options, measured: &Measured) -> Result<Ceiling, Fault> {
    let reply = if measured.reply_bytes == 0 { REPLY_BYTES } else { measured.reply_bytes };
    let in_flight = match options.load {
        Load::Closed { in_flight } => in_flight,
        Load::Open { rate } => little(rate, measured.latency_us.mean()),
    };
    let tag = match options.carrier {
        Carrier::Lane => LANE_TAG_BYTES,
        Carrier::Stream => 0,
    };
    let shape = Shape {
        request: HEADER_BYTES + tag + LaunchHead::BYTES + measured.request_bytes,
        reply: HEADER_BYTES + tag + reply,
        connections: options.connections_each() * options.threads,
        in_flight: in_flight.clamp(1, IN_FLIGHT_MAX),
        hosts: options.hosts.clamp(1, HOSTS_MAX),
        time: options.ceiling,
        carrier: options.carrier,
    };
    let (echo, relay) = (trips(shape, false)?, trips(shape, true)?);
    Ok(Ceiling {
        echo_per_second: echo.per_second,
        relay_per_second: relay.per_second,
        echo_cpu_us: echo.cpu_us,
        relay_cpu_us: relay.cpu_us,
        connections: shape.connections,
        in_flight: shape.in_flight,
        hosts: shape.hosts,
        request_bytes: shape.request,
        reply_bytes: shape.reply,
    })
}

/// Little's law: what an open loop has in flight.
fn little(rate: f64, mean_us: f64) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and clamped by the caller"
    )]
    let in_flight = (rate * mean_us / 1e6).ceil() as usize;
    in_flight
}

/// Round trips a second on bare quinn, by one hop or through a relay. Blocks; starts threads of its own.
///
/// # Errors
/// [`Code::Internal`] if a connection broke: then there is no figure.
pub fn bare(shape: Shape, relayed: bool) -> Result<f64, Fault> {
    trips(shape, relayed).map(|trips| trips.per_second)
}

/// Round trips that were measured.
#[derive(Clone, Copy)]
struct Trips {
    per_second: f64,
    /// Microseconds of processor time that one took of this process: client, relay and echoes together.
    cpu_us: f64,
}

fn trips(shape: Shape, relayed: bool) -> Result<Trips, Fault> {
    let authority = &FleetAuthority::unsaved()?;
    let (stop, stopped) = watch::channel(false);
    let sockets = if relayed { shape.hosts } else { 1 };
    let echoes = Served { sockets, behind: Vec::new(), stopped: stopped.clone(), shape };
    let (mut targets, echo_thread) = serve(authority, echoes)?;
    let mut threads = vec![echo_thread];
    if relayed {
        let relay = Served { sockets: 1, behind: targets, stopped, shape };
        let (addrs, thread) = serve(authority, relay)?;
        targets = addrs;
        threads.push(thread);
    }
    let target = targets[0];
    let client = authority.issue(&Peer::Client { tenant: "bench".into() })?;
    let rate = spawn("ceiling-client", move || runtime()?.block_on(offer(client, target, shape)))?
        .join()
        .map_err(|_| panicked())?;
    let _ = stop.send(true);
    for thread in threads {
        thread.join().map_err(|_| panicked())??;
    }
    rate
}

fn panicked() -> Fault {
    Fault::new(Code::Internal, "a ceiling's thread panicked")
}

fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::new(Code::Internal, error.to_string()))
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<thread::JoinHandle<Result<T, Fault>>, Fault> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|error| Fault::new(Code::Internal, format!("no thread: {error}")))
}

/// Echoes, a socket each as hosts have, or with `behind` a relay to them.
struct Served {
    sockets: usize,
    behind: Vec<SocketAddr>,
    stopped: watch::Receiver<bool>,
    shape: Shape,
}

type Serving = thread::JoinHandle<Result<(), Fault>>;

/// Serves on a thread of its own; returns where.
fn serve(authority: &FleetAuthority, served: Served) -> Result<(Vec<SocketAddr>, Serving), Fault> {
    let identity = authority.issue(&Peer::Placer(1))?;
    let (tell, told) = mpsc::channel();
    let thread = spawn("ceiling-serve", move || {
        runtime()?.block_on(async move {
            let Served { sockets, behind, mut stopped, shape } = served;
            let listen = |_| quic::listen(LOOPBACK, &identity, &[Role::Client, Role::Placer]);
            let endpoints = (0..sockets).map(listen).collect::<Result<Vec<_>, _>>()?;
            let mut hosts = Vec::new();
            for addr in behind {
                hosts.push(quic::connect(&endpoints[0], addr, Role::Placer).await?);
            }
            let behind = Arc::new(match shape.carrier {
                Carrier::Stream => Behind::Streams(streams::Hosts::new(hosts)),
                Carrier::Lane => Behind::Lanes(lanes::Hosts::open(&hosts, shape).await?),
            });
            let addrs = endpoints.iter().map(Endpoint::local_addr).collect::<Result<_, _>>();
            let _ = tell.send(addrs.map_err(|e| Fault::new(Code::Internal, e.to_string()))?);
            for endpoint in &endpoints {
                tokio::spawn(accept_all(endpoint.clone(), Arc::clone(&behind), shape));
            }
            let _ = stopped.changed().await;
            endpoints.iter().for_each(|endpoint| endpoint.close(0u32.into(), b""));
            Ok(())
        })
    })?;
    match told.recv() {
        Ok(addrs) => Ok((addrs, thread)),
        Err(_) => Err(thread.join().map_err(|_| panicked())?.err().unwrap_or_else(panicked)),
    }
}

async fn accept_all(endpoint: Endpoint, behind: Arc<Behind>, shape: Shape) {
    while let Some(incoming) = endpoint.accept().await {
        let behind = Arc::clone(&behind);
        tokio::spawn(async move {
            let Ok((connection, _)) = quic::accept(incoming).await else { return };
            match &*behind {
                Behind::Streams(hosts) => {
                    streams::answer_all(connection, hosts.clone(), shape).await;
                }
                Behind::Lanes(hosts) => lanes::answer_all(connection, hosts, shape).await,
            }
        });
    }
}

/// What a server hands requests to; nothing for an echo.
enum Behind {
    Streams(streams::Hosts),
    Lanes(lanes::Hosts),
}

/// Round trips a second that come back.
async fn offer(identity: Identity, target: SocketAddr, shape: Shape) -> Result<Trips, Fault> {
    let endpoint = quic::dialer(LOOPBACK, &identity)?;
    let mut connections = Vec::new();
    for _ in 0..shape.connections {
        connections.push(quic::connect(&endpoint, target, Role::Placer).await?);
    }
    let done = Arc::new(AtomicU64::new(0));
    let lost = Arc::new(AtomicBool::new(false));
    let count = match shape.carrier {
        Carrier::Stream => shape.in_flight,
        Carrier::Lane => connections.len(),
    };
    let workers: Vec<_> = (0..count)
        .map(|at| {
            let connection = connections[at % connections.len()].clone();
            let (done, lost) = (Arc::clone(&done), Arc::clone(&lost));
            tokio::spawn(async move {
                match shape.carrier {
                    Carrier::Stream => streams::offer(&connection, shape, &done).await,
                    Carrier::Lane => lanes::offer(&connection, shape, at, &done).await,
                };
                lost.store(true, Ordering::Relaxed);
            })
        })
        .collect();
    tokio::time::sleep(WARM_UP).await;
    let cpu = || cpu::used(std::process::id()).unwrap_or_default();
    let (before, from, cpu_before) = (done.load(Ordering::Relaxed), Instant::now(), cpu());
    tokio::time::sleep(shape.time).await;
    let (count, took) = (done.load(Ordering::Relaxed) - before, from.elapsed());
    let spent = cpu() - cpu_before;
    let broke = lost.load(Ordering::Relaxed);
    workers.iter().for_each(tokio::task::JoinHandle::abort);
    endpoint.close(0u32.into(), b"");
    if broke {
        return Err(Fault::new(
            Code::Internal,
            "the ceiling's connection broke, so it has no figure",
        ));
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(Trips {
        per_second: count as f64 / took.as_secs_f64(),
        cpu_us: spent.as_secs_f64() * 1e6 / count.max(1) as f64,
    })
}
