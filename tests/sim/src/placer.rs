//! Placers: placer-core's table, adopter, dispatcher and launches, and the connections that they believe in.

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
    sync::atomic::AtomicU64,
};

use placer_core::{
    Adopted, Adopter, CapacityTable, Dispatch, Launch, MapView, Report, sync::zeroed,
    table::words_for,
};
use wire::{CapacityWord, HostId, LaunchId, map::MapVersion, report::FailureReport};

use crate::{Micros, Options, stores::MapFile};

/// A map file as bytes.
#[derive(Clone, Debug)]
pub struct Bytes(MapFile);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0.1
    }
}

/// A launch under way.
#[derive(Debug)]
pub struct Going {
    /// Its state machine.
    pub launch: Launch,
    /// Its name.
    pub id: LaunchId,
    /// When it came.
    pub came: Micros,
    /// Whether it is the greedy tenant's.
    pub hog: bool,
    /// When it is polled next.
    pub wake: Micros,
}

/// One placer.
pub struct SimPlacer {
    /// Its table.
    pub table: CapacityTable<Vec<AtomicU64>>,
    /// Its dispatcher.
    pub dispatch: Dispatch,
    /// Launches under way.
    pub going: HashMap<u64, Going>,
    /// Hosts whose connection is known to be broken.
    pub broken: BTreeSet<HostId>,
    adopter: Adopter,
    map: Option<MapView<Bytes>>,
    reports: u64,
}

impl SimPlacer {
    /// A placer without a map.
    #[must_use]
    pub fn new(options: &Options, seed: u64, at: usize) -> Self {
        let table = CapacityTable::create(zeroed(words_for(options.hosts + 64)), 1);
        let adopter = Adopter::new(&table);
        Self {
            table,
            dispatch: Dispatch::new(options.policy, seed.wrapping_add(at as u64)),
            going: HashMap::new(),
            broken: BTreeSet::new(),
            adopter,
            map: None,
            reports: 0,
        }
    }

    /// A map was fetched; what became of the table, if it was adopted (PROTOCOL 5.3: only a newer one is).
    ///
    /// # Panics
    /// If the map does not check, or the table is too small for it.
    pub fn adopt(&mut self, file: &MapFile) -> Option<(MapVersion, Adopted)> {
        if self.map.as_ref().is_some_and(|map| file.0 <= map.version()) {
            return None;
        }
        let Ok(map) = MapView::open(Bytes(Rc::clone(file))) else { panic!("a map that checks") };
        let adopted = self.adopter.adopt(&self.table, self.map.as_ref(), &map);
        let Ok(adopted) = adopted else { panic!("the table has room for every host") };
        let version = map.version();
        self.map = Some(map);
        Some((version, adopted))
    }

    /// Words of the feed.
    pub fn fed(&self, words: &[(HostId, CapacityWord)]) {
        for (host, word) in words {
            self.table.feed(*host, *word);
        }
    }

    /// The next report, as it is sealed.
    pub fn poll_report(&mut self) -> Option<FailureReport> {
        let report = self.dispatch.poll_report()?;
        self.reports += 1;
        let seq = self.reports;
        Some(match report {
            Report::Capacity { host, word } => {
                let about = FailureReport::CAPACITY;
                FailureReport { host, seq, about, word, failures: 0, code: 0 }
            }
            Report::Health { host, failures, code } => {
                let (about, word) = (FailureReport::HEALTH, CapacityWord::default());
                FailureReport { host, seq, about, word, failures, code: code as u16 }
            }
        })
    }
}
