//! What callers ask of a running box: exec, signals, files, ports, figures.

use std::{io, os::fd::OwnedFd, rc::Rc};

use hostd_sandbox::{
    ClaimError, FileAnswer, FileKind, FileOp as BoxOp, FileStat, Program, TtySize,
};
use wire::{
    Code, Fault, SandboxId,
    call::{Answer, ExecRequest, FileOp, FileRecord, Stats},
    launch::LaunchRequest,
    limits::FRAME_BYTES_MAX,
};

use super::{
    Real, box_id,
    start::{claim_fault, enter},
};
use crate::{
    host::{Backend, HostCell},
    note::Note,
    process::{EXECS_MAX, Pipe, Process},
};

impl Real {
    /// Freezes or thaws a sandbox.
    ///
    /// # Errors
    /// Why it stays as it is.
    pub(crate) async fn freeze(&self, id: SandboxId, frozen: bool) -> Result<(), Fault> {
        let spawner = self.spawner()?;
        let id = box_id(id);
        let done = if frozen { spawner.pause(id).await } else { spawner.resume(id).await };
        done.map_err(|error| claim_fault(&error))
    }
}

/// Starts another process in a sandbox.
///
/// # Errors
/// By what is wrong; nothing was started.
pub(crate) async fn exec(
    cell: &Rc<HostCell>,
    note: &Rc<Note>,
    request: ExecRequest,
) -> Result<Rc<Process>, Fault> {
    let real = cell.real()?;
    if request.command.is_empty() {
        return Err(Fault::new(Code::BadRequest, "exec names no command; nothing was started"));
    }
    if note.processes.borrow().live() >= EXECS_MAX {
        let text =
            format!("{EXECS_MAX} processes of this sandbox run already; nothing was started");
        return Err(Fault::new(Code::Overloaded, text));
    }
    let program = program_of(note, request);
    let spawner = real.spawner()?;
    let executed =
        spawner.exec(box_id(note.id), program).await.map_err(|error| claim_fault(&error))?;
    let number = note.processes.borrow_mut().next();
    let log_bytes = cell.defaults.log_bytes;
    enter(cell, note, number, executed.exec, executed.stdio, log_bytes).ok_or_else(|| {
        Fault::new(Code::Internal, "the process runs, but its output cannot be read")
    })
}

/// The sandbox's own environment, directory and user where the request says none.
fn program_of(note: &Note, request: ExecRequest) -> Program {
    let image = note.image.borrow();
    let config = image.as_ref().map(|image| image.config());
    let launch = LaunchRequest::from_bytes(&note.request).ok();
    let own = |text: String, launch: Option<&String>, image: Option<&String>| {
        [Some(&text), launch, image].into_iter().flatten().find(|t| !t.is_empty()).cloned()
    };
    let mut env: Vec<(String, String)> = Vec::new();
    let image_env = config.map(|config| config.env.clone()).unwrap_or_default();
    env.extend(image_env.iter().filter_map(|entry| {
        entry.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
    }));
    let launch_env = launch.as_ref().map(|launch| launch.env.clone()).unwrap_or_default();
    for (name, value) in launch_env.into_iter().chain(request.env) {
        env.retain(|(other, _)| *other != name);
        env.push((name, value));
    }
    let cwd = own(request.cwd, launch.as_ref().map(|l| &l.cwd), config.map(|c| &c.cwd));
    let user = own(request.user, launch.as_ref().map(|l| &l.user), config.map(|c| &c.user));
    Program {
        argv: request.command,
        env: env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        cwd: cwd.unwrap_or_default(),
        user: user.unwrap_or_default(),
        tty: request.tty.map(|(rows, cols)| TtySize { rows, cols }),
        stdin: request.stdin,
    }
}

/// Sends a signal: to the main process, or to one that exec started.
///
/// # Errors
/// Why it was not sent.
pub(crate) async fn signal(
    cell: &HostCell,
    note: &Note,
    exec: u64,
    signal: u8,
) -> Result<(), Fault> {
    let Backend::Real(real) = &cell.backend else { return cell.real().map(|_| ()) };
    if signal == 0 || signal > 64 {
        return Err(Fault::new(Code::BadRequest, "signals are from 1 to 64; nothing was sent"));
    }
    let sent = real.spawner()?.signal(box_id(note.id), exec, i32::from(signal)).await;
    sent.map_err(|error| claim_fault(&error))
}

