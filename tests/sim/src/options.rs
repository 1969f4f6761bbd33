//! What a run is made of. A seed and these fields say all of it.

use placer_core::Policy;

use crate::Micros;

/// A run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of everything random.
    pub seed: u64,
    /// Hosts.
    pub hosts: usize,
    /// Slots of each.
    pub slots: u16,
    /// Launches that a host starts at once without slowing down.
    pub cores: u32,
    /// Aggregators; hosts find theirs by rendezvous.
    pub aggregators: usize,
    /// Clocks of hosts are off by up to so many seconds.
    pub skew_seconds: u64,
    /// Placers, each with its own table.
    pub placers: usize,
    /// How launches are carried out.
    pub policy: Policy,
    /// Launches a second over all placers.
    pub rate: f64,
    /// Seconds during which they come.
    pub seconds: u64,
    /// Seconds before, in which the fleet registers and the first map is published.
    pub warm_seconds: u64,
    /// Mean life of a sandbox, in seconds; from a half to one and a half of it.
    pub life_seconds: f64,
    /// Time to start a sandbox on an idle host.
    pub start_us: Micros,
    /// Milliseconds that a launch may take.
    pub budget_ms: u32,
    /// Milliseconds between heartbeats.
    pub beat_ms: u32,
    /// Latency of one message, least and most.
    pub net_us: (Micros, Micros),
    /// Share of datagrams that are lost, and of those that come twice.
    pub loss: f64,
    /// Share of replies to launches that are lost with their stream.
    pub reply_loss: f64,
    /// How late the feed is, besides the network.
    pub feed_late_us: Micros,
    /// Milliseconds between maps.
    pub map_ms: u64,
    /// Milliseconds between slow scans.
    pub scan_ms: u64,
    /// Share of launches that one tenant adds on top (1.0: as many again).
    pub hog: f64,
    /// Share of launches that are named and sent through two placers.
    pub named: f64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// A planted bug: cancels are answered and not obeyed. The rules must notice.
    pub cancels_lie: bool,
    /// A planted bug: the object store swaps whatever head is named. The rules must notice.
    pub swaps_blind: bool,
    /// Keep each attempt, for shares over time.
    pub trace: bool,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    /// Seconds after the warm-up when it begins.
    pub from_s: f64,
    /// And when it ends.
    pub to_s: f64,
    /// What it is.
    pub what: What,
}

/// What goes wrong. Shares are of the fleet; each fault draws its own hosts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    /// Hosts fail every launch in a millisecond and report that they are empty.
    BlackHole(f64),
    /// Hosts are this many times slower.
    Gray(f64, u64),
    /// Hosts beat, and their QUIC port is dead.
    PortDead(f64),
    /// One host claims all the slots that a word can say; it serves them.
    Lying,
    /// Heartbeats of these hosts are lost.
    Silent(f64),
    /// Machines crash; they come back empty when the fault ends.
    Crash(f64),
    /// Machines are gone, and placers know their connections to be broken; the map and the feed may still name them.
    Gone(f64),
    /// Hosts are full of what no placer here started, and do not say so before their next heartbeat. They stay full.
    Full(f64),
    /// hostd is killed at the begin and is back at the end; sandboxes live on.
    HostdDown(f64),
    /// Hosts and one placer do not reach each other.
    Partition(f64),
    /// The object store answers nothing: no map is published and none is read.
    NoMaps,
    /// The database answers nothing.
    NoDatabase,
    /// Questions to both stores end without an outcome, this share of them: not carried out, carried out, or carried out late.
    Flaky(f64),
    /// This aggregator (by number, round the number there are) is killed; it starts again at the end.
    AggregatorKilled(usize),
    /// This aggregator is stopped; at the end it wakes in the middle of whatever it did.
    AggregatorStopped(usize),
    /// Hosts are cut off from one placer one after the other, each for a time of its own.
    Swizzle(f64),
    /// Placers hear no feed.
    NoFeed,
    /// No placer reaches any host.
    Outage,
    /// Datagrams are lost and delayed by up to half a second.
    Storm(f64),
    /// Arrivals are this many times as many.
    Load(f64),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 1,
            hosts: 100,
            slots: 64,
            cores: 4,
            aggregators: 1,
            skew_seconds: 0,
            placers: 3,
            policy: Policy::default(),
            rate: 200.0,
            seconds: 20,
            warm_seconds: 3,
            life_seconds: 5.0,
            start_us: 1_000,
            budget_ms: 10_000,
            beat_ms: 15_000,
            net_us: (50, 400),
            loss: 0.0,
            reply_loss: 0.0,
            feed_late_us: 0,
            map_ms: 1_000,
            scan_ms: 30_000,
            hog: 0.0,
            named: 0.0,
            faults: Vec::new(),
            cancels_lie: false,
            swaps_blind: false,
            trace: false,
        }
    }
}

impl Options {
    /// Seconds after the warm-up when the last fault has ended.
    #[must_use]
    pub fn healed_s(&self) -> f64 {
        self.faults.iter().map(|fault| fault.to_s).fold(0.0, f64::max)
    }
}
