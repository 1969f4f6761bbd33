//! The host's core against its promises: every short sequence of events, long random ones, and named cases.

use proptest::prelude::*;
use wire::{
    Code, Fault, HostId, Incarnation, LaunchId, Seq, ShapeId,
    call::{Exit, ExitWhy, State},
    launch::{Started, Steps},
};

use crate::{
    admission::Resources,
    host::{Admit, Ask, Cancelled, Deed, Host, HostConfig},
    limits::{ENDED_MAX, ENDED_MS, REMEMBER_MS},
    shapes::Shapes,
};

const A: LaunchId = LaunchId([0xa; 16]);
const B: LaunchId = LaunchId([0xb; 16]);
const RETURNED: Exit = Exit { code: 0, why: ExitWhy::Returned };

fn host(boxes_max: u32) -> Host<()> {
    Host::new(&HostConfig {
        host: HostId(9),
        incarnation: Incarnation(3),
        shapes: Shapes::default(),
        whole: Resources { cpu_millis: 64_000, memory_bytes: 64 << 30 },
        boxes_max,
        margin_percent: 0,
        seed: 5,
    })
}

fn ask(launch_id: LaunchId, body: u8) -> Ask {
    Ask {
        launch_id,
        body: [body; 16],
        named: false,
        shape: ShapeId::new(0).unwrap(),
        budget_ms: 1_000,
        hard_ms: 0,
        idle_ms: 0,
    }
}

/// A host with one slot, what was seen of it, and what it may do.
struct Model {
    host: Host<()>,
    now_ms: u64,
    begun: [Vec<u64>; 2],
    body: [u8; 2],
    started: [Option<Started>; 2],
    cancelled: [bool; 2],
    failed: [bool; 2],
}

const EVENTS: usize = 10;
const IDS: [LaunchId; 2] = [A, B];

impl Model {
    fn new() -> Self {
        Self {
            host: host(1),
            now_ms: 0,
            begun: [vec![], vec![]],
            body: [0; 2],
            started: [None; 2],
            cancelled: [false; 2],
            failed: [false; 2],
        }
    }

    fn claimed(&self) -> Option<(usize, u64)> {
        let of = |at: usize| {
            let local = *self.begun[at].last()?;
            let state = self.host.sandbox(local)?.state;
            (state == State::Claimed).then_some((at, local))
        };
        of(0).or_else(|| of(1))
    }

    fn step(&mut self, event: usize) {
        match event {
            0 => self.launch(0, 1),
            1 => self.launch(1, 1),
            2 => self.launch(0, 2),
            3 => self.start_claimed(),
            4 => {
                if let Some((at, local)) = self.claimed() {
                    self.host.handle_failed(
                        self.now_ms,
                        local,
                        Fault::new(Code::BoxFailed, "test"),
                    );
                    self.failed[at] = true;
                }
            }
            5 => {
                for at in 0..2 {
                    if let Some(&local) = self.begun[at].last()
                        && self.host.sandbox(local).is_some_and(|s| s.state == State::Running)
                    {
                        self.host.handle_exited(self.now_ms, local, RETURNED);
                    }
                }
            }
            6 | 7 => self.cancel(event - 6),
            8 => {
                if let Some(&local) = self.begun[0].last() {
                    self.host.handle_kill(local);
                }
            }
            _ => {
                self.now_ms += 600;
                self.host.handle_timeout(self.now_ms);
            }
        }
        self.check();
    }

    fn launch(&mut self, at: usize, body: u8) {
        match self.host.handle_launch(self.now_ms, &ask(IDS[at], body), |_| ()) {
            Admit::Begin(id) => {
                assert!(self.begun[at].is_empty(), "an id begins at most once");
                assert!(!self.cancelled[at], "a cancelled id never begins");
                self.begun[at].push(id.local);
                self.body[at] = body;
                self.host.watch(id.local);
            }
            Admit::Failed(fault) if self.begun[at].len() == 1 && self.body[at] != body => {
                let told = if self.cancelled[at] { Code::Cancelled } else { Code::Conflict };
                assert_eq!(fault.code, told, "another body under a known id");
            }
            Admit::Started(started) => {
                assert_eq!(self.started[at], Some(started), "the same answer");
                assert!(!self.cancelled[at]);
            }
            Admit::Pending(id) => assert_eq!(self.begun[at].last(), Some(&id.local)),
            Admit::Refused(refused) => {
                assert_eq!(refused.code, Code::NoCapacity);
                assert!(self.begun[at].is_empty() && self.host.running() == 1);
            }
            Admit::Failed(fault) => match fault.code {
                Code::Cancelled => assert!(self.cancelled[at] || self.failed[at]),
                Code::BoxFailed | Code::BudgetSpent => assert!(self.failed[at]),
                other => panic!("{other}"),
            },
        }
    }

    fn start_claimed(&mut self) {
        let Some((at, local)) = self.claimed() else { return };
        match self.host.handle_started(self.now_ms, local, Steps::default()) {
            Ok(started) => {
                assert!(!self.cancelled[at], "what is cancelled does not start");
                self.started[at] = Some(started);
            }
            Err(fault) => {
                self.host.handle_failed(self.now_ms, local, fault);
                self.failed[at] = true;
            }
        }
    }