/// Closes a process's input.
pub(crate) async fn end_input(cell: &HostCell, note: &Note, process: &Process) {
    if let Some(pty) = &process.pty {
        // A terminal has no other end of file than its control character.
        let _ = pty.write_all(&[4]).await;
        return;
    }
    if process.close_input()
        && process.exec == 0
        && let Ok(real) = cell.real()
        && let Ok(spawner) = real.spawner()
    {
        let _ = spawner.close_stdin(box_id(note.id)).await;
    }
}

/// Tells a process's terminal its size.
pub(crate) fn resize(process: &Process, rows: u16, cols: u16) {
    let Some(pty) = &process.pty else { return };
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = rustix::termios::tcsetwinsize(pty.fd(), size);
}

/// What a sandbox uses.
///
/// # Errors
/// Why that cannot be said.
pub(crate) async fn stats(cell: &HostCell, note: &Note) -> Result<Stats, Fault> {
    let Backend::Real(real) = &cell.backend else { return Ok(Stats::default()) };
    let stats =
        real.spawner()?.stats(box_id(note.id)).await.map_err(|error| claim_fault(&error))?;
    let request = LaunchRequest::access(&note.request).ok();
    let shape = request.and_then(|request| wire::ShapeId::new(request.shape)).unwrap_or_default();
    let (egress_in, egress_out) = real.egress_usage(note.id).await;
    let (doors_in, doors_out) = note.doors.borrow().passed();
    let lost = note.processes.borrow().get(0).map_or(0, |main| main.ring.borrow().lost());
    Ok(Stats {
        cpu_ns: stats.cpu_ns,
        memory_bytes: stats.memory_bytes,
        memory_peak_bytes: stats.memory_peak_bytes,
        memory_limit_bytes: cell.defaults.shapes.get(shape).need.memory_bytes,
        pids: stats.pids,
        disk_bytes: stats.disk_bytes,
        net_in_bytes: egress_in + doors_in,
        net_out_bytes: egress_out + doors_out,
        log_lost_bytes: lost,
    })
}

/// A fault by an error number.
pub(crate) fn os_fault(what: &str, error: &io::Error) -> Fault {
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => Code::NotFound,
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => Code::Forbidden,
        _ => Code::Internal,
    };
    Fault::new(code, format!("could not {what}: {error}"))
}

fn file_fault(path: &str, error: &ClaimError) -> Fault {
    match error {
        ClaimError::Failed(fault) if let Some(errno) = fault.errno() => {
            let error = io::Error::from_raw_os_error(errno);
            let code = match errno {
                libc::EEXIST | libc::EISDIR | libc::ENOTDIR | libc::ENOTEMPTY | libc::EINVAL => {
                    Code::BadRequest
                }
                libc::ENOSPC | libc::EDQUOT => Code::Overloaded,
                _ => os_fault("do it", &error).code,
            };
            Fault::new(code, format!("{path}: {error}"))
        }
        other => claim_fault(other),
    }
}

/// What an operation is about.
fn path_of(op: &BoxOp) -> &str {
    match op {
        BoxOp::Read { path }
        | BoxOp::Write { path, .. }
        | BoxOp::Stat { path }
        | BoxOp::List { path }
        | BoxOp::MakeDirectory { path, .. }
        | BoxOp::Remove { path, .. }
        | BoxOp::Watch { path }
        | BoxOp::Rename { from: path, .. } => path,
    }
}

async fn ask_file(cell: &HostCell, note: &Note, op: BoxOp) -> Result<FileAnswer, Fault> {
    let spawner = cell.real()?.spawner()?;
    let path = path_of(&op).to_owned();
    spawner.file(box_id(note.id), op).await.map_err(|error| file_fault(&path, &error))
}

async fn open(cell: &HostCell, note: &Note, op: BoxOp) -> Result<OwnedFd, Fault> {
    match ask_file(cell, note, op).await? {
        FileAnswer::Open(fd) => Ok(fd),
        _ => Err(Fault::new(Code::Internal, "the box did not give the file it opened")),
    }
}

