//! What placers' health reports lead to: suspicion, then quarantine with exponential retest.
//!
//! A host that fails every launch at once looks empty and draws all work: the black hole of FAULTS P1. One placer's word
//! never quarantines a host, for the placer may be the broken one: it takes `placers_min` distinct ones inside a
//! window. A quarantine ends by itself; the host is tried again, and if it is reported again its next one is twice
//! as long. At most [`QUARANTINE_PERCENT`] of the fleet are out at once: when most hosts fail it is not the hosts (P2).

use std::collections::{BTreeMap, btree_map::Entry};

use wire::{HostId, report::FailureReport};

use crate::limits::{PLACERS_MAX, QUARANTINE_PERCENT, REPORTED_HOSTS_MAX, REPORTERS_MAX};

/// Settings of the quarantine.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Distinct placers that must report a host.
    pub placers_min: usize,
    /// Milliseconds inside which they must.
    pub window_ms: u64,
    /// Milliseconds of a first quarantine.
    pub first_ms: u64,
    /// Milliseconds of the longest.
    pub longest_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { placers_min: 2, window_ms: 10_000, first_ms: 10_000, longest_ms: 600_000 }
    }
}

/// What is to be done about a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// A placer reported its health.
    Suspect(HostId),
    /// No report of it is young any more.
    Clear(HostId),
    /// Leave it out.
    Quarantine(HostId),
    /// Try it again.
    Release(HostId),
}

#[derive(Clone, Debug, Default)]
struct Reported {
    by: Vec<(u64, u64)>,
    until_ms: Option<u64>,
    /// Quarantines in a row.
    times: u32,
    /// When it was released last.
    released_ms: u64,
}

/// Reports and quarantines of a fleet.
#[derive(Debug)]
pub struct Quarantine {
    settings: Settings,
    hosts: BTreeMap<HostId, Reported>,
    placers: BTreeMap<u64, u64>,
    out: u64,
    /// Reports that were older than the last of their placer.
    pub replayed: u64,
    /// Quarantines that the cap refused.
    pub capped: u64,
}

