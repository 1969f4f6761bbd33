//! A host without boxes, over real QUIC: admission, identity of launches, calls, drain, deadlines, heartbeats.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::{Fleet, HOST, block_on, call, inspect, launch, request, run, started};
use hostd::{Boxes, Config, HostConfig};
use wire::{
    Code, HostId, LaunchId, SandboxId,
    call::{Answer, Call, ExitWhy, State},
    frame::{Header, Kind, lane_tag},
    launch::{LaunchHead, LaunchReply, Limits},
};
use wire_net::{stream, tls::Peer};

#[test]
fn the_same_launch_a_hundred_times_at_once_is_one_sandbox() {
    let fleet = Fleet::new();
    let host = run(fleet.config(HOST));
    block_on(async {
        let mut asked = Vec::new();
        for _ in 0..3 {
            let placer = fleet.placer(HOST, host.addr).await;
            for _ in 0..34 {
                let placer = placer.clone();
                asked.push(async move { launch(&placer, &request(7, "img", &["a"])).await });
            }
        }
        let replies = futures::future::join_all(asked).await;
        assert!(matches!(replies[0], LaunchReply::Started(_)));
        assert!(replies.iter().all(|reply| *reply == replies[0]), "the same answer");
        let placer = fleet.placer(HOST, host.addr).await;
        let LaunchReply::Failed(fault) = launch(&placer, &request(7, "img", &["b"])).await else {
            panic!("another body under the same id")
        };
        assert_eq!(fault.code, Code::Conflict);
        let list = Call::List { tenant: String::new(), labels: vec![], ended: true };
        let Answer::Sandboxes(all) = call(&placer, &list).await.unwrap() else { panic!() };
        assert_eq!(all.len(), 1);
    });
    host.end().unwrap();
}

#[test]
fn a_refusal_gives_the_true_word_and_a_cancel_the_slot_back() {
    let fleet = Fleet::new();
    let host = run(Config { cpu_millis: Some(500), ..fleet.config(HOST) });
    block_on(async {
        let placer = fleet.placer(HOST, host.addr).await;
        let first = started(&placer, &request(1, "img", &["a"])).await;
        assert_eq!(first.word.free_all()[0], 1);
        started(&placer, &request(2, "img", &["a"])).await;
        let LaunchReply::Refused(refused) = launch(&placer, &request(3, "img", &["a"])).await
        else {
            panic!("there was no room")
        };
        assert_eq!((refused.code, refused.word.free_all()[0]), (Code::NoCapacity, 0));
        let cancel =
            |number: u128| Call::Cancel { launch_id: LaunchId(number.to_le_bytes()), host: HOST };
        assert_eq!(call(&placer, &cancel(1)).await, Ok(Answer::Done));
        let State::Stopped(exit) = inspect(&placer, first.sandbox).await.state else { panic!() };
        assert_eq!(exit.why, ExitWhy::Killed);
        // Before it came, and after it was done.
        assert_eq!(call(&placer, &cancel(4)).await, Ok(Answer::Done));
        for number in [1, 4] {
            let LaunchReply::Failed(fault) = launch(&placer, &request(number, "img", &["a"])).await
            else {
                panic!("a cancelled launch started")
            };
            assert_eq!(fault.code, Code::Cancelled);
        }
        started(&placer, &request(5, "img", &["a"])).await;
    });
}

#[test]
fn deadlines_are_kept_with_nobody_connected() {
    let fleet = Fleet::new();
    let host = run(fleet.config(HOST));
    block_on(async {
        let placer = fleet.placer(HOST, host.addr).await;
        let mut asked = request(1, "img", &["a"]);
        asked.limits = Limits { hard_ms: 300, ..Limits::default() };
        let id = started(&placer, &asked).await.sandbox;
        placer.close(0u32.into(), b"gone");
        let begun = Instant::now();
        // The next one to ask finds it ended, at its deadline and not when asked.
        tokio::time::sleep(Duration::from_millis(600)).await;
        let placer = fleet.placer(HOST, host.addr).await;
        let record = inspect(&placer, id).await;
        let State::Stopped(exit) = record.state else { panic!("still {:?}", record.state) };
        assert_eq!(exit.why, ExitWhy::Deadline);
        assert!(begun.elapsed() < Duration::from_secs(30));
        let Answer::Exited(waited) = call(&placer, &Call::Wait(id)).await.unwrap() else {
            panic!()
        };
        assert_eq!(waited, exit);
    });
}

#[test]
fn a_drained_host_refuses_and_comes_to_zero() {
    let fleet = Fleet::new();
    let host = run(fleet.config(HOST));
    block_on(async {
        let placer = fleet.placer(HOST, host.addr).await;
        let id = started(&placer, &request(1, "img", &["a"])).await.sandbox;
        let operator = fleet.connect(&Peer::Operator, HOST, host.addr).await.unwrap();
        let drain = Call::Drain { host: HOST, deadline_ms: 200, message: "test".into() };
        let forbidden = call(&placer, &drain).await.unwrap_err();
        assert_eq!(forbidden.code, Code::Forbidden);
        assert_eq!(stream::call(&operator, &drain).await, Ok(Answer::Done));
        let LaunchReply::Refused(refused) = launch(&placer, &request(2, "img", &["a"])).await
        else {
            panic!("a draining host took work")
        };
        assert_eq!(refused.code, Code::Draining);
        assert!(refused.word.has(wire::CapacityWord::DRAINING));
        let Answer::Exited(exit) = call(&placer, &Call::Wait(id)).await.unwrap() else { panic!() };
        assert_eq!(exit.why, ExitWhy::Lost);
        assert_eq!(stream::call(&operator, &Call::Undrain(HOST)).await, Ok(Answer::Done));
        started(&placer, &request(3, "img", &["a"])).await;
    });
}

