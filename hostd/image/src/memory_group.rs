//! A memory group of the image server's own: what it pushes into the page cache ahead of its readers is charged to the
//! process that pushes, and must not press on hostd, nor on whichever sandbox happens to read first.
//!
//! The group lies at the top of the hierarchy that has the memory controller, v1 or v2. Where that is not ours to write,
//! the server stays where it is, and says so. Left out: pages that readers themselves bring in, which are theirs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Part of the machine's memory that the server and what it brought may take, as a divisor.
const MEMORY_PART: u64 = 8;
/// At least so much: frames in memory, boot packs that are kept, and as much again of pages.
const BYTES_MIN: u64 = 1 << 30;

/// A name for the group of what is mounted below a state directory.
pub(crate) fn name(state_dir: &Path, domain: &str) -> String {
    let all = [state_dir.as_os_str().as_encoded_bytes(), b"\0", domain.as_bytes()].concat();
    format!("volley-images-{}", crate::id::to_hex(&blake3::hash(&all).as_bytes()[..8]))
}

/// Where the group is, and the name of the file of its bound.
fn place(name: &str) -> Option<(PathBuf, &'static str)> {
    let of_v1 = Path::new("/sys/fs/cgroup/memory");
    if of_v1.join("memory.limit_in_bytes").exists() {
        return Some((of_v1.join(name), "memory.limit_in_bytes"));
    }
    let of_v2 = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(of_v2.join("cgroup.subtree_control")).ok()?;
    let has_memory = controllers.split_whitespace().any(|controller| controller == "memory");
    has_memory.then(|| (of_v2.join(name), "memory.max"))
}

/// Moves this process into the group, which is made if it is not there.
pub(crate) fn enter(name: &str) -> io::Result<()> {
    let none = || io::Error::other("no memory controller that groups may have");
    let (group, bound) = place(name).ok_or_else(none)?;
    match fs::create_dir(&group) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let info = rustix::system::sysinfo();
    let memory = info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)));
    let bytes = (memory / MEMORY_PART).max(BYTES_MIN);
    fs::write(group.join(bound), bytes.to_string())?;
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

/// Leaves the group, which is removed: for a server whose holder may be dead.
pub(crate) fn leave(name: &str) {
    if let Some((group, _)) = place(name)
        && let Some(top) = group.parent()
    {
        let _ = fs::write(top.join("cgroup.procs"), std::process::id().to_string());
        remove(name);
    }
}

/// Removes the group when nobody is in it any more.
pub(crate) fn remove(name: &str) {
    if let Some((group, _)) = place(name) {
        let _ = fs::remove_dir(group);
    }
}
