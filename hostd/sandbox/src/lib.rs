//! Boxes: parked ahead of time, given a root and a program in about a millisecond, and held.
//!
//! A box is a process tree in namespaces of its own. The **spawner**, a separate small process, keeps
//! boxes parked and outlives hostd; [`Spawner`] is hostd's handle on it. DESIGN.md beside this crate
//! says who owns what and which attack each measure answers. Left out: images (hostd-image makes the
//! layers that a root is composed of) and policy (hostd decides who gets a box).
//!
//! Any binary that starts a spawner calls [`main_if_asked`] first thing in `main`.

pub mod bench;
mod cgroup;
mod client;
mod error;
mod filter;
mod fork;
mod inside;
mod msg;
mod packet;
mod probe;
mod spawner;
mod spec;
mod start;
mod sweep;
mod sys;
mod syscalls;

pub use client::{Events, Spawner};
pub use error::{ClaimError, Fault, Refusal, StartError};
pub use inside::ENTRIES_MAX;
pub use probe::probe;
pub use spawner::main_if_asked;
pub use spec::{
    BoxNetwork, ClaimSpec, Config, EXITS_MAX, Event, Executed, ExitStatus, Exited, FileAnswer,
    FileKind, FileOp, FileStat, LAYERS_MAX, Limits, Live, PoolState, Program, RootSpec, Running,
    SLOTS_MAX, SandboxId, Shape, Stats, Stdio, Steps, TtySize, Tunnel, UIDS_A_BOX,
};
pub use start::Joined;
pub use sweep::{Swept, sweep};
