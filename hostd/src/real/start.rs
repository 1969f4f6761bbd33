//! One real start: image, journal and box at once, then the answer.

use std::{rc::Rc, time::Duration};

use hostd_core::Ask;
use hostd_image::{ImageConfig, MountedImage};
use hostd_sandbox::{
    ClaimError, ClaimSpec, Fault as BoxFault, Program, Refusal, RootSpec, Stdio, TtySize,
};
use tokio::sync::oneshot;
use wire::{
    Code, Fault, SandboxId,
    call::MAIN_PROCESS,
    launch::{LaunchReply, LaunchRequest, Refused, Steps},
};

use super::{Real, box_id, ended, row_of};
use crate::{
    clock,
    doors::{self, Doors},
    host::{Backend, HostCell},
    journal::{Past, Stage},
    launch::Launch,
    metrics::count,
    note::Note,
    process::Process,
    runtime::spawn,
};

/// A terminal's size until its client says it.
const TTY: TtySize = TtySize { rows: 24, cols: 80 };

/// How long a box that must not run is waited for to be gone.
const GONE_WAIT: Duration = Duration::from_secs(5);

/// Begins a start; its outcome comes with the note.
pub(crate) fn start(cell: &Rc<HostCell>, id: SandboxId, ask: Ask) -> Launch {
    let note = {
        let mut core = cell.core.borrow_mut();
        core.watch(id.local);
        core.sandbox(id.local).map(|sandbox| Rc::clone(&sandbox.note))
    };
    let Some(note) = note else {
        let fault = Fault::new(Code::Internal, "a claimed sandbox has no record");
        return Launch::Now(LaunchReply::Failed(fault));
    };
    let (cell, own) = (Rc::clone(cell), Rc::clone(&note));
    spawn(async move {
        let Backend::Real(real) = &cell.backend else { return };
        let reply = make(&cell, real, &own, ask).await;
        match &reply {
            LaunchReply::Started(_) => count(&cell.counts.started),
            LaunchReply::Refused(_) => count(&cell.counts.refused),
            LaunchReply::Failed(fault) => {
                count(&cell.counts.failed);
                tracing::debug!(id = %own.id, %fault, "a launch failed");
            }
        }
        own.outcome.set(reply);
        let now_ms = clock::now_ms();
        // A program may have ended before its start was told.
        let early = real.early.borrow_mut().remove(&own.id.local);
        if let Some(exit) = early {
            ended(&cell, real, now_ms, own.id.local, exit);
        }
        cell.settle(now_ms);
    });
    Launch::Later(note)
}

async fn make(cell: &Rc<HostCell>, real: &Real, note: &Rc<Note>, ask: Ask) -> LaunchReply {
    let arrived_ns = clock::now_ns();
    let local = note.id.local;
    match attempt(cell, real, note, &ask, arrived_ns).await {
        Ok((stdio, steps)) => {
            let started = cell.core.borrow_mut().handle_started(clock::now_ms(), local, steps);
            match started {
                Ok(started) => {
                    enter_main(cell, note, stdio);
                    doors::serve(cell, note);
                    // Not waited for: whoever lives says that it ran.
                    drop(real.put_running(cell, local));
                    LaunchReply::Started(started)
                }
                Err(fault) => {
                    undo(real, note.id).await;
                    failed(cell, real, note, &ask, fault).await
                }
            }
        }
        Err(Outcome::Failed(fault)) => failed(cell, real, note, &ask, fault).await,
        Err(Outcome::NoBox(code)) => {
            note.doors.borrow_mut().close();
            drop(real.journal.drop_claim(local, ask.launch_id, None));
            let now_ms = clock::now_ms();
            let refused = cell.core.borrow_mut().handle_no_box(now_ms, local, ask.named, code);
            LaunchReply::Refused(remembered(real, &ask, refused).await)
        }
    }
}

