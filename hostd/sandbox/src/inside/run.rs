//! Starting one program: the main one, or one of an `exec`.
//!
//! The child says through a close-on-exec pipe why it could not become the program; silence and end
//! of file mean that it did. The program gets descriptors 0-2 and no other.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::thread::CpuSet;

use super::users::{self, User};
use crate::error::Fault;
use crate::fork;
use crate::spec::{Limits, Program, TtySize};
use crate::sys;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// `RLIMIT_CORE` of 1: the kernel's own mark for "start no core helper", which 0 is not.
const NO_CORE: u64 = 1;

/// A program that has been executed.
pub(super) struct Started {
    pub(super) pid: i32,
    /// The terminal's master, where one was asked for.
    pub(super) master: Option<OwnedFd>,
}

/// What starting a program takes whichever it is, so that it can be made before.
pub(super) struct Means {
    null: OwnedFd,
    status: (OwnedFd, OwnedFd),
    stack: fork::Stack,
}

impl Means {
    /// Opens `/dev/null` and the status pipe.
    pub(super) fn make(stack: fork::Stack) -> Result<Self, Fault> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty())
            .map_err(|e| Fault::os("/dev/null", &e.into()))?;
        let status = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|e| Fault::os("status pipe", &e.into()))?;
        Ok(Self { null, status, stack })
    }
}

/// Goes through what is computed for any program, so that its code and memory are there when one comes.
pub(super) fn rehearse() {
    drop(std::hint::black_box(prepare(&Program::new(["/bin/true"]), &Limits::default())));
}

/// Where a child failed; a byte on the status pipe.
#[derive(Clone, Copy)]
enum Stage {
    Stdio = 1,
    Cwd = 2,
    Ids = 3,
    Exec = 4,
}

struct Launch<'a> {
    program: &'a Program,
    user: User,
    argv: sys::Strings,
    env: sys::Strings,
    cwd: CString,
    candidates: Vec<CString>,
    open_files: u64,
    /// Cores that init is let go to before the program begins.
    init: Option<&'a CpuSet>,
}

/// Starts `program` with the given stdio descriptors (stdin where asked for, stdout, stderr). `cores`: where both this
/// process and the program may run from then on, if this one is kept on one core. Gives the stack back.
pub(super) fn start(
    program: &Program,
    stdio: Vec<OwnedFd>,
    limits: &Limits,
    cores: Option<&CpuSet>,
    means: Means,
) -> (Result<Started, Fault>, fork::Stack) {
    let Means { null, status, mut stack } = means;
    let started = (|| {
        let launch = Launch { init: cores, ..prepare(program, limits)? };
        let (stdio, master) = match program.tty {
            Some(size) => {
                let (master, slave) =
                    terminal(size, &launch.user).map_err(|e| Fault::os("terminal", &e))?;
                let copy = || slave.try_clone().map_err(|e| Fault::os("terminal", &e));
                (vec![copy()?, copy()?, slave], Some(master))
            }
            None => (pipes(program, stdio, null, &launch.user)?, None),
        };
        let pid = spawn(&launch, stdio, status, &mut stack)?;
        Ok(Started { pid, master })
    })();
    (started, stack)
}

/// Forks and waits until the child is the program.
fn spawn(
    launch: &Launch<'_>,
    stdio: Vec<OwnedFd>,
    (status_in, status_out): (OwnedFd, OwnedFd),
    stack: &mut fork::Stack,
) -> Result<i32, Fault> {
    // SAFETY: a box's init has one thread. The child moves and closes descriptors by number only and
    // forgets every owner that it makes; the strings that it allocates it frees or leaks.
    let forked = unsafe { fork::vfork(stack, || become_program(launch, &stdio, &status_out)) };
    let pid = forked.map_err(|e| Fault::os("fork", &e))?;
    if let Some(cores) = launch.init {
        let _ = sys::keep_on(Some(pid), cores);
    }
    drop(status_out);
    drop(stdio);
    let mut said = Vec::with_capacity(8);
    let read = std::fs::File::from(status_in).take(8).read_to_end(&mut said);
    if read.is_ok() && said.is_empty() {
        // The program has begun with the short slices of the launch.
        let _ = sys::schedule_normally(pid);
        return Ok(pid);
    }
    // SAFETY: a null status pointer is allowed. The child has said its last word and is exiting.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    Err(why(&said, launch.program))
}

