//! From the clone to the parked state: everything about a box that needs no image and no program.
//!
//! Entered with a user and a pid namespace of its own and the spawner's everything else. Left with a
//! root that holds four empty directories, `/proc`, `/dev` and `/sys` ready to be moved, the big
//! filter on, and no way to name anything of the host.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use super::Setup;
use wire::codec::Message as _;

use crate::error::Fault;
use crate::msg::ToBox;
use crate::packet;
use crate::sys;

/// Files and directories of `/proc` that tell about the host or reach it: hidden.
const MASKED: [&str; 14] = [
    "acpi",
    "asound",
    "config.gz",
    "interrupts",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
];
/// Those that are read but not written.
const READ_ONLY: [&str; 6] = ["bus", "driver", "fs", "irq", "sys", "sysrq-trigger"];

/// Terminals of a box.
const TERMINALS_MAX: &str = "128";

type Step<T> = Result<T, Fault>;

fn os<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> Step<T> {
    result.map_err(|e| Fault::os(what, &e.into()))
}

/// Parks. Returns the control socket, also where it fails.
pub(super) fn park(setup: Setup<'_>, buffer: &mut [u8]) -> Result<OwnedFd, (OwnedFd, Fault)> {
    let Setup { control, dev, doors, filters, has_net } = setup;
    let made = (|| {
        os("parent death signal", die_with_parent())?;
        enter(&control, &dev, doors)?;
        await_map(&control, buffer)?;
        os("ids", sys::set_ids(0, 0, &[]))?;
        // A change of user id clears it.
        os("parent death signal", die_with_parent())?;
        let namespaces = libc::CLONE_NEWNS
            | if has_net { 0 } else { libc::CLONE_NEWNET }
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWCGROUP;
        os("unshare", sys::unshare(namespaces))?;
        // Kernels without keyrings have none to leak.
        let _ = sys::new_session_keyring();
        if !has_net {
            os("loopback", sys::loopback_up())?;
        }
        build_root(dev)?;
        // Left behind: the spawner's session.
        os("session", rustix::process::setsid())?;
        os("bounding set", sys::drop_bounding_set())?;
        os("name", sys::set_name(c"init"))?;
        os("stdio", forget_stdio())?;
        filters.install_first()
    })();
    match made {
        Ok(()) => Ok(control),
        Err(why) => Err((control, why)),
    }
}

fn die_with_parent() -> io::Result<()> {
    sys::prctl(libc::PR_SET_PDEATHSIG, u64::from(libc::SIGKILL.unsigned_abs()))
}

/// Enters the cgroups, then closes every descriptor that came through the fork but two.
fn enter(control: &OwnedFd, dev: &OwnedFd, doors: Vec<std::fs::File>) -> Step<()> {
    for mut door in doors {
        os("enter cgroup", door.write_all(b"0"))?;
    }
    let mut kept = [control.as_raw_fd(), dev.as_raw_fd()];
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            // SAFETY: takes no pointer. What is closed here belongs to values of the spawner's that this
            // process never uses or drops: it leaves through `_exit`.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd + 1;
    }
    os("close descriptors", sys::close_from(first.unsigned_abs()))
}

fn await_map(control: &OwnedFd, buffer: &mut [u8]) -> Step<()> {
    let packet = os("wait for id map", packet::recv(control.as_fd(), buffer, true))?;
    match ToBox::decode(&buffer[..packet.len]) {
        Some(ToBox::Mapped) => Ok(()),
        _ => Err(Fault::BoxDied { what: "waiting for its id map".into() }),
    }
}

