//! A process that only holds: the FUSE connection outlives the process that serves it, and both outlive hostd.
//!
//! The holder opens `/dev/fuse`, mounts, clones the descriptors, and starts a worker that gets them through a socket. It reads no
//! request itself. When the worker dies, the kernel keeps what it had not answered, for the descriptors are still open; the
//! next worker asks for all of it again. So a crash of the worker is a pause and not an error.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use rustix::fs::FlockOperation;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::device::{self, THREADS};
use crate::kernel;
use crate::lazy_host::Dirs;
use crate::memory_group;
use crate::mount::MountConfig;

/// The hidden first arguments.
const HOLDER: &str = "__image-holder";
const WORKER: &str = "__image-worker";

/// A worker that lives shorter than this is waited for longer each time.
const LIVES_LONG: Duration = Duration::from_secs(10);
const WAIT_MAX: Duration = Duration::from_secs(2);
/// Bytes of a holder's configuration.
const CONFIG_BYTES_MAX: usize = 16 << 10;

/// Opens the object store that a URL names.
pub type OpenStore = fn(&str) -> Result<Arc<dyn ObjectStore>, String>;

/// What holder and worker are told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HeldConfig {
    pub(crate) state_dir: PathBuf,
    pub(crate) cache_dir: PathBuf,
    pub(crate) cache_bytes_max: u64,
    pub(crate) domain: String,
    /// URL of the store. Its keys come through the environment.
    pub(crate) objects: String,
    /// Another worker served before.
    takes_over: bool,
}

impl HeldConfig {
    pub(crate) fn new(config: &MountConfig, objects: &str) -> Self {
        Self {
            state_dir: config.state_dir.clone(),
            cache_dir: config.cache_dir.clone(),
            cache_bytes_max: config.cache_bytes_max,
            domain: config.domain.clone(),
            objects: objects.to_owned(),
            takes_over: false,
        }
    }
}

/// Becomes an image holder or its worker if this process was started as one, and then never returns.
///
/// Call it first thing in `main` of every binary that runs hostd: `hostd_image::main_if_asked(open_store)`.
pub fn main_if_asked(open: OpenStore) {
    let asked = std::env::args_os().nth(1);
    let done = match asked.as_ref().and_then(|text| text.to_str()) {
        Some(HOLDER) => hold(),
        Some(WORKER) => receive(io::stdin().as_fd()).and_then(|(config, files)| {
            let store = open(&config.objects).map_err(io::Error::other)?;
            crate::worker::work(&config, store, files, config.takes_over)
        }),
        _ => return,
    };
    if let Err(error) = &done {
        // Standard error is what hostd's is.
        let _ = writeln!(io::stderr(), "volley {}: {error}", asked.unwrap_or_default().display());
    }
    std::process::exit(i32::from(done.is_err()));
}

/// Starts a holder. It is there when its worker's socket answers.
pub(crate) fn start(config: &HeldConfig) -> io::Result<()> {
    let bytes = serde_json::to_vec(config).map_err(io::Error::other)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("volley")
        .arg(HOLDER)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        // Signals for hostd's terminal are not for it.
        .process_group(0)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&bytes)?;
    }
    // Collected whenever it ends, so that it leaves no zombie.
    let thread = std::thread::Builder::new().name("holder-wait".to_owned()).stack_size(64 << 10);
    thread.spawn(move || drop(child.wait()))?;
    Ok(())
}

/// Mounts the objects of a domain, and keeps a worker on them until the mount is gone.
fn hold() -> io::Result<()> {
    let mut bytes = Vec::new();
    io::stdin().take(CONFIG_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    let mut config: HeldConfig = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
    let dirs = Dirs::below(&config.state_dir, &config.domain);
    // Kept to the end. Another holder's worker may only be away for a moment: its mounts must stay.
    let _lock = lock(&dirs)?;
    dirs.ready()?;
    let first = device::open()?;
    kernel::mount_fuse(&first, &dirs.fuse)?;
    let mut files = vec![first];
    while files.len() < THREADS {
        files.push(device::clone_device(&files[0])?);
    }
    let mut wait = Duration::from_millis(1);
    loop {
        let started = Instant::now();
        let (ours, theirs) = UnixStream::pair()?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("volley")
            .arg(WORKER)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        let sent = send(&ours, &config, &files);
        drop(ours);
        let ended = child.wait()?;
        sent?;
        // A worker that ends by itself saw the connection's end.
        if ended.success() {
            memory_group::remove(&memory_group::name(&config.state_dir, &config.domain));
            return Ok(());
        }
        // Without its directories no worker comes up any more: whoever took them away wants none.
        // (The mount below it must not be asked: nobody answers now.)
        if !dirs.control().parent().is_some_and(std::path::Path::exists) {
            return Err(io::Error::other("the state directory is gone"));
        }
        config.takes_over = true;
        if started.elapsed() > LIVES_LONG {
            wait = Duration::from_millis(1);
        } else {
            std::thread::sleep(wait);
            wait = (wait * 2).min(WAIT_MAX);
        }
    }
}

/// The right to mount below a state directory. A worker that leaves takes the file away, and with it the right.
fn lock(dirs: &Dirs) -> io::Result<File> {
    let path = dirs.lock();
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| io::Error::other("another image holder has this state directory"))?;
    Ok(file)
}

fn send(socket: &UnixStream, config: &HeldConfig, files: &[File]) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(THREADS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let bytes = serde_json::to_vec(config).map_err(io::Error::other)?;
    sendmsg(socket, &[io::IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<(HeldConfig, Vec<File>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(THREADS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; CONFIG_BYTES_MAX];
    let mut parts = [io::IoSliceMut::new(&mut bytes)];
    let got = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds.map(File::from));
        }
    }
    let config = serde_json::from_slice(&bytes[..got.bytes]).map_err(io::Error::other)?;
    Ok((config, files))
}
