//! `volley bench launch`: how many launches a second a fleet takes, and how long one takes.
//!
//! Open loop (an offered rate; latency counts from the moment at which a launch was due, so that a stall is not
//! omitted) or closed loop (so many in flight). It speaks the protocol itself, over its own connections, against any
//! placer. The claim says what was counted: launches accepted by hosts without boxes, or programs running.

mod ceiling;
mod lanes;
mod load;
mod pace;
mod report;
mod sweep;
mod way;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use wire::{
    Code, Fault,
    limits::{LANE_LAUNCHES_MAX, STREAMS_MAX},
};

pub use crate::cpu::RolePid;
pub use ceiling::{Shape, bare};
pub use report::{Achieved, Ceiling, LatencyUs, Report, RoleCpu};
pub use sweep::{Knee, Step, sweep};

/// What a counted launch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Claim {
    /// A `hostd --boxes none` answered `Started`: placement and admission, no program.
    LaunchesAccepted,
    /// A real program was executed.
    ProgramsRunning,
}

/// How load is offered.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// So many a second, come what may.
    Open {
        /// Launches a second.
        rate: f64,
    },
    /// So many at once; the next starts when one ends.
    Closed {
        /// Launches in flight.
        in_flight: usize,
    },
}

/// What carries launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carrier {
    /// One long-lived stream a connection, as the client library does (PROTOCOL 7.7).
    #[default]
    Lane,
    /// A stream a launch.
    Stream,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Placers; connections are spread over them.
    pub placers: Vec<SocketAddr>,
    /// Directory of a tenant's or an operator's identity.
    pub identity: PathBuf,
    /// In whose name: must be the certificate's tenant; an operator must say one.
    pub tenant: Option<String>,
    /// What is counted. The hosts decide it; the caller knows them.
    pub claim: Claim,
    /// How load is offered.
    pub load: Load,
    /// Time that is measured.
    pub duration: Duration,
    /// Time before, that is not.
    pub warm_up: Duration,
    /// Ends earlier after so many launches (a burst); zero for no such bound.
    pub launches_max: u64,
    /// What carries launches.
    pub carrier: Carrier,
    /// Connections; zero for as many as the load needs ([`STREAMS_MAX`] launches at once on each, or one lane a thread).
    pub connections: usize,
    /// Threads that offer load, each with a socket of its own: the kernel spreads sockets over a placer's threads.
    pub threads: usize,
    /// Image; by default the one that `volley dev` prepares.
    pub image: String,
    /// Index of the shape.
    pub shape: u8,
    /// Command; empty for the image's own. It should end by itself.
    pub command: Vec<String>,
    /// Each sandbox is ended by its host after this (its hard deadline).
    pub lifetime: Duration,
    /// Time that one launch may take.
    pub budget: Duration,
    /// Processes whose processor time is reported.
    pub pids: Vec<RolePid>,
    /// A placer's ops port, where attempts are counted.
    pub placer_ops: Option<SocketAddr>,
    /// Hosts behind the placer: the ceiling with a relay uses as many connections there.
    pub hosts: usize,
    /// Measure the bare quinn ceilings too, for so long each; zero for not.
    pub ceiling: Duration,
    /// Show a progress bar on stderr.
    pub progress: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            placers: Vec::new(),
            identity: PathBuf::new(),
            tenant: None,
            claim: Claim::LaunchesAccepted,
            load: Load::Closed { in_flight: 64 },
            duration: Duration::from_secs(10),
            warm_up: Duration::from_secs(2),
            launches_max: 0,
            carrier: Carrier::Lane,
            connections: 0,
            threads: 1,
            image: "shell".into(),
            shape: 0,
            command: vec!["true".into()],
            lifetime: Duration::from_millis(100),
            budget: Duration::from_secs(5),
            pids: Vec::new(),
            placer_ops: None,
            hosts: 1,
            ceiling: Duration::from_secs(2),
            progress: true,
        }
    }
}

/// Launches in flight at most in an open loop; what is due beyond it is counted as not sent.
const OPEN_IN_FLIGHT_MAX: usize = 20_000;

impl Options {
    fn check(&self) -> Result<(), Fault> {
        let bad = |what: &str| Err(Fault::new(Code::Config, what));
        if self.placers.is_empty() {
            return bad("a bench needs a placer's address");
        }
        if self.threads == 0 || self.duration.is_zero() {
            return bad("a bench needs a thread and some time");
        }
        match self.load {
            Load::Open { rate } if !(rate.is_finite() && rate > 0.0) => bad("the rate is no rate"),
            Load::Closed { in_flight: 0 } => bad("nothing in flight measures nothing"),
            _ => Ok(()),
        }
    }

    fn in_flight_max(&self) -> usize {
        match self.load {
            Load::Open { .. } => OPEN_IN_FLIGHT_MAX,
            Load::Closed { in_flight } => in_flight,
        }
    }

    /// Connections a thread.
    fn connections_each(&self) -> usize {
        let needed = match (self.carrier, self.load) {
            (Carrier::Lane, _) => self.in_flight_max().div_ceil(LANE_LAUNCHES_MAX / 2),
            (Carrier::Stream, Load::Open { .. }) => 16,
            (Carrier::Stream, Load::Closed { in_flight }) => {
                in_flight.div_ceil(STREAMS_MAX as usize)
            }
        };
        let all = if self.connections == 0 { needed } else { self.connections };
        all.div_ceil(self.threads).max(1)
    }
}

/// Offers the load and reports. Blocks: it starts threads and runtimes of its own, so call it from a plain thread
/// (or `spawn_blocking`).
///
/// # Errors
/// [`Code::Config`] for options that measure nothing; what connecting met. Launches that fail are figures.
pub fn run(options: &Options) -> Result<Report, Fault> {
    options.check()?;
    let measured = load::offer(options)?;
    let ceiling =
        if options.ceiling.is_zero() { None } else { Some(ceiling::measure(options, &measured)?) };
    Ok(report::report(options, &measured, ceiling))
}
