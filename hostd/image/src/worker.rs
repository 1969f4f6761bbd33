//! The process that serves a holder's connection: it answers the kernel, and hostd's questions.
//!
//! It stays while hostd is there, or comes back within half a minute. Then it takes its mounts away, so that nothing is left
//! behind; roots of sandboxes that still run keep the connection alive, and it goes on serving them until the last one ends.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use tokio::net::UnixListener;

use crate::device::{self, Device, READAHEAD_KIB};
use crate::disk::DiskFrames;
use crate::frames::Frames;
use crate::holder::HeldConfig;
use crate::lazy_host::{Dirs, MEMORY_BYTES_MAX};
use crate::memory_group;
use crate::push::Pusher;
use crate::server::Server;
use crate::store::DomainStore;

/// How long hostd may be away.
const HOSTD_BACK: Duration = Duration::from_secs(30);

/// What is served, and for whom.
pub(crate) struct Worker {
    pub(crate) pusher: Arc<Pusher>,
    dirs: Dirs,
    /// Connections by which hostd says that it is there.
    leases: AtomicUsize,
}

impl Worker {
    /// hostd is there until what is given back is dropped.
    pub(crate) fn lease(self: &Arc<Self>) -> Lease {
        self.leases.fetch_add(1, Ordering::SeqCst);
        Lease(self.clone())
    }

    /// Takes the mounts away. What uses them goes on.
    pub(crate) async fn leave(&self) {
        let dirs = self.dirs.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _ = fs::remove_file(dirs.control());
            let cleared = dirs.clear();
            // From now on another holder may mount here.
            let _ = fs::remove_file(dirs.lock());
            cleared
        });
        if let Ok(Err(error)) = done.await {
            tracing::warn!(%error, "image mounts were left behind");
        }
    }

    async fn watch_leases(self: Arc<Self>) {
        let mut alone_since = Instant::now();
        while alone_since.elapsed() < HOSTD_BACK {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if self.leases.load(Ordering::SeqCst) > 0 {
                alone_since = Instant::now();
            }
        }
        self.leave().await;
    }
}

/// hostd's being there.
pub(crate) struct Lease(Arc<Worker>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.leases.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Serves until the connection ends.
pub(crate) fn work(
    config: &HeldConfig,
    store: Arc<dyn ObjectStore>,
    files: Vec<File>,
    takes_over: bool,
) -> io::Result<()> {
    let at = DomainStore::new(store, &config.domain).map_err(io::Error::other)?;
    // Before any thread: they go along.
    let group = memory_group::name(&config.state_dir, &config.domain);
    if let Err(error) = memory_group::enter(&group) {
        tracing::info!(%error, "the image server has no memory group of its own");
    }
    let dirs = Dirs::below(&config.state_dir, at.domain.name());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("images")
        .enable_all()
        .build()?;
    let frames_dir = config.cache_dir.join("frames").join(at.domain.name());
    let disk = DiskFrames::open(&frames_dir, config.cache_bytes_max, &at.domain)?;
    let frames = Frames::new(at, disk, MEMORY_BYTES_MAX, runtime.handle().clone());
    let scanned = frames.clone();
    // Beside the rest: whoever takes over answers at once.
    runtime.spawn_blocking(move || {
        if let Err(error) = scanned.scan_disk() {
            tracing::warn!(%error, "the frame cache was not read through");
        }
    });
    let server = Arc::new(Server::new(frames, dirs.images.clone()));
    let (device, threads) = Device::serve_all(files, &server, runtime.handle(), takes_over)?;
    if let Err(error) = device::set_readahead(&dirs.fuse, READAHEAD_KIB) {
        tracing::info!(%error, "reads of large files stay at 128 KiB");
    }
    let pusher = Pusher::new(server, device, dirs.fuse.clone(), runtime.handle().clone());
    let pusher = Arc::new(pusher);
    let listener = {
        let _inside = runtime.enter();
        let _ = fs::remove_file(dirs.control());
        UnixListener::bind(dirs.control())?
    };
    let worker = Arc::new(Worker { pusher, dirs, leases: AtomicUsize::new(0) });
    runtime.spawn(crate::control::listen(listener, worker.clone()));
    runtime.spawn(worker.watch_leases());
    for thread in threads {
        let _ = thread.join();
    }
    runtime.shutdown_background();
    memory_group::leave(&group);
    Ok(())
}
