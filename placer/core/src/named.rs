//! Named launches: the way of a launch id that may reach several placers (PROTOCOL 6.11, 6.12).
//!
//! Two placers with different views of capacity would pick different hosts for one id. For a named launch nobody picks: its
//! [`homes`] follow from the id and the map, and the hosts' own answers, which they repeat, decide how far to go. Placers
//! whose maps differ by a few hosts agree on nearly all ids. The price is balance: one choice instead of two, and a
//! home that does not answer is waited for, since it may have said to another placer that it runs the launch.

use wire::{
    Code, Fault, HostId, LaunchId,
    launch::{LaunchReply, Refused},
    limits::BUDGET_MS_MAX,
};

use crate::{
    MapView, Micros,
    launch::{Outcome, Step, is_of_the_launch},
};

/// Homes of one launch that are tried.
const HOMES_MAX: u32 = 16;

/// Time between two messages to one home.
const AGAIN_US: Micros = 50_000;

const HOME_KEY: &[u8; 32] = b"volley home\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The point whose host at or above is the launch's `index`-th home.
fn point(id: LaunchId, index: u32) -> u64 {
    let mut said = [0; 20];
    said[..16].copy_from_slice(&id.0);
    said[16..].copy_from_slice(&index.to_le_bytes());
    let hash = blake3::keyed_hash(HOME_KEY, &said);
    let mut point = [0; 8];
    point.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(point)
}

/// The launch's home hosts, in order.
#[must_use]
pub fn homes<B: AsRef<[u8]>>(map: &MapView<B>, id: LaunchId) -> Vec<HostId> {
    let mut homes = Vec::new();
    if map.is_empty() {
        return homes;
    }
    for index in 0..4 * HOMES_MAX {
        let at = map.lower_bound(HostId(point(id, index)));
        let host = map.id(if at == map.len() { 0 } else { at });
        if !homes.contains(&host) {
            homes.push(host);
        }
        if homes.len() == HOMES_MAX as usize {
            break;
        }
    }
    homes
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Send it (again) to its home at this time.
    Due(Micros),
    /// On its way to its home, or answered soon.
    Asked,
    /// The outcome is there.
    Done,
}

/// A named launch under way: home by home, on only after an answer that it does not run there and will not.
#[derive(Debug)]
pub struct Named {
    homes: Vec<HostId>,
    /// Index of the home that is asked.
    at: usize,
    deadline: Micros,
    state: State,
    /// Whether the home may have been reached by a message that it did not answer.
    silent: bool,
    refused: u32,
    fault: Option<Fault>,
    outcome: Option<Outcome>,
}

impl Named {
    /// A launch with so many milliseconds to spend from `now` on.
    #[must_use]
    pub fn new(now: Micros, homes: Vec<HostId>, budget_ms: u32) -> Self {
        let mut named = Self {
            homes,
            at: 0,
            deadline: now + u64::from(budget_ms.min(BUDGET_MS_MAX)) * 1_000,
            state: State::Due(now),
            silent: false,
            refused: 0,
            fault: None,
            outcome: None,
        };
        if named.homes.is_empty() {
            named.fail(Code::NoHosts, "the fleet has no hosts; nothing was started".into());
        }
        named
    }

    /// When it is given up.
    #[must_use]
    pub const fn deadline(&self) -> Micros {
        self.deadline
    }

    /// The home that is asked, or was asked last.
    #[must_use]
    pub fn host(&self) -> Option<HostId> {
        self.homes.get(self.at).copied()
    }

    /// What to do now.
    pub fn poll(&mut self, now: Micros) -> Step {
        if now >= self.deadline && self.state != State::Done {
            self.out_of_time();
        }
        match (self.state, self.host()) {
            (State::Due(at), Some(host)) if now >= at => {
                self.state = State::Asked;
                let left_ms = (self.deadline - now).div_ceil(1_000);
                let budget_ms = u32::try_from(left_ms).unwrap_or(BUDGET_MS_MAX);
                Step::Send { host, budget_ms, again: self.silent }
            }
            (State::Due(at), Some(_)) => Step::Wait { until: at.min(self.deadline) },
            (State::Asked, _) => Step::Wait { until: self.deadline },
            (State::Due(_) | State::Done, _) => Step::Done(self.outcome()),
        }
    }

