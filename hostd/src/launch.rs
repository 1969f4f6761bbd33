//! One launch, from its bytes to its reply. DESIGN 5.4 and 5.5.
//!
//! What can be answered at once is: a known id, a refusal, a no-op. The rest is begun, and its reply comes later.

use std::rc::Rc;

use hostd_core::{Admit, Ask};
use wire::{
    Code, Fault, LaunchId, ShapeId,
    launch::{ArchivedLaunchRequest, LaunchHead, LaunchReply, LaunchRequest, Refused, Steps},
    limits::NAME_BYTES_MAX,
};

use crate::{
    host::{Backend, HostCell},
    metrics::count,
    note::Note,
};

/// A launch that was decided.
pub(crate) enum Launch {
    /// Its reply.
    Now(LaunchReply),
    /// It is being started: its outcome comes with its note.
    Later(Rc<Note>),
}

/// Decides a launch frame's payload. Call [`HostCell::settle`] after a batch of them.
pub(crate) fn begin(cell: &Rc<HostCell>, now_ms: u64, payload: &[u8]) -> (Launch, u32) {
    let parsed = LaunchHead::split(payload).and_then(|(head, bytes)| {
        LaunchRequest::access(bytes).map(|request| (head, bytes, request))
    });
    let (head, bytes, request) = match parsed {
        Ok(parsed) => parsed,
        Err(malformed) => {
            let text = format!("what came is no launch request: {malformed}; nothing was started");
            return (failed(cell, Fault::new(Code::BadRequest, text)), 0);
        }
    };
    let launch = match ask(cell, head, bytes, request) {
        Ok(ask) => decide(cell, now_ms, &ask, bytes),
        Err(fault) => failed(cell, fault),
    };
    (launch, head.budget_ms)
}

fn failed(cell: &HostCell, fault: Fault) -> Launch {
    count(&cell.counts.failed);
    Launch::Now(LaunchReply::Failed(fault))
}

/// What the core decides by, out of the request where it lies.
fn ask(
    cell: &HostCell,
    head: LaunchHead,
    bytes: &[u8],
    request: &ArchivedLaunchRequest,
) -> Result<Ask, Fault> {
    let bad = |what: &str| Fault::new(Code::BadRequest, format!("{what}; nothing was started"));
    let shape = ShapeId::new(request.shape).ok_or_else(|| bad("no such shape"))?;
    let named = |text: &str| !text.is_empty() && text.len() <= NAME_BYTES_MAX;
    if !named(&request.tenant) || !named(&request.image) {
        return Err(bad("tenant or image: empty or longer than 128 bytes"));
    }
    if matches!(cell.backend, Backend::Real(_)) {
        LaunchRequest::from_bytes(bytes)
            .map_err(|_| bad("a field of the request is out of bounds"))?;
    }
    let launch_id = LaunchId(request.launch_id.0);
    // Its memory comes while the request is hashed.
    cell.core.borrow().launches().warm(&launch_id);
    let hash = blake3::hash(bytes);
    let (body, _) = hash.as_bytes().split_first_chunk().unwrap_or((&[0; 16], &[]));
    let hard_ms = request.limits.hard_ms.to_native();
    Ok(Ask {
        launch_id,
        body: *body,
        named: head.named,
        shape,
        budget_ms: head.budget_ms,
        hard_ms: if hard_ms == 0 { cell.defaults.hard_ms } else { hard_ms },
        idle_ms: request.limits.idle_ms.to_native(),
    })
}

fn decide(cell: &Rc<HostCell>, now_ms: u64, ask: &Ask, bytes: &[u8]) -> Launch {
    let admit = {
        let mut core = cell.core.borrow_mut();
        core.handle_launch(now_ms, ask, |id| Rc::new(Note::new(id, bytes)))
    };
    match admit {
        Admit::Begin(id) => match cell.backend {
            Backend::None { noop_ms } => start_noop(cell, now_ms, id.local, noop_ms),
            Backend::Real(_) => crate::real::start(cell, id, *ask),
        },
        Admit::Pending(id) => match cell.core.borrow().sandbox(id.local) {
            Some(sandbox) => {
                count(&cell.counts.again);
                Launch::Later(Rc::clone(&sandbox.note))
            }
            None => failed(cell, Fault::new(Code::Internal, "a claimed sandbox has no record")),
        },
        Admit::Started(started) => {
            count(&cell.counts.again);
            Launch::Now(LaunchReply::Started(started))
        }
        Admit::Refused(refused) => {
            count(&cell.counts.refused);
            crate::real::refuse(cell, *ask, refused)
        }
        Admit::Failed(fault) => failed(cell, fault),
    }
}

/// Starts nothing, at once.
fn start_noop(cell: &HostCell, now_ms: u64, local: u64, noop_ms: Option<u64>) -> Launch {
    let started = cell.core.borrow_mut().handle_started(now_ms, local, Steps::default());
    match started {
        Ok(started) => {
            count(&cell.counts.started);
            cell.noop_started(now_ms, local, noop_ms);
            Launch::Now(LaunchReply::Started(started))
        }
        Err(fault) => {
            cell.core.borrow_mut().handle_failed(now_ms, local, fault.clone());
            failed(cell, fault)
        }
    }
}

/// The refusal of what is too much at once.
pub(crate) fn overloaded(cell: &HostCell) -> LaunchReply {
    count(&cell.counts.refused);
    LaunchReply::Refused(Refused { word: cell.core.borrow().word(), code: Code::Overloaded })
}

/// An answer reached nobody: unless somebody asks again, what it started is reaped.
pub(crate) fn undelivered(cell: &HostCell, now_ms: u64, reply: &LaunchReply, budget_ms: u32) {
    if let LaunchReply::Started(started) = reply {
        count(&cell.counts.undelivered);
        let local = started.sandbox.local;
        cell.core.borrow_mut().handle_undelivered(now_ms, local, budget_ms);
    }
}
