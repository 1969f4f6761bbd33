//! The journal: which launches this host has claimed, so that after `kill -9` the next start takes up or reaps all.
//!
//! Redb over a file that is written but not synced at each commit: what a commit wrote is in the kernel's page cache,
//! which outlives the process, and what does not outlive it, the machine, takes every sandbox with it. A thread of
//! its own commits whatever is waiting in one transaction, and syncs once a second for the case that the disk is
//! read by the next boot. A journal that does not open is set aside, never deleted (FAULTS O3). One that could not be
//! written (a full disk, O2) takes nothing more until it is opened again, which each next write tries; what nobody
//! waited for is written then. Heartbeats tell of no free slots meanwhile.
//!
//! The launch path waits for its row while its box is being made, not after it. Left out: no-op boxes, of which
//! nothing could be taken up.
//!
//! Longer than 500 lines: the thread, what it writes to and what is told of it are one mechanism, and its tests are here.

mod rows;

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use tokio::sync::oneshot;
use wire::{Code, Fault, LaunchId};

pub(crate) use self::rows::{Past, Row, Stage};

const SANDBOXES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("sandboxes");
const LAUNCHES: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("launches");

/// Rows that wait for the thread. Beyond it launches fail: the disk is far behind.
const QUEUE_MAX: usize = 4_096;

/// Rows of one transaction.
const BATCH_MAX: usize = 512;

/// A journal that could not be written counts as writable again from so much room on its disk: on less, the next few
/// launches would fail as those before.
const ROOM_BYTES: u64 = 1 << 20;

/// How often one that could not be written is tried.
const RETRY: Duration = Duration::from_secs(1);

/// Writes through to the page cache; syncing is somebody else's turn.
#[derive(Debug)]
struct Unsynced {
    file: File,
    dirty: Arc<AtomicBool>,
}

impl StorageBackend for Unsynced {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        // Only tells the one thread that writes and syncs, hence relaxed.
        self.dirty.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.file.write_all_at(data, offset)
    }
}

/// What is written.
#[derive(Debug)]
enum Write {
    Sandbox(u64, Option<Row>),
    Launch(LaunchId, Option<Past>),
}

struct Job {
    writes: Vec<Write>,
    done: Option<oneshot::Sender<Result<(), Fault>>>,
}

/// What an earlier start of the daemon left.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// Sandboxes by local id.
    pub(crate) sandboxes: Vec<(u64, Row)>,
    /// Launches without one.
    pub(crate) launches: Vec<(LaunchId, Past)>,
}

/// The journal of a host.
#[derive(Debug)]
pub(crate) struct Journal {
    jobs: Option<mpsc::SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    well: Arc<AtomicBool>,
}

fn storage(path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Storage, format!("{}: {error}; nothing was started", path.display()))
}

