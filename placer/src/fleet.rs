//! What this machine knows of the fleet: the map in use, and the capacity table that follows it.
//!
//! Both are published to the dispatching threads, which never wait for a swap. The table lives in a file that outlives
//! the process: a restart knows at once what was free a moment ago. One process a directory adopts and hears the feed; it
//! holds the lock file. Another placer needs a directory of its own for now (DESIGN.md).

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use placer_core::{Adopter, CapacityTable, Published, map, table::words_for};
use wire::{Code, Fault, limits::HOSTS_MAX, map::MapVersion};

use crate::{
    Map, Table,
    mapped::{MappedBytes, MappedWords},
};

/// Hosts that a new table has room for at least.
const HOSTS_AT_FIRST: usize = 4_096;
const TABLE_PREFIX: &str = "capacity-";
const LOCK: &str = "capacity.lock";
const EMPTY: &str = "map.empty";

/// The map and the table in use.
#[derive(Debug)]
pub struct Fleet {
    /// Where hosts are.
    pub map: Arc<Published<Map>>,
    /// What is free on them.
    pub table: Arc<Published<Table>>,
    /// Grows when hosts came of whom nothing is known yet: the feed then asks for everything.
    pub unheard: Arc<AtomicU64>,
}

/// The one who changes them.
#[derive(Debug)]
pub struct FleetKeeper {
    dir: PathBuf,
    fleet: Arc<Fleet>,
    held: Arc<Map>,
    table: Arc<Table>,
    adopter: Adopter,
    _lock: File,
}

impl FleetKeeper {
    /// Takes up the table in `dir`, or makes one, for the map that a loader found there.
    ///
    /// # Errors
    /// [`Code::Busy`] if another process keeps this directory, [`Code::Config`] if it cannot be written.
    pub fn open(dir: &Path, map: Option<Arc<Map>>) -> Result<Self, Fault> {
        let no_dir = |error: &io::Error| {
            let message = format!("the state directory {}: {error}", dir.display());
            Fault::new(Code::Config, message)
        };
        fs::create_dir_all(dir).map_err(|error| no_dir(&error))?;
        let lock = lock(dir)?;
        let table = newest_table(dir)
            .map_or_else(|| make_table(dir, HOSTS_AT_FIRST), Ok)
            .map_err(|error| no_dir(&error))?;
        let table = Arc::new(table);
        let empty = Arc::new(empty_map(dir).map_err(|error| no_dir(&error))?);
        let fleet = Arc::new(Fleet {
            map: Published::new(Arc::clone(&empty)),
            table: Published::new(Arc::clone(&table)),
            unheard: Arc::default(),
        });
        let adopter = Adopter::new(&table);
        let mut keeper =
            Self { dir: dir.to_owned(), fleet, held: empty, table, adopter, _lock: lock };
        if let Some(map) = map {
            keeper.adopt(map).map_err(|error| no_dir(&error))?;
        }
        Ok(keeper)
    }

    /// What the dispatching threads read.
    #[must_use]
    pub const fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    /// The table in use.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Puts a newer map into use. The map first: whoever is picked from the table has an address.
    ///
    /// # Errors
    /// A bigger table was needed and its file could not be made: the new map is in use, new hosts are not picked.
    pub fn adopt(&mut self, map: Arc<Map>) -> io::Result<()> {
        self.fleet.map.replace(Arc::clone(&map));
        let old = std::mem::replace(&mut self.held, Arc::clone(&map));
        let known = Some(&*old);
        let adopted = if let Ok(adopted) = self.adopter.adopt(&self.table, known, &map) {
            adopted
        } else {
            self.grow(map.len())?;
            self.adopter.adopt(&self.table, known, &map).map_err(io::Error::other)?
        };
        if adopted.added > 0 {
            self.fleet.unheard.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    fn grow(&mut self, hosts: usize) -> io::Result<()> {
        let bigger = Arc::new(make_table(&self.dir, (hosts + hosts / 4).min(HOSTS_MAX))?);
        self.adopter = Adopter::grow(&*self.table, &*bigger);
        let old = self.fleet.table.replace(Arc::clone(&bigger));
        Adopter::catch_up(&*old, &*bigger);
        // The file of the old one goes; those who have it mapped keep it until they look again.
        let _ = fs::remove_file(table_path(&self.dir, old.generation()));
        self.table = bigger;
        Ok(())
    }
}

fn lock(dir: &Path) -> Result<File, Fault> {
    let path = dir.join(LOCK);
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|error| {
        Fault::new(Code::Config, format!("{} cannot be written: {error}", path.display()))
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message =
                format!("another placer keeps {}: give each its own `state`", dir.display());
            Err(Fault::new(Code::Busy, message))
        }
        Err(TryLockError::Error(error)) => {
            Err(Fault::new(Code::Config, format!("{} cannot be locked: {error}", path.display())))
        }
    }
}

fn table_path(dir: &Path, generation: u64) -> PathBuf {
    dir.join(format!("{TABLE_PREFIX}{generation}"))
}

/// The newest table in `dir` that opens; others are removed.
fn newest_table(dir: &Path) -> Option<Table> {
    let generation = |name: &str| name.strip_prefix(TABLE_PREFIX)?.parse::<u64>().ok();
    let names =
        fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut generations: Vec<_> = names.filter_map(|name| generation(&name)).collect();
    generations.sort_unstable();
    let mut newest = None;
    for generation in generations.into_iter().rev() {
        let path = table_path(dir, generation);
        if newest.is_none() {
            newest = MappedWords::open(&path).ok().and_then(|words| Table::open(words).ok());
            if newest.is_some() {
                continue;
            }
        }
        let _ = fs::remove_file(path);
    }
    newest
}

fn make_table(dir: &Path, hosts: usize) -> io::Result<Table> {
    // Only to be distinct and to grow, which a clock does that was not set back between two tables of one machine.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut generation = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
    loop {
        match MappedWords::create(&table_path(dir, generation), words_for(hosts)) {
            Ok(words) => return Ok(CapacityTable::create(words, generation)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => generation += 1,
            Err(error) => return Err(error),
        }
    }
}

/// A map of nobody, until there is one.
fn empty_map(dir: &Path) -> io::Result<Map> {
    let path = dir.join(EMPTY);
    fs::write(&path, map::encode(MapVersion::default(), &[]))?;
    let map = MappedBytes::open(&path).and_then(|bytes| Map::open(bytes).map_err(io::Error::other));
    let _ = fs::remove_file(&path);
    map
}
