//! The store of one process: a hot copy in a concurrent map over a crash-safe file.
//!
//! For `volley dev` and small fleets. Writes that wait for the disk are gathered: one thread commits everything that
//! came while the last commit was on its way, then answers all of them. Acknowledged means on disk.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use dashmap::DashMap;
use futures::FutureExt as _;
use heartbeat_core::{
    Drain, Row,
    row::removed,
    shard::{upkeep::Silent, writes::Batch},
};
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tokio::sync::{mpsc, oneshot};
use wire::{CapacityWord, HostId, SandboxId, limits::RECORD_LIVES_MS};

use super::{
    Doing, Store, StoreError,
    listed::Kept,
    said::{read_row, write_row},
};
use crate::shards::wall_ms;

const HOSTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("hosts");
const SANDBOXES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("sandbox_by_tenant");
const DRAINS: TableDefinition<'_, u64, (u64, u64, &str)> = TableDefinition::new("drains");

/// Writes that wait for a commit, at most.
const QUEUE: usize = 1_024;
/// Sandboxes that are kept, at most: news of others are left out.
const SANDBOXES_MAX: usize = 1 << 18;
/// Time between two looks for records that nobody says any more, in ms.
const SWEEP_MS: u64 = 60_000;
/// Writes of one commit, at most.
const COMMIT_MAX: usize = 1_024;

enum Change {
    Put(Vec<Row>),
    Remove(Vec<Silent>),
    Drain(Drain),
    Undrain(HostId),
    Sandboxes(Vec<Kept>),
    Forget(Vec<Vec<u8>>),
}

type Write = (Change, oneshot::Sender<Result<(), StoreError>>);

/// See the module.
pub struct EmbeddedStore {
    path: PathBuf,
    rows: DashMap<HostId, Row>,
    drains: DashMap<HostId, Drain>,
    sandboxes: Sandboxes,
    lease: Mutex<Option<(u64, Instant)>>,
    writes: Option<mpsc::Sender<Write>>,
    commits: Option<thread::JoinHandle<()>>,
}

impl Drop for EmbeddedStore {
    /// Lets go of the file before it returns: whoever opens it next must not find it busy.
    fn drop(&mut self) {
        self.writes = None;
        if let Some(commits) = self.commits.take() {
            let _ = commits.join();
        }
    }
}

fn away(error: impl std::fmt::Display) -> StoreError {
    StoreError::Away(error.to_string())
}

impl EmbeddedStore {
    /// Opens the file at `path`, which is made if there is none.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if another process has it; else what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let said = path.display();
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)
                .map_err(|error| StoreError::Config(format!("{}: {error}", dir.display())))?;
        }
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::Busy(said.to_string()),
            DatabaseError::Storage(redb::StorageError::Corrupted(what)) => {
                StoreError::Broken(format!("{said}: {what}"))
            }
            other => StoreError::Config(format!("{said}: {other}")),
        })?;
        let (rows, drains, sandboxes) = load(&database)?;
        let (writes, queue) = mpsc::channel(QUEUE);
        let commits = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || commit_all(&database, queue))
            .map_err(away)?;
        Ok(Self {
            path: path.to_owned(),
            rows,
            drains,
            sandboxes,
            lease: Mutex::new(None),
            writes: Some(writes),
            commits: Some(commits),
        })
    }

    async fn write(&self, change: Change) -> Result<(), StoreError> {
        let (done, reply) = oneshot::channel();
        let closed = || StoreError::Away("it is being closed".to_owned());
        let writes = self.writes.as_ref().ok_or_else(closed)?;
        writes.send((change, done)).await.map_err(away)?;
        reply.await.map_err(away)?
    }
}

type Loaded = (DashMap<HostId, Row>, DashMap<HostId, Drain>, Sandboxes);