    /// An answer of `host`. `overloaded` is the one refusal that a host does not remember: it is asked again.
    pub fn handle_reply(&mut self, now: Micros, host: HostId, reply: LaunchReply) {
        if self.host() != Some(host) || self.state == State::Done {
            return;
        }
        self.silent = false;
        match reply {
            LaunchReply::Started(started) => self.finish(Outcome::Started(started)),
            LaunchReply::Refused(Refused { code: Code::Overloaded, .. }) => self.again(now),
            LaunchReply::Refused(_) => {
                self.refused += 1;
                self.next(now);
            }
            LaunchReply::Failed(fault) if is_of_the_launch(fault.code) => {
                self.finish(Outcome::Failed(fault));
            }
            LaunchReply::Failed(fault) => {
                self.fault = Some(fault);
                self.next(now);
            }
        }
    }

    /// It did not leave this machine: no connection to `host`.
    pub fn handle_unsent(&mut self, now: Micros, host: HostId) {
        if self.host() == Some(host) && self.state == State::Asked {
            self.again(now);
        }
    }

    /// It was sent to `host` and the answer will not come.
    pub fn handle_lost(&mut self, now: Micros, host: HostId) {
        if self.host() == Some(host) && self.state == State::Asked {
            self.silent = true;
            self.again(now);
        }
    }

    fn again(&mut self, now: Micros) {
        self.state = State::Due(now + AGAIN_US);
    }

    fn next(&mut self, now: Micros) {
        self.at += 1;
        self.state = State::Due(now);
        if self.at < self.homes.len() {
            return;
        }
        match self.fault.take() {
            Some(fault) => self.finish(Outcome::Failed(fault)),
            None => {
                let refused = self.refused;
                let text =
                    format!("none of its {refused} home hosts has room; nothing was started");
                self.fail(Code::NoCapacity, text);
            }
        }
    }

    fn out_of_time(&mut self) {
        let Some(host) = self.host() else { return };
        if self.silent || self.state == State::Asked {
            let text = format!("home host {host} was asked and did not answer; it may run there");
            return self.fail(Code::Unknown, text);
        }
        let text = format!(
            "home host {host} of this named launch cannot be reached or takes nothing now; this placer started nothing"
        );
        self.fail(Code::HostUnreachable, text);
    }

    fn fail(&mut self, code: Code, text: String) {
        self.finish(Outcome::Failed(Fault::new(code, text)));
    }

    fn finish(&mut self, outcome: Outcome) {
        self.state = State::Done;
        self.outcome = Some(outcome);
    }

    fn outcome(&self) -> Outcome {
        let none = || Outcome::Failed(Fault::new(Code::Internal, "a named launch without an end"));
        self.outcome.clone().unwrap_or_else(none)
    }
}

#[cfg(test)]
mod tests {
    use wire::{
        CapacityWord, SandboxId,
        launch::{Started, Steps, VisibleAt},
        map::{HostAddr, MapVersion},
    };

    use super::*;
    use crate::map::encode;

    const A: HostId = HostId(1);
    const B: HostId = HostId(2);

    fn refused(code: Code) -> LaunchReply {
        LaunchReply::Refused(Refused { word: CapacityWord::default(), code })
    }

    fn started(host: HostId) -> Started {
        let sandbox = SandboxId { host, local: 1 };
        let (word, steps) = (CapacityWord::default(), Steps::default());
        Started { sandbox, visible_at: VisibleAt::default(), word, steps }
    }

    fn sent(host: HostId, budget_ms: u32, again: bool) -> Step {
        Step::Send { host, budget_ms, again }
    }

