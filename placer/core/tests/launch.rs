//! The launch state machine, step by step, and under random sequences of events.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing fails")]

use std::sync::atomic::AtomicU64;

use placer_core::{
    Adopter, CapacityTable, Dispatch, Launch, MapView, Outcome, Policy, Report, Step, map::encode,
    sync::zeroed, table::words_for,
};
use rand::{Rng, SeedableRng, TryRngCore, rngs::SmallRng};
use wire::{
    CapacityWord, Code, Fault, HostId, Incarnation, SandboxId, Seq, ShapeId, Stamp,
    launch::{LaunchReply, Refused, Started, Steps, VisibleAt},
    map::{HostAddr, MapVersion},
};

type Table = CapacityTable<Vec<AtomicU64>>;

fn shape() -> ShapeId {
    ShapeId::new(1).unwrap()
}

fn word(free: u16, seq: u64) -> CapacityWord {
    CapacityWord::new([free; 4], 0, Stamp::of(Seq(seq)))
}

fn table(hosts: u64) -> Table {
    let addr = HostAddr { ip: [10, 0, 0, 1].into(), port: 1 };
    let rows: Vec<_> = (1..=hosts).map(|id| (HostId(id), addr)).collect();
    let map = MapView::open(encode(MapVersion { epoch: 1, version: 1 }, &rows)).unwrap();
    let capacity = usize::try_from(hosts.max(1)).unwrap();
    let table = CapacityTable::create(zeroed(words_for(capacity)), 1);
    Adopter::new(&table).adopt::<_, Vec<u8>, _>(&table, None, &map).unwrap();
    (1..=hosts).for_each(|id| assert!(table.feed(HostId(id), word(100, 1))));
    table
}

fn reserved(table: &Table) -> u32 {
    (0..table.len())
        .filter_map(|slot| table.at(slot))
        .map(|(host, _)| u32::from(table.get(host).unwrap().1.count(shape())))
        .sum()
}

fn started(host: HostId) -> LaunchReply {
    LaunchReply::Started(Started {
        sandbox: SandboxId { host, local: 1 },
        visible_at: VisibleAt { incarnation: Incarnation(1), seq: Seq(2) },
        word: word(99, 1),
        steps: Steps::default(),
    })
}

fn refused() -> LaunchReply {
    LaunchReply::Refused(Refused { word: word(0, 1), code: Code::NoCapacity })
}

fn failed(code: Code) -> LaunchReply {
    LaunchReply::Failed(Fault::new(code, "it broke"))
}

struct One {
    table: Table,
    dispatch: Dispatch,
    launch: Launch,
}

impl One {
    fn new(hosts: u64, budget_ms: u32) -> Self {
        let mut dispatch = Dispatch::new(Policy::default(), 1);
        let launch = Launch::new(0, shape(), budget_ms, &mut dispatch);
        Self { table: table(hosts), dispatch, launch }
    }

    fn poll(&mut self, now: u64) -> Step {
        self.launch.poll(now, &self.table, &mut self.dispatch)
    }

    fn sent(&mut self, now: u64) -> (HostId, bool) {
        match self.poll(now) {
            Step::Send { host, again, .. } => (host, again),
            other => panic!("{other:?}"),
        }
    }

    fn reply(&mut self, now: u64, host: HostId, reply: LaunchReply) {
        self.launch.handle_reply(now, host, reply, &self.table, &mut self.dispatch);
    }

