//! hostd's handle on a spawner: starts or joins it, asks, and hears events.
//!
//! Questions leave from the caller's thread (one non-blocking `sendmsg`); one thread of ours reads
//! answers and wakes whoever waits. So the async functions work on any runtime, and each has no
//! timeout of its own: the spawner always answers, and if it dies every question answers `Unknown`.

use std::collections::HashMap;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio as ChildStdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::error::{ClaimError, Fault, Refusal, StartError};
use crate::msg::{Answer, Ask, Claim, FileResult, PROTOCOL, Reply, Request, StdioFds};
use crate::packet;
use crate::spawner::{ARGUMENT, LOCKED, READY, check, socket_path};
use crate::spec::{
    ClaimSpec, Config, Event, Executed, Exited, FileAnswer, FileOp, FileStat, LAYERS_MAX, Live,
    PoolState, Program, Running, SandboxId, Stats, Stdio,
};
use crate::sys;

/// Events that wait for hostd. Beyond it the reader stops reading, the spawner's own bounded queue
/// fills, and at its end the connection is dropped; nothing is lost that `running` and `exited` do
/// not tell again.
const EVENTS_MAX: usize = 4096;
/// Longest wait for a spawner that is ending.
const START_MAX: Duration = Duration::from_secs(10);
/// Longest listing that is read back.
const LISTING_BYTES_MAX: u64 = 64 << 20;

type Outcome = Result<(Answer, Vec<OwnedFd>), String>;

struct Shared {
    socket: OwnedFd,
    next: AtomicU64,
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Outcome>>>>,
}

/// Events of a spawner, in order. Ends with [`Event::Gone`].
pub type Events = mpsc::Receiver<Event>;

/// A connection to a spawner. Cheap to clone; dropping the last clone leaves the spawner running.
#[derive(Clone)]
pub struct Spawner {
    shared: Arc<Shared>,
    pid: u32,
}

impl std::fmt::Debug for Spawner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spawner").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// What a spawner had when it was joined.
#[derive(Debug)]
pub struct Joined {
    /// The handle.
    pub spawner: Spawner,
    /// Its events.
    pub events: Events,
    /// Sandboxes that run already: adopt them or kill them.
    pub live: Vec<Live>,
    /// Sandboxes that have ended and were not forgotten.
    pub exited: Vec<Exited>,
    /// Whether this call started it.
    pub started: bool,
}

