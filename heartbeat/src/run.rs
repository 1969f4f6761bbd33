//! Brings an aggregator up and takes it down.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, thread::JoinHandle, time::Duration};

use heartbeat_core::{
    KeyRing, Shard, feed::Subscriptions, liveness::Liveness, quarantine::Quarantine,
    shard::writes::Batch,
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wire::{CapacityWord, Code, Fault, HostId, seal::Role};
use wire_net::{
    NetError,
    objects::{self, object_store::ObjectStore},
    ops, quic,
    tls::{self, Identity},
    udp::{Receiver, ReceiverOptions, Sender},
};

use crate::{
    admin::Admin,
    config::Config,
    hub::{Drains, Hub, HubFigures},
    metrics::{Metrics, Sources},
    publisher::{PublishFigures, Publisher},
    receiver::{self, Ends, Event, Outlets, Pauses, Relay},
    recorded::{self, HeardRecords, Recorder},
    scanner::{self, ScanFigures, Scanner, Watcher},
    shards::{Ask, Clock, INBOX, Shards},
    store::{self, Store, StoreError},
    writer,
};

/// Messages that wait between a receiver and the rest, at most.
const EVENTS: usize = 4_096;
const NEWS: usize = 64;
const BATCHES: usize = 64;
/// How long a start waits for a port that another process holds.
const LAST_OWNER: Duration = Duration::from_secs(2);
/// How long a stop waits for rows to reach the store.
const LAST_WORDS: Duration = Duration::from_millis(1_000);

/// An aggregator that is up.
pub struct Running {
    /// Where datagrams are taken.
    pub udp: SocketAddr,
    /// Where calls are taken.
    pub admin: SocketAddr,
    /// Where metrics are served.
    pub ops: Option<SocketAddr>,
    /// Its receiver threads.
    pub shards: Shards,
    /// The fleet's drains.
    pub drains: Arc<Drains>,
    receivers: Vec<JoinHandle<()>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    stop_receivers: CancellationToken,
}

/// Runs an aggregator until `stop`; prints one line when it is ready.
///
/// # Errors
/// Why it could not start.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), Fault> {
    let running = start(config, stop.clone()).await?;
    println!("ready heartbeatd {}", running.udp);
    stop.cancelled().await;
    running.stop().await;
    Ok(())
}

impl Running {
    /// Stops it: rows that wait are written, for a second at most.
    pub async fn stop(self) {
        self.stop.cancel();
        let flushed = async {
            loop {
                self.shards.tell_all(|| Ask::Flush).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
                let figures = self.shards.figures().await;
                if figures.iter().all(|shard| shard.dirty == 0) {
                    break;
                }
            }
        };
        if tokio::time::timeout(LAST_WORDS, flushed).await.is_err() {
            tracing::warn!(
                "stopped with rows that the store did not take; hosts will say them again"
            );
        }
        self.stop_receivers.cancel();
        for receiver in self.receivers {
            let _ = tokio::task::spawn_blocking(move || receiver.join()).await;
        }
        drop(self.shards);
        drop(self.drains);
        self.tasks.close();
        let _ = tokio::time::timeout(LAST_WORDS, self.tasks.wait()).await;
    }
}

/// What has to be there before a thread starts.
struct Ground {
    identity: Identity,
    keys: KeyRing,
    objects: Arc<dyn ObjectStore>,
    store: Arc<dyn Store>,
    receivers: Vec<Receiver>,
    aggregator: u64,
}

async fn ground(config: &Config, stop: &CancellationToken) -> Result<Ground, Fault> {
    config.check()?;
    tls::install_provider();
    let identity = Identity::load(&config.identity)?;
    if identity.peer.role() != Role::Aggregator {
        return Err(Fault::new(
            Code::Config,
            format!(
                "{} holds the identity of {}, not of an aggregator",
                config.identity.display(),
                identity.peer
            ),
        ));
    }
    let aggregator = config.aggregator_id.or(identity.peer.sender_id()).unwrap_or_default();
    let keys = scanner::load_keys(&config.fleet)?;
    let objects = objects::open(&config.objects)?;
    let receivers = bind(config).await?;
    let store = store::open_or_wait(&config.store, stop.clone()).await?;
    Ok(Ground { identity, keys, objects, store, receivers, aggregator })
}

/// A killed process's ring lets go of its socket some time after the process has gone: whoever restarts it at once waits.
async fn bind_first(config: &Config, options: &ReceiverOptions) -> Result<Receiver, NetError> {
    let began = std::time::Instant::now();
    loop {
        match Receiver::bind(config.udp, options) {
            Err(NetError::Busy(_)) if began.elapsed() < LAST_OWNER => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            bound => return bound,
        }
    }
}

