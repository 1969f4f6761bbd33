//! The `/dev/fuse` side of a server: threads that read requests, and answers that may come later.
//!
//! What can be answered at once is answered by the thread that read it. What waits for storage goes to the runtime, so that
//! a slow GET stops nobody else.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::Bytes;
use futures::FutureExt;
use tokio::runtime::Handle;

use crate::fuse_wire::{Answer, REQUEST_BYTES_MAX, Request, resend, store_head};
use crate::server::Server;

/// Threads that read requests: two keep two cores busy, and each has a queue of its own in the kernel.
pub(crate) const THREADS: usize = 2;

/// Opens the device. It belongs to no mount yet.
pub(crate) fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/fuse")
}

/// A second descriptor of the connection that `device` is, with a queue of its own.
pub(crate) fn clone_device(device: &File) -> io::Result<File> {
    const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500_u32 as libc::Ioctl;
    let clone = open()?;
    let fd = u32::try_from(device.as_raw_fd()).unwrap_or(u32::MAX);
    // SAFETY: the kernel reads four bytes through the pointer, which is to a local that lives for the whole call; both
    // descriptors are open for as long.
    let done = unsafe { libc::ioctl(clone.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const fd) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(clone) }
}

/// A connection that is being served.
#[derive(Clone)]
pub(crate) struct Device {
    file: Arc<File>,
}

impl Device {
    /// Starts to serve a connection that was just made.
    pub(crate) fn serve(device: File, server: &Arc<Server>, runtime: &Handle) -> io::Result<Self> {
        let mut files = vec![device];
        while files.len() < THREADS {
            files.push(clone_device(&files[0])?);
        }
        Ok(Self::serve_all(files, server, runtime, false)?.0)
    }

    /// Starts to serve, a thread a descriptor. `takes_over` says that another served it before, whose open requests are to
    /// come again. The threads end with the connection.
    pub(crate) fn serve_all(
        files: Vec<File>,
        server: &Arc<Server>,
        runtime: &Handle,
        takes_over: bool,
    ) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        let first = files.first().ok_or_else(|| io::Error::other("no descriptor"))?;
        let this = Self { file: first.clone() };
        let mut threads = Vec::new();
        for (n, file) in files.into_iter().enumerate() {
            let (server, runtime) = (server.clone(), runtime.clone());
            let thread = std::thread::Builder::new().name(format!("fuse-{n}"));
            threads.push(thread.spawn(move || serve(&file, &server, &runtime))?);
        }
        if takes_over {
            (&*this.file).write_all(&resend())?;
        }
        Ok((this, threads))
    }

    /// Puts bytes into a node's page cache. That the kernel does not know the node is no error: `false`.
    pub(crate) fn push(&self, node: u64, at: u64, bytes: &[u8]) -> io::Result<bool> {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let head = store_head(node, at, len);
        let parts = [IoSlice::new(&head), IoSlice::new(bytes)];
        match (&*self.file).write_vectored(&parts) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn serve(file: &Arc<File>, server: &Arc<Server>, runtime: &Handle) {
    // Timers of the runtime are made while a request is looked at here.
    let _inside = runtime.enter();
    let mut buffer = vec![0; REQUEST_BYTES_MAX];
    loop {
        let len = match (&**file).read(&mut buffer) {
            Ok(len) => len,
            Err(e) => match e.raw_os_error() {
                // Withdrawn before it was read, a signal, or nothing there after all.
                Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => continue,
                // The mount is gone.
                _ => return,
            },
        };
        let Some(request) = Request::parse(&buffer[..len]) else { continue };
        let unique = request.unique;
        let (answering, replying) = (server.clone(), file.clone());
        let mut answer = async move { answering.answer(&request).await }.boxed();
        if let Some(answer) = answer.as_mut().now_or_never() {
            reply(file, unique, &answer);
            continue;
        }
        server.begin_waiting(unique);
        let server = server.clone();
        runtime.spawn(async move {
            let answer = answer.await;
            reply(&replying, unique, &answer);
            server.end_waiting(unique);
        });
    }
}

fn reply(mut file: &File, unique: u64, answer: &Answer) {
    let head = answer.head(unique);
    let mut parts = vec![IoSlice::new(&head)];
    match answer {
        Answer::Silence => return,
        Answer::Error(_) => {}
        Answer::Head(bytes) => parts.push(IoSlice::new(bytes)),
        Answer::Data(bytes) => parts.extend(bytes.iter().map(|b: &Bytes| IoSlice::new(b))),
    }
    // ENOENT: the asker was killed meanwhile. Anything else means that the mount is gone, which `read` finds as well.
    let _ = file.write_vectored(&parts);
}

/// As far as one request reaches.
pub(crate) const READAHEAD_KIB: u32 = 1024;

/// Says how far the kernel reads ahead; 128 KiB if nobody says.
pub(crate) fn set_readahead(mountpoint: &Path, kib: u32) -> io::Result<()> {
    let stat = rustix::fs::stat(mountpoint)?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let place = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(place, kib.to_string())
}
