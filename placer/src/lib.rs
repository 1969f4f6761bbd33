//! The placement service: clients come in, launches go to hosts, and nothing is kept but what is known anyway.
//!
//! Threads: one that loads the map, one that hears the feed, and one a core that serves clients and dispatches. The last
//! share no lock and no queue with one another. `DESIGN.md` says how a launch goes through, and what is simple for now.
#![deny(unsafe_code)]

mod calls;
pub mod config;
mod direct;
mod dispatch;
mod feed;
pub mod fleet;
mod front;
mod known;
mod listing;
pub mod loader;
mod lookup;
pub mod mapped;
pub mod metrics;
mod named;
mod pool;
mod run;
mod worker;

pub use config::{Config, Lookup};
pub use run::run;

/// The host map as it is mapped.
pub type Map = placer_core::MapView<mapped::MappedBytes>;

/// The capacity table as it is mapped.
pub type Table = placer_core::CapacityTable<mapped::MappedWords>;