fn load(database: &Database) -> Result<Loaded, StoreError> {
    let begin = database.begin_write().map_err(away)?;
    begin.open_table(HOSTS).map_err(away)?;
    begin.open_table(DRAINS).map_err(away)?;
    begin.open_table(SANDBOXES).map_err(away)?;
    begin.commit().map_err(away)?;
    let read = database.begin_read().map_err(away)?;
    let (rows, drains) = (DashMap::new(), DashMap::new());
    for entry in read.open_table(HOSTS).map_err(away)?.iter().map_err(away)? {
        let (host, bytes) = entry.map_err(away)?;
        let row = read_row(HostId(host.value()), bytes.value())
            .ok_or_else(|| StoreError::Broken(format!("the row of {}", HostId(host.value()))))?;
        rows.insert(row.host, row);
    }
    for entry in read.open_table(DRAINS).map_err(away)?.iter().map_err(away)? {
        let (host, drain) = entry.map_err(away)?;
        let (deadline_ms, since_ms, message) = drain.value();
        let host = HostId(host.value());
        drains.insert(host, Drain { host, deadline_ms, since_ms, message: message.to_owned() });
    }
    let mut sandboxes = BTreeMap::new();
    for entry in read.open_table(SANDBOXES).map_err(away)?.iter().map_err(away)? {
        let (key, bytes) = entry.map_err(away)?;
        // Of another build, say: hosts say it again.
        if let Some(kept) = read_key(key.value()).and_then(|id| Kept::from_bytes(id, bytes.value()))
        {
            sandboxes.insert(key.value().to_vec(), kept);
        }
    }
    Ok((rows, drains, Sandboxes { rows: Mutex::new(sandboxes), swept_ms: AtomicU64::new(0) }))
}

/// Commits until all senders are gone.
fn commit_all(database: &Database, mut queue: mpsc::Receiver<Write>) {
    while let Some(first) = queue.blocking_recv() {
        let mut writes = vec![first];
        while writes.len() < COMMIT_MAX
            && let Ok(next) = queue.try_recv()
        {
            writes.push(next);
        }
        let done = commit(database, writes.iter().map(|(change, _)| change));
        for (_, reply) in writes {
            let _ = reply.send(done.clone());
        }
    }
}

fn commit<'a>(
    database: &Database,
    changes: impl Iterator<Item = &'a Change>,
) -> Result<(), StoreError> {
    let write = database.begin_write().map_err(away)?;
    {
        let mut hosts = write.open_table(HOSTS).map_err(away)?;
        let mut drains = write.open_table(DRAINS).map_err(away)?;
        let mut sandboxes = write.open_table(SANDBOXES).map_err(away)?;
        for change in changes {
            match change {
                Change::Put(rows) => {
                    for row in rows {
                        hosts.insert(row.host.0, &write_row(row)[..]).map_err(away)?;
                    }
                }
                Change::Remove(gone) => {
                    for silent in gone {
                        hosts.remove(silent.host.0).map_err(away)?;
                    }
                }
                Change::Drain(drain) => {
                    let said = (drain.deadline_ms, drain.since_ms, drain.message.as_str());
                    drains.insert(drain.host.0, said).map_err(away)?;
                }
                Change::Sandboxes(kept) => {
                    for kept in kept {
                        let key = write_key(&kept.record.tenant, kept.record.sandbox);
                        sandboxes.insert(&key[..], &kept.to_bytes()[..]).map_err(away)?;
                    }
                }
                Change::Forget(keys) => {
                    for key in keys {
                        sandboxes.remove(&key[..]).map_err(away)?;
                    }
                }
                Change::Undrain(host) => {
                    drains.remove(host.0).map_err(away)?;
                }
            }
        }
    }
    write.commit().map_err(away)
}

/// Records of sandboxes by tenant and id.
struct Sandboxes {
    rows: Mutex<BTreeMap<Vec<u8>, Kept>>,
    swept_ms: AtomicU64,
}

/// The tenant (which holds no zero byte), a zero byte, the sandbox: so that a tenant's are one range.
fn write_key(tenant: &str, id: SandboxId) -> Vec<u8> {
    let mut key = tenant.as_bytes().to_vec();
    key.push(0);
    key.extend(id.host.0.to_be_bytes());
    key.extend(id.local.to_be_bytes());
    key
}

