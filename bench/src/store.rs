//! `bench store`: rows a second that a database takes, as aggregators write them and one at a time.
//!
//! A batch is the rows of one partition, prepared, unlogged and sent to a node that has it, as `heartbeatd` writes; the peer in
//! the same run is the same row by itself. Made-up hosts are written, so that a keyspace in which others stand is refused, and
//! what was written is removed at the end. Left out: the aggregator's own window of batches, which is wider; more nodes
//! than are given.

use std::{
    collections::BTreeSet,
    fmt,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use heartbeat::store::{Store as _, StoreError, scylla::ScyllaStore};
use heartbeat_core::{
    Row,
    shard::{upkeep::Silent, writes::Batch},
};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use serde::Serialize;
use wire::{CapacityWord, Code, Fault, HostId, Incarnation, Seq};

use crate::rounds::Figure;

/// Partitions that the rows lie in: so many of the 4,096 that each has as many rows as with a million hosts.
const ROWS_A_PARTITION: u64 = 250;
/// What is on its way at once: batches, and single rows.
const BATCHES: usize = 32;
const SINGLES: usize = 256;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// `scylla://host:port[,host:port]/keyspace`, made by `volley store init`, with no hosts in it.
    pub store: String,
    /// Rows in batches a round. A fifth as many are written one at a time.
    pub rows: usize,
    /// Rounds, all of which are told: an engine warms up over them.
    pub rounds: usize,
}

/// Rows a second.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What the database says that it is.
    pub engine: String,
    /// Rows in a batch, in the mean.
    pub rows_a_batch: f64,
    /// In batches, round by round.
    pub batched: Vec<f64>,
    /// One at a time, round by round.
    pub single: Vec<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.engine)?;
        for (batched, single) in self.batched.iter().zip(&self.single) {
            writeln!(
                f,
                "  batches of {:.0}: {batched:.0} rows/s   one at a time: {single:.0} rows/s   {:.1}x",
                self.rows_a_batch,
                batched / single
            )?;
        }
        let ratios =
            self.batched.iter().zip(&self.single).map(|(batched, single)| batched / single);
        write!(
            f,
            "rows/s in batches {:.0}; times single writes {:.1}",
            Figure::of(self.batched.clone()),
            Figure::of(ratios.collect())
        )
    }
}

/// Writes for some seconds, and cleans up.
///
/// # Errors
/// The store is not there, has no tables, or holds other hosts; nothing was written then. Or a write failed: what was
/// written stays, and another run removes it.
pub async fn run(options: &Options) -> Result<Report, Fault> {
    let Some(place) = options.store.strip_prefix("scylla://") else {
        let text = "only databases are measured: give scylla://host:port/keyspace";
        return Err(Fault::new(Code::Config, text));
    };
    let store = ScyllaStore::open(place).await?;
    // Seconds order runs: a later one writes over what an earlier one removed.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first = Seq(since.as_secs() << 8);
    let mut rows = rows(options.rows);
    refuse_others(&store, &rows).await?;
    let mut report = Report {
        engine: store.check().await?,
        rows_a_batch: 0.0,
        batched: Vec::new(),
        single: Vec::new(),
    };
    for round in 0..options.rounds {
        let seq = Seq(first.0 + round as u64);
        rows.iter_mut().for_each(|row| row.seq = seq);
        let batches = batches(&rows);
        report.rows_a_batch = rows.len() as f64 / batches.len().max(1) as f64;
        let single = &rows[..rows.len() / 5];
        report.single.push(write_singly(&store, single).await?);
        report.batched.push(write_batches(&store, &batches).await?);
    }
    let last = Seq(first.0 + options.rounds as u64);
    let gone: Vec<Silent> =
        rows.iter().map(|row| Silent { host: row.host, seq: last, heard_ms: 0 }).collect();
    store.remove(&gone).await?;
    Ok(report)
}

async fn refuse_others(store: &ScyllaStore, ours: &[Row]) -> Result<(), Fault> {
    let ours: BTreeSet<HostId> = ours.iter().map(|row| row.host).collect();
    for part in 0..store.scan_parts() {
        let there = store.scan(part).await?;
        if let Some(other) = there.iter().find(|row| !ours.contains(&row.host)) {
            let text = format!(
                "the keyspace holds host {}, and made-up hosts are to be written; nothing was: \
                 give a keyspace of its own, made by `volley store init`",
                other.host
            );
            return Err(Fault::new(Code::Config, text));
        }
    }
    Ok(())
}

fn rows(count: usize) -> Vec<Row> {
    let mut rng = SmallRng::seed_from_u64(1);
    let partitions = (count as u64 / ROWS_A_PARTITION).clamp(1, 4_096);
    let mut rows: Vec<Row> = (0..count)
        .map(|_| {
            let id = rng.next_u64();
            row(HostId((id >> 12) | (id % partitions) << 52))
        })
        .collect();
    rows.sort_by_key(|row| row.host);
    rows
}

fn row(host: HostId) -> Row {
    Row {
        host,
        incarnation: Incarnation(1),
        seq: Seq(0),
        revision: 0,
        ip: [7; 16],
        port: 7_000,
        word: CapacityWord(1),
        total: [64, 16, 8, 4],
        running: 5,
        interval_ms: 15_000,
        says_draining: false,
        no_boxes: true,
    }
}

fn batches(rows: &[Row]) -> Vec<Batch> {
    rows.chunk_by(|a, b| a.host.bucket() == b.host.bucket())
        .flat_map(|part| part.chunks(heartbeat_core::limits::BATCH_ROWS_MAX))
        .map(|part| Batch { bucket: part[0].host.bucket(), rows: part.to_vec() })
        .collect()
}

async fn write_batches(store: &ScyllaStore, batches: &[Batch]) -> Result<f64, StoreError> {
    let began = Instant::now();
    let writes = stream::iter(batches).map(|batch| store.upsert(batch)).buffer_unordered(BATCHES);
    writes.try_collect::<()>().await?;
    let rows: usize = batches.iter().map(|batch| batch.rows.len()).sum();
    Ok(rows as f64 / began.elapsed().as_secs_f64())
}

async fn write_singly(store: &ScyllaStore, rows: &[Row]) -> Result<f64, StoreError> {
    let began = Instant::now();
    let writes = stream::iter(rows).map(|row| store.upsert_one(row)).buffer_unordered(SINGLES);
    writes.try_collect::<()>().await?;
    Ok(rows.len() as f64 / began.elapsed().as_secs_f64())
}
