//! What sandboxes reach and where they are reached, tried from inside real ones (FAULTS I6).
//!
//! The world is this machine: servers of the test on addresses that it adds to the loopback interface, in a private
//! range that the host's operator opens for some tests, and a name server that lies. Programs inside are perl's own
//! socket calls, which say the error number.
#![allow(clippy::unwrap_used, reason = "tests; clippy does not see that without the usual harness")]

mod names;
mod world;

use std::time::{Duration, Instant};

use hostd::EgressMode;
use wire::{
    Code,
    call::{Answer, Call, Stats},
    launch::{LaunchReply, LaunchRequest, Network, Publish},
};

use crate::{
    common::{block_on, call, inspect, launch, request, started},
    place::{self, Place, attach_all, exited, fault_of},
};
use names::NameServer;
use world::{CLIENT, World, fetch};

/// Settings of a host that opens the world's first range.
fn open(config: &mut hostd::Config, world: &World) {
    config.egress = EgressMode::Policy;
    config.egress_allow = vec![world.range()];
}

fn egress(number: u128, rules: &[&str], script: &str) -> LaunchRequest {
    let script = format!("{CLIENT}\n{script}");
    let mut asked = request(number, "img", &["perl", "-e", &script]);
    asked.network = Network::Egress(rules.iter().map(|&rule| rule.into()).collect());
    asked
}

/// Runs it to its end: what it said, and how long that took.
fn run(place: &Place, asked: &LaunchRequest) -> (String, Duration) {
    block_on(async {
        let placer = place.placer().await;
        let begun = Instant::now();
        let id = started(&placer, asked).await.sandbox;
        let (out, err, _) = attach_all(&placer, id, 0, 0).await;
        exited(&placer, id).await;
        (out + &err, begun.elapsed())
    })
}

fn words(said: &str) -> Vec<&str> {
    said.split_whitespace().collect()
}

