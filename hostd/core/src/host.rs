//! The core of one host: admission, what is known of launches, and the lives of sandboxes, as one state machine.
//!
//! It has one owner and no lock. A launch is decided in one call; the box is made outside, and comes back by
//! [`Host::handle_started`] or [`Host::handle_failed`]. Whatever must end is said by [`Host::poll_deed`]; time
//! passes by [`Host::handle_timeout`], due at [`Host::poll_timeout`].
//! Longer than 500 lines: every change of a sandbox's state is in this file.

use std::collections::{BTreeSet, HashMap, VecDeque};

use wire::{
    Code, Fault, HostId, Incarnation, LaunchId, SandboxId, Seq, ShapeId,
    call::{Exit, ExitWhy, State},
    hash::Seeded,
    launch::{Refused, Started, Steps},
    limits::SHAPES_MAX,
};

use crate::{
    admission::{Admission, Resources},
    launches::{BodyHash, Fate, Known, Launches},
    limits::{ENDED_MAX, ENDED_MS, LAPSE_GRACE_MS},
    records::Untold,
    sandbox::{Held, Sandbox, Ties},
    shapes::Shapes,
};

/// What a host is set up with.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its name.
    pub host: HostId,
    /// This start of the daemon.
    pub incarnation: Incarnation,
    /// The fleet's shapes.
    pub shapes: Shapes,
    /// What sandboxes share.
    pub whole: Resources,
    /// Sandboxes at once, whatever their shape.
    pub boxes_max: u32,
    /// Share of the free slots that is not told.
    pub margin_percent: u8,
    /// A secret random number: keys the hashes.
    pub seed: u64,
}

/// A launch as the core needs it.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Its name.
    pub launch_id: LaunchId,
    /// Hash of the request's bytes.
    pub body: BodyHash,
    /// Whether other placers may send it too (PROTOCOL 6.11).
    pub named: bool,
    /// The shape.
    pub shape: ShapeId,
    /// Milliseconds left.
    pub budget_ms: u32,
    /// Milliseconds to live; zero for ever.
    pub hard_ms: u64,
    /// Idle milliseconds; zero for ever.
    pub idle_ms: u64,
}

/// What is answered to a launch, or done first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admit {
    /// Admitted: make its box, then call [`Host::handle_started`] or [`Host::handle_failed`].
    Begin(SandboxId),
    /// The same launch is being started: wait for what comes of it.
    Pending(SandboxId),
    /// The same launch was started: the same answer.
    Started(Started),
    /// No room, draining or overloaded; nothing was done.
    Refused(Refused),
    /// It failed before, or cannot be tried.
    Failed(Fault),
}

/// What the core wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// End a running sandbox; its exit comes back by [`Host::handle_exited`].
    Kill(SandboxId),
}

/// What a cancel leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// Nothing of it runs, and nothing will.
    Done,
    /// Its sandbox is being ended: done when that has stopped.
    Ending(SandboxId),
}

/// One host.
#[derive(Debug)]
pub struct Host<N> {
    pub(crate) host: HostId,
    pub(crate) incarnation: Incarnation,
    pub(crate) admission: Admission,
    pub(crate) launches: Launches,
    pub(crate) sandboxes: HashMap<u64, Held<N>, Seeded>,
    /// Live sandboxes a shape.
    pub(crate) live: [u32; SHAPES_MAX],
    /// When to look at which sandbox: once each. What is due next lies at one edge and what is due last at the other, so that both are
    /// in the cache however many there are.
    due: BTreeSet<(u64, u64)>,
    /// When to drop the record of which ended sandbox, oldest first.
    ended: VecDeque<(u64, u64)>,
    ended_max: usize,
    deeds: VecDeque<Deed>,
    untold: Untold,
    drain_at_ms: Option<u64>,
    made: u64,
    pub(crate) next_seq: Seq,
}

/// Bits of a sandbox's local id that count within one incarnation.
const LOCAL_BITS: u32 = 40;

impl<N> Host<N> {
    /// An empty host.
    ///
    /// # Panics
    /// With an incarnation of 2^24 or more: 16 million restarts.
    #[must_use]
    pub fn new(config: &HostConfig) -> Self {
        assert!(config.incarnation.0 < 1 << (u64::BITS - LOCAL_BITS), "fits a local id");
        let HostConfig { shapes, whole, boxes_max, margin_percent, .. } = config;
        Self {
            host: config.host,
            incarnation: config.incarnation,
            admission: Admission::new(shapes, *whole, *boxes_max, *margin_percent),
            launches: Launches::new(config.seed),
            sandboxes: HashMap::with_hasher(Seeded::new(config.seed)),
            live: [0; SHAPES_MAX],
            due: BTreeSet::new(),
            ended: VecDeque::new(),
            ended_max: ENDED_MAX,
            deeds: VecDeque::new(),
            untold: Untold::default(),
            drain_at_ms: None,
            made: 0,
            next_seq: Seq(0),
        }
    }

