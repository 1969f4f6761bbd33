//! Hosts: hostd-core's host and heartbeat sender, and what is simulated round them.

use std::{collections::BTreeMap, net::SocketAddr};

use hostd_core::{
    Admit, Ask, Beat, BeatConfig, Deed, Fate, Host, HostConfig, Resources, Sandbox, Shapes,
    host::Cancelled,
};
use rand::{Rng, rngs::SmallRng};
use wire::{
    Code, Fault, HostId, Incarnation, LaunchId, SandboxId, Seq,
    call::{Exit, ExitWhy, State},
    launch::{LaunchReply, Started, Steps},
    limits::{DATAGRAM_BYTES_MAX, FREE_MAX, SEQ_RESERVE},
    map::HostAddr,
    rendezvous,
    seal::{FleetKey, Role},
};

use crate::{Micros, Options, caller::Caller, shape};

/// What ails a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Fails every launch at once, and stays empty.
    pub black_hole: bool,
    /// Times slower.
    pub slow: u64,
    /// Nobody reaches its port.
    pub port_dead: bool,
    /// Its heartbeats are lost.
    pub silent: bool,
    /// This placer does not reach it.
    pub cut_off: Option<usize>,
}

impl Trouble {
    /// None.
    pub const NONE: Self =
        Self { black_hole: false, slow: 1, port_dead: false, silent: false, cut_off: None };
}

/// What a host does with what it was given.
#[derive(Debug)]
pub enum Act {
    /// Answer these.
    Answer(Vec<Caller>, LaunchReply, Option<u64>),
    /// Answer a cancel.
    Cancelled(Caller),
    /// A launch is being started; [`SimHost::begun`] is due then.
    Begin(Micros, LaunchId, SandboxId),
    /// A sandbox runs; [`SimHost::ended`] is due then.
    Runs(Micros, LaunchId, u64),
    /// hostd ends a sandbox of its own accord, or for a cancel.
    Reaped(LaunchId, SandboxId),
    /// A sandbox is gone.
    Gone(LaunchId, SandboxId),
}

/// One host.
#[derive(Debug)]
pub struct SimHost {
    /// Its name.
    pub id: HostId,
    /// The machine is up.
    pub machine_up: bool,
    /// hostd is up.
    pub hostd_up: bool,
    /// Counts machine starts: what was to happen before a crash does not.
    pub machine: u32,
    /// Counts hostd starts.
    pub hostd: u32,
    /// What ails it.
    pub trouble: Trouble,
    config: HostConfig,
    core: Host<()>,
    beat: Beat,
    /// Boxes that exist, whatever hostd knows.
    boxes: BTreeMap<u64, (LaunchId, Started)>,
    starting: BTreeMap<u64, LaunchId>,
    waiting: BTreeMap<u64, Vec<Caller>>,
    cancelling: BTreeMap<u64, Vec<Caller>>,
    /// What hostd's journal holds: it survives all but the loss of the disk.
    journal: BTreeMap<LaunchId, Fate>,
    /// And the named launches that it says were refused.
    refused: BTreeMap<LaunchId, Code>,
    start_us: Micros,
    cores: u32,
    life_us: Micros,
    skew_ms: u64,
    owner: usize,
}

fn body(id: LaunchId) -> [u8; 16] {
    id.0
}

fn host_config(options: &Options, id: HostId, slots: u16) -> HostConfig {
    let slots = u64::from(slots);
    HostConfig {
        host: id,
        incarnation: Incarnation(1),
        shapes: Shapes::default(),
        whole: Resources { cpu_millis: slots * 250, memory_bytes: slots << 30 },
        boxes_max: u32::try_from(slots).unwrap_or(u32::MAX),
        margin_percent: 0,
        seed: options.seed,
    }
}

const FIRST_PORT: u16 = 7_001;

/// All aggregators in the order of a host's bucket.
fn aggregators(options: &Options, host: HostId) -> Vec<SocketAddr> {
    let count = u16::try_from(options.aggregators).unwrap_or(u16::MAX);
    let all: Vec<SocketAddr> =
        (0..count).map(|at| ([127, 0, 0, 1], FIRST_PORT + at).into()).collect();
    rendezvous::ranked(host.bucket(), &all)
}

