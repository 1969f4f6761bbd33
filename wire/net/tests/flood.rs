//! A flood of first packets from many addresses (FAULTS Q4): few bytes go out, few handshakes are held, and who is
//! real still gets in.
//!
//! The first packets are real: a dialer is pointed at a socket that keeps what it gets. Each then leaves from a port
//! of its own and nobody answers there, as with forged senders. `VOLLEY_FAULTS_LONG=1` sends 100,000 instead of 3,000.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    collections::{HashMap, VecDeque},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use wire::{HostId, seal::Role};
use wire_net::{
    quic,
    tls::{FleetAuthority, Identity, Peer},
};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const HOST: Peer = Peer::Host(HostId(7));
/// Senders whose answers are still waited for.
const SENDERS_MAX: usize = 3_000;
/// More are not held at once for addresses that were not proven.
const UNPROVEN_MAX: usize = 1_024;

fn first_packets_wanted() -> usize {
    if std::env::var_os("VOLLEY_FAULTS_LONG").is_some() { 100_000 } else { 3_000 }
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4_096
}

/// Bytes that came back to a sender.
fn answered(socket: &UdpSocket) -> usize {
    let mut bytes = [0; 2_048];
    std::iter::from_fn(|| socket.recv(&mut bytes).ok()).sum()
}

/// First packets of so many connections.
async fn first_packets(identity: &Identity) -> Vec<Vec<u8>> {
    let sink = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    let addr = sink.local_addr().unwrap();
    let dialer = quic::dialer(ANY, identity).unwrap();
    let mut packets = HashMap::new();
    let mut bytes = [0; 2_048];
    while packets.len() < first_packets_wanted() {
        let connecting = dialer.connect(addr, "host-0000000000000007.volley").unwrap();
        // Until its own first packet comes: farewells of dropped dials are under way too.
        let before = packets.len();
        while packets.len() == before {
            let (len, _) = sink.recv_from(&mut bytes).await.unwrap();
            let id_len = usize::from(bytes[5]);
            packets.entry(bytes[6..6 + id_len].to_vec()).or_insert_with(|| bytes[..len].to_vec());
        }
        drop(connecting);
    }
    packets.into_values().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_first_packets_cost_little_and_real_peers_get_in() {
    let authority = FleetAuthority::unsaved().unwrap();
    let placer = authority.issue(&Peer::Placer(1)).unwrap();
    let packets = first_packets(&placer).await;
    assert!(packets.len() > 2 * UNPROVEN_MAX, "{} first packets", packets.len());

    let listener = quic::listen(ANY, &authority.issue(&HOST).unwrap(), &[Role::Placer]).unwrap();
    let addr = listener.local_addr().unwrap();
    let serving = listener.clone();
    tokio::spawn(async move {
        while let Some(incoming) = serving.accept().await {
            tokio::spawn(async move {
                if let Ok((connection, _)) = quic::accept(incoming).await {
                    connection.closed().await;
                }
            });
        }
    });

    // Every packet from a port of its own; what comes back there is counted.
    let before = resident();
    let mut sockets = VecDeque::new();
    let (mut sent, mut received) = (0, 0);
    for (at, packet) in packets.iter().enumerate() {
        let socket = UdpSocket::bind(ANY).unwrap();
        socket.set_nonblocking(true).unwrap();
        sent += socket.send_to(packet, addr).unwrap();
        sockets.push_back(socket);
        if sockets.len() > SENDERS_MAX {
            received += sockets.pop_front().as_ref().map_or(0, answered);
        }
        if at % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }

    let dialer = quic::dialer(ANY, &placer).unwrap();
    let real = quic::connect(&dialer, addr, &HOST);
    let real = tokio::time::timeout(Duration::from_secs(60), real).await;
    let real = real.expect("a real peer gets in").expect("a real peer gets in");
    assert!(real.close_reason().is_none());

    received += sockets.iter().map(answered).sum::<usize>();
    assert!(received > 0, "nobody was answered at all");
    assert!(received <= 3 * sent, "{received} bytes out for {sent} in");
    // The real connection, and handshakes that wait for an answer that will not come.
    let held = listener.open_connections();
    assert!(held <= UNPROVEN_MAX + 8, "{held} connections are held");
    // A handshake takes some 40 KB here; waiting first packets have their own bound.
    let grown = resident().saturating_sub(before) >> 20;
    assert!(grown < 256, "{grown} MiB more than before the flood");
    let count = packets.len();
    println!("Q4: {count} packets, {sent} bytes in, {received} out, {held} held, {grown} MiB");
}
