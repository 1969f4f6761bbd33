//! `bench heartbeat`: what verifying heartbeats into a shard costs beside receiving them.
//!
//! Raw and verified rounds alternate, over the same engine and the same sealed datagrams from many sockets. What counts
//! is the receiving thread's own processor time: on few cores the sender is the bottleneck, and the kernel's softirq
//! work runs in the sender's time. A core's capacity is one second over that time.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use heartbeat_core::{KeyRing, Shard};
use serde::Serialize;
use wire::{
    Code, Fault, HostId, Incarnation, Seq,
    heartbeat::Heartbeat,
    limits::{DATAGRAM_BYTES_MAX, HEARTBEAT_INTERVAL_MS},
    seal::{FleetKey, KeyEpoch, Role, SenderKey},
};
use wire_net::udp::{Engine, Receiver, ReceiverOptions, Sender};

use crate::{
    cpu::thread_time,
    pick::fleet,
    rounds::{Figure, Options, alternate},
};

/// What a fleet of a million sends, from a tenth as many hosts.
#[must_use]
pub fn options() -> Options {
    Options::of(100_000, 66_700.0)
}

/// Figures. `ns` is processor time of the receiving thread a datagram.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Hosts that sent.
    pub hosts: usize,
    /// The engine.
    pub engine: String,
    /// Received and dropped, flooded.
    pub raw_ns: Figure,
    /// Received and verified into the shard, flooded.
    pub verified_ns: Figure,
    /// The shard's part alone, from memory.
    pub shard_ns: Figure,
    /// The sending thread's processor time a datagram, flooded: sealing, sending, and the kernel's way to the
    /// receiver's socket, which on a loopback runs in the sender's time.
    pub sender_ns: Figure,
    /// Heartbeats a second that came in the paced rounds.
    pub paced_per_second: f64,
    /// Cores of the receiving thread at that rate, verified.
    pub paced_cores: Figure,
    /// Datagrams that the kernel dropped in all rounds.
    pub dropped: u64,
}

impl Report {
    /// Verified heartbeats of a core, as a share of bare receives of a core.
    #[must_use]
    pub fn share_of_raw(&self) -> f64 {
        self.raw_ns.median / self.verified_ns.median
    }
}

const SOCKETS: usize = 64;
/// Datagrams of one socket in a row; a batch of a few, as hosts' datagrams interleave.
const RUN: usize = 4;

fn internal(error: impl fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

/// All that the sending side has.
struct Hosts {
    keys: Vec<(HostId, SenderKey)>,
    /// Grows with each lap over the hosts: no heartbeat is ever sent twice.
    lap: AtomicU64,
}

impl Hosts {
    fn new(options: &Options, key: &FleetKey) -> Self {
        let keys = fleet(options.hosts, options.seed)
            .into_iter()
            .map(|(id, _)| (id, key.sender(Role::Host, id.0)))
            .collect();
        Self { keys, lap: AtomicU64::new(1) }
    }

    fn seal(&self, at: usize, lap: u64, out: &mut [u8; DATAGRAM_BYTES_MAX]) -> usize {
        let (host, key) = &self.keys[at];
        let heartbeat = Heartbeat {
            incarnation: Incarnation(1),
            seq: Seq(lap),
            ip: Heartbeat::ip_bytes(Ipv4Addr::LOCALHOST.into()),
            port: 7_400,
            free: [8; 4],
            total: [8; 4],
            running: 0,
            interval_ms: u32::try_from(HEARTBEAT_INTERVAL_MS).unwrap_or(u32::MAX),
            flags: 0,
        };
        heartbeat.seal(*host, KeyEpoch(1), key, out)
    }

    /// Sends until told to stop; `rate` a second, or as fast as it goes. Returns its processor time a datagram.
    fn send(&self, to: SocketAddr, rate: Option<f64>, stop: &AtomicBool) -> Result<f64, Fault> {
        let mut senders = (0..SOCKETS)
            .map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map(Sender::over))
            .collect::<Result<Vec<_>, _>>()
            .map_err(internal)?;
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let (started, cpu) = (Instant::now(), thread_time());
        let mut sent = 0usize;
        let mut lap = self.lap.fetch_add(1, Ordering::Relaxed);
        while !stop.load(Ordering::Relaxed) {
            let sender = &mut senders[sent / RUN % SOCKETS];
            for _ in 0..RUN {
                let at = sent % self.keys.len();
                if at == 0 && sent > 0 {
                    lap = self.lap.fetch_add(1, Ordering::Relaxed);
                }
                let len = self.seal(at, lap, &mut out);
                sender.push(&out[..len], to).map_err(internal)?;
                sent += 1;
            }
            sender.flush().map_err(internal)?;
            if let Some(rate) = rate {
                #[expect(clippy::cast_precision_loss, reason = "small")]
                let due = Duration::from_secs_f64(sent as f64 / rate);
                let ahead = due.saturating_sub(started.elapsed());
                if ahead > Duration::from_micros(200) {
                    thread::sleep(ahead);
                }
            }
        }
        Ok(ns_each(thread_time() - cpu, sent))
    }
}

