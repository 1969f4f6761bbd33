//! Packets with file descriptors: one `sendmsg` or `recvmsg` on a `SOCK_SEQPACKET` socket a message.
//!
//! A packet is whole or absent, so neither side of a pair can be left in the middle of one by a peer
//! that dies. Both directions are bounded: [`PACKET_BYTES_MAX`] and [`PACKET_FDS_MAX`].
//! Left out: streams, and credentials of the sender (the socket's directory is private to root).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The largest packet: an argument list and an environment fit, and it stays under the default
/// socket buffer (208 KiB), so that a send either succeeds or says `EAGAIN`.
pub(crate) const PACKET_BYTES_MAX: usize = 160 * 1024;
/// The most descriptors in a packet; a root of [`crate::LAYERS_MAX`] layers fits twice.
pub(crate) const PACKET_FDS_MAX: usize = 128;

const CONTROL_WORDS: usize = 1 + PACKET_FDS_MAX / 2 + 4;

/// A connected pair, close-on-exec at both ends.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    // SAFETY: `fds` is a local array of two descriptors, which is what the call fills.
    let rc = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so both are open and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Sends one packet without blocking. `WouldBlock` means that nothing was sent.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.len() > PACKET_BYTES_MAX || fds.len() > PACKET_FDS_MAX {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let raw: Vec<RawFd> = fds.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    let mut control = [0_u64; CONTROL_WORDS];
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: `msghdr` is plain data for which all-zero bytes are a valid, empty value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !raw.is_empty() {
        let payload = u32::try_from(std::mem::size_of_val(raw.as_slice())).unwrap_or(u32::MAX);
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: pure arithmetic on a length bounded by PACKET_FDS_MAX.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as usize;
        assert!(
            header.msg_controllen <= std::mem::size_of_val(&control),
            "control buffer too small"
        );
        // SAFETY: `msg_control` points at `control`, which the assertion above showed to be long
        // enough for one header and `payload` bytes, and which is aligned for `cmsghdr` (u64).
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(payload) as usize;
            std::ptr::copy_nonoverlapping(
                raw.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(first),
                payload as usize,
            );
        }
    }
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: `header` points at `iov`, `control` and `bytes`, all alive across the call.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const header,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What [`recv`] brought.
pub(crate) struct Packet {
    /// Length of the packet inside the caller's buffer. 0 means that the peer is gone.
    pub(crate) len: usize,
    /// Descriptors that came along, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether more descriptors came than this process had room for. The rest is closed.
    pub(crate) cut: bool,
}

/// Receives one packet into `buffer`. A packet longer than that is an `InvalidData` error; its descriptors
/// are closed.
pub(crate) fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8], block: bool) -> io::Result<Packet> {
    use std::os::fd::AsRawFd;
    let mut control = [MaybeUninit::<u64>::uninit(); CONTROL_WORDS];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: `msghdr` is plain data for which all-zero bytes are a valid, empty value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = std::mem::size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | if block { 0 } else { libc::MSG_DONTWAIT };
    let got = loop {
        // SAFETY: `header` points at `iov`, `control` and `buffer`, all alive across the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        if got >= 0 {
            break got;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` with `msg_controllen` bytes of well-formed headers; the
    // CMSG macros stay inside them. Each descriptor was installed for us by this call alone.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            if (*at).cmsg_level == libc::SOL_SOCKET && (*at).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*at).cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..bytes / size_of::<RawFd>() {
                    let fd = libc::CMSG_DATA(at).cast::<RawFd>().add(i).read_unaligned();
                    fds.push(OwnedFd::from_raw_fd(fd));
                }
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    if header.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet cut short"));
    }
    let cut = header.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(Packet { len: usize::try_from(got).unwrap_or(0), fds, cut })
}

/// A memory file of these bytes: for what may be longer than a packet.
pub(crate) fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create("message", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut at = 0;
    while at < bytes.len() {
        at += rustix::io::pwrite(&memory, &bytes[at..], at as u64)?;
    }
    Ok(memory)
}

/// Reads a memory file, of at most `most` bytes.
pub(crate) fn read_memory_file(fd: OwnedFd, most: u64) -> io::Result<Vec<u8>> {
    use std::io::{Read, Seek};
    let mut file = std::fs::File::from(fd);
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Borrows a list of owned descriptors, for [`send`].
pub(crate) fn borrow(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_carries_bytes_and_descriptors() {
        let (a, b) = pair().unwrap();
        let (c, _d) = pair().unwrap();
        send(a.as_fd(), b"hello", &[c.as_fd(), c.as_fd()]).unwrap();
        let mut buffer = [0_u8; 64];
        let packet = recv(b.as_fd(), &mut buffer, true).unwrap();
        assert_eq!(&buffer[..packet.len], b"hello");
        assert_eq!(packet.fds.len(), 2);
        drop(a);
        assert_eq!(recv(b.as_fd(), &mut buffer, true).unwrap().len, 0);
    }

    #[test]
    fn a_packet_longer_than_the_buffer_is_refused() {
        let (a, b) = pair().unwrap();
        send(a.as_fd(), &[7; 100], &[a.as_fd()]).unwrap();
        let mut buffer = [0_u8; 64];
        assert!(recv(b.as_fd(), &mut buffer, true).is_err());
        assert!(send(a.as_fd(), &vec![0; PACKET_BYTES_MAX + 1], &[]).is_err());
    }
}
