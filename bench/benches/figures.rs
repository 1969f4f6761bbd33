//! The parts' figures without the front door: `cargo bench -p bench --bench figures -- pick heartbeat map`.
//!
//! Without a name it runs all. `--quick` makes small short rounds, to see that they run; `--json` prints for programs.
//! As a test (`cargo test --benches`) it is quick.

use std::{process::ExitCode, time::Duration};

use bench::{heartbeat, map, pick};
use wire::Fault;

fn show(json: bool, report: &(impl serde::Serialize + std::fmt::Display)) {
    match serde_json::to_string(report) {
        Ok(text) if json => println!("{text}"),
        _ => println!("{report}"),
    }
}

fn run(args: &[String]) -> Result<(), Fault> {
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let quick = has("--quick") || has("--test") || !has("--bench");
    let named = ["pick", "heartbeat", "map"].iter().any(|name| has(name));
    let (wanted, json) = (|name: &str| !named || has(name), has("--json"));
    if wanted("pick") {
        let mut options = pick::Options::default();
        if quick {
            options =
                pick::Options { hosts: vec![1_000, 10_000], picks: 10_000, rounds: 1, ..options };
        }
        show(json, &pick::run(&options)?);
        if !quick {
            show(json, &pick::run(&pick::Options { huge: false, ..options })?);
        }
    }
    if wanted("heartbeat") {
        let mut options = heartbeat::Options::default();
        if quick {
            let time = Duration::from_millis(100);
            options = heartbeat::Options { hosts: 1_000, rounds: 1, time, ..options };
        }
        show(json, &heartbeat::run(&options)?);
    }
    if wanted("map") {
        let mut options = map::Options::default();
        if quick {
            options = map::Options { hosts: 10_000, rounds: 1, ..options };
        }
        show(json, &map::run(&options)?);
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("error: {fault}");
            ExitCode::FAILURE
        }
    }
}
