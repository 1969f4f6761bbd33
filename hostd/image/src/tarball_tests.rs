//! The tar reader against archives written by another crate, and by hand where that crate would not write them.
