//! One launch on its way: the core's state machine says what to do, this does it.
//!
//! A launch that comes in is checked, looked up by id, and driven to its outcome by this thread alone. What the client does
//! meanwhile changes nothing: its connection may break, and the outcome is kept for when it asks again.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, future::LocalBoxFuture};
use placer_core::{Launch, Micros, Outcome, Step};
use wire::{
    Code, Fault, HostId, LaunchId, ShapeId,
    call::Call,
    launch::{LaunchHead, LaunchReply, LaunchRequest},
};
use wire_net::{
    lane::LaneReply,
    stream::{self, LaunchLost},
    tls::Peer,
};

use crate::{
    known::{Entered, Left},
    pool::Outstanding,
    worker::Worker,
};

/// Time to ask a pinned host when the asker gave none.
const ASK_PINNED: Duration = Duration::from_secs(2);
/// Between two askings of one host by the paths that have no state machine.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// What a host, or the way to it, said.
pub(crate) enum News {
    Reply(LaunchReply),
    NotSent(Fault),
    Lost,
    Cancelled(bool),
}

/// Something under way at a host. The usual one, a launch on a warm connection, needs no allocation.
pub(crate) enum Flight<'a> {
    Nothing,
    Launch { reply: LaneReply, _outstanding: Outstanding },
    Slow(LocalBoxFuture<'a, News>),
}

impl Future for Flight<'_> {
    type Output = News;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<News> {
        let this = self.get_mut();
        let news = match this {
            Self::Nothing => return Poll::Pending,
            Self::Launch { reply, .. } => match Pin::new(reply).poll(context) {
                Poll::Ready(reply) => news_of(reply),
                Poll::Pending => return Poll::Pending,
            },
            Self::Slow(slow) => match slow.as_mut().poll(context) {
                Poll::Ready(news) => news,
                Poll::Pending => return Poll::Pending,
            },
        };
        *this = Self::Nothing;
        Poll::Ready(news)
    }
}

pub(crate) fn news_of(reply: Result<LaunchReply, LaunchLost>) -> News {
    match reply {
        Ok(reply) => News::Reply(reply),
        Err(LaunchLost::NotSent(fault)) => News::NotSent(fault),
        Err(LaunchLost::Unknown(fault)) => {
            tracing::debug!(%fault, "a launch went unanswered");
            News::Lost
        }
    }
}

/// A launch that was checked.
pub(crate) struct Asked<'a> {
    pub(crate) id: LaunchId,
    /// What its tenant is known by.
    pub(crate) tenant: u64,
    pub(crate) shape: ShapeId,
    pub(crate) head: LaunchHead,
    pub(crate) request: &'a [u8],
}

impl<'a> Asked<'a> {
    /// Checks a launch frame's payload, and that `peer` may ask for it.
    pub(crate) fn check(
        payload: &'a [u8],
        peer: &Peer,
        known_by: impl FnOnce(&str) -> u64,
    ) -> Result<Self, Fault> {
        let bad = |what: &str| Fault::new(Code::BadRequest, format!("{what}; nothing was started"));
        let (head, bytes) = LaunchHead::split(payload).map_err(|_| bad("not a launch"))?;
        let request = LaunchRequest::access(bytes).map_err(|_| bad("not a launch request"))?;
        let shape = ShapeId::new(request.shape).ok_or_else(|| bad("no such shape"))?;
        match peer {
            Peer::Client { tenant } if *tenant == request.tenant.as_str() => {}
            Peer::Operator if !request.tenant.is_empty() => {}
            Peer::Operator => return Err(bad("no tenant was named")),
            _ => {
                let tenant = request.tenant.as_str();
                let message = format!("{peer} may not launch for tenant {tenant:?}");
                return Err(Fault::new(Code::Forbidden, message));
            }
        }
        let id = LaunchId(request.launch_id.0);
        Ok(Self { id, tenant: known_by(&request.tenant), shape, head, request: bytes })
    }
}

