//! A whole userland, as it is: give its directory in `VOLLEY_TEST_ROOTFS` (debootstrap makes one), and it is prepared from the
//! directory and from a tar of it, mounted lazily, and compared in every byte.

use std::path::PathBuf;
use std::process::Command;

use super::lazy_mount::{Overlay, is_lazy};
use super::support::{assert_same, memory, mounter, prepared, snapshot};
use crate::Source;

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_userland_is_as_it_was() {
    let Ok(root) = std::env::var("VOLLEY_TEST_ROOTFS").map(PathBuf::from) else {
        println!("skipped: VOLLEY_TEST_ROOTFS names no root file system");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let store = memory();
    let mounter = mounter(&store, dir.path(), false).await;
    if !is_lazy(&mounter) {
        return;
    }
    let tar = dir.path().join("rootfs.tar");
    let mut command = Command::new("tar");
    command.args(["--format=posix", "--xattrs", "--xattrs-include=*", "-S", "-C"]).arg(&root);
    assert!(command.arg("-cf").arg(&tar).arg(".").status().unwrap().success());
    let from_dir = prepared(&store, "dir", Source::RootfsDir(root.clone())).await;
    let from_tar = prepared(&store, "tar", Source::RootfsTar(tar)).await;
    println!("{from_dir:?}\n{from_tar:?}");
    assert_eq!((from_dir.files, from_dir.bytes), (from_tar.files, from_tar.bytes));
    for id in [from_dir.id, from_tar.id] {
        let layers = mounter.mount(id).await.unwrap().layers().clone();
        let (target, root) = (dir.path().join("overlay"), root.clone());
        let compare = move || {
            let _overlay = Overlay::mount(&layers, &target);
            assert_same(&snapshot(&root), &snapshot(&target));
        };
        tokio::task::spawn_blocking(compare).await.unwrap();
    }
    println!("{:?}", mounter.metrics().await.unwrap());
}
