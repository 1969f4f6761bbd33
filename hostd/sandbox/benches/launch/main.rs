//! How fast boxes are, beside crun and runc in the same run, as one table of figures and goals.
//!
//! `cargo bench -p hostd-sandbox`, as root. Rounds of each kind alternate, so that all see the same machine. What was
//! measured is told as it comes, and at the end the table. `VOLLEY_ROUNDS` (300), `VOLLEY_LIVES` (2000) and `VOLLEY_IDLE`
//! (1000) bound it. `VOLLEY_ONLY=latency|bombs` runs that part alone, `VOLLEY_BOMBS=memory,log` with these bombs alone. `VOLLEY_SOAK=100000` runs so many lives instead, and says what they left behind.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

mod bombs;
mod idle;
mod lives;
mod peers;
mod soak;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hostd_sandbox::{
    ClaimSpec, Config, Event, Joined, Limits, Program, RootSpec, Shape, Spawner, Steps, bench,
};

pub(crate) fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// One line of the table.
pub(crate) struct Figure {
    name: String,
    measured: String,
    goal: String,
    met: Option<bool>,
}

/// The table as it grows.
#[derive(Default)]
pub(crate) struct Table(Vec<Figure>);

impl Table {
    pub(crate) fn add(&mut self, name: &str, measured: String, goal: &str, met: Option<bool>) {
        self.0.push(Figure { name: name.into(), measured, goal: goal.into(), met });
    }

    fn print(&self) {
        println!("\n{:44} {:>34}  {:26} met", "figure", "measured", "goal");
        for Figure { name, measured, goal, met } in &self.0 {
            let met = met.map_or("", |met| if met { "yes" } else { "NO" });
            println!("{name:44} {measured:>34}  {goal:26} {met}");
        }
    }
}

