//! Mount: gives what a sandbox's root is composed of, once an image a host.
//!
//! Callers of the same image wait for one mount. What they get is a list of directories for overlayfs, whatever stands behind
//! them, so that the box does not know which kind of mount a host has.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::ObjectStore;
use tokio::sync::OnceCell;
use wire::ImageId;

use crate::manifest::{ImageConfig, Manifest};
use crate::store::{DomainStore, ImageError};

/// What a mounter needs.
#[derive(Debug, Clone)]
pub struct MountConfig {
    /// For sockets and mount points. Private to hostd.
    pub state_dir: PathBuf,
    /// For what was fetched. Private to hostd; may be emptied when nothing is mounted.
    pub cache_dir: PathBuf,
    /// Bytes that the cache may hold; images in use stay beyond it.
    pub cache_bytes_max: u64,
    /// Where images are.
    pub store: Arc<dyn ObjectStore>,
    /// The trust domain whose images are mounted.
    pub domain: String,
}

/// How images are mounted on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountMode {
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

/// An image that is mounted. It stays so at least while this is held.
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

type Slot = Arc<OnceCell<Arc<MountedImage>>>;

/// Mounts the images of one trust domain on this host.
#[derive(Debug)]
pub struct Mounter {
    at: DomainStore,
    trees: PathBuf,
    cache_bytes_max: u64,
    slots: Mutex<HashMap<ImageId, Slot>>,
    mode: MountMode,
}

impl Mounter {
    /// Readies the directories, and clears what a crash left half done.
    ///
    /// Images of sandboxes that outlived the last hostd must be mounted again before any other, so that the cache knows
    /// that they are in use.
    ///
    /// # Errors
    /// [`ImageError::Host`] when the directories cannot be used.
    pub async fn start(config: MountConfig) -> Result<Self, ImageError> {
        let at = DomainStore::new(config.store, &config.domain)?;
        let trees = config.cache_dir.join("trees").join(at.domain.name());
        let dirs = [config.state_dir.clone(), trees.clone()];
        blocking("ready the cache", move || {
            dirs.iter().try_for_each(fs::create_dir_all)?;
            clear_half_done(&dirs[1])
        })
        .await?;
        let mode = MountMode::Unpacked { why: "lazy mounts are not built yet".to_owned() };
        Ok(Self {
            at,
            trees,
            cache_bytes_max: config.cache_bytes_max,
            slots: Mutex::new(HashMap::new()),
            mode,
        })
    }

    /// How images are mounted here, for `volley doctor`.
    #[must_use]
    pub fn mode(&self) -> &MountMode {
        &self.mode
    }

    /// The image that a name or an id says.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] when there is no such name.
    pub async fn resolve(&self, name_or_id: &str) -> Result<ImageId, ImageError> {
        self.at.resolve(name_or_id).await
    }

    /// The image, mounted. Mounts it if it is not; many callers of one image cause one mount.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] when it is not in the domain. After any error nothing is half mounted.
    pub async fn mount(&self, id: ImageId) -> Result<Arc<MountedImage>, ImageError> {
        let slot = self.slots().entry(id).or_default().clone();
        let mounted = slot.get_or_try_init(|| self.mount_now(id)).await;
        if mounted.is_err() {
            // Ids that do not exist must not fill the table.
            let mut slots = self.slots();
            if slots.get(&id).is_some_and(|slot| !slot.initialized()) {
                slots.remove(&id);
            }
        }
        mounted.cloned()
    }

    /// The image if it is mounted already: this never waits.
    #[must_use]
    pub fn mounted(&self, id: ImageId) -> Option<Arc<MountedImage>> {
        self.slots().get(&id).and_then(|slot| slot.get().cloned())
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<ImageId, Slot>> {
        // The table is whole between any two statements that hold the lock.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn mount_now(&self, id: ImageId) -> Result<Arc<MountedImage>, ImageError> {
        let manifest = self.at.manifest(id).await?;
        let tree = self.trees.join(id.to_string());
        if !fs::exists(&tree).unwrap_or(false) {
            self.make_room(manifest.totals.bytes).await;
            self.unpack(&manifest, &tree).await?;
        }
        // The sweeper goes by this date.
        let touched = tree.join("used");
        blocking("mark the image as used", move || fs::write(touched, b"")).await?;
        let layers = Layers { lower: vec![tree.join("root")], ..Layers::default() };
        Ok(Arc::new(MountedImage { id, config: manifest.config, layers }))
    }

    /// Writes the tree aside and renames it into place.
    async fn unpack(&self, manifest: &Manifest, tree: &Path) -> Result<(), ImageError> {
        let trees = self.trees.clone();
        let aside = blocking("make a directory", move || {
            tempfile::Builder::new().prefix(".half-").tempdir_in(trees)
        })
        .await?;
        let root = aside.path().join("root");
        fs::create_dir(&root).map_err(|e| ImageError::host("make a directory", e))?;
        crate::unpack::unpack(&self.at, manifest, &root).await?;
        let bytes = manifest.totals.bytes.to_string();
        let (from, to) = (aside.path().to_owned(), tree.to_owned());
        blocking("put the tree in place", move || {
            fs::write(from.join("bytes"), bytes)?;
            fs::rename(&from, to)
        })
        .await?;
        // It has another name now, and is not to be removed.
        let _ = aside.keep();
        Ok(())
    }

    /// Removes trees that nobody uses, the longest unused first, until so many bytes more have room.
    async fn make_room(&self, bytes: u64) {
        let in_use = |id: &str| {
            let id = id.parse::<ImageId>().ok();
            let slots = self.slots();
            id.and_then(|id| slots.get(&id).cloned()).is_some_and(|slot| {
                // One is the table's own; a slot without a value is being mounted.
                slot.get().is_none_or(|image| Arc::strong_count(image) > 1)
            })
        };
        let mut trees = list_trees(&self.trees);
        let mut sum: u64 = trees.iter().map(|tree| tree.bytes).sum();
        trees.sort_unstable_by_key(|tree| tree.used);
        for tree in trees {
            if sum.saturating_add(bytes) <= self.cache_bytes_max {
                break;
            }
            if in_use(&tree.id) {
                continue;
            }
            if let Ok(id) = tree.id.parse::<ImageId>() {
                self.slots().remove(&id);
            }
            // Renamed first: a tree half removed must not be found whole.
            let aside = self.trees.join(format!(".half-{}", tree.id));
            if fs::rename(self.trees.join(&tree.id), &aside).is_ok() {
                let _ = blocking("remove a tree", move || fs::remove_dir_all(aside)).await;
                sum = sum.saturating_sub(tree.bytes);
            }
        }
    }
}

struct TreeRow {
    id: String,
    bytes: u64,
    used: std::time::SystemTime,
}

fn list_trees(trees: &Path) -> Vec<TreeRow> {
    let Ok(entries) = fs::read_dir(trees) else { return Vec::new() };
    let row = |entry: fs::DirEntry| {
        let id = entry.file_name().into_string().ok()?;
        id.parse::<ImageId>().ok()?;
        let bytes = fs::read_to_string(entry.path().join("bytes")).ok()?.parse().ok()?;
        let used = fs::metadata(entry.path().join("used")).and_then(|m| m.modified());
        Some(TreeRow { id, bytes, used: used.unwrap_or(std::time::UNIX_EPOCH) })
    };
    entries.filter_map(|entry| row(entry.ok()?)).collect()
}

fn clear_half_done(trees: &Path) -> io::Result<()> {
    for entry in fs::read_dir(trees)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(".half-") {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, ImageError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(io::Error::other("the task was stopped")))
        .map_err(|e| ImageError::host(what, e))
}
