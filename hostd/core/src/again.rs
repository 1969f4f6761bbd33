//! What outlived a restart of the daemon, told to a new core before it serves.

use wire::{Code, LaunchId};

use crate::{
    host::Host,
    launches::{BodyHash, Fate},
    sandbox::{Held, Sandbox, Ties},
};

impl<N> Host<N> {
    /// Takes up a sandbox that lived on while the daemon was away. Its slot is taken even beyond the budget.
    pub fn adopt(&mut self, body: BodyHash, fate: Fate, sandbox: Sandbox<N>) {
        let local = sandbox.id.local;
        self.admission.occupy(sandbox.shape);
        self.live[sandbox.shape.index()] += 1;
        let launch = Some(self.launches.remember(sandbox.launch_id, body, fate));
        self.sandboxes.insert(local, Held { sandbox, ties: Ties { launch, due_ms: None } });
        self.arm(local);
    }

    /// Remembers a launch of an earlier start of the daemon of which nothing lives.
    pub fn recall(&mut self, now_ms: u64, launch_id: LaunchId, body: BodyHash, fate: Fate) {
        let place = self.launches.remember(launch_id, body, fate);
        self.launches.release(now_ms, place);
    }

    /// Remembers that an earlier start of the daemon refused a named launch (PROTOCOL 6.12).
    pub fn recall_refused(&mut self, now_ms: u64, launch_id: LaunchId, code: Code) {
        // One more than there is room for is one of 65,536 of the last minutes.
        let _ = self.launches.refuse(now_ms, launch_id, code);
    }
}
