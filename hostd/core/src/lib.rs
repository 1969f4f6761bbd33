//! The host daemon's decisions: which launches are admitted, what each sandbox is, when it must end, and when
//! the next heartbeat goes out. DESIGN 5.4, 5.5 and 6.
//!
//! Nothing here reads a clock, draws randomness or touches the world. Times are milliseconds of one monotonic
//! clock of the machine, given by the caller; they hold over a restart of the daemon, but not of the machine.
//! The caller feeds events in by `handle_*(now_ms, ..)` and takes out what is to be done by `poll_*`.
//!
//! Left out: how a box is made (`hostd-sandbox`), where the journal lies and how bytes travel (`hostd`).
#![forbid(unsafe_code)]

pub mod admission;
mod again;
pub mod beat;
pub mod host;
pub mod launches;
pub mod limits;
pub mod records;
pub mod sandbox;
pub mod shapes;

#[cfg(test)]
mod beat_tests;
#[cfg(test)]
mod host_tests;
mod view;

pub use admission::{Admission, Resources};
pub use beat::{Beat, BeatConfig};
pub use host::{Admit, Ask, Deed, Host, HostConfig};
pub use launches::{BodyHash, Fate, Launches};
pub use sandbox::Sandbox;
pub use shapes::{Shape, Shapes};
