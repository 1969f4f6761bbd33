//! What hostd asks of the spawner, one question at a time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::boxes::{Claimed, HostEnds, Pending, State};
use super::root::Parts;
use super::{Spawning, WAITING_MAX, Waiting};
use wire::codec::Message as _;

use crate::cgroup::GroupLimits;
use crate::error::{Fault, Refusal};
use crate::msg::{Answer, Ask, Census, Claim, PROTOCOL, ToBox};
use crate::spec::{Live, SandboxId, Steps, UIDS_A_BOX};
use crate::sys;

type From = (u64, u64);

impl Spawning {
    pub(super) fn ask(&mut self, from: From, ask: Ask, fds: Vec<OwnedFd>) {
        match ask {
            Ask::Hello => self.welcome(from),
            Ask::Claim(claim) => self.claim(from, claim, fds),
            Ask::Exec { id, program } => self.exec(from, &id, program),
            Ask::Signal { id, exec, signal } => {
                self.forward(from, &id, |number| ToBox::Signal { number, exec, signal });
            }
            Ask::File { id, op } => {
                self.forward(from, &id, |number| ToBox::File { number, op });
            }
            Ask::Connect { id, port } => {
                self.forward(from, &id, |number| ToBox::Connect { number, port });
            }
            Ask::Tunnel { id } => self.forward(from, &id, |number| ToBox::Tunnel { number }),
            Ask::Kill { id } => self.kill(from, &id),
            Ask::Freeze { id, frozen } => self.on_box(from, &id, |built| {
                built.group.freeze(frozen).map_err(|e| Fault::os("freezer", &e))?;
                built.paused = frozen;
                Ok(Answer::Done)
            }),
            Ask::CloseStdin { id } => self.on_box(from, &id, |built| {
                if let Some(claimed) = &mut built.claimed {
                    claimed.ends.stdin = None;
                }
                Ok(Answer::Done)
            }),
            Ask::Stats { id } => {
                self.on_box(from, &id, |built| Ok(Answer::Stats(built.stats())));
            }
            Ask::Stdio { id } => self.stdio(from, &id),
            Ask::Forget { id } => {
                self.exited.retain(|e| e.id != id);
                self.answer(from, Answer::Done, Vec::new());
            }
            Ask::Pool => {
                let shapes = (0..self.config.shapes.len()).filter(|s| !self.retired.contains(s));
                let pools = shapes.map(|s| self.pool_state(s)).collect();
                self.answer(from, Answer::Pool(pools), Vec::new());
            }
            Ask::Shapes(shapes) => {
                let answer = self.reshape(shapes).map_or_else(Answer::Failed, |()| Answer::Done);
                self.answer(from, answer, Vec::new());
            }
            Ask::Shutdown { kill } => self.stop(from, kill),
        }
    }

    /// Kills in whatever state: a claim that still waits for a box too.
    fn kill(&mut self, from: From, id: &SandboxId) {
        if let Some(at) = self.waiting.iter().position(|w| w.claim.id == *id) {
            if let Some(waited) = self.waiting.remove(at) {
                let why = Fault::BoxDied { what: "waiting for a box: it was killed".into() };
                self.answer((from.0, waited.number), Answer::Failed(why), Vec::new());
            }
            return self.answer(from, Answer::Done, Vec::new());
        }
        let slot = self.by_id.get(id).copied();
        let built = slot.and_then(|slot| self.boxes.get_mut(&slot));
        let answer = built.map_or(Answer::Failed(Fault::NoSandbox), |built| {
            built.kill();
            Answer::Done
        });
        self.answer(from, answer, Vec::new());
    }

    fn welcome(&mut self, from: From) {
        let live =
            self.boxes.values().filter(|b| b.entry.state() == State::Running).filter_map(|b| {
                let claimed = b.claimed.as_ref()?;
                Some(Live {
                    id: claimed.id,
                    shape: self.config.shapes[b.shape].name.clone(),
                    pid: b.pid,
                    slot: b.slot,
                    paused: b.paused,
                    started_ns: claimed.started_ns,
                })
            });
        let census = Census { live: live.collect(), exited: self.exited.iter().cloned().collect() };
        match crate::packet::memory_file(&census.encode()) {
            Ok(file) => {
                let answer = Answer::Welcome { protocol: PROTOCOL, pid: std::process::id() };
                self.answer(from, answer, vec![file]);
            }
            Err(e) => {
                let why = Fault::os("list sandboxes", &e);
                self.answer(from, Answer::Failed(why), Vec::new());
            }
        }
    }

