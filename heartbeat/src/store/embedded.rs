//! The store of one process: a hot copy in a concurrent map over a crash-safe file.
//!
//! For `volley dev` and small fleets. Writes that wait for the disk are gathered: one thread commits everything that
//! came while the last commit was on its way, then answers all of them. Acknowledged means on disk.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
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
use wire::{CapacityWord, HostId};

use super::{
    Doing, Store, StoreError,
    said::{read_row, write_row},
};

const HOSTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("hosts");
const DRAINS: TableDefinition<'_, u64, (u64, u64, &str)> = TableDefinition::new("drains");

/// Writes that wait for a commit, at most.
const QUEUE: usize = 1_024;
/// Writes of one commit, at most.
const COMMIT_MAX: usize = 1_024;

enum Change {
    Put(Vec<Row>),
    Remove(Vec<Silent>),
    Drain(Drain),
    Undrain(HostId),
}

type Write = (Change, oneshot::Sender<Result<(), StoreError>>);

/// See the module.
pub struct EmbeddedStore {
    path: PathBuf,
    rows: DashMap<HostId, Row>,
    drains: DashMap<HostId, Drain>,
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
        let (rows, drains) = load(&database)?;
        let (writes, queue) = mpsc::channel(QUEUE);
        let commits = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || commit_all(&database, queue))
            .map_err(away)?;
        Ok(Self {
            path: path.to_owned(),
            rows,
            drains,
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

type Loaded = (DashMap<HostId, Row>, DashMap<HostId, Drain>);

fn load(database: &Database) -> Result<Loaded, StoreError> {
    let begin = database.begin_write().map_err(away)?;
    begin.open_table(HOSTS).map_err(away)?;
    begin.open_table(DRAINS).map_err(away)?;
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
    Ok((rows, drains))
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
                Change::Undrain(host) => {
                    drains.remove(host.0).map_err(away)?;
                }
            }
        }
    }
    write.commit().map_err(away)
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
