//! Real boxes: what ties the core to the spawner, the images and the journal.
//!
//! The spawner outlives hostd. At a start the journal says what was claimed and the spawner what lives: what both know
//! is taken up, what only the spawner knows is killed, what only the journal knows has ended. News of the spawner
//! may overtake the answers that they belong to; both orders are handled ([`Real::early`]).

mod adopt;
mod ask;
pub(crate) mod rehearse;
mod start;
mod ways;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    path::Path,
    rc::Rc,
    time::Duration,
};

use hostd_core::{Sandbox, limits::REMEMBER_MS};
use hostd_sandbox::{Event, Events, ExitStatus, Live, Spawner, StartError};
use tokio::sync::oneshot;
use wire::{
    Code, Fault, HostId, LaunchId, SandboxId,
    call::{Exit, ExitWhy, State},
};

pub(crate) use self::{
    adopt::adopt,
    ask::{
        connect, connect_fd, end_input, exec, file, open_read, open_write, os_fault, resize,
        signal, stats, watch,
    },
    start::{refuse, start},
};
use self::{start::claim_fault, ways::Ways};
use crate::{
    clock,
    config::{Config, EgressMode, HostConfig},
    doors::DoorsConfig,
    host::{Backend, HostCell},
    images::{ImageSettings, Images},
    journal::{Journal, Left, Past, Row, Stage, Written},
    note::Note,
    runtime::spawn,
};

/// Processes and threads of one sandbox whose launch did not say.
const PIDS: u32 = 1_024;

/// Bytes of the cache of unpacked images.
const CACHE_BYTES_MAX: u64 = 40 << 30;

/// What a start found.
#[derive(Debug, Default)]
struct Found {
    left: Left,
    live: Vec<Live>,
    exited: Vec<hostd_sandbox::Exited>,
    events: Option<Events>,
    /// Whether the spawner is a new one, which knows nothing of boxes before it.
    started: bool,
}

/// Real boxes of one host.
#[derive(Debug)]
pub(crate) struct Real {
    host: HostId,
    spawner: RefCell<Option<Spawner>>,
    boxes: hostd_sandbox::Config,
    images: Images,
    journal: Journal,
    found: RefCell<Found>,
    /// Exits of boxes whose start has not been answered yet.
    early: RefCell<HashMap<u64, Exit>>,
    /// Who waits for a box to be gone that was killed before its launch was answered.
    awaited: RefCell<HashMap<u64, oneshot::Sender<()>>>,
    /// Rows of the journal whose time runs, all the same time.
    forgetting: RefCell<VecDeque<(u64, u64, LaunchId)>>,
    stopping: Cell<bool>,
    /// What the image servers counted, when it was last asked and not yet published.
    pub(crate) image_metrics: Cell<Option<hostd_image::ImageMetrics>>,
    /// Ways out of boxes.
    ways: Ways,
    /// Where ports are published.
    doors: DoorsConfig,
}

/// A sandbox's name for the spawner.
pub(crate) fn box_id(id: SandboxId) -> hostd_sandbox::SandboxId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&id.host.0.to_be_bytes());
    bytes[8..].copy_from_slice(&id.local.to_be_bytes());
    bytes
}

fn sandbox_id(id: hostd_sandbox::SandboxId) -> SandboxId {
    let (host, local) = id.split_at(8);
    let number = |bytes: &[u8]| bytes.iter().fold(0, |n: u64, byte| n << 8 | u64::from(*byte));
    SandboxId { host: HostId(number(host)), local: number(local) }
}

/// How a program ended, as the wire says it.
fn exit_of(status: ExitStatus) -> Exit {
    let (code, why) = match (status.code, status.signal) {
        (_, Some(signal)) => (128 + signal, ExitWhy::Signalled),
        (Some(code), None) => (code, ExitWhy::Returned),
        (None, None) => (255, ExitWhy::Lost),
    };
    let killed = code == 128 + libc::SIGKILL;
    Exit { code, why: if status.oom && killed { ExitWhy::OutOfMemory } else { why } }
}

fn start_fault(error: &StartError) -> Fault {
    let code = match error {
        StartError::NeedsRoot => Code::Privilege,
        StartError::Version { .. } | StartError::Ending => Code::Busy,
        StartError::Config(_) => Code::Config,
        StartError::Setup(_) => Code::Unsupported,
        StartError::Io { .. } => Code::Internal,
    };
    Fault::new(code, error.to_string())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let gone = |_| Fault::new(Code::Internal, "a blocking step ended without an answer");
    tokio::task::spawn_blocking(work).await.map_err(gone)?
}

