//! Launches that came on lanes: who is next, and the usual way of a launch without a task of its own.
//!
//! What a lane brings waits in a fair queue (`placer_core::Fair`) until the thread takes it up, so that a tenant with a thousand times the
//! launches of another delays himself (FAULTS P9). Usually that is at once. A launch whose host has a warm connection then
//! is a record in a slab: its reply comes with all others of the same packet, and the state machine is asked again right
//! there. Whatever is not usual (a known id, a dial, a refusal, silence) goes on as a task, by the same state machine and
//! from the same state ([`Worker::drive_on`]), so that rare ways are written once.
//!
//! Nobody's timer is set for a usual launch: its deadline lies in a wheel that is looked at every [`TICK_US`].

use std::{cell::Cell, rc::Rc};

use bytes::Bytes;
use placer_core::{Launch, Micros, Outcome, Step};
use wire::{
    Code, Fault, HostId,
    launch::{LaunchHead, LaunchReply},
};
use wire_net::{
    lane::{Landed, LaneReplies},
    stream::LaunchLost,
    tls::Peer,
};

use crate::{
    dispatch::{Asked, Ended, Flight, News, news_of},
    known::{Entered, Seat},
    pool::{Link, Outstanding},
    worker::Worker,
};

/// Launches that are taken up before whoever else is ready has a turn.
const TURN_LAUNCHES: usize = 1_024;

/// How finely deadlines of attempts are kept: these are 50 ms at least.
pub(crate) const TICK_US: Micros = 10_000;
/// Ticks of the wheel; a deadline further away is looked at more than once.
const WHEEL_TICKS: usize = 512;

/// The placer's end of a client's lane.
pub(crate) struct ClientLane {
    pub(crate) replies: LaneReplies,
    pub(crate) peer: Rc<Peer>,
    /// What its tenant is known by; none for an operator, who may name any.
    tenant: Option<u64>,
    pub(crate) outstanding: Cell<usize>,
}

/// A launch that came and was checked.
pub(crate) struct Arrived {
    lane: Rc<ClientLane>,
    tag: u32,
    payload: Bytes,
    asked: AskedHere,
    came: Micros,
}

/// [`Asked`], without the bytes.
#[derive(Clone, Copy)]
struct AskedHere {
    id: wire::LaunchId,
    tenant: u64,
    shape: wire::ShapeId,
    head: LaunchHead,
}

impl Arrived {
    fn asked(&self) -> Asked<'_> {
        let AskedHere { id, tenant, shape, head } = self.asked;
        Asked { id, tenant, shape, head, request: &self.payload[LaunchHead::BYTES..] }
    }
}

/// A launch at a host, without a task.
pub(crate) struct Direct {
    launch: Launch,
    arrived: Arrived,
    seat: Seat,
    host: HostId,
    _outstanding: Outstanding,
}

/// Direct launches by token: an index, and a count that tells two users of it apart.
#[derive(Default)]
pub(crate) struct Directs {
    slots: Vec<(u32, Option<Direct>)>,
    free: Vec<u32>,
    wheel: Vec<Vec<u64>>,
    /// The tick that is looked at next.
    tick: u64,
}

impl Directs {
    fn put(&mut self, direct: Direct) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let (count, slot) = &mut self.slots[index as usize];
        *slot = Some(direct);
        u64::from(*count) << 32 | u64::from(index)
    }

    fn slot(&mut self, token: u64) -> Option<&mut (u32, Option<Direct>)> {
        let index = usize::try_from(token & u64::from(u32::MAX)).ok()?;
        let slot = self.slots.get_mut(index)?;
        (u64::from(slot.0) == token >> 32).then_some(slot)
    }

    fn take(&mut self, token: u64) -> Option<Direct> {
        let (count, slot) = self.slot(token)?;
        let direct = slot.take()?;
        *count = count.wrapping_add(1);
        self.free.push(u32::try_from(token & u64::from(u32::MAX)).unwrap_or_default());
        Some(direct)
    }

    fn wait(&mut self, token: u64, until: Micros) {
        if self.wheel.is_empty() {
            self.wheel.resize_with(WHEEL_TICKS, Vec::new);
        }
        // The tick after it, at most a turn of the wheel away: what is not due then is put in again.
        let tick = (until / TICK_US + 1).clamp(self.tick, self.tick + WHEEL_TICKS as u64 - 1);
        let bucket = usize::try_from(tick % WHEEL_TICKS as u64).unwrap_or_default();
        self.wheel[bucket].push(token);
    }

    /// Tokens whose time may have come.
    fn due(&mut self, now: Micros) -> Vec<u64> {
        let mut due = Vec::new();
        let last = now / TICK_US;
        if self.wheel.is_empty() {
            self.tick = last + 1;
            return due;
        }
        if last >= self.tick + WHEEL_TICKS as u64 {
            self.tick = last + 1 - WHEEL_TICKS as u64;
        }
        while self.tick <= last {
            let bucket = usize::try_from(self.tick % WHEEL_TICKS as u64).unwrap_or_default();
            due.append(&mut self.wheel[bucket]);
            self.tick += 1;
        }
        due
    }
}

