//! What a run came to.

use std::collections::BTreeMap;

use wire::map::MapVersion;

use crate::Micros;

/// Figures of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Launches that ended, by the second (after the warm-up) in which they came.
    pub seconds: Vec<Second>,
    /// Launch messages that were sent to hosts, first ones and again.
    pub sent: u64,
    /// Refusals that came back.
    pub refused: u64,
    /// Ends that were no start, by the name of their code.
    pub codes: BTreeMap<&'static str, u64>,
    /// Latencies of what was started, ordinary tenants, in us.
    pub latencies_us: Vec<u32>,
    /// Sandboxes started, a host.
    pub started_on: Vec<u32>,
    /// Each attempt: when (ms), on which host. With `trace`.
    pub attempts: Vec<(u32, u32)>,
    /// When which host was first quarantined by the aggregator, in ms.
    pub quarantined_ms: BTreeMap<u32, u64>,
    /// Most hosts in quarantine at once.
    pub quarantined_max: u64,
    /// Hosts removed from the map by the slow scan.
    pub removed: u64,
    /// Whether the brake was on at some time.
    pub braked: bool,
    /// Hosts that were up at the end and not in the newest map.
    pub missing: u32,
    /// The newest map's version.
    pub version: MapVersion,
    /// Hosts that were drawn for each fault.
    pub faulty: Vec<Vec<u32>>,
    /// A digest of every event, in order.
    pub digest: u64,
    /// Events.
    pub events: u64,
    /// Rules that were broken; the run ends with the first.
    pub broken: Option<String>,
}

/// Launches that came in one second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Second {
    /// Offered.
    pub offered: u64,
    /// Started.
    pub started: u64,
}

impl Outcome {
    /// Offered and started in a span of seconds.
    #[must_use]
    pub fn span(&self, from_s: usize, to_s: usize) -> Second {
        let seconds = self.seconds.iter().take(to_s).skip(from_s);
        seconds.fold(Second::default(), |sum, one| Second {
            offered: sum.offered + one.offered,
            started: sum.started + one.started,
        })
    }

    /// Share that was started, in a span of seconds.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub fn success(&self, from_s: usize, to_s: usize) -> f64 {
        let span = self.span(from_s, to_s);
        if span.offered == 0 { 1.0 } else { span.started as f64 / span.offered as f64 }
    }

    /// Messages sent a launch offered.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub fn attempts_a_launch(&self) -> f64 {
        self.sent as f64 / self.span(0, usize::MAX).offered.max(1) as f64
    }

    /// Share of attempts in a span of ms (after the warm-up) that went to `hosts`. With `trace`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub fn share(&self, hosts: &[u32], from_ms: u32, to_ms: u32) -> f64 {
        let within = self.attempts.iter().filter(|(at, _)| (from_ms..to_ms).contains(at));
        let (mut all, mut of) = (0u64, 0u64);
        for (_, host) in within {
            all += 1;
            of += u64::from(hosts.contains(host));
        }
        if all == 0 { 0.0 } else { of as f64 / all as f64 }
    }

    /// A percentile of the latencies, in us.
    #[must_use]
    pub fn latency_us(&self, percent: usize) -> Micros {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        sorted.get(at).copied().unwrap_or(0).into()
    }

    /// Most started on one host, over the mean.
    #[must_use]
    pub fn max_over_mean(&self) -> f64 {
        let most = self.started_on.iter().copied().max().unwrap_or(0);
        let sum: u32 = self.started_on.iter().sum();
        f64::from(most) * self.started_on.len() as f64 / f64::from(sum.max(1))
    }
}
