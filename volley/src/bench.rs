//! `bench`: the figures of bench/SPEC.md, from the command line.
//!
//! A bench makes a fleet of its own in a scratch directory, so that nobody's state colours it, measures, prints figure and
//! ceiling of the same run, and takes the fleet down; with `--running` it measures the fleet of the client file.
//! What is measured and how is in the crate `bench`. Left out: judging figures; the SPEC does.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode, time::Duration};

use bench::launch::{Claim, Load, Options};
use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;
use volley_client::Code;

use crate::{
    client::{ClientFile, ClientFlags, Session},
    dev::{
        self,
        fleet::{Boxes, Fleet, Wanted},
    },
    failure::Failure,
    role, run,
    show::{self, Form, Output, print},
};

/// Flags of `volley bench`.
#[derive(Args, Debug)]
pub(crate) struct Flags {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Launches a second, and how long one takes.
    Launch(LaunchFlags),
}

/// Flags of `volley bench launch`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley bench launch                                  closed loop, 256 in flight, nothing runs
  volley bench launch --rate 20000 --duration 30s      open loop
  volley bench launch --boxes real --in-flight 32      real sandboxes running /bin/true
  volley bench launch --running --rate 100             the fleet of the client file")]
struct LaunchFlags {
    #[command(flatten)]
    client: ClientFlags,
    #[command(flatten)]
    output: Output,
    /// Measure the fleet of the client file instead of one made for it.
    #[arg(long)]
    running: bool,
    /// Hosts of the fleet that is made; without sandboxes they share a process.
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=4096))]
    hosts: u16,
    /// Whether sandboxes are real.
    #[arg(long, value_enum, default_value_t = Boxes::None, value_name = "KIND")]
    boxes: Boxes,
    /// Open loop: launches a second, come what may.
    #[arg(long, value_name = "RATE", conflicts_with = "in_flight")]
    rate: Option<f64>,
    /// Closed loop: launches at once.
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    in_flight: usize,
    /// Time that is measured.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Time before, that is not.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    warm_up: Duration,
    /// Time for each ceiling; 0s for none.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    ceiling: Duration,
    /// Threads that offer load.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    threads: usize,
    /// Connections to the placer; 0 for as many as the load needs.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    connections: usize,
    /// Image.
    #[arg(long, value_name = "IMAGE", default_value = dev::IMAGE)]
    image: String,
    /// Size: nano, small, medium, large, or an index.
    #[arg(long, value_name = "SHAPE", default_value = "nano", value_parser = run::shape)]
    shape: u8,
    /// Time to live of each sandbox; without sandboxes they end at once.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    lifetime: Duration,
    /// Keep the made fleet's files here.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Command; default: true.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// `volley bench ...`.
pub(crate) fn run(flags: &Flags) -> Result<ExitCode, Failure> {
    match &flags.what {
        What::Launch(flags) => launch(flags).map(|()| ExitCode::SUCCESS),
    }
}

impl LaunchFlags {
    fn options(&self, base: Options) -> Options {
        let command =
            if self.command.is_empty() { vec!["true".to_owned()] } else { self.command.clone() };
        Options {
            claim: match self.boxes {
                Boxes::Real => Claim::ProgramsRunning,
                Boxes::None => Claim::LaunchesAccepted,
            },
            load: match self.rate {
                Some(rate) => Load::Open { rate },
                None => Load::Closed { in_flight: self.in_flight },
            },
            duration: self.duration,
            warm_up: self.warm_up,
            ceiling: self.ceiling,
            threads: self.threads,
            connections: self.connections,
            image: self.image.clone(),
            shape: self.shape,
            command,
            lifetime: self.lifetime,
            hosts: usize::from(self.hosts),
            progress: std::io::stderr().is_terminal(),
            ..base
        }
    }
}

fn launch(flags: &LaunchFlags) -> Result<(), Failure> {
    let stop = CancellationToken::new();
    role::stop_on_signal(stop.clone())?;
    if flags.running {
        let file = ClientFile::load(&flags.client)?;
        let base = Options {
            placers: file.placers,
            identity: file.identity,
            tenant: file.tenant,
            ..Options::default()
        };
        return measure(flags, base, &stop);
    }
    if flags.boxes == Boxes::Real {
        dev::need_root()?;
    }
    let scratch = tempfile::tempdir().map_err(|error| Failure::io("scratch directory", &error))?;
    let state = flags.state.clone().unwrap_or_else(|| scratch.path().to_owned());
    let wanted = Wanted {
        hosts: flags.hosts,
        packed: flags.boxes == Boxes::None,
        boxes: flags.boxes,
        store: None,
        objects: None,
        port: None,
    };
    let fleet = Fleet::lay_out(&wanted, &state)?;
    let mut roles = dev::start(&fleet)?;
    let measured = on_fleet(flags, &fleet, &mut roles, &stop);
    dev::put_down(&mut roles);
    measured
}

fn on_fleet(
    flags: &LaunchFlags,
    fleet: &Fleet,
    roles: &mut [dev::child::Role],
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let operator = Session::over(&fleet.client, true)?;
    dev::await_hosts(&operator, flags.hosts, roles, stop)?;
    if flags.boxes == Boxes::Real {
        dev::prepare(fleet)?;
    }
    // The placer has the map when a launch gets through.
    let session = Session::over(&fleet.client, false)?;
    session.block(dev::first_launch(&session, &["true"]))?;
    drop((session, operator));
    measure(flags, dev::options(fleet, roles), stop)
}

fn measure(flags: &LaunchFlags, base: Options, stop: &CancellationToken) -> Result<(), Failure> {
    let options = flags.options(base);
    let tend = || match stop.is_cancelled() {
        true => Err(Failure::new(Code::Cancelled, "stopped before it was measured")),
        false => Ok(()),
    };
    let report = dev::meanwhile(tend, move || bench::launch::run(&options))??;
    match flags.output.output {
        Form::Json => show::json(&report)?,
        Form::Table => print(report.to_string().trim_end())?,
    }
    if report.achieved.started == 0 {
        let first = report.first_fault.unwrap_or_else(|| "no reason was kept".to_owned());
        return Err(Failure::new(Code::FleetFailing, format!("no launch started: {first}")));
    }
    Ok(())
}
