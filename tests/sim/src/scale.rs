//! A million hosts for a minute, and a second in which a million launches come.
//!
//! The same cores as in [`crate::fleet`], without a host's registry of launches and with time in steps of a millisecond: each
//! heartbeat is sealed, verified, answered and fed; the map is built, published and adopted; each launch is
//! picked, sent, admitted or refused, answered and settled. One message takes a millisecond.

use std::sync::atomic::AtomicU64;

use heartbeat_core::{Heard, KeyRing, Shard, map::MapBuilder};
use hostd_core::{Admission, Beat, BeatConfig, Resources, Shapes};
use placer_core::{
    Adopter, CapacityTable, Dispatch, Launch, MapView, Policy, Step, launch, map::encode,
    sync::zeroed, table::words_for,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use wire::{
    Code, HostId, Incarnation, SandboxId, Seq,
    launch::{LaunchReply, Refused, Started, Steps, VisibleAt},
    limits::{DATAGRAM_BYTES_MAX, HEARTBEAT_INTERVAL_MS, SEQ_RESERVE, SHAPES_MAX},
    map::{HostAddr, MapVersion},
    seal::{FleetKey, Role},
};

use crate::{control::fleet_key, shape};

/// Size of a run.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Of everything random.
    pub seed: u64,
    /// Hosts.
    pub hosts: usize,
    /// Simulated seconds.
    pub seconds: u64,
    /// Launches that come in the one second in the middle.
    pub launches: u64,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scaled {
    /// Heartbeats that the shard took.
    pub heartbeats: u64,
    /// Directives that went back.
    pub directives: u64,
    /// Words that the table took from the feed.
    pub fed: u64,
    /// Launches offered, started, and sent to hosts.
    pub offered: u64,
    /// Of them.
    pub started: u64,
    /// To whatever host.
    pub sent: u64,
    /// Refusals.
    pub refused: u64,
    /// Most sandboxes that one host held.
    pub most_on_one: u32,
    /// Hosts in the adopted map.
    pub adopted: usize,
}

const STEP_SLOTS: u64 = 16;
const LIFE_MS: u64 = 10_000;
const BUDGET_MS: u32 = 10_000;

struct OneHost {
    beat: Beat,
    admission: Admission,
    live: u16,
}

struct Big {
    hosts: Vec<OneHost>,
    ids: Vec<HostId>,
    due: Vec<Vec<u32>>,
    ends: Vec<Vec<u32>>,
    shard: Shard,
    table: CapacityTable<Vec<AtomicU64>>,
    map: MapView<Vec<u8>>,
    dispatch: Dispatch,
    rng: SmallRng,
    to_hosts: Vec<Flight>,
    to_placer: Vec<(Flight, LaunchReply)>,
    scaled: Scaled,
}

struct Flight {
    launch: Launch,
    host: u32,
}

fn one_host(id: HostId, at_ms: u64, key: &FleetKey) -> OneHost {
    let whole = Resources { cpu_millis: STEP_SLOTS * 250, memory_bytes: STEP_SLOTS << 30 };
    let config = BeatConfig {
        host: id,
        incarnation: Incarnation(1),
        first_seq: Seq(id.0 & 0xfff),
        reserved_to: Seq(SEQ_RESERVE * 4),
        addr: HostAddr { ip: [10, 0, 0, 1].into(), port: 7_000 },
        flags: 0,
        interval_ms: u32::try_from(HEARTBEAT_INTERVAL_MS).unwrap_or(u32::MAX),
        key_epoch: key.epoch,
        key: key.sender(Role::Host, id.0),
        aggregators: vec![([127, 0, 0, 1], 7_001).into()],
    };
    let admission = Admission::new(&Shapes::default(), whole, 64, 0);
    OneHost { beat: Beat::new(at_ms, config), admission, live: 0 }
}

/// Runs it.
#[must_use]
pub fn run(size: Size) -> Scaled {
    let mut big = Big::new(size);
    // Everybody has registered after the first interval; then the map; then the launches.
    let publish_ms = HEARTBEAT_INTERVAL_MS + 1_000;
    let burst_ms = (size.seconds * 500).max(publish_ms + 1_000);
    let a_ms = size.launches / 1_000;
    for now_ms in 0..size.seconds * 1_000 {
        big.beats(now_ms);
        if now_ms.is_multiple_of(100) {
            big.feed();
        }
        if now_ms == publish_ms {
            big.publish();
        }
        big.end_sandboxes(now_ms);
        big.answers(now_ms);
        big.arrivals(now_ms);
        if (burst_ms..burst_ms + 1_000).contains(&now_ms) {
            (0..a_ms).for_each(|_| big.launch(now_ms));
        }
    }
    big.scaled
}

impl Big {
    fn new(size: Size) -> Self {
        let mut rng = SmallRng::seed_from_u64(size.seed);
        let key = fleet_key();
        let mut ids: Vec<HostId> = (0..size.hosts).map(|_| HostId(rng.random())).collect();
        ids.sort_unstable();
        let steps = usize::try_from(size.seconds * 1_000 + 2 * HEARTBEAT_INTERVAL_MS).unwrap_or(0);
        let mut due = vec![Vec::new(); steps];
        let mut hosts = Vec::with_capacity(ids.len());
        for (at, id) in ids.iter().enumerate() {
            let at_ms = rng.random_range(0..HEARTBEAT_INTERVAL_MS);
            hosts.push(one_host(*id, at_ms, &key));
            put(&mut due, at_ms, u32::try_from(at).unwrap_or(u32::MAX));
        }
        let Some(keys) = KeyRing::new(vec![key]) else { unreachable!("one key") };
        let Ok(map) = MapView::open(encode(MapVersion::default(), &[])) else {
            unreachable!("an empty map is a map")
        };
        Self {
            hosts,
            due,
            ends: vec![Vec::new(); steps],
            shard: Shard::new(0, 1, keys, None),
            table: CapacityTable::create(zeroed(words_for(ids.len())), 1),
            map,
            dispatch: Dispatch::new(Policy::default(), rng.random()),
            ids,
            rng,
            to_hosts: Vec::new(),
            to_placer: Vec::new(),
            scaled: Scaled::default(),
        }
    }

    fn beats(&mut self, now_ms: u64) {
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let mut answer = [0; DATAGRAM_BYTES_MAX];
        for at in take(&mut self.due, now_ms) {
            let host = &mut self.hosts[at as usize];
            if let Some(to) = host.beat.poll_reserve() {
                host.beat.handle_reserved(to);
            }
            let (random, running) = (self.rng.random(), u32::from(host.live));
            let sent = host.beat.poll(now_ms, random, &host.admission, running, &mut out);
            let Some(sent) = sent else { continue };
            self.scaled.heartbeats += 1;
            if let Heard::Directive(len) =
                self.shard.handle_datagram(now_ms, &out[..sent.len], &mut answer)
            {
                self.scaled.directives += 1;
                let obeyed = host.beat.handle_datagram(now_ms, &answer[..len]);
                debug_assert!(obeyed.is_ok(), "it answers what was just sent");
            }
            put(&mut self.due, host.beat.poll_timeout(), at);
        }
    }

    fn feed(&mut self) {
        let mut words = Vec::new();
        self.shard.take_news(usize::MAX, &mut words);
        for (host, word) in words {
            self.scaled.fed += u64::from(self.table.feed(host, word));
        }
    }

    fn publish(&mut self) {
        let mut hosts = Vec::new();
        self.shard.addresses(0, usize::MAX, &mut hosts);
        hosts.sort_unstable_by_key(|(host, _)| *host);
        let built = MapBuilder::new().build(&hosts).map_or(0, |built| built.count);
        let file = encode(MapVersion { epoch: 1, version: 1 }, &hosts);
        let Ok(map) = MapView::open(file) else { unreachable!("what was encoded opens") };
        let adopted = Adopter::new(&self.table).adopt::<_, Vec<u8>, _>(&self.table, None, &map);
        assert!(adopted.is_ok() && built == map.len() as u64, "the table holds the fleet");
        self.scaled.adopted = map.len();
        self.map = map;
        let mut words = Vec::new();
        self.shard.words(0, usize::MAX, &mut words);
        words.iter().for_each(|(host, word)| _ = self.table.feed(*host, *word));
    }

    fn launch(&mut self, now_ms: u64) {
        self.scaled.offered += 1;
        let launch = Launch::new(now_ms * 1_000, shape(), BUDGET_MS, &mut self.dispatch);
        self.poll(now_ms, launch);
    }

    fn poll(&mut self, now_ms: u64, mut launch: Launch) {
        match launch.poll(now_ms * 1_000, &self.table, &mut self.dispatch) {
            Step::Send { host, .. } => {
                self.scaled.sent += 1;
                let at = self.map.find(host).unwrap_or(0);
                let host = u32::try_from(at).unwrap_or(u32::MAX);
                self.to_hosts.push(Flight { launch, host });
            }
            Step::Done(launch::Outcome::Started(_)) => self.scaled.started += 1,
            _ => {}
        }
    }

    /// Launches that were sent a millisecond ago reach their hosts.
    fn arrivals(&mut self, now_ms: u64) {
        for flight in std::mem::take(&mut self.to_hosts) {
            let at = flight.host as usize;
            let (id, host) = (self.ids[at], &mut self.hosts[at]);
            let next = host.beat.next_seq();
            let said = wire::Stamp::of(Seq(next.0 - 1));
            let reply = if host.admission.take(shape()).is_ok() {
                host.live += 1;
                self.scaled.most_on_one = self.scaled.most_on_one.max(host.live.into());
                put(&mut self.ends, now_ms + LIFE_MS, flight.host);
                LaunchReply::Started(Started {
                    sandbox: SandboxId { host: id, local: self.scaled.sent },
                    visible_at: VisibleAt { incarnation: Incarnation(1), seq: next },
                    word: host.admission.word(said),
                    steps: Steps::default(),
                })
            } else {
                self.scaled.refused += 1;
                let word = host.admission.word(said);
                LaunchReply::Refused(Refused { word, code: Code::NoCapacity })
            };
            Self::capacity_changed(now_ms, host, &mut self.due, flight.host);
            self.to_placer.push((flight, reply));
        }
    }

    fn capacity_changed(now_ms: u64, host: &mut OneHost, due: &mut [Vec<u32>], at: u32) {
        let before = host.beat.poll_timeout();
        host.beat.handle_capacity(now_ms, &host.admission);
        if host.beat.poll_timeout() < before {
            put(due, host.beat.poll_timeout(), at);
        }
    }

    fn answers(&mut self, now_ms: u64) {
        for (mut flight, reply) in std::mem::take(&mut self.to_placer) {
            let (now, host) = (now_ms * 1_000, self.ids[flight.host as usize]);
            flight.launch.handle_reply(now, host, reply, &self.table, &mut self.dispatch);
            self.poll(now_ms, flight.launch);
        }
        while self.dispatch.poll_report().is_some() {}
    }

    fn end_sandboxes(&mut self, now_ms: u64) {
        for at in take(&mut self.ends, now_ms) {
            let host = &mut self.hosts[at as usize];
            host.live -= 1;
            let mut live = [0; SHAPES_MAX];
            live[shape().index()] = u32::from(host.live);
            host.admission.give(&live);
            Self::capacity_changed(now_ms, host, &mut self.due, at);
        }
    }
}

fn put(steps: &mut [Vec<u32>], at_ms: u64, host: u32) {
    if let Some(step) = usize::try_from(at_ms).ok().and_then(|at| steps.get_mut(at)) {
        step.push(host);
    }
}

fn take(steps: &mut [Vec<u32>], at_ms: u64) -> Vec<u32> {
    let step = usize::try_from(at_ms).ok().and_then(|at| steps.get_mut(at));
    step.map(std::mem::take).unwrap_or_default()
}