    /// Keeps fewer records of ended sandboxes than [`ENDED_MAX`]: many hosts in one process share one cache.
    pub fn set_ended_max(&mut self, ended_max: usize) {
        self.ended_max = ended_max.min(ENDED_MAX);
    }

    /// Decides a launch. `note` makes what the caller keeps with the sandbox, if one is admitted.
    pub fn handle_launch(
        &mut self,
        now_ms: u64,
        ask: &Ask,
        note: impl FnOnce(SandboxId) -> N,
    ) -> Admit {
        match self.launches.look(&ask.launch_id, &ask.body) {
            Known::New => self.admit(now_ms, ask, note),
            Known::Same(fate) => match fate.clone() {
                Fate::Claimed { local } => {
                    self.handle_asked(local);
                    Admit::Pending(self.sandbox_id(local))
                }
                Fate::Started(started) => {
                    self.handle_asked(started.sandbox.local);
                    Admit::Started(started)
                }
                Fate::Failed(fault) => Admit::Failed(*fault),
                Fate::Cancelled => Admit::Failed(cancelled()),
            },
            Known::Conflict => Admit::Failed(Fault::new(
                Code::Conflict,
                "this launch id was used with another request; that launch goes on unchanged",
            )),
            Known::Refused(code) => self.refused(code),
        }
    }

    fn admit(&mut self, now_ms: u64, ask: &Ask, note: impl FnOnce(SandboxId) -> N) -> Admit {
        if ask.budget_ms == 0 {
            let text = "the launch came with no time left; nothing was started";
            return Admit::Failed(Fault::new(Code::BudgetSpent, text));
        }
        if !self.launches.has_room() {
            return self.refused(Code::Overloaded);
        }
        if let Err(code) = self.admission.take(ask.shape) {
            let code = self.refusal(now_ms, ask.launch_id, ask.named, code);
            return self.refused(code);
        }
        self.made += 1;
        let local = (self.incarnation.0 << LOCAL_BITS) | self.made;
        let id = self.sandbox_id(local);
        self.live[ask.shape.index()] += 1;
        let place = self.launches.remember(ask.launch_id, ask.body, Fate::Claimed { local });
        let after = |ms: u64| (ms > 0).then(|| now_ms.saturating_add(ms));
        let sandbox = Sandbox {
            id,
            launch_id: ask.launch_id,
            shape: ask.shape,
            state: State::Claimed,
            admitted_ms: now_ms,
            hard_at_ms: after(ask.hard_ms),
            idle_ms: ask.idle_ms,
            used_ms: now_ms,
            lapse_at_ms: after(u64::from(ask.budget_ms)),
            callers: 1,
            ending: None,
            drop_at_ms: None,
            note: note(id),
        };
        let ties = Ties { launch: Some(place), due_ms: None };
        self.sandboxes.insert(local, Held { sandbox, ties });
        Admit::Begin(id)
    }

    /// Why a launch is said to be refused: one that is named and cannot be remembered is to be asked again.
    fn refusal(&mut self, now_ms: u64, launch_id: LaunchId, named: bool, code: Code) -> Code {
        let kept = !named || self.launches.refuse(now_ms, launch_id, code);
        if kept { code } else { Code::Overloaded }
    }

    fn refused(&self, code: Code) -> Admit {
        Admit::Refused(Refused { word: self.word(), code })
    }

    /// A claimed sandbox that is still being started after its budget is watched from here on: call it when
    /// the start does not end at once.
    pub fn watch(&mut self, local: u64) {
        self.arm(local);
    }

