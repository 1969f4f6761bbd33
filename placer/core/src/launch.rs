//! One launch, from its first attempt to its outcome.
//!
//! The caller calls [`Launch::poll`] after each `handle_*` and when a wait ends, and does what the [`Step`] says. Rules, of
//! PROTOCOL 6 and DESIGN 5: refused goes to the other candidate, then to fresh picks; failed is reported and
//! goes elsewhere; no room known anywhere is asked of one host all the same; unknown (sent, and no answer) is asked again of the *same* host under the same id, then cancelled
//! there, and goes elsewhere only when the cancel was answered or the caller knows that nothing of it is left. The
//! budget is time left and shrinks; attempts are bounded; each retry that is not a refusal costs a token of the thread's budget.
//!
//! Left out: the request's bytes and the connections. Everything here is about one host at a time.
//! Longer than 500 lines: one state machine, whose transitions are argued against one another.

use wire::{
    Code, Fault, HostId, ShapeId,
    launch::{LaunchReply, Refused, Started},
    limits::{ATTEMPTS_MAX, BUDGET_MS_MAX},
};

use crate::{
    Micros,
    dispatch::{Dispatch, Report, Verdict},
    select::{Pick, Picked},
    sync::Words,
    table::{CapacityTable, Reservation},
};

/// Asked again of a host that did not answer, before it is cancelled there.
const ASKED_AGAIN_MAX: u32 = 2;

/// Time between two messages to a host whose connection just broke: a daemon that was restarted is back in tens of
/// milliseconds. Each further message waits four times as long, up to an eighth of the time left.
const PACE_US: Micros = 20_000;

/// What the caller does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the launch to this host, with so much budget; then poll again.
    Send {
        /// Where to.
        host: HostId,
        /// For [`wire::launch::LaunchHead`].
        budget_ms: u32,
        /// Sent there before, and the answer did not come: the host may hold it already.
        again: bool,
    },
    /// Send [`wire::call::Call::Cancel`] to this host; then poll again.
    Cancel {
        /// Where to.
        host: HostId,
    },
    /// Nothing until an answer comes or this time.
    Wait {
        /// When to poll again.
        until: Micros,
    },
    /// It is over.
    Done(Outcome),
}

/// How a launch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs.
    Started(Started),
    /// It does not run, unless the code is [`Code::Unknown`].
    Failed(Fault),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No host holds it: pick one.
    Choosing,
    /// Send it (again) to its host at this time.
    Due { at: Micros, again: bool },
    /// Sent; an answer should come.
    Sent { at: Micros, until: Micros },
    /// Cancel it on its host at this time.
    CancelDue { at: Micros },
    /// A cancel was sent.
    Cancelling { until: Micros },
    /// The outcome is there.
    Done,
}

/// A launch under way.
#[derive(Debug)]
pub struct Launch {
    shape: ShapeId,
    deadline: Micros,
    state: State,
    held: Option<Reservation>,
    other: Option<u32>,
    attempts: u32,
    asked_again: u32,
    /// Messages to this host that were paced.
    paced: u32,
    excluded: [HostId; ATTEMPTS_MAX as usize],
    excluded_len: usize,
    failed: u32,
    refused: u32,
    aborted: bool,
    hoped: bool,
    fault: Option<Fault>,
    outcome: Option<Outcome>,
}

impl Launch {
    /// A launch of `shape` with so many milliseconds to spend from `now` on.
    pub fn new(now: Micros, shape: ShapeId, budget_ms: u32, dispatch: &mut Dispatch) -> Self {
        dispatch.offered();
        Self {
            shape,
            deadline: now + u64::from(budget_ms.min(BUDGET_MS_MAX)) * 1_000,
            state: State::Choosing,
            held: None,
            other: None,
            attempts: 0,
            asked_again: 0,
            paced: 0,
            excluded: [HostId(0); ATTEMPTS_MAX as usize],
            excluded_len: 0,
            failed: 0,
            refused: 0,
            aborted: false,
            hoped: false,
            fault: None,
            outcome: None,
        }
    }

    /// The same, with a pick that was made in a batch.
    pub fn with_pick(
        now: Micros,
        shape: ShapeId,
        budget_ms: u32,
        picked: Picked,
        dispatch: &mut Dispatch,
    ) -> Self {
        let mut launch = Self::new(now, shape, budget_ms, dispatch);
        launch.hold(now, picked);
        launch
    }

    /// Attempts so far: launches sent, to whatever host.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The host that holds it or may hold it.
    #[must_use]
    pub fn host(&self) -> Option<HostId> {
        self.held.as_ref().map(|held| held.host)
    }

