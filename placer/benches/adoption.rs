//! A million-host map put to use: how long it takes, and what launches notice of it.
//!
//! `cargo bench -p placer --bench adoption -- [hosts of the map] [launches a second] [seconds]`. First the real loader and
//! keeper, without a placer around them: a first map, and one of which a host in a thousand is new (so that every page is
//! another), from the store's bytes to the table that picks are made from. Then launches at a steady rate through a real
//! placer with this map, to 64 hosts that accept at once, the rest of the map being there to be adopted: with no new
//! maps; with one each second, as placers look for them; and with one after another. Rounds alternate. A launch's time runs
//! from when it was due, so that a stall is not left out.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a bench stops at the first surprise, and its numbers are small"
)]

#[path = "fleet/mod.rs"]
mod fleet;

use std::{
    io::Read as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fleet::{publish, put_head, put_pages, request, runtime, start_hosts, start_placer};
use placer::{
    fleet::{Aperture, FleetKeeper},
    loader::{Loader, Refresh},
};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use volley_client::draw_id;
use wire::{
    HostId,
    launch::{LaunchHead, LaunchReply},
    limits::HOSTS_MAX,
    map::{MapVersion, PageRef},
    seal::Role,
};
use wire_net::{
    lane::Lane,
    objects, quic,
    tls::{FleetAuthority, Peer},
};

const ROUNDS: usize = 5;
/// Hosts that launches go to.
const REAL: usize = 64;
/// The placer's pause between two looks for a map, as short as a setting can be.
const REFRESH_MS: u64 = 10;
type Hosts = Vec<(HostId, SocketAddr)>;

fn main() {
    let args: Vec<u64> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let get = |at: usize, or: u64| args.get(at).copied().unwrap_or(or);
    let (hosts, rate, seconds) = (get(0, 1_000_000) as usize, get(1, 2_000), get(2, 4));
    let mut rng = SmallRng::seed_from_u64(7);
    let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    let map: Hosts = (0..hosts).map(|_| (HostId(rng.next_u64()), nobody)).collect();
    load(&map);
    launch(map, rate, Duration::from_secs(seconds));
    std::process::exit(0);
}

/// The same map but for one host in a thousand, which is another.
fn changed(map: &Hosts, but: usize) -> Hosts {
    let mut map = map.clone();
    map.iter_mut().skip(but).step_by(1_000).for_each(|(host, _)| host.0 ^= 1);
    map
}

fn ms(from: Instant) -> f64 {
    from.elapsed().as_secs_f64() * 1e3
}

fn of(figures: &mut [f64]) -> String {
    figures.sort_by(f64::total_cmp);
    let last = figures.len() - 1;
    format!("{:.1} ({:.1}-{:.1})", figures[last / 2], figures[0], figures[last])
}

/// From an object store to a table in use.
fn load(map: &Hosts) {
    const OBJECTS: &str = "mem://adoption-load";
    let next = changed(map, 0);
    for (what, aperture) in
        [("all of them launched on", HOSTS_MAX), ("an aperture of 4,096", 4_096)]
    {
        let [mut fetched, mut first, mut other] = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            let dir = tempfile::tempdir().unwrap();
            let mut loader = Loader::new(objects::open(OBJECTS).unwrap(), dir.path());
            let aperture = Aperture { placer: 1, hosts: aperture };
            let mut keeper = FleetKeeper::open(dir.path(), aperture, None).unwrap();
            runtime().block_on(publish(OBJECTS, map));
            let from = Instant::now();
            let newer = refreshed(&mut loader);
            fetched.push(ms(from));
            keeper.adopt(newer).unwrap();
            first.push(ms(from));
            assert_eq!(keeper.table().live(), map.len().min(aperture.hosts) as u64);
            runtime().block_on(async {
                let pages = put_pages(OBJECTS, &next).await;
                put_head(OBJECTS, pages, MapVersion { epoch: 1, version: 2 }).await;
            });
            loader.settle();
            let from = Instant::now();
            let newer = refreshed(&mut loader);
            keeper.adopt(newer).unwrap();
            other.push(ms(from));
        }
        println!("{} hosts, {what}: milliseconds", map.len());
        println!("  first map fetched, checked, mapped  {}", of(&mut fetched));
        println!("  first map in use                    {}", of(&mut first));
        println!("  the next in use, 0.1 % new          {}", of(&mut other));
    }
}

fn refreshed(loader: &mut Loader) -> Arc<placer::Map> {
    match runtime().block_on(loader.refresh()).unwrap() {
        Refresh::Newer { map, .. } => map,
        Refresh::Unchanged => panic!("a map was published"),
    }
}

