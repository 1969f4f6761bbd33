//! crun and runc, run on the same program in the same run.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hostd_sandbox::bench;

/// A bundle with the peer's own default configuration, our program and no terminal.
pub(crate) fn bundle(peer: &str, root: &Path, dir: &Path) -> Option<PathBuf> {
    let bundle = dir.join(peer);
    std::fs::create_dir_all(&bundle).unwrap();
    let spec = Command::new(peer).arg("spec").current_dir(&bundle).status();
    if !spec.is_ok_and(|s| s.success()) {
        println!("skipped: {peer} is not installed");
        return None;
    }
    let path = bundle.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config
        .replace("\"terminal\": true", "\"terminal\": false")
        .replace("\"sh\"", "\"/tiny\"")
        .replace("\"path\": \"rootfs\"", &format!("\"path\": \"{}\"", root.display()));
    std::fs::write(&path, config).unwrap();
    let trial = Command::new(peer)
        .args(["run", "--bundle", bundle.to_str().unwrap(), "volley-bench-trial"])
        .output()
        .unwrap();
    if trial.stdout.len() != 16 {
        let why = String::from_utf8_lossy(&trial.stderr).into_owned();
        println!("skipped: {peer} does not run here: {}", why.trim());
        return None;
    }
    Some(bundle)
}

/// crun refuses hybrid cgroups while v2 holds a controller; where that is hugetlb alone, a v1 mount of it
/// takes it away for the time of the bench.
pub(crate) fn drain_unified(dir: &Path) -> Option<PathBuf> {
    let left = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").ok()?;
    if left.trim() != "hugetlb" {
        return None;
    }
    let mount = dir.join("hugetlb");
    std::fs::create_dir_all(&mount).ok()?;
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("cgroup", &mount, "cgroup", flags, c"hugetlb").ok()?;
    Some(mount)
}

pub(crate) fn peer(name: &str, bundle: &Path, round: usize) -> u64 {
    let start = bench::now_ns();
    let mut child = Command::new(name)
        .args(["run", "--bundle", bundle.to_str().unwrap(), &format!("volley-bench-{round}")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let first = bench::read_first_instruction(stdout.into()).unwrap();
    child.wait().unwrap();
    first - start
}
