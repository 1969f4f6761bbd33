//! Tests that go through several files of this crate: from a source to what a mount shows.

mod boot_packs;
mod erofs_kernel;
mod faults;
mod hostile;
mod lazy_mount;
mod real;
mod registry;
mod round_trip;
mod sources;
mod support;
mod sweep;
