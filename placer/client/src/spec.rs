//! What is to run: a launch before it is sent, and another process before it is started.
//!
//! A [`LaunchSpec`] is the request without what the client fills in (tenant, id, budget). It checks nothing: the
//! request's own check does, once, when it is launched.

use std::time::Duration;

use wire::{
    LaunchId, SandboxId,
    call::ExecRequest,
    launch::{LaunchRequest, Limits, Network, Publish},
};

/// What a sandbox runs, and within which bounds. Built up by its methods.
///
/// ```
/// use std::time::Duration;
/// use volley_client::LaunchSpec;
///
/// let spec = LaunchSpec::new("python")
///     .command(["python3", "-c", "print(6 * 7)"])
///     .env("LANG", "C.UTF-8")
///     .label("job", "17")
///     .lifetime(Duration::from_secs(600));
/// ```
#[derive(Clone, Debug)]
pub struct LaunchSpec {
    request: LaunchRequest,
    named: bool,
    budget: Option<Duration>,
}

impl LaunchSpec {
    /// A sandbox of `image` (a name, or an id of 64 hex digits) in the smallest shape, running the image's own
    /// command.
    #[must_use]
    pub fn new(image: impl Into<String>) -> Self {
        let request = LaunchRequest {
            launch_id: LaunchId::default(),
            tenant: String::new(),
            image: image.into(),
            shape: 0,
            command: Vec::new(),
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            tty: false,
            stdin: false,
            limits: Limits::default(),
            network: Network::None,
            publish: vec![],
            labels: Vec::new(),
        };
        Self { request, named: false, budget: None }
    }

    /// Program and arguments, instead of the image's own.
    #[must_use]
    pub fn command<S: Into<String>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.request.command = command.into_iter().map(Into::into).collect();
        self
    }

    /// Adds to, or replaces in, the image's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.env.push((name.into(), value.into()));
        self
    }

    /// Working directory.
    #[must_use]
    pub fn cwd(mut self, path: impl Into<String>) -> Self {
        self.request.cwd = path.into();
        self
    }

    /// `name`, `uid` or `uid:gid`.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.request.user = user.into();
        self
    }

    /// Index of the shape in the fleet's table.
    #[must_use]
    pub const fn shape(mut self, shape: u8) -> Self {
        self.request.shape = shape;
        self
    }

    /// A terminal instead of pipes.
    #[must_use]
    pub const fn tty(mut self, tty: bool) -> Self {
        self.request.tty = tty;
        self
    }

    /// Keeps standard input open for [`crate::Sandbox::attach`].
    #[must_use]
    pub const fn stdin(mut self, open: bool) -> Self {
        self.request.stdin = open;
        self
    }

    /// Metadata to list and filter by.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.labels.push((name.into(), value.into()));
        self
    }

    /// What it may reach; nothing unless said.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.request.network = network;
        self
    }

    /// Opens a port of it on its host's own address, where the host's operator allows that; `host_port` zero takes any
    /// that is free. [`crate::Sandbox::inspect`] says where it is.
    #[must_use]
    pub fn publish(mut self, host_port: u16, port: u16) -> Self {
        self.request.publish.push(Publish { port, host_port });
        self
    }

    /// All bounds beyond the shape's.
    #[must_use]
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.request.limits = limits;
        self
    }

    /// Kills it after this time, wherever the client is then. The host keeps the deadline.
    #[must_use]
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.request.limits.hard_ms = millis(lifetime);
        self
    }

    /// Kills it when nothing was said to it or by it for this time.
    #[must_use]
    pub fn idle(mut self, idle: Duration) -> Self {
        self.request.limits.idle_ms = millis(idle);
        self
    }

    /// Time that the launch may take, over all attempts.
    #[must_use]
    pub const fn budget(mut self, budget: Duration) -> Self {
        self.budget = Some(budget);
        self
    }

    /// Names the launch: the same id again, from any program and through any placer, is the same sandbox. Send it again within
    /// two minutes (`BUDGET_MS_MAX`, PROTOCOL 6.12); later it may be taken for a new launch.
    ///
    /// Without it the client draws an id that nobody else knows, and the launch goes to the emptier of two hosts. A
    /// named launch goes to the home hosts of its id in order, so that all placers agree (PROTOCOL 6.11).
    #[must_use]
    pub const fn id(mut self, id: LaunchId) -> Self {
        self.request.launch_id = id;
        self.named = true;
        self
    }

    /// Names the launch by an id that the client draws: should the placer die in mid-launch, the client finds the outcome
    /// through another.
    #[must_use]
    pub fn named(self) -> Self {
        let id = draw_id();
        self.id(id)
    }

    /// The id that it was given.
    #[must_use]
    pub fn given_id(&self) -> Option<LaunchId> {
        self.named.then_some(self.request.launch_id)
    }

    /// The request as it travels, for `tenant` unless the spec was made from a request that says one.
    pub(crate) fn into_parts(self, tenant: &str) -> (LaunchRequest, bool, Option<Duration>) {
        let mut request = self.request;
        if request.tenant.is_empty() {
            tenant.clone_into(&mut request.tenant);
        }
        if !self.named {
            request.launch_id = draw_id();
        }
        (request, self.named, self.budget)
    }
}

/// A request that came from elsewhere (the HTTP front, a test), launched under its own id.
impl From<LaunchRequest> for LaunchSpec {
    fn from(request: LaunchRequest) -> Self {
        Self { request, named: true, budget: None }
    }
}

/// A fresh launch id, ordered by time.
#[must_use]
pub fn draw_id() -> LaunchId {
    LaunchId(uuid::Uuid::now_v7().into_bytes())
}

/// Another process in a running sandbox. Built up by its methods.
#[derive(Clone, Debug)]
pub struct ExecSpec {
    pub(crate) request: ExecRequest,
}

impl ExecSpec {
    /// Program and arguments.
    #[must_use]
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        let nowhere = SandboxId { host: wire::HostId(0), local: 0 };
        let request = ExecRequest {
            sandbox: nowhere,
            command: command.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            tty: None,
            stdin: false,
        };
        Self { request }
    }

    /// Adds to the sandbox's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.env.push((name.into(), value.into()));
        self
    }

    /// Working directory.
    #[must_use]
    pub fn cwd(mut self, path: impl Into<String>) -> Self {
        self.request.cwd = path.into();
        self
    }

    /// `name`, `uid` or `uid:gid`.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.request.user = user.into();
        self
    }

    /// A terminal of this size instead of pipes.
    #[must_use]
    pub const fn tty(mut self, rows: u16, columns: u16) -> Self {
        self.request.tty = Some((rows, columns));
        self
    }

    /// Keeps standard input open.
    #[must_use]
    pub const fn stdin(mut self, open: bool) -> Self {
        self.request.stdin = open;
        self
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for ExecSpec {
    fn from(command: [S; N]) -> Self {
        Self::new(command)
    }
}

impl<S: Into<String>> From<Vec<S>> for ExecSpec {
    fn from(command: Vec<S>) -> Self {
        Self::new(command)
    }
}

/// Whole milliseconds, at least one for a time that is not zero.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX)
}
