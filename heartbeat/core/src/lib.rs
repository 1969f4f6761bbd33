//! The capacity service's decisions: who lives, what is written, what is said to whom, who publishes.
//!
//! Bytes and the time come in by `handle_*`, what is to be done comes out by `poll_*`, `take_*` and return values. The
//! daemon (`heartbeat`) owns sockets, stores and clocks; the simulator drives the very same code. All times are
//! milliseconds since some start of the caller's own, never of another machine.
//!
//! - [`shard`]: the records of the hosts, one shard a receiver thread: verifies, keeps the newest, marks what changed.
//! - [`liveness`]: when silence becomes death, and the brake that keeps a burst of silence from emptying the map.
//! - [`quarantine`]: what placers' failure reports lead to.
//! - [`flush`]: how fast rows may leave for a database that may be slow or gone.
//! - [`feed`]: which placers are told, and what.
//! - [`map`]: pages and head of the host map. [`leader`]: who publishes it, and what an unknown PUT means.
#![forbid(unsafe_code)]

pub mod feed;
pub mod flush;
mod index;
pub mod keys;
pub mod leader;
pub mod limits;
pub mod liveness;
pub mod map;
pub mod quarantine;
mod record;
pub mod row;
pub mod shard;

pub use keys::KeyRing;
pub use row::{Drain, Row};
pub use shard::{Heard, Shard};