pub(crate) fn without_egress_nothing_is_reached() {
    let Some(world) = World::new() else { return };
    let server = world.echo(1);
    let place = Place::with(|config| open(config, &world));
    let script = format!(
        "say(dial('{}', {}), dial('169.254.169.254', 80), dial('1.1.1.1', 53), dial('127.0.0.1', {}));",
        world.ip(1),
        server.port(),
        place.listens().port(),
    );
    let mut asked = egress(1, &[], &script);
    asked.network = Network::None;
    let (said, took) = run(&place, &asked);
    // ENETUNREACH where there is no way at all, ECONNREFUSED on its own loopback.
    assert_eq!(words(&said), ["101", "101", "101", "111"], "{said}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    place.end();
}

// PROTOCOL 6.16
pub(crate) fn egress_reaches_what_is_allowed() {
    let Some(world) = World::new() else { return };
    let (allowed, other, far) = (world.echo(1), world.echo(1), world.echo(2));
    let place = Place::with(|config| open(config, &world));
    let (ip, port) = (world.ip(1), allowed.port());
    let closed = world.free_port(1);
    let rules = [format!("{ip}:{port}"), format!("{ip}:{closed}")];
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let script = format!(
        "say(talk('{ip}', {port}, 'hello'), dial('{ip}', {closed}), dial('{ip}', {}), dial('{}', {}), \
         dial('127.0.0.1', {port}), dial('198.18.0.1', 53), dial('198.18.0.1', {port}), \
         dial('169.254.169.254', 80), dial('1.1.1.1', 53), dial('{}', {}));",
        other.port(),
        world.ip(2),
        far.port(),
        place.listens().ip(),
        place.listens().port(),
    );
    let (said, took) = run(&place, &egress(1, &rules, &script));
    // Refused by nobody being there, by policy (EHOSTUNREACH), by its own loopback.
    let wanted = ["HELLO", "111", "113", "113", "111", "113", "113", "113", "113", "111"];
    assert_eq!(words(&said), wanted, "{said}");
    assert!(took < Duration::from_secs(30), "refusals are quick: {took:?}");
    place.end();
}

pub(crate) fn what_the_operator_closes_is_refused() {
    let Some(world) = World::new() else { return };
    let server = world.echo(1);
    let place = Place::with(|config| {
        open(config, &world);
        config.egress_deny = vec![format!("{}/32", world.ip(2))];
        // Doors of the fleet stay shut in an open range.
        config.aggregators = vec![server.address()];
    });
    let refused = |number, rule: &str, code| {
        block_on(async {
            let placer = place.placer().await;
            let reply = launch(&placer, &egress(number, &[rule], "")).await;
            let fault = fault_of(&reply);
            assert_eq!(fault.code, code, "{rule}: {fault}");
        });
    };
    refused(1, "169.254.169.254:80", Code::Forbidden);
    refused(2, "127.0.0.1", Code::Forbidden);
    refused(3, "192.168.0.0/16:443", Code::Forbidden);
    refused(4, &format!("{}:80", world.ip(2)), Code::Forbidden);
    refused(5, "[2001:db8::1]:80", Code::Unsupported);
    refused(6, "not a rule", Code::BadRequest);
    let all = format!(
        "say(dial('{}', {}), dial('{}', 80), dial('169.254.169.254', 80), dial('127.0.0.2', {0}));",
        world.ip(1),
        server.port(),
        world.ip(2),
    )
    .replace("{0}", &server.port().to_string());
    let (said, _) = run(&place, &egress(7, &["0.0.0.0/0"], &all));
    assert_eq!(words(&said), ["113", "113", "113", "111"], "{said}");
    place.end();
    let place = Place::new();
    block_on(async {
        let placer = place.placer().await;
        let fault = fault_of(&launch(&placer, &egress(1, &["any"], "")).await).clone();
        assert_eq!(fault.code, Code::Forbidden, "egress is off unless the operator says: {fault}");
        let mut asked = request(2, "img", &["true"]);
        asked.publish = vec![Publish { port: 80, host_port: 0 }];
        assert_eq!(fault_of(&launch(&placer, &asked).await).code, Code::Forbidden);
    });
    place.end();
}

pub(crate) fn names_open_what_they_resolve_to() {
    let Some(world) = World::new() else { return };
    let (server, hidden) = (world.echo(1), world.echo(2));
    let names = NameServer::start();
    names.set("good.test", &[world.ip(1)]);
    names.set("deep.wild.test", &[world.ip(2)]);
    names.set("evil.test", &["169.254.169.254".parse().unwrap(), "127.0.0.1".parse().unwrap()]);
    names.set("flip.test", &[world.ip(1)]);
    names.set("other.test", &[world.ip(1)]);
    let place = Place::with(|config| {
        open(config, &world);
        config.egress_dns = vec![names.address().to_string()];
    });
    let (port, far) = (server.port(), hidden.port());
    let rules = [
        format!("name:good.test:{port}"),
        format!("*.wild.test:{far}"),
        "evil.test".into(),
        "flip.test".into(),
    ];
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let (one, two) = (world.ip(1), world.ip(2));
    // An address is closed before its name was resolved, open after it, and only for the port of its rule.
    let script = format!(
        "say(dial('{one}', {port}), name('Good.Test'), talk('{one}', {port}, 'x'), dial('{one}', {far}), \
         dial('{two}', {far}), name('deep.wild.test'), talk('{two}', {far}, 'y'), name('wild.test'), \
         name('other.test'), name('evil.test'), dial('169.254.169.254', 80), name('flip.test'));"
    );
    let (said, _) = run(&place, &egress(1, &rules, &script));
    let (one, two) = (one.to_string(), two.to_string());
    let wanted = ["113", &one, "X", "113", "113", &two, "Y", "none", "none", "none", "113", &one];
    assert_eq!(words(&said), wanted, "{said}");
    // Rebinding: the same name turns towards what is closed.
    names.set("flip.test", &["169.254.169.254".parse().unwrap()]);
    let script = "say(name('flip.test'), dial('169.254.169.254', 80));";
    let (said, _) = run(&place, &egress(2, &rules, script));
    assert_eq!(words(&said), ["none", "113"], "{said}");
    let asked = names.asked();
    assert!(asked.iter().all(|name| !name.contains("other") && name != "wild.test"), "{asked:?}");
    place.end();
}

pub(crate) fn datagrams_pass_by_rule() {
    let Some(world) = World::new() else { return };
    let server = world.udp_echo(1);
    let place = Place::with(|config| open(config, &world));
    let (ip, port) = (world.ip(1), server.port());
    let script = format!(
        "say(ask('{ip}', {port}, 'hello'), ask('{ip}', {}, 'x'), ask('{}', {port}, 'x'), dial('{ip}', {port}));",
        port ^ 1,
        world.ip(2),
    );
    let (said, _) = run(&place, &egress(1, &[&format!("udp:{ip}:{port}")], &script));
    assert_eq!(words(&said), ["HELLO", "113", "113", "113"], "{said}");
    place.end();
}

/// Bytes of a large transfer.
const LARGE: usize = 192 << 20;

pub(crate) fn large_transfers_are_whole() {
    let Some(world) = World::new() else { return };
    let (source, sink) = (world.source(1, LARGE), world.sink(1));
    let place = Place::with(|config| open(config, &world));
    let ip = world.ip(1);
    let rules = format!("{ip}:{}-{}", 1, 65_535);
    let down = format!("my ($n, $sum) = drain('{ip}', {}); say($n, $sum);", source.port());
    let (said, took) = run(&place, &egress(1, &[&rules], &down));
    let wanted = [LARGE.to_string(), world::sum_of(LARGE).to_string()];
    assert_eq!(words(&said), wanted, "{said}");
    let rate = |took: Duration| LARGE as f64 / took.as_secs_f64() / 1e6;
    println!("egress, to a sandbox: {:.0} MB/s with its launch", rate(took));
    let up = format!("say(pour('{ip}', {}, {LARGE}));", sink.port());
    let (said, took) = run(&place, &egress(2, &[&rules], &up));
    assert_eq!(words(&said), wanted, "the far end's count and sum: {said}");
    println!("egress, from a sandbox: {:.0} MB/s with its launch", rate(took));
    place.end();
}

pub(crate) fn connections_and_bandwidth_are_bounded() {
    let Some(world) = World::new() else { return };
    let (server, source) = (world.echo(1), world.source(1, 4 << 20));
    let place = Place::with(|config| {
        open(config, &world);
        config.egress_connections = 100;
        config.egress_bytes_per_s = 2_000_000;
    });
    let (ip, port) = (world.ip(1), server.port());
    let script = format!(
        "my @held; my $error; for (1..120) {{ my $s = socket_to('{ip}', {port}); \
         if (ref $s) {{ push @held, $s }} else {{ $error = $s; last }} }} say(scalar @held, $error); \
         @held = (); select(undef, undef, undef, 0.5); say(talk('{ip}', {port}, 'again'));"
    );
    let (said, _) = run(&place, &egress(1, &[&ip.to_string()], &script));
    assert_eq!(words(&said), ["100", "111", "AGAIN"], "{said}");
    let down = format!("my ($n) = drain('{ip}', {}); say($n);", source.port());
    let (said, took) = run(&place, &egress(2, &[&ip.to_string()], &down));
    assert_eq!(words(&said), [(4 << 20).to_string()], "{said}");
    assert!((1.6..60.0).contains(&took.as_secs_f64()), "4 MiB at 2 MB/s took {took:?}");
    place.end();
}

pub(crate) fn egress_outlives_hostd_and_its_worker() {
    let Some(world) = World::new() else { return };
    let server = world.echo(1);
    let mut place = Place::with(|config| open(config, &world));
    let (ip, port) = (world.ip(1), server.port());
    // Says a word a line, over one connection as long as it lives, else over a new one.
    let script = format!(
        "my $s; while (my $word = <STDIN>) {{ chomp $word; my $was = ref $s ? 'held' : 'new'; \
         my $heard = ref $s ? over($s, $word) : ''; \
         if ($heard eq '') {{ $was = 'new'; for (1..50) {{ $s = socket_to('{ip}', {port}); last if ref $s; \
         select(undef, undef, undef, 0.1) }} $heard = ref $s ? over($s, $word) : $s }} \
         print \"$was $heard\\n\"; }}"
    );
    let mut asked = egress(1, &[&ip.to_string()], &script);
    asked.stdin = true;
    let id = block_on(async {
        let placer = place.placer().await;
        let id = started(&placer, &asked).await.sandbox;
        assert_eq!(place::converse(&placer, id, "one").await, "new ONE");
        let stats = stats(&placer, id).await;
        assert!(stats.net_in_bytes >= 3 && stats.net_out_bytes >= 3, "{stats:?}");
        id
    });
    for kill in [true, false] {
        if kill {
            place.kill_hostd();
        } else {
            place.stop_hostd();
        }
        place.start_hostd();
        block_on(async {
            let placer = place.placer().await;
            assert_eq!(
                place::converse(&placer, id, "two").await,
                "held TWO",
                "a connection lives on"
            );
        });
    }
    world::kill_worker(place.state());
    block_on(async {
        let placer = place.placer().await;
        assert_eq!(
            place::converse(&placer, id, "three").await,
            "new THREE",
            "another worker carries it"
        );
        let kill = Call::Kill { sandbox: id, signal: 0 };
        assert!(matches!(call(&placer, &kill).await.unwrap(), Answer::Done));
        exited(&placer, id).await;
    });
    let mut ends = egress(2, &[&ip.to_string()], "sleep 100");
    ends.stdin = true;
    block_on(async {
        let placer = place.placer().await;
        started(&placer, &ends).await;
    });
    place.kill_spawner();
    world::no_device_is_left(place.state());
    place.end();
}

async fn stats(placer: &quinn::Connection, id: wire::SandboxId) -> Stats {
    match call(placer, &Call::Stats(id)).await.unwrap() {
        Answer::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

/// Waits for the program behind a port to listen: it was executed when its launch was answered, no more.
fn serves(at: std::net::SocketAddr) {
    let begun = Instant::now();
    while fetch(at, "up") != Ok("UP".into()) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{at} never serves");
        std::thread::sleep(Duration::from_millis(20));
    }
}

// PROTOCOL 6.17
pub(crate) fn published_ports_lead_in() {
    let Some(world) = World::new() else { return };
    let (first, taken) = (world.free_port(1), world.echo(1));
    let low = first.min(taken.port());
    let high = first.max(taken.port());
    let mut place = Place::with(|config| {
        config.publish = Some(world.ip(1).into());
        config.publish_ports = [low, high];
    });
    let serve = |number, ports: &[(u16, u16)]| {
        let script = format!("{CLIENT}\nserve(80);");
        let mut asked = request(number, "img", &["perl", "-e", &script]);
        asked.publish =
            ports.iter().map(|&(host_port, port)| Publish { port, host_port }).collect();
        asked
    };
    let at = std::net::SocketAddr::from((world.ip(1), first));
    let id = block_on(async {
        let placer = place.placer().await;
        let id = started(&placer, &serve(1, &[(first, 80), (0, 80)])).await.sandbox;
        let record = inspect(&placer, id).await;
        assert_eq!(record.published.len(), 2);
        assert_eq!(record.published[0].address, at.to_string());
        let any: std::net::SocketAddr = record.published[1].address.parse().unwrap();
        assert!((low..=high).contains(&any.port()) && any != at);
        serves(at);
        assert_eq!((fetch(at, "a"), fetch(any, "b")), (Ok("A".into()), Ok("B".into())));
        for (number, ports, code) in [
            (2, (first, 80), Code::Busy),
            (3, (taken.port(), 80), Code::Busy),
            (4, (if low > 1 { low - 1 } else { high + 1 }, 80), Code::Forbidden),
        ] {
            let reply = launch(&placer, &serve(number, &[ports])).await;
            let LaunchReply::Failed(fault) = &reply else { panic!("{ports:?}: {reply:?}") };
            assert_eq!(fault.code, code, "{fault}");
        }
        let stats = stats(&placer, id).await;
        assert!(stats.net_in_bytes >= 2 && stats.net_out_bytes >= 2, "{stats:?}");
        id
    });
    place.kill_hostd();
    assert!(fetch(at, "x").is_err());
    place.start_hostd();
    assert_eq!(fetch(at, "again"), Ok("AGAIN".into()));
    block_on(async {
        let placer = place.placer().await;
        assert_eq!(inspect(&placer, id).await.published.len(), 2);
        assert!(matches!(
            call(&placer, &Call::Kill { sandbox: id, signal: 0 }).await.unwrap(),
            Answer::Done
        ));
        exited(&placer, id).await;
        assert!(fetch(at, "x").is_err(), "the port went with its sandbox");
        let again = started(&placer, &serve(5, &[(first, 80)])).await.sandbox;
        serves(at);
        assert_eq!(fetch(at, "new"), Ok("NEW".into()));
        assert_eq!(inspect(&placer, again).await.published.len(), 1);
    });
    place.kill_spawner();
    let begun = Instant::now();
    while fetch(at, "x").is_ok() || std::net::TcpListener::bind(at).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30), "a port outlived its sandbox");
        std::thread::sleep(Duration::from_millis(20));
    }
    place.end();
}
