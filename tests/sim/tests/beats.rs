//! FAULTS H8 and H9: the hosts' own sender and the aggregators' own shard, over a link that loses, delays and doubles.
//!
//! All aggregators are one shard here, as they are one view through the store. `VOLLEY_H8_SECONDS` makes it longer.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    net::SocketAddr,
};

use heartbeat_core::{Heard, KeyRing, Shard, shard::upkeep::Standing};
use hostd_core::{Admission, Beat, BeatConfig, Resources, Shapes};
use rand::{Rng as _, RngCore as _, SeedableRng as _, TryRngCore as _, rngs::SmallRng};
use wire::{
    HostId, Incarnation, Seq,
    limits::DATAGRAM_BYTES_MAX,
    map::HostAddr,
    seal::{FleetKey, KeyEpoch, Role},
};

const HOSTS: usize = 1_000;
const INTERVAL_MS: u32 = 15_000;

/// What the way between hosts and aggregators does to a datagram.
struct Link {
    loss: f64,
    doubled: f64,
    delay_ms: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Due(usize),
    Up(usize, Vec<u8>),
    Down(usize, Vec<u8>),
    Look,
}

struct Run {
    now_ms: u64,
    rng: SmallRng,
    link: Link,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    put: u64,
    hosts: Vec<Beat>,
    /// How far each host's clock is ahead.
    ahead_ms: Vec<u64>,
    admission: Admission,
    shard: Shard,
}

/// Times that a host was held for suspect, and for dead.
#[derive(Debug, Default)]
struct Wrong {
    suspected: u64,
    died: u64,
    sent: u64,
}

