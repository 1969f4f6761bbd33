//! A TCP port inside a sandbox, as a byte stream.
//!
//! [`PortStream::into_io`] makes one that implements tokio's traits, for whatever speaks over sockets.

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use wire::frame::Kind;

use crate::{
    CallError,
    process::{Attached, write, write_bulk},
};

/// Bytes that lie between a [`PortStream`] and its [`PortStream::into_io`] each way.
const IO_BYTES: usize = 64 * 1024;

/// A connection to a port inside a sandbox.
#[derive(Debug)]
pub struct PortStream {
    attached: Attached,
    ended: bool,
}

impl PortStream {
    pub(crate) const fn of(attached: Attached) -> Self {
        Self { attached, ended: false }
    }

    /// What the port sends next; `None` when it has ended its direction.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn read(&mut self) -> Result<Option<Bytes>, CallError> {
        if self.ended {
            return Ok(None);
        }
        match self.attached.frame().await? {
            Some((Kind::Data, bytes)) => Ok(Some(bytes)),
            Some((Kind::End, _)) | None => {
                self.ended = true;
                Ok(None)
            }
            Some(_) => Err(CallError::protocol("a frame that no port sends")),
        }
    }

    /// Sends all of `bytes` to the port.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        write_bulk(&mut self.attached.send, Kind::Data, bytes).await
    }

    /// Ends our direction.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn close(&mut self) -> Result<(), CallError> {
        write(&mut self.attached.send, Kind::End, &[]).await
    }

    /// As a stream of tokio's traits. A task passes the bytes until both directions have ended.
    #[must_use]
    pub fn into_io(self) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(IO_BYTES);
        tokio::spawn(pass(self.attached, theirs));
        ours
    }
}

async fn pass(attached: Attached, io: DuplexStream) {
    let (mut send, mut frames) = attached.split();
    let (mut io_read, mut io_write) = tokio::io::split(io);
    let outward = async {
        let mut bytes = vec![0; IO_BYTES];
        while let Ok(len @ 1..) = io_read.read(&mut bytes).await {
            if write(&mut send, Kind::Data, &bytes[..len]).await.is_err() {
                return;
            }
        }
        // The other side may be gone already.
        let _ = write(&mut send, Kind::End, &[]).await;
        let _ = send.finish();
    };
    let inward = async {
        while let Ok(Some((Kind::Data, bytes))) = frames.next().await {
            if io_write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = io_write.shutdown().await;
    };
    tokio::join!(outward, inward);
}
