//! The lazy mount against an ordinary unpack, and against storage that fails.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::support::{assert_same, is_root, make_varied, memory, mounter, prepared, snapshot};
use crate::{Layers, MountMode, Mounter, Source, kernel};

/// An overlay for as long as a test looks at it.
pub(super) struct Overlay<'a>(&'a Path);

impl<'a> Overlay<'a> {
    pub(super) fn mount(layers: &Layers, target: &'a Path) -> Self {
        fs::create_dir_all(target).unwrap();
        kernel::mount_overlay(layers, target).unwrap();
        Self(target)
    }
}

impl Drop for Overlay<'_> {
    fn drop(&mut self) {
        kernel::unmount(self.0).unwrap();
    }
}

/// A mounter that mounts lazily, or the reason why there is none here.
pub(super) fn is_lazy(mounter: &Mounter) -> bool {
    match mounter.mode() {
        MountMode::Lazy | MountMode::LazyByLoop { .. } => true,
        MountMode::Unpacked { why } => {
            assert!(!is_root() || !kernel::has_filesystem("erofs"), "{why}");
            println!("skipped: {why}");
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_tree_is_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let store = memory();
    let mounter = mounter(&store, dir.path(), false).await;
    if !is_lazy(&mounter) {
        return;
    }
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    make_varied(&root);
    let summary = prepared(&store, "varied", Source::RootfsDir(root.clone())).await;
    let image = mounter.mount(summary.id).await.unwrap();
    let target = dir.path().join("overlay");
    let got = tokio::task::spawn_blocking({
        let layers = image.layers().clone();
        move || {
            let _overlay = Overlay::mount(&layers, &target);
            snapshot(&target)
        }
    });
    assert_same(&snapshot(&root), &got.await.unwrap());
    let metrics = mounter.metrics().await.unwrap();
    assert_eq!(metrics.eio, 0);
    assert!(metrics.frames_fetched > 0 && metrics.bytes_read > 0, "{metrics:?}");
    drop(Arc::clone(&image));
    let again = mounter.mount(summary.id).await.unwrap();
    assert!(Arc::ptr_eq(&image, &again));
}
