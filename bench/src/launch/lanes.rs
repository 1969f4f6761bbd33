//! Load on lanes: no task and no timer a launch, so that the bench takes little of the machine that it measures.
//!
//! Each lane has one reader, which notes all replies that came together and, in a closed loop, sends as many anew.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use quinn::Endpoint;
use rand::RngCore as _;
use wire::{Fault, launch::LaunchReply, seal::Role};
use wire_net::{
    lane::{Landed, LandedReplies, Lane},
    quic,
    stream::LaunchLost,
};

use super::load::{Own, Seen};

/// A lane to a placer, and what is under way on it.
pub(super) struct LaneLink {
    addr: SocketAddr,
    state: Mutex<State>,
}

struct State {
    /// Keeps the connection open.
    _connection: quinn::Connection,
    lane: Lane,
    replies: Option<LandedReplies>,
    /// When each launch under way was due, by token.
    due: Vec<Instant>,
    free: Vec<u64>,
}

impl State {
    async fn dial(endpoint: &Endpoint, addr: SocketAddr) -> Result<Self, Fault> {
        let connection = quic::connect(endpoint, addr, Role::Placer).await?;
        let (lane, replies) = Lane::open_direct(&connection).await?;
        Ok(Self {
            _connection: connection,
            lane,
            replies: Some(replies),
            due: Vec::new(),
            free: Vec::new(),
        })
    }
}

impl LaneLink {
    pub(super) async fn dial(endpoint: &Endpoint, addr: SocketAddr) -> Result<Self, Fault> {
        Ok(Self { addr, state: Mutex::new(State::dial(endpoint, addr).await?) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches that were not answered.
    pub(super) fn under_way(&self) -> u64 {
        let state = self.state();
        (state.due.len() - state.free.len()) as u64
    }

    /// Sends a launch. What cannot be sent is noted.
    pub(super) fn send(&self, own: &Own, seen: &mut Seen, due: Instant) -> bool {
        let state = &mut *self.state();
        let token = state.free.pop().unwrap_or_else(|| {
            state.due.push(due);
            state.due.len() as u64 - 1
        });
        if let Some(slot) = usize::try_from(token).ok().and_then(|at| state.due.get_mut(at)) {
            *slot = due;
        }
        let Seen { rng, request, .. } = seen;
        rng.fill_bytes(own.template.id_in(request));
        match state.lane.launch_direct(token, own.template.head, request) {
            Ok(()) => true,
            Err(lost) => {
                state.free.push(token);
                own.note(seen, Instant::now(), due, Err(lost));
                false
            }
        }
    }

    /// Takes the tokens of what landed back; gives when each was due.
    fn take(&self, landed: &mut Vec<Landed>) -> Vec<(Instant, Result<LaunchReply, LaunchLost>)> {
        let state = &mut *self.state();
        let mut back = Vec::with_capacity(landed.len());
        for Landed { token, reply } in landed.drain(..) {
            let at = usize::try_from(token).ok();
            let Some(due) = at.and_then(|at| state.due.get(at)).copied() else { continue };
            state.free.push(token);
            let no_reply = |_| {
                let message = "the placer sent what is no reply";
                LaunchLost::Unknown(Fault::new(wire::Code::Unknown, message))
            };
            back.push((due, reply.and_then(|b| LaunchReply::from_bytes(&b).map_err(no_reply))));
        }
        back
    }

    /// Reads replies until the run has ended and nothing is under way; with `closed`, keeps so many under way.
    pub(super) async fn drive(&self, own: &Arc<Own>, closed: Option<usize>) {
        let mut live = 0;
        let mut landed = Vec::new();
        loop {
            let Some(mut replies) = self.state().replies.take() else { return };
            if let Some(most) = closed {
                live += self.fill(own, most - live);
                if live == 0 {
                    return;
                }
            }
            loop {
                let open = replies.next(&mut landed).await;
                let now = Instant::now();
                let back = self.take(&mut landed);
                let seen = &mut *own.seen();
                for (due, outcome) in back {
                    own.note(seen, now, due, outcome);
                    seen.in_flight = seen.in_flight.saturating_sub(usize::from(closed.is_none()));
                    if closed.is_some() && !(open && own.take() && self.send(own, seen, now)) {
                        live -= 1;
                    }
                }
                if closed.is_some() && live == 0 && open {
                    return;
                }
                if !open {
                    break;
                }
            }
            if own.is_over() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            if let Ok(new) = State::dial(&own.endpoint, self.addr).await {
                *self.state() = new;
            }
        }
    }

    fn fill(&self, own: &Arc<Own>, more: usize) -> usize {
        let seen = &mut *own.seen();
        let sent = |_: &usize| own.take() && self.send(own, seen, Instant::now());
        (0..more).take_while(sent).count()
    }
}
