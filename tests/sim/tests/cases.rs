//! FAULTS H8 to H10, M5, M6, D2, P1 to P7, P9, P10 and Q7 as runs of the simulator, each with its figure. Run them one by one with `--nocapture` to
//! see the figures.

use tests_sim::{Fault, Options, Outcome, What, run};

const SHOWN: &str = "see the printed figures";

fn go(name: &str, options: &Options) -> Outcome {
    let outcome = run(options);
    assert_eq!(outcome.broken, None, "{name}");
    println!(
        "{name}: offered {}, success {:.5}, attempts a launch {:.3}, p50 {} us, p99 {} us, ends {:?}",
        outcome.span(0, usize::MAX).offered,
        outcome.success(0, usize::MAX),
        outcome.attempts_a_launch(),
        outcome.latency_us(50),
        outcome.latency_us(99),
        outcome.codes
    );
    outcome
}

fn fault(from_s: f64, to_s: f64, what: What) -> Fault {
    Fault { from_s, to_s, what }
}

#[test]
fn p1_a_black_hole_swallows_little() {
    let faults = vec![fault(0.0, 60.0, What::BlackHole(0.01))];
    let options = Options { rate: 500.0, seconds: 30, trace: true, faults, ..Options::default() };
    let outcome = go("P1", &options);
    let hole = &outcome.faulty[0];
    assert_eq!(hole.len(), 1, "1 of 100 hosts");
    let after: Vec<_> = outcome.attempts.iter().skip(50).collect();
    let into = after.iter().filter(|(_, host)| hole.contains(host)).count();
    let quarantined_ms = outcome.quarantined_ms.get(&hole[0]).copied();
    println!(
        "P1: {into} of {} attempts after the first 50, quarantined after {quarantined_ms:?} ms",
        after.len()
    );
    assert!(into * 50 <= after.len(), "at most 2 %");
    // Also while it was still being found out.
    let early = after.iter().take(1_000).filter(|(_, host)| hole.contains(host)).count();
    assert!(early <= 20, "{early} of the next 1,000");
    assert!(outcome.success(0, usize::MAX) >= 0.999, "{SHOWN}");
    assert!(quarantined_ms.is_some_and(|at| at <= 10_000), "{SHOWN}");
}

#[test]
fn p2_a_bad_roll_out_keeps_the_cap_and_says_what_is_wrong() {
    let faults = vec![fault(0.0, 60.0, What::BlackHole(0.6))];
    let options = Options { rate: 300.0, seconds: 20, faults, ..Options::default() };
    let outcome = go("P2", &options);
    println!("P2: at most {} of 100 in quarantine", outcome.quarantined_max);
    assert!(outcome.quarantined_max <= 10, "the cap holds");
    let ends = |name| outcome.codes.get(name).copied().unwrap_or(0);
    assert!(ends("fleet-failing") > 0, "{SHOWN}");
    assert_eq!(ends("no-capacity"), 0, "{SHOWN}");
    // Told apart by outcomes, the 40 good hosts carry what is offered.
    assert!(outcome.success(10, 20) >= 0.99, "{}", outcome.success(10, 20));
}

fn gray(name: &str, what: What) {
    let faults = vec![fault(10.0, 60.0, what)];
    let options = Options {
        rate: 1_000.0,
        seconds: 200,
        life_seconds: 2.0,
        trace: true,
        faults,
        ..Options::default()
    };
    let outcome = go(name, &options);
    let hosts = &outcome.faulty[0];
    let fair = outcome.share(hosts, 0, 10_000);
    let ill = outcome.share(hosts, 40_000, 60_000);
    let healed = outcome.share(hosts, 180_000, 200_000);
    println!(
        "{name}: share before {fair:.4}, from 30 s on {ill:.4}, 120 s after healing {healed:.4}"
    );
    assert!(ill <= 0.2 * fair, "{name}: {ill} of {fair}");
    assert!(healed >= 0.5 * fair, "{name}: {healed} of {fair}");
    assert!(outcome.success(40, 60) >= 0.999, "{name}: {}", outcome.success(40, 60));
}

#[test]
fn p3_a_gray_host_loses_its_share_and_gets_it_back() {
    gray("P3 slow", What::Gray(0.02, 10));
    gray("P3 dead port", What::PortDead(0.02));
}

