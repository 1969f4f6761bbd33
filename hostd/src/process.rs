//! A process of a sandbox as its host sees it: output kept in a bounded ring, input, exit.
//!
//! Output is read as it comes and kept up to a bound, the oldest dropped and counted. A reader that is attached
//! holds the program back while it makes progress, as a pipe would; one that takes nothing for
//! [`PATIENCE_MS`] loses bytes instead, so that nobody can freeze a sandbox by attaching to it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};
use wire::{call::Exit, frame::Kind};

use crate::{clock, note::Once};

/// Milliseconds for which an attached reader that takes nothing holds the program back.
const PATIENCE_MS: u64 = 5_000;

/// Bytes of one read.
const READ_BYTES: usize = 64 * 1024;

/// What a kept chunk costs beside its bytes.
const CHUNK_COST: usize = 64;

/// Ended processes of one sandbox whose output is kept.
const ENDED_MAX: usize = 32;

/// Live processes of one sandbox, started by exec.
pub(crate) const EXECS_MAX: usize = 256;

/// A descriptor whose readiness is waited for.
#[derive(Debug)]
pub(crate) struct Pipe(AsyncFd<OwnedFd>);

impl Pipe {
    /// Takes over a descriptor that can be polled.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned by what is registered, so that it stays open and the same for as long as
        // the registration: `Pipe` takes an `OwnedFd` and gives out borrows only.
        let registered = unsafe { AsyncFd::register(fd)? };
        Ok(Self(registered))
    }

    /// The next bytes; empty at the end.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn read(&self) -> io::Result<Bytes> {
        thread_local! {
            /// Shared by all pipes of a thread: bytes stay in it only between two statements.
            static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
        }
        let read = |fd: &OwnedFd| {
            SCRATCH.with_borrow_mut(|scratch| {
                let len = rustix::io::read(fd, &mut scratch[..])?;
                Ok(Bytes::copy_from_slice(&scratch[..len]))
            })
        };
        match self.0.async_io(Interest::READABLE, read).await {
            // A terminal whose other end is closed says EIO.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Bytes::new()),
            other => other,
        }
    }

    /// Writes all.
    ///
    /// # Errors
    /// What the kernel says: a broken pipe if nobody reads.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| rustix::io::write(fd, bytes).map_err(io::Error::from);
            let len = self.0.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[len..];
        }
        Ok(())
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// What a reader finds at an offset.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// So many bytes were dropped; read on behind them.
    Lost(u64),
    /// Output.
    Chunk(Kind, Bytes),
    /// Nothing more yet.
    Nothing,
}

/// Output of a process: the newest bytes of both streams, in the order in which they were read.
#[derive(Debug)]
pub(crate) struct Ring {
    chunks: VecDeque<(u64, Kind, Bytes)>,
    end: u64,
    kept: usize,
    bytes_max: usize,
    lost: u64,
}

impl Ring {
    /// An empty one.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            chunks: VecDeque::new(),
            end: 0,
            kept: 0,
            bytes_max: bytes_max.max(READ_BYTES),
            lost: 0,
        }
    }

    fn push(&mut self, kind: Kind, bytes: Bytes) -> u64 {
        let len = bytes.len();
        self.chunks.push_back((self.end, kind, bytes));
        self.end += len as u64;
        self.kept += len + CHUNK_COST;
        let mut lost = 0;
        while self.kept > self.bytes_max && self.chunks.len() > 1 {
            let Some((_, _, old)) = self.chunks.pop_front() else { break };
            self.kept -= old.len() + CHUNK_COST;
            lost += old.len() as u64;
        }
        self.lost += lost;
        lost
    }

    /// What is at an offset.
    pub(crate) fn at(&self, offset: u64) -> Next {
        if offset >= self.end {
            return Next::Nothing;
        }
        let start = self.chunks.front().map_or(self.end, |(start, ..)| *start);
        if offset < start {
            return Next::Lost(start - offset);
        }
        let index = self.chunks.partition_point(|(start, ..)| *start <= offset) - 1;
        let (start, kind, bytes) = &self.chunks[index];
        let skip = usize::try_from(offset - start).unwrap_or(bytes.len());
        Next::Chunk(*kind, bytes.slice(skip..))
    }

    /// Bytes dropped so far.
    pub(crate) const fn lost(&self) -> u64 {
        self.lost
    }
}

