//! Placers: placer-core's table, adopter, dispatcher and launches, and the connections that they believe in.

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
    sync::atomic::AtomicU64,
};

use placer_core::{
    Adopted, Adopter, CapacityTable, Dispatch, Launch, MapView, Named, Report, Step, named,
    sync::zeroed, table::words_for,
};
use wire::{
    CapacityWord, Code, HostId, LaunchId, launch::LaunchReply, map::MapVersion,
    report::FailureReport,
};

use crate::{Micros, Options, stores::MapFile};

/// A map file as bytes.
#[derive(Clone, Debug)]
pub struct Bytes(MapFile);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0.1
    }
}

/// The placer's table.
pub type Table = CapacityTable<Vec<AtomicU64>>;

/// The state machine of a launch.
#[derive(Debug)]
pub enum Way {
    /// Hosts are picked.
    Picked(Box<Launch>),
    /// Its hosts follow from its id.
    Named(Named),
}

impl Way {
    /// What to do now.
    pub fn poll(&mut self, now: Micros, table: &Table, dispatch: &mut Dispatch) -> Step {
        match self {
            Self::Picked(launch) => launch.poll(now, table, dispatch),
            Self::Named(named) => named.poll(now),
        }
    }

    /// A host's answer.
    pub fn handle_reply(
        &mut self,
        now: Micros,
        host: HostId,
        reply: LaunchReply,
        table: &Table,
        dispatch: &mut Dispatch,
    ) {
        match self {
            Self::Picked(launch) => launch.handle_reply(now, host, reply, table, dispatch),
            Self::Named(named) => {
                let word = match &reply {
                    LaunchReply::Started(started) => Some(started.word),
                    LaunchReply::Refused(refused) => Some(refused.word),
                    LaunchReply::Failed(_) => None,
                };
                word.map(|word| table.correct(host, word));
                named.handle_reply(now, host, reply);
            }
        }
    }

    /// Nothing was sent.
    pub fn handle_unsent(
        &mut self,
        now: Micros,
        host: HostId,
        table: &Table,
        dispatch: &mut Dispatch,
    ) {
        match self {
            Self::Picked(launch) => {
                launch.handle_unsent(now, host, Code::Unreachable, table, dispatch);
            }
            Self::Named(named) => named.handle_unsent(now, host),
        }
    }

    /// No answer will come.
    pub fn handle_lost(
        &mut self,
        now: Micros,
        host: HostId,
        table: &Table,
        dispatch: &mut Dispatch,
    ) {
        match self {
            Self::Picked(launch) => launch.handle_lost(now, host, table, dispatch),
            Self::Named(named) => named.handle_lost(now, host),
        }
    }

    /// A cancel was carried out.
    pub fn handle_cancelled(
        &mut self,
        now: Micros,
        host: HostId,
        table: &Table,
        dispatch: &mut Dispatch,
    ) {
        if let Self::Picked(launch) = self {
            launch.handle_cancel(now, host, true, table, dispatch);
        }
    }
}

/// A launch under way.
#[derive(Debug)]
pub struct Going {
    /// Its state machine.
    pub way: Way,
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
    pub table: Table,
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

    /// The home hosts of an id by its map.
    #[must_use]
    pub fn homes(&self, id: LaunchId) -> Vec<HostId> {
        self.map.as_ref().map(|map| named::homes(map, id)).unwrap_or_default()
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