/// The end of a launch, with the host that may hold it.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) host: Option<HostId>,
}

impl Ended {
    fn reply(&self) -> LaunchReply {
        match &self.outcome {
            Outcome::Started(started) => LaunchReply::Started(*started),
            Outcome::Failed(fault) => LaunchReply::Failed(fault.clone()),
        }
    }

    fn left(&self) -> Left {
        match (&self.outcome, self.host) {
            (Outcome::Started(started), _) => Left::Started(*started),
            (Outcome::Failed(fault), Some(host)) if fault.code == Code::Unknown => {
                Left::Pinned(host)
            }
            (Outcome::Failed(_), _) => Left::Failed,
        }
    }
}

impl Worker {
    /// Carries a launch frame to its reply.
    pub(crate) async fn launch(self: &Rc<Self>, payload: &[u8], peer: &Peer) -> LaunchReply {
        let asked = match Asked::check(payload, peer, |tenant| self.known.hash(tenant)) {
            Ok(asked) => asked,
            Err(fault) => return self.denied(fault),
        };
        if self.under_way.get() >= self.shared.config.launches_max {
            let message = "too many launches are under way at this placer; nothing was started";
            return self.denied(Fault::new(Code::Overloaded, message));
        }
        let began = self.now();
        self.under_way.set(self.under_way.get() + 1);
        let reply = self.launch_once(&asked).await;
        self.under_way.set(self.under_way.get() - 1);
        self.observe(self.now().saturating_sub(began));
        reply
    }

    pub(crate) fn observe(&self, took: Micros) {
        #[expect(clippy::cast_precision_loss, reason = "a figure for a histogram")]
        self.metrics.latency.observe(took as f64 / 1e6);
    }

    pub(crate) fn denied(&self, fault: Fault) -> LaunchReply {
        self.metrics.denied.inc();
        LaunchReply::Failed(fault)
    }

    /// Looks the id up; drives the launch if it is this thread's to drive.
    async fn launch_once(self: &Rc<Self>, asked: &Asked<'_>) -> LaunchReply {
        let digest = self.known.digest(asked.request);
        let start = asked.head.budget_ms > 0;
        let entered = self.known.enter(asked.id, asked.tenant, digest, start);
        self.entered(asked, entered).await
    }

    /// Goes on with what is known of an id.
    pub(crate) async fn entered(
        self: &Rc<Self>,
        asked: &Asked<'_>,
        entered: Entered,
    ) -> LaunchReply {
        let ended = match entered {
            // The rare ways are boxed: this future is allocated for each launch (see the test below).
            Entered::New(_) if asked.head.named => Box::pin(self.drive_named(asked)).await,
            Entered::New(_) => self.drive(asked).await,
            Entered::Pinned(host) => Box::pin(self.ask_pinned(asked, host)).await,
            Entered::Started(started) => {
                self.metrics.known.inc();
                return LaunchReply::Started(started);
            }
            Entered::Joined(reply) => {
                self.metrics.known.inc();
                let gone = || Fault::new(Code::Unknown, "the placer stopped; ask again");
                return reply.await.unwrap_or_else(|_| LaunchReply::Failed(gone()));
            }
            Entered::Cancelled => {
                self.metrics.known.inc();
                let message = "the launch was cancelled; nothing runs";
                return LaunchReply::Failed(Fault::new(Code::Cancelled, message));
            }
            Entered::Conflict => {
                let message = "another launch has this id; nothing was started";
                return self.denied(Fault::new(Code::Conflict, message));
            }
            Entered::Crowded => {
                let message = "too many ask for this launch at once; nothing more was started";
                return self.denied(Fault::new(Code::Overloaded, message));
            }
            Entered::Nothing => {
                let message = "this placer does not know the launch: it may run or not";
                return LaunchReply::Failed(Fault::new(Code::Unknown, message));
            }
        };
        self.ended(asked.id, &ended)
    }

