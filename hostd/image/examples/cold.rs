//! scratch harness
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hostd_image::{MountBy, MountConfig, Mounter, Run, Serving, Source, far_store::FarStore};
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};

const PROGRAM: &str = "import asyncio, json, email.mime.text, xml.etree.ElementTree, decimal, argparse, \
    logging.config, concurrent.futures, unittest, csv, tarfile, zipfile, http.client, difflib, dataclasses; print('ready')";

fn first_output(command: &mut Command) -> Duration {
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 16];
    let n = child.stdout.take().unwrap().read(&mut said).unwrap();
    let took = started.elapsed();
    child.wait().unwrap();
    assert!(said[..n].starts_with(b"ready"));
    took
}
fn in_root(root: &Path, python: &Path) -> Duration {
    let mut command = Command::new("chroot");
    command.arg(root).arg(python).args(["-I", "-S", "-c", PROGRAM]);
    first_output(&mut command)
}
fn host(dir: &Path, far: &Arc<FarStore>) -> MountConfig {
    MountConfig {
        state_dir: dir.join("state"),
        cache_dir: dir.join("cache"),
        cache_bytes_max: 1 << 36,
        store: far.clone(),
        domain: "bench".into(),
        by: MountBy::Auto,
    }
}
struct Clock(Instant);
impl tracing_subscriber::fmt::time::FormatTime for Clock {
    fn format_time(&self, w: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        write!(w, "{:8.2}", self.0.elapsed().as_secs_f64() * 1e3)
    }
}