    /// The program of a claimed sandbox was executed: it runs, and this is the answer.
    ///
    /// # Errors
    /// It was cancelled, lapsed or drained meanwhile: end the box, then call [`Host::handle_failed`] with this.
    pub fn handle_started(
        &mut self,
        now_ms: u64,
        local: u64,
        steps: Steps,
    ) -> Result<Started, Fault> {
        let (word, visible_at) = (self.word(), self.visible_at());
        let Some(sandbox) = self.sandboxes.get_mut(&local) else {
            return Err(Fault::new(Code::Internal, "started a sandbox that was not claimed"));
        };
        if let Some(why) = sandbox.ending {
            return Err(ended_before_start(why));
        }
        sandbox.state = State::Running;
        sandbox.used_ms = now_ms;
        sandbox.lapse_at_ms = None;
        let waited_ms = now_ms.saturating_sub(sandbox.admitted_ms);
        sandbox.hard_at_ms = sandbox.hard_at_ms.map(|at_ms| at_ms.saturating_add(waited_ms));
        let started = Started { sandbox: sandbox.id, visible_at, word, steps };
        if let Some(place) = sandbox.ties.launch {
            self.launches.settle(place, Fate::Started(started));
        }
        self.untold.mark(local);
        self.arm(local);
        Ok(started)
    }

    /// A claimed sandbox could not be started, and nothing of it is left.
    pub fn handle_failed(&mut self, now_ms: u64, local: u64, fault: Fault) {
        let Some(sandbox) = self.sandboxes.remove(&local) else { return };
        debug_assert!(sandbox.state == State::Claimed, "what ran has exited, not failed");
        self.disarm(local, sandbox.ties);
        self.free(sandbox.shape);
        let Some(place) = sandbox.ties.launch else { return };
        if self.launches.fate_at(place) != Some(&Fate::Cancelled) {
            self.launches.settle(place, Fate::Failed(Box::new(fault)));
        }
        self.launches.release(now_ms, place);
    }

    /// A claimed sandbox found no box: its launch is refused after all, and nothing of it is left.
    pub fn handle_no_box(
        &mut self,
        now_ms: u64,
        local: u64,
        named: bool,
        mut code: Code,
    ) -> Refused {
        if let Some(sandbox) = self.sandboxes.remove(&local) {
            self.disarm(local, sandbox.ties);
            self.free(sandbox.shape);
            match sandbox.ties.launch {
                Some(place) if self.launches.fate_at(place) == Some(&Fate::Cancelled) => {
                    self.launches.release(now_ms, place);
                }
                place => {
                    place.into_iter().for_each(|place| self.launches.drop_claim(place));
                    code = self.refusal(now_ms, sandbox.launch_id, named, code);
                }
            }
        }
        Refused { word: self.word(), code }
    }

    /// A sandbox has ended, and nothing of it is left. Returns how, as it is told.
    pub fn handle_exited(&mut self, now_ms: u64, local: u64, exit: Exit) -> Option<Exit> {
        let sandbox = self.sandboxes.get_mut(&local).filter(|sandbox| sandbox.is_live())?;
        let exit = Exit { why: sandbox.ending.unwrap_or(exit.why), ..exit };
        sandbox.state = State::Stopped(exit);
        let drop_at_ms = now_ms.saturating_add(ENDED_MS);
        sandbox.drop_at_ms = Some(drop_at_ms);
        let (shape, ties) = (sandbox.shape, sandbox.ties);
        sandbox.ties = Ties::default();
        self.disarm(local, ties);
        self.free(shape);
        if let Some(place) = ties.launch {
            self.launches.release(now_ms, place);
        }
        self.ended.push_back((drop_at_ms, local));
        self.untold.mark(local);
        if self.ended.len() > self.ended_max {
            self.drop_oldest_ended();
        }
        Some(exit)
    }

    /// Ends a launch whatever has become of it, and never starts it later.
    pub fn handle_cancel(&mut self, now_ms: u64, launch_id: LaunchId) -> Cancelled {
        let Some(place) = self.launches.place(&launch_id) else {
            let place = self.launches.remember(launch_id, [0; 16], Fate::Cancelled);
            self.launches.release(now_ms, place);
            return Cancelled::Done;
        };
        let local = match self.launches.fate_at(place) {
            Some(Fate::Claimed { local }) => Some(*local),
            Some(Fate::Started(started)) => Some(started.sandbox.local),
            Some(Fate::Failed(_)) | None => None,
            // A second cancel waits for the same end.
            Some(Fate::Cancelled) => self.live_of(launch_id),
        };
        self.launches.settle(place, Fate::Cancelled);
        let live =
            local.filter(|local| self.sandboxes.get(local).is_some_and(|held| held.is_live()));
        if let Some(local) = live {
            self.end(local, ExitWhy::Killed);
            return Cancelled::Ending(self.sandbox_id(local));
        }
        self.launches.release(now_ms, place);
        Cancelled::Done
    }

