//! `exec` and `attach`: a process of a sandbox on the caller's standard streams.
//!
//! The same few lines serve `run`: output goes out as it comes, input goes in where it was asked for, Ctrl-C and
//! SIGTERM become signals of the process, a resized terminal tells it so, and the process's exit is ours.
//! Left out: what becomes of a process whose caller goes away. It goes on; `attach` finds it again.

use std::{
    io::{stderr, stdout},
    process::ExitCode,
};

use clap::Args;
use futures::{Stream, StreamExt as _};
use tokio::signal::unix::{Signal, SignalKind, signal};
use volley_client::{CallError, Event, ExecSpec, Exit, ExitWhy, Process, SandboxId, Stdin};
use wire::{Code, call::MAIN_PROCESS};

use crate::{
    client::{ClientFlags, Session},
    failure::Failure,
    terminal::{self, Raw},
};

/// Flags of `volley exec`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley exec sb-... -- ps aux
  volley exec -it sb-... -- sh
  echo hello | volley exec -i sb-... -- cat")]
pub(crate) struct ExecFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// Keep standard input open and pass it on.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Environment variable, added to the sandbox's. May be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// Working directory.
    #[arg(short = 'w', long, value_name = "DIR", default_value = "", hide_default_value = true)]
    cwd: String,
    /// User: a name, uid or uid:gid.
    #[arg(short, long, value_name = "USER", default_value = "", hide_default_value = true)]
    user: String,
    /// The sandbox.
    sandbox: SandboxId,
    /// Command and arguments.
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Flags of `volley attach`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley attach --stdin sb-...")]
pub(crate) struct AttachFlags {
    #[command(flatten)]
    client: ClientFlags,
    /// Pass standard input on (the sandbox was launched with -i or -t).
    #[arg(short = 'i', long = "stdin")]
    stdin: bool,
    /// Put this terminal into raw mode (the process has a terminal).
    #[arg(short, long)]
    tty: bool,
    /// The process: 0 is the one that the sandbox was launched with.
    #[arg(long, value_name = "NUMBER", default_value_t = MAIN_PROCESS)]
    process: u32,
    /// Bytes of output already seen.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
    /// The sandbox.
    sandbox: SandboxId,
}

/// What of the caller's terminal a process gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    /// Its standard input.
    pub(crate) stdin: bool,
    /// All of it.
    pub(crate) tty: bool,
}

/// Reads `NAME=VALUE`.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// `volley exec`.
pub(crate) fn exec(flags: ExecFlags) -> Result<ExitCode, Failure> {
    let streams = Streams { stdin: flags.interactive || flags.tty, tty: flags.tty };
    let mut spec =
        ExecSpec::new(flags.command).cwd(flags.cwd).user(flags.user).stdin(streams.stdin);
    for (name, value) in flags.env {
        spec = spec.env(name, value);
    }
    if flags.tty {
        let (rows, columns) = terminal::size();
        spec = spec.tty(rows, columns);
    }
    let session = Session::open(&flags.client)?;
    session.block(async {
        let process = session.client().sandbox(flags.sandbox).exec(spec).await?;
        Ok(exit_code(&pump(process, streams, &mut 0).await?))
    })
}

/// `volley attach`.
pub(crate) fn attach(flags: &AttachFlags) -> Result<ExitCode, Failure> {
    let streams = Streams { stdin: flags.stdin || flags.tty, tty: flags.tty };
    let session = Session::open(&flags.client)?;
    session.block(async {
        let sandbox = session.client().sandbox(flags.sandbox);
        let process = sandbox.attach_to(flags.process, flags.offset).await?;
        Ok(exit_code(&pump(process, streams, &mut 0).await?))
    })
}

