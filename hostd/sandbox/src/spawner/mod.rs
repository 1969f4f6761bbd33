//! The spawner: a small process of one thread that makes boxes, keeps some parked, hands them out, and
//! outlives hostd.
//!
//! It is entered by a re-exec of the running binary (`main_if_asked`), so that it starts with one thread
//! and a clean memory, and it works in a mount namespace of its own: whatever it mounts is seen by
//! nobody and is gone with it. Boxes are its children and die with it (parent death signal).
//! Left out: replacing a running spawner by a newer one; drain it instead.

mod asks;
mod boxes;
mod nets;
mod pool;
mod root;
mod setup;
mod tally;
mod told;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use self::boxes::{Boxed, State};
use wire::codec::Message as _;

use crate::cgroup::{Group, Layout};
use crate::inside::Filters;
use crate::msg::{Answer, Claim, Reply, Request};
use crate::packet;
use crate::spec::{Config, Event, Exited, SandboxId};

pub use setup::main_if_asked;
pub(crate) use setup::{ARGUMENT, LOCKED, READY, check, socket_path};

/// Answers and events that wait for a slow hostd; beyond it the connection is dropped, and hostd
/// learns everything again when it comes back.
const OUTBOX_MAX: usize = 8192;
/// Claims that wait for a box.
const WAITING_MAX: usize = 256;

/// Shapes that a spawner can know in its life, those that were taken away included.
const SHAPES_MAX: usize = 256;
/// Longest that a box may take to park before it is killed: a thousand times the usual.
const PARKING_MAX: Duration = Duration::from_secs(10);

const LISTENER: u64 = 0;
const CONNECTION: u64 = 1;
const TERMINATE: u64 = 2;
/// Tokens of a slot: this, plus two times the slot, plus 1 for the process.
const SLOTS: u64 = 16;

struct Connection {
    socket: OwnedFd,
    generation: u64,
    outbox: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

struct Waiting {
    claim: Box<Claim>,
    fds: Vec<OwnedFd>,
    number: u64,
    received_ns: u64,
    deadline: Instant,
}

/// Everything that the spawner knows.
pub(crate) struct Spawning {
    config: Config,
    layout: Layout,
    filters: Filters,
    dev: OwnedFd,
    listener: OwnedFd,
    terminate: OwnedFd,
    epoll: OwnedFd,
    connection: Option<Connection>,
    generation: u64,
    boxes: HashMap<u32, Boxed>,
    tally: Rc<tally::Tally>,
    /// Shapes, by index, that the configuration no longer has. Their boxes may still run.
    retired: HashSet<usize>,
    by_id: HashMap<SandboxId, u32>,
    free_slots: Vec<u32>,
    groups: HashMap<u32, Group>,
    nets: nets::Nets,
    waiting: VecDeque<Waiting>,
    exited: VecDeque<Exited>,
    next_number: u64,
    refill: pool::Refill,
    alone_since: Option<Instant>,
    /// Set by `Shutdown`: the questions to answer at the end.
    stopping: Option<Vec<(u64, u64)>>,
    buffer: Vec<u8>,
}

/// Says something on hostd's stderr, if anybody still reads it.
fn log(line: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let _ = writeln!(io::stderr(), "volley spawner: {line}");
}

impl Spawning {
    /// Serves until shut down or alone for too long.
    fn run(mut self) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        loop {
            let timeout = self.next_timeout();
            let timeout = timeout.map(|d| rustix::event::Timespec {
                tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(d.subsec_nanos()),
            });
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in &events {
                self.handle_event(event.data.u64());
            }
            self.expire_waiting();
            self.expire_parking();
            if events.is_empty() {
                // Nobody waits: the time to make boxes.
                self.refill();
            }
            if self.is_over() {
                self.finish();
                return Ok(());
            }
        }
    }

    fn handle_event(&mut self, token: u64) {
        match token {
            LISTENER => self.accept(),
            CONNECTION => self.hear(),
            TERMINATE => {
                // In the name of whoever is connected, who hears of it by the end of the connection.
                let generation = self.connection.as_ref().map_or(0, |c| c.generation);
                self.stop((generation, 0), true);
            }
            _ => {
                let Ok(slot) = u32::try_from((token - SLOTS) / 2) else { return };
                if (token - SLOTS) % 2 == 1 {
                    self.bury(slot);
                } else {
                    let _more_comes_again = self.listen_to(slot);
                }
            }
        }
    }

    /// Begins to end. `asker` is answered when nothing is left.
    fn stop(&mut self, asker: (u64, u64), kill: bool) {
        // Level-triggered and left unread: once is enough.
        let _ = epoll::delete(&self.epoll, &self.terminate);
        self.stopping.get_or_insert_default().push(asker);
        for waiting in std::mem::take(&mut self.waiting) {
            let to = (asker.0, waiting.number);
            self.answer(to, Answer::Refused(crate::error::Refusal::Stopping), Vec::new());
        }
        for built in self.boxes.values_mut() {
            if kill || matches!(built.entry.state(), State::Preparing | State::Parked) {
                built.kill();
            }
        }
    }