    fn cancel(&mut self, at: usize) {
        self.cancelled[at] = true;
        let live = self.begun[at].last().is_some_and(|local| {
            self.host.sandbox(*local).is_some_and(crate::sandbox::Sandbox::is_live)
        });
        match self.host.handle_cancel(self.now_ms, IDS[at]) {
            Cancelled::Done => assert!(!live, "done means that nothing of it runs"),
            Cancelled::Ending(id) => assert!(live && self.begun[at].last() == Some(&id.local)),
        }
    }

    fn check(&mut self) {
        let live = self.host.sandboxes().filter(|sandbox| sandbox.is_live()).count();
        assert_eq!(u32::try_from(live).unwrap(), self.host.running());
        assert!(live <= 1, "no host over its admission");
        assert_eq!(self.host.admission().free()[0], u16::from(live == 0));
        while let Some(Deed::Kill(id)) = self.host.poll_deed() {
            let sandbox = self.host.sandbox(id.local).unwrap();
            assert!(sandbox.ending.is_some() && sandbox.is_live(), "kills what is live, once");
        }
    }
}

/// Every sequence of six events of ten: a million of them.
#[test]
fn every_short_sequence_keeps_the_promises() {
    const LENGTH: u32 = 6;
    for code in 0..EVENTS.pow(LENGTH) {
        let mut model = Model::new();
        let mut rest = code;
        for _ in 0..LENGTH {
            model.step(rest % EVENTS);
            rest /= EVENTS;
        }
    }
}

proptest! {
    #[test]
    fn long_sequences_keep_the_promises(events in prop::collection::vec(0..EVENTS, 0..200)) {
        let mut model = Model::new();
        events.into_iter().for_each(|event| model.step(event));
    }
}

fn run(host: &mut Host<()>, now_ms: u64, ask: &Ask) -> u64 {
    let Admit::Begin(id) = host.handle_launch(now_ms, ask, |_| ()) else { panic!("not admitted") };
    host.handle_started(now_ms, id.local, Steps::default()).unwrap();
    id.local
}

#[test]
fn deadlines_end_what_runs_and_say_why() {
    let mut host = host(10);
    let hard = run(&mut host, 0, &Ask { hard_ms: 500, ..ask(A, 1) });
    let idle = run(&mut host, 0, &Ask { idle_ms: 300, ..ask(B, 1) });
    assert_eq!(host.poll_timeout(), Some(300));
    host.handle_used(250, idle);
    host.handle_timeout(300);
    assert_eq!(host.poll_deed(), None, "it was used");
    host.handle_timeout(500);
    assert_eq!(host.poll_deed(), Some(Deed::Kill(host.sandbox(hard).unwrap().id)));
    host.handle_timeout(550);
    assert_eq!(host.poll_deed(), Some(Deed::Kill(host.sandbox(idle).unwrap().id)));
    assert_eq!(host.poll_deed(), None);
    let killed = Exit { code: 137, why: ExitWhy::Signalled };
    assert_eq!(host.handle_exited(560, hard, killed).unwrap().why, ExitWhy::Deadline);
    assert_eq!(host.handle_exited(560, idle, killed).unwrap().why, ExitWhy::Idle);
    assert_eq!(host.handle_exited(560, idle, killed), None, "it ends once");
}

#[test]
fn a_deadline_counts_from_the_execution() {
    let mut host = host(10);
    let asked = Ask { hard_ms: 300, ..ask(A, 1) };
    let Admit::Begin(id) = host.handle_launch(0, &asked, |_| ()) else { panic!() };
    host.watch(id.local);
    host.handle_timeout(900);
    host.handle_started(900, id.local, Steps::default()).unwrap();
    host.handle_timeout(1_199);
    assert_eq!(host.poll_deed(), None);
    host.handle_timeout(1_200);
    assert_eq!(host.poll_deed(), Some(Deed::Kill(id)));
}

#[test]
fn an_extension_moves_the_deadline_and_a_pause_stops_the_idle_clock() {
    let mut host = host(10);
    let local = run(&mut host, 0, &Ask { hard_ms: 500, idle_ms: 100, ..ask(A, 1) });
    host.handle_paused(local);
    host.handle_extend(50, local, 10_000, 0);
    host.handle_timeout(9_000);
    assert_eq!(host.poll_deed(), None);
    host.handle_resumed(9_000, local);
    host.handle_timeout(9_100);
    assert!(host.poll_deed().is_some(), "idle again");
}

#[test]
fn an_answer_that_reached_nobody_is_reaped_unless_somebody_asks() {
    let mut host = host(10);
    let lost = run(&mut host, 0, &ask(A, 1));
    let found = run(&mut host, 0, &ask(B, 1));
    host.handle_undelivered(0, lost, 1_000);
    host.handle_undelivered(0, found, 1_000);
    assert!(matches!(host.handle_launch(900, &ask(B, 1), |_| ()), Admit::Started(_)));
    host.handle_timeout(60_000);
    assert_eq!(host.poll_deed(), Some(Deed::Kill(host.sandbox(lost).unwrap().id)));
    assert_eq!(host.poll_deed(), None);
}