fn main() {
    let zero = Instant::now();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_timer(Clock(zero))
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(go(zero));
}
fn cpu() -> f64 {
    let u = rustix::process::getpid();
    let s = std::fs::read_to_string(format!("/proc/{}/stat", u.as_raw_nonzero())).unwrap();
    let f: Vec<&str> = s.rsplit(')').next().unwrap().split_whitespace().collect();
    (f[11].parse::<f64>().unwrap() + f[12].parse::<f64>().unwrap()) * 10.0
}
fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (n, piece) in out.chunks_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = if n / 512 % 3 == 0 { state } else { 0x2020_6f6c_6c65_6820 ^ (state & 0xff) };
        piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
    }
    out
}
async fn reads() {
    use std::os::unix::fs::FileExt;
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let root = scratch.path().join("reads");
    std::fs::create_dir_all(&root).unwrap();
    for n in 0..200 {
        std::fs::write(root.join(n.to_string()), bytes_of(n, 256 << 10)).unwrap();
    }
    let far = FarStore::new(Arc::new(InMemory::new()));
    let store: Arc<dyn ObjectStore> = far.clone();
    let made = hostd_image::prepare(
        store.clone(),
        "bench",
        "reads",
        Source::RootfsDir(root),
        Arc::new(()),
    )
    .await
    .unwrap();
    let dir = tempfile::tempdir_in(scratch.path()).unwrap();
    let mounter = Mounter::start_with(host(dir.path(), &far), Serving::Inside).await.unwrap();
    let (image, _g) = mounter.mount_to_run(made.id, &Run::of(&[], false)).await.unwrap();
    let target = tempfile::tempdir().unwrap();
    hostd_image::mount_overlay(image.layers(), target.path()).unwrap();
    let mut page = [0; 4096];
    let (mut cold, mut here) = (vec![], vec![]);
    for n in 0..200 {
        let file = std::fs::File::open(target.path().join(n.to_string())).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        for (place, times) in [(0, &mut cold), (128 << 10, &mut here)] {
            let started = Instant::now();
            file.read_exact_at(&mut page, place).unwrap();
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
    }
    hostd_image::unmount(target.path()).unwrap();
    cold.sort_by(f64::total_cmp);
    here.sort_by(f64::total_cmp);
    let b = bytes_of(1, 256 << 10);
    let z = zstd::bulk::compress(&b, 3).unwrap();
    let time = |f: &mut dyn FnMut()| {
        let t = Instant::now();
        for _ in 0..200 {
            f()
        }
        t.elapsed().as_secs_f64() * 1e6 / 200.0
    };
    let mut d = zstd::bulk::Decompressor::new().unwrap();
    println!(
        "cold {:.0} here {:.1} | hash {:.0} decode {:.0} decode anew {:.0} stored {}",
        cold[100],
        here[100],
        time(&mut || {
            std::hint::black_box(blake3::keyed_hash(&[7; 32], &b));
        }),
        time(&mut || {
            std::hint::black_box(d.decompress(&z, b.len()).unwrap());
        }),
        time(&mut || {
            std::hint::black_box(zstd::bulk::decompress(&z, b.len()).unwrap());
        }),
        z.len()
    );
}
async fn go(zero: Instant) {
    reads().await;
    let rounds: usize = std::env::args().nth(1).map_or(3, |s| s.parse().unwrap());
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let root = scratch.path().join("root");
    std::fs::create_dir_all(&root).unwrap();
    let out = Command::new("/usr/bin/python3")
        .args(["-I", "-S", "-c", include_str!("../../../bench/src/image/program.py")])
        .arg(&root)
        .arg(PROGRAM)
        .output()
        .unwrap();
    let python = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim().to_owned());
    let far = FarStore::new(Arc::new(InMemory::new()));
    let store: Arc<dyn ObjectStore> = far.clone();
    let made = hostd_image::prepare(
        store.clone(),
        "bench",
        "small",
        Source::RootfsDir(root.clone()),
        Arc::new(()),
    )
    .await
    .unwrap();
    eprintln!("prepared {} files {} bytes", made.files, made.bytes);
    // record
    {
        let dir = tempfile::tempdir_in(scratch.path()).unwrap();
        let mounter = Mounter::start_with(host(dir.path(), &far), Serving::Inside).await.unwrap();
        let (image, guard) = mounter.mount_to_run(made.id, &Run::of(&[], true)).await.unwrap();
        let target = tempfile::tempdir().unwrap();
        hostd_image::mount_overlay(image.layers(), target.path()).unwrap();
        in_root(target.path(), &python);
        hostd_image::unmount(target.path()).unwrap();
        drop(guard);
        while mounter.metrics().await.unwrap().boot_packs_recorded == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        eprintln!("{:?}", mounter.metrics().await.unwrap());
    }
    let pack = store
        .get(&object_store::path::Path::from(format!("boot/{}/default", made.id)))
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    eprintln!("pack {} bytes", pack.len());
    std::fs::write("/tmp/image-pack", &pack).unwrap();
    far.set_distance(Duration::from_millis(20), 90_000_000);
    let t = Instant::now();
    let l = far
        .get(&object_store::path::Path::from(format!("boot/{}/default", made.id)))
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap()
        .len();
    eprintln!("bare GET of {l}: {:?}", t.elapsed());
    far.set_distance(Duration::ZERO, 0);
    for n in 0..rounds {
        let dir = tempfile::tempdir_in(scratch.path()).unwrap();
        let mounter = Mounter::start_with(host(dir.path(), &far), Serving::Inside).await.unwrap();
        far.set_distance(Duration::from_millis(20), 90_000_000);
        let bytes = far.bytes.load(Ordering::Relaxed);
        let c0 = cpu();
        tracing::debug!("round {n} begins");
        let started = Instant::now();
        let (image, _g) = mounter.mount_to_run(made.id, &Run::of(&[], false)).await.unwrap();
        let mounted = started.elapsed();
        let target = tempfile::tempdir().unwrap();
        hostd_image::mount_overlay(image.layers(), target.path()).unwrap();
        let overlaid = started.elapsed();
        tracing::debug!("overlaid");
        let (t, p) = (target.path().to_owned(), python.clone());
        tokio::task::spawn_blocking(move || in_root(&t, &p)).await.unwrap();
        let total = started.elapsed();
        tracing::debug!("said");
        let c1 = cpu();
        let w = Instant::now();
        let (t, p) = (target.path().to_owned(), python.clone());
        let warm = tokio::task::spawn_blocking(move || in_root(&t, &p)).await.unwrap();
        let _ = w;
        hostd_image::unmount(target.path()).unwrap();
        let plain = in_root(&root, &python);
        let m = mounter.metrics().await.unwrap();
        println!(
            "mount {:.1} overlay {:.1} total {:.1} warm {:.1} plain {:.1} | own cpu {:.0} | {} bytes | reads {} boot {} bytes_read {} pushed {} missed {} gets {}",
            mounted.as_secs_f64() * 1e3,
            overlaid.as_secs_f64() * 1e3,
            total.as_secs_f64() * 1e3,
            warm.as_secs_f64() * 1e3,
            plain.as_secs_f64() * 1e3,
            c1 - c0,
            far.bytes.load(Ordering::Relaxed) - bytes,
            m.reads,
            m.reads_boot,
            m.bytes_read,
            m.bytes_pushed,
            m.boot_bytes_missed,
            m.gets
        );
        far.set_distance(Duration::ZERO, 0);
    }
    let _ = zero;
}
