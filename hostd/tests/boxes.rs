//! Real boxes behind a real hostd process, over QUIC: what users do, and what is left after `kill -9`.
//!
//! Runs as root only; prints `skipped` else. With an argument, those tests whose name holds it.
#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]
#![allow(unexpected_cfgs, reason = "shared with tests of the usual harness")]

mod common;
mod crashes;
mod network;
mod place;

use std::time::{Duration, Instant};

use common::{block_on, call, inspect, launch, request, started};
use place::{Place, attach_all, exec_all, exited, fault_of};
use wire::{
    Code,
    call::{Answer, Call, ChangeKind, ExecRequest, Exit, ExitWhy, FileOp, MAIN_PROCESS, State},
    frame::Kind,
    launch::{LaunchReply, Limits},
};
use wire_net::stream;

fn main() {
    place::main(&[
        ("a_program_runs_and_its_end_is_told", a_program_runs_and_its_end_is_told),
        ("what_cannot_start_fails_by_its_code", what_cannot_start_fails_by_its_code),
        ("one_launch_id_is_one_box", one_launch_id_is_one_box),
        ("exec_with_input_and_terminal", exec_with_input_and_terminal),
        ("files_go_in_and_out", files_go_in_and_out),
        ("pause_stats_signal_and_kill", pause_stats_signal_and_kill),
        ("deadlines_end_boxes", deadlines_end_boxes),
        ("a_cancelled_launch_leaves_nothing", a_cancelled_launch_leaves_nothing),
        ("output_beyond_the_log_is_lost_and_counted", output_beyond_the_log_is_lost_and_counted),
        (
            "a_killed_hostd_takes_its_boxes_up_again",
            crashes::a_killed_hostd_takes_its_boxes_up_again,
        ),
        ("a_named_refusal_outlives_hostd", crashes::a_named_refusal_outlives_hostd),
        (
            "a_kill_at_any_moment_loses_and_doubles_nothing",
            crashes::a_kill_at_any_moment_loses_and_doubles_nothing,
        ),
        ("an_upgrade_ends_no_box", crashes::an_upgrade_ends_no_box),
        ("a_killed_spawner_leaves_nothing", crashes::a_killed_spawner_leaves_nothing),
        (
            "a_torn_journal_opens_and_nothing_stays_unowned",
            crashes::a_torn_journal_opens_and_nothing_stays_unowned,
        ),
        ("many_boxes_come_and_go", many_boxes_come_and_go),
        ("without_egress_nothing_is_reached", network::without_egress_nothing_is_reached),
        ("egress_reaches_what_is_allowed", network::egress_reaches_what_is_allowed),
        ("what_the_operator_closes_is_refused", network::what_the_operator_closes_is_refused),
        ("names_open_what_they_resolve_to", network::names_open_what_they_resolve_to),
        ("datagrams_pass_by_rule", network::datagrams_pass_by_rule),
        ("large_transfers_are_whole", network::large_transfers_are_whole),
        ("connections_and_bandwidth_are_bounded", network::connections_and_bandwidth_are_bounded),
        ("egress_outlives_hostd_and_its_worker", network::egress_outlives_hostd_and_its_worker),
        ("published_ports_lead_in", network::published_ports_lead_in),
        ("a_first_run_leaves_a_boot_pack", a_first_run_leaves_a_boot_pack),
        (
            "a_full_state_directory_undoes_what_it_fails",
            crashes::full::a_full_state_directory_undoes_what_it_fails,
        ),
        ("images_by_loop_devices", images_by_loop_devices),
        ("image_processes_go_when_hostd_does_not_come_back", crashes::image_processes_go),
    ]);
}

