//! Clients that want too much, or break what they can, and what the others notice of it (FAULTS P9, Q5).
//!
//! The short form runs in CI, where other work shares the machine: it allows some milliseconds of noise beside the factor. With
//! `VOLLEY_FAULTS_LONG=1` there are more launches and no allowance: run it alone on a machine.

#![allow(clippy::unwrap_used, reason = "outside of test functions as well")]

mod house;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use house::{Act, House};
use volley_client::{Client, LaunchSpec, draw_id};
use wire::{
    Code,
    frame::{Header, Kind},
    launch::{LaunchHead, LaunchReply, LaunchRequest, Limits, Network},
    limits::{FRAME_BYTES_MAX, LANE_LAUNCHES_MAX, STREAMS_MAX},
    seal::Role,
};
use wire_net::{
    lane::Lane,
    quic,
    tls::{Identity, Peer},
};

fn long() -> bool {
    std::env::var_os("VOLLEY_FAULTS_LONG").is_some()
}

/// Asserts that a latency grew by a factor at most, or tells by how much it did.
fn assert_within(what: &str, calm: Duration, now: Duration, factor: f64) {
    // Without the cure it would be seconds.
    let noise = if long() { Duration::ZERO } else { Duration::from_millis(250) };
    let ratio = now.as_secs_f64() / calm.as_secs_f64();
    println!("{what}: {calm:.1?} before, {now:.1?} meanwhile, {ratio:.2} times");
    assert!(now <= calm.mul_f64(factor) + noise, "{what}: {calm:.1?} before, {now:.1?} meanwhile");
}

fn quantile(times: &mut [Duration], per_cent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * per_cent / 100).min(times.len() - 1)]
}

/// Which latency is held: in the short form the ninth of ten, since other tests run beside.
fn held() -> usize {
    if long() { 99 } else { 90 }
}

/// How long launches of some tenants take, each tenant one at a time.
async fn latencies(clients: &[Client], each: usize) -> Vec<Duration> {
    let one = |client: Client| async move {
        let mut times = Vec::new();
        for _ in 0..each {
            let begun = Instant::now();
            client.launch(LaunchSpec::new("test")).await.unwrap();
            times.push(begun.elapsed());
        }
        times
    };
    join_all(clients.iter().cloned().map(one)).await.concat()
}

fn request(tenant: &str) -> LaunchRequest {
    LaunchRequest {
        launch_id: draw_id(),
        tenant: tenant.into(),
        image: "test".into(),
        shape: 0,
        command: vec!["true".into()],
        env: Vec::new(),
        cwd: String::new(),
        user: String::new(),
        tty: false,
        stdin: false,
        limits: Limits::default(),
        network: Network::None,
        labels: Vec::new(),
        publish: Vec::new(),
    }
}

/// Connections of somebody who means no good.
async fn connections(identity: &Identity, to: SocketAddr, count: usize) -> Vec<quinn::Connection> {
    let endpoint = quic::dialer("127.0.0.1:0".parse().unwrap(), identity).unwrap();
    let dials = (0..count).map(|_| quic::connect(&endpoint, to, Role::Placer));
    join_all(dials).await.into_iter().map(Result::unwrap).collect()
}

