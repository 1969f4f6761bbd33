//! hostd's handle on the worker: joins the one that is there, or starts one.

use std::{
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::sync::Mutex;
use wire::codec::Message as _;

use crate::{
    limits::ASK_MAX,
    message::{self, Answer, Ask, BoxId, Question, Reply, Socket, Usage, VERSION},
    settings::EgressSettings,
    worker::{ARGUMENT, LOCKED, READY, socket_path},
};

/// Longest wait for a worker that is ending.
const START_MAX: Duration = Duration::from_secs(5);

/// Why there is no worker, or no answer of it.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// It could not be started.
    #[error("the egress worker did not start: {0}")]
    Start(String),
    /// It is of another build and still carries boxes.
    #[error(
        "the egress worker speaks version {0} and this build {VERSION}: end its sandboxes first"
    )]
    Version(u32),
    /// It is gone: what was asked was not done, or was undone with it.
    #[error("the egress worker is gone: {0}")]
    Gone(io::Error),
    /// It could not do it.
    #[error("the egress worker: {0}")]
    Failed(String),
}

/// How a worker is set up.
#[derive(Clone, Debug)]
pub struct EgressConfig {
    /// Directory of its socket and lock, private to root. Its path is the worker's identity.
    pub dir: PathBuf,
    /// The user that it becomes: one of its own.
    pub uid: u32,
    /// The operator's settings.
    pub settings: EgressSettings,
}

/// A connection to the worker.
#[derive(Debug)]
pub struct Egress {
    /// With the number of the last question.
    socket: Mutex<(Socket, u64)>,
    settings: EgressSettings,
}

impl Egress {
    /// Joins the worker, or starts one; gives it the settings. Returns the boxes that it carries. On a runtime of
    /// tokio, which waits for some milliseconds.
    ///
    /// # Errors
    /// [`EgressError`]: there is none.
    pub async fn connect_or_start(
        config: &EgressConfig,
    ) -> Result<(Self, Vec<BoxId>), EgressError> {
        let begun = Instant::now();
        loop {
            if let Some(joined) = Self::join(config).await? {
                return Ok(joined);
            }
            let own = config.clone();
            let started = tokio::task::spawn_blocking(move || start(&own.dir, own.uid)).await;
            let started = started.unwrap_or_else(|error| Err(error.to_string()));
            match started {
                Ok(()) => {}
                // One that is just ending holds its lock a moment longer.
                Err(why) if why == LOCKED && begun.elapsed() < START_MAX => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(why) => return Err(EgressError::Start(why)),
            }
        }
    }

    async fn join(config: &EgressConfig) -> Result<Option<(Self, Vec<BoxId>)>, EgressError> {
        let Some(socket) = connect(&config.dir).map_err(EgressError::Gone)? else {
            return Ok(None);
        };
        let socket = Mutex::new((message::socket(socket).map_err(EgressError::Gone)?, 0));
        let egress = Self { socket, settings: config.settings.clone() };
        match egress.boxes().await {
            Ok(boxes) => Ok(Some((egress, boxes))),
            Err(EgressError::Gone(_)) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// The boxes that it carries.
    ///
    /// # Errors
    /// [`EgressError`].
    pub async fn boxes(&self) -> Result<Vec<BoxId>, EgressError> {
        let hello = Ask::Hello { version: VERSION, settings: self.settings.clone() };
        match self.ask(hello, &[]).await? {
            Answer::Welcome { version: VERSION, boxes } => Ok(boxes),
            Answer::Welcome { version, .. } => Err(EgressError::Version(version)),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the worker of a directory, if there is one: every link of it breaks.
    pub async fn end(dir: &Path) {
        let Ok(Some(socket)) = connect(dir) else { return };
        let Ok(socket) = message::socket(socket) else { return };
        let settings = EgressSettings::default();
        let _ = Self { socket: Mutex::new((socket, 0)), settings }.ask(Ask::Shutdown, &[]).await;
    }

    /// Has a box's packets carried under these rules, until the box has ended.
    ///
    /// # Errors
    /// [`EgressError`]: they are not.
    pub async fn open(
        &self,
        id: BoxId,
        rules: Vec<String>,
        device: OwnedFd,
        ended: OwnedFd,
    ) -> Result<(), EgressError> {
        match self.ask(Ask::Open { id, rules }, &[device, ended]).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// What a box has used; `None` if it is not carried.
    ///
    /// # Errors
    /// [`EgressError`].
    pub async fn usage(&self, id: BoxId) -> Result<Option<Usage>, EgressError> {
        match self.ask(Ask::Usage { id }, &[]).await? {
            Answer::Usage(usage) => Ok(Some(usage)),
            Answer::Unknown => Ok(None),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the worker.
    ///
    /// # Errors
    /// [`EgressError`]: it was gone before it said so.
    pub async fn shutdown(&self) -> Result<(), EgressError> {
        self.ask(Ask::Shutdown, &[]).await.map(drop)
    }

    async fn ask(&self, ask: Ask, fds: &[OwnedFd]) -> Result<Answer, EgressError> {
        let mut locked = self.socket.lock().await;
        let (socket, last) = &mut *locked;
        *last += 1;
        let number = *last;
        let asked = async {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            message::send(socket, &Question { number, ask }.encode(), &fds).await?;
            let mut buffer = Vec::new();
            loop {
                let (length, _) = message::receive(socket, &mut buffer).await?;
                let reply = Reply::decode(&buffer[..length]).ok_or(io::ErrorKind::BrokenPipe)?;
                // Others answer a question whose asker has gone away.
                if reply.number == number {
                    return Ok(reply.answer);
                }
            }
        };
        let answer: Result<io::Result<Answer>, _> = tokio::time::timeout(ASK_MAX, asked).await;
        answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(EgressError::Gone)
    }
}

fn unexpected(answer: Answer) -> EgressError {
    match answer {
        Answer::Failed { why } => EgressError::Failed(why),
        other => EgressError::Failed(format!("it answered out of turn: {other:?}")),
    }
}

/// Connects, or `None` where nobody listens.
fn connect(dir: &Path) -> io::Result<Option<OwnedFd>> {
    use rustix::net as n;
    let flags = SocketFlags::CLOEXEC;
    let socket = n::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match n::connect(&socket, &SocketAddrUnix::new(socket_path(dir))?) {
        Ok(()) => Ok(Some(socket)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Starts a worker and waits until it listens.
fn start(dir: &Path, uid: u32) -> Result<(), String> {
    let made = || -> io::Result<Vec<u8>> {
        std::fs::create_dir_all(dir)?;
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(dir, private)?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("volley")
            .arg(ARGUMENT)
            .arg(dir)
            .arg(uid.to_string())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = Vec::new();
        if let Some(mut stdout) = child.stdout.take() {
            let mut chunk = [0; 4096];
            // It keeps its end for as long as it lives: its first word is all that it says.
            while said != READY {
                match stdout.read(&mut chunk)? {
                    0 => break,
                    length => said.extend_from_slice(&chunk[..length]),
                }
            }
        }
        // Collected whenever it ends, so that it leaves no zombie.
        std::thread::Builder::new()
            .name("egress-wait".into())
            .stack_size(64 << 10)
            .spawn(move || drop(child.wait()))?;
        Ok(said)
    };
    match made() {
        Ok(said) if said == READY => Ok(()),
        Ok(said) if said.is_empty() => {
            Err("it ended at once; the binary must call hostd_egress::main_if_asked first thing"
                .into())
        }
        Ok(said) => Err(String::from_utf8_lossy(&said).into_owned()),
        Err(error) => Err(error.to_string()),
    }
}