fn a_program_runs_and_its_end_is_told() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let line = "echo out; echo err >&2; echo $A $0; exit 7";
        let mut asked = request(1, "img", &["sh", "-c", line, "zero"]);
        asked.env = vec![("A".into(), "b c".into())];
        asked.labels = vec![("k".into(), "v".into())];
        let answer = started(&placer, &asked).await;
        assert!(answer.steps.total_ns > 0 && answer.steps.exec_ns > 0, "{:?}", answer.steps);
        let id = answer.sandbox;
        assert_eq!(exited(&placer, id).await, Exit { code: 7, why: ExitWhy::Returned });
        let (out, err, exit) = attach_all(&placer, id, MAIN_PROCESS, 0).await;
        assert_eq!((out.as_str(), err.as_str()), ("out\nb c zero\n", "err\n"));
        assert_eq!(exit, Some(Exit { code: 7, why: ExitWhy::Returned }));
        let record = inspect(&placer, id).await;
        assert_eq!(record.command[0], "sh");
        assert!(matches!(record.state, State::Stopped(_)));
        let labelled = |value: &str| Call::List {
            tenant: String::new(),
            labels: vec![("k".into(), value.into())],
            ended: true,
        };
        for (value, count) in [("v", 1), ("w", 0)] {
            let Answer::Sandboxes(found) = call(&placer, &labelled(value)).await.unwrap() else {
                panic!()
            };
            assert_eq!(found.len(), count);
        }
    });
    place.end();
}

fn what_cannot_start_fails_by_its_code() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let mut number = 0;
        let mut asked = |image: &str, command: &[&str]| {
            number += 1;
            request(number, image, command)
        };
        let mut user = asked("img", &["sh"]);
        user.user = "nobody-here".into();
        let cases = [
            (asked("no-such-image", &["sh"]), Code::ImageNotFound),
            (asked(&"ab".repeat(32), &["sh"]), Code::ImageNotFound),
            (asked("img", &["no-such-program"]), Code::CommandNotFound),
            (asked("img", &["/etc/passwd"]), Code::CommandNotExecutable),
            (asked("img", &[]), Code::BadRequest),
            (user, Code::UserNotFound),
        ];
        for (request, code) in cases {
            let first = launch(&placer, &request).await;
            assert_eq!(fault_of(&first).code, code, "{first:?}");
            assert_eq!(launch(&placer, &request).await, first, "the same answer again");
        }
        let list = Call::List { tenant: String::new(), labels: vec![], ended: true };
        assert_eq!(call(&placer, &list).await, Ok(Answer::Sandboxes(vec![])));
    });
    place.end();
}

fn one_launch_id_is_one_box() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let asked = request(1, "img", &["sleep", "100"]);
        let replies = futures::future::join_all((0..100).map(|_| launch(&placer, &asked))).await;
        assert!(matches!(replies[0], LaunchReply::Started(_)), "{:?}", replies[0]);
        assert!(replies.iter().all(|reply| *reply == replies[0]), "the same answer");
        place.programs_become("sleep", 1);
        let other = request(1, "img", &["sleep", "200"]);
        assert_eq!(fault_of(&launch(&placer, &other).await).code, Code::Conflict);
    });
    place.end();
}