/// One round's figures of the receiving thread.
struct Round {
    received: usize,
    cpu: Duration,
    took: Duration,
    sender_ns: f64,
}

struct Bench<'a> {
    options: &'a Options,
    hosts: &'a Hosts,
    dropped: u64,
    engine: Engine,
}

impl Bench<'_> {
    /// Receives for a round; with a shard, each datagram goes into it.
    fn round(&mut self, shard: Option<&mut Shard>, rate: Option<f64>) -> Result<Round, Fault> {
        let options = ReceiverOptions { engine: self.options.engine, ..ReceiverOptions::default() };
        let mut receiver = Receiver::bind((Ipv4Addr::LOCALHOST, 0).into(), &options)?;
        self.engine = receiver.engine();
        let to = receiver.local_addr().map_err(internal)?;
        let stop = AtomicBool::new(false);
        let round = thread::scope(|scope| {
            let sender = scope.spawn(|| self.hosts.send(to, rate, &stop));
            let round = receive(&mut receiver, shard, self.options.time);
            stop.store(true, Ordering::Relaxed);
            let sender_ns =
                sender.join().map_err(|_| internal("the sending thread panicked"))??;
            round.map(|round| Round { sender_ns, ..round })
        })?;
        self.dropped += receiver.kernel_drops();
        Ok(round)
    }
}