/// What the parts share.
pub(crate) struct Bench {
    pub(crate) spawner: Spawner,
    pub(crate) events: hostd_sandbox::Events,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) root: PathBuf,
    pub(crate) dir: PathBuf,
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
    let (Some(tiny), Some(sleeper)) = (bench::tiny_program(), bench::idle_program()) else {
        println!("skipped: no tiny program for this machine");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("rootfs");
    for name in ["proc", "dev", "sys", "etc"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    use std::os::unix::fs::PermissionsExt;
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    for (name, program) in [("tiny", tiny), ("idle", sleeper)] {
        std::fs::write(root.join(name), program).unwrap();
        open(&root.join(name));
    }
    open(&root);
    let config = Config { slots: 128, ..Config::new(dir.path().join("state"), vec![shape(32)]) };
    let Joined { spawner, events, .. } = Spawner::connect_or_start(&config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut bench = Bench { spawner, events, runtime, root, dir: dir.path().to_owned() };
    let mut table = Table::default();
    let soak = number("VOLLEY_SOAK", 0);
    if soak > 0 {
        soak::run(&mut bench, soak, &mut table);
        table.print();
        bench.runtime.block_on(bench.spawner.shutdown(true)).unwrap();
        return;
    }
    let only = std::env::var("VOLLEY_ONLY").unwrap_or_default();
    if !only.is_empty() {
        match only.as_str() {
            "latency" => drop(latency(&mut bench, &mut table)),
            "bombs" => bombs::run(&mut bench, &mut table),
            other => println!("VOLLEY_ONLY={other}: no such part"),
        }
        bench.runtime.block_on(bench.spawner.shutdown(true)).unwrap();
        table.print();
        return;
    }
    let median = latency(&mut bench, &mut table);
    let rate = lives::run(&mut bench, &mut table);
    lives::half_load(&mut bench, &mut table, rate, median);
    bombs::run(&mut bench, &mut table);
    bench.runtime.block_on(bench.spawner.shutdown(true)).unwrap();
    idle::run(&bench.dir, &bench.root, &bench.runtime, &mut table);
    table.print();
}

pub(crate) fn shape(parked: u32) -> Shape {
    Shape { name: "small".into(), cpu_millis: 2000, memory_bytes: 128 << 20, pids: 64, parked }
}

pub(crate) fn spec(root: &Path, id: u128) -> ClaimSpec {
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

/// The value below which a share of sorted times lies.
pub(crate) fn quantile(sorted: &[u64], q: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let index = ((sorted.len() - 1) as f64 * q) as usize;
    sorted[index]
}

/// Prints and returns them sorted.
pub(crate) fn quantiles(name: &str, mut times: Vec<u64>) -> Vec<u64> {
    times.sort_unstable();
    let us = |q: f64| quantile(&times, q) / 1000;
    println!(
        "{name:28} min {:>6} us  p50 {:>6} us  p90 {:>6} us  p99 {:>6} us  max {:>6} us",
        us(0.0),
        us(0.5),
        us(0.9),
        us(0.99),
        us(1.0)
    );
    times
}

pub(crate) fn ms(ns: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "milliseconds for people")]
    let ms = ns as f64 / 1e6;
    format!("{ms:.2} ms")
}

fn latency(bench: &mut Bench, table: &mut Table) -> u64 {
    let rounds = number("VOLLEY_ROUNDS", 300);
    let drained = peers::drain_unified(&bench.dir);
    let peers: Vec<(&str, PathBuf)> = ["crun", "runc"]
        .into_iter()
        .filter_map(|name| Some((name, peers::bundle(name, &bench.root, &bench.dir)?)))
        .collect();
    let mut ours = Vec::new();
    let mut steps = Vec::new();
    let mut theirs = vec![Vec::new(); peers.len()];
    for round in 0..rounds {
        let start = bench::now_ns();
        let running = bench.spawner.claim_blocking(spec(&bench.root, round as u128)).unwrap();
        let first = bench::read_first_instruction(running.stdio.stdout.unwrap()).unwrap();
        ours.push(first - start);
        steps.push((start, running.steps, first));
        wait_for_end(bench, (round as u128).to_be_bytes());
        // A pause about as long as a launch: the pool refills, the machine is half idle.
        std::thread::sleep(Duration::from_millis(2));
        if round % 10 == 0 {
            for (at, (name, bundle)) in peers.iter().enumerate() {
                theirs[at].push(peers::peer(name, bundle, round));
            }
        }
    }
    if let Some(mount) = drained {
        let _ = rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH);
    }
    println!("request -> first instruction, one at a time, pool warm, {rounds} rounds");
    let ours = quantiles("volley", ours);
    let median = quantile(&ours, 0.5);
    table.add(
        "first instruction, idle, p50",
        ms(median),
        "at most 1.3 ms",
        Some(median <= 1_300_000),
    );
    table.add("first instruction, idle, p99", ms(quantile(&ours, 0.99)), "", None);
    for ((name, _), times) in peers.iter().zip(theirs) {
        let peer = quantile(&quantiles(&format!("{name} run"), times), 0.5);
        #[expect(clippy::cast_precision_loss, reason = "microseconds")]
        let ratio = peer as f64 / median as f64;
        let met = (*name == "crun").then_some(ratio >= 15.0);
        let goal = if *name == "crun" { "at least 15 times ours" } else { "" };
        let said = format!("{} ({ratio:.1} times ours)", ms(peer));
        table.add(&format!("{name} run, p50"), said, goal, met);
    }
    print_steps(&steps);
    median
}

pub(crate) fn print_steps(steps: &[(u64, Steps, u64)]) {
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

/// Waits for the end of one sandbox; that of others, such as of a bomb, is passed over.
pub(crate) fn wait_for_end(bench: &mut Bench, id: hostd_sandbox::SandboxId) {
    let Bench { runtime, events, .. } = bench;
    let ended = |event: &Option<Event>| match event {
        Some(Event::Exited(exited)) => exited.id == id,
        other => other.is_none(),
    };
    runtime.block_on(async { while !ended(&events.recv().await) {} });
}
