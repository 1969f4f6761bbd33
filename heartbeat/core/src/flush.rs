//! How fast rows leave for a store that may be slow, overloaded, or gone.
//!
//! A window of outstanding batches that halves with each failure, down to one probe at a time with growing pauses, and
//! grows by one for each success. So a store that is away is asked about once a second, not by every row, and when it
//! comes back the backlog leaves at the rate that the store takes, without a herd (FAULTS D1, D2). This is all the
//! retrying there is: a failed row waits in its record and goes with a later round in its newest state.

use crate::limits::BATCHES_IN_FLIGHT_MAX;

const PAUSE_MS_MIN: u64 = 50;
const PAUSE_MS_MAX: u64 = 1_000;

/// The window of one shard.
#[derive(Clone, Debug)]
pub struct Flush {
    window: usize,
    in_flight: usize,
    pause_ms: u64,
    resume_ms: u64,
    failures: u64,
}

impl Default for Flush {
    fn default() -> Self {
        Self {
            window: BATCHES_IN_FLIGHT_MAX,
            in_flight: 0,
            pause_ms: PAUSE_MS_MIN,
            resume_ms: 0,
            failures: 0,
        }
    }
}

impl Flush {
    /// Batches that may be sent now.
    #[must_use]
    pub const fn room(&self, now_ms: u64) -> usize {
        if now_ms < self.resume_ms { 0 } else { self.window.saturating_sub(self.in_flight) }
    }

    /// Batches outstanding.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Batches that failed since the last one that did not.
    #[must_use]
    pub const fn failures(&self) -> u64 {
        self.failures
    }

    /// A batch was sent.
    pub const fn handle_sent(&mut self) {
        self.in_flight += 1;
    }

    /// A batch was answered.
    ///
    /// # Panics
    /// If none was outstanding.
    pub fn handle_done(&mut self, now_ms: u64, acknowledged: bool) {
        assert!(self.in_flight > 0, "an answer belongs to a batch that was sent");
        self.in_flight -= 1;
        if acknowledged {
            self.window = (self.window + 1).min(BATCHES_IN_FLIGHT_MAX);
            (self.pause_ms, self.failures) = (PAUSE_MS_MIN, 0);
            return;
        }
        self.window = (self.window / 2).max(1);
        self.failures += 1;
        self.resume_ms = now_ms + self.pause_ms;
        self.pause_ms = (self.pause_ms * 2).min(PAUSE_MS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `outage_ms` cost in batches, and how long the way back to a full window took, with answers after 5 ms.
    fn run(outage_ms: u64) -> (u64, u64) {
        let (mut flush, mut sent, mut due) = (Flush::default(), 0, Vec::new());
        for now_ms in 0..outage_ms + 60_000 {
            let up = now_ms >= outage_ms;
            due.retain(|&at_ms| {
                if at_ms == now_ms {
                    flush.handle_done(now_ms, up);
                }
                at_ms != now_ms
            });
            if up && flush.window == BATCHES_IN_FLIGHT_MAX {
                return (sent, now_ms - outage_ms);
            }
            for _ in 0..flush.room(now_ms) {
                flush.handle_sent();
                sent += u64::from(!up);
                due.push(now_ms + 5);
            }
        }
        panic!("the window never opened again");
    }

    #[test]
    fn an_outage_of_ten_minutes_is_probed_about_once_a_second_and_left_within_two() {
        let (sent, back_ms) = run(600_000);
        assert!(sent < 700, "{sent} batches into the void");
        assert!(back_ms < 2_000, "{back_ms} ms to a full window");
    }
}