impl Real {
    /// Opens the journal, and joins or starts the spawner.
    ///
    /// # Errors
    /// Why there can be no real boxes here: nothing was started.
    pub(crate) async fn open(
        config: &Config,
        host: &HostConfig,
        id: HostId,
    ) -> Result<Self, Fault> {
        let dir = host.state.join("images");
        let settings = ImageSettings {
            by: config.image_mount,
            record: config.record_boot_packs,
            cache_bytes_max: CACHE_BYTES_MAX,
        };
        let images = Images::open(&config.objects, dir, settings)?;
        let boxes = boxes_config(config, &host.state, id)?;
        let path = host.state.join("journal");
        let (journal, left) = blocking(move || Journal::open(&path)).await?;
        let joined = {
            let boxes = boxes.clone();
            blocking(move || join(&boxes)).await?
        };
        let ways = open_ways(config, host, &boxes).await?;
        let found = Found {
            left,
            live: joined.live,
            exited: joined.exited,
            events: Some(joined.events),
            started: joined.started,
        };
        Ok(Self {
            host: id,
            spawner: RefCell::new(Some(joined.spawner)),
            boxes,
            images,
            journal,
            found: RefCell::new(found),
            early: RefCell::default(),
            awaited: RefCell::default(),
            forgetting: RefCell::default(),
            stopping: Cell::new(false),
            image_metrics: Cell::new(None),
            ways,
            doors: DoorsConfig { at: config.publish, ports: config.publish_ports },
        })
    }

    /// The spawner.
    ///
    /// # Errors
    /// [`Code::BoxFailed`] while there is none.
    fn spawner(&self) -> Result<Spawner, Fault> {
        let text = "the spawner of this host is gone and being started again; nothing was started";
        self.spawner.borrow().clone().ok_or_else(|| Fault::new(Code::BoxFailed, text))
    }

    /// Stops with the daemon: sandboxes run on, or end now.
    pub(crate) async fn stop(&self, end_sandboxes: bool) {
        self.stopping.set(true);
        if !end_sandboxes {
            return;
        }
        self.ways.stop().await;
        if let Ok(spawner) = self.spawner() {
            let shut = spawner.shutdown(true);
            if !matches!(tokio::time::timeout(Duration::from_millis(1_500), shut).await, Ok(Ok(())))
            {
                tracing::warn!("the spawner did not say that all sandboxes have ended");
            }
        }
    }

    /// Writes the row of a sandbox that runs.
    fn put_running(&self, cell: &HostCell, local: u64) -> Written {
        let core = cell.core.borrow();
        match core.sandbox(local).filter(|sandbox| sandbox.is_live()) {
            Some(sandbox) => self.journal.put(local, row_of(sandbox, &core, Stage::Running)),
            None => Written::nothing(),
        }
    }

    /// Forgets rows whose time has run.
    pub(crate) fn forget(&self, now_ms: u64) {
        let mut forgetting = self.forgetting.borrow_mut();
        while let Some(&(at_ms, local, launch_id)) = forgetting.front()
            && at_ms <= now_ms
        {
            forgetting.pop_front();
            self.journal.forget(local, launch_id);
        }
    }

    fn forget_later(&self, now_ms: u64, local: u64, launch_id: LaunchId) {
        self.forgetting.borrow_mut().push_back((now_ms + REMEMBER_MS, local, launch_id));
    }
}

/// The worker stands beside the spawner, as the user just below the boxes' own.
async fn open_ways(
    config: &Config,
    host: &HostConfig,
    boxes: &hostd_sandbox::Config,
) -> Result<Ways, Fault> {
    let dir = host.state.join("egress");
    let doors: Vec<_> = [host.listen].into_iter().chain(host.advertise).collect();
    let wanted = (config.egress == EgressMode::Policy).then(|| hostd_egress::EgressConfig {
        dir: dir.clone(),
        uid: boxes.uid_base.saturating_sub(1),
        settings: config.egress_settings(&doors),
    });
    Ways::open(dir, wanted).await
}

