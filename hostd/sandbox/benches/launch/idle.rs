//! What idle boxes cost in memory, by what the machine has left: parked ones, and running ones whose program sleeps.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::path::Path;
use std::time::{Duration, Instant};

use hostd_sandbox::{Config, Joined, Program, Spawner};

use crate::{Table, number, shape, spec};

fn available_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

pub(crate) fn run(dir: &Path, root: &Path, runtime: &tokio::runtime::Runtime, table: &mut Table) {
    let boxes = u32::try_from(number("VOLLEY_IDLE", 1000)).unwrap();
    let config = Config { slots: boxes, ..Config::new(dir.join("idle"), vec![shape(boxes)]) };
    let (before, start) = (available_kib(), Instant::now());
    let Joined { spawner, events: _events, .. } = Spawner::connect_or_start(&config).unwrap();
    while runtime.block_on(spawner.pool()).unwrap()[0].parked < boxes {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (parked, time) = (available_kib(), start.elapsed());
    let mut stdio = Vec::new();
    for id in 0..boxes {
        let mut spec = spec(root, u128::from(id) | 3 << 64);
        spec.program = Program::new(["/idle"]);
        stdio.push(spawner.claim_blocking(spec).unwrap().stdio);
    }
    let running = available_kib();
    let each = |after: u64| before.saturating_sub(after) / u64::from(boxes);
    let rate = f64::from(boxes) / time.as_secs_f64();
    println!("{boxes} boxes: made at {rate:.0} a second");
    for (name, kib) in [("parked", each(parked)), ("running, program asleep", each(running))] {
        let name = format!("an idle box of {boxes}, {name}");
        let met = (boxes >= 1000).then_some(kib <= 1536);
        table.add(&name, format!("{kib} KiB"), "at most 1,536 KiB", met);
    }
    runtime.block_on(spawner.shutdown(true)).unwrap();
}
