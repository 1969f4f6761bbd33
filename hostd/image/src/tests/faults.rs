//! Storage that is gone, slow, short or lying: EIO and a count, never wrong bytes and never zeros.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::lazy_mount::{Overlay, is_lazy};
use super::support::{make_varied, memory, mounter, noise, prepared, snapshot};
use crate::far_store::FarStore;
use crate::{MountedImage, Mounter, Source};

/// Files of noise, one frame or more each.
const FILES: u64 = 12;
const FILE_BYTES: usize = 300_000;

struct Bed {
    dir: tempfile::TempDir,
    far: Arc<FarStore>,
    mounter: Mounter,
    image: Arc<MountedImage>,
}

/// A mounted image of which only the metadata was read; `None` where that cannot be had.
async fn bed() -> Option<Bed> {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    for n in 0..FILES {
        fs::write(root.join(n.to_string()), noise(n, FILE_BYTES)).unwrap();
    }
    let near = memory();
    let id = prepared(&near, "x", Source::RootfsDir(root)).await.id;
    let far = FarStore::new(near);
    let store: Arc<dyn ObjectStore> = far.clone();
    let mounter = mounter(&store, dir.path(), false).await;
    if !is_lazy(&mounter) {
        return None;
    }
    let image = mounter.mount(id).await.unwrap();
    Some(Bed { dir, far, mounter, image })
}

impl Bed {
    fn target(&self) -> PathBuf {
        self.dir.path().join("overlay")
    }