fn exec_with_input_and_terminal() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let mut main = request(1, "img", &["sleep", "100"]);
        main.env = vec![("OWN".into(), "yes".into())];
        let id = started(&placer, &main).await.sandbox;
        let exec = |command: &[&str]| ExecRequest {
            sandbox: id,
            command: command.iter().map(|&arg| arg.into()).collect(),
            env: vec![("MORE".into(), "too".into())],
            cwd: "/tmp".into(),
            user: String::new(),
            tty: None,
            stdin: false,
        };
        let (out, err, exit) =
            exec_all(&placer, exec(&["sh", "-c", "pwd; echo $OWN $MORE; exit 3"]), b"").await;
        assert_eq!((out.as_str(), err.as_str()), ("/tmp\nyes too\n", ""));
        assert_eq!(exit, Some(Exit { code: 3, why: ExitWhy::Returned }));
        let mut cat = exec(&["cat"]);
        cat.stdin = true;
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| b'a' + (n % 23) as u8).collect();
        let (out, _, exit) = exec_all(&placer, cat, &sent).await;
        assert!(out.as_bytes() == sent, "a megabyte goes in and comes out: {}", out.len());
        assert_eq!(exit.unwrap().code, 0);
        let mut terminal = exec(&["sh", "-c", "stty size; read x; stty size; echo got $x"]);
        terminal.tty = Some((30, 90));
        let (_, mut send, mut recv) =
            stream::open_on_behalf(&placer, "acme", &Call::Exec(terminal)).await.unwrap();
        let mut said = String::new();
        place::read_until(&mut recv, &mut said, "30 90").await;
        let size: Vec<u8> = [40u16, 100].iter().flat_map(|n| n.to_le_bytes()).collect();
        stream::write_frame(&mut send, Kind::Resize, &size).await.unwrap();
        stream::write_frame(&mut send, Kind::Stdin, b"word\n").await.unwrap();
        place::read_until(&mut recv, &mut said, "got word").await;
        assert!(said.contains("40 100"), "{said}");
        let missing = stream::call_on_behalf(&placer, "acme", &Call::Exec(exec(&["nope"]))).await;
        assert_eq!(missing.unwrap_err().code, Code::CommandNotFound);
    });
    place.end();
}

fn files_go_in_and_out() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let id = started(&placer, &request(1, "img", &["sleep", "100"])).await.sandbox;
        let op = |op| Call::File { sandbox: id, op };
        let path = |name: &str| format!("/tmp/new/{name}");
        assert_eq!(call(&placer, &op(FileOp::MakeDir("/tmp/new".into()))).await, Ok(Answer::Done));
        let bytes: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
        place::write_file(&placer, id, &path("a"), &bytes).await.unwrap();
        let rename = FileOp::Rename { from: path("a"), to: path("b") };
        assert_eq!(call(&placer, &op(rename)).await, Ok(Answer::Done));
        assert!(place::read_file(&placer, id, &path("b")).await.unwrap() == bytes);
        let Answer::Files(files) =
            call(&placer, &op(FileOp::List("/tmp/new".into()))).await.unwrap()
        else {
            panic!()
        };
        assert_eq!((files.len(), files[0].name.as_str(), files[0].size), (1, "b", 2_800_000));
        let Answer::Files(stat) = call(&placer, &op(FileOp::Stat(path("b")))).await.unwrap() else {
            panic!()
        };
        assert_eq!(stat[0].mode & 0o170_777, 0o100_640);
        // PROTOCOL 7.5: a watch tells changes until what it watches is gone.
        let watch = op(FileOp::Watch("/tmp/new".into()));
        let (answer, _send, mut changes) =
            stream::open_on_behalf(&placer, "acme", &watch).await.unwrap();
        assert_eq!(answer, Answer::Done);
        assert_eq!(call(&placer, &op(FileOp::Remove("/tmp/new".into()))).await, Ok(Answer::Done));
        let told = place::read_changes(&mut changes).await;
        assert!(told.contains(&(ChangeKind::Removed, "b".to_owned())), "{told:?}");
        assert_eq!(told.last(), Some(&(ChangeKind::Removed, String::new())), "{told:?}");
        let missing = op(FileOp::Watch("/none".into()));
        let missing = stream::open_on_behalf(&placer, "acme", &missing).await.unwrap_err();
        assert_eq!(missing.code, Code::NotFound);
        let gone = place::read_file(&placer, id, &path("b")).await.unwrap_err();
        assert_eq!(gone.code, Code::NotFound);
    });
    place.end();
}

