//! What an earlier start of the daemon left: taken up, ended, or remembered.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
    time::{Duration, Instant},
};

use hostd_core::{Fate, Sandbox};
use hostd_sandbox::Live;
use wire::{
    Code, Fault, SandboxId, ShapeId,
    call::{Exit, ExitWhy, State},
    launch::{LaunchRequest, Started, Steps},
};

use super::{Real, box_id, ended, exit_of, listen, sandbox_id, start, ways};
use crate::{
    clock,
    doors::{self, Doors},
    host::{Backend, HostCell},
    journal::{Past, Row, Stage},
    note::Note,
    runtime::spawn,
};

/// Takes up what an earlier start left, and listens to the spawner from then on.
///
/// # Errors
/// Why that is not possible: the host must not serve.
pub(crate) async fn adopt(cell: &Rc<HostCell>) -> Result<(), Fault> {
    let Backend::Real(real) = &cell.backend else { return Ok(()) };
    let mut found = real.found.take();
    let now_ms = clock::now_ms();
    let mut live: HashMap<u64, Live> = HashMap::new();
    for one in found.live {
        let id = sandbox_id(one.id);
        if id.host == real.host {
            live.insert(id.local, one)
        } else {
            None
        };
    }
    let mut exited: HashMap<u64, Exit> =
        found.exited.iter().map(|one| (sandbox_id(one.id).local, exit_of(one.status))).collect();
    for (launch_id, past) in found.left.launches {
        let mut core = cell.core.borrow_mut();
        match past {
            Past::Cancelled => core.recall(now_ms, launch_id, [0; 16], Fate::Cancelled),
            Past::Failed(body, fault) => {
                core.recall(now_ms, launch_id, body, Fate::Failed(Box::new(fault)));
            }
            Past::Refused(code) => core.recall_refused(now_ms, launch_id, code),
        }
        drop(core);
        // There is no row of a sandbox under zero.
        real.forget_later(now_ms, 0, launch_id);
    }
    found.left.sandboxes.sort_unstable_by_key(|(local, _)| *local);
    for (local, row) in found.left.sandboxes {
        let lives = live.remove(&local);
        if lives.is_none() && row.stage == Stage::Claimed && !exited.contains_key(&local) {
            never_started(cell, real, now_ms, local, &row, found.started).await;
            continue;
        }
        let note = take_up(cell, local, &row, lives.as_ref().is_some_and(|live| live.paused));
        let Some(note) = note else { continue };
        match (lives, row.stage) {
            (Some(_), _) => reattach(cell, real, &note, &row).await,
            (None, Stage::Ended(_, exit)) => ended(cell, real, now_ms, local, exit),
            (None, Stage::Claimed | Stage::Running) => {
                let lost = Exit { code: 137, why: ExitWhy::Lost };
                ended(cell, real, now_ms, local, exited.remove(&local).unwrap_or(lost));
            }
        }
    }
    let spawner = real.spawner()?;
    for one in found.exited {
        let _ = spawner.forget(one.id).await;
    }
    for one in live.into_values() {
        tracing::warn!(id = %sandbox_id(one.id), "a box that no launch owns is ended");
        let _ = spawner.kill(one.id).await;
    }
    if let Some(events) = found.events.take() {
        spawn(listen(Rc::clone(cell), events));
    }
    cell.act(now_ms);
    spawn(reconcile(Rc::clone(cell)));
    spawn(tidy(Rc::clone(cell)));
    spawn(tell(Rc::clone(cell)));
    spawn(ways::keep(Rc::clone(cell)));
    Ok(())
}

