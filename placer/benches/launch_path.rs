//! The launch path on one machine: client -> placer -> hosts that accept at once, over real QUIC on the loopback.
//!
//! `cargo bench -p placer --bench launch_path -- [hosts] [in flight] [seconds] [connections]`. Prints launches a second and the
//! processor time a launch of each part, then the same without a placer: launches straight from the client to the
//! hosts, on lanes, in QUIC datagrams (sent again after 50 ms without an answer) and with a stream each, as ceilings in the same
//! run. Hosts answer from memory: no admission is measured.
//!
//! `-- flat [real hosts] [in flight] [seconds]`: the cost of a launch with 10 to 1,000,000 hosts in the map. The real hosts are those
//! of the map that are this placer's part (its aperture is as large as they are many); the others are there to be searched.
//! Longer than 500 lines: one program with its own fleet, read from its figures down.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a bench stops at the first surprise, and its numbers are small"
)]

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use object_store::{ObjectStoreExt, path::Path};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio_util::sync::CancellationToken;
use volley_client::draw_id;
use wire::{
    CapacityWord, HostId, Incarnation, SandboxId, Seq, Stamp,
    datagram::Datagram,
    feed,
    frame::Kind,
    launch::{LaunchHead, LaunchReply, LaunchRequest, Limits, Network, Started, Steps, VisibleAt},
    limits::DATAGRAM_BYTES_MAX,
    map::{Head, HostAddr, MapVersion, Page, PageRef, path as names},
    seal::Role,
};
use wire_net::{
    lane::{Lane, LaneServer},
    objects, quic,
    stream::{self, LaunchLost},
    tls::{FleetAuthority, Identity, Peer},
};

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
    let placer = start_placer(&authority, "mem://bench", &addrs, &addrs);
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
        placers.push((count, start_placer(&authority, objects, &all, &hosts)));
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

fn request() -> LaunchRequest {
    LaunchRequest {
        launch_id: draw_id(),
        tenant: "acme".into(),
        image: "busybox".into(),
        shape: 0,
        command: vec!["/bin/true".into()],
        env: Vec::new(),
        cwd: String::new(),
        user: String::new(),
        tty: false,
        stdin: false,
        limits: Limits::default(),
        network: Network::None,
        publish: vec![],
        labels: Vec::new(),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Hosts that start everything, all on one thread.
fn start_hosts(authority: &Arc<FleetAuthority>, ids: Vec<HostId>) -> Vec<(HostId, SocketAddr)> {
    let (told, addrs) = std::sync::mpsc::channel();
    let authority = Arc::clone(authority);
    let serve = move || {
        runtime().block_on(async move {
            let mut all = Vec::new();
            for id in ids {
                let identity = authority.issue(&Peer::Host(id)).unwrap();
                let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                let endpoint = quic::listen(any, &identity, &[Role::Placer]).unwrap();
                all.push((id, endpoint.local_addr().unwrap()));
                tokio::spawn(serve_host(id, endpoint));
            }
            told.send(all).unwrap();
            std::future::pending::<()>().await;
        });
    };
    std::thread::Builder::new().name("hosts".into()).spawn(serve).unwrap();
    addrs.recv().unwrap()
}

async fn serve_host(id: HostId, endpoint: quinn::Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            let Ok((connection, _)) = quic::accept(incoming).await else { return };
            let datagrams = connection.clone();
            tokio::spawn(async move {
                while let Ok(bytes) = datagrams.read_datagram().await {
                    let mut reply = bytes[..4].to_vec();
                    reply.extend(started(id, &bytes[4..]).to_bytes());
                    let _ = datagrams.send_datagram(reply.into());
                }
            });
            while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                tokio::spawn(async move {
                    let mut scratch = bytes::BytesMut::new();
                    match stream::read_frame(&mut recv, &mut scratch).await {
                        Ok(Some((Kind::Lane, _))) => {
                            let mut lane = LaneServer::new(send, recv);
                            let replies = lane.replies();
                            while let Ok(Some((tag, payload))) = lane.next().await {
                                replies.reply(tag, &started(id, &payload));
                            }
                        }
                        Ok(Some((Kind::Launch, payload))) => {
                            let _ = stream::reply(&mut send, &started(id, &payload)).await;
                        }
                        _ => {}
                    }
                });
            }
        });
    }
}

fn started(id: HostId, payload: &[u8]) -> LaunchReply {
    let (_, bytes) = LaunchHead::split(payload).unwrap();
    let request = LaunchRequest::access(bytes).unwrap();
    LaunchReply::Started(Started {
        sandbox: SandboxId { host: id, local: u64::from(request.launch_id.0[0]) },
        visible_at: VisibleAt { incarnation: Incarnation(1), seq: Seq(2) },
        word: word(),
        steps: Steps::default(),
    })
}

