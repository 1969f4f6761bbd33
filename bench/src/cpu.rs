//! Processor time of processes, as the kernel counts it.

use std::{fs, time::Duration};

/// One role's process, whose processor time is reported.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RolePid {
    /// `placerd`, `hostd`, ...; several processes of one name are summed.
    pub role: String,
    /// Its process id.
    pub pid: u32,
}

/// Processor time of a process so far, user and system, all threads; `None` if it is gone.
#[must_use]
pub fn used(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    ticks(&stat).map(|ticks| {
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / per_second))
    })
}

/// Fields 14 and 15 of `/proc/pid/stat`; the second field may hold spaces and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
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
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194304 1 0 0 0 30 12 0 0 20 0 1 0 5 0 0";
        assert_eq!(ticks(stat), Some(42));
        assert!(used(std::process::id()).is_some());
    }
}
