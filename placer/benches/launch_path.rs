//! The launch path on one machine: client -> placer -> hosts that accept at once, over real QUIC on the loopback.
//!
//! `cargo bench -p placer --bench launch_path -- [hosts] [in flight] [seconds] [connections]`. Prints launches a second and the
//! processor time a launch of each part, then the same without a placer: launches straight from the client to the
//! hosts, on lanes, in QUIC datagrams (sent again after 50 ms without an answer) and with a stream each, as ceilings in the same
//! run. Hosts answer from memory: no admission is measured.
//!
//! `-- flat [real hosts] [in flight] [seconds]`: the cost of a launch with 10 to 1,000,000 hosts in the map. The real hosts are those
//! of the map that are this placer's part (its aperture is as large as they are many); the others are there to be searched.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a bench stops at the first surprise, and its numbers are small"
)]

#[path = "fleet/mod.rs"]
mod fleet;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fleet::{request, runtime, start_hosts, start_placer};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use volley_client::draw_id;
use wire::{
    HostId,
    launch::{LaunchHead, LaunchReply},
    seal::Role,
};
use wire_net::{
    lane::Lane,
    quic,
    stream::{self, LaunchLost},
    tls::{FleetAuthority, Identity, Peer},
};

/// The placer's pause between two looks for a map.
const REFRESH_MS: u64 = 100;

