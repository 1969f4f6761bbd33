//! Calls: who may ask, and the answers that need no stream. What streams goes on in `streams`.

use std::rc::Rc;

use hostd_core::host::Cancelled;
use quinn::{RecvStream, SendStream};
use wire::{
    Code, Fault, HostId, LaunchId, SandboxId,
    call::{Answer, Call, FileOp, SandboxRecord, State},
    limits::FRAME_BYTES_MAX,
};
use wire_net::stream;

use crate::{
    clock,
    host::{Backend, HostCell},
    note::{Note, record},
    real, streams,
};

/// In whose name a call is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// An operator's: every sandbox.
    Operator,
    /// A placer's own: no sandbox.
    Placer,
    /// A tenant's: its own sandboxes; others do not exist for it (PROTOCOL 7.3).
    Tenant(Box<str>),
}

/// Answers a call, and serves what streams after the answer.
pub(crate) async fn serve(
    cell: Rc<HostCell>,
    who: Who,
    call: Call,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let answer = match call {
        Call::Exec(exec) => streams::exec(&cell, &who, exec, &mut send, &mut recv).await,
        Call::Attach { sandbox, process, offset, follow } => {
            let at = streams::At { process, offset, follow };
            streams::attach(&cell, &who, sandbox, at, &mut send, &mut recv).await
        }
        Call::File { sandbox, op: FileOp::Read(path) } => {
            streams::read_file(&cell, &who, sandbox, path, &mut send).await
        }
        Call::File { sandbox, op: FileOp::Write { path, mode } } => {
            streams::write_file(&cell, &who, sandbox, path, mode, &mut recv).await.map(Some)
        }
        Call::File { sandbox, op: FileOp::Watch(path) } => {
            streams::watch(&cell, &who, sandbox, path, &mut send).await
        }
        Call::Port { sandbox, port } => {
            streams::port(&cell, &who, sandbox, port, &mut send, &mut recv).await
        }
        other => tokio::select! {
            answer = simple(&cell, &who, other) => answer.map(Some),
            // Nobody waits for the answer any more.
            _ = send.stopped() => Ok(None),
        },
    };
    let answered = match answer {
        Ok(Some(answer)) => stream::answer(&mut send, &answer).await,
        Ok(None) => Ok(()),
        Err(fault) => stream::answer(&mut send, &Answer::Fault(fault)).await,
    };
    if answered.is_ok() {
        let _ = send.finish();
    }
}

async fn simple(cell: &Rc<HostCell>, who: &Who, call: Call) -> Result<Answer, Fault> {
    let now_ms = clock::now_ms();
    match call {
        Call::Ping => Ok(Answer::Done),
        Call::Cancel { launch_id, host } => cancel(cell, who, launch_id, host).await,
        Call::Inspect(id) => {
            let note = find(cell, who, id)?;
            record(&cell.core.borrow(), &note, now_ms).map(Answer::Sandbox).ok_or_else(not_found)
        }
        Call::List { tenant, labels, ended } => list(cell, who, &tenant, &labels, ended),
        Call::Wait(id) => {
            let note = find(cell, who, id)?;
            Ok(Answer::Exited(note.exit.wait().await))
        }
        Call::Kill { sandbox, signal } => kill(cell, &*find(cell, who, sandbox)?, signal).await,
        Call::Pause(id) => pause(cell, &*find(cell, who, id)?, true).await,
        Call::Resume(id) => pause(cell, &*find(cell, who, id)?, false).await,
        Call::Extend { sandbox, hard_ms, idle_ms } => {
            let note = find(cell, who, sandbox)?;
            live(cell, &note)?;
            let local = note.id.local;
            cell.core.borrow_mut().handle_extend(now_ms, local, hard_ms, idle_ms);
            cell.settle(now_ms);
            real::keep_deadlines(cell, local).await?;
            Ok(Answer::Done)
        }
        Call::Stats(id) => {
            let note = find(cell, who, id)?;
            live(cell, &note)?;
            real::stats(cell, &note).await.map(Answer::Stats)
        }
        Call::File { sandbox, op } => {
            let note = find_used(cell, who, sandbox)?;
            real::file(cell, &note, op).await
        }
        Call::Drain { host, deadline_ms, message } => {
            operator(cell, who, host)?;
            tracing::info!(%host, deadline_ms, message, "draining");
            cell.core.borrow_mut().handle_drain(now_ms, deadline_ms);
            cell.act(now_ms);
            Ok(Answer::Done)
        }
        Call::Undrain(host) => {
            operator(cell, who, host)?;
            cell.core.borrow_mut().handle_undrain();
            cell.act(now_ms);
            Ok(Answer::Done)
        }
        Call::Hosts | Call::Host(_) | Call::ListRecorded { .. } => {
            let text = "a host knows no other host: ask an aggregator";
            Err(Fault::new(Code::Unsupported, text))
        }
        Call::Exec(_) | Call::Attach { .. } | Call::Port { .. } => {
            Err(Fault::new(Code::Internal, "a call that streams came to the wrong place"))
        }
    }
}

pub(crate) fn not_found() -> Fault {
    Fault::new(Code::SandboxNotFound, "no such sandbox on this host")
}

/// A sandbox that is the asker's.
pub(crate) fn find(cell: &HostCell, who: &Who, id: SandboxId) -> Result<Rc<Note>, Fault> {
    let core = cell.core.borrow();
    let sandbox =
        core.sandbox(id.local).filter(|sandbox| sandbox.id == id).ok_or_else(not_found)?;
    let theirs = match who {
        Who::Operator => true,
        Who::Placer => false,
        Who::Tenant(tenant) => sandbox.note.is_of(tenant),
    };
    theirs.then(|| Rc::clone(&sandbox.note)).ok_or_else(not_found)
}