fn read_key(key: &[u8]) -> Option<SandboxId> {
    let (rest, local) = key.split_last_chunk()?;
    let (_, host) = rest.split_last_chunk()?;
    Some(SandboxId { host: HostId(u64::from_be_bytes(*host)), local: u64::from_be_bytes(*local) })
}

impl Sandboxes {
    /// Takes those that are newer; returns them, and the keys of those that have aged out, if it is time to look.
    fn take(&self, batch: &[Kept], now_ms: u64) -> Result<(Vec<Kept>, Vec<Vec<u8>>), StoreError> {
        let mut rows = self.rows.lock().map_err(away)?;
        let mut newer = Vec::with_capacity(batch.len());
        for kept in batch {
            let key = write_key(&kept.record.tenant, kept.record.sandbox);
            match rows.get(&key) {
                Some(held) if held.version > kept.version => continue,
                None if rows.len() >= SANDBOXES_MAX => continue,
                _ => {}
            }
            rows.insert(key, kept.clone());
            newer.push(kept.clone());
        }
        if now_ms < self.swept_ms.load(Ordering::Relaxed).saturating_add(SWEEP_MS) {
            return Ok((newer, Vec::new()));
        }
        self.swept_ms.store(now_ms, Ordering::Relaxed);
        let old = |kept: &Kept| kept.heard_ms.saturating_add(RECORD_LIVES_MS) < now_ms;
        let aged: Vec<_> =
            rows.iter().filter(|(_, kept)| old(kept)).map(|(key, _)| key.clone()).collect();
        for key in &aged {
            rows.remove(key);
        }
        Ok((newer, aged))
    }

    fn of(&self, tenant: &str, partition: u8, max: usize) -> Result<Vec<Kept>, StoreError> {
        let least = SandboxId { host: HostId(0), local: 0 };
        let most = SandboxId { host: HostId(u64::MAX), local: u64::MAX };
        let range = write_key(tenant, least)..=write_key(tenant, most);
        let rows = self.rows.lock().map_err(away)?;
        let here = rows.range(range).map(|(_, kept)| kept);
        Ok(here.filter(|kept| kept.partition() == partition).take(max).cloned().collect())
    }
}

impl Store for EmbeddedStore {
    fn shared(&self) -> bool {
        false
    }

    fn upsert<'a>(&'a self, batch: &'a Batch) -> Doing<'a, ()> {
        async move {
            let mut newer = Vec::with_capacity(batch.rows.len());
            for row in &batch.rows {
                let mut held = self.rows.entry(row.host).or_insert(*row);
                if row.written() >= held.written() {
                    *held = *row;
                    newer.push(*row);
                }
            }
            self.write(Change::Put(newer)).await
        }
        .boxed()
    }

    fn remove<'a>(&'a self, gone: &'a [Silent]) -> Doing<'a, ()> {
        async move {
            let mut old = Vec::with_capacity(gone.len());
            for silent in gone {
                let until = removed(silent.seq);
                let was = self.rows.remove_if(&silent.host, |_, row| row.written() <= until);
                if was.is_some() {
                    old.push(*silent);
                }
            }
            self.write(Change::Remove(old)).await
        }
        .boxed()
    }

