//! The world: events, network and faults. [`run`] turns [`Options`] into an [`Outcome`].
//! Longer than 500 lines: one loop over all kinds of events, each of which touches the same world.

use std::collections::HashMap;

use placer_core::{Launch, MapView, Named, Step, dispatch::DECAY_US, launch};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::index};
use wire::{Code, HostId, SandboxId, launch::LaunchReply, report::FailureReport};

use crate::{
    Fault, Micros, Options, Outcome, SECOND, What,
    caller::Caller,
    check::{Broken, Rules, Told},
    control::{Aggregator, Noted, Question, Words, fleet_key},
    host::{Act, SimHost, Trouble},
    placer::{Going, SimPlacer, Way},
    queue::Queue,
    shape,
    stores::{Answer, MapFile, Stores},
};

mod service;

use service::Ails;

/// How long a dead connection takes to be noticed, and a dial to a dead port to be given up.
const NOTICED_US: Micros = SECOND;
const DIAL_US: Micros = 200_000;
const TICK_US: Micros = 100_000;

#[derive(Debug)]
enum Event {
    Arrive { hog: bool },
    Again { placer: usize, key: u64, homes: Vec<HostId> },
    Beat(usize),
    Heartbeat { aggregator: usize, host: usize, bytes: Vec<u8> },
    Directive(usize, Vec<u8>),
    Tick,
    Publish,
    Scan(usize),
    Asked(Question, bool),
    Answered(Question, Option<Answer>),
    Decay,
    Feed(usize, Words),
    Report(usize, FailureReport),
    Map(usize, MapFile),
    Poll(usize, u64),
    ToHost { host: usize, caller: Caller, cancel: bool },
    Begun { host: usize, hostd: u32, local: u64 },
    Ended { host: usize, machine: u32, local: u64 },
    Due(usize),
    Said { host: usize, caller: Caller, what: Said },
    Fault(usize, bool),
    Cut { host: usize, cut: bool },
    Audit,
}

#[derive(Clone, Debug)]
enum Said {
    Reply(LaunchReply),
    Unsent,
    Lost,
    Cancelled,
}

/// What ails the network and the fleet as a whole, now.
#[derive(Debug)]
struct Weather {
    database: Ails,
    objects: Ails,
    feed: bool,
    outage: bool,
    loss: f64,
    late_us: Micros,
    load: f64,
}

struct World {
    options: Options,
    queue: Queue<Event>,
    rng: SmallRng,
    arrivals: SmallRng,
    hosts: Vec<SimHost>,
    at: HashMap<HostId, usize>,
    placers: Vec<SimPlacer>,
    service: Vec<Aggregator>,
    stores: Stores,
    noted: Noted,
    weather: Weather,
    rules: Rules,
    outcome: Outcome,
    begin: Micros,
    launches: u64,
    drawn: Vec<Vec<usize>>,
    /// When each host's next heartbeat and its hostd's next look are put; an event at another time is out of date.
    beats: Vec<Micros>,
    dues: Vec<Micros>,
}

/// Runs a fleet from its first heartbeat until the last launch and sandbox have ended.
#[must_use]
pub fn run(options: &Options) -> Outcome {
    let mut world = World::new(options);
    let end = world.begin + options.seconds * SECOND;
    let rest = u64::from(options.budget_ms) * 1_000 + 10 * SECOND;
    while let Some(event) = world.queue.take(end + rest) {
        world.digest(&event);
        if let Err(Broken(what)) = world.happen(event) {
            let at = world.queue.now();
            world.outcome.broken = Some(format!("at {at} us: {what}"));
            break;
        }
    }
    world.finish()
}

