//! Frames, calls and launches over QUIC streams.
//!
//! A reader takes what QUIC has and no more than its frame, so that a stream can be handed on between frames. It
//! never reserves what a header merely claims. What was sent and not answered is *unknown*, a type of its own
//! ([`LaunchLost::Unknown`]): only the same host can say what became of it (PROTOCOL 6).

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use wire::{
    Code, Fault,
    call::{Answer, Call, FileOp},
    codec::Malformed,
    frame::{HEADER_BYTES, Header, Kind},
    launch::{LaunchHead, LaunchReply},
};

use crate::tls;

/// Closes a stream whose peer broke the protocol (PROTOCOL 7.6).
pub const BROKEN: VarInt = VarInt::from_u32(1);

/// A stream that ended where it should not.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamLost {
    /// The peer broke the protocol.
    #[error("the peer sent what is no frame: {0}")]
    Malformed(#[from] Malformed),
    /// The peer ended the stream within a frame.
    #[error("the stream ended within a frame")]
    Truncated,
    /// The peer sent another kind of frame than the protocol says here.
    #[error("the peer sent a {0:?} frame where another belongs")]
    Unexpected(Kind),
    /// The connection or the stream is gone.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The connection or the stream is gone.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl From<StreamLost> for Fault {
    fn from(lost: StreamLost) -> Self {
        match &lost {
            StreamLost::Read(ReadError::ConnectionLost(error))
            | StreamLost::Write(WriteError::ConnectionLost(error)) => tls::explain(error),
            StreamLost::Malformed(_) | StreamLost::Truncated | StreamLost::Unexpected(_) => {
                Self::new(Code::BadRequest, lost.to_string())
            }
            StreamLost::Read(_) | StreamLost::Write(_) => {
                Self::new(Code::Unreachable, lost.to_string())
            }
        }
    }
}

/// Where a stream's bytes come from: a QUIC stream, or a test's chunks.
pub trait Chunks {
    /// The next bytes, at least one and at most `bytes_max` of them; `None` at the end.
    fn chunk(
        &mut self,
        bytes_max: usize,
    ) -> impl Future<Output = Result<Option<Bytes>, StreamLost>> + Send;
}

impl Chunks for RecvStream {
    async fn chunk(&mut self, bytes_max: usize) -> Result<Option<Bytes>, StreamLost> {
        Ok(self.read_chunk(bytes_max, true).await?.map(|chunk| chunk.bytes))
    }
}

/// Writes one frame.
///
/// # Errors
/// [`StreamLost::Write`].
///
/// # Panics
/// If the payload is above [`wire::limits::FRAME_BYTES_MAX`]: cut bulk data first.
pub async fn write_frame(
    send: &mut SendStream,
    kind: Kind,
    payload: &[u8],
) -> Result<(), StreamLost> {
    write_parts(send, kind, &[payload]).await
}

/// Writes one frame whose payload lies in parts.
///
/// # Errors
/// [`StreamLost::Write`].
pub async fn write_parts(
    send: &mut SendStream,
    kind: Kind,
    parts: &[&[u8]],
) -> Result<(), StreamLost> {
    let len = parts.iter().map(|part| part.len()).sum();
    let mut frame = BytesMut::with_capacity(HEADER_BYTES + len);
    frame.extend_from_slice(&Header { kind, len }.bytes());
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    Ok(send.write_chunk(frame.freeze()).await?)
}

/// Reads one frame; `None` where the stream ends between frames. `scratch` keeps its allocation between calls.
///
/// # Errors
/// [`StreamLost`]: a bad header (stop the stream with [`BROKEN`]), an end within a frame, or a lost connection.
pub async fn read_frame<C: Chunks>(
    recv: &mut C,
    scratch: &mut BytesMut,
) -> Result<Option<(Kind, Bytes)>, StreamLost> {
    let mut header = [0; HEADER_BYTES];
    let mut have = 0;
    while have < HEADER_BYTES {
        match recv.chunk(HEADER_BYTES - have).await? {
            Some(chunk) => {
                header[have..have + chunk.len()].copy_from_slice(&chunk);
                have += chunk.len();
            }
            None if have == 0 => return Ok(None),
            None => return Err(StreamLost::Truncated),
        }
    }
    let Header { kind, len } = Header::parse(&header)?;
    if len == 0 {
        return Ok(Some((kind, Bytes::new())));
    }
    let first = recv.chunk(len).await?.ok_or(StreamLost::Truncated)?;
    if first.len() == len {
        return Ok(Some((kind, first)));
    }
    scratch.clear();
    scratch.extend_from_slice(&first);
    while scratch.len() < len {
        let chunk = recv.chunk(len - scratch.len()).await?.ok_or(StreamLost::Truncated)?;
        scratch.extend_from_slice(&chunk);
    }
    Ok(Some((kind, scratch.split().freeze())))
}