fn boxes_config(config: &Config, state: &Path, id: HostId) -> Result<hostd_sandbox::Config, Fault> {
    let mut shapes = Vec::new();
    for (shape, parked) in config.shapes()?.iter().zip(config.pool) {
        let wide = |_| Fault::new(Code::Config, "shapes: cpu_millis is beyond 32 bits");
        shapes.push(hostd_sandbox::Shape {
            name: shape.name.clone(),
            cpu_millis: u32::try_from(shape.need.cpu_millis).map_err(wide)?,
            memory_bytes: shape.need.memory_bytes,
            pids: PIDS,
            parked,
        });
    }
    let mut boxes = hostd_sandbox::Config::new(state.join("boxes"), shapes);
    let parked: u32 = config.pool.iter().sum();
    boxes.slots = config.boxes_max.saturating_add(parked).min(hostd_sandbox::SLOTS_MAX);
    boxes.uid_base = config.uid_base.unwrap_or_else(|| uid_base(id, boxes.slots));
    Ok(boxes)
}

/// User ids between these are given to boxes: above what machines use, below 2^31.
const UIDS: std::ops::Range<u32> = 0x2000_0000..0x7fff_0000;

/// A band of user ids by the host's id, so that hosts that share a machine seldom share one.
fn uid_base(id: HostId, slots: u32) -> u32 {
    let band = slots.max(1).saturating_mul(hostd_sandbox::UIDS_A_BOX);
    let bands = ((UIDS.end - UIDS.start) / band).max(1);
    let mixed = id.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let nth = u32::try_from(mixed % u64::from(bands)).unwrap_or(0);
    UIDS.start + nth * band
}

fn join(boxes: &hostd_sandbox::Config) -> Result<hostd_sandbox::Joined, Fault> {
    match hostd_sandbox::sweep(boxes) {
        Ok(swept) if swept.killed > 0 || swept.groups_left > 0 => {
            tracing::warn!(?swept, "a dead spawner had left something behind");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "what a dead spawner left could not be swept"),
    }
    Spawner::connect_or_start(boxes).map_err(|error| start_fault(&error))
}

/// A sandbox of this host has ended, and nothing of it is left.
fn ended(cell: &Rc<HostCell>, real: &Real, now_ms: u64, local: u64, exit: Exit) {
    cell.exited(now_ms, local, exit);
    let row = {
        let core = cell.core.borrow();
        let Some(sandbox) = core.sandbox(local) else { return };
        let State::Stopped(exit) = sandbox.state else { return };
        let note = &sandbox.note;
        note.processes.borrow().end_all(exit);
        note.doors.borrow_mut().close();
        note.image.borrow_mut().take();
        note.first_run.borrow_mut().take();
        row_of(sandbox, &core, Stage::Ended(now_ms, exit))
    };
    real.forget_later(now_ms, local, row.launch_id);
    drop(real.journal.put(local, row));
    cell.settle(now_ms);
}

/// The row of a sandbox that is known to the core.
fn row_of(sandbox: &Sandbox<Rc<Note>>, core: &crate::host::Core, stage: Stage) -> Row {
    let note = &sandbox.note;
    let image = note.image.borrow().as_ref().map(|image| image.id());
    Row {
        launch_id: sandbox.launch_id,
        body: core.launches().body(&sandbox.launch_id).unwrap_or_default(),
        shape: u8::try_from(sandbox.shape.index()).unwrap_or(u8::MAX),
        admitted_ms: sandbox.admitted_ms,
        hard_at_ms: sandbox.hard_at_ms.unwrap_or(0),
        idle_ms: sandbox.idle_ms,
        image: image.unwrap_or(wire::ImageId([0; 32])),
        stage,
        published: note.doors.borrow().ports(),
        request: note.request.to_vec(),
    }
}

/// Keeps changed deadlines over a restart.
///
/// # Errors
/// [`Code::Storage`]: they hold until the daemon restarts.
pub(crate) async fn keep_deadlines(cell: &HostCell, local: u64) -> Result<(), Fault> {
    match &cell.backend {
        Backend::Real(real) => real.put_running(cell, local).done().await,
        Backend::None { .. } => Ok(()),
    }
}

/// Keeps a cancel over a restart.
///
/// # Errors
/// [`Code::Storage`]: it holds until the daemon restarts.
pub(crate) async fn keep_cancel(cell: &HostCell, launch_id: LaunchId) -> Result<(), Fault> {
    match &cell.backend {
        Backend::Real(real) => {
            real.forget_later(clock::now_ms(), 0, launch_id);
            real.journal.remember(launch_id, Past::Cancelled).done().await
        }
        Backend::None { .. } => Ok(()),
    }
}

