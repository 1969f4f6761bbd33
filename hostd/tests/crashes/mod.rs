//! What is left of boxes, and what is known of them, when hostd or the spawner is killed or replaced.
#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]

pub(crate) mod full;

use std::time::{Duration, Instant};

use wire::{
    Code,
    call::{Answer, Call, ExecRequest, Exit, ExitWhy, State},
    frame::Kind,
    launch::{LaunchHead, LaunchReply, Limits},
};
use wire_net::stream;

use crate::{
    common::{block_on, call, inspect, launch, request, started},
    place::{self, Place, exec_all, exited, fault_of},
};

/// PROTOCOL 6.12: other placers went on to the next home, where it may run by now.
pub(crate) fn a_named_refusal_outlives_hostd() {
    let mut place = Place::with(|config| (config.boxes_max, config.pool) = (1, [1, 0, 0, 0]));
    let (full, named) = (request(1, "img", &["sleep", "100"]), request(2, "img", &["true"]));
    let refused = async |place: &Place| {
        let head = LaunchHead { budget_ms: 10_000, named: true };
        let placer = place.placer().await;
        match stream::launch(&placer, head, &named.to_bytes()).await.unwrap() {
            LaunchReply::Refused(refused) => refused.code,
            other => panic!("{other:?}"),
        }
    };
    block_on(async {
        let placer = place.placer().await;
        let id = started(&placer, &full).await.sandbox;
        assert_eq!(refused(&place).await, Code::NoCapacity);
        call(&placer, &Call::Kill { sandbox: id, signal: 0 }).await.unwrap();
        exited(&placer, id).await;
        assert_eq!(refused(&place).await, Code::NoCapacity, "although there is room");
    });
    place.kill_hostd();
    place.start_hostd();
    block_on(async {
        assert_eq!(refused(&place).await, Code::NoCapacity, "although it was killed");
        let placer = place.placer().await;
        let id = started(&placer, &request(3, "img", &["true"])).await.sandbox;
        assert_eq!(exited(&placer, id).await.code, 0);
    });
    place.end();
}

pub(crate) fn a_killed_hostd_takes_its_boxes_up_again() {
    let mut place = Place::new();
    let asked = request(1, "img", &["sh", "-c", "echo first; read x; echo $x; exit 5"]);
    let mut asked = asked;
    asked.stdin = true;
    let mut ends = request(2, "img", &["sh", "-c", "sleep 0.5; exit 4"]);
    ends.limits = Limits { hard_ms: 60_000, ..Limits::default() };
    let mut dies = request(3, "img", &["sleep", "100"]);
    dies.limits = Limits { hard_ms: 1_000, ..Limits::default() };
    let (id, ended, dead) = block_on(async {
        let placer = place.placer().await;
        (
            started(&placer, &asked).await.sandbox,
            started(&placer, &ends).await.sandbox,
            started(&placer, &dies).await.sandbox,
        )
    });
    place.kill_hostd();
    std::thread::sleep(Duration::from_millis(1_500));
    let begun = Instant::now();
    place.start_hostd();
    block_on(async {
        let placer = place.placer().await;
        let again = started(&placer, &asked).await;
        assert_eq!(again.sandbox, id, "the same sandbox for the same launch");
        let other = request(1, "img", &["sh"]);
        assert_eq!(fault_of(&launch(&placer, &other).await).code, Code::Conflict);
        assert_eq!(inspect(&placer, id).await.state, State::Running);
        assert_eq!(exited(&placer, ended).await, Exit { code: 4, why: ExitWhy::Returned });
        assert_eq!(exited(&placer, dead).await.why, ExitWhy::Deadline);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let attach = Call::Attach { sandbox: id, process: 0, offset: 0, follow: true };
        let (_, mut send, mut recv) =
            stream::open_on_behalf(&placer, "acme", &attach).await.unwrap();
        stream::write_frame(&mut send, Kind::Stdin, b"word\n").await.unwrap();
        let mut said = String::new();
        place::read_until(&mut recv, &mut said, "word").await;
        assert_eq!(exited(&placer, id).await.code, 5);
    });
    place.end();
}

/// FAULTS O4: hostd stops as for an upgrade, and then is killed, and the next one has them all, images included. With 40
/// boxes, or as many as `VOLLEY_OUTLIVE` says.
pub(crate) fn an_upgrade_ends_no_box() {
    let count = std::env::var("VOLLEY_OUTLIVE").ok().and_then(|count| count.parse().ok());
    let count: u32 = count.unwrap_or(40);
    let mut place = Place::with_room(count + 8);
    let asked: Vec<_> =
        (1..=u128::from(count)).map(|n| request(n, "img", &["sleep", "222"])).collect();
    let before = block_on(async {
        let placer = place.placer().await;
        let mut before = Vec::new();
        for some in asked.chunks(8) {
            let launches = some.iter().map(|request| started(&placer, request));
            before.extend(futures::future::join_all(launches).await);
        }
        before
    });
    for killed in [false, true] {
        if killed {
            place.kill_hostd();
        } else {
            place.stop_hostd();
        }
        place.programs_become("sleep", asked.len());
        let begun = Instant::now();
        place.start_hostd();
        println!("{count} boxes were taken up again in {:?} (killed: {killed})", begun.elapsed());
        block_on(async {
            let placer = place.placer().await;
            for (request, before) in asked.iter().zip(&before) {
                assert_eq!(started(&placer, request).await.sandbox, before.sandbox);
                assert_eq!(inspect(&placer, before.sandbox).await.state, State::Running);
            }
            // A program of the image that nobody has read yet.
            let exec = ExecRequest {
                sandbox: before[0].sandbox,
                command: vec![if killed { "id" } else { "stty" }.into(), "--version".into()],
                env: vec![],
                cwd: String::new(),
                user: String::new(),
                tty: None,
                stdin: false,
            };
            let (out, err, exit) = exec_all(&placer, exec, b"").await;
            assert_eq!(exit.unwrap().code, 0, "{out} {err}");
        });
        place.programs_become("sleep", asked.len());
    }
    place.end();
}

