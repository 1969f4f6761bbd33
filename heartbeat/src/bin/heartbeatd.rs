//! `heartbeatd CONFIG.toml`: the capacity service alone, for who wants no other role on the machine.

use std::process::ExitCode;

use heartbeat::Config;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use wire::{Code, Fault};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("heartbeatd: {fault} ({}): {}", fault.code, fault.code.hint());
            ExitCode::from(fault.code.exit())
        }
    }
}

fn run() -> Result<(), Fault> {
    let usage = || Fault::new(Code::Config, "usage: heartbeatd CONFIG.toml");
    let file = std::env::args().nth(1).ok_or_else(usage)?;
    let text = std::fs::read_to_string(&file)
        .map_err(|error| Fault::new(Code::Config, format!("{file}: {error}")))?;
    let config = Config::from_toml(&file, &text)?;
    let internal = |error: std::io::Error| Fault::new(Code::Internal, error.to_string());
    let runtime = tokio::runtime::Runtime::new().map_err(internal)?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let (mut term, mut int) = (
            signal(SignalKind::terminate()).map_err(internal)?,
            signal(SignalKind::interrupt()).map_err(internal)?,
        );
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            stopping.cancel();
        });
        heartbeat::run(config, stop).await
    })
}
