//! What hostd keeps with each sandbox beside what the core decides by: the request, the outcome, the exit.

use std::{
    cell::{OnceCell, RefCell},
    sync::Arc,
};

use hostd_image::{FirstRunGuard, MountedImage};
use tokio::sync::Notify;
use wire::{
    SandboxId,
    call::{Exit, SandboxRecord},
    launch::{LaunchReply, LaunchRequest},
};

use crate::{doors::Doors, host::Core, process::Processes};

/// A value that comes once, and those who wait for it. For one thread.
#[derive(Debug)]
pub(crate) struct Once<T> {
    value: OnceCell<T>,
    came: Notify,
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self { value: OnceCell::new(), came: Notify::new() }
    }
}

impl<T: Clone> Once<T> {
    /// Sets it; a second time changes nothing.
    pub(crate) fn set(&self, value: T) {
        if self.value.set(value).is_ok() {
            self.came.notify_waiters();
        }
    }

    /// The value, if it has come.
    pub(crate) fn get(&self) -> Option<T> {
        self.value.get().cloned()
    }

    /// Waits for it.
    pub(crate) async fn wait(&self) -> T {
        loop {
            let came = self.came.notified();
            if let Some(value) = self.value.get() {
                return value.clone();
            }
            came.await;
        }
    }
}

/// What is kept with one sandbox.
#[derive(Debug)]
pub(crate) struct Note {
    /// Its name.
    pub(crate) id: SandboxId,
    /// The request as it came: small, and read only when somebody asks.
    pub(crate) request: Box<[u8]>,
    /// The answer to its launch. Not used for what starts at once.
    pub(crate) outcome: Once<LaunchReply>,
    /// How it ended.
    pub(crate) exit: Once<Exit>,
    /// Its processes, if it has real ones.
    pub(crate) processes: RefCell<Processes>,
    /// Its image, held while it lives.
    pub(crate) image: RefCell<Option<Arc<MountedImage>>>,
    /// Notes what it reads, if it is the first here to run what it runs.
    pub(crate) first_run: RefCell<Option<FirstRunGuard>>,
    /// Its ports that are open on the host.
    pub(crate) doors: RefCell<Doors>,
}

impl Note {
    /// Of a launch.
    pub(crate) fn new(id: SandboxId, request: &[u8]) -> Self {
        Self {
            id,
            request: request.into(),
            outcome: Once::default(),
            exit: Once::default(),
            processes: RefCell::default(),
            image: RefCell::default(),
            first_run: RefCell::default(),
            doors: RefCell::default(),
        }
    }

    /// Waits until nothing of it runs, or ever will: it has exited, or was never started.
    pub(crate) async fn gone(&self) {
        tokio::select! {
            _ = self.exit.wait() => {}
            reply = self.outcome.wait() => {
                if matches!(reply, LaunchReply::Started(_)) {
                    self.exit.wait().await;
                }
            }
        }
    }

    /// Whether it is this tenant's.
    pub(crate) fn is_of(&self, tenant: &str) -> bool {
        LaunchRequest::access(&self.request).is_ok_and(|request| request.tenant == tenant)
    }
}

/// What is told of a sandbox.
pub(crate) fn record(core: &Core, note: &Note, now_ms: u64) -> Option<SandboxRecord> {
    let sandbox = core.sandbox(note.id.local)?;
    let request = LaunchRequest::from_bytes(&note.request).ok()?;
    Some(SandboxRecord {
        sandbox: note.id,
        launch_id: sandbox.launch_id,
        tenant: request.tenant,
        image: request.image,
        shape: request.shape,
        command: request.command,
        labels: request.labels,
        state: sandbox.state,
        age_ms: now_ms.saturating_sub(sandbox.admitted_ms),
        left_ms: sandbox.left_ms(now_ms),
        network: request.network,
        published: note.doors.borrow().published(),
    })
}
