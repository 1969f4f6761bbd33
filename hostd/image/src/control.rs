//! How hostd speaks with the process that serves its images: one line of JSON each way, a connection a question.
//!
//! The socket lies in hostd's private directory; whoever can reach it is hostd.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use wire::ImageId;

use crate::index::Damaged;
use crate::metrics::ImageMetrics;
use crate::push::{BootSummary, Pusher, write_boot};
use crate::store::ImageError;

/// Bytes of a line.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// A question.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Question {
    /// Open an image, to find out what is wrong with it.
    Open(String),
    /// Let go of an image.
    Close(String),
    /// Bring a boot pack.
    Bring { image: String, entry: String },
    /// Start to note reads.
    Record,
    /// Make them a boot pack.
    FinishRecord { image: String, entry: String },
    /// Counters.
    Metrics,
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Reply {
    Done,
    NotFound(String),
    Failed(String),
    Boot { spans: u64, bytes: u64, stored: u64 },
    Metrics(ImageMetrics),
}

/// Answers questions until the process ends.
pub(crate) async fn listen(listener: UnixListener, pusher: Arc<Pusher>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: others must end first.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let pusher = pusher.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(stream, &pusher).await {
                tracing::debug!(%error, "a control connection broke off");
            }
        });
    }
}

async fn serve(mut stream: UnixStream, pusher: &Arc<Pusher>) -> std::io::Result<()> {
    let mut line = Vec::new();
    let (reader, mut writer) = stream.split();
    BufReader::new(reader.take(LINE_BYTES_MAX)).read_until(b'\n', &mut line).await?;
    let reply = match serde_json::from_slice(&line) {
        Ok(question) => answer(question, pusher).await,
        Err(error) => Reply::Failed(error.to_string()),
    };
    let mut reply = serde_json::to_vec(&reply).map_err(std::io::Error::other)?;
    reply.push(b'\n');
    writer.write_all(&reply).await
}

fn image_id(text: &str) -> Result<ImageId, ImageError> {
    text.parse().map_err(|_| ImageError::NotFound(text.to_owned()))
}

async fn answer(question: Question, pusher: &Arc<Pusher>) -> Reply {
    match try_answer(question, pusher).await {
        Ok(reply) => reply,
        Err(ImageError::NotFound(name)) => Reply::NotFound(name),
        Err(ImageError::Shared(error)) if error.is_not_found() => {
            Reply::NotFound(error.to_string())
        }
        Err(error) => Reply::Failed(error.to_string()),
    }
}

async fn try_answer(question: Question, pusher: &Arc<Pusher>) -> Result<Reply, ImageError> {
    let server = &pusher.server;
    match question {
        Question::Open(image) => {
            server.open(image_id(&image)?).await.map_err(ImageError::Shared)?;
        }
        Question::Close(image) => server.close(image_id(&image)?),
        Question::Bring { image, entry } => {
            tokio::spawn(pusher.clone().bring(image_id(&image)?, entry));
        }
        Question::Record => server.record(),
        Question::FinishRecord { image, entry } => {
            let Some(recorder) = server.recorded() else { return Ok(Reply::Done) };
            let made = write_boot(server, image_id(&image)?, &entry, recorder).await?;
            let BootSummary { spans, bytes, stored } = made;
            return Ok(Reply::Boot { spans, bytes, stored });
        }
        Question::Metrics => return Ok(Reply::Metrics(server.metrics())),
    }
    Ok(Reply::Done)
}

/// The asking side.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    socket: PathBuf,
}

impl Control {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks. A server that is being replaced is waited for.
    pub(crate) async fn ask(&self, question: &Question) -> Result<Reply, ImageError> {
        let failed = |e| ImageError::host("ask the image server", e);
        let mut line =
            serde_json::to_vec(question).map_err(|e| failed(std::io::Error::other(e)))?;
        line.push(b'\n');
        let mut last = None;
        // Together some five seconds.
        for wait_ms in [10, 20, 50, 100, 200, 400, 800, 1600, 1600] {
            match self.ask_once(&line).await {
                Ok(reply) => {
                    return match serde_json::from_slice(&reply) {
                        Ok(Reply::NotFound(name)) => Err(ImageError::NotFound(name)),
                        Ok(Reply::Failed(why)) => Err(failed(std::io::Error::other(why))),
                        Ok(reply) => Ok(reply),
                        Err(_) => Err(Damaged("an answer of the image server").into()),
                    };
                }
                Err(error) => last = Some(error),
            }
            tokio::time::sleep(std::time::Duration::from_millis(wait_ms)).await;
        }
        Err(failed(last.unwrap_or_else(|| std::io::Error::other("no answer"))))
    }

    async fn ask_once(&self, line: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_all(line).await?;
        let mut reply = Vec::new();
        stream.take(LINE_BYTES_MAX).read_to_end(&mut reply).await?;
        if reply.ends_with(b"\n") {
            return Ok(reply);
        }
        Err(std::io::Error::other("the image server ended in the middle of its answer"))
    }
}
