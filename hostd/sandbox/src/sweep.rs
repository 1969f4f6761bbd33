//! Reaping what a dead spawner left: processes in its groups, then the groups, then its socket.
//!
//! Mounts need no sweeping: all of them live in mount namespaces of processes that die here.
//! Boxes normally die with their spawner; this is for what was frozen, and for the groups.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::cgroup::Layout;
use crate::spawner::socket_path;
use crate::spec::Config;

/// Longest that a sweep waits for killed processes to go.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What [`sweep`] found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// A spawner is alive: nothing was touched; join it instead.
    pub spawner_alive: bool,
    /// Processes killed.
    pub killed: usize,
    /// Groups that could not be removed.
    pub groups_left: usize,
}

/// Kills and removes what a dead spawner of this configuration's state directory left.
///
/// # Errors
/// What opening the lock gives; a missing state directory is an empty one.
pub fn sweep(config: &Config) -> io::Result<Swept> {
    let path = Path::new(&config.state_dir).join("spawner.lock");
    let lock = match rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => Some(fd),
        Err(rustix::io::Errno::NOENT) => None,
        Err(e) => return Err(e.into()),
    };
    if let Some(fd) = &lock
        && rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive).is_err()
    {
        return Ok(Swept { spawner_alive: true, ..Swept::default() });
    }
    let swept = sweep_groups(config);
    let _ = std::fs::remove_file(socket_path(&config.state_dir));
    Ok(swept)
}

/// The same, for a caller that holds the lock.
pub(crate) fn sweep_groups(config: &Config) -> Swept {
    let mut swept = Swept::default();
    let Ok(own) = std::fs::read_to_string("/proc/self/cgroup") else { return swept };
    let name = config.group_name();
    let Ok(layout) = Layout::find(Path::new(&config.cgroup_root), &own, &name) else {
        return swept;
    };
    let deadline = Instant::now() + WAIT_MAX;
    let mut seen = std::collections::HashSet::new();
    loop {
        let pids = layout.processes();
        if pids.is_empty() || Instant::now() > deadline {
            break;
        }
        for pid in pids {
            seen.insert(pid);
            // SAFETY: takes no pointer. The process is in a group that only boxes of ours are put into.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        layout.thaw_all();
        std::thread::yield_now();
    }
    swept.killed = seen.len();
    swept.groups_left = layout.remove_all();
    swept
}
