//! Keeping boxes parked: made when nobody waits, up to each shape's number and the slots there are.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::boxes::{Boxed, Mould, State};
use super::setup::check;
use super::{SHAPES_MAX, SLOTS, Spawning};
use crate::cgroup::{Group, GroupLimits};
use crate::error::Fault;
use crate::spec::{Config, Event, Exited, PoolState, Shape, UIDS_A_BOX};

/// Boxes being made at once. Each does its own work on whatever core is free.
const PREPARING_MAX: usize = 4;
/// Parked boxes of a shape that have a network namespace of their own, at most a quarter of them: where networks are
/// wanted often, those that were used do not serve again, and so there are more.
const OWN_NETWORKS: usize = 2;
/// A program that was just executed gets this long before boxes are made again, unless a pool is half empty: what
/// makes a box would take the core from under its first instructions.
const QUIET: Duration = Duration::from_micros(500);
const BACK_OFF_FIRST: Duration = Duration::from_millis(10);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// From here on boxes cannot be counted on to be made in time: some failures in a row.
const FAILING: Duration = Duration::from_millis(100);

/// When boxes may be made again after one could not be.
pub(super) struct Refill {
    not_before: Option<Instant>,
    back_off: Duration,
    quiet_until: Option<Instant>,
}

impl Refill {
    pub(super) fn new() -> Self {
        Self { not_before: None, back_off: BACK_OFF_FIRST, quiet_until: None }
    }

    fn failed(&mut self) {
        self.not_before = Some(Instant::now() + self.back_off);
        self.back_off = (self.back_off * 2).min(BACK_OFF_MAX);
    }

    /// A program was executed.
    pub(super) fn hush(&mut self) {
        self.quiet_until = Some(Instant::now() + QUIET);
    }

    /// Whether boxes have failed to be made for a while: what is parked is all there is.
    fn is_failing(&self) -> bool {
        self.back_off > FAILING
    }

    fn quiet_for(&self, now: Instant) -> Duration {
        self.quiet_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    fn succeeded(&mut self) {
        self.not_before = None;
        self.back_off = BACK_OFF_FIRST;
    }
}

pub(super) fn limits_of(shape: &Shape) -> GroupLimits {
    GroupLimits { cpu_millis: shape.cpu_millis, memory_bytes: shape.memory_bytes, pids: shape.pids }
}

impl Spawning {
    /// The shape that lacks boxes most, if one may be made now.
    fn shape_in_need(&self, launching: bool) -> Option<usize> {
        if self.stopping.is_some() || self.free_slots.is_empty() {
            return None;
        }
        let preparing = self.tally.total(State::Preparing);
        if preparing >= PREPARING_MAX {
            return None;
        }
        // A box that is being made takes the core of one that is being launched: while one is, only
        // the emptier half of a pool is filled.
        let lack = |shape: usize| {
            let parked =
                if launching { self.parked_wanted(shape) / 2 } else { self.parked_wanted(shape) };
            let target = self.waiting_for(shape) + parked;
            target.saturating_sub(self.tally.count(shape, &[State::Preparing, State::Parked]))
        };
        (0..self.config.shapes.len()).filter(|s| lack(*s) > 0).max_by_key(|s| lack(*s))
    }

    fn waiting_for(&self, shape: usize) -> usize {
        let name = &self.config.shapes[shape].name;
        self.waiting.iter().filter(|w| w.claim.shape == *name).count()
    }

    fn parked_wanted(&self, shape: usize) -> usize {
        if self.retired.contains(&shape) { 0 } else { self.config.shapes[shape].parked as usize }
    }

    /// A parked box that nobody waits for any more: its claim was killed or ran out of time. Left alone, such boxes
    /// could take every slot from the other shapes.
    fn surplus(&self) -> Option<u32> {
        (0..self.config.shapes.len()).find_map(|shape| {
            let wanted = self.waiting_for(shape) + self.parked_wanted(shape);
            let is_over = self.tally.count(shape, &[State::Parked]) > wanted;
            is_over.then(|| self.tally.ready(shape, false)).flatten()
        })
    }

    /// Whether the next box should make a network namespace of its own: claims that want one wait for it, and a few are
    /// kept for those to come.
    fn lacks_own_network(&self, shape: usize) -> bool {
        let name = &self.config.shapes[shape].name;
        let wanted = |w: &&super::Waiting| w.claim.network.is_some() && w.claim.shape == *name;
        let waiting = self.waiting.iter().filter(wanted).count();
        let kept = OWN_NETWORKS.min(self.parked_wanted(shape) / 4);
        self.tally.own_networks(shape) < waiting + kept
    }