#[test]
fn p4_a_lying_host_gets_at_most_three_shares() {
    let faults = vec![fault(0.0, 60.0, What::Lying)];
    let options = Options { rate: 500.0, seconds: 30, trace: true, faults, ..Options::default() };
    let outcome = go("P4", &options);
    let share = outcome.share(&outcome.faulty[0], 16_000, 30_000) * 100.0;
    println!("P4: {share:.2} fair shares");
    assert!(share <= 3.0 && share > 1.0, "{share}: it lies, and is not believed");
}

#[test]
fn p5_a_map_and_a_feed_a_minute_old_still_serve() {
    // 10 % of the hosts are gone and no map says so; the feed is a minute late and 10 % are full.
    let faults = vec![
        fault(-0.5, 90.0, What::Gone(0.1)),
        fault(-0.5, 90.0, What::Full(0.1)),
        fault(-1.0, 90.0, What::NoMaps),
        fault(-1.0, 90.0, What::NoFeed),
    ];
    let options = Options {
        hosts: 500,
        slots: 40,
        rate: 250.0,
        seconds: 60,
        warm_seconds: 5,
        life_seconds: 45.0,
        faults,
        ..Options::default()
    };
    let outcome = go("P5", &options);
    println!("P5: {} refusals", outcome.refused);
    assert!(outcome.success(0, usize::MAX) >= 0.999, "{}", outcome.success(0, usize::MAX));
    assert!(outcome.attempts_a_launch() <= 1.3, "{}", outcome.attempts_a_launch());
}

#[test]
fn p6_a_herd_spreads() {
    let options = Options {
        hosts: 1_000,
        slots: 400,
        cores: 64,
        placers: 4,
        rate: 100_000.0,
        seconds: 1,
        life_seconds: 30.0,
        ..Options::default()
    };
    let outcome = go("P6", &options);
    println!("P6: max over mean {:.3}", outcome.max_over_mean());
    assert!(outcome.max_over_mean() <= 1.5, "{}", outcome.max_over_mean());
    assert!(outcome.success(0, usize::MAX) >= 0.999);
}

#[test]
fn p7_half_the_fleet_silent_removes_nobody() {
    let faults = vec![fault(2.0, 122.0, What::Silent(0.5))];
    let options = Options {
        seconds: 130,
        rate: 100.0,
        beat_ms: 5_000,
        scan_ms: 10_000,
        faults,
        ..Options::default()
    };
    let outcome = go("P7", &options);
    assert!(outcome.braked && outcome.removed == 0, "removed {}", outcome.removed);
    assert!(outcome.success(0, usize::MAX) >= 0.9999);
    // One at a time, silence is death.
    let faults = vec![fault(2.0, 122.0, What::Silent(0.05))];
    let outcome = go("P7, 5 %", &Options { faults, ..options });
    assert!(!outcome.braked && outcome.removed >= 5, "removed {}", outcome.removed);
}

#[test]
fn p9_a_greedy_tenant_does_not_slow_the_others() {
    let calm = Options { rate: 5.0, seconds: 120, slots: 256, ..Options::default() };
    let alone = go("P9 alone", &calm);
    let beside = go(
        "P9 beside 1000x",
        &Options { hog: 1_000.0, seconds: 40, rate: 15.0, life_seconds: 0.5, ..calm },
    );
    let (before, after) = (alone.latency_us(99), beside.latency_us(99));
    println!("P9: p99 {before} us alone, {after} us beside");
    assert!(after * 10 <= before * 12, "{after} against {before}");
    assert!(beside.success(0, usize::MAX) >= 0.999);
}

#[test]
fn p10_overload_keeps_goodput_and_ends_with_its_cause() {
    // 100 hosts of 16 slots, 5 s a sandbox: 320 a second are all that fit. Three times that for 5 minutes.
    let faults = vec![fault(10.0, 310.0, What::Load(4.0))];
    let options = Options { slots: 16, rate: 240.0, seconds: 340, faults, ..Options::default() };
    let outcome = go("P10", &options);
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let goodput = outcome.span(20, 310).started as f64 / 290.0;
    println!(
        "P10: goodput {goodput:.1} of 320 a second, success 10 s after {:.5}",
        outcome.success(320, 340)
    );
    assert!(goodput >= 0.9 * 320.0, "{goodput}");
    assert!(outcome.success(320, 340) >= 0.999, "{}", outcome.success(320, 340));
}

