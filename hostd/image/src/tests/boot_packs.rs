//! Boot packs through the whole stack: recorded by a first run, used by the next host, renewed when they miss, refused when
//! they were forged.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use object_store::{ObjectStore, ObjectStoreExt};

use super::lazy_mount::{Overlay, is_lazy};
use super::support::{memory, mounter, noise, prepared};
use crate::boot::{self, Head, boot_path};
use crate::far_store::FarStore;
use crate::id::Domain;
use crate::{ImageId, ImageMetrics, Mounter, Run, Source};

const FILES: u64 = 8;
/// More than a chunk, so that objects are cut.
const FILE_BYTES: usize = (2 << 20) + 777;

/// An image in a store that may be far away.
async fn image(dir: &Path) -> (Arc<FarStore>, ImageId) {
    let root = dir.join("rootfs");
    fs::create_dir(&root).unwrap();
    for n in 0..FILES {
        fs::write(root.join(n.to_string()), noise(n, FILE_BYTES)).unwrap();
        fs::write(root.join(format!("small-{n}")), noise(100 + n, 20_000)).unwrap();
    }
    let near = memory();
    let id = prepared(&near, "x", Source::RootfsDir(root)).await.id;
    (FarStore::new(near), id)
}

/// A first run on a host of its own that reads these files, and what its mounter counted.
async fn first_run(
    far: &Arc<FarStore>,
    id: ImageId,
    run: &Run,
    files: &[u64],
) -> Option<(ImageMetrics, Mounter)> {
    let host = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = far.clone();
    let mounter = mounter(&store, host.path(), false).await;
    if !is_lazy(&mounter) {
        return None;
    }
    let (image, guard) = mounter.mount_to_run(id, run).await.unwrap();
    let (layers, target, files) =
        (image.layers().clone(), host.path().join("root"), files.to_vec());
    let read = move || {
        let _overlay = Overlay::mount(&layers, &target);
        for n in files {
            let small = fs::read(target.join(format!("small-{n}"))).unwrap();
            assert!(small == noise(100 + n, 20_000), "small file {n}");
            let large = fs::read(target.join(n.to_string())).unwrap();
            assert!(large == noise(n, FILE_BYTES), "large file {n}");
        }
    };
    tokio::task::spawn_blocking(read).await.unwrap();
    drop(guard);
    for _ in 0..1_000 {
        if mounter.metrics().await.unwrap().first_runs > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Some((mounter.metrics().await.unwrap(), mounter))
}

async fn pack(store: &Arc<FarStore>, id: ImageId, entry: &str) -> Option<Vec<u8>> {
    let got = store.get(&boot_path(id, entry)).await.ok()?;
    Some(got.bytes().await.unwrap().to_vec())
}

fn decode(pack: &[u8]) -> (Head, usize) {
    let domain = Domain::new("test").unwrap();
    let (stored, len, hash) = boot::decode_lead(&pack[..boot::LEAD_BYTES]).unwrap();
    let end = boot::LEAD_BYTES + stored;
    (boot::decode_head(&domain, &pack[boot::LEAD_BYTES..end], len, &hash).unwrap(), end)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_run_is_recorded_used_and_renewed_when_it_misses() {
    let dir = tempfile::tempdir().unwrap();
    let (far, id) = image(dir.path()).await;
    let run = Run::of(&["python3".to_owned(), "main.py".to_owned()], true);
    let Some((first, _)) = first_run(&far, id, &run, &[0, 1]).await else { return };
    assert_eq!((first.boot_packs_recorded, first.boot_packs_used), (1, 0), "{first:?}");
    // For commands that were never run there is the image's own pack: what the first one read.
    let own = pack(&far, id, run.entry()).await.unwrap();
    assert_eq!(pack(&far, id, "default").await.as_ref(), Some(&own));
    let (head, _) = decode(&own);
    let pages: usize = head.parts.iter().flat_map(|p| &p.spans).map(|s| s.len as usize).sum();
    assert!(pages > 2 * FILE_BYTES && pages < 3 * FILE_BYTES, "{pages}");

    // The next host has all of it, on storage that has lost every pack.
    far.loses.store(true, Ordering::Relaxed);
    let (second, _) = first_run(&far, id, &run, &[0, 1]).await.unwrap();
    far.loses.store(false, Ordering::Relaxed);
    assert_eq!((second.boot_packs_used, second.eio), (1, 0), "{second:?}");
    assert!(second.push_hit_rate().unwrap() > 0.9, "{second:?}");
    assert_eq!(pack(&far, id, run.entry()).await, Some(own.clone()), "as good as it was");

    // The program reads more than before: the pack grows, and the third host misses nothing.
    let (third, _) = first_run(&far, id, &run, &[0, 1, 2, 3]).await.unwrap();
    assert_eq!(third.boot_packs_renewed, 1, "{third:?}");
    assert!(third.push_hit_rate().unwrap() < 0.9, "{third:?}");
    far.loses.store(true, Ordering::Relaxed);
    let (fourth, _) = first_run(&far, id, &run, &[2, 0, 3, 1]).await.unwrap();
    far.loses.store(false, Ordering::Relaxed);
    assert!(fourth.push_hit_rate().unwrap() > 0.9, "{fourth:?}");

    // Another command has the image's own pack until it has one itself.
    let other = Run::of(&["python3".to_owned(), "other.py".to_owned()], true);
    let (fifth, _) = first_run(&far, id, &other, &[0, 1]).await.unwrap();
    assert_eq!((fifth.boot_packs_used, fifth.boot_packs_recorded), (1, 0), "{fifth:?}");
    assert!(pack(&far, id, other.entry()).await.is_none(), "the image's own was good enough");
    // One that may not record leaves nothing.
    let silent = Run::of(&["sh".to_owned()], false);
    let (sixth, _) = first_run(&far, id, &silent, &[5]).await.unwrap();
    assert_eq!((sixth.boot_packs_recorded, sixth.boot_packs_renewed), (0, 0), "{sixth:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_touched_pages_are_recorded_and_nobody_sees_an_error() {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let dir = tempfile::tempdir().unwrap();
    let (far, id) = image(dir.path()).await;
    let host = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = far.clone();
    let mounter = mounter(&store, host.path(), false).await;
    if !is_lazy(&mounter) {
        return;
    }
    let (image, guard) = mounter.mount_to_run(id, &Run::of(&[], true)).await.unwrap();
    let (layers, target) = (image.layers().clone(), host.path().join("root"));
    let (whole, touched) = (noise(0, FILE_BYTES), [3usize, 100, 101, 400, 511]);
    let read = move || {
        let _overlay = Overlay::mount(&layers, &target);
        let file = fs::File::open(target.join("0")).unwrap();
        let mut page = [0; 4096];
        for n in touched {
            file.read_exact_at(&mut page, n as u64 * 4096).unwrap();
            assert!(page[..] == whole[n * 4096..][..4096], "page {n}");
        }
        // Past the page cache the kernel does not ask again: such a read is never turned away.
        let direct =
            fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(target.join("1"));
        let Ok(direct) = direct else { return };
        let mut bytes = vec![0; (256 << 10) + 4096];
        let at = bytes.as_ptr().align_offset(4096);
        direct.read_exact_at(&mut bytes[at..at + (256 << 10)], 1 << 20).unwrap();
        assert!(bytes[at..at + (256 << 10)] == noise(1, FILE_BYTES)[1 << 20..][..256 << 10]);
    };
    tokio::task::spawn_blocking(read).await.unwrap();
    drop(guard);
    for _ in 0..3_000 {
        if mounter.metrics().await.unwrap().first_runs > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let metrics = mounter.metrics().await.unwrap();
    assert_eq!((metrics.boot_packs_recorded, metrics.eio), (1, 0), "{metrics:?}");
    let (head, _) = decode(&pack(&far, id, "default").await.unwrap());
    let object = head.objects.iter().position(|object| {
        head.parts
            .iter()
            .flat_map(|part| &part.spans)
            .any(|span| span.at == 3 * 4096 && head.objects[span.object as usize].id == object.id)
    });
    let object = u32::try_from(object.unwrap()).unwrap();
    let spans = head.parts.iter().flat_map(|part| &part.spans);
    let bytes: u32 = spans.filter(|span| span.object == object).map(|span| span.len).sum();
    // The five, and the last page, which proves the size.
    assert_eq!(bytes as usize, 5 * 4096 + FILE_BYTES % 4096);
}

/// Changes a byte of a page, with lengths and hashes of the pack itself made right again.
fn forged(pack: &[u8]) -> Vec<u8> {
    let (head, mut at) = decode(pack);
    let mut parts = Vec::new();
    for part in &head.parts {
        let stored = &pack[at..at + part.stored as usize];
        at += part.stored as usize;
        parts.push(zstd::bulk::decompress(stored, part.bytes as usize).unwrap());
    }
    let last = parts.last_mut().unwrap();
    // The last bytes of a part are pages, and not hashes.
    let end = last.len() - 10;
    last[end] ^= 1;
    let packed: Vec<Vec<u8>> =
        parts.iter().map(|part| zstd::bulk::compress(part, 3).unwrap()).collect();
    let domain = Domain::new("test").unwrap();
    let (stored, len, _) = boot::decode_lead(&pack[..boot::LEAD_BYTES]).unwrap();
    let open = &pack[boot::LEAD_BYTES..boot::LEAD_BYTES + stored];
    let mut open = zstd::bulk::decompress(open, len).unwrap();
    // Parts stand behind objects: their stored lengths are found by what they were.
    let mut from = 0;
    for (part, packed) in head.parts.iter().zip(&packed) {
        let old = [part.stored.to_le_bytes(), part.bytes.to_le_bytes()].concat();
        let place = open[from..].windows(8).position(|window| window == old).unwrap() + from;
        open[place..place + 4].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        from = place + 8;
    }
    let stored = zstd::bulk::compress(&open, 3).unwrap();
    let mut out = pack[..8].to_vec();
    for len in [stored.len(), open.len()] {
        out.extend_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
    }
    out.extend_from_slice(&domain.hash(&open));
    out.extend_from_slice(&stored);
    packed.iter().for_each(|part| out.extend_from_slice(part));
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_or_damaged_pack_changes_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (far, id) = image(dir.path()).await;
    let run = Run::of(&[], true);
    if first_run(&far, id, &run, &[0, 1]).await.is_none() {
        return;
    }
    let good = pack(&far, id, "default").await.unwrap();
    let silent = Run::of(&[], false);
    let forged = forged(&good);
    decode(&forged);
    let mut bad = vec![forged, good[..good.len() / 2].to_vec(), Vec::new(), vec![7; 100]];
    for part in 1..6 {
        let mut flipped = good.clone();
        let at = good.len() * part / 6;
        flipped[at] ^= 1;
        bad.push(flipped);
    }
    for bytes in bad {
        far.put(&boot_path(id, "default"), bytes.into()).await.unwrap();
        // The reads inside compare every byte.
        let (metrics, _) = first_run(&far, id, &silent, &[0, 1]).await.unwrap();
        assert_eq!(metrics.eio, 0, "{metrics:?}");
    }
    // One that is damaged is replaced by the next run that may write.
    let (healed, _) = first_run(&far, id, &run, &[0, 1]).await.unwrap();
    assert_eq!(healed.boot_packs_recorded + healed.boot_packs_renewed, 1, "{healed:?}");
    decode(&pack(&far, id, "default").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_stalls_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (far, id) = image(dir.path()).await;
    if first_run(&far, id, &Run::of(&[], true), &[0]).await.is_none() {
        return;
    }
    far.stalls_boot.store(true, Ordering::Relaxed);
    let started = std::time::Instant::now();
    let (metrics, _) = first_run(&far, id, &Run::of(&[], false), &[0]).await.unwrap();
    assert_eq!(metrics.eio, 0);
    // Found out by patience, of 250 ms a read, and then by demand.
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}