#[test]
fn a_sandbox_is_its_tenants_and_nobody_elses() {
    let fleet = Fleet::new();
    let host = run(fleet.config(HOST));
    block_on(async {
        let placer = fleet.placer(HOST, host.addr).await;
        let id = started(&placer, &request(1, "img", &["a"])).await.sandbox;
        for call in [Call::Inspect(id), Call::Kill { sandbox: id, signal: 0 }, Call::Wait(id)] {
            let other = stream::call_on_behalf(&placer, "other", &call).await.unwrap_err();
            assert_eq!(other.code, Code::SandboxNotFound);
            let none = stream::call(&placer, &call).await.unwrap_err();
            assert_eq!(none.code, Code::SandboxNotFound, "a placer has no sandboxes of its own");
        }
        let foreign = Call::Inspect(SandboxId { host: HostId(1), ..id });
        assert_eq!(call(&placer, &foreign).await.unwrap_err().code, Code::SandboxNotFound);
        inspect(&placer, id).await;
        let tenant = Peer::Client { tenant: "acme".into() };
        let refused = fleet.connect(&tenant, HOST, host.addr).await;
        let used = match refused {
            Ok(connection) => stream::call(&connection, &Call::Ping).await.map(|_| ()),
            Err(fault) => Err(fault),
        };
        assert!(used.is_err(), "a host serves placers and operators (PROTOCOL 8.3)");
    });
}

#[test]
fn a_lane_carries_many_launches_and_a_broken_one_ends() {
    const LAUNCHES: u32 = 500;
    let fleet = Fleet::new();
    let host = run(Config { noop_ms: Some(0), ..fleet.config(HOST) });
    block_on(async {
        let placer = fleet.placer(HOST, host.addr).await;
        let (mut send, mut recv) = placer.open_bi().await.unwrap();
        let mut out = BytesMut::new();
        out.extend_from_slice(&Header { kind: Kind::Lane, len: 0 }.bytes());
        for tag in 0..LAUNCHES {
            let bytes = request(u128::from(tag), "img", &["a"]).to_bytes();
            let len = 4 + LaunchHead::BYTES + bytes.len();
            out.extend_from_slice(&Header { kind: Kind::LaneLaunch, len }.bytes());
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&LaunchHead::new(1_000).bytes());
            out.extend_from_slice(&bytes);
        }
        // In pieces that cut frames anywhere.
        let bytes = out.freeze();
        for piece in bytes.chunks(777) {
            send.write_all(piece).await.unwrap();
        }
        let mut seen = std::collections::BTreeSet::new();
        let mut scratch = BytesMut::new();
        while seen.len() < LAUNCHES as usize {
            let (kind, payload) =
                stream::read_frame(&mut recv, &mut scratch).await.unwrap().unwrap();
            assert_eq!(kind, Kind::LaneReply);
            let (tag, reply) = lane_tag(&payload).unwrap();
            let reply = LaunchReply::from_bytes(reply).unwrap();
            assert!(matches!(reply, LaunchReply::Started(_)), "{reply:?}");
            assert!(seen.insert(tag), "one reply a tag");
        }
        send.write_all(&[99, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
        assert!(stream::read_frame(&mut recv, &mut scratch).await.is_err(), "PROTOCOL 7.6");
        assert_eq!(stream::call(&placer, &Call::Ping).await, Ok(Answer::Done), "others go on");
    });
}

#[test]
fn a_busy_port_and_a_busy_state_are_said() {
    let fleet = Fleet::new();
    let config = fleet.config(HOST);
    let first = run(config.clone());
    block_on(fleet.placer(HOST, first.addr));
    let same_state = run(Config { listen: common::free_addr(), ..config.clone() });
    assert_eq!(same_state.thread_result().code, Code::Busy);
    let other = HostId(HOST.0 + 1);
    let same_port = run(Config { listen: config.listen, ..fleet.config(other) });
    assert_eq!(same_port.thread_result().code, Code::Busy);
    first.end().unwrap();
}

#[test]
fn many_hosts_of_one_process_each_answer_for_themselves() {
    let fleet = Fleet::new();
    let hosts: Vec<HostId> = (1..=20).map(|n| HostId(n << 40)).collect();
    let configs: Vec<Config> = hosts.iter().map(|host| fleet.config(*host)).collect();
    let listed = configs
        .iter()
        .enumerate()
        .map(|(at, config)| HostConfig {
            identity: config.identity.clone(),
            state: config.state.clone(),
            listen: std::net::SocketAddr::from((
                [127, 1, 0, u8::try_from(at + 1).unwrap()],
                config.listen.port(),
            )),
            advertise: None,
        })
        .collect::<Vec<_>>();
    let mut all = configs[0].clone();
    all.hosts = listed.clone();
    all.threads = 2;
    all.boxes = Boxes::None;
    let running = run(all);
    block_on(async {
        for (host, listed) in hosts.iter().zip(&listed) {
            let placer = fleet.placer(*host, listed.listen).await;
            let started = started(&placer, &request(1, "img", &["a"])).await;
            assert_eq!(started.sandbox.host, *host);
        }
    });
    running.end().unwrap();
}