/// Reads the frame that must come next, of the kind that must come.
///
/// # Errors
/// [`StreamLost`]; also [`StreamLost::Truncated`] where the stream ends.
pub async fn expect_frame<C: Chunks>(recv: &mut C, kind: Kind) -> Result<Bytes, StreamLost> {
    match read_frame(recv, &mut BytesMut::new()).await? {
        Some((got, payload)) if got == kind => Ok(payload),
        Some((got, _)) => Err(StreamLost::Unexpected(got)),
        None => Err(StreamLost::Truncated),
    }
}

/// Whether a call that was sent and not answered may have changed something.
fn changes(call: &Call) -> bool {
    match call {
        Call::Inspect(_)
        | Call::List { .. }
        | Call::Attach { .. }
        | Call::Wait(_)
        | Call::Stats(_)
        | Call::Port { .. }
        | Call::Hosts
        | Call::Host(_)
        | Call::Ping => false,
        Call::File { op, .. } => {
            !matches!(op, FileOp::Read(_) | FileOp::List(_) | FileOp::Stat(_) | FileOp::Watch(_))
        }
        _ => true,
    }
}

/// Asks and waits for the one answer; [`Answer::Fault`] comes back as the error.
///
/// # Errors
/// The peer's fault; [`Code::Unreachable`] if nothing was done; [`Code::Unknown`] if a call that changes something
/// was sent and its answer was lost.
pub async fn call(connection: &Connection, call: &Call) -> Result<Answer, Fault> {
    let (answer, mut send, _) = open_in(connection, None, call).await?;
    let _ = send.finish();
    Ok(answer)
}

/// As [`call`], from a placer to a host, in a tenant's name (empty for an operator; PROTOCOL 7.1).
///
/// # Errors
/// As [`call`].
pub async fn call_on_behalf(
    connection: &Connection,
    tenant: &str,
    call: &Call,
) -> Result<Answer, Fault> {
    let (answer, mut send, _) = open_in(connection, Some(tenant), call).await?;
    let _ = send.finish();
    Ok(answer)
}

/// Asks, and keeps the stream for the frames that go on after the answer.
///
/// # Errors
/// As [`call`].
pub async fn open(
    connection: &Connection,
    call: &Call,
) -> Result<(Answer, SendStream, RecvStream), Fault> {
    open_in(connection, None, call).await
}

/// As [`open`], from a placer to a host, in a tenant's name (empty for an operator; PROTOCOL 7.1).
///
/// # Errors
/// As [`call`].
pub async fn open_on_behalf(
    connection: &Connection,
    tenant: &str,
    call: &Call,
) -> Result<(Answer, SendStream, RecvStream), Fault> {
    open_in(connection, Some(tenant), call).await
}

async fn open_in(
    connection: &Connection,
    tenant: Option<&str>,
    call: &Call,
) -> Result<(Answer, SendStream, RecvStream), Fault> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| not_opened(&e))?;
    let asked = async {
        if let Some(tenant) = tenant {
            write_frame(&mut send, Kind::OnBehalf, tenant.as_bytes()).await?;
        }
        write_frame(&mut send, Kind::Call, &call.to_bytes()).await?;
        let bytes = expect_frame(&mut recv, Kind::Answer).await?;
        Ok(Answer::from_bytes(&bytes)?)
    };
    match asked.await {
        Ok(Answer::Fault(fault)) => Err(fault),
        Ok(answer) => Ok((answer, send, recv)),
        Err(lost) => {
            let _ = recv.stop(BROKEN);
            Err(unanswered(lost, changes(call)))
        }
    }
}

