//! A box from within: process 1 of its namespaces, from the clone to the end.
//!
//! It parks (`park`), waits for one claim, swaps its root (`swap`), starts the program (`run`), and then
//! stays: reaps orphans, starts further programs, does file operations, and tells the spawner how
//! the main program ended. It has one thread and no memory of other boxes. It trusts the spawner
//! and nothing in its own root.

mod confine;
mod files;
mod network;
mod park;
mod run;
mod serve;
mod swap;
mod users;
mod watch;

use std::os::fd::{AsFd, OwnedFd};

use rustix::thread::CpuSet;
use wire::codec::Message as _;

use crate::error::Fault;
use crate::msg::{FromBox, ToBox};
use crate::packet;
use crate::spec::{BoxNetwork, Limits};
use crate::sys;

pub(crate) use confine::Filters;
pub use files::ENTRIES_MAX;

/// What the spawner hands to a box through the fork.
pub(crate) struct Setup<'a> {
    /// The box's end of its control socket.
    pub(crate) control: OwnedFd,
    /// A detached mount of the prepared `/dev`.
    pub(crate) dev: OwnedFd,
    /// cgroup files to enter through (v1).
    pub(crate) doors: Vec<std::fs::File>,
    /// Compiled seccomp filters.
    pub(crate) filters: &'a Filters,
    /// Whether it is in a network namespace of its own already.
    pub(crate) has_net: bool,
}

/// Runs a box to its end.
pub(crate) fn run_box(setup: Setup<'_>) -> ! {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| live(setup)));
    sys::exit_now(outcome.unwrap_or(70))
}

fn live(setup: Setup<'_>) -> i32 {
    let mut buffer = vec![0_u8; packet::PACKET_BYTES_MAX];
    let filters = setup.filters;
    let control = match park::park(setup, &mut buffer) {
        Ok(control) => control,
        Err((control, why)) => {
            tell(&control, &FromBox::Unfit { why });
            return 71;
        }
    };
    // The spawner may keep this process on one core while it launches (`Boxed::bring_here`).
    let Ok(cores) = sys::cores() else { return 71 };
    let ready = match Ready::make() {
        Ok(ready) => ready,
        Err(why) => {
            tell(&control, &FromBox::Unfit { why });
            return 71;
        }
    };
    tell(&control, &FromBox::Ready);
    let Ok(packet) = packet::recv(control.as_fd(), &mut buffer, true) else { return 72 };
    if packet.len == 0 {
        return 0;
    }
    let woken = sys::now_ns();
    let Some(ToBox::Claim { program, hostname, limits, network, parts }) =
        ToBox::decode(&buffer[..packet.len])
    else {
        return 73;
    };
    let claim =
        Claimed { fds: packet.fds, program, hostname, limits, network, parts, woken, cores };
    let started = if packet.cut {
        Err(Fault::Os { what: "take descriptors".into(), errno: libc::EMFILE })
    } else {
        start(&control, claim, filters, ready)
    };
    match started {
        Ok(serving) => serve::serve(&control, serving, &mut buffer),
        Err(why) => {
            tell(&control, &FromBox::NotStarted { why });
            74
        }
    }
}

struct Claimed {
    fds: Vec<OwnedFd>,
    program: crate::spec::Program,
    hostname: String,
    limits: Limits,
    network: Option<BoxNetwork>,
    parts: u32,
    woken: u64,
    /// Those that the program may run on.
    cores: CpuSet,
}

/// What a launch uses and a parked box has made beforehand.
struct Ready {
    /// Readable when a child has ended.
    children: OwnedFd,
    fence: landlock::RulesetCreated,
    means: run::Means,
}

impl Ready {
    /// Memory that a launch needs; each page of it that this process does not have yet is a page fault less.
    const HEAP_BYTES: usize = 24 * 1024;

    fn make() -> Result<Self, Fault> {
        let children = sys::signal_fd(libc::SIGCHLD).map_err(|e| Fault::os("signalfd", &e))?;
        let (fence, means) = (confine::fence()?, run::Means::make(crate::fork::Stack::new())?);
        // Given back at once: the allocator keeps it.
        drop(std::hint::black_box(vec![1_u8; Self::HEAP_BYTES]));
        let _ = sys::now_ns();
        let claim = ToBox::Claim {
            program: crate::spec::Program::new(["/bin/true"]),
            hostname: "sandbox".into(),
            limits: Limits::default(),
            network: None,
            parts: 0,
        };
        drop(std::hint::black_box(ToBox::decode(&claim.encode())));
        run::rehearse();
        Ok(Self { children, fence, means })
    }
}

fn start(
    control: &OwnedFd,
    claim: Claimed,
    filters: &Filters,
    ready: Ready,
) -> Result<serve::Serving, Fault> {
    let Ready { children, fence, means } = ready;
    let mut steps = crate::spec::Steps { woken: claim.woken, ..crate::spec::Steps::default() };
    let mut fds = claim.fds;
    let tunnel = match &claim.network {
        Some(network) => {
            let node = fds.pop().ok_or_else(|| Fault::BoxDied { what: "a network".into() })?;
            Some(network::make_tunnel(node.as_fd(), network)?)
        }
        None => None,
    };
    let mut fds = fds.into_iter();
    let root = fds.next().ok_or_else(|| Fault::BoxDied { what: "a claim without root".into() })?;
    let parts: Vec<_> = fds.by_ref().take(claim.parts as usize).collect();
    swap::swap(&root, &parts, &claim.hostname, claim.network.as_ref(), &mut steps)?;
    confine::confine(filters, fence, root.as_fd())?;
    steps.confined = sys::now_ns();
    let stdio = fds.collect();
    let (started, stack) =
        run::start(&claim.program, stdio, &claim.limits, Some(&claim.cores), means);
    let started = started?;
    steps.executed = sys::now_ns();
    let master: Vec<_> = started.master.iter().map(AsFd::as_fd).collect();
    tell_with(control, &FromBox::Started { steps }, &master);
    // Closed when nobody waits for it any more.
    drop((started.master, root, parts));
    // The launch is over: from here on this process is worth no more than the program.
    let _ = sys::schedule_normally(0);
    Ok(serve::Serving::new(started.pid, children, claim.limits, stack, tunnel))
}

/// Sends a message; one that cannot be sent means that the spawner is gone, which shows on receive.
fn tell(control: &OwnedFd, message: &FromBox) {
    tell_with(control, message, &[]);
}

fn tell_with(control: &OwnedFd, message: &FromBox, fds: &[std::os::fd::BorrowedFd<'_>]) {
    let bytes = message.encode();
    loop {
        match packet::send(control.as_fd(), &bytes, fds) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let mut poll = [rustix::event::PollFd::new(control, rustix::event::PollFlags::OUT)];
                if rustix::event::poll(&mut poll, None).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}
