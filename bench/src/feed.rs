//! `bench feed`: what it costs a placer to follow a million hosts.
//!
//! Sealed feed datagrams come over UDP as aggregators send them (the changes of 20 ms, packed); the receiving thread does
//! what a placer's feed thread does: parse, verify, open, and each word into the capacity table. The ceiling is the same
//! thread receiving the same datagrams and dropping them; rounds alternate. What counts is the thread's own processor
//! time. Left out: the daemon around it (subscriptions, reports), which does nothing a word.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use placer_core::{Adopter, CapacityTable, MapView, map::encode, table::words_for};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use serde::Serialize;
use wire::{
    CapacityWord, Code, Fault, HostId, Seq, Stamp,
    datagram::{Datagram, PREFIX_BYTES},
    feed::{self, ENTRIES_MAX, Feed},
    limits::{DATAGRAM_BYTES_MAX, TAG_BYTES},
    map::{HostAddr, MapVersion},
    seal::{FleetKey, KeyEpoch, Role, SenderKey},
};
use wire_net::udp::{Receiver, ReceiverOptions, Sender};

use crate::{
    arena::Arena,
    cpu::thread_time,
    pick::fleet,
    rounds::{Figure, Options, alternate},
};

/// What a fleet of a million says, and some more.
#[must_use]
pub fn options() -> Options {
    Options::of(1_000_000, 70_000.0)
}

/// Figures of the receiving thread.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Hosts in the table.
    pub hosts: usize,
    /// Words of a datagram at the paced rate.
    pub words_a_datagram: f64,
    /// Processor time a word, flooded: received and dropped.
    pub bare_ns: Figure,
    /// The same, verified and into the table.
    pub fed_ns: Figure,
    /// Words a second that came in the paced rounds.
    pub paced_per_second: f64,
    /// Cores at that rate, received and dropped.
    pub paced_bare_cores: Figure,
    /// Cores at that rate, into the table.
    pub paced_cores: Figure,
    /// Bytes a host of the table.
    pub table_bytes_a_host: f64,
    /// Bytes a host of the map that is held beside it.
    pub map_bytes_a_host: f64,
    /// Datagrams that the kernel dropped in all rounds.
    pub dropped: u64,
}

const PLACER: u64 = 5;
/// The aggregators of the fleet: each packs its own.
const AGGREGATORS: usize = 3;
/// Time for which an aggregator gathers.
const GATHER: Duration = Duration::from_millis(20);

fn internal(error: impl fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

struct Aggregators<'a> {
    fleet: &'a [(HostId, HostAddr)],
    key: &'a SenderKey,
    /// Grows with each word: no word is older than one before.
    stamp: AtomicU64,
    seed: u64,
}

impl Aggregators<'_> {
    /// Sends until told to stop; `rate` words a second, or as fast as it goes.
    fn send(&self, to: SocketAddr, rate: Option<f64>, stop: &AtomicBool) -> Result<(), Fault> {
        let mut sender =
            UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map(Sender::over).map_err(internal)?;
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let began = Instant::now();
        let (mut said, mut seq) = (0.0, 0);
        while !stop.load(Ordering::Relaxed) {
            let due = rate.map(|rate| rate * began.elapsed().as_secs_f64() - said);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
            let each = due.map_or(ENTRIES_MAX, |due| due.max(0.0) as usize / AGGREGATORS);
            for aggregator in 0..AGGREGATORS as u64 {
                let stamp = Stamp::of(Seq(self.stamp.fetch_add(1, Ordering::Relaxed)));
                let word = CapacityWord::new([8; 4], 0, stamp);
                let entries: Vec<_> = (0..each)
                    .map(|_| {
                        let at = (u64::from(rng.next_u32()) * self.fleet.len() as u64) >> 32;
                        (self.fleet[at as usize].0, word)
                    })
                    .collect();
                for part in entries.chunks(ENTRIES_MAX) {
                    seq += 1;
                    let mut out = [0; DATAGRAM_BYTES_MAX];
                    let key = (PLACER, KeyEpoch(1), self.key);
                    let len = feed::seal(aggregator, seq, part, key, &mut out);
                    sender.push(&out[..len], to).map_err(internal)?;
                }
                #[expect(clippy::cast_precision_loss, reason = "small")]
                let words = each as f64;
                said += words;
            }
            sender.flush().map_err(internal)?;
            if rate.is_some() {
                thread::sleep(GATHER);
            }
        }
        Ok(())
    }
}

/// What the receiving thread did in a round.
struct Round {
    words: u64,
    datagrams: u64,
    cpu: Duration,
    took: Duration,
    dropped: u64,
}

type Table<'a> = CapacityTable<&'a [AtomicU64]>;

fn round(
    options: &Options,
    from: &Aggregators<'_>,
    table: Option<&Table<'_>>,
    rate: Option<f64>,
) -> Result<Round, Fault> {
    let engine = ReceiverOptions { engine: options.engine, ..ReceiverOptions::default() };
    let mut receiver = Receiver::bind((Ipv4Addr::LOCALHOST, 0).into(), &engine)?;
    let to = receiver.local_addr().map_err(internal)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sender = scope.spawn(|| from.send(to, rate, &stop));
        let round = receive(&mut receiver, from.key, table, options.time);
        stop.store(true, Ordering::Relaxed);
        sender.join().map_err(|_| internal("the sending thread panicked"))??;
        round
    })
}

