//! One host of this process: its core, its sender, its boxes, and what binds them. Owned by one thread.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use hostd_core::{Beat, Deed, Fate, Shapes};
use tokio::sync::Notify;
use wire::{
    Fault, HostId, LaunchId, SandboxId,
    call::{Exit, ExitWhy},
};

use crate::{
    clock,
    metrics::{Counts, count},
    note::Note,
    real::Real,
};

/// The core, with what hostd keeps a sandbox.
pub(crate) type Core = hostd_core::Host<Rc<Note>>;

/// What makes sandboxes.
#[derive(Debug)]
pub(crate) enum Backend {
    /// Nothing does: `boxes = "none"`.
    None {
        /// Milliseconds after which one ends of its own.
        noop_ms: Option<u64>,
    },
    /// Real ones.
    Real(Box<Real>),
}

/// Defaults of launches.
#[derive(Clone, Debug)]
pub(crate) struct Defaults {
    /// Milliseconds to live.
    pub(crate) hard_ms: u64,
    /// Bytes of output kept.
    pub(crate) log_bytes: u64,
    /// The shapes.
    pub(crate) shapes: Shapes,
}

/// One host.
#[derive(Debug)]
pub(crate) struct HostCell {
    /// Its name.
    pub(crate) id: HostId,
    /// What decides.
    pub(crate) core: RefCell<Core>,
    /// What tells the fleet.
    pub(crate) beat: RefCell<Beat>,
    /// What makes sandboxes.
    pub(crate) backend: Backend,
    /// Defaults of launches.
    pub(crate) defaults: Defaults,
    /// What was counted.
    pub(crate) counts: Counts,
    /// No-op sandboxes in the order in which they end.
    noops: RefCell<VecDeque<(u64, u64)>>,
    wake: Notify,
    armed_ms: Cell<u64>,
}

impl HostCell {
    /// Binds the parts.
    pub(crate) fn new(
        id: HostId,
        core: Core,
        beat: Beat,
        backend: Backend,
        defaults: Defaults,
    ) -> Self {
        let cell = Self {
            id,
            core: RefCell::new(core),
            beat: RefCell::new(beat),
            backend,
            defaults,
            counts: Counts::default(),
            noops: RefCell::default(),
            wake: Notify::new(),
            armed_ms: Cell::new(0),
        };
        cell.core.borrow_mut().set_next_seq(cell.beat.borrow().next_seq());
        cell
    }

    /// The real boxes.
    ///
    /// # Errors
    /// [`wire::Code::Unsupported`] if there are none.
    pub(crate) fn real(&self) -> Result<&Real, Fault> {
        match &self.backend {
            Backend::Real(real) => Ok(real),
            Backend::None { .. } => Err(Fault::new(
                wire::Code::Unsupported,
                "this host runs no boxes (boxes = \"none\"); nothing was done",
            )),
        }
    }

    /// What is kept with the sandbox of a launch.
    pub(crate) fn note_of(&self, launch_id: LaunchId) -> Option<Rc<Note>> {
        let core = self.core.borrow();
        let local = match core.launches().fate(&launch_id)? {
            Fate::Claimed { local } => *local,
            Fate::Started(started) => started.sandbox.local,
            Fate::Failed(_) | Fate::Cancelled => return None,
        };
        core.sandbox(local).map(|sandbox| Rc::clone(&sandbox.note))
    }

    /// A no-op sandbox has started: it ends when it is told to.
    pub(crate) fn noop_started(&self, now_ms: u64, local: u64, noop_ms: Option<u64>) {
        match noop_ms {
            Some(0) => self.exited(now_ms, local, Exit { code: 0, why: ExitWhy::Returned }),
            Some(ms) => self.noops.borrow_mut().push_back((now_ms + ms, local)),
            None => {}
        }
    }

    /// A sandbox has ended, and nothing of it is left.
    pub(crate) fn exited(&self, now_ms: u64, local: u64, exit: Exit) {
        let told = self.core.borrow_mut().handle_exited(now_ms, local, exit);
        let Some(exit) = told else { return };
        count(&self.counts.ended);
        let core = self.core.borrow();
        if let Some(sandbox) = core.sandbox(local) {
            sandbox.note.exit.set(exit);
        }
    }

    /// To be called after anything that changed the core: has the fleet told, and the timer set, if need be.
    pub(crate) fn settle(&self, now_ms: u64) {
        self.beat.borrow_mut().handle_capacity(now_ms, self.core.borrow().admission());
        if self.next_ms() < self.armed_ms.get() {
            self.wake.notify_one();
        }
    }

    /// When something is next due.
    fn next_ms(&self) -> u64 {
        let noop = self.noops.borrow().front().map(|(at_ms, _)| *at_ms);
        let core = self.core.borrow().poll_timeout();
        let beat = self.beat.borrow().poll_timeout();
        [noop, core].into_iter().flatten().fold(beat, u64::min)
    }

    /// Waits until something is due or changed. The timer's own.
    pub(crate) async fn due(&self, at_most_ms: u64) {
        let next_ms = self.next_ms().min(clock::now_ms() + at_most_ms);
        self.armed_ms.set(next_ms);
        let _ = tokio::time::timeout_at(clock::instant(next_ms), self.wake.notified()).await;
        self.armed_ms.set(0);
    }

    /// Does what is due in the core; returns the sandboxes that must be killed.
    pub(crate) fn handle_timeout(&self, now_ms: u64) -> Vec<SandboxId> {
        loop {
            let due = self.noops.borrow().front().is_some_and(|(at_ms, _)| *at_ms <= now_ms);
            let Some((_, local)) = due.then(|| self.noops.borrow_mut().pop_front()).flatten()
            else {
                break;
            };
            self.exited(now_ms, local, Exit { code: 0, why: ExitWhy::Returned });
        }
        let mut core = self.core.borrow_mut();
        core.handle_timeout(now_ms);
        let mut kills = Vec::new();
        while let Some(Deed::Kill(id)) = core.poll_deed() {
            kills.push(id);
        }
        kills
    }

    /// Ends sandboxes that the core wants ended.
    pub(crate) fn kill(self: &Rc<Self>, now_ms: u64, kills: Vec<SandboxId>) {
        for id in kills {
            match &self.backend {
                Backend::None { .. } => {
                    self.exited(now_ms, id.local, Exit { code: 137, why: ExitWhy::Signalled });
                }
                Backend::Real(_) => crate::real::kill(self, id),
            }
        }
    }

    /// Does what the core wants done now, outside the timer.
    pub(crate) fn act(self: &Rc<Self>, now_ms: u64) {
        let kills = self.handle_timeout(now_ms);
        self.kill(now_ms, kills);
        self.settle(now_ms);
    }
}
