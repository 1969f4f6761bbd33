//! The worker: a process of its own that carries the packets of all boxes of a host that may reach out.
//!
//! It is a re-exec of the running binary with an empty environment, so that hostd's restarts and upgrades break no
//! connection; it parses what hostile programs write, so that it has no rights: a user of its own, no capability, and no
//! file but its descriptors. If it dies, hostd starts another and gives it the devices again: connections break, boxes
//! live on. It ends when there is neither a hostd nor a box for a while. Left out: replacing it by a newer one under
//! its boxes; it ends with the last of them.

use std::{
    collections::HashMap,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    process::{Resource, Rlimit},
};
use tokio::{io::Interest, sync::watch};
use wire::codec::Message as _;

use crate::{
    limits::{LINGER, THREADS_MAX},
    link::{self, Parts},
    message::{self, Answer, Ask, BoxId, Question, Reply, Socket, Usage, VERSION},
    settings::Settings,
    sync::Counters,
};

/// The hidden first argument; behind it: state directory, user id.
pub(crate) const ARGUMENT: &str = "__egress";
/// What it says once it listens; anything else is why it does not.
pub(crate) const READY: &[u8] = b"ready";
/// What it says where another holds the directory.
pub(crate) const LOCKED: &str = "another egress worker holds the state directory";

pub(crate) fn socket_path(dir: &Path) -> PathBuf {
    dir.join("egress.sock")
}

/// Becomes the worker if this process was started as one, and then never returns. Call it first thing in `main`, before
/// any thread.
pub fn main_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|argument| argument != ARGUMENT) {
        return;
    }
    let dir = PathBuf::from(arguments.next().unwrap_or_default());
    let uid = arguments.next().and_then(|uid| uid.to_str()?.parse().ok());
    let code = match uid.ok_or_else(|| "no user id".to_owned()).and_then(|uid| prepare(&dir, uid)) {
        Ok(listener) => match serve(listener) {
            Ok(()) => 0,
            Err(_) => 1,
        },
        Err(why) => {
            let _ = io::stdout().write_all(why.as_bytes());
            2
        }
    };
    std::process::exit(code);
}

/// Takes what needs rights, then gives them up.
fn prepare(dir: &Path, uid: u32) -> Result<OwnedFd, String> {
    let say = |what: &'static str| move |e: rustix::io::Errno| format!("{what}: {e}");
    let _ = rustix::process::setsid();
    rustix::process::chdir("/").map_err(say("working directory"))?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let lock = rustix::fs::open(dir.join("egress.lock"), flags, Mode::from_raw_mode(0o600))
        .map_err(say("lock of the state directory"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
        rustix::io::Errno::WOULDBLOCK => LOCKED.to_owned(),
        other => format!("lock of the state directory: {other}"),
    })?;
    // Held until the process ends.
    std::mem::forget(lock);
    let listener = listen(&socket_path(dir)).map_err(say("socket"))?;
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard });
    give_up(uid).map_err(say("giving up rights"))?;
    Ok(listener)
}

/// Becomes an unprivileged user for good. This process has one thread yet, and those to come are made like it.
fn give_up(uid: u32) -> rustix::io::Result<()> {
    use rustix::{process as p, thread as t};
    t::set_no_new_privs(true)?;
    t::set_thread_groups(&[])?;
    let (user, group) = (t::Uid::from_raw(uid), t::Gid::from_raw(uid));
    t::set_thread_res_gid(group, group, group)?;
    t::set_thread_res_uid(user, user, user)?;
    p::set_dumpable_behavior(p::DumpableBehavior::NotDumpable)
}

fn listen(path: &Path) -> rustix::io::Result<OwnedFd> {
    use rustix::net as n;
    let _ = rustix::fs::unlink(path);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = n::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    n::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, Mode::from_raw_mode(0o600))?;
    n::listen(&socket, 16)?;
    Ok(socket)
}

fn serve(listener: OwnedFd) -> io::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(THREADS_MAX))
        .max_blocking_threads(8)
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        let mut stdout = io::stdout();
        stdout.write_all(READY)?;
        stdout.flush()?;
        Doorkeeper::default().serve(listener).await
    });
    runtime.shutdown_background();
    served
}