fn receive(
    receiver: &mut Receiver,
    mut shard: Option<&mut Shard>,
    time: Duration,
) -> Result<Round, Fault> {
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let (from, cpu) = (Instant::now(), thread_time());
    let (mut received, mut bytes) = (0, 0);
    let before = shard.as_ref().map_or(0, |shard| shard.counters().accepted);
    while from.elapsed() < time {
        let now_ms = u64::try_from(from.elapsed().as_millis()).unwrap_or(0);
        let got = receiver.recv(Duration::from_millis(100), |datagram, _| {
            bytes += datagram.len();
            if let Some(shard) = &mut shard {
                shard.handle_datagram(now_ms, datagram, &mut out);
            }
        });
        received += got.map_err(internal)?;
    }
    let round = Round { received, cpu: thread_time() - cpu, took: from.elapsed(), sender_ns: 0.0 };
    if let Some(shard) = shard {
        let accepted = shard.counters().accepted - before;
        // All were sealed by their hosts and new: the figure is of verified heartbeats only.
        if usize::try_from(accepted) != Ok(received) {
            let counters = shard.counters();
            return Err(internal(format!(
                "{received} came and {accepted} were taken: {counters:?}"
            )));
        }
    }
    std::hint::black_box(bytes);
    Ok(round)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn ns_each(time: Duration, count: usize) -> f64 {
    time.as_secs_f64() * 1e9 / count.max(1) as f64
}

/// Measures. Blocks.
///
/// # Errors
/// What the kernel says; [`Code::Internal`] if a heartbeat was not taken.
pub fn run(options: &Options) -> Result<Report, Fault> {
    let key = FleetKey { epoch: KeyEpoch(1), secret: [7; 32] };
    let hosts = Hosts::new(options, &key);
    let ring = KeyRing::new(vec![key]).ok_or_else(|| internal("no key"))?;
    let mut shard = Shard::new(0, 1, ring, None);
    let shard_ns = from_memory(&hosts, &mut shard, options.rounds);
    let bench = Bench { options, hosts: &hosts, dropped: 0, engine: options.engine };
    let bench = std::cell::RefCell::new(bench);
    let shard = std::cell::RefCell::new(shard);
    let mut sender_ns = Vec::new();
    let [raw_ns, verified_ns] = alternate::<Fault, 2>(
        options.rounds,
        [
            &mut || {
                let round = bench.borrow_mut().round(None, None)?;
                sender_ns.push(round.sender_ns);
                Ok(ns_each(round.cpu, round.received))
            },
            &mut || {
                let round = bench.borrow_mut().round(Some(&mut shard.borrow_mut()), None)?;
                Ok(ns_each(round.cpu, round.received))
            },
        ],
    )?;
    let mut rates = Vec::new();
    let [paced_cores] = alternate::<Fault, 1>(
        options.rounds,
        [&mut || {
            let shard = &mut shard.borrow_mut();
            let round = bench.borrow_mut().round(Some(shard), Some(options.rate))?;
            #[expect(clippy::cast_precision_loss, reason = "small")]
            rates.push(round.received as f64 / round.took.as_secs_f64());
            Ok(round.cpu.as_secs_f64() / round.took.as_secs_f64())
        }],
    )?;
    let bench = bench.into_inner();
    Ok(Report {
        hosts: hosts.keys.len(),
        engine: format!("{:?}", bench.engine),
        raw_ns,
        verified_ns,
        shard_ns,
        sender_ns: Figure::of(sender_ns),
        paced_per_second: Figure::of(rates).median,
        paced_cores,
        dropped: bench.dropped,
    })
}

/// The shard's part: each host's heartbeat once a round, out of memory. The first round registers them.
fn from_memory(hosts: &Hosts, shard: &mut Shard, rounds: usize) -> Figure {
    let mut figures = Vec::new();
    let mut out = [0; DATAGRAM_BYTES_MAX];
    for round in 0..=rounds {
        let lap = hosts.lap.fetch_add(1, Ordering::Relaxed);
        let mut bytes = Vec::new();
        let mut len = 0;
        for at in 0..hosts.keys.len() {
            len = hosts.seal(at, lap, &mut out);
            bytes.extend_from_slice(&out[..len]);
        }
        let from = thread_time();
        for datagram in bytes.chunks_exact(len.max(1)) {
            shard.handle_datagram(0, datagram, &mut out);
        }
        if round > 0 {
            figures.push(ns_each(thread_time() - from, hosts.keys.len()));
        }
    }
    Figure::of(figures)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "heartbeats of {} hosts ({}); processor time of the receiving thread",
            self.hosts, self.engine
        )?;
        writeln!(f, "  bare receive       {} ns each", self.raw_ns)?;
        writeln!(f, "  received, verified {} ns each", self.verified_ns)?;
        writeln!(f, "  the shard alone    {} ns each", self.shard_ns)?;
        writeln!(
            f,
            "  verified a core    {:.0} % of bare receives a core",
            100.0 * self.share_of_raw()
        )?;
        writeln!(
            f,
            "  at {:.0} a second   {:.1} % of a core ({:.1} to {:.1})",
            self.paced_per_second,
            100.0 * self.paced_cores.median,
            100.0 * self.paced_cores.min,
            100.0 * self.paced_cores.max
        )?;
        writeln!(f, "  dropped by kernel  {}", self.dropped)
    }
}
