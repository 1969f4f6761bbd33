//! The capacity service, `heartbeatd`: hears every host, keeps the fleet's state, publishes the map, feeds placers.
//!
//! Everything is decided in `heartbeat-core`; here are the threads, sockets, stores and clocks around it:
//!
//! - [`receiver`]: a thread a core, each with its socket and its shard. The only hot path.
//! - [`hub`]: what goes to placers (the feed) and what comes from them (reports).
//! - [`writer`]: rows to the store. [`scanner`]: rows from it, and death. [`publisher`]: the map.
//! - [`admin`]: operators' calls over QUIC. [`store`]: the store as a trait, with two real ones behind it.
//!
//! No part waits for another: the store may be gone and hosts are still heard, placers fed and maps published.
//! DESIGN.md says what was decided and why.

pub mod admin;
pub mod config;
pub mod fleet_sender;
pub mod hub;
mod metrics;
pub mod publisher;
pub mod receiver;
pub mod recorded;
mod run;
pub mod scanner;
pub mod shards;
pub mod store;
pub mod writer;

pub use config::Config;
pub use run::{Running, run, start};
