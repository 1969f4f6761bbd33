//! A neighbour's launches beside bombs of every kind (FAULTS I7): processes, memory, disk, inodes, log.

use hostd_sandbox::{ClaimSpec, Limits, Program, RootSpec, bench};

#[path = "../../tests/house/mod.rs"]
mod house;

use hostd_sandbox::Steps;

use crate::{Bench, Table, ms, number, print_steps, quantile, quantiles, spec};

const BOMBS: [(&str, &str); 5] = [
    ("processes", "f() { f | f & }; f & exec sleep 1000"),
    ("memory", "while :; do tail /dev/zero; done"),
    ("disk", "while :; do dd if=/dev/zero of=/f bs=1M count=64; done 2>/dev/null"),
    ("inodes", "i=0; while :; do : > /i$i; i=$((i+1)); done 2>/dev/null"),
    ("log", "while :; do echo flood flood flood; done"),
];

pub(crate) fn run(bench: &mut Bench, table: &mut Table) {
    let rounds = number("VOLLEY_ROUNDS", 300);
    let shell = house::root();
    let wanted = std::env::var("VOLLEY_BOMBS").unwrap_or_default();
    let quiet = told("a neighbour alone", &times(bench, rounds, 4 << 64));
    let mut running = Vec::new();
    for (nth, (name, bomb)) in (0_u128..).zip(BOMBS) {
        if !wanted.is_empty() && !wanted.split(',').any(|w| w == name) {
            continue;
        }
        let limits = Limits {
            // A tenth of a core each: the rest is the neighbour's.
            cpu_millis: Some(100),
            disk_bytes: 16 << 20,
            inodes: 500,
            ..Limits::default()
        };
        let spec = ClaimSpec {
            root: RootSpec::directory(shell.path()).unwrap(),
            program: Program::new(["/bin/sh", "-c", bomb]),
            limits,
            ..spec(&bench.root, nth | 5 << 64)
        };
        running.push(bench.spawner.claim_blocking(spec).unwrap());
    }
    let loud = told("beside five bombs", &times(bench, rounds, 6 << 64));
    for bomb in &running {
        // One that the kernel has ended for want of memory is gone already.
        let _ = bench.runtime.block_on(bench.spawner.kill(bomb.id));
    }
    for (name, q, bounded) in [("p50", 0.5, false), ("p99", 0.99, true)] {
        let (alone, beside) = (quantile(&quiet, q), quantile(&loud, q));
        #[expect(clippy::cast_precision_loss, reason = "microseconds")]
        let ratio = beside as f64 / alone as f64;
        let said = format!("{} / {} = {ratio:.2}", ms(beside), ms(alone));
        let goal = if bounded { "at most 1.5 times" } else { "" };
        table.add(
            &format!("a neighbour's {name} beside five bombs"),
            said,
            goal,
            bounded.then_some(ratio <= 1.5),
        );
    }
}

type Time = (u64, Steps, u64);

/// Prints them with their steps; returns them sorted.
fn told(name: &str, times: &[Time]) -> Vec<u64> {
    let sorted = quantiles(name, times.iter().map(|(start, _, first)| first - start).collect());
    print_steps(times);
    sorted
}

fn times(bench: &mut Bench, rounds: usize, ids: u128) -> Vec<Time> {
    (0..rounds)
        .map(|round| {
            let start = bench::now_ns();
            let spec = spec(&bench.root, round as u128 | ids);
            let running = bench.spawner.claim_blocking(spec).unwrap();
            let first = bench::read_first_instruction(running.stdio.stdout.unwrap()).unwrap();
            crate::wait_for_end(bench, (round as u128 | ids).to_be_bytes());
            std::thread::sleep(std::time::Duration::from_millis(2));
            (start, running.steps, first)
        })
        .collect()
}
