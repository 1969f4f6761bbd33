//! Which sandboxes have something new to be told to aggregators (PROTOCOL 9.1).
//!
//! A change only marks the sandbox here, in memory and bounded: nothing of a launch waits for it. What finds no room is
//! told with the next whole round, which also repairs what was lost on the way.

use std::collections::{HashSet, VecDeque};

use wire::limits::RECORDS_ROUND_MS;

/// Sandboxes that wait to be told, besides a whole round.
pub const UNTOLD_MAX: usize = 4_096;

/// Datagrams of records that a host sends in a second: with some seven records each, what about 200 launches a
/// second change. A faster host tells the rest later.
pub const DATAGRAMS_MAX: u16 = 32;

/// What is still to be told.
#[derive(Debug, Default)]
pub struct Untold {
    on: bool,
    changed: VecDeque<u64>,
    marked: HashSet<u64>,
    round: Vec<u64>,
    round_at_ms: u64,
}

impl Untold {
    /// From here on changes are marked; the first whole round is due at once.
    pub fn begin(&mut self, now_ms: u64) {
        self.on = true;
        self.round_at_ms = now_ms;
    }

    /// A sandbox has changed.
    pub fn mark(&mut self, local: u64) {
        if self.on && self.marked.len() < UNTOLD_MAX && self.marked.insert(local) {
            self.changed.push_back(local);
        }
    }

    /// Begins a whole round if one is due; `all` are the sandboxes that are known.
    pub fn begin_round(&mut self, now_ms: u64, all: impl FnOnce() -> Vec<u64>) {
        if self.on && now_ms >= self.round_at_ms {
            self.round_at_ms = now_ms.saturating_add(RECORDS_ROUND_MS);
            self.round = all();
        }
    }

    /// The next one to tell: what changed first, then what the round still has.
    pub fn take(&mut self) -> Option<u64> {
        if let Some(local) = self.changed.pop_front() {
            self.marked.remove(&local);
            return Some(local);
        }
        self.round.pop()
    }

    /// Whether nothing is left to tell.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.round.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_come_first_and_once_and_the_round_tells_all() {
        let mut untold = Untold::default();
        untold.mark(1);
        assert!(untold.is_empty(), "off until begun");
        untold.begin(10);
        untold.begin_round(10, || vec![5, 6]);
        untold.mark(2);
        untold.mark(2);
        let told: Vec<_> = std::iter::from_fn(|| untold.take()).collect();
        assert_eq!(told, [2, 6, 5]);
        untold.begin_round(11, || panic!("not due"));
        untold.mark(2);
        assert_eq!(untold.take(), Some(2), "changed again, told again");
        untold.begin_round(10 + RECORDS_ROUND_MS, || vec![7]);
        assert_eq!(untold.take(), Some(7));
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut untold = Untold::default();
        untold.begin(0);
        (0..UNTOLD_MAX as u64 + 9).for_each(|local| untold.mark(local));
        assert_eq!(std::iter::from_fn(|| untold.take()).count(), UNTOLD_MAX);
    }
}
