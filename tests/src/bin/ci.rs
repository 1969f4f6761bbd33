//! `cargo ci`: the one command that checks everything, here and in CI.
//!
//! Cheapest first, so that a slip costs seconds; each step is timed, and the first that fails ends the run with the
//! command that repeats it. It is a program and not a script so that it runs wherever Rust does. Left out: installing
//! what is missing, which is `.ci/run`'s part.

use std::{
    env,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

/// One check.
struct Step {
    name: &'static str,
    args: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
}

const STEPS: &[Step] = &[
    Step { name: "format", args: &["fmt", "--all", "--check"], env: &[] },
    Step {
        name: "lints",
        args: &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"],
        env: &[],
    },
    Step {
        name: "docs",
        args: &["doc", "--workspace", "--no-deps", "--locked"],
        env: &[("RUSTDOCFLAGS", "-D warnings")],
    },
    // What tests print is shown, so that none is skipped silently.
    Step {
        name: "tests",
        args: &["test", "--workspace", "--locked"],
        env: &[("RUST_TEST_NOCAPTURE", "1")],
    },
    // Every interleaving of what is lock-free. In its own directory: the flag changes every crate.
    Step {
        name: "loom",
        args: &[
            "test",
            "--package",
            "placer-core",
            "--release",
            "--test",
            "loom",
            "--locked",
            "--target-dir",
        ],
        env: &[("RUSTFLAGS", "--cfg loom")],
    },
    Step {
        name: "simulator",
        args: &[
            "run",
            "--release",
            "--locked",
            "--package",
            "tests-sim",
            "--bin",
            "sim",
            "--",
            "lite",
        ],
        env: &[],
    },
];

fn main() -> ExitCode {
    let started = Instant::now();
    let only: Vec<String> = env::args().skip(1).collect();
    if let Some(unknown) = only.iter().find(|name| STEPS.iter().all(|step| step.name != *name)) {
        let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
        eprintln!("error[usage]: no step `{unknown}`\nhint: steps are {}", names.join(", "));
        return ExitCode::from(2);
    }
    let steps: Vec<_> = STEPS
        .iter()
        .filter(|step| only.is_empty() || only.iter().any(|o| o == step.name))
        .collect();
    let mut times = Vec::with_capacity(steps.len());
    for (at, step) in steps.iter().enumerate() {
        println!("== {}/{} {}: {}", at + 1, steps.len(), step.name, step.line());
        let begun = Instant::now();
        let passed = step.command().status().is_ok_and(|status| status.success());
        let took = begun.elapsed();
        if !passed {
            println!("== {} FAILED after {}; repeat it with:", step.name, seconds(took));
            println!("   {}", step.line());
            return ExitCode::FAILURE;
        }
        println!("== {} ok in {}", step.name, seconds(took));
        times.push(format!("{} {}", step.name, seconds(took)));
    }
    println!(
        "== all {} steps passed in {}: {}",
        steps.len(),
        seconds(started.elapsed()),
        times.join(", ")
    );
    ExitCode::SUCCESS
}

impl Step {
    /// Arguments, completed by the one that depends on the place.
    fn args(&self) -> Vec<String> {
        let mut args: Vec<_> = self.args.iter().map(|arg| (*arg).to_owned()).collect();
        if self.args.last() == Some(&"--target-dir") {
            args.push(format!("{}/loom", target()));
        }
        args
    }

    fn command(&self) -> Command {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(self.args()).envs(self.env.iter().copied());
        // Tests of whole fleets need not build again what this run has built.
        if let Ok(here) = env::current_dir() {
            command.env("VOLLEY_BIN", here.join(target()).join("debug/volley"));
        }
        command
    }

    /// The step as one would type it.
    fn line(&self) -> String {
        let env = self.env.iter().map(|(name, value)| format!("{name}='{value}' "));
        env.chain([format!("cargo {}", self.args().join(" "))]).collect()
    }
}

fn target() -> String {
    env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned())
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
