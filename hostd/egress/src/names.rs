//! Asking the machine's name servers, as any client would, for a box that may know the answer.
//!
//! A question has its own socket, so its own port, and an id of its own: a forger has to guess both.

use std::{io, net::Ipv4Addr, net::SocketAddr};

use simple_dns::RCODE;
use tokio::net::UdpSocket;

use crate::{
    dns::{self, Found},
    limits::{ANSWER_BYTES_MAX, ANSWER_MAX, ROUNDS_MAX},
    message::random,
};

/// Addresses of a name, by the first server that answers.
pub(crate) async fn resolve(servers: &[SocketAddr], name: &str) -> Found {
    for _ in 0..ROUNDS_MAX {
        for server in servers {
            match tokio::time::timeout(ANSWER_MAX, ask(*server, name)).await {
                // A server that fails may have a neighbour that does not.
                Ok(Ok(found)) if found.rcode != RCODE::ServerFailure => return found,
                _ => {}
            }
        }
    }
    Found { addresses: Vec::new(), rcode: RCODE::ServerFailure }
}

async fn ask(server: SocketAddr, name: &str) -> io::Result<Found> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let id = u16::try_from(random()? & 0xffff).unwrap_or(0);
    let question = dns::question(id, name).ok_or(io::ErrorKind::InvalidInput)?;
    socket.send(&question).await?;
    let mut bytes = [0; ANSWER_BYTES_MAX];
    loop {
        let length = socket.recv(&mut bytes).await?;
        if let Some(found) = dns::found(id, name, &bytes[..length]) {
            return Ok(found);
        }
    }
}

/// The machine's own name servers.
pub(crate) fn of_machine() -> Vec<SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server = |line: &str| {
        let rest = line.trim().strip_prefix("nameserver")?;
        let ip = rest.trim().split('%').next()?.parse().ok()?;
        Some(SocketAddr::new(ip, 53))
    };
    text.lines().filter_map(server).take(3).collect()
}