#[test]
fn what_one_caller_has_is_not_reaped_for_another_that_was_lost() {
    let mut host = host(10);
    let local = run(&mut host, 0, &ask(A, 1));
    assert!(matches!(host.handle_launch(1, &ask(A, 1), |_| ()), Admit::Started(_)));
    host.handle_undelivered(2, local, 1_000);
    host.handle_timeout(60_000);
    assert_eq!(host.poll_deed(), None, "the first caller has it");
    let Admit::Begin(id) = host.handle_launch(60_000, &ask(B, 1), |_| ()) else { panic!() };
    assert!(matches!(host.handle_launch(60_001, &ask(B, 1), |_| ()), Admit::Pending(_)));
    host.handle_started(60_002, id.local, Steps::default()).unwrap();
    host.handle_undelivered(60_003, id.local, 1_000);
    host.handle_undelivered(60_004, id.local, 1_000);
    host.handle_timeout(120_000);
    assert_eq!(host.poll_deed(), Some(Deed::Kill(id)), "both were lost");
}

#[test]
fn a_claim_lapses_with_its_budget() {
    let mut host = host(10);
    let Admit::Begin(id) = host.handle_launch(0, &ask(A, 1), |_| ()) else { panic!() };
    host.watch(id.local);
    host.handle_timeout(1_000);
    assert_eq!(host.poll_deed(), None, "its maker is told");
    let fault = host.handle_started(1_001, id.local, Steps::default()).unwrap_err();
    assert_eq!(fault.code, Code::BudgetSpent);
    host.handle_failed(1_002, id.local, fault);
    assert_eq!(host.running(), 0);
    assert!(matches!(host.handle_launch(1_003, &ask(A, 1), |_| ()), Admit::Failed(_)));
}

#[test]
fn a_drain_refuses_at_once_and_ends_the_rest_at_its_deadline() {
    let mut host = host(10);
    run(&mut host, 0, &ask(A, 1));
    host.handle_drain(0, 5_000);
    let Admit::Refused(refused) = host.handle_launch(1, &ask(B, 1), |_| ()) else { panic!() };
    assert_eq!(refused.code, Code::Draining);
    assert!(matches!(host.handle_launch(1, &ask(A, 1), |_| ()), Admit::Started(_)), "known still");
    assert!(!host.drained());
    host.handle_timeout(5_000);
    let Some(Deed::Kill(id)) = host.poll_deed() else { panic!() };
    assert_eq!(host.handle_exited(5_001, id.local, RETURNED).unwrap().why, ExitWhy::Lost);
    assert!(host.drained());
    host.handle_undrain();
    assert!(matches!(host.handle_launch(6_000, &ask(B, 1), |_| ()), Admit::Begin(_)));
}

#[test]
fn a_named_refusal_stays_for_all_placers() {
    let mut host = host(1);
    let first = run(&mut host, 0, &ask(A, 1));
    let named = Ask { named: true, ..ask(B, 1) };
    assert!(matches!(host.handle_launch(0, &named, |_| ()), Admit::Refused(_)));
    host.handle_exited(1, first, RETURNED);
    assert!(matches!(host.handle_launch(2, &named, |_| ()), Admit::Refused(_)), "PROTOCOL 6.12");
    host.handle_timeout(200_000);
    assert!(matches!(host.handle_launch(200_000, &named, |_| ()), Admit::Begin(_)));
}

#[test]
fn a_refusal_of_an_earlier_start_is_repeated() {
    let mut host = host(1);
    host.recall_refused(0, B, Code::NoCapacity);
    let named = Ask { named: true, ..ask(B, 1) };
    let Admit::Refused(refused) = host.handle_launch(1, &named, |_| ()) else { panic!() };
    assert_eq!(refused.code, Code::NoCapacity);
}

#[test]
fn memory_of_the_past_is_bounded_and_forgotten_in_time() {
    let mut host = host(10);
    for n in 0..ENDED_MAX as u128 + 100 {
        let local = run(&mut host, 0, &ask(LaunchId(n.to_le_bytes()), 1));
        host.handle_exited(0, local, RETURNED);
    }
    assert_eq!(host.sandboxes().count(), ENDED_MAX);
    assert_eq!(host.launches().len(), ENDED_MAX + 100);
    host.handle_timeout(REMEMBER_MS);
    assert!(host.launches().is_empty());
    host.handle_timeout(ENDED_MS);
    assert_eq!(host.sandboxes().count(), 0);
    assert_eq!(host.poll_timeout(), None);
}

#[test]
fn an_answer_names_the_heartbeat_that_counts_it() {
    let mut host = host(10);
    host.set_next_seq(Seq(77));
    let Admit::Begin(id) = host.handle_launch(0, &ask(A, 1), |_| ()) else { panic!() };
    let started = host.handle_started(0, id.local, Steps::default()).unwrap();
    assert_eq!((started.visible_at.incarnation, started.visible_at.seq), (Incarnation(3), Seq(77)));
    assert_eq!(started.word.stamp(), wire::Stamp::of(Seq(76)));
}
