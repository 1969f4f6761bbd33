//! Connections and streams: who asks, and which of launch, lane or call a stream is (PROTOCOL 7.1, 8.3).
//!
//! A stream whose first frame has come with it is served at once, in the turn of its connection: no task is
//! started, and replies of one turn leave together. Only what must wait becomes a task.

use std::{cell::Cell, rc::Rc, time::Duration};

use bytes::BytesMut;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use wire::{
    Code, Fault,
    call::{Answer, Call},
    frame::Kind,
    launch::LaunchReply,
    limits::NAME_BYTES_MAX,
};
use wire_net::{
    quic,
    stream::{self, BROKEN, StreamLost},
    tls::Peer,
};

use crate::{
    calls::{self, Who},
    clock,
    host::HostCell,
    lane,
    launch::{self, Launch},
    metrics::count,
    runtime::spawn,
};

/// A stream that has not said what it is after this long is ended: half-open streams cost memory.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// Handshakes under way beyond which a peer must first show that it has its address: a token costs us nothing to keep.
const HANDSHAKES_FREE: usize = 128;

/// Handshakes under way at most. Each takes some 30 KB until it ends.
const HANDSHAKES_MAX: usize = 2_048;

/// Serves an endpoint until it is closed.
pub(crate) async fn endpoint(cell: Rc<HostCell>, endpoint: Endpoint) {
    let handshakes = Rc::new(Cell::new(0));
    while let Some(incoming) = endpoint.accept().await {
        if handshakes.get() >= HANDSHAKES_MAX {
            incoming.ignore();
            continue;
        }
        if handshakes.get() >= HANDSHAKES_FREE && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        handshakes.set(handshakes.get() + 1);
        let (cell, handshakes) = (Rc::clone(&cell), Rc::clone(&handshakes));
        spawn(async move {
            let accepted = quic::accept(incoming).await;
            handshakes.set(handshakes.get() - 1);
            match accepted {
                Ok((connection, peer)) => serve(cell, connection, peer).await,
                Err(fault) => tracing::debug!(%fault, "no connection"),
            }
        });
    }
}

async fn serve(cell: Rc<HostCell>, connection: Connection, peer: Peer) {
    let placer = matches!(peer, Peer::Placer(_));
    while let Ok((send, recv)) = connection.accept_bi().await {
        let mut one = Box::pin(serve_stream(Rc::clone(&cell), placer, send, recv));
        if futures::poll!(one.as_mut()).is_pending() {
            spawn(one);
        }
    }
}

async fn serve_stream(
    cell: Rc<HostCell>,
    placer: bool,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let mut scratch = BytesMut::new();
    let first = stream::read_frame(&mut recv, &mut scratch);
    let served = match tokio::time::timeout(FIRST_FRAME, first).await {
        Ok(Ok(Some((kind, payload)))) => match kind {
            Kind::Launch => return one_launch(&cell, &payload, &mut send).await,
            Kind::Lane => return lane::serve(cell, send, recv).await,
            Kind::OnBehalf if placer => match who_of(&payload) {
                Some(who) => one_call(cell, who, send, recv, scratch).await,
                None => Err((send, recv)),
            },
            Kind::Call if placer => called(cell, Who::Placer, &payload, send, recv).await,
            Kind::Call => called(cell, Who::Operator, &payload, send, recv).await,
            _ => Err((send, recv)),
        },
        _ => Err((send, recv)),
    };
    if let Err((mut send, mut recv)) = served {
        // PROTOCOL 7.6.
        let _ = recv.stop(BROKEN);
        let _ = send.reset(BROKEN);
    }
}

type Streams = (SendStream, RecvStream);

fn who_of(payload: &[u8]) -> Option<Who> {
    let tenant = std::str::from_utf8(payload).ok().filter(|t| t.len() <= NAME_BYTES_MAX)?;
    Some(if tenant.is_empty() { Who::Operator } else { Who::Tenant(tenant.into()) })
}

async fn one_call(
    cell: Rc<HostCell>,
    who: Who,
    send: SendStream,
    mut recv: RecvStream,
    mut scratch: BytesMut,
) -> Result<(), Streams> {
    let frame = stream::read_frame(&mut recv, &mut scratch);
    match tokio::time::timeout(FIRST_FRAME, frame).await {
        Ok(Ok(Some((Kind::Call, payload)))) => called(cell, who, &payload, send, recv).await,
        _ => Err((send, recv)),
    }
}

async fn called(
    cell: Rc<HostCell>,
    who: Who,
    payload: &[u8],
    mut send: SendStream,
    recv: RecvStream,
) -> Result<(), Streams> {
    count(&cell.counts.calls);
    match Call::from_bytes(payload) {
        Ok(call) => {
            calls::serve(cell, who, call, send, recv).await;
            Ok(())
        }
        Err(malformed) => {
            let text = format!("what came is no call: {malformed}; nothing was done");
            let answer = Answer::Fault(Fault::new(Code::BadRequest, text));
            let _ = stream::answer(&mut send, &answer).await;
            let _ = send.finish();
            Ok(())
        }
    }
}

async fn one_launch(cell: &Rc<HostCell>, payload: &[u8], send: &mut SendStream) {
    let now_ms = clock::now_ms();
    let (decided, budget_ms) = launch::begin(cell, now_ms, payload);
    cell.settle(now_ms);
    let reply = match decided {
        Launch::Now(reply) => reply,
        Launch::Later(note) => note.outcome.wait().await,
    };
    if let Err(lost) = reply_to(send, &reply).await {
        tracing::debug!(%lost, "an answer to a launch was not delivered");
        let now_ms = clock::now_ms();
        launch::undelivered(cell, now_ms, &reply, budget_ms);
        cell.settle(now_ms);
    }
}

async fn reply_to(send: &mut SendStream, reply: &LaunchReply) -> Result<(), StreamLost> {
    stream::reply(send, reply).await
}
