//! Several rounds, in turn, and what they say: a median with its extremes.
//!
//! Candidates and their ceiling alternate inside one process run, so that a slow moment of the machine hits both.

use std::{fmt, time::Duration};

use serde::Serialize;
use wire_net::udp::Engine;

/// What a bench of a receiving thread takes: heartbeats into a shard, or the capacity feed into a table.
#[derive(Clone, Debug)]
pub struct Options {
    /// Hosts that are spoken for.
    pub hosts: usize,
    /// What comes a second in the paced rounds: heartbeats, or words.
    pub rate: f64,
    /// Time of a round.
    pub time: Duration,
    /// Rounds after one that warms up.
    pub rounds: usize,
    /// How datagrams are received.
    pub engine: Engine,
    /// The seed of the fleet.
    pub seed: u64,
}

impl Options {
    /// Five rounds of a second.
    #[must_use]
    pub fn of(hosts: usize, rate: f64) -> Self {
        let time = Duration::from_secs(1);
        Self { hosts, rate, time, rounds: 5, engine: Engine::Auto, seed: 1 }
    }
}

/// A figure over several rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figure {
    /// The middle round.
    pub median: f64,
    /// The lowest round.
    pub min: f64,
    /// The highest round.
    pub max: f64,
    /// Rounds.
    pub rounds: usize,
}

impl Figure {
    /// The figure of these rounds.
    #[must_use]
    pub fn of(mut rounds: Vec<f64>) -> Self {
        rounds.sort_by(f64::total_cmp);
        let at = |at: usize| rounds.get(at).copied().unwrap_or(f64::NAN);
        Self {
            median: at(rounds.len() / 2),
            min: at(0),
            max: at(rounds.len().saturating_sub(1)),
            rounds: rounds.len(),
        }
    }

    /// The same in another unit.
    #[must_use]
    pub fn scaled(self, by: f64) -> Self {
        Self { median: self.median * by, min: self.min * by, max: self.max * by, ..self }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(1);
        write!(f, "{:.digits$} ({:.digits$} to {:.digits$})", self.median, self.min, self.max)
    }
}

/// Runs each candidate once a round, in turn; the first round only warms up. A candidate returns its figure.
pub fn alternate<E, const N: usize>(
    rounds: usize,
    mut candidates: [&mut dyn FnMut() -> Result<f64, E>; N],
) -> Result<[Figure; N], E> {
    let mut figures: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    for round in 0..=rounds {
        for (candidate, figures) in candidates.iter_mut().zip(&mut figures) {
            let figure = candidate()?;
            if round > 0 {
                figures.push(figure);
            }
        }
    }
    Ok(figures.map(Figure::of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_is_not_counted_and_the_median_is_the_middle() {
        let (mut n, mut other) = (0.0, 0.0);
        let [a, b] = alternate::<(), 2>(
            3,
            [
                &mut || {
                    n += 1.0;
                    Ok(if n == 1.0 { 1_000.0 } else { 10.0 - n })
                },
                &mut || {
                    other += 1.0;
                    Ok(other)
                },
            ],
        )
        .unwrap();
        assert_eq!(a, Figure { median: 7.0, min: 6.0, max: 8.0, rounds: 3 });
        assert_eq!(b.median, 3.0);
    }
}
