//! hostd's handle on a spawner: asks, and hears events. `start` is how it comes to be.
//!
//! Questions leave from the caller's thread (one non-blocking `sendmsg`); one thread of ours reads
//! answers and wakes whoever waits. So the async functions work on any runtime, and each has no
//! timeout of its own: the spawner always answers, and if it dies every question answers `Unknown`.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};

use wire::codec::Message as _;

use crate::error::{ClaimError, Fault, Refusal};
use crate::msg::{Answer, Ask, Census, Claim, FileResult, Reply, Request, StdioFds};
use crate::packet;
use crate::spec::{
    ClaimSpec, Event, Executed, Exited, FileAnswer, FileOp, FileStat, LAYERS_MAX, Live, PoolState,
    Program, Running, SandboxId, Shape, Stats, Stdio, Tunnel,
};
use crate::sys;

/// Events that wait for hostd. Beyond it the reader stops reading, the spawner's own bounded queue
/// fills, and at its end the connection is dropped; nothing is lost that `running` and `exited` do
/// not tell again.
const EVENTS_MAX: usize = 4096;
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
    /// Ends the connection, and with it the reader, when the last clone goes.
    _last: Arc<HangUp>,
    pid: u32,
}

struct HangUp(Arc<Shared>);

impl Drop for HangUp {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.0.socket, rustix::net::Shutdown::Both);
    }
}

/// How a spawner greets.
pub(crate) struct Welcome {
    pub(crate) protocol: u32,
    pub(crate) census: Census,
}

impl std::fmt::Debug for Spawner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spawner").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Spawner {
    /// Greets over a connected socket. `None`: whoever was there is gone.
    pub(crate) fn over(socket: OwnedFd) -> io::Result<Option<(Self, Events, Welcome)>> {
        let shared = Arc::new(Shared {
            socket,
            next: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
        });
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let reader = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("spawner-read".into())
            .spawn(move || read_answers(&reader, &sender))?;
        let last = Arc::new(HangUp(Arc::clone(&shared)));
        let mut spawner = Self { shared, _last: last, pid: 0 };
        let Ok(hello) = spawner.send(Ask::Hello, &[]) else { return Ok(None) };
        let Ok(Ok((Answer::Welcome { protocol, pid }, fds))) = block_on(hello) else {
            return Ok(None);
        };
        spawner.pid = pid;
        // One of another version may list in another way; that is found out by the caller.
        let census = read_census(fds).unwrap_or_default();
        Ok(Some((spawner, events, Welcome { protocol, census })))
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
        let outcome = block_on(begun.answer);
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
            network: spec.network,
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

    /// The outer end of the network device of a sandbox that has one.
    ///
    /// # Errors
    /// No such sandbox, or one without a network.
    pub async fn tunnel(&self, id: SandboxId) -> Result<Tunnel, ClaimError> {
        let (answer, fds) = self.ask(Ask::Tunnel { id }).await?;
        let mut fds = fds.into_iter();
        match (answer, fds.next(), fds.next()) {
            (Answer::Tunnel, Some(device), Some(ended)) => Ok(Tunnel { device, ended }),
            (other, ..) => Err(unexpected(&other)),
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
            (Answer::Welcome { .. }, fds) => {
                let census = read_census(fds)?;
                Ok((census.live, census.exited))
            }
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

    /// Boxes by shape.
    ///
    /// # Errors
    /// The spawner is gone.
    pub async fn pool(&self) -> Result<Vec<PoolState>, ClaimError> {
        match self.ask(Ask::Pool).await? {
            (Answer::Pool(pools), _) => Ok(pools),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Gives the spawner another list of shapes. Running sandboxes stay as they are; a shape that is not
    /// listed takes no more claims. [`Spawner::connect_or_start`] does it with its configuration's.
    ///
    /// # Errors
    /// [`Fault::Os`] with `EINVAL`, which says what is wrong: nothing was changed.
    pub async fn reshape(&self, shapes: Vec<Shape>) -> Result<(), ClaimError> {
        self.done(Ask::Shapes(shapes)).await
    }

    /// [`Spawner::reshape`] for a thread without a runtime.
    pub(crate) fn reshape_blocking(&self, shapes: Vec<Shape>) -> Result<(), ClaimError> {
        block_on(self.reshape(shapes))
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

/// Waits on this thread, whether or not a runtime runs on it (where tokio's own ways of blocking
/// panic). The reader thread does the waking.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        std::thread::park();
    }
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
    let bytes = packet::read_memory_file(fd, LISTING_BYTES_MAX)
        .map_err(|e| Fault::os("read a listing", &e))?;
    rkyv::from_bytes::<Vec<FileStat>, rkyv::rancor::Error>(&bytes)
        .map_err(|_| Fault::BoxDied { what: "listing a directory".into() }.into())
}

fn read_census(fds: Vec<OwnedFd>) -> Result<Census, ClaimError> {
    let lost = || Fault::Os { what: "take the list of sandboxes".into(), errno: libc::EMFILE };
    let fd = fds.into_iter().next().ok_or_else(lost)?;
    let bytes = packet::read_memory_file(fd, LISTING_BYTES_MAX)
        .map_err(|e| Fault::os("read the list of sandboxes", &e))?;
    Census::decode(&bytes)
        .ok_or_else(|| ClaimError::Unknown { why: "its list of sandboxes is no list".into() })
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