fn why(said: &[u8], program: &Program) -> Fault {
    let [stage, a, b, c, d] = *said else {
        return Fault::BoxDied { what: "starting the program".into() };
    };
    let errno = i32::from_ne_bytes([a, b, c, d]);
    let name = program.argv.first().cloned().unwrap_or_default();
    match (stage, errno) {
        (4, libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => Fault::NotFound { program: name },
        (4, libc::EACCES | libc::EPERM | libc::EISDIR) => Fault::NotExecutable { program: name },
        (4, libc::ENOEXEC | libc::ELIBBAD | libc::EINVAL) => Fault::BadFormat { program: name },
        (4, _) => Fault::Os { what: format!("execute {name}"), errno },
        (2, _) => Fault::Os { what: format!("working directory {}", program.cwd), errno },
        (3, _) => Fault::Os { what: "user and group".into(), errno },
        _ => Fault::Os { what: "stdio".into(), errno },
    }
}

fn prepare<'a>(program: &'a Program, limits: &Limits) -> Result<Launch<'a>, Fault> {
    let user = users::resolve(&program.user)?;
    let c = |s: &str| sys::c_string(s).map_err(|e| Fault::os("a zero byte in an argument", &e));
    let strings = |list: &[String]| {
        sys::Strings::new(list).map_err(|e| Fault::os("a zero byte in an argument", &e))
    };
    let argv = strings(&program.argv)?;
    let Some(name) = program.argv.first().filter(|n| !n.is_empty()) else {
        return Err(Fault::NotFound { program: String::new() });
    };
    let has = |name: &str| program.env.iter().any(|e| e.split('=').next() == Some(name));
    let mut env = program.env.clone();
    if !has("PATH") {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !has("HOME") {
        env.push(format!("HOME={}", user.home));
    }
    if program.tty.is_some() && !has("TERM") {
        env.push("TERM=xterm".into());
    }
    let path = env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let candidates = if name.contains('/') {
        vec![c(name)?]
    } else {
        let in_dir = |d: &str| c(&format!("{}/{name}", if d.is_empty() { "." } else { d }));
        path.split(':').map(in_dir).collect::<Result<Vec<_>, _>>()?
    };
    let env = strings(&env)?;
    let cwd = c(if program.cwd.is_empty() { "/" } else { &program.cwd })?;
    make_directory(&program.cwd)
        .map_err(|e| Fault::os(&format!("working directory {}", program.cwd), &e))?;
    Ok(Launch {
        program,
        user,
        argv,
        env,
        cwd,
        candidates,
        open_files: limits.open_files,
        init: None,
    })
}

/// Gives the pipes to the program's user, so that it may open `/dev/stdout`.
fn pipes(
    program: &Program,
    stdio: Vec<OwnedFd>,
    null: OwnedFd,
    user: &User,
) -> Result<Vec<OwnedFd>, Fault> {
    let mut stdio = stdio;
    if !program.stdin {
        stdio.insert(0, null);
    }
    if stdio.len() != 3 {
        return Err(Fault::BoxDied { what: "counting its stdio".into() });
    }
    if user.uid != 0 {
        for fd in &stdio {
            // `/dev/null` is not this box's to give; it needs no giving.
            let _ = rustix::fs::fchown(
                fd,
                Some(Uid::from_raw(user.uid)),
                Some(Gid::from_raw(user.gid)),
            );
        }
    }
    Ok(stdio)
}

fn terminal(size: TtySize, user: &User) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC,
    )?;
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&slave, size)?;
    rustix::fs::fchown(&slave, Some(Uid::from_raw(user.uid)), None)?;
    Ok((master, slave))
}

fn become_program(launch: &Launch<'_>, stdio: &[OwnedFd], status: &OwnedFd) -> ! {
    // Descriptor 3 is the status pipe's place; the stdio ones lie above 2 and are copied first.
    let (stage, error) = match arrange(launch, stdio, status.as_fd()) {
        Err(failed) => failed,
        Ok(()) => (Stage::Exec, execute(launch)),
    };
    let mut word = [stage as u8; 5];
    word[1..].copy_from_slice(&error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes());
    // SAFETY: `arrange` put the pipe at 3; before it did, the original is still open under its own
    // number, so try that too. The value is never dropped: this process exits below.
    let at_three = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(3) });
    if rustix::io::write(&*at_three, &word).is_err() {
        let _ = rustix::io::write(status, &word);
    }
    sys::exit_now(127)
}