    /// Keeps the outcome of a launch that this thread drove.
    pub(crate) fn ended(&self, id: LaunchId, ended: &Ended) -> LaunchReply {
        let reply = ended.reply();
        self.known.leave(id, ended.left(), &reply);
        match &ended.outcome {
            Outcome::Started(_) => self.metrics.started.inc(),
            Outcome::Failed(fault) if fault.code == Code::Unknown => self.metrics.unknown.inc(),
            Outcome::Failed(_) => self.metrics.failed.inc(),
        };
        reply
    }

    /// Drives a launch by the core's state machine.
    async fn drive(self: &Rc<Self>, asked: &Asked<'_>) -> Ended {
        let budget_ms = asked.head.budget_ms;
        let began = self.now();
        let picked = match &self.shared.store {
            Some(store) => Box::pin(self.pick_from_store(&**store, asked.shape)).await,
            None => None,
        };
        let launch = self.decide(|dispatch, _| match picked {
            Some(picked) => Launch::with_pick(began, asked.shape, budget_ms, picked, dispatch),
            None => Launch::new(began, asked.shape, budget_ms, dispatch),
        });
        Box::pin(self.drive_on(asked, launch, HostId(0), None, Flight::Nothing)).await
    }

    /// Drives a launch from any of its states: `next` is what its state machine said last, if that was not done yet, `last`
    /// the host that it was sent to last.
    pub(crate) async fn drive_on<'a>(
        self: &'a Rc<Self>,
        asked: &'a Asked<'_>,
        mut launch: Launch,
        mut last: HostId,
        mut next: Option<Step>,
        mut flight: Flight<'a>,
    ) -> Ended {
        loop {
            let poll = || self.decide(|dispatch, table| launch.poll(self.now(), table, dispatch));
            match next.take().unwrap_or_else(poll) {
                Step::Send { host, budget_ms, .. } => {
                    self.metrics.attempts.inc();
                    last = host;
                    flight = self.begin(asked, host, budget_ms);
                }
                Step::Cancel { host } => {
                    let cancel = self.cancel(asked.id, "", host);
                    let cancel = cancel.map(|done| News::Cancelled(done.is_ok()));
                    flight = Flight::Slow(cancel.boxed_local());
                }
                Step::Wait { until } => {
                    let until = self.instant(until);
                    if let Ok(news) = tokio::time::timeout_at(until, &mut flight).await {
                        self.tell(&mut launch, last, news);
                    }
                }
                Step::Done(outcome) => return Ended { outcome, host: Some(last) },
            }
        }
    }

    pub(crate) fn tell(&self, launch: &mut Launch, host: HostId, news: News) {
        let now = self.now();
        self.decide(|dispatch, table| match news {
            News::Reply(reply) => {
                if matches!(reply, LaunchReply::Refused(_)) {
                    self.metrics.refusals.inc();
                }
                launch.handle_reply(now, host, reply, table, dispatch);
            }
            News::NotSent(fault) => launch.handle_unsent(now, host, fault.code, table, dispatch),
            News::Lost => launch.handle_lost(now, host, table, dispatch),
            News::Cancelled(done) => launch.handle_cancel(now, host, done, table, dispatch),
        });
    }

    /// Sends a launch to a host: at once where there is a connection, else after a dial.
    fn begin<'a>(
        self: &'a Rc<Self>,
        asked: &'a Asked<'_>,
        host: HostId,
        budget_ms: u32,
    ) -> Flight<'a> {
        let link = self.addr_of(host).and_then(|addr| self.pool.open(host, addr.into()));
        let Some(link) = link else {
            return Flight::Slow(self.send(asked, host, budget_ms).boxed_local());
        };
        let head = LaunchHead { budget_ms, named: asked.head.named };
        match link.lane.launch(head, asked.request) {
            Ok(reply) => Flight::Launch { reply, _outstanding: link.outstanding() },
            Err(lost) => Flight::Slow(std::future::ready(news_of(Err(lost))).boxed_local()),
        }
    }

    /// Sends a launch to a host and waits for what becomes of it. A dial takes a part of the wait only, so that a host
    /// that does not answer dials is known as not reached rather than as silent.
    pub(crate) async fn send(
        self: &Rc<Self>,
        asked: &Asked<'_>,
        host: HostId,
        budget_ms: u32,
    ) -> News {
        let Some(addr) = self.addr_of(host) else {
            let message = format!("host {host} has left the map; nothing was sent");
            return News::NotSent(Fault::new(Code::HostUnreachable, message));
        };
        let patience = Duration::from_millis(u64::from(budget_ms / 4).max(1));
        let link = match self.pool.get(host, addr.into(), patience).await {
            Ok(link) => link,
            Err(fault) => return News::NotSent(fault),
        };
        let _outstanding = link.outstanding();
        let head = LaunchHead { budget_ms, named: asked.head.named };
        match link.lane.launch(head, asked.request) {
            Ok(reply) => news_of(reply.await),
            Err(lost) => news_of(Err(lost)),
        }
    }

    /// Cancels a launch on a host, in a tenant's name: then it does not run there, and never will.
    pub(crate) async fn cancel(
        self: &Rc<Self>,
        launch_id: LaunchId,
        tenant: &str,
        host: HostId,
    ) -> Result<(), Fault> {
        let addr = self.addr_of(host).ok_or_else(|| {
            Fault::new(Code::HostUnreachable, format!("host {host} has left the map"))
        })?;
        let link = self.pool.get(host, addr.into(), Duration::from_secs(1)).await?;
        let _outstanding = link.outstanding();
        let call = Call::Cancel { launch_id, host };
        stream::call_on_behalf(&link.connection, tenant, &call).await.map(drop)
    }

    /// Asks the one host that may hold a launch of unknown outcome, until it answers or time is up.
    async fn ask_pinned(self: &Rc<Self>, asked: &Asked<'_>, host: HostId) -> Ended {
        let given = Duration::from_millis(u64::from(asked.head.budget_ms));
        let deadline = tokio::time::Instant::now() + given.max(ASK_PINNED);
        let ended = match self.ask_until(asked, host, deadline).await {
            Ok(LaunchReply::Started(started)) => Outcome::Started(started),
            Ok(LaunchReply::Failed(fault)) => Outcome::Failed(fault),
            Ok(LaunchReply::Refused(refused)) => {
                let message = format!("host {host} did not start it; nothing was started");
                Outcome::Failed(Fault::new(refused.code, message))
            }
            Err(_) => {
                let message =
                    format!("host {host} was asked and does not answer; it may run there");
                Outcome::Failed(Fault::new(Code::Unknown, message))
            }
        };
        Ended { outcome: ended, host: Some(host) }
    }

    /// Asks one host for a launch until there is a reply or time is up. The error says whether it was ever sent.
    pub(crate) async fn ask_until(
        self: &Rc<Self>,
        asked: &Asked<'_>,
        host: HostId,
        deadline: tokio::time::Instant,
    ) -> Result<LaunchReply, bool> {
        let mut sent = false;
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let left_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
            if left_ms == 0 {
                return Err(sent);
            }
            self.metrics.attempts.inc();
            match tokio::time::timeout_at(deadline, self.send(asked, host, left_ms)).await {
                Ok(News::Reply(reply)) => return Ok(reply),
                Ok(News::NotSent(_) | News::Cancelled(_)) => {}
                Ok(News::Lost) => sent = true,
                Err(_) => return Err(true),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<'a, F: Future>(_: fn(&'a Rc<Worker>, &'a [u8], &'a Peer) -> F) -> usize {
        size_of::<F>()
    }

    /// A launch allocates one task. Above about a kilobyte the allocator leaves its fast path, which costs more than the rest
    /// of the task.
    #[test]
    fn a_launch_is_a_small_future() {
        let bytes = size_of_future(Worker::launch);
        assert!(bytes <= 900, "{bytes} bytes");
    }
}