/// Launches while maps come.
fn launch(mut map: Hosts, rate: u64, time: Duration) {
    const OBJECTS: &str = "mem://adoption-launch";
    let authority = Arc::new(FleetAuthority::unsaved().unwrap());
    let aperture = Aperture { placer: 1, hosts: REAL };
    map.sort_unstable_by_key(|(host, _)| aperture.weight(*host));
    let real = start_hosts(&authority, map[..REAL].iter().map(|(host, _)| *host).collect());
    map[..REAL].copy_from_slice(&real);
    // Another host of a thousand: never one of the real ones.
    let pages = runtime().block_on(async {
        [put_pages(OBJECTS, &map).await, put_pages(OBJECTS, &changed(&map, REAL)).await]
    });
    let (placer, state) = start_placer(&authority, OBJECTS, &map, &real, REFRESH_MS);
    let tenant = authority.issue(&Peer::Client { tenant: "acme".into() }).unwrap();
    let maps =
        Maps { objects: OBJECTS, pages, file: state.join("map"), version: AtomicU64::new(1) };
    println!("{} hosts in the map, {rate} launches a second to {REAL} of them", map.len());
    let offered = Offered { placer, tenant, rate, time };
    let pauses = [None, Some(Duration::from_secs(1)), Some(Duration::ZERO)];
    let mut figures = vec![Figures::default(); pauses.len()];
    offered.round(&maps, None); // Warms up.
    for _ in 0..ROUNDS {
        for (pause, figures) in pauses.iter().zip(&mut figures) {
            figures.add(offered.round(&maps, *pause), time);
        }
    }
    for (what, figures) in ["none", "each second", "one after another"].iter().zip(&mut figures) {
        println!(
            "  new maps {what:>17}: {} a second; launches p50 {}, p99 {}, p99.9 {} ms",
            of(&mut figures.maps),
            of(&mut figures.p50),
            of(&mut figures.p99),
            of(&mut figures.p999)
        );
    }
}

/// What is published, in turn.
struct Maps {
    objects: &'static str,
    pages: [Vec<PageRef>; 2],
    /// Where the placer keeps what it has.
    file: PathBuf,
    version: AtomicU64,
}

impl Maps {
    /// Publishes one map after another, each when the placer has the last and the pause is over.
    fn publish_until(&self, stop: &AtomicBool, pause: Duration) -> usize {
        let mut adopted = 0;
        while !stop.load(Ordering::Relaxed) {
            let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
            let pages = self.pages[version as usize % 2].clone();
            let from = Instant::now();
            runtime().block_on(put_head(self.objects, pages, MapVersion { epoch: 1, version }));
            while held(&self.file) != Some(version) || from.elapsed() < pause {
                if stop.load(Ordering::Relaxed) {
                    return adopted;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            adopted += 1;
        }
        adopted
    }
}

/// The version of the map in a file.
fn held(file: &Path) -> Option<u64> {
    let mut head = [0; 24];
    std::fs::File::open(file).ok()?.read_exact(&mut head).ok()?;
    head.last_chunk().map(|version| u64::from_le_bytes(*version))
}

struct Offered {
    placer: SocketAddr,
    tenant: wire_net::tls::Identity,
    rate: u64,
    time: Duration,
}

#[derive(Clone, Default)]
struct Figures {
    maps: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    p999: Vec<f64>,
}

impl Figures {
    fn add(&mut self, (maps, mut ms): (usize, Vec<f64>), time: Duration) {
        ms.sort_by(f64::total_cmp);
        let at = |per_mille: usize| ms[ms.len() * per_mille / 1_000];
        self.maps.push(maps as f64 / time.as_secs_f64());
        self.p50.push(at(500));
        self.p99.push(at(990));
        self.p999.push(at(999));
    }
}

impl Offered {
    /// Maps that came, and how long each launch took, in milliseconds.
    fn round(&self, maps: &Maps, pause: Option<Duration>) -> (usize, Vec<f64>) {
        let stop = AtomicBool::new(false);
        let (stop, maps) = (&stop, &maps);
        std::thread::scope(|scope| {
            let publishing =
                pause.map(|pause| scope.spawn(move || maps.publish_until(stop, pause)));
            let took = runtime().block_on(self.launches());
            stop.store(true, Ordering::Relaxed);
            (publishing.map_or(0, |publishing| publishing.join().unwrap()), took)
        })
    }

    async fn launches(&self) -> Vec<f64> {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let endpoint = quic::dialer(any, &self.tenant).unwrap();
        let connection = quic::connect(&endpoint, self.placer, Role::Placer).await.unwrap();
        let lane = Arc::new(Lane::open(&connection).await.unwrap());
        let took = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = tokio::task::JoinSet::new();
        let (began, each) = (Instant::now(), Duration::from_secs(1) / self.rate as u32);
        let mut due = began;
        while began.elapsed() < self.time {
            while due <= Instant::now() {
                let (lane, took, was_due) = (Arc::clone(&lane), Arc::clone(&took), due);
                tasks.spawn(async move {
                    let mut request = request();
                    request.launch_id = draw_id();
                    let reply = lane.launch(LaunchHead::new(10_000), &request.to_bytes());
                    // What did not start took all its time: these hosts answer launches, and no question after one.
                    if !matches!(reply.unwrap().await.unwrap(), LaunchReply::Started(_)) {
                        println!("  a launch did not start");
                    }
                    took.lock().unwrap().push(ms(was_due));
                });
                due += each;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            while tasks.try_join_next().is_some_and(|done| done.is_ok()) {}
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        endpoint.close(0u32.into(), b"done");
        std::mem::take(&mut took.lock().unwrap())
    }
}
