//! Lanes: many launches on one long-lived stream (PROTOCOL 7.7), from both ends.
//!
//! A stream a launch costs a packet and an acknowledgement each; on a lane, whatever is ready together leaves in one write.
//! [`Lane`] is the end that launches, [`LaneServer`] the end that answers. Replies come in any order and are matched by
//! tag. When a lane breaks, everything outstanding on it is unknown. Memory is bounded: by launches outstanding, and by
//! bytes that the peer does not take.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::Notify;
use wire::{
    Code, Fault,
    frame::{HEADER_BYTES, Header, Kind, LANE_TAG_BYTES, lane_tag},
    launch::{LaunchHead, LaunchReply},
    limits::LANE_LAUNCHES_MAX,
};

use crate::stream::{BROKEN, LaunchLost, StreamLost};

/// Bytes that one turn of a reader takes.
const TURN_BYTES: usize = 64 * 1024;

/// Bytes that wait for the writer: beyond, nothing more is sent, and a server reads no more.
const UNSENT_BYTES_MAX: usize = 4 << 20;

/// Whole frames out of a stream, several a chunk, without a copy unless a frame lies across two chunks.
#[derive(Debug)]
struct Frames {
    recv: RecvStream,
    have: Bytes,
}

impl Frames {
    /// The next frame that is here already.
    fn take(&mut self) -> Result<Option<(Kind, Bytes)>, StreamLost> {
        let Some(header) = self.have.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let Header { kind, len } = Header::parse(header)?;
        if self.have.len() < HEADER_BYTES + len {
            return Ok(None);
        }
        self.have.advance(HEADER_BYTES);
        Ok(Some((kind, self.have.split_to(len))))
    }

    /// Waits for more bytes; `false` at the end.
    async fn more(&mut self) -> Result<bool, StreamLost> {
        let Some(chunk) = self.recv.read_chunk(TURN_BYTES, true).await? else {
            return if self.have.is_empty() { Ok(false) } else { Err(StreamLost::Truncated) };
        };
        if self.have.is_empty() {
            self.have = chunk.bytes;
        } else {
            let mut joined = BytesMut::with_capacity(self.have.len() + chunk.bytes.len());
            joined.extend_from_slice(&self.have);
            joined.extend_from_slice(&chunk.bytes);
            self.have = joined.freeze();
        }
        Ok(true)
    }
}

/// Frames that wait to be written.
#[derive(Debug, Default)]
struct Outgoing {
    bytes: BytesMut,
    ended: bool,
}

impl Outgoing {
    fn push(&mut self, kind: Kind, tag: u32, parts: &[&[u8]]) {
        let len = LANE_TAG_BYTES + parts.iter().map(|part| part.len()).sum::<usize>();
        self.bytes.reserve(HEADER_BYTES + len);
        self.bytes.extend_from_slice(&Header { kind, len }.bytes());
        self.bytes.extend_from_slice(&tag.to_le_bytes());
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
    }
}

/// A launch's place on a lane; its index is the tag.
#[derive(Debug)]
enum Slot {
    Free,
    Waiting(Option<Waker>),
    Replied(Bytes),
    /// Whoever waited has gone; the tag is taken until the reply comes.
    Abandoned,
}

#[derive(Debug, Default)]
struct Launches {
    out: Outgoing,
    slots: Vec<Slot>,
    free: Vec<u32>,
    broken: Option<Fault>,
}

#[derive(Debug, Default)]
struct Shared {
    launches: Mutex<Launches>,
    ready: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics under these locks, and what they guard is whole after each statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The launching end of a lane. Cheap to clone; the lane ends with its last clone and the launches on it.
#[derive(Clone, Debug)]
pub struct Lane(Arc<Ended>);

/// Ends the writer when the last clone goes.
#[derive(Debug)]
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        lock(&self.0.launches).out.ended = true;
        self.0.ready.notify_one();
    }
}

impl Lane {
    /// Opens a lane on a connection. Runs two tasks on the current runtime.
    ///
    /// # Errors
    /// The connection is gone: nothing was sent.
    pub async fn open(connection: &Connection) -> Result<Self, Fault> {
        let (send, recv) =
            connection.open_bi().await.map_err(|error| crate::tls::explain(&error))?;
        let shared = Arc::new(Shared::default());
        lock(&shared.launches)
            .out
            .bytes
            .extend_from_slice(&Header { kind: Kind::Lane, len: 0 }.bytes());
        tokio::spawn(write_launches(Arc::clone(&shared), send));
        tokio::spawn(read_replies(Arc::clone(&shared), recv));
        Ok(Self(Arc::new(Ended(shared))))
    }

