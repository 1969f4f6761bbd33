//! Where clients come in: connections, streams, and the first frame of each.
//!
//! A stream that does not say what it wants within [`FIRST_FRAME`] is ended, so that half-open streams are bounded in number
//! by the transport and in time by us (FAULTS Q5). Handshakes beyond a few at once must prove their address first (Q4).

use std::{cell::Cell, rc::Rc, time::Duration};

use bytes::BytesMut;
use quinn::{Endpoint, Incoming, RecvStream, SendStream};
use tokio::task::spawn_local;
use wire::{Code, Fault, frame::Kind, launch::LaunchReply, limits::LANE_LAUNCHES_MAX};
use wire_net::{
    lane::LaneServer,
    quic,
    stream::{self, BROKEN, StreamLost},
    tls::Peer,
};

use crate::{direct::ClientLane, worker::Worker};

/// Time that a stream has to say what it wants.
const FIRST_FRAME: Duration = Duration::from_secs(10);
/// Handshakes under way from which on addresses must be proved.
const HANDSHAKES_FREE: usize = 64;
/// And from which on nobody is let in.
const HANDSHAKES_MAX: usize = 4_096;
/// Connections from clients on one thread.
const CLIENTS_MAX: i64 = 16_384;

/// Accepts connections until the endpoint is closed.
pub(crate) async fn serve(worker: Rc<Worker>, endpoint: Endpoint) {
    let handshakes = Rc::new(Cell::new(0usize));
    while let Some(incoming) = endpoint.accept().await {
        let under_way = handshakes.get();
        if under_way >= HANDSHAKES_MAX || worker.metrics.clients.get() >= CLIENTS_MAX {
            incoming.refuse();
        } else if under_way >= HANDSHAKES_FREE && !incoming.remote_address_validated() {
            // A refused retry is a closed endpoint.
            let _ = incoming.retry();
        } else {
            handshakes.set(under_way + 1);
            spawn_local(connection(Rc::clone(&worker), incoming, Rc::clone(&handshakes)));
        }
    }
}

async fn connection(worker: Rc<Worker>, incoming: Incoming, handshakes: Rc<Cell<usize>>) {
    let from = incoming.remote_address();
    let accepted = quic::accept(incoming).await;
    handshakes.set(handshakes.get() - 1);
    let (connection, peer) = match accepted {
        Ok(accepted) => accepted,
        Err(fault) => return tracing::debug!(%from, %fault, "no connection"),
    };
    worker.metrics.clients.inc();
    let peer = Rc::new(peer);
    while let Ok((send, recv)) = connection.accept_bi().await {
        spawn_local(serve_stream(Rc::clone(&worker), Rc::clone(&peer), send, recv));
    }
    worker.metrics.clients.dec();
}

async fn serve_stream(worker: Rc<Worker>, peer: Rc<Peer>, send: SendStream, recv: RecvStream) {
    if let Err(lost) = stream(&worker, &peer, send, recv).await {
        tracing::debug!(%peer, %lost, "a client's stream was lost");
    }
}

async fn stream(
    worker: &Rc<Worker>,
    peer: &Rc<Peer>,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), StreamLost> {
    let mut scratch = BytesMut::new();
    let first = stream::read_frame(&mut recv, &mut scratch);
    let Ok(first) = tokio::time::timeout(FIRST_FRAME, first).await else {
        let _ = recv.stop(BROKEN);
        return Err(StreamLost::Truncated);
    };
    match first {
        Ok(Some((Kind::Launch, payload))) => {
            let reply = worker.launch(&payload, peer).await;
            stream::reply(&mut send, &reply).await
        }
        Ok(Some((Kind::Lane, _))) => lane(worker, peer, LaneServer::new(send, recv)).await,
        Ok(Some((Kind::Call, bytes))) => worker.call(&bytes, peer, send, recv).await,
        Ok(Some((kind, _))) => {
            let _ = recv.stop(BROKEN);
            Err(StreamLost::Unexpected(kind))
        }
        Ok(None) => Ok(()),
        Err(lost) => {
            let _ = recv.stop(BROKEN);
            Err(lost)
        }
    }
}

/// Serves a lane to its end. Launches under way go on when it breaks.
async fn lane(
    worker: &Rc<Worker>,
    peer: &Rc<Peer>,
    mut lane: LaneServer,
) -> Result<(), StreamLost> {
    let client = ClientLane::new(worker, lane.replies(), peer);
    loop {
        let now = worker.now();
        while let Some((tag, payload)) = lane.here()? {
            if client.outstanding.get() >= LANE_LAUNCHES_MAX {
                // PROTOCOL 7.7.
                let message = "too many launches are outstanding on this lane; nothing was started";
                let fault = Fault::new(Code::Overloaded, message);
                client.replies.reply(tag, &LaunchReply::Failed(fault));
                continue;
            }
            worker.arrive(now, &client, tag, payload);
        }
        worker.pump(now);
        // A lane that always has more gives way to others at times.
        tokio::task::coop::consume_budget().await;
        if !lane.more().await? {
            return Ok(());
        }
    }
}
