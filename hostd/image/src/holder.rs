//! A process that only holds: the FUSE connection outlives the process that serves it.
//!
//! The holder opens `/dev/fuse`, mounts, clones the descriptors, and starts a worker that gets them through a socket. It reads no
//! request itself. When the worker dies, the kernel keeps what it had not answered, for the descriptors are still open; the
//! next worker asks for all of it again. So a crash or an upgrade of the worker is a pause and not an error, and hostd may come
//! and go as it likes.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::net::UnixListener;

use crate::device::{self, Device, THREADS};
use crate::lazy_host::{Dirs, MEMORY_BYTES_MAX};
use crate::mount::MountConfig;
use crate::push::Pusher;
use crate::server::Server;
use crate::store::DomainStore;
use crate::{frames::Frames, kernel};

/// A worker that lives shorter than this is waited for longer each time.
const LIVES_LONG: Duration = Duration::from_secs(10);

/// Mounts the objects of a domain below `state_dir` and keeps a worker on them. `worker` gives the command of one; it is to
/// call [`work`]. Returns when the mount is gone, or when `worker` cannot be started at all.
///
/// # Errors
/// When the mount cannot be made, or no worker started.
pub fn hold(state_dir: &Path, domain: &str, mut worker: impl FnMut() -> Command) -> io::Result<()> {
    let dirs = Dirs::below(state_dir, domain);
    dirs.ready()?;
    let first = device::open()?;
    kernel::mount_fuse(&first, &dirs.fuse)?;
    let mut files = vec![first];
    while files.len() < THREADS {
        files.push(device::clone_device(&files[0])?);
    }
    let mut takes_over = false;
    let mut wait = Duration::from_millis(1);
    while kernel::is_mounted(&dirs.fuse) {
        let started = Instant::now();
        let (ours, theirs) = UnixStream::pair()?;
        let mut child = worker().stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
        send_files(&ours, &files, takes_over)?;
        child.wait()?;
        takes_over = true;
        if started.elapsed() > LIVES_LONG {
            wait = Duration::from_millis(1);
        } else {
            std::thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_secs(2));
        }
    }
    Ok(())
}

/// Serves the connection that a holder gave on standard input, until it ends.
///
/// # Errors
/// When there is no holder on standard input, or the cache cannot be used.
pub fn work(config: MountConfig) -> io::Result<()> {
    let (files, takes_over) = receive_files(io::stdin().as_fd())?;
    let at = DomainStore::new(config.store, &config.domain).map_err(io::Error::other)?;
    let dirs = Dirs::below(&config.state_dir, at.domain.name());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("images")
        .enable_all()
        .build()?;
    let frames_dir = config.cache_dir.join("frames").join(at.domain.name());
    let disk = crate::disk::DiskFrames::open(&frames_dir, config.cache_bytes_max, &at.domain)?;
    let frames = Frames::new(at, disk, MEMORY_BYTES_MAX, runtime.handle().clone());
    let server = Arc::new(Server::new(frames, dirs.images.clone()));
    let (device, threads) = Device::serve_all(files, &server, runtime.handle(), takes_over)?;
    if let Err(error) = device::raise_readahead(&dirs.fuse) {
        tracing::info!(%error, "reads of large files stay at 128 KiB");
    }
    let pusher = Arc::new(Pusher { server, device, fuse: dirs.fuse.clone() });
    let socket = dirs.control();
    let _ = fs::remove_file(&socket);
    let listener = {
        let _inside = runtime.enter();
        UnixListener::bind(&socket)?
    };
    runtime.spawn(crate::control::listen(listener, pusher));
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn send_files(socket: &UnixStream, files: &[File], takes_over: bool) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(THREADS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let byte = [u8::from(takes_over)];
    sendmsg(socket, &[io::IoSlice::new(&byte)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_files(socket: BorrowedFd<'_>) -> io::Result<(Vec<File>, bool)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(THREADS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            files.extend(fds.map(File::from));
        }
    }
    if files.is_empty() {
        return Err(io::Error::other(
            "no holder on standard input: the image server is not started by hand",
        ));
    }
    Ok((files, byte[0] != 0))
}

/// Where a worker's socket lies; a holder's worker is there when somebody answers.
#[must_use]
pub fn control_socket(state_dir: &Path, domain: &str) -> PathBuf {
    Dirs::below(state_dir, domain).control()
}