/// Links by box.
type Links = Arc<Mutex<HashMap<BoxId, Arc<Counters>>>>;

#[derive(Default)]
struct Doorkeeper {
    links: Links,
    settings: Option<watch::Sender<Arc<Settings>>>,
    /// Of boxes that have ended, so that their last figures can be had for a moment.
    over: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Doorkeeper {
    /// Serves one hostd after the other: the newest is the hostd.
    async fn serve(mut self, listener: OwnedFd) -> io::Result<()> {
        let listener = message::socket(listener)?;
        let mut alone = Instant::now();
        let mut connection: Option<Socket> = None;
        let mut buffer = Vec::new();
        while !self.over {
            let current = async {
                match &connection {
                    Some(socket) => message::receive(socket, &mut buffer).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                accepted = accept(&listener) => connection = Some(accepted?),
                received = current => {
                    let answered = match received {
                        Ok((length @ 1.., fds)) => {
                            match (Question::decode(&buffer[..length]), &connection) {
                                (Some(Question { number, ask }), Some(socket)) => {
                                    let reply = Reply { number, answer: self.answer(ask, fds) };
                                    message::send(socket, &reply.encode(), &[]).await
                                }
                                _ => Err(io::ErrorKind::InvalidData.into()),
                            }
                        }
                        _ => Err(io::ErrorKind::BrokenPipe.into()),
                    };
                    if answered.is_err() {
                        connection = None;
                        alone = Instant::now();
                    }
                }
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    if connection.is_some() || !lock(&self.links).is_empty() {
                        alone = Instant::now();
                    } else if alone.elapsed() > LINGER {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, ask: Ask, fds: Vec<OwnedFd>) -> Answer {
        match ask {
            Ask::Hello { version, .. } if version != VERSION => {
                Answer::Welcome { version: VERSION, boxes: Vec::new() }
            }
            Ask::Hello { settings, .. } => match settings.checked() {
                Ok(checked) => {
                    let checked = Arc::new(checked);
                    match &self.settings {
                        Some(sender) => drop(sender.send_replace(checked)),
                        None => self.settings = Some(watch::channel(checked).0),
                    }
                    let boxes = lock(&self.links).keys().copied().collect();
                    Answer::Welcome { version: VERSION, boxes }
                }
                Err(error) => Answer::Failed { why: error.to_string() },
            },
            Ask::Open { id, rules } => self.open(id, rules, fds),
            Ask::Usage { id } => lock(&self.links).get(&id).map_or(Answer::Unknown, |counters| {
                let (received, sent, refused) = counters.read();
                Answer::Usage(Usage { received, sent, refused })
            }),
            Ask::Shutdown => {
                self.over = true;
                Answer::Done
            }
        }
    }

    fn open(&mut self, id: BoxId, rules: Vec<String>, fds: Vec<OwnedFd>) -> Answer {
        let failed = |why: &str| Answer::Failed { why: why.into() };
        let Some(settings) = &self.settings else { return failed("no settings yet") };
        let Ok([device, ended]) = <[OwnedFd; 2]>::try_from(fds) else {
            return failed("no room for the descriptors of a box");
        };
        let rules = match wire::network::Network::Egress(rules).rules() {
            Ok(rules) => rules,
            Err(error) => return failed(&error.to_string()),
        };
        let counters = Arc::new(Counters::default());
        {
            let mut links = lock(&self.links);
            if links.contains_key(&id) {
                return Answer::Done;
            }
            links.insert(id, Arc::clone(&counters));
        }
        let links = Arc::clone(&self.links);
        let parts = Parts { device, ended, rules, settings: settings.subscribe(), counters };
        tokio::spawn(async move {
            // A device that cannot be waited for is closed: the box has no network, and hostd finds it missing.
            let _ = link::run(parts).await;
            lock(&links).remove(&id);
        });
        Answer::Done
    }
}

async fn accept(listener: &Socket) -> io::Result<Socket> {
    let accept = |fd: &OwnedFd| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(rustix::net::accept_with(fd.as_fd(), flags)?)
    };
    message::socket(listener.async_io(Interest::READABLE, accept).await?)
}
