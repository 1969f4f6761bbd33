//! The knee: offered rates in steps up to what the fleet takes in a closed loop, and where latency bends.

use std::{fmt, time::Duration};

use serde::Serialize;
use wire::Fault;

use super::{LatencyUs, Load, Options, Report, run};

/// Shares of the closed loop's rate that are offered.
const SHARES: [f64; 6] = [0.25, 0.5, 0.6, 0.7, 0.8, 0.9];
/// A rate is beyond the knee when p99 is above so many times p50 of the lowest rate offered,
const BEND: u64 = 10;
/// or when less than this share of what was offered was started.
const TAKEN: f64 = 0.99;

/// One offered rate.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Step {
    /// Launches a second that were offered.
    pub offered: f64,
    /// That were started.
    pub started: f64,
    /// Their latency.
    pub latency_us: LatencyUs,
}

/// A sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Knee {
    /// Launches a second in the closed loop.
    pub closed: f64,
    /// Rates, ascending.
    pub steps: Vec<Step>,
    /// The highest offered rate before the bend; none if even the lowest was beyond it.
    pub knee: Option<f64>,
    /// p99 over p50 at half of the closed loop's rate.
    pub half_load_ratio: f64,
}

/// Measures the closed loop of `options`, then an open loop at shares of its rate. Blocks.
///
/// # Errors
/// As [`run`].
pub fn sweep(options: &Options, closed: &Report) -> Result<Knee, Fault> {
    let mut steps = Vec::new();
    for share in SHARES {
        let offered = (closed.launches_per_second * share).max(1.0);
        let load = Load::Open { rate: offered };
        let report = run(&Options { load, ceiling: Duration::ZERO, ..options.clone() })?;
        let (started, latency_us) = (report.launches_per_second, report.latency_us);
        steps.push(Step { offered, started, latency_us });
    }
    let calm = steps.first().map_or(1, |step| step.latency_us.p50.max(1));
    let holds =
        |step: &&Step| step.latency_us.p99 <= BEND * calm && step.started >= TAKEN * step.offered;
    let knee = steps.iter().take_while(holds).last().map(|step| step.offered);
    let half = steps.get(1).map(|step| step.latency_us).unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "microseconds")]
    let half_load_ratio = half.p99 as f64 / half.p50.max(1) as f64;
    Ok(Knee { closed: closed.launches_per_second, steps, knee, half_load_ratio })
}

impl fmt::Display for Knee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.knee {
            Some(knee) => write!(
                f,
                "{knee:.0} launches a second on this machine, {:.0} % of the closed loop's {:.0}",
                100.0 * knee / self.closed.max(1.0),
                self.closed
            )?,
            None => write!(f, "below the lowest rate offered; closed loop {:.0}", self.closed)?,
        }
        writeln!(f, "; p99 is {:.1} times p50 at half load", self.half_load_ratio)?;
        for Step { offered, started, latency_us: LatencyUs { p50, p99, .. } } in &self.steps {
            writeln!(
                f,
                "    offered {offered:>8.0}/s  started {started:>8.0}/s  p50 {p50:>7} us  p99 {p99:>8} us"
            )?;
        }
        Ok(())
    }
}
