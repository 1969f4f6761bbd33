//! The figures of a run, for people and for programs.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{Carrier, Claim, Load, Options, load::Measured};

/// Microseconds from the moment at which a launch was due to its reply.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct LatencyUs {
    /// Half are at most this.
    pub p50: u64,
    /// 90 % are at most this.
    pub p90: u64,
    /// 99 % are at most this.
    pub p99: u64,
    /// 99.9 % are at most this.
    pub p99_9: u64,
    /// The longest.
    pub max: u64,
}

impl LatencyUs {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), max: histogram.max() }
    }
}

/// What became of the launches of the measured time.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Achieved {
    /// Answered `Started`.
    pub started: u64,
    /// Answered that no host took it.
    pub refused: u64,
    /// Answered that it failed.
    pub failed: u64,
    /// Sent, and not answered.
    pub unknown: u64,
    /// Due, and not sent: too many were in flight, or no placer was there.
    pub unsent: u64,
}

/// Processor time of one role.
#[derive(Clone, Debug, Serialize)]
pub struct RoleCpu {
    /// Its name.
    pub role: String,
    /// Microseconds a started launch.
    pub us_a_launch: f64,
    /// Share of one core.
    pub cores: f64,
}

/// What the same bytes reach on bare quinn, in the same run, with the same connections and load in flight.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceiling {
    /// Round trips a second, client to an echo, each on a thread of its own.
    pub echo_per_second: f64,
    /// The same through a relay that forwards to as many echoes as there are hosts: launch's own shape.
    pub relay_per_second: f64,
    /// Microseconds of processor time a round trip of the echo, both ends.
    pub echo_cpu_us: f64,
    /// The same of the relay: client, relay and echoes.
    pub relay_cpu_us: f64,
    /// Connections that the client used.
    pub connections: usize,
    /// Round trips in flight.
    pub in_flight: usize,
    /// Echoes behind the relay.
    pub hosts: usize,
    /// Bytes there.
    pub request_bytes: usize,
    /// Bytes back.
    pub reply_bytes: usize,
}

/// All figures of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What a launch means here.
    pub claim: Claim,
    /// How load was offered.
    pub load: Load,
    /// What carried launches from the bench to the placer; placer and hosts use lanes.
    pub carrier: Carrier,
    /// Seconds that were measured.
    pub seconds: f64,
    /// Offered a second (open loop only).
    pub offered_per_second: Option<f64>,
    /// Started a second.
    pub launches_per_second: f64,
    /// What became of them.
    pub achieved: Achieved,
    /// Latency of the started ones.
    pub latency_us: LatencyUs,
    /// Attempts on hosts a launch, if the placer told.
    pub attempts_a_launch: Option<f64>,
    /// Processor time by role; the bench's own is among them as `bench`.
    pub cpu: Vec<RoleCpu>,
    /// The bare quinn ceilings, if measured.
    pub ceiling: Option<Ceiling>,
    /// The commonest failure, if there was any.
    pub first_fault: Option<String>,
}

pub(super) fn report(options: &Options, measured: &Measured, ceiling: Option<Ceiling>) -> Report {
    let seconds = measured.elapsed.as_secs_f64();
    let started = measured.achieved.started;
    let cpu = measured.cpu.iter().map(|(role, spent)| RoleCpu {
        role: role.clone(),
        us_a_launch: ratio(*spent * 1_000_000, started),
        cores: spent.as_secs_f64() / seconds,
    });
    Report {
        claim: options.claim,
        load: options.load,
        carrier: options.carrier,
        seconds,
        offered_per_second: match options.load {
            Load::Open { rate } => Some(rate),
            Load::Closed { .. } => None,
        },
        launches_per_second: ratio(Duration::from_secs(started), 1) / seconds,
        achieved: measured.achieved,
        latency_us: LatencyUs::of(&measured.latency_us),
        attempts_a_launch: measured.attempts_a_launch,
        cpu: cpu.collect(),
        ceiling,
        first_fault: measured.first_fault.clone(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a bench are far below 2^52")]
fn ratio(sum: Duration, count: u64) -> f64 {
    if count == 0 { 0.0 } else { sum.as_secs_f64() / count as f64 }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let claim = match self.claim {
            Claim::LaunchesAccepted => "launches accepted by hosts (--boxes none, no program ran)",
            Claim::ProgramsRunning => "programs running",
        };
        writeln!(f, "{:.0} launches/sec: {claim}", self.launches_per_second)?;
        match self.load {
            Load::Open { rate } => write!(f, "  offered    {rate:.0}/s, open loop")?,
            Load::Closed { in_flight } => write!(f, "  load       {in_flight} in flight")?,
        }
        let carrier = match self.carrier {
            Carrier::Lane => "on lanes",
            Carrier::Stream => "a stream each",
        };
        writeln!(f, ", {carrier}, {:.1} s measured", self.seconds)?;
        let LatencyUs { p50, p90, p99, p99_9, max } = self.latency_us;
        let ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1e3;
        writeln!(
            f,
            "  latency    p50 {:.2} ms, p90 {:.2}, p99 {:.2}, p99.9 {:.2}, max {:.2}",
            ms(p50),
            ms(p90),
            ms(p99),
            ms(p99_9),
            ms(max)
        )?;
        let Achieved { started, refused, failed, unknown, unsent } = self.achieved;
        writeln!(
            f,
            "  outcome    {started} started, {refused} refused, {failed} failed, {unknown} unknown, \
             {unsent} not sent"
        )?;
        if let Some(fault) = &self.first_fault {
            writeln!(f, "  first fault  {fault}")?;
        }
        if let Some(attempts) = self.attempts_a_launch {
            writeln!(f, "  attempts   {attempts:.3} a launch")?;
        }
        for RoleCpu { role, us_a_launch, cores } in &self.cpu {
            writeln!(f, "  cpu        {role}: {us_a_launch:.1} us a launch, {cores:.2} cores")?;
        }
        if let Some(ceiling) = &self.ceiling {
            let share = |of: f64| 100.0 * self.launches_per_second / of.max(1.0);
            writeln!(
                f,
                "  ceiling    bare quinn relay {:.0}/s (we are at {:.0} %), bare quinn echo {:.0}/s ({:.0} %); \
                 {} + {} bytes, {} connections, {} in flight",
                ceiling.relay_per_second,
                share(ceiling.relay_per_second),
                ceiling.echo_per_second,
                share(ceiling.echo_per_second),
                ceiling.request_bytes,
                ceiling.reply_bytes,
                ceiling.connections,
                ceiling.in_flight
            )?;
            let ours: f64 = self.cpu.iter().map(|role| role.us_a_launch).sum();
            writeln!(
                f,
                "             in processor time: a launch {ours:.1} us over all roles, a trip by the bare relay {:.1} us \
                 ({:.0} %), to the bare echo {:.1} us; relay = client, relay and {} echoes, threads of one process",
                ceiling.relay_cpu_us,
                100.0 * ceiling.relay_cpu_us / ours.max(0.01),
                ceiling.echo_cpu_us,
                ceiling.hosts
            )?;
        }
        Ok(())
    }
}