/// Exit status of a process as our own.
pub(crate) fn exit_code(exit: &Exit) -> ExitCode {
    let why = match exit.why {
        ExitWhy::Returned | ExitWhy::Signalled => None,
        ExitWhy::OutOfMemory => Some("it ran out of memory"),
        ExitWhy::Deadline => Some("its time was over"),
        ExitWhy::Idle => Some("it was idle too long"),
        ExitWhy::Killed => Some("it was killed"),
        ExitWhy::Lost => Some("its host lost it"),
    };
    if let Some(why) = why {
        eprintln!("volley: the command ended with {}: {why}", exit.code);
    }
    ExitCode::from(u8::try_from(exit.code & 0xff).unwrap_or(u8::MAX))
}

/// Passes bytes both ways until the process ends. `seen` counts output, so that a caller can attach again.
pub(crate) async fn pump(
    process: Process,
    streams: Streams,
    seen: &mut u64,
) -> Result<Exit, Failure> {
    // Before anything is shown: whoever sees output may send a signal at once.
    let signals = Signals::caught()?;
    let _raw = if streams.tty { Raw::enter()? } else { None };
    let (mut stdin, events) = process.split();
    let upstream = async {
        // The process's end is told by its events; a closed way up is no news.
        let _ = upstream(&mut stdin, streams, signals).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        exit = show_events(events, seen) => exit?.ok_or_else(lost),
        () = upstream => unreachable!("it never ends first"),
    }
}

fn lost() -> Failure {
    Failure::new(Code::Unreachable, "the connection ended before the process did, which may go on")
        .hint("look with `volley ls`, then `volley attach`")
}

/// Shows events until the process's exit, which is returned, or the end.
pub(crate) async fn show_events(
    events: impl Stream<Item = Result<Event, CallError>>,
    seen: &mut u64,
) -> Result<Option<Exit>, Failure> {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event? {
            Event::Stdout(bytes) => {
                *seen += bytes.len() as u64;
                show(&mut stdout().lock(), &bytes)?;
            }
            Event::Stderr(bytes) => {
                *seen += bytes.len() as u64;
                show(&mut stderr().lock(), &bytes)?;
            }
            Event::Lost(bytes) => {
                *seen += bytes;
                eprintln!("volley: {bytes} bytes of output were dropped here");
            }
            Event::Exit(exit) => return Ok(Some(exit)),
        }
    }
    Ok(None)
}

fn show(out: &mut impl std::io::Write, bytes: &[u8]) -> Result<(), Failure> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // As any program in a pipe whose reader went away.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(141),
        Err(error) => Err(Failure::io("output", &error)),
        Ok(()) => Ok(()),
    }
}

/// Signals that are passed on.
struct Signals {
    int: Signal,
    term: Signal,
    resized: Signal,
}

impl Signals {
    /// From here on they no longer end this program.
    fn caught() -> Result<Self, Failure> {
        let listen =
            |kind| signal(kind).map_err(|error| Failure::io("cannot catch signals", &error));
        Ok(Self {
            int: listen(SignalKind::interrupt())?,
            term: listen(SignalKind::terminate())?,
            resized: listen(SignalKind::window_change())?,
        })
    }
}

async fn upstream(stdin: &mut Stdin, streams: Streams, signals: Signals) -> Result<(), Failure> {
    let Signals { mut int, mut term, mut resized } = signals;
    if streams.tty {
        // A launch says that it wants a terminal and not how large, and the one that is attached to may be another's.
        let (rows, columns) = terminal::size();
        stdin.resize(rows, columns).await?;
    }
    let mut input = streams.stdin.then(terminal::input);
    loop {
        let next = async {
            match &mut input {
                Some(input) => input.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            piece = next => match piece {
                Some(piece) => stdin.write_all(&piece).await?,
                None => {
                    input = None;
                    stdin.close().await?;
                }
            },
            _ = int.recv() => stdin.signal(2).await?,
            _ = term.recv() => stdin.signal(15).await?,
            _ = resized.recv(), if streams.tty => {
                let (rows, columns) = terminal::size();
                stdin.resize(rows, columns).await?;
            }
        }
    }
}