impl Journal {
    /// Opens the journal, or sets a broken one aside and begins anew.
    ///
    /// # Errors
    /// [`Code::Storage`] if the file cannot be used at all.
    pub(crate) fn open(path: &Path) -> Result<(Self, Left), Fault> {
        let opened = open(path).and_then(|(database, sync)| Ok((read(&database)?, database, sync)));
        let (left, database, sync) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let aside = set_aside(path).map_err(|error| storage(path, error))?;
                tracing::error!(
                    %error, aside = %aside.display(),
                    "the journal does not open and was set aside: running boxes it knew are reaped"
                );
                let (database, sync) = open(path).map_err(|error| storage(path, error))?;
                (Left::default(), database, sync)
            }
        };
        let (jobs, queue) = mpsc::sync_channel(QUEUE_MAX);
        let well = Arc::new(AtomicBool::new(true));
        let mut writer = Writer {
            path: path.to_owned(),
            book: Some((database, sync)),
            owed: Vec::new(),
            well: Arc::clone(&well),
            tried: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("hostd-journal".into())
            .spawn(move || writer.write_all(&queue))
            .map_err(|error| storage(path, error))?;
        Ok((Self { jobs: Some(jobs), thread: Some(thread), well }, left))
    }

    /// Whether it can be written, as far as is known: false from a write that failed on, until there is room again.
    pub(crate) fn is_well(&self) -> bool {
        // Nothing else is read by it, hence relaxed.
        self.well.load(Ordering::Relaxed)
    }

    /// Writes a sandbox's row; it is in the journal once the answer has come.
    pub(crate) fn put(&self, local: u64, row: Row) -> Written {
        self.send(vec![Write::Sandbox(local, Some(row))])
    }

    /// Forgets a sandbox that was never started; its launch may be remembered instead.
    pub(crate) fn drop_claim(
        &self,
        local: u64,
        launch_id: LaunchId,
        past: Option<Past>,
    ) -> Written {
        let mut writes = vec![Write::Sandbox(local, None)];
        writes.extend(past.map(|past| Write::Launch(launch_id, Some(past))));
        self.send(writes)
    }

    /// Remembers what became of a launch that has no sandbox.
    pub(crate) fn remember(&self, launch_id: LaunchId, past: Past) -> Written {
        self.send(vec![Write::Launch(launch_id, Some(past))])
    }

    /// Forgets a sandbox and its launch: its time has run.
    pub(crate) fn forget(&self, local: u64, launch_id: LaunchId) {
        drop(self.send(vec![Write::Sandbox(local, None), Write::Launch(launch_id, None)]));
    }

    fn send(&self, writes: Vec<Write>) -> Written {
        let (done, answer) = oneshot::channel();
        let job = Job { writes, done: Some(done) };
        let sent = self.jobs.as_ref().map(|jobs| jobs.try_send(job));
        Written(if matches!(sent, Some(Ok(()))) { Some(answer) } else { None })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A write under way. Dropping it does not stop it.
#[derive(Debug)]
#[must_use = "a write that nobody waits for is dropped on purpose"]
pub(crate) struct Written(Option<oneshot::Receiver<Result<(), Fault>>>);

impl Written {
    /// There was nothing to write.
    pub(crate) fn nothing() -> Self {
        let (done, answer) = oneshot::channel();
        let _ = done.send(Ok(()));
        Self(Some(answer))
    }

    /// Waits until it is in the journal.
    ///
    /// # Errors
    /// [`Code::Storage`]: it is not.
    pub(crate) async fn done(self) -> Result<(), Fault> {
        let behind = || Fault::new(Code::Storage, "the journal is far behind or gone");
        match self.0 {
            Some(answer) => answer.await.unwrap_or_else(|_| Err(behind())),
            None => Err(behind()),
        }
    }
}

fn open(path: &Path) -> Result<(Database, Sync), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| text(&error))?;
    let dirty = Arc::new(AtomicBool::new(false));
    let sync =
        Sync { file: file.try_clone().map_err(|error| text(&error))?, dirty: Arc::clone(&dirty) };
    let backend = Unsynced { file, dirty };
    let database = Database::builder()
        .set_cache_size(16 << 20)
        .create_with_backend(backend)
        .map_err(|error| text(&error))?;
    Ok((database, sync))
}

/// Whether the disk of the journal has room for what comes next. One that does not say has.
fn has_room(path: &Path) -> bool {
    let dir = path.parent().unwrap_or(path);
    rustix::fs::statvfs(dir).map_or(true, |disk| disk.f_bavail * disk.f_frsize >= ROOM_BYTES)
}

fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let free = (0..1_000).map(|n| path.with_extension(format!("broken-{n}"))).find(|p| !p.exists());
    let aside = free.ok_or_else(|| io::Error::other("a thousand broken journals are set aside"))?;
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

fn read(database: &Database) -> Result<Left, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    // Tables are made by the first write.
    let write = database.begin_write().map_err(|error| text(&error))?;
    {
        write.open_table(SANDBOXES).map_err(|error| text(&error))?;
        write.open_table(LAUNCHES).map_err(|error| text(&error))?;
    }
    write.commit().map_err(|error| text(&error))?;
    let read = database.begin_read().map_err(|error| text(&error))?;
    let mut left = Left::default();
    let sandboxes = read.open_table(SANDBOXES).map_err(|error| text(&error))?;
    for entry in sandboxes.iter().map_err(|error| text(&error))? {
        let (local, row) = entry.map_err(|error| text(&error))?;
        match Row::from_bytes(row.value()) {
            Some(row) => left.sandboxes.push((local.value(), row)),
            None => tracing::warn!(local = local.value(), "a row of the journal is unreadable"),
        }
    }
    let launches = read.open_table(LAUNCHES).map_err(|error| text(&error))?;
    for entry in launches.iter().map_err(|error| text(&error))? {
        let (id, past) = entry.map_err(|error| text(&error))?;
        left.launches
            .extend(Past::from_bytes(past.value()).map(|past| (LaunchId(id.value()), past)));
    }
    Ok(left)
}

