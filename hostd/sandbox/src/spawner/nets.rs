//! Network namespaces that are used again: a fresh one costs more than all else about a box.
//!
//! A box makes its own when there is no spare one. After the box is gone, the namespace may serve another, but only
//! if nothing shows that it was ever used: no socket in it, and no packet, error or label counted since it was
//! made. That is more than emptiness needs, and it leaves nothing to be learned from counters, caches or
//! lingering connections of the box before. What no box can change (addresses, routes, settings) needs no look: no
//! program in a box has `CAP_NET_ADMIN`, and the next box has no capability over the namespace at all, since it
//! belongs to the user namespace of the box that made it.
//! Left out: namespaces that a network policy has touched, and those of boxes that did use their network; they go.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

/// Spare ones that are kept: what ends at once is made again soon. Each holds some tens of kilobytes of the kernel's
/// memory, and a descriptor.
const SPARE_MAX: usize = 16;

/// What tells a namespace that was used from one that was not; of `sockstat` the first line, since the rest of it
/// counts the whole machine.
const TOLD_BY: [(&str, bool); 6] = [
    ("/proc/thread-self/net/sockstat", true),
    ("/proc/thread-self/net/dev", false),
    ("/proc/thread-self/net/snmp", false),
    ("/proc/thread-self/net/snmp6", false),
    ("/proc/thread-self/net/netstat", false),
    ("/proc/thread-self/net/ip6_flowlabel", false),
];

/// Spare network namespaces, and the way home.
pub(super) struct Nets {
    own: OwnedFd,
    /// How an unused one looks.
    unused: Vec<u8>,
    spare: Vec<OwnedFd>,
    scratch: Vec<u8>,
    /// Boxes that got one that was there already.
    pub(super) reused: u64,
}

fn open(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

fn enter(net: &OwnedFd) -> io::Result<()> {
    Ok(move_into_link_name_space(net.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Reads how the calling thread's network namespace looks.
fn look(into: &mut Vec<u8>) -> io::Result<()> {
    into.clear();
    for (path, first_line) in TOLD_BY {
        let from = into.len();
        match File::open(path) {
            Ok(mut file) => drop(file.read_to_end(into)?),
            // A kernel without IPv6 has no word of it, in any namespace.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        if first_line && let Some(end) = into[from..].iter().position(|byte| *byte == b'\n') {
            into.truncate(from + end);
        }
    }
    Ok(())
}

impl Nets {
    /// Learns how an unused namespace looks, from one made for it.
    pub(super) fn new() -> io::Result<Self> {
        let own = open("/proc/thread-self/ns/net")?;
        sys::unshare(libc::CLONE_NEWNET)?;
        let mut unused = Vec::with_capacity(16 << 10);
        let looked = sys::loopback_up().and_then(|()| look(&mut unused));
        enter(&own)?;
        looked?;
        Ok(Self { own, unused, spare: Vec::new(), scratch: Vec::new(), reused: 0 })
    }

    /// The namespace that a box has made, to be used again when it is gone.
    pub(super) fn of(pid: u32) -> Option<OwnedFd> {
        open(&format!("/proc/{pid}/ns/net")).ok()
    }

    /// Takes one whose box is gone.
    pub(super) fn give_back(&mut self, net: OwnedFd) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(net);
        }
    }

    /// Enters a spare one that was never used, if there is one: what is forked before [`Nets::leave`] is in it.
    /// Others are let go.
    pub(super) fn enter_spare(&mut self) -> io::Result<Option<OwnedFd>> {
        while let Some(net) = self.spare.pop() {
            enter(&net)?;
            if look(&mut self.scratch).is_ok() && self.scratch == self.unused {
                self.reused += 1;
                return Ok(Some(net));
            }
            self.leave()?;
        }
        Ok(None)
    }

    /// Goes home.
    pub(super) fn leave(&self) -> io::Result<()> {
        enter(&self.own)
    }
}
