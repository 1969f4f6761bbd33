//! Both receive engines, in turn, in one run: processor time a datagram when flooded, and at a million hosts' rate.
//!
//! Senders have many sockets, as hosts do. The receiving thread's own time is what counts: on few cores the sender is
//! the bottleneck. Prints a line a round; DESIGN.md has the figures that chose the engine. Run by
//! `cargo bench -p wire-net --bench udp`; as a test (`--test`) it makes one short round.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};
use wire_net::udp::{Engine, Receiver, ReceiverOptions, Sender};

const SENDERS: usize = 64;
const BYTES: usize = 103; // A sealed heartbeat's, about.
/// Heartbeats a second of a million hosts.
const MILLION_HOSTS: f64 = 66_700.0;

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(now).expect("processor time is not negative")
}

/// Sends from many sockets until told to stop; `rate` a second, or as fast as it goes.
fn send(to: SocketAddr, rate: Option<f64>, stop: &AtomicBool) {
    let any = (Ipv4Addr::LOCALHOST, 0);
    let mut senders: Vec<_> =
        (0..SENDERS).map(|_| Sender::over(UdpSocket::bind(any).expect("a port"))).collect();
    let started = Instant::now();
    let mut sent = 0u64;
    for at in (0..SENDERS).cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        for _ in 0..4 {
            senders[at].push(&[7; BYTES], to).expect("loopback");
        }
        senders[at].flush().expect("loopback");
        sent += 4;
        if let Some(rate) = rate {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let due = Duration::from_secs_f64(sent as f64 / rate);
            let ahead = due.saturating_sub(started.elapsed());
            if ahead > Duration::from_micros(200) {
                thread::sleep(ahead);
            }
        }
    }
}

/// Datagrams a second, processor time of each, and share of one core.
fn round(engine: Engine, gather: Duration, rate: Option<f64>, time: Duration) {
    let options = ReceiverOptions { engine, gather, ..ReceiverOptions::default() };
    let mut receiver =
        Receiver::bind((Ipv4Addr::LOCALHOST, 0).into(), &options).expect("a loopback port");
    let to = receiver.local_addr().expect("bound");
    let stop = Arc::new(AtomicBool::new(false));
    let sender = thread::spawn({
        let stop = Arc::clone(&stop);
        move || send(to, rate, &stop)
    });
    let (mut got, mut calls, mut bytes) = (0usize, 0usize, 0usize);
    let (from, cpu) = (Instant::now(), thread_time());
    while from.elapsed() < time {
        let each = |datagram: &[u8], _| bytes += datagram.len();
        got += receiver.recv(Duration::from_millis(100), each).expect("loopback");
        calls += 1;
    }
    let (took, cpu) = (from.elapsed(), thread_time() - cpu);
    stop.store(true, Ordering::Relaxed);
    sender.join().expect("the sender ends");
    assert_eq!(bytes, got * BYTES);
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let (got, calls) = (got as f64, calls as f64);
    println!(
        "{:?} gather {:>4} us: {:>9.0}/s, {:>6.0} ns each, {:>5.1} % of a core, {:>5.1} a call, {} dropped, buffer {} KiB",
        receiver.engine(),
        gather.as_micros(),
        got / took.as_secs_f64(),
        cpu.as_nanos() as f64 / got.max(1.0),
        100.0 * cpu.as_secs_f64() / took.as_secs_f64(),
        got / calls.max(1.0),
        receiver.kernel_drops(),
        receiver.rcvbuf_bytes() / 1024,
    );
}

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let (rounds, time) =
        if test { (1, Duration::from_millis(100)) } else { (5, Duration::from_secs(1)) };
    let gather = Duration::from_micros(500);
    for (name, rate, gather) in [
        ("flood", None, gather),
        ("a million hosts, gathered", Some(MILLION_HOSTS), gather),
        ("a million hosts, at once", Some(MILLION_HOSTS), Duration::ZERO),
    ] {
        println!("{name}");
        for _ in 0..rounds {
            round(Engine::Recvmmsg, gather, rate, time);
            match Receiver::bind(
                (Ipv4Addr::LOCALHOST, 0).into(),
                &ReceiverOptions { engine: Engine::IoUring, ..ReceiverOptions::default() },
            ) {
                Ok(_) => round(Engine::IoUring, gather, rate, time),
                Err(error) => println!("skipped: {error}"),
            }
        }
    }
}
