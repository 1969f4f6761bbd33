//! What this machine knows of the fleet: the map in use, and the capacity table that follows it.
//!
//! The table holds the hosts that launches go to. In a fleet larger than the aperture these are a part of the map: the hosts
//! whose hash with this placer's id is smallest. Each placer has another part, and keeps it over restarts; a host that leaves
//! is replaced by one that was just outside. So connections stay warm, and a launch costs the same in a fleet of any size.
//! Calls and named launches reach all hosts of the map.
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

use placer_core::{
    Adopted, Adopter, CapacityTable, MapView, Published, adopt::Full, map, table::words_for,
};
use wire::{Code, Fault, HostId, limits::HOSTS_MAX, map::MapVersion};

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
    aperture: Aperture,
    fleet: Arc<Fleet>,
    held: Part,
    table: Arc<Table>,
    adopter: Adopter,
    _lock: File,
}

/// Which part of a large fleet a placer launches on.
#[derive(Clone, Copy, Debug)]
pub struct Aperture {
    /// Whose part.
    pub placer: u64,
    /// Hosts of it.
    pub hosts: usize,
}

/// The hosts that the table holds: all of a map, or some.
#[derive(Debug)]
enum Part {
    All(Arc<Map>),
    Some(MapView<Vec<u8>>),
}

impl Aperture {
    /// Orders hosts for this placer, whose part is the lightest of them.
    #[must_use]
    pub const fn weight(self, host: HostId) -> u64 {
        // Fibonacci mixing of two random numbers: every placer sorts the hosts in another way.
        let mixed = (host.0 ^ self.placer.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    fn weights(self, map: &Map) -> impl Iterator<Item = (u64, usize)> {
        map.ids().enumerate().map(move |(at, id)| (self.weight(id), at))
    }

    /// This placer's part of a map.
    fn part(self, map: &Arc<Map>) -> Part {
        if map.len() <= self.hosts {
            return Part::All(Arc::clone(map));
        }
        // Weights are spread evenly: those of the part are below this, but for a fleet of chosen ids.
        let bound =
            (u64::MAX / map.len() as u64).saturating_mul((self.hosts + self.hosts / 4 + 64) as u64);
        let mut weights: Vec<_> = self.weights(map).filter(|(weight, _)| *weight < bound).collect();
        if weights.len() < self.hosts {
            weights = self.weights(map).collect();
        }
        weights.select_nth_unstable(self.hosts - 1);
        weights.truncate(self.hosts);
        let mut chosen: Vec<usize> = weights.into_iter().map(|(_, at)| at).collect();
        chosen.sort_unstable();
        let hosts: Vec<_> = chosen.into_iter().map(|at| (map.id(at), map.addr(at))).collect();
        let some = MapView::open(map::encode(map.version(), &hosts));
        // What was just encoded opens; should it not, all hosts do.
        some.map_or_else(|_| Part::All(Arc::clone(map)), Part::Some)
    }
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Self::All(map) => map.len(),
            Self::Some(map) => map.len(),
        }
    }
}

/// Makes the table's hosts those of `new`, knowing that they were those of `old`.
fn adopt_part(
    adopter: &mut Adopter,
    table: &Table,
    old: &Part,
    new: &Part,
) -> Result<Adopted, Full> {
    match (old, new) {
        (Part::All(old), Part::All(new)) => adopter.adopt(table, Some(&**old), new),
        (Part::All(old), Part::Some(new)) => adopter.adopt(table, Some(&**old), new),
        (Part::Some(old), Part::All(new)) => adopter.adopt(table, Some(old), new),
        (Part::Some(old), Part::Some(new)) => adopter.adopt(table, Some(old), new),
    }
}

impl FleetKeeper {
    /// Takes up the table in `dir`, or makes one, for the map that a loader found there.
    ///
    /// # Errors
    /// [`Code::Busy`] if another process keeps this directory, [`Code::Config`] if it cannot be written.
    pub fn open(dir: &Path, aperture: Aperture, map: Option<Arc<Map>>) -> Result<Self, Fault> {
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
        let held = Part::All(empty);
        let dir = dir.to_owned();
        let mut keeper = Self { dir, aperture, fleet, held, table, adopter, _lock: lock };
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
        let part = self.aperture.part(&map);
        let old = std::mem::replace(&mut self.held, part);
        let adopted = adopt_part(&mut self.adopter, &self.table, &old, &self.held);
        let adopted = if let Ok(adopted) = adopted {
            adopted
        } else {
            self.grow(self.held.len())?;
            adopt_part(&mut self.adopter, &self.table, &old, &self.held)
                .map_err(io::Error::other)?
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
