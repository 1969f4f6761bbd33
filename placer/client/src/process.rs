//! A process that this program is attached to: its output as events, its input, its end.
//!
//! There is no task behind it: [`Process::next`] reads the stream, so that a program which reads slowly slows the
//! process down and nothing piles up in between.

use bytes::{Bytes, BytesMut};
use futures::Stream;
use quinn::{RecvStream, SendStream};
use wire::{
    call::{Answer, Call, Exit},
    frame::Kind,
    limits::FRAME_BYTES_MAX,
};
use wire_net::stream::{read_frame, write_frame};

use crate::{CallError, Client};

/// A stream that opened with a call, before and after its answer.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) send: SendStream,
    frames: Frames,
}

/// The receiving side of a stream, frame by frame.
#[derive(Debug)]
pub(crate) struct Frames {
    recv: RecvStream,
    scratch: BytesMut,
}

impl Frames {
    /// The next frame; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<(Kind, Bytes)>, CallError> {
        Ok(read_frame(&mut self.recv, &mut self.scratch).await.map_err(wire::Fault::from)?)
    }
}

impl Attached {
    /// Sends the call; the answer is still to be read.
    pub(crate) async fn open(client: &Client, call: &Call) -> Result<Self, CallError> {
        let (_, open) = client.open_link().await?;
        let (mut send, recv) = open.connection.open_bi().await.map_err(CallError::lost)?;
        write(&mut send, Kind::Call, &call.to_bytes()).await?;
        Ok(Self { send, frames: Frames { recv, scratch: BytesMut::new() } })
    }

    /// The answer, which comes once.
    pub(crate) async fn answer(&mut self) -> Result<Answer, CallError> {
        match self.frame().await? {
            Some((Kind::Answer, bytes)) => match Answer::from_bytes(&bytes) {
                Ok(Answer::Fault(fault)) => Err(fault.into()),
                Ok(answer) => Ok(answer),
                Err(_) => Err(CallError::protocol("an answer that is none")),
            },
            Some(_) => Err(CallError::protocol("another frame before the answer")),
            None => Err(CallError::lost("it ended before the answer")),
        }
    }

    pub(crate) async fn frame(&mut self) -> Result<Option<(Kind, Bytes)>, CallError> {
        self.frames.next().await
    }

    /// Both directions apart.
    pub(crate) fn split(self) -> (SendStream, Frames) {
        (self.send, self.frames)
    }
}

/// Writes one frame.
pub(crate) async fn write(
    send: &mut SendStream,
    kind: Kind,
    payload: &[u8],
) -> Result<(), CallError> {
    Ok(write_frame(send, kind, payload).await.map_err(wire::Fault::from)?)
}

/// Writes bytes in frames of their largest size.
pub(crate) async fn write_bulk(
    send: &mut SendStream,
    kind: Kind,
    bytes: &[u8],
) -> Result<(), CallError> {
    for part in bytes.chunks(FRAME_BYTES_MAX) {
        write(send, kind, part).await?;
    }
    Ok(())
}

/// What comes out of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Output.
    Stdout(Bytes),
    /// Error output; with a terminal all output is [`Event::Stdout`].
    Stderr(Bytes),
    /// So many bytes of output were dropped before what comes next: the host keeps a bounded log.
    Lost(u64),
    /// It ended. The last event.
    Exit(Exit),
}

impl Event {
    /// Checks a frame of an attached stream; `None` for the end.
    fn of(kind: Kind, bytes: Bytes) -> Result<Option<Self>, CallError> {
        let bad = || CallError::protocol("a frame of the wrong length");
        Ok(Some(match kind {
            Kind::Stdout => Self::Stdout(bytes),
            Kind::Stderr => Self::Stderr(bytes),
            Kind::Lost => {
                let count = <[u8; 8]>::try_from(bytes.as_ref()).map_err(|_| bad())?;
                Self::Lost(u64::from_le_bytes(count))
            }
            Kind::Exit => Self::Exit(Exit::from_frame_bytes(&bytes).map_err(|_| bad())?),
            Kind::End => return Ok(None),
            _ => return Err(CallError::protocol("a frame that no process sends")),
        }))
    }
}

/// What a process wrote until it ended, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its error output.
    pub stderr: Vec<u8>,
    /// Bytes of both that were dropped.
    pub lost_bytes: u64,
    /// How it ended.
    pub exit: Exit,
}

/// The input side of a process, to be used beside its output.
#[derive(Debug)]
pub struct Stdin {
    send: SendStream,
}

impl Stdin {
    /// Writes all of `bytes`; waits while the process does not read.
    ///
    /// # Errors
    /// [`CallError`]: the stream broke, or the process is gone.
    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        write_bulk(&mut self.send, Kind::Stdin, bytes).await
    }

    /// Ends the input: the process reads end of file. Signals can still be sent.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn close(&mut self) -> Result<(), CallError> {
        write(&mut self.send, Kind::End, &[]).await
    }

    /// Tells the process the size of its terminal.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn resize(&mut self, rows: u16, columns: u16) -> Result<(), CallError> {
        let [r0, r1] = rows.to_le_bytes();
        let [c0, c1] = columns.to_le_bytes();
        write(&mut self.send, Kind::Resize, &[r0, r1, c0, c1]).await
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn signal(&mut self, signal: u8) -> Result<(), CallError> {
        write(&mut self.send, Kind::Signal, &[signal]).await
    }
}

