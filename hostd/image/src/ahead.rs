//! Reads ahead of need, turned away once: so that only pages that a program touches are noted, fetched and waited for.
//!
//! Around a page fault the kernel reads up to a megabyte. Nearly half of what a start reads that way nobody touches, and a
//! boot pack of it is as much longer; and when the pack has only what is touched, a read around it would wait for
//! storage to bring the rest. An error for a read ahead costs nothing but itself: no program sees it, and who wants a page asks for
//! that page alone (`filemap_fault`, `filemap_read`). The other way, less readahead for the whole mount, would stay with each
//! file that is opened meanwhile for as long as that is open.
//!
//! Who asks again is answered, whatever he asks for: a range is turned away once, and few ranges of a node are. Left out: when it
//! is done; `server` knows which runs are watched.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Ranges of one node that are turned away: a megabyte each, so that a long file read from front to back is read as ever
/// after its first part.
const RANGES_MAX: usize = 32;
/// Nodes that are remembered. Of more, none is turned away.
const NODES_MAX: usize = 16 << 10;

fn meets(ranges: &[Range<u64>], read: &Range<u64>) -> bool {
    ranges.iter().any(|range| range.start < read.end && read.start < range.end)
}

/// What was turned away.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    ranges: Mutex<HashMap<u64, Vec<Range<u64>>>>,
}

impl Refusals {
    /// Whether a read is to be turned away: never one that meets a range that was.
    pub(crate) fn refuse(&self, node: u64, read: Range<u64>) -> bool {
        // The table is whole between any two statements that hold the lock.
        let mut nodes = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.len() >= NODES_MAX && !nodes.contains_key(&node) {
            return false;
        }
        let ranges = nodes.entry(node).or_default();
        let refused = !meets(ranges, &read) && ranges.len() < RANGES_MAX;
        if refused {
            ranges.push(read);
        }
        refused
    }

    /// Whether any of a range was turned away.
    pub(crate) fn met(&self, node: u64, read: Range<u64>) -> bool {
        let nodes = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&node).is_some_and(|ranges| meets(ranges, &read))
    }

    /// The kernel has let go of a node, and of its pages.
    pub(crate) fn forget(&self, node: u64) {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_again_is_answered() {
        let refusals = Refusals::default();
        assert!(refusals.refuse(7, 0..8192));
        assert!(!refusals.refuse(7, 0..8192));
        assert!(!refusals.refuse(7, 4096..16384), "it meets one that was turned away");
        assert!(refusals.refuse(7, 8192..16384));
        assert!(refusals.refuse(8, 0..8192), "another node");
        refusals.forget(7);
        assert!(refusals.refuse(7, 0..8192));
    }

    #[test]
    fn a_long_file_is_read_as_ever_after_a_while() {
        let refusals = Refusals::default();
        let refused = (0..1_000u64).filter(|n| refusals.refuse(1, n << 20..(n + 1) << 20)).count();
        assert_eq!(refused, RANGES_MAX);
    }
}