/// The same, live, and counts as a use of it.
pub(crate) fn find_used(cell: &HostCell, who: &Who, id: SandboxId) -> Result<Rc<Note>, Fault> {
    let note = find(cell, who, id)?;
    live(cell, &note)?;
    cell.core.borrow_mut().handle_used(clock::now_ms(), id.local);
    Ok(note)
}

/// Where it stands, if it is live and was executed.
pub(crate) fn live(cell: &HostCell, note: &Note) -> Result<State, Fault> {
    let state = cell.core.borrow().sandbox(note.id.local).map(|sandbox| sandbox.state);
    match state {
        Some(state @ (State::Running | State::Paused)) => Ok(state),
        Some(State::Claimed) => Err(Fault::new(
            Code::WrongState,
            "the sandbox is still being started; nothing was done",
        )),
        Some(State::Stopped(exit)) => {
            let (why, code) = (exit.why.name(), exit.code);
            let text = format!("the sandbox has ended ({why} {code}); nothing was done");
            Err(Fault::new(Code::WrongState, text))
        }
        None => Err(not_found()),
    }
}

fn operator(cell: &HostCell, who: &Who, host: HostId) -> Result<(), Fault> {
    if *who != Who::Operator {
        return Err(Fault::new(Code::Forbidden, "only operators drain hosts; nothing was done"));
    }
    if host != cell.id {
        return Err(Fault::new(Code::HostNotFound, format!("this is {}, not {host}", cell.id)));
    }
    Ok(())
}

async fn cancel(
    cell: &Rc<HostCell>,
    who: &Who,
    launch_id: LaunchId,
    host: HostId,
) -> Result<Answer, Fault> {
    if host != cell.id {
        return Err(Fault::new(Code::HostNotFound, format!("this is {}, not {host}", cell.id)));
    }
    let now_ms = clock::now_ms();
    if let (Who::Tenant(tenant), Some(note)) = (who, cell.note_of(launch_id))
        && !note.is_of(tenant)
    {
        return Err(not_found());
    }
    let cancelled = cell.core.borrow_mut().handle_cancel(now_ms, launch_id);
    real::keep_cancel(cell, launch_id).await?;
    cell.act(now_ms);
    if let Cancelled::Ending(id) = cancelled {
        let note = cell.core.borrow().sandbox(id.local).map(|sandbox| Rc::clone(&sandbox.note));
        if let Some(note) = note {
            // Whichever comes: what runs exits, what is being started comes to an outcome.
            note.gone().await;
        }
    }
    Ok(Answer::Done)
}

async fn kill(cell: &Rc<HostCell>, note: &Note, signal: u8) -> Result<Answer, Fault> {
    let now_ms = clock::now_ms();
    if signal == 0 {
        cell.core.borrow_mut().handle_kill(note.id.local);
        cell.act(now_ms);
        return Ok(Answer::Done);
    }
    live(cell, note)?;
    cell.core.borrow_mut().handle_used(now_ms, note.id.local);
    real::signal(cell, note, 0, signal).await.map(|()| Answer::Done)
}

async fn pause(cell: &Rc<HostCell>, note: &Note, frozen: bool) -> Result<Answer, Fault> {
    let state = live(cell, note)?;
    if (state == State::Paused) == frozen {
        return Ok(Answer::Done);
    }
    if let Backend::Real(real) = &cell.backend {
        real.freeze(note.id, frozen).await?;
    }
    let now_ms = clock::now_ms();
    {
        let mut core = cell.core.borrow_mut();
        if frozen {
            core.handle_paused(note.id.local);
        } else {
            core.handle_resumed(now_ms, note.id.local);
        }
    }
    cell.settle(now_ms);
    Ok(Answer::Done)
}

fn list(
    cell: &HostCell,
    who: &Who,
    tenant: &str,
    labels: &[(String, String)],
    ended: bool,
) -> Result<Answer, Fault> {
    let tenant = match who {
        Who::Placer => {
            return Err(Fault::new(Code::Forbidden, "a list is asked in a tenant's name"));
        }
        Who::Operator => tenant,
        Who::Tenant(own) if tenant.is_empty() || tenant == &**own => own,
        Who::Tenant(_) => {
            return Err(Fault::new(Code::Forbidden, "the list of another tenant is not shown"));
        }
    };
    let core = cell.core.borrow();
    let now_ms = clock::now_ms();
    let mut locals: Vec<u64> = core
        .sandboxes()
        .filter(|sandbox| ended || sandbox.is_live())
        .map(|sandbox| sandbox.id.local)
        .collect();
    locals.sort_unstable_by(|a, b| b.cmp(a));
    let (mut records, mut bytes) = (Vec::new(), 0);
    for local in locals {
        let Some(sandbox) = core.sandbox(local) else { continue };
        let Some(record) = record(&core, &sandbox.note, now_ms) else { continue };
        let has = |label: &(String, String)| record.labels.contains(label);
        if (!tenant.is_empty() && record.tenant != tenant) || !labels.iter().all(has) {
            continue;
        }
        bytes += size_of::<SandboxRecord>() + sandbox.note.request.len();
        // What does not fit one answer is older than what does.
        if bytes > FRAME_BYTES_MAX / 2 {
            break;
        }
        records.push(record);
    }
    Ok(Answer::Sandboxes(records))
}
