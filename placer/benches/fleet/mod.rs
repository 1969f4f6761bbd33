//! The fleet of the benches: hosts that start everything, an aggregator that says that all have room, a store with a map, and
//! a real placer, all in this process over real QUIC on the loopback.
#![allow(dead_code, reason = "each bench uses its part")]

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use object_store::{ObjectStoreExt, path::Path};
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
    lane::LaneServer,
    objects, quic, stream,
    tls::{FleetAuthority, Peer},
};

/// Hosts of a page: heartbeatd's pages have 1,024 to 3,072.
const PAGE_HOSTS: usize = 4_096;

pub(crate) fn request() -> LaunchRequest {
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

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Hosts that start everything, all on one thread.
pub(crate) fn start_hosts(
    authority: &Arc<FleetAuthority>,
    ids: Vec<HostId>,
) -> Vec<(HostId, SocketAddr)> {
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

/// A placer with one dispatching thread, and its directory: it launches on `real`, once it has the map of `hosts` and has heard of all real ones.
pub(crate) fn start_placer(
    authority: &Arc<FleetAuthority>,
    objects: &'static str,
    hosts: &[(HostId, SocketAddr)],
    real: &[(HostId, SocketAddr)],
    map_refresh_ms: u64,
) -> (SocketAddr, PathBuf) {
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
        map_refresh_ms,
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
    (listen, dir.join("state"))
}

pub(crate) async fn publish(objects: &str, hosts: &[(HostId, SocketAddr)]) {
    let pages = put_pages(objects, hosts).await;
    put_head(objects, pages, MapVersion { epoch: 1, version: 1 }).await;
}

/// Puts all pages of a map; a head may name them.
pub(crate) async fn put_pages(objects: &str, hosts: &[(HostId, SocketAddr)]) -> Vec<PageRef> {
    let store = objects::open(objects).unwrap();
    let addr = |addr: &SocketAddr| HostAddr { ip: addr.ip(), port: addr.port() };
    let mut hosts: Vec<_> = hosts.iter().map(|(id, at)| (*id, addr(at))).collect();
    hosts.sort_unstable_by_key(|(id, _)| *id);
    let mut pages = Vec::new();
    let mut first = 0;
    for chunk in hosts.chunks(PAGE_HOSTS) {
        let bytes = Page::encode(chunk);
        let last = chunk.last().unwrap().0.0;
        let last = if last == hosts.last().unwrap().0.0 { u64::MAX } else { last };
        let digest = *blake3::hash(&bytes).as_bytes();
        let count = chunk.len() as u32;
        pages.push(PageRef { first, last, count, bytes: bytes.len() as u32, digest });
        first = last.wrapping_add(1);
        store.put(&Path::from(names::page(&digest)), bytes.into()).await.unwrap();
    }
    pages
}

/// Puts a head: from now on this is the map.
pub(crate) async fn put_head(objects: &str, pages: Vec<PageRef>, version: MapVersion) {
    let store = objects::open(objects).unwrap();
    let head = Head {
        format: wire::map::FORMAT,
        version,
        previous: MapVersion::default(),
        nonce: [1; 16],
        created_ms: 0,
        count: pages.iter().map(|page| u64::from(page.count)).sum(),
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
