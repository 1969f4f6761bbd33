//! The fleet of issue 4 as far as this crate goes: 100,000 senders over real UDP, three aggregators as processes, a real
//! Cassandra and a real S3 server, and each of them lost in turn. Nobody is lost, and the map goes on.
//!
//! `VOLLEY_OUTAGE_S` lengthens the outages (10 s by default; the issue's own figure is 120).
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod fleet;

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fleet::{
    Fleet,
    cassandra::{Cassandra, free_port},
    moto::Moto,
    published, until,
};
use heartbeat::fleet_sender::FleetSender;
use wire::map::Head;

const HOSTS: usize = 100_000;
const RATE: u64 = 25_000;

/// An aggregator as a process of its own.
struct Process {
    child: Child,
    udp: SocketAddr,
    ops: u16,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(fleet: &Fleet, id: u64, peers: &[SocketAddr]) -> Process {
    let ops = free_port();
    let config = fleet.config(id);
    let udp = peers[usize::try_from(id).unwrap() - 1];
    let mut text = String::new();
    for (key, value) in [
        ("identity", config.identity.display().to_string()),
        ("fleet", config.fleet.display().to_string()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("udp", udp.to_string()),
        ("ops", format!("127.0.0.1:{ops}")),
        ("store", fleet.store.clone()),
        ("objects", fleet.objects_url.clone()),
    ] {
        writeln!(text, "{key} = {value:?}").unwrap();
    }
    writeln!(text, "receivers = 1\npublish_ms = 500\nscan_ms = 5000\ngrace_ms = 20000").unwrap();
    let file = fleet.dir.path().join(format!("aggregator-{id}.toml"));
    std::fs::write(&file, text).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_heartbeatd"))
        .arg(file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), format!("ready heartbeatd {udp}"));
    Process { child, udp, ops }
}

/// One figure of `/metrics`.
fn figure(ops: u16, name: &str) -> Option<u64> {
    let mut stream = TcpStream::connect(("127.0.0.1", ops)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

const PUBLISHED: &str = "volley_heartbeatd_map{what=\"published\"}";
const HELD: &str = "volley_heartbeatd_hosts{what=\"held\"}";
const REMOVED: &str = "volley_heartbeatd_hosts{what=\"removed\"}";
const WAITING: &str = "volley_heartbeatd_store{what=\"rows_waiting\"}";

/// Beats for so long, each host once in 5 s.
async fn beat_for(senders: &mut FleetSender, time: Duration) {
    let began = Instant::now();
    while began.elapsed() < time {
        let round = Instant::now();
        senders.beat_all(RATE).unwrap();
        tokio::time::sleep(Duration::from_secs(5).saturating_sub(round.elapsed())).await;
    }
}

/// A host moves; the map must come to say so: that is how a test sees that publishing goes on.
async fn a_move_is_published(
    what: &str,
    senders: &mut FleetSender,
    fleet: &Fleet,
    at: usize,
) -> Head {
    let began = Instant::now();
    senders.hosts[at].beat.ip[15] ^= 0x80;
    let (host, addr) = (senders.hosts[at].host, senders.hosts[at].beat.addr());
    let head = until(what, async || {
        senders.beat(at..at + 1, RATE).unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (head, hosts) = published(&fleet.objects()).await?;
        hosts.contains(&(host, addr)).then_some(head)
    })
    .await;
    println!("{what}: {:.1} s, version {:?}", began.elapsed().as_secs_f64(), head.version);
    assert_eq!(head.count, HOSTS as u64, "nobody is lost");
    head
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_of_100_000_loses_each_of_its_parts_and_nobody() {
    let (node, s3) = match (Cassandra::start().await, Moto::start().await) {
        (Ok(node), Ok(s3)) => (node, s3),
        (Err(why), _) | (_, Err(why)) => return println!("skipped: {why}"),
    };
    let outage = std::env::var("VOLLEY_OUTAGE_S").ok().and_then(|text| text.parse().ok());
    let outage = Duration::from_secs(outage.unwrap_or(10));
    // SAFETY: no other thread of this test program reads or writes the environment at this point.
    unsafe {
        std::env::set_var("AWS_ACCESS_KEY_ID", "test");
        std::env::set_var("AWS_SECRET_ACCESS_KEY", "test");
    }
    let fleet = Fleet { store: node.url.clone(), objects_url: s3.url.clone(), ..Fleet::new() };
    let peers: Vec<SocketAddr> =
        (0..3).map(|_| SocketAddr::from(([127, 0, 0, 1], free_port()))).collect();
    let mut aggregators: Vec<_> = (1..=3).map(|id| spawn(&fleet, id, &peers)).collect();
    let mut senders = fleet.senders(HOSTS, &peers);
    let began = Instant::now();
    senders.beat_all(RATE).unwrap();
    let sent = began.elapsed();
    let (head, map) = until("the map has everybody", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.count == HOSTS as u64)
    })
    .await;
    println!(
        "{HOSTS} hosts: heard in {:.1} s, in the map after {:.1} s, {} pages",
        sent.as_secs_f64(),
        began.elapsed().as_secs_f64(),
        head.pages.len()
    );
    assert_eq!(map, senders.addresses(), "the map is exactly the fleet");

    let leader = aggregators
        .iter()
        .position(|one| figure(one.ops, PUBLISHED).is_some_and(|count| count > 0))
        .unwrap();
    let dead = aggregators.remove(leader);
    let udp = dead.udp;
    drop(dead);
    senders.leave(udp);
    senders.beat_all(RATE).unwrap();
    let next = a_move_is_published("the leader was killed", &mut senders, &fleet, 1).await;
    assert_eq!(next.version.epoch, head.version.epoch + 1, "another leads");

    node.signal("STOP");
    beat_for(&mut senders, outage).await;
    // Aggregators meet in the store: while it is away, the leader knows what it hears itself.
    let leads = |one: &&Process| figure(one.ops, PUBLISHED).is_some_and(|count| count > 0);
    let leader = aggregators.iter().find(leads).unwrap().udp;
    let heard = senders.hosts.iter().position(|host| host.aggregator() == leader).unwrap();
    a_move_is_published("Cassandra is stopped", &mut senders, &fleet, heard).await;
    node.signal("CONT");
    let back = Instant::now();
    until("the rows have landed", async || {
        aggregators.iter().all(|one| figure(one.ops, WAITING) == Some(0)).then_some(())
    })
    .await;
    println!("rows landed {:.1} s after Cassandra came back", back.elapsed().as_secs_f64());

    s3.signal("STOP");
    beat_for(&mut senders, outage).await;
    s3.signal("CONT");
    a_move_is_published("S3 is back", &mut senders, &fleet, 3).await;

    // Rolling restart of all that are left, and the killed one comes back.
    for id in 1..=3u64 {
        let udp = peers[usize::try_from(id).unwrap() - 1];
        aggregators.retain(|one| one.udp != udp);
        aggregators.push(spawn(&fleet, id, &peers));
        senders.beat_all(RATE).unwrap();
    }
    a_move_is_published("all were restarted", &mut senders, &fleet, 4).await;
    for one in &aggregators {
        let (held, removed) = (figure(one.ops, HELD), figure(one.ops, REMOVED));
        println!("{}: holds {held:?}, removed {removed:?}", one.udp);
        assert_eq!((held, removed), (Some(HOSTS as u64), Some(0)));
    }
}