    fn code(step: Step) -> Code {
        match step {
            Step::Done(Outcome::Failed(fault)) => fault.code,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_refusal_goes_on_and_the_last_one_ends_it() {
        let mut named = Named::new(0, vec![A, B], 1_000);
        assert_eq!(named.poll(0), sent(A, 1_000, false));
        assert_eq!(named.poll(0), Step::Wait { until: 1_000_000 });
        named.handle_reply(10, A, refused(Code::NoCapacity));
        assert_eq!(named.poll(10_000), sent(B, 990, false));
        named.handle_reply(10_000, A, LaunchReply::Started(started(A)));
        assert_eq!(named.poll(10_000), Step::Wait { until: 1_000_000 }, "A has spoken already");
        named.handle_reply(20_000, B, refused(Code::NoCapacity));
        assert_eq!(code(named.poll(20_000)), Code::NoCapacity);
    }

    /// What a host does not remember it might decide otherwise for the next placer.
    #[test]
    fn an_overloaded_home_is_asked_again_and_not_passed_by() {
        let mut named = Named::new(0, vec![A, B], 1_000);
        named.poll(0);
        named.handle_reply(0, A, refused(Code::Overloaded));
        assert_eq!(named.poll(0), Step::Wait { until: AGAIN_US });
        assert_eq!(named.poll(AGAIN_US), sent(A, 950, false));
        named.handle_reply(AGAIN_US, A, LaunchReply::Started(started(A)));
        assert_eq!(named.poll(AGAIN_US), Step::Done(Outcome::Started(started(A))));
    }

    #[test]
    fn a_silent_home_is_never_passed_by() {
        let mut named = Named::new(0, vec![A, B], 100);
        named.poll(0);
        named.handle_lost(1_000, A);
        assert_eq!(named.poll(51_000), sent(A, 49, true));
        named.handle_unsent(60_000, A);
        assert_eq!(named.poll(60_000), Step::Wait { until: 100_000 });
        assert_eq!(code(named.poll(100_000)), Code::Unknown, "the first message may have come");
        let mut unsent = Named::new(0, vec![A, B], 100);
        unsent.poll(0);
        unsent.handle_unsent(60_000, A);
        assert_eq!(code(unsent.poll(100_000)), Code::HostUnreachable);
        assert_eq!(code(Named::new(0, vec![], 100).poll(0)), Code::NoHosts);
    }

    #[test]
    fn failures_of_the_launch_end_it_and_those_of_the_host_do_not() {
        let failed = |code| LaunchReply::Failed(Fault::new(code, ""));
        let mut named = Named::new(0, vec![A, B], 1_000);
        named.poll(0);
        named.handle_reply(0, A, failed(Code::BoxFailed));
        assert_eq!(named.poll(0), sent(B, 1_000, false));
        named.handle_reply(0, B, failed(Code::ImageNotFound));
        assert_eq!(code(named.poll(0)), Code::ImageNotFound);
    }

    #[test]
    fn homes_are_distinct_and_change_little_with_the_map() {
        let addr = HostAddr { ip: [10, 0, 0, 1].into(), port: 7 };
        let hosts: Vec<_> = (1..=100_u64).map(|n| (HostId(n * (u64::MAX / 101)), addr)).collect();
        let version = MapVersion { epoch: 1, version: 1 };
        let view = |hosts: &[_]| MapView::open(encode(version, hosts)).unwrap();
        let (all, fewer) = (view(&hosts), view(&hosts[1..]));
        let gone = hosts[0].0;
        for number in 0..200_u128 {
            let id = LaunchId(number.to_le_bytes());
            let of_all = homes(&all, id);
            let distinct: std::collections::BTreeSet<_> = of_all.iter().collect();
            assert_eq!((of_all.len(), distinct.len()), (16, 16));
            if !of_all.contains(&gone) {
                assert_eq!(homes(&fewer, id), of_all);
            }
        }
        assert_eq!(homes(&view(&[hosts[20], hosts[50], hosts[80]]), LaunchId([1; 16])).len(), 3);
        assert!(homes(&view(&[]), LaunchId([1; 16])).is_empty());
    }
}
