//! Launches through real placers to scripted hosts: outcomes, retries, and at most one sandbox a launch id.

#![allow(clippy::unwrap_used, reason = "outside of test functions as well")]

mod house;

use std::time::{Duration, Instant};

use house::{Act, House};
use volley_client::{LaunchError, LaunchSpec, draw_id};
use wire::{Code, SandboxId, report::FailureReport};
use wire_net::tls::Peer;

fn spec() -> LaunchSpec {
    LaunchSpec::new("test").command(["true"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_starts_and_its_sandbox_is_found() {
    let mut house = House::new("starts", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    let sandbox = client.launch(spec()).await.unwrap();
    let record = sandbox.inspect().await.unwrap();
    assert_eq!((record.sandbox, record.tenant.as_str()), (sandbox.id(), "acme"));
    let listed = client.list(&[], false).await.unwrap();
    assert!(listed.iter().any(|record| record.sandbox == sandbox.id()));
    let stranger = house.client("other", vec![addr]).await;
    assert!(stranger.list(&[], false).await.unwrap().is_empty());
    let foreign = stranger.sandbox(sandbox.id()).inspect().await.unwrap_err();
    assert_eq!(foreign.code(), Code::SandboxNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_launches_for_its_own_tenant_only() {
    let mut house = House::new("tenants", 1).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    let before = house.started();
    let operator = house.authority.issue(&Peer::Operator).unwrap();
    let operators = house.connect(&operator, vec![addr], Some("acme".into())).await.unwrap();
    operators.launch(spec()).await.unwrap();
    assert_eq!(house.started(), before + 1);
    let mine = house.authority.issue(&Peer::Client { tenant: "acme".into() }).unwrap();
    let refused = house.connect(&mine, vec![addr], Some("other".into())).await.unwrap_err();
    assert_eq!(refused.code, Code::Forbidden);
    assert_eq!(client.hosts().await.unwrap_err().code(), Code::Forbidden);
    // A program that does not ask our library: the request says another tenant than the certificate.
    let mut request = raw_request();
    request.tenant = "other".into();
    let endpoint = wire_net::quic::dialer("127.0.0.1:0".parse().unwrap(), &mine).unwrap();
    let connection =
        wire_net::quic::connect(&endpoint, addr, wire::seal::Role::Placer).await.unwrap();
    let head = wire::launch::LaunchHead::new(1_000);
    let reply = wire_net::stream::launch(&connection, head, &request.to_bytes()).await.unwrap();
    let wire::launch::LaunchReply::Failed(fault) = reply else { panic!("{reply:?}") };
    assert_eq!(fault.code, Code::Forbidden);
    assert_eq!(house.started(), before + 1);
}

fn raw_request() -> wire::launch::LaunchRequest {
    wire::launch::LaunchRequest {
        launch_id: draw_id(),
        tenant: "acme".into(),
        image: "test".into(),
        shape: 0,
        command: Vec::new(),
        env: Vec::new(),
        cwd: String::new(),
        user: String::new(),
        tty: false,
        stdin: false,
        limits: wire::launch::Limits::default(),
        network: wire::launch::Network::None,
        publish: Vec::new(),
        labels: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_goes_to_the_other_host_and_corrects_the_table() {
    let mut house = House::new("refusal", 2).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts[0].script(|_| Act::Refuse);
    let asked = house.hosts[0].asked();
    for _ in 0..50 {
        let sandbox = client.launch(spec()).await.unwrap();
        assert_eq!(sandbox.id().host, house.hosts[1].id);
    }
    // Its word said zero with the first refusal, and no heartbeat has said otherwise since.
    assert!(house.hosts[0].asked() - asked <= 2, "{}", house.hosts[0].asked() - asked);
    let refused = house.hosts[0].id;
    until("a report", || {
        let reports = house.reports.lock().unwrap();
        reports.iter().any(|r| r.host == refused && r.about == FailureReport::CAPACITY)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_fleet_says_so_and_starts_nothing() {
    let mut house = House::new("full", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts.iter().for_each(|host| host.script(|_| Act::Refuse));
    let before = house.started();
    let error = client.launch(spec()).await.unwrap_err();
    assert_eq!((error.code(), house.started()), (Code::NoCapacity, before), "{error}");
    assert!(!error.is_unknown());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_host_is_tried_little_and_reported() {
    let mut house = House::new("failing", 4).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts[2].script(|_| Act::Fail(Code::BoxFailed));
    let asked = house.hosts[2].asked();
    for _ in 0..200 {
        client.launch(spec()).await.unwrap();
    }
    // Picked in half of the draws while it is trusted; then once in 8, 64, 512.
    let tried = house.hosts[2].asked() - asked;
    assert!(tried <= 12, "{tried} of 200 launches went to a host that fails them all");
    let failing = house.hosts[2].id;
    until("a report", || {
        let reports = house.reports.lock().unwrap();
        reports.iter().any(|report| {
            (report.host, report.about, report.code)
                == (failing, FailureReport::HEALTH, Code::BoxFailed as u16)
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_of_the_launch_ends_it_at_once() {
    let mut house = House::new("own-fault", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts.iter().for_each(|host| host.script(|_| Act::Fail(Code::CommandNotFound)));
    let asked: usize = house.hosts.iter().map(|host| host.asked()).sum();
    let error = client.launch(spec()).await.unwrap_err();
    assert!(matches!(&error, LaunchError::NotStarted(f) if f.code == Code::CommandNotFound));
    assert_eq!(house.hosts.iter().map(|host| host.asked()).sum::<usize>(), asked + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_reply_is_asked_again_of_the_same_host() {
    let mut house = House::new("lost-reply", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    for host in &house.hosts {
        let first = host.asked();
        // Each host drops the connection with every third launch, after it was started.
        host.script(move |at| if (at - first) % 3 == 0 { Act::StartAndDrop } else { Act::Start });
    }
    let before = house.started();
    for at in 0..30 {
        let started = client.launch_timed(spec()).await.unwrap_or_else(|e| panic!("{at}: {e}"));
        assert_eq!(house.running(started.launch_id), 1);
        assert!(house.host(started.started.sandbox.host).runs(started.launch_id));
    }
    assert_eq!(house.started() - before, 30, "each launch started once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_host_is_cancelled_before_another_gets_the_launch() {
    let mut house = House::new("silent", 2).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts[0].script(|_| Act::StartInSilence);
    let mut moved = 0;
    for _ in 0..6 {
        let launched = client.launch_timed(spec().budget(Duration::from_secs(2))).await.unwrap();
        assert_eq!(launched.started.sandbox.host, house.hosts[1].id);
        assert_eq!(house.running(launched.launch_id), 1, "cancelled on the silent host");
        moved += usize::from(house.hosts[0].asked() > 0);
    }
    assert!(moved > 0);
}

fn raw(id: wire::LaunchId) -> wire::launch::LaunchRequest {
    wire::launch::LaunchRequest { launch_id: id, ..raw_request() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_never_answers_leaves_an_unknown_outcome_within_the_budget() {
    let mut house = House::new("hang", 1).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts[0].script(|_| Act::Hang);
    let begun = Instant::now();
    let named = spec().named().budget(Duration::from_millis(600));
    let id = named.given_id().unwrap();
    let error = client.launch(named).await.unwrap_err();
    assert!(error.is_unknown(), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // It comes back: the same id gets its one sandbox.
    house.hosts[0].script(|_| Act::Start);
    let mut again = raw(id);
    again.command = vec!["true".into()];
    let launched = client.launch_timed(LaunchSpec::from(again)).await.unwrap();
    assert_eq!(launched.launch_id, id);
    assert_eq!(house.running(id), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_host_costs_a_dial_and_no_launch() {
    let mut house = House::new("dead", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    house.hosts[1].kill();
    let dead = house.hosts[1].id;
    // Once the placer has heard of it: what was sent before that may run there, and its outcome is unknown.
    let lost = client.sandbox(SandboxId { host: dead, local: 1 });
    until_async("failed call", async || {
        lost.inspect().await.is_err_and(|error| error.code() == Code::HostUnreachable)
    })
    .await;
    for _ in 0..30 {
        let sandbox = client.launch(spec()).await.unwrap();
        assert_ne!(sandbox.id().host, dead);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_id_through_three_placers_is_one_sandbox() {
    let mut house = House::new("one-id", 5).await;
    let mut placers = Vec::new();
    for id in 1..=3 {
        placers.push(house.placer(id, |_| {}).await.0);
    }
    house.ready_client("acme", placers.clone()).await;
    let before = house.started();
    // The first homes may refuse: everybody must go on to the same next one.
    for host in &house.hosts[..2] {
        host.script(|_| Act::Refuse);
    }
    for round in 1..=5 {
        let request = raw(draw_id());
        let mut launches = Vec::new();
        for at in 0..100 {
            let client = house.client("acme", vec![placers[at % 3]]);
            let client = if at < 3 { client.await } else { launches_client(&launches, at).await };
            launches.push((client, request.clone()));
        }
        let ids =
            futures::future::join_all(launches.into_iter().map(|(client, request)| async move {
                client.launch(LaunchSpec::from(request)).await.unwrap().id()
            }))
            .await;
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert_eq!(house.running(request.launch_id), 1);
        assert_eq!(house.started() - before, round);
        let mut other = request.clone();
        other.image = "another".into();
        for placer in &placers {
            let client = house.client("acme", vec![*placer]).await;
            let error = client.launch(LaunchSpec::from(other.clone())).await.unwrap_err();
            assert_eq!(error.code(), Code::Conflict, "{error}");
        }
    }
}

/// The client that the launch three places before uses: a handshake a placer is enough.
async fn launches_client(
    launches: &[(volley_client::Client, wire::launch::LaunchRequest)],
    at: usize,
) -> volley_client::Client {
    launches[at - 3].0.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_id_at_one_placer_is_one_sandbox_even_if_nobody_named_it() {
    let mut house = House::new("repeated", 4).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    house.ready_client("acme", vec![addr]).await;
    let identity = house.authority.issue(&Peer::Client { tenant: "acme".into() }).unwrap();
    let endpoint = wire_net::quic::dialer("127.0.0.1:0".parse().unwrap(), &identity).unwrap();
    let connection =
        wire_net::quic::connect(&endpoint, addr, wire::seal::Role::Placer).await.unwrap();
    let request = raw_request();
    let bytes = request.to_bytes();
    let head = wire::launch::LaunchHead::new(5_000);
    let replies = futures::future::join_all(
        (0..50).map(|_| wire_net::stream::launch(&connection, head, &bytes)),
    )
    .await;
    let first = replies[0].as_ref().unwrap().clone();
    assert!(replies.iter().all(|reply| reply.as_ref().unwrap() == &first));
    assert_eq!(house.running(request.launch_id), 1);
    // Zero budget asks and starts nothing.
    let ask = wire::launch::LaunchHead::new(0);
    let known = wire_net::stream::launch(&connection, ask, &bytes).await.unwrap();
    assert_eq!(known, first);
    let stranger = raw_request();
    let reply = wire_net::stream::launch(&connection, ask, &stranger.to_bytes()).await.unwrap();
    let wire::launch::LaunchReply::Failed(fault) = reply else { panic!("{reply:?}") };
    assert_eq!((fault.code, house.running(stranger.launch_id)), (Code::Unknown, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_launch_does_not_run_and_will_not() {
    let mut house = House::new("cancel", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    let launched = client.launch_timed(spec()).await.unwrap();
    let id = launched.launch_id;
    let stranger = house.client("other", vec![addr]).await;
    assert_eq!(stranger.cancel(id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(house.running(id), 1, "another tenant's launch is not found");
    client.cancel(id).await.unwrap();
    assert_eq!(house.running(id), 0);
    client.cancel(id).await.unwrap();
    // One that is not known anywhere: cancelled before it comes.
    let named = spec().named();
    let id = named.given_id().unwrap();
    assert_eq!(client.cancel(id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.launch(named).await.unwrap_err().code(), Code::Cancelled);
    assert_eq!(house.running(id), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_goes_dark_takes_only_what_was_on_its_way() {
    let mut house = House::new("dark", 2).await;
    let dark = wire::HostId(77);
    let mortal = house.add_mortal_host(dark, 500);
    let version = wire::map::MapVersion { epoch: 1, version: 2 };
    house::publish(&*house.store, version, &house.addresses()).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let client = house.ready_client("acme", vec![addr]).await;
    // Until the placer has a connection to it.
    until_async("a launch on it", async || {
        client.launch(spec()).await.is_ok_and(|sandbox| sandbox.id().host == dark)
    })
    .await;
    mortal.shutdown_background();
    let burst = (0..40).map(|_| client.launch_timed(spec().budget(Duration::from_secs(4))));
    for launched in futures::future::join_all(burst).await {
        match launched {
            Ok(launched) => assert_eq!(house.running(launched.launch_id), 1),
            Err(error) => assert!(error.is_unknown(), "{error}"),
        }
    }
    // By now it is known: a dial fails, nothing is sent, another host has it.
    for _ in 0..20 {
        assert_ne!(client.launch(spec()).await.unwrap().id().host, dark);
    }
}

/// As [`until`], for what must be asked.
async fn until_async(what: &str, is_so: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so().await {
        assert!(Instant::now() < deadline, "no {what} within a minute");
    }
}

/// Waits until something is so, for a minute at most.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let mut turns = tokio::time::interval(Duration::from_millis(5));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "no {what} within a minute");
        turns.tick().await;
    }
}