impl ClientLane {
    pub(crate) fn new(worker: &Worker, replies: LaneReplies, peer: &Rc<Peer>) -> Rc<Self> {
        let tenant = peer.tenant().map(|tenant| worker.known.hash(tenant));
        Rc::new(Self { replies, peer: Rc::clone(peer), tenant, outstanding: Cell::new(0) })
    }

    fn answer(&self, tag: u32, reply: &LaunchReply) {
        self.outstanding.set(self.outstanding.get() - 1);
        self.replies.reply(tag, reply);
    }
}

impl Worker {
    /// A launch came on a lane: it is checked, and waits for its turn.
    pub(crate) fn arrive(&self, now: Micros, lane: &Rc<ClientLane>, tag: u32, payload: Bytes) {
        lane.outstanding.set(lane.outstanding.get() + 1);
        let checked = Asked::check(&payload, &lane.peer, |name| {
            lane.tenant.unwrap_or_else(|| self.known.hash(name))
        });
        let asked = match checked {
            Ok(Asked { id, tenant, shape, head, .. }) => AskedHere { id, tenant, shape, head },
            Err(fault) => return lane.answer(tag, &self.denied(fault)),
        };
        // All of a packet come in before the first is taken up.
        self.known.warm(&asked.id);
        let tenant = asked.tenant;
        let cost = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let arrived = Arrived { lane: Rc::clone(lane), tag, payload, asked, came: now };
        let pushed = self.waiting.borrow_mut().push(tenant, cost, arrived);
        if let Err(Arrived { lane, tag, .. }) = pushed {
            let message =
                "too many launches of this tenant wait at this placer; nothing was started";
            lane.answer(tag, &self.denied(Fault::new(Code::Overloaded, message)));
        }
    }

    /// Takes up what waits, as far as there is room; the rest follows when others have had their turn.
    pub(crate) fn pump(self: &Rc<Self>, now: Micros) {
        for _ in 0..TURN_LAUNCHES {
            let room = self.shared.config.launches_max.saturating_sub(self.under_way.get());
            if room == 0 {
                return;
            }
            let Some(next) = self.waiting.borrow_mut().pop(room) else { return };
            self.take_up(now, next);
        }
        self.pump.notify_one();
    }

    /// Takes up what a full turn left, for ever.
    pub(crate) async fn pump_on(self: Rc<Self>) {
        loop {
            self.pump.notified().await;
            tokio::task::yield_now().await;
            self.pump(self.now());
        }
    }

    fn take_up(self: &Rc<Self>, now: Micros, arrived: Arrived) {
        self.under_way.set(self.under_way.get() + 1);
        let asked = arrived.asked();
        let start = asked.head.budget_ms > 0;
        let digest = self.known.digest(asked.request);
        match self.known.enter(asked.id, asked.tenant, digest, start) {
            Entered::New(seat) if !asked.head.named && self.shared.store.is_none() => {
                self.go(now, arrived, seat);
            }
            entered => {
                let worker = Rc::clone(self);
                tokio::task::spawn_local(async move {
                    let reply = worker.entered(&arrived.asked(), entered).await;
                    worker.done(&arrived);
                    arrived.lane.answer(arrived.tag, &reply);
                });
            }
        }
    }

    /// Begins a launch: directly if its host has a warm connection.
    fn go(self: &Rc<Self>, now: Micros, arrived: Arrived, seat: Seat) {
        let asked = arrived.asked();
        // Its budget runs from when it came.
        let (launch, step) = self.decide(|dispatch, table| {
            let budget_ms = asked.head.budget_ms;
            let mut launch = Launch::new(arrived.came, asked.shape, budget_ms, dispatch);
            let step = launch.poll(now, table, dispatch);
            (launch, step)
        });
        let Step::Send { host, budget_ms, .. } = step else {
            return self.go_on(arrived, launch, HostId(0), Some(step), Flight::Nothing);
        };
        match self.addr_of(host).and_then(|addr| self.pool.open(host, addr.into())) {
            Some(link) => self.send_direct(now, arrived, seat, launch, (host, budget_ms), &link),
            None => self.go_on(arrived, launch, host, Some(step), Flight::Nothing),
        }
    }

