//! Whether this kernel can make boxes at all: asked once at the start of a spawner, and by `volley doctor`.
//!
//! Left out: what has a fallback or shows by itself at the first box (cgroups, namespaces, filters).

use std::io;
use std::os::fd::AsFd;

use crate::sys;

/// Tries what every claim does and kernels before 6.15 refuse: to clone a mount that is attached nowhere, and to use
/// it as a layer. Needs root; leaves nothing.
///
/// # Errors
/// What is lacking, in words.
pub fn probe() -> Result<(), String> {
    let lacks = |what: &str, error: &io::Error| {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        format!("Linux {release} cannot {what} ({error}): real sandboxes need Linux 6.15 or later")
    };
    let mount = sys::new_mount("tmpfs", &[("size", "4k"), ("nr_inodes", "4")], 0)
        .map_err(|e| format!("no right to make mounts: {e}"))?;
    let layer = sys::clone_tree(mount.as_fd(), "", false)
        .map_err(|e| lacks("clone mounts that are attached nowhere", &e))?;
    let overlay = || -> io::Result<()> {
        let fs = rustix::mount::fsopen("overlay", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC)?;
        for layer in [&layer, &mount] {
            rustix::mount::fsconfig_set_fd(fs.as_fd(), "lowerdir+", layer)?;
        }
        Ok(())
    };
    overlay().map_err(|e| lacks("use such mounts as layers of a root", &e))
}
