//! What lazy images cost and save, on storage as far away as one says: prepare, mount, and the time until a program has read
//! its files, cold, cold with a boot pack, warm, and against unpacking everything first.
//!
//! `cargo run --release -p hostd-image --example image_bench -- [LATENCY_MS] [MB_PER_S] [LARGE_MB] [FILES]`, as root. The same
//! program (600 files, 24 MB) is in a small image, in a large one, in one of 20 GB with holes, and in one of many files.
//! Left out: what the program then does with its bytes.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hostd_image::{ImageId, MountConfig, MountMode, Mounter, Serving, Source};
use object_store::ObjectStore;
use object_store::memory::InMemory;

mod store;

use store::FarStore;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Files of the program, and what each begins with: half of them compress.
const PROGRAM_FILES: u64 = 600;
const ROUNDS: usize = 5;

fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    if seed.is_multiple_of(2) {
        out[len / 3..].fill(b'a');
    }
    out
}

fn program_len(n: u64) -> usize {
    // From 1 KB to 200 KB, 40 KB on the average, and a few libraries of 2 MB.
    if n.is_multiple_of(200) {
        2 << 20
    } else {
        1000 + usize::try_from(n * 7919 % 67_000).unwrap_or(0)
    }
}

fn write_program(root: &Path) -> Outcome<()> {
    for n in 0..PROGRAM_FILES {
        let dir = root.join(format!("app/{}", n % 40));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("module_{n}.py")), bytes_of(n, program_len(n)))?;
    }
    Ok(())
}

/// Reads what the program reads: its files, in an order of its own.
fn run_program(root: &Path) -> Outcome<u64> {
    let mut bytes = 0;
    for i in 0..PROGRAM_FILES {
        let n = i * 37 % PROGRAM_FILES;
        let path = root.join(format!("app/{}/module_{n}.py", n % 40));
        let got = fs::read(&path)?;
        if got != bytes_of(n, program_len(n)) {
            return Err(format!("{} has other bytes", path.display()).into());
        }
        bytes += got.len() as u64;
    }
    Ok(bytes)
}

struct Bench {
    dir: PathBuf,
    far: Arc<FarStore>,
    latency: Duration,
    rate: u64,
}

impl Bench {
    fn near(&self) {
        self.far.set_distance(Duration::ZERO, 0);
    }

    fn far(&self) {
        self.far.set_distance(self.latency, self.rate);
    }

    async fn prepare(&self, name: &str, source: Source, bytes: u64) -> Outcome<ImageId> {
        self.near();
        let store: Arc<dyn ObjectStore> = self.far.clone();
        let cpu = cpu_time();
        let done = hostd_image::prepare(store, "bench", name, source, Arc::new(())).await?;
        let cpu = (cpu_time() - cpu).as_secs_f64();
        let mb = bytes as f64 / 1e6;
        println!(
            "prepare {name:12} {:>8} files {mb:>8.0} MB, {:>6.0} MB new: {:>6.2} s, {:>5.0} MB/s, {:>5.0} MB/s a core",
            done.files,
            done.new_bytes as f64 / 1e6,
            done.seconds,
            mb / done.seconds,
            mb / cpu.max(1e-9)
        );
        Ok(done.id)
    }

    async fn mounter(&self, unpack: bool) -> Outcome<Mounter> {
        let dir = tempfile::tempdir_in(&self.dir)?.keep();
        let config = MountConfig {
            state_dir: dir.join("state"),
            cache_dir: dir.join("cache"),
            cache_bytes_max: 1 << 36,
            store: self.far.clone(),
            domain: "bench".to_owned(),
        };
        let serving = if unpack { Serving::Unpack } else { Serving::Inside };
        Ok(Mounter::start_with(config, serving).await?)
    }

    /// Mounts and runs the program on a host that has nothing. Gives the times to the mount and to the last byte.
    async fn cold(&self, id: ImageId, unpack: bool) -> Outcome<(Duration, Duration, u64, Mounter)> {
        let mounter = self.mounter(unpack).await?;
        self.far();
        let fetched = self.far.bytes.load(Ordering::Relaxed);
        let started = Instant::now();
        let image = mounter.mount(id).await?;
        let mounted = started.elapsed();
        overlay_run(&image).await?;
        let done = started.elapsed();
        let fetched = self.far.bytes.load(Ordering::Relaxed) - fetched;
        Ok((mounted, done, fetched, mounter))
    }

    async fn figures(&self, name: &str, id: ImageId, bytes: u64) -> Outcome<()> {
        let (mut mounts, mut colds, mut warms, mut packed) = (vec![], vec![], vec![], vec![]);
        let mut share = 0.0;
        for _ in 0..ROUNDS {
            let (mounted, done, fetched, mounter) = self.cold(id, false).await?;
            mounts.push(mounted);
            colds.push(done);
            share = fetched as f64 / bytes as f64;
            let started = Instant::now();
            let image = mounter.mount(id).await?;
            overlay_run(&image).await?;
            warms.push(started.elapsed());
        }
        let mounter = self.mounter(false).await?;
        self.near();
        let image = mounter.mount(id).await?;
        mounter.record().await?;
        overlay_run(&image).await?;
        let boot = mounter.finish_record(id, None).await?;
        drop(image);
        drop(mounter);
        for _ in 0..ROUNDS {
            packed.push(self.cold(id, false).await?.1);
        }
        println!(
            "{name:12} mount {} | program cold {} (reads {:.1} % of the image) | with boot pack of {:.1} MB {} | warm {}",
            ms(&mut mounts),
            ms(&mut colds),
            share * 100.0,
            boot.stored as f64 / 1e6,
            ms(&mut packed),
            ms(&mut warms)
        );
        Ok(())
    }
}

