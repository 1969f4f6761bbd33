//! Lanes: many launches on one long-lived stream (PROTOCOL 7.7), from both ends.
//!
//! A stream a launch costs a packet and an acknowledgement each; on a lane, whatever is ready together leaves in one write.
//! [`Lane`] is the end that launches, [`LaneServer`] the end that answers. Replies come in any order and are matched by
//! tag. When a lane breaks, everything outstanding on it is unknown. Memory is bounded: by launches outstanding, and by
//! bytes that the peer does not take.
//!
//! A launch waits as a future ([`Lane::launch`]), or under a token of its caller's ([`Lane::launch_direct`]): replies of such
//! launches come in batches to one reader ([`LandedReplies`]), so that thousands a turn wake one task and not thousands.

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

mod server;

pub use server::{LaneReplies, LaneServer};

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

/// Frames of a lane that wait to be written, one behind the other.
#[derive(Debug, Default)]
pub struct Outgoing {
    bytes: BytesMut,
    ended: bool,
}

impl Outgoing {
    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All that waits, to be written now.
    #[must_use]
    pub fn take(&mut self) -> Bytes {
        self.bytes.split().freeze()
    }

    /// Adds a frame: its tag, and what follows it.
    pub fn push(&mut self, kind: Kind, tag: u32, parts: &[&[u8]]) {
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
    /// The reply goes to the lane's one reader, with this token.
    Direct(u64),
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
        let (lane, mut replies) = Self::open_direct(connection).await?;
        tokio::spawn(async move {
            let mut landed = Vec::new();
            while replies.next(&mut landed).await {
                debug_assert!(landed.is_empty(), "nobody launches directly on this lane");
            }
        });
        Ok(lane)
    }

    /// As [`Lane::open`]; the replies are read by the caller, who must go on reading for as long as the lane is used.
    ///
    /// # Errors
    /// As [`Lane::open`].
    pub async fn open_direct(connection: &Connection) -> Result<(Self, LandedReplies), Fault> {
        let (send, recv) =
            connection.open_bi().await.map_err(|error| crate::tls::explain(&error))?;
        let shared = Arc::new(Shared::default());
        lock(&shared.launches)
            .out
            .bytes
            .extend_from_slice(&Header { kind: Kind::Lane, len: 0 }.bytes());
        tokio::spawn(write_launches(Arc::clone(&shared), send));
        let frames = Frames { recv, have: Bytes::new() };
        let replies = LandedReplies { shared: Arc::clone(&shared), frames, wakers: Vec::new() };
        Ok((Self(Arc::new(Ended(shared))), replies))
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
        let tag = self.push(Slot::Waiting(None), head, request)?;
        Ok(LaneReply { shared: Arc::clone(&self.0.0), tag, done: false })
    }

    /// Sends a launch whose reply comes to the reader of [`Lane::open_direct`] with this token.
    ///
    /// # Errors
    /// As [`Lane::launch`].
    pub fn launch_direct(
        &self,
        token: u64,
        head: LaunchHead,
        request: &[u8],
    ) -> Result<(), LaunchLost> {
        self.push(Slot::Direct(token), head, request).map(drop)
    }

    fn push(&self, slot: Slot, head: LaunchHead, request: &[u8]) -> Result<u32, LaunchLost> {
        let shared = &self.0.0;
        let mut launches = lock(&shared.launches);
        if let Some(fault) = &launches.broken {
            return Err(LaunchLost::NotSent(fault.clone()));
        }
        let full = launches.free.is_empty() && launches.slots.len() >= LANE_LAUNCHES_MAX;
        if full || launches.out.len() > UNSENT_BYTES_MAX {
            let message = "the lane is full; nothing was sent";
            return Err(LaunchLost::NotSent(Fault::new(Code::Overloaded, message)));
        }
        let tag = launches.free.pop().unwrap_or_else(|| {
            launches.slots.push(Slot::Free);
            u32::try_from(launches.slots.len() - 1).unwrap_or(u32::MAX)
        });
        launches.slots[tag as usize] = slot;
        let idle = launches.out.is_empty();
        launches.out.push(Kind::LaneLaunch, tag, &[&head.bytes(), request]);
        drop(launches);
        if idle {
            shared.ready.notify_one();
        }
        Ok(tag)
    }
}

/// The reply to a launch that was sent with a token.
#[derive(Debug)]
pub struct Landed {
    /// The launch's token.
    pub token: u64,
    /// The reply's bytes, unchecked ([`LaunchReply::from_bytes`]); or why there is none and will not be.
    pub reply: Result<Bytes, LaunchLost>,
}

/// Replies as they come, a batch a time.
#[derive(Debug)]
pub struct LandedReplies {
    shared: Arc<Shared>,
    frames: Frames,
    wakers: Vec<Waker>,
}

impl LandedReplies {
    /// Waits for replies and adds those of launches with a token to `landed`; futures of the others are woken. `false` once
    /// the lane is broken: whatever was outstanding has been added as lost, and nothing comes any more.
    pub async fn next(&mut self, landed: &mut Vec<Landed>) -> bool {
        let lost = match self.frames.more().await {
            Ok(true) => {
                let taken = take_replies(&self.shared, &mut self.frames, &mut self.wakers, landed);
                self.wakers.drain(..).for_each(Waker::wake);
                let Err(lost) = taken else { return true };
                let _ = self.frames.recv.stop(BROKEN);
                lost
            }
            Ok(false) => StreamLost::Truncated,
            Err(lost) => lost,
        };
        break_launches(&self.shared, &lost.into());
        give_up(&self.shared, landed);
        false
    }
}

impl Drop for LandedReplies {
    fn drop(&mut self) {
        // Nobody reads on: nobody should wait.
        break_launches(&self.shared, &Fault::new(Code::Unknown, "the lane's reader has gone"));
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
            Slot::Free | Slot::Abandoned | Slot::Direct(_) => {
                unreachable!("this launch's until it is done")
            }
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
            (launches.out.take(), launches.out.ended)
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

fn take_replies(
    shared: &Shared,
    frames: &mut Frames,
    wakers: &mut Vec<Waker>,
    landed: &mut Vec<Landed>,
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
            Slot::Direct(token) => {
                landed.push(Landed { token: *token, reply: Ok(payload.slice(LANE_TAG_BYTES..)) });
                *slot = Slot::Free;
                launches.free.push(tag);
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

/// Takes the tokens of what is outstanding on a broken lane.
fn give_up(shared: &Shared, landed: &mut Vec<Landed>) {
    let mut launches = lock(&shared.launches);
    let Launches { slots, broken, .. } = &mut *launches;
    let fault = broken.clone().unwrap_or_else(|| Fault::new(Code::Unknown, "the lane broke"));
    for slot in slots {
        if let Slot::Direct(token) = *slot {
            // No tag is drawn any more, so that the slot need not be freed.
            *slot = Slot::Abandoned;
            landed.push(Landed { token, reply: Err(lost(fault.clone())) });
        }
    }
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