    /// What to do now.
    pub fn poll<W: Words>(
        &mut self,
        now: Micros,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) -> Step {
        if self.state == State::Choosing {
            self.choose(now, table, dispatch);
        }
        match self.state {
            State::Sent { until, .. } if now >= until => self.silent(now, false, table, dispatch),
            State::Cancelling { until } if now >= until => {
                self.state = State::CancelDue { at: now };
            }
            _ => {}
        }
        if now >= self.deadline && !matches!(self.state, State::Done) {
            self.out_of_time(table);
        }
        match (self.state, self.host()) {
            (State::Due { at, again }, Some(host)) if now >= at => {
                self.attempts += 1;
                let until = now + self.wait(now, dispatch);
                self.state = State::Sent { at: now, until };
                Step::Send { host, budget_ms: self.left_ms(now), again }
            }
            (State::CancelDue { at }, Some(host)) if now >= at => {
                let (least, _) = dispatch.policy.wait_us;
                let left = self.deadline.saturating_sub(now);
                self.state = State::Cancelling { until: now + (left / 2).max(least).min(left) };
                Step::Cancel { host }
            }
            (State::Due { at, .. } | State::CancelDue { at }, _) => Step::Wait { until: at },
            (State::Sent { until, .. } | State::Cancelling { until }, _) => Step::Wait { until },
            (State::Choosing | State::Done, _) => Step::Done(self.outcome()),
        }
    }

    /// An answer of `host`. One that comes from a host that was given up, or after a cancel, is ignored: the cancel's answer
    /// decides.
    pub fn handle_reply<W: Words>(
        &mut self,
        now: Micros,
        host: HostId,
        reply: LaunchReply,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        let sent = match self.state {
            State::Sent { at, .. } => at,
            State::Due { again: true, .. } => now, // Late, but there before it was asked again.
            _ => return,
        };
        if self.host() != Some(host) {
            return;
        }
        match reply {
            LaunchReply::Started(started) => {
                self.judge(Verdict::Well(now.saturating_sub(sent)), table, dispatch);
                if let Some(held) = self.held.take() {
                    table.settle(held, &started);
                }
                self.finish(Outcome::Started(started));
            }
            LaunchReply::Refused(refused) => self.refused(host, &refused, table, dispatch),
            LaunchReply::Failed(fault) => self.failed(now, sent, fault, table, dispatch),
        }
    }

    /// The launch did not leave this machine: no connection to `host`. It may be sent elsewhere, if an earlier try did not
    /// reach the same host.
    pub fn handle_unsent<W: Words>(
        &mut self,
        now: Micros,
        host: HostId,
        code: Code,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        if self.host() != Some(host) || !matches!(self.state, State::Sent { .. }) {
            return;
        }
        if self.asked_again > 0 {
            return self.silent(now, true, table, dispatch);
        }
        self.bad(code, table, dispatch);
        self.fault = Some(Fault::new(code, format!("host {host} cannot be reached")));
        self.elsewhere(table, dispatch, true);
    }

    /// The launch was sent to `host` and the answer will not come: the stream or the connection broke.
    pub fn handle_lost<W: Words>(
        &mut self,
        now: Micros,
        host: HostId,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        if self.host() == Some(host) && matches!(self.state, State::Sent { .. }) {
            self.silent(now, true, table, dispatch);
        }
    }

    /// The answer to a cancel. `true`: nothing of it runs there, and nothing will (PROTOCOL 6.6).
    pub fn handle_cancel<W: Words>(
        &mut self,
        now: Micros,
        host: HostId,
        cancelled: bool,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        let waits = matches!(self.state, State::Cancelling { .. } | State::CancelDue { .. });
        if self.host() != Some(host) || !waits {
            return;
        }
        if cancelled {
            self.gone(table, dispatch);
        } else {
            self.state = State::CancelDue { at: now + self.pace(now) };
        }
    }

    /// The caller knows that nothing of it is left on `host`: its claim has lapsed.
    pub fn handle_lapsed<W: Words>(
        &mut self,
        host: HostId,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        if self.host() == Some(host) && !matches!(self.state, State::Done) {
            self.gone(table, dispatch);
        }
    }

    /// Whoever asked for it does not want it any more: it is cancelled where it may be.
    pub fn handle_abort<W: Words>(&mut self, now: Micros, table: &CapacityTable<W>) {
        self.aborted = true;
        match self.state {
            State::Sent { .. } | State::Due { again: true, .. } => {
                self.state = State::CancelDue { at: now };
            }
            State::Choosing | State::Due { .. } => self.end_aborted(table),
            State::CancelDue { .. } | State::Cancelling { .. } | State::Done => {}
        }
    }

