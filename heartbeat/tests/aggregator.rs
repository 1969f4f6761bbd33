//! One aggregator over real sockets, an embedded store and a directory of objects.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod fleet;

use std::time::Duration;

use fleet::{Fleet, process::Aggregator, published, until};
use heartbeat::fleet_sender::SimHost;
use wire::{
    HostId,
    call::{Answer, Call},
    heartbeat::Heartbeat,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_register_are_published_drain_and_survive_a_restart() {
    let fleet = Fleet::new();
    let running = fleet.start(|_| {}).await;
    let mut senders = fleet.senders(500, &[running.udp]);
    senders.beat_all(20_000).unwrap();
    let map = until("the map has all hosts", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.count == 500)
    })
    .await;
    assert_eq!(map.1, senders.addresses());
    let figures = running.shards.figures().await;
    let spread: Vec<_> = figures.iter().map(|shard| (shard.hosts, shard.handed_on)).collect();
    println!("hosts and handed on of each shard: {spread:?}");
    assert!(spread.iter().all(|&(hosts, _)| hosts > 180), "both receivers hear hosts");

    let drained = senders.hosts[7].host;
    let operator = fleet.operator(&running).await;
    let message = "kernel".to_owned();
    let drain = Call::Drain { host: drained, deadline_ms: 60_000, message };
    assert_eq!(wire_net::stream::call(&operator, &drain).await, Ok(Answer::Done));
    let nobody = Call::Drain { host: HostId(1), deadline_ms: 0, message: String::new() };
    let fault = wire_net::stream::call(&operator, &nobody).await.unwrap_err();
    assert_eq!(fault.code, wire::Code::HostNotFound);
    senders.beat_all(20_000).unwrap();
    until("the host was told", async || {
        senders.take_directives().unwrap();
        (senders.hosts[7].beat.flags & Heartbeat::DRAINING != 0).then_some(())
    })
    .await;
    assert_eq!(senders.directives, 1, "nobody else was told anything");
    senders.beat_all(20_000).unwrap();
    let state = async |operator: &quinn::Connection| {
        let hosts = fleet::hosts(operator).await;
        assert_eq!(hosts.len(), 500);
        hosts.into_iter().find(|host| host.host == drained).map(|host| (host.state, host.message))
    };
    let wanted = ("drained".to_owned(), "kernel".to_owned());
    until("it says that it is drained", async || {
        (state(&operator).await.as_ref() == Some(&wanted)).then_some(())
    })
    .await;
    running.stop().await;

    let running = fleet.start(|_| {}).await;
    let operator = fleet.operator(&running).await;
    assert_eq!(state(&operator).await, Some(wanted), "drains and hosts survive a restart");
    senders.retarget(running.udp);
    assert_eq!(wire_net::stream::call(&operator, &Call::Undrain(drained)).await, Ok(Answer::Done));
    senders.beat_all(20_000).unwrap();
    until("the host was told to resume", async || {
        senders.take_directives().unwrap();
        (senders.hosts[7].beat.flags & Heartbeat::DRAINING == 0).then_some(())
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_silent_leave_the_map_and_a_burst_of_silence_empties_nothing() {
    let fleet = Fleet::new();
    let running = fleet
        .start(|config| {
            config.scan_ms = 100;
            config.grace_ms = 100;
        })
        .await;
    let mut senders = fleet.senders(100, &[running.udp]);
    senders.hosts.iter_mut().for_each(|host| host.beat.interval_ms = 200);
    let count = async || published(&fleet.objects()).await.map(|(head, _)| head.count);
    // Ten fall silent: they leave.
    until("ninety are left", async || {
        let speaking = if count().await == Some(100) || senders.sent > 1_000 { 10 } else { 0 };
        senders.beat(speaking..100, 100_000).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        (count().await == Some(90)).then_some(())
    })
    .await;
    // All fall silent: nobody leaves (FAULTS P7).
    let census = until("all are silent", async || {
        let census = running.shards.census().await;
        (census.silent.len() == 90).then_some(census)
    })
    .await;
    assert_eq!(census.total, 90);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(running.shards.census().await.total, 90);
    assert_eq!(count().await, Some(90));
    running.stop().await;
}

/// PROTOCOL 7.8: more hosts than three frames hold, each once and in order; and one of them by name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_hosts_is_as_long_as_the_fleet() {
    let fleet = Fleet::new();
    let running = fleet.start(|_| {}).await;
    let operator = fleet.operator(&running).await;
    assert_eq!(fleet::hosts(&operator).await.len(), 0, "none is a list too");
    let mut senders = fleet.senders(1_700, &[running.udp]);
    senders.beat_all(50_000).unwrap();
    until("all are known", async || (running.shards.census().await.total == 1_700).then_some(()))
        .await;
    let listed = fleet::hosts(&operator).await;
    assert_eq!(listed.len(), 1_700);
    assert!(listed.is_sorted_by(|a, b| a.host < b.host));
    let asked = listed[1_234].host;
    match wire_net::stream::call(&operator, &Call::Host(asked)).await.unwrap() {
        Answer::Hosts(one) => assert_eq!((one.len(), one[0].host), (1, asked)),
        other => panic!("{other:?}"),
    }
    let fault = wire_net::stream::call(&operator, &Call::Host(HostId(1))).await.unwrap_err();
    assert_eq!(fault.code, wire::Code::HostNotFound);
    running.stop().await;
}

/// A store that was lost does not empty the map: who takes over takes the hosts that the map names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_store_does_not_empty_the_map() {
    let fleet = Fleet::new();
    let running = fleet.start(|_| {}).await;
    let mut senders = fleet.senders(400, &[running.udp]);
    senders.beat_all(20_000).unwrap();
    let full = async || published(&fleet.objects()).await.filter(|(head, _)| head.count == 400);
    let (before, _) = until("the map has all hosts", full).await;
    running.stop().await;

    let running = fleet.start(|config| config.store.push_str(".new")).await;
    senders.retarget(running.udp);
    senders.beat(0..1, 20_000).unwrap();
    let (after, map) = until("another map", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.version > before.version)
    })
    .await;
    assert_eq!((after.version.epoch, map), (before.version.epoch + 1, senders.addresses()));
    senders.beat(1..400, 20_000).unwrap();
    until("all of them have spoken", async || {
        let seen = running.shards.seen().await;
        (seen.len() == 400 && seen.iter().all(|seen| !seen.foreign)).then_some(())
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_or_a_port_of_another_process_is_said() {
    let fleet = Fleet::new();
    let running = fleet.start(|_| {}).await;
    let fault = fleet.try_start(|_| {}).await.err().unwrap();
    assert_eq!(fault.code, wire::Code::Busy);
    assert!(fault.message.contains("store"), "{fault}");
    let udp = running.udp;
    let fault = fleet
        .try_start(|config| {
            config.udp = udp;
            config.store.push_str(".other");
        })
        .await
        .err()
        .unwrap();
    assert_eq!(fault.code, wire::Code::Busy, "{fault}");
    running.stop().await;
}

/// P8: "drain of 30 % at once, kill -9 in mid-drain": what was acknowledged is in force after the restart, the rest is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_of_a_third_survives_kill_9_in_the_middle() {
    let fleet = Fleet::new();
    let aggregator = Aggregator::start(&fleet, 1, &fleet.objects_url);
    let mut senders = fleet.senders(300, &[aggregator.udp]);
    senders.hosts.iter_mut().for_each(|sim| sim.beat.running = 2);
    senders.beat_all(20_000).unwrap();
    let operator = fleet.operator_at(aggregator.admin).await;
    until("all are known", async || (fleet::hosts(&operator).await.len() == 300).then_some(()))
        .await;
    // One after another, until the process dies under them: some are acknowledged, one is of unknown outcome.
    let third: Vec<HostId> = senders.hosts.iter().take(100).map(|sim| sim.host).collect();
    let drain = async |operator: &quinn::Connection, host| {
        let call = Call::Drain { host, deadline_ms: 60_000, message: "third".to_owned() };
        wire_net::stream::call(operator, &call).await
    };
    let draining = async {
        let mut acknowledged = 0;
        for host in &third {
            match drain(&operator, *host).await {
                Ok(Answer::Done) => acknowledged += 1,
                // quinn notices a dead peer by its silence only; this one is known to be dead.
                _ => break,
            }
            if acknowledged == 50 {
                aggregator.signal("KILL");
                operator.close(0u32.into(), b"it is dead");
            }
        }
        acknowledged
    };
    let acknowledged = draining.await;
    drop(aggregator);
    println!("{acknowledged} drains were acknowledged before the kill");
    assert_eq!(acknowledged, 50);

    let aggregator = Aggregator::start(&fleet, 1, &fleet.objects_url);
    senders.retarget(aggregator.udp);
    let operator = fleet.operator_at(aggregator.admin).await;
    let draining = |hosts: &[wire::call::HostRecord]| {
        hosts.iter().filter(|host| host.state == "draining").count()
    };
    let hosts = fleet::hosts(&operator).await;
    assert_eq!(hosts.len(), 300, "rows survive too");
    let kept = draining(&hosts);
    assert!(
        (50..=51).contains(&kept),
        "{kept}: what was acknowledged, and at most the one under way"
    );
    for host in &third {
        assert_eq!(drain(&operator, *host).await, Ok(Answer::Done), "asking again is safe");
    }
    senders.beat_all(20_000).unwrap();
    until("a third was told", async || {
        senders.take_directives().unwrap();
        let told = |sim: &&SimHost| sim.beat.flags & Heartbeat::DRAINING != 0;
        (senders.hosts.iter().filter(told).count() == 100).then_some(())
    })
    .await;
    senders.hosts[0].beat.running = 0;
    senders.beat_all(20_000).unwrap();
    let states = until("one is drained and the others drain", async || {
        let hosts = fleet::hosts(&operator).await;
        let drained = hosts.iter().filter(|host| host.state == "drained").count();
        (drained == 1).then_some(hosts)
    })
    .await;
    assert_eq!(draining(&states), 99);
    assert!(states.iter().all(|host| host.state != "drained" || host.running == 0));
}