/// Refuses a launch. A named one is refused by the next start of the daemon too (PROTOCOL 6.12), so its answer waits for
/// the journal.
pub(crate) fn refuse(cell: &Rc<HostCell>, ask: Ask, refused: Refused) -> Launch {
    if !ask.named || matches!(cell.backend, Backend::None { .. }) {
        return Launch::Now(LaunchReply::Refused(refused));
    }
    let note = Rc::new(Note::new(SandboxId { host: cell.id, local: 0 }, &[]));
    let (cell, own) = (Rc::clone(cell), Rc::clone(&note));
    spawn(async move {
        let Backend::Real(real) = &cell.backend else { return };
        own.outcome.set(LaunchReply::Refused(remembered(real, &ask, refused).await));
    });
    Launch::Later(note)
}

/// What is answered for a refusal once it is in the journal, if it has to be there.
async fn remembered(real: &Real, ask: &Ask, refused: Refused) -> Refused {
    if !ask.named || refused.code == Code::Overloaded {
        return refused;
    }
    real.forget_later(clock::now_ms(), 0, ask.launch_id);
    match real.journal.remember(ask.launch_id, Past::Refused(refused.code)).done().await {
        Ok(()) => refused,
        // The one refusal that need not be remembered.
        Err(_) => Refused { code: Code::Overloaded, ..refused },
    }
}

async fn failed(
    cell: &Rc<HostCell>,
    real: &Real,
    note: &Rc<Note>,
    ask: &Ask,
    fault: Fault,
) -> LaunchReply {
    let now_ms = clock::now_ms();
    cell.core.borrow_mut().handle_failed(now_ms, note.id.local, fault.clone());
    note.image.borrow_mut().take();
    note.first_run.borrow_mut().take();
    note.doors.borrow_mut().close();
    let past = match fault.code {
        Code::Cancelled => Past::Cancelled,
        _ => Past::Failed(ask.body, fault.clone()),
    };
    let written = real.journal.drop_claim(note.id.local, ask.launch_id, Some(past));
    real.forget_later(now_ms, note.id.local, ask.launch_id);
    // For a named launch placers go on to its next home, which the next start of the daemon must not contradict.
    if ask.named && written.done().await.is_err() {
        tracing::warn!(id = %note.id, "a failed named launch is not in the journal");
    }
    LaunchReply::Failed(fault)
}

/// A start that did not come about.
enum Outcome {
    /// Tried, undone.
    Failed(Fault),
    /// No box was to be had: others may have one.
    NoBox(Code),
}

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

/// Makes the box and executes the program.
async fn attempt(
    cell: &Rc<HostCell>,
    real: &Real,
    note: &Rc<Note>,
    ask: &Ask,
    arrived_ns: u64,
) -> Result<(Stdio, Steps), Outcome> {
    let request = LaunchRequest::from_bytes(&note.request).map_err(|malformed| {
        Fault::new(Code::BadRequest, format!("the request is malformed: {malformed}"))
    })?;
    let network = real.ways.admit(&request.network)?;
    if !request.publish.is_empty() {
        *note.doors.borrow_mut() = Doors::bind(real.doors, &request.publish)?;
    }
    let budget = Duration::from_millis(u64::from(ask.budget_ms));
    let mounting = real.images.mount(&request.tenant, &request.image, &request.command);
    let (image, first_run) = tokio::time::timeout(budget, mounting).await.map_err(|_| {
        let text = "the launch's time ran out while its image was being mounted; the mount goes on";
        Fault::new(Code::BudgetSpent, text)
    })??;
    let mounted_ns = clock::now_ns();
    note.image.borrow_mut().replace(std::sync::Arc::clone(&image));
    *note.first_run.borrow_mut() = first_run;
    // From here to the answer the journal's thread works beside the spawner.
    let row = {
        let core = cell.core.borrow();
        core.sandbox(note.id.local).map(|sandbox| row_of(sandbox, &core, Stage::Claimed))
    };
    let gone = || Fault::new(Code::Internal, "a claimed sandbox has no record");
    let written = real.journal.put(note.id.local, row.ok_or_else(gone)?);
    let spec = ClaimSpec { network, ..spec_of(cell, note.id, ask, &request, &image)? };
    let claimed = real.spawner()?.claim(spec).await;
    let running = claimed.map_err(claim_outcome)?;
    if let Err(fault) = written.done().await {
        // What is not in the journal would be killed by the next start: it must not be answered.
        undo(real, note.id).await;
        return Err(fault.into());
    }
    if network.is_some()
        && let Err(fault) = real.carry(note.id, &request.network).await
    {
        undo(real, note.id).await;
        return Err(fault.into());
    }
    let at = &running.steps;
    let between = |from: u64, to: u64| to.saturating_sub(from);
    let steps = Steps {
        image_ns: between(arrived_ns, mounted_ns),
        box_ns: between(at.received, at.box_found),
        root_ns: between(at.box_found, at.pivoted),
        exec_ns: between(at.pivoted, at.executed),
        total_ns: between(arrived_ns, clock::now_ns()),
    };
    Ok((running.stdio, steps))
}