fn word() -> CapacityWord {
    CapacityWord::new([1_000; 4], 0, Stamp::of(Seq(1)))
}

/// A placer with one dispatching thread that launches on `real`, once it has the map of `hosts` and has heard of all real ones.
fn start_placer(
    authority: &Arc<FleetAuthority>,
    objects: &'static str,
    hosts: &[(HostId, SocketAddr)],
    real: &[(HostId, SocketAddr)],
) -> SocketAddr {
    let dir = tempfile::tempdir().unwrap().keep();
    let identity = authority.issue(&Peer::Placer(1)).unwrap();
    identity.save(&dir).unwrap();
    let listen = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let config = placer::Config {
        identity: dir.clone(),
        state: dir.join("state"),
        listen,
        objects: objects.into(),
        aggregators: vec![start_aggregator(authority, real)],
        aperture: real.len(),
        map_refresh_ms: 100,
        workers: 1,
        ..placer::Config::default()
    };
    let hosts = hosts.to_vec();
    std::thread::spawn(move || {
        runtime().block_on(async move {
            publish(objects, &hosts).await;
            placer::run(config, CancellationToken::new()).await.unwrap();
        });
    });
    let tenant = authority.issue(&Peer::Client { tenant: "acme".into() }).unwrap();
    runtime().block_on(async {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let endpoint = quic::dialer(any, &tenant).unwrap();
        loop {
            let Ok(connection) = quic::connect(&endpoint, listen, Role::Placer).await else {
                continue;
            };
            let bytes = request().to_bytes();
            let reply = stream::launch(&connection, LaunchHead::new(1_000), &bytes).await;
            if matches!(reply, Ok(LaunchReply::Started(_))) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    listen
}

async fn publish(objects: &str, hosts: &[(HostId, SocketAddr)]) {
    let store = objects::open(objects).unwrap();
    let addr = |addr: &SocketAddr| HostAddr { ip: addr.ip(), port: addr.port() };
    let mut hosts: Vec<_> = hosts.iter().map(|(id, at)| (*id, addr(at))).collect();
    hosts.sort_unstable_by_key(|(id, _)| *id);
    let mut pages = Vec::new();
    let mut first = 0;
    for chunk in hosts.chunks(4_096) {
        let bytes = Page::encode(chunk);
        let last = chunk.last().unwrap().0.0;
        let last = if last == hosts.last().unwrap().0.0 { u64::MAX } else { last };
        let digest = *blake3::hash(&bytes).as_bytes();
        let count = chunk.len() as u32;
        pages.push(PageRef { first, last, count, bytes: bytes.len() as u32, digest });
        first = last.wrapping_add(1);
        store.put(&Path::from(names::page(&digest)), bytes.into()).await.unwrap();
    }
    let version = MapVersion { epoch: 1, version: 1 };
    let head = Head {
        format: wire::map::FORMAT,
        version,
        previous: MapVersion::default(),
        nonce: [1; 16],
        created_ms: 0,
        count: hosts.len() as u64,
        pages,
    };
    store.put(&Path::from(names::HEAD), head.to_bytes().into()).await.unwrap();
}

/// Tells whoever subscribes that all hosts are empty, ten times a second, so that nobody runs full.
fn start_aggregator(authority: &Arc<FleetAuthority>, hosts: &[(HostId, SocketAddr)]) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let addr = socket.local_addr().unwrap();
    let key = authority.newest_key().clone();
    let hosts: Vec<_> = hosts.iter().map(|(id, _)| *id).collect();
    let serve = move || {
        let (mut bytes, mut seq, mut beat) = ([0; 2_048], 0, 1);
        let mut subscribers: HashMap<SocketAddr, u64> = HashMap::new();
        loop {
            if let Ok((len, from)) = socket.recv_from(&mut bytes) {
                subscribers.insert(from, Datagram::parse(&bytes[..len]).unwrap().sender.id);
            }
            beat += 1;
            let word = CapacityWord::new([1_000; 4], 0, Stamp::of(Seq(beat)));
            for (to, placer) in &subscribers {
                let sender = key.sender(Role::Placer, *placer);
                for hosts in hosts.chunks(feed::ENTRIES_MAX) {
                    seq += 1;
                    let entries: Vec<_> = hosts.iter().map(|id| (*id, word)).collect();
                    let mut out = [0; DATAGRAM_BYTES_MAX];
                    let len = feed::seal(9, seq, &entries, (*placer, key.epoch, &sender), &mut out);
                    let _ = socket.send_to(&out[..len], *to);
                }
            }
        }
    };
    std::thread::Builder::new().name("aggregator".into()).spawn(serve).unwrap();
    addr
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