/// Where output comes from: stdout (or a terminal), stderr.
pub(crate) type Outputs = [Option<Rc<Pipe>>; 2];

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    /// As [`wire::call::Call::Attach`] names it.
    pub(crate) number: u32,
    /// As the spawner names it; zero for the main process.
    pub(crate) exec: u64,
    /// Its output.
    pub(crate) ring: RefCell<Ring>,
    /// Its exit.
    pub(crate) exit: Once<Exit>,
    /// Where its input goes, until that is closed.
    input: RefCell<Option<Rc<Pipe>>>,
    /// Its terminal, if it has one.
    pub(crate) pty: Option<Rc<Pipe>>,
    /// All its output was read.
    drained: Cell<bool>,
    changed: Notify,
    taken: Notify,
    readers: RefCell<BTreeMap<u64, (u64, u64)>>,
    readers_made: Cell<u64>,
}

impl Process {
    /// Of a process's descriptors.
    ///
    /// # Errors
    /// What the kernel says of one.
    pub(crate) fn new(
        number: u32,
        exec: u64,
        stdio: hostd_sandbox::Stdio,
        log_bytes: usize,
    ) -> io::Result<(Rc<Self>, Outputs)> {
        let pipe = |fd: Option<OwnedFd>| fd.map(|fd| Pipe::new(fd).map(Rc::new)).transpose();
        let (stdin, pty) = (pipe(stdio.stdin)?, pipe(stdio.pty)?);
        let (stdout, stderr) = (pipe(stdio.stdout)?, pipe(stdio.stderr)?);
        let process = Rc::new(Self {
            number,
            exec,
            ring: RefCell::new(Ring::new(log_bytes)),
            exit: Once::default(),
            input: RefCell::new(stdin.or_else(|| pty.clone())),
            pty: pty.clone(),
            drained: Cell::new(false),
            changed: Notify::new(),
            taken: Notify::new(),
            readers: RefCell::default(),
            readers_made: Cell::new(0),
        });
        Ok((process, [stdout.or(pty), stderr]))
    }

    /// Reads its output to the end. `used` is told of each read, and of bytes lost.
    pub(crate) async fn pump(self: Rc<Self>, from: Outputs, used: impl Fn(u64)) {
        let [stdout, stderr] = from;
        let one = |pipe: Option<Rc<Pipe>>, kind| {
            let (this, used) = (&self, &used);
            async move {
                let Some(pipe) = pipe else { return };
                loop {
                    this.wait_for_readers().await;
                    match pipe.read().await {
                        Ok(bytes) if !bytes.is_empty() => {
                            used(this.ring.borrow_mut().push(kind, bytes));
                            this.changed.notify_waiters();
                        }
                        _ => return,
                    }
                }
            }
        };
        futures::join!(one(stdout, Kind::Stdout), one(stderr, Kind::Stderr));
        self.drained.set(true);
        self.changed.notify_waiters();
    }

    /// Waits while a reader that makes progress is half a ring behind.
    async fn wait_for_readers(&self) {
        loop {
            let taken = self.taken.notified();
            {
                let (end, bytes_max) = {
                    let ring = self.ring.borrow();
                    (ring.end, ring.bytes_max as u64)
                };
                let now_ms = clock::now_ms();
                let holds = |&(offset, at_ms): &(u64, u64)| {
                    end - offset.min(end) > bytes_max / 2 && at_ms + PATIENCE_MS > now_ms
                };
                if !self.readers.borrow().values().any(holds) {
                    return;
                }
            }
            let _ = tokio::time::timeout(Duration::from_millis(500), taken).await;
        }
    }

    /// Waits until there may be more at an offset than there was. Ends at once if all was read and it has exited.
    pub(crate) async fn more(&self, offset: u64) {
        loop {
            let changed = self.changed.notified();
            if self.ring.borrow().end > offset || self.is_over() {
                return;
            }
            changed.await;
        }
    }

    /// Whether it has exited and all its output was read.
    pub(crate) fn is_over(&self) -> bool {
        self.drained.get() && self.exit.get().is_some()
    }

