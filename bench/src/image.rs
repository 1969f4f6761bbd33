//! What an image costs until a program in it says its first word: cold, cold with a boot pack, warm; whatever its size.
//!
//! Storage is in memory behind a link of a set latency and bandwidth that all GETs share, so that a cold figure is honest
//! and a bound can be computed: a cold start with a boot pack waits for one round trip and for the bytes it fetched, and no
//! arrangement of the same bytes is faster. Peers in the same run: everything pulled and unpacked first, a container runner
//! on the unpacked tree, and that tree as it is. Images take turns in each round. Left out: placing and boxes, which
//! `bench launch` measures.

mod reads;
mod run;
mod tree;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use hostd_image::{
    FirstRunGuard, ImageId, MountBy, MountConfig, MountMode, MountedImage, Mounter, Run, Serving,
    Source, far_store::FarStore,
};
use object_store::{ObjectStore, memory::InMemory};
use serde::Serialize;
use wire::{Code, Fault};

use self::{
    reads::Reads,
    run::{Program, Runner, in_image, in_root},
    tree::io_fault,
};
use crate::{cpu, rounds::Figure};

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time to a GET's first byte.
    pub latency: Duration,
    /// Bytes a second over the link.
    pub bytes_per_second: u64,
    /// Bytes of the large image.
    pub large_bytes: u64,
    /// Bytes of the sparse one.
    pub sparse_bytes: u64,
    /// Files of the one of many.
    pub files: u64,
    /// Rounds.
    pub rounds: usize,
    /// Scratch directory; the system's if absent.
    pub scratch: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            latency: Duration::from_millis(20),
            bytes_per_second: 90_000_000,
            large_bytes: 2_000_000_000,
            sparse_bytes: 20_000_000_000,
            files: 1_000_000,
            rounds: 5,
            scratch: None,
        }
    }
}

/// One image's figures; times in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which.
    pub name: &'static str,
    /// Whether the shell's program was run and not Python's.
    pub shell: bool,
    /// Its bytes, holes in full.
    pub bytes: u64,
    /// Its files.
    pub files: u64,
    /// Megabytes a second of processor time that preparing it took.
    pub prepare_mb_a_core: f64,
    /// Mount on a host that has nothing, with its boot pack.
    pub mount_ms: Figure,
    /// To the first output on a host that has nothing, without a boot pack.
    pub cold_ms: Figure,
    /// The same with a boot pack.
    pub boot_ms: Figure,
    /// On a host that has run it.
    pub warm_ms: Figure,
    /// GETs of a cold start with a boot pack.
    pub gets: u64,
    /// Bytes that it fetched.
    pub fetched: u64,
    /// One round trip and those bytes over the link, and nothing else.
    pub bound_ms: f64,
}

/// All figures.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Time to a GET's first byte.
    pub latency_ms: f64,
    /// Megabytes a second over the link.
    pub mb_per_second: f64,
    /// A row an image.
    pub rows: Vec<Row>,
    /// The large image pulled and unpacked, then run.
    pub unpacked_first_ms: f64,
    /// The program in the unpacked tree, as it is.
    pub plain_ms: Figure,
    /// A container runner on the unpacked tree, by name.
    pub runner: Option<(String, Figure)>,
    /// What reads cost.
    pub reads: Reads,
}

/// The bench's surroundings.
struct Bed {
    dir: PathBuf,
    far: Arc<FarStore>,
    options: Options,
    python: Program,
}

/// An image that was prepared, and what is run in it.
#[derive(Clone)]
struct Made {
    program: Program,
    name: &'static str,
    id: ImageId,
    bytes: u64,
    files: u64,
    prepare_mb_a_core: f64,
}