    /// A rare look: cancelled twice.
    fn live_of(&self, launch_id: LaunchId) -> Option<u64> {
        let of = |sandbox: &&Held<N>| sandbox.launch_id == launch_id && sandbox.is_live();
        self.sandboxes.values().find(of).map(|sandbox| sandbox.id.local)
    }

    /// Ends a sandbox. Returns whether it is live and so will come to an exit.
    pub fn handle_kill(&mut self, local: u64) -> bool {
        let live = self.sandboxes.get(&local).is_some_and(|held| held.is_live());
        if live {
            self.end(local, ExitWhy::Killed);
        }
        live
    }

    fn end(&mut self, local: u64, why: ExitWhy) {
        let Some(sandbox) = self.sandboxes.get_mut(&local) else { return };
        if sandbox.ending.is_some() {
            return;
        }
        sandbox.ending = Some(why);
        // What is claimed has no box yet that could be killed: `handle_started` tells its maker.
        if sandbox.state != State::Claimed {
            self.deeds.push_back(Deed::Kill(sandbox.id));
        }
    }

    /// It was frozen.
    pub fn handle_paused(&mut self, local: u64) {
        if let Some(sandbox) = self.sandboxes.get_mut(&local)
            && sandbox.state == State::Running
        {
            sandbox.state = State::Paused;
            self.untold.mark(local);
        }
    }

    /// It was thawed.
    pub fn handle_resumed(&mut self, now_ms: u64, local: u64) {
        if let Some(sandbox) = self.sandboxes.get_mut(&local)
            && sandbox.state == State::Paused
        {
            sandbox.state = State::Running;
            sandbox.used_ms = now_ms;
            self.untold.mark(local);
            self.arm(local);
        }
    }

    /// New timeouts, counted from now; zero keeps the old.
    pub fn handle_extend(&mut self, now_ms: u64, local: u64, hard_ms: u64, idle_ms: u64) {
        let Some(sandbox) = self.sandboxes.get_mut(&local) else { return };
        if hard_ms > 0 {
            sandbox.hard_at_ms = Some(now_ms.saturating_add(hard_ms));
        }
        if idle_ms > 0 {
            sandbox.idle_ms = idle_ms;
        }
        sandbox.used_ms = now_ms;
        self.untold.mark(local);
        self.arm(local);
    }

    /// It was used: input, output or a call.
    pub fn handle_used(&mut self, now_ms: u64, local: u64) {
        if let Some(sandbox) = self.sandboxes.get_mut(&local) {
            sandbox.used_ms = now_ms;
            sandbox.lapse_at_ms = None;
        }
    }

    /// An answer reached nobody. If nobody else has one or waits for one, it is reaped, unless somebody asks for it by its
    /// id within the budget.
    pub fn handle_undelivered(&mut self, now_ms: u64, local: u64, budget_ms: u32) {
        if let Some(sandbox) = self.sandboxes.get_mut(&local)
            && sandbox.is_live()
        {
            sandbox.callers = sandbox.callers.saturating_sub(1);
            if sandbox.callers == 0 {
                let wait_ms = u64::from(budget_ms) + LAPSE_GRACE_MS;
                sandbox.lapse_at_ms = Some(now_ms.saturating_add(wait_ms));
                self.arm(local);
            }
        }
    }

    /// Somebody more asks for its answer. One that runs is theirs from here on.
    fn handle_asked(&mut self, local: u64) {
        if let Some(sandbox) = self.sandboxes.get_mut(&local) {
            sandbox.callers = sandbox.callers.saturating_add(1);
            if sandbox.state != State::Claimed {
                sandbox.lapse_at_ms = None;
            }
        }
    }

    /// Takes no new work; what still runs after `deadline_ms` is ended (zero: never). Again changes the deadline.
    pub fn handle_drain(&mut self, now_ms: u64, deadline_ms: u64) {
        self.admission.set_draining(true);
        self.drain_at_ms = (deadline_ms > 0).then(|| now_ms.saturating_add(deadline_ms));
    }

    /// Takes work again.
    pub fn handle_undrain(&mut self) {
        self.admission.set_draining(false);
        self.drain_at_ms = None;
    }

    /// Whether it can start sandboxes.
    pub fn set_sick(&mut self, sick: bool) {
        self.admission.set_sick(sick);
    }

    /// Whether what is started can be written down; see [`Admission::set_full`].
    pub fn set_full(&mut self, full: bool) {
        self.admission.set_full(full);
    }

