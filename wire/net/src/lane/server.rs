//! The answering end of a lane.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use tokio::sync::Notify;
use wire::{
    frame::{Kind, LANE_TAG_BYTES, lane_tag},
    launch::LaunchReply,
};

use super::{Frames, Outgoing, UNSENT_BYTES_MAX, lock};
use crate::stream::{BROKEN, StreamLost};

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
            if let Some(launch) = self.here()? {
                return Ok(Some(launch));
            }
            if !self.more().await? {
                return Ok(None);
            }
        }
    }

    /// The next launch that is here already: what comes together can be answered together.
    ///
    /// # Errors
    /// [`StreamLost`].
    pub fn here(&mut self) -> Result<Option<(u32, Bytes)>, StreamLost> {
        let Some((kind, payload)) = self.frames.take()? else { return Ok(None) };
        if kind != Kind::LaneLaunch {
            let _ = self.frames.recv.stop(BROKEN);
            return Err(StreamLost::Unexpected(kind));
        }
        let (tag, _) = lane_tag(&payload)?;
        Ok(Some((tag, payload.slice(LANE_TAG_BYTES..))))
    }

    /// Waits until more is here, and while the peer does not take its replies; `false` once no more come.
    ///
    /// # Errors
    /// [`StreamLost`].
    pub async fn more(&mut self) -> Result<bool, StreamLost> {
        self.replies.taken().await;
        self.frames.more().await
    }
}

impl LaneReplies {
    /// Answers a launch.
    pub fn reply(&self, tag: u32, reply: &LaunchReply) {
        self.reply_bytes(tag, &reply.to_bytes());
    }

    /// Answers a launch with the bytes of a reply, as a host sent them.
    pub fn reply_bytes(&self, tag: u32, reply: &[u8]) {
        let replies = &self.0.0;
        let mut out = lock(&replies.out);
        let idle = out.is_empty();
        out.push(Kind::LaneReply, tag, &[reply]);
        drop(out);
        if idle {
            replies.ready.notify_one();
        }
    }

    /// Waits while the peer does not take its replies.
    async fn taken(&self) {
        let replies = &self.0.0;
        while lock(&replies.out).len() > UNSENT_BYTES_MAX {
            replies.written.notified().await;
        }
    }
}

async fn write_replies(replies: Arc<Replies>, mut send: SendStream) {
    loop {
        tokio::task::yield_now().await;
        let (bytes, ended) = {
            let mut out = lock(&replies.out);
            (out.take(), out.ended)
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
