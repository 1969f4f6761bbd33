//! A fleet in one thread: the real cores under simulated time, network, hosts, arrivals and faults.
//!
//! Nothing of the cores is imitated. Heartbeats are sealed by hostd-core's sender and verified by heartbeat-core's shard;
//! silence is judged by its brake, reports by its quarantine, maps built by its builder; placers adopt those maps
//! into placer-core's table, pick, and carry launches through its state machine; hosts admit, deduplicate, cancel and reap
//! by hostd-core. What is simulated is what they are given: time, latency, loss, crashes, and how long a sandbox lives.
//!
//! One seed makes one run, event by event: [`fleet::run`] of the same [`Options`] gives the same [`Outcome`] and
//! digest. While it runs, [`check`] holds the rules of the simulation gate (FAULTS); a broken rule ends the run with its
//! text. Modes, as `sim MODE`: `lite` (fixed seeds and a fresh one), `swarm` (many random seeds and faults), `replay`
//! (one seed again, told in words), `scale` (a million hosts), `grid` (staleness against choices).
//!
//! Measured on two shared cores: `swarm` of 10,000 seeds (1 to 10,000) broke no rule in 45 million launches and 520 million
//! events, 3.5 minutes of processor time; `scale` took 8.5 s of processor time (26 s on the wall beside other work) and 633 MiB.
//!
//! `tests/DESIGN.md` has the table of faults and cases.
//!
//! Left out: sockets, the stores' own inside, and threads. Both stores do what they promise at once and in one place; what is
//! simulated is how questions to them fare: lost, answered to nobody, or carried out long after. Memory orderings are loom's business (`placer-core/tests/loom.rs`).
#![forbid(unsafe_code)]

pub mod caller;
pub mod check;
pub mod control;
pub mod fleet;
pub mod grid;
pub mod host;
pub mod options;
pub mod outcome;
pub mod placer;
pub mod queue;
pub mod scale;
pub mod stores;
pub mod swarm;

pub use fleet::run;
pub use options::{Fault, Options, What};
pub use outcome::Outcome;

/// Microseconds since the run began.
pub type Micros = u64;

/// One second.
pub const SECOND: Micros = 1_000_000;

/// The shape that all launches have.
///
/// # Panics
/// Never.
#[must_use]
pub fn shape() -> wire::ShapeId {
    match wire::ShapeId::new(0) {
        Some(shape) => shape,
        None => unreachable!("there are four shapes"),
    }
}