fn beat(now_ms: u64, options: &Options, config: &HostConfig, key: &FleetKey, seq: Seq) -> Beat {
    let number = u32::try_from(config.host.0 >> 32).unwrap_or(0);
    Beat::new(
        now_ms,
        BeatConfig {
            host: config.host,
            incarnation: config.incarnation,
            first_seq: seq,
            reserved_to: Seq(seq.0 + SEQ_RESERVE),
            addr: HostAddr { ip: number.to_be_bytes().into(), port: 7_000 },
            flags: 0,
            interval_ms: options.beat_ms,
            key_epoch: key.epoch,
            key: key.sender(Role::Host, config.host.0),
            aggregators: aggregators(options, config.host),
        },
    )
}

impl SimHost {
    /// An empty host that beats as soon as it is polled.
    #[must_use]
    pub fn new(options: &Options, id: HostId, key: &FleetKey) -> Self {
        let config = host_config(options, id, options.slots);
        // Two clocks differ by up to twice what each is off.
        let skew_ms = (id.0 >> 8) % (options.skew_seconds * 2_000 + 1);
        let owner = aggregators(options, id).first().copied();
        let beat = beat(skew_ms, options, &config, key, Seq(id.0 & 0xff_ffff));
        let mut core = Host::new(&config);
        core.set_next_seq(beat.next_seq());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds")]
        let life_us = (options.life_seconds * 1e6) as Micros;
        Self {
            id,
            machine_up: true,
            hostd_up: true,
            machine: 0,
            hostd: 0,
            trouble: Trouble::NONE,
            config,
            core,
            beat,
            boxes: BTreeMap::new(),
            starting: BTreeMap::new(),
            waiting: BTreeMap::new(),
            cancelling: BTreeMap::new(),
            journal: BTreeMap::new(),
            refused: BTreeMap::new(),
            start_us: options.start_us,
            cores: options.cores,
            life_us,
            skew_ms,
            owner: owner.map_or(0, |addr| usize::from(addr.port() - FIRST_PORT)),
        }
    }

    /// Claims as many slots as a word can say, and has them.
    pub fn lie(&mut self, options: &Options) {
        self.config = HostConfig {
            incarnation: self.config.incarnation,
            ..host_config(options, self.id, FREE_MAX)
        };
        let mut core = Host::new(&self.config);
        core.set_next_seq(self.beat.next_seq());
        self.core = core;
    }

    /// Fills it with sandboxes of somebody else.
    pub fn fill(&mut self, now: Micros) {
        for number in 0..self.config.boxes_max {
            let mut id = [0xff; 16];
            id[..4].copy_from_slice(&number.to_be_bytes());
            let ask = Ask {
                launch_id: LaunchId(id),
                body: id,
                named: false,
                shape: shape(),
                budget_ms: 1_000,
                hard_ms: 0,
                idle_ms: 0,
            };
            if let Admit::Begin(sandbox) = self.core.handle_launch(self.ms(now), &ask, |_| ()) {
                let started =
                    self.core.handle_started(self.ms(now), sandbox.local, Steps::default());
                debug_assert!(started.is_ok(), "nobody cancelled it");
            }
        }
    }

