//! Tests that go through several files of this crate: from a source to what a mount shows.

mod round_trip;
mod support;