/// FAULTS O1 and Q1: hostd is killed while a dozen launches are at every step of theirs; each is asked again after.
pub(crate) fn a_kill_at_any_moment_loses_and_doubles_nothing() {
    const LAUNCHES: u128 = 12;
    let mut place = Place::new();
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed} (SEED=... replays)");
    let mut state = seed;
    for round in 0..6u128 {
        let asked: Vec<_> = (0..LAUNCHES)
            .map(|n| request(1 + round * LAUNCHES + n, "img", &["sleep", "333"]))
            .collect();
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let moment = Duration::from_micros((state >> 33) % 40_000);
        let before = block_on(async {
            let placer = place.placer().await;
            let head = wire::launch::LaunchHead::new(10_000);
            let bodies: Vec<_> = asked.iter().map(|request| request.to_bytes()).collect();
            let launches = bodies.iter().map(|body| stream::launch(&placer, head, body));
            let killed = async {
                tokio::time::sleep(moment).await;
                place.kill_hostd();
                // What is lost is lost at once: the peer that could say more is gone.
                placer.close(0u32.into(), b"killed");
            };
            tokio::join!(futures::future::join_all(launches), killed).0
        });
        place.start_hostd();
        block_on(async {
            let placer = place.placer().await;
            let mut ids = std::collections::BTreeSet::new();
            for (request, before) in asked.iter().zip(before) {
                let again = started(&placer, request).await;
                if let Ok(LaunchReply::Started(before)) = before {
                    assert_eq!(before.sandbox, again.sandbox, "an answer stays true");
                    assert_eq!(inspect(&placer, again.sandbox).await.state, State::Running);
                }
                ids.insert(again.sandbox);
            }
            assert_eq!(ids.len(), asked.len());
            for id in &ids {
                let record = inspect(&placer, *id).await;
                assert_eq!(
                    record.state,
                    State::Running,
                    "round {round}, {id}, {} ms old",
                    record.age_ms
                );
            }
            place.programs_become("sleep", ids.len());
            for id in ids {
                call(&placer, &Call::Kill { sandbox: id, signal: 0 }).await.unwrap();
                exited(&placer, id).await;
            }
            assert_eq!(place.boxes_of_programs("sleep"), 0);
        });
    }
    place.end();
}

pub(crate) fn a_killed_spawner_leaves_nothing() {
    let mut place = Place::new();
    let asked = request(1, "img", &["sleep", "555"]);
    let id = block_on(async {
        let placer = place.placer().await;
        started(&placer, &asked).await.sandbox
    });
    // At once: whether the row that says that it runs is written already or not.
    place.kill_hostd();
    place.kill_spawner();
    place.start_hostd();
    block_on(async {
        let placer = place.placer().await;
        assert_eq!(exited(&placer, id).await.why, ExitWhy::Lost);
        assert_eq!(place.boxes_of_programs("sleep"), 0);
        started(&placer, &request(2, "img", &["sleep", "555"])).await;
    });
    // With hostd alive it starts another one, and says what was lost.
    place.kill_spawner();
    block_on(async {
        let placer = place.placer().await;
        let begun = Instant::now();
        for number in 10.. {
            match launch(&placer, &request(number, "img", &["true"])).await {
                LaunchReply::Started(_) => break,
                other if begun.elapsed() > Duration::from_secs(60) => panic!("{other:?}"),
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        assert_eq!(place.boxes_of_programs("sleep"), 0);
    });
    place.end();
}

pub(crate) fn a_torn_journal_opens_and_nothing_stays_unowned() {
    let mut place = Place::new();
    let asked = request(1, "img", &["sleep", "444"]);
    block_on(async {
        let placer = place.placer().await;
        started(&placer, &asked).await;
    });
    for (round, cut) in [(1u128, 1u64), (2, 5_000), (3, 40_000)] {
        place.kill_hostd();
        place.tear_journal(cut);
        place.start_hostd();
        block_on(async {
            let placer = place.placer().await;
            // Either the journal knew it, and it goes on, or it was reaped: never both, never neither.
            let list = Call::List { tenant: String::new(), labels: vec![], ended: false };
            let Answer::Sandboxes(live) = call(&placer, &list).await.unwrap() else { panic!() };
            place.programs_become("sleep", live.len());
            started(&placer, &request(100 + round, "img", &["sleep", "444"])).await;
        });
    }
    place.end();
}

/// A hostd that is killed and never comes back: holder and worker of its images take their mounts away and end, half a
/// minute later, once nothing runs on them.
pub(crate) fn image_processes_go() {
    let mut place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let id = started(&placer, &request(1, "img", &["true"])).await.sandbox;
        assert_eq!(exited(&placer, id).await.code, 0);
    });
    assert_eq!(place.image_holders().len(), 1);
    place.kill_hostd();
    // Nothing keeps the spawner either: hostd is gone for good.
    place.kill_spawner();
    let begun = Instant::now();
    while !place.image_holders().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(90), "an image holder stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    place.start_hostd();
    place.end();
}
