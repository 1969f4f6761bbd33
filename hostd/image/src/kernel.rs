//! The kernel's part: mounts by the new mount API, and what this kernel can do.
//!
//! Every mount lies below hostd's private directory and is read-only, without devices and set-user-id of its own: the box's
//! overlay decides about those.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    open_tree,
};

fn lower_attrs() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME
}

/// Attaches a detached mount to a directory.
fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount, "", CWD, target, flags)?)
}

/// How EROFS gets at an image of metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MetaBy {
    /// As a file: Linux 6.12 and later.
    File,
    /// As a file behind a loop device: any kernel.
    Loop,
}

/// Mounts an EROFS image that lies in a file.
pub(crate) fn mount_erofs(image: &Path, target: &Path, by: MetaBy) -> io::Result<()> {
    match by {
        MetaBy::File => mount_erofs_source(image, target),
        MetaBy::Loop => {
            let device = LoopDevice::attach(image)?;
            mount_erofs_source(Path::new(&device.path), target)
        }
    }
}

fn mount_erofs_source(source: &Path, target: &Path) -> io::Result<()> {
    let fs = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", source)?;
    fsconfig_set_flag(&fs, "ro")?;
    fsconfig_create(&fs)?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, lower_attrs())?;
    attach(&mount, target)
}

/// Mounts a FUSE file system that is answered through `device`.
pub(crate) fn mount_fuse(device: &File, target: &Path) -> io::Result<()> {
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", "volley")?;
    fsconfig_set_string(&fs, "subtype", "volley")?;
    fsconfig_set_string(&fs, "fd", device.as_raw_fd().to_string())?;
    for (key, value) in [("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
        fsconfig_set_string(&fs, key, value)?;
    }
    // A box reads through the overlay with hostd's credentials, its page faults with none.
    fsconfig_set_flag(&fs, "allow_other")?;
    fsconfig_create(&fs)?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, lower_attrs())?;
    attach(&mount, target)
}

/// An overlay of these layers, mounted on `target` without an upper one: for looking into an image. A sandbox's root is made
/// by its box.
///
/// # Errors
/// What the kernel says; nothing is mounted then.
pub fn mount_overlay(layers: &crate::Layers, target: &Path) -> io::Result<()> {
    // An overlay of one layer is none, says the kernel.
    if let ([only], []) = (layers.lower.as_slice(), layers.data_only.as_slice()) {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        return attach(&open_tree(CWD, only, flags)?, target);
    }
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in &layers.options {
        fsconfig_set_string(&fs, *name, *value)?;
    }
    for dir in &layers.lower {
        fsconfig_set_string(&fs, "lowerdir+", dir)?;
    }
    for dir in &layers.data_only {
        fsconfig_set_string(&fs, "datadir+", dir)?;
    }
    fsconfig_create(&fs)?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, lower_attrs())?;
    attach(&mount, target)
}

/// Takes a mount away, even one whose server is dead. Nothing mounted there is fine.
///
/// # Errors
/// What the kernel says, as when the caller may not.
pub fn unmount(target: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Nothing (more) is mounted there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether something is mounted there: by the mount table, for asking a mount would ask its server.
pub(crate) fn is_mounted(target: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // The table writes a space as \\040.
    let target = target.display().to_string().replace(' ', "\\040");
    table.lines().any(|line| line.split(' ').nth(1) == Some(&target))
}

/// Whether the kernel knows a file system, as far as it says so.
pub(crate) fn has_filesystem(name: &str) -> bool {
    fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC).is_ok()
        || fs::read_to_string("/proc/filesystems")
            .is_ok_and(|all| all.lines().any(|line| line.split_whitespace().last() == Some(name)))
}

/// A loop device that goes away with its last user.
struct LoopDevice {
    path: String,
    /// Keeps the device until the file system holds it.
    _file: File,
}

impl LoopDevice {
    fn attach(image: &Path) -> io::Result<Self> {
        let image = File::open(image)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        // Another process may take the free device first; then the next one is asked for.
        for _ in 0..64 {
            let path = format!("/dev/loop{}", free_loop(&control)?);
            let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else { continue };
            match configure_loop(&file, image.as_fd()) {
                Ok(()) => return Ok(Self { path, _file: file }),
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::other("no free loop device"))
    }
}

fn free_loop(control: &File) -> io::Result<i32> {
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
    // SAFETY: `control` is an open descriptor of the loop control device for the whole call, and this request takes no
    // pointer.
    let n = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n) }
}

fn configure_loop(device: &File, image: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
    const FLAGS_AT: usize = 8 + 52;
    const READ_ONLY: u32 = 1;
    const AUTOCLEAR: u32 = 4;
    // struct loop_config: fd, block_size, struct loop_info64 (232 bytes), 8 reserved words.
    let mut config = [0u64; (8 + 232 + 64) / 8];
    let fd = u32::try_from(image.as_raw_fd()).unwrap_or(u32::MAX);
    config[0] = u64::from(fd);
    config[FLAGS_AT / 8] = u64::from(READ_ONLY | AUTOCLEAR) << (8 * (FLAGS_AT % 8));
    // SAFETY: the kernel reads `size_of::<loop_config>()` = 304 bytes through the pointer, which is what the array has;
    // it is alive and not shared for the whole call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) fn mount_small_tmpfs(target: &Path, size: &str) -> io::Result<()> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "size", size)?;
    fsconfig_create(&fs)?;
    attach(&fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?, target)
}
