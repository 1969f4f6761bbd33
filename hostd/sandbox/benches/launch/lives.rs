//! Whole lives a second beside the bare clone and exec, and latency at half of that load.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::time::{Duration, Instant};

use hostd_sandbox::{Event, bench};

use crate::{Bench, Table, ms, number, quantile, quantiles, spec};

/// CPU time of a process so far, microseconds.
fn cpu_of(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit(')').next().unwrap();
    let ticks: u64 =
        after.split_whitespace().skip(11).take(2).map(|t| t.parse::<u64>().unwrap()).sum();
    ticks * 10_000
}

/// Runs lives, some at once; returns the rate and the CPU time in boxes.
pub(crate) fn live(bench: &mut Bench, lives: usize, in_flight: usize) -> (f64, u64) {
    let Bench { spawner, events, runtime, root, .. } = bench;
    let start = Instant::now();
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
    (rate, in_boxes)
}

pub(crate) fn run(bench: &mut Bench, table: &mut Table) -> f64 {
    let lives = number("VOLLEY_LIVES", 2000);
    println!("whole lives (claim, run, reap, refill), {lives} of them");
    let mut best = (0.0, 0);
    for in_flight in [1, 4, 8, 16] {
        let (pid, own) = (bench.spawner.pid(), std::process::id());
        let (spawner_before, ours_before) = (cpu_of(pid), cpu_of(own));
        let (rate, in_boxes) = live(bench, lives, in_flight);
        let each = |total: u64| total / lives as u64;
        println!(
            "  {in_flight:>3} in flight: {rate:.0} a second; CPU a life: boxes {} us, spawner {} us, \
             this program {} us",
            each(in_boxes),
            each(cpu_of(pid) - spawner_before),
            each(cpu_of(own) - ours_before)
        );
        if rate > best.0 {
            best = (rate, in_flight);
        }
    }
    let floor = bare(bench, lives);
    println!("  bare clone into seven namespaces + exec + wait, two at once: {floor:.0} a second");
    let (rate, in_flight) = best;
    let said = format!("{rate:.0}/s ({in_flight} in flight)");
    table.add("whole lives", said, "at least 500/s", Some(rate >= 500.0));
    let share = 100.0 * rate / floor;
    table.add("  of bare clone + exec + wait", format!("{share:.0} % of {floor:.0}/s"), "", None);
    rate
}

/// The floor: two at once, as there are two cores.
fn bare(bench: &Bench, lives: usize) -> f64 {
    let program = bench.root.join("tiny");
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..lives / 2).for_each(|_| bench::bare_life(&program).unwrap()));
        }
    });
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let rate = lives as f64 / start.elapsed().as_secs_f64();
    rate
}

/// Claims at half of the rate that was reached, at even times, whether those before have ended or not: latency counts
/// from when each was due.
pub(crate) fn half_load(bench: &mut Bench, table: &mut Table, rate: f64, idle_median: u64) {
    let rounds = number("VOLLEY_LIVES", 2000);
    let every = Duration::from_secs_f64(2.0 / rate);
    let (sender, times) = std::sync::mpsc::sync_channel(rounds);
    let Bench { spawner, events, runtime, root, .. } = bench;
    let begun = Instant::now();
    let begun_ns = bench::now_ns();
    let (threads, spawner) = (4_u32, spawner.clone());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (spawner, sender, root) = (spawner.clone(), sender.clone(), root.clone());
            scope.spawn(move || {
                for round in (thread..u32::try_from(rounds).unwrap()).step_by(threads as usize) {
                    let due = every * round;
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                    let id = u128::from(round) | 2 << 64;
                    let running = spawner.claim_blocking(spec(&root, id)).unwrap();
                    let stdout = running.stdio.stdout.unwrap();
                    let first = bench::read_first_instruction(stdout).unwrap();
                    let due_ns = begun_ns + u64::try_from(due.as_nanos()).unwrap();
                    sender.send(first.saturating_sub(due_ns)).unwrap();
                }
            });
        }
        let mut ended = 0;
        runtime.block_on(async {
            while ended < rounds {
                if let Event::Exited(e) = events.recv().await.expect("the spawner lives") {
                    spawner.forget(e.id).await.unwrap();
                    ended += 1;
                }
            }
        });
    });
    drop(sender);
    let name = format!("at {:.0} a second", rate / 2.0);
    let times = quantiles(&name, times.into_iter().collect());
    let (p50, p99) = (quantile(&times, 0.5), quantile(&times, 0.99));
    table.add("first instruction, half load, p50", ms(p50), "", None);
    table.add("first instruction, half load, p99", ms(p99), "at most 5 ms", Some(p99 <= 5_000_000));
    #[expect(clippy::cast_precision_loss, reason = "microseconds")]
    let ratio = p50 as f64 / idle_median as f64;
    println!("  p50 is {ratio:.1} times that of one at a time");
}
