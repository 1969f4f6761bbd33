//! The fleet of this test: its directories, its processes, its simulated hosts, and somebody who watches the map.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use heartbeat::fleet_sender::{FleetSender, Plan};
use placer::fleet::Aperture;
use wire::{
    HostId,
    map::{Head, HostAddr, MapVersion, Page, path},
};
use wire_net::{
    objects::{self, object_store::ObjectStore, object_store::path::Path as ObjectPath},
    tls::{FleetAuthority, Peer},
};

use crate::engines::s3::{S3, free_port};

const PLACER: u64 = 77;
/// Hosts that launches go to, and that are real.
const APERTURE: usize = 256;
/// Each simulated host beats so often, and says so.
const INTERVAL: Duration = Duration::from_secs(15);

/// A number out of the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// A role as a process of its own.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(role: &str, config: &Path) -> Self {
        let log = fs::File::options().append(true).create(true).open(config.with_extension("log"));
        let mut child = Command::new(tests::fleet::volley())
            .args([role, "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let log = || fs::read_to_string(config.with_extension("log")).unwrap_or_default();
        assert!(line.starts_with("ready "), "{role} said {line:?}\n{}", log());
        Self(child)
    }
}

/// What the object store says of the map, whenever it says anything.
#[derive(Clone, Default)]
pub(crate) struct Watched {
    pub(crate) version: MapVersion,
    pub(crate) count: u64,
    pub(crate) hosts: Vec<(HostId, HostAddr)>,
}

#[derive(Default)]
struct Watch {
    last: Watched,
    /// From when on, nobody may be missing.
    least: u64,
    wrong: Option<String>,
}

pub(crate) struct House {
    dir: tempfile::TempDir,
    authority: FleetAuthority,
    store: String,
    objects: String,
    peers: Vec<SocketAddr>,
    admin: Vec<SocketAddr>,
    ops: Vec<u16>,
    aggregators: BTreeMap<u64, Process>,
    others: Vec<Process>,
    real: Vec<(HostId, SocketAddr)>,
    hostd_ops: u16,
    /// Where clients connect.
    pub(crate) placer: SocketAddr,
    /// The hosts that are simulated.
    pub(crate) senders: FleetSender,
    beaten: Instant,
    /// All hosts.
    pub(crate) total: u64,
    watch: Arc<Mutex<Watch>>,
    kept: Option<S3>,
}

fn local() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}

