//! A running sandbox, as a handle: an id and the way there.
//!
//! The handle holds nothing of the sandbox. Dropping it changes nothing; the sandbox ends by its own program, its
//! deadlines, or [`Sandbox::kill`].

use std::time::Duration;

use futures::Stream;
use wire::{
    SandboxId,
    call::{Answer, Call, Exit, MAIN_PROCESS, SandboxRecord, Stats},
};

use crate::{
    CallError, Client, Event, ExecSpec, PortStream, Process,
    process::{Attached, events},
    spec::millis,
};

/// A sandbox of some id. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sandbox {
    pub(crate) client: Client,
    id: SandboxId,
}

impl Sandbox {
    pub(crate) const fn of(client: Client, id: SandboxId) -> Self {
        Self { client, id }
    }

    /// Its name, which says where it is: keep it to find the sandbox again with [`Client::sandbox`].
    #[must_use]
    pub const fn id(&self) -> SandboxId {
        self.id
    }

    /// Starts another process in it and attaches to it.
    ///
    /// ```no_run
    /// # async fn example(sandbox: volley_client::Sandbox) -> Result<(), volley_client::CallError> {
    /// let output = sandbox.exec(["uname", "-a"]).await?.output().await?;
    /// println!("{}", String::from_utf8_lossy(&output.stdout));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CallError`]: no such sandbox, command not found, and so on.
    pub async fn exec(&self, spec: impl Into<ExecSpec>) -> Result<Process, CallError> {
        let mut request = spec.into().request;
        request.sandbox = self.id;
        self.attach_by(&Call::Exec(request)).await
    }

    /// Attaches to the process that the sandbox was launched with, from `offset` bytes of its output on.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn attach(&self, offset: u64) -> Result<Process, CallError> {
        self.attach_to(MAIN_PROCESS, offset).await
    }

    /// Attaches to any of its processes ([`Process::id`]).
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn attach_to(&self, process: u32, offset: u64) -> Result<Process, CallError> {
        self.attach_by(&Call::Attach { sandbox: self.id, process, offset, follow: true }).await
    }

    async fn attach_by(&self, call: &Call) -> Result<Process, CallError> {
        let mut attached = Attached::open(&self.client, call).await?;
        match attached.answer().await? {
            Answer::Process(id) => Ok(Process::of(id, attached)),
            _ => Err(CallError::protocol("a process was expected")),
        }
    }

    /// The output of the main process that was kept, oldest first; with `follow`, until the process ends.
    ///
    /// # Errors
    /// [`CallError`], at once or within the stream.
    pub async fn logs(
        &self,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<Event, CallError>> + Send + 'static, CallError> {
        let call = Call::Attach { sandbox: self.id, process: MAIN_PROCESS, offset: 0, follow };
        Ok(events(self.attach_by(&call).await?))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn wait(&self) -> Result<Exit, CallError> {
        match self.client.ask(&Call::Wait(self.id)).await? {
            Answer::Exited(exit) => Ok(exit),
            _ => Err(CallError::protocol("an exit was expected")),
        }
    }

    /// Ends it with everything in it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn kill(&self) -> Result<(), CallError> {
        self.done(Call::Kill { sandbox: self.id, signal: 0 }).await
    }

    /// Sends a signal to its main process.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn signal(&self, signal: u8) -> Result<(), CallError> {
        self.done(Call::Kill { sandbox: self.id, signal }).await
    }

    /// Freezes it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn pause(&self) -> Result<(), CallError> {
        self.done(Call::Pause(self.id)).await
    }

    /// Thaws it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn resume(&self) -> Result<(), CallError> {
        self.done(Call::Resume(self.id)).await
    }

    /// Sets new deadlines, counted from now; `None` keeps the old.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn extend(
        &self,
        lifetime: Option<Duration>,
        idle: Option<Duration>,
    ) -> Result<(), CallError> {
        let ms = |time: Option<Duration>| time.map_or(0, millis);
        self.done(Call::Extend { sandbox: self.id, hard_ms: ms(lifetime), idle_ms: ms(idle) }).await
    }

    /// What is known of it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn inspect(&self) -> Result<SandboxRecord, CallError> {
        match self.client.ask(&Call::Inspect(self.id)).await? {
            Answer::Sandbox(record) => Ok(record),
            _ => Err(CallError::protocol("a sandbox was expected")),
        }
    }

    /// What it uses.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn stats(&self) -> Result<Stats, CallError> {
        match self.client.ask(&Call::Stats(self.id)).await? {
            Answer::Stats(stats) => Ok(stats),
            _ => Err(CallError::protocol("stats were expected")),
        }
    }

    /// Connects to a TCP port on its loopback.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn forward_port(&self, port: u16) -> Result<PortStream, CallError> {
        let call = Call::Port { sandbox: self.id, port };
        let mut attached = Attached::open(&self.client, &call).await?;
        match attached.answer().await? {
            Answer::Done => Ok(PortStream::of(attached)),
            _ => Err(CallError::protocol("done was expected")),
        }
    }

    async fn done(&self, call: Call) -> Result<(), CallError> {
        self.client.ask_done(&call).await
    }
}
