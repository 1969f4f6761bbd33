//! One sandbox's life: `Claimed -> Running -> (Paused) -> Stopped`, nothing else, and when it must end.

use std::ops::{Deref, DerefMut};

use wire::{
    LaunchId, SandboxId, ShapeId,
    call::{ExitWhy, State},
    rows::Place,
};

/// A sandbox of this host, live or ended. `N` is what the caller keeps with it.
#[derive(Debug)]
pub struct Sandbox<N> {
    /// Its name.
    pub id: SandboxId,
    /// The launch that it came from.
    pub launch_id: LaunchId,
    /// Its slot.
    pub shape: ShapeId,
    /// Where it stands.
    pub state: State,
    /// When it was admitted, in ms.
    pub admitted_ms: u64,
    /// When it is killed, in ms. Until it was executed, as if it were now: its deadline counts from there.
    pub hard_at_ms: Option<u64>,
    /// Milliseconds without use after which it is killed; zero for never.
    pub idle_ms: u64,
    /// When it was last used, in ms.
    pub used_ms: u64,
    /// When it is reaped because nobody took its answer.
    pub lapse_at_ms: Option<u64>,
    /// Callers that have its answer or wait for it. One whose answer could not be delivered is none.
    pub callers: u32,
    /// Why it is being ended, once it is.
    pub ending: Option<ExitWhy>,
    /// When its record is dropped, once it has ended.
    pub drop_at_ms: Option<u64>,
    /// What the caller keeps with it.
    pub note: N,
}

/// Where the core finds what belongs to a sandbox without looking for it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ties {
    /// What is remembered of its launch, until it is released.
    pub(crate) launch: Option<Place>,
    /// The time at which it is to be looked at.
    pub(crate) due_ms: Option<u64>,
}

/// A sandbox as the core holds it.
#[derive(Debug)]
pub(crate) struct Held<N> {
    pub(crate) sandbox: Sandbox<N>,
    pub(crate) ties: Ties,
}

impl<N> Deref for Held<N> {
    type Target = Sandbox<N>;
    fn deref(&self) -> &Sandbox<N> {
        &self.sandbox
    }
}

impl<N> DerefMut for Held<N> {
    fn deref_mut(&mut self) -> &mut Sandbox<N> {
        &mut self.sandbox
    }
}

impl<N> Sandbox<N> {
    /// Whether it still takes a slot.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        !matches!(self.state, State::Stopped(_))
    }

    /// The next time at which something is due, and why it would end then.
    #[must_use]
    pub fn due(&self) -> Option<(u64, ExitWhy)> {
        if !self.is_live() || self.ending.is_some() {
            return None;
        }
        // A paused sandbox is not used, and does not sit idle either: somebody froze it on purpose.
        let idle_at = (self.idle_ms > 0 && self.state == State::Running)
            .then(|| (self.used_ms.saturating_add(self.idle_ms), ExitWhy::Idle));
        let executed = self.state != State::Claimed;
        let hard_at = self.hard_at_ms.filter(|_| executed).map(|at| (at, ExitWhy::Deadline));
        let lapse_at = self.lapse_at_ms.map(|at| (at, ExitWhy::Lost));
        [hard_at, idle_at, lapse_at].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Milliseconds until its hard deadline; zero for none.
    #[must_use]
    pub fn left_ms(&self, now_ms: u64) -> u64 {
        self.hard_at_ms.map_or(0, |at| at.saturating_sub(now_ms).max(1))
    }
}
