//! FAULTS P8 with real processes: a drain of 30 % at once with a deadline, and `kill -9` in its middle. No launch is accepted on
//! a drained host after the acknowledgement plus one map age, and "done" means that hostd counts zero.
//!
//! Ten hosts without boxes, under launches all the while. Two things are watched: what a placer starts, by the host that the
//! sandbox's id names; and what a drained host itself says to a launch that comes past the placer, which a host takes until
//! it has heard of its drain, and then never again. The aggregator and one of the drained hosts are killed as soon as the
//! drains are acknowledged; `volley dev` starts them again. Left out: a drained host that never hears of it, which is the
//! placers' half of the same rule.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use quinn::Connection;
use rustix::process::Signal;
use tests::fleet::{Fleet, signal};
use volley_client::{
    Client, ConnectOptions, ExitWhy, HostId, HostRecord, LaunchError, LaunchSpec, Sandbox, State,
};
use wire::{
    Code,
    call::{Answer, Call},
    launch::{LaunchHead, LaunchReply, LaunchRequest, Limits, Network},
};
use wire_net::{
    quic, stream,
    tls::{Identity, Peer},
};

const HOSTS: usize = 10;
const DRAINED: usize = 3;
/// What still runs on a drained host ends after this.
const DEADLINE: Duration = Duration::from_secs(6);
/// How old a placer's map may be: published so often, and read so often (both are the fleet's settings below).
const MAP_AGE: Duration = Duration::from_millis(1_000 + 1_000);

/// A launch that the placer began.
struct Begun {
    at: Instant,
    host: HostId,
}

#[derive(Default)]
struct Seen {
    /// Launches that started.
    started: Vec<Begun>,
    /// Launches that did not, but for those of unknown outcome: one of the hosts is killed under them.
    failed: Vec<String>,
    unknown: usize,
}

impl Seen {
    fn add(&mut self, at: Instant, launched: Result<Sandbox, LaunchError>) {
        match launched {
            Ok(sandbox) => self.started.push(Begun { at, host: sandbox.id().host }),
            Err(LaunchError::Unknown { .. }) => self.unknown += 1,
            Err(error) => self.failed.push(error.to_string()),
        }
    }
}

/// The first directory of the fleet whose name says that it is of such a member.
fn identity(fleet: &Fleet, role: &str) -> Identity {
    let entries = fs::read_dir(fleet.state()).unwrap().flatten();
    let mut dirs = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(role));
    Identity::load(&dirs.next().unwrap().path()).unwrap()
}

async fn client(fleet: &Fleet, role: &str) -> Client {
    let said = fs::read_to_string(fleet.client()).unwrap();
    let said: toml::Table = said.parse().unwrap();
    let placer = said["placers"][0].as_str().unwrap().parse().unwrap();
    let options = ConnectOptions {
        placers: vec![placer],
        budget: Duration::from_secs(10),
        tenant: (role == "operator").then(|| "dev".to_owned()),
        ..ConnectOptions::default()
    };
    Client::connect_as(&identity(fleet, role), options).await.unwrap()
}

async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            println!("  {what}: {:.2} s", began.elapsed().as_secs_f64());
            return answer;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Launches, eight at a time, until told to stop.
