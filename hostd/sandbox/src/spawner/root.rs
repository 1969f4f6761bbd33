//! Composing a box's root: read-only layers, shown through the box's uid range, beneath a sized tmpfs.
//!
//! Done here and not in the box, because overlayfs honours `metacopy` and `redirect_dir` only for a
//! mounter with rights over the whole machine. Nothing is attached anywhere: descriptors in, one
//! detached mount out, and the kernel frees all of it with the last descriptor or with the box.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount as m;

use crate::error::Fault;
use crate::spec::Limits;
use crate::sys;

/// What [`compose`] needs.
pub(super) struct Parts<'a> {
    /// Detached mounts, topmost first; each is given the box's id map.
    pub(super) lowers: &'a [OwnedFd],
    /// Detached mounts of data-only layers.
    pub(super) data_lowers: &'a [OwnedFd],
    /// The box's user namespace.
    pub(super) userns: BorrowedFd<'a>,
    /// First user id of the box.
    pub(super) uid_base: u32,
    /// Limits, for the size of the writable layer.
    pub(super) limits: &'a Limits,
}

fn os<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> Result<T, Fault> {
    result.map_err(|e| Fault::os(what, &e.into()))
}

/// Composes; returns a detached overlay mount and the detached mount of its writable layer.
///
/// The overlay does not need that one, nor the lower mounts, any more. But closing the last descriptor
/// of a detached mount waits for a grace period of RCU (milliseconds on busy cores), so nobody on
/// this path does: they go to the box, which attaches them where nothing sees them, and go with it.
pub(super) fn compose(parts: &Parts<'_>) -> Result<[OwnedFd; 2], Fault> {
    let Some(top) = parts.lowers.first() else {
        return Err(Fault::Os { what: "a root without layers".into(), errno: libc::EINVAL });
    };
    for lower in parts.lowers {
        match sys::mount_idmap(lower.as_fd(), parts.userns) {
            Ok(()) => {}
            // A file system without id maps: its files show as nobody's, which reads but does not write.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(Fault::os("id map of a layer", &e)),
        }
    }
    let (upper, work, writable) = writable_layer(parts, top)?;
    let fs = os("overlay", m::fsopen("overlay", m::FsOpenFlags::FSOPEN_CLOEXEC))?;
    let fs = fs.as_fd();
    for lower in parts.lowers {
        os("overlay lowerdir", m::fsconfig_set_fd(fs, "lowerdir+", lower))?;
    }
    for data in parts.data_lowers {
        os("overlay datadir", m::fsconfig_set_fd(fs, "datadir+", data))?;
    }
    os("overlay upperdir", m::fsconfig_set_fd(fs, "upperdir", &upper))?;
    os("overlay workdir", m::fsconfig_set_fd(fs, "workdir", &work))?;
    os("overlay volatile", m::fsconfig_set_flag(fs, "volatile"))?;
    if !parts.data_lowers.is_empty() {
        os("overlay metacopy", m::fsconfig_set_string(fs, "metacopy", "on"))?;
        os("overlay redirect_dir", m::fsconfig_set_string(fs, "redirect_dir", "on"))?;
    }
    os("overlay", m::fsconfig_create(fs))?;
    let attr = m::MountAttrFlags::MOUNT_ATTR_NOSUID | m::MountAttrFlags::MOUNT_ATTR_NODEV;
    let root = os("overlay mount", m::fsmount(fs, m::FsMountFlags::FSMOUNT_CLOEXEC, attr))?;
    Ok([root, writable])
}

/// A tmpfs of the box's size with an upper and a work directory. The mount must outlive `fsconfig`.
fn writable_layer(parts: &Parts<'_>, top: &OwnedFd) -> Result<(OwnedFd, OwnedFd, OwnedFd), Fault> {
    let size = parts.limits.disk_bytes.max(4096).to_string();
    let inodes = parts.limits.inodes.max(64).to_string();
    let options = [("size", size.as_str()), ("nr_inodes", inodes.as_str()), ("mode", "0700")];
    let mount = os("writable layer", sys::new_mount("tmpfs", &options, 0))?;
    for name in ["upper", "work"] {
        let made = rustix::fs::mkdirat(&mount, name, Mode::from_raw_mode(0o755));
        os("writable layer", made)?;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open =
        |name: &str| os("writable layer", rustix::fs::openat(&mount, name, flags, Mode::empty()));
    let (upper, work) = (open("upper")?, open("work")?);
    // The merged root takes its owner and mode from the upper directory: those of the image's root.
    let stat = os("image root", rustix::fs::fstat(top))?;
    let within = |id: u32| {
        if id >= parts.uid_base && id - parts.uid_base < crate::UIDS_A_BOX {
            id
        } else {
            parts.uid_base
        }
    };
    let (uid, gid) = (Uid::from_raw(within(stat.st_uid)), Gid::from_raw(within(stat.st_gid)));
    let own =
        rustix::fs::chownat(&mount, "upper", Some(uid), Some(gid), rustix::fs::AtFlags::empty());
    os("writable layer", own)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let set = rustix::fs::chmodat(&mount, "upper", mode, rustix::fs::AtFlags::empty());
    os("writable layer", set)?;
    Ok((upper, work, mount))
}