    /// It has exited. What it left behind may hold its output open: that is waited for only a little.
    pub(crate) fn exited(self: &Rc<Self>, exit: Exit) {
        self.exit.set(exit);
        self.input.borrow_mut().take();
        self.changed.notify_waiters();
        let this = Rc::clone(self);
        crate::runtime::spawn(async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            this.drained.set(true);
            this.changed.notify_waiters();
        });
    }

    /// Its input, while that is open.
    pub(crate) fn input(&self) -> Option<Rc<Pipe>> {
        self.input.borrow().clone()
    }

    /// Closes its input. Returns whether it was open.
    pub(crate) fn close_input(&self) -> bool {
        self.input.borrow_mut().take().is_some()
    }

    /// Counts a reader in; it holds the program back while it reads.
    pub(crate) fn add_reader(self: &Rc<Self>, offset: u64) -> Reader {
        let id = self.readers_made.get();
        self.readers_made.set(id + 1);
        self.readers.borrow_mut().insert(id, (offset, clock::now_ms()));
        Reader { process: Rc::clone(self), id }
    }
}

/// A reader of a process's output, counted in while it lives.
pub(crate) struct Reader {
    process: Rc<Process>,
    id: u64,
}

impl Reader {
    /// It has read up to here.
    pub(crate) fn took(&self, offset: u64) {
        self.process.readers.borrow_mut().insert(self.id, (offset, clock::now_ms()));
        self.process.taken.notify_waiters();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.process.readers.borrow_mut().remove(&self.id);
        self.process.taken.notify_waiters();
    }
}

/// The processes of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    all: BTreeMap<u32, Rc<Process>>,
    made: u32,
    /// Exits of processes that are not entered yet: news may overtake the answer to an exec.
    early: BTreeMap<u64, Exit>,
}

impl Processes {
    /// A process by its number.
    pub(crate) fn get(&self, number: u32) -> Option<Rc<Process>> {
        self.all.get(&number).cloned()
    }

    /// Live processes that exec started.
    pub(crate) fn live(&self) -> usize {
        self.all.values().filter(|p| p.number != 0 && p.exit.get().is_none()).count()
    }

    /// The number of the next exec.
    pub(crate) fn next(&mut self) -> u32 {
        self.made += 1;
        self.made
    }

    /// Enters a process; forgets the oldest ended one beyond the bound.
    pub(crate) fn enter(&mut self, process: Rc<Process>) {
        if let Some(exit) = self.early.remove(&process.exec).filter(|_| process.exec != 0) {
            process.exited(exit);
        }
        self.all.insert(process.number, process);
        let ended = |p: &&Rc<Process>| p.number != 0 && p.is_over();
        if self.all.values().filter(ended).count() > ENDED_MAX
            && let Some(oldest) = self.all.values().find(ended).map(|p| p.number)
        {
            self.all.remove(&oldest);
        }
    }

    /// A process that exec started has ended.
    pub(crate) fn exec_exited(&mut self, exec: u64, exit: Exit) {
        match self.all.values().find(|process| process.exec == exec) {
            Some(process) => process.exited(exit),
            None if self.early.len() < EXECS_MAX => drop(self.early.insert(exec, exit)),
            None => {}
        }
    }

    /// The sandbox has ended: all end with it.
    pub(crate) fn end_all(&self, exit: Exit) {
        for process in self.all.values().filter(|process| process.exit.get().is_none()) {
            process.exited(exit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_newest_and_says_what_it_lost() {
        let mut ring = Ring::new(READ_BYTES);
        ring.push(Kind::Stdout, Bytes::from_static(b"hello "));
        ring.push(Kind::Stderr, Bytes::from_static(b"world"));
        assert_eq!(ring.at(0), Next::Chunk(Kind::Stdout, Bytes::from_static(b"hello ")));
        assert_eq!(ring.at(3), Next::Chunk(Kind::Stdout, Bytes::from_static(b"lo ")));
        assert_eq!(ring.at(6), Next::Chunk(Kind::Stderr, Bytes::from_static(b"world")));
        assert_eq!(ring.at(11), Next::Nothing);
        let lost = ring.push(Kind::Stdout, Bytes::from(vec![b'x'; READ_BYTES - CHUNK_COST]));
        assert_eq!((lost, ring.lost()), (11, 11));
        assert_eq!(ring.at(2), Next::Lost(9));
        assert!(matches!(ring.at(11), Next::Chunk(Kind::Stdout, _)));
    }

    #[test]
    fn a_ring_of_tiny_writes_is_bounded_too() {
        let mut ring = Ring::new(READ_BYTES);
        for _ in 0..100_000 {
            ring.push(Kind::Stdout, Bytes::from_static(b"x"));
        }
        assert!(ring.chunks.len() * (CHUNK_COST + 1) <= READ_BYTES);
        assert_eq!(ring.lost() + ring.chunks.len() as u64, 100_000);
    }
}
