//! The root swap: from the parking root to the sandbox's own.
//!
//! Every mount is made while no foreign program runs, on a root whose writable layer is this box's
//! alone, so that nothing can be swapped underneath. What an image planted at `/proc`, `/dev` or
//! `/sys` (a symlink, a file) is never followed: it is removed from the box's layer and replaced.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::error::Fault;
use crate::spec::{BoxNetwork, Steps};
use crate::sys;

fn os<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> Result<T, Fault> {
    result.map_err(|e| Fault::os(what, &e.into()))
}

/// Puts the box into `root` and fills in its steps.
///
/// The new root is moved over the parking root and entered, as an initramfs does it, and the parking
/// root stays mounted beneath: unmounting waits for a grace period of RCU, half a millisecond and
/// more on busy cores. What stays beneath is an empty tmpfs and the mounts that the root was made from
/// (`parts`); no path leads there, because the new root covers it at the very root of the namespace.
pub(super) fn swap(
    root: &OwnedFd,
    parts: &[OwnedFd],
    hostname: &str,
    network: Option<&BoxNetwork>,
    steps: &mut Steps,
) -> Result<(), Fault> {
    os("mount root", sys::attach(root.as_fd(), CWD, "/root"))?;
    for part in parts {
        os("put layers away", sys::attach(part.as_fd(), CWD, "/empty"))?;
    }
    for name in ["proc", "dev", "sys"] {
        let point = os("mount point", mount_point(root.as_fd(), name))?;
        let moved = move_mount(
            CWD,
            format!("/{name}"),
            point.as_fd(),
            "",
            MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        );
        os("move mount", moved)?;
    }
    steps.mounted = sys::now_ns();
    os("enter root", sys::attach(root.as_fd(), CWD, "/"))?;
    os("enter root", rustix::process::fchdir(root))?;
    os("enter root", rustix::process::chroot("."))?;
    let hostname = if hostname.is_empty() { "sandbox" } else { hostname };
    os("host name", rustix::system::sethostname(hostname.as_bytes()))?;
    // An image without /etc, or with a read-only one, goes without.
    let _ = name_localhost(root.as_fd(), hostname);
    if let Some(network) = network {
        super::network::name_server(root.as_fd(), network);
    }
    steps.pivoted = sys::now_ns();
    Ok(())
}

/// Gives an image whose `/etc/hosts` is absent or empty (as exports of other tools leave it) one that
/// names localhost and the box.
fn name_localhost(root: BorrowedFd<'_>, hostname: &str) -> rustix::io::Result<()> {
    let etc = open_directory(root, "etc")?;
    match rustix::fs::statat(&etc, "hosts", AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => {}
        Ok(stat) if stat.st_size == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFREG => {}
        _ => return Ok(()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&etc, "hosts", flags, Mode::from_raw_mode(0o644))?;
    let text = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost\n");
    rustix::io::write(file, text.as_bytes())?;
    Ok(())
}

fn open_directory(at: BorrowedFd<'_>, path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(at, path, flags, Mode::empty(), resolve)
}

/// A real directory of this name in the root, made where there is none.
fn mount_point(root: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    let mut last = Errno::LOOP;
    for _ in 0..3 {
        match open_directory(root, name) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755))?;
                last = Errno::NOENT;
            }
            Err(e @ (Errno::LOOP | Errno::NOTDIR)) => {
                rustix::fs::unlinkat(root, name, AtFlags::empty())?;
                last = e;
            }
            other => return other,
        }
    }
    Err(last)
}