    fn send_direct(
        self: &Rc<Self>,
        now: Micros,
        arrived: Arrived,
        seat: Seat,
        mut launch: Launch,
        (host, budget_ms): (HostId, u32),
        link: &Rc<Link>,
    ) {
        self.metrics.attempts.inc();
        let step = self.decide(|dispatch, table| launch.poll(now, table, dispatch));
        let Step::Wait { until } = step else {
            // Its time is over already; nothing was sent.
            return self.go_on(arrived, launch, host, Some(step), Flight::Nothing);
        };
        let head = LaunchHead { budget_ms, named: false };
        let mut directs = self.directs.borrow_mut();
        let outstanding = link.outstanding();
        let token = directs.put(Direct { launch, arrived, seat, host, _outstanding: outstanding });
        let Some((_, Some(direct))) = directs.slot(token) else { return };
        let sent = link.lane.launch_direct(token, head, direct.arrived.asked().request);
        match sent {
            Ok(()) => directs.wait(token, until),
            Err(lost) => {
                let direct = directs.take(token);
                drop(directs);
                if let Some(direct) = direct {
                    self.tell_direct(direct, news_of(Err(lost)));
                }
            }
        }
    }

    /// Replies came.
    pub(crate) fn landed(self: &Rc<Self>, landed: &mut Vec<Landed>) {
        let now = self.now();
        for Landed { token, reply } in landed.drain(..) {
            match reply {
                Ok(bytes) => self.replied(now, token, &bytes),
                Err(lost) => self.lost(token, lost),
            }
        }
        // There is room again.
        if !self.waiting.borrow().is_empty() {
            self.pump(now);
        }
    }

    fn lost(self: &Rc<Self>, token: u64, lost: LaunchLost) {
        let direct = self.directs.borrow_mut().take(token);
        if let Some(direct) = direct {
            self.tell_direct(direct, news_of(Err(lost)));
        }
    }

    /// A host answered: a start ends the launch right here.
    fn replied(self: &Rc<Self>, now: Micros, token: u64, bytes: &[u8]) {
        let started = match LaunchReply::from_bytes(bytes) {
            Ok(LaunchReply::Started(started)) => started,
            Ok(reply) => {
                let direct = self.directs.borrow_mut().take(token);
                if let Some(direct) = direct {
                    self.tell_direct(direct, News::Reply(reply));
                }
                return;
            }
            Err(_) => {
                let fault = Fault::new(Code::Unknown, "the host sent what is no reply");
                return self.lost(token, LaunchLost::Unknown(fault));
            }
        };
        let mut directs = self.directs.borrow_mut();
        let Some((_, Some(direct))) = directs.slot(token) else { return };
        // In place: a record is half a kilobyte.
        let step = self.decide(|dispatch, table| {
            let reply = LaunchReply::Started(started);
            direct.launch.handle_reply(now, direct.host, reply, table, dispatch);
            direct.launch.poll(now, table, dispatch)
        });
        let Some(Direct { launch, arrived, seat, host, .. }) = directs.take(token) else { return };
        drop(directs);
        let Step::Done(Outcome::Started(started)) = step else {
            return self.go_on(arrived, launch, host, Some(step), Flight::Nothing);
        };
        self.known.leave_started(seat, started);
        self.metrics.started.inc();
        self.done_at(now, &arrived);
        arrived.lane.outstanding.set(arrived.lane.outstanding.get() - 1);
        arrived.lane.replies.reply_bytes(arrived.tag, bytes);
    }

    /// Something unusual happened to a direct launch: its task goes on from there.
    fn tell_direct(self: &Rc<Self>, direct: Direct, news: News) {
        let Direct { mut launch, arrived, host, .. } = direct;
        self.tell(&mut launch, host, news);
        self.go_on(arrived, launch, host, None, Flight::Nothing);
    }

    fn go_on(
        self: &Rc<Self>,
        arrived: Arrived,
        launch: Launch,
        host: HostId,
        step: Option<Step>,
        flight: Flight<'static>,
    ) {
        let worker = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let asked = arrived.asked();
            let ended: Ended = worker.drive_on(&asked, launch, host, step, flight).await;
            let reply = worker.ended(asked.id, &ended);
            worker.done(&arrived);
            arrived.lane.answer(arrived.tag, &reply);
        });
    }

    fn done(self: &Rc<Self>, arrived: &Arrived) {
        self.done_at(self.now(), arrived);
        if !self.waiting.borrow().is_empty() {
            self.pump.notify_one();
        }
    }

    fn done_at(&self, now: Micros, arrived: &Arrived) {
        self.under_way.set(self.under_way.get() - 1);
        self.waiting.borrow_mut().done(arrived.asked.tenant);
        self.observe(now.saturating_sub(arrived.came));
    }

    /// Looks for direct launches whose host has been silent for too long. Called every tick.
    pub(crate) fn tick(self: &Rc<Self>, now: Micros) {
        let due = self.directs.borrow_mut().due(now);
        for token in due {
            let mut directs = self.directs.borrow_mut();
            let Some((_, Some(direct))) = directs.slot(token) else { continue };
            let step = self.decide(|dispatch, table| direct.launch.poll(now, table, dispatch));
            if let Step::Wait { until } = step
                && until > now
            {
                directs.wait(token, until);
                continue;
            }
            let Some(direct) = directs.take(token) else { continue };
            drop(directs);
            let Direct { launch, arrived, host, .. } = direct;
            self.go_on(arrived, launch, host, Some(step), Flight::Nothing);
        }
    }
}
