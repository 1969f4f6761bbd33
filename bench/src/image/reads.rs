//! What a read through a mounted image costs over the storage's own time, and how fast warm ones are.
//!
//! Storage is at no distance here: its own time is that of the same GET without a mount. A cold read of 4 KB unpacks and
//! hashes the whole frame that it lies in; one whose frame is here already costs the way through the kernel alone.

use std::{
    fmt, fs,
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::TryStreamExt as _;
use hostd_image::{MountBy, MountedImage, Run, Source};
use object_store::ObjectStore;
use object_store::ObjectStoreExt as _;
use serde::Serialize;
use wire::Fault;

use super::{Bed, image_fault, tree};
use crate::rounds::Figure;

/// Files that are read at one place each, of a frame each.
const COLD_FILES: u64 = 200;
/// Bytes of such a file: as much as a frame of small files has.
const COLD_BYTES: usize = 256 << 10;
/// Bytes of the file that is read from front to back.
const LONG_BYTES: usize = 256 << 20;

/// What reads cost.
#[derive(Clone, Debug, Serialize)]
pub struct Reads {
    /// Microseconds of a 4 KB read whose frame must be fetched.
    pub cold_us: Figure,
    /// Microseconds of that frame's GET and nothing else.
    pub storage_us: Figure,
    /// Microseconds of a 4 KB read that is not in the page cache, of a frame that was unpacked.
    pub here_us: Figure,
    /// Microseconds of a 4 KB read of a file in the page cache.
    pub cached_us: Figure,
    /// Gigabytes a second of a file read from front to back a second time.
    pub warm_gb_s: Figure,
    /// The same of a plain file.
    pub plain_gb_s: Figure,
}

/// Measures.
pub(super) async fn measure(bed: &Bed) -> Result<Reads, Fault> {
    let root = bed.dir.join("reads");
    let fault = |error| tree::io_fault("files to read", &error);
    fs::create_dir_all(&root).map_err(fault)?;
    for n in 0..COLD_FILES {
        fs::write(root.join(n.to_string()), tree::bytes_of(n, COLD_BYTES)).map_err(fault)?;
    }
    fs::write(root.join("long"), tree::bytes_of(7, LONG_BYTES)).map_err(fault)?;
    let size = tree::measure(&root);
    let made = bed.prepare("reads", Source::RootfsDir(root.clone()), size).await?;
    let storage = storage_times(bed).await?;
    let (_dir, mounter) = bed.host(MountBy::Auto).await?;
    let (image, _) = Bed::mount(&mounter, made.id, &Run::of(&[], false)).await?;
    let done = tokio::task::spawn_blocking(move || read(&image, &root)).await;
    let (cold, here, cached, warm, plain) = done.map_err(image_fault)??;
    Ok(Reads {
        cold_us: Figure::of(cold),
        storage_us: Figure::of(storage),
        here_us: Figure::of(here),
        cached_us: Figure::of(cached),
        warm_gb_s: Figure::of(warm),
        plain_gb_s: Figure::of(plain),
    })
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// GETs of as many bytes as such frames have, of packs that are there.
async fn storage_times(bed: &Bed) -> Result<Vec<f64>, Fault> {
    let packs = bed.far.list(Some(&object_store::path::Path::from("pack")));
    let packs: Vec<_> = packs.try_collect().await.map_err(image_fault)?;
    let bytes = COLD_BYTES as u64 / 2;
    let Some(pack) = packs.iter().max_by_key(|pack| pack.size) else { return Ok(Vec::new()) };
    let mut times = Vec::new();
    for n in 0..COLD_FILES {
        let from = (n * bytes) % (pack.size - bytes).max(1);
        let started = Instant::now();
        bed.far.get_range(&pack.location, from..from + bytes).await.map_err(image_fault)?;
        times.push(us(started.elapsed()));
    }
    Ok(times)
}

type Times = (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>);

fn read(image: &Arc<MountedImage>, plain: &Path) -> Result<Times, Fault> {
    let target = tempfile::tempdir().map_err(|error| tree::io_fault("scratch", &error))?;
    let overlay = |error| tree::io_fault("the overlay", &error);
    hostd_image::mount_overlay(image.layers(), target.path()).map_err(overlay)?;
    let done = read_in(target.path(), plain);
    hostd_image::unmount(target.path()).map_err(overlay)?;
    done
}

fn read_in(root: &Path, plain: &Path) -> Result<Times, Fault> {
    let fault = |error| tree::io_fault("a read", &error);
    let (mut cold, mut here, mut cached) = (Vec::new(), Vec::new(), Vec::new());
    let mut page = [0; 4096];
    for n in 0..COLD_FILES {
        let file = fs::File::open(root.join(n.to_string())).map_err(fault)?;
        let no_more = |error: rustix::io::Errno| fault(error.into());
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).map_err(no_more)?;
        for (place, times) in [(0, &mut cold), (128 << 10, &mut here), (0, &mut cached)] {
            let started = Instant::now();
            file.read_exact_at(&mut page, place).map_err(fault)?;
            times.push(us(started.elapsed()));
        }
    }
    let long = |root: &Path| -> Result<Vec<f64>, Fault> {
        let mut times = Vec::new();
        for round in 0..4 {
            let took = read_through(&root.join("long")).map_err(fault)?;
            if round > 0 {
                times.push(LONG_BYTES as f64 / 1e9 / took.as_secs_f64());
            }
        }
        Ok(times)
    };
    Ok((cold, here, cached, long(root)?, long(plain)?))
}

fn read_through(path: &PathBuf) -> std::io::Result<Duration> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let started = Instant::now();
    while file.read(&mut buffer)? > 0 {}
    Ok(started.elapsed())
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "4 KB read, storage at no distance: frame to be fetched {:.0} us, of which the GET {:.0} us; \
             frame here {:.1} us; in the page cache {:.1} us",
            self.cold_us, self.storage_us, self.here_us, self.cached_us
        )?;
        writeln!(
            f,
            "warm, from front to back: {:.2} GB/s; a plain file {:.2} GB/s",
            self.warm_gb_s, self.plain_gb_s
        )
    }
}
