//! The feed thread: capacity words come in, subscriptions and failure reports go out.
//!
//! It blocks in the kernel, writes each verified word into the table that all dispatching threads read, and renews its
//! subscriptions. A lost datagram is counted and not asked for again: the host's next heartbeat repairs it (PROTOCOL
//! 4.3). When hosts came of whom nothing is known, or an aggregator is heard for the first time or after a silence,
//! everything is asked for once.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crossbeam::queue::ArrayQueue;
use placer_core::{Reader, Report};
use tokio_util::sync::CancellationToken;
use wire::{
    CapacityWord, HostId,
    datagram::Datagram,
    feed::{Feed, SUBSCRIPTION_MS, Subscribe},
    limits::DATAGRAM_BYTES_MAX,
    rendezvous,
    report::FailureReport,
};
use wire_net::{
    NetError,
    tls::SenderKeys,
    udp::{Receiver, ReceiverOptions, Sender},
};

use crate::{Table, fleet::Fleet, metrics::FeedMetrics};

/// Reports that wait for the thread; more are dropped and counted.
pub(crate) const REPORTS_WAITING_MAX: usize = 4_096;

/// Reports of one turn: the feed comes first.
const REPORTS_A_TURN: usize = 256;

/// Longest wait for a datagram, so that renewals, reports and the stop are looked at.
const TURN: Duration = Duration::from_millis(20);
const RENEW: Duration = Duration::from_millis(SUBSCRIPTION_MS / 3);
const SILENCE: Duration = Duration::from_millis(SUBSCRIPTION_MS);
/// Least time between two askings for everything: at a million hosts an answer is 16 MB.
const EVERYTHING_AGAIN: Duration = Duration::from_millis(250);
/// Nothing at all came after asking for everything: the asking was lost, or there is no host yet.
const UNANSWERED: Duration = Duration::from_secs(1);

/// What the thread is made of.
pub(crate) struct FeedThread {
    receiver: Receiver,
    sender: Sender,
    placer: u64,
    keys: SenderKeys,
    aggregators: Vec<SocketAddr>,
    table: Reader<Table>,
    unheard: Arc<AtomicU64>,
    reports: Arc<ArrayQueue<Report>>,
    metrics: FeedMetrics,
    sources: HashMap<u64, Source>,
    /// When a word came last.
    newest: Option<Instant>,
    seq: u64,
    /// Whether words are wanted at all.
    pub(crate) subscribes: bool,
}

/// An aggregator as it is heard.
struct Source {
    seq: u64,
    heard: Instant,
}

impl FeedThread {
    /// Binds the socket.
    pub(crate) fn bind(
        placer: u64,
        keys: SenderKeys,
        aggregators: Vec<SocketAddr>,
        fleet: &Fleet,
        reports: Arc<ArrayQueue<Report>>,
        metrics: FeedMetrics,
    ) -> Result<Self, NetError> {
        let v6 = aggregators.iter().any(SocketAddr::is_ipv6);
        let ip = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        let receiver = Receiver::bind(SocketAddr::new(ip, 0), &ReceiverOptions::default())?;
        let sender = receiver.sender().map_err(|error| NetError::Socket("a copy", error))?;
        Ok(Self {
            receiver,
            sender,
            placer,
            keys,
            aggregators,
            table: fleet.table.reader(),
            unheard: Arc::clone(&fleet.unheard),
            reports,
            metrics,
            sources: HashMap::new(),
            newest: None,
            seq: 0,
            subscribes: true,
        })
    }