/// The file, to be synced when it is written.
struct Sync {
    file: File,
    dirty: Arc<AtomicBool>,
}

impl Sync {
    fn now(&self) {
        if self.dirty.swap(false, Ordering::Relaxed)
            && let Err(error) = self.file.sync_data()
        {
            tracing::error!(%error, "the journal could not be synced");
        }
    }
}

/// What the journal's thread has.
struct Writer {
    path: PathBuf,
    /// None after a failure, until it opens again.
    book: Option<(Database, Sync)>,
    /// Writes that failed and that nobody waited for, oldest first.
    owed: Vec<Write>,
    /// What [`Journal::is_well`] says.
    well: Arc<AtomicBool>,
    /// When it was last tried whether a journal that was not well is again.
    tried: Instant,
}

impl Writer {
    fn write_all(&mut self, queue: &mpsc::Receiver<Job>) {
        loop {
            let first = match queue.recv_timeout(Duration::from_secs(1)) {
                Ok(job) => job,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    if !self.owed.is_empty() {
                        let _ = self.write(Vec::new());
                    }
                    self.recover();
                    self.sync();
                    continue;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            };
            let mut jobs = vec![first];
            jobs.extend(queue.try_iter().take(BATCH_MAX - 1));
            // Of a write that fails whoever waits is told, and undoes what it was for; the others still hold.
            let (mut writes, mut waiting) = (Vec::new(), Vec::new());
            for Job { writes: some, done } in jobs {
                let waits = done.filter(|done| !done.is_closed());
                writes.push((some, waits.is_some()));
                waiting.extend(waits);
            }
            let outcome = self.write(writes);
            for done in waiting {
                let _ = done.send(outcome.clone());
            }
            self.recover();
        }
        self.sync();
    }

    /// Tries whether a journal that could not be written can be again.
    fn recover(&mut self) {
        if self.well.load(Ordering::Relaxed) || self.tried.elapsed() < RETRY {
            return;
        }
        self.tried = Instant::now();
        if has_room(&self.path) && self.write(Vec::new()).is_ok() {
            self.well.store(true, Ordering::Relaxed);
        }
    }

    /// Writes what is owed and these in one transaction, where each says whether somebody waits for it.
    fn write(&mut self, writes: Vec<(Vec<Write>, bool)>) -> Result<(), Fault> {
        let owed = std::mem::take(&mut self.owed);
        let all = owed.iter().chain(writes.iter().flat_map(|(writes, _)| writes));
        let done = match &self.book {
            Some((database, _)) => commit(database, all).map_err(|error| error.to_string()),
            None => open(&self.path).and_then(|(database, sync)| {
                commit(&database, all).map_err(|error| error.to_string())?;
                tracing::info!("the journal is written again");
                self.book = Some((database, sync));
                Ok(())
            }),
        };
        let Err(error) = done else { return Ok(()) };
        // It takes nothing more, whatever the disk does: closed, to be opened again.
        self.book = None;
        self.well.store(false, Ordering::Relaxed);
        self.owed = owed;
        let unheard = writes.into_iter().filter(|(_, waited_for)| !waited_for);
        self.owed.extend(unheard.flat_map(|(writes, _)| writes));
        let excess = self.owed.len().saturating_sub(QUEUE_MAX);
        self.owed.drain(..excess);
        tracing::error!(%error, owed = self.owed.len(), "the journal could not be written");
        Err(Fault::new(Code::Storage, format!("the journal could not be written: {error}")))
    }

    fn sync(&self) {
        if let Some((_, sync)) = &self.book {
            sync.now();
        }
    }
}

