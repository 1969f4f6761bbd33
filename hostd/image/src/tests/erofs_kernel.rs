//! The EROFS writer against those who know the format: the kernel, and `fsck.erofs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use object_store::ObjectStore;

use super::support::{
    assert_same, is_root, make_varied, memory, noise, prepared, snapshot, snapshot_without_bytes,
};
use crate::store::DomainStore;
use crate::{Source, Summary, kernel};

/// Unmounts when a test ends, however it ends.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        kernel::unmount(self.0).unwrap();
    }
}

async fn write_meta(store: &Arc<dyn ObjectStore>, summary: &Summary, to: &Path) {
    let at = DomainStore::new(store.clone(), "test").unwrap();
    let manifest = at.manifest(summary.id).await.unwrap();
    fs::write(to, at.blob(&manifest, &manifest.meta).await.unwrap()).unwrap();
}

fn cannot_mount() -> bool {
    let cannot = !is_root() || !kernel::has_filesystem("erofs");
    if cannot {
        println!("skipped: needs root and a kernel with EROFS");
    }
    cannot
}

/// Prepares a directory, and compares what the kernel shows of its metadata.
async fn check(root: &Path, dir: &Path) {
    let store = memory();
    let summary = prepared(&store, "x", Source::RootfsDir(root.to_owned())).await;
    let (image, target) = (dir.join("meta.erofs"), dir.join("mounted"));
    write_meta(&store, &summary, &image).await;
    fs::create_dir(&target).unwrap();
    fsck(&image);
    kernel::mount_erofs(&image, &target, kernel::MetaBy::File).unwrap();
    let _mounted = Mounted(&target);
    let want = snapshot_without_bytes(root);
    assert_same(&want, &hide_our_xattrs(snapshot_without_bytes(&target)));
    assert_eq!(summary.files, inodes(&want) as u64);
    names_are_found(root, &target);
}

/// A listing reads a directory through; a lookup searches it.
fn names_are_found(root: &Path, target: &Path) {
    for path in snapshot_without_bytes(root).keys() {
        let path = Path::new(std::ffi::OsStr::new(std::str::from_utf8(path).unwrap()));
        assert!(fs::symlink_metadata(target.join(path)).is_ok(), "{}", path.display());
    }
    assert!(fs::symlink_metadata(target.join("no such name")).is_err());
}

fn inodes(all: &BTreeMap<Vec<u8>, String>) -> usize {
    let mut seen = std::collections::HashSet::new();
    let first = |(path, line): (&Vec<u8>, &String)| {
        let with = line.split(" with ").nth(1).map(str::to_owned);
        with.unwrap_or_else(|| path.escape_ascii().to_string())
    };
    all.iter().map(first).filter(|first| seen.insert(first.clone())).count()
}

fn hide_our_xattrs(mut all: BTreeMap<Vec<u8>, String>) -> BTreeMap<Vec<u8>, String> {
    for line in all.values_mut() {
        let kept: Vec<&str> =
            line.split(' ').filter(|word| !word.starts_with("trusted.overlay.")).collect();
        *line = kept.join(" ");
    }
    all
}

fn fsck(image: &Path) {
    match Command::new("fsck.erofs").arg(image).output() {
        Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr)),
        Err(error) => println!("skipped: fsck.erofs: {error}"),
    }
}

#[tokio::test]
async fn the_kernel_shows_a_varied_tree() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    make_varied(&root);
    check(&root, dir.path()).await;
}

#[tokio::test]
async fn the_kernel_shows_large_directories_deep_paths_and_hardlink_forests() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    // Directories whose entries just fill a block, just pass it, and need many; and names around `.` and `..`.
    for (name, count, len) in [("a", 1u32, 1), ("b", 280, 10), ("c", 340, 200), ("d", 5000, 3)] {
        fs::create_dir_all(root.join(name)).unwrap();
        for i in 0..count {
            let name = root.join(name).join(format!("{i:0len$}"));
            if i % 3 == 0 { fs::create_dir(name).unwrap() } else { fs::write(name, "x").unwrap() }
        }
    }
    for n in 0..130 {
        let dir = root.join("edges").join(n.to_string());
        fs::create_dir_all(&dir).unwrap();
        (0..n).for_each(|i| fs::write(dir.join(format!("{i:019}")), "").unwrap());
    }
    for name in ["!", "-", "...", ".a", "0", "~", "\u{fc}"] {
        fs::write(root.join(name), name).unwrap();
    }
    fs::create_dir_all(root.join("deep/".repeat(300))).unwrap();
    for i in 0..40 {
        let first = root.join(format!("a/f{i}"));
        fs::write(&first, noise(i, 3000)).unwrap();
        (0..i).for_each(|n| fs::hard_link(&first, root.join(format!("b/link-{i}-{n}"))).unwrap());
    }
    check(&root, dir.path()).await;
}

#[tokio::test]
async fn the_kernel_shows_files_of_many_gigabytes() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    for (name, size) in [("a", (5u64 << 30) + 3), ("b", 300 << 30), ("c", 4 << 30), ("d", 4097)] {
        fs::File::create(root.join(name)).unwrap().set_len(size).unwrap();
    }
    check(&root, dir.path()).await;
}

#[tokio::test]
async fn a_loop_device_serves_older_kernels() {
    if cannot_mount() || !Path::new("/dev/loop-control").exists() {
        println!("skipped: needs loop devices");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("small"), "in the metadata itself").unwrap();
    let store = memory();
    let summary = prepared(&store, "x", Source::RootfsDir(root.clone())).await;
    let (image, target) = (dir.path().join("meta.erofs"), dir.path().join("mounted"));
    write_meta(&store, &summary, &image).await;
    fs::create_dir(&target).unwrap();
    if let Err(error) = kernel::mount_erofs(&image, &target, kernel::MetaBy::Loop) {
        println!("skipped: loop devices do not work here: {error}");
        return;
    }
    let _mounted = Mounted(&target);
    assert_same(&snapshot(&root), &snapshot(&target));
}