    /// Says how many boxes of a shape are there or can be made in time; `None`: as many as may be asked for.
    pub fn set_boxes(&mut self, shape: ShapeId, boxes: Option<u32>) {
        self.admission.set_boxes(shape, boxes);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now_ms: u64) {
        while let Some(&(at_ms, local)) = self.due.first()
            && at_ms <= now_ms
        {
            self.due.pop_first();
            let Some(sandbox) = self.sandboxes.get_mut(&local) else { continue };
            sandbox.ties.due_ms = None;
            match sandbox.due() {
                Some((at_ms, why)) if at_ms <= now_ms => self.end(local, why),
                _ => self.arm(local),
            }
        }
        if self.drain_at_ms.is_some_and(|at_ms| at_ms <= now_ms) {
            self.drain_at_ms = None;
            let live = |sandbox: &&Held<N>| sandbox.is_live();
            let mut all: Vec<u64> =
                self.sandboxes.values().filter(live).map(|s| s.id.local).collect();
            all.sort_unstable();
            all.into_iter().for_each(|local| self.end(local, ExitWhy::Lost));
        }
        while self.ended.front().is_some_and(|(at_ms, _)| *at_ms <= now_ms) {
            self.drop_oldest_ended();
        }
        self.launches.forget(now_ms);
    }

    fn drop_oldest_ended(&mut self) {
        if let Some((_, local)) = self.ended.pop_front() {
            self.sandboxes.remove(&local);
        }
    }

    /// When [`Host::handle_timeout`] is due, in ms.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let ended = self.ended.front().map(|(at_ms, _)| *at_ms);
        let due = self.due.first().map(|(at_ms, _)| *at_ms);
        [due, self.drain_at_ms, ended, self.launches.poll_timeout()].into_iter().flatten().min()
    }

    /// From here on changes of sandboxes are to be told; all that are known first.
    pub fn tell_records(&mut self, now_ms: u64) {
        self.untold.begin(now_ms);
    }

    /// A sandbox could not be told of now after all.
    pub fn tell_again(&mut self, local: u64) {
        self.untold.mark(local);
    }

    /// The next sandbox to tell of, if it is still known.
    pub fn poll_record(&mut self, now_ms: u64) -> Option<u64> {
        let Self { untold, sandboxes, .. } = self;
        untold.begin_round(now_ms, || sandboxes.keys().copied().collect());
        loop {
            let local = untold.take()?;
            if self.sandboxes.get(&local).is_some_and(|s| s.state != State::Claimed) {
                return Some(local);
            }
        }
    }

    /// The next thing to do.
    pub fn poll_deed(&mut self) -> Option<Deed> {
        self.deeds.pop_front()
    }

    /// Has a sandbox looked at when something is due. What is due later than it was is found out then, so that use costs nothing.
    pub(crate) fn arm(&mut self, local: u64) {
        let Some(sandbox) = self.sandboxes.get_mut(&local) else { return };
        let Some((at_ms, _)) = sandbox.due() else { return };
        let before_ms = sandbox.ties.due_ms;
        if before_ms.is_some_and(|before_ms| before_ms <= at_ms) {
            return;
        }
        sandbox.ties.due_ms = Some(at_ms);
        before_ms.map(|before_ms| self.due.remove(&(before_ms, local)));
        self.due.insert((at_ms, local));
    }

    /// It need not be looked at any more.
    fn disarm(&mut self, local: u64, ties: Ties) {
        if let Some(at_ms) = ties.due_ms {
            self.due.remove(&(at_ms, local));
        }
    }

    fn free(&mut self, shape: ShapeId) {
        self.live[shape.index()] -= 1;
        self.admission.give(&self.live);
    }

    fn sandbox_id(&self, local: u64) -> SandboxId {
        SandboxId { host: self.host, local }
    }

    /// Says which heartbeat is the next, so that answers can name it.
    pub fn set_next_seq(&mut self, seq: Seq) {
        self.next_seq = seq;
    }
}

fn cancelled() -> Fault {
    Fault::new(Code::Cancelled, "the launch was cancelled; nothing of it runs or will")
}

fn ended_before_start(why: ExitWhy) -> Fault {
    match why {
        ExitWhy::Killed => cancelled(),
        ExitWhy::Lost => Fault::new(
            Code::BudgetSpent,
            "the launch's time ran out, or the host's drain ended it, before its program ran",
        ),
        _ => Fault::new(Code::BudgetSpent, "the sandbox's deadline passed before its program ran"),
    }
}
