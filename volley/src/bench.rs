//! `bench`: the figures of bench/SPEC.md, from the command line.
//!
//! A bench makes a fleet of its own in a scratch directory, so that nobody's state colours it, measures, prints figure and
//! ceiling of the same run, and takes the fleet down; with `--running` it measures the fleet of the client file.
//! What is measured and how is in the crate `bench`. Left out: judging figures; the SPEC does.
//! Longer than 500 lines: most of it is the flags of eight benches.

use std::{
    fmt::Display,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use bench::launch::{Carrier, Claim, Load, Options};
use clap::{Args, Subcommand};
use serde::Serialize;
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
    Launch(Box<LaunchFlags>),
    /// Picks a second over a map of so many hosts.
    Pick(PickFlags),
    /// Heartbeats a second that one thread receives and verifies.
    Heartbeat(HeartbeatFlags),
    /// What it costs a placer to follow a fleet's capacity.
    Feed(FeedFlags),
    /// Milliseconds to build, publish and adopt a host map.
    Map(MapFlags),
    /// Rows a second that a database takes.
    Store(StoreFlags),
    /// Time to a program's first output in small and large images, cold and warm.
    Image(ImageFlags),
    /// Cores that a fleet takes, counted up from parts that are measured now.
    Cost(CostFlags),
}

/// Flags of `volley bench pick`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley bench pick --hosts 1000000")]
struct PickFlags {
    #[command(flatten)]
    output: Output,
    /// Sizes of the fleet.
    #[arg(
        long,
        value_name = "COUNT",
        value_delimiter = ',',
        default_value = "10000,100000,1000000"
    )]
    hosts: Vec<usize>,
    /// Rounds after one that warms up.
    #[arg(long, value_name = "COUNT", default_value_t = 7)]
    rounds: usize,
}

/// Flags of `volley bench heartbeat`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley bench heartbeat --hosts 100000 --rate 66700")]
struct HeartbeatFlags {
    #[command(flatten)]
    output: Output,
    /// Hosts that send.
    #[arg(long, value_name = "COUNT", default_value_t = 100_000)]
    hosts: usize,
    /// Heartbeats a second in the paced rounds.
    #[arg(long, value_name = "RATE", default_value_t = 66_700.0)]
    rate: f64,
    /// Rounds after one that warms up.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    rounds: usize,
}

/// Flags of `volley bench feed`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley bench feed --hosts 1000000 --rate 70000")]
struct FeedFlags {
    #[command(flatten)]
    output: Output,
    /// Hosts in the placer's table.
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000)]
    hosts: usize,
    /// Words a second in the paced rounds.
    #[arg(long, value_name = "RATE", default_value_t = 70_000.0)]
    rate: f64,
    /// Rounds after one that warms up.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    rounds: usize,
}

/// Flags of `volley bench map`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley bench map --hosts 1000000 --objects dir:///tmp/objects")]
struct MapFlags {
    #[command(flatten)]
    output: Output,
    /// Hosts in the map.
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000)]
    hosts: usize,
    /// Object store that it is published to.
    #[arg(long, value_name = "URL", default_value = "mem://")]
    objects: String,
    /// Rounds.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    rounds: usize,
}

/// Flags of `volley bench store`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley store init scylla://db1:9042/scratch
  volley bench store scylla://db1:9042/scratch        made-up hosts; a keyspace with others is refused")]
struct StoreFlags {
    #[command(flatten)]
    output: Output,
    /// scylla://host:port[,host:port]/keyspace.
    store: String,
    /// Rows in batches a round; a fifth as many one at a time.
    #[arg(long, value_name = "COUNT", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(5..=4_000_000))]
    rows: u32,
    /// Rounds; the first ones warm the engine up.
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
}

/// Flags of `volley bench image`.
#[derive(Args, Debug)]
#[command(after_help = "\
As root. Takes some 8 GB of scratch and memory, and a few minutes.
Example:
  volley bench image --latency 20ms --mb-per-second 90")]
struct ImageFlags {
    #[command(flatten)]
    output: Output,
    /// Storage's time to a first byte.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration)]
    latency: Duration,
    /// Megabytes a second that all GETs share.
    #[arg(long, value_name = "RATE", default_value_t = 90)]
    mb_per_second: u64,
    /// Megabytes of the large image.
    #[arg(long, value_name = "MB", default_value_t = 2_000)]
    large_mb: u64,
    /// Files of the image of many.
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000)]
    files: u64,
    /// Rounds.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    rounds: usize,
    /// Where images are laid out.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

