//! The parts' figures without the front door: `cargo bench -p bench --bench figures -- pick heartbeat feed map cost`.
//!
//! Without a name it runs pick, heartbeat, feed and map. `cost` and `launch` want a running fleet: `--placer ADDR --identity DIR
//! --role placerd=PID --role hostd=PID --hosts N`; without one, `cost` says what is missing. Built as a test it is quick.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use bench::{
    cost, feed, heartbeat, image,
    launch::{self, Carrier, Load, RolePid},
    map, pick,
    rounds::Options,
};
use clap::Parser;
use wire::{Code, Fault};

/// Figures of the parts.
#[derive(Parser)]
struct Args {
    /// Which: pick, heartbeat, feed, map, image, launch, sweep, cost.
    names: Vec<String>,
    /// Print for programs.
    #[arg(long)]
    json: bool,
    /// Small and short.
    #[arg(long)]
    quick: bool,
    /// A placer of a running fleet.
    #[arg(long)]
    placer: Option<SocketAddr>,
    /// The placer's ops port.
    #[arg(long)]
    placer_ops: Option<SocketAddr>,
    /// Identity directory of a tenant.
    #[arg(long)]
    identity: Option<PathBuf>,
    /// Processes whose time is told, as `role=pid`.
    #[arg(long = "role", value_parser = role)]
    roles: Vec<RolePid>,
    /// Hosts of the running fleet.
    #[arg(long, default_value_t = 1)]
    hosts: usize,
    /// Launches in flight.
    #[arg(long, default_value_t = 1_024)]
    in_flight: usize,
    /// Connections to the placer; 0 for as many as it takes.
    #[arg(long, default_value_t = 0)]
    connections: usize,
    /// Threads that offer load.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// A stream a launch instead of lanes.
    #[arg(long)]
    streams: bool,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Image.
    #[arg(long, default_value = "shell")]
    image: String,
    /// Measured rows a second of a database core.
    #[arg(long)]
    rows_a_core: Option<f64>,
    /// Where the map is published.
    #[arg(long, default_value = "mem://")]
    objects: String,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    test: bool,
}

fn role(text: &str) -> Result<RolePid, String> {
    let (role, pid) = text.split_once('=').ok_or("write role=pid")?;
    let pid = pid.parse().map_err(|error| format!("{pid}: {error}"))?;
    Ok(RolePid { role: role.to_owned(), pid })
}

impl Args {
    fn quick(&self) -> bool {
        self.quick || self.test || !self.bench
    }

    fn wanted(&self, name: &str) -> bool {
        self.names.iter().any(|wanted| wanted == name)
    }

    fn show(&self, report: &(impl serde::Serialize + std::fmt::Display)) {
        match serde_json::to_string(report) {
            Ok(text) if self.json => println!("{text}"),
            _ => println!("{report}"),
        }
    }

    fn launches(&self) -> Option<launch::Options> {
        let (placer, identity) = self.placer.zip(self.identity.clone())?;
        Some(launch::Options {
            placers: vec![placer],
            identity,
            load: Load::Closed { in_flight: self.in_flight },
            carrier: if self.streams { Carrier::Stream } else { Carrier::Lane },
            connections: self.connections,
            threads: self.threads,
            duration: Duration::from_secs(self.seconds),
            image: self.image.clone(),
            pids: self.roles.clone(),
            placer_ops: self.placer_ops,
            hosts: self.hosts,
            progress: false,
            ..launch::Options::default()
        })
    }

    fn fleet(&self) -> Result<launch::Options, Fault> {
        let missing = || Fault::new(Code::Config, "give --placer and --identity of a fleet");
        self.launches().ok_or_else(missing)
    }
}

fn picks(args: &Args) -> Result<(), Fault> {
    let mut options = pick::Options::default();
    if args.quick() {
        options = pick::Options { hosts: vec![1_000, 10_000], picks: 10_000, rounds: 1, ..options };
    }
    for huge in [true, false] {
        args.show(&pick::run(&pick::Options { huge, ..options.clone() })?);
    }
    Ok(())
}

fn heartbeats(args: &Args) -> Result<(), Fault> {
    let mut options = heartbeat::options();
    if args.quick() {
        let time = Duration::from_millis(100);
        options = Options { hosts: 1_000, rounds: 1, time, ..options };
    }
    args.show(&heartbeat::run(&options)?);
    Ok(())
}

fn feeds(args: &Args) -> Result<(), Fault> {
    let mut options = feed::options();
    if args.quick() {
        let time = Duration::from_millis(100);
        options = Options { hosts: 10_000, rounds: 1, time, ..options };
    }
    args.show(&feed::run(&options)?);
    Ok(())
}

fn maps(args: &Args) -> Result<(), Fault> {
    let mut options = map::Options { objects: args.objects.clone(), ..map::Options::default() };
    if args.quick() {
        options = map::Options { hosts: 10_000, rounds: 1, ..options };
    }
    args.show(&map::run(&options)?);
    Ok(())
}

fn run(args: &Args) -> Result<(), Fault> {
    let all = args.names.is_empty();
    if all || args.wanted("pick") {
        picks(args)?;
    }
    if all || args.wanted("heartbeat") {
        heartbeats(args)?;
    }
    if all || args.wanted("feed") {
        feeds(args)?;
    }
    if all || args.wanted("map") {
        maps(args)?;
    }
    if args.wanted("image") {
        let options = image::Options::default();
        let quick =
            image::Options { large_bytes: 50_000_000, files: 5_000, rounds: 2, ..options.clone() };
        args.show(&image::run(if args.quick() { &quick } else { &options })?);
    }
    if args.wanted("launch") {
        args.show(&launch::run(&args.fleet()?)?);
    }
    if args.wanted("sweep") {
        let options = args.fleet()?;
        let closed = launch::run(&options)?;
        args.show(&launch::sweep(&options, &closed)?);
    }
    if args.wanted("cost") {
        let options = cost::Options {
            launch: args.launches(),
            rows_a_core: args.rows_a_core,
            quick: args.quick(),
            ..cost::Options::default()
        };
        args.show(&cost::run(&options)?);
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("error: {fault}");
            ExitCode::FAILURE
        }
    }
}