/// Ends a box whose launch is not answered with a start, and waits until nothing of it is left.
async fn undo(real: &Real, id: SandboxId) {
    let (waiter, gone) = oneshot::channel();
    if real.early.borrow_mut().remove(&id.local).is_some() {
        return;
    }
    real.awaited.borrow_mut().insert(id.local, waiter);
    if let Ok(spawner) = real.spawner()
        && spawner.kill(box_id(id)).await.is_ok()
        && tokio::time::timeout(GONE_WAIT, gone).await.is_err()
    {
        tracing::error!(%id, "a box that must not run is not gone after 5 s");
    }
    real.awaited.borrow_mut().remove(&id.local);
}

/// Enters the main process and reads what it says.
pub(super) fn enter_main(cell: &Rc<HostCell>, note: &Rc<Note>, stdio: Stdio) {
    let log_bytes = LaunchRequest::access(&note.request)
        .map_or(0, |request| request.limits.log_bytes.to_native());
    let log_bytes = if log_bytes == 0 { cell.defaults.log_bytes } else { log_bytes };
    enter(cell, note, MAIN_PROCESS, 0, stdio, log_bytes);
}

/// Bytes of output that a launch may ask to be kept.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Enters a process of a sandbox and reads what it says.
pub(super) fn enter(
    cell: &Rc<HostCell>,
    note: &Rc<Note>,
    number: u32,
    exec: u64,
    stdio: Stdio,
    log_bytes: u64,
) -> Option<Rc<Process>> {
    let log_bytes = usize::try_from(log_bytes.min(LOG_BYTES_MAX)).unwrap_or(1 << 20);
    let (process, from) = match Process::new(number, exec, stdio, log_bytes) {
        Ok(made) => made,
        Err(error) => {
            tracing::error!(id = %note.id, %error, "output of a process cannot be read");
            return None;
        }
    };
    note.processes.borrow_mut().enter(Rc::clone(&process));
    let (cell, local) = (Rc::clone(cell), note.id.local);
    let used = move |lost: u64| {
        cell.core.borrow_mut().handle_used(clock::now_ms(), local);
        let lost_bytes = &cell.counts.log_lost_bytes;
        lost_bytes.set(lost_bytes.get() + lost);
    };
    spawn(Rc::clone(&process).pump(from, used));
    Some(process)
}

/// What the spawner is asked for.
fn spec_of(
    cell: &HostCell,
    id: SandboxId,
    ask: &Ask,
    request: &LaunchRequest,
    image: &MountedImage,
) -> Result<ClaimSpec, Fault> {
    let layers = image.layers();
    let root = RootSpec::layered(&layers.lower, &layers.data_only).map_err(|error| {
        let text = format!("a layer of the image cannot be opened: {error}; nothing was started");
        Fault::new(Code::BoxFailed, text)
    })?;
    let mut limits = hostd_sandbox::Limits::default();
    let asked = &request.limits;
    if asked.disk_bytes > 0 {
        limits.disk_bytes = asked.disk_bytes;
    }
    if asked.open_files > 0 {
        limits.open_files = u64::from(asked.open_files);
    }
    limits.pids = (asked.pids > 0).then_some(asked.pids);
    Ok(ClaimSpec {
        id: box_id(id),
        shape: cell.defaults.shapes.get(ask.shape).name.clone(),
        root,
        program: program_of(request, image.config())?,
        hostname: String::new(),
        limits,
        network: None,
    })
}

