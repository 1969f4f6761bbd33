//! How a process becomes the spawner, and what it prepares once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::event::epoll;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::mount::MountPropagationFlags;

use super::pool::Refill;
use super::{LISTENER, Spawning, TERMINATE};
use crate::cgroup::Layout;
use crate::inside::Filters;
use crate::packet;
use crate::spec::{Config, SLOTS_MAX, UIDS_A_BOX};
use crate::sys;

/// The hidden first argument.
pub(crate) const ARGUMENT: &str = "__spawner";
/// What the spawner writes on stdout once it listens; anything else is why it does not.
pub(crate) const READY: &[u8] = b"ready";

/// What it says where another holds the state directory.
pub(crate) const LOCKED: &str = "another spawner holds the state directory";

/// Socket of the spawner of a state directory.
pub(crate) fn socket_path(state_dir: &str) -> PathBuf {
    Path::new(state_dir).join("spawner.sock")
}

/// Becomes the spawner if this process was started as one, and then never returns.
///
/// Call it first thing in `main`, before any thread: `hostd_sandbox::main_if_asked()`.
pub fn main_if_asked() {
    if std::env::args_os().nth(1).is_none_or(|a| a != ARGUMENT) {
        return;
    }
    let code = match prepare() {
        Ok(spawning) => match spawning.run() {
            Ok(()) => 0,
            Err(e) => {
                super::log(format_args!("{e}"));
                1
            }
        },
        Err(why) => {
            let _ = io::stdout().write_all(why.as_bytes());
            let _ = io::stdout().flush();
            2
        }
    };
    std::process::exit(code);
}

fn prepare() -> Result<Spawning, String> {
    let say = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let mut bytes = Vec::new();
    io::stdin()
        .take(packet::PACKET_BYTES_MAX as u64)
        .read_to_end(&mut bytes)
        .map_err(say("configuration"))?;
    let config = rkyv::from_bytes::<Config, rkyv::rancor::Error>(&bytes)
        .map_err(|e| format!("configuration: {e}"))?;
    check(&config)?;
    harden().map_err(say("process setup"))?;
    lock(&config.state_dir).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => LOCKED.to_owned(),
        _ => format!("lock of the state directory: {e}"),
    })?;
    let stage = Path::new(&config.state_dir).join("stage");
    std::fs::create_dir_all(&stage).map_err(say("stage directory"))?;
    let stage = stage.to_string_lossy().into_owned();
    crate::probe::probe()?;
    let dev = private_mounts(&stage).map_err(say("private mounts"))?;
    crate::sweep::sweep_groups(&config);
    let own = std::fs::read_to_string("/proc/self/cgroup").map_err(say("own cgroup"))?;
    let name = config.group_name();
    let layout =
        Layout::prepare(Path::new(&config.cgroup_root), &own, &name).map_err(say("cgroups"))?;
    let listener = listen(&config.state_dir).map_err(say("socket"))?;
    let terminate = sys::signal_fd(libc::SIGTERM).map_err(say("signals"))?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| format!("epoll: {e}"))?;
    let slots = config.slots;
    let spawning = Spawning {
        layout,
        filters: Filters::compile()?,
        dev,
        listener,
        terminate,
        epoll,
        connection: None,
        generation: 0,
        boxes: HashMap::new(),
        tally: super::tally::Tally::new(config.shapes.len()),
        retired: HashSet::new(),
        by_id: HashMap::new(),
        free_slots: (0..slots).rev().collect(),
        groups: HashMap::new(),
        nets: super::nets::Nets::new().map_err(say("network namespace"))?,
        waiting: VecDeque::new(),
        exited: VecDeque::new(),
        next_number: 1,
        refill: Refill::new(),
        alone_since: Some(Instant::now()),
        stopping: None,
        buffer: vec![0; packet::PACKET_BYTES_MAX],
        config,
    };
    spawning.watch(&spawning.listener, LISTENER).map_err(say("epoll"))?;
    spawning.watch(&spawning.terminate, TERMINATE).map_err(say("epoll"))?;
    let mut stdout = io::stdout();
    stdout.write_all(READY).and_then(|()| stdout.flush()).map_err(say("stdout"))?;
    // From here on nobody reads stdout or writes stdin; hostd's ends close with it.
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| format!("/dev/null: {e}"))?;
    for number in 0..2 {
        sys::move_fd(null.as_fd(), number, false).map_err(say("stdio"))?;
    }
    Ok(spawning)
}

/// Checks what the rest relies on.
pub(crate) fn check(config: &Config) -> Result<(), String> {
    if config.slots == 0 || config.slots > SLOTS_MAX {
        return Err(format!("slots must be 1 to {SLOTS_MAX}"));
    }
    let last = u64::from(config.uid_base) + u64::from(config.slots) * u64::from(UIDS_A_BOX);
    if config.uid_base < UIDS_A_BOX || last > 0x7fff_ffff {
        return Err("uid_base and slots must give user ids from 65,536 to 2^31".into());
    }
    if config.shapes.is_empty() {
        return Err("at least one shape is needed".into());
    }
    for shape in &config.shapes {
        if shape.memory_bytes < 16 << 20 || shape.pids < 4 || shape.cpu_millis < 10 {
            let name = &shape.name;
            return Err(format!(
                "shape {name} needs at least 16 MiB of memory, 4 pids and 10 cpu_millis"
            ));
        }
    }
    if !Path::new(&config.state_dir).is_absolute() {
        return Err("state_dir must be an absolute path".into());
    }
    Ok(())
}