impl Spawner {
    /// Joins the spawner of the state directory, or starts one. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`StartError::NeedsRoot`] without root; otherwise why there is no spawner.
    pub fn connect_or_start(config: &Config) -> Result<Joined, StartError> {
        check(config).map_err(StartError::Config)?;
        if !rustix::process::geteuid().is_root() {
            return Err(StartError::NeedsRoot);
        }
        make_state_dir(&config.state_dir)?;
        let deadline = Instant::now() + START_MAX;
        loop {
            // One that is just ending still holds its lock, or accepts and is gone: come again.
            let met = meet(config);
            let again = matches!(&met, Err(StartError::Ending));
            if !again || Instant::now() > deadline {
                return met;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The spawner's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Claims a box and starts the program in it. The sandbox runs when this returns.
    ///
    /// # Errors
    /// Refused (nothing touched), failed (undone), or unknown (the spawner is gone, and with it every
    /// box).
    pub async fn claim(&self, spec: ClaimSpec) -> Result<Running, ClaimError> {
        let begun = self.claim_begin(spec)?;
        self.finish_claim(begun.id, received(begun.answer.await)?)
    }

    /// [`Spawner::claim`] for a thread without a runtime.
    ///
    /// # Errors
    /// As there.
    pub fn claim_blocking(&self, spec: ClaimSpec) -> Result<Running, ClaimError> {
        let begun = self.claim_begin(spec)?;
        let outcome = begun.answer.blocking_recv();
        self.finish_claim(begun.id, received(outcome)?)
    }

    fn claim_begin(&self, spec: ClaimSpec) -> Result<Begun, ClaimError> {
        let layers = spec.root.lowers.len() + spec.root.data_lowers.len();
        if layers > LAYERS_MAX {
            let limit = LAYERS_MAX as u64;
            return Err(Refusal::TooLarge { what: "number of layers".into(), limit }.into());
        }
        let mut fds = Vec::with_capacity(layers);
        for layer in spec.root.lowers.iter().chain(&spec.root.data_lowers) {
            let clone = sys::clone_tree(layer.as_fd(), "", false);
            fds.push(clone.map_err(|e| Fault::os("clone a layer", &e))?);
        }
        let count = |list: &Vec<OwnedFd>| u32::try_from(list.len()).unwrap_or(u32::MAX);
        let claim = Claim {
            id: spec.id,
            shape: spec.shape,
            lowers: count(&spec.root.lowers),
            data_lowers: count(&spec.root.data_lowers),
            program: spec.program,
            hostname: spec.hostname,
            limits: spec.limits,
            sent_ns: sys::now_ns(),
        };
        let answer = self.send(Ask::Claim(Box::new(claim)), &fds)?;
        Ok(Begun { id: spec.id, answer })
    }

    /// Starts one more program in a running sandbox.
    ///
    /// # Errors
    /// As [`Spawner::claim`].
    pub async fn exec(&self, id: SandboxId, program: Program) -> Result<Executed, ClaimError> {
        match self.ask(Ask::Exec { id, program }).await? {
            (Answer::Executed { exec, stdio }, fds) => {
                Ok(Executed { exec, stdio: named(stdio, fds)? })
            }
            other => Err(unexpected(&other.0)),
        }
    }

    /// Sends a signal to the main program (`exec` 0) or to one started by [`Spawner::exec`].
    ///
    /// # Errors
    /// No such sandbox or program.
    pub async fn signal(&self, id: SandboxId, exec: u64, signal: i32) -> Result<(), ClaimError> {
        self.done(Ask::Signal { id, exec, signal }).await
    }

    /// Kills everything in a sandbox, in any state. [`Event::Exited`] follows.
    ///
    /// # Errors
    /// No such sandbox.
    pub async fn kill(&self, id: SandboxId) -> Result<(), ClaimError> {
        self.done(Ask::Kill { id }).await
    }

    /// Stops every process of a sandbox where it is.
    ///
    /// # Errors
    /// No such sandbox, or the freezer failed.
    pub async fn pause(&self, id: SandboxId) -> Result<(), ClaimError> {
        self.done(Ask::Freeze { id, frozen: true }).await
    }

    /// Undoes [`Spawner::pause`].
    ///
    /// # Errors
    /// No such sandbox, or the freezer failed.
    pub async fn resume(&self, id: SandboxId) -> Result<(), ClaimError> {
        self.done(Ask::Freeze { id, frozen: false }).await
    }

    /// Lets go of the spawner's copy of the main program's stdin, so that closing the caller's is the
    /// end of file.
    ///
    /// # Errors
    /// No such sandbox.
    pub async fn close_stdin(&self, id: SandboxId) -> Result<(), ClaimError> {
        self.done(Ask::CloseStdin { id }).await
    }

    /// What a sandbox has used.
    ///
    /// # Errors
    /// No such sandbox.
    pub async fn stats(&self, id: SandboxId) -> Result<Stats, ClaimError> {
        match self.ask(Ask::Stats { id }).await? {
            (Answer::Stats(stats), _) => Ok(stats),
            other => Err(unexpected(&other.0)),
        }
    }

    /// A file operation inside a sandbox.
    ///
    /// # Errors
    /// No such sandbox, or [`Fault::Os`] with the operation's error number.
    pub async fn file(&self, id: SandboxId, op: FileOp) -> Result<FileAnswer, ClaimError> {
        let (answer, fds) = self.ask(Ask::File { id, op }).await?;
        let fd = fds.into_iter().next();
        match (answer, fd) {
            (Answer::File(FileResult::Open), Some(fd)) => Ok(FileAnswer::Open(fd)),
            (Answer::File(FileResult::Stat(stat)), _) => Ok(FileAnswer::Stat(stat)),
            (Answer::File(FileResult::Done), _) => Ok(FileAnswer::Done),
            (Answer::File(FileResult::List), Some(fd)) => read_listing(fd).map(FileAnswer::List),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Connects to a port of a sandbox's own loopback.
    ///
    /// # Errors
    /// No such sandbox, or [`Fault::Os`] with the connection's error number.
    pub async fn connect(&self, id: SandboxId, port: u16) -> Result<OwnedFd, ClaimError> {
        let (answer, fds) = self.ask(Ask::Connect { id, port }).await?;
        match (answer, fds.into_iter().next()) {
            (Answer::Connected, Some(fd)) => Ok(fd),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Host ends of an adopted sandbox's stdio.
    ///
    /// # Errors
    /// No such sandbox.
    pub async fn stdio(&self, id: SandboxId) -> Result<Stdio, ClaimError> {
        match self.ask(Ask::Stdio { id }).await? {
            (Answer::Stdio(which), fds) => named(which, fds),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Sandboxes that run, and those that have ended and were not forgotten.
    ///
    /// # Errors
    /// The spawner is gone.
    pub async fn running(&self) -> Result<(Vec<Live>, Vec<Exited>), ClaimError> {
        match self.ask(Ask::Hello).await? {
            (Answer::Welcome { live, exited, .. }, _) => Ok((live, exited)),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Drops the record of a sandbox that has ended.
    ///
    /// # Errors
    /// The spawner is gone.
    pub async fn forget(&self, id: SandboxId) -> Result<(), ClaimError> {
        self.done(Ask::Forget { id }).await
    }

    /// Boxes by shape, in the order of the configuration.
    ///
    /// # Errors
    /// The spawner is gone.
    pub async fn pool(&self) -> Result<Vec<PoolState>, ClaimError> {
        match self.ask(Ask::Pool).await? {
            (Answer::Pool(pools), _) => Ok(pools),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Ends the spawner: at once with every sandbox (`kill`), or when the last has ended. Returns
    /// when nothing is left.
    ///
    /// # Errors
    /// The spawner was gone before it said so.
    pub async fn shutdown(&self, kill: bool) -> Result<(), ClaimError> {
        self.done(Ask::Shutdown { kill }).await
    }

    fn finish_claim(
        &self,
        id: SandboxId,
        (answer, fds): (Answer, Vec<OwnedFd>),
    ) -> Result<Running, ClaimError> {
        let Answer::Started { pid, slot, mut steps, stdio } = answer else {
            return Err(unexpected(&answer));
        };
        steps.answered = sys::now_ns();
        match named(stdio, fds) {
            Ok(stdio) => Ok(Running { id, pid, slot, stdio, steps }),
            Err(why) => {
                // It runs, and nobody could hear it: undone like any failure. If this cannot be sent
                // either, the spawner is gone, and the sandbox with it.
                drop(self.send(Ask::Kill { id }, &[]));
                Err(why)
            }
        }
    }

    async fn done(&self, ask: Ask) -> Result<(), ClaimError> {
        match self.ask(ask).await? {
            (Answer::Done, _) => Ok(()),
            other => Err(unexpected(&other.0)),
        }
    }

    async fn ask(&self, ask: Ask) -> Result<(Answer, Vec<OwnedFd>), ClaimError> {
        let answer = self.send(ask, &[])?;
        received(answer.await)
    }

    fn send(&self, ask: Ask, fds: &[OwnedFd]) -> Result<oneshot::Receiver<Outcome>, ClaimError> {
        let gone = || ClaimError::Unknown { why: "its socket is closed".into() };
        // Relaxed: the number only has to differ from every other.
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let bytes = Request { number, ask }.encode();
        let (sender, receiver) = oneshot::channel();
        lock(&self.shared.waiting).as_mut().ok_or_else(gone)?.insert(number, sender);
        let sent = packet::send(self.shared.socket.as_fd(), &bytes, &packet::borrow(fds));
        let Err(error) = sent else { return Ok(receiver) };
        if let Some(waiting) = lock(&self.shared.waiting).as_mut() {
            waiting.remove(&number);
        }
        Err(match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ETOOMANYREFS) => Refusal::Busy.into(),
            Some(libc::EMSGSIZE) => Refusal::TooLarge {
                what: "size of arguments and environment".into(),
                limit: packet::PACKET_BYTES_MAX as u64,
            }
            .into(),
            // Not sent, so nothing was touched; but nobody will answer anything any more.
            _ => gone(),
        })
    }
}

struct Begun {
    id: SandboxId,
    answer: oneshot::Receiver<Outcome>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn received(
    outcome: Result<Outcome, oneshot::error::RecvError>,
) -> Result<(Answer, Vec<OwnedFd>), ClaimError> {
    match outcome {
        Ok(Ok((Answer::Refused(refusal), _))) => Err(refusal.into()),
        Ok(Ok((Answer::Failed(fault), _))) => Err(fault.into()),
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(why)) => Err(ClaimError::Unknown { why }),
        Err(_) => Err(ClaimError::Unknown { why: "its reader ended".into() }),
    }
}

fn unexpected(answer: &Answer) -> ClaimError {
    ClaimError::Unknown { why: format!("it answered out of turn: {answer:?}") }
}

fn named(which: StdioFds, fds: Vec<OwnedFd>) -> Result<Stdio, ClaimError> {
    let wanted = [which.stdin, which.stdout, which.stderr, which.pty];
    if fds.len() != wanted.iter().filter(|w| **w).count() {
        // This process had no room for them.
        let what = "take the descriptors of its stdio".into();
        return Err(Fault::Os { what, errno: libc::EMFILE }.into());
    }
    let mut fds = fds.into_iter();
    let mut next = |there: bool| if there { fds.next() } else { None };
    Ok(Stdio {
        stdin: next(which.stdin),
        stdout: next(which.stdout),
        stderr: next(which.stderr),
        pty: next(which.pty),
    })
}

fn read_listing(fd: OwnedFd) -> Result<Vec<FileStat>, ClaimError> {
    let mut bytes = Vec::new();
    let mut file = std::fs::File::from(fd);
    file.rewind()
        .and_then(|()| file.take(LISTING_BYTES_MAX).read_to_end(&mut bytes))
        .map_err(|e| Fault::os("read a listing", &e))?;
    rkyv::from_bytes::<Vec<FileStat>, rkyv::rancor::Error>(&bytes)
        .map_err(|_| Fault::BoxDied { what: "listing a directory".into() }.into())
}

fn io_error(what: &str) -> impl FnOnce(io::Error) -> StartError {
    let what = what.to_owned();
    move |error| StartError::Io { what, error }
}

fn meet(config: &Config) -> Result<Joined, StartError> {
    if let Some(socket) = connect(&config.state_dir)? {
        return join(config, socket, false);
    }
    start(config)?;
    match connect(&config.state_dir)? {
        Some(socket) => join(config, socket, true),
        None => Err(StartError::Setup("it started and is not there".into())),
    }
}

/// Connects, or `None` where nobody listens.
fn connect(state_dir: &str) -> Result<Option<OwnedFd>, StartError> {
    use rustix::net as n;
    let make = || -> rustix::io::Result<Option<OwnedFd>> {
        let flags = n::SocketFlags::CLOEXEC;
        let socket = n::socket_with(n::AddressFamily::UNIX, n::SocketType::SEQPACKET, flags, None)?;
        let address = n::SocketAddrUnix::new(socket_path(state_dir))?;
        match n::connect(&socket, &address) {
            Ok(()) => Ok(Some(socket)),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(e) => Err(e),
        }
    };
    make().map_err(|e| io_error("connect to the spawner")(e.into()))
}

fn make_state_dir(state_dir: &str) -> Result<(), StartError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let path = Path::new(state_dir);
    if path.exists() {
        let private = std::fs::Permissions::from_mode(0o700);
        return std::fs::set_permissions(path, private).map_err(io_error("state directory"));
    }
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(path).map_err(io_error("state directory"))
}

/// Starts the spawner and waits until it listens. Its binary is executed through a read-only mount
/// of its own, so that nobody who reaches it through `/proc/self/exe` can write it.
fn start(config: &Config) -> Result<(), StartError> {
    let exe = if config.exe.is_empty() { "/proc/self/exe" } else { &config.exe };
    let sealed = sys::clone_tree(rustix::fs::CWD, exe, false)
        .and_then(|mount| sys::mount_restrict(mount.as_fd(), sys::ATTR_RDONLY).map(|()| mount));
    let sealed = match sealed {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Err(StartError::NeedsRoot),
        // A binary that was replaced since has no name to mount by: a sealed copy in memory, then.
        Err(_) => sealed_copy(exe).map_err(io_error("copy the spawner's binary"))?,
        Ok(mount) => mount,
    };
    let path = format!("/proc/self/fd/{}", sealed.as_raw_fd());
    use std::os::unix::process::CommandExt;
    let mut child = Command::new(path)
        // What `ps` in a box shows of its init: no path of the host.
        .arg0("volley")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(ChildStdio::piped())
        .stdout(ChildStdio::piped())
        .spawn()
        .map_err(io_error("start the spawner"))?;
    let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(config)
        .map_err(|e| StartError::Config(e.to_string()))?;
    let mut said = Vec::new();
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    if let (Some(mut stdin), Some(stdout)) = (stdin, stdout) {
        stdin.write_all(&bytes).map_err(io_error("configure the spawner"))?;
        drop(stdin);
        let read = stdout.take(4096).read_to_end(&mut said);
        read.map_err(io_error("hear the spawner"))?;
    }
    // Collected whenever it ends, so that it leaves no zombie.
    std::thread::Builder::new()
        .name("spawner-wait".into())
        .stack_size(64 << 10)
        .spawn(move || drop(child.wait()))
        .map_err(io_error("start a thread"))?;
    if said == READY {
        return Ok(());
    }
    if said == LOCKED.as_bytes() {
        return Err(StartError::Ending);
    }
    let why = String::from_utf8_lossy(&said).into_owned();
    Err(StartError::Setup(if why.is_empty() {
        "it ended at once; the binary must call hostd_sandbox::main_if_asked first thing".into()
    } else {
        why
    }))
}

fn sealed_copy(exe: &str) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("spawner", flags)?;
    io::copy(&mut std::fs::File::open(exe)?, &mut std::fs::File::from(memory.try_clone()?))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals)?;
    Ok(memory)
}

fn join(config: &Config, socket: OwnedFd, started: bool) -> Result<Joined, StartError> {
    let shared = Arc::new(Shared {
        socket,
        next: AtomicU64::new(1),
        waiting: Mutex::new(Some(HashMap::new())),
    });
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let reader = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("spawner-read".into())
        .spawn(move || read_answers(&reader, &sender))
        .map_err(io_error("start a thread"))?;
    let mut spawner = Spawner { shared, pid: 0 };
    let hello = spawner.send(Ask::Hello, &[]).map_err(|_| StartError::Ending)?;
    match hello.blocking_recv() {
        Ok(Ok((Answer::Welcome { protocol, pid, live, exited }, _))) => {
            if protocol != PROTOCOL {
                return Err(StartError::Version {
                    state_dir: config.state_dir.clone(),
                    theirs: protocol,
                    ours: PROTOCOL,
                });
            }
            spawner.pid = pid;
            Ok(Joined { spawner, events, live, exited, started })
        }
        _ => Err(StartError::Ending),
    }
}

fn read_answers(shared: &Shared, events: &mpsc::Sender<Event>) {
    let mut buffer = vec![0_u8; packet::PACKET_BYTES_MAX];
    let why = loop {
        match packet::recv(shared.socket.as_fd(), &mut buffer, true) {
            Ok(packet) if packet.len == 0 => break "it closed the connection".to_owned(),
            Ok(packet) => match Reply::decode(&buffer[..packet.len]) {
                Some(Reply { answer: Answer::Event(event), .. }) => {
                    // A receiver that was dropped does not want events.
                    let _ = events.blocking_send(event);
                }
                Some(Reply { number, answer }) => {
                    let asker = lock(&shared.waiting).as_mut().and_then(|w| w.remove(&number));
                    if let Some(asker) = asker {
                        let _ = asker.send(Ok((answer, packet.fds)));
                    }
                }
                None => break "it sent what is no message".to_owned(),
            },
            Err(e) => break e.to_string(),
        }
    };
    for (_, asker) in lock(&shared.waiting).take().unwrap_or_default() {
        let _ = asker.send(Err(why.clone()));
    }
    let _ = events.blocking_send(Event::Gone);
}