impl Run {
    /// Clocks of `skewed` of a hundred hosts are up to ten minutes ahead or behind of the others'.
    fn new(seed: u64, link: Link, skewed: u32) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let key = FleetKey { epoch: KeyEpoch(1), secret: [7; 32] };
        let mut shard = Shard::new(0, 1, KeyRing::new(vec![key.clone()]).unwrap(), None);
        shard.handle_drains(BTreeMap::new());
        let whole = Resources { cpu_millis: 8_000, memory_bytes: 16 << 30 };
        let aggregators: Vec<SocketAddr> =
            (1..4).map(|at| SocketAddr::from(([10, 0, 0, at], 7_400))).collect();
        let ahead_ms: Vec<u64> = (0..HOSTS)
            .map(|_| match rng.random_ratio(skewed, 100) {
                // Nobody's begins below zero: they are all ten minutes on.
                true => rng.random_range(0..=1_200_000),
                false => 600_000,
            })
            .collect();
        let hosts = (0..HOSTS)
            .map(|at| {
                let host = HostId(rng.next_u64());
                let config = BeatConfig {
                    host,
                    incarnation: Incarnation(1),
                    first_seq: Seq(1),
                    reserved_to: Seq(1 << 40),
                    addr: HostAddr { ip: [10, 1, 0, 1].into(), port: 7_410 },
                    flags: 0,
                    interval_ms: INTERVAL_MS,
                    key_epoch: KeyEpoch(1),
                    key: key.sender(Role::Host, host.0),
                    aggregators: aggregators.clone(),
                };
                Beat::new(ahead_ms[at], config)
            })
            .collect();
        let admission = Admission::new(&Shapes::default(), whole, 64, 0);
        let events = BinaryHeap::new();
        let mut run =
            Self { now_ms: 0, rng, link, events, put: 0, hosts, ahead_ms, admission, shard };
        for at in 0..HOSTS {
            let first_ms = run.rng.random_range(0..u64::from(INTERVAL_MS));
            run.put(first_ms, Event::Due(at));
        }
        run.put(0, Event::Look);
        run
    }

    fn put(&mut self, at_ms: u64, event: Event) {
        self.put += 1;
        self.events.push(Reverse((at_ms, self.put, event)));
    }

    /// Sends over the link: lost, or late, or late and again.
    fn send(&mut self, what: impl Fn(Vec<u8>) -> Event, bytes: &[u8]) {
        let copies = if self.rng.random_bool(self.link.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            if !self.rng.random_bool(self.link.loss) {
                let late_ms = self.rng.random_range(0..=self.link.delay_ms);
                self.put(self.now_ms + late_ms, what(bytes.to_vec()));
            }
        }
    }

    fn run(mut self, seconds: u64) -> Wrong {
        let (mut wrong, mut out) = (Wrong::default(), [0; DATAGRAM_BYTES_MAX]);
        let mut suspects = BTreeMap::new();
        while let Some(Reverse((at_ms, _, event))) = self.events.pop() {
            self.now_ms = at_ms;
            if at_ms > seconds * 1_000 {
                break;
            }
            match event {
                Event::Due(at) => {
                    let (theirs_ms, random) = (at_ms + self.ahead_ms[at], self.rng.next_u64());
                    let beat = &mut self.hosts[at];
                    if let Some(sent) = beat.poll(theirs_ms, random, &self.admission, 0, &mut out) {
                        wrong.sent += 1;
                        self.send(|bytes| Event::Up(at, bytes), &out[..sent.len]);
                    }
                    let next_ms = self.hosts[at].poll_timeout().max(theirs_ms + 1);
                    self.put(next_ms - self.ahead_ms[at], Event::Due(at));
                }
                Event::Up(at, bytes) => {
                    if let Heard::Directive(len) =
                        self.shard.handle_datagram(at_ms, &bytes, &mut out)
                    {
                        self.send(|bytes| Event::Down(at, bytes), &out[..len]);
                    }
                }
                Event::Down(at, bytes) => {
                    let _ = self.hosts[at].handle_datagram(at_ms + self.ahead_ms[at], &bytes);
                }
                Event::Look => {
                    self.look(&mut suspects, &mut wrong);
                    self.put(at_ms + 1_000, Event::Look);
                }
            }
        }
        wrong
    }

    /// Counts who has come to be suspect or dead since the last look.
    fn look(&self, before: &mut BTreeMap<HostId, Standing>, wrong: &mut Wrong) {
        let mut seen = Vec::new();
        assert_eq!(self.shard.seen(self.now_ms, 0, usize::MAX, &mut seen), None);
        for seen in seen {
            let before = before.insert(seen.row.host, seen.standing);
            let came = before.is_some_and(|before| before != seen.standing);
            wrong.suspected += u64::from(came && seen.standing == Standing::Suspect);
            wrong.died += u64::from(came && seen.standing == Standing::Dead);
        }
    }
}

fn seed() -> u64 {
    let seed = std::env::var("VOLLEY_SEED").ok().and_then(|text| text.parse().ok());
    seed.unwrap_or_else(|| rand::rngs::OsRng.try_next_u64().unwrap())
}

/// H8: "30 % loss, 500 ms jitter, duplicates: false suspects under 1 in 10^6 host-seconds".
#[test]
fn h8_a_lossy_link_makes_no_suspects() {
    let seconds = std::env::var("VOLLEY_H8_SECONDS").ok().and_then(|text| text.parse().ok());
    let (seconds, seed) = (seconds.unwrap_or(2_000), seed());
    let link = Link { loss: 0.3, doubled: 0.1, delay_ms: 500 };
    let wrong = Run::new(seed, link, 0).run(seconds);
    let host_seconds = HOSTS as u64 * seconds;
    println!("H8, seed {seed}: {wrong:?} in {host_seconds} host-seconds");
    assert_eq!(wrong.died, 0);
    // Less than one is expected in these: two or more would be one in ten thousand runs.
    assert!(wrong.suspected <= 2 + host_seconds / 1_000_000, "{wrong:?}");
}

/// H9: "clocks +-10 min on 5 %: no death".
#[test]
fn h9_clocks_that_are_wrong_kill_nobody() {
    let seed = seed();
    let link = Link { loss: 0.01, doubled: 0.0, delay_ms: 20 };
    let wrong = Run::new(seed, link, 5).run(600);
    println!("H9, seed {seed}: {wrong:?}");
    assert_eq!((wrong.suspected, wrong.died), (0, 0));
}