    fn watch(&self, fd: &OwnedFd, token: u64) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?)
    }

    fn accept(&mut self) {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        // The newest hostd is the hostd; the one before it is dead or about to be.
        self.disconnect();
        self.generation += 1;
        if self.watch(&socket, CONNECTION).is_ok() {
            let generation = self.generation;
            self.connection = Some(Connection { socket, generation, outbox: VecDeque::new() });
            self.alone_since = None;
        }
    }

    fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = epoll::delete(&self.epoll, &connection.socket);
        }
        self.alone_since = Some(Instant::now());
        self.waiting.clear();
    }

    /// Reads what hostd asks: a few questions at a time, so that boxes are heard in between.
    fn hear(&mut self) {
        if self.connection.as_ref().is_some_and(|c| !c.outbox.is_empty()) {
            self.flush();
        }
        for _ in 0..16 {
            let Some(connection) = &self.connection else { return };
            let generation = connection.generation;
            let mut buffer = std::mem::take(&mut self.buffer);
            let got = packet::recv(connection.socket.as_fd(), &mut buffer, false);
            let request = got.map(|p| (p.len, Request::decode(&buffer[..p.len]), p.fds, p.cut));
            self.buffer = buffer;
            match request {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // No room for the descriptors: for want of slots, in effect.
                Ok((_, Some(request), _, true)) => {
                    let busy = Answer::Refused(crate::error::Refusal::Busy);
                    self.answer((generation, request.number), busy, Vec::new());
                }
                Ok((len, Some(request), fds, false)) if len > 0 => {
                    self.ask((generation, request.number), request.ask, fds);
                }
                // Gone, or not of our kind.
                _ => return self.disconnect(),
            }
        }
    }

    /// Answers a question, if its asker is still there.
    fn answer(&mut self, to: (u64, u64), answer: Answer, fds: Vec<OwnedFd>) {
        let Some(connection) = &mut self.connection else { return };
        if connection.generation != to.0 {
            return;
        }
        if connection.outbox.len() >= OUTBOX_MAX {
            return self.disconnect();
        }
        connection.outbox.push_back((Reply { number: to.1, answer }.encode(), fds));
        self.flush();
    }

    /// Tells hostd something that it did not ask.
    fn emit(&mut self, event: Event) {
        if let Some(connection) = &self.connection {
            let to = (connection.generation, 0);
            self.answer(to, Answer::Event(event), Vec::new());
        }
    }

    fn flush(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        let mut lost = false;
        while let Some((bytes, fds)) = connection.outbox.front() {
            match packet::send(connection.socket.as_fd(), bytes, &packet::borrow(fds)) {
                Ok(()) => drop(connection.outbox.pop_front()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    lost = true;
                    break;
                }
            }
        }
        let wanted = if connection.outbox.is_empty() {
            epoll::EventFlags::IN
        } else {
            epoll::EventFlags::IN | epoll::EventFlags::OUT
        };
        let data = epoll::EventData::new_u64(CONNECTION);
        if lost || epoll::modify(&self.epoll, &connection.socket, data, wanted).is_err() {
            self.disconnect();
        }
    }

    fn next_timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        let mut next = self.refill_due(now);
        let mut soonest = |at: Instant| {
            let left = at.saturating_duration_since(now);
            next = Some(next.map_or(left, |n| n.min(left)));
        };
        if let Some(waiting) = self.waiting.front() {
            soonest(waiting.deadline);
        }
        if self.tally.total(State::Preparing) > 0 {
            // Only a bound: what parks in time wakes the loop itself.
            soonest(now + PARKING_MAX);
        }
        if let (Some(since), true) = (self.alone_since, self.by_id.is_empty()) {
            soonest(since + Duration::from_secs(self.config.linger_s));
        }
        next
    }

    fn is_over(&self) -> bool {
        if self.stopping.is_some() {
            return self.boxes.is_empty();
        }
        let linger = Duration::from_secs(self.config.linger_s);
        self.by_id.is_empty() && self.alone_since.is_some_and(|since| since.elapsed() >= linger)
    }

    /// Removes what would outlive the process.
    fn finish(&mut self) {
        for built in self.boxes.values_mut() {
            built.kill();
        }
        for (_, built) in self.boxes.drain() {
            built.wait_for_end();
            built.group.remove();
        }
        for group in self.groups.values() {
            group.remove();
        }
        self.layout.remove_all();
        let _ = std::fs::remove_file(socket_path(&self.config.state_dir));
        for to in self.stopping.take().unwrap_or_default() {
            // Question 0 is nobody's.
            if to.1 != 0 {
                self.answer(to, Answer::Done, Vec::new());
            }
        }
        self.flush_for(Duration::from_secs(2));
    }

    /// Waits for a slow hostd, so that the last word is heard.
    fn flush_for(&mut self, most: Duration) {
        let deadline = Instant::now() + most;
        while let Some(connection) = &self.connection {
            let left = deadline.saturating_duration_since(Instant::now());
            if connection.outbox.is_empty() || left.is_zero() {
                return;
            }
            let mut ready =
                [rustix::event::PollFd::new(&connection.socket, rustix::event::PollFlags::OUT)];
            let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            let _ = rustix::event::poll(&mut ready, Some(&timeout));
            self.flush();
        }
    }

    fn box_of(&mut self, id: &SandboxId) -> Option<&mut Boxed> {
        let slot = self.by_id.get(id)?;
        self.boxes.get_mut(slot).filter(|b| b.entry.state() == State::Running)
    }
}
