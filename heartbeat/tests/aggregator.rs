//! One aggregator over real sockets, an embedded store and a directory of objects.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod fleet;

use std::time::Duration;

use fleet::{Fleet, published, until};
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

/// The brake of the publisher: a store that was lost does not empty the map.
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
    senders.beat(0..200, 20_000).unwrap();
    until("half of them are known", async || {
        (running.shards.census().await.total == 200).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(full().await.map(|(head, _)| head.version), Some(before.version));
    senders.beat(200..400, 20_000).unwrap();
    let (after, map) = until("another map of all", async || {
        full().await.filter(|(head, _)| head.version > before.version)
    })
    .await;
    assert_eq!((after.version.epoch, map), (before.version.epoch + 1, senders.addresses()));
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
