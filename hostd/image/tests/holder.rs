//! The processes behind lazy mounts: a worker killed with reads in flight, a hostd that comes back, and that nothing is left.
#![allow(clippy::unwrap_used, reason = "a test with a `main` of its own")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostd_image::far_store::FarStore;
use hostd_image::{Layers, MountBy, MountConfig, MountMode, Mounter, Serving, Source};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use rustix::process::{Pid, Signal, kill_process};

const FILES: u64 = 100;
const FILE_BYTES: usize = 300_000;

fn open(url: &str) -> Result<Arc<dyn ObjectStore>, String> {
    let path = url.strip_prefix("far:").ok_or("an unknown store")?;
    let near = LocalFileSystem::new_with_prefix(path).map_err(|e| e.to_string())?;
    let far = FarStore::new(Arc::new(near));
    far.set_distance(Duration::from_millis(150), 0);
    Ok(far)
}

fn noise(seed: u64) -> Vec<u8> {
    let mut out = vec![0; FILE_BYTES];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// A prepared image, and a place for a host.
struct Place {
    dir: tempfile::TempDir,
    near: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Runtime,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (objects, root) = (dir.path().join("objects"), dir.path().join("rootfs"));
        fs::create_dir(&objects).unwrap();
        fs::create_dir(&root).unwrap();
        for n in 0..FILES {
            fs::write(root.join(n.to_string()), noise(n)).unwrap();
        }
        let near: Arc<dyn ObjectStore> =
            Arc::new(LocalFileSystem::new_with_prefix(&objects).unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (source, progress) = (Source::RootfsDir(root), Arc::new(()));
        let prepared = hostd_image::prepare(near.clone(), "acme", "img", source, progress);
        runtime.block_on(prepared).unwrap();
        Self { dir, near, runtime }
    }

    fn objects(&self) -> String {
        format!("far:{}", self.dir.path().join("objects").display())
    }

    fn mounter(&self) -> Mounter {
        let config = MountConfig {
            state_dir: self.dir.path().join("state"),
            cache_dir: self.dir.path().join("cache"),
            cache_bytes_max: 1 << 30,
            store: self.near.clone(),
            domain: "acme".to_owned(),
            by: MountBy::Auto,
        };
        let serving = Serving::Holder { objects: self.objects() };
        self.runtime.block_on(Mounter::start_with(config, serving)).unwrap()
    }

    fn layers(&self, mounter: &Mounter) -> Layers {
        let mount = async {
            let id = mounter.resolve("img").await.unwrap();
            mounter.mount(id).await.unwrap().layers().clone()
        };
        self.runtime.block_on(mount)
    }

    fn overlay(&self, layers: &Layers) -> PathBuf {
        let target = self.dir.path().join("overlay");
        fs::create_dir_all(&target).unwrap();
        hostd_image::mount_overlay(layers, &target).unwrap();
        target
    }

    /// The group that its worker is in.
    fn memory_group(&self) -> String {
        let state = self.dir.path().join("state");
        let all = [state.as_os_str().as_encoded_bytes(), b"\0acme"].concat();
        let hash = blake3::hash(&all).to_hex();
        format!("volley-images-{}", &hash.as_str()[..16])
    }

    /// Nothing of it is mounted and no process of it is there, within some seconds.
    fn assert_gone(&self) {
        let place = self.dir.path().to_str().unwrap().to_owned();
        let left = || {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
            let mounts = mounts.lines().filter(|line| line.contains(&place)).count();
            let groups = fs::read_dir("/sys/fs/cgroup/memory").into_iter().flatten().flatten();
            let ours = |name: String| name == self.memory_group();
            let groups =
                groups.filter(|e| ours(e.file_name().to_string_lossy().into_owned())).count();
            mounts + groups + children_of(std::process::id(), "__image-holder").len()
        };
        let started = Instant::now();
        while left() > 0 {
            assert!(started.elapsed() < Duration::from_secs(30), "{} left", left());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn children_of(parent: u32, argument: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let ppid: u32 = stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let asked = line.windows(argument.len()).any(|window| window == argument.as_bytes());
        (ppid == parent && asked).then_some(pid)
    });
    pids.collect()
}

fn worker() -> u32 {
    let holders = children_of(std::process::id(), "__image-holder");
    assert_eq!(holders.len(), 1, "one holder");
    let started = Instant::now();
    loop {
        if let [worker] = children_of(holders[0], "__image-worker")[..] {
            return worker;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "no worker");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn read_all(target: &Path, numbers: std::ops::Range<u64>) {
    std::thread::scope(|scope| {
        for n in numbers {
            scope.spawn(move || {
                let got = fs::read(target.join(n.to_string())).unwrap();
                assert!(got == noise(n), "file {n} has other bytes");
            });
        }
    });
}

fn a_killed_worker_is_a_pause() {
    let place = Place::new();
    let mounter = place.mounter();
    let target = place.overlay(&place.layers(&mounter));
    // Once to find the names, so that what is in flight later are reads.
    for n in 0..FILES {
        fs::metadata(target.join(n.to_string())).unwrap();
    }
    let first = worker();
    if Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
        let groups = fs::read_to_string(format!("/proc/{first}/cgroup")).unwrap();
        assert!(groups.contains(&place.memory_group()), "{groups}");
    }
    std::thread::scope(|scope| {
        let target = &target;
        let reads = scope.spawn(move || read_all(target, 0..FILES));
        // In the middle of GETs of 150 ms each.
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(60));
            kill(worker());
        }
        reads.join().unwrap();
    });
    assert_ne!(worker(), first);
    let metrics = place.runtime.block_on(mounter.metrics()).unwrap();
    assert_eq!(metrics.eio, 0, "{metrics:?}");
    hostd_image::unmount(&target).unwrap();
    drop(mounter);
    place.assert_gone();
}

fn a_hostd_that_comes_back_finds_all_as_it_was() {
    let place = Place::new();
    let mounter = place.mounter();
    let layers = place.layers(&mounter);
    let target = place.overlay(&layers);
    let before = worker();
    // Ended without a word, as by `kill -9`: nothing is said to the worker but by the connection's end.
    std::mem::forget(mounter);
    let again = place.mounter();
    assert_eq!(place.layers(&again), layers);
    assert_eq!(worker(), before);
    // And once more while the worker is only away for a moment.
    std::mem::forget(again);
    kill(before);
    let again = place.mounter();
    assert_eq!(again.mode(), &MountMode::Lazy);
    assert_eq!(place.layers(&again), layers);
    worker();
    read_all(&target, 0..20);
    hostd_image::unmount(&target).unwrap();
    drop(again);
    place.assert_gone();
}

fn roots_in_use_outlive_hostd() {
    let place = Place::new();
    let mounter = place.mounter();
    let target = place.overlay(&place.layers(&mounter));
    read_all(&target, 0..3);
    drop(mounter);
    // Bytes that were not read before come from the worker that stayed for them.
    read_all(&target, 3..20);
    hostd_image::unmount(&target).unwrap();
    place.assert_gone();
}

/// The holder dies with a hundred readers in flight, then hostd too: the worker answers them all, and the next hostd
/// finds it.
fn a_killed_holder_and_hostd_with_readers_in_flight() {
    let place = Place::new();
    let mounter = place.mounter();
    let target = place.overlay(&place.layers(&mounter));
    for n in 0..FILES {
        fs::metadata(target.join(n.to_string())).unwrap();
    }
    let holders = children_of(std::process::id(), "__image-holder");
    std::thread::scope(|scope| {
        let target = &target;
        let reads = scope.spawn(move || read_all(target, 0..FILES));
        std::thread::sleep(Duration::from_millis(60));
        kill(holders[0]);
        std::thread::sleep(Duration::from_millis(20));
        // As by `kill -9`.
        std::mem::forget(mounter);
        reads.join().unwrap();
    });
    let again = place.mounter();
    let metrics = place.runtime.block_on(again.metrics()).unwrap();
    assert_eq!(metrics.eio, 0, "{metrics:?}");
    place.layers(&again);
    hostd_image::unmount(&target).unwrap();
    drop(again);
    place.assert_gone();
}

/// Holder and worker die with readers in flight: those get errors and no other bytes, and images are mounted anew.
fn a_killed_holder_and_worker_are_errors_and_heal() {
    let place = Place::new();
    let mounter = place.mounter();
    let target = place.overlay(&place.layers(&mounter));
    for n in 0..FILES {
        fs::metadata(target.join(n.to_string())).unwrap();
    }
    let (holder, worker) = (children_of(std::process::id(), "__image-holder")[0], worker());
    let failed = std::thread::scope(|scope| {
        let target = &target;
        let reads: Vec<_> = (0..FILES)
            .map(|n| {
                scope.spawn(move || match fs::read(target.join(n.to_string())) {
                    Ok(got) => {
                        assert!(got == noise(n), "file {n} has other bytes");
                        0
                    }
                    Err(_) => 1,
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(60));
        kill(holder);
        kill(worker);
        reads.into_iter().map(|read| read.join().unwrap()).sum::<u32>()
    });
    assert!(failed > 0, "all were read before the kill");
    hostd_image::unmount(&target).unwrap();
    place.runtime.block_on(mounter.revive()).unwrap();
    let target = place.overlay(&place.layers(&mounter));
    read_all(&target, 0..20);
    hostd_image::unmount(&target).unwrap();
    drop(mounter);
    place.assert_gone();
}

fn main() -> ExitCode {
    hostd_image::main_if_asked(open);
    let place = Place::new();
    if let MountMode::Unpacked { why } = place.mounter().mode() {
        println!("skipped: {why}");
        return ExitCode::SUCCESS;
    }
    place.assert_gone();
    let tests: [(&str, fn()); 5] = [
        ("a_killed_worker_is_a_pause", a_killed_worker_is_a_pause),
        (
            "a_hostd_that_comes_back_finds_all_as_it_was",
            a_hostd_that_comes_back_finds_all_as_it_was,
        ),
        ("roots_in_use_outlive_hostd", roots_in_use_outlive_hostd),
        (
            "a_killed_holder_and_hostd_with_readers_in_flight",
            a_killed_holder_and_hostd_with_readers_in_flight,
        ),
        (
            "a_killed_holder_and_worker_are_errors_and_heal",
            a_killed_holder_and_worker_are_errors_and_heal,
        ),
    ];
    for (name, test) in tests {
        let started = Instant::now();
        test();
        println!("test {name} ... ok ({:?})", started.elapsed());
    }
    ExitCode::SUCCESS
}