impl World {
    fn new(options: &Options) -> Self {
        let mut rng = SmallRng::seed_from_u64(options.seed);
        let key = fleet_key();
        let mut hosts: Vec<SimHost> =
            (0..options.hosts).map(|_| SimHost::new(options, HostId(rng.random()), &key)).collect();
        hosts.sort_by_key(|host| host.id);
        let mut world = Self {
            at: hosts.iter().enumerate().map(|(at, host)| (host.id, at)).collect(),
            placers: (0..options.placers)
                .map(|at| SimPlacer::new(options, rng.random(), at))
                .collect(),
            arrivals: SmallRng::seed_from_u64(rng.random()),
            service: (0..options.aggregators).map(Aggregator::new).collect(),
            stores: Stores::new(options.swaps_blind),
            noted: Noted::default(),
            weather: Weather {
                database: Ails::default(),
                objects: Ails::default(),
                feed: true,
                outage: false,
                loss: options.loss,
                late_us: 0,
                load: 1.0,
            },
            rules: Rules::default(),
            outcome: Outcome { started_on: vec![0; hosts.len()], ..Outcome::default() },
            begin: options.warm_seconds * SECOND,
            launches: 0,
            drawn: Vec::new(),
            beats: vec![Micros::MAX; hosts.len()],
            dues: vec![Micros::MAX; hosts.len()],
            queue: Queue::default(),
            options: options.clone(),
            hosts,
            rng,
        };
        world.plan();
        world
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds")]
    fn plan(&mut self) {
        for host in 0..self.hosts.len() {
            // The fleet has been up for long: its hosts are out of phase, as they are after their first intervals.
            let spread = self.begin / 2;
            let at = self.rng.random_range(0..spread.max(1));
            self.put_beat(host, at);
        }
        self.queue.put(TICK_US, Event::Tick);
        self.queue.put(self.options.map_ms * 1_000, Event::Publish);
        self.queue.put(DECAY_US, Event::Decay);
        for aggregator in 0..self.service.len() {
            let at = self.options.scan_ms * 1_000 + aggregator as u64 * 100_000;
            self.queue.put(at, Event::Scan(aggregator));
        }
        self.queue.put(self.begin, Event::Arrive { hog: false });
        self.queue.put(self.begin + SECOND, Event::Audit);
        if self.options.hog > 0.0 {
            self.queue.put(self.begin, Event::Arrive { hog: true });
        }
        for (at, fault) in self.options.faults.clone().iter().enumerate() {
            let drawn = self.draw(fault.what);
            self.outcome.faulty.push(drawn.iter().map(|host| *host as u32).collect());
            if matches!(fault.what, What::Swizzle(_)) {
                self.plan_swizzle(fault, &drawn);
            }
            self.drawn.push(drawn);
            let us = |seconds: f64| self.begin + (seconds * 1e6) as Micros;
            self.queue.put(us(fault.from_s), Event::Fault(at, true));
            self.queue.put(us(fault.to_s), Event::Fault(at, false));
        }
    }

    /// Each host is cut off somewhere in the first half, and back somewhere in the second.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds")]
    fn plan_swizzle(&mut self, fault: &Fault, drawn: &[usize]) {
        let half_s = (fault.to_s - fault.from_s) / 2.0;
        for &host in drawn {
            for (from_s, cut) in [(fault.from_s, true), (fault.from_s + half_s, false)] {
                let at = ((from_s + self.rng.random_range(0.0..half_s)) * 1e6) as Micros;
                self.queue.put(self.begin + at, Event::Cut { host, cut });
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of hosts")]
    #[expect(clippy::cast_precision_loss, reason = "a share of hosts")]
    fn draw(&mut self, what: What) -> Vec<usize> {
        let share = match what {
            What::BlackHole(share)
            | What::Gray(share, _)
            | What::PortDead(share)
            | What::Silent(share)
            | What::Crash(share)
            | What::Gone(share)
            | What::Full(share)
            | What::HostdDown(share)
            | What::Partition(share)
            | What::Swizzle(share) => share,
            What::Lying => 1e-9,
            _ => return Vec::new(),
        };
        let count = ((self.hosts.len() as f64 * share).ceil() as usize).min(self.hosts.len());
        index::sample(&mut self.rng, self.hosts.len(), count).into_vec()
    }

    fn net(&mut self) -> Micros {
        let (least, most) = self.options.net_us;
        self.rng.random_range(least..=most)
    }

    /// Sends a datagram: never, once or twice.
    fn datagram(&mut self, event: impl Fn() -> Event) {
        let loss = self.weather.loss;
        for _ in 0..1 + usize::from(self.rng.random_bool(loss / 4.0)) {
            if self.rng.random_bool(1.0 - loss) {
                let late = self.rng.random_range(0..=self.weather.late_us);
                let at = self.queue.now() + self.net() + late;
                self.queue.put(at, event());
            }
        }
    }

    fn happen(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Arrive { hog } => self.arrive(hog)?,
            Event::Again { placer, key, homes } => self.arrive_again(placer, key, &homes)?,
            Event::Beat(host) => self.beat(host),
            Event::Heartbeat { aggregator, host, bytes } => self.heard(aggregator, host, &bytes),
            Event::Directive(host, bytes) => {
                let now = self.queue.now();
                if self.hosts[host].hostd_up {
                    self.hosts[host].directed(now, &bytes);
                }
            }
            Event::Tick => self.tick(),
            Event::Publish => self.look_for_maps(),
            Event::Scan(aggregator) => self.scan(aggregator),
            Event::Asked(question, answers) => self.asked(question, answers)?,
            Event::Answered(question, answer) => self.answered(question, answer),
            Event::Decay => {
                let tick = self.queue.now() / DECAY_US;
                for placer in &self.placers {
                    placer.table.decay(tick);
                }
                self.queue.put(self.queue.now() + DECAY_US, Event::Decay);
            }
            Event::Feed(placer, words) => self.placers[placer].fed(&words),
            Event::Report(placer, report) => {
                let owner = self.hosts[self.at[&report.host]].owner();
                let (now, here) = (self.queue.now(), &mut self.service[owner]);
                if here.awake() {
                    here.reported(now, placer as u64, &report, &mut self.noted);
                }
            }
            Event::Map(placer, file) => {
                if let Some((version, adopted)) = self.placers[placer].adopt(&file) {
                    self.rules.adopted(placer, version)?;
                    if adopted.added > 0 && self.weather.feed {
                        // Words of hosts that it did not know were dropped: it asks for everything.
                        self.subscribe(placer);
                    }
                }
            }
            Event::Poll(placer, key) => self.poll(placer, key)?,
            Event::ToHost { host, caller, cancel } => self.reaches_host(host, caller, cancel)?,
            Event::Begun { .. } | Event::Ended { .. } | Event::Due(_) => {
                self.happen_on_host(&event)?
            }
            Event::Said { host, caller, what } => self.said(host, caller, what)?,
            Event::Fault(at, begins) => self.fault(at, begins)?,
            Event::Cut { host, cut } => {
                let placer = host % self.options.placers;
                self.hosts[host].trouble.cut_off = cut.then_some(placer);
            }
            Event::Audit => {
                let grace = u64::from(self.options.budget_ms) * 1_000 + 15 * SECOND;
                self.rules.owned(self.queue.now(), grace + self.longest_fault())?;
                self.queue.put(self.queue.now() + SECOND, Event::Audit);
            }
        }
        Ok(())
    }

    /// Something that was planned happens on a host, unless the host or its hostd has died since.
    fn happen_on_host(&mut self, event: &Event) -> Result<(), Broken> {
        let (now, mut acts) = (self.queue.now(), Vec::new());
        let at = match *event {
            Event::Begun { host, hostd, local } if self.hosts[host].hostd == hostd => {
                self.hosts[host].begun(now, local, &mut self.rng, &mut acts);
                host
            }
            Event::Ended { host, machine, local } if self.hosts[host].machine == machine => {
                self.hosts[host].ended(now, local, &mut acts);
                host
            }
            Event::Due(host) if self.dues[host] == now => {
                self.dues[host] = Micros::MAX;
                if self.hosts[host].hostd_up {
                    self.hosts[host].due(now, &mut acts);
                }
                host
            }
            _ => return Ok(()),
        };
        self.act(at, acts)
    }

    /// A host that nobody reaches, or whose hostd is down, reaps when it is back.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds")]
    fn longest_fault(&self) -> Micros {
        let faults = self.options.faults.iter();
        faults.map(|fault| ((fault.to_s - fault.from_s) * 1e6) as Micros).max().unwrap_or(0)
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "microseconds")]
    fn arrive(&mut self, hog: bool) -> Result<(), Broken> {
        let now = self.queue.now();
        if now >= self.begin + self.options.seconds * SECOND {
            return Ok(());
        }
        let share = if hog { self.options.hog } else { 1.0 };
        let mean_us = 1e6 / (self.options.rate * self.weather.load * share);
        let wait = -mean_us * (1.0 - self.arrivals.random::<f64>()).ln();
        self.queue.put(now + wait as Micros, Event::Arrive { hog });
        self.launches += 1;
        let at = self.arrivals.random_range(0..self.placers.len());
        if !hog {
            let second = ((now - self.begin) / SECOND) as usize;
            if self.outcome.seconds.len() <= second {
                self.outcome.seconds.resize(second + 1, Default::default());
            }
            self.outcome.seconds[second].offered += 1;
        }
        if self.options.named > 0.0 && self.arrivals.random_bool(self.options.named) {
            return self.arrive_named(at, self.launches | Caller::NAMED);
        }
        let placer = &mut self.placers[at];
        let launch = Launch::new(now, shape(), self.options.budget_ms, &mut placer.dispatch);
        self.enter(at, self.launches, Way::Picked(Box::new(launch)), hog)
    }

    /// A named launch comes, and comes again through another placer while its budget lasts.
    fn arrive_named(&mut self, at: usize, key: u64) -> Result<(), Broken> {
        let now = self.queue.now();
        let homes = self.placers[at].homes(Caller::launch_id(key));
        let budget_us = u64::from(self.options.budget_ms) * 1_000;
        let placer = (at + self.arrivals.random_range(0..self.placers.len())) % self.placers.len();
        if placer != at {
            let again = now + self.arrivals.random_range(0..budget_us);
            let event = Event::Again { placer, key: key | Caller::SECOND, homes: homes.clone() };
            self.queue.put(again, event);
        }
        let named = Named::new(now, homes, self.options.budget_ms);
        self.enter(at, key, Way::Named(named), false)
    }

    /// While two placers have different maps they may see other homes; PROTOCOL 6.11 promises nothing for these.
    fn arrive_again(&mut self, at: usize, key: u64, homes: &[HostId]) -> Result<(), Broken> {
        let own = self.placers[at].homes(Caller::launch_id(key));
        if own != homes {
            return Ok(());
        }
        let named = Named::new(self.queue.now(), own, self.options.budget_ms);
        self.enter(at, key, Way::Named(named), false)
    }

    fn enter(&mut self, at: usize, key: u64, way: Way, hog: bool) -> Result<(), Broken> {
        let (id, came) = (Caller::launch_id(key), self.queue.now());
        self.placers[at].going.insert(key, Going { way, id, came, hog, wake: 0 });
        self.poll(at, key)
    }

    fn put_beat(&mut self, host: usize, at: Micros) {
        if at < self.beats[host] {
            self.beats[host] = at;
            self.queue.put(at, Event::Beat(host));
        }
    }

    fn put_due(&mut self, host: usize) {
        if let Some(at) = self.hosts[host].due_at()
            && at < self.dues[host]
        {
            let at = at.max(self.queue.now() + 1_000);
            self.dues[host] = at;
            self.queue.put(at, Event::Due(host));
        }
    }

    fn beat(&mut self, host: usize) {
        let now = self.queue.now();
        if self.beats[host] != now {
            return;
        }
        self.beats[host] = Micros::MAX;
        if !self.hosts[host].hostd_up {
            return;
        }
        let random = self.rng.random();
        if let Some((aggregator, bytes)) = self.hosts[host].poll_beat(now, random)
            && !self.hosts[host].trouble.silent
        {
            self.datagram(|| Event::Heartbeat { aggregator, host, bytes: bytes.clone() });
        }
        self.put_beat(host, self.hosts[host].beat_at().max(now + 1_000));
    }

    /// Does what a launch wants.
    fn poll(&mut self, placer: usize, key: u64) -> Result<(), Broken> {
        let now = self.queue.now();
        let mut sent = Vec::new();
        let here = &mut self.placers[placer];
        let Some(going) = here.going.get_mut(&key) else { return Ok(()) };
        let end = loop {
            match going.way.poll(now, &here.table, &mut here.dispatch) {
                Step::Send { host, budget_ms, .. } => sent.push((host, budget_ms, false)),
                Step::Cancel { host } => sent.push((host, 0, true)),
                Step::Wait { until } => {
                    if going.wake != until {
                        going.wake = until;
                        self.queue.put(until, Event::Poll(placer, key));
                    }
                    break None;
                }
                Step::Done(outcome) => break Some(outcome),
            }
        };
        while let Some(report) = self.placers[placer].poll_report() {
            self.datagram(|| Event::Report(placer, report));
        }
        for (host, budget_ms, cancel) in sent {
            let host = self.at[&host];
            self.outcome.sent += u64::from(!cancel);
            #[expect(clippy::cast_possible_truncation, reason = "milliseconds, hosts")]
            if self.options.trace && !cancel {
                let at_ms = (now.saturating_sub(self.begin) / 1_000) as u32;
                self.outcome.attempts.push((at_ms, host as u32));
            }
            let at = now + self.net();
            let caller = Caller { placer, key, budget_ms };
            self.queue.put(at, Event::ToHost { host, caller, cancel });
        }
        match end {
            Some(end) => self.end(placer, key, end),
            None => Ok(()),
        }
    }

    fn end(&mut self, placer: usize, key: u64, end: launch::Outcome) -> Result<(), Broken> {
        let now = self.queue.now();
        let Some(going) = self.placers[placer].going.remove(&key) else { return Ok(()) };
        let told = match end {
            launch::Outcome::Started(started) => {
                self.outcome.started_on[self.at[&started.sandbox.host]] += 1;
                if !going.hog && key & Caller::SECOND == 0 {
                    let second = usize::try_from((going.came - self.begin) / SECOND);
                    self.outcome.seconds[second.unwrap_or(0)].started += 1;
                    let took = u32::try_from(now - going.came).unwrap_or(u32::MAX);
                    self.outcome.latencies_us.push(took);
                }
                Told::Started(started.sandbox)
            }
            launch::Outcome::Failed(fault) => {
                *self.outcome.codes.entry(fault.code.name()).or_default() += 1;
                match (fault.code, &going.way) {
                    (Code::Unknown, _) => Told::Unknown,
                    // This placer sent nothing; what the other one did is its own.
                    (Code::HostUnreachable | Code::NoHosts, Way::Named(_)) => Told::Nothing,
                    _ => Told::Failed,
                }
            }
        };
        self.rules.told(now, going.id, told)
    }

    fn reaches_host(&mut self, host: usize, caller: Caller, cancel: bool) -> Result<(), Broken> {
        let now = self.queue.now();
        let id = self.hosts[host].id;
        if self.weather.outage || !self.hosts[host].reached_by(caller.placer) {
            let known = self.placers[caller.placer].broken.contains(&id);
            let (after, what) =
                if known { (DIAL_US, Said::Unsent) } else { (NOTICED_US, Said::Lost) };
            self.queue.put(now + after, Event::Said { host, caller, what });
            return Ok(());
        }
        self.placers[caller.placer].broken.remove(&id);
        let launch = Caller::launch_id(caller.key);
        let mut acts = Vec::new();
        if cancel && self.options.cancels_lie {
            self.answer(host, caller, Said::Cancelled, None);
        } else if cancel {
            self.hosts[host].cancel(now, launch, caller, &mut acts);
        } else {
            self.hosts[host].launch(now, launch, caller, &mut self.rng, &mut acts);
        }
        self.act(host, acts)
    }

    fn act(&mut self, host: usize, acts: Vec<Act>) -> Result<(), Broken> {
        let now = self.queue.now();
        for act in acts {
            match act {
                Act::Begin(at, id, sandbox) => {
                    let SandboxId { local, .. } = sandbox;
                    self.rules.begun(id, sandbox, self.hosts[host].slots())?;
                    let hostd = self.hosts[host].hostd;
                    self.queue.put(at, Event::Begun { host, hostd, local });
                }
                Act::Runs(until, id, local) => {
                    self.rules.executed(id);
                    let machine = self.hosts[host].machine;
                    self.queue.put(until, Event::Ended { host, machine, local });
                }
                Act::Reaped(id, sandbox) => self.rules.reaped(id, sandbox)?,
                Act::Gone(id, sandbox) => self.rules.gone(id, sandbox),
                Act::Cancelled(caller) => self.answer(host, caller, Said::Cancelled, None),
                Act::Answer(callers, reply, local) => {
                    for caller in callers {
                        self.answer(host, caller, Said::Reply(reply.clone()), local);
                    }
                }
            }
        }
        self.put_due(host);
        if self.hosts[host].hostd_up {
            self.put_beat(host, self.hosts[host].beat_at().max(now));
        }
        Ok(())
    }

    fn answer(&mut self, host: usize, caller: Caller, what: Said, local: Option<u64>) {
        let now = self.queue.now();
        let cut = self.weather.outage || self.hosts[host].trouble.cut_off == Some(caller.placer);
        if cut || self.rng.random_bool(self.options.reply_loss) {
            if let Some(local) = local {
                self.hosts[host].undelivered(now, local, caller.budget_ms);
            }
            let after = if cut { NOTICED_US } else { 20_000 };
            self.queue.put(now + after, Event::Said { host, caller, what: Said::Lost });
        } else {
            let at = now + self.net();
            self.queue.put(at, Event::Said { host, caller, what });
        }
    }

    fn said(&mut self, host: usize, caller: Caller, what: Said) -> Result<(), Broken> {
        let now = self.queue.now();
        let id = self.hosts[host].id;
        let placer = &mut self.placers[caller.placer];
        if matches!(what, Said::Lost) && !self.hosts[host].hostd_up {
            placer.broken.insert(id);
        }
        if matches!(what, Said::Unsent) || self.weather.outage {
            placer.broken.insert(id);
        }
        let Some(going) = placer.going.get_mut(&caller.key) else { return Ok(()) };
        let (table, dispatch) = (&placer.table, &mut placer.dispatch);
        match what {
            Said::Reply(reply) => {
                self.outcome.refused += u64::from(matches!(reply, LaunchReply::Refused(_)));
                going.way.handle_reply(now, id, reply, table, dispatch);
            }
            Said::Unsent => {
                going.way.handle_unsent(now, id, table, dispatch);
            }
            Said::Lost => going.way.handle_lost(now, id, table, dispatch),
            Said::Cancelled => going.way.handle_cancelled(now, id, table, dispatch),
        }
        self.poll(caller.placer, caller.key)
    }

    fn fault(&mut self, at: usize, begins: bool) -> Result<(), Broken> {
        let what = self.options.faults[at].what;
        let calm = Options::default();
        match what {
            What::NoMaps => self.weather.objects.away = begins,
            What::NoDatabase => self.weather.database.away = begins,
            What::Flaky(share) => {
                let flaky = if begins { share } else { 0.0 };
                (self.weather.database.flaky, self.weather.objects.flaky) = (flaky, flaky);
            }
            What::AggregatorKilled(which) => self.fault_of_service(which, true, begins),
            What::AggregatorStopped(which) => self.fault_of_service(which, false, begins),
            What::NoFeed => self.weather.feed = !begins,
            What::Outage => self.weather.outage = begins,
            What::Load(times) => self.weather.load = if begins { times } else { 1.0 },
            What::Storm(loss) => {
                self.weather.loss = if begins { loss } else { self.options.loss };
                self.weather.late_us = if begins { SECOND / 2 } else { calm.feed_late_us };
            }
            _ => {}
        }
        for host in self.drawn[at].clone() {
            self.fault_of(host, what, begins)?;
        }
        Ok(())
    }

    fn fault_of(&mut self, host: usize, what: What, begins: bool) -> Result<(), Broken> {
        let cut_off = begins.then(|| host % self.options.placers);
        let here = &mut self.hosts[host];
        let trouble = &mut here.trouble;
        match what {
            What::BlackHole(_) => trouble.black_hole = begins,
            What::Gray(_, times) => trouble.slow = if begins { times } else { Trouble::NONE.slow },
            What::PortDead(_) => trouble.port_dead = begins,
            What::Silent(_) => trouble.silent = begins,
            What::Partition(_) => trouble.cut_off = cut_off,
            What::Lying if begins => here.lie(&self.options),
            What::Full(_) if begins => here.fill(self.queue.now()),
            What::Crash(_) | What::Gone(_) | What::HostdDown(_) => {
                let mut acts = Vec::new();
                let waiting = match (begins, what) {
                    (true, What::Crash(_) | What::Gone(_)) => here.crash(&mut acts),
                    (true, _) => here.kill_hostd(&mut acts),
                    (false, _) if !here.hostd_up => {
                        here.start_hostd(self.queue.now(), &self.options, &fleet_key());
                        self.put_beat(host, self.queue.now());
                        Vec::new()
                    }
                    (false, _) => Vec::new(),
                };
                if begins && matches!(what, What::Gone(_)) {
                    let id = self.hosts[host].id;
                    self.placers.iter_mut().for_each(|placer| _ = placer.broken.insert(id));
                }
                for caller in waiting {
                    let at = self.queue.now() + NOTICED_US;
                    self.queue.put(at, Event::Said { host, caller, what: Said::Lost });
                }
                self.act(host, acts)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// FNV over what happens and when: two runs of one seed have the same.
    fn digest(&mut self, event: &Event) {
        let kind = match event {
            Event::Arrive { .. } => 1,
            Event::Said { host, .. } | Event::ToHost { host, .. } => 2 + *host as u64,
            Event::Beat(host) => 3 + *host as u64,
            _ => 4,
        };
        for part in [self.queue.now(), kind] {
            self.outcome.digest = (self.outcome.digest ^ part).wrapping_mul(0x0100_0000_01b3);
        }
        self.outcome.events += 1;
    }

    fn finish(mut self) -> Outcome {
        let begin_ms = self.begin / 1_000;
        for (host, at_ms) in &self.noted.quarantined_ms {
            let at = u32::try_from(self.at[host]).unwrap_or(u32::MAX);
            self.outcome.quarantined_ms.insert(at, at_ms.saturating_sub(begin_ms));
        }
        self.outcome.quarantined_max = self.noted.quarantined_max;
        self.outcome.removed = self.noted.removed;
        self.outcome.braked = self.noted.braked;
        let published = self.stores.map(false);
        let published = published.as_ref().and_then(|file| MapView::open(&file.1[..]).ok());
        let known =
            |host: &&SimHost| published.as_ref().is_some_and(|map| map.find(host.id).is_some());
        let up = self.hosts.iter().filter(|host| host.hostd_up);
        let missing = up.filter(|host| !known(host)).count();
        self.outcome.missing = u32::try_from(missing).unwrap_or(u32::MAX);
        self.outcome.version = published.map(|map| map.version()).unwrap_or_default();
        self.outcome
    }
}
