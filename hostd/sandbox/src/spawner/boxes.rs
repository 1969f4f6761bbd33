//! One box as the spawner knows it: its process, socket, groups, and what it is asked.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use rustix::fs::{Mode, OFlags};

use super::nets::Nets;
use super::root::Canvas;
use super::tally::{Entry, Tally};
use wire::codec::Message as _;

use crate::cgroup::Group;
use crate::error::Fault;
use crate::fork::{self, Cloned};
use crate::inside::{self, Filters};
use crate::msg::{StdioFds, ToBox};
use crate::packet;
use crate::spec::{ExitStatus, Program, SandboxId, Steps, UIDS_A_BOX};
use crate::sys;

/// Where a box is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Cloned, not yet ready.
    Preparing,
    /// Ready for a claim.
    Parked,
    /// Claimed; its program is not yet executed.
    Starting,
    /// Its program runs.
    Running,
    /// Told to die, or known to be dying.
    Dying,
}

impl State {
    pub(super) const ALL: [Self; 5] =
        [Self::Preparing, Self::Parked, Self::Starting, Self::Running, Self::Dying];
}

/// Host ends of a program's stdio, and which they are.
#[derive(Debug, Default)]
pub(super) struct HostEnds {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) pty: Option<OwnedFd>,
}

impl HostEnds {
    pub(super) fn which(&self) -> StdioFds {
        StdioFds {
            stdin: self.stdin.is_some(),
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            pty: self.pty.is_some(),
        }
    }

    /// In the order of [`StdioFds`].
    pub(super) fn borrow(&self) -> Vec<BorrowedFd<'_>> {
        let all = [&self.stdin, &self.stdout, &self.stderr, &self.pty];
        all.into_iter().flatten().map(AsFd::as_fd).collect()
    }

    /// Makes the pipes of a program: host ends, and the ends for the box (stdin where asked for,
    /// stdout, stderr), which belong to the box's root.
    pub(super) fn pipes(program: &Program, uid: u32) -> io::Result<(Self, Vec<OwnedFd>)> {
        let outputs = if program.tty.is_none() { Some(Outputs::make(uid)?) } else { None };
        Self::with(outputs, program, uid)
    }

    /// The same with pipes that are there, which a program on a terminal needs not.
    pub(super) fn with(
        outputs: Option<Outputs>,
        program: &Program,
        uid: u32,
    ) -> io::Result<(Self, Vec<OwnedFd>)> {
        let mut host = Self::default();
        let mut inner = Vec::new();
        let Some(Outputs([stdout, stderr])) = outputs.filter(|_| program.tty.is_none()) else {
            return Ok((host, inner));
        };
        if program.stdin {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            give(&read, uid)?;
            host.stdin = Some(write);
            inner.push(read);
        }
        inner.extend([stdout.1, stderr.1]);
        (host.stdout, host.stderr) = (Some(stdout.0), Some(stderr.0));
        Ok((host, inner))
    }
}

/// Pipes for stdout and stderr, whose inner ends belong to a box's root.
pub(super) struct Outputs([(OwnedFd, OwnedFd); 2]);

impl Outputs {
    pub(super) fn make(uid: u32) -> io::Result<Self> {
        let pipe = || -> io::Result<_> {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            give(&write, uid)?;
            Ok((read, write))
        };
        Ok(Self([pipe()?, pipe()?]))
    }
}

fn give(fd: &OwnedFd, uid: u32) -> io::Result<()> {
    let (user, group) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(uid));
    Ok(rustix::fs::fchown(fd, Some(user), Some(group))?)
}

/// A question that a box has not answered.
pub(super) struct Pending {
    /// The asker's connection and its number for the question.
    pub(super) from: (u64, u64),
    /// Stdio of an `exec`.
    pub(super) ends: HostEnds,
}

/// What a box was claimed for.
pub(super) struct Claimed {
    pub(super) id: SandboxId,
    pub(super) from: (u64, u64),
    pub(super) steps: Steps,
    pub(super) ends: HostEnds,
    pub(super) started_ns: u64,
}

/// A live box.
pub(super) struct Boxed {
    pub(super) slot: u32,
    pub(super) shape: usize,
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
    pub(super) control: OwnedFd,
    /// Until it is claimed.
    pub(super) userns: Option<OwnedFd>,
    /// Until it is claimed.
    pub(super) canvas: Option<(Canvas, Outputs)>,
    /// Its network namespace, where it may serve another box.
    pub(super) net: Option<OwnedFd>,
    pub(super) group: Group,
    pub(super) entry: Entry,
    pub(super) made_at: Instant,
    pub(super) was_ready: bool,
    pub(super) paused: bool,
    pub(super) claimed: Option<Claimed>,
    pub(super) exit: Option<ExitStatus>,
    pub(super) pending: HashMap<u64, Pending>,
    /// Programs of `exec` that run, by number.
    pub(super) execs: HashSet<u64>,
}

/// What a new box is made from.
pub(super) struct Mould<'a> {
    pub(super) slot: u32,
    pub(super) shape: usize,
    pub(super) uid_base: u32,
    pub(super) group: Group,
    pub(super) dev: BorrowedFd<'a>,
    pub(super) filters: &'a Filters,
    pub(super) tally: &'a Rc<Tally>,
    pub(super) nets: &'a mut Nets,
    /// Whether the box is to make a network namespace of its own.
    pub(super) own_network: bool,
}