async fn bind(config: &Config) -> Result<Vec<Receiver>, Fault> {
    let options =
        ReceiverOptions { rcvbuf_bytes: config.rcvbuf_bytes, ..ReceiverOptions::default() };
    // Bound alone first: with a shared port a second aggregator here would go unnoticed and take half of the hosts.
    let probe = bind_first(config, &options).await?;
    let addr = probe.local_addr().map_err(|error| internal(&error))?;
    if config.shards() == 1 {
        warn_of_buffer(&probe, config);
        return Ok(vec![probe]);
    }
    drop(probe);
    let options = ReceiverOptions { reuse_port: true, ..options };
    let receivers = (0..config.shards())
        .map(|_| Receiver::bind(addr, &options))
        .collect::<Result<Vec<_>, _>>()?;
    // Bytes 8 to 11 of a datagram are the low half of its sender's id: `heartbeat_core::shard::shard_of`.
    if let Err(error) = receivers[0].steer(8, config.shards()) {
        tracing::warn!(%error, "the kernel does not steer datagrams; receivers hand them on");
    }
    warn_of_buffer(&receivers[0], config);
    Ok(receivers)
}

/// FAULTS H7: "a warning at start where `rmem_max` is too small".
fn warn_of_buffer(receiver: &Receiver, config: &Config) {
    if receiver.rcvbuf_bytes() < config.rcvbuf_bytes {
        tracing::warn!(
            bytes = receiver.rcvbuf_bytes(),
            wanted = config.rcvbuf_bytes,
            "the receive buffer is smaller than wanted: raise net.core.rmem_max"
        );
    }
}

fn internal(error: &dyn std::fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

/// What the receiver threads' ends are held by.
struct Inlets {
    events: mpsc::Receiver<Event>,
    news: mpsc::Receiver<Vec<(HostId, CapacityWord)>>,
    batches: mpsc::Receiver<(usize, Batch)>,
    records: mpsc::Receiver<HeardRecords>,
}

/// Receiver threads that run.
struct Threads {
    shards: Shards,
    joins: Vec<JoinHandle<()>>,
    inlets: Inlets,
    stop: CancellationToken,
}

/// The other aggregators. One that listens on every address finds itself by what it can bind.
fn others(config: &Config, receivers: &[Receiver]) -> Vec<SocketAddr> {
    let own = receivers.first().and_then(|receiver| receiver.local_addr().ok());
    let mine = |peer: &SocketAddr| {
        own.is_some_and(|own| {
            let here = || std::net::UdpSocket::bind((peer.ip(), 0)).is_ok();
            own == *peer || (own.ip().is_unspecified() && own.port() == peer.port() && here())
        })
    };
    config.peers.iter().filter(|peer| !mine(peer)).copied().collect()
}

fn start_receivers(
    config: &Config,
    keys: &KeyRing,
    receivers: Vec<Receiver>,
    clock: Clock,
) -> Result<Threads, Fault> {
    let (events, events_in) = mpsc::channel(EVENTS);
    let (news, news_in) = mpsc::channel(NEWS);
    let (batches, batches_in) = mpsc::channel(BATCHES);
    let (records, records_in) = mpsc::channel(recorded::QUEUE);
    let inlets =
        Inlets { events: events_in, news: news_in, batches: batches_in, records: records_in };
    let pauses = Pauses { feed_ms: config.feed_ms, flush_ms: config.flush_ms };
    let (of, stop) = (config.shards(), CancellationToken::new());
    let handover = receiver::handover(of);
    let peers = Arc::new(others(config, &receivers));
    let (mut inboxes, mut joins) = (Vec::new(), Vec::new());
    for (at, receiver) in (0..of).zip(receivers) {
        let (inbox, asks) = mpsc::channel(INBOX);
        inboxes.push(inbox);
        let outlets = Outlets {
            events: events.clone(),
            news: news.clone(),
            batches: batches.clone(),
            records: records.clone(),
        };
        let shard = Shard::new(at, of, keys.clone(), config.interval_ms);
        let relay = Relay::new(Arc::clone(&peers));
        let handover = Arc::clone(&handover);
        let ends = Ends { receiver, handover, relay, inbox: asks, outlets };
        joins.push(receiver::spawn(at as usize, shard, ends, pauses, clock, stop.clone())?);
    }
    Ok(Threads { shards: Shards::new(inboxes), joins, inlets, stop })
}

/// Starts an aggregator: when this returns, hosts are heard and calls answered, and what the store knows is known, unless it is a
/// database that does not answer. That one is connected to when it does.
///
/// # Errors
/// [`Code::Busy`] for a port or a store's file of another process, [`Code::Config`] for a setting, [`Code::Storage`] for an
/// embedded store that does not serve.
pub async fn start(config: Config, stop: CancellationToken) -> Result<Running, Fault> {
    let ground = ground(&config, &stop).await?;
    let endpoint = quic::listen(config.listen, &ground.identity, &[Role::Operator, Role::Placer])?;
    let listener = match config.ops {
        Some(addr) => Some(ops::bind(addr).await?),
        None => None,
    };
    let clock = Clock::new();
    let first = &ground.receivers[0];
    let udp = first.local_addr().map_err(|error| internal(&error))?;
    let sender = first.sender().map_err(|error| internal(&error))?;
    let listed = config.peers.len() > others(&config, &ground.receivers).len();
    if !config.peers.is_empty() && !listed {
        tracing::warn!(%udp, "not among `peers`: hosts that are given that list never come here");
    }
    let admin = endpoint.local_addr().map_err(|error| internal(&error))?;
    let Ground { keys, objects, store, receivers, aggregator, .. } = ground;
    let threads = start_receivers(&config, &keys, receivers, clock)?;
    let shards = threads.shards;
    let running = Running {
        udp,
        admin,
        ops: listener.as_ref().and_then(|listener| listener.local_addr().ok()),
        shards: shards.clone(),
        drains: Arc::new(Drains::new(Arc::clone(&store), shards, clock)),
        receivers: threads.joins,
        tasks: TaskTracker::new(),
        stop: stop.clone(),
        stop_receivers: threads.stop,
    };
    // Drains first: a host that beats meanwhile must not be told to resume.
    let restored = match running.drains.reload().await {
        Ok(()) => scanner::restore(&*store, &running.shards).await,
        Err(error) => Err(error),
    };
    match restored {
        Ok(rows) => tracing::info!(rows, "the store's hosts are known"),
        Err(error @ StoreError::Away(_)) if store.shared() => {
            tracing::warn!(%error, "started without the store: hosts are heard, maps wait for it");
        }
        Err(error) => {
            running.stop().await;
            return Err(error.into());
        }
    };
    let admin_store = Arc::clone(&store);
    let parts = Parts { config: &config, store, objects, keys, aggregator, clock, sender };
    let sources = spawn_parts(&running, parts, threads.inlets).await;
    let calls = Admin {
        shards: running.shards.clone(),
        drains: Arc::clone(&running.drains),
        store: admin_store,
    };
    running.tasks.spawn(calls.serve(endpoint, stop.clone()));
    let metrics = Metrics::new();
    if let Some(listener) = listener {
        let ready = ops::Ready::default();
        ready.set(true);
        let serve = ops::serve_on(listener, Arc::clone(&metrics.registry), ready, stop.clone());
        running.tasks.spawn(async move {
            if let Err(fault) = serve.await {
                tracing::error!(%fault, "metrics are not served any more");
            }
        });
    }
    running.tasks.spawn(metrics.run(sources, stop));
    Ok(running)
}

/// What the tasks are made of.
struct Parts<'a> {
    config: &'a Config,
    store: Arc<dyn Store>,
    objects: Arc<dyn ObjectStore>,
    keys: KeyRing,
    aggregator: u64,
    clock: Clock,
    sender: Sender,
}

