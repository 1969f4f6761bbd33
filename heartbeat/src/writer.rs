//! Rows on their way to the store. How many may be on their way is the shards' business (`heartbeat_core::flush`).

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use heartbeat_core::shard::writes::Batch;
use tokio::sync::mpsc;

use crate::{
    shards::{Ask, Shards},
    store::Store,
};

/// A batch without an answer after this is taken as failed: it may have been written, and is written again.
const ANSWER: Duration = Duration::from_secs(5);

/// Writes batches until their senders are gone, and tells each shard what became of its own.
pub(crate) async fn write_all(
    store: Arc<dyn Store>,
    shards: Shards,
    mut batches: mpsc::Receiver<(usize, Batch)>,
) {
    let mut writing = FuturesUnordered::new();
    let mut failing = false;
    loop {
        tokio::select! {
            batch = batches.recv() => match batch {
                Some((shard, batch)) => writing.push(write(Arc::clone(&store), shard, batch)),
                None => break,
            },
            Some((shard, rows, done)) = writing.next() => {
                match &done {
                    Err(error) if !failing => tracing::warn!(%error, "rows wait for the store"),
                    Ok(()) if failing => tracing::info!("the store takes rows again"),
                    _ => {}
                }
                failing = done.is_err();
                shards.tell(shard, Ask::Written(rows, done.is_ok())).await;
            }
        }
    }
}

type Written = (usize, Vec<(wire::HostId, i64)>, Result<(), String>);

async fn write(store: Arc<dyn Store>, shard: usize, batch: Batch) -> Written {
    let done = match tokio::time::timeout(ANSWER, store.upsert(&batch)).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("no answer within 5 s".to_owned()),
    };
    (shard, batch.rows.iter().map(|row| (row.host, row.written())).collect(), done)
}
