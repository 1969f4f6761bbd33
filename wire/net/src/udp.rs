//! Datagrams in batches, on threads of their own: the aggregator's receive path, and every role's sender.
//!
//! A receiver has its own socket (`SO_REUSEPORT` spreads senders over several) and blocks in the kernel, so that it
//! belongs on a thread of its own. What the kernel drops for want of room is counted (`SO_RXQ_OVFL`), and a receive
//! buffer that is smaller than wanted is said: a full buffer is never silent (FAULTS H6, H7). DESIGN.md has the
//! measurement by which [`Engine::Auto`] chooses.

mod mmsg;
mod parts;
mod sender;
mod uring;

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

pub use sender::Sender;

use crate::NetError;

/// How datagrams are taken from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// The one that measured faster here, else the other.
    #[default]
    Auto,
    /// io_uring with multishot receive and provided buffers.
    IoUring,
    /// `recvmmsg`.
    Recvmmsg,
}

/// How a receiver is made.
#[derive(Clone, Copy, Debug)]
pub struct ReceiverOptions {
    /// Let other sockets of this process share the port; the kernel spreads senders over them.
    pub reuse_port: bool,
    /// Bytes of kernel buffer that are wanted. A small datagram takes about 800 bytes of it.
    pub rcvbuf_bytes: usize,
    /// How datagrams are taken.
    pub engine: Engine,
    /// After the first datagram of a batch, wait so long for more: fewer wake-ups for a later answer.
    pub gather: Duration,
}

/// A heartbeat may wait so long.
const GATHER: Duration = Duration::from_micros(500);

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self { reuse_port: false, rcvbuf_bytes: 8 << 20, engine: Engine::Auto, gather: GATHER }
    }
}

/// Receives datagrams in batches.
#[derive(Debug)]
pub struct Receiver {
    socket: UdpSocket,
    ring: Ring,
    drops: parts::Drops,
    rcvbuf_bytes: usize,
    gather: Duration,
}

#[derive(Debug)]
enum Ring {
    IoUring(Box<uring::Uring>),
    Recvmmsg(mmsg::Batch),
}

impl Receiver {
    /// Binds a socket. Receive from one thread only, and drop it there: with io_uring the first one to receive owns it.
    ///
    /// # Errors
    /// [`NetError`], by what the kernel refused: io_uring itself only if it was named. A receive buffer that is smaller than wanted is no error: see
    /// [`Receiver::rcvbuf_bytes`].
    pub fn bind(addr: SocketAddr, options: &ReceiverOptions) -> Result<Self, NetError> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))
            .map_err(|error| NetError::Socket("a UDP socket", error))?;
        if options.reuse_port {
            socket.set_reuse_port(true).map_err(|error| NetError::Socket("SO_REUSEPORT", error))?;
        }
        socket.bind(&addr.into()).map_err(|error| NetError::bind(addr, error))?;
        let rcvbuf_bytes = set_receive_buffer(&socket, options.rcvbuf_bytes);
        parts::count_drops(&socket).map_err(|error| NetError::Socket("SO_RXQ_OVFL", error))?;
        let ring = match options.engine {
            Engine::Recvmmsg => Ring::Recvmmsg(mmsg::Batch::new()),
            Engine::IoUring => {
                let ring = uring::Uring::new().map_err(|e| NetError::Socket("io_uring", e))?;
                Ring::IoUring(Box::new(ring))
            }
            Engine::Auto => match uring::Uring::new() {
                Ok(ring) => Ring::IoUring(Box::new(ring)),
                Err(error) => {
                    tracing::warn!(%error, "no io_uring here: datagrams are received with recvmmsg");
                    Ring::Recvmmsg(mmsg::Batch::new())
                }
            },
        };
        Ok(Self {
            socket: socket.into(),
            ring,
            drops: parts::Drops::default(),
            rcvbuf_bytes,
            gather: options.gather,
        })
    }

    /// Waits for datagrams, at most `timeout`, and hands over each that is there, up to one batch; returns how many.
    /// A datagram longer than any of ours is cut, but stays longer than [`wire::limits::DATAGRAM_BYTES_MAX`].
    ///
    /// # Errors
    /// What the kernel says of the socket; a timeout or a signal is no error.
    pub fn recv(
        &mut self,
        timeout: Duration,
        each: impl FnMut(&[u8], SocketAddr),
    ) -> io::Result<usize> {
        // The kernel takes zero for "for ever".
        let times = (timeout.max(Duration::from_micros(1)), self.gather);
        match &mut self.ring {
            Ring::IoUring(ring) => ring.recv(&self.socket, times, &mut self.drops, each),
            Ring::Recvmmsg(batch) => batch.recv(&self.socket, times, &mut self.drops, each),
        }
    }

    /// Of the sockets that share this port (`reuse_port`), `sockets` of them, lets the kernel choose by a datagram's
    /// content: the four bytes from `at` on, read big-endian, modulo `sockets`, name the socket in the order in which
    /// they were bound. A shorter datagram goes to the first.
    ///
    /// # Errors
    /// What the kernel says; senders are then spread by their addresses, as without it.
    pub fn steer(&self, at: u32, sockets: u32) -> io::Result<()> {
        parts::steer(&self.socket, at, sockets)
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Datagrams that the kernel dropped because this socket's buffer was full, up to the newest one received.
    #[must_use]
    pub fn kernel_drops(&self) -> u64 {
        self.drops.total()
    }

    /// Bytes of kernel buffer that it got: compare with what was wanted, and warn (`net.core.rmem_max`).
    #[must_use]
    pub fn rcvbuf_bytes(&self) -> usize {
        self.rcvbuf_bytes
    }

    /// The engine in use; never [`Engine::Auto`].
    #[must_use]
    pub fn engine(&self) -> Engine {
        match self.ring {
            Ring::IoUring(_) => Engine::IoUring,
            Ring::Recvmmsg(_) => Engine::Recvmmsg,
        }
    }

    /// A sender from the same port.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn sender(&self) -> io::Result<Sender> {
        Ok(Sender::over(self.socket.try_clone()?))
    }
}

/// Sets a socket's receive buffer, past the machine's limit if we may; returns the bytes that it got.
fn set_receive_buffer(socket: &Socket, bytes: usize) -> usize {
    if parts::force_receive_buffer(socket, bytes).is_err() {
        let _ = socket.set_recv_buffer_size(bytes);
    }
    // The kernel doubles what is set, for its own bookkeeping, and tells the double.
    socket.recv_buffer_size().map_or(0, |doubled| doubled / 2)
}

/// Sets both buffers of a QUIC socket as large as we may.
pub(crate) fn set_buffers(socket: &Socket, bytes: usize) {
    set_receive_buffer(socket, bytes);
    if parts::force_send_buffer(socket, bytes).is_err() {
        let _ = socket.set_send_buffer_size(bytes);
    }
}