/// Keeps a lane full until `stop`; counts what is told to slow down.
async fn flood(lane: Lane, in_flight: usize, stop: Arc<AtomicBool>, refused: Arc<AtomicUsize>) {
    let one = || async {
        while !stop.load(Ordering::Relaxed) {
            let bytes = request("greedy").to_bytes();
            let Ok(reply) = lane.launch(LaunchHead::new(5_000), &bytes) else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            if let Ok(LaunchReply::Failed(fault)) = reply.await {
                // Unknown is one that was taken up when hardly any of its time was left.
                let told =
                    matches!(fault.code, Code::Overloaded | Code::BudgetSpent | Code::Unknown);
                assert!(told, "{fault}");
                refused.fetch_add(usize::from(fault.code == Code::Overloaded), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        }
    };
    join_all((0..in_flight).map(|_| one())).await;
}

/// FAULTS P9. Hosts take 20 ms a launch and the placer has room for 64 under way: 3,200 a second. Five tenants have one launch
/// under way each; another one keeps thousands waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p9_a_greedy_tenant_delays_itself() {
    let mut house = House::new("greedy", 4).await;
    house.hosts.iter().for_each(|host| host.script(|_| Act::StartIn(20)));
    let (addr, _) = house.placer(1, |config| config.launches_max = 64).await;
    let mut others = vec![house.ready_client("other-0", vec![addr]).await];
    for at in 1..5 {
        others.push(house.client(&format!("other-{at}"), vec![addr]).await);
    }
    let each = if long() { 400 } else { 40 };
    let mut calm = latencies(&others, each).await;
    let identity = house.authority.issue(&Peer::Client { tenant: "greedy".into() }).unwrap();
    let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut floods = Vec::new();
    let mut kept = Vec::new();
    for connection in connections(&identity, addr, 3).await {
        let lane = Lane::open(&connection).await.unwrap();
        kept.push(connection);
        let (stop, refused) = (Arc::clone(&stop), Arc::clone(&refused));
        floods.push(tokio::spawn(flood(lane, LANE_LAUNCHES_MAX - 64, stop, refused)));
    }
    // It is there once it is told to slow down: more than two lanes' worth waits.
    let begun = Instant::now();
    while refused.load(Ordering::Relaxed) == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody was told to slow down");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The burst has been sorted.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut flooded = latencies(&others, each).await;
    stop.store(true, Ordering::Relaxed);
    floods.iter().for_each(tokio::task::JoinHandle::abort);
    let at = held();
    assert_within("P9", quantile(&mut calm, at), quantile(&mut flooded, at), 1.2);
    println!("P9: {} launches were told to slow down", refused.load(Ordering::Relaxed));
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4_096
}

/// Streams that say little, too much, or the same thing for ever. What is returned keeps them open.
async fn mischief(connection: &quinn::Connection) -> Vec<(quinn::SendStream, quinn::RecvStream)> {
    let mut open = Vec::new();
    for at in 0..STREAMS_MAX - 2 {
        let (mut send, recv) = connection.open_bi().await.unwrap();
        let header = match at % 4 {
            // Half a header, and no more.
            0 => vec![1, 0, 0],
            // A length far above the limit.
            1 => [&[Kind::Launch as u8, 0, 0, 0][..], &u32::MAX.to_le_bytes()].concat(),
            // The longest frame there is, of which hardly anything comes.
            2 => [&Header { kind: Kind::Launch, len: FRAME_BYTES_MAX }.bytes()[..], b"x"].concat(),
            _ => Header { kind: Kind::Lane, len: 0 }.bytes().to_vec(),
        };
        send.write_all(&header).await.unwrap();
        open.push((send, recv));
    }
    open
}

/// Launches that are refused at once, on a lane whose replies nobody reads.
async fn never_read(connection: &quinn::Connection) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    send.write_all(&Header { kind: Kind::Lane, len: 0 }.bytes()).await.unwrap();
    let bytes = request("somebody-else").to_bytes();
    for tag in 0..60_000u32 {
        let len = 4 + LaunchHead::BYTES + bytes.len();
        let frame = [
            &Header { kind: Kind::LaneLaunch, len }.bytes()[..],
            &tag.to_le_bytes(),
            &LaunchHead::new(1_000).bytes(),
            &bytes,
        ]
        .concat();
        let written = send.write_all(&frame);
        // The placer stops reading what it cannot answer.
        if !matches!(tokio::time::timeout(Duration::from_millis(300), written).await, Ok(Ok(()))) {
            break;
        }
    }
    (send, recv)
}

/// FAULTS Q5.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q5_clients_that_break_the_protocol_cost_bounded_memory_and_nobody_elses_time() {
    let mut house = House::new("hostile", 3).await;
    let (addr, _) = house.placer(1, |_| {}).await;
    let good = vec![house.ready_client("good", vec![addr]).await];
    let each = if long() { 5_000 } else { 300 };
    let mut calm = latencies(&good, each).await;
    let before = resident();
    let identity = house.authority.issue(&Peer::Client { tenant: "evil".into() }).unwrap();
    let evil = connections(&identity, addr, if long() { 64 } else { 8 }).await;
    let mut open = Vec::new();
    for connection in &evil {
        open.extend(mischief(connection).await);
    }
    for connection in evil.iter().take(2) {
        open.push(never_read(connection).await);
    }
    let mut meanwhile = latencies(&good, each / 2).await;
    // One byte a second on the frames that were begun, for as long as launches go on.
    for (send, _) in &mut open {
        let _ = tokio::time::timeout(Duration::from_millis(1), send.write_all(b"x")).await;
    }
    meanwhile.extend(latencies(&good, each / 2).await);
    let grown = resident().saturating_sub(before);
    let (streams, each_mb) = (open.len(), 6);
    println!("Q5: {streams} bad streams, {} MiB more in this process, both ends", grown >> 20);
    assert!(grown < (evil.len() * each_mb + 64) << 20, "{} MiB more", grown >> 20);
    let at = held();
    assert_within("Q5", quantile(&mut calm, at), quantile(&mut meanwhile, at), 1.5);
}