/// Opens a file of a sandbox.
///
/// # Errors
/// Why it is not open.
pub(crate) async fn open_read(
    cell: &HostCell,
    note: &Note,
    path: String,
) -> Result<OwnedFd, Fault> {
    open(cell, note, BoxOp::Read { path }).await
}

/// Makes or empties a file of a sandbox.
///
/// # Errors
/// Why it is not open.
pub(crate) async fn open_write(
    cell: &HostCell,
    note: &Note,
    path: String,
    mode: u32,
) -> Result<OwnedFd, Fault> {
    let mode = if mode == 0 { 0o644 } else { mode & 0o7777 };
    open(cell, note, BoxOp::Write { path, mode, append: false }).await
}

/// Watches a file or directory: records of a kind, a name and a zero byte come out of the pipe.
///
/// # Errors
/// Why it is not watched.
pub(crate) async fn watch(cell: &HostCell, note: &Note, path: String) -> Result<Pipe, Fault> {
    let told = open(cell, note, BoxOp::Watch { path }).await?;
    Pipe::new(told).map_err(|error| os_fault("hear of changes", &error))
}

/// What is done with files in one question and one answer.
///
/// # Errors
/// Why it was not done.
pub(crate) async fn file(cell: &HostCell, note: &Note, op: FileOp) -> Result<Answer, Fault> {
    let op = match op {
        FileOp::List(path) => BoxOp::List { path },
        FileOp::Stat(path) => BoxOp::Stat { path },
        FileOp::MakeDir(path) => BoxOp::MakeDirectory { path, mode: 0o755 },
        FileOp::Remove(path) => BoxOp::Remove { path, recursive: true },
        FileOp::Rename { from, to } => BoxOp::Rename { from, to },
        FileOp::Read(_) | FileOp::Write { .. } | FileOp::Watch(_) => {
            return Err(Fault::new(Code::Internal, "a call that streams came to the wrong place"));
        }
    };
    match ask_file(cell, note, op).await? {
        FileAnswer::Done => Ok(Answer::Done),
        FileAnswer::Stat(stat) => Ok(Answer::Files(vec![file_record(stat)])),
        FileAnswer::List(stats) => {
            let bytes = |stat: &FileStat| {
                size_of::<FileRecord>()
                    + stat.name.len()
                    + stat.target.as_ref().map_or(0, String::len)
            };
            if stats.iter().map(bytes).sum::<usize>() > FRAME_BYTES_MAX / 4 * 3 {
                let text = format!("{} entries do not fit one answer", stats.len());
                return Err(Fault::new(Code::Overloaded, text));
            }
            Ok(Answer::Files(stats.into_iter().map(file_record).collect()))
        }
        FileAnswer::Open(_) => {
            Err(Fault::new(Code::Internal, "the box opened a file that nobody asked for"))
        }
    }
}

fn file_record(stat: FileStat) -> FileRecord {
    let kind = match stat.kind {
        FileKind::File => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::Other => 0,
    };
    FileRecord {
        name: stat.name,
        mode: kind | (stat.mode & 0o7777),
        uid: stat.uid,
        gid: stat.gid,
        size: stat.size,
        mtime_ns: stat.mtime_ns,
        target: stat.target.unwrap_or_default(),
    }
}

/// Connects to a port inside.
///
/// # Errors
/// Why there is no connection.
pub(crate) async fn connect(cell: &HostCell, note: &Note, port: u16) -> Result<Pipe, Fault> {
    let socket = connect_fd(cell, note, port).await?;
    Pipe::new(socket).map_err(|error| os_fault("use the connection", &error))
}

/// The same, as the bare socket.
///
/// # Errors
/// Why there is no connection.
pub(crate) async fn connect_fd(cell: &HostCell, note: &Note, port: u16) -> Result<OwnedFd, Fault> {
    let spawner = cell.real()?.spawner()?;
    spawner.connect(box_id(note.id), port).await.map_err(|error| match &error {
        ClaimError::Failed(fault) if fault.errno() == Some(libc::ECONNREFUSED) => {
            Fault::new(Code::Unreachable, format!("nothing listens on port {port} of the sandbox"))
        }
        other => claim_fault(other),
    })
}
