//! A rehearsal: an image's command run once where the image was prepared, so that its boot pack is there before the first
//! host needs it.
//!
//! It is a sandbox like any other, with nothing but its own loopback: images are hostile here too. What it reads until it ends, or
//! until its time is up, for a server does not end, becomes the boot pack. Left out: the fleet; no daemon takes part.

use std::{io::Read, os::fd::OwnedFd, path::Path, sync::Arc, time::Duration};

use hostd_image::{
    BootSummary, ImageId, MountBy, MountConfig, MountMode, MountedImage, Mounter, Run, Serving,
};
use hostd_sandbox::{
    ClaimSpec, Event, Events, ExitStatus, Joined, Limits, Program, RootSpec, Shape, Spawner,
};
use object_store::ObjectStore;
use tokio::time::Instant;
use wire::{Code, Fault};

use super::{
    start::{argv_of, claim_fault},
    start_fault,
};
use crate::images;

/// The one box's shape: bounds for what it may take of the machine that prepares.
const SHAPE: &str = "rehearsal";
const CPU_MILLIS: u32 = 4_000;
const MEMORY_BYTES: u64 = 2 << 30;
const PIDS: u32 = 1_024;
/// Frames that are kept on disk meanwhile.
const CACHE_BYTES_MAX: u64 = 4 << 30;
/// How long a box that was killed is waited for.
const GONE_WAIT: Duration = Duration::from_secs(10);
/// Its id; nothing else runs under that spawner.
const ID: hostd_sandbox::SandboxId = [1; 16];

/// Takes what the command says, piece by piece, both streams.
pub type Said = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What came of a rehearsal.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// The boot pack's name.
    pub entry: String,
    /// What is in it.
    pub boot: BootSummary,
    /// How the command ended; `None` when its time was up first.
    pub ended: Option<ExitStatus>,
}

/// Runs a command of an image, for at most so long, and writes what it read as its boot pack. No words mean the image's own
/// command. `dir` is an empty directory, private to the caller.
///
/// # Errors
/// [`Code::Unsupported`] where images are not mounted lazily or there may be no boxes; [`Code::CommandNotFound`] and its
/// like; [`Code::BadRequest`] when it ended in an error. No boot pack was written then, and the image is as good as before.
pub async fn rehearse(
    store: Arc<dyn ObjectStore>,
    domain: &str,
    id: ImageId,
    command: &[String],
    (at_most, said): (Duration, Said),
    dir: &Path,
) -> Result<Rehearsal, Fault> {
    let config = MountConfig {
        state_dir: dir.join("mounts"),
        cache_dir: dir.join("cache"),
        cache_bytes_max: CACHE_BYTES_MAX,
        store,
        domain: domain.to_owned(),
        by: MountBy::Auto,
    };
    let image_fault = |error| images::fault(&error);
    let mounter = Mounter::start_with(config, Serving::Inside).await.map_err(image_fault)?;
    if let MountMode::Unpacked { why } = mounter.mode() {
        let text = format!("images are not mounted lazily here, so that nothing is noted: {why}");
        return Err(Fault::new(Code::Unsupported, text));
    }
    // From before the mount, whose own reads belong to a start.
    let recording = mounter.record().await.map_err(image_fault)?;
    let image = mounter.mount_again(id).await.map_err(image_fault)?;
    let boxes = hostd_sandbox::Config {
        slots: 2,
        linger_s: 1,
        ..hostd_sandbox::Config::new(
            dir.join("boxes"),
            vec![Shape {
                name: SHAPE.to_owned(),
                cpu_millis: CPU_MILLIS,
                memory_bytes: MEMORY_BYTES,
                pids: PIDS,
                parked: 1,
            }],
        )
    };
    let joined = tokio::task::spawn_blocking(move || Spawner::connect_or_start(&boxes)).await;
    let joined = joined.map_err(|_| Fault::new(Code::Internal, "the spawner was not started"))?;
    let Joined { spawner, events, .. } = joined.map_err(|error| start_fault(&error))?;
    let ended = run(&spawner, events, &image, command, (at_most, said)).await;
    if let Err(error) = spawner.shutdown(true).await {
        tracing::debug!(%error, "the rehearsal's spawner was gone already");
    }
    let ended = ended?;
    if let Some(status) = ended.filter(|status| status.code != Some(0)) {
        let how = match (status.code, status.signal) {
            (Some(code), _) => format!("with code {code}"),
            (None, Some(signal)) => format!("by signal {signal}"),
            (None, None) => "in an unknown way".to_owned(),
        };
        let oom = if status.oom { ", out of memory" } else { "" };
        let text = format!("the command ended {how}{oom}; no boot pack was written");
        return Err(Fault::new(Code::BadRequest, text));
    }
    let entry = Run::of(command, false).entry().to_owned();
    let boot = mounter.finish_record(recording, id, Some(&entry)).await.map_err(image_fault)?;
    Ok(Rehearsal { entry, boot, ended })
}

/// Runs the command in a box until it ends or its time is up.
async fn run(
    spawner: &Spawner,
    mut events: Events,
    image: &MountedImage,
    command: &[String],
    (at_most, said): (Duration, Said),
) -> Result<Option<ExitStatus>, Fault> {
    let (layers, config) = (image.layers(), image.config());
    let root = RootSpec::layered(&layers.lower, &layers.data_only).map_err(|error| {
        Fault::new(Code::BoxFailed, format!("open the image's layers: {error}"))
    })?;
    let program = Program {
        env: config.env.clone(),
        cwd: config.cwd.clone(),
        user: config.user.clone(),
        ..Program::new(argv_of(command, config)?)
    };
    let claim = ClaimSpec {
        id: ID,
        shape: SHAPE.to_owned(),
        root,
        program,
        hostname: String::new(),
        limits: Limits::default(),
        network: None,
    };
    let until = Instant::now() + at_most;
    let running = spawner.claim(claim).await.map_err(|error| claim_fault(&error))?;
    for stream in [running.stdio.stdout, running.stdio.stderr].into_iter().flatten() {
        let said = Arc::clone(&said);
        // Ends with the box, which holds the other end.
        std::thread::spawn(move || pass_on(stream, &*said));
    }
    if let Ok(status) = tokio::time::timeout_at(until, exit(&mut events)).await {
        return status.map(Some);
    }
    spawner.kill(ID).await.map_err(|error| claim_fault(&error))?;
    match tokio::time::timeout(GONE_WAIT, exit(&mut events)).await {
        Ok(status) => status.map(|_| None),
        Err(_) => Err(Fault::new(Code::BoxFailed, "the box did not end when it was killed")),
    }
}

async fn exit(events: &mut Events) -> Result<ExitStatus, Fault> {
    while let Some(event) = events.recv().await {
        match event {
            Event::Exited(exited) if exited.id == ID => return Ok(exited.status),
            Event::Gone => break,
            _ => {}
        }
    }
    Err(Fault::new(Code::BoxFailed, "the spawner went away, and the box with it"))
}

fn pass_on(stream: OwnedFd, said: &(dyn Fn(&[u8]) + Send + Sync)) {
    let mut stream = std::fs::File::from(stream);
    let mut buffer = [0; 8 << 10];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        said(&buffer[..len]);
    }
}
