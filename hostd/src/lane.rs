//! A lane: many launches on one stream, replies in any order, whatever is ready together in one write (PROTOCOL 7.7).
//!
//! The reader decides all launches of a chunk before the writer runs, so that their replies leave in one packet.
//! Memory is bounded by the launches outstanding and by replies that the peer does not take: beyond that the
//! reader stops reading, and flow control stops the peer.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use bytes::{Buf, Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use tokio::sync::Notify;
use wire::{
    codec::Malformed,
    frame::{HEADER_BYTES, Header, Kind, lane_tag},
    launch::LaunchReply,
    limits::LANE_LAUNCHES_MAX,
};
use wire_net::{lane::Outgoing, stream::BROKEN};

use crate::{
    clock,
    host::HostCell,
    launch::{self, Launch},
    runtime::spawn,
};

/// Bytes that one turn of the reader takes.
const TURN_BYTES: usize = 64 * 1024;

/// Bytes of replies beyond which the reader waits for the writer.
const UNSENT_BYTES_MAX: usize = 1 << 20;

#[derive(Default)]
struct Lane {
    out: RefCell<Outgoing>,
    /// What was started and is in `out`: if the stream breaks, nobody learned of it.
    unsent: RefCell<Vec<(LaunchReply, u32)>>,
    outstanding: Cell<usize>,
    written: Notify,
    ready: Notify,
    /// No more launches come.
    ended: Cell<bool>,
    broken: Cell<bool>,
}

impl Lane {
    fn push(&self, tag: u32, reply: LaunchReply, budget_ms: u32) {
        self.out.borrow_mut().push(Kind::LaneReply, tag, &[&reply.to_bytes()]);
        if matches!(reply, LaunchReply::Started(_)) {
            self.unsent.borrow_mut().push((reply, budget_ms));
        }
    }

    fn is_done(&self) -> bool {
        self.broken.get() || (self.ended.get() && self.outstanding.get() == 0)
    }
}

/// Serves a lane to its end.
pub(crate) async fn serve(cell: Rc<HostCell>, mut send: SendStream, mut recv: RecvStream) {
    let lane = Rc::new(Lane::default());
    let reader = read(&cell, &lane, &mut recv);
    let writer = write(&cell, &lane, &mut send);
    let (read, ()) = futures::join!(reader, writer);
    if read.is_err() {
        let _ = recv.stop(BROKEN);
        let _ = send.reset(BROKEN);
    }
    let _ = send.finish();
}

async fn read(
    cell: &Rc<HostCell>,
    lane: &Rc<Lane>,
    recv: &mut RecvStream,
) -> Result<(), Malformed> {
    let mut rest = BytesMut::new();
    let result = loop {
        while lane.out.borrow().len() > UNSENT_BYTES_MAX && !lane.broken.get() {
            lane.written.notified().await;
        }
        if lane.broken.get() {
            break Ok(());
        }
        let Ok(Some(chunk)) = recv.read_chunk(TURN_BYTES, true).await else { break Ok(()) };
        if let Err(malformed) = take(cell, lane, &mut rest, chunk.bytes) {
            break Err(malformed);
        }
    };
    lane.ended.set(true);
    lane.ready.notify_one();
    result
}

/// Decides all whole frames of what has come; keeps the beginning of the next in `rest`.
fn take(
    cell: &Rc<HostCell>,
    lane: &Rc<Lane>,
    rest: &mut BytesMut,
    chunk: Bytes,
) -> Result<(), Malformed> {
    let now_ms = clock::now_ms();
    let mut bytes = chunk;
    if !rest.is_empty() {
        rest.extend_from_slice(&bytes);
        bytes = rest.split().freeze();
    }
    while let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let Header { kind, len } = Header::parse(header)?;
        if kind != Kind::LaneLaunch {
            return Err(Malformed::Magic);
        }
        if bytes.len() < HEADER_BYTES + len {
            break;
        }
        let (tag, payload) = lane_tag(&bytes[HEADER_BYTES..HEADER_BYTES + len])?;
        one(cell, lane, now_ms, tag, payload);
        bytes.advance(HEADER_BYTES + len);
    }
    rest.extend_from_slice(&bytes);
    cell.settle(now_ms);
    lane.ready.notify_one();
    Ok(())
}

fn one(cell: &Rc<HostCell>, lane: &Rc<Lane>, now_ms: u64, tag: u32, payload: &[u8]) {
    if lane.outstanding.get() >= LANE_LAUNCHES_MAX {
        return lane.push(tag, launch::overloaded(cell), 0);
    }
    let (decided, budget_ms) = launch::begin(cell, now_ms, payload);
    let note = match decided {
        Launch::Now(reply) => return lane.push(tag, reply, budget_ms),
        Launch::Later(note) => note,
    };
    lane.outstanding.set(lane.outstanding.get() + 1);
    let (cell, lane) = (Rc::clone(cell), Rc::clone(lane));
    spawn(async move {
        let reply = note.outcome.wait().await;
        lane.outstanding.set(lane.outstanding.get() - 1);
        if lane.broken.get() {
            launch::undelivered(&cell, clock::now_ms(), &reply, budget_ms);
            cell.settle(clock::now_ms());
        } else {
            lane.push(tag, reply, budget_ms);
        }
        lane.ready.notify_one();
    });
}

async fn write(cell: &Rc<HostCell>, lane: &Rc<Lane>, send: &mut SendStream) {
    let mut unsent = Vec::new();
    loop {
        let out = lane.out.borrow_mut().take();
        if out.is_empty() {
            if lane.is_done() {
                return;
            }
            lane.ready.notified().await;
            continue;
        }
        std::mem::swap(&mut *lane.unsent.borrow_mut(), &mut unsent);
        if send.write_chunk(out).await.is_err() {
            lane.broken.set(true);
            let now_ms = clock::now_ms();
            for (reply, budget_ms) in unsent.drain(..).chain(lane.unsent.take()) {
                launch::undelivered(cell, now_ms, &reply, budget_ms);
            }
            cell.settle(now_ms);
        }
        unsent.clear();
        lane.written.notify_one();
    }
}
