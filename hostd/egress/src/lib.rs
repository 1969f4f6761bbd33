//! What sandboxes may reach: packets of boxes carried under policy by a process that has no rights of its own.
//!
//! A box that may reach out has a TUN device in its own network namespace. Its other end is a descriptor that the
//! **worker** of this crate reads: it answers for the whole world, decides by the launch's rules and the operator's
//! settings, and makes the machine's own connections for what may pass. No interface, route, address or firewall rule of
//! the host is touched, so there is nothing to reap. DESIGN.md beside this crate says why it is so. Left out: IPv6,
//! ping, and connections from outside (hostd publishes ports itself).

mod bucket;
mod client;
mod device;
mod dns;
mod guard;
mod limits;
mod link;
mod message;
mod names;
mod own;
mod packet;
mod policy;
mod settings;
mod sync;
mod tcp;
mod udp;
mod worker;

use std::net::Ipv4Addr;

pub use client::{Egress, EgressConfig, EgressError};
pub use limits::{CONNECTIONS_DEFAULT, CONNECTIONS_MAX};
pub use message::{BoxId, Usage};
pub use settings::{EgressSettings, PolicyError};
pub use worker::main_if_asked;

/// Every box's own address. In a range that is for benchmarks (RFC 2544), so that it collides with no network that
/// anybody reaches.
pub const BOX_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// Every box's gateway and name server: the worker.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// Bits of the network of the two.
pub const PREFIX_BITS: u8 = 30;
/// Bytes of a packet at most.
pub const MTU: u32 = 65_520;

const _: () = assert!(MTU as usize == limits::MTU);