/// Ends a running sandbox; its exit comes as news.
pub(crate) fn kill(cell: &Rc<HostCell>, id: SandboxId) {
    let cell = Rc::clone(cell);
    spawn(async move {
        let Backend::Real(real) = &cell.backend else { return };
        let Ok(spawner) = real.spawner() else { return };
        if let Err(error) = spawner.kill(box_id(id)).await {
            tracing::debug!(%id, %error, "a kill was not taken: its exit is on the way");
        }
    });
}

/// Hears the spawner's news to its end; then starts another one.
async fn listen(cell: Rc<HostCell>, mut events: Events) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Exited(exited) => heard_exit(&cell, &exited).await,
            Event::ExecExited { id, exec, status } => {
                let core = cell.core.borrow();
                if let Some(sandbox) = core.sandbox(sandbox_id(id).local) {
                    sandbox.note.processes.borrow_mut().exec_exited(exec, exit_of(status));
                }
            }
            Event::Pool(pool) => heard_pool(&cell, &pool),
            Event::Gone => break,
        }
    }
    gone(cell).await;
}

/// Heartbeats tell of no slots while the state directory cannot be written: a launch would fail.
pub(crate) fn tell_if_full(cell: &HostCell, now_ms: u64) {
    let Backend::Real(real) = &cell.backend else { return };
    let full = !real.journal.is_well();
    if cell.core.borrow().admission().full() != full {
        tracing::warn!(
            full,
            "room to write down what is started: free slots are told while it is there"
        );
        cell.core.borrow_mut().set_full(full);
        cell.settle(now_ms);
    }
}

/// Heartbeats tell of no more slots than there are boxes for: those parked, and those that can be made while a claim
/// waits.
fn heard_pool(cell: &HostCell, pool: &hostd_sandbox::PoolState) {
    tracing::debug!(?pool, "pool");
    let Some(shape) = cell.defaults.shapes.by_name(&pool.shape) else { return };
    // While slots are left, boxes are made faster than heartbeats could tell of them.
    let boxes = (pool.slots_left == 0).then_some(pool.parked);
    cell.core.borrow_mut().set_boxes(shape, boxes);
    cell.settle(clock::now_ms());
}

async fn heard_exit(cell: &Rc<HostCell>, exited: &hostd_sandbox::Exited) {
    let Backend::Real(real) = &cell.backend else { return };
    let local = sandbox_id(exited.id).local;
    let exit = exit_of(exited.status);
    let state = cell.core.borrow().sandbox(local).map(|sandbox| sandbox.state);
    if let Some(waiter) = real.awaited.borrow_mut().remove(&local) {
        let _ = waiter.send(());
    } else if state == Some(State::Claimed) {
        real.early.borrow_mut().insert(local, exit);
    } else {
        ended(cell, real, clock::now_ms(), local, exit);
    }
    if let Ok(spawner) = real.spawner() {
        let _ = spawner.forget(exited.id).await;
    }
}

/// The spawner is gone and every box with it: says so, and starts another one.
async fn gone(cell: Rc<HostCell>) {
    let Backend::Real(real) = &cell.backend else { return };
    if real.stopping.get() {
        return;
    }
    tracing::error!("the spawner is gone and every box with it: starting another");
    real.spawner.borrow_mut().take();
    let now_ms = clock::now_ms();
    let lost: Vec<u64> = {
        let mut core = cell.core.borrow_mut();
        core.set_sick(true);
        let runs =
            |sandbox: &&Sandbox<Rc<Note>>| matches!(sandbox.state, State::Running | State::Paused);
        core.sandboxes().filter(runs).map(|sandbox| sandbox.id.local).collect()
    };
    for local in lost {
        ended(&cell, real, now_ms, local, Exit { code: 137, why: ExitWhy::Lost });
    }
    for (_, waiter) in real.awaited.borrow_mut().drain() {
        let _ = waiter.send(());
    }
    cell.settle(now_ms);
    let mut wait = Duration::from_millis(100);
    let joined = loop {
        let boxes = real.boxes.clone();
        match blocking(move || join(&boxes)).await {
            Ok(joined) => break joined,
            Err(fault) => tracing::error!(%fault, "no spawner: this host stays sick"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(10));
        if real.stopping.get() {
            return;
        }
    };
    *real.spawner.borrow_mut() = Some(joined.spawner);
    cell.core.borrow_mut().set_sick(false);
    cell.settle(clock::now_ms());
    spawn(listen(Rc::clone(&cell), joined.events));
}