async fn overlay_run(image: &hostd_image::MountedImage) -> Outcome<()> {
    let layers = image.layers().clone();
    let run = move || -> Result<u64, String> {
        let target = tempfile::tempdir().map_err(|e| e.to_string())?;
        hostd_image::mount_overlay(&layers, target.path()).map_err(|e| e.to_string())?;
        let done = run_program(target.path()).map_err(|e| e.to_string());
        hostd_image::unmount(target.path()).map_err(|e| e.to_string())?;
        done
    };
    tokio::task::spawn_blocking(run).await??;
    Ok(())
}

/// Median, with the least and the most.
fn ms(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |i: usize| times[i].as_secs_f64() * 1e3;
    format!("{:.1} ms ({:.1}-{:.1})", at(times.len() / 2), at(0), at(times.len() - 1))
}

fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = text.rsplit(')').next().unwrap_or_default();
    let ticks = |n: usize| after.split_whitespace().nth(n).and_then(|f| f.parse().ok());
    // utime and stime, in hundredths of a second.
    Duration::from_millis(10 * (ticks(11).unwrap_or(0) + ticks(12).unwrap_or(0)))
}

fn write_noise(root: &Path, mb: u64) -> Outcome<()> {
    for n in 0..mb * 4 {
        let dir = root.join(format!("data/{}", n % 64));
        fs::create_dir_all(&dir)?;
        // 256 KB a piece in files of 20 KB to 2 MB.
        let len = [20 << 10, 64 << 10, 256 << 10, 2 << 20][usize::try_from(n % 4)?] / 2;
        fs::write(dir.join(n.to_string()), bytes_of(1_000_000 + n, len))?;
    }
    Ok(())
}

/// A tar of so many small files after those of a directory.
fn write_many(path: &Path, program: &Path, files: u64) -> Outcome<()> {
    let mut out = tar::Builder::new(std::io::BufWriter::new(fs::File::create(path)?));
    out.append_dir_all(".", program)?;
    for n in 0..files {
        let text = format!("file {n}");
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        out.append_data(&mut header, format!("many/{}/{n}", n / 1000), text.as_bytes())?;
    }
    out.into_inner()?.flush()?;
    Ok(())
}

fn du(path: &Path) -> Outcome<u64> {
    let out = Command::new("du").args(["-sb", "--apparent-size"]).arg(path).output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text.split_whitespace().next().unwrap_or("0").parse()?)
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let arg = |n: usize, default: u64| -> Outcome<u64> {
        std::env::args().nth(n).map_or(Ok(default), |text| Ok(text.parse()?))
    };
    let (latency, rate) = (arg(1, 20)?, arg(2, 90)?);
    let (large_mb, many) = (arg(3, 400)?, arg(4, 200_000)?);
    let work = tempfile::tempdir()?;
    let bench = Bench {
        dir: work.path().to_owned(),
        far: FarStore::new(Arc::new(InMemory::new())),
        latency: Duration::from_millis(latency),
        rate: rate * 1_000_000,
    };
    if let MountMode::Unpacked { why } = bench.mounter(false).await?.mode() {
        println!("skipped: {why}");
        return Ok(());
    }
    println!(
        "storage: {latency} ms a GET, {rate} MB/s for all; {ROUNDS} rounds, median (least-most)"
    );
    let make = |name: &str| -> Outcome<PathBuf> {
        let root = work.path().join(name);
        write_program(&root)?;
        Ok(root)
    };
    let small = make("small")?;
    let large = make("large")?;
    write_noise(&large, large_mb)?;
    let padded = make("padded")?;
    fs::File::create(padded.join("padding"))?.set_len(20 << 30)?;
    let many_tar = work.path().join("many.tar");
    write_many(&many_tar, &small, many)?;
    let images = [
        ("small", Source::RootfsDir(small.clone()), du(&small)?),
        ("large", Source::RootfsDir(large.clone()), du(&large)?),
        ("padded", Source::RootfsDir(padded.clone()), du(&padded)?),
        ("many files", Source::RootfsTar(many_tar.clone()), du(&many_tar)?),
    ];
    let mut ids = Vec::new();
    for (name, source, bytes) in images {
        let name = name.replace(' ', "-");
        ids.push((name.clone(), bench.prepare(&name, source, bytes).await?, bytes));
    }
    for (name, id, bytes) in &ids {
        bench.figures(name, *id, *bytes).await?;
    }
    let (name, id, _) = &ids[1];
    let (_, done, _, _) = bench.cold(*id, true).await?;
    println!("{name:12} unpacked first, then the program: {:.0} ms", done.as_secs_f64() * 1e3);
    Ok(())
}