/// An attached process. Dropping it detaches; the process goes on.
#[derive(Debug)]
pub struct Process {
    id: u32,
    stdin: Stdin,
    frames: Frames,
    exit: Option<Exit>,
}

impl Process {
    pub(crate) fn of(id: u32, attached: Attached) -> Self {
        let (send, frames) = attached.split();
        Self { id, stdin: Stdin { send }, frames, exit: None }
    }

    /// Names it within its sandbox: attach to it again with [`crate::Sandbox::attach_to`].
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The next piece of output, or the end; `None` after the end.
    ///
    /// Dropping the future within a frame may lose that frame: use [`Process::split`] and one task a side rather than
    /// `select!` over both.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn next(&mut self) -> Result<Option<Event>, CallError> {
        if self.exit.is_some() {
            return Ok(None);
        }
        let Some((kind, bytes)) = self.frames.next().await? else { return Ok(None) };
        let event = Event::of(kind, bytes)?;
        if let Some(Event::Exit(exit)) = event {
            self.exit = Some(exit);
        }
        Ok(event)
    }

    /// Its input.
    pub const fn stdin(&mut self) -> &mut Stdin {
        &mut self.stdin
    }

    /// Input and output apart, for a task each.
    pub fn split(self) -> (Stdin, impl Stream<Item = Result<Event, CallError>> + Send + 'static) {
        let Self { stdin, frames, exit, .. } = self;
        (stdin, event_stream(frames, exit))
    }

    /// Waits for its end, and lets its output go.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn wait(mut self) -> Result<Exit, CallError> {
        while self.next().await?.is_some() {}
        self.exit.ok_or_else(|| CallError::lost("it ended before the process did"))
    }

    /// Ends its input, collects its output, and waits for its end.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn output(mut self) -> Result<Output, CallError> {
        // A process that is gone already has no input to end.
        let _ = self.stdin.close().await;
        let (mut stdout, mut stderr, mut lost_bytes) = (Vec::new(), Vec::new(), 0u64);
        while let Some(event) = self.next().await? {
            match event {
                Event::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                Event::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                Event::Lost(bytes) => lost_bytes = lost_bytes.saturating_add(bytes),
                Event::Exit(exit) => return Ok(Output { stdout, stderr, lost_bytes, exit }),
            }
        }
        Err(CallError::lost("it ended before the process did"))
    }
}

/// The events of a process whose input nobody needs.
pub(crate) fn events(
    process: Process,
) -> impl Stream<Item = Result<Event, CallError>> + Send + 'static {
    // The sender is kept: dropping it would reset the stream.
    let (stdin, events) = process.split();
    futures::stream::unfold((stdin, Box::pin(events)), |(stdin, mut events)| async move {
        let event = futures::StreamExt::next(&mut events).await?;
        Some((event, (stdin, events)))
    })
}

fn event_stream(
    frames: Frames,
    exit: Option<Exit>,
) -> impl Stream<Item = Result<Event, CallError>> + Send + 'static {
    let open = exit.is_none().then_some(frames);
    futures::stream::unfold(open, |open| async move {
        let mut frames = open?;
        let event = match frames.next().await {
            Ok(Some((kind, bytes))) => Event::of(kind, bytes).transpose()?,
            Ok(None) => return None,
            Err(error) => Err(error),
        };
        let last = !matches!(event, Ok(Event::Stdout(_) | Event::Stderr(_) | Event::Lost(_)));
        Some((event, (!last).then_some(frames)))
    })
}

#[cfg(test)]
mod tests {
    use wire::call::ExitWhy;

    use super::*;

    #[test]
    fn frames_of_the_wrong_length_are_errors_and_right_ones_events() {
        let exit = |bytes: &[u8]| Event::of(Kind::Exit, Bytes::copy_from_slice(bytes));
        let seven = Exit { code: 7, why: ExitWhy::Returned };
        assert_eq!(exit(&[7, 0, 0, 0, 0]), Ok(Some(Event::Exit(seven))));
        assert!(exit(&[7, 0, 0, 0]).is_err());
        assert!(exit(&[7, 0, 0, 0, 99]).is_err());
        assert_eq!(
            Event::of(Kind::Lost, Bytes::from_static(&[2, 0, 0, 0, 0, 0, 0, 0])),
            Ok(Some(Event::Lost(2)))
        );
        assert!(Event::of(Kind::Lost, Bytes::from_static(&[2])).is_err());
        assert_eq!(Event::of(Kind::End, Bytes::new()), Ok(None));
        assert!(Event::of(Kind::Launch, Bytes::new()).is_err());
    }
}
