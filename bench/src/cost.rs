//! The cost model: what a fleet takes, from the parts that were measured in this run.
//!
//! Every line is a measured time multiplied by a count; a part that was not measured is said to be missing and left out
//! of the sums. Assumptions stand in the output. It is linear on purpose: where the fleet stops being linear (the knee)
//! is measured, by a sweep of offered rates ([`crate::launch::sweep`]), not computed.

use std::{fmt, time::Duration};

use serde::Serialize;
use wire::{Fault, feed::ENTRIES_MAX, limits::HEARTBEAT_INTERVAL_MS};

use crate::{heartbeat, launch, map, pick, rounds};

/// Cores of a placer machine: its processes share one feed and one capacity table.
const PLACER_CORES: f64 = 16.0;
/// Seconds between two publications of the map.
const PUBLISH_S: f64 = 15.0;

/// What was measured. `None` is told, not guessed.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// Launches end to end, with the roles' processor time.
    pub launch: Option<launch::Report>,
    /// Heartbeats.
    pub heartbeat: Option<heartbeat::Report>,
    /// Picks and the feed's writes.
    pub pick: Option<pick::Report>,
    /// The host map.
    pub map: Option<map::Report>,
    /// Rows a second that a core of the database takes, in batches.
    pub rows_a_core: Option<f64>,
    /// Where the sweep of offered rates bent.
    pub knee: Option<launch::Knee>,
    /// Launches in flight a host, while launches were measured.
    pub together: Option<f64>,
}

/// A line of the model.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Whose work.
    pub role: &'static str,
    /// Which work.
    pub work: &'static str,
    /// Times a second.
    pub a_second: f64,
    /// Nanoseconds each; none if it was not measured in this run.
    pub ns: Option<f64>,
}

impl Line {
    /// Cores that it takes.
    #[must_use]
    pub fn cores(&self) -> Option<f64> {
        self.ns.map(|ns| self.a_second * ns / 1e9)
    }
}

/// The model of one fleet.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// Hosts.
    pub hosts: f64,
    /// Launches a second.
    pub launches: f64,
    /// Machines of placers that the launches alone need.
    pub placers: f64,
    /// All work.
    pub lines: Vec<Line>,
    /// Where the sweep bent.
    pub knee: Option<launch::Knee>,
    /// Launches in flight a host, while launches were measured.
    pub together: Option<f64>,
}

/// What is measured for the model.
#[derive(Clone, Debug)]
pub struct Options {
    /// Launches on a running fleet, with the pids of its roles as `placerd` and `hostd`; none leaves them out.
    pub launch: Option<launch::Options>,
    /// Hosts of the fleet that is counted up.
    pub hosts: f64,
    /// Its launches a second.
    pub launches: f64,
    /// Rows a second that a core of the database takes, where it was measured beforehand.
    pub rows_a_core: Option<f64>,
    /// Small and short: to see that it runs.
    pub quick: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { launch: None, hosts: 1e6, launches: 1e6, rows_a_core: None, quick: false }
    }
}

/// Measures the parts, one after the other, and counts up. Blocks.
///
/// # Errors
/// What a part met.
pub fn run(options: &Options) -> Result<Model, Fault> {
    let quick = options.quick;
    let mut pick = pick::Options { hosts: vec![1_000_000], ..pick::Options::default() };
    let mut heartbeat = heartbeat::options();
    let mut map = map::Options::default();
    if quick {
        pick = pick::Options { hosts: vec![10_000], picks: 10_000, rounds: 1, ..pick };
        let time = Duration::from_millis(100);
        heartbeat = rounds::Options { hosts: 1_000, rounds: 1, time, ..heartbeat };
        map = map::Options { hosts: 10_000, rounds: 1, ..map };
    }
    let launch = options.launch.as_ref().map(launch::run).transpose()?;
    let knee = match (&options.launch, &launch) {
        (Some(options), Some(closed)) => Some(launch::sweep(options, closed)?),
        _ => None,
    };
    let parts = Parts {
        launch,
        heartbeat: Some(heartbeat::run(&heartbeat)?),
        pick: Some(pick::run(&pick)?),
        map: Some(map::run(&map)?),
        rows_a_core: options.rows_a_core,
        knee,
        together: options.launch.as_ref().map(together),
    };
    Ok(model(&parts, options.hosts, options.launches))
}

#[expect(clippy::cast_precision_loss, reason = "thousands")]
fn together(options: &launch::Options) -> f64 {
    match options.load {
        launch::Load::Closed { in_flight } => in_flight as f64 / options.hosts.max(1) as f64,
        launch::Load::Open { .. } => f64::NAN,
    }
}

fn role_ns(report: Option<&launch::Report>, role: &str) -> Option<f64> {
    let cpu = report?.cpu.iter().find(|cpu| cpu.role == role)?;
    Some(cpu.us_a_launch * 1e3)
}