    fn fault(&mut self, now: u64) -> Fault {
        match self.poll(now) {
            Step::Done(Outcome::Failed(fault)) => fault,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn started_settles_and_ends() {
    let mut one = One::new(10, 10_000);
    let (host, again) = one.sent(0);
    assert!(!again);
    assert_eq!(reserved(&one.table), 1);
    assert!(matches!(one.poll(1), Step::Wait { until } if until > 1));
    one.reply(900, host, started(host));
    assert!(matches!(one.poll(900), Step::Done(Outcome::Started(_))));
    assert_eq!(reserved(&one.table), 0);
    assert_eq!(one.table.get(host).unwrap().0.unwrap().free(shape()), 99);
    assert_eq!(one.launch.attempts(), 1);
}

#[test]
fn a_refusal_goes_to_another_host_corrects_the_table_and_is_reported() {
    let mut one = One::new(2, 10_000);
    let (first, _) = one.sent(0);
    one.reply(100, first, refused());
    let (second, again) = one.sent(100);
    assert!(second != first && !again);
    assert_eq!(one.table.get(first).unwrap().0.unwrap().free(shape()), 0);
    let report = one.dispatch.poll_report();
    assert_eq!(report, Some(Report::Capacity { host: first, word: word(0, 1) }));
    one.reply(200, second, refused());
    let fault = one.fault(200);
    assert_eq!(fault.code, Code::NoCapacity, "{fault}");
    assert_eq!(reserved(&one.table), 0);
}

#[test]
fn a_host_thought_full_is_asked_once_and_within_the_budget() {
    let mut one = One::new(3, 10_000);
    (1..=3).for_each(|id| assert!(one.table.feed(HostId(id), word(0, 2))));
    let (host, again) = one.sent(0);
    assert!(!again);
    one.reply(1, host, started(host));
    assert!(matches!(one.poll(1), Step::Done(Outcome::Started(_))));

    let mut one = One::new(3, 10_000);
    (1..=3).for_each(|id| assert!(one.table.feed(HostId(id), word(0, 2))));
    let (host, _) = one.sent(0);
    one.reply(1, host, refused());
    assert_eq!(one.fault(1).code, Code::NoCapacity, "once, not host after host");
    assert_eq!(reserved(&one.table), 0);

    one.dispatch = Dispatch::new(Policy { retry_burst: 0, ..Policy::default() }, 1);
    one.launch = Launch::new(0, shape(), 10_000, &mut one.dispatch);
    assert_eq!(one.fault(0).code, Code::NoCapacity, "not without a token");
    assert_eq!(reserved(&one.table), 0);
}

#[test]
fn failures_are_reported_excluded_and_say_that_the_fleet_fails() {
    let mut one = One::new(20, 10_000);
    let mut hosts = Vec::new();
    for at in 0..5 {
        let (host, _) = one.sent(at);
        assert!(!hosts.contains(&host), "an excluded host is not tried again");
        assert!(one.table.get(host).unwrap().1.penalty() == 0);
        one.reply(at, host, failed(Code::BoxFailed));
        assert!(one.table.get(host).unwrap().1.penalty() >= 3);
        let report = one.dispatch.poll_report();
        assert_eq!(report, Some(Report::Health { host, failures: 1, code: Code::BoxFailed }));
        hosts.push(host);
    }
    let fault = one.fault(5);
    assert_eq!(fault.code, Code::FleetFailing);
    assert_eq!(
        fault.message,
        "5 of 5 hosts that were tried failed it, the last with: it broke; nothing was started"
    );
}

#[test]
fn a_fault_of_the_launch_ends_it_and_is_no_mark_against_the_host() {
    let mut one = One::new(20, 10_000);
    let (host, _) = one.sent(0);
    one.reply(1, host, failed(Code::CommandNotFound));
    assert_eq!(one.fault(1).code, Code::CommandNotFound);
    assert_eq!(one.table.get(host).unwrap().1.penalty(), 0);
    assert_eq!(one.dispatch.poll_report(), None);
    assert_eq!(reserved(&one.table), 0);
}

#[test]
fn unknown_asks_the_same_host_then_cancels_and_only_then_goes_elsewhere() {
    let mut one = One::new(20, 10_000);
    let (host, _) = one.sent(0);
    one.launch.handle_lost(1_000, host, &one.table, &mut one.dispatch);
    let Step::Wait { until } = one.poll(1_000) else { panic!() };
    let Step::Send { host: same, again: true, budget_ms } = one.poll(until) else { panic!() };
    assert_eq!(same, host);
    assert!(until <= 1_000 + 20_000, "a daemon that was restarted is back soon: {until}");
    assert!(budget_ms < 10_000 && budget_ms > 9_900, "the budget shrinks: {budget_ms}");
    let Step::Wait { until } = one.poll(until) else { panic!() };
    assert_eq!(one.sent(until), (host, true), "no answer in time: once more");
    let Step::Wait { until } = one.poll(until) else { panic!() };
    assert_eq!(one.poll(until), Step::Cancel { host });
    one.reply(until, host, started(host));
    assert!(matches!(one.poll(until), Step::Wait { .. }), "after a cancel its answer decides");
    one.launch.handle_cancel(until + 1, host, true, &one.table, &mut one.dispatch);
    let (other, again) = one.sent(until + 1);
    assert!(other != host && !again);
}

#[test]
fn unknown_without_any_answer_ends_as_unknown_and_never_elsewhere() {
    let mut one = One::new(20, 10_000);
    let (host, _) = one.sent(0);
    let mut now = 0;
    loop {
        match one.poll(now) {
            Step::Send { host: to, again, .. } => assert!(to == host && again),
            Step::Cancel { host: to } => assert_eq!(to, host),
            Step::Wait { until } => now = until,
            Step::Done(Outcome::Failed(fault)) => {
                assert_eq!(fault.code, Code::Unknown, "{fault}");
                break;
            }
            Step::Done(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(now, 10_000_000);
    assert_eq!(reserved(&one.table), 0);
}

#[test]
fn what_did_not_leave_goes_elsewhere_at_once() {
    let mut one = One::new(20, 10_000);
    let (host, _) = one.sent(0);
    one.launch.handle_unsent(5, host, Code::Unreachable, &one.table, &mut one.dispatch);
    let (other, again) = one.sent(5);
    assert!(other != host && !again);
    assert_eq!(one.table.get(host).unwrap().1.penalty(), 3);
}

#[test]
fn an_abort_cancels_where_it_may_run() {
    let mut one = One::new(20, 10_000);
    one.launch.handle_abort(0, &one.table);
    assert_eq!(one.fault(0).code, Code::Cancelled);
    let mut one = One::new(20, 10_000);
    let (host, _) = one.sent(0);
    one.launch.handle_abort(1, &one.table);
    assert_eq!(one.poll(1), Step::Cancel { host });
    one.launch.handle_cancel(2, host, true, &one.table, &mut one.dispatch);
    assert_eq!(one.fault(2).code, Code::Cancelled);
    assert_eq!(reserved(&one.table), 0);
}

#[test]
fn a_hedge_cancels_first() {
    let policy = Policy { hedge_us: Some(3_000), ..Policy::default() };
    let mut dispatch = Dispatch::new(policy, 1);
    let launch = Launch::new(0, shape(), 10_000, &mut dispatch);
    let mut one = One { table: table(20), dispatch, launch };
    let (host, _) = one.sent(0);
    assert_eq!(one.poll(0), Step::Wait { until: 3_000 });
    assert_eq!(one.poll(3_000), Step::Cancel { host });
    assert!(matches!(one.poll(3_001), Step::Wait { .. }));
}

#[test]
fn an_empty_fleet_says_so() {
    let mut one = One::new(0, 100);
    assert_eq!(one.fault(0).code, Code::NoHosts);
}

#[test]
fn retries_stay_within_their_share_of_the_load() {
    let table = table(1_000);
    let policy = Policy::default();
    let mut dispatch = Dispatch::new(policy, 1);
    let mut sent = 0u32;
    let launches = 12_000u32;
    for at in 0..launches {
        let now = u64::from(at) * 1_000;
        let mut launch = Launch::new(now, shape(), 10_000, &mut dispatch);
        loop {
            match launch.poll(now, &table, &mut dispatch) {
                Step::Send { host, .. } => {
                    sent += 1;
                    launch.handle_unsent(now, host, Code::Unreachable, &table, &mut dispatch);
                }
                Step::Done(Outcome::Failed(fault)) => {
                    assert!(
                        matches!(fault.code, Code::FleetFailing | Code::Unreachable),
                        "{fault:?}"
                    );
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    // FAULTS Q7.
    assert!(f64::from(sent) <= 1.1 * f64::from(launches), "{sent}");
    assert!(f64::from(sent) > 1.05 * f64::from(launches), "the share is used: {sent}");
}

#[expect(clippy::too_many_lines, reason = "one table of events")]
/// Whatever happens: time and attempts are bounded, one host at a time, everything reserved is given back.
#[test]
fn any_sequence_of_events_keeps_the_rules() {
    let seed = rand::rngs::OsRng.try_next_u64().unwrap();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let table = table(8);
    let mut dispatch = Dispatch::new(Policy { retry_burst: 100_000, ..Policy::default() }, seed);
    for round in 0..4_000u64 {
        let begin = round * 1_000_000_000;
        let mut now = begin;
        let budget_ms = rng.random_range(1..20_000);
        let mut launch = Launch::new(now, shape(), budget_ms, &mut dispatch);
        // Hosts where it may run: sent to, and not answered by anything that says it does not run.
        let mut may_run: Option<HostId> = None;
        let mut sends = 0;
        let outcome = loop {
            let step = launch.poll(now, &table, &mut dispatch);
            let (host, sent) = match step {
                Step::Done(outcome) => break outcome,
                Step::Wait { until } => {
                    assert!(until > now, "no busy wait");
                    now = until;
                    continue;
                }
                Step::Send { host, again, .. } => {
                    sends += 1;
                    assert!(may_run.is_none_or(|other| other == host), "two hosts at once");
                    assert!(!again || may_run == Some(host));
                    (host, true)
                }
                Step::Cancel { host } => {
                    assert_eq!(may_run, Some(host));
                    (host, false)
                }
            };
            now += rng.random_range(0..200_000);
            let first = may_run.is_none();
            match (sent, rng.random_range(0..8)) {
                (true, 0) => launch.handle_reply(now, host, started(host), &table, &mut dispatch),
                (true, 1) if now < begin + u64::from(budget_ms) * 1_000 => {
                    may_run = None;
                    launch.handle_reply(now, host, refused(), &table, &mut dispatch);
                    table.feed(host, word(100, rng.random_range(2..1_000)));
                }
                (true, 2) => {
                    may_run = None;
                    let fault = failed(Code::BoxFailed);
                    launch.handle_reply(now, host, fault, &table, &mut dispatch);
                }
                (true, 3) => {
                    launch.handle_unsent(now, host, Code::Unreachable, &table, &mut dispatch)
                }
                (true, 4) => {
                    may_run = Some(host);
                    launch.handle_lost(now, host, &table, &mut dispatch);
                }
                (true, 5) => {
                    may_run = Some(host);
                    launch.handle_abort(now, &table);
                }
                (true, _) => may_run = Some(host),
                (false, 0..4) => {
                    may_run = None;
                    launch.handle_cancel(now, host, true, &table, &mut dispatch);
                }
                (false, 4) => launch.handle_cancel(now, host, false, &table, &mut dispatch),
                (false, _) => {}
            }
            if sent && first && may_run.is_none() && launch.host() == Some(host) {
                may_run = Some(host);
            }
        };
        assert!(sends <= 5 && launch.attempts() == sends);
        assert!(now <= begin + u64::from(budget_ms) * 1_000 + 200_000);
        assert_eq!(reserved(&table), 0, "round {round}: {outcome:?}");
        while dispatch.poll_report().is_some() {}
    }
}

#[test]
fn messages_over_broken_connections_are_paced_from_20_ms_up_to_an_eighth_of_the_time_left() {
    let mut one = One::new(4, 10_000);
    let (host, _) = one.sent(0);
    let (mut now, mut sent) = (0, true);
    let mut paces = Vec::new();
    while paces.len() < 5 {
        if sent {
            one.launch.handle_lost(now, host, &one.table, &mut one.dispatch);
        } else {
            one.launch.handle_cancel(now, host, false, &one.table, &mut one.dispatch);
        }
        let mut step = one.poll(now);
        if let Step::Wait { until } = step {
            paces.push(until - now);
            now = until;
            step = one.poll(now);
        }
        // Asked twice more, then cancelled at once, and again and again.
        match step {
            Step::Send { host: same, again: true, .. } => assert_eq!(same, host),
            Step::Cancel { host: same } => {
                assert_eq!(same, host);
                sent = false;
            }
            other => panic!("{other:?} after {paces:?}"),
        }
    }
    assert_eq!(paces[..3], [20_000, 80_000, 320_000]);
    assert!(paces[3..].iter().all(|pace| (1_000_000..=1_250_000).contains(pace)), "{paces:?}");
}
