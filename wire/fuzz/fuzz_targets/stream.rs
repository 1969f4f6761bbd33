//! Fuzz target: the body of `tests/bodies` by this name.
#![no_main]
#[path = "../../tests/bodies/mod.rs"]
#[allow(dead_code)]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::stream(bytes));
