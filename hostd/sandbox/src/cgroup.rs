//! Control groups of boxes, on v2 and on hybrid layouts (v1 controllers on mounts of their own).
//!
//! One group a slot, `<our own group>/volley-<hash>-slot-<n>`, in every hierarchy that we use. On v1 groups
//! are recycled, because making five of them costs more than everything else about a box; on v2 each
//! box gets a fresh one. No group holds all boxes: what bombs used of its share would be taken from their
//! neighbours, whose every wake-up then waits for its turn against the rest of the machine (a box's p99 was
//! ten times as long beside five bombs on busy cores). As it is each box has a share of its own, by its shape.
//! Left out: io and cpuset, devices (mounts in a box are `nodev` instead).
//! Longer than 500 lines: what both layouts do differently stands side by side.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::spec::Stats;

/// v1 controllers that a box needs; `freezer` for pause.
const V1: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "freezer"];
const CPU_PERIOD_US: u64 = 100_000;
/// How much heavier a group is until its program runs: a launch beside busy neighbours is then never behind them by its
/// own share.
const FAVOUR: u64 = 16;
/// Shares that a favoured group has at most, if it has not more anyway: below those of a process of nice -20 (88,761),
/// which the spawner is, who ends the favour.
const FAVOURED_MAX: u64 = 65_536;

/// Where our groups live: in each hierarchy the path that all of their paths begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One v2 hierarchy with its controllers.
    V2(PathBuf),
    /// Hierarchies of v1, by controller.
    V1(Vec<(&'static str, PathBuf)>),
}

/// Limits as the groups take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupLimits {
    pub(crate) cpu_millis: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) pids: u32,
}