fn pause_stats_signal_and_kill() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let line = "trap 'echo term; exit 9' TERM; echo set; while :; do sleep 0.05; done";
        let id = started(&placer, &request(1, "img", &["sh", "-c", line])).await.sandbox;
        let attach = Call::Attach { sandbox: id, process: 0, offset: 0, follow: true };
        let (_, _send, mut recv) = stream::open_on_behalf(&placer, "acme", &attach).await.unwrap();
        place::read_until(&mut recv, &mut String::new(), "set").await;
        let Answer::Stats(stats) = call(&placer, &Call::Stats(id)).await.unwrap() else { panic!() };
        assert!(stats.memory_bytes > 0 && stats.pids >= 2, "{stats:?}");
        assert_eq!(call(&placer, &Call::Pause(id)).await, Ok(Answer::Done));
        assert_eq!(inspect(&placer, id).await.state, State::Paused);
        assert_eq!(call(&placer, &Call::Resume(id)).await, Ok(Answer::Done));
        assert_eq!(call(&placer, &Call::Kill { sandbox: id, signal: 15 }).await, Ok(Answer::Done));
        assert_eq!(exited(&placer, id).await, Exit { code: 9, why: ExitWhy::Returned });
        let paused = started(&placer, &request(2, "img", &["sleep", "100"])).await.sandbox;
        assert_eq!(call(&placer, &Call::Pause(paused)).await, Ok(Answer::Done));
        assert_eq!(
            call(&placer, &Call::Kill { sandbox: paused, signal: 0 }).await,
            Ok(Answer::Done)
        );
        assert_eq!(exited(&placer, paused).await.why, ExitWhy::Killed);
        let late = call(&placer, &Call::Pause(paused)).await.unwrap_err();
        assert_eq!(late.code, Code::WrongState);
    });
    place.end();
}

fn deadlines_end_boxes() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let mut hard = request(1, "img", &["sleep", "100"]);
        hard.limits = Limits { hard_ms: 400, ..Limits::default() };
        let mut idle = request(2, "img", &["sleep", "100"]);
        idle.limits = Limits { idle_ms: 400, ..Limits::default() };
        let mut busy = request(3, "img", &["sh", "-c", "while :; do echo x; sleep 0.1; done"]);
        busy.limits = Limits { idle_ms: 1_500, ..Limits::default() };
        let begun = Instant::now();
        let (hard, idle) = (started(&placer, &hard).await, started(&placer, &idle).await);
        let busy = started(&placer, &busy).await.sandbox;
        assert_eq!(exited(&placer, hard.sandbox).await.why, ExitWhy::Deadline);
        assert_eq!(exited(&placer, idle.sandbox).await.why, ExitWhy::Idle);
        assert!(begun.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(inspect(&placer, busy).await.state, State::Running, "output is use");
    });
    place.end();
}

fn a_cancelled_launch_leaves_nothing() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        for number in 1..20u128 {
            let asked = request(number, "img", &["sleep", "777"]);
            let cancel = Call::Cancel { launch_id: asked.launch_id, host: common::HOST };
            // The cancel overtakes the start, meets it, or comes after it.
            let wait = Duration::from_micros(u64::try_from(number).unwrap() * 200);
            let (reply, cancelled) = tokio::join!(launch(&placer, &asked), async {
                tokio::time::sleep(wait).await;
                call(&placer, &cancel).await
            });
            assert_eq!(cancelled, Ok(Answer::Done));
            assert_eq!(place.boxes_of_programs("sleep"), 0, "done means gone; {reply:?}");
            assert_eq!(fault_of(&launch(&placer, &asked).await).code, Code::Cancelled);
        }
    });
    place.end();
}