fn main() {
    let args: Vec<u64> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let get = |at: usize, or: u64| args.get(at).copied().unwrap_or(or);
    if std::env::args().any(|arg| arg == "flat") {
        flat(get(0, 10), get(1, 256), get(2, 2));
        std::process::exit(0);
    }
    let (hosts, in_flight, seconds) = (get(0, 100), get(1, 1_000), get(2, 3));
    let connections = get(3, 1);
    let authority = Arc::new(FleetAuthority::unsaved().unwrap());
    let ids: Vec<_> =
        (0..hosts).map(|at| HostId((at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    let addrs = start_hosts(&authority, ids);
    let (placer, _) = start_placer(&authority, "mem://bench", &addrs, &addrs, REFRESH_MS);
    let tenant = authority.issue(&Peer::Client { tenant: "acme".into() }).unwrap();
    let as_placer = authority.issue(&Peer::Placer(2)).unwrap();
    println!("{hosts} hosts, {in_flight} in flight, {connections} connections of the client");
    for _ in 0..2 {
        let load = Load { in_flight, seconds };
        let to_placer = vec![(placer, Role::Placer); connections as usize];
        load.run("through the placer, lanes", &tenant, &to_placer, Carrier::Lanes);
        let to_hosts: Vec<_> = addrs.iter().map(|(_, addr)| (*addr, Role::Host)).collect();
        load.run("straight to the hosts, lanes", &as_placer, &to_hosts, Carrier::Lanes);
        load.run("straight to the hosts, datagrams", &as_placer, &to_hosts, Carrier::Datagrams);
        load.run("straight to the hosts, a stream each", &as_placer, &to_hosts, Carrier::Streams);
    }
    std::process::exit(0);
}

/// The cost of a launch by the size of the map: the same hosts, connections and load, and a map with more and more others.
fn flat(real: u64, in_flight: u64, seconds: u64) {
    let authority = Arc::new(FleetAuthority::unsaved().unwrap());
    let tenant = authority.issue(&Peer::Client { tenant: "acme".into() }).unwrap();
    let mut rng = SmallRng::seed_from_u64(7);
    let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    let load = Load { in_flight, seconds };
    let mut placers = Vec::new();
    for (objects, count) in [
        ("mem://flat-10", 10u64),
        ("mem://flat-1k", 1_000),
        ("mem://flat-100k", 100_000),
        ("mem://flat-1m", 1_000_000),
    ] {
        let mut ids: Vec<_> = (0..count.max(real)).map(|_| HostId(rng.next_u64())).collect();
        // The placer's part of the map, by its own rule: these are the hosts that are there.
        let part = placer::fleet::Aperture { placer: 1, hosts: real as usize };
        ids.sort_unstable_by_key(|id| part.weight(*id));
        let hosts = start_hosts(&authority, ids[..real as usize].to_vec());
        let others = ids[real as usize..].iter().map(|id| (*id, nobody));
        let all: Vec<_> = hosts.iter().copied().chain(others).collect();
        placers.push((count, start_placer(&authority, objects, &all, &hosts, REFRESH_MS).0));
    }
    println!("{real} real hosts, {in_flight} in flight; the rest of the map is others' hosts");
    let mut figures = vec![Vec::new(); placers.len()];
    for _ in 0..3 {
        for ((count, placer), figures) in placers.iter().zip(&mut figures) {
            let what = format!("{count} hosts in the map");
            let to = [(*placer, Role::Placer)];
            figures.push(load.run(&what, &tenant, &to, Carrier::Lanes));
        }
    }
    let median = |figures: &mut Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    let medians: Vec<f64> = figures.iter_mut().map(median).collect();
    println!(
        "cost of a launch at a placer: {medians:.2?} us; {:.2} times from {} to {} hosts",
        medians[medians.len() - 1] / medians[0],
        placers[0].0,
        placers[placers.len() - 1].0
    );
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Carrier {
    Lanes,
    Datagrams,
    Streams,
}

/// A datagram without an answer is sent again after this.
const AGAIN: Duration = Duration::from_millis(50);

/// Launches in datagrams, matched by a tag.
struct Datagrams {
    connection: quinn::Connection,
    /// Datagrams that were sent again.
    again: AtomicU64,
    waiting: std::sync::Mutex<HashMap<u32, tokio::sync::oneshot::Sender<bytes::Bytes>>>,
    next: std::sync::atomic::AtomicU32,
}

impl Datagrams {
    fn over(connection: quinn::Connection) -> Arc<Self> {
        let this = Arc::new(Self {
            connection,
            again: AtomicU64::new(0),
            waiting: Default::default(),
            next: Default::default(),
        });
        let reader = Arc::clone(&this);
        tokio::spawn(async move {
            while let Ok(bytes) = reader.connection.read_datagram().await {
                let tag = u32::from_le_bytes(*bytes.first_chunk().unwrap());
                if let Some(waiting) = reader.waiting.lock().unwrap().remove(&tag) {
                    let _ = waiting.send(bytes.slice(4..));
                }
            }
        });
        this
    }

    async fn launch(&self, head: LaunchHead, request: &[u8]) -> Result<LaunchReply, LaunchLost> {
        let tag = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.waiting.lock().unwrap().insert(tag, sender);
        let mut bytes = bytes::BytesMut::with_capacity(8 + request.len());
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&head.bytes());
        bytes.extend_from_slice(request);
        let bytes = bytes.freeze();
        self.connection.send_datagram(bytes.clone()).unwrap();
        let lost = || LaunchLost::Unknown(wire::Fault::new(wire::Code::Unknown, "lost"));
        let mut receiver = receiver;
        let mut reply = tokio::time::timeout(AGAIN, &mut receiver).await;
        for _ in 0..8 {
            if reply.is_ok() {
                break;
            }
            // Lost, or late: the id makes a second copy harmless.
            self.again.fetch_add(1, Ordering::Relaxed);
            self.connection.send_datagram(bytes.clone()).unwrap();
            reply = tokio::time::timeout(AGAIN, &mut receiver).await;
        }
        LaunchReply::from_bytes(&reply.map_err(|_| lost())?.map_err(|_| lost())?)
            .map_err(|_| lost())
    }
}

struct Load {
    in_flight: u64,
    seconds: u64,
}

impl Load {
    /// Returns the microseconds of processor time that a launch took of the placers.
    fn run(
        &self,
        what: &str,
        identity: &Identity,
        to: &[(SocketAddr, Role)],
        carrier: Carrier,
    ) -> f64 {
        let done = Arc::new(AtomicU64::new(0));
        let failed = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (identity, to, in_flight) = (identity.clone(), to.to_vec(), self.in_flight);
            let (done, failed, stop) = (Arc::clone(&done), Arc::clone(&failed), Arc::clone(&stop));
            std::thread::Builder::new().name("client".into()).spawn(move || {
                runtime().block_on(offer(&identity, to, carrier, in_flight, done, failed, stop));
            })
        };
        std::thread::sleep(Duration::from_millis(1_500));
        let (before, cpu, begun) = (done.load(Ordering::Relaxed), cpu(), Instant::now());
        std::thread::sleep(Duration::from_secs(self.seconds));
        let launches = done.load(Ordering::Relaxed) - before;
        let took = begun.elapsed().as_secs_f64();
        let used = cpu_since(&cpu);
        stop.store(true, Ordering::Relaxed);
        thread.unwrap().join().unwrap();
        let rate = launches as f64 / took;
        let parts: Vec<_> =
            used.iter().map(|(name, us)| format!("{name} {:.1}", us / launches as f64)).collect();
        println!(
            "{what:40} {rate:>9.0}/s  failed {}  us a launch: {}",
            failed.load(Ordering::Relaxed),
            parts.join(", ")
        );
        let of_placers = used.iter().filter(|(name, _)| name.starts_with("placer"));
        of_placers.map(|(_, us)| us).sum::<f64>() / launches as f64
    }
}

async fn offer(
    identity: &Identity,
    to: Vec<(SocketAddr, Role)>,
    carrier: Carrier,
    in_flight: u64,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) {
    let endpoint = quic::dialer(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), identity).unwrap();
    let mut links = Vec::new();
    for (addr, role) in to {
        let connection = quic::connect(&endpoint, addr, role).await.unwrap();
        let lane = Lane::open(&connection).await.unwrap();
        let datagrams = Datagrams::over(connection.clone());
        links.push((connection, lane, datagrams));
    }
    let links = Arc::new(links);
    let mut tasks = Vec::new();
    for at in 0..in_flight as usize {
        let (links, done, failed, stop) =
            (Arc::clone(&links), Arc::clone(&done), Arc::clone(&failed), Arc::clone(&stop));
        tasks.push(tokio::spawn(async move {
            let mut request = request();
            let mut turn = at;
            while !stop.load(Ordering::Relaxed) {
                request.launch_id = draw_id();
                let bytes = request.to_bytes();
                let (connection, lane, datagrams) = &links[turn % links.len()];
                turn = turn.wrapping_mul(5).wrapping_add(7);
                let head = LaunchHead::new(10_000);
                let reply = match carrier {
                    Carrier::Lanes => match lane.launch(head, &bytes) {
                        Ok(reply) => reply.await,
                        Err(lost) => Err(lost),
                    },
                    Carrier::Datagrams => datagrams.launch(head, &bytes).await,
                    Carrier::Streams => stream::launch(connection, head, &bytes).await,
                };
                match reply {
                    Ok(LaunchReply::Started(_)) => done.fetch_add(1, Ordering::Relaxed),
                    other => {
                        if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                            println!("{other:?}");
                        }
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        0
                    }
                };
            }
        }));
    }
    for task in tasks {
        let _ = task.await;
    }
    let again: u64 = links.iter().map(|link| link.2.again.load(Ordering::Relaxed)).sum();
    if again > 0 {
        println!("  {again} datagrams were sent again");
    }
    endpoint.close(0u32.into(), b"done");
    let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
}

/// Microseconds of processor time that each named thread has used.
fn cpu() -> HashMap<String, f64> {
    let mut used = HashMap::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let Ok(stat) = std::fs::read_to_string(path.join("schedstat")) else { continue };
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else { continue };
        let ns: f64 = stat.split(' ').next().unwrap().parse().unwrap();
        *used.entry(name.trim().to_owned()).or_default() += ns / 1e3;
    }
    used
}

fn cpu_since(before: &HashMap<String, f64>) -> Vec<(String, f64)> {
    let mut used: Vec<_> = cpu()
        .into_iter()
        .map(|(name, us)| {
            let was = before.get(&name).copied().unwrap_or_default();
            (name, us - was)
        })
        .filter(|(_, us)| *us > 20_000.0)
        .collect();
    used.sort_by(|a, b| a.0.cmp(&b.0));
    used
}
