//! The daemon: starts the threads, and stops them.

use std::{
    io::Write as _,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crossbeam::queue::ArrayQueue;
use placer_core::dispatch::DECAY_US;
use prometheus_client::registry::Registry;
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;
use wire::{Code, Fault, seal::Role};
use wire_net::{
    objects,
    ops::{self, Ready},
    quic,
    tls::{self, Identity, Peer},
};

use crate::{
    Config, Lookup,
    feed::{FeedThread, REPORTS_WAITING_MAX},
    fleet::{Aperture, FleetKeeper},
    front,
    known::Known,
    loader::{Loader, NotTaken, Refresh},
    metrics::{FeedMetrics, FleetMetrics, WorkersMetrics},
    worker::{Shared, Worker},
};

/// Who may connect.
const CLIENTS: &[Role] = &[Role::Client, Role::Operator];

/// How far the thread that loads maps stands back: a tenth of a core is its share of a busy one.
const NICE: i32 = 10;

/// What runs for a stop that takes no longer than this to show.
const STOP: Duration = Duration::from_millis(1_500);

/// Runs a placer until `stop`. Prints `ready placer <addr>` once clients can connect.
///
/// # Errors
/// [`Code::Config`], [`Code::Unauthenticated`], [`Code::Busy`]: it did not start. Nothing is left running.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), Fault> {
    tls::install_provider();
    config.check()?;
    let identity = Identity::load(&config.identity)?;
    let Peer::Placer(placer) = identity.peer else {
        let message = format!("{} is the identity of {}", config.identity.display(), identity.peer);
        return Err(Fault::new(Code::Config, message));
    };
    let objects = objects::open(&config.objects)?;
    let store = match (config.lookup, &config.store) {
        (Lookup::Store, Some(url)) => Some(heartbeat::store::open(url).await?),
        _ => None,
    };
    let loader = Loader::new(objects, &config.state);
    let aperture = Aperture { placer, hosts: config.aperture };
    let keeper = FleetKeeper::open(&config.state, aperture, loader.held().cloned())?;
    let mut registry = Registry::default();
    let shared = Arc::new(Shared {
        identity,
        fleet: Arc::clone(keeper.fleet()),
        known: Arc::new(Known::new(config.known_max)),
        reports: Arc::new(ArrayQueue::new(REPORTS_WAITING_MAX)),
        store,
        config,
    });
    let ready = Ready::default();
    // Whatever ends one part ends all.
    let all = stop.child_token();
    let guard = all.clone().drop_guard();
    let mut threads = Vec::new();
    if let Some(feed) = feed_thread(&shared, placer, &mut registry)? {
        let stop = all.clone();
        threads.push(spawn("placer-feed", move || feed.run(&stop))?);
    }
    let metrics = FleetMetrics::register(&mut registry);
    let map = MapThread { loader, keeper, metrics, ready: ready.clone() };
    let (period, until) = (Duration::from_millis(shared.config.map_refresh_ms), all.clone());
    threads.push(spawn("placer-map", move || map.run(period, &until))?);
    let addr = start_workers(&shared, &mut registry, &all, &mut threads).await?;
    let ops = match shared.config.ops {
        Some(ops) => {
            let listener = ops::bind(ops).await?;
            Some(tokio::spawn(ops::serve_on(listener, Arc::new(registry), ready, all.clone())))
        }
        None => None,
    };
    announce(addr);
    all.cancelled().await;
    drop(guard);
    join(threads).await;
    if let Some(ops) = ops {
        let _ = tokio::time::timeout(STOP, ops).await;
    }
    Ok(())
}