/// Figures while they are collected.
#[derive(Default)]
struct Times {
    mount: Vec<f64>,
    cold: Vec<f64>,
    boot: Vec<f64>,
    warm: Vec<f64>,
    gets: u64,
    fetched: u64,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn image_fault(error: impl fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

impl Made {
    fn run(&self) -> Run {
        match self.program {
            Program::Python(_) => Run::of(&[], false),
            Program::Shell => Run::of(&["shell".to_owned()], false),
        }
    }
}

impl Bed {
    fn near(&self) {
        self.far.set_distance(Duration::ZERO, 0);
    }

    fn far(&self) {
        self.far.set_distance(self.options.latency, self.options.bytes_per_second);
    }

    async fn prepare(
        &self,
        name: &'static str,
        source: Source,
        (bytes, files): (u64, u64),
    ) -> Result<Made, Fault> {
        self.near();
        let store: Arc<dyn ObjectStore> = self.far.clone();
        let pid = std::process::id();
        let before = cpu::used(pid).unwrap_or_default();
        let made = hostd_image::prepare(store, "bench", name, source, Arc::new(())).await;
        let made = made.map_err(image_fault)?;
        let spent = cpu::used(pid).unwrap_or_default().saturating_sub(before).as_secs_f64();
        Ok(Made {
            program: self.python.clone(),
            name,
            id: made.id,
            bytes,
            files,
            prepare_mb_a_core: bytes as f64 / 1e6 / spent.max(1e-9),
        })
    }

    /// A host that has nothing.
    async fn host(&self, by: MountBy) -> Result<(tempfile::TempDir, Mounter), Fault> {
        let dir = tempfile::tempdir_in(&self.dir)
            .map_err(|error| io_fault("scratch directory", &error))?;
        let config = MountConfig {
            state_dir: dir.path().join("state"),
            cache_dir: dir.path().join("cache"),
            cache_bytes_max: 1 << 36,
            store: self.far.clone(),
            domain: "bench".to_owned(),
            by,
        };
        let mounter = Mounter::start_with(config, Serving::Inside).await.map_err(image_fault)?;
        Ok((dir, mounter))
    }

    async fn mount(
        mounter: &Mounter,
        id: ImageId,
        run: &Run,
    ) -> Result<(Arc<MountedImage>, Option<FirstRunGuard>), Fault> {
        mounter.mount_to_run(id, run).await.map_err(image_fault)
    }

    async fn in_image(image: Arc<MountedImage>, program: Program) -> Result<Duration, Fault> {
        let run = move || in_image(&image, &program);
        tokio::task::spawn_blocking(run).await.map_err(image_fault)?
    }

    /// A cold start and, on the same host, a warm one. `boot` says that there is a boot pack.
    async fn start(&self, made: &Made, times: &mut Times, boot: bool) -> Result<(), Fault> {
        let (id, run) = (made.id, &made.run());
        let (_dir, mounter) = self.host(MountBy::Auto).await?;
        self.far();
        let (gets, bytes) = self.counted();
        let started = Instant::now();
        let (image, _) = Self::mount(&mounter, id, run).await?;
        let mounted = started.elapsed();
        let ran = Self::in_image(image.clone(), made.program.clone()).await?;
        let took = ms(mounted + ran);
        if boot {
            let (gets_after, bytes_after) = self.counted();
            (times.gets, times.fetched) = (gets_after - gets, bytes_after - bytes);
            times.mount.push(ms(mounted));
            times.boot.push(took);
            let started = Instant::now();
            let (image, _) = Self::mount(&mounter, id, run).await?;
            let mounted = started.elapsed();
            times.warm.push(ms(mounted + Self::in_image(image, made.program.clone()).await?));
        } else {
            times.cold.push(took);
        }
        self.near();
        Ok(())
    }

    fn counted(&self) -> (u64, u64) {
        (self.far.gets.load(Ordering::Relaxed), self.far.bytes.load(Ordering::Relaxed))
    }

    /// Records the image's boot pack by a first run, as `image prepare --run` does.
    async fn record(&self, made: &Made) -> Result<(), Fault> {
        self.near();
        let (_dir, mounter) = self.host(MountBy::Auto).await?;
        let recording = mounter.record().await.map_err(image_fault)?;
        let image = mounter.mount_again(made.id).await.map_err(image_fault)?;
        Self::in_image(image, made.program.clone()).await?;
        let run = made.run();
        let done = mounter.finish_record(recording, made.id, Some(run.entry())).await;
        done.map(drop).map_err(image_fault)
    }

    /// The large image pulled and unpacked, then run.
    async fn unpacked_first(&self, made: &Made) -> Result<f64, Fault> {
        let (_dir, mounter) = self.host(MountBy::Unpack).await?;
        self.far();
        let started = Instant::now();
        let (image, _) = Self::mount(&mounter, made.id, &Run::of(&[], false)).await?;
        let pulled = started.elapsed();
        let ran = Self::in_image(image, made.program.clone()).await?;
        self.near();
        Ok(ms(pulled + ran))
    }
}

/// A name, where it comes from, its bytes and files.
type Named = (&'static str, Source, (u64, u64));

fn sources(bed: &Bed, large: &Path) -> Result<Vec<Named>, Fault> {
    let fault = |error| io_fault("the images", &error);
    let small = bed.dir.join("small");
    let sparse = bed.dir.join("sparse");
    for root in [large, &sparse] {
        fs::create_dir_all(root).map_err(fault)?;
        tree::program(root)?;
    }
    tree::pad(large, bed.options.large_bytes)?;
    let hole = fs::File::create(sparse.join("hole")).map_err(fault)?;
    hole.set_len(bed.options.sparse_bytes).map_err(fault)?;
    let many = bed.dir.join("many.tar");
    tree::many(&many, &small, bed.options.files)?;
    // The same shell in the large image: what it takes there is compared with the smallest image.
    tree::userland(large)?;
    let (small_bytes, small_files) = tree::measure(&small);
    let many_size = (small_bytes + 12 * bed.options.files, small_files + bed.options.files);
    let dir = |name, root: &Path| (name, Source::RootfsDir(root.to_owned()), tree::measure(root));
    Ok(vec![
        dir("small", &small),
        dir("large", large),
        dir("sparse", &sparse),
        ("many-files", Source::RootfsTar(many), many_size),
    ])
}

/// Measures.
///
/// # Errors
/// [`Code::Unsupported`] where images are not mounted lazily, or there is no Python; else what failed.
pub fn run(options: &Options) -> Result<Report, Fault> {
    let scratch = match &options.scratch {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let scratch = scratch.map_err(|error| io_fault("scratch directory", &error))?;
    let small = scratch.path().join("small");
    fs::create_dir_all(&small).map_err(|error| io_fault("scratch directory", &error))?;
    let bed = Bed {
        dir: scratch.path().to_owned(),
        far: FarStore::new(Arc::new(InMemory::new())),
        options: options.clone(),
        python: Program::Python(tree::program(&small)?),
    };
    let runtime = tokio::runtime::Runtime::new().map_err(|error| io_fault("runtime", &error))?;
    runtime.block_on(measure(&bed))
}

async fn measure(bed: &Bed) -> Result<Report, Fault> {
    if let MountMode::Unpacked { why } = bed.host(MountBy::Auto).await?.1.mode() {
        let text = format!("images are not mounted lazily here: {why}");
        return Err(Fault::new(Code::Unsupported, text));
    }
    let large = bed.dir.join("large");
    let mut made = Vec::new();
    for (name, source, size) in sources(bed, &large)? {
        made.push(bed.prepare(name, source, size).await?);
    }
    let userland = bed.dir.join("userland");
    if tree::userland(&userland)?.is_some() {
        let source = Source::RootfsDir(userland.clone());
        let tiny = bed.prepare("userland", source, tree::measure(&userland)).await?;
        let in_large = Made { name: "its in large", ..made[1].clone() };
        made.extend([tiny, in_large].map(|made| Made { program: Program::Shell, ..made }));
    }
    let mut times: Vec<Times> = made.iter().map(|_| Times::default()).collect();
    let Program::Python(interpreter) = &bed.python else { unreachable!("set so by `run`") };
    let mut runner = Runner::find(&large, interpreter, &bed.dir);
    let (mut plain, mut theirs) = (Vec::new(), Vec::new());
    in_root(&large, &bed.python)?;
    // Before there are boot packs.
    for _ in 0..bed.options.rounds.div_ceil(2) {
        for (made, times) in made.iter().zip(&mut times) {
            bed.start(made, times, false).await?;
        }
    }
    for made in &made {
        bed.record(made).await?;
    }
    for _ in 0..bed.options.rounds {
        for (made, times) in made.iter().zip(&mut times) {
            bed.start(made, times, true).await?;
        }
        plain.push(ms(in_root(&large, &bed.python)?));
        if let Some(runner) = &mut runner {
            theirs.push(ms(runner.run()?));
        }
    }
    let unpacked_first_ms = bed.unpacked_first(&made[1]).await?;
    let reads = reads::measure(bed).await?;
    let rows = made.iter().zip(times).map(|(made, times)| row(bed, made, times)).collect();
    Ok(Report {
        latency_ms: ms(bed.options.latency),
        mb_per_second: bed.options.bytes_per_second as f64 / 1e6,
        rows,
        unpacked_first_ms,
        plain_ms: Figure::of(plain),
        runner: runner.map(|runner| (runner.name.to_owned(), Figure::of(theirs))),
        reads,
    })
}

fn row(bed: &Bed, made: &Made, times: Times) -> Row {
    let link = times.fetched as f64 / bed.options.bytes_per_second.max(1) as f64;
    Row {
        name: made.name,
        shell: made.program == Program::Shell,
        bytes: made.bytes,
        files: made.files,
        prepare_mb_a_core: made.prepare_mb_a_core,
        mount_ms: Figure::of(times.mount),
        cold_ms: Figure::of(times.cold),
        boot_ms: Figure::of(times.boot),
        warm_ms: Figure::of(times.warm),
        gets: times.gets,
        fetched: times.fetched,
        bound_ms: ms(bed.options.latency) + link * 1e3,
    }
}

impl Report {
    /// The largest of the medians of images in which the same program was run over the smallest.
    #[must_use]
    pub fn spread(&self, shell: bool, of: impl Fn(&Row) -> Figure) -> f64 {
        let rows = || self.rows.iter().filter(|row| row.shell == shell);
        let medians = || rows().map(|row| of(row).median);
        medians().fold(f64::MIN, f64::max) / medians().fold(f64::MAX, f64::min)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "storage: {:.0} ms a GET, {:.0} MB/s for all; times in ms, median (least to most)",
            self.latency_ms, self.mb_per_second
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:12} {:>8.1} MB {:>8} files  prepared at {:>4.0} MB/s a core\n    \
                 first output: cold {:.0} | cold with boot pack {:.0} | warm {:.0} | cold to warm {:.2}x\n    \
                 with boot pack: mount {:.1}, {} GETs, {:.1} MB = {:.1} % of the image; \
                 bound of one round trip and these bytes {:.0} ms",
                row.name,
                row.bytes as f64 / 1e6,
                row.files,
                row.prepare_mb_a_core,
                row.cold_ms,
                row.boot_ms,
                row.warm_ms,
                row.boot_ms.median / row.warm_ms.median,
                row.mount_ms,
                row.gets,
                row.fetched as f64 / 1e6,
                row.fetched as f64 / row.bytes as f64 * 100.0,
                row.bound_ms,
            )?;
        }
        for (shell, program) in [(false, "python"), (true, "shell")] {
            if self.rows.iter().any(|row| row.shell == shell) {
                writeln!(
                    f,
                    "{program}, slowest over fastest image: cold {:.2}x, with boot pack {:.2}x, warm {:.2}x, mount {:.2}x",
                    self.spread(shell, |row| row.cold_ms),
                    self.spread(shell, |row| row.boot_ms),
                    self.spread(shell, |row| row.warm_ms),
                    self.spread(shell, |row| row.mount_ms),
                )?;
            }
        }
        writeln!(f, "large pulled and unpacked first, then run: {:.0} ms", self.unpacked_first_ms)?;
        writeln!(f, "the unpacked tree as it is: {:.0} ms", self.plain_ms)?;
        match &self.runner {
            Some((name, figure)) => writeln!(f, "{name} on the unpacked tree: {figure:.0} ms")?,
            None => writeln!(f, "no crun and no runc that runs here")?,
        }
        write!(f, "{}", self.reads)
    }
}