    /// Slots that it has.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.config.boxes_max
    }

    /// Whether a placer reaches it.
    #[must_use]
    pub fn reached_by(&self, placer: usize) -> bool {
        self.hostd_up && !self.trouble.port_dead && self.trouble.cut_off != Some(placer)
    }

    /// When its next heartbeat is due, in us.
    #[must_use]
    pub fn beat_at(&self) -> Micros {
        self.us(self.beat.poll_timeout())
    }

    /// When its hostd has something to do, in us.
    #[must_use]
    pub fn due_at(&self) -> Option<Micros> {
        self.core.poll_timeout().map(|at_ms| self.us(at_ms))
    }

    /// The aggregator that placers report it to.
    #[must_use]
    pub const fn owner(&self) -> usize {
        self.owner
    }

    /// The time by its own clock, in ms.
    const fn ms(&self, now: Micros) -> u64 {
        now / 1_000 + self.skew_ms
    }

    /// A time of its own clock, in us of everybody's.
    const fn us(&self, own_ms: u64) -> Micros {
        own_ms.saturating_sub(self.skew_ms).saturating_mul(1_000)
    }

    /// The heartbeat that is due, and the aggregator that it goes to.
    pub fn poll_beat(&mut self, now: Micros, random: u64) -> Option<(usize, Vec<u8>)> {
        if let Some(to) = self.beat.poll_reserve() {
            self.beat.handle_reserved(to);
        }
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let (admission, running) = (self.core.admission(), self.core.running());
        let sent = self.beat.poll(self.ms(now), random, admission, running, &mut out)?;
        self.core.set_next_seq(self.beat.next_seq());
        Some((usize::from(sent.to.port() - FIRST_PORT), out[..sent.len].to_vec()))
    }

    /// A directive came.
    pub fn directed(&mut self, now: Micros, bytes: &[u8]) {
        // What it asks beyond the sender's own settings is not part of any fault here.
        let _ = self.beat.handle_datagram(self.ms(now), bytes);
    }

    fn capacity_changed(&mut self, now: Micros) {
        self.beat.handle_capacity(self.ms(now), self.core.admission());
    }

    /// A launch came from a placer.
    pub fn launch(
        &mut self,
        now: Micros,
        id: LaunchId,
        caller: Caller,
        rng: &mut SmallRng,
        acts: &mut Vec<Act>,
    ) {
        let ask = Ask {
            launch_id: id,
            body: body(id),
            named: caller.is_named(),
            shape: shape(),
            budget_ms: caller.budget_ms,
            hard_ms: 3 * self.life_us / 1_000,
            idle_ms: 0,
        };
        let reply = match self.core.handle_launch(self.ms(now), &ask, |_| ()) {
            Admit::Begin(sandbox) => {
                self.starting.insert(sandbox.local, id);
                self.waiting.entry(sandbox.local).or_default().push(caller);
                let at = now + self.start_takes(rng);
                acts.push(Act::Begin(at, id, sandbox));
                self.core.watch(sandbox.local);
                self.capacity_changed(now);
                return;
            }
            Admit::Pending(sandbox) => {
                self.waiting.entry(sandbox.local).or_default().push(caller);
                return;
            }
            Admit::Started(started) => LaunchReply::Started(started),
            Admit::Refused(refused) => {
                if ask.named {
                    self.refused.insert(id, refused.code);
                }
                LaunchReply::Refused(refused)
            }
            Admit::Failed(fault) => LaunchReply::Failed(fault),
        };
        let local = match &reply {
            LaunchReply::Started(started) => Some(started.sandbox.local),
            _ => None,
        };
        acts.push(Act::Answer(vec![caller], reply, local));
    }

    fn start_takes(&self, rng: &mut SmallRng) -> Micros {
        if self.trouble.black_hole {
            return 1_000;
        }
        // Cores are shared by what starts.
        let crowd = self.starting.len() as u64 / u64::from(self.cores.max(1));
        let takes = self.start_us * self.trouble.slow * (1 + crowd);
        rng.random_range(takes * 4 / 5..=takes * 6 / 5)
    }

    /// A start is over.
    pub fn begun(&mut self, now: Micros, local: u64, rng: &mut SmallRng, acts: &mut Vec<Act>) {
        let Some(id) = self.starting.remove(&local) else { return };
        let sandbox = SandboxId { host: self.id, local };
        let callers = self.waiting.remove(&local).unwrap_or_default();
        let failed = |text: &str| Fault::new(Code::BoxFailed, text);
        let result = if self.trouble.black_hole {
            Err(failed("the box could not be made; nothing is left of it"))
        } else {
            self.core.handle_started(self.ms(now), local, Steps::default())
        };
        let reply = match result {
            Ok(started) => {
                self.boxes.insert(local, (id, started));
                self.journal.insert(id, Fate::Started(started));
                let life = rng.random_range(self.life_us / 2..=self.life_us * 3 / 2);
                acts.push(Act::Runs(now + life, id, local));
                LaunchReply::Started(started)
            }
            Err(fault) => {
                self.core.handle_failed(self.ms(now), local, fault.clone());
                if !matches!(self.journal.get(&id), Some(Fate::Cancelled)) {
                    self.journal.insert(id, Fate::Failed(Box::new(fault.clone())));
                }
                acts.push(Act::Gone(id, sandbox));
                LaunchReply::Failed(fault)
            }
        };
        let started = matches!(reply, LaunchReply::Started(_)).then_some(local);
        acts.push(Act::Answer(callers, reply, started));
        self.answer_cancels(local, acts);
        self.capacity_changed(now);
    }

    fn answer_cancels(&mut self, local: u64, acts: &mut Vec<Act>) {
        let callers = self.cancelling.remove(&local).unwrap_or_default();
        acts.extend(callers.into_iter().map(Act::Cancelled));
    }

    /// A sandbox's program has ended, whether hostd is there or not.
    pub fn ended(&mut self, now: Micros, local: u64, acts: &mut Vec<Act>) {
        let Some((id, started)) = self.boxes.remove(&local) else { return };
        acts.push(Act::Gone(id, started.sandbox));
        if self.hostd_up {
            let exit = Exit { code: 0, why: ExitWhy::Returned };
            self.core.handle_exited(self.ms(now), local, exit);
            self.answer_cancels(local, acts);
            self.capacity_changed(now);
        }
    }

    /// A cancel came.
    pub fn cancel(&mut self, now: Micros, id: LaunchId, caller: Caller, acts: &mut Vec<Act>) {
        match self.core.handle_cancel(self.ms(now), id) {
            Cancelled::Done => acts.push(Act::Cancelled(caller)),
            Cancelled::Ending(sandbox) => {
                self.cancelling.entry(sandbox.local).or_default().push(caller);
            }
        }
        self.journal.insert(id, Fate::Cancelled);
        self.deeds(now, acts);
    }

    /// hostd's time has come.
    pub fn due(&mut self, now: Micros, acts: &mut Vec<Act>) {
        self.core.handle_timeout(self.ms(now));
        self.deeds(now, acts);
    }

    /// A reply reached nobody.
    pub fn undelivered(&mut self, now: Micros, local: u64, budget_ms: u32) {
        self.core.handle_undelivered(self.ms(now), local, budget_ms);
    }

    fn deeds(&mut self, now: Micros, acts: &mut Vec<Act>) {
        while let Some(Deed::Kill(sandbox)) = self.core.poll_deed() {
            if let Some((id, _)) = self.boxes.get(&sandbox.local) {
                acts.push(Act::Reaped(*id, sandbox));
            }
            self.ended(now, sandbox.local, acts);
        }
    }

    /// hostd is gone; what it was starting is lost. Whoever waits finds the stream broken.
    pub fn kill_hostd(&mut self, acts: &mut Vec<Act>) -> Vec<Caller> {
        self.hostd_up = false;
        self.hostd += 1;
        for (local, id) in std::mem::take(&mut self.starting) {
            acts.push(Act::Gone(id, SandboxId { host: self.id, local }));
        }
        let waiting = std::mem::take(&mut self.waiting).into_values();
        waiting.chain(std::mem::take(&mut self.cancelling).into_values()).flatten().collect()
    }

    /// The machine is gone, with all that ran on it.
    pub fn crash(&mut self, acts: &mut Vec<Act>) -> Vec<Caller> {
        let waiting = self.kill_hostd(acts);
        self.machine_up = false;
        self.machine += 1;
        for (id, started) in std::mem::take(&mut self.boxes).into_values() {
            acts.push(Act::Gone(id, started.sandbox));
        }
        waiting
    }

    /// hostd starts: it takes up what lives, and what its journal says.
    pub fn start_hostd(&mut self, now: Micros, options: &Options, key: &FleetKey) {
        let now_ms = self.ms(now);
        (self.machine_up, self.hostd_up) = (true, true);
        self.config.incarnation = Incarnation(self.config.incarnation.0 + 1);
        let seq = Seq(self.beat.next_seq().0 + SEQ_RESERVE);
        self.beat = beat(now_ms, options, &self.config, key, seq);
        self.core = Host::new(&self.config);
        self.core.set_next_seq(seq);
        for (local, (id, started)) in &self.boxes {
            let killed = matches!(self.journal.get(id), Some(Fate::Cancelled));
            let sandbox = Sandbox {
                id: started.sandbox,
                launch_id: *id,
                shape: shape(),
                state: State::Running,
                admitted_ms: now_ms,
                hard_at_ms: Some(now_ms + 3 * self.life_us / 1_000),
                idle_ms: 0,
                used_ms: now_ms,
                lapse_at_ms: None,
                callers: 1,
                ending: None,
                drop_at_ms: None,
                note: (),
            };
            self.core.adopt(body(*id), Fate::Started(*started), sandbox);
            if killed {
                self.core.handle_kill(*local);
            }
        }
        for (id, code) in &self.refused {
            self.core.recall_refused(now_ms, *id, *code);
        }
        for (id, fate) in &self.journal {
            if !self.boxes.values().any(|(live, _)| live == id) {
                self.core.recall(now_ms, *id, body(*id), fate.clone());
            }
        }
    }
}
