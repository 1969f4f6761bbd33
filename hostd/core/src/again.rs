//! What outlived a restart of the daemon, told to a new core before it serves.

use wire::LaunchId;

use crate::{
    host::Host,
    launches::{BodyHash, Fate},
    sandbox::Sandbox,
};

impl<N> Host<N> {
    /// Takes up a sandbox that lived on while the daemon was away. Its slot is taken even beyond the budget.
    pub fn adopt(&mut self, body: BodyHash, fate: Fate, sandbox: Sandbox<N>) {
        let (local, launch_id) = (sandbox.id.local, sandbox.launch_id);
        self.admission.occupy(sandbox.shape);
        self.live[sandbox.shape.index()] += 1;
        self.launches.remember(launch_id, body, fate);
        self.sandboxes.insert(local, sandbox);
        self.arm(local);
    }

    /// Remembers a launch of an earlier start of the daemon of which nothing lives.
    pub fn recall(&mut self, now_ms: u64, launch_id: LaunchId, body: BodyHash, fate: Fate) {
        self.launches.remember(launch_id, body, fate);
        self.launches.release(now_ms, launch_id);
    }
}