    /// Whether launches can still be sent on it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        lock(&self.0.0.launches).broken.is_none()
    }

    /// Sends a launch; the future is its reply. Dropping the future leaves the outcome unknown.
    ///
    /// # Errors
    /// [`LaunchLost::NotSent`]: the lane is broken or full.
    pub fn launch(&self, head: LaunchHead, request: &[u8]) -> Result<LaneReply, LaunchLost> {
        let shared = &self.0.0;
        let mut launches = lock(&shared.launches);
        if let Some(fault) = &launches.broken {
            return Err(LaunchLost::NotSent(fault.clone()));
        }
        let full = launches.free.is_empty() && launches.slots.len() >= LANE_LAUNCHES_MAX;
        if full || launches.out.bytes.len() > UNSENT_BYTES_MAX {
            let message = "the lane is full; nothing was sent";
            return Err(LaunchLost::NotSent(Fault::new(Code::Overloaded, message)));
        }
        let tag = launches.free.pop().unwrap_or_else(|| {
            launches.slots.push(Slot::Free);
            u32::try_from(launches.slots.len() - 1).unwrap_or(u32::MAX)
        });
        launches.slots[tag as usize] = Slot::Waiting(None);
        let idle = launches.out.bytes.is_empty();
        launches.out.push(Kind::LaneLaunch, tag, &[&head.bytes(), request]);
        drop(launches);
        if idle {
            shared.ready.notify_one();
        }
        Ok(LaneReply { shared: Arc::clone(shared), tag, done: false })
    }
}

/// A launch on its way.
#[derive(Debug)]
pub struct LaneReply {
    shared: Arc<Shared>,
    tag: u32,
    /// The reply was taken: the tag is another launch's now.
    done: bool,
}

impl Future for LaneReply {
    type Output = Result<LaunchReply, LaunchLost>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        assert!(!this.done, "a reply is taken once");
        let mut launches = lock(&this.shared.launches);
        let Launches { slots, free, broken, .. } = &mut *launches;
        let slot = &mut slots[this.tag as usize];
        match slot {
            Slot::Waiting(waker) => match (broken, waker) {
                (Some(fault), _) => Poll::Ready(Err(lost(fault.clone()))),
                (None, Some(waker)) => {
                    waker.clone_from(context.waker());
                    Poll::Pending
                }
                (None, waker) => {
                    *waker = Some(context.waker().clone());
                    Poll::Pending
                }
            },
            Slot::Replied(bytes) => {
                let bytes = std::mem::take(bytes);
                *slot = Slot::Free;
                free.push(this.tag);
                drop(launches);
                this.done = true;
                let message = "the host sent what is no reply";
                let no_reply = |_| LaunchLost::Unknown(Fault::new(Code::Unknown, message));
                Poll::Ready(LaunchReply::from_bytes(&bytes).map_err(no_reply))
            }
            Slot::Free | Slot::Abandoned => unreachable!("this launch's until it is done"),
        }
    }
}

impl Drop for LaneReply {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut launches = lock(&self.shared.launches);
        let slot = &mut launches.slots[self.tag as usize];
        if let Slot::Replied(_) = slot {
            *slot = Slot::Free;
            launches.free.push(self.tag);
        } else {
            *slot = Slot::Abandoned;
        }
    }
}

fn lost(fault: Fault) -> LaunchLost {
    let refused = matches!(fault.code, Code::Unauthenticated | Code::Forbidden | Code::Clock);
    if refused { LaunchLost::NotSent(fault) } else { LaunchLost::Unknown(fault) }
}

async fn write_launches(shared: Arc<Shared>, mut send: SendStream) {
    loop {
        // Whoever is ready to run may add to the write.
        tokio::task::yield_now().await;
        let (bytes, ended) = {
            let mut launches = lock(&shared.launches);
            (launches.out.bytes.split().freeze(), launches.out.ended)
        };
        if bytes.is_empty() {
            if ended {
                let _ = send.finish();
                return;
            }
            shared.ready.notified().await;
            continue;
        }
        if let Err(error) = send.write_chunk(bytes).await {
            return break_launches(&shared, &StreamLost::from(error).into());
        }
    }
}

async fn read_replies(shared: Arc<Shared>, recv: RecvStream) {
    let mut frames = Frames { recv, have: Bytes::new() };
    let mut wakers = Vec::new();
    let lost = loop {
        match frames.more().await {
            Ok(true) => {}
            Ok(false) => break StreamLost::Truncated,
            Err(lost) => break lost,
        }
        let taken = take_replies(&shared, &mut frames, &mut wakers);
        wakers.drain(..).for_each(Waker::wake);
        if let Err(lost) = taken {
            let _ = frames.recv.stop(BROKEN);
            break lost;
        }
    };
    break_launches(&shared, &lost.into());
}