    fn on_box(
        &mut self,
        from: From,
        id: &SandboxId,
        act: impl FnOnce(&mut super::boxes::Boxed) -> Result<Answer, Fault>,
    ) {
        let answer = self.box_of(id).ok_or(Fault::NoSandbox).and_then(act);
        self.answer(from, answer.unwrap_or_else(Answer::Failed), Vec::new());
    }

    /// Passes a question on to a box.
    fn forward(&mut self, from: From, id: &SandboxId, message: impl FnOnce(u64) -> ToBox) {
        let number = self.next_number;
        self.next_number += 1;
        let asked = self.box_of(id).ok_or(Fault::NoSandbox).and_then(|built| {
            if built.paused {
                return Err(Fault::WrongState { state: "paused".into() });
            }
            built.tell(&message(number), &[]).map_err(|e| Fault::os("ask the box", &e))?;
            built.pending.insert(number, Pending { from, ends: HostEnds::default() });
            Ok(())
        });
        if let Err(why) = asked {
            self.answer(from, Answer::Failed(why), Vec::new());
        }
    }

    fn exec(&mut self, from: From, id: &SandboxId, program: crate::spec::Program) {
        let number = self.next_number;
        self.next_number += 1;
        let uid_base = self.config.uid_base;
        let asked = self.box_of(id).ok_or(Fault::NoSandbox).and_then(|built| {
            if built.paused {
                return Err(Fault::WrongState { state: "paused".into() });
            }
            let uid = uid_base + built.slot * UIDS_A_BOX;
            let os = |e: io::Error| Fault::os("exec", &e);
            let (ends, inner) = HostEnds::pipes(&program, uid).map_err(os)?;
            built.tell(&ToBox::Exec { number, program }, &inner).map_err(os)?;
            built.pending.insert(number, Pending { from, ends });
            Ok(())
        });
        if let Err(why) = asked {
            self.answer(from, Answer::Failed(why), Vec::new());
        }
    }

