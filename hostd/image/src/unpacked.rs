//! Images as directories: unpacked once a host, evicted when there is no room. Stands behind the same interface as the lazy
//! mount, where that cannot be had.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use wire::ImageId;

use crate::lazy_host::blocking;
use crate::manifest::Manifest;
use crate::mount::Layers;
use crate::store::{DomainStore, ImageError};

/// The trees of one domain on this host.
#[derive(Debug)]
pub(crate) struct UnpackedHost {
    at: DomainStore,
    trees: PathBuf,
    bytes_max: u64,
}

impl UnpackedHost {
    /// Readies the directory, and clears what a crash left half done.
    pub(crate) async fn start(
        at: DomainStore,
        cache_dir: &Path,
        bytes_max: u64,
    ) -> Result<Self, ImageError> {
        let trees = cache_dir.join("trees").join(at.domain.name());
        let dir = trees.clone();
        blocking("ready the cache", move || {
            fs::create_dir_all(&dir)?;
            clear_half_done(&dir)
        })
        .await?;
        Ok(Self { at, trees, bytes_max })
    }

    /// The image's tree, unpacked now if it is not there.
    pub(crate) async fn mount(
        &self,
        id: ImageId,
        manifest: &Manifest,
        in_use: &dyn Fn(ImageId) -> bool,
    ) -> Result<Layers, ImageError> {
        let tree = self.trees.join(id.to_string());
        if !fs::exists(&tree).unwrap_or(false) {
            self.make_room(manifest.totals.bytes, in_use).await;
            self.unpack(manifest, &tree).await?;
        }
        // Eviction goes by this date.
        let touched = tree.join("used");
        blocking("mark the image as used", move || fs::write(touched, b"")).await?;
        Ok(Layers { lower: vec![tree.join("root")], ..Layers::default() })
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
    async fn make_room(&self, bytes: u64, in_use: &dyn Fn(ImageId) -> bool) {
        let mut trees = list_trees(&self.trees);
        let mut sum: u64 = trees.iter().map(|tree| tree.bytes).sum();
        trees.sort_unstable_by_key(|tree| tree.used);
        for tree in trees {
            if sum.saturating_add(bytes) <= self.bytes_max {
                break;
            }
            if in_use(tree.id) {
                continue;
            }
            // Renamed first: a tree half removed must not be found whole.
            let aside = self.trees.join(format!(".half-{}", tree.id));
            if fs::rename(self.trees.join(tree.id.to_string()), &aside).is_ok() {
                let _ = blocking("remove a tree", move || fs::remove_dir_all(aside)).await;
                sum = sum.saturating_sub(tree.bytes);
            }
        }
    }
}

struct TreeRow {
    id: ImageId,
    bytes: u64,
    used: std::time::SystemTime,
}

fn list_trees(trees: &Path) -> Vec<TreeRow> {
    let Ok(entries) = fs::read_dir(trees) else { return Vec::new() };
    let row = |entry: fs::DirEntry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
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
