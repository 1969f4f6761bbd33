//! Processor time of processes, as the kernel counts it.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// One role's process, whose processor time is reported.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RolePid {
    /// `placerd`, `hostd`, ...; several processes of one name are summed.
    pub role: String,
    /// Its process id.
    pub pid: u32,
}

/// Processor time of a process so far, user and system, all threads, to the nanosecond; `None` if it is gone.
#[must_use]
pub fn used(pid: u32) -> Option<Duration> {
    let pid = libc::pid_t::try_from(pid).ok()?;
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls write one value each, which lives on this frame; the kernel checks pid and clock.
    let told = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    let nanos = u32::try_from(time.tv_nsec).ok()?;
    told.then(|| Duration::new(seconds, nanos))
}

/// Processor time of the calling thread so far. On a machine that is shared, work per second of it says what a core does;
/// on a quiet one it is the wall's time.
#[must_use]
pub fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// Processor time by role between two looks.
#[derive(Debug)]
pub struct Meter {
    pids: Vec<RolePid>,
    before: Vec<Option<Duration>>,
}

impl Meter {
    /// Starts counting.
    #[must_use]
    pub fn start(pids: Vec<RolePid>) -> Self {
        let before = pids.iter().map(|role| used(role.pid)).collect();
        Self { pids, before }
    }

    /// Time since the start, by role in order of first mention. A process that is gone counts nothing.
    #[must_use]
    pub fn read(&self) -> Vec<(String, Duration)> {
        let mut by_role: Vec<(String, Duration)> = Vec::new();
        for (role, before) in self.pids.iter().zip(&self.before) {
            let spent = used(role.pid).zip(*before).map(|(now, then)| now.saturating_sub(then));
            let spent = spent.unwrap_or_default();
            match by_role.iter_mut().find(|(name, _)| *name == role.role) {
                Some((_, sum)) => *sum += spent,
                None => by_role.push((role.role.clone(), spent)),
            }
        }
        by_role
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_time_grows_with_work_and_nobodys_is_none() {
        let before = used(std::process::id()).unwrap();
        let mut work = 0u64;
        while used(std::process::id()).unwrap() == before {
            work = std::hint::black_box(work + 1);
        }
        assert_eq!(used(u32::MAX), None);
    }
}
