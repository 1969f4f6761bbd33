//! What a placer decides, without IO: which host takes a launch, and what to do when it does not.
//!
//! [`map`] holds where hosts are, [`table`] what is free on them; [`select`] picks and reserves; [`launch`] carries one
//! launch from its first attempt to its outcome, [`named`] one that may come through several placers; [`publish`] swaps a map or a table under its readers. Nothing on the
//! launch path takes a lock, allocates or enters the kernel. Time, bytes and randomness are given by the caller.
//!
//! Left out: sockets, files and clocks. The daemon maps the files and hands in slices; `DESIGN.md` says how they
//! fit together and why the lock-free parts are right.
#![deny(unsafe_code)]

pub mod adopt;
pub mod dispatch;
pub mod fair;
pub mod index;
pub mod launch;
pub mod map;
pub mod named;
mod prefetch;
pub mod publish;
pub mod reserved;
pub mod select;
pub mod sync;
pub mod table;

/// Microseconds since a start of the caller's choice. Never a time of day.
pub type Micros = u64;

pub use adopt::{Adopted, Adopter};
pub use dispatch::{Dispatch, Policy, Report};
pub use fair::Fair;
pub use launch::{Launch, Outcome, Step};
pub use map::MapView;
pub use named::Named;
pub use publish::{Published, Reader};
pub use select::{Pick, Picked, Picker, Select};
pub use table::{CapacityTable, Reservation, TableError};
