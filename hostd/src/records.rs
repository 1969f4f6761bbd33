//! Records of sandboxes on their way to the aggregator, beside heartbeats (PROTOCOL 9.1).
//!
//! On the timer, never in a launch: the core says which sandboxes changed, here they are read, cut, packed and sent. A
//! second's worth is bounded; what is left waits in the core. A lost datagram is repaired by the next whole round.

use std::net::SocketAddr;

use hostd_core::records::DATAGRAMS_MAX;
use wire::{
    Seq,
    limits::DATAGRAM_BYTES_MAX,
    records::{Records, bounded, version},
};

use crate::{host::HostCell, metrics::count, note::record};

/// Records that are read before they are packed: a datagram holds fewer.
const READ_AT_ONCE: usize = 12;

/// Sends one host's records.
#[derive(Debug)]
pub(crate) struct Teller {
    every_ms: u64,
    due_ms: u64,
    seq: Seq,
    nth: u16,
}

impl Teller {
    /// Begins to tell; `every_ms` of zero tells nothing.
    pub(crate) fn new(cell: &HostCell, now_ms: u64, every_ms: u64) -> Self {
        if every_ms > 0 {
            cell.core.borrow_mut().tell_records(now_ms);
        }
        Self { every_ms, due_ms: now_ms, seq: Seq(0), nth: 0 }
    }

    /// The datagrams that are due, sealed, and to whom: at most [`DATAGRAMS_MAX`].
    pub(crate) fn due(&mut self, cell: &HostCell, now_ms: u64) -> Vec<(Vec<u8>, SocketAddr)> {
        if self.every_ms == 0 || now_ms < self.due_ms {
            return Vec::new();
        }
        self.due_ms = now_ms + self.every_ms;
        let beat = cell.beat.borrow();
        let Some(to) = beat.aggregator() else { return Vec::new() };
        if beat.next_seq() != self.seq {
            (self.seq, self.nth) = (beat.next_seq(), 0);
        }
        let mut core = cell.core.borrow_mut();
        let (mut sealed, mut read) = (Vec::new(), Vec::new());
        let mut out = [0; DATAGRAM_BYTES_MAX];
        while sealed.len() < usize::from(DATAGRAMS_MAX) && self.nth < u16::MAX {
            while read.len() < READ_AT_ONCE
                && let Some(local) = core.poll_record(now_ms)
            {
                let Some(note) = core.sandbox(local).map(|s| std::rc::Rc::clone(&s.note)) else {
                    continue;
                };
                read.extend(record(&core, &note, now_ms).map(bounded));
            }
            if read.is_empty() {
                break;
            }
            let records = Records::take(version(self.seq, self.nth), &mut read);
            self.nth += 1;
            match beat.seal_records(&records, &mut out) {
                Some(len) => sealed.push((out[..len].to_vec(), to)),
                None => tracing::warn!("records did not fit a datagram and are not told"),
            }
        }
        for left in read {
            core.tell_again(left.sandbox.local);
        }
        sealed
    }
}

/// Counts what became of one.
pub(crate) fn sent(cell: &HostCell, done: std::io::Result<usize>) {
    match done {
        Ok(_) => count(&cell.counts.records),
        Err(error) => tracing::debug!(%error, "records were not sent"),
    }
}
