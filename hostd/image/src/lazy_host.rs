//! The lazy mount on this host: one FUSE mount a domain, one EROFS mount an image.
//!
//! The metadata image is a file of the FUSE mount, so that EROFS itself is read piece by piece, and mounting a million files
//! costs what mounting ten does. At start all of it is tried on a small image of its own: a host on which any part fails
//! falls back to unpacking, and says why.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::runtime::Runtime;
use wire::ImageId;

use crate::control::{Control, Held, Question, Reply};
use crate::device::{self, Device, READAHEAD_KIB};
use crate::disk::DiskFrames;
use crate::frames::Frames;
use crate::holder::{self, HeldConfig};
use crate::index::Damaged;
use crate::kernel::{self, MetaBy};
use crate::manifest::ImageConfig;
use crate::metrics::ImageMetrics;
use crate::mount::{Layers, MountConfig};
use crate::push::{BootSummary, FirstRun, Pusher};
use crate::server::Server;
use crate::store::{DomainStore, ImageError};

/// Frames kept in memory, beside the kernel's page cache: enough that a run of small reads decompresses each frame once.
pub(crate) const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// Overlay options that the layers need.
pub(crate) const OVERLAY_OPTIONS: [(&str, &str); 2] = [("metacopy", "on"), ("redirect_dir", "on")];

/// The entry of an image's own command, and the pack for those that have none of their own.
pub(crate) const DEFAULT_ENTRY: &str = "default";

/// Threads that answer what waited for storage.
const RUNTIME_THREADS: usize = 2;

/// The lazy mounts of one domain.
pub(crate) struct LazyHost {
    dirs: Dirs,
    meta_by: MetaBy,
    link: Link,
}

/// Where the server is.
enum Link {
    /// In this process: when it ends, so do the mounts.
    Inside {
        pusher: Arc<Pusher>,
        /// Given back in the background: a runtime must not be dropped where others run.
        runtime: Option<Runtime>,
    },
    /// In a holder's worker, which stays as long as we say that we are there.
    Outside { control: Control, config: HeldConfig, _held: Held },
}

/// Where things are below the state directory.
#[derive(Debug, Clone)]
pub(crate) struct Dirs {
    /// The FUSE mount.
    pub(crate) fuse: PathBuf,
    /// A file an image that may be asked for.
    pub(crate) images: PathBuf,
    /// An EROFS mount an image.
    metas: PathBuf,
}

impl Dirs {
    pub(crate) fn below(state_dir: &Path, domain: &str) -> Self {
        let dir = state_dir.join(domain);
        Self { fuse: dir.join("fuse"), images: dir.join("images"), metas: dir.join("meta") }
    }

    /// Takes away what a server left that is no more, and makes what is missing.
    pub(crate) fn ready(&self) -> io::Result<()> {
        self.clear()?;
        [&self.fuse, &self.images, &self.metas].into_iter().try_for_each(fs::create_dir_all)?;
        // Anybody may read objects through the FUSE mount: nobody but hostd gets there.
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        self.fuse.parent().map_or(Ok(()), |dir| fs::set_permissions(dir, private))
    }

    /// Where a holder's worker listens.
    pub(crate) fn control(&self) -> PathBuf {
        self.fuse.with_file_name("control")
    }

    /// What the holder locks.
    pub(crate) fn lock(&self) -> PathBuf {
        self.fuse.with_file_name("lock")
    }

