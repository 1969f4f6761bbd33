//! The sweeper removes what nobody needs, after its grace, and nothing else.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::ObjectStore;

use super::support::{memory, noise, prepared};
use crate::Source;
use crate::store::DomainStore;

async fn objects(store: &Arc<dyn ObjectStore>, prefix: &str) -> usize {
    let prefix = object_store::path::Path::from(prefix);
    store.list(Some(&prefix)).try_collect::<Vec<_>>().await.unwrap().len()
}

#[tokio::test]
async fn only_what_no_name_leads_to_goes_and_only_after_the_grace() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::write(root.join("shared"), noise(1, 100_000)).unwrap();
    let store = memory();
    let a = prepared(&store, "a", Source::RootfsDir(root.to_owned())).await;
    fs::write(root.join("more"), noise(2, 100_000)).unwrap();
    let b = prepared(&store, "b", Source::RootfsDir(root.to_owned())).await;
    crate::remove_name(store.clone(), "test", "a").await.unwrap();
    assert!(crate::remove_name(store.clone(), "test", "a").await.unwrap_err().is_not_found());

    let hour = Duration::from_secs(3600);
    for _ in 0..2 {
        let swept = crate::gc(store.clone(), hour).await.unwrap();
        assert_eq!((swept.removed, swept.waiting), (0, 2), "the manifest and metadata of a");
    }
    let packs = objects(&store, "pack").await;
    let swept = crate::gc(store.clone(), Duration::ZERO).await.unwrap();
    assert_eq!((swept.removed, swept.waiting), (2, 0), "{swept:?}");
    assert_eq!(objects(&store, "pack").await, packs - 1);
    assert_eq!(objects(&store, "gc/mark").await, 0);
    let at = DomainStore::new(store.clone(), "test").unwrap();
    assert!(at.manifest(a.id).await.unwrap_err().is_not_found());
    // What b has of a's packs is still there, every byte of it.
    let manifest = at.manifest(b.id).await.unwrap();
    let index = at.index(&manifest).await.unwrap();
    for frame in &index.frames {
        at.frame(&index.packs[frame.pack as usize].hash, frame).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_needed_again_before_its_grace_ends_stays() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x"), noise(1, 100_000)).unwrap();
    let store = memory();
    let source = Source::RootfsDir(dir.path().to_owned());
    prepared(&store, "a", source.clone()).await;
    crate::remove_name(store.clone(), "test", "a").await.unwrap();
    assert!(crate::gc(store.clone(), Duration::ZERO).await.unwrap().waiting > 0);
    prepared(&store, "again", source).await;
    let swept = crate::gc(store.clone(), Duration::ZERO).await.unwrap();
    assert_eq!((swept.removed, swept.waiting), (0, 0), "{swept:?}");
    assert_eq!(objects(&store, "gc/mark").await, 0);
}

#[tokio::test]
async fn an_image_that_a_host_has_mounted_stays() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("x"), noise(1, 100_000)).unwrap();
    let store = memory();
    let a = prepared(&store, "a", Source::RootfsDir(root)).await;
    let mounter = super::support::mounter(&store, dir.path(), true).await;
    mounter.note_use(a.id).await.unwrap();
    crate::remove_name(store.clone(), "test", "a").await.unwrap();
    for _ in 0..2 {
        let swept = crate::gc(store.clone(), Duration::ZERO).await.unwrap();
        assert_eq!((swept.removed, swept.waiting), (0, 0), "{swept:?}");
    }
}
