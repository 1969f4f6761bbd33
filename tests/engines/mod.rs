//! Real engines for tests: a database and an object store, each a process of the test's own, stopped by its pid.
//!
//! Test programs of several crates take this folder in as a module. Each engine comes from the script of its name, which
//! fetches it once into the cache; one that cannot be had says why, and the test says that it was skipped.

#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod cassandra;
pub(crate) mod s3;