async fn launch_all(client: Client, seen: Arc<Mutex<Seen>>, stop: Arc<AtomicBool>) {
    let one = async || {
        while !stop.load(Ordering::Relaxed) {
            let at = Instant::now();
            let spec = LaunchSpec::new("none").command(["true"]).lifetime(Duration::from_secs(1));
            let launched = client.launch(spec).await;
            seen.lock().unwrap().add(at, launched);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    futures::future::join_all((0..8).map(|_| one())).await;
}

/// A drained host, asked past the placer with a placer's certificate.
struct Direct {
    host: HostId,
    addr: SocketAddr,
    endpoint: quinn::Endpoint,
    connection: Option<Connection>,
}

impl Direct {
    fn new(fleet: &Fleet, record: &HostRecord) -> Self {
        let endpoint =
            quic::dialer(SocketAddr::from(([127, 0, 0, 1], 0)), &identity(fleet, "placer-"));
        let addr = record.addr.parse().unwrap();
        Self { host: record.host, addr, endpoint: endpoint.unwrap(), connection: None }
    }

    async fn connection(&mut self) -> Option<Connection> {
        if self.connection.as_ref().is_none_or(|open| open.close_reason().is_some()) {
            let peer = Peer::Host(self.host);
            self.connection = quic::connect(&self.endpoint, self.addr, &peer).await.ok();
        }
        self.connection.clone()
    }

    /// Launches something that runs for so long.
    async fn launch(&mut self, lifetime: Duration) -> Option<LaunchReply> {
        let request = LaunchRequest {
            launch_id: volley_client::LaunchId(rand::random()),
            tenant: "dev".into(),
            image: "none".into(),
            shape: 0,
            command: vec!["true".into()],
            env: vec![],
            cwd: String::new(),
            user: String::new(),
            tty: false,
            stdin: false,
            limits: Limits {
                hard_ms: u64::try_from(lifetime.as_millis()).unwrap(),
                ..Limits::default()
            },
            network: Network::None,
            publish: vec![],
            labels: vec![],
        };
        let connection = self.connection().await?;
        stream::launch(&connection, LaunchHead::new(5_000), &request.to_bytes()).await.ok()
    }

    /// Launches until it refuses: from when on it does.
    async fn until_refused(&mut self) -> Instant {
        let host = self.host;
        until(&format!("{host} refuses by itself"), async || {
            match self.launch(Duration::from_millis(100)).await? {
                LaunchReply::Refused(refused) if refused.code == Code::Draining => {
                    Some(Instant::now())
                }
                _ => None,
            }
        })
        .await
    }

    /// How many sandboxes it counts, of all tenants.
    async fn running(&mut self) -> Option<usize> {
        let connection = self.connection().await?;
        let list = Call::List { tenant: String::new(), labels: vec![], ended: false };
        match stream::call_on_behalf(&connection, "dev", &list).await.ok()? {
            Answer::Sandboxes(all) => Some(all.len()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_of_30_percent_takes_no_launch_and_is_done_at_zero() {
    let hosts = HOSTS.to_string();
    let fleet = Fleet::up_with(
        &["--boxes", "none", "--burst", "0", "--hosts", &hosts],
        &[
            // A sandbox runs until its lifetime, or its host's drain, ends it.
            ("VOLLEY_HOSTD_NOOP_MS", "600000"),
            ("VOLLEY_HEARTBEATD_PUBLISH_MS", "1000"),
            ("VOLLEY_PLACERD_MAP_REFRESH_MS", "1000"),
        ],
    );
    let fleet_up = Instant::now();
    let operator = client(&fleet, "operator").await;
    let seen = Arc::<Mutex<Seen>>::default();
    let stop = Arc::<AtomicBool>::default();
    let launching =
        tokio::spawn(launch_all(client(&fleet, "tenant").await, seen.clone(), stop.clone()));
    until("launches start on every host", async || {
        (started_on(&seen, fleet_up).len() == HOSTS).then_some(())
    })
    .await;

    let mut records = operator.hosts().await.unwrap();
    records.sort_by_key(|record| record.host);
    let mut direct: Vec<_> =
        records[..DRAINED].iter().map(|record| Direct::new(&fleet, record)).collect();
    // Work that only the drain's deadline ends.
    let mut long = Vec::new();
    for host in &mut direct {
        match host.launch(Duration::from_secs(600)).await.unwrap() {
            LaunchReply::Started(started) => long.push(operator.sandbox(started.sandbox)),
            other => panic!("{other:?}"),
        }
    }

    let asked = Instant::now();
    let drains = direct.iter().map(|host| {
        let (id, operator) = (host.host, &operator);
        async move {
            operator.drain(id, Some(DEADLINE), "a test").await.unwrap();
            (id, Instant::now())
        }
    });
    let acknowledged: BTreeMap<_, _> =
        futures::future::join_all(drains).await.into_iter().collect();
    signal(fleet.pids("heartbeatd")[0], Signal::KILL);
    let killed = direct[0].host;
    signal(pid_of(&fleet, killed), Signal::KILL);
    // quinn notices a dead peer by its silence only; this one is known to be dead.
    direct[0].connection.take().unwrap().close(0u32.into(), b"it is dead");
    println!("three are drained; the aggregator and {killed} are killed");

    // Each says so by itself; the one that was killed, when it is back and has heard of it.
    let refusals = futures::future::join_all(direct.iter_mut().map(Direct::until_refused)).await;
    for (host, refused) in direct.iter().zip(&refusals) {
        let after = refused.duration_since(acknowledged[&host.host]);
        println!("  {} refuses {} ms after the acknowledgement", host.host, after.as_millis());
    }
    done_means_zero(&operator, &mut direct).await;
    // Milliseconds are cut off on the way.
    let least = DEADLINE - Duration::from_millis(100);
    assert!(asked.elapsed() >= least, "what runs on a host that drains runs until the deadline");
    for sandbox in &long[1..] {
        let State::Stopped(exit) = sandbox.inspect().await.unwrap().state else {
            panic!("{} runs on", sandbox.id())
        };
        assert_eq!(exit.why, ExitWhy::Lost);
    }
    nobody_was_launched_on(&seen, &acknowledged);

    back_in_service(&operator, &seen, &acknowledged, killed).await;
    stop.store(true, Ordering::Relaxed);
    launching.await.unwrap();
    let seen = seen.lock().unwrap();
    println!("{} launches started, {} have no known outcome", seen.started.len(), seen.unknown);
    assert!(seen.failed.is_empty(), "{:?}", seen.failed);
}

/// Where launches went that began after `since`.
fn started_on(seen: &Mutex<Seen>, since: Instant) -> BTreeSet<HostId> {
    let seen = seen.lock().unwrap();
    seen.started.iter().filter(|begun| begun.at > since).map(|begun| begun.host).collect()
}

/// Resumed hosts take launches again. The one that was killed is not waited for: placers keep away for a while from a host
/// that died under them.
async fn back_in_service(
    operator: &Client,
    seen: &Mutex<Seen>,
    drained: &BTreeMap<HostId, Instant>,
    killed: HostId,
) {
    let resumed = Instant::now();
    for host in drained.keys() {
        operator.resume_host(*host).await.unwrap();
    }
    until("launches start on those that were resumed", async || {
        let on = started_on(seen, resumed);
        drained.keys().all(|host| *host == killed || on.contains(host)).then_some(())
    })
    .await;
}

/// Whenever a host is said to be drained it counts nothing; it refuses all the while.
async fn done_means_zero(operator: &Client, direct: &mut [Direct]) {
    let mut open: BTreeMap<_, _> = direct.iter_mut().map(|host| (host.host, host)).collect();
    until("all are drained", async || {
        for (id, host) in &mut open {
            match host.launch(Duration::from_millis(100)).await {
                Some(LaunchReply::Started(_)) => panic!("{id} has refused, and now it starts"),
                Some(LaunchReply::Refused(refused)) => assert_eq!(refused.code, Code::Draining),
                _ => {}
            }
        }
        let known = operator.hosts().await.ok()?;
        for record in known.iter().filter(|record| record.state == "drained") {
            let Some(host) = open.get_mut(&record.host) else { continue };
            // No answer is none: it is asked again.
            if let Some(running) = host.running().await {
                assert_eq!(running, 0, "{record:?}");
                open.remove(&record.host);
            }
        }
        open.is_empty().then_some(())
    })
    .await;
}

/// Of what began a map age after the acknowledgement, nothing is on a drained host.
fn nobody_was_launched_on(seen: &Mutex<Seen>, acknowledged: &BTreeMap<HostId, Instant>) {
    let seen = seen.lock().unwrap();
    for (host, at) in acknowledged {
        let theirs = seen.started.iter().filter(|begun| begun.host == *host);
        let last = theirs.map(|begun| begun.at).max().unwrap();
        match last.checked_duration_since(*at) {
            Some(after) => println!("  {host}: last launch {} ms after it", after.as_millis()),
            None => println!("  {host}: last launch {} ms before it", (*at - last).as_millis()),
        }
        assert!(last <= *at + MAP_AGE, "a launch was accepted on {host}, which is drained");
    }
}

/// The process of a host, whose settings are in the file that its name says.
fn pid_of(fleet: &Fleet, host: HostId) -> u32 {
    let pids = fleet.pids("hostd");
    let identity = format!("host-{:016x}", host.0);
    let at = (1..=HOSTS).find(|at| {
        let file = fleet.state().join(format!("config/hostd-{at}.toml"));
        fs::read_to_string(file).unwrap().contains(&identity)
    });
    pids[at.unwrap() - 1]
}
