//! Starting a spawner, or joining the one that is there.
//!
//! The spawner is this binary again, executed with an empty environment through a read-only mount, so
//! that whoever reached it through `/proc/self/exe` could not write it. A state directory has one
//! spawner: its lock says so, its socket is how to meet it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio as ChildStdio};
use std::time::{Duration, Instant};

use crate::client::{Events, Spawner};
use crate::error::{ClaimError, StartError};
use crate::msg::PROTOCOL;
use crate::spawner::{ARGUMENT, LOCKED, READY, check, socket_path};
use crate::spec::{Config, Exited, Live};
use crate::sys;

/// Longest wait for a spawner that is ending.
const START_MAX: Duration = Duration::from_secs(10);

/// What a spawner had when it was joined.
#[derive(Debug)]
pub struct Joined {
    /// The handle.
    pub spawner: Spawner,
    /// Its events.
    pub events: Events,
    /// Sandboxes that run already: adopt them or kill them.
    pub live: Vec<Live>,
    /// Sandboxes that have ended and were not forgotten.
    pub exited: Vec<Exited>,
    /// Whether this call started it.
    pub started: bool,
}

impl Spawner {
    /// Joins the spawner of the state directory, or starts one. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`StartError::NeedsRoot`] without root; otherwise why there is no spawner.
    pub fn connect_or_start(config: &Config) -> Result<Joined, StartError> {
        check(config).map_err(StartError::Config)?;
        if !rustix::process::geteuid().is_root() {
            return Err(StartError::NeedsRoot);
        }
        make_state_dir(&config.state_dir)?;
        let deadline = Instant::now() + START_MAX;
        loop {
            // One that is just ending still holds its lock, or accepts and is gone: come again.
            let met = meet(config);
            let again = matches!(&met, Err(StartError::Ending));
            if !again || Instant::now() > deadline {
                return met;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn meet(config: &Config) -> Result<Joined, StartError> {
    if let Some(socket) = connect(&config.state_dir)? {
        return join(config, socket, false);
    }
    start(config)?;
    match connect(&config.state_dir)? {
        Some(socket) => join(config, socket, true),
        None => Err(StartError::Setup("it started and is not there".into())),
    }
}

/// Connects, or `None` where nobody listens.
fn connect(state_dir: &str) -> Result<Option<OwnedFd>, StartError> {
    use rustix::net as n;
    let make = || -> rustix::io::Result<Option<OwnedFd>> {
        let flags = n::SocketFlags::CLOEXEC;
        let socket = n::socket_with(n::AddressFamily::UNIX, n::SocketType::SEQPACKET, flags, None)?;
        let address = n::SocketAddrUnix::new(socket_path(state_dir))?;
        match n::connect(&socket, &address) {
            Ok(()) => Ok(Some(socket)),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(e) => Err(e),
        }
    };
    make().map_err(|e| io_error("connect to the spawner")(e.into()))
}

fn make_state_dir(state_dir: &str) -> Result<(), StartError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let path = Path::new(state_dir);
    if path.exists() {
        let private = std::fs::Permissions::from_mode(0o700);
        return std::fs::set_permissions(path, private).map_err(io_error("state directory"));
    }
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(path).map_err(io_error("state directory"))
}

/// Starts the spawner and waits until it listens. Its binary is executed through a read-only mount
/// of its own, so that nobody who reaches it through `/proc/self/exe` can write it.
fn start(config: &Config) -> Result<(), StartError> {
    let exe = if config.exe.is_empty() { "/proc/self/exe" } else { &config.exe };
    let sealed = sys::clone_tree(rustix::fs::CWD, exe, false)
        .and_then(|mount| sys::mount_restrict(mount.as_fd(), sys::ATTR_RDONLY).map(|()| mount));
    let sealed = match sealed {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Err(StartError::NeedsRoot),
        // A binary that was replaced since has no name to mount by: a sealed copy in memory, then.
        Err(_) => sealed_copy(exe).map_err(io_error("copy the spawner's binary"))?,
        Ok(mount) => mount,
    };
    let path = format!("/proc/self/fd/{}", sealed.as_raw_fd());
    use std::os::unix::process::CommandExt;
    let mut child = Command::new(path)
        // What `ps` in a box shows of its init: no path of the host.
        .arg0("volley")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(ChildStdio::piped())
        .stdout(ChildStdio::piped())
        .spawn()
        .map_err(io_error("start the spawner"))?;
    let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(config)
        .map_err(|e| StartError::Config(e.to_string()))?;
    let mut said = Vec::new();
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    if let (Some(mut stdin), Some(stdout)) = (stdin, stdout) {
        stdin.write_all(&bytes).map_err(io_error("configure the spawner"))?;
        drop(stdin);
        let read = stdout.take(4096).read_to_end(&mut said);
        read.map_err(io_error("hear the spawner"))?;
    }
    // Collected whenever it ends, so that it leaves no zombie.
    std::thread::Builder::new()
        .name("spawner-wait".into())
        .stack_size(64 << 10)
        .spawn(move || drop(child.wait()))
        .map_err(io_error("start a thread"))?;
    if said == READY {
        return Ok(());
    }
    if said == LOCKED.as_bytes() {
        return Err(StartError::Ending);
    }
    let why = String::from_utf8_lossy(&said).into_owned();
    Err(StartError::Setup(if why.is_empty() {
        "it ended at once; the binary must call hostd_sandbox::main_if_asked first thing".into()
    } else {
        why
    }))
}

fn sealed_copy(exe: &str) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("spawner", flags)?;
    io::copy(&mut std::fs::File::open(exe)?, &mut std::fs::File::from(memory.try_clone()?))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals)?;
    Ok(memory)
}

fn io_error(what: &str) -> impl FnOnce(io::Error) -> StartError {
    let what = what.to_owned();
    move |error| StartError::Io { what, error }
}

fn join(config: &Config, socket: OwnedFd, started: bool) -> Result<Joined, StartError> {
    let (spawner, events, welcome) =
        Spawner::over(socket).map_err(io_error("start a thread"))?.ok_or(StartError::Ending)?;
    if welcome.protocol != PROTOCOL {
        return Err(StartError::Version {
            state_dir: config.state_dir.clone(),
            theirs: welcome.protocol,
            ours: PROTOCOL,
        });
    }
    if !started {
        // It began with the shapes of the hostd before this one.
        spawner.reshape_blocking(config.shapes.clone()).map_err(|error| match error {
            ClaimError::Unknown { .. } => StartError::Ending,
            other => StartError::Config(other.to_string()),
        })?;
    }
    Ok(Joined {
        spawner,
        events,
        live: welcome.census.live,
        exited: welcome.census.exited,
        started,
    })
}