    fn stdio(&mut self, from: From, id: &SandboxId) {
        let copied = self.box_of(id).ok_or(Fault::NoSandbox).and_then(|built| {
            let Some(claimed) = &built.claimed else { return Err(Fault::NoSandbox) };
            let copy = |fd: std::os::fd::BorrowedFd<'_>| {
                fd.try_clone_to_owned().map_err(|e| Fault::os("copy stdio", &e))
            };
            let fds: Result<Vec<_>, _> = claimed.ends.borrow().into_iter().map(copy).collect();
            Ok((Answer::Stdio(claimed.ends.which()), fds?))
        });
        match copied {
            Ok((answer, fds)) => self.answer(from, answer, fds),
            Err(why) => self.answer(from, Answer::Failed(why), Vec::new()),
        }
    }

    fn claim(&mut self, from: From, claim: Box<Claim>, fds: Vec<OwnedFd>) {
        let received_ns = sys::now_ns();
        let refusal = if self.stopping.is_some() {
            Some(Refusal::Stopping)
        } else if self.by_id.contains_key(&claim.id)
            || self.waiting.iter().any(|w| w.claim.id == claim.id)
        {
            Some(Refusal::Exists)
        } else if self.shape_named(&claim.shape).is_none() {
            Some(Refusal::NoShape { shape: claim.shape.clone() })
        } else {
            None
        };
        if let Some(refusal) = refusal {
            return self.answer(from, Answer::Refused(refusal), Vec::new());
        }
        if let Some(slot) = self.parked(&claim) {
            return self.hand_out(slot, from, claim, fds, received_ns);
        }
        let on_the_way = self.tally.total(State::Preparing) > 0;
        let room = !self.free_slots.is_empty() || on_the_way;
        if !room || self.waiting.len() >= WAITING_MAX {
            let shape = claim.shape.clone();
            let refusal = Answer::Refused(Refusal::NoBox { shape });
            return self.answer(from, refusal, Vec::new());
        }
        let deadline = Instant::now() + Duration::from_millis(self.config.claim_wait_ms);
        self.waiting.push_back(Waiting { claim, fds, number: from.1, received_ns, deadline });
    }

    fn parked(&self, claim: &Claim) -> Option<u32> {
        self.tally.ready(self.shape_named(&claim.shape)?, claim.network.is_some())
    }

    /// Gives waiting claims the boxes that have become ready.
    pub(super) fn serve_waiting(&mut self) {
        let Some(generation) = self.connection.as_ref().map(|c| c.generation) else { return };
        let mut still = std::collections::VecDeque::new();
        while let Some(w) = self.waiting.pop_front() {
            match self.parked(&w.claim) {
                Some(slot) => {
                    self.hand_out(slot, (generation, w.number), w.claim, w.fds, w.received_ns);
                }
                None => still.push_back(w),
            }
        }
        self.waiting = still;
    }

    pub(super) fn expire_waiting(&mut self) {
        let now = Instant::now();
        let Some(generation) = self.connection.as_ref().map(|c| c.generation) else { return };
        while self.waiting.front().is_some_and(|w| w.deadline <= now) {
            let Some(w) = self.waiting.pop_front() else { return };
            let refusal = Refusal::NoBox { shape: w.claim.shape.clone() };
            self.answer((generation, w.number), Answer::Refused(refusal), Vec::new());
        }
    }

    /// Gives a parked box its root and its program.
    fn hand_out(
        &mut self,
        slot: u32,
        from: From,
        claim: Box<Claim>,
        fds: Vec<OwnedFd>,
        received_ns: u64,
    ) {
        let claim = *claim;
        let id = claim.id;
        let mut steps = Steps {
            claim_sent: claim.sent_ns,
            received: received_ns,
            box_found: sys::now_ns(),
            ..Steps::default()
        };
        match self.send_claim(slot, claim, fds) {
            Ok((ends, composed_ns)) => {
                steps.composed = composed_ns;
                self.by_id.insert(id, slot);
                if let Some(built) = self.boxes.get_mut(&slot) {
                    built.entry.enter(State::Starting);
                    built.claimed = Some(Claimed { id, from, steps, ends, started_ns: 0 });
                    let shape = built.shape;
                    self.tell_if_empty(shape, 0);
                }
            }
            Err((why, spoilt)) => {
                if let (true, Some(built)) = (spoilt, self.boxes.get_mut(&slot)) {
                    built.kill();
                }
                self.answer(from, Answer::Failed(why), Vec::new());
            }
        }
    }

    /// The error says whether the box can no longer be used.
    fn send_claim(
        &mut self,
        slot: u32,
        claim: Claim,
        fds: Vec<OwnedFd>,
    ) -> Result<(HostEnds, u64), (Fault, bool)> {
        let uid_base = self.config.uid_base + slot * UIDS_A_BOX;
        let alone = self.tally.total(State::Starting) == 0;
        let built = self.boxes.get_mut(&slot).ok_or((Fault::NoSandbox, false))?;
        let (lowers, data) = (claim.lowers as usize, claim.data_lowers as usize);
        if lowers.checked_add(data) != Some(fds.len()) {
            let what = "layers that do not match their count".into();
            return Err((Fault::Os { what, errno: libc::EINVAL }, false));
        }
        let (lowers, data_lowers) = fds.split_at(lowers);
        let userns = built.userns.as_ref().ok_or((Fault::NoSandbox, false))?.as_fd();
        let parts = Parts { lowers, data_lowers, userns, uid_base, limits: &claim.limits };
        // Whatever fails from here on leaves the box without its canvas.
        let (canvas, outputs) = built.canvas.take().ok_or((Fault::NoSandbox, true))?;
        let [root, writable] = canvas.compose(&parts).map_err(|why| (why, true))?;
        let shape = &self.config.shapes[built.shape];
        let wanted = GroupLimits {
            cpu_millis: claim.limits.cpu_millis.unwrap_or(shape.cpu_millis),
            memory_bytes: claim.limits.memory_bytes.unwrap_or(shape.memory_bytes),
            pids: claim.limits.pids.unwrap_or(shape.pids),
        };
        if wanted != super::pool::limits_of(shape) {
            built.group.limit(&wanted).map_err(|e| (Fault::os("limits", &e), true))?;
        }
        let (ends, inner) = HostEnds::with(Some(outputs), &claim.program, uid_base)
            .map_err(|e| (Fault::os("stdio", &e), true))?;
        let mut given = vec![root, writable];
        given.extend(fds);
        let message = ToBox::Claim {
            program: claim.program,
            hostname: claim.hostname,
            limits: claim.limits,
            network: claim.network,
            parts: u32::try_from(given.len() - 1).unwrap_or(0),
        };
        given.extend(inner);
        if claim.network.is_some() {
            // What gets a device never serves another.
            built.net = None;
            let node =
                super::setup::tun_node().map_err(|e| (Fault::os("/dev/net/tun", &e), true))?;
            given.push(node);
        }
        let composed_ns = sys::now_ns();
        if alone {
            built.bring_here();
        }
        built.tell(&message, &given).map_err(|e| (Fault::os("tell the box", &e), true))?;
        built.userns = None;
        Ok((ends, composed_ns))
    }
}
