//! Records of sandboxes: from hosts' datagrams to the store, and from there to a tenant's list. No host is asked.
//!
//! Receivers hand on verified datagrams; here they are read, the newest of each sandbox is kept for a moment, and all of
//! them leave in batches of one partition. A full queue or a store that is away loses the oldest news and says so by
//! a figure: hosts say everything again in their next round (PROTOCOL 9.1), so nothing is retried for long.
//! Left out: an answer beyond one frame. It says that there is more.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use wire::{
    Code, Fault, HostId, SandboxId,
    call::{Answer, SandboxRecord, State},
    limits::{FRAME_BYTES_MAX, RECORD_LIVES_MS},
    records::{Listed, Records},
};

use crate::{
    shards::wall_ms,
    store::{
        Store,
        listed::{Kept, PARTITIONS},
    },
};

/// Datagrams that wait to be read.
pub(crate) const QUEUE: usize = 4_096;
/// Sandboxes whose newest record waits for the store; news of others are dropped beyond it.
const PENDING_MAX: usize = 65_536;
/// Time between two writes.
const FLUSH: Duration = Duration::from_millis(500);
/// Records of one batch: some tens of kilobytes.
const BATCH_MAX: usize = 64;
/// Batches on their way at once.
const WRITES: usize = 16;
/// A batch without an answer after this is taken as failed.
const WRITE: Duration = Duration::from_secs(5);
/// Records of one tenant that are looked at for one list.
const LOOKED_MAX: usize = 20_000;
/// How far below a host's newest version a datagram may be and still count: the reorder of one heartbeat.
const REORDER: u64 = 1 << 16;

/// A verified datagram's sender and body.
pub(crate) type HeardRecords = (HostId, Vec<u8>);

/// What became of records.
#[derive(Debug, Default)]
pub struct RecordFigures {
    /// Records taken.
    pub heard: AtomicU64,
    /// Datagrams that were none, or old.
    pub refused: AtomicU64,
    /// Records dropped for want of room.
    pub dropped: AtomicU64,
    /// Records written.
    pub written: AtomicU64,
    /// Records in batches that failed.
    pub failed: AtomicU64,
}

fn add(figure: &AtomicU64, count: usize) {
    figure.fetch_add(count as u64, Ordering::Relaxed);
}

/// Takes records to the store.
pub(crate) struct Recorder {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) figures: Arc<RecordFigures>,
    /// The newest version of each host.
    pub(crate) newest: HashMap<HostId, u64>,
    pub(crate) pending: HashMap<SandboxId, Kept>,
}

impl Recorder {
    pub(crate) fn new(store: Arc<dyn Store>, figures: Arc<RecordFigures>) -> Self {
        Self { store, figures, newest: HashMap::new(), pending: HashMap::new() }
    }

    /// Takes what comes until `stop`; the last of it is written.
    pub(crate) async fn run(
        mut self,
        mut heard: mpsc::Receiver<HeardRecords>,
        stop: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(FLUSH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                some = heard.recv() => match some {
                    Some((host, body)) => self.take(host, &body, wall_ms()),
                    None => break,
                },
                _ = tick.tick() => self.write().await,
                () = stop.cancelled() => break,
            }
        }
        self.write().await;
    }

    fn take(&mut self, host: HostId, body: &[u8], heard_ms: u64) {
        let Ok(Records { version, records }) = Records::read(host, body) else {
            return add(&self.figures.refused, 1);
        };
        let newest = self.newest.entry(host).or_default();
        if version.saturating_add(REORDER) < *newest {
            return add(&self.figures.refused, 1);
        }
        *newest = version.max(*newest);
        add(&self.figures.heard, records.len());
        for record in records {
            let id = record.sandbox;
            let room = self.pending.len() < PENDING_MAX;
            match self.pending.get_mut(&id) {
                // PROTOCOL 9.2.
                Some(held) if held.version > version => {}
                Some(held) => *held = Kept { version, heard_ms, record },
                None if room => drop(self.pending.insert(id, Kept { version, heard_ms, record })),
                None => add(&self.figures.dropped, 1),
            }
        }
    }

    async fn write(&mut self) {
        let mut partitions: BTreeMap<(String, u8), Vec<Kept>> = BTreeMap::new();
        for (_, kept) in self.pending.drain() {
            let key = (kept.record.tenant.clone(), kept.partition());
            partitions.entry(key).or_default().push(kept);
        }
        let batches = partitions.into_values().flat_map(|mut rows| {
            let mut batches = Vec::new();
            while rows.len() > BATCH_MAX {
                batches.push(rows.split_off(rows.len() - BATCH_MAX));
            }
            batches.push(rows);
            batches
        });
        let (store, figures) = (&self.store, &self.figures);
        let done = stream::iter(batches).map(|batch| async move {
            let done = tokio::time::timeout(WRITE, store.keep_sandboxes(&batch)).await;
            let good = matches!(done, Ok(Ok(())));
            add(if good { &figures.written } else { &figures.failed }, batch.len());
            good
        });
        let bad = done.buffer_unordered(WRITES).filter(|good| std::future::ready(!good));
        let bad = bad.count().await;
        if bad > 0 {
            tracing::warn!(
                batches = bad,
                "records of sandboxes were not written: lists lag until hosts say them again"
            );
        }
    }
}