    pub(super) fn refill_due(&self, now: Instant) -> Option<Duration> {
        if self.surplus().is_some() {
            return Some(Duration::ZERO);
        }
        let launching = self.tally.total(State::Starting) > 0;
        let quiet = self.refill.quiet_for(now);
        let held =
            self.refill.not_before.map_or(Duration::ZERO, |t| t.saturating_duration_since(now));
        if self.shape_in_need(launching || !quiet.is_zero()).is_some() {
            return Some(held);
        }
        self.shape_in_need(launching)?;
        Some(held.max(quiet))
    }

    /// Makes at most one box, or takes one away that is too many.
    pub(super) fn refill(&mut self) {
        let now = Instant::now();
        if let Some(built) = self.surplus().and_then(|slot| self.boxes.get_mut(&slot)) {
            return built.kill();
        }
        if self.refill.not_before.is_some_and(|t| t > now) {
            return;
        }
        let launching = self.tally.total(State::Starting) > 0;
        let busy = launching || !self.refill.quiet_for(now).is_zero();
        let Some(shape) = self.shape_in_need(busy) else { return };
        if let Err(why) = self.make_box(shape) {
            super::log(format_args!("a box could not be made, trying again later: {why}"));
            self.could_not_make();
        }
    }

    fn make_box(&mut self, shape: usize) -> Result<(), Fault> {
        let Some(slot) = self.free_slots.pop() else { return Ok(()) };
        let limits = limits_of(&self.config.shapes[shape]);
        let group = match self.groups.remove(&slot) {
            // One that cannot be reset is dropped here and found again by its name.
            Some(mut group) => {
                let set = group.reset().and_then(|()| group.favour(true));
                set.and_then(|()| group.limit(&limits)).map(|()| group)
            }
            None => Group::make(&self.layout, slot, &limits),
        };
        let group = match group {
            Ok(group) => group,
            Err(e) => {
                self.free_slots.push(slot);
                return Err(Fault::os("cgroup", &e));
            }
        };
        let own_network = self.lacks_own_network(shape);
        let made = Boxed::make(Mould {
            slot,
            shape,
            uid_base: self.config.uid_base + slot * UIDS_A_BOX,
            group,
            dev: self.dev.as_fd(),
            filters: &self.filters,
            tally: &self.tally,
            nets: &mut self.nets,
            own_network,
        });
        match made {
            Ok(built) => {
                let token = SLOTS + 2 * u64::from(slot);
                let watched = self
                    .watch(&built.control, token)
                    .and_then(|()| self.watch(&built.pidfd, token + 1));
                self.boxes.insert(slot, built);
                if let Err(e) = watched {
                    self.destroy(slot);
                    return Err(Fault::os("watch a box", &e));
                }
                Ok(())
            }
            Err(failed) => {
                let (group, why) = *failed;
                self.keep(slot, group);
                Err(why)
            }
        }
    }

    /// Takes a slot and its groups back.
    fn keep(&mut self, slot: u32, group: Group) {
        if group.is_used_once() {
            group.remove();
        } else {
            self.groups.insert(slot, group);
        }
        self.free_slots.push(slot);
        if self.free_slots.len() == 1 {
            // There were none: what was told of the pools is no longer so.
            self.tell_pools();
        }
    }

    /// Kills a box that nobody watches and takes its slot back.
    fn destroy(&mut self, slot: u32) {
        if let Some(mut built) = self.boxes.remove(&slot) {
            built.kill();
            built.wait_for_end();
            self.keep(slot, built.group);
        }
    }

    /// A box's process has ended: hears its last words, tells hostd, takes the slot back.
    pub(super) fn bury(&mut self, slot: u32) {
        if !self.boxes.get(&slot).is_some_and(Boxed::collect) {
            return;
        }
        while self.listen_to(slot) {}
        let Some(mut built) = self.boxes.remove(&slot) else { return };
        if let Some(net) = built.net.take() {
            self.nets.give_back(net);
        }
        let _ = epoll::delete(&self.epoll, &built.control);
        let _ = epoll::delete(&self.epoll, &built.pidfd);
        let stats = built.group.stats();
        let shape = self.config.shapes[built.shape].name.clone();
        if !built.was_ready && self.stopping.is_none() {
            self.could_not_make();
        }
        for (_, pending) in built.pending {
            let why = Fault::BoxDied { what: "a question to it".into() };
            self.answer(pending.from, crate::msg::Answer::Failed(why), Vec::new());
        }
        if let Some(claimed) = built.claimed {
            self.by_id.remove(&claimed.id);
            if claimed.started_ns == 0 {
                let why = Fault::BoxDied { what: "its start".into() };
                self.answer(claimed.from, crate::msg::Answer::Failed(why), Vec::new());
            } else {
                // Killed without a word: by us, or by the kernel for want of memory.
                let mut status = built.exit.unwrap_or(crate::spec::ExitStatus {
                    code: None,
                    signal: Some(libc::SIGKILL),
                    oom: false,
                });
                status.oom = stats.oom_kills > 0;
                let exited = Exited { id: claimed.id, shape, status, stats };
                if self.exited.len() >= crate::EXITS_MAX {
                    self.exited.pop_front();
                }
                self.exited.push_back(exited.clone());
                self.emit(Event::Exited(exited));
            }
        }
        self.keep(slot, built.group);
    }

