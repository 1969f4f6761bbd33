//! What hostd and the worker say to one another: a question, an answer, one packet each, descriptors beside it.
//!
//! `SOCK_SEQPACKET`, so that a message is whole or absent. Each question is answered before the next is read. rkyv,
//! checked; of one build with itself, so that there is a version and no compatibility.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rand::TryRngCore;

use rkyv::{Archive, Deserialize, Serialize};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{limits::MESSAGE_BYTES_MAX, settings::EgressSettings};

/// A sandbox's id, as `wire` carries it.
pub type BoxId = [u8; 16];

/// Of everything in this file.
pub(crate) const VERSION: u32 = 1;

/// Descriptors beside a message: a device and a process.
const FDS_MAX: usize = 2;

/// A question with its number. Whoever asks may go away before the answer comes (a caller's connection ends), so the next
/// one must know which answer is its own.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) struct Question {
    pub(crate) number: u64,
    pub(crate) ask: Ask,
}

/// An answer with the number of its question.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) struct Reply {
    pub(crate) number: u64,
    pub(crate) answer: Answer,
}

/// hostd asks.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum Ask {
    /// The first question. Settings hold for links that are there as well.
    Hello { version: u32, settings: EgressSettings },
    /// Carry this box's packets. Two descriptors: its device, its process. One that is carried already stays.
    Open { id: BoxId, rules: Vec<String> },
    /// What a box has used.
    Usage { id: BoxId },
    /// End at once.
    Shutdown,
}

/// The worker answers.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub(crate) enum Answer {
    /// Boxes that are carried.
    Welcome {
        version: u32,
        boxes: Vec<BoxId>,
    },
    Done,
    Usage(Usage),
    /// It is not carried.
    Unknown,
    Failed {
        why: String,
    },
}

/// What a box has used of its network.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that it got.
    pub received: u64,
    /// Bytes that it sent.
    pub sent: u64,
    /// Connections, datagrams and names that it was refused.
    pub refused: u64,
}

/// One end of the conversation. It must not block.
pub(crate) type Socket = AsyncFd<OwnedFd>;

/// Sends a message.
pub(crate) async fn send(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let sent = |socket: &OwnedFd| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL)?)
    };
    socket.async_io(Interest::WRITABLE, sent).await.map(drop)
}

/// Receives a message; an empty one means that the other side is gone.
pub(crate) async fn receive(
    socket: &Socket,
    buffer: &mut Vec<u8>,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    buffer.resize(MESSAGE_BYTES_MAX, 0);
    let received = |socket: &OwnedFd| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(buffer)];
        let got = recvmsg(socket, &mut into, &mut beside, RecvFlags::CMSG_CLOEXEC)?;
        let mut fds = Vec::new();
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                fds.extend(came);
            }
        }
        Ok((got.bytes, fds))
    };
    socket.async_io(Interest::READABLE, received).await
}

/// Makes a descriptor one that is waited for.
pub(crate) fn socket(fd: OwnedFd) -> io::Result<Socket> {
    rustix::io::ioctl_fionbio(fd.as_fd(), true)?;
    // SAFETY: the descriptor is owned by what is registered and given out as a borrow only, so that it stays open and
    // the same for as long as the registration.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Waits for a descriptor to be readable, for those that are shared or are no sockets.
pub(crate) fn watched(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: as above; an `Arc` of an owner owns the descriptor as well.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

/// A number that nobody can guess.
pub(crate) fn random() -> io::Result<u64> {
    rand::rngs::OsRng.try_next_u64().map_err(io::Error::other)
}