impl Quarantine {
    /// None yet.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self {
            settings,
            hosts: BTreeMap::new(),
            placers: BTreeMap::new(),
            out: 0,
            replayed: 0,
            capped: 0,
        }
    }

    /// Hosts that are out.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.out
    }

    /// Whether none is out.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.out == 0
    }

    /// Whether a report is new from its placer. Each counts once (its seq must grow).
    pub fn admit(&mut self, placer: u64, report: &FailureReport) -> bool {
        let full = self.placers.len() >= PLACERS_MAX;
        let fresh = match self.placers.entry(placer) {
            Entry::Occupied(mut last) => {
                let fresh = report.seq > *last.get();
                if fresh {
                    last.insert(report.seq);
                }
                fresh
            }
            Entry::Vacant(_) if full => false,
            Entry::Vacant(none) => {
                none.insert(report.seq);
                true
            }
        };
        self.replayed += u64::from(!fresh);
        fresh
    }

    /// Takes a health report that was admitted, in a fleet of `total` hosts.
    pub fn handle_report(
        &mut self,
        now_ms: u64,
        total: u64,
        placer: u64,
        host: HostId,
    ) -> Option<Act> {
        if self.hosts.len() >= REPORTED_HOSTS_MAX && !self.hosts.contains_key(&host) {
            return None;
        }
        let settings = self.settings;
        // A fleet of three or more can spare one, however small a share that is.
        let cap = (total * QUARANTINE_PERCENT / 100).max(u64::from(total >= 3));
        let reported = self.hosts.entry(host).or_default();
        reported.by.retain(|&(by, at_ms)| by != placer && at_ms + settings.window_ms > now_ms);
        if reported.by.len() < REPORTERS_MAX {
            reported.by.push((placer, now_ms));
        }
        if reported.until_ms.is_some() {
            return None;
        }
        if reported.by.len() < settings.placers_min.max(2) {
            return Some(Act::Suspect(host));
        }
        if self.out >= cap {
            self.capped += 1;
            return Some(Act::Suspect(host));
        }
        let length_ms =
            settings.first_ms.saturating_mul(1 << reported.times.min(20)).min(settings.longest_ms);
        reported.times += 1;
        reported.until_ms = Some(now_ms + length_ms);
        reported.by.clear();
        self.out += 1;
        Some(Act::Quarantine(host))
    }

    /// Ends what is over: quarantines, suspicions, and the memory of hosts that stayed well for as long as their next
    /// quarantine would have been.
    pub fn poll(&mut self, now_ms: u64, acts: &mut Vec<Act>) {
        let settings = self.settings;
        let out = &mut self.out;
        self.hosts.retain(|&host, reported| {
            if reported.until_ms.is_some_and(|until_ms| until_ms <= now_ms) {
                (reported.until_ms, reported.released_ms) = (None, now_ms);
                *out -= 1;
                acts.push(Act::Release(host));
            }
            let had = !reported.by.is_empty();
            reported.by.retain(|&(_, at_ms)| at_ms + settings.window_ms > now_ms);
            if had && reported.by.is_empty() && reported.until_ms.is_none() {
                acts.push(Act::Clear(host));
            }
            let next_ms = settings.first_ms.saturating_mul(1 << reported.times.min(20));
            let forgiven = reported.times == 0
                || reported.released_ms + next_ms.min(settings.longest_ms) <= now_ms;
            reported.until_ms.is_some() || !reported.by.is_empty() || !forgiven
        });
    }

    /// A host is gone: so are its reports.
    pub fn handle_gone(&mut self, host: HostId) {
        if let Some(reported) = self.hosts.remove(&host) {
            self.out -= u64::from(reported.until_ms.is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::CapacityWord;

    use super::*;

    fn report(seq: u64) -> FailureReport {
        FailureReport {
            host: HostId(1),
            seq,
            about: FailureReport::HEALTH,
            word: CapacityWord(0),
            failures: 1,
            code: 9,
        }
    }

    #[test]
    fn one_placer_never_quarantines_and_two_do() {
        let mut quarantine = Quarantine::new(Settings::default());
        for now_ms in 0..100 {
            let act = quarantine.handle_report(now_ms, 100, 1, HostId(1));
            assert_eq!(act, Some(Act::Suspect(HostId(1))));
        }
        let act = quarantine.handle_report(100, 100, 2, HostId(1));
        assert_eq!(act, Some(Act::Quarantine(HostId(1))));
    }

    #[test]
    fn two_placers_far_apart_do_not() {
        let mut quarantine = Quarantine::new(Settings::default());
        quarantine.handle_report(0, 100, 1, HostId(1));
        let act = quarantine.handle_report(10_000, 100, 2, HostId(1));
        assert_eq!(act, Some(Act::Suspect(HostId(1))));
    }

    #[test]
    fn a_retest_comes_later_each_time_and_a_healed_host_is_forgiven() {
        let mut quarantine = Quarantine::new(Settings::default());
        let (mut now_ms, mut lengths) = (0, Vec::new());
        for _ in 0..9 {
            quarantine.handle_report(now_ms, 100, 1, HostId(1));
            let act = quarantine.handle_report(now_ms, 100, 2, HostId(1));
            assert_eq!(act, Some(Act::Quarantine(HostId(1))));
            let (began_ms, mut acts) = (now_ms, Vec::new());
            while !acts.contains(&Act::Release(HostId(1))) {
                now_ms += 1_000;
                quarantine.poll(now_ms, &mut acts);
            }
            lengths.push((now_ms - began_ms) / 1_000);
        }
        assert_eq!(lengths, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        quarantine.poll(now_ms + 600_000, &mut Vec::new());
        assert!(quarantine.hosts.is_empty() && quarantine.is_empty());
    }

    #[test]
    fn at_most_a_tenth_of_the_fleet_is_out() {
        let mut quarantine = Quarantine::new(Settings::default());
        for host in (0..60).map(HostId) {
            quarantine.handle_report(0, 100, 1, host);
            quarantine.handle_report(0, 100, 2, host);
        }
        assert_eq!((quarantine.len(), quarantine.capped), (10, 50));
        quarantine.handle_gone(HostId(0));
        assert_eq!(quarantine.len(), 9);
    }

    #[test]
    fn the_only_hosts_of_a_tiny_fleet_stay() {
        let mut quarantine = Quarantine::new(Settings::default());
        quarantine.handle_report(0, 2, 1, HostId(1));
        assert_eq!(quarantine.handle_report(0, 2, 2, HostId(1)), Some(Act::Suspect(HostId(1))));
    }

    #[test]
    fn a_replayed_report_counts_once() {
        let mut quarantine = Quarantine::new(Settings::default());
        assert!(quarantine.admit(1, &report(5)));
        assert!(!quarantine.admit(1, &report(5)));
        assert!(!quarantine.admit(1, &report(4)));
        assert!(quarantine.admit(2, &report(4)));
        assert_eq!(quarantine.replayed, 2);
    }
}