    fn words(&self, hosts: [HostId; 2]) -> Doing<'_, [Option<CapacityWord>; 2]> {
        let words = hosts.map(|host| self.rows.get(&host).map(|row| row.word));
        async move { Ok(words) }.boxed()
    }

    fn scan_parts(&self) -> u32 {
        1
    }

    fn scan(&self, _part: u32) -> Doing<'_, Vec<Row>> {
        async move { Ok(self.rows.iter().map(|row| *row).collect()) }.boxed()
    }

    fn lease(&self, aggregator: u64, ttl_ms: u64) -> Doing<'_, bool> {
        async move {
            let mut lease = self.lease.lock().map_err(away)?;
            let now = Instant::now();
            let free = lease.is_none_or(|(holder, until)| holder == aggregator || until <= now);
            if free {
                *lease = Some((aggregator, now + Duration::from_millis(ttl_ms)));
            }
            Ok(free)
        }
        .boxed()
    }

    fn drains(&self) -> Doing<'_, Vec<Drain>> {
        async move { Ok(self.drains.iter().map(|drain| drain.clone()).collect()) }.boxed()
    }

    fn set_drain<'a>(&'a self, drain: &'a Drain) -> Doing<'a, ()> {
        async move {
            self.write(Change::Drain(drain.clone())).await?;
            self.drains.insert(drain.host, drain.clone());
            Ok(())
        }
        .boxed()
    }

    fn clear_drain(&self, host: HostId) -> Doing<'_, ()> {
        async move {
            self.write(Change::Undrain(host)).await?;
            self.drains.remove(&host);
            Ok(())
        }
        .boxed()
    }

    fn keep_sandboxes<'a>(&'a self, batch: &'a [Kept]) -> Doing<'a, ()> {
        async move {
            let (newer, aged) = self.sandboxes.take(batch, wall_ms())?;
            if !aged.is_empty() {
                self.write(Change::Forget(aged)).await?;
            }
            self.write(Change::Sandboxes(newer)).await
        }
        .boxed()
    }

    fn sandboxes<'a>(&'a self, tenant: &'a str, partition: u8, max: usize) -> Doing<'a, Vec<Kept>> {
        async move { self.sandboxes.of(tenant, partition, max) }.boxed()
    }

    fn check(&self) -> Doing<'_, String> {
        async move {
            Ok(format!(
                "embedded store {}: {} hosts, {} drains",
                self.path.display(),
                self.rows.len(),
                self.drains.len()
            ))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use wire::{BucketId, Seq};

    use super::{super::said::tests::row, *};

    #[tokio::test]
    async fn rows_and_drains_survive_and_older_ones_never_win() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let batch = |rows| Batch { bucket: BucketId(0), rows };
        {
            let store = EmbeddedStore::open(&path).unwrap();
            assert_eq!(
                EmbeddedStore::open(&path).err(),
                Some(StoreError::Busy(path.display().to_string()))
            );
            store.upsert(&batch(vec![row(1, 10), row(2, 10), row(3, 10)])).await.unwrap();
            store.upsert(&batch(vec![row(1, 9), row(2, 11)])).await.unwrap();
            let silent = |host, seq| Silent { host: HostId(host), seq: Seq(seq), heard_ms: 0 };
            store.remove(&[silent(2, 10), silent(3, 10)]).await.unwrap();
            let drain =
                Drain { host: HostId(2), deadline_ms: 5, since_ms: 6, message: "why".to_owned() };
            store.set_drain(&drain).await.unwrap();
            store.set_drain(&Drain { host: HostId(1), ..drain }).await.unwrap();
            store.clear_drain(HostId(1)).await.unwrap();
        }
        let store = EmbeddedStore::open(&path).unwrap();
        let mut rows = store.scan(0).await.unwrap();
        rows.sort_by_key(|row| row.host);
        assert_eq!(rows, [row(1, 10), row(2, 11)]);
        assert_eq!(store.drains().await.unwrap().len(), 1);
        let words = store.words([HostId(2), HostId(3)]).await.unwrap();
        assert_eq!(words, [Some(CapacityWord(11)), None]);
    }

    #[tokio::test]
    async fn one_aggregator_holds_the_lease() {
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(&dir.path().join("store")).unwrap();
        assert_eq!(store.lease(1, 60_000).await, Ok(true));
        assert_eq!(store.lease(2, 60_000).await, Ok(false));
        assert_eq!(store.lease(1, 0).await, Ok(true));
        assert_eq!(store.lease(2, 60_000).await, Ok(true));
    }
}