/// A tenant's list, newest first (PROTOCOL 9.5).
pub(crate) async fn list(
    store: &dyn Store,
    tenant: &str,
    labels: &[(String, String)],
    ended: bool,
) -> Result<Answer, Fault> {
    if tenant.is_empty() {
        let text = "a list from records names a tenant; hosts can be asked for those of all";
        return Err(Fault::new(Code::BadRequest, text));
    }
    let now_ms = wall_ms();
    let reads = stream::iter(0..PARTITIONS)
        .map(|partition| store.sandboxes(tenant, partition, LOOKED_MAX / usize::from(PARTITIONS)));
    let mut more = false;
    let mut listed = Vec::new();
    let mut reads = reads.buffer_unordered(usize::from(PARTITIONS));
    while let Some(rows) = reads.next().await {
        let rows = rows?;
        more |= rows.len() >= LOOKED_MAX / usize::from(PARTITIONS);
        let theirs = rows.into_iter().filter(|kept| kept.record.tenant == tenant);
        listed.extend(theirs.filter_map(|kept| told(kept, now_ms, labels, ended)));
    }
    listed.sort_unstable_by_key(|listed: &Listed| listed.record.age_ms);
    Ok(fitting(listed, more))
}

fn told(kept: Kept, now_ms: u64, labels: &[(String, String)], ended: bool) -> Option<Listed> {
    let heard_ms = now_ms.saturating_sub(kept.heard_ms);
    let mut record = kept.record;
    let is_over = matches!(record.state, State::Stopped(_));
    let has = |label: &(String, String)| record.labels.contains(label);
    if heard_ms > RECORD_LIVES_MS || (is_over && !ended) || !labels.iter().all(has) {
        return None;
    }
    forward(&mut record, heard_ms);
    Some(Listed { record, heard_ms })
}

/// Brings a record's times forward to now.
fn forward(record: &mut SandboxRecord, by_ms: u64) {
    record.age_ms = record.age_ms.saturating_add(by_ms);
    if record.left_ms > 0 {
        record.left_ms = record.left_ms.saturating_sub(by_ms).max(1);
    }
}

/// The newest that fit one frame.
fn fitting(mut listed: Vec<Listed>, mut more: bool) -> Answer {
    loop {
        let count = listed.len();
        let answer = Answer::Listed { listed, more };
        if answer.to_bytes().len() <= FRAME_BYTES_MAX {
            return answer;
        }
        let Answer::Listed { listed: too_many, .. } = answer else { unreachable!("made above") };
        listed = too_many;
        listed.truncate(count / 2);
        more = true;
    }
}

#[cfg(test)]
mod tests {
    use wire::call::{Exit, ExitWhy};

    use super::*;
    use crate::store::{embedded::EmbeddedStore, listed::tests::record};

    fn body(version: u64, records: Vec<SandboxRecord>) -> Vec<u8> {
        wire::codec::write(&Records { version, records })
    }

    #[tokio::test]
    async fn what_hosts_say_is_listed_by_tenant_and_label_and_older_news_never_win() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(EmbeddedStore::open(&dir.path().join("store")).unwrap());
        let mut recorder = Recorder::new(Arc::<EmbeddedStore>::clone(&store), Arc::default());
        let now_ms = wall_ms();
        let ended = State::Stopped(Exit { code: 0, why: ExitWhy::Returned });
        let of = |local, state| SandboxRecord { state, ..record(7, local, "acme") };
        recorder.take(HostId(7), &body(5, vec![of(1, State::Running), of(2, ended)]), now_ms);
        recorder.take(HostId(7), &body(4, vec![of(1, State::Paused)]), now_ms);
        recorder.take(HostId(9), &body(1, vec![record(9, 1, "other")]), now_ms);
        // PROTOCOL 9.3: another host's sandbox.
        recorder.take(HostId(9), &body(2, vec![of(3, State::Running)]), now_ms);
        // PROTOCOL 9.4: heard of too long ago.
        let old = vec![record(8, 1, "acme")];
        recorder.take(HostId(8), &body(1, old), now_ms - RECORD_LIVES_MS - 1_000);
        recorder.write().await;
        let told = async |tenant: &str, label: Option<&str>, ended| {
            let labels: Vec<_> =
                label.map(|value| ("job".to_owned(), value.to_owned())).into_iter().collect();
            match list(&*store, tenant, &labels, ended).await.unwrap() {
                Answer::Listed { listed, more: false } => listed,
                other => panic!("{other:?}"),
            }
        };
        let live = told("acme", None, false).await;
        assert_eq!(live.len(), 1);
        assert_eq!((live[0].record.sandbox.local, live[0].record.state), (1, State::Running));
        assert_eq!(told("acme", None, true).await.len(), 2);
        assert_eq!(told("acme", Some("42"), false).await.len(), 1);
        assert_eq!(told("acme", Some("43"), false).await.len(), 0);
        assert_eq!(told("other", None, false).await.len(), 1);
        assert_eq!(told("acm", None, true).await.len(), 0);
        // PROTOCOL 9.2, over writes as well.
        recorder.take(HostId(7), &body(4, vec![of(1, State::Paused)]), now_ms);
        recorder.write().await;
        assert_eq!(told("acme", None, false).await[0].record.state, State::Running);
        recorder.take(HostId(7), &body(6, vec![of(1, ended)]), now_ms);
        recorder.write().await;
        assert!(told("acme", None, false).await.is_empty());
        assert!(list(&*store, "", &[], false).await.is_err());
    }

    #[tokio::test]
    async fn a_list_that_is_too_long_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(EmbeddedStore::open(&dir.path().join("store")).unwrap());
        let mut recorder = Recorder::new(Arc::<EmbeddedStore>::clone(&store), Arc::default());
        for local in 0..3_000 {
            recorder.take(HostId(7), &body(local + 1, vec![record(7, local, "acme")]), wall_ms());
        }
        recorder.write().await;
        match list(&*store, "acme", &[], false).await.unwrap() {
            Answer::Listed { listed, more: true } => {
                assert!(listed.len() > 300, "{}", listed.len())
            }
            other => panic!("{other:?}"),
        }
    }
}