/// Flags of `volley bench cost`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  volley bench cost --hosts 1000000 --launches 1000000")]
struct CostFlags {
    #[command(flatten)]
    output: Output,
    /// Hosts of the fleet that is counted up.
    #[arg(long, value_name = "COUNT", default_value_t = 1e6)]
    hosts: f64,
    /// Its launches a second.
    #[arg(long, value_name = "RATE", default_value_t = 1e6)]
    launches: f64,
    /// Rows a second that a core of the database takes, where that was measured.
    #[arg(long, value_name = "RATE")]
    rows_a_core: Option<f64>,
    /// Small and short.
    #[arg(long)]
    quick: bool,
}

/// Flags of `volley bench launch`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  volley bench launch                                  closed loop, 256 in flight, nothing runs
  volley bench launch --rate 20000 --duration 30s      open loop
  volley bench launch --hosts 100 --in-flight 1024 --sweep --duration 4s
                                                       rates up to what the closed loop reached, and where latency bends
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
    /// After the closed loop, offer shares of its rate in an open loop: how latency grows, and where it bends.
    #[arg(long, conflicts_with = "rate")]
    sweep: bool,
    /// Time that is measured (each rate's, in a sweep).
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
    /// A stream a launch, instead of lanes that carry many.
    #[arg(long)]
    streams: bool,
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
        What::Launch(flags) => launch(flags)?,
        What::Pick(flags) => {
            let options = bench::pick::Options {
                hosts: flags.hosts.clone(),
                rounds: flags.rounds,
                ..bench::pick::Options::default()
            };
            figures(flags.output, &bench::pick::run(&options)?)?;
        }
        What::Heartbeat(flags) => {
            let options = bench::rounds::Options {
                hosts: flags.hosts,
                rate: flags.rate,
                rounds: flags.rounds,
                ..bench::heartbeat::options()
            };
            figures(flags.output, &bench::heartbeat::run(&options)?)?;
        }
        What::Feed(flags) => {
            let options = bench::rounds::Options {
                hosts: flags.hosts,
                rate: flags.rate,
                rounds: flags.rounds,
                ..bench::feed::options()
            };
            figures(flags.output, &bench::feed::run(&options)?)?;
        }
        What::Store(flags) => {
            let options = bench::store::Options {
                store: flags.store.clone(),
                rows: flags.rows as usize,
                rounds: flags.rounds as usize,
            };
            figures(flags.output, &role::runtime()?.block_on(bench::store::run(&options))?)?;
        }
        What::Map(flags) => {
            let options = bench::map::Options {
                hosts: flags.hosts,
                objects: flags.objects.clone(),
                rounds: flags.rounds,
                ..bench::map::Options::default()
            };
            figures(flags.output, &bench::map::run(&options)?)?;
        }
        What::Image(flags) => {
            dev::need_root()?;
            let options = bench::image::Options {
                latency: flags.latency,
                bytes_per_second: flags.mb_per_second * 1_000_000,
                large_bytes: flags.large_mb * 1_000_000,
                files: flags.files,
                rounds: flags.rounds.max(1),
                scratch: flags.scratch.clone(),
                ..bench::image::Options::default()
            };
            figures(flags.output, &bench::image::run(&options)?)?;
        }
        What::Cost(flags) => cost(flags)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn figures<T: Serialize + Display>(output: Output, report: &T) -> Result<(), Failure> {
    match output.output {
        Form::Json => show::json(report),
        Form::Table => print(report.to_string().trim_end()),
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
            carrier: if self.streams { Carrier::Stream } else { Carrier::Lane },
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
    let made = Made { hosts: flags.hosts, boxes: flags.boxes, state: flags.state.as_deref() };
    made.run(&stop, |base| measure(flags, base, &stop))
}

/// The cost model, on a fleet of eight hosts without sandboxes.
fn cost(flags: &CostFlags) -> Result<(), Failure> {
    let stop = CancellationToken::new();
    role::stop_on_signal(stop.clone())?;
    let made = Made { hosts: 8, boxes: Boxes::None, state: None };
    made.run(&stop, |base| {
        let launch = Options { load: Load::Closed { in_flight: 1_024 }, hosts: 8, ..base };
        let options = bench::cost::Options {
            launch: Some(launch),
            hosts: flags.hosts,
            launches: flags.launches,
            rows_a_core: flags.rows_a_core,
            quick: flags.quick,
        };
        let model = dev::meanwhile(|| stopped(&stop), move || bench::cost::run(&options))??;
        figures(flags.output, &model)
    })
}

/// Hosts that a list shows at most.
const LISTED_MAX: u16 = 500;

/// How long thousands of hosts may take to be in the placer's map.
const MAP_READY_MAX: Duration = Duration::from_secs(60);

/// A fleet that is made for one bench.
struct Made<'a> {
    hosts: u16,
    boxes: Boxes,
    state: Option<&'a Path>,
}