/// A launch that the last start was killed over, and of which no box is known. The spawner may still be making it.
async fn never_started(
    cell: &Rc<HostCell>,
    real: &Real,
    now_ms: u64,
    local: u64,
    row: &Row,
    spawner_is_new: bool,
) {
    let id = SandboxId { host: cell.id, local };
    if let Ok(spawner) = real.spawner() {
        let begun = Instant::now();
        // Killed again until it is not there: then nothing of it is left.
        while spawner.kill(box_id(id)).await.is_ok() && begun.elapsed() < GONE_WAIT {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    if !spawner_is_new {
        // Nothing was executed: the same id may be launched as if it had never come.
        drop(real.journal.drop_claim(local, row.launch_id, None));
        return;
    }
    let text = "the host broke down while it was being started; nothing of it is left";
    let fault = Fault::new(Code::BoxFailed, text);
    let past = Past::Failed(row.body, fault.clone());
    drop(real.journal.drop_claim(local, row.launch_id, Some(past)));
    let fate = Fate::Failed(Box::new(fault));
    if let Some((_, sandbox)) = remembered(cell, local, row, false) {
        // It may have been told to have started, in the moment before its row would have said so: whoever waits for it
        // hears that it was lost.
        let mut core = cell.core.borrow_mut();
        core.adopt(row.body, fate, sandbox);
        drop(core);
        cell.exited(now_ms, local, Exit { code: 137, why: ExitWhy::Lost });
    } else {
        cell.core.borrow_mut().recall(now_ms, row.launch_id, row.body, fate);
    }
    real.forget_later(now_ms, local, row.launch_id);
}

/// Looks from time to time that the spawner's boxes are the core's sandboxes, soon after a start first: boxes that the
/// last start had asked for and never heard of may come up late.
async fn reconcile(cell: Rc<HostCell>) {
    let Backend::Real(real) = &cell.backend else { return };
    for wait_ms in [50, 200, 1_000].into_iter().chain(std::iter::repeat(5_000)) {
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        if real.stopping.get() {
            return;
        }
        let Ok(spawner) = real.spawner() else { continue };
        let Ok((live, exited)) = spawner.running().await else { continue };
        let mut known: HashSet<u64> = exited.iter().map(|one| sandbox_id(one.id).local).collect();
        for one in live {
            let id = sandbox_id(one.id);
            known.insert(id.local);
            let owned = id.host == real.host
                && cell.core.borrow().sandbox(id.local).is_some_and(Sandbox::is_live);
            if !owned && !real.awaited.borrow().contains_key(&id.local) {
                tracing::warn!(%id, "a box that no launch owns is ended");
                let _ = spawner.kill(one.id).await;
            }
        }
        let now_ms = clock::now_ms();
        let lost: Vec<u64> = {
            let core = cell.core.borrow();
            let is_lost = |sandbox: &&Sandbox<Rc<Note>>| {
                matches!(sandbox.state, State::Running | State::Paused)
                    && sandbox.admitted_ms + SETTLED_MS < now_ms
                    && !known.contains(&sandbox.id.local)
            };
            core.sandboxes().filter(is_lost).map(|sandbox| sandbox.id.local).collect()
        };
        for local in lost {
            tracing::error!(local, "a sandbox has no box any more");
            ended(&cell, real, now_ms, local, Exit { code: 137, why: ExitWhy::Lost });
        }
    }
}

/// Asks from time to time what the image servers counted.
async fn tell(cell: Rc<HostCell>) {
    const EVERY: Duration = Duration::from_secs(3);
    let Backend::Real(real) = &cell.backend else { return };
    while !real.stopping.get() {
        tokio::time::sleep(EVERY).await;
        real.image_metrics.set(Some(real.images.metrics().await));
    }
}

/// Looks after the host's images.
async fn tidy(cell: Rc<HostCell>) {
    const EVERY: Duration = Duration::from_secs(60);
    /// Notes hold for a day.
    const RENEW_TURNS: u32 = 4 * 60;
    let Backend::Real(real) = &cell.backend else { return };
    let mut turn = 0u32;
    while !real.stopping.get() {
        tokio::time::sleep(EVERY).await;
        turn = turn.wrapping_add(1);
        real.images.tidy(turn.is_multiple_of(RENEW_TURNS)).await;
    }
}

/// Milliseconds after its admission for which a sandbox is not looked for: its start may be under way.
const SETTLED_MS: u64 = 10_000;

/// How long a box that was never answered for is waited for to be gone.
const GONE_WAIT: Duration = Duration::from_secs(2);

fn take_up(cell: &Rc<HostCell>, local: u64, row: &Row, paused: bool) -> Option<Rc<Note>> {
    let (started, sandbox) = remembered(cell, local, row, paused)?;
    let note = Rc::clone(&sandbox.note);
    note.outcome.set(wire::launch::LaunchReply::Started(started));
    cell.core.borrow_mut().adopt(row.body, Fate::Started(started), sandbox);
    Some(note)
}

/// A sandbox as its row tells of it, and what its launch was answered.
fn remembered(
    cell: &HostCell,
    local: u64,
    row: &Row,
    paused: bool,
) -> Option<(Started, Sandbox<Rc<Note>>)> {
    let shape = ShapeId::new(row.shape)?;
    let id = SandboxId { host: cell.id, local };
    let note = Rc::new(Note::new(id, &row.request));
    let core = cell.core.borrow();
    let (word, visible_at) = (core.word(), core.visible_at());
    let started = Started { sandbox: id, visible_at, word, steps: Steps::default() };
    let sandbox = Sandbox {
        id,
        launch_id: row.launch_id,
        shape,
        state: if paused { State::Paused } else { State::Running },
        admitted_ms: row.admitted_ms,
        hard_at_ms: (row.hard_at_ms > 0).then_some(row.hard_at_ms),
        idle_ms: row.idle_ms,
        used_ms: clock::now_ms(),
        lapse_at_ms: None,
        callers: 1,
        ending: None,
        drop_at_ms: None,
        note,
    };
    Some((started, sandbox))
}

/// Attaches to what a living sandbox says, and holds its image.
async fn reattach(cell: &Rc<HostCell>, real: &Real, note: &Rc<Note>, row: &Row) {
    let Ok(spawner) = real.spawner() else { return };
    match spawner.stdio(box_id(note.id)).await {
        Ok(stdio) => start::enter_main(cell, note, stdio),
        Err(error) => tracing::warn!(id = %note.id, %error, "output of a box cannot be had again"),
    }
    if let Ok(request) = LaunchRequest::from_bytes(&row.request) {
        match real.images.mount_again(&request.tenant, row.image).await {
            Ok(image) => drop(note.image.borrow_mut().replace(image)),
            Err(fault) => tracing::warn!(id = %note.id, %fault, "an image in use was not mounted"),
        }
    }
    *note.doors.borrow_mut() = Doors::bind_again(real.doors, &row.published);
    doors::serve(cell, note);
    tracing::info!(id = %note.id, "taken up again");
}