impl House {
    pub(crate) fn new(store: &str, objects: &str, total: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = FleetAuthority::create(&dir.path().join("fleet")).unwrap();
        let peers: Vec<SocketAddr> = (0..3).map(|_| local()).collect();
        let key = authority.newest_key().clone();
        let interval_ms = u32::try_from(INTERVAL.as_millis()).unwrap();
        let plan = Plan { interval_ms, ..Plan::new(total, key, peers.clone()) };
        let mut senders = FleetSender::new(&plan).unwrap();
        // The placer launches on the lightest: those are real.
        let aperture = Aperture { placer: PLACER, hosts: APERTURE };
        let mut ids: Vec<HostId> = senders.hosts.iter().map(|sim| sim.host).collect();
        ids.sort_unstable_by_key(|host| aperture.weight(*host));
        ids.truncate(APERTURE);
        senders.leave_out(&ids.iter().copied().collect::<BTreeSet<_>>());
        let port = free_port();
        let addr = |at: u16| {
            let [high, low] = (at + 256).to_be_bytes();
            SocketAddr::from((Ipv4Addr::new(127, 1, high, low), port))
        };
        let real = ids.into_iter().zip((0..).map(addr)).collect();
        let watch = Arc::default();
        tokio::spawn(watch_map(objects::open(objects).unwrap(), Arc::clone(&watch)));
        Self {
            dir,
            authority,
            store: store.to_owned(),
            objects: objects.to_owned(),
            peers,
            admin: (0..3).map(|_| local()).collect(),
            ops: (0..3).map(|_| free_port()).collect(),
            aggregators: BTreeMap::new(),
            others: Vec::new(),
            real,
            hostd_ops: free_port(),
            placer: local(),
            senders,
            beaten: Instant::now(),
            total: total as u64,
            watch,
            kept: None,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn identity(&self, name: &str, peer: &Peer) -> PathBuf {
        let dir = self.file(name);
        if !dir.exists() {
            self.authority.issue(peer).unwrap().save(&dir).unwrap();
        }
        dir
    }

    pub(crate) fn start_aggregator(&mut self, id: u64) {
        let at = usize::try_from(id - 1).unwrap();
        let (dir, fleet) =
            (self.identity(&format!("aggregator-{id}"), &Peer::Aggregator(id)), self.file("fleet"));
        let text = format!(
            "identity = {dir:?}\nfleet = {fleet:?}\nlisten = \"{}\"\nudp = \"{}\"\nops = \"127.0.0.1:{}\"\n\
             store = {:?}\nobjects = {:?}\npeers = {:?}\nreceivers = 1\npublish_ms = 500\nscan_ms = 5000\n\
             grace_ms = 20000\naggregator_id = {id}\n",
            self.admin[at],
            self.peers[at],
            self.ops[at],
            self.store,
            self.objects,
            self.peers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        );
        let config = self.file(&format!("aggregator-{id}.toml"));
        fs::write(&config, text).unwrap();
        self.aggregators.insert(id, Process::start("heartbeatd", &config));
    }

    /// `kill -9`. Its simulated hosts notice, as real ones do by themselves.
    pub(crate) fn kill_aggregator(&mut self, id: u64) {
        drop(self.aggregators.remove(&id));
        self.senders.leave(self.udp(id));
        self.beaten = Instant::now() - INTERVAL;
    }

    pub(crate) fn udp(&self, id: u64) -> SocketAddr {
        self.peers[usize::try_from(id - 1).unwrap()]
    }

    pub(crate) fn ops(&self, id: u64) -> u16 {
        self.ops[usize::try_from(id - 1).unwrap()]
    }

    /// Who has published something since its start.
    pub(crate) fn leader(&self) -> Option<u64> {
        let leads = |id: &u64| figure(self.ops(*id), crate::LEADS) == Some(1);
        self.aggregators.keys().copied().find(leads)
    }

    /// The hosts that launches go to, in one process.
    pub(crate) fn start_hosts(&mut self) {
        let aggregators: Vec<_> = self.peers.iter().map(ToString::to_string).collect();
        let mut text = format!(
            "boxes = \"none\"\nnoop_ms = 0\ninterval_ms = 2000\nthreads = 1\naggregators = {aggregators:?}\n\
             cpu_millis = 64000\nmemory_bytes = 137438953472\nops = \"127.0.0.1:{}\"\n",
            self.hostd_ops
        );
        for (host, addr) in &self.real {
            let dir = self.identity(&host.to_string(), &Peer::Host(*host));
            let state = dir.join("state");
            writeln!(text, "[[hosts]]\nidentity = {dir:?}\nstate = {state:?}\nlisten = \"{addr}\"")
                .unwrap();
        }
        let config = self.file("hostd.toml");
        fs::write(&config, text).unwrap();
        self.others.push(Process::start("hostd", &config));
    }

    pub(crate) fn start_placer(&mut self) {
        let text = |addrs: &[SocketAddr]| addrs.iter().map(ToString::to_string).collect::<Vec<_>>();
        let config = format!(
            "identity = {:?}\nstate = {:?}\nlisten = \"{}\"\nobjects = {:?}\naggregators = {:?}\nadmin = {:?}\n\
             aperture = {APERTURE}\nworkers = 1\n",
            self.identity("placer", &Peer::Placer(PLACER)),
            self.file("placer-state"),
            self.placer,
            self.objects,
            text(&self.peers),
            text(&self.admin),
        );
        let file = self.file("placerd.toml");
        fs::write(&file, config).unwrap();
        self.others.push(Process::start("placerd", &file));
    }

    pub(crate) fn tenant(&self) -> PathBuf {
        self.identity("tenant", &Peer::Client { tenant: "acme".to_owned() })
    }

    /// An operator's command, to its end; what it printed.
    pub(crate) fn volley(&self, args: &[&str]) -> String {
        let operator = self.identity("operator", &Peer::Operator);
        let mut command = Command::new(tests::fleet::volley());
        command
            .args(args)
            .arg("--identity")
            .arg(operator)
            .args(["--placer", &self.placer.to_string()]);
        let ran =
            tests::fleet::Ran::of(command.env("VOLLEY_CLIENT", "/dev/null").stdin(Stdio::null()));
        ran.assert_done().to_owned()
    }

    /// Every simulated host beats, if its time has come.
    pub(crate) fn beat_if_due(&mut self) {
        if self.beaten.elapsed() >= INTERVAL {
            self.beaten = Instant::now();
            self.senders.beat_all(crate::RATE).unwrap();
            self.senders.take_directives().unwrap();
        }
    }

    /// Host and address of everybody: what the map must say.
    pub(crate) fn addresses(&self) -> Vec<(HostId, HostAddr)> {
        let real = self
            .real
            .iter()
            .map(|(host, addr)| (*host, HostAddr { ip: addr.ip(), port: addr.port() }));
        let mut all: Vec<_> = real.chain(self.senders.addresses()).collect();
        all.sort_unstable_by_key(|(host, _)| *host);
        all
    }

    /// The map as the object store last said it; every page checked.
    pub(crate) fn watched(&self) -> Watched {
        let watch = self.watch.lock().unwrap();
        assert_eq!(watch.wrong, None);
        watch.last.clone()
    }

    /// From now on a map without everybody is an error.
    pub(crate) fn expect_everybody(&self) {
        self.watch.lock().unwrap().least = self.total;
    }

    pub(crate) fn hosts_that_started(&self) -> String {
        let text = metrics(self.hostd_ops).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains("started") && !line.starts_with('#'));
        lines.collect::<Vec<_>>().join(", ")
    }

    /// An engine that must outlive this.
    pub(crate) fn keep(&mut self, s3: S3) {
        self.kept = Some(s3);
    }
}

fn metrics(ops: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", ops)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// One figure of `/metrics`.
pub(crate) fn figure(ops: u16, name: &str) -> Option<u64> {
    metrics(ops)?.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Reads the map for ever, as a placer does: pages by digest, each once.
async fn watch_map(store: Arc<dyn ObjectStore>, watch: Arc<Mutex<Watch>>) {
    let mut pages: BTreeMap<[u8; 32], Vec<(HostId, HostAddr)>> = BTreeMap::new();
    loop {
        if let Some(seen) = read_map(&*store, &mut pages).await {
            let mut watch = watch.lock().unwrap();
            if seen.version < watch.last.version {
                watch.wrong = Some(format!("{:?} after {:?}", seen.version, watch.last.version));
            }
            if seen.count < watch.least {
                watch.wrong = Some(format!("{} hosts in {:?}", seen.count, seen.version));
            }
            watch.last = seen;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn read_map(
    store: &dyn ObjectStore,
    pages: &mut BTreeMap<[u8; 32], Vec<(HostId, HostAddr)>>,
) -> Option<Watched> {
    let patience = Duration::from_secs(2);
    let at = ObjectPath::from(path::HEAD);
    let read = objects::read(store, &at);
    let (bytes, _) = tokio::time::timeout(patience, read).await.ok()?.ok()??;
    let head = Head::from_bytes(&bytes).unwrap();
    let mut hosts = Vec::new();
    for named in &head.pages {
        let page = match pages.entry(named.digest) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let at = ObjectPath::from(path::page(&named.digest));
                let read = tokio::time::timeout(patience, objects::read(store, &at));
                let (bytes, _) = read.await.ok()?.ok()?.expect("pages before heads");
                new.insert(Page::parse(&bytes, named).unwrap().hosts().collect())
            }
        };
        hosts.extend_from_slice(page);
    }
    Some(Watched { version: head.version, count: head.count, hosts })
}