fn receive(
    receiver: &mut Receiver,
    key: &SenderKey,
    table: Option<&Table<'_>>,
    time: Duration,
) -> Result<Round, Fault> {
    let (from, cpu) = (Instant::now(), thread_time());
    let (mut words, mut datagrams, mut refused) = (0, 0, 0);
    while from.elapsed() < time {
        let got = receiver.recv(Duration::from_millis(20), |bytes, _| {
            datagrams += 1;
            let Some(table) = table else {
                // What is left beside prefix, tag and a head of two numbers are words.
                let rest = bytes.len().saturating_sub(PREFIX_BYTES + TAG_BYTES + 16);
                words += rest as u64 / 16;
                return;
            };
            let datagram = Datagram::parse(bytes).ok();
            let verified = datagram.and_then(|datagram| datagram.verify(key));
            let feed = verified.as_ref().and_then(|verified| Feed::open(verified).ok());
            let Some(feed) = feed else {
                refused += 1;
                return;
            };
            for (host, word) in feed.entries() {
                table.feed(host, word);
                words += 1;
            }
        });
        got.map_err(internal)?;
    }
    if refused > 0 {
        return Err(internal(format!("{refused} datagrams of the feed were refused")));
    }
    let (cpu, took) = (thread_time() - cpu, from.elapsed());
    Ok(Round { words, datagrams, cpu, took, dropped: receiver.kernel_drops() })
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn ns_each(round: &Round) -> f64 {
    round.cpu.as_secs_f64() * 1e9 / round.words.max(1) as f64
}

fn cores(round: &Round) -> f64 {
    round.cpu.as_secs_f64() / round.took.as_secs_f64()
}

/// Measures. Blocks.
///
/// # Errors
/// What the kernel says; [`Code::Internal`] if a datagram was refused.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub fn run(options: &Options) -> Result<Report, Fault> {
    let hosts = fleet(options.hosts, options.seed);
    let arena = Arena::new(words_for(hosts.len()), true).map_err(internal)?;
    let table: Table<'_> = CapacityTable::create(arena.words(), 1);
    let encoded = encode(MapVersion { epoch: 1, version: 1 }, &hosts);
    let map_bytes = encoded.len();
    let map = MapView::open(encoded).map_err(internal)?;
    let no_old: Option<&MapView<Vec<u8>>> = None;
    Adopter::new(&table).adopt(&table, no_old, &map).map_err(internal)?;
    let key = FleetKey { epoch: KeyEpoch(1), secret: [7; 32] }.sender(Role::Placer, PLACER);
    let from =
        Aggregators { fleet: &hosts, key: &key, stamp: AtomicU64::new(1), seed: options.seed };
    let (mut rates, mut sizes, mut dropped) = (Vec::new(), Vec::new(), 0);
    let [bare_ns, fed_ns] = alternate::<Fault, 2>(
        options.rounds,
        [&mut || Ok(ns_each(&round(options, &from, None, None)?)), &mut || {
            Ok(ns_each(&round(options, &from, Some(&table), None)?))
        }],
    )?;
    let [paced_bare_cores, paced_cores] = alternate::<Fault, 2>(
        options.rounds,
        [&mut || Ok(cores(&round(options, &from, None, Some(options.rate))?)), &mut || {
            let round = round(options, &from, Some(&table), Some(options.rate))?;
            rates.push(round.words as f64 / round.took.as_secs_f64());
            sizes.push(round.words as f64 / round.datagrams.max(1) as f64);
            dropped += round.dropped;
            Ok(cores(&round))
        }],
    )?;
    Ok(Report {
        hosts: hosts.len(),
        words_a_datagram: Figure::of(sizes).median,
        bare_ns,
        fed_ns,
        paced_per_second: Figure::of(rates).median,
        paced_bare_cores,
        paced_cores,
        table_bytes_a_host: (words_for(hosts.len()) * 8) as f64 / hosts.len() as f64,
        map_bytes_a_host: map_bytes as f64 / hosts.len() as f64,
        dropped,
    })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "capacity feed into a table of {} hosts; processor time of the receiving thread",
            self.hosts
        )?;
        writeln!(f, "  flooded, received and dropped  {} ns a word", self.bare_ns)?;
        writeln!(f, "  flooded, into the table        {} ns a word", self.fed_ns)?;
        writeln!(
            f,
            "  paced at {:.0} words/s, {:.0} a datagram",
            self.paced_per_second, self.words_a_datagram
        )?;
        let percent = |figure: Figure| figure.scaled(100.0);
        writeln!(
            f,
            "    received and dropped         {} % of a core",
            percent(self.paced_bare_cores)
        )?;
        writeln!(f, "    into the table               {} % of a core", percent(self.paced_cores))?;
        writeln!(f, "  dropped by the kernel          {}", self.dropped)?;
        writeln!(
            f,
            "  bytes a host                   {:.1} of table, {:.1} of map",
            self.table_bytes_a_host, self.map_bytes_a_host
        )
    }
}
