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

/// What [`Canvas::compose`] needs.
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

/// The part of a root that does not depend on the claim, made when the box is: a writable layer of the usual size, and
/// an overlay that lacks its layers.
pub(super) struct Canvas {
    writable: OwnedFd,
    overlay: OwnedFd,
}

fn os<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> Result<T, Fault> {
    result.map_err(|e| Fault::os(what, &e.into()))
}

impl Canvas {
    /// Makes one for a box whose first user id this is.
    pub(super) fn make(uid_base: u32) -> io::Result<Self> {
        let limits = Limits::default();
        let (size, inodes) = sizes(&limits);
        let options = [("size", size.as_str()), ("nr_inodes", inodes.as_str()), ("mode", "0700")];
        let writable = sys::new_mount("tmpfs", &options, 0)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |name: &str| -> io::Result<OwnedFd> {
            rustix::fs::mkdirat(&writable, name, Mode::from_raw_mode(0o755))?;
            Ok(rustix::fs::openat(&writable, name, flags, Mode::empty())?)
        };
        let (upper, work) = (open("upper")?, open("work")?);
        own(&writable, uid_base, uid_base)?;
        let overlay = m::fsopen("overlay", m::FsOpenFlags::FSOPEN_CLOEXEC)?;
        m::fsconfig_set_fd(overlay.as_fd(), "upperdir", &upper)?;
        m::fsconfig_set_fd(overlay.as_fd(), "workdir", &work)?;
        m::fsconfig_set_flag(overlay.as_fd(), "volatile")?;
        Ok(Self { writable, overlay })
    }

    /// Composes; returns a detached overlay mount and the detached mount of its writable layer.
    ///
    /// The overlay does not need that one, nor the lower mounts, any more. But closing the last descriptor
    /// of a detached mount waits for a grace period of RCU (milliseconds on busy cores), so nobody on
    /// this path does: they go to the box, which attaches them where nothing sees them, and go with it.
    pub(super) fn compose(self, parts: &Parts<'_>) -> Result<[OwnedFd; 2], Fault> {
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
        os("writable layer", self.resize(parts.limits))?;
        os("writable layer", self.resemble(top, parts.uid_base))?;
        let fs = self.overlay.as_fd();
        for lower in parts.lowers {
            os("overlay lowerdir", m::fsconfig_set_fd(fs, "lowerdir+", lower))?;
        }
        for data in parts.data_lowers {
            os("overlay datadir", m::fsconfig_set_fd(fs, "datadir+", data))?;
        }
        if !parts.data_lowers.is_empty() {
            os("overlay metacopy", m::fsconfig_set_string(fs, "metacopy", "on"))?;
            os("overlay redirect_dir", m::fsconfig_set_string(fs, "redirect_dir", "on"))?;
        }
        os("overlay", m::fsconfig_create(fs))?;
        let attr = m::MountAttrFlags::MOUNT_ATTR_NOSUID | m::MountAttrFlags::MOUNT_ATTR_NODEV;
        let root = os("overlay mount", m::fsmount(fs, m::FsMountFlags::FSMOUNT_CLOEXEC, attr))?;
        Ok([root, self.writable])
    }

    /// Gives the writable layer the size that a claim wants, where that is not the usual one.
    fn resize(&self, limits: &Limits) -> io::Result<()> {
        let ((size, inodes), usual) = (sizes(limits), sizes(&Limits::default()));
        if (&size, &inodes) == (&usual.0, &usual.1) {
            return Ok(());
        }
        let flags = m::FsPickFlags::FSPICK_CLOEXEC | m::FsPickFlags::FSPICK_EMPTY_PATH;
        let fs = m::fspick(&self.writable, "", flags)?;
        m::fsconfig_set_string(fs.as_fd(), "size", size)?;
        m::fsconfig_set_string(fs.as_fd(), "nr_inodes", inodes)?;
        Ok(m::fsconfig_reconfigure(fs.as_fd())?)
    }

    /// The merged root takes its owner and mode from the upper directory: those of the image's root.
    fn resemble(&self, top: &OwnedFd, uid_base: u32) -> io::Result<()> {
        let stat = rustix::fs::fstat(top)?;
        let within = |id: u32| {
            if id >= uid_base && id - uid_base < crate::UIDS_A_BOX { id } else { uid_base }
        };
        let (uid, gid, mode) = (within(stat.st_uid), within(stat.st_gid), stat.st_mode & 0o7777);
        if (uid, gid) != (uid_base, uid_base) {
            own(&self.writable, uid, gid)?;
        }
        if mode != 0o755 {
            let flags = rustix::fs::AtFlags::empty();
            rustix::fs::chmodat(&self.writable, "upper", Mode::from_raw_mode(mode), flags)?;
        }
        Ok(())
    }
}

fn sizes(limits: &Limits) -> (String, String) {
    (limits.disk_bytes.max(4096).to_string(), limits.inodes.max(64).to_string())
}

fn own(writable: &OwnedFd, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    Ok(rustix::fs::chownat(writable, "upper", uid, gid, rustix::fs::AtFlags::empty())?)
}