    /// Runs until `stop`.
    pub(crate) fn run(mut self, stop: &CancellationToken) {
        let mut renewed: Option<Instant> = None;
        let (mut heard, mut asked) = (None, None::<Instant>);
        while !stop.is_cancelled() {
            let now = Instant::now();
            let unheard = self.unheard.load(Ordering::Acquire);
            let may_ask = asked.is_none_or(|at| now - at >= EVERYTHING_AGAIN);
            let unanswered = asked.is_some_and(|at| {
                now - at >= UNANSWERED && self.newest.is_none_or(|newest| newest < at)
            });
            let news = heard != Some(unheard) || self.anyone_silent(now);
            let wants = (news || unanswered) && may_ask;
            let due = wants || renewed.is_none_or(|at| now - at >= RENEW);
            if due && self.subscribes {
                let want = if wants { Subscribe::EVERYTHING } else { Subscribe::CHANGES };
                self.subscribe(want);
                renewed = Some(now);
                if wants {
                    (heard, asked) = (Some(unheard), Some(now));
                    let heard_now = |source: &mut Source| source.heard = now;
                    self.sources.values_mut().for_each(heard_now);
                }
            }
            self.report();
            if let Err(error) = self.receive(now) {
                tracing::warn!(%error, "the feed's socket failed; trying again");
                std::thread::sleep(TURN);
            }
        }
        if self.subscribes {
            self.subscribe(Subscribe::END);
        }
    }

    fn anyone_silent(&self, now: Instant) -> bool {
        self.sources.values().any(|source| now - source.heard > SILENCE)
    }

    fn receive(&mut self, now: Instant) -> std::io::Result<()> {
        let Self { receiver, table, keys, placer, metrics, sources, newest, .. } = self;
        let table = table.get();
        receiver.recv(TURN, |bytes, _| {
            let Ok(datagram) = Datagram::parse(bytes) else {
                metrics.refused.inc();
                return;
            };
            let ours = datagram.sender.id == *placer && datagram.sender.key_epoch == keys.epoch;
            let verified = if ours { datagram.verify(&keys.key) } else { None };
            let Some(feed) = verified.and_then(|verified| Feed::open(&verified).ok()) else {
                metrics.refused.inc();
                return;
            };
            let source = sources
                .entry(feed.aggregator)
                .or_insert(Source { seq: feed.seq.wrapping_sub(1), heard: now });
            let ahead = feed.seq.wrapping_sub(source.seq);
            if (2..1 << 32).contains(&ahead) {
                metrics.lost.inc_by(ahead - 1);
            }
            *source = Source { seq: feed.seq, heard: now };
            let mut words = 0;
            for (host, word) in feed.entries() {
                table.feed(host, word);
                words += 1;
            }
            metrics.words.inc_by(words);
            *newest = Some(Instant::now());
        })?;
        metrics.kernel_drops.set(i64::try_from(receiver.kernel_drops()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// A number that grows over restarts too: the clock's microseconds, or one more.
    fn next_seq(&mut self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let micros = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        self.seq = micros.max(self.seq + 1);
        self.seq
    }

    fn subscribe(&mut self, want: u8) {
        let subscribe = Subscribe { seq: self.next_seq(), want };
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let len = subscribe.seal(self.placer, self.keys.epoch, &self.keys.key, &mut out);
        for aggregator in &self.aggregators {
            // What does not leave now is renewed soon.
            let _ = self.sender.push(&out[..len], *aggregator);
        }
        let _ = self.sender.flush();
    }

    /// Sends waiting reports, each to the aggregator that owns its host.
    fn report(&mut self) {
        for _ in 0..REPORTS_A_TURN {
            let Some(report) = self.reports.pop() else { break };
            let seq = self.next_seq();
            let report = datagram_of(report, seq);
            let owner = rendezvous::ranked(report.host.bucket(), &self.aggregators);
            let Some(owner) = owner.first() else { break };
            let mut out = [0; DATAGRAM_BYTES_MAX];
            let len = report.seal(self.placer, self.keys.epoch, &self.keys.key, &mut out);
            let _ = self.sender.push(&out[..len], *owner);
            self.metrics.reports.inc();
        }
        let _ = self.sender.flush();
    }
}

fn datagram_of(report: Report, seq: u64) -> FailureReport {
    let empty = |host: HostId, about| FailureReport {
        host,
        seq,
        about,
        word: CapacityWord::default(),
        failures: 0,
        code: 0,
    };
    match report {
        Report::Capacity { host, word } => {
            FailureReport { word, ..empty(host, FailureReport::CAPACITY) }
        }
        Report::Health { host, failures, code } => {
            FailureReport { failures, code: code as u16, ..empty(host, FailureReport::HEALTH) }
        }
    }
}
