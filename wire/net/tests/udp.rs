//! Both receive engines over the loopback: everything arrives once, whole, from whom it came; drops are counted.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use wire::limits::DATAGRAM_BYTES_MAX;
use wire_net::udp::{Engine, Receiver, ReceiverOptions, Sender};

const V4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0);
const LONG: Duration = Duration::from_secs(5);

/// Runs a test on each engine that this kernel has.
fn on_each(test: impl Fn(Engine, ReceiverOptions)) {
    test(Engine::Recvmmsg, ReceiverOptions { engine: Engine::Recvmmsg, ..Default::default() });
    let options = ReceiverOptions { engine: Engine::IoUring, ..Default::default() };
    match Receiver::bind(V4, &options) {
        Ok(_) => test(Engine::IoUring, options),
        Err(error) => println!("skipped: io_uring: {error}"),
    }
}

/// Receives until `count` datagrams came or a time passed.
fn receive(receiver: &mut Receiver, count: usize) -> Vec<(Vec<u8>, SocketAddr)> {
    let mut got = Vec::new();
    let deadline = Instant::now() + LONG;
    while got.len() < count && Instant::now() < deadline {
        let each = |bytes: &[u8], from| got.push((bytes.to_vec(), from));
        receiver.recv(Duration::from_millis(50), each).unwrap();
    }
    got
}

#[test]
fn batches_arrive_whole_and_once_from_each_sender() {
    on_each(|engine, options| {
        let mut receiver = Receiver::bind(V4, &options).unwrap();
        assert_eq!(receiver.engine(), engine);
        let to = receiver.local_addr().unwrap();
        // More than there are buffers, by senders of known port.
        const EACH: usize = 1_500;
        let mut senders: Vec<_> = (0..4).map(|_| Sender::bind(V4).unwrap()).collect();
        let mut got = Vec::new();
        for n in 0..EACH {
            for sender in &mut senders {
                let len = 8 + n % (DATAGRAM_BYTES_MAX - 8);
                let mut bytes = vec![0; len];
                bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
                sender.push(&bytes, to).unwrap();
            }
            if n % 100 == 99 {
                senders.iter_mut().for_each(|sender| sender.flush().unwrap());
                got.extend(receive(&mut receiver, 4 * 100));
            }
        }
        assert_eq!(got.len(), 4 * EACH, "{engine:?}");
        let mut by_sender: HashMap<_, Vec<u64>> = HashMap::new();
        for (bytes, from) in &got {
            let n = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let len = 8 + usize::try_from(n).unwrap() % (DATAGRAM_BYTES_MAX - 8);
            assert_eq!(bytes.len(), len);
            by_sender.entry(*from).or_default().push(n);
        }
        for sender in &senders {
            let mut seen = by_sender.remove(&sender.local_addr().unwrap()).unwrap();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..EACH as u64));
            assert_eq!(sender.unsent(), 0);
        }
        assert_eq!(receiver.kernel_drops(), 0);
    });
}

#[test]
fn a_datagram_that_is_too_long_stays_too_long_and_an_empty_one_empty() {
    on_each(|_, options| {
        let mut receiver = Receiver::bind(V4, &options).unwrap();
        let socket = UdpSocket::bind(V4).unwrap();
        let to = receiver.local_addr().unwrap();
        for bytes in [&[][..], &[1; 9_000], &[2; DATAGRAM_BYTES_MAX]] {
            socket.send_to(bytes, to).unwrap();
        }
        let got = receive(&mut receiver, 3);
        assert!(got[0].0.is_empty());
        assert!(got[1].0.len() > DATAGRAM_BYTES_MAX);
        assert_eq!(got[2].0, [2; DATAGRAM_BYTES_MAX]);
    });
}

#[test]
fn answers_leave_from_the_port_that_was_asked_over_ipv6_too() {
    on_each(|_, options| {
        let Ok(mut receiver) = Receiver::bind(V6, &options) else {
            println!("skipped: no IPv6 loopback");
            return;
        };
        let asker = UdpSocket::bind(V6).unwrap();
        asker.set_read_timeout(Some(LONG)).unwrap();
        let to = receiver.local_addr().unwrap();
        asker.send_to(b"ask", to).unwrap();
        let got = receive(&mut receiver, 1);
        assert_eq!(got, [(b"ask".to_vec(), asker.local_addr().unwrap())]);
        let mut sender = receiver.sender().unwrap();
        sender.push(b"answer", got[0].1).unwrap();
        sender.flush().unwrap();
        let mut bytes = [0; 16];
        let (len, from) = asker.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..len], from), (&b"answer"[..], to));
    });
}

