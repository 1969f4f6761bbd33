//! What one dispatching thread remembers over all its launches: outcomes, the retry budget, news for the aggregators.
//!
//! **Outcome window.** Each outcome of a host moves its penalty in the table ([`crate::reserved`]): a failure or silence
//! adds three levels, a launch far slower than is usual here adds one, a launch that went well takes half off, and every
//! [`DECAY_US`] takes one level off all. The penalty is an exponentially weighted count of the host's last outcomes,
//! kept as a logarithm; at three levels the host is considered once in eight times. A black hole, which looks
//! emptiest because it fails first, is down to one in a thousand after three launches; a gray host falls by degrees, and both
//! are tried again, and believed again, by degrees.
//!
//! **Retry budget.** A token bucket: each launch puts in a share, each attempt after a failure or silence takes one
//! out, so that an outage is not amplified. A refusal is not an error and takes none: it is quick and it
//! corrects the table.
//!
//! Left out: sending the reports. They queue here, bounded, for the daemon.

use std::collections::VecDeque;

use wire::{CapacityWord, Code, HostId, limits::ATTEMPTS_MAX};

use crate::{
    Micros,
    select::{Picker, Select},
};

/// Microseconds between two calls of [`crate::CapacityTable::decay`].
pub const DECAY_US: Micros = 10_000_000;

/// Reports that wait, at most; the oldest are dropped and counted.
pub const REPORTS_MAX: usize = 1_024;

/// Levels that a failure adds, and the highest that failures reach (once in 1,024 times).
const FAILURE_LEVELS: u8 = 3;
const FAILURE_LEVELS_MAX: u8 = 10;
/// The highest that slowness alone reaches: once in 16 times. A slow host still works.
const SLOW_LEVELS_MAX: u8 = 4;

/// How launches are carried out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// How hosts are picked.
    pub select: Select,
    /// Attempts of one launch over all hosts, at most [`ATTEMPTS_MAX`].
    pub attempts_max: u32,
    /// Launches a retry token, ten or more: retries are at most that share of the offered load.
    pub launches_a_retry: u32,
    /// Tokens that can be saved up.
    pub retry_burst: u32,
    /// Times the usual latency from which a launch counts as slow.
    pub slow_factor: u64,
    /// Latency below which nothing is slow.
    pub slow_least_us: Micros,
    /// Least and most time that one attempt waits for an answer.
    pub wait_us: (Micros, Micros),
    /// Off by default. After this long without an answer the launch is cancelled there and, once that is answered,
    /// sent elsewhere: never two hosts at once (PROTOCOL 6.5).
    pub hedge_us: Option<Micros>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            select: Select::default(),
            attempts_max: ATTEMPTS_MAX,
            launches_a_retry: 12,
            retry_burst: 100,
            slow_factor: 4,
            slow_least_us: 2_000,
            wait_us: (50_000, 5_000_000),
            hedge_us: None,
        }
    }
}

/// News of a host for the aggregators; the daemon gives it a seq and seals it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// It refused, and this is its true word.
    Capacity {
        /// The host.
        host: HostId,
        /// Its word.
        word: CapacityWord,
    },
    /// It failed launches or did not answer.
    Health {
        /// The host.
        host: HostId,
        /// Failures since the last report of it, as far as they are still queued.
        failures: u32,
        /// What the newest was.
        code: Code,
    },
}

/// How an attempt ended, as it counts for or against its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It did its part, in so many microseconds.
    Well(Micros),
    /// It did not.
    Badly(Code),
}

/// One thread's memory.
#[derive(Debug)]
pub struct Dispatch {
    /// How launches are carried out.
    pub policy: Policy,
    pub(crate) picker: Picker,
    tokens: u64, // In units of 1 / launches_a_retry of a retry.
    usual_us: f64,
    failing: f64,
    reports: VecDeque<Report>,
    reports_dropped: u64,
}

impl Dispatch {
    /// A thread's memory, with the seed of its choices.
    #[must_use]
    pub fn new(policy: Policy, seed: u64) -> Self {
        let tokens = u64::from(policy.retry_burst) * u64::from(policy.launches_a_retry);
        Self {
            policy,
            picker: Picker::new(policy.select, seed),
            tokens,
            usual_us: 0.0,
            failing: 0.0,
            reports: VecDeque::new(),
            reports_dropped: 0,
        }
    }

    /// The thread's picker, for batches.
    pub const fn picker(&mut self) -> &mut Picker {
        &mut self.picker
    }

    /// The next report to send.
    pub fn poll_report(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    /// Reports that were dropped because nobody polled.
    #[must_use]
    pub const fn reports_dropped(&self) -> u64 {
        self.reports_dropped
    }

    /// The share of recent attempts that ended badly on their hosts, from 0 to 1.
    #[must_use]
    pub const fn failing(&self) -> f64 {
        self.failing
    }

    /// The median latency of launches that went well, as a slow-moving estimate.
    #[must_use]
    pub const fn usual_us(&self) -> f64 {
        self.usual_us
    }

    /// A launch was offered.
    pub(crate) fn offered(&mut self) {
        let most = u64::from(self.policy.retry_burst) * u64::from(self.policy.launches_a_retry);
        self.tokens = (self.tokens + 1).min(most);
    }

    /// Takes a retry out of the budget, if there is one.
    pub(crate) fn take_retry(&mut self) -> bool {
        match self.tokens.checked_sub(u64::from(self.policy.launches_a_retry.max(1))) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }

    /// Levels that an outcome adds to its host's penalty, and up to which; `None` takes half off.
    pub(crate) fn judge(&mut self, verdict: Verdict) -> Option<(u8, u8)> {
        let bad = matches!(verdict, Verdict::Badly(_));
        self.failing += (f64::from(u8::from(bad)) - self.failing) / 64.0;
        let Verdict::Well(took_us) = verdict else {
            return Some((FAILURE_LEVELS, FAILURE_LEVELS_MAX));
        };
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let took = took_us as f64;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let slow_from =
            (self.usual_us * self.policy.slow_factor as f64).max(self.policy.slow_least_us as f64);
        let slow = self.usual_us > 0.0 && took > slow_from;
        // Steps towards the median: one outlier moves it as little as one ordinary launch.
        if self.usual_us == 0.0 {
            self.usual_us = took.max(1.0);
        } else if took > self.usual_us {
            self.usual_us *= 1.02;
        } else {
            self.usual_us *= 0.98;
        }
        slow.then_some((1, SLOW_LEVELS_MAX))
    }

    pub(crate) fn report(&mut self, report: Report) {
        if let Report::Health { host, failures, code } = report {
            let same = self.reports.iter_mut().rev().take(32).find_map(|queued| match queued {
                Report::Health { host: queued, failures, code } if *queued == host => {
                    Some((failures, code))
                }
                _ => None,
            });
            if let Some((queued, newest)) = same {
                (*queued, *newest) = (queued.saturating_add(failures), code);
                return;
            }
        }
        if self.reports.len() == REPORTS_MAX {
            self.reports.pop_front();
            self.reports_dropped += 1;
        }
        self.reports.push_back(report);
    }
}
