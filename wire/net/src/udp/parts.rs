//! What both engines need of the kernel's ways: socket options, addresses and control messages as bytes.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _},
};

use wire::limits::DATAGRAM_BYTES_MAX;

/// Room for one datagram: more than ours have, so that a longer one is seen to be longer.
pub(super) const SLOT_BYTES: usize = DATAGRAM_BYTES_MAX + 16;
/// Room for an IPv6 address, the longest.
pub(super) const NAME_BYTES: usize = 28;
/// Room for one control message of four bytes.
pub(super) const CONTROL_BYTES: usize = 24;

/// Reads the address that the kernel wrote.
pub(super) fn address(name: &[u8]) -> Option<SocketAddr> {
    let (family, rest) = name.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let port = u16::from_be_bytes(*port);
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => {
            let ip = Ipv4Addr::from(*rest.first_chunk::<4>()?);
            Some((ip, port).into())
        }
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(*rest.get(4..)?.first_chunk::<16>()?);
            Some((ip, port).into())
        }
        _ => None,
    }
}

/// Counts drops out of the kernel's running count, which has 32 bits and comes with datagrams.
#[derive(Debug, Default)]
pub(super) struct Drops {
    last: u32,
    total: u64,
}

impl Drops {
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Looks for the count in a datagram's control messages.
    pub(super) fn note(&mut self, control: &[u8]) {
        if control.is_empty() {
            return;
        }
        if let Some(count) = drop_count(control) {
            self.total += u64::from(count.wrapping_sub(self.last));
            self.last = count;
        }
    }
}

/// `struct cmsghdr`: length (of all), level, type, then the value; the next one starts aligned.
fn drop_count(mut control: &[u8]) -> Option<u32> {
    const HEAD: usize = size_of::<usize>() + 8;
    loop {
        let (len, rest) = control.split_first_chunk::<{ size_of::<usize>() }>()?;
        let len = usize::from_ne_bytes(*len);
        let (level, rest) = rest.split_first_chunk::<4>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        let ours = i32::from_ne_bytes(*level) == libc::SOL_SOCKET
            && i32::from_ne_bytes(*kind) == libc::SO_RXQ_OVFL;
        if ours && len >= HEAD + 4 {
            return Some(u32::from_ne_bytes(*rest.first_chunk::<4>()?));
        }
        let step = len.max(HEAD).next_multiple_of(size_of::<usize>());
        control = control.get(step..)?;
    }
}

/// Sets an option of the socket level to a plain value: `T` is what the kernel takes for `option`.
fn set_option<T: Copy>(socket: &impl AsFd, option: libc::c_int, value: T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `len` bytes of `value`, which lives on this frame; the fd is borrowed and open. What a
    // `sock_fprog` points to is kept alive by `steer`, its only maker, and copied by the kernel before it returns.
    let done = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, option, value, len)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A filter of three steps: load a word of the payload, take it modulo, give it back.
pub(super) fn steer(socket: &impl AsFd, at: u32, sockets: u32) -> io::Result<()> {
    const LOAD_WORD: u16 = 0x20;
    const MODULO: u16 = 0x94;
    const RETURN: u16 = 0x16;
    let step = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut steps = [step(LOAD_WORD, at), step(MODULO, sockets), step(RETURN, 0)];
    let program = libc::sock_fprog { len: 3, filter: steps.as_mut_ptr() };
    set_option(socket, libc::SO_ATTACH_REUSEPORT_CBPF, program)
}

fn clamp(bytes: usize) -> libc::c_int {
    // The kernel doubles it.
    libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX).min(libc::c_int::MAX / 2)
}

pub(super) fn count_drops(socket: &impl AsFd) -> io::Result<()> {
    set_option(socket, libc::SO_RXQ_OVFL, 1 as libc::c_int)
}

pub(super) fn force_receive_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    set_option(socket, libc::SO_RCVBUFFORCE, clamp(bytes))
}

pub(super) fn force_send_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    set_option(socket, libc::SO_SNDBUFFORCE, clamp(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn addresses_read_as_the_kernel_writes_them(v4: u32, v6: u128, port: u16) {
            for addr in [
                SocketAddr::from((Ipv4Addr::from(v4), port)),
                SocketAddr::from((Ipv6Addr::from(v6), port)),
            ] {
                let kernel = socket2::SockAddr::from(addr);
                // SAFETY: a SockAddr has `len` initialised bytes behind its pointer and lives past the slice.
                let name = unsafe {
                    std::slice::from_raw_parts(kernel.as_ptr().cast::<u8>(), kernel.len() as usize)
                };
                prop_assert_eq!(address(name), Some(addr));
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = address(&bytes);
            Drops::default().note(&bytes);
        }
    }

    #[test]
    fn a_count_that_wraps_goes_on() {
        let control = |count: u32| {
            let mut bytes = 20usize.to_ne_bytes().to_vec();
            bytes.extend(libc::SOL_SOCKET.to_ne_bytes());
            bytes.extend(libc::SO_RXQ_OVFL.to_ne_bytes());
            bytes.extend(count.to_ne_bytes());
            bytes
        };
        let mut drops = Drops::default();
        drops.note(&control(u32::MAX));
        drops.note(&[]);
        drops.note(&control(4));
        assert_eq!(drops.total(), u64::from(u32::MAX) + 5);
    }
}