#[test]
fn what_the_kernel_drops_is_counted() {
    on_each(|engine, options| {
        let options = ReceiverOptions { rcvbuf_bytes: 16 * 1024, ..options };
        let mut receiver = Receiver::bind(V4, &options).unwrap();
        assert!(receiver.rcvbuf_bytes() >= 16 * 1024);
        let to = receiver.local_addr().unwrap();
        let mut sender = Sender::bind(V4).unwrap();
        const SENT: usize = 5_000;
        for _ in 0..SENT {
            sender.push(&[0; 100], to).unwrap();
        }
        sender.flush().unwrap();
        // The count comes with a datagram that was received after the drops.
        let mut got = 0;
        let deadline = Instant::now() + LONG;
        while Instant::now() < deadline {
            let now = receiver.recv(Duration::from_millis(50), |_, _| ()).unwrap();
            got += now;
            if now == 0 {
                break;
            }
        }
        sender.push(&[0; 100], to).unwrap();
        sender.flush().unwrap();
        got += receive(&mut receiver, 1).len();
        let drops = usize::try_from(receiver.kernel_drops()).unwrap();
        assert!(drops > 0, "{engine:?}: a buffer of 16 KiB held {SENT} datagrams");
        assert_eq!(got + drops, SENT + 1, "{engine:?}");
    });
}

#[test]
fn waiting_ends_by_its_time_and_the_port_is_free_after_the_drop() {
    on_each(|_, options| {
        let mut receiver = Receiver::bind(V4, &options).unwrap();
        let addr = receiver.local_addr().unwrap();
        let from = Instant::now();
        assert_eq!(receiver.recv(Duration::from_millis(30), |_, _| ()).unwrap(), 0);
        assert!((Duration::from_millis(25)..LONG).contains(&from.elapsed()));
        drop(receiver);
        // The kernel lets go of the socket when the ring's last work is done.
        let deadline = Instant::now() + LONG;
        while Receiver::bind(addr, &options).is_err() {
            assert!(Instant::now() < deadline, "the port stays busy");
            thread::yield_now();
        }
    });
}

#[test]
fn a_busy_port_says_so_unless_it_is_shared() {
    let shared = ReceiverOptions { reuse_port: true, ..Default::default() };
    let first = Receiver::bind(V4, &shared).unwrap();
    let addr = first.local_addr().unwrap();
    assert!(Receiver::bind(addr, &shared).is_ok());
    let error = Receiver::bind(addr, &ReceiverOptions::default()).unwrap_err();
    assert_eq!(wire::Fault::from(error).code, wire::Code::Busy);
}

#[test]
fn the_kernel_steers_by_content() {
    const SOCKETS: u32 = 3;
    let shared = ReceiverOptions { reuse_port: true, ..Default::default() };
    let first = Receiver::bind(V4, &shared).unwrap();
    let addr = first.local_addr().unwrap();
    let mut receivers = vec![first];
    receivers.extend((1..SOCKETS).map(|_| Receiver::bind(addr, &shared).unwrap()));
    receivers[0].steer(8, SOCKETS).unwrap();
    let mut sender = Sender::bind(V4).unwrap();
    for word in 0..300u32 {
        let mut bytes = [0; 16];
        bytes[8..12].copy_from_slice(&word.wrapping_mul(2_654_435_761).to_be_bytes());
        sender.push(&bytes, addr).unwrap();
    }
    sender.push(b"short", addr).unwrap();
    sender.flush().unwrap();
    let mut got = 0;
    for (at, receiver) in receivers.iter_mut().enumerate() {
        for (bytes, _) in receive_all(receiver) {
            let word =
                bytes.get(8..12).map_or(0, |word| u32::from_be_bytes(word.try_into().unwrap()));
            assert_eq!((word % SOCKETS) as usize, at);
            got += 1;
        }
    }
    assert_eq!(got, 301);
}

/// What is there already.
fn receive_all(receiver: &mut Receiver) -> Vec<(Vec<u8>, SocketAddr)> {
    let mut got = Vec::new();
    let each = |got: &mut Vec<_>, bytes: &[u8], from| got.push((bytes.to_vec(), from));
    while receiver
        .recv(Duration::from_millis(20), |bytes, from| each(&mut got, bytes, from))
        .unwrap()
        > 0
    {}
    got
}
