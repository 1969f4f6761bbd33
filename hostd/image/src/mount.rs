//! Mount: gives what a sandbox's root is composed of, once an image a host.
//!
//! Callers of the same image wait for one mount. What they get is a list of directories for overlayfs, whatever stands behind
//! them, so that the box does not know which kind of mount a host has.
//!
//! Longer than 500 lines: a third of it is what callers see, whose documentation is best read in one place.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use wire::ImageId;

use crate::lazy_host::{DEFAULT_ENTRY, LazyHost, RunEnd, blocking};
use crate::manifest::ImageConfig;
use crate::metrics::ImageMetrics;
use crate::push::{BootSummary, FirstRun};
use crate::store::{DomainStore, ImageError};
use crate::unpacked::UnpackedHost;

/// What a mounter needs.
#[derive(Debug, Clone)]
pub struct MountConfig {
    /// For mount points. Private to hostd.
    pub state_dir: PathBuf,
    /// For what was fetched. Private to hostd; may be emptied when nothing is mounted.
    pub cache_dir: PathBuf,
    /// Bytes that the cache may hold. Unpacked images that are in use stay beyond it.
    pub cache_bytes_max: u64,
    /// Where images are.
    pub store: Arc<dyn ObjectStore>,
    /// The trust domain whose images are mounted.
    pub domain: String,
    /// How, where that is not left to the self-check.
    pub by: MountBy,
}

/// How images are to be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountBy {
    /// The first of the ways below that works on this host.
    #[default]
    Auto,
    /// Lazily, the metadata mounted as a file: Linux 6.12 and later.
    File,
    /// Lazily, the metadata behind a loop device.
    Loop,
    /// Unpacked once a host.
    Unpack,
}

/// What is run of an image, as far as images care: who runs the same reads the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Names the boot pack: see [`Run::of`].
    entry: String,
    /// A boot pack may be written if this host is the first to run it, or if the one that is there misses much.
    record: bool,
}

impl Run {
    /// The run of a command; none means the image's own.
    #[must_use]
    pub fn of(command: &[String], record: bool) -> Self {
        let entry = if command.is_empty() {
            DEFAULT_ENTRY.to_owned()
        } else {
            let mut hasher = blake3::Hasher::new();
            for word in command {
                hasher.update(&(word.len() as u64).to_le_bytes()).update(word.as_bytes());
            }
            format!("run-{}", crate::id::to_hex(&hasher.finalize().as_bytes()[..8]))
        };
        Self { entry, record }
    }

    /// The name of its boot pack.
    #[must_use]
    pub fn entry(&self) -> &str {
        &self.entry
    }
}

/// The first run of an entry on this host. Drop it when the run has ended: until then, and for ten seconds at most, what
/// it reads is noted.
pub struct FirstRunGuard {
    _end: RunEnd,
}

impl std::fmt::Debug for FirstRunGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FirstRunGuard")
    }
}

/// Who serves the objects of lazy images.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Serving {
    /// This process: when it ends, so do the mounts. For tools and tests.
    #[default]
    Inside,
    /// A process of its own, which this one starts or finds: sandboxes outlive hostd. The binary must call
    /// [`crate::main_if_asked`] first thing.
    Holder {
        /// URL of the store, for the holder to open it.
        objects: String,
    },
    /// Nobody: images are unpacked even where lazy mounts would work.
    Unpack,
}

/// How images are mounted on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountMode {
    /// Lazily: FUSE objects below EROFS metadata.
    Lazy,
    /// The same with the metadata behind a loop device, and why.
    LazyByLoop {
        /// What was missing for the way before.
        why: String,
    },
    /// Unpacked once a host, and why not lazily.
    Unpacked {
        /// What was missing.
        why: String,
    },
}

/// What overlayfs composes a root of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layers {
    /// Ordinary lower directories (`lowerdir+`), the topmost first. Each may be cloned and id-mapped.
    pub lower: Vec<PathBuf>,
    /// Data-only lower directories (`datadir+`), below those.
    pub data_only: Vec<PathBuf>,
    /// Overlay options that they need: name and value.
    pub options: Vec<(&'static str, &'static str)>,
}

/// An image that is mounted. It stays so at least while this is held: hold it as long as a sandbox runs on it.
#[derive(Debug)]
pub struct MountedImage {
    id: ImageId,
    config: ImageConfig,
    layers: Layers,
}

