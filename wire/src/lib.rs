//! What Volley's parts say to one another.
//!
//! Records (heartbeat, directive, failure report, capacity feed), the host map, the launch protocol, ids, limits
//! and error codes. `PROTOCOL.md` beside this crate is normative; its sentences are numbered and quoted here.
//! Every decoder takes bytes from outside and gives back a checked type or an error that names the rule.
//!
//! Left out: sockets, files, clocks and randomness. How a message travels is `wire-net`'s business; what it
//! leads to is decided by the cores.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod call;
pub mod capacity;
pub mod codec;
pub mod datagram;
pub mod fault;
pub mod feed;
pub mod frame;
pub mod hash;
pub mod heartbeat;
pub mod id;
pub mod launch;
pub mod limits;
pub mod map;
pub mod network;
pub mod records;
pub mod rendezvous;
pub mod report;
pub mod rows;
pub mod seal;

pub use capacity::{CapacityWord, ShapeId, Stamp};
pub use fault::{Code, Fault};
pub use id::{BucketId, HostId, ImageId, Incarnation, LaunchId, SandboxId, Seq};