/// The one line that whoever started us waits for.
fn announce(addr: SocketAddr) {
    let mut out = std::io::stdout().lock();
    // A closed stdout is no reason not to serve.
    let _ = writeln!(out, "ready placer {addr}").and_then(|()| out.flush());
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Fault> {
    thread::Builder::new().name(name.into()).spawn(body).map_err(|error| {
        Fault::new(Code::Internal, format!("thread {name} cannot be started: {error}"))
    })
}

async fn join(threads: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + STOP;
    while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn feed_thread(
    shared: &Shared,
    placer: u64,
    registry: &mut Registry,
) -> Result<Option<FeedThread>, Fault> {
    let metrics = FeedMetrics::register(registry);
    let aggregators = shared.config.aggregators.clone();
    if aggregators.is_empty() {
        return Ok(None);
    }
    let keys = shared.identity.beat.clone().ok_or_else(|| {
        Fault::new(Code::Config, "the identity has no beat.key: issue it again for a placer")
    })?;
    let reports = Arc::clone(&shared.reports);
    let mut feed = FeedThread::bind(placer, keys, aggregators, &shared.fleet, reports, metrics)?;
    // With the store at hand, it sends reports only.
    feed.subscribes = shared.config.lookup == Lookup::Feed;
    Ok(Some(feed))
}

/// Starts the dispatching threads; returns the address that they share once all listen.
async fn start_workers(
    shared: &Arc<Shared>,
    registry: &mut Registry,
    stop: &CancellationToken,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<SocketAddr, Fault> {
    let metrics = WorkersMetrics::register(registry);
    let count = shared.config.threads();
    // A shared port is never busy for its own user: bound alone once, another process on it is noticed.
    let probe = quic::listen(shared.config.listen, &shared.identity, CLIENTS)?;
    let addr = probe.local_addr().map_err(|error| Fault::new(Code::Internal, error.to_string()))?;
    drop(probe);
    let mut seeds = SmallRng::from_os_rng();
    let mut listening = Vec::new();
    for index in 0..count {
        let worker = WorkerThread {
            shared: Arc::clone(shared),
            metrics: metrics.worker(index),
            seed: seeds.next_u64(),
            addr,
            alone: count == 1,
            stop: stop.clone(),
        };
        let (told, listens) = tokio::sync::oneshot::channel();
        threads.push(spawn(&format!("placer-{index}"), move || worker.run(told))?);
        listening.push(listens);
    }
    for listens in listening {
        listens.await.map_err(|_| Fault::new(Code::Internal, "a worker ended at its start"))??;
    }
    Ok(addr)
}

/// A dispatching thread before it runs.
struct WorkerThread {
    shared: Arc<Shared>,
    metrics: crate::metrics::WorkerMetrics,
    seed: u64,
    addr: SocketAddr,
    alone: bool,
    stop: CancellationToken,
}

impl WorkerThread {
    fn run(self, told: tokio::sync::oneshot::Sender<Result<(), Fault>>) {
        let runtime = match runtime() {
            Ok(runtime) => runtime,
            Err(fault) => return drop(told.send(Err(fault))),
        };
        LocalSet::new().block_on(&runtime, self.serve(told));
    }

    async fn serve(self, told: tokio::sync::oneshot::Sender<Result<(), Fault>>) {
        let identity = &self.shared.identity;
        let listen = if self.alone { quic::listen } else { quic::listen_shared };
        // The probe's socket is closed by its own task, a moment after it was dropped.
        let endpoint = loop {
            match listen(self.addr, identity, CLIENTS) {
                Ok(endpoint) => break endpoint,
                Err(wire_net::NetError::Busy(_)) if !self.stop.is_cancelled() => {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Err(error) => return drop(told.send(Err(error.into()))),
            }
        };
        let worker = Worker::new(Arc::clone(&self.shared), self.metrics, self.seed);
        if told.send(Ok(())).is_err() {
            return;
        }
        tokio::select! {
            () = front::serve(Rc::clone(&worker), endpoint.clone()) => {}
            () = Rc::clone(&worker).tend() => {}
            () = Rc::clone(&worker).keep_time() => {}
            () = Rc::clone(&worker).pump_on() => {}
            () = self.stop.cancelled() => {}
        }
        worker.drain().await;
        endpoint.close(0u32.into(), b"stopped");
        let _ = tokio::time::timeout(Duration::from_millis(200), endpoint.wait_idle()).await;
        worker.pool.close().await;
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::new(Code::Internal, format!("no runtime: {error}")))
}

/// The thread that loads maps and keeps the table to them.
struct MapThread {
    loader: Loader,
    keeper: FleetKeeper,
    metrics: FleetMetrics,
    ready: Ready,
}

impl MapThread {
    fn run(mut self, period: Duration, stop: &CancellationToken) {
        // Launches go first where both want a core: a map is put to use a little later. Threads that this one starts are as
        // patient. Where the kernel refuses, they share as ever.
        let _ = rustix::process::setpriority_process(None, NICE);
        match runtime() {
            Ok(runtime) => runtime.block_on(self.refresh_until(period, stop)),
            Err(fault) => tracing::error!(%fault, "no maps are loaded"),
        }
    }

    async fn refresh_until(&mut self, period: Duration, stop: &CancellationToken) {
        let mut confirmed = Instant::now();
        let mut jitter = SmallRng::from_os_rng();
        self.tell();
        loop {
            if self.refresh().await {
                confirmed = Instant::now();
            }
            self.metrics.map_age_seconds.set(confirmed.elapsed().as_secs_f64());
            self.decay();
            // A tenth more or less, so that placers do not ask in step.
            let spread = u32::try_from(period.as_millis() / 5).unwrap_or(u32::MAX).max(1);
            let wait =
                period * 9 / 10 + Duration::from_millis(u64::from(jitter.next_u32() % spread));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Looks for a newer map; whether ours is known to be the newest now.
    async fn refresh(&mut self) -> bool {
        match self.loader.refresh().await {
            Ok(Refresh::Unchanged) => true,
            Ok(Refresh::Newer { map, fetched }) => {
                let version = map.version();
                tracing::info!(
                    epoch = version.epoch,
                    version = version.version,
                    hosts = map.len(),
                    fetched,
                    "newer map"
                );
                self.metrics.pages_fetched.inc_by(fetched as u64);
                if let Err(error) = self.keeper.adopt(map) {
                    tracing::error!(%error, "the capacity table did not grow: new hosts get no launches");
                }
                self.tell();
                self.loader.settle();
                true
            }
            Err(NotTaken::NoHead) => false,
            Err(reason) => {
                tracing::warn!(%reason, "no newer map");
                self.metrics.refreshes_failed.inc();
                false
            }
        }
    }

    fn tell(&self) {
        let Some(map) = self.loader.held() else { return };
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.metrics.map_epoch.set(gauge(map.version().epoch));
        self.metrics.map_version.set(gauge(map.version().version));
        self.metrics.hosts.set(gauge(map.len() as u64));
        self.metrics.table_slots.set(gauge(self.keeper.table().capacity() as u64));
        self.ready.set(true);
    }

    /// Takes a level off every host's penalty, once a period over all processes of the machine.
    fn decay(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let micros = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        self.keeper.table().decay(micros / DECAY_US);
    }
}