fn output_beyond_the_log_is_lost_and_counted() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let mut asked = request(1, "img", &["sh", "-c", "head -c 3000000 /dev/zero; echo end"]);
        asked.limits = Limits { log_bytes: 200_000, ..Limits::default() };
        let id = started(&placer, &asked).await.sandbox;
        exited(&placer, id).await;
        let attach = Call::Attach { sandbox: id, process: 0, offset: 0, follow: true };
        let (_, _send, mut recv) = stream::open_on_behalf(&placer, "acme", &attach).await.unwrap();
        let (mut lost, mut kept) = (0, 0);
        let mut scratch = bytes::BytesMut::new();
        while let Some((kind, payload)) = stream::read_frame(&mut recv, &mut scratch).await.unwrap()
        {
            match kind {
                Kind::Lost => lost += u64::from_le_bytes(payload[..].try_into().unwrap()),
                Kind::Stdout => kept += payload.len() as u64,
                Kind::Exit => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(lost + kept, 3_000_004);
        assert!(kept <= 200_000 && lost > 0, "{kept} kept");
    });
    place.end();
}

fn many_boxes_come_and_go() {
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let before = place.descriptors();
        for round in 0..10u128 {
            let asked: Vec<_> =
                (0..20).map(|n| request(1 + round * 20 + n, "img", &["true"])).collect();
            let started =
                futures::future::join_all(asked.iter().map(|r| started(&placer, r))).await;
            for one in started {
                assert_eq!(exited(&placer, one.sandbox).await.code, 0);
            }
        }
        let begun = Instant::now();
        while place.descriptors() > before + 20 {
            assert!(begun.elapsed() < Duration::from_secs(30), "descriptors leak");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    place.end();
}

/// Names of boot packs that are stored, with their bytes.
fn boot_packs(place: &Place) -> Vec<(String, u64)> {
    let images = std::fs::read_dir(place.objects().join("boot")).into_iter().flatten().flatten();
    let packs = images.flat_map(|image| std::fs::read_dir(image.path()).into_iter().flatten());
    let row = |entry: std::fs::DirEntry| {
        (entry.file_name().to_string_lossy().into_owned(), entry.metadata().unwrap().len())
    };
    packs.flatten().map(row).filter(|(name, _)| !name.contains('#')).collect()
}

/// What a first run read is there for the next host, which then reads nothing else.
fn a_first_run_leaves_a_boot_pack() {
    let mut place = Place::new();
    let run = |place: &Place, n| {
        block_on(async {
            let placer = place.placer().await;
            let id = started(&placer, &request(n, "img", &["sh", "-c", "ls / >&2; id"])).await;
            assert_eq!(exited(&placer, id.sandbox).await.code, 0);
        });
    };
    run(&place, 1);
    let begun = Instant::now();
    let packs = loop {
        let packs = boot_packs(&place);
        // The command's own, and the same for commands that have none.
        if packs.len() == 2 {
            break packs;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{packs:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(packs.iter().any(|(name, _)| name == "default"), "{packs:?}");
    assert!(packs.iter().all(|(_, bytes)| *bytes > 100_000), "{packs:?}");
    // A host that never saw the image, on a store whose packs are gone: all that the run reads is in the boot pack.
    place.forget_images();
    let moved = place.objects().with_file_name("away");
    std::fs::rename(place.objects().join("pack"), &moved).unwrap();
    run(&place, 2);
    std::fs::rename(moved, place.objects().join("pack")).unwrap();
    place.end();
}

/// The way for kernels that mount EROFS from devices only.
fn images_by_loop_devices() {
    let place = Place::with(|config| config.image_mount = hostd_image::MountBy::Loop);
    block_on(async {
        let placer = place.placer().await;
        let id = started(&placer, &request(1, "img", &["sh", "-c", "id; ls /"])).await.sandbox;
        let (out, err, exit) = attach_all(&placer, id, MAIN_PROCESS, 0).await;
        assert_eq!(exit.unwrap().code, 0, "{err}");
        assert!(out.contains("uid=0") && out.contains("etc"), "{out}");
    });
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let state = place.state().display().to_string();
    let by_loop = |line: &&str| line.starts_with("/dev/loop") && line.contains(&state);
    assert_eq!(mounts.lines().filter(by_loop).count(), 1, "{mounts}");
    place.end();
}
