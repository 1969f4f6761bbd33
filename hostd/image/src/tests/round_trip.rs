//! What goes in comes out: every kind of source, prepared, mounted and compared with an ordinary unpack.

use std::fs;

use super::support::{assert_same, is_root, make_varied, memory, mounter, prepared, snapshot};
use crate::Source;

#[tokio::test]
async fn a_directory_comes_back_as_it_was() {
    if !is_root() {
        println!("skipped: owners and devices need root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    make_varied(&root);
    let store = memory();
    let summary = prepared(&store, "varied", Source::RootfsDir(root.clone())).await;
    let mounter = mounter(&store, dir.path(), true).await;
    assert_eq!(mounter.resolve("varied").await.unwrap(), summary.id);
    let image = mounter.mount(summary.id).await.unwrap();
    let mounted = &image.layers().lower[0];
    assert_same(&snapshot(&root), &snapshot(mounted));
}

#[tokio::test]
async fn a_second_prepare_stores_only_what_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    make_varied(&root);
    let store = memory();
    let first = prepared(&store, "a", Source::RootfsDir(root.clone())).await;
    fs::write(root.join("added"), super::support::noise(999, 50_000)).unwrap();
    let second = prepared(&store, "b", Source::RootfsDir(root.clone())).await;
    assert_ne!(first.id, second.id);
    assert!(first.new_bytes > 5 << 20, "{first:?}");
    // The new file, the index, and metadata with 300 small files of noise in it.
    assert!(second.new_bytes < 520_000, "{second:?}");
    let third_source = Source::RootfsDir(root);
    let third = prepared(&store, "c", third_source.clone()).await;
    // Nothing at all but where the index has other packs.
    assert!(third.new_bytes < 60_000, "{third:?}");
    let fourth = prepared(&store, "c", third_source).await;
    assert_eq!((fourth.new_bytes, fourth.id), (0, third.id));
    let rows = crate::list(store, "test").await.unwrap();
    let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_prepares_of_one_source_at_once_agree() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    make_varied(&root);
    let store = memory();
    let prepare = |name| prepared(&store, name, Source::RootfsDir(root.clone()));
    let (a, b) = futures::join!(prepare("a"), prepare("b"));
    let elsewhere = memory();
    let c = prepared(&elsewhere, "c", Source::RootfsDir(root.clone())).await;
    // The same bytes are the same image, whoever prepares them, unless one found the other's packs.
    assert_eq!(a.files, b.files);
    assert!(a.id == c.id || b.id == c.id);
    for summary in [a, b] {
        let mounter = mounter(&store, dir.path(), true).await;
        if is_root() {
            let image = mounter.mount(summary.id).await.unwrap();
            assert_same(&snapshot(&root), &snapshot(&image.layers().lower[0]));
        }
    }
}
