//! A small fleet inside a test: real certificates, real QUIC and UDP, the placer as it is; only hosts and the aggregator
//! follow a script.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test's own fixture, of which each test uses a part"
)]

pub mod host;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub use host::{Act, Host};
use object_store::{ObjectStore, ObjectStoreExt, path::Path as ObjectPath};
use tokio_util::sync::CancellationToken;
use volley_client::{Client, ConnectOptions};
use wire::{
    CapacityWord, Code, Fault, HostId, LaunchId,
    datagram::Datagram,
    feed,
    limits::DATAGRAM_BYTES_MAX,
    map::{Head, HostAddr, MapVersion, Page, PageRef, path as names},
    seal::Role,
};
use wire_net::{
    objects, quic,
    tls::{FleetAuthority, Identity, Peer},
};

/// The fleet.
pub struct House {
    pub authority: Arc<FleetAuthority>,
    pub hosts: Vec<Arc<Host>>,
    pub objects: String,
    pub store: Arc<dyn ObjectStore>,
    aggregator: SocketAddr,
    words: Arc<Mutex<HashMap<HostId, CapacityWord>>>,
    pub reports: Arc<Mutex<Vec<wire::report::FailureReport>>>,
    stop: CancellationToken,
    ended: Arc<AtomicBool>,
    dirs: Vec<tempfile::TempDir>,
    pub state: Vec<std::path::PathBuf>,
}

impl House {
    /// A fleet of `count` hosts that start everything, published as version 1.1.
    pub async fn new(name: &str, count: usize) -> Self {
        let authority = Arc::new(FleetAuthority::unsaved().unwrap());
        let objects = format!("mem://{name}-{}", std::process::id());
        let store = objects::open(&objects).unwrap();
        let words = Arc::<Mutex<HashMap<_, _>>>::default();
        let reports = Arc::default();
        let ended = Arc::new(AtomicBool::new(false));
        let aggregator =
            start_aggregator(&authority, Arc::clone(&words), Arc::clone(&reports), &ended);
        let mut house = Self {
            authority,
            hosts: Vec::new(),
            objects,
            store,
            aggregator,
            words,
            reports,
            stop: CancellationToken::new(),
            ended,
            dirs: Vec::new(),
            state: Vec::new(),
        };
        for at in 0..count as u64 {
            // Spread over all ids, so that homes are spread.
            let id = HostId((at + 1).wrapping_mul(u64::MAX / (count as u64 + 1)));
            house.add_host(id, 500);
        }
        publish(&*house.store, MapVersion { epoch: 1, version: 1 }, &house.addresses()).await;
        house
    }

    /// A host on a runtime of its own: when that is dropped, the host is gone without a word.
    pub fn add_mortal_host(&mut self, id: HostId, free: u16) -> tokio::runtime::Runtime {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let guard = runtime.enter();
        self.add_host(id, free);
        drop(guard);
        runtime
    }

    pub fn add_host(&mut self, id: HostId, free: u16) {
        let identity = self.authority.issue(&Peer::Host(id)).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let endpoint = quic::listen(any, &identity, &[Role::Placer]).unwrap();
        let host = Arc::new(Host::new(id, endpoint));
        self.words.lock().unwrap().insert(id, host.word(free));
        tokio::spawn(host::serve(Arc::clone(&host)));
        self.hosts.push(host);
    }

    pub fn addresses(&self) -> Vec<(HostId, HostAddr)> {
        let addr = |addr: SocketAddr| HostAddr { ip: addr.ip(), port: addr.port() };
        self.hosts.iter().map(|host| (host.id, addr(host.addr))).collect()
    }

    pub fn host(&self, id: HostId) -> &Host {
        self.hosts.iter().find(|host| host.id == id).unwrap()
    }

    pub fn started(&self) -> usize {
        self.hosts.iter().map(|host| host.started()).sum()
    }

    pub fn running(&self, id: LaunchId) -> usize {
        self.hosts.iter().filter(|host| host.runs(id)).count()
    }

    fn saved(&mut self, identity: &Identity) -> std::path::PathBuf {
        let dir = tempfile::tempdir().unwrap();
        identity.save(dir.path()).unwrap();
        let path = dir.path().to_owned();
        self.dirs.push(dir);
        path
    }

    /// Starts a placer and waits until it listens.
    pub async fn placer(
        &mut self,
        id: u64,
        change: impl FnOnce(&mut placer::Config),
    ) -> (SocketAddr, CancellationToken) {
        let identity = self.authority.issue(&Peer::Placer(id)).unwrap();
        let identity = self.saved(&identity);
        let state = tempfile::tempdir().unwrap();
        let listen = free_port();
        let mut config = placer::Config {
            identity,
            state: state.path().to_owned(),
            listen,
            objects: self.objects.clone(),
            aggregators: vec![self.aggregator],
            map_refresh_ms: 20,
            workers: 1,
            ..placer::Config::default()
        };
        change(&mut config);
        self.state.push(config.state.clone());
        self.dirs.push(state);
        let stop = self.stop.child_token();
        tokio::spawn(placer::run(config, stop.clone()));
        let client = self.client("probe", vec![listen]).await;
        client.ping().await.unwrap();
        (listen, stop)
    }

    /// A client of a tenant, as soon as one of the placers answers.
    pub async fn client(&self, tenant: &str, placers: Vec<SocketAddr>) -> Client {
        let identity = self.authority.issue(&Peer::Client { tenant: tenant.into() }).unwrap();
        self.connect(&identity, placers, None).await.unwrap()
    }

