//! What can be seen of a host: its words, its flags, its sandboxes. Nothing here changes any of it.

use wire::{CapacityWord, HostId, Seq, Stamp, launch::VisibleAt};

use crate::{admission::Admission, host::Host, launches::Launches, sandbox::Sandbox};

impl<N> Host<N> {
    /// The first heartbeat that counts what is admitted now.
    #[must_use]
    pub const fn visible_at(&self) -> VisibleAt {
        VisibleAt { incarnation: self.incarnation, seq: self.next_seq }
    }

    /// The capacity word now. Its stamp is that of the last heartbeat: it corrects it and is replaced by the next.
    #[must_use]
    pub fn word(&self) -> CapacityWord {
        self.admission.word(Stamp::of(Seq(self.next_seq.0.wrapping_sub(1))))
    }

    /// Its budget and flags.
    #[must_use]
    pub const fn admission(&self) -> &Admission {
        &self.admission
    }

    /// What is known of launches.
    #[must_use]
    pub const fn launches(&self) -> &Launches {
        &self.launches
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> HostId {
        self.host
    }

    /// Sandboxes that take a slot.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.live.iter().sum()
    }

    /// Whether a drain is over: nothing is taken in and nothing runs.
    #[must_use]
    pub fn drained(&self) -> bool {
        self.admission.draining() && self.running() == 0
    }

    /// A sandbox, live or remembered.
    #[must_use]
    pub fn sandbox(&self, local: u64) -> Option<&Sandbox<N>> {
        self.sandboxes.get(&local).map(|held| &held.sandbox)
    }

    /// All sandboxes, live or remembered, in no order.
    pub fn sandboxes(&self) -> impl Iterator<Item = &Sandbox<N>> {
        self.sandboxes.values().map(|held| &held.sandbox)
    }
}
