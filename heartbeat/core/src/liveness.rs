//! When silence is death, and the brake.
//!
//! Think of a traffic light that has failed: one car that does not come is a broken car; when no car comes at all, the
//! road is closed, and nobody should be declared dead for it. So the slow scan removes the silent one by one, but if
//! more than [`BRAKE_PERCENT`] of the fleet would leave at once it removes nobody and raises an alarm: then most likely
//! it is we who cannot hear (DESIGN 4.5, invariant 8). Scans may come faster than heartbeats, so a host leaves only when
//! it has been dead for an interval: by then all who fell silent with it are counted.
//!
//! Hosts that other aggregators hear are known here from the store alone. While the store does not answer they cannot
//! be seen to live, so nobody is removed from the first failed scan until a grace after scans work again.

use crate::{limits::BRAKE_PERCENT, shard::upkeep::Census, shard::upkeep::Silent};

/// What a scan leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// These leave; possibly none.
    Remove(Vec<Silent>),
    /// Too many would leave: nobody does. The alarm is up until a scan passes.
    Brake {
        /// Silent hosts.
        silent: u64,
        /// All hosts.
        total: u64,
    },
    /// The store was away, the brake has just gone off, or this process is young: too early to judge anybody.
    Grace,
}

/// The judge of one aggregator.
#[derive(Clone, Debug)]
pub struct Liveness {
    grace_ms: u64,
    percent_max: u64,
    judge_from_ms: u64,
    held_until_ms: u64,
    store_away: bool,
    alarm: bool,
}

impl Liveness {
    /// A judge that starts at `now_ms` and gives a grace of `grace_ms` after each time of deafness.
    #[must_use]
    pub const fn new(now_ms: u64, grace_ms: u64) -> Self {
        Self {
            grace_ms,
            percent_max: BRAKE_PERCENT,
            judge_from_ms: now_ms + grace_ms,
            held_until_ms: 0,
            store_away: false,
            alarm: false,
        }
    }

    /// The same with another brake, in percent of the fleet.
    #[must_use]
    pub const fn with_brake(mut self, percent_max: u64) -> Self {
        self.percent_max = percent_max;
        self
    }

    /// A scan of the store was complete, or it was not.
    pub const fn handle_scan(&mut self, now_ms: u64, complete: bool) {
        if !complete {
            self.store_away = true;
        } else if self.store_away {
            self.store_away = false;
            self.judge_from_ms = now_ms + self.grace_ms;
        }
    }

    /// Whether the brake is on.
    #[must_use]
    pub const fn alarm(&self) -> bool {
        self.alarm
    }

    /// Judges the silent of a whole census. One host may always leave: a fleet of four must be able to lose one.
    pub fn judge(&mut self, now_ms: u64, census: Census) -> Verdict {
        if self.store_away || now_ms < self.judge_from_ms {
            return Verdict::Grace;
        }
        let silent = census.fresh + census.silent.len() as u64;
        let braked = self.alarm;
        self.alarm = silent > 1 && silent * 100 > census.total * self.percent_max;
        if self.alarm {
            return Verdict::Brake { silent, total: census.total };
        }
        if braked {
            // That they are heard again too takes an interval and its jitter, and may have begun just now: nobody is
            // dead for being the last.
            self.held_until_ms = now_ms + 2 * census.interval_ms_max;
        }
        if now_ms < self.held_until_ms {
            return Verdict::Grace;
        }
        Verdict::Remove(census.silent)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wire::{HostId, Seq};

    use super::*;

    fn census(total: u64, silent: u64) -> Census {
        let silent =
            (0..silent).map(|at| Silent { host: HostId(at), seq: Seq(1), heard_ms: 0 }).collect();
        Census { total, silent, ..Census::default() }
    }

    proptest! {
        #[test]
        fn never_more_than_the_brake_allows_leave(total in 1u64..5_000, share in 0u64..=100) {
            let silent = total * share / 100;
            match Liveness::new(0, 0).judge(1, census(total, silent)) {
                Verdict::Remove(gone) => prop_assert!(
                    gone.len() as u64 == silent && (silent <= 1 || silent * 5 <= total)
                ),
                Verdict::Brake { .. } => prop_assert!(silent * 5 > total),
                Verdict::Grace => prop_assert!(false, "no grace was asked for"),
            }
        }
    }

    #[test]
    fn half_the_fleet_silent_removes_nobody_and_raises_the_alarm() {
        let mut liveness = Liveness::new(0, 0);
        let verdict = liveness.judge(1, census(1_000, 500));
        assert_eq!(verdict, Verdict::Brake { silent: 500, total: 1_000 });
        assert!(liveness.alarm());
        assert!(
            matches!(liveness.judge(2, census(1_000, 3)), Verdict::Remove(gone) if gone.len() == 3)
        );
        assert!(!liveness.alarm());
    }

    #[test]
    fn those_who_just_died_hold_the_brake_and_do_not_leave() {
        let mut liveness = Liveness::new(0, 0);
        let first_seen = Census { fresh: 300, ..census(1_000, 10) };
        assert_eq!(liveness.judge(1, first_seen), Verdict::Brake { silent: 310, total: 1_000 });
        let few = Census { fresh: 30, ..census(1_000, 10) };
        assert!(matches!(liveness.judge(2, few), Verdict::Remove(gone) if gone.len() == 10));
    }

    #[test]
    fn when_they_are_heard_again_the_last_to_speak_have_time() {
        let mut liveness = Liveness::new(0, 0);
        let silent = |silent| Census { interval_ms_max: 15, ..census(1_000, silent) };
        assert!(matches!(liveness.judge(100, silent(500)), Verdict::Brake { .. }));
        // However long after it: the scan before may have come just before they began to speak.
        assert_eq!(liveness.judge(200, silent(100)), Verdict::Grace);
        assert_eq!(liveness.judge(229, silent(1)), Verdict::Grace);
        assert!(matches!(liveness.judge(230, silent(1)), Verdict::Remove(_)));
    }

    #[test]
    fn nobody_is_judged_while_the_store_is_away_nor_right_after() {
        let mut liveness = Liveness::new(0, 100);
        assert_eq!(liveness.judge(99, census(100, 1)), Verdict::Grace);
        liveness.handle_scan(150, false);
        assert_eq!(liveness.judge(10_000, census(100, 1)), Verdict::Grace);
        liveness.handle_scan(20_000, true);
        assert_eq!(liveness.judge(20_099, census(100, 1)), Verdict::Grace);
        liveness.handle_scan(20_050, true);
        assert!(
            matches!(liveness.judge(20_100, census(100, 1)), Verdict::Remove(gone) if gone.len() == 1)
        );
    }
}