    /// Reads file `n` through an overlay of its own.
    async fn read(&self, n: u64) -> std::io::Result<Vec<u8>> {
        let (layers, target) = (self.image.layers().clone(), self.target());
        let read = move || {
            let _overlay = Overlay::mount(&layers, &target);
            fs::read(target.join(n.to_string()))
        };
        tokio::task::spawn_blocking(read).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_storage_does_wrong_is_eio_and_heals() {
    let Some(bed) = bed().await else { return };
    let faults = [&bed.far.flips, &bed.far.truncates, &bed.far.fails, &bed.far.loses];
    for (n, fault) in (0..).zip(faults) {
        fault.store(true, Ordering::Relaxed);
        let before = bed.mounter.metrics().await.unwrap().eio;
        let error = bed.read(n).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "fault {n}: {error}");
        assert!(bed.mounter.metrics().await.unwrap().eio > before, "fault {n}");
        fault.store(false, Ordering::Relaxed);
        assert!(bed.read(n).await.unwrap() == noise(n, FILE_BYTES), "fault {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_rots_on_disk_is_fetched_again() {
    let Some(bed) = bed().await else { return };
    assert!(bed.read(0).await.unwrap() == noise(0, FILE_BYTES));
    let id = bed.image.id();
    let (near, dir) = (bed.far.clone() as Arc<dyn ObjectStore>, bed.dir.path().to_owned());
    let Bed { dir: _kept, mounter: first, image, .. } = bed;
    drop(image);
    drop(first);
    for sub in fs::read_dir(dir.join("cache/frames/test")).unwrap() {
        for frame in fs::read_dir(sub.unwrap().path()).unwrap() {
            let path = frame.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    let second = mounter(&near, &dir, false).await;
    let image = second.mount(id).await.unwrap();
    let layers = image.layers().clone();
    let target = dir.join("overlay");
    let read = move || {
        let _overlay = Overlay::mount(&layers, &target);
        fs::read(target.join("0"))
    };
    assert!(tokio::task::spawn_blocking(read).await.unwrap().unwrap() == noise(0, FILE_BYTES));
    assert!(
        second.metrics().await.unwrap().frames_disk_damaged > 0,
        "{:?}",
        second.metrics().await.unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_frame_fetch_it_once() {
    let Some(bed) = bed().await else { return };
    bed.far.set_distance(std::time::Duration::from_millis(30), 0);
    let gets = bed.far.gets.load(Ordering::Relaxed);
    let (layers, target) = (bed.image.layers().clone(), bed.target());
    let read = move || {
        let _overlay = Overlay::mount(&layers, &target);
        let target = &target;
        std::thread::scope(|scope| {
            let all: Vec<_> =
                (0..16).map(|_| scope.spawn(move || fs::read(target.join("3")))).collect();
            all.into_iter().all(|one| one.join().unwrap().unwrap() == noise(3, FILE_BYTES))
        })
    };
    assert!(tokio::task::spawn_blocking(read).await.unwrap());
    let metrics = bed.mounter.metrics().await.unwrap();
    let gets = bed.far.gets.load(Ordering::Relaxed) - gets;
    // The file's one frame, and twins of it should the machine be slow.
    assert!(gets <= 1 + metrics.gets_hedged, "{gets} {metrics:?}");
    assert_eq!(metrics.oldest_unanswered_ms, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_is_not_found_and_leaves_nothing() {
    let Some(bed) = bed().await else { return };
    let error = bed.mounter.mount(crate::ImageId([9; 32])).await.unwrap_err();
    assert!(error.is_not_found(), "{error}");
    let state = bed.dir.path().join("state/test");
    assert_eq!(fs::read_dir(state.join("images")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(state.join("meta")).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_pack_brings_what_the_first_run_read() {
    let Some(bed) = bed().await else { return };
    let id = bed.image.id();
    let recording = bed.mounter.record().await.unwrap();
    assert!(bed.read(1).await.is_ok() && bed.read(5).await.is_ok());
    let made = bed.mounter.finish_record(recording, id, None).await.unwrap();
    assert!(made.bytes >= 2 * FILE_BYTES as u64 && made.bytes < 4 * FILE_BYTES as u64, "{made:?}");

    // A host that never saw it, on storage that loses every pack but what the metadata needs.
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = bed.far.clone();
    let second = mounter(&store, dir.path(), false).await;
    let image = second.mount(id).await.unwrap();
    // The push is beside the mount: wait until it has happened.
    for _ in 0..500 {
        if second.metrics().await.unwrap().bytes_pushed >= made.bytes {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    bed.far.loses.store(true, Ordering::Relaxed);
    let (layers, target) = (image.layers().clone(), dir.path().join("overlay"));
    let read = move || {
        let _overlay = Overlay::mount(&layers, &target);
        [1, 5, 2].map(|n: u64| fs::read(target.join(n.to_string())))
    };
    let [one, five, two] = tokio::task::spawn_blocking(read).await.unwrap();
    assert!(one.unwrap() == noise(1, FILE_BYTES) && five.unwrap() == noise(5, FILE_BYTES));
    assert_eq!(two.unwrap_err().raw_os_error(), Some(libc::EIO));
    bed.far.loses.store(false, Ordering::Relaxed);
}

/// A copy of a store in which one bit of one object is another.
async fn flipped(near: &Arc<dyn ObjectStore>, at: &Path, bit: u64) -> Arc<dyn ObjectStore> {
    let copy = memory();
    let all: Vec<_> = near.list(None).try_collect().await.unwrap();
    for object in all {
        let bytes = near.get(&object.location).await.unwrap().bytes().await.unwrap();
        let mut bytes = bytes.to_vec();
        if object.location == *at {
            let byte = usize::try_from(bit / 8).unwrap();
            bytes[byte] ^= 1 << (bit % 8);
        }
        copy.put(&object.location, bytes.into()).await.unwrap();
    }
    copy
}

#[tokio::test(flavor = "multi_thread")]
async fn no_flipped_bit_of_any_stored_object_gives_other_bytes() {
    if !super::support::is_root() {
        println!("skipped: owners and devices need root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    fs::create_dir(&root).unwrap();
    make_varied(&root);
    let near = memory();
    prepared(&near, "x", Source::RootfsDir(root.clone())).await;
    let want = snapshot(&root);
    let objects: Vec<_> = near.list(None).try_collect().await.unwrap();
    let (mut tried, mut harmless) = (0, 0);
    for object in objects {
        for part in 0..6 {
            let bit = object.size * 8 * part / 6 + part;
            let store = flipped(&near, &object.location, bit).await;
            let host = tempfile::tempdir().unwrap();
            let mounter = mounter(&store, host.path(), true).await;
            tried += 1;
            let Ok(id) = mounter.resolve("x").await else { continue };
            if let Ok(image) = mounter.mount(id).await {
                // A byte that nobody reads: all is as it was.
                super::support::assert_same(&want, &snapshot(&image.layers().lower[0]));
                harmless += 1;
            }
        }
    }
    println!("{tried} bits flipped, {harmless} where nobody looks");
    assert!(harmless < tried / 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_speed_and_nothing_else() {
    let Some(bed) = bed().await else { return };
    let host = tempfile::tempdir().unwrap();
    let cache = host.path().join("cache");
    fs::create_dir(&cache).unwrap();
    crate::kernel::mount_small_tmpfs(&cache, "1m").unwrap();
    let store: Arc<dyn ObjectStore> = bed.far.clone();
    let second = mounter(&store, host.path(), false).await;
    let image = second.mount(bed.image.id()).await.unwrap();
    let (layers, target) = (image.layers().clone(), host.path().join("overlay"));
    let read = move || {
        let _overlay = Overlay::mount(&layers, &target);
        (0..FILES).all(|n| fs::read(target.join(n.to_string())).unwrap() == noise(n, FILE_BYTES))
    };
    assert!(tokio::task::spawn_blocking(read).await.unwrap());
    // Frames are written behind the reader's back.
    for _ in 0..200 {
        if second.metrics().await.unwrap().disk_write_failures > 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let metrics = second.metrics().await.unwrap();
    drop(second);
    crate::unmount(&cache).unwrap();
    assert!(metrics.disk_write_failures > 0 && metrics.eio == 0, "{metrics:?}");
}