#[test]
fn q7_a_total_outage_is_not_amplified() {
    let faults = vec![fault(5.0, 65.0, What::Outage)];
    let options = Options { rate: 500.0, seconds: 90, trace: true, faults, ..Options::default() };
    let outcome = go("Q7", &options);
    let sent = outcome.attempts.iter().filter(|(at, _)| (5_000..65_000).contains(at)).count();
    let offered = outcome.span(5, 65).offered;
    println!(
        "Q7: {sent} sent for {offered} offered in the outage, success after {:.5}",
        outcome.success(80, 90)
    );
    assert!(sent as u64 * 10 <= offered * 11, "{sent} for {offered}");
    assert!(outcome.success(80, 90) >= 0.9999, "{}", outcome.success(80, 90));
}

#[test]
fn p7_scans_faster_than_heartbeats_take_nobody() {
    // heartbeatd scans every 5 s: hosts that fell silent together pass for dead over three scans.
    let faults = vec![fault(2.0, 182.0, What::Silent(0.5))];
    let options = Options {
        seconds: 190,
        rate: 20.0,
        beat_ms: 15_000,
        scan_ms: 5_000,
        faults,
        ..Options::default()
    };
    let outcome = go("P7, 5 s scans", &options);
    println!("P7, 5 s scans: {} of 100 removed before the brake held", outcome.removed);
    assert!(outcome.braked && outcome.removed == 0, "removed {}", outcome.removed);
    assert!(outcome.success(0, usize::MAX) >= 0.9999);
}

/// Three aggregators, each of which is killed or stopped for a while, a database that is away for two minutes and an object
/// store for one: nobody leaves, nobody is missing, nearly all launches start.
#[test]
fn h10_m6_d2_aggregators_die_and_stores_go_away() {
    let faults = vec![
        fault(5.0, 20.0, What::AggregatorKilled(0)),
        fault(25.0, 85.0, What::AggregatorStopped(1)),
        fault(30.0, 150.0, What::NoDatabase),
        fault(60.0, 75.0, What::AggregatorKilled(2)),
        fault(160.0, 220.0, What::NoMaps),
        fault(230.0, 250.0, What::Flaky(0.3)),
    ];
    let options = Options {
        aggregators: 3,
        seconds: 290,
        rate: 100.0,
        scan_ms: 5_000,
        faults,
        ..Options::default()
    };
    let outcome = go("H10, M6, D2", &options);
    println!(
        "removed {}, missing {}, last map {:?}",
        outcome.removed, outcome.missing, outcome.version
    );
    assert_eq!((outcome.removed, outcome.missing), (0, 0));
    assert!(outcome.success(0, usize::MAX) >= 0.9999, "{}", outcome.success(0, usize::MAX));
}

/// A third of all datagrams lost, half a second of jitter, some twice, clocks ten minutes apart: nobody is taken for dead.
#[test]
fn h8_h9_a_third_lost_and_clocks_apart_kill_nobody() {
    let faults = vec![fault(0.0, 600.0, What::Storm(0.3))];
    let options = Options {
        hosts: 200,
        aggregators: 2,
        skew_seconds: 600,
        rate: 20.0,
        seconds: 600,
        scan_ms: 5_000,
        faults,
        ..Options::default()
    };
    let outcome = go("H8, H9", &options);
    println!("H8, H9: {} removed in {} host-seconds", outcome.removed, 200 * 600);
    assert_eq!((outcome.removed, outcome.missing), (0, 0));
    assert!(outcome.success(0, usize::MAX) >= 0.9999, "{}", outcome.success(0, usize::MAX));
}

/// Q1: a named id comes through two placers, to hosts that are full, restart, are cut off and lose replies.
#[test]
fn q1_one_id_through_two_placers_is_one_sandbox() {
    for seed in 0..100 {
        let downs = (0..4).map(|n| {
            let from_s = f64::from(n) * 4.0;
            fault(from_s, from_s + 1.5, What::HostdDown(0.5))
        });
        let faults = downs.chain([fault(2.0, 14.0, What::Swizzle(0.6))]).collect();
        let options = Options {
            seed,
            hosts: 8,
            slots: 4,
            placers: 3,
            rate: 4.0,
            seconds: 30,
            life_seconds: 8.0,
            budget_ms: 1_500,
            reply_loss: 0.1,
            named: 0.7,
            faults,
            ..Options::default()
        };
        let outcome = run(&options);
        assert_eq!(outcome.broken, None, "seed {seed}");
        assert!(outcome.success(0, usize::MAX) > 0.3, "{:?}", outcome.codes);
    }
}
