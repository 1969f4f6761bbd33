//! Files of a sandbox. Paths are absolute inside it, and links are followed inside it.

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use wire::{
    call::{Answer, Call, FileChange, FileOp, FileRecord},
    frame::Kind,
};

use crate::{
    CallError, Sandbox,
    process::{Attached, write, write_bulk},
};

impl Sandbox {
    /// All of a file.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn read_file(&self, path: &str) -> Result<Vec<u8>, CallError> {
        let mut reader = self.open_file(FileOp::Read(path.to_owned())).await?;
        let mut bytes = Vec::new();
        loop {
            match reader.frame().await? {
                Some((Kind::Data, data)) => bytes.extend_from_slice(&data),
                Some((Kind::End, _)) => return Ok(bytes),
                Some((Kind::Answer, fault)) => return Err(broken_off(&fault)),
                Some(_) => return Err(CallError::protocol("a frame that no file sends")),
                None => return Err(CallError::lost("it ended within the file")),
            }
        }
    }

    /// A file in pieces, for what does not fit into memory.
    ///
    /// # Errors
    /// [`CallError`], at once or within the stream.
    pub async fn read_file_stream(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, CallError>> + Send + 'static, CallError> {
        let reader = self.open_file(FileOp::Read(path.to_owned())).await?;
        Ok(futures::stream::unfold(Some(reader), |reader| async move {
            let mut reader = reader?;
            Some(match reader.frame().await {
                Ok(Some((Kind::Data, data))) => (Ok(data), Some(reader)),
                Ok(Some((Kind::End, _))) => return None,
                Ok(Some((Kind::Answer, fault))) => (Err(broken_off(&fault)), None),
                Ok(Some(_)) => (Err(CallError::protocol("a frame that no file sends")), None),
                Ok(None) => (Err(CallError::lost("it ended within the file")), None),
                Err(error) => (Err(error), None),
            })
        }))
    }

    /// Makes or truncates a file; `mode` is that of a new one. Returns once all is written.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn write_file(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), CallError> {
        let all = futures::stream::once(std::future::ready(Ok(Bytes::copy_from_slice(bytes))));
        self.write_file_stream(path, mode, all).await
    }

    /// The same from pieces, for what does not fit into memory. The first error among them breaks it off, and what was
    /// written until then stays.
    ///
    /// # Errors
    /// [`CallError`], or that of a piece.
    pub async fn write_file_stream<E: From<CallError>>(
        &self,
        path: &str,
        mode: u32,
        pieces: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<(), E> {
        let op = FileOp::Write { path: path.to_owned(), mode };
        let mut writer =
            Attached::open(&self.client, &Call::File { sandbox: self.id(), op }).await?;
        let mut pieces = std::pin::pin!(pieces);
        let sent = loop {
            let Some(piece) = pieces.next().await else {
                break write(&mut writer.send, Kind::End, &[]).await;
            };
            if let Err(error) = write_bulk(&mut writer.send, Kind::Data, &piece?).await {
                break Err(error);
            }
        };
        // A host that refuses stops the stream: its answer says more than the broken pipe.
        match (writer.answer().await, sent) {
            (Ok(Answer::Done), Ok(())) => Ok(()),
            (Ok(_), Ok(())) => Err(CallError::protocol("done was expected").into()),
            (Err(error), Ok(())) => Err(error.into()),
            (Err(error), Err(_)) if error.code() != wire::Code::Unreachable => Err(error.into()),
            (_, Err(error)) => Err(error.into()),
        }
    }

    /// What is in a directory.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn list_dir(&self, path: &str) -> Result<Vec<FileRecord>, CallError> {
        match self.client.ask(&self.file(FileOp::List(path.to_owned()))).await? {
            Answer::Files(files) => Ok(files),
            _ => Err(CallError::protocol("files were expected")),
        }
    }

    /// What one path is.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn stat(&self, path: &str) -> Result<FileRecord, CallError> {
        match self.client.ask(&self.file(FileOp::Stat(path.to_owned()))).await? {
            Answer::Files(mut files) if files.len() == 1 => Ok(files.remove(0)),
            _ => Err(CallError::protocol("one file was expected")),
        }
    }

    /// Makes a directory, with its parents.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn make_dir(&self, path: &str) -> Result<(), CallError> {
        self.client.ask_done(&self.file(FileOp::MakeDir(path.to_owned()))).await
    }

    /// Removes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn remove(&self, path: &str) -> Result<(), CallError> {
        self.client.ask_done(&self.file(FileOp::Remove(path.to_owned()))).await
    }

    /// Renames.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), CallError> {
        let op = FileOp::Rename { from: from.to_owned(), to: to.to_owned() };
        self.client.ask_done(&self.file(op)).await
    }

    /// Changes of a file, or of what is in a directory (not beneath it), from now on. Ends when what is watched is
    /// gone, or with the sandbox; drop it to stop.
    ///
    /// # Errors
    /// [`CallError`], at once or within the stream.
    pub async fn watch(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<FileChange, CallError>> + Send + 'static, CallError> {
        let watcher = self.open_file(FileOp::Watch(path.to_owned())).await?;
        Ok(futures::stream::unfold(Some(watcher), |watcher| async move {
            let mut watcher = watcher?;
            Some(match watcher.frame().await {
                Ok(Some((Kind::Data, said))) => match FileChange::from_frame_bytes(&said) {
                    Ok(change) => (Ok(change), Some(watcher)),
                    Err(_) => (Err(CallError::protocol("a change that is none")), None),
                },
                Ok(Some((Kind::End, _))) => return None,
                Ok(Some(_)) => (Err(CallError::protocol("a frame that no watch sends")), None),
                Ok(None) => (Err(CallError::lost("it ended within the watch")), None),
                Err(error) => (Err(error), None),
            })
        }))
    }

    const fn file(&self, op: FileOp) -> Call {
        Call::File { sandbox: self.id(), op }
    }

    async fn open_file(&self, op: FileOp) -> Result<Attached, CallError> {
        let mut reader = Attached::open(&self.client, &self.file(op)).await?;
        match reader.answer().await? {
            Answer::Done => Ok(reader),
            _ => Err(CallError::protocol("done was expected")),
        }
    }
}

/// A second answer within a file: the host could not read on.
fn broken_off(answer: &[u8]) -> CallError {
    match Answer::from_bytes(answer) {
        Ok(Answer::Fault(fault)) => fault.into(),
        _ => CallError::protocol("a second answer that is no fault"),
    }
}