fn arrange(
    launch: &Launch<'_>,
    stdio: &[OwnedFd],
    status: BorrowedFd<'_>,
) -> Result<(), (Stage, io::Error)> {
    // Shares the parent's memory: allocates nothing, so that a child killed half-way leaves the heap whole.
    let at = |stage: Stage| move |error: io::Error| (stage, error);
    let stdio: &[OwnedFd; 3] =
        stdio.try_into().map_err(|_| (Stage::Stdio, io::ErrorKind::NotFound.into()))?;
    // Copied out of the way first, where one lies where another goes; `close_from` below closes these, no drop does.
    let lift = |fd: BorrowedFd<'_>| -> Result<i32, (Stage, io::Error)> {
        if fd.as_raw_fd() > 3 {
            return Ok(fd.as_raw_fd());
        }
        sys::dup_above(fd, 4).map(IntoRawFd::into_raw_fd).map_err(at(Stage::Stdio))
    };
    let lifted =
        [lift(stdio[0].as_fd())?, lift(stdio[1].as_fd())?, lift(stdio[2].as_fd())?, lift(status)?];
    // SAFETY: open until `close_from` below, after which none is used.
    let [stdin, stdout, stderr, status] = lifted.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    if launch.program.tty.is_some() {
        rustix::process::setsid().map_err(|e| (Stage::Stdio, e.into()))?;
        sys::take_terminal(stdin).map_err(at(Stage::Stdio))?;
    } else {
        // A group of its own in the session of init, which has no terminal: a session costs a launch some microseconds.
        rustix::process::setpgid(None, None).map_err(|e| (Stage::Stdio, e.into()))?;
    }
    for (number, fd) in (0..).zip([stdin, stdout, stderr]) {
        sys::move_fd(fd, number, false).map_err(at(Stage::Stdio))?;
    }
    sys::move_fd(status, 3, true).map_err(at(Stage::Stdio))?;
    sys::close_from(4).map_err(at(Stage::Stdio))?;
    if let Some(cores) = launch.init {
        // Init has the higher priority: if it were to wake on this core, it would run before the program.
        let _ = sys::keep_on(Some(1), cores);
    }
    let _ = sys::schedule_for_first_instruction();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let (_, hard) = sys::open_files_limit();
    let hard = launch.open_files.min(hard);
    sys::set_rlimit(libc::RLIMIT_NOFILE, hard.min(1024), hard).map_err(at(Stage::Stdio))?;
    sys::set_rlimit(libc::RLIMIT_CORE, NO_CORE, NO_CORE).map_err(at(Stage::Stdio))?;
    rustix::process::chdir(launch.cwd.as_c_str()).map_err(|e| (Stage::Cwd, e.into()))?;
    if !sys::is_beneath_root() {
        return Err((Stage::Cwd, io::Error::from_raw_os_error(libc::EXDEV)));
    }
    let user = &launch.user;
    sys::set_ids(user.uid, user.gid, &user.groups).map_err(at(Stage::Ids))?;
    sys::default_pipe_signal();
    sys::unblock_signals();
    Ok(())
}

/// Makes the working directory where absent.
fn make_directory(cwd: &str) -> io::Result<()> {
    if cwd.is_empty() || cwd == "/" {
        return Ok(());
    }
    if !cwd.starts_with('/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    if std::path::Path::new(cwd).exists() { Ok(()) } else { std::fs::create_dir_all(cwd) }
}

fn execute(launch: &Launch<'_>) -> io::Error {
    let mut denied = None;
    let mut last = io::Error::from_raw_os_error(libc::ENOENT);
    for path in &launch.candidates {
        last = sys::execve(path, &launch.argv, &launch.env);
        match last.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            Some(libc::EACCES) => denied = Some(libc::EACCES),
            _ => return last,
        }
    }
    denied.map_or(last, io::Error::from_raw_os_error)
}
