//! UDP of one box: for each source port and destination one socket of the machine's, as a NAT has it.
//!
//! A datagram comes back only from where one went, because the socket is connected. Left out: everything about
//! groups, and errors of the far end (a datagram may be lost).

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    task::{Context, Poll},
    time::Instant,
};

use rustix::net::SendFlags;
use tokio::{io::ReadBuf, net::UdpSocket};

use crate::{
    limits::{UDP_BYTES_MAX, UDP_IDLE},
    packet::Flow,
};

struct Exchange {
    socket: UdpSocket,
    used: Instant,
}

/// Exchanges of one box.
#[derive(Default)]
pub(crate) struct Exchanges(HashMap<Flow, Exchange>);

impl Exchanges {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn has(&self, flow: &Flow) -> bool {
        self.0.contains_key(flow)
    }

    /// Begins an exchange.
    ///
    /// # Errors
    /// What the kernel says of the destination.
    pub(crate) fn begin(&mut self, flow: Flow) -> io::Result<()> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect(SocketAddr::from((flow.to, flow.to_port)))?;
        let socket = UdpSocket::from_std(socket)?;
        self.0.insert(flow, Exchange { socket, used: Instant::now() });
        Ok(())
    }

    /// Sends; what the kernel does not take now is lost, as datagrams may be.
    pub(crate) fn send(&mut self, flow: &Flow, payload: &[u8]) -> usize {
        let Some(exchange) = self.0.get_mut(flow) else { return 0 };
        exchange.used = Instant::now();
        // Straight to the kernel: tokio knows nothing yet of what a new socket is ready for.
        rustix::net::send(&exchange.socket, payload, SendFlags::DONTWAIT).unwrap_or(0)
    }

    /// Takes what came, at most a few datagrams an exchange.
    pub(crate) fn receive(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut [u8],
        mut take: impl FnMut(Flow, &[u8]),
    ) -> bool {
        let mut busy = false;
        for (flow, exchange) in &mut self.0 {
            for _ in 0..16 {
                let mut buffer = ReadBuf::new(&mut scratch[..UDP_BYTES_MAX]);
                match exchange.socket.poll_recv(cx, &mut buffer) {
                    Poll::Ready(Ok(())) => {
                        exchange.used = Instant::now();
                        busy = true;
                        take(*flow, buffer.filled());
                    }
                    // The far end refused the last one; the next may do better.
                    Poll::Ready(Err(_)) => {}
                    Poll::Pending => break,
                }
            }
        }
        busy
    }

    /// Forgets what has been idle.
    pub(crate) fn expire(&mut self) {
        self.0.retain(|_, exchange| exchange.used.elapsed() < UDP_IDLE);
    }
}