/// Counts up what a fleet of so many hosts takes at so many launches a second.
#[must_use]
pub fn model(parts: &Parts, hosts: f64, launches: f64) -> Model {
    let launch = parts.launch.as_ref();
    let (placer_ns, host_ns) = (role_ns(launch, "placerd"), role_ns(launch, "hostd"));
    let placers = placer_ns.map_or(1.0, |ns| (launches * ns / 1e9 / PLACER_CORES).ceil().max(1.0));
    #[expect(clippy::cast_precision_loss, reason = "15,000")]
    let beats = hosts * 1e3 / HEARTBEAT_INTERVAL_MS as f64;
    #[expect(clippy::cast_precision_loss, reason = "about 70")]
    let feed_datagrams = placers * beats / ENTRIES_MAX as f64;
    let heartbeat = parts.heartbeat.as_ref();
    let sender_ns = heartbeat.map(|report| report.sender_ns.median);
    let largest = parts.pick.as_ref().and_then(|report| report.rows.last());
    let scaled = |ms: f64, of: usize| {
        #[expect(clippy::cast_precision_loss, reason = "millions")]
        let share = hosts / of as f64;
        ms * 1e6 * share
    };
    let map = parts.map.as_ref();
    let published = map.map(|m| scaled(m.build_ms.median + m.publish_ms.median, m.hosts));
    let adopted = map
        .map(|m| scaled(m.fetch_ms.median + m.open_ms.median + m.adopt_change_ms.median, m.hosts));
    let line = |role, work, a_second, ns| Line { role, work, a_second, ns };
    let fed_ns = largest.map(|row| 1e3 / row.fed.median);
    let verified_ns = heartbeat.map(|report| report.verified_ns.median);
    let row_ns = parts.rows_a_core.map(|rows| 1e9 / rows);
    let lines = vec![
        line("placers", "launches", launches, placer_ns),
        line("placers", "words of the feed", placers * beats, fed_ns),
        line("placers", "maps adopted", placers / PUBLISH_S, adopted),
        line("hosts", "launches, without boxes", launches, host_ns),
        line("hosts", "heartbeats sent", beats, sender_ns),
        line("aggregators", "heartbeats verified", beats, verified_ns),
        line("aggregators", "feed datagrams sent", feed_datagrams, sender_ns),
        line("aggregators", "maps published", 1.0 / PUBLISH_S, published),
        line("database", "rows in batches", beats, row_ns),
    ];
    let (knee, together) = (parts.knee.clone(), parts.together);
    Model { hosts, launches, placers, lines, knee, together }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "cost of {:.0} launches a second on {:.0} hosts, from what this run measured",
            self.launches, self.hosts
        )?;
        writeln!(
            f,
            "  {:<12} {:<26} {:>12} {:>10} {:>9}",
            "role", "work", "a second", "ns each", "cores"
        )?;
        for line in &self.lines {
            let (ns, cores) = match (line.ns, line.cores()) {
                (Some(ns), Some(cores)) => (format!("{ns:.0}"), format!("{cores:.2}")),
                _ => ("not measured".to_owned(), "?".to_owned()),
            };
            let Line { role, work, a_second, .. } = line;
            writeln!(f, "  {role:<12} {work:<26} {a_second:>12.1} {ns:>10} {cores:>9}")?;
        }
        for role in ["placers", "hosts", "aggregators", "database"] {
            let of_role = || self.lines.iter().filter(|line| line.role == role);
            let sum = of_role().filter_map(Line::cores).reduce(|sum, cores| sum + cores);
            let missing = of_role().any(|line| line.ns.is_none());
            let at_least = if missing { "at least " } else { "" };
            match sum {
                Some(sum) => writeln!(f, "  {role}: {at_least}{sum:.2} cores")?,
                None => writeln!(f, "  {role}: not measured in this run")?,
            }
        }
        match &self.knee {
            Some(knee) => writeln!(f, "  knee: {knee}")?,
            None => writeln!(f, "  knee: not measured in this run (needs a sweep of rates)")?,
        }
        if let Some(together) = self.together.filter(|together| *together > 1.0) {
            writeln!(
                f,
                "  mind: {together:.0} launches a host were under way where launches were measured, so that they shared \
                 packets;\n  with {:.1} a second a host each has packets of its own: measure with as many hosts as \
                 launches in flight",
                self.launches / self.hosts.max(1.0)
            )?;
        }
        writeln!(
            f,
            "  assumed: a heartbeat every {} s a host, {PLACER_CORES:.0} cores a placer machine ({:.0} of them), a map every \
             {PUBLISH_S:.0} s;\n  the feed goes to each placer machine once; the kernel's receive side is in the sender's figure \
             on a loopback",
            HEARTBEAT_INTERVAL_MS / 1_000,
            self.placers
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_is_said_and_not_summed() {
        let parts = Parts { rows_a_core: Some(100_000.0), ..Parts::default() };
        let model = model(&parts, 1_000_000.0, 1_000_000.0);
        let text = model.to_string();
        assert!(text.contains("placers: not measured"), "{text}");
        assert!(text.contains("database: 0.67 cores"), "{text}");
        assert!(text.contains("not measured"), "{text}");
    }
}
