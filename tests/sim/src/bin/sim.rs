//! The simulator as a program: `sim lite|swarm|replay|scale|grid`.
//!
//! `sim lite` runs fixed seeds and a fresh one; `sim swarm [SEEDS [FIRST]]` many, a thread a core; `sim replay SEED` tells
//! one again; `sim scale` runs a million hosts and says what it took; `sim grid [DIR]` writes `staleness.md` and
//! `staleness.png`. Exit status 1 if a rule was broken or a limit passed.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use rand::{TryRngCore, rngs::OsRng};
use tests_sim::{grid, scale, swarm};

/// NUMBERS P9.
const SCALE_SECONDS_MAX: f64 = 30.0;
const SCALE_KIB_MAX: u64 = 1 << 20;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|text| text.parse::<u64>().ok());
    let good = match args.first().map(String::as_str) {
        Some("lite") => seeds(60, 1) && seeds(4, fresh()),
        Some("swarm") => seeds(number(1).unwrap_or(10_000), number(2).unwrap_or_else(fresh)),
        Some("replay") => number(1).is_some_and(replay),
        Some("scale") => scaled(number(1).unwrap_or(1_000_000)),
        Some("grid") => gridded(args.get(1).map_or("bench", String::as_str)),
        _ => {
            eprintln!(
                "usage: sim lite | swarm [SEEDS [FIRST]] | replay SEED | scale [HOSTS] | grid [DIR]"
            );
            return ExitCode::from(2);
        }
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn fresh() -> u64 {
    OsRng.try_next_u64().unwrap_or(0) >> 24
}

fn seeds(count: u64, first: u64) -> bool {
    let (begun, next, broken) = (Instant::now(), AtomicU64::new(0), AtomicU64::new(0));
    let (events, launches) = (AtomicU64::new(0), AtomicU64::new(0));
    println!("{count} seeds from {first}");
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count {
                        return;
                    }
                    match swarm::check(first.wrapping_add(at)) {
                        Ok(outcome) => {
                            events.fetch_add(outcome.events, Ordering::Relaxed);
                            let offered = outcome.span(0, usize::MAX).offered;
                            launches.fetch_add(offered, Ordering::Relaxed);
                        }
                        Err(why) => {
                            broken.fetch_add(1, Ordering::Relaxed);
                            println!("{why}");
                        }
                    }
                }
            });
        }
    });
    let broken = broken.into_inner();
    println!(
        "{count} seeds from {first}: {broken} broke a rule; {} launches, {} events, {:.1} s",
        launches.into_inner(),
        events.into_inner(),
        begun.elapsed().as_secs_f64()
    );
    broken == 0
}

fn replay(seed: u64) -> bool {
    let options = swarm::options(seed);
    println!("{options:#?}");
    let result = swarm::check(seed);
    match &result {
        Ok(outcome) => println!(
            "seed {seed} holds: digest {:016x}, {} events, success {:.5}, attempts a launch {:.3}, \
             ends {:?}",
            outcome.digest,
            outcome.events,
            outcome.success(0, usize::MAX),
            outcome.attempts_a_launch(),
            outcome.codes
        ),
        Err(why) => println!("{why}"),
    }
    result.is_ok()
}

/// A line of /proc/self/status, in KiB.
fn status_kib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

fn scaled(hosts: u64) -> bool {
    let begun = Instant::now();
    let size = scale::Size {
        seed: 1,
        hosts: usize::try_from(hosts).unwrap_or(usize::MAX),
        seconds: 60,
        launches: hosts,
    };
    let scaled = scale::run(size);
    let (seconds, kib) = (begun.elapsed().as_secs_f64(), status_kib("VmHWM"));
    println!("{scaled:#?}");
    println!(
        "{hosts} hosts x {} simulated seconds: {seconds:.1} s, {} MiB",
        size.seconds,
        kib >> 10
    );
    let served = scaled.started * 10_000 >= scaled.offered * 9_999;
    served && seconds <= SCALE_SECONDS_MAX && kib <= SCALE_KIB_MAX
}

fn gridded(dir: &str) -> bool {
    match grid::write(std::path::Path::new(dir)) {
        Ok(()) => true,
        Err(why) => {
            eprintln!("the grid was not written: {why}");
            false
        }
    }
}