    /// Kills what has been parking for too long: it holds a place of the few that may.
    pub(super) fn expire_parking(&mut self) {
        if self.tally.total(State::Preparing) == 0 {
            return;
        }
        for built in self.boxes.values_mut() {
            let late = built.made_at.elapsed() > super::PARKING_MAX;
            if late && built.entry.state() == State::Preparing {
                super::log(format_args!("box {} does not park and is killed", built.slot));
                built.kill();
            }
        }
    }

    /// Takes a new list of shapes: those of a known name change, the rest are added, and what is not
    /// named any more takes no claims. Running boxes stay as they are.
    pub(super) fn reshape(&mut self, shapes: Vec<Shape>) -> Result<(), Fault> {
        let bad = |what| Fault::Os { what, errno: libc::EINVAL };
        let wanted = Config { shapes, ..self.config.clone() };
        check(&wanted).map_err(bad)?;
        let names = |list: &[Shape], name: &str| list.iter().position(|s| s.name == name);
        let new = wanted.shapes.iter().filter(|s| names(&self.config.shapes, &s.name).is_none());
        if self.config.shapes.len() + new.count() > SHAPES_MAX {
            let why = format!("more than {SHAPES_MAX} shapes in the life of a spawner");
            return Err(bad(why));
        }
        let mut stale = Vec::new();
        for (index, shape) in self.config.shapes.iter().enumerate() {
            match names(&wanted.shapes, &shape.name) {
                Some(at) if limits_of(shape) == limits_of(&wanted.shapes[at]) => {
                    self.retired.remove(&index);
                }
                Some(_) => {
                    self.retired.remove(&index);
                    stale.push(index);
                }
                None => {
                    self.retired.insert(index);
                    stale.push(index);
                }
            }
        }
        for shape in wanted.shapes {
            match names(&self.config.shapes, &shape.name) {
                Some(index) => self.config.shapes[index] = shape,
                None => self.config.shapes.push(shape),
            }
        }
        self.tally.grow(self.config.shapes.len());
        for built in self.boxes.values_mut().filter(|b| stale.contains(&b.shape)) {
            if matches!(built.entry.state(), State::Preparing | State::Parked) {
                built.kill();
            }
        }
        Ok(())
    }

    /// The shape of this name, if claims may ask for it.
    pub(super) fn shape_named(&self, name: &str) -> Option<usize> {
        let index = self.config.shapes.iter().position(|s| s.name == name)?;
        (!self.retired.contains(&index)).then_some(index)
    }

    fn could_not_make(&mut self) {
        let was = self.refill.is_failing();
        self.refill.failed();
        if self.refill.is_failing() != was {
            self.tell_pools();
        }
    }

    /// A box parked: they can be made.
    pub(super) fn could_make(&mut self) {
        let was = self.refill.is_failing();
        self.refill.succeeded();
        if was {
            self.tell_pools();
        }
    }

    fn tell_pools(&mut self) {
        for shape in 0..self.config.shapes.len() {
            if !self.retired.contains(&shape) {
                self.emit(Event::Pool(self.pool_state(shape)));
            }
        }
    }

    /// Tells hostd when a pool has just run out of parked boxes, or has one again; and of every change while no more
    /// can be made.
    pub(super) fn tell_if_empty(&mut self, shape: usize, parked: usize) {
        let all_there_is = self.refill.is_failing() || self.free_slots.is_empty();
        if all_there_is || self.tally.count(shape, &[State::Parked]) == parked {
            self.emit(Event::Pool(self.pool_state(shape)));
        }
    }

    pub(super) fn pool_state(&self, shape: usize) -> PoolState {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        PoolState {
            shape: self.config.shapes[shape].name.clone(),
            parked: number(self.tally.count(shape, &[State::Parked])),
            running: number(self.tally.count(shape, &[State::Starting, State::Running])),
            slots_left: if self.refill.is_failing() { 0 } else { number(self.free_slots.len()) },
        }
    }
}