    fn hold(&mut self, now: Micros, picked: Picked) {
        self.held = Some(picked.reservation);
        self.other = picked.other;
        self.asked_again = 0;
        self.paced = 0;
        self.state = State::Due { at: now, again: false };
    }

    fn choose<W: Words>(&mut self, now: Micros, table: &CapacityTable<W>, dispatch: &mut Dispatch) {
        let select = dispatch.policy.select;
        let excluded = &self.excluded[..self.excluded_len];
        let other = self.other.take();
        let other = other.and_then(|slot| select.pick_other(table, slot, self.shape, excluded));
        let pick = match other {
            Some(picked) => Pick::Picked(picked),
            None => dispatch.picker.pick(table, self.shape, excluded),
        };
        match pick {
            Pick::Picked(picked) => self.hold(now, picked),
            Pick::NoHosts if self.attempts == 0 => {
                self.fail(Code::NoHosts, "the fleet has no hosts; nothing was started".into());
            }
            Pick::NoRoom if !self.hoped => {
                self.hoped = true;
                match self.hope(table, dispatch) {
                    Some(picked) => self.hold(now, picked),
                    None => self.give_up(dispatch),
                }
            }
            Pick::NoRoom | Pick::NoHosts => self.give_up(dispatch),
        }
    }

    /// Nobody is known to have room. Once a launch, and within the retry budget, a host is asked all the same.
    fn hope<W: Words>(&self, table: &CapacityTable<W>, dispatch: &mut Dispatch) -> Option<Picked> {
        let excluded = &self.excluded[..self.excluded_len];
        let select = dispatch.policy.select;
        let picked = select.pick_hopeful(table, dispatch.picker.rng(), self.shape, excluded)?;
        if dispatch.take_retry() {
            return Some(picked);
        }
        table.release(picked.reservation);
        None
    }

    /// No host is left to try: says what the reason was on most.
    fn give_up(&mut self, dispatch: &Dispatch) {
        let fleet = dispatch.failing() > 0.5 && self.failed > 0;
        match self.fault.take() {
            Some(fault) if fleet || self.failed >= 2 => self.fail(
                Code::FleetFailing,
                format!(
                    "{} of {} hosts that were tried failed it, the last with: {fault}; nothing was \
                     started",
                    self.failed,
                    self.failed + self.refused
                ),
            ),
            Some(fault) if self.failed >= self.refused || fault.code == Code::Busy => {
                self.finish(Outcome::Failed(fault));
            }
            _ => self.fail(
                Code::NoCapacity,
                format!("no host has room for it ({} refused); nothing was started", self.refused),
            ),
        }
    }

    fn refused<W: Words>(
        &mut self,
        host: HostId,
        refused: &Refused,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        self.refused += 1;
        dispatch.report(Report::Capacity { host, word: refused.word });
        if let Some(held) = self.held.take() {
            self.exclude(held.host);
            table.refuse(held, refused);
        }
        self.again(dispatch, false);
    }

    fn failed<W: Words>(
        &mut self,
        now: Micros,
        sent: Micros,
        fault: Fault,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        if is_of_the_launch(fault.code) {
            self.judge(Verdict::Well(now.saturating_sub(sent)), table, dispatch);
            self.let_go(table);
            return self.finish(Outcome::Failed(fault));
        }
        // A published port that is taken there (busy) says nothing of that host, and may be free on another.
        if matches!(fault.code, Code::NoCapacity | Code::Draining | Code::Overloaded | Code::Busy) {
            self.refused += 1;
            self.fault = Some(fault);
            return self.elsewhere(table, dispatch, false);
        }
        self.bad(fault.code, table, dispatch);
        self.fault = Some(fault);
        self.elsewhere(table, dispatch, true);
    }

    /// Sent, and no answer: the same host is asked again (a while later if its connection broke), then it is cancelled there.
    fn silent<W: Words>(
        &mut self,
        now: Micros,
        broke: bool,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
    ) {
        if self.asked_again == 0 {
            self.bad(Code::Unknown, table, dispatch);
        }
        let hedged = dispatch.policy.hedge_us.is_some() && self.asked_again == 0;
        let ask = !hedged
            && self.asked_again < ASKED_AGAIN_MAX
            && self.attempts < dispatch.policy.attempts_max
            && dispatch.take_retry();
        if ask {
            self.asked_again += 1;
            let at = if broke { now + self.pace(now) } else { now };
            self.state = State::Due { at, again: true };
        } else {
            self.state = State::CancelDue { at: now };
        }
    }

    /// Nothing of it is on its host: it was cancelled there, or lapsed.
    fn gone<W: Words>(&mut self, table: &CapacityTable<W>, dispatch: &mut Dispatch) {
        if self.aborted {
            return self.end_aborted(table);
        }
        let host = self.host();
        self.fault = host.map(|host| {
            Fault::new(Code::HostUnreachable, format!("host {host} did not answer in time"))
        });
        self.elsewhere(table, dispatch, true);
    }