fn commit<'a>(
    database: &Database,
    writes: impl Iterator<Item = &'a Write>,
) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut sandboxes = transaction.open_table(SANDBOXES)?;
        let mut launches = transaction.open_table(LAUNCHES)?;
        for write in writes {
            match write {
                Write::Sandbox(local, Some(row)) => {
                    sandboxes.insert(local, &row.to_bytes()[..])?;
                }
                Write::Sandbox(local, None) => drop(sandboxes.remove(local)?),
                Write::Launch(id, Some(past)) => {
                    launches.insert(id.0, &past.to_bytes()[..])?;
                }
                Write::Launch(id, None) => drop(launches.remove(id.0)?),
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use wire::{
        ImageId,
        call::{Exit, ExitWhy},
    };

    use super::*;

    fn row(stage: Stage) -> Row {
        Row {
            launch_id: LaunchId([1; 16]),
            body: [2; 16],
            shape: 3,
            admitted_ms: 4,
            hard_at_ms: 5,
            idle_ms: 6,
            image: ImageId([7; 32]),
            stage,
            published: vec![(8_080, 80), (8_081, 81)],
            request: vec![8; 100],
        }
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    /// FAULTS O2: from the first write that fails it is known that the next would, until there is room.
    #[test]
    fn a_full_disk_is_known_until_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        if rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, c"size=12m").is_err() {
            println!("skipped: mounting needs root");
            return;
        }
        let (journal, _) = Journal::open(&dir.path().join("journal")).unwrap();
        let fill = dir.path().join("fill");
        let mut file = File::create(&fill).unwrap();
        for piece in [1 << 20, 4096] {
            while io::Write::write_all(&mut file, &vec![7; piece]).is_ok() {}
        }
        let long = || Row { request: vec![8; 100_000], ..row(Stage::Claimed) };
        let failed = (1..200).any(|n| block_on(journal.put(n, long()).done()).is_err());
        assert!(failed && !journal.is_well());
        // No write that fits, nor time, makes it well while the disk is full.
        let until = Instant::now() + 2 * RETRY;
        while Instant::now() < until {
            let _ = block_on(journal.put(1_000, row(Stage::Running)).done());
            assert!(!journal.is_well());
        }
        std::fs::remove_file(fill).unwrap();
        drop(file);
        let begun = Instant::now();
        while !journal.is_well() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "there is room, and it is not known"
            );
            std::thread::yield_now();
        }
        block_on(journal.put(2_000, long()).done()).unwrap();
        drop(journal);
        rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }

    #[test]
    fn what_was_acknowledged_is_there_after_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let exit = Exit { code: 9, why: ExitWhy::Idle };
        let stages = [Stage::Claimed, Stage::Running, Stage::Ended(0, exit)];
        let fault = Fault::new(Code::CommandNotFound, "no such program");
        {
            let (journal, left) = Journal::open(&path).unwrap();
            assert!(left.sandboxes.is_empty() && left.launches.is_empty());
            for (local, stage) in (1..).zip(stages) {
                block_on(journal.put(local, row(stage)).done()).unwrap();
            }
            block_on(journal.put(9, row(Stage::Claimed)).done()).unwrap();
            let past = Past::Failed([2; 16], fault.clone());
            block_on(journal.drop_claim(9, LaunchId([9; 16]), Some(past)).done()).unwrap();
            block_on(journal.remember(LaunchId([8; 16]), Past::Cancelled).done()).unwrap();
        }
        let (journal, left) = Journal::open(&path).unwrap();
        let rows: Vec<(u64, Row)> = (1..).zip(stages.map(row)).collect();
        assert_eq!(left.sandboxes, rows);
        let failed = (LaunchId([9; 16]), Past::Failed([2; 16], fault));
        assert_eq!(left.launches, [(LaunchId([8; 16]), Past::Cancelled), failed]);
        journal.forget(1, LaunchId([8; 16]));
        drop(journal);
        let (_journal, left) = Journal::open(&path).unwrap();
        assert_eq!((left.sandboxes.len(), left.launches.len()), (2, 1));
    }

    #[test]
    fn a_broken_journal_is_set_aside_and_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        for round in 0..2 {
            std::fs::write(&path, vec![round + 1; 10_000]).unwrap();
            let (journal, left) = Journal::open(&path).unwrap();
            assert!(left.sandboxes.is_empty());
            block_on(journal.put(1, row(Stage::Claimed)).done()).unwrap();
            assert!(path.with_extension(format!("broken-{round}")).exists(), "kept for a look");
        }
    }
}
