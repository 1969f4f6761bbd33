//! The box's end of its egress: a TUN device in its own network namespace, and the name server that programs ask.
//!
//! Made by the box's init with the box's own rights, so that nothing of the host's network is touched, locked or left:
//! the device goes with the namespace. Its other end is a descriptor that hostd gives to the process that decides what
//! may pass. Packets sent before that reads wait in the device. Left out: IPv6, to which there is no route.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::error::Fault;
use crate::spec::BoxNetwork;
use crate::sys;

/// What programs see it as.
const NAME: &[u8] = b"eth0";

/// Makes the device out of a node of `/dev/net/tun`. Call before the root is swapped: `/proc` is needed.
pub(super) fn make_tunnel(node: BorrowedFd<'_>, network: &BoxNetwork) -> Result<OwnedFd, Fault> {
    let made = || -> io::Result<OwnedFd> {
        // Opened here and not by the spawner: a device belongs to the namespace of whoever opens it.
        let path = format!("/proc/self/fd/{}", node.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let tunnel = rustix::fs::open(path, flags, Mode::empty())?;
        sys::tun_attach(&tunnel, NAME)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        sys::set_link(&socket, NAME, network.address, network.prefix_bits, network.mtu)?;
        sys::add_default_route(&socket, network.gateway)?;
        Ok(tunnel)
    };
    made().map_err(|e| Fault::os("make the network device", &e))
}

/// Points the C library of the box at its name server: replaces `/etc/resolv.conf` in the box's own layer. An image
/// without `/etc`, or with a read-only one, goes without.
pub(super) fn name_server(root: BorrowedFd<'_>, network: &BoxNetwork) {
    let write = || -> rustix::io::Result<()> {
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let etc = rustix::fs::openat2(root, "etc", flags, Mode::empty(), resolve)?;
        // Whatever an image has there, a link to somewhere else before all.
        let _ = rustix::fs::unlinkat(&etc, "resolv.conf", AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&etc, "resolv.conf", flags, Mode::from_raw_mode(0o644))?;
        let [a, b, c, d] = network.gateway;
        let text = format!("nameserver {a}.{b}.{c}.{d}\noptions timeout:3 attempts:2\n");
        rustix::io::write(file, text.as_bytes())?;
        Ok(())
    };
    let _ = write();
}
