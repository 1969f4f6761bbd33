//! A box's init once the program runs: reaps, and answers the spawner, until the main program ends.
//!
//! When that happens it says so and exits; with it the kernel ends every process of the box.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};

use super::watch::Watch;
use super::{files, run, tell, tell_with};
use wire::codec::Message as _;

use crate::error::Fault;
use crate::fork;
use crate::msg::{FromBox, ToBox};
use crate::packet;
use crate::spec::{ExitStatus, Limits, Program};
use crate::sys;

/// Children that are not the main program, at once; beyond it `exec` and files are refused. The box's
/// pids limit is usually lower.
const CHILDREN_MAX: usize = 1024;

enum Child {
    Exec(u64),
    /// Does one operation and answers by itself; if it dies first, init answers.
    Operation(u64),
}

/// What init remembers while it serves.
pub(super) struct Serving {
    main: i32,
    children_ready: OwnedFd,
    children: HashMap<i32, Child>,
    limits: Limits,
    /// Of programs to come.
    stack: Option<fork::Stack>,
    /// The network device, kept for whoever serves it next.
    tunnel: Option<OwnedFd>,
}

impl Serving {
    pub(super) fn new(
        main: i32,
        children_ready: OwnedFd,
        limits: Limits,
        stack: fork::Stack,
        tunnel: Option<OwnedFd>,
    ) -> Self {
        Self { main, children_ready, children: HashMap::new(), limits, stack: Some(stack), tunnel }
    }
}

/// Serves to the end; returns the exit code of init.
pub(super) fn serve(control: &OwnedFd, mut serving: Serving, buffer: &mut [u8]) -> i32 {
    loop {
        if let Some(status) = serving.reap(control) {
            tell(control, &FromBox::MainExited { status });
            return 0;
        }
        let mut ready = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(&serving.children_ready, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return 75,
            Ok(_) => {}
        }
        let (asked, child) = (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
        if child {
            let mut drained = [0_u8; 1024];
            let _ = rustix::io::read(&serving.children_ready, &mut drained);
        }
        if asked {
            match packet::recv(control.as_fd(), buffer, false) {
                Ok(packet) if packet.len == 0 => return 0,
                Ok(packet) => match ToBox::decode(&buffer[..packet.len]) {
                    Some(message) => serving.handle(control, message, packet.fds),
                    None => return 76,
                },
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return 77,
            }
        }
    }
}

impl Serving {
    /// Collects the dead. Returns the main program's end.
    fn reap(&mut self, control: &OwnedFd) -> Option<ExitStatus> {
        loop {
            let mut raw = 0;
            // SAFETY: `raw` lives across the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut raw, libc::WNOHANG) };
            if pid <= 0 {
                return None;
            }
            let status = exit_status(raw);
            if pid == self.main {
                return Some(status);
            }
            match self.children.remove(&pid) {
                Some(Child::Exec(number)) => tell(control, &FromBox::ExecExited { number, status }),
                Some(Child::Operation(number)) if status.code != Some(0) => {
                    let why = Fault::BoxDied { what: "a file or port operation".into() };
                    tell(control, &FromBox::NotDone { number, why });
                }
                _ => {}
            }
        }
    }

    /// Starts the program of an `exec`.
    fn start(&mut self, program: &Program, fds: Vec<OwnedFd>) -> Result<run::Started, Fault> {
        let stack = self.stack.take().unwrap_or_else(fork::Stack::new);
        let means = run::Means::make(stack)?;
        let (started, stack) = run::start(program, fds, &self.limits, None, means);
        self.stack = Some(stack);
        started
    }

    fn handle(&mut self, control: &OwnedFd, message: ToBox, fds: Vec<OwnedFd>) {
        match message {
            ToBox::Exec { number, program } => {
                let started = self.room().and_then(|()| self.start(&program, fds));
                match started {
                    Ok(started) => {
                        self.children.insert(started.pid, Child::Exec(number));
                        let master: Vec<_> = started.master.iter().map(AsFd::as_fd).collect();
                        tell_with(control, &FromBox::Executed { number }, &master);
                    }
                    Err(why) => tell(control, &FromBox::NotDone { number, why }),
                }
            }
            ToBox::Signal { number, exec, signal } => {
                let answer = match self.signal(exec, signal) {
                    Ok(()) => FromBox::Signalled { number },
                    Err(why) => FromBox::NotDone { number, why },
                };
                tell(control, &answer);
            }
            ToBox::File { number, op } => self.operation(control, number, || {
                let (result, fd, watch) = files::operate(&op)?;
                Ok((FromBox::File { number, result }, fd, watch))
            }),
            ToBox::Connect { number, port } => self.operation(control, number, || {
                let fd = files::connect(port)?;
                Ok((FromBox::Connected { number }, Some(fd), None))
            }),
            ToBox::Tunnel { number } => match &self.tunnel {
                Some(tunnel) => tell_with(control, &FromBox::Tunnel { number }, &[tunnel.as_fd()]),
                None => {
                    let what = "give its network device: it has none".into();
                    let why = Fault::Os { what, errno: libc::ENODEV };
                    tell(control, &FromBox::NotDone { number, why });
                }
            },
            // Neither comes to a box that runs.
            ToBox::Mapped | ToBox::Claim { .. } => {}
        }
    }

    fn room(&self) -> Result<(), Fault> {
        if self.children.len() < CHILDREN_MAX {
            return Ok(());
        }
        Err(Fault::Os { what: "too many programs in the sandbox".into(), errno: libc::EAGAIN })
    }

    fn signal(&self, exec: u64, signal: i32) -> Result<(), Fault> {
        let of = |(pid, child): (&i32, &Child)| match child {
            Child::Exec(n) if *n == exec => Some(*pid),
            _ => None,
        };
        let pid = match exec {
            0 => self.main,
            _ => self.children.iter().find_map(of).ok_or(Fault::NoExec)?,
        };
        // SAFETY: takes no pointer. `pid` is a child not yet waited for, so its number is its own.
        if unsafe { libc::kill(pid, signal) } == 0 {
            return Ok(());
        }
        Err(Fault::os("signal", &std::io::Error::last_os_error()))
    }

    fn operation(
        &mut self,
        control: &OwnedFd,
        number: u64,
        work: impl FnOnce() -> Result<(FromBox, Option<OwnedFd>, Option<Watch>), Fault>,
    ) {
        // SAFETY: a box's init has one thread.
        let forked =
            self.room().and_then(|()| unsafe { fork::fork() }.map_err(|e| Fault::os("fork", &e)));
        match forked {
            Ok(Some(pid)) => {
                self.children.insert(pid, Child::Operation(number));
            }
            Ok(None) => {
                let (answer, fd, watch) = match work() {
                    Ok(done) => done,
                    Err(why) => (FromBox::NotDone { number, why }, None, None),
                };
                let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
                tell_with(control, &answer, &fds);
                drop(fd);
                if let Some(watch) = watch {
                    watch.run();
                }
                sys::exit_now(0)
            }
            Err(why) => tell(control, &FromBox::NotDone { number, why }),
        }
    }
}

fn exit_status(raw: i32) -> ExitStatus {
    if libc::WIFSIGNALED(raw) {
        return ExitStatus { code: None, signal: Some(libc::WTERMSIG(raw)), oom: false };
    }
    ExitStatus { code: Some(libc::WEXITSTATUS(raw)), signal: None, oom: false }
}