impl Made<'_> {
    /// Brings it up, measures, takes it down.
    fn run(
        &self,
        stop: &CancellationToken,
        measure: impl FnOnce(Options) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if self.boxes == Boxes::Real {
            dev::need_root()?;
        }
        let scratch =
            tempfile::tempdir().map_err(|error| Failure::io("scratch directory", &error))?;
        let wanted = Wanted {
            hosts: self.hosts,
            packed: self.boxes == Boxes::None,
            boxes: self.boxes,
            store: None,
            objects: None,
            port: None,
        };
        let fleet = Fleet::lay_out(&wanted, self.state.unwrap_or(scratch.path()))?;
        let mut roles = dev::start(&fleet)?;
        let measured = self
            .settle(&fleet, &mut roles, stop)
            .and_then(|()| measure(dev::options(&fleet, &roles)));
        dev::put_down(&mut roles);
        measured
    }

    /// Waits until the placer's map holds all hosts.
    fn await_map(&self, fleet: &Fleet, stop: &CancellationToken) -> Result<(), Failure> {
        let deadline = Instant::now() + MAP_READY_MAX;
        let in_map = || {
            let text = bench::scrape::fetch(fleet.placer_ops)?;
            bench::scrape::sum(&text, "placer_hosts")
        };
        while in_map().unwrap_or_default() < f64::from(self.hosts) {
            stopped(stop)?;
            if Instant::now() > deadline {
                let what = format!("the placer's map does not hold {} hosts", self.hosts);
                return Err(Failure::new(Code::NoHosts, what));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits until a launch gets through: then the placer has the map.
    fn settle(
        &self,
        fleet: &Fleet,
        roles: &mut [dev::child::Role],
        stop: &CancellationToken,
    ) -> Result<(), Failure> {
        let operator = Session::over(&fleet.client, true)?;
        // A list of hosts shows the first hundreds; the placer's own count says when it has the others.
        dev::await_hosts(&operator, self.hosts.min(LISTED_MAX), roles, stop)?;
        self.await_map(fleet, stop)?;
        if self.boxes == Boxes::Real {
            dev::prepare(fleet)?;
        }
        let session = Session::over(&fleet.client, false)?;
        session.block(dev::first_launch(&session, &["true"])).map(drop)
    }
}

fn stopped(stop: &CancellationToken) -> Result<(), Failure> {
    if stop.is_cancelled() {
        return Err(Failure::new(Code::Cancelled, "stopped before it was measured"));
    }
    Ok(())
}

fn measure(flags: &LaunchFlags, base: Options, stop: &CancellationToken) -> Result<(), Failure> {
    let options = flags.options(base);
    let swept = flags.sweep.then(|| options.clone());
    let report = dev::meanwhile(|| stopped(stop), move || bench::launch::run(&options))??;
    figures(flags.output, &report)?;
    if let Some(options) = swept.filter(|_| report.achieved.started > 0) {
        let closed = report.clone();
        let knee =
            dev::meanwhile(|| stopped(stop), move || bench::launch::sweep(&options, &closed))??;
        figures(flags.output, &knee)?;
    }
    if report.achieved.started == 0 {
        let first = report.first_fault.unwrap_or_else(|| "no reason was kept".to_owned());
        return Err(Failure::new(Code::FleetFailing, format!("no launch started: {first}")));
    }
    Ok(())
}
