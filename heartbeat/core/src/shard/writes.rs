//! What leaves a shard: news for the feed, batches for the store, and what the store's answer means.
//!
//! A host stands at most once in each list, however often it beats: while the store is away, rows wait in their records
//! and nothing grows. A mark clears only when the store has acknowledged the very state that is held.

use wire::{BucketId, CapacityWord, HostId};

use super::Shard;
use crate::{
    limits::BATCH_ROWS_MAX,
    record::mark,
    row::{Row, written},
};

/// Rows of one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The partition.
    pub bucket: BucketId,
    /// Its rows, by ascending host; at most [`BATCH_ROWS_MAX`].
    pub rows: Vec<Row>,
}

impl Shard {
    /// Notes that a record changed: the feed is to say it and the store to keep it.
    pub(super) fn changed(&mut self, at: u32) {
        self.tell_placers(at);
        let record = &mut self.records[at as usize];
        self.dirty += usize::from(!record.is(mark::DIRTY));
        record.set(mark::DIRTY, true);
        self.list(at);
    }

    /// Notes that the feed is to say it.
    pub(super) fn tell_placers(&mut self, at: u32) {
        let record = &mut self.records[at as usize];
        if !record.is(mark::NEWS) {
            record.set(mark::NEWS, true);
            self.news.push(at);
        }
    }

    fn list(&mut self, at: u32) {
        let record = &mut self.records[at as usize];
        if !record.is(mark::LISTED | mark::IN_FLIGHT) {
            record.set(mark::LISTED, true);
            self.listed.push(at);
        }
    }

    /// Moves what changed since the last call to `out`, at most `max` hosts; the rest stays for the next.
    pub fn take_news(&mut self, max: usize, out: &mut Vec<(HostId, CapacityWord)>) {
        let gone = self.gone.len().min(max);
        out.extend(self.gone.drain(..gone));
        for _ in gone..max {
            let Some(at) = self.news.pop() else { break };
            let record = &mut self.records[at as usize];
            if record.is(mark::NEWS) {
                record.set(mark::NEWS, false);
                out.extend(record.spoke().then(|| (HostId(record.host), record.said())));
            }
        }
    }

    /// Rows that the store does not have yet, those on their way included.
    #[must_use]
    pub const fn dirty(&self) -> usize {
        self.dirty
    }

    /// Orders what is to be written by partition, unless the last round still has some.
    /// Returns whether there is anything to take.
    pub fn begin_round(&mut self) -> bool {
        if self.round.is_empty() {
            std::mem::swap(&mut self.round, &mut self.listed);
            let records = &self.records;
            // Taken from the end.
            self.round.sort_unstable_by_key(|&at| std::cmp::Reverse(records[at as usize].host));
        }
        !self.round.is_empty()
    }

    /// Rows of the round that are left.
    #[must_use]
    pub fn round_left(&self) -> usize {
        self.round.len()
    }

    /// The next batch of the round.
    pub fn take_batch(&mut self) -> Option<Batch> {
        let mut batch: Option<Batch> = None;
        while let Some(&at) = self.round.last() {
            let record = &mut self.records[at as usize];
            if !record.is(mark::LISTED) {
                self.round.pop(); // Removed since.
                continue;
            }
            let bucket = HostId(record.host).bucket();
            let open = batch.get_or_insert_with(|| Batch { bucket, rows: Vec::new() });
            if open.bucket != bucket || open.rows.len() == BATCH_ROWS_MAX {
                break;
            }
            self.round.pop();
            record.set(mark::LISTED, false);
            record.set(mark::IN_FLIGHT, true);
            open.rows.push(record.row());
        }
        batch
    }

    /// Takes the store's answer for rows of a batch, each named by host and [`Row::written`].
    pub fn handle_written(&mut self, rows: &[(HostId, i64)], acknowledged: bool) {
        for &(host, stamp) in rows {
            let Some(at) = self.find(host) else { continue };
            let record = &mut self.records[at as usize];
            record.set(mark::IN_FLIGHT, false);
            let same = written(wire::Seq(record.seq), record.revision) == stamp;
            if acknowledged && same && record.is(mark::DIRTY) {
                record.set(mark::DIRTY | mark::UNTOLD, false);
                self.dirty -= 1;
            }
            if record.is(mark::DIRTY) {
                self.list(at);
            }
        }
    }
}
