//! Sends datagrams in batches (`sendmmsg`).

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    ptr,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::NetError;

/// Datagrams a system call at most.
const BATCH: usize = 64;

/// Bytes of kernel buffer that a sender asks for.
const SNDBUF_BYTES: usize = 4 << 20;

/// Collects datagrams and sends them a batch at a time. Dropping it sends nothing: call [`Sender::flush`].
#[derive(Debug)]
pub struct Sender {
    socket: UdpSocket,
    bytes: Vec<u8>,
    queue: Vec<(SockAddr, std::ops::Range<usize>)>,
    unsent: u64,
}

impl Sender {
    /// Binds a socket of its own.
    ///
    /// # Errors
    /// [`NetError`], by what the kernel refused.
    pub fn bind(addr: SocketAddr) -> Result<Self, NetError> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))
            .map_err(|error| NetError::Socket("a UDP socket", error))?;
        socket.bind(&addr.into()).map_err(|error| NetError::bind(addr, error))?;
        super::set_buffers(&socket, SNDBUF_BYTES);
        Ok(Self::over(socket.into()))
    }

    /// Sends over a socket that there is.
    #[must_use]
    pub fn over(socket: UdpSocket) -> Self {
        Self { socket, bytes: Vec::new(), queue: Vec::with_capacity(BATCH), unsent: 0 }
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Adds a datagram, and sends the batch if that filled it.
    ///
    /// # Errors
    /// As [`Sender::flush`].
    pub fn push(&mut self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(datagram);
        self.queue.push((to.into(), start..self.bytes.len()));
        if self.queue.len() == BATCH { self.flush() } else { Ok(()) }
    }

    /// Sends all that was added. A datagram that the kernel refuses (no route, say) is left out and counted.
    ///
    /// # Errors
    /// What the kernel says, if the socket itself is broken; the rest of the batch is then gone.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut from = 0;
        let done = loop {
            if from == self.queue.len() {
                break Ok(());
            }
            match self.send(from) {
                Ok(sent) => from += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => break Err(error),
                Err(_) => {
                    self.unsent += 1;
                    from += 1;
                }
            }
        };
        self.queue.clear();
        self.bytes.clear();
        done
    }

    /// Datagrams that the kernel refused.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.unsent
    }

    fn send(&mut self, from: usize) -> io::Result<usize> {
        let queue = &self.queue[from..];
        let empty = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let mut vectors = [empty; BATCH];
        for (vector, (_, range)) in vectors.iter_mut().zip(queue) {
            let bytes = &self.bytes[range.clone()];
            // The kernel only reads it, whatever the type says.
            *vector =
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        }
        let mut heads = [const {
            libc::mmsghdr {
                msg_hdr: libc::msghdr {
                    msg_name: ptr::null_mut(),
                    msg_namelen: 0,
                    msg_iov: ptr::null_mut(),
                    msg_iovlen: 1,
                    msg_control: ptr::null_mut(),
                    msg_controllen: 0,
                    msg_flags: 0,
                },
                msg_len: 0,
            }
        }; BATCH];
        for ((head, vector), (to, _)) in heads.iter_mut().zip(&mut vectors).zip(queue) {
            head.msg_hdr.msg_name = to.as_ptr().cast_mut().cast();
            head.msg_hdr.msg_namelen = to.len();
            head.msg_hdr.msg_iov = ptr::from_mut(vector);
        }
        let count = queue.len().min(BATCH);
        #[expect(clippy::cast_possible_truncation, reason = "at most 64")]
        let count = count as libc::c_uint;
        // SAFETY: the first `count` heads were filled just above with pointers into `self.bytes`, `self.queue` and
        // `vectors`, none of which changes before the call returns; the kernel only reads through them.
        let sent = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), heads.as_mut_ptr(), count, 0) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}
