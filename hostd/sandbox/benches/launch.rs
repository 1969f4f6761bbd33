//! How fast boxes are, beside crun and runc in the same run.
//!
//! `cargo bench -p hostd-sandbox`. Prints request -> first instruction (one at a time, rounds of each
//! kind in turn), the steps of a claim, and whole lives a second beside the bare clone and exec.
//! `VOLLEY_ROUNDS` (default 300) and `VOLLEY_LIVES` (default 2000) bound it. As root.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hostd_sandbox::{
    ClaimSpec, Config, Event, Joined, Limits, Program, RootSpec, Shape, Spawner, Steps, bench,
};

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn main() {
    hostd_sandbox::main_if_asked();
    if std::env::args().any(|a| a == "--list") {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: boxes need root");
        return;
    }
    let Some(tiny) = bench::tiny_program() else {
        println!("skipped: no tiny program for this machine");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    for name in ["proc", "dev", "sys", "etc"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::write(root.join("tiny"), tiny).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(root.join("tiny"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
    let shape = Shape {
        name: "small".into(),
        cpu_millis: 2000,
        memory_bytes: 128 << 20,
        pids: 64,
        parked: 32,
    };
    let config = Config { slots: 128, ..Config::new(dir.path().join("state"), vec![shape]) };
    let Joined { spawner, mut events, .. } = Spawner::connect_or_start(&config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    latency(&spawner, &mut events, &runtime, &root, dir.path());
    lives(&spawner, events, &runtime, &root);
    runtime.block_on(spawner.shutdown(true)).unwrap();
    idle(dir.path(), &runtime);
}

/// What a parked box costs in memory, by what the machine has left.
fn idle(dir: &Path, runtime: &tokio::runtime::Runtime) {
    let boxes = u32::try_from(number("VOLLEY_IDLE", 500)).unwrap();
    let shape = Shape {
        name: "small".into(),
        cpu_millis: 1000,
        memory_bytes: 128 << 20,
        pids: 64,
        parked: boxes,
    };
    let config = Config { slots: boxes, ..Config::new(dir.join("idle"), vec![shape]) };
    let available = || {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let (before, start) = (available(), Instant::now());
    let Joined { spawner, .. } = Spawner::connect_or_start(&config).unwrap();
    while runtime.block_on(spawner.pool()).unwrap()[0].parked < boxes {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (after, time) = (available(), start.elapsed());
    let each = before.saturating_sub(after) / u64::from(boxes);
    let rate = f64::from(boxes) / time.as_secs_f64();
    println!("{boxes} parked boxes: {each} KiB each (MemAvailable), made at {rate:.0} a second");
    runtime.block_on(spawner.shutdown(true)).unwrap();
}

fn spec(root: &Path, id: u128) -> ClaimSpec {
    ClaimSpec {
        id: id.to_be_bytes(),
        shape: "small".into(),
        root: RootSpec::directory(root).unwrap(),
        program: Program::new(["/tiny"]),
        hostname: String::new(),
        limits: Limits::default(),
        network: None,
    }
}

fn quantiles(name: &str, mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    let at = |q: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let index = ((times.len() - 1) as f64 * q) as usize;
        times[index]
    };
    let us = |ns: u64| ns / 1000;
    println!(
        "{name:28} min {:>6} us  p50 {:>6} us  p90 {:>6} us  p99 {:>6} us  max {:>6} us",
        us(at(0.0)),
        us(at(0.5)),
        us(at(0.9)),
        us(at(0.99)),
        us(at(1.0))
    );
    at(0.5)
}

fn latency(
    spawner: &Spawner,
    events: &mut hostd_sandbox::Events,
    runtime: &tokio::runtime::Runtime,
    root: &Path,
    dir: &Path,
) {
    let rounds = number("VOLLEY_ROUNDS", 300);
    let drained = drain_unified(dir);
    let peers: Vec<(&str, PathBuf)> = ["crun", "runc"]
        .into_iter()
        .filter_map(|name| Some((name, bundle(name, root, dir)?)))
        .collect();
    let mut ours = Vec::new();
    let mut steps = Vec::new();
    let mut theirs = vec![Vec::new(); peers.len()];
    for round in 0..rounds {
        let start = bench::now_ns();
        let running = spawner.claim_blocking(spec(root, round as u128)).unwrap();
        let first = bench::read_first_instruction(running.stdio.stdout.unwrap()).unwrap();
        ours.push(first - start);
        steps.push((start, running.steps, first));
        wait_for_end(runtime, events);
        // A pause about as long as a launch: the pool refills, the machine is half idle.
        std::thread::sleep(Duration::from_millis(2));
        if round % 10 == 0 {
            for (at, (name, bundle)) in peers.iter().enumerate() {
                theirs[at].push(peer(name, bundle, round));
            }
        }
    }
    if let Some(mount) = drained {
        let _ = rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH);
    }
    println!("request -> first instruction, one at a time, pool warm, {rounds} rounds");
    let median = quantiles("volley", ours);
    for ((name, _), times) in peers.iter().zip(theirs) {
        let peer = quantiles(&format!("{name} run"), times);
        #[expect(clippy::cast_precision_loss, reason = "microseconds")]
        let ratio = peer as f64 / median as f64;
        println!("{name} / volley at p50: {ratio:.1}x");
    }
    print_steps(&steps);
}

fn print_steps(steps: &[(u64, Steps, u64)]) {
    type Step = (&'static str, fn(&(u64, Steps, u64)) -> u64);
    let named: [Step; 9] = [
        ("  cloned and sent", |(t, s, _)| s.claim_sent - t),
        ("  read by the spawner", |(_, s, _)| s.received - s.claim_sent),
        ("  root composed, sent on", |(_, s, _)| s.composed - s.received),
        ("  read by the box", |(_, s, _)| s.woken - s.composed),
        ("  mounted", |(_, s, _)| s.mounted - s.woken),
        ("  pivoted", |(_, s, _)| s.pivoted - s.mounted),
        ("  confined", |(_, s, _)| s.confined - s.pivoted),
        ("  first instruction", |(_, s, first)| first - s.confined),
        ("  answered, from request", |(t, s, _)| s.answered - t),
    ];
    for (name, step) in named {
        quantiles(name, steps.iter().map(step).collect());
    }
}

fn wait_for_end(runtime: &tokio::runtime::Runtime, events: &mut hostd_sandbox::Events) {
    runtime
        .block_on(async { while !matches!(events.recv().await, Some(Event::Exited(_)) | None) {} });
}

/// A bundle with the peer's own default configuration, our program and no terminal.
fn bundle(peer: &str, root: &Path, dir: &Path) -> Option<PathBuf> {
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
fn drain_unified(dir: &Path) -> Option<PathBuf> {
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

fn peer(name: &str, bundle: &Path, round: usize) -> u64 {
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

/// CPU time of a process so far, microseconds.
fn cpu_of(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit(')').next().unwrap();
    let ticks: u64 =
        after.split_whitespace().skip(11).take(2).map(|t| t.parse::<u64>().unwrap()).sum();
    ticks * 10_000
}

fn held_by(pid: u32) -> String {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("?");
    format!("{fds} descriptors, {mounts} mounts, {} resident", memory.trim())
}

fn lives(
    spawner: &Spawner,
    mut events: hostd_sandbox::Events,
    runtime: &tokio::runtime::Runtime,
    root: &Path,
) {
    let lives = number("VOLLEY_LIVES", 2000);
    println!("whole lives (claim, run, reap, refill), {lives} of them");
    let before = held_by(spawner.pid());
    for in_flight in [1, 4, 8, 16] {
        let start = Instant::now();
        let (spawner_before, ours_before) = (cpu_of(spawner.pid()), cpu_of(std::process::id()));
        let mut in_boxes = 0;
        runtime.block_on(async {
            let (mut begun, mut ended) = (0_usize, 0_usize);
            let mut claims = Vec::new();
            while ended < lives {
                while begun < lives && begun - ended < in_flight {
                    let (spawner, spec) = (spawner.clone(), spec(root, begun as u128 | 1 << 64));
                    let claim = async move { spawner.claim(spec).await.map(drop) };
                    claims.push(Box::pin(claim));
                    begun += 1;
                }
                for claim in claims.drain(..) {
                    claim.await.unwrap();
                }
                match events.recv().await {
                    Some(Event::Exited(e)) => {
                        spawner.forget(e.id).await.unwrap();
                        in_boxes += e.stats.cpu_ns / 1000;
                        ended += 1;
                    }
                    Some(_) => {}
                    None => panic!("the spawner is gone"),
                }
            }
        });
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let rate = lives as f64 / start.elapsed().as_secs_f64();
        let each = |total: u64| total / lives as u64;
        println!(
            "  {in_flight:>3} in flight: {rate:.0} a second; CPU a life: boxes {} us, spawner {} us, \
             this program {} us",
            each(in_boxes),
            each(cpu_of(spawner.pid()) - spawner_before),
            each(cpu_of(std::process::id()) - ours_before)
        );
    }
    println!("  spawner: {before} before, {} after", held_by(spawner.pid()));
    let program = root.join("tiny");
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..lives / 2).for_each(|_| bench::bare_life(&program).unwrap()));
        }
    });
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let rate = lives as f64 / start.elapsed().as_secs_f64();
    println!("  bare clone into seven namespaces + exec + wait, two at once: {rate:.0} a second");
}