    pub(crate) fn clear(&self) -> io::Result<()> {
        if let Ok(entries) = fs::read_dir(&self.metas) {
            for entry in entries {
                let path = entry?.path();
                kernel::unmount(&path)?;
                fs::remove_dir(&path)?;
            }
        }
        kernel::unmount(&self.fuse)?;
        match fs::remove_dir_all(&self.images) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl LazyHost {
    /// Mounts the domain's objects and serves them.
    pub(crate) async fn start(
        at: DomainStore,
        state_dir: &Path,
        cache_dir: &Path,
        cache_bytes_max: u64,
        meta_by: MetaBy,
    ) -> Result<Self, ImageError> {
        let dirs = Dirs::below(state_dir, at.domain.name());
        let frames_dir = cache_dir.join("frames").join(at.domain.name());
        blocking("mount the objects", move || {
            dirs.ready()?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(RUNTIME_THREADS)
                .thread_name("images")
                .enable_all()
                .build()?;
            let disk = DiskFrames::open(&frames_dir, cache_bytes_max, &at.domain)?;
            disk.scan()?;
            let frames = Frames::new(at, disk, MEMORY_BYTES_MAX, runtime.handle().clone());
            let server = Arc::new(Server::new(frames, dirs.images.clone()));
            let file = device::open()?;
            kernel::mount_fuse(&file, &dirs.fuse)?;
            let device = Device::serve(file, &server, runtime.handle());
            let device = device.inspect_err(|_| {
                let _ = kernel::unmount(&dirs.fuse);
            })?;
            if let Err(error) = device::set_readahead(&dirs.fuse, READAHEAD_KIB) {
                tracing::info!(%error, "reads of large files stay at 128 KiB");
            }
            let handle = runtime.handle().clone();
            let pusher = Arc::new(Pusher::new(server, device, dirs.fuse.clone(), handle));
            let link = Link::Inside { pusher, runtime: Some(runtime) };
            Ok(Self { dirs, meta_by, link })
        })
        .await
    }

    /// Uses a holder: the one that is there, with the images that it has mounted, or a new one.
    pub(crate) async fn hold(
        config: &MountConfig,
        objects: &str,
        meta_by: MetaBy,
    ) -> Result<Self, ImageError> {
        let dirs = Dirs::below(&config.state_dir, &config.domain);
        let control = Control::new(&dirs.control());
        let config = HeldConfig::new(config, objects);
        if control.ask_now(&Question::Metrics).await.is_err() {
            start_holder(&config, &control).await?;
        }
        let held = Held::begin(&dirs.control())
            .map_err(|e| ImageError::host("keep the image holder", e))?;
        Ok(Self { dirs, meta_by, link: Link::Outside { control, config, _held: held } })
    }

    /// Starts another holder when there is neither a worker nor anybody who would replace it. What was mounted is gone then:
    /// `true`.
    pub(crate) async fn revive(&self) -> Result<bool, ImageError> {
        let Link::Outside { control, config, .. } = &self.link else { return Ok(false) };
        if control.ask_now(&Question::Metrics).await.is_ok() {
            return Ok(false);
        }
        start_holder(config, control).await?;
        Ok(true)
    }

    /// Opens an image, so that what is wrong with it is said in its own words and not as an errno of `mount`.
    async fn open(&self, id: ImageId, run: Option<FirstRun>) -> Result<ImageConfig, ImageError> {
        match &self.link {
            Link::Inside { pusher, .. } => {
                let pusher = pusher.clone();
                self.spawn(async move { pusher.open_for(id, run).await }).await?
            }
            Link::Outside { control, .. } => {
                match control.ask(&Question::Open { image: id.to_string(), run }).await? {
                    Reply::Opened(config) => Ok(config),
                    _ => Err(Damaged("an answer of the image server").into()),
                }
            }
        }
    }

    /// Runs on the server's runtime what is to be done in this process.
    async fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, ImageError> {
        let lost = |_| ImageError::host("ask the image server", io::Error::other("stopped"));
        match &self.link {
            Link::Inside { runtime: Some(runtime), .. } => runtime.spawn(work).await.map_err(lost),
            _ => Ok(work.await),
        }
    }

    /// Mounts an image's metadata.
    pub(crate) async fn mount(
        &self,
        id: ImageId,
        run: Option<FirstRun>,
    ) -> Result<(Layers, ImageConfig), ImageError> {
        let name = id.to_string();
        let (file, meta) = (self.dirs.images.join(&name), self.dirs.metas.join(&name));
        let source = self.dirs.fuse.join("m").join(&name);
        blocking("note the image", move || fs::write(file, b"")).await?;
        let mounted = match self.open(id, run).await {
            Ok(config) => {
                let (target, by) = (meta.clone(), self.meta_by);
                let mount = move || mount_once(&source, &target, by);
                blocking("mount the image's metadata", mount).await.map(|()| config)
            }
            Err(error) => Err(error),
        };
        let config = match mounted {
            Ok(config) => config,
            Err(error) => {
                self.unmount(id).await;
                return Err(error);
            }
        };
        let layers = Layers {
            lower: vec![meta],
            data_only: vec![self.dirs.fuse.join("o").join(&name)],
            options: OVERLAY_OPTIONS.to_vec(),
        };
        Ok((layers, config))
    }

    /// Takes an image away that no sandbox uses.
    pub(crate) async fn unmount(&self, id: ImageId) {
        let name = id.to_string();
        let (file, meta) = (self.dirs.images.join(&name), self.dirs.metas.join(&name));
        match &self.link {
            Link::Inside { pusher, .. } => pusher.server.close(id),
            Link::Outside { control, .. } => {
                let _ = control.ask(&Question::Close(name)).await;
            }
        }
        let done = blocking("unmount an image", move || {
            kernel::unmount(&meta)?;
            let _ = fs::remove_dir(&meta);
            fs::remove_file(&file)
        });
        if let Err(error) = done.await {
            tracing::debug!(%error, "an image was not there to unmount");
        }
    }

    /// What was counted; from another process when the server is there.
    pub(crate) async fn metrics(&self) -> Result<ImageMetrics, ImageError> {
        match &self.link {
            Link::Inside { pusher, .. } => Ok(pusher.server.metrics()),
            Link::Outside { control, .. } => match control.ask(&Question::Metrics).await? {
                Reply::Metrics(metrics) => Ok(metrics),
                _ => Err(Damaged("an answer of the image server").into()),
            },
        }
    }

    /// An entry's first run of an image that is mounted: brings its boot pack, if it has one, while others go on.
    pub(crate) fn run(&self, id: ImageId, run: FirstRun) {
        match &self.link {
            Link::Inside { pusher, .. } => drop(pusher.begin(id, run)),
            Link::Outside { control, .. } => ask_later(control, Question::Run(run)),
        }
    }

    /// What says later that a first run has ended.
    pub(crate) fn run_end(&self, image: String, entry: String) -> RunEnd {
        let end = match &self.link {
            Link::Inside { pusher, .. } => EndBy::Inside(pusher.clone()),
            Link::Outside { control, .. } => EndBy::Outside(control.clone()),
        };
        RunEnd { end, image, entry }
    }

    /// Starts to note what is read.
    pub(crate) async fn record(&self) -> Result<u64, ImageError> {
        match &self.link {
            Link::Inside { pusher, .. } => Ok(pusher.server.record()),
            Link::Outside { control, .. } => match control.ask(&Question::Record).await? {
                Reply::Recording(recording) => Ok(recording),
                _ => Err(Damaged("an answer of the image server").into()),
            },
        }
    }

    /// Makes what was read since the boot pack of an image's entry.
    pub(crate) async fn finish_record(
        &self,
        recording: u64,
        id: ImageId,
        entry: &str,
    ) -> Result<BootSummary, ImageError> {
        let entry = entry.to_owned();
        match &self.link {
            Link::Inside { pusher, .. } => {
                let Some(recorder) = pusher.server.recorded(recording) else {
                    return Ok(BootSummary::default());
                };
                let pusher = pusher.clone();
                self.spawn(async move { pusher.write(id, &entry, recorder).await }).await?
            }
            Link::Outside { control, .. } => {
                let question = Question::FinishRecord { recording, image: id.to_string(), entry };
                match control.ask(&question).await? {
                    Reply::Boot(summary) => Ok(summary),
                    _ => Ok(BootSummary::default()),
                }
            }
        }
    }
}

async fn start_holder(config: &HeldConfig, control: &Control) -> Result<(), ImageError> {
    let config = config.clone();
    blocking("start the image holder", move || holder::start(&config)).await?;
    control.ask(&Question::Metrics).await.map(drop)
}

/// Asks what nobody waits for the answer to.
fn ask_later(control: &Control, question: Question) {
    let control = control.clone();
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(async move {
            if let Err(error) = control.ask(&question).await {
                tracing::debug!(%error, "the image server was not told something");
            }
        });
    }
}

enum EndBy {
    Inside(Arc<Pusher>),
    Outside(Control),
}

/// Says, when it is dropped, that a first run has ended.
pub(crate) struct RunEnd {
    end: EndBy,
    image: String,
    entry: String,
}

impl Drop for RunEnd {
    fn drop(&mut self) {
        let (image, entry) = (std::mem::take(&mut self.image), std::mem::take(&mut self.entry));
        match &self.end {
            EndBy::Inside(pusher) => pusher.end(&image, &entry),
            EndBy::Outside(control) => ask_later(control, Question::EndRun { image, entry }),
        }
    }
}

/// Mounts unless that was done before, by a hostd that is no more.
fn mount_once(source: &Path, target: &Path, by: MetaBy) -> io::Result<()> {
    match fs::create_dir(target) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    if kernel::is_mounted(target) { Ok(()) } else { kernel::mount_erofs(source, target, by) }
}

impl Drop for LazyHost {
    fn drop(&mut self) {
        // What a holder serves goes on without us.
        let Link::Inside { runtime, .. } = &mut self.link else { return };
        if let Err(error) = self.dirs.clear() {
            tracing::warn!(%error, "image mounts were left behind");
        }
        if let Some(runtime) = runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, ImageError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(io::Error::other("the task was stopped")))
        .map_err(|e| ImageError::host(what, e))
}