fn put(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

fn get(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(64 * 1024).read_to_string(&mut text)?;
    Ok(text)
}

fn number(path: &Path) -> u64 {
    get(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

fn keyed(path: &Path, key: &str) -> u64 {
    let Ok(text) = get(path) else { return 0 };
    let value = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

/// This process's group in a hierarchy: `controller` is empty for v2.
fn own_group(cgroup_file: &str, controller: &str) -> Option<String> {
    cgroup_file.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?);
        let hit = if controller.is_empty() {
            names.is_empty()
        } else {
            names.split(',').any(|n| n == controller)
        };
        hit.then(|| path.trim_start_matches('/').to_owned())
    })
}

impl Layout {
    /// Finds the layout below `root` for a process whose `/proc/self/cgroup` is given, and makes it one in
    /// which groups can be made.
    pub(crate) fn prepare(root: &Path, cgroup_file: &str, name: &str) -> io::Result<Self> {
        let layout = Self::find(root, cgroup_file, name)?;
        if let Self::V2(prefix) = &layout {
            let base = prefix.parent().unwrap_or(root);
            delegate(base, &base.join(format!("{name}-host")))?;
        }
        Ok(layout)
    }

    /// Finds the layout and makes nothing.
    pub(crate) fn find(root: &Path, cgroup_file: &str, name: &str) -> io::Result<Self> {
        if let Ok(controllers) = get(&root.join("cgroup.controllers")) {
            for needed in ["cpu", "memory", "pids"] {
                if !controllers.split_whitespace().any(|c| c == needed) {
                    let text = format!("cgroup v2 at {} lacks {needed}", root.display());
                    return Err(io::Error::new(io::ErrorKind::Unsupported, text));
                }
            }
            let own = own_group(cgroup_file, "").unwrap_or_default();
            // A hostd that an earlier spawner moved into a leaf (`delegate`) still means the group above.
            let own = own.strip_suffix(&format!("{name}-host")).unwrap_or(&own);
            return Ok(Self::V2(root.join(own.trim_end_matches('/')).join(name)));
        }
        let mut found = Vec::new();
        for controller in V1 {
            let mount = root.join(controller);
            let own = own_group(cgroup_file, controller).unwrap_or_default();
            let base = [mount.join(own), mount].into_iter().find(|p| p.join("tasks").exists());
            let Some(base) = base else {
                let text = format!("no cgroup controller {controller} below {}", root.display());
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            };
            found.push((controller, base.join(name)));
        }
        Ok(Self::V1(found))
    }

    /// Every group of ours, in all hierarchies. Those of builds that had one group over all boxes are among them, the inner
    /// ones first.
    fn groups(&self) -> Vec<PathBuf> {
        let prefixes: Vec<&Path> = match self {
            Self::V2(prefix) => vec![prefix],
            Self::V1(list) => {
                // `cpu` and `cpuacct` are often one mount by two names.
                let mut prefixes: Vec<&Path> = list.iter().map(|(_, p)| p.as_path()).collect();
                prefixes.dedup_by_key(|p| p.parent().map(fs::canonicalize).and_then(Result::ok));
                prefixes
            }
        };
        let ours = |prefix: &Path| {
            let name = slot_dir(prefix, "");
            let ours = move |dir: &PathBuf| {
                dir.as_os_str().as_encoded_bytes().starts_with(name.as_os_str().as_encoded_bytes())
            };
            let mut old = subgroups(prefix);
            old.extend(prefix.is_dir().then(|| prefix.to_path_buf()));
            let new = subgroups(prefix.parent().unwrap_or(prefix)).into_iter().filter(ours);
            new.chain(old)
        };
        prefixes.into_iter().flat_map(ours).collect()
    }

    /// Processes in any group of ours.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut dirs = self.groups();
        let mut pids = Vec::new();
        while let Some(dir) = dirs.pop() {
            if let Ok(text) = fs::read_to_string(dir.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
            }
            dirs.extend(subgroups(&dir));
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Thaws every group, so that a kill reaches frozen processes.
    pub(crate) fn thaw_all(&self) {
        for dir in self.groups() {
            let _ = put(&dir.join("freezer.state"), "THAWED");
            let _ = put(&dir.join("cgroup.freeze"), "0");
        }
    }

    /// Removes every empty group of ours. Returns how many are left.
    pub(crate) fn remove_all(&self) -> usize {
        let mut left = 0;
        for dir in self.groups() {
            for inner in subgroups(&dir) {
                let _ = fs::remove_dir(inner);
            }
            if fs::remove_dir(&dir).is_err() {
                left += 1;
            }
        }
        left
    }
}

/// The group of a slot.
fn slot_dir(prefix: &Path, slot: &str) -> PathBuf {
    let name = prefix.file_name().unwrap_or_default().to_string_lossy();
    prefix.with_file_name(format!("{name}-slot-{slot}"))
}

fn subgroups(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

/// Turns controllers on below `base`. v2 forbids that while `base` has processes of its own (except at
/// the root): they move into `leaf` first.
fn delegate(base: &Path, leaf: &Path) -> io::Result<()> {
    let control = base.join("cgroup.subtree_control");
    if put(&control, "+cpu +memory +pids").is_ok() {
        return Ok(());
    }
    fs::create_dir_all(leaf)?;
    for pid in get(&base.join("cgroup.procs"))?.lines() {
        // One that has just exited is no failure; one that cannot move shows in the next write.
        let _ = put(&leaf.join("cgroup.procs"), pid);
    }
    put(&control, "+cpu +memory +pids")
}

/// The groups of one slot.
#[derive(Debug)]
pub(crate) struct Group {
    dirs: Dirs,
    oom_kills_before: u64,
    /// What was last set: a recycled group of the same shape needs no write.
    limits: Option<GroupLimits>,
    was_frozen: bool,
    /// Whether it weighs [`FAVOUR`] times what it should.
    favoured: bool,
}

#[derive(Debug)]
enum Dirs {
    V2(PathBuf),
    V1 { cpu: PathBuf, cpuacct: PathBuf, memory: PathBuf, pids: PathBuf, freezer: PathBuf },
}

/// A core's worth weighs as much as a process of the host, which has 1,024 shares.
fn shares(cpu_millis: u32, favoured: bool) -> u64 {
    let shares = (u64::from(cpu_millis) * 1024 / 1000).max(2);
    if favoured { (shares * FAVOUR).min(FAVOURED_MAX).max(shares) } else { shares }
}

impl Group {
    /// Makes or recycles the groups of a slot, and limits them.
    pub(crate) fn make(layout: &Layout, slot: u32, limits: &GroupLimits) -> io::Result<Self> {
        let slot = slot.to_string();
        let dirs = match layout {
            Layout::V2(prefix) => {
                let dir = slot_dir(prefix, &slot);
                let _ = fs::remove_dir(&dir);
                fs::create_dir(&dir)?;
                Dirs::V2(dir)
            }
            Layout::V1(prefixes) => {
                let of = |controller: &str| -> io::Result<PathBuf> {
                    let prefix = prefixes.iter().find(|(c, _)| *c == controller);
                    let (_, prefix) =
                        prefix.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
                    let dir = slot_dir(prefix, &slot);
                    match fs::create_dir(&dir) {
                        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
                        _ => Ok(dir),
                    }
                };
                Dirs::V1 {
                    cpu: of("cpu")?,
                    cpuacct: of("cpuacct")?,
                    memory: of("memory")?,
                    pids: of("pids")?,
                    freezer: of("freezer")?,
                }
            }
        };
        let mut group =
            Self { dirs, oom_kills_before: 0, limits: None, was_frozen: true, favoured: true };
        group.reset()?;
        group.limit(limits)?;
        Ok(group)
    }

    /// Forgets what the last box of this slot used.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        if let Dirs::V1 { cpuacct, memory, freezer, .. } = &self.dirs {
            put(&cpuacct.join("cpuacct.usage"), "0")?;
            put(&memory.join("memory.max_usage_in_bytes"), "0")?;
            if std::mem::take(&mut self.was_frozen) {
                put(&freezer.join("freezer.state"), "THAWED")?;
            }
            self.oom_kills_before = keyed(&memory.join("memory.oom_control"), "oom_kill");
        }
        Ok(())
    }

    /// Makes the group heavy for a launch, or ends that.
    pub(crate) fn favour(&mut self, favoured: bool) -> io::Result<()> {
        let Some(limits) = self.limits.filter(|_| self.favoured != favoured) else { return Ok(()) };
        self.favoured = favoured;
        let written = self.write_weight(limits.cpu_millis);
        if written.is_err() {
            // What it weighs is unknown until limits are written again.
            self.limits = None;
        }
        written
    }

    fn write_weight(&self, cpu_millis: u32) -> io::Result<()> {
        let shares = shares(cpu_millis, self.favoured);
        match &self.dirs {
            Dirs::V2(dir) => {
                let weight = (shares * 100 / 1024).clamp(1, 10_000);
                put(&dir.join("cpu.weight"), &weight.to_string())
            }
            Dirs::V1 { cpu, .. } => put(&cpu.join("cpu.shares"), &shares.to_string()),
        }
    }

    /// Sets limits.
    pub(crate) fn limit(&mut self, limits: &GroupLimits) -> io::Result<()> {
        if self.limits == Some(*limits) {
            return Ok(());
        }
        // Unknown until all of it is written.
        self.limits = None;
        self.write_limits(limits)?;
        self.limits = Some(*limits);
        Ok(())
    }

    fn write_limits(&self, limits: &GroupLimits) -> io::Result<()> {
        let quota = (u64::from(limits.cpu_millis) * CPU_PERIOD_US / 1000).max(1000);
        let pids = limits.pids.to_string();
        let memory_max = limits.memory_bytes.to_string();
        match &self.dirs {
            Dirs::V2(dir) => {
                put(&dir.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))?;
                self.write_weight(limits.cpu_millis)?;
                put(&dir.join("memory.max"), &memory_max)?;
                let _ = put(&dir.join("memory.swap.max"), "0");
                put(&dir.join("pids.max"), &pids)
            }
            Dirs::V1 { cpu, memory, pids: pids_dir, .. } => {
                put(&cpu.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
                put(&cpu.join("cpu.cfs_quota_us"), &quota.to_string())?;
                self.write_weight(limits.cpu_millis)?;
                put(&memory.join("memory.limit_in_bytes"), &memory_max)?;
                // v1 counts TCP's buffers apart, and only where they are limited; v2 counts them anyway.
                let tcp = memory.join("memory.kmem.tcp.limit_in_bytes");
                let _ = put(&tcp, &(limits.memory_bytes / 4).to_string());
                put(&pids_dir.join("pids.max"), &pids)
            }
        }
    }

    /// For `CLONE_INTO_CGROUP`: the directory, on v2.
    pub(crate) fn clone_target(&self) -> io::Result<Option<File>> {
        match &self.dirs {
            Dirs::V2(dir) => File::open(dir).map(Some),
            Dirs::V1 { .. } => Ok(None),
        }
    }

    /// Files into which a new process writes `0` to enter, on v1.
    pub(crate) fn doors(&self) -> io::Result<Vec<File>> {
        let Dirs::V1 { cpu, cpuacct, memory, pids, freezer } = &self.dirs else {
            return Ok(Vec::new());
        };
        let mut doors = Vec::new();
        for dir in [cpu, cpuacct, memory, pids, freezer] {
            doors.push(OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?);
        }
        Ok(doors)
    }

    /// Freezes or thaws. v1 answers before all are frozen; the state settles by itself.
    pub(crate) fn freeze(&mut self, frozen: bool) -> io::Result<()> {
        self.was_frozen |= frozen;
        match &self.dirs {
            Dirs::V2(dir) => put(&dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            Dirs::V1 { freezer, .. } => {
                put(&freezer.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" })
            }
        }
    }

    /// What the box has used.
    pub(crate) fn stats(&self) -> Stats {
        match &self.dirs {
            Dirs::V2(dir) => Stats {
                cpu_ns: keyed(&dir.join("cpu.stat"), "usage_usec") * 1000,
                memory_bytes: number(&dir.join("memory.current")),
                memory_peak_bytes: number(&dir.join("memory.peak")),
                pids: number(&dir.join("pids.current")),
                oom_kills: keyed(&dir.join("memory.events"), "oom_kill"),
                disk_bytes: 0,
            },
            Dirs::V1 { cpuacct, memory, pids, .. } => Stats {
                cpu_ns: number(&cpuacct.join("cpuacct.usage")),
                memory_bytes: number(&memory.join("memory.usage_in_bytes")),
                memory_peak_bytes: number(&memory.join("memory.max_usage_in_bytes")),
                pids: number(&pids.join("pids.current")),
                oom_kills: keyed(&memory.join("memory.oom_control"), "oom_kill")
                    .saturating_sub(self.oom_kills_before),
                disk_bytes: 0,
            },
        }
    }

    /// Removes the groups; they must be empty.
    pub(crate) fn remove(&self) {
        match &self.dirs {
            Dirs::V2(dir) => drop(fs::remove_dir(dir)),
            Dirs::V1 { cpu, cpuacct, memory, pids, freezer } => {
                for dir in [cpu, cpuacct, memory, pids, freezer] {
                    let _ = fs::remove_dir(dir);
                }
            }
        }
    }

    /// Whether the groups must be made anew for the next box.
    pub(crate) fn is_used_once(&self) -> bool {
        matches!(self.dirs, Dirs::V2(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "4:memory:/process_api/x\n2:cpuacct:/\n1:cpu,other:/a b\n0::/\n";

    #[test]
    fn own_groups_are_found_by_controller() {
        assert_eq!(own_group(HYBRID, "memory").unwrap(), "process_api/x");
        assert_eq!(own_group(HYBRID, "cpu").unwrap(), "a b");
        assert_eq!(own_group(HYBRID, "").unwrap(), "");
        assert_eq!(own_group(HYBRID, "pids"), None);
    }

    #[test]
    fn v2_is_chosen_where_it_has_the_controllers() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        let layout = Layout::find(dir.path(), "0::/system.slice/hostd.service\n", "ab").unwrap();
        let wanted = dir.path().join("system.slice/hostd.service/ab");
        assert_eq!(layout, Layout::V2(wanted));
        let moved = "0::/system.slice/hostd.service/ab-host\n";
        assert_eq!(Layout::find(dir.path(), moved, "ab").unwrap(), layout);
        fs::write(dir.path().join("cgroup.controllers"), "cpuset io\n").unwrap();
        assert!(Layout::find(dir.path(), "0::/\n", "ab").is_err());
    }

    /// What a v2 hierarchy without controllers, as hybrid machines have one, lets us try: to make a group, to have a
    /// process in it, to freeze, thaw and kill it, to remove the group. Limits are not among it.
    #[test]
    fn v2_groups_hold_freeze_and_go() {
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let Some(root) = roots.into_iter().find(|root| root.join("cgroup.procs").exists()) else {
            println!("skipped: no cgroup v2 here");
            return;
        };
        let dir = root.join(format!("volley-test-{}", std::process::id()));
        if fs::create_dir(&dir).is_err() {
            println!("skipped: no right to make cgroups");
            return;
        }
        let limits = None;
        let mut group = Group {
            dirs: Dirs::V2(dir.clone()),
            oom_kills_before: 0,
            limits,
            was_frozen: false,
            favoured: false,
        };
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        put(&dir.join("cgroup.procs"), &child.id().to_string()).unwrap();
        assert!(group.clone_target().unwrap().is_some() && group.doors().unwrap().is_empty());
        let settles = |frozen: u64| {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
            while keyed(&dir.join("cgroup.events"), "frozen") != frozen {
                assert!(std::time::Instant::now() < deadline, "never frozen {frozen}");
            }
        };
        group.freeze(true).unwrap();
        settles(1);
        // v2 kills what is frozen.
        child.kill().unwrap();
        child.wait().unwrap();
        group.freeze(false).unwrap();
        settles(0);
        assert_eq!(group.stats().pids, 0);
        group.remove();
        assert!(!dir.exists() && group.is_used_once());
    }

    #[test]
    fn groups_of_older_builds_are_found_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("memory/volley-ab");
        let all = ["volley-ab/slot-1", "volley-ab-slot-2", "volley-abc-slot-1"]
            .map(|name| dir.path().join("memory").join(name));
        for (group, pid) in all.iter().zip(["11\n", "12\n", "13\n"]) {
            fs::create_dir_all(group).unwrap();
            fs::write(group.join("cgroup.procs"), pid).unwrap();
        }
        let layout = Layout::V1(vec![("memory", prefix.clone())]);
        assert_eq!(layout.processes(), [11, 12]);
        for group in &all {
            fs::remove_file(group.join("cgroup.procs")).unwrap();
        }
        assert_eq!(layout.remove_all(), 0);
        assert_eq!(all.map(|group| group.exists()), [false, false, true]);
        assert!(!prefix.exists());
    }

    #[test]
    fn a_favoured_group_weighs_less_than_the_spawner() {
        assert_eq!((shares(1000, false), shares(1000, true)), (1024, 16_384));
        assert_eq!((shares(1, false), shares(8000, true)), (2, FAVOURED_MAX));
        // A box of very many cores weighs what it should.
        assert_eq!(shares(100_000, true), shares(100_000, false));
    }

    #[test]
    fn v1_needs_every_controller() {
        let dir = tempfile::tempdir().unwrap();
        for controller in V1 {
            assert!(Layout::find(dir.path(), HYBRID, "ab").is_err());
            fs::create_dir(dir.path().join(controller)).unwrap();
            fs::write(dir.path().join(controller).join("tasks"), "").unwrap();
        }
        let Layout::V1(list) = Layout::find(dir.path(), HYBRID, "ab").unwrap() else { panic!() };
        assert_eq!(list.len(), V1.len());
    }
}