impl MountedImage {
    /// Which image.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// How to start what is in it.
    #[must_use]
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// What to compose its root of.
    #[must_use]
    pub fn layers(&self) -> &Layers {
        &self.layers
    }
}

/// Entries that are remembered to have been run; at the bound all are forgotten, and their packs are looked for again.
const RUNS_MAX: usize = 4_096;

type Slot = Arc<OnceCell<Arc<MountedImage>>>;

enum Host {
    Lazy(LazyHost),
    Unpacked(UnpackedHost),
}

/// Mounts the images of one trust domain on this host.
pub struct Mounter {
    at: DomainStore,
    host: Host,
    slots: Mutex<HashMap<ImageId, Slot>>,
    mode: MountMode,
    /// Entries that were run here before.
    runs: Mutex<HashSet<(ImageId, String)>>,
    /// Tells this host's notes from others'.
    host_note: String,
}

impl std::fmt::Debug for Mounter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounter")
            .field("domain", &self.at.domain.name())
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl Mounter {
    /// Readies the directories, and clears what a crash left half done. Images are unpacked: lazy mounts need somebody who
    /// serves them, see [`Mounter::start_with`].
    ///
    /// Images of sandboxes that outlived the last hostd must be mounted again before any other, so that the cache knows
    /// that they are in use.
    ///
    /// # Errors
    /// [`ImageError::Host`] when the directories cannot be used.
    pub async fn start(config: MountConfig) -> Result<Self, ImageError> {
        Self::start_with(config, Serving::Unpack).await
    }

    /// The same, with the objects of lazy images served by whom `serving` says, if this host can mount lazily: that is tried
    /// first, and [`Mounter::mode`] says what came of it.
    ///
    /// # Errors
    /// [`ImageError::Host`] when the directories cannot be used.
    pub async fn start_with(config: MountConfig, serving: Serving) -> Result<Self, ImageError> {
        let at = DomainStore::new(config.store.clone(), &config.domain)?;
        let dirs = [config.state_dir.clone(), config.cache_dir.clone()];
        blocking("make hostd's directories", move || {
            dirs.iter().try_for_each(std::fs::create_dir_all)
        })
        .await?;
        let (state, cache, max) = (&config.state_dir, &config.cache_dir, config.cache_bytes_max);
        let lazy = if serving == Serving::Unpack || config.by == MountBy::Unpack {
            Err("nobody asked for lazy mounts".to_owned())
        } else {
            crate::self_check::lazy_mounts(state, config.by).await
        };
        let lazy = match lazy {
            Err(why) => Err(why),
            Ok((by, mode)) => {
                let host = match &serving {
                    Serving::Holder { objects } => LazyHost::hold(&config, objects, by).await,
                    _ => LazyHost::start(at.clone(), state, cache, max, by).await,
                };
                host.map(|host| (host, mode)).map_err(|e| e.to_string())
            }
        };
        let (host, mode) = match lazy {
            Ok((host, mode)) => (Host::Lazy(host), mode),
            Err(why) if matches!(config.by, MountBy::File | MountBy::Loop) => {
                return Err(ImageError::host("mount lazily as asked", std::io::Error::other(why)));
            }
            Err(why) => {
                tracing::warn!(%why, "images are unpacked on this host");
                let host = UnpackedHost::start(at.clone(), cache, max).await?;
                (Host::Unpacked(host), MountMode::Unpacked { why })
            }
        };
        let host_note = host_note(&config.state_dir);
        let (slots, runs) = (Mutex::default(), Mutex::default());
        Ok(Self { at, host, slots, mode, runs, host_note })
    }

    /// How images are mounted here, for `volley doctor`.
    #[must_use]
    pub fn mode(&self) -> &MountMode {
        &self.mode
    }

    /// What was counted so far; all zeros where images are unpacked.
    ///
    /// # Errors
    /// When the holder's server does not answer.
    pub async fn metrics(&self) -> Result<ImageMetrics, ImageError> {
        match &self.host {
            Host::Lazy(host) => host.metrics().await,
            Host::Unpacked(_) => Ok(ImageMetrics::default()),
        }
    }

    /// Looks that the holder's server is there, and starts another holder when both have died. Sandboxes on the images of
    /// the dead one read errors from then on; new ones have the images mounted anew.
    ///
    /// # Errors
    /// When none can be started.
    pub async fn revive(&self) -> Result<(), ImageError> {
        let Host::Lazy(host) = &self.host else { return Ok(()) };
        if host.revive().await? {
            tracing::error!(
                "the image holder was gone, and its mounts with it: another was started"
            );
            self.slots().clear();
            self.runs.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        Ok(())
    }

    /// The image that a name or an id says.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] when there is no such name.
    pub async fn resolve(&self, name_or_id: &str) -> Result<ImageId, ImageError> {
        self.at.resolve(name_or_id).await
    }

    /// The image, mounted. Mounts it if it is not; many callers of one image cause one mount. The boot pack of its own
    /// command is brought.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] when it is not in the domain. After any error nothing is half mounted.
    pub async fn mount(&self, id: ImageId) -> Result<Arc<MountedImage>, ImageError> {
        Ok(self.mount_to_run(id, &Run::of(&[], false)).await?.0)
    }

    /// The same for a run. When it is the entry's first here, its boot pack is brought, and there is a guard to drop when
    /// the run has ended.
    ///
    /// # Errors
    /// As above.
    pub async fn mount_to_run(
        &self,
        id: ImageId,
        run: &Run,
    ) -> Result<(Arc<MountedImage>, Option<FirstRunGuard>), ImageError> {
        if let Some(mounted) = self.mounted(id) {
            return Ok((mounted, self.first_run(id, run)));
        }
        let (mounted, cold) = self.mount_slot(id, Some(run)).await?;
        if !cold {
            return Ok((mounted, self.first_run(id, run)));
        }
        self.note_run(id, run);
        Ok((mounted, self.guard(id, run)))
    }

    /// The same for a sandbox that runs already: nothing is brought.
    ///
    /// # Errors
    /// As above.
    pub async fn mount_again(&self, id: ImageId) -> Result<Arc<MountedImage>, ImageError> {
        Ok(self.mount_slot(id, None).await?.0)
    }

    /// The image, and whether this call mounted it.
    async fn mount_slot(
        &self,
        id: ImageId,
        run: Option<&Run>,
    ) -> Result<(Arc<MountedImage>, bool), ImageError> {
        let slot = self.slots().entry(id).or_default().clone();
        let mut cold = false;
        let mount = || {
            cold = true;
            self.mount_now(id, run)
        };
        let mounted = slot.get_or_try_init(mount).await;
        if mounted.is_err() {
            // Ids that do not exist must not fill the table.
            let mut slots = self.slots();
            if slots.get(&id).is_some_and(|slot| !slot.initialized()) {
                slots.remove(&id);
            }
        }
        Ok((mounted.cloned()?, cold))
    }

    /// Whether a run's entry is new here; notes that it is not any more.
    fn note_run(&self, id: ImageId, run: &Run) -> bool {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if runs.len() >= RUNS_MAX {
            runs.clear();
        }
        runs.insert((id, run.entry.clone()))
    }

    /// The first run of an entry of an image that is mounted.
    fn first_run(&self, id: ImageId, run: &Run) -> Option<FirstRunGuard> {
        let Host::Lazy(host) = &self.host else { return None };
        if !self.note_run(id, run) {
            return None;
        }
        host.run(id, told(id, run, false));
        // What is in the page cache is not asked for, so that nothing is noted that a guard could end.
        None
    }

    fn guard(&self, id: ImageId, run: &Run) -> Option<FirstRunGuard> {
        match &self.host {
            Host::Lazy(host) => {
                Some(FirstRunGuard { _end: host.run_end(id.to_string(), run.entry.clone()) })
            }
            Host::Unpacked(_) => None,
        }
    }

    /// The image if it is mounted already: this never waits.
    #[must_use]
    pub fn mounted(&self, id: ImageId) -> Option<Arc<MountedImage>> {
        self.slots().get(&id).and_then(|slot| slot.get().cloned())
    }

    /// Starts to note what is read of all images. Best on a host that has read nothing of the image yet: what is in the page
    /// cache is not asked for. Gives the number of the recording.
    ///
    /// # Errors
    /// When the holder's server does not answer.
    pub async fn record(&self) -> Result<u64, ImageError> {
        match &self.host {
            Host::Lazy(host) => host.record().await,
            Host::Unpacked(_) => Ok(0),
        }
    }

    /// Makes what was read of an image since [`Mounter::record`] its boot pack: of the command that `entry` names, or of the
    /// image's own when it is `None`.
    ///
    /// # Errors
    /// [`ImageError::Store`] when it cannot be written; the image is as good as before.
    pub async fn finish_record(
        &self,
        recording: u64,
        id: ImageId,
        entry: Option<&str>,
    ) -> Result<BootSummary, ImageError> {
        match &self.host {
            Host::Lazy(host) => {
                host.finish_record(recording, id, entry.unwrap_or(DEFAULT_ENTRY)).await
            }
            Host::Unpacked(_) => Ok(BootSummary::default()),
        }
    }

    /// Notes in the store that this host uses an image, so that the sweeper leaves it although no name has it any more. Done
    /// at each mount, and holds for a day: a host calls [`Mounter::renew_uses`] every few hours.
    ///
    /// # Errors
    /// [`ImageError::Store`] when the note could not be written.
    pub async fn note_use(&self, id: ImageId) -> Result<(), ImageError> {
        write_note(&self.at, id, &self.host_note).await
    }

    /// Notes all images that are mounted: see [`Mounter::note_use`].
    ///
    /// # Errors
    /// [`ImageError::Store`] at the first note that could not be written.
    pub async fn renew_uses(&self) -> Result<(), ImageError> {
        let ids: Vec<ImageId> = self.slots().keys().copied().collect();
        for id in ids {
            self.note_use(id).await?;
        }
        Ok(())
    }

    /// Unmounts images that nobody holds until at most `keep` are mounted. What was fetched of them stays in the cache.
    pub async fn unmount_unused(&self, keep: usize) {
        let unused: Vec<ImageId> = {
            let mut slots = self.slots();
            let over = slots.len().saturating_sub(keep);
            let unused = slots.iter().filter(|(_, slot)| is_unused(slot)).map(|(id, _)| *id);
            let unused: Vec<_> = unused.take(over).collect();
            unused.iter().for_each(|id| {
                slots.remove(id);
            });
            unused
        };
        if let Host::Lazy(host) = &self.host {
            for id in unused {
                host.unmount(id).await;
            }
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<ImageId, Slot>> {
        // The table is whole between any two statements that hold the lock.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn mount_now(
        &self,
        id: ImageId,
        run: Option<&Run>,
    ) -> Result<Arc<MountedImage>, ImageError> {
        let (layers, config) = match &self.host {
            Host::Lazy(host) => host.mount(id, run.map(|run| told(id, run, true))).await?,
            Host::Unpacked(host) => {
                let manifest = self.at.manifest(id).await?;
                let in_use = |id| self.keep_if_used(id);
                (host.mount(id, &manifest, &in_use).await?, manifest.config)
            }
        };
        let (at, note) = (self.at.clone(), self.host_note.clone());
        // Beside the mount: nobody waits for a note.
        tokio::spawn(async move {
            if let Err(error) = write_note(&at, id, &note).await {
                tracing::warn!(%error, image = %id, "the store was not told that an image is used");
            }
        });
        Ok(Arc::new(MountedImage { id, config, layers }))
    }

    /// Whether somebody holds the image. If not, it is not mounted any more: the caller removes it.
    fn keep_if_used(&self, id: ImageId) -> bool {
        let mut slots = self.slots();
        let used = slots.get(&id).is_some_and(|slot| !is_unused(slot));
        if !used {
            slots.remove(&id);
        }
        used
    }
}

/// What the server is told of a run.
fn told(id: ImageId, run: &Run, cold: bool) -> FirstRun {
    FirstRun { image: id.to_string(), entry: run.entry.clone(), cold, record: run.record }
}

async fn write_note(at: &DomainStore, id: ImageId, host: &str) -> Result<(), ImageError> {
    let note = crate::store::use_path(&at.domain, id, host);
    let put = at.store.put(&note, object_store::PutPayload::default()).await;
    put.map(drop).map_err(ImageError::Store)
}

/// A name for this host's notes: the same after a restart, and another on another host.
fn host_note(state_dir: &std::path::Path) -> String {
    let machine = std::fs::read("/etc/machine-id").unwrap_or_default();
    let name = rustix::system::uname().nodename().to_bytes().to_vec();
    let all = [&machine, &name, state_dir.as_os_str().as_encoded_bytes()].concat();
    crate::id::to_hex(&blake3::hash(&all).as_bytes()[..16])
}

/// Mounted, and held by the table alone. One that is being mounted is in use.
fn is_unused(slot: &Slot) -> bool {
    slot.get().is_some_and(|image| Arc::strong_count(image) == 1)
}
