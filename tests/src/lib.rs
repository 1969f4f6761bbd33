//! Whole-system tests and the program that CI runs.
//!
//! The tests are in `tests/`, the program in `src/bin/ci.rs`; this library holds what several tests need to have a
//! fleet of real processes.

pub mod fleet;