    fn end_aborted<W: Words>(&mut self, table: &CapacityTable<W>) {
        self.let_go(table);
        self.fail(Code::Cancelled, "the launch was given up; nothing runs".into());
    }

    /// The current host is given up, surely without the launch: another one, if that is allowed.
    fn elsewhere<W: Words>(
        &mut self,
        table: &CapacityTable<W>,
        dispatch: &mut Dispatch,
        costs: bool,
    ) {
        if let Some(host) = self.host() {
            self.exclude(host);
        }
        self.let_go(table);
        self.again(dispatch, costs);
    }

    fn again(&mut self, dispatch: &mut Dispatch, costs: bool) {
        let tried_out = self.attempts >= dispatch.policy.attempts_max.min(ATTEMPTS_MAX);
        if tried_out || costs && !dispatch.take_retry() {
            self.give_up(dispatch);
        } else {
            self.state = State::Choosing;
        }
    }

    fn out_of_time<W: Words>(&mut self, table: &CapacityTable<W>) {
        let unknown = match self.state {
            State::Sent { .. } | State::CancelDue { .. } | State::Cancelling { .. } => true,
            State::Due { again, .. } => again,
            State::Choosing | State::Done => false,
        };
        let host = self.host();
        self.let_go(table);
        match host.filter(|_| unknown) {
            Some(host) => self.fail(
                Code::Unknown,
                format!("host {host} was asked and did not answer; it may run there"),
            ),
            None => self.fail(
                Code::BudgetSpent,
                format!("its time was spent on {} attempts; nothing was started", self.attempts),
            ),
        }
    }

    fn bad<W: Words>(&mut self, code: Code, table: &CapacityTable<W>, dispatch: &mut Dispatch) {
        self.failed += 1;
        if let Some(host) = self.host() {
            dispatch.report(Report::Health { host, failures: 1, code });
        }
        self.judge(Verdict::Badly(code), table, dispatch);
    }

    fn judge<W: Words>(&self, verdict: Verdict, table: &CapacityTable<W>, dispatch: &mut Dispatch) {
        let Some(held) = &self.held else { return };
        match dispatch.judge(verdict) {
            Some((levels, most)) => table.penalise(held, levels, most),
            None => table.relieve(held),
        }
    }

    fn let_go<W: Words>(&mut self, table: &CapacityTable<W>) {
        if let Some(held) = self.held.take() {
            table.release(held);
        }
    }

    fn exclude(&mut self, host: HostId) {
        if self.excluded_len < self.excluded.len() {
            self.excluded[self.excluded_len] = host;
            self.excluded_len += 1;
        }
    }

    fn wait(&self, now: Micros, dispatch: &Dispatch) -> Micros {
        let left = self.deadline.saturating_sub(now);
        let (least, most) = dispatch.policy.wait_us;
        let wait = (left / 3).clamp(least, most);
        dispatch.policy.hedge_us.map_or(wait, |hedge| wait.min(hedge)).min(left)
    }

    fn pace(&mut self, now: Micros) -> Micros {
        let most = (self.deadline.saturating_sub(now) / 8).max(PACE_US);
        let pace = PACE_US.saturating_mul(4u64.saturating_pow(self.paced));
        self.paced += 1;
        pace.min(most)
    }

    fn left_ms(&self, now: Micros) -> u32 {
        let left = self.deadline.saturating_sub(now).div_ceil(1_000);
        u32::try_from(left).unwrap_or(BUDGET_MS_MAX).clamp(1, BUDGET_MS_MAX)
    }

    fn fail(&mut self, code: Code, message: String) {
        self.finish(Outcome::Failed(Fault::new(code, message)));
    }

    fn finish(&mut self, outcome: Outcome) {
        self.state = State::Done;
        self.outcome = Some(outcome);
    }

    fn outcome(&self) -> Outcome {
        self.outcome.clone().unwrap_or_else(|| {
            Outcome::Failed(Fault::new(Code::Internal, "the launch ended without an outcome"))
        })
    }
}

/// Faults that would meet this launch on any host: it ends, and its host did well.
#[must_use]
pub const fn is_of_the_launch(code: Code) -> bool {
    matches!(
        code,
        Code::BadRequest
            | Code::ImageNotFound
            | Code::ImageBroken
            | Code::ImageArchitecture
            | Code::CommandNotFound
            | Code::CommandNotExecutable
            | Code::UserNotFound
            | Code::Conflict
            | Code::Cancelled
            | Code::Forbidden
            | Code::Unsupported
            | Code::NotFound
    )
}