fn not_opened(error: &ConnectionError) -> Fault {
    let fault = tls::explain(error);
    Fault::new(fault.code, format!("{}; nothing was sent", fault.message))
}

fn unanswered(lost: StreamLost, may_have_happened: bool) -> Fault {
    let fault = Fault::from(lost);
    let refused = matches!(fault.code, Code::Unauthenticated | Code::Forbidden | Code::Clock);
    if may_have_happened && !refused {
        let message =
            format!("the answer was lost ({}): it may have been done or not", fault.message);
        return Fault::new(Code::Unknown, message);
    }
    fault
}

/// A launch without an answer. Two types of news, because they lead to different deeds.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LaunchLost {
    /// It was not sent: another host may have it.
    #[error("{0}")]
    NotSent(Fault),
    /// It was sent: it may run or not, and only this host can tell.
    #[error("{0}")]
    Unknown(Fault),
}

/// Sends a launch and waits for its reply. Dropping the future leaves the outcome unknown.
///
/// # Errors
/// [`LaunchLost`].
pub async fn launch(
    connection: &Connection,
    head: LaunchHead,
    request: &[u8],
) -> Result<LaunchReply, LaunchLost> {
    let (mut send, mut recv) =
        connection.open_bi().await.map_err(|error| LaunchLost::NotSent(not_opened(&error)))?;
    let asked = async {
        write_parts(&mut send, Kind::Launch, &[&head.bytes(), request]).await?;
        let _ = send.finish();
        let bytes = expect_frame(&mut recv, Kind::LaunchReply).await?;
        Ok(LaunchReply::from_bytes(&bytes)?)
    };
    asked.await.map_err(|lost: StreamLost| {
        let fault = unanswered(lost, true);
        // Refused in the handshake: no stream of ours was read.
        if fault.code == Code::Unknown {
            LaunchLost::Unknown(fault)
        } else {
            LaunchLost::NotSent(fault)
        }
    })
}

/// Answers a launch and ends the stream.
///
/// # Errors
/// [`StreamLost::Write`].
pub async fn reply(send: &mut SendStream, reply: &LaunchReply) -> Result<(), StreamLost> {
    write_frame(send, Kind::LaunchReply, &reply.to_bytes()).await?;
    let _ = send.finish();
    Ok(())
}

/// Answers a call. The caller goes on with frames, or ends the stream.
///
/// # Errors
/// [`StreamLost::Write`].
pub async fn answer(send: &mut SendStream, answer: &Answer) -> Result<(), StreamLost> {
    write_frame(send, Kind::Answer, &answer.to_bytes()).await
}

/// Passes bytes both ways until both directions have ended; returns the bytes from `a` to `b`, and from `b` to `a`.
/// A reset or a stop on one side is handed to the other.
pub async fn splice(
    (mut a_send, mut a_recv): (SendStream, RecvStream),
    (mut b_send, mut b_recv): (SendStream, RecvStream),
) -> (u64, u64) {
    tokio::join!(pass(&mut a_recv, &mut b_send), pass(&mut b_recv, &mut a_send))
}

/// Bytes that one turn of a splice takes at most.
const SPLICE_BYTES: usize = 64 * 1024;

async fn pass(recv: &mut RecvStream, send: &mut SendStream) -> u64 {
    let mut passed = 0;
    let stopped = send.stopped();
    tokio::pin!(stopped);
    loop {
        let chunk = tokio::select! {
            chunk = recv.read_chunk(SPLICE_BYTES, true) => chunk,
            code = &mut stopped => {
                let code = code.ok().flatten().unwrap_or(BROKEN);
                let _ = recv.stop(code);
                return passed;
            }
        };
        match chunk {
            Ok(Some(chunk)) => {
                let len = chunk.bytes.len() as u64;
                if let Err(error) = send.write_chunk(chunk.bytes).await {
                    let code = if let WriteError::Stopped(code) = error { code } else { BROKEN };
                    let _ = recv.stop(code);
                    return passed;
                }
                passed += len;
            }
            Ok(None) => {
                let _ = send.finish();
                return passed;
            }
            Err(error) => {
                let code = if let ReadError::Reset(code) = error { code } else { BROKEN };
                let _ = send.reset(code);
                return passed;
            }
        }
    }
}