fn take_replies(
    shared: &Shared,
    frames: &mut Frames,
    wakers: &mut Vec<Waker>,
) -> Result<(), StreamLost> {
    let mut launches = lock(&shared.launches);
    while let Some((kind, payload)) = frames.take()? {
        if kind != Kind::LaneReply {
            return Err(StreamLost::Unexpected(kind));
        }
        let (tag, _) = lane_tag(&payload)?;
        let Some(slot) = launches.slots.get_mut(tag as usize) else {
            return Err(StreamLost::Unexpected(kind));
        };
        match slot {
            Slot::Waiting(waker) => {
                wakers.extend(waker.take());
                *slot = Slot::Replied(payload.slice(LANE_TAG_BYTES..));
            }
            Slot::Abandoned => {
                *slot = Slot::Free;
                launches.free.push(tag);
            }
            Slot::Free | Slot::Replied(_) => return Err(StreamLost::Unexpected(kind)),
        }
    }
    Ok(())
}

fn break_launches(shared: &Shared, fault: &Fault) {
    let mut launches = lock(&shared.launches);
    if launches.broken.is_none() {
        launches.broken = Some(fault.clone());
    }
    launches.out.ended = true;
    launches.out.bytes.clear();
    let waiting = launches.slots.iter_mut().filter_map(|slot| match slot {
        Slot::Waiting(waker) => waker.take(),
        _ => None,
    });
    let wakers: Vec<Waker> = waiting.collect();
    drop(launches);
    shared.ready.notify_one();
    wakers.into_iter().for_each(Waker::wake);
}

/// The answering end of a lane, after its [`Kind::Lane`] frame was read.
#[derive(Debug)]
pub struct LaneServer {
    frames: Frames,
    replies: LaneReplies,
}

/// Where replies go. Cheap to clone; the lane's writer ends with the last clone.
#[derive(Clone, Debug)]
pub struct LaneReplies(Arc<RepliesEnded>);

#[derive(Debug)]
struct RepliesEnded(Arc<Replies>);

#[derive(Debug, Default)]
struct Replies {
    out: Mutex<Outgoing>,
    ready: Notify,
    written: Notify,
}

impl Drop for RepliesEnded {
    fn drop(&mut self) {
        lock(&self.0.out).ended = true;
        self.0.ready.notify_one();
    }
}

impl LaneServer {
    /// Serves a lane. Runs a task on the current runtime that writes replies.
    #[must_use]
    pub fn new(send: SendStream, recv: RecvStream) -> Self {
        let replies = Arc::new(Replies::default());
        tokio::spawn(write_replies(Arc::clone(&replies), send));
        let frames = Frames { recv, have: Bytes::new() };
        Self { frames, replies: LaneReplies(Arc::new(RepliesEnded(replies))) }
    }

    /// Where replies go.
    #[must_use]
    pub fn replies(&self) -> LaneReplies {
        self.replies.clone()
    }

    /// The next launch: its tag, and the payload of a [`Kind::Launch`] frame. `None` once no more come.
    ///
    /// # Errors
    /// [`StreamLost`].
    pub async fn next(&mut self) -> Result<Option<(u32, Bytes)>, StreamLost> {
        loop {
            if let Some((kind, payload)) = self.frames.take()? {
                if kind != Kind::LaneLaunch {
                    let _ = self.frames.recv.stop(BROKEN);
                    return Err(StreamLost::Unexpected(kind));
                }
                let (tag, _) = lane_tag(&payload)?;
                return Ok(Some((tag, payload.slice(LANE_TAG_BYTES..))));
            }
            self.replies.taken().await;
            if !self.frames.more().await? {
                return Ok(None);
            }
        }
    }
}

impl LaneReplies {
    /// Answers a launch.
    pub fn reply(&self, tag: u32, reply: &LaunchReply) {
        let replies = &self.0.0;
        let mut out = lock(&replies.out);
        let idle = out.bytes.is_empty();
        out.push(Kind::LaneReply, tag, &[&reply.to_bytes()]);
        drop(out);
        if idle {
            replies.ready.notify_one();
        }
    }

    /// Waits while the peer does not take its replies.
    async fn taken(&self) {
        let replies = &self.0.0;
        while lock(&replies.out).bytes.len() > UNSENT_BYTES_MAX {
            replies.written.notified().await;
        }
    }
}

async fn write_replies(replies: Arc<Replies>, mut send: SendStream) {
    loop {
        tokio::task::yield_now().await;
        let (bytes, ended) = {
            let mut out = lock(&replies.out);
            (out.bytes.split().freeze(), out.ended)
        };
        if bytes.is_empty() {
            if ended {
                let _ = send.finish();
                return;
            }
            replies.ready.notified().await;
            continue;
        }
        // A peer that is gone does not want its replies; the server learns of it by reading.
        let gone = send.write_chunk(bytes).await.is_err();
        replies.written.notify_one();
        if gone {
            return;
        }
    }
}