impl Boxed {
    /// Clones a box and lets it park. On failure gives the groups back.
    pub(super) fn make(mould: Mould<'_>) -> Result<Self, Box<(Group, Fault)>> {
        let Mould { slot, shape, uid_base, group, dev, filters, tally, nets, own_network } = mould;
        let made = (|| -> io::Result<_> {
            let canvas = (Canvas::make(uid_base)?, Outputs::make(uid_base)?);
            let dev = sys::clone_tree(dev, "", false)?;
            let (ours, theirs) = packet::pair()?;
            let into = group.clone_target()?;
            let doors = group.doors()?;
            let flags = u64::from((libc::CLONE_NEWUSER | libc::CLONE_NEWPID).unsigned_abs());
            // The creator of a user namespace pays for what is counted by user (inotify instances, pending
            // signals, processes of RLIMIT_NPROC). So each box is created by its own user, or one box
            // could use up root's and with it everybody's.
            let net = if own_network { None } else { nets.enter_spare()? };
            sys::set_effective_uid(uid_base)?;
            // SAFETY: the spawner has one thread, always.
            let cloned = unsafe { fork::clone_process(flags, into.as_ref().map(AsFd::as_fd)) };
            if matches!(cloned, Ok(Cloned::Child)) {
                let (control, has_net) = (theirs, net.is_some());
                inside::run_box(inside::Setup { control, dev, doors, filters, has_net })
            }
            sys::set_effective_uid(0)?;
            if net.is_some() {
                nets.leave()?;
            }
            match cloned? {
                Cloned::Child => Err(io::ErrorKind::Unsupported.into()),
                Cloned::Parent { pid, pidfd } => Ok((ours, pid, pidfd, net, canvas)),
            }
        })();
        let (control, pid, pidfd, net, canvas) = match made {
            Ok(parts) => parts,
            Err(e) => return Err(Box::new((group, Fault::os("clone a box", &e)))),
        };
        match admit(pid, uid_base, &control) {
            Ok(userns) => Ok(Self {
                slot,
                shape,
                pid,
                pidfd,
                control,
                userns: Some(userns),
                canvas: Some(canvas),
                entry: Entry::new(tally, shape, slot, net.is_none()),
                net,
                group,
                made_at: Instant::now(),
                was_ready: false,
                paused: false,
                claimed: None,
                exit: None,
                pending: HashMap::new(),
                execs: HashSet::new(),
            }),
            Err(e) => {
                let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
                let _ = wait(&pidfd, true);
                Err(Box::new((group, Fault::os("id map of a box", &e))))
            }
        }
    }

    /// Says something to the box.
    pub(super) fn tell(&self, message: &ToBox, fds: &[OwnedFd]) -> io::Result<()> {
        packet::send(self.control.as_fd(), &message.encode(), &packet::borrow(fds))
    }

    /// Makes the parked box wake on the core of this process, which is about to sleep: to wake another core, or to
    /// move to one, costs more than most steps of a launch. The box lets its program go everywhere again.
    pub(super) fn bring_here(&self) {
        if let Ok(pid) = i32::try_from(self.pid) {
            let _ = sys::keep_on(Some(pid), &sys::this_core());
        }
    }

    /// Kills everything in the box: its init, and with it the namespace.
    pub(super) fn kill(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        if self.paused {
            // A process frozen by v1 sees the signal only once thawed.
            let _ = self.group.freeze(false);
            self.paused = false;
        }
        self.entry.enter(State::Dying);
    }

    /// What the box has used.
    pub(super) fn stats(&self) -> crate::spec::Stats {
        // A magic link, not a walk through the box's files; an overlay answers for its upper layer.
        let used = rustix::fs::statfs(format!("/proc/{}/root", self.pid)).map(|s| {
            let block = u64::try_from(s.f_bsize).unwrap_or(0);
            s.f_blocks.saturating_sub(s.f_bfree).saturating_mul(block)
        });
        crate::spec::Stats { disk_bytes: used.unwrap_or(0), ..self.group.stats() }
    }

    /// Waits until the killed box is gone.
    pub(super) fn wait_for_end(&self) {
        wait(&self.pidfd, true);
    }

    /// Collects the box if it is dead.
    pub(super) fn collect(&self) -> bool {
        wait(&self.pidfd, false)
    }
}

/// Writes the id maps, sets the score, and opens the user namespace of a new box.
fn admit(pid: u32, uid_base: u32, control: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())?;
    let put = |name: &str, text: &str| -> io::Result<()> {
        let file =
            rustix::fs::openat(&proc, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(file, text.as_bytes())?;
        Ok(())
    };
    let map = format!("0 {uid_base} {UIDS_A_BOX}");
    put("uid_map", &map)?;
    put("gid_map", &map)?;
    // Before hostd, when the machine itself runs out.
    put("oom_score_adj", "500")?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let userns = rustix::fs::openat(&proc, "ns/user", flags, Mode::empty())?;
    packet::send(control.as_fd(), &ToBox::Mapped.encode(), &[])?;
    Ok(userns)
}

fn wait(pidfd: &OwnedFd, block: bool) -> bool {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let mut options = WaitIdOptions::EXITED;
    if !block {
        options |= WaitIdOptions::NOHANG;
    }
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(status) => status.is_some(),
        // Nobody else waits for our children; if one is gone all the same, it is gone.
        Err(rustix::io::Errno::CHILD) => true,
        Err(_) => false,
    }
}