/// Starts hub, writer, scanner, watcher and publisher.
async fn spawn_parts(running: &Running, parts: Parts<'_>, inlets: Inlets) -> Sources {
    let Parts { config, store, objects, keys, aggregator, clock, sender } = parts;
    let (shards, tasks, stop) = (&running.shards, &running.tasks, &running.stop);
    let (keys_out, keys_in) = watch::channel(keys);
    let (leads_out, leads_in) = watch::channel(false);
    let (looked_out, looked_in) = watch::channel(0);
    let hurry = Arc::new(Notify::new());
    let sources = Sources {
        shards: shards.clone(),
        hub: Arc::new(HubFigures::default()),
        scan: Arc::new(ScanFigures::default()),
        publish: Arc::new(PublishFigures::default()),
        records_kept: Arc::default(),
    };
    let hub = Hub {
        shards: shards.clone(),
        clock,
        subscriptions: Subscriptions::new(aggregator),
        quarantine: Quarantine::new(config.quarantine()),
        keys: keys_in,
        sender,
        figures: Arc::clone(&sources.hub),
    };
    tasks.spawn(hub.run(inlets.events, inlets.news, stop.clone()));
    let recorder = Recorder::new(Arc::clone(&store), Arc::clone(&sources.records_kept));
    tasks.spawn(recorder.run(inlets.records, stop.clone()));
    tasks.spawn(writer::write_all(Arc::clone(&store), shards.clone(), inlets.batches));
    let scanner = Scanner {
        store: Arc::clone(&store),
        shards: shards.clone(),
        clock,
        liveness: Liveness::new(clock.now_ms(), config.grace_ms).with_brake(config.brake_percent),
        leads: leads_in,
        figures: Arc::clone(&sources.scan),
        hub: Arc::clone(&sources.hub),
        scan_ms: config.scan_ms,
        looked_ms: looked_out,
        hurry: Arc::clone(&hurry),
    };
    tasks.spawn(scanner.run(stop.clone()));
    let mut watcher = Watcher {
        fleet: config.fleet.clone(),
        keys: keys_out,
        shards: shards.clone(),
        drains: Arc::clone(&running.drains),
        store: Arc::clone(&store),
        revoked: BTreeSet::new(),
    };
    watcher.look().await;
    tasks.spawn(watcher.run(stop.clone()));
    let publisher = Publisher {
        store,
        objects,
        shards: shards.clone(),
        clock,
        aggregator,
        publish_ms: config.publish_ms,
        brake_percent: config.brake_percent,
        leads: leads_out,
        looked_ms: looked_in,
        hurry,
        figures: Arc::clone(&sources.publish),
    };
    tasks.spawn(publisher.run(stop.clone()));
    sources
}