fn build_root(dev: OwnedFd) -> Step<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    os("private mounts", rustix::mount::mount_change("/", private))?;
    let plain = sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
    let options = [("mode", "0755"), ("size", "64k"), ("nr_inodes", "16")];
    let root = os("parking root", sys::new_mount("tmpfs", &options, sys::ATTR_NOSUID))?;
    // The spawner left its working directory at a mount made for this: the box's user could not reach
    // it by name.
    os("parking root", sys::attach(root.as_fd(), CWD, "."))?;
    for name in ["root", "proc", "dev", "sys", "empty"] {
        os("parking root", rustix::fs::mkdirat(&root, name, Mode::from_raw_mode(0o755)))?;
    }
    let empty_options = [("mode", "0555"), ("size", "4k"), ("nr_inodes", "2")];
    let empty = os("empty", sys::new_mount("tmpfs", &empty_options, plain | sys::ATTR_RDONLY))?;
    os("empty", sys::attach(empty.as_fd(), root.as_fd(), "empty"))?;
    os("/sys", show_limits(root.as_fd()))?;
    os("/dev", sys::attach(dev.as_fd(), root.as_fd(), "dev"))?;
    let dev = os("/dev", open_directory(root.as_fd(), "dev"))?;
    // Terminals are counted for the whole machine: `max`, or one box could have them all.
    let pts = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("max", TERMINALS_MAX)];
    let pts: Vec<_> = pts.into_iter().chain([("gid", "5")]).collect();
    let pts = os("/dev/pts", sys::new_mount("devpts", &pts, sys::ATTR_NOSUID | sys::ATTR_NOEXEC))?;
    os("/dev/pts", sys::attach(pts.as_fd(), dev.as_fd(), "pts"))?;
    let shm = [("mode", "1777"), ("size", "64m"), ("nr_inodes", "4096")];
    let shm = os("/dev/shm", sys::new_mount("tmpfs", &shm, plain))?;
    os("/dev/shm", sys::attach(shm.as_fd(), dev.as_fd(), "shm"))?;
    let proc = os("/proc", sys::new_mount("proc", &[], plain))?;
    os("/proc", sys::attach(proc.as_fd(), root.as_fd(), "proc"))?;
    let proc = os("/proc", open_directory(root.as_fd(), "proc"))?;
    // A server that is not root may listen on port 80 of its own network namespace.
    let ports = "sys/net/ipv4/ip_unprivileged_port_start";
    let _ = write_at(proc.as_fd(), ports, b"0");
    mask(proc.as_fd(), dev.as_fd(), root.as_fd())?;
    os("leave host root", rustix::process::fchdir(&root))?;
    os("leave host root", rustix::process::pivot_root(".", "."))?;
    os("leave host root", rustix::mount::unmount(".", UnmountFlags::DETACH))?;
    os("leave host root", rustix::process::chdir("/"))
}

/// Makes `/sys`: nothing but, where runtimes look for the memory and CPU that they have, a read-only
/// view of the box's own cgroup (its cgroup namespace ends there).
fn show_limits(root: BorrowedFd<'_>) -> io::Result<()> {
    let plain = sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
    let options = [("mode", "0755"), ("size", "4k"), ("nr_inodes", "8")];
    let tree = sys::new_mount("tmpfs", &options, plain)?;
    let make = |name: &str| rustix::fs::mkdirat(&tree, name, Mode::from_raw_mode(0o755));
    make("fs")?;
    make("fs/cgroup")?;
    let read_only = plain | sys::ATTR_RDONLY;
    let mut views = Vec::new();
    // Whichever the machine has; one that cannot be shown is left out, as everything else of /sys is.
    for controller in ["memory", "cpu"] {
        if let Ok(view) = sys::new_mount("cgroup", &[(controller, "")], read_only) {
            make(&format!("fs/cgroup/{controller}"))?;
            views.push((format!("fs/cgroup/{controller}"), view));
        }
    }
    if views.is_empty()
        && let Ok(view) = sys::new_mount("cgroup2", &[], read_only)
    {
        views.push(("fs/cgroup".to_owned(), view));
    }
    sys::mount_restrict(tree.as_fd(), read_only)?;
    sys::attach(tree.as_fd(), root, "sys")?;
    for (at, view) in views {
        sys::attach(view.as_fd(), tree.as_fd(), &at)?;
    }
    Ok(())
}

fn open_directory(at: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(at, path, flags, Mode::empty())?)
}

fn write_at(at: BorrowedFd<'_>, path: &str, bytes: &[u8]) -> io::Result<()> {
    let file = rustix::fs::openat(at, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, bytes)?;
    Ok(())
}

fn mask(proc: BorrowedFd<'_>, dev: BorrowedFd<'_>, root: BorrowedFd<'_>) -> Step<()> {
    for name in MASKED {
        let Ok(stat) = rustix::fs::statat(proc, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        let cover = if kind == rustix::fs::FileType::Directory {
            sys::clone_tree(root, "empty", false)
        } else {
            sys::clone_tree(dev, "null", false)
        };
        let cover = os("mask /proc", cover)?;
        os("mask /proc", sys::attach(cover.as_fd(), proc, name))?;
    }
    for name in READ_ONLY {
        let cover = match sys::clone_tree(proc, name, false) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => continue,
            other => os("read-only /proc", other)?,
        };
        let attr = sys::ATTR_RDONLY | sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
        os("read-only /proc", sys::mount_restrict(cover.as_fd(), attr))?;
        os("read-only /proc", sys::attach(cover.as_fd(), proc, name))?;
    }
    Ok(())
}

/// Points 0-2 at `/dev/null`: the spawner's log is not the box's.
fn forget_stdio() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for number in 0..3 {
        sys::move_fd(null.as_fd(), number, false)?;
    }
    Ok(())
}
