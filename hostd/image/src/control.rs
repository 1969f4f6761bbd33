//! How hostd speaks with the process that serves its images: one line of JSON each way, a connection a question.
//!
//! The socket lies in hostd's private directory; whoever can reach it is hostd.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use wire::ImageId;

use crate::index::Damaged;
use crate::manifest::ImageConfig;
use crate::metrics::ImageMetrics;
use crate::push::{BootSummary, FirstRun, Pusher};
use crate::store::ImageError;
use crate::worker::Worker;

/// Bytes of a line.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// A question.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Question {
    /// Open an image that is about to be mounted, and begin its first run if there is one.
    Open { image: String, run: Option<FirstRun> },
    /// Let go of an image.
    Close(String),
    /// An entry's first run of an image that is mounted.
    Run(FirstRun),
    /// That run has ended.
    EndRun { image: String, entry: String },
    /// Start to note reads.
    Record,
    /// Make them a boot pack.
    FinishRecord { recording: u64, image: String, entry: String },
    /// Counters.
    Metrics,
    /// hostd is there as long as this connection is.
    Hold,
    /// hostd ends in good order: take the mounts away.
    Leave,
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Reply {
    Done,
    NotFound(String),
    Failed(String),
    Opened(ImageConfig),
    Recording(u64),
    Boot(BootSummary),
    Metrics(ImageMetrics),
}

/// Answers questions until the process ends.
pub(crate) async fn listen(listener: UnixListener, worker: Arc<Worker>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: others must end first.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let worker = worker.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(stream, &worker).await {
                tracing::debug!(%error, "a control connection broke off");
            }
        });
    }
}

async fn serve(mut stream: UnixStream, worker: &Arc<Worker>) -> std::io::Result<()> {
    let mut line = Vec::new();
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader.take(LINE_BYTES_MAX));
    reader.read_until(b'\n', &mut line).await?;
    let reply = match serde_json::from_slice(&line) {
        Ok(Question::Hold) => {
            let _lease = worker.lease();
            // Nothing more comes; the end does.
            let _ = reader.read_until(b'\n', &mut line).await;
            return Ok(());
        }
        Ok(Question::Leave) => {
            worker.leave().await;
            Reply::Done
        }
        Ok(question) => answer(question, &worker.pusher).await,
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
        Question::Open { image, run } => {
            return Ok(Reply::Opened(pusher.open_for(image_id(&image)?, run).await?));
        }
        Question::Close(image) => server.close(image_id(&image)?),
        Question::Run(run) => drop(pusher.begin(image_id(&run.image)?, run)),
        Question::EndRun { image, entry } => pusher.end(&image, &entry),
        Question::Record => return Ok(Reply::Recording(server.record())),
        Question::FinishRecord { recording, image, entry } => {
            let Some(recorder) = server.recorded(recording) else { return Ok(Reply::Done) };
            return Ok(Reply::Boot(pusher.write(image_id(&image)?, &entry, recorder).await?));
        }
        Question::Metrics => return Ok(Reply::Metrics(server.metrics())),
        // Answered by `serve`.
        Question::Hold | Question::Leave => {}
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

    /// Asks. A server that is being replaced is waited for, some five seconds.
    pub(crate) async fn ask(&self, question: &Question) -> Result<Reply, ImageError> {
        self.ask_within(question, &[10, 20, 50, 100, 200, 400, 800, 1600, 1600]).await
    }

    /// Asks a server that is there or not.
    pub(crate) async fn ask_now(&self, question: &Question) -> Result<Reply, ImageError> {
        self.ask_within(question, &[0]).await
    }

    async fn ask_within(&self, question: &Question, waits_ms: &[u64]) -> Result<Reply, ImageError> {
        let failed = |e| ImageError::host("ask the image server", e);
        let mut line =
            serde_json::to_vec(question).map_err(|e| failed(std::io::Error::other(e)))?;
        line.push(b'\n');
        let mut last = None;
        for wait_ms in waits_ms {
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
            tokio::time::sleep(std::time::Duration::from_millis(*wait_ms)).await;
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

/// Says to the worker that hostd is there, for as long as it lives, and again to each new worker.
#[derive(Debug)]
pub(crate) struct Held {
    socket: PathBuf,
    state: Arc<Mutex<HeldState>>,
}

#[derive(Debug, Default)]
struct HeldState {
    ended: bool,
    stream: Option<std::os::unix::net::UnixStream>,
}

impl Held {
    pub(crate) fn begin(socket: &Path) -> std::io::Result<Self> {
        let state = Arc::new(Mutex::new(HeldState::default()));
        let held = Self { socket: socket.to_owned(), state: state.clone() };
        let socket = socket.to_owned();
        let thread = std::thread::Builder::new().name("image-lease".to_owned());
        thread.stack_size(64 << 10).spawn(move || {
            while hold_once(&socket, &state).is_ok_and(|ended| !ended) {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        })?;
        Ok(held)
    }
}

/// Holds one connection until it ends; says whether that was meant.
fn hold_once(socket: &Path, state: &Mutex<HeldState>) -> std::io::Result<bool> {
    use std::io::{Read, Write};
    let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
    if lock().ended {
        return Ok(true);
    }
    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(socket) else { return Ok(false) };
    lock().stream = Some(stream.try_clone()?);
    let _ = stream.write_all(b"\"hold\"\n");
    // Returns when the worker ends, or when `drop` shuts the stream.
    let _ = stream.read(&mut [0]);
    Ok(lock().ended)
}

impl Drop for Held {
    fn drop(&mut self) {
        use std::io::{Read, Write};
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ended = true;
        if let Some(stream) = &state.stream {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        drop(state);
        if let Ok(mut stream) = std::os::unix::net::UnixStream::connect(&self.socket) {
            let _ = stream.set_read_timeout(Some(std::time::Duration::from_secs(2)));
            let _ = stream.write_all(b"\"leave\"\n");
            let _ = stream.read(&mut [0; 64]);
        }
    }
}