    pub async fn connect(
        &self,
        identity: &Identity,
        placers: Vec<SocketAddr>,
        tenant: Option<String>,
    ) -> Result<Client, Fault> {
        let options = ConnectOptions { placers, tenant, ..ConnectOptions::default() };
        let mut last = Err(Fault::new(Code::Internal, "not tried"));
        // Nobody listens while a placer starts: each dial then ends by itself.
        for _ in 0..20 {
            last = Client::connect_as(identity, options.clone()).await;
            match &last {
                Err(fault) if fault.code == Code::Unreachable => {}
                _ => return last,
            }
        }
        last
    }

    /// A client once launches work: the map is loaded, and capacity was heard.
    pub async fn ready_client(&self, tenant: &str, placers: Vec<SocketAddr>) -> Client {
        for placer in &placers {
            let client = self.client(tenant, vec![*placer]).await;
            let mut turns = tokio::time::interval(Duration::from_millis(10));
            for turn in 0.. {
                turns.tick().await;
                match client.launch(volley_client::LaunchSpec::new("probe")).await {
                    Ok(_) => break,
                    Err(error) => assert!(turn < 500, "{error}"),
                }
            }
        }
        self.client(tenant, placers).await
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.stop.cancel();
        self.ended.store(true, Ordering::SeqCst);
    }
}

/// A UDP port of the loopback that was free a moment ago.
pub fn free_port() -> SocketAddr {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

/// Publishes a map in one page a quarter of the ids.
pub async fn publish(store: &dyn ObjectStore, version: MapVersion, hosts: &[(HostId, HostAddr)]) {
    let (head, pages) = make_map(version, hosts);
    for (page, bytes) in head.pages.iter().zip(pages) {
        let path = ObjectPath::from(names::page(&page.digest));
        store.put(&path, bytes.into()).await.unwrap();
    }
    store.put(&ObjectPath::from(names::HEAD), head.to_bytes().into()).await.unwrap();
}

/// A map's head and pages.
pub fn make_map(version: MapVersion, hosts: &[(HostId, HostAddr)]) -> (Head, Vec<Vec<u8>>) {
    let mut hosts = hosts.to_vec();
    hosts.sort_unstable_by_key(|(id, _)| *id);
    let quarter = 1u64 << 62;
    let mut pages = Vec::new();
    let refs = (0..4u64).map(|at| {
        let (first, last) = (at * quarter, at * quarter + (quarter - 1));
        let inside: Vec<_> =
            hosts.iter().copied().filter(|(id, _)| (first..=last).contains(&id.0)).collect();
        let bytes = Page::encode(&inside);
        let page = PageRef {
            first,
            last,
            count: inside.len() as u32,
            bytes: bytes.len() as u32,
            digest: *blake3::hash(&bytes).as_bytes(),
        };
        pages.push(bytes);
        page
    });
    let refs = refs.collect();
    let head = Head {
        format: wire::map::FORMAT,
        version,
        previous: MapVersion::default(),
        nonce: [1; 16],
        created_ms: 0,
        count: hosts.len() as u64,
        pages: refs,
    };
    (head, pages)
}

/// An aggregator that tells every subscriber all words at once, and keeps failure reports.
fn start_aggregator(
    authority: &FleetAuthority,
    words: Arc<Mutex<HashMap<HostId, CapacityWord>>>,
    reports: Arc<Mutex<Vec<wire::report::FailureReport>>>,
    ended: &Arc<AtomicBool>,
) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let addr = socket.local_addr().unwrap();
    let key = authority.newest_key().clone();
    let ended = Arc::clone(ended);
    std::thread::spawn(move || {
        let mut seq = 0;
        let mut bytes = [0; 2_048];
        while !ended.load(Ordering::SeqCst) {
            let Ok((len, from)) = socket.recv_from(&mut bytes) else { continue };
            let datagram = Datagram::parse(&bytes[..len]).unwrap();
            let placer = datagram.sender.id;
            let sender = key.sender(Role::Placer, placer);
            let verified = datagram.verify(&sender).expect("sealed under the placer's key");
            if let Ok((_, report)) = wire::report::FailureReport::open(&verified) {
                reports.lock().unwrap().push(report);
                continue;
            }
            let (_, subscribe) = feed::Subscribe::open(&verified).unwrap();
            if subscribe.want != feed::Subscribe::EVERYTHING {
                continue;
            }
            let entries: Vec<_> =
                words.lock().unwrap().iter().map(|(id, word)| (*id, *word)).collect();
            for entries in entries.chunks(feed::ENTRIES_MAX) {
                seq += 1;
                let mut out = [0; DATAGRAM_BYTES_MAX];
                let len = feed::seal(9, seq, entries, (placer, key.epoch, &sender), &mut out);
                socket.send_to(&out[..len], from).unwrap();
            }
        }
    });
    addr
}

/// A map of hosts at made-up addresses.
pub fn hosts(count: u64) -> Vec<(HostId, HostAddr)> {
    let addr =
        |at: u64| HostAddr { ip: Ipv4Addr::from(0x0a00_0000 + at as u32).into(), port: 7_430 };
    (0..count).map(|at| (HostId(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)), addr(at))).collect()
}

/// Whether a directory holds files that nobody should have left.
pub fn leftovers(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with('.')).collect()
}
