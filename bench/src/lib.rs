//! The harness that reports launches/sec and every other figure of SPEC.md.
//!
//! Each bench prints its ceiling beside its figure, measured in the same run: on a machine where the load generator
//! shares the cores with what it measures, a figure alone says little (NUMBERS). Nothing here is on anybody's launch
//! path.

pub mod arena;
pub mod cost;
pub mod cpu;
pub mod feed;
pub mod heartbeat;
pub mod image;
pub mod launch;
pub mod map;
pub mod pick;
pub mod rounds;
pub mod scrape;
pub mod store;
