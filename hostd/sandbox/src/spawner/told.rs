//! What boxes tell the spawner. Untrusted: a message that does not fit the box's state kills it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::Spawning;
use super::boxes::{Boxed, State};
use wire::codec::Message as _;

use crate::error::Fault;
use crate::msg::{Answer, FileResult, FromBox};
use crate::packet;
use crate::spec::Event;

impl Spawning {
    /// Reads what a box has said: a bounded part of it, so that none can talk the others down. Returns
    /// whether there may be more.
    pub(super) fn listen_to(&mut self, slot: u32) -> bool {
        for _ in 0..64 {
            let Some(built) = self.boxes.get_mut(&slot) else { return false };
            let mut buffer = std::mem::take(&mut self.buffer);
            let got = packet::recv(built.control.as_fd(), &mut buffer, false);
            let heard = got.map(|p| (p.len, FromBox::decode(&buffer[..p.len]), p.fds, p.cut));
            self.buffer = buffer;
            match heard {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
                // What came without its descriptor is of no use; the box is not to blame.
                Ok((_, Some(message), _, true)) => self.cut_off(slot, &message),
                Ok((len, Some(message), fds, false)) if len > 0 => {
                    if self.told(slot, message, fds).is_none() {
                        self.distrust(slot);
                        return false;
                    }
                }
                // End of file: it is dying. Anything else: it is not as it should be.
                _ => {
                    let _ = rustix::event::epoll::delete(&self.epoll, &built.control);
                    built.kill();
                    return false;
                }
            }
        }
        true
    }

    fn distrust(&mut self, slot: u32) {
        super::log(format_args!("box {slot} said something out of turn and was killed"));
        if let Some(built) = self.boxes.get_mut(&slot) {
            built.kill();
        }
    }

    /// Fails the question whose answer has lost its descriptor.
    fn cut_off(&mut self, slot: u32, message: &FromBox) {
        let full = Fault::Os { what: "take a descriptor".into(), errno: libc::EMFILE };
        let Some(built) = self.boxes.get_mut(&slot) else { return };
        let from = match message.number() {
            Some(number) => built.pending.remove(&number).map(|pending| pending.from),
            None => {
                built.kill();
                built.claimed.take().map(|claimed| {
                    self.by_id.remove(&claimed.id);
                    claimed.from
                })
            }
        };
        if let Some(from) = from {
            self.answer(from, Answer::Failed(full), Vec::new());
        }
    }

    /// Handles one message. `None`: it does not fit.
    fn told(&mut self, slot: u32, message: FromBox, fds: Vec<OwnedFd>) -> Option<()> {
        if fds.len() > 1 {
            return None;
        }
        if self.boxes.get(&slot)?.entry.state() == State::Dying {
            // Said before it was killed. How its program ended still counts.
            if let (FromBox::MainExited { status }, Some(built)) =
                (&message, self.boxes.get_mut(&slot))
            {
                built.exit.get_or_insert(*status);
            }
            return Some(());
        }
        match message {
            FromBox::Ready => {
                let built = self.in_state(slot, State::Preparing)?;
                built.entry.enter(State::Parked);
                built.was_ready = true;
                if built.net.is_none() {
                    built.net = super::nets::Nets::of(built.pid);
                }
                let shape = built.shape;
                self.tell_if_empty(shape, 1);
                self.could_make();
                self.serve_waiting();
            }
            FromBox::Unfit { why } => {
                super::log(format_args!("box {slot} could not be parked: {why}"));
            }
            FromBox::Started { steps } => self.started(slot, steps, fds)?,
            FromBox::NotStarted { why } => {
                let built = self.in_state(slot, State::Starting)?;
                let claimed = built.claimed.take()?;
                built.kill();
                self.by_id.remove(&claimed.id);
                self.answer(claimed.from, Answer::Failed(why), Vec::new());
            }
            FromBox::MainExited { status } => {
                let built = self.in_state(slot, State::Running)?;
                built.exit = Some(status);
                built.entry.enter(State::Dying);
            }
            FromBox::ExecExited { number, status } => {
                let built = self.boxes.get_mut(&slot)?;
                if !built.execs.remove(&number) {
                    return None;
                }
                let id = built.claimed.as_ref()?.id;
                self.emit(Event::ExecExited { id, exec: number, status });
            }
            other => self.answered(slot, other, fds)?,
        }
        Some(())
    }

    fn in_state(&mut self, slot: u32, state: State) -> Option<&mut Boxed> {
        self.boxes.get_mut(&slot).filter(|b| b.entry.state() == state)
    }

    fn started(&mut self, slot: u32, inner: crate::spec::Steps, fds: Vec<OwnedFd>) -> Option<()> {
        let built = self.in_state(slot, State::Starting)?;
        let pid = built.pid;
        // The launch is over; a program that cannot be made as light as its neighbours does not stay.
        let light = built.group.favour(false);
        let claimed = built.claimed.as_mut()?;
        claimed.ends.pty = fds.into_iter().next();
        let steps = &mut claimed.steps;
        steps.woken = inner.woken;
        steps.mounted = inner.mounted;
        steps.pivoted = inner.pivoted;
        steps.confined = inner.confined;
        steps.executed = inner.executed;
        claimed.started_ns = inner.executed;
        let (from, steps, stdio) = (claimed.from, *steps, claimed.ends.which());
        let copies = claimed.ends.borrow().into_iter().map(|fd| fd.try_clone_to_owned());
        match light.and_then(|()| copies.collect::<io::Result<Vec<_>>>()) {
            Ok(fds) => {
                built.entry.enter(State::Running);
                self.refill.hush();
                self.answer(from, Answer::Started { pid, slot, steps, stdio }, fds);
            }
            Err(e) => {
                // No descriptors left, as a rule: nobody could hear this sandbox, so it does not start.
                built.kill();
                let id = built.claimed.take()?.id;
                self.by_id.remove(&id);
                self.answer(from, Answer::Failed(Fault::os("finish the start", &e)), Vec::new());
            }
        }
        Some(())
    }

    /// An answer to a question that hostd asked.
    fn answered(&mut self, slot: u32, message: FromBox, mut fds: Vec<OwnedFd>) -> Option<()> {
        let number = message.number()?;
        let built = self.boxes.get_mut(&slot)?;
        // A child of the box's init and init itself may both answer; the first counts.
        let Some(mut pending) = built.pending.remove(&number) else { return Some(()) };
        let answer = match message {
            FromBox::Executed { .. } => {
                built.execs.insert(number);
                pending.ends.pty = fds.pop();
                let stdio = pending.ends.which();
                let ends = pending.ends;
                fds = [ends.stdin, ends.stdout, ends.stderr, ends.pty]
                    .into_iter()
                    .flatten()
                    .collect();
                Answer::Executed { exec: number, stdio }
            }
            FromBox::NotDone { why, .. } => Answer::Failed(why),
            FromBox::Signalled { .. } => Answer::Done,
            FromBox::Connected { .. } if fds.len() == 1 => Answer::Connected,
            FromBox::Tunnel { .. } if fds.len() == 1 => match built.pidfd.try_clone() {
                Ok(process) => {
                    fds.push(process);
                    Answer::Tunnel
                }
                Err(e) => Answer::Failed(Fault::os("copy a descriptor", &e)),
            },
            FromBox::File { result, .. } => {
                let wants = matches!(result, FileResult::Open | FileResult::List);
                if wants != (fds.len() == 1) {
                    return None;
                }
                Answer::File(result)
            }
            _ => return None,
        };
        self.answer(pending.from, answer, fds);
        Some(())
    }
}
