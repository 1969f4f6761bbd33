//! What one core of hostd accepts: no-op launches over loopback, by lanes and by one stream a launch.
//!
//! `cargo bench -p hostd --bench accept -- [hosts] [in flight a host] [seconds]`. Prints launches a second and, because
//! client and host share the machine, the processor time that hostd's thread took for one launch: that figure
//! holds on a busy machine too.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    cell::Cell,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use common::{Fleet, request};
use hostd::{Boxes, Config, HostConfig};
use quinn::Connection;
use tokio::task::LocalSet;
use wire::{
    HostId,
    frame::{Header, Kind},
    launch::{LaunchHead, LaunchReply},
};
use wire_net::{quic, stream, tls::Peer};

/// A request whose launch id is drawn anew in place.
#[derive(Clone)]
struct Template {
    bytes: Vec<u8>,
    id_at: usize,
    next: Rc<Cell<u128>>,
}

impl Template {
    fn new() -> Self {
        let mark = 0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978_u128;
        let bytes = request(mark, "img", &["/bin/true"]).to_bytes();
        let wanted = mark.to_le_bytes();
        let id_at = bytes.windows(16).position(|window| window == wanted).unwrap();
        Self { bytes, id_at, next: Rc::new(Cell::new(1)) }
    }

    fn draw(&mut self) -> &[u8] {
        let next = self.next.get();
        self.next.set(next + 1);
        self.bytes[self.id_at..self.id_at + 16].copy_from_slice(&next.to_le_bytes());
        &self.bytes
    }

    fn lane_frame(&mut self, tag: u32, out: &mut BytesMut) {
        let bytes = self.draw();
        let len = 4 + LaunchHead::BYTES + bytes.len();
        out.extend_from_slice(&Header { kind: Kind::LaneLaunch, len }.bytes());
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&LaunchHead::new(10_000).bytes());
        out.extend_from_slice(bytes);
    }
}

async fn by_lane(connection: Connection, window: u32, mut template: Template, done: Rc<Cell<u64>>) {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let mut out = BytesMut::new();
    out.extend_from_slice(&Header { kind: Kind::Lane, len: 0 }.bytes());
    (0..window).for_each(|tag| template.lane_frame(tag, &mut out));
    let mut rest = BytesMut::new();
    loop {
        if send.write_chunk(out.split().freeze()).await.is_err() {
            return;
        }
        let Ok(Some(chunk)) = recv.read_chunk(1 << 16, true).await else { return };
        rest.extend_from_slice(&chunk.bytes);
        while let Some(header) = rest.first_chunk::<8>() {
            let len = Header::parse(header).unwrap().len;
            if rest.len() < 8 + len {
                break;
            }
            let frame = rest.split_to(8 + len);
            let tag = u32::from_le_bytes(frame[8..12].try_into().unwrap());
            done.set(done.get() + 1);
            template.lane_frame(tag, &mut out);
        }
    }
}

async fn by_stream(connection: Connection, mut template: Template, done: Rc<Cell<u64>>) {
    loop {
        let bytes = template.draw().to_vec();
        match stream::launch(&connection, LaunchHead::new(10_000), &bytes).await {
            Ok(LaunchReply::Started(_)) => done.set(done.get() + 1),
            Ok(other) => panic!("{other:?}"),
            Err(_) => return,
        }
    }
}

/// Processor seconds of the threads whose name begins so.
fn cpu_seconds(name: &str) -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let of = |task: std::fs::DirEntry| {
        let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let on_cpu: f64 = stat.split(' ').next()?.parse().ok()?;
        comm.starts_with(name).then_some(on_cpu / 1e9)
    };
    tasks.filter_map(of).sum()
}

/// So many hosts in one process, with room for everything.
fn settings(fleet: &Fleet, hosts: usize) -> (Vec<HostId>, Config) {
    let ids: Vec<HostId> = (1..=hosts as u64).map(|n| HostId(n << 32)).collect();
    let configs: Vec<Config> = ids.iter().map(|id| fleet.config(*id)).collect();
    let port = configs[0].listen.port();
    let octet = |n: usize| u8::try_from(n).unwrap();
    let hosts = configs.iter().enumerate().map(|(at, config)| HostConfig {
        identity: config.identity.clone(),
        state: config.state.clone(),
        listen: SocketAddr::from(([127, 2, octet(at / 250), octet(at % 250 + 1)], port)),
        advertise: None,
    });
    let config = Config {
        hosts: hosts.collect(),
        boxes: Boxes::None,
        noop_ms: Some(0),
        cpu_millis: Some(1 << 30),
        memory_bytes: Some(1 << 50),
        boxes_max: 1_000_000,
        ..configs[0].clone()
    };
    (ids, config)
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    let mut number = |default: usize| args.next().map_or(default, |arg| arg.parse().unwrap());
    let (hosts, window, seconds) = (number(100), number(16), number(3));
    let fleet = Fleet::new();
    let (ids, config) = settings(&fleet, hosts);
    let listed = config.hosts.clone();
    let running = common::run(config);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let identity = fleet.authority.issue(&Peer::Placer(1)).unwrap();
        let dialer = quic::dialer(SocketAddr::from(([127, 0, 0, 1], 0)), &identity).unwrap();
        let mut connections = Vec::new();
        for (id, host) in ids.iter().zip(&listed) {
            let begun = Instant::now();
            connections.push(loop {
                match quic::connect(&dialer, host.listen, &Peer::Host(*id)).await {
                    Ok(connection) => break connection,
                    Err(fault) => assert!(begun.elapsed() < Duration::from_secs(60), "{fault}"),
                }
            });
        }
        let template = Template::new();
        for carrier in ["lane", "stream", "lane", "stream"] {
            let done = Rc::new(Cell::new(0));
            let mut tasks = Vec::new();
            for connection in &connections {
                let (connection, template, done) =
                    (connection.clone(), template.clone(), Rc::clone(&done));
                if carrier == "lane" {
                    let window = u32::try_from(window).unwrap();
                    tasks.push(tokio::task::spawn_local(by_lane(connection, window, template, done)));
                } else {
                    tasks.extend((0..window).map(|_| {
                        let (connection, template) = (connection.clone(), template.clone());
                        tokio::task::spawn_local(by_stream(connection, template, Rc::clone(&done)))
                    }));
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            let (before, cpu, begun) = (done.get(), cpu_seconds("hostd-"), Instant::now());
            tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
            let launches = (done.get() - before) as f64;
            let cpu = cpu_seconds("hostd-") - cpu;
            let rate = launches / begun.elapsed().as_secs_f64();
            println!(
                "{carrier}: {hosts} hosts, {window} in flight each: {rate:.0} launches/s, hostd {:.2} us a launch",
                cpu / launches * 1e6
            );
            tasks.iter().for_each(|task| task.abort());
        }
    });
    running.end().unwrap();
}
