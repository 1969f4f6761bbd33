//! The database and the object store, as the capacity service sees them: what is asked for, what it comes to, and nothing
//! of how it travels. Questions may be lost, their answers too, and a question may be carried out long after whoever asked gave up
//! on it: that is [`crate::fleet`]'s to decide. Here stands only what each store promises:
//! a row keeps its newest write (`USING TIMESTAMP`), a lease is one holder's until it ends, and a head is
//! swapped only for the one that was named. Every head ever put must continue the one that it replaced: one lineage.

use std::{collections::BTreeMap, rc::Rc};

use heartbeat_core::{
    leader::{LEASE_MS, Put},
    map::NewPage,
    row::{Row, removed},
    shard::{upkeep::Silent, writes::Batch},
};
use placer_core::map::encode;
use wire::{
    HostId,
    map::{Digest, Head, HostAddr, MapVersion, Page},
};

use crate::{Micros, check::Broken};

/// A map as a placer's file: version and bytes.
pub type MapFile = Rc<(MapVersion, Vec<u8>)>;

/// What an aggregator asks of a store.
#[derive(Debug)]
pub enum Ask {
    /// The lease of publishing.
    Lease,
    /// Rows to be written.
    Write(Batch),
    /// All rows.
    Scan,
    /// The dead leave.
    Remove(Vec<Silent>),
    /// The map's head.
    Head,
    /// All hosts that the head names.
    Hosts,
    /// New pages.
    Pages(Vec<NewPage>),
    /// A head in place of the one that the token names.
    Swap(Head, Option<u64>),
}

impl Ask {
    /// Whether it goes to the database, and not to the object store.
    #[must_use]
    pub const fn of_database(&self) -> bool {
        matches!(self, Self::Lease | Self::Write(_) | Self::Scan | Self::Remove(_))
    }
}

/// What a store answers.
#[derive(Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// Whether the lease is the asker's.
    Lease(bool),
    /// Rows.
    Rows(Vec<Row>),
    /// The head and what names it.
    Head(Option<(Head, u64)>),
    /// Hosts of a map.
    Hosts(Vec<(HostId, HostAddr)>),
    /// How a swap went.
    Swapped(Put<u64>),
}

/// Both stores.
#[derive(Debug, Default)]
pub struct Stores {
    rows: BTreeMap<HostId, Row>,
    removed: BTreeMap<HostId, i64>,
    lease: Option<(usize, Micros)>,
    head: Option<(Head, u64)>,
    pages: BTreeMap<Digest, Vec<u8>>,
    /// The newest map and the one before it, as files.
    files: [Option<MapFile>; 2],
    blind: bool,
}

impl Stores {
    /// Empty ones. With the planted bug `blind`, a swap succeeds whatever head is named.
    #[must_use]
    pub fn new(blind: bool) -> Self {
        Self { blind, ..Self::default() }
    }

    /// Carries out what an aggregator asked.
    ///
    /// # Errors
    /// [`Broken`]: a head that does not continue what it replaced, or that names a page which is not there.
    pub fn serve(&mut self, now: Micros, from: usize, ask: &Ask) -> Result<Answer, Broken> {
        Ok(match ask {
            Ask::Lease => Answer::Lease(self.lease(now, from)),
            Ask::Write(batch) => {
                batch.rows.iter().for_each(|row| self.write(row));
                Answer::Done
            }
            Ask::Scan => Answer::Rows(self.rows.values().copied().collect()),
            Ask::Remove(silent) => {
                silent.iter().for_each(|silent| self.remove(silent));
                Answer::Done
            }
            Ask::Head => Answer::Head(self.head.clone()),
            Ask::Hosts => Answer::Hosts(match &self.head {
                Some((head, _)) => self.hosts_of(head)?,
                None => Vec::new(),
            }),
            Ask::Pages(pages) => {
                self.pages.extend(pages.iter().map(|page| (page.digest, page.bytes.clone())));
                Answer::Done
            }
            Ask::Swap(head, expected) => Answer::Swapped(self.swap(head, *expected)?),
        })
    }

    /// The map that a reader finds: the newest, or from a stale cache the one before.
    #[must_use]
    pub fn map(&self, stale: bool) -> Option<MapFile> {
        self.files[usize::from(stale)].clone()
    }

    fn lease(&mut self, now: Micros, from: usize) -> bool {
        let free = self.lease.is_none_or(|(holder, until)| holder == from || until <= now);
        if free {
            self.lease = Some((from, now + LEASE_MS * 1_000));
        }
        free
    }

    fn write(&mut self, row: &Row) {
        let gone = self.removed.get(&row.host).is_some_and(|&at| at >= row.written());
        let newer = self.rows.get(&row.host).is_none_or(|had| had.written() < row.written());
        if newer && !gone {
            self.rows.insert(row.host, *row);
        }
    }

    fn remove(&mut self, silent: &Silent) {
        let at = removed(silent.seq);
        if self.rows.get(&silent.host).is_some_and(|row| row.written() <= at) {
            self.rows.remove(&silent.host);
        }
        let gone = self.removed.entry(silent.host).or_insert(at);
        *gone = at.max(*gone);
    }

    fn swap(&mut self, head: &Head, expected: Option<u64>) -> Result<Put<u64>, Broken> {
        let (version, token) = match &self.head {
            Some((old, token)) => (old.version, Some(*token)),
            None => (MapVersion::default(), None),
        };
        if token != expected && !self.blind {
            return Ok(Put::Lost);
        }
        if head.previous != version || head.version <= version {
            let (new, said) = (head.version, head.previous);
            return Err(Broken(format!(
                "two lineages: map {new:?} replaces {version:?} and says that it replaced {said:?}"
            )));
        }
        let file = Rc::new((head.version, encode(head.version, &self.hosts_of(head)?)));
        self.files = [Some(file), self.files[0].take()];
        let token = token.unwrap_or(0) + 1;
        self.head = Some((head.clone(), token));
        Ok(Put::Won(token))
    }

    /// Through the pages, as a placer gets them.
    fn hosts_of(&self, head: &Head) -> Result<Vec<(HostId, HostAddr)>, Broken> {
        let mut hosts = Vec::new();
        for named in &head.pages {
            let page =
                self.pages.get(&named.digest).and_then(|bytes| Page::parse(bytes, named).ok());
            let Some(page) = page else {
                return Err(Broken(format!("map {:?} names a page that nobody put", head.version)));
            };
            hosts.extend(page.hosts());
        }
        Ok(hosts)
    }
}