/// The program out of the request and the image's config, as OCI says: a command replaces the image's and comes after
/// its entrypoint.
fn program_of(request: &LaunchRequest, config: &ImageConfig) -> Result<Program, Fault> {
    let argv = argv_of(&request.command, config)?;
    let own =
        |text: &String, image: &String| if text.is_empty() { image.clone() } else { text.clone() };
    Ok(Program {
        argv,
        env: merge_env(&config.env, &request.env),
        cwd: own(&request.cwd, &config.cwd),
        user: own(&request.user, &config.user),
        tty: request.tty.then_some(TTY),
        stdin: request.stdin,
    })
}

/// What is executed when these words are asked for.
pub(super) fn argv_of(command: &[String], config: &ImageConfig) -> Result<Vec<String>, Fault> {
    let tail = if command.is_empty() { &config.cmd } else { command };
    let argv: Vec<String> = config.entrypoint.iter().chain(tail).cloned().collect();
    if argv.is_empty() {
        let text = "the launch names no command and the image has none; nothing was started";
        return Err(Fault::new(Code::BadRequest, text));
    }
    Ok(argv)
}

/// The image's environment with the request's in place of and behind it.
fn merge_env(image: &[String], request: &[(String, String)]) -> Vec<String> {
    let name_of = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let kept = image.iter().filter(|entry| {
        let name = name_of(entry);
        !request.iter().any(|(other, _)| *other == name)
    });
    kept.cloned().chain(request.iter().map(|(name, value)| format!("{name}={value}"))).collect()
}

fn claim_outcome(error: ClaimError) -> Outcome {
    match error {
        ClaimError::Refused(Refusal::NoBox { .. }) => Outcome::NoBox(Code::NoCapacity),
        ClaimError::Refused(Refusal::Busy) => Outcome::NoBox(Code::Overloaded),
        ClaimError::Refused(Refusal::Stopping) => Outcome::NoBox(Code::Draining),
        other => Outcome::Failed(claim_fault(&other)),
    }
}

/// A spawner's refusal or failure as a launch's or an exec's fault.
pub(super) fn claim_fault(error: &ClaimError) -> Fault {
    let code = match error {
        ClaimError::Refused(Refusal::TooLarge { .. }) => Code::BadRequest,
        ClaimError::Refused(_) => Code::Overloaded,
        ClaimError::Failed(fault) => match fault {
            BoxFault::NotFound { .. } => Code::CommandNotFound,
            BoxFault::NotExecutable { .. } | BoxFault::BadFormat { .. } => {
                Code::CommandNotExecutable
            }
            BoxFault::NoSuchUser { .. } => Code::UserNotFound,
            BoxFault::NoSandbox => Code::SandboxNotFound,
            BoxFault::NoExec => Code::NotFound,
            BoxFault::WrongState { .. } => Code::WrongState,
            // The host's own doing, and whatever is added.
            _ => Code::BoxFailed,
        },
        ClaimError::Unknown { .. } => Code::BoxFailed,
    };
    Fault::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requests_environment_replaces_the_images_by_name() {
        let image = ["PATH=/bin".to_owned(), "A=1".to_owned(), "A2=x".to_owned()];
        let request = [("A".to_owned(), "2=3".to_owned()), ("B".to_owned(), String::new())];
        assert_eq!(merge_env(&image, &request), ["PATH=/bin", "A2=x", "A=2=3", "B="]);
    }
}