fn harden() -> io::Result<()> {
    let _ = rustix::process::setsid();
    // What hostd's parent ignored or blocked is not for programs to inherit.
    sys::default_signals();
    sys::unblock_signals();
    rustix::process::umask(Mode::empty());
    rustix::process::chdir("/")?;
    // Boxes are cloned under their own user id; see `Boxed::make`.
    sys::keep_capabilities_over_ids()?;
    // No file of this process or of a fork of it is readable from inside a box.
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    let (_, hard) = sys::open_files_limit();
    sys::set_rlimit(libc::RLIMIT_NOFILE, hard, hard)?;
    // A launch must not wait for a scheduler's slice of something else.
    let _ = sys::schedule_for_launch();
    sys::set_name(c"volley-spawner")
}

/// Takes the lock of the state directory for the life of the process.
fn lock(state_dir: &str) -> io::Result<()> {
    let path = Path::new(state_dir).join("spawner.lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?;
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    std::mem::forget(fd);
    Ok(())
}

/// Leaves the host's mount namespace for a copy, and builds the `/dev` of all boxes in it: one
/// read-only tmpfs, so that a box's `/dev` is one mount and nothing in it can be swapped.
fn private_mounts(stage: &str) -> io::Result<OwnedFd> {
    sys::unshare(libc::CLONE_NEWNS)?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave)?;
    let options = [("mode", "0755"), ("size", "64k"), ("nr_inodes", "32")];
    let attr = sys::ATTR_NOSUID | sys::ATTR_NOEXEC;
    let mount = sys::new_mount("tmpfs", &options, attr)?;
    for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
        make_device(&mount, name, rustix::fs::makedev(1, minor))?;
    }
    make_device(&mount, "tty", rustix::fs::makedev(5, 0))?;
    for name in ["pts", "shm"] {
        rustix::fs::mkdirat(&mount, name, Mode::from_raw_mode(0o755))?;
    }
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ] {
        rustix::fs::symlinkat(target, &mount, name)?;
    }
    sys::mount_restrict(mount.as_fd(), attr | sys::ATTR_RDONLY)?;
    sys::attach(mount.as_fd(), rustix::fs::CWD, stage)?;
    // Boxes mount their parking root at the working directory that they inherit.
    rustix::process::chdir(stage)?;
    Ok(mount)
}

/// A node of `/dev/net/tun` that a box may open, in a file system of its own that nothing else names. Made for each
/// box that has a network, so that those without pay nothing.
pub(super) fn tun_node() -> io::Result<OwnedFd> {
    let options = [("mode", "0755"), ("size", "4k"), ("nr_inodes", "4")];
    let mount = sys::new_mount("tmpfs", &options, sys::ATTR_NOSUID | sys::ATTR_NOEXEC)?;
    make_device(&mount, "tun", rustix::fs::makedev(10, 200))?;
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(&mount, "tun", flags, Mode::empty())?)
}

fn make_device(at: &OwnedFd, name: &str, device: rustix::fs::Dev) -> io::Result<()> {
    let mode = Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(at, name, rustix::fs::FileType::CharacterDevice, mode, device)?;
    Ok(())
}

fn listen(state_dir: &str) -> io::Result<OwnedFd> {
    use rustix::net as n;
    let path = socket_path(state_dir);
    let _ = std::fs::remove_file(&path);
    let flags = n::SocketFlags::CLOEXEC | n::SocketFlags::NONBLOCK;
    let socket = n::socket_with(n::AddressFamily::UNIX, n::SocketType::SEQPACKET, flags, None)?;
    n::bind(&socket, &n::SocketAddrUnix::new(&path)?)?;
    rustix::fs::chmod(&path, Mode::from_raw_mode(0o600))?;
    n::listen(&socket, 16)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Shape;

    #[test]
    fn configurations_that_cannot_work_are_refused() {
        let shape = Shape {
            name: "small".into(),
            cpu_millis: 1000,
            memory_bytes: 64 << 20,
            pids: 64,
            parked: 1,
        };
        let good = Config::new("/run/x", vec![shape.clone()]);
        assert_eq!(check(&good), Ok(()));
        let bad = |change: &dyn Fn(&mut Config)| {
            let mut config = good.clone();
            change(&mut config);
            check(&config).unwrap_err()
        };
        bad(&|c| c.slots = 0);
        bad(&|c| c.slots = SLOTS_MAX + 1);
        bad(&|c| c.uid_base = 0);
        bad(&|c| c.uid_base = 0x7fff_0000);
        bad(&|c| c.shapes.clear());
        bad(&|c| c.shapes[0].pids = 1);
        bad(&|c| c.state_dir = "here".into());
    }

    #[test]
    fn group_names_differ_by_directory() {
        let name = |dir: &str| Config::new(dir, Vec::new()).group_name();
        assert_ne!(name("/run/a"), name("/run/b"));
        assert_eq!(name("/run/a").len(), "volley-".len() + 8);
    }
}
