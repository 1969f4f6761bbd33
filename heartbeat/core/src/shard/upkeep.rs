//! What else happens to a shard: rows of the store, drains, quarantine, corrections, keys, and the sweep for the silent.

use std::collections::{BTreeMap, BTreeSet};

use wire::{CapacityWord, HostId, Seq, limits::DEAD_AFTER_INTERVALS, map::HostAddr};

use super::{DrainUntil, Shard, shard_of};
use crate::{
    keys::KeyRing,
    limits::SUSPECT_AFTER_INTERVALS,
    record::{Record, mark},
    row::Row,
};

/// Where a host stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Heard of within [`SUSPECT_AFTER_INTERVALS`].
    Alive,
    /// Not, or a placer reported its health.
    Suspect,
    /// Left out until a retest.
    Quarantined,
    /// Takes no new work, and some still runs.
    Draining,
    /// Takes no new work, and none runs.
    Drained,
    /// Silent for so long that the next scan may remove it.
    Dead,
}

impl Standing {
    /// The word that [`wire::call::HostRecord`] carries.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Quarantined => "quarantined",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Dead => "dead",
        }
    }
}

/// A host as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What is known.
    pub row: Row,
    /// Where it stands.
    pub standing: Standing,
    /// Milliseconds since it was heard of.
    pub age_ms: u64,
    /// Heard by another aggregator, known here from the store.
    pub foreign: bool,
}

/// A host that has been silent for [`DEAD_AFTER_INTERVALS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Silent {
    /// Which.
    pub host: HostId,
    /// The newest heartbeat: if another comes before it is removed, it stays.
    pub seq: Seq,
    /// When it was heard of last, by the caller's clock.
    pub heard_ms: u64,
}

/// Hosts by standing, and those that are dead by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// All.
    pub total: u64,
    /// Neither suspect nor dead.
    pub alive: u64,
    /// Overdue, or reported.
    pub suspect: u64,
    /// Left out until a retest.
    pub quarantined: u64,
    /// Takes no new work.
    pub draining: u64,
    /// Dead, but for less than another interval. Hosts that fall silent together pass for dead over one interval, one after
    /// another: so long they only count against the brake, which then sees all of them before one leaves.
    pub fresh: u64,
    /// Candidates for removal: dead for an interval.
    pub silent: Vec<Silent>,
    /// Heard here under a key of an epoch that is not the newest: until it is zero everywhere, no epoch may end.
    pub old_key: u64,
    /// The longest time between heartbeats of any host, in milliseconds.
    pub interval_ms_max: u64,
}

impl Census {
    /// Adds what another shard counted.
    pub fn add(&mut self, other: Self) {
        self.total += other.total;
        self.alive += other.alive;
        self.suspect += other.suspect;
        self.quarantined += other.quarantined;
        self.draining += other.draining;
        self.fresh += other.fresh;
        self.old_key += other.old_key;
        self.silent.extend(other.silent);
        self.interval_ms_max = self.interval_ms_max.max(other.interval_ms_max);
    }
}

impl Record {
    pub(super) fn addr(&self) -> HostAddr {
        self.row().addr()
    }

    fn seen(&self, now_ms: u64) -> Seen {
        Seen {
            row: self.row(),
            standing: self.standing(now_ms),
            age_ms: now_ms.saturating_sub(self.heard_ms()),
            foreign: self.is(mark::FOREIGN),
        }
    }

    fn standing(&self, now_ms: u64) -> Standing {
        let (age_ms, interval_ms) =
            (now_ms.saturating_sub(self.heard_ms()), u64::from(self.interval_ms()));
        let said = self.said();
        if age_ms > DEAD_AFTER_INTERVALS * interval_ms {
            Standing::Dead
        } else if said.has(CapacityWord::QUARANTINED) {
            Standing::Quarantined
        } else if said.has(CapacityWord::DRAINING) {
            // The host's own word that it drains, not just our wish, makes its zero the last one.
            let done = self.running == 0 && self.word.has(CapacityWord::DRAINING);
            if done { Standing::Drained } else { Standing::Draining }
        } else if age_ms > SUSPECT_AFTER_INTERVALS * interval_ms
            || self.is(mark::REPORTED)
            || said.has(CapacityWord::SICK)
        {
            Standing::Suspect
        } else {
            Standing::Alive
        }
    }
}

impl Shard {
    /// Takes a row of the store: at the start, and of hosts that other aggregators hear. Returns whether it was news.
    pub fn handle_row(&mut self, now_ms: u64, row: &Row) -> bool {
        let mine = shard_of(row.host, self.of) == self.at;
        if !mine || self.revoked.contains(&row.host) {
            return false;
        }
        let known = self.find(row.host);
        if let Some(at) = known {
            let record = &self.records[at as usize];
            let held = (record.incarnation, record.seq, record.revision);
            if held >= (row.incarnation.0, row.seq.0, row.revision) {
                return false;
            }
        }
        let Some(at) = known.or_else(|| self.register(row.host)) else { return false };
        let record = &mut self.records[at as usize];
        let before = record.addr();
        record.take_row(now_ms, row);
        if before != record.addr() {
            self.membership += 1;
        }
        true
    }

    /// Takes a host that the published map names, if nothing is known of it: whoever published it heard of it. It takes no
    /// work until it is heard here or its row comes, and leaves like any other if it stays silent.
    pub fn handle_listed(&mut self, now_ms: u64, host: HostId, addr: HostAddr) -> bool {
        let mine = shard_of(host, self.of) == self.at;
        if !mine || self.revoked.contains(&host) || self.find(host).is_some() {
            return false;
        }
        let Some(at) = self.register(host) else { return false };
        self.records[at as usize].take_listed(now_ms, addr);
        true
    }

    /// Takes all drains that there are. Before the first call none is known, and hosts are left as they are.
    pub fn handle_drains(&mut self, drains: BTreeMap<HostId, DrainUntil>) {
        let old = self.drains.take().unwrap_or_default();
        let touched: BTreeSet<HostId> = old.keys().chain(drains.keys()).copied().collect();
        for host in touched {
            self.set_mark(host, mark::DRAIN, drains.contains_key(&host));
        }
        self.drains = Some(drains);
    }

    /// Puts a host into quarantine or ends it.
    pub fn handle_quarantine(&mut self, host: HostId, quarantined: bool) {
        self.set_mark(host, mark::QUARANTINED, quarantined);
    }

    /// A placer's report of its health makes a host suspect, until it lapses.
    pub fn handle_suspicion(&mut self, host: HostId, suspect: bool) {
        if let Some(at) = self.find(host) {
            self.records[at as usize].set(mark::REPORTED, suspect);
        }
    }

    fn set_mark(&mut self, host: HostId, mark: u16, up: bool) {
        let Some(at) = self.find(host) else { return };
        let record = &mut self.records[at as usize];
        if record.is(mark) != up {
            record.set(mark, up);
            record.revise();
            self.changed(at);
        }
    }

    /// Corrects the free counts by the word that came with a refusal. The stamp stays the newest heartbeat's: a word
    /// that claims a later one must not outlive the host's own next words.
    pub fn handle_correction(&mut self, host: HostId, word: CapacityWord) {
        let Some(at) = self.find(host) else { return };
        let record = &mut self.records[at as usize];
        if record.word.stamp().is_after(word.stamp()) {
            return;
        }
        let corrected =
            CapacityWord::new(word.free_all(), record.word.flags(), record.word.stamp());
        if corrected != record.word {
            record.word = corrected;
            record.revise();
            self.changed(at);
        }
    }

    /// Takes other fleet keys. Cached keys of epochs that are no longer accepted are forgotten.
    pub fn handle_keys(&mut self, keys: KeyRing) {
        for record in &mut self.records {
            if !keys.accepts(wire::seal::KeyEpoch(record.key_epoch)) {
                record.forget_key();
            }
        }
        self.keys = keys;
    }

    /// Takes the list of revoked hosts; returns those that were known here and are now gone.
    pub fn handle_revoked(&mut self, revoked: BTreeSet<HostId>) -> Vec<Silent> {
        let mut removed = Vec::new();
        for &host in &revoked {
            let Some(at) = self.find(host) else { continue };
            let (seq, heard_ms) =
                (Seq(self.records[at as usize].seq), self.records[at as usize].heard_ms());
            self.remove_at(at);
            removed.push(Silent { host, seq, heard_ms });
        }
        self.revoked = revoked;
        removed
    }

    /// Removes a host that was silent, unless it has been heard of since.
    pub fn handle_remove(&mut self, silent: &Silent) -> bool {
        match self.find(silent.host) {
            Some(at) if self.records[at as usize].seq == silent.seq.0 => {
                self.remove_at(at);
                true
            }
            _ => false,
        }
    }

    fn remove_at(&mut self, at: u32) {
        let records = &self.records;
        let record = &records[at as usize];
        let (host, said) = (record.host, record.said());
        self.dirty -= usize::from(record.is(mark::DIRTY));
        self.index.remove(host, |at| records[at as usize].host);
        if record.spoke() {
            let absent = CapacityWord::new([0; 4], CapacityWord::ABSENT, said.stamp());
            self.gone.push((HostId(host), absent));
        }
        self.records[at as usize] = Record::vacant();
        self.vacant.push(at);
        self.membership += 1;
    }

    /// Counts up to `max` records from `cursor` on into `census`; returns where to go on, if not done.
    pub fn sweep(
        &self,
        now_ms: u64,
        cursor: usize,
        max: usize,
        census: &mut Census,
    ) -> Option<usize> {
        self.sweep_as_of(now_ms, now_ms, cursor, max, census)
    }

    /// As [`Shard::sweep`]; who is silent is judged as of `judged_ms`: with a shared store the beginning of its last complete scan, for what other
    /// aggregators have written since then was not looked for yet.
    pub fn sweep_as_of(
        &self,
        now_ms: u64,
        judged_ms: u64,
        cursor: usize,
        max: usize,
        census: &mut Census,
    ) -> Option<usize> {
        let (records, next) = self.part(cursor, max);
        for record in records {
            census.total += 1;
            // Hosts that others hear have no key here.
            let epochs = 1..self.keys.target().0;
            census.old_key +=
                u64::from(epochs.contains(&record.key_epoch) && !record.is(mark::FOREIGN));
            let interval_ms = u64::from(record.interval_ms());
            census.interval_ms_max = census.interval_ms_max.max(interval_ms);
            let judged_ms = judged_ms.min(now_ms);
            if record.standing(judged_ms) == Standing::Dead {
                if record.standing(judged_ms.saturating_sub(interval_ms)) != Standing::Dead {
                    census.fresh += 1;
                    continue;
                }
                census.silent.push(Silent {
                    host: HostId(record.host),
                    seq: Seq(record.seq),
                    heard_ms: record.heard_ms(),
                });
                continue;
            }
            match record.standing(now_ms) {
                Standing::Alive => census.alive += 1,
                Standing::Suspect | Standing::Dead => census.suspect += 1,
                Standing::Quarantined => census.quarantined += 1,
                Standing::Draining | Standing::Drained => census.draining += 1,
            }
        }
        next
    }

    /// What an operator sees of up to `max` records from `cursor` on.
    pub fn seen(
        &self,
        now_ms: u64,
        cursor: usize,
        max: usize,
        out: &mut Vec<Seen>,
    ) -> Option<usize> {
        let (records, next) = self.part(cursor, max);
        out.extend(records.map(|record| record.seen(now_ms)));
        next
    }

    /// One host, as an operator sees it.
    #[must_use]
    pub fn seen_of(&self, now_ms: u64, host: HostId) -> Option<Seen> {
        self.find(host).map(|at| self.records[at as usize].seen(now_ms))
    }

    /// Host and address of up to `max` records from `cursor` on.
    pub fn addresses(
        &self,
        cursor: usize,
        max: usize,
        out: &mut Vec<(HostId, HostAddr)>,
    ) -> Option<usize> {
        let (records, next) = self.part(cursor, max);
        out.extend(records.map(|record| (HostId(record.host), record.addr())));
        next
    }

    /// Host and word of up to `max` records from `cursor` on.
    pub fn words(
        &self,
        cursor: usize,
        max: usize,
        out: &mut Vec<(HostId, CapacityWord)>,
    ) -> Option<usize> {
        let (records, next) = self.part(cursor, max);
        let records = records.filter(|record| record.spoke());
        out.extend(records.map(|record| (HostId(record.host), record.said())));
        next
    }

    fn part(&self, cursor: usize, max: usize) -> (impl Iterator<Item = &Record>, Option<usize>) {
        let end = cursor.saturating_add(max).min(self.records.len());
        let part = &self.records[cursor.min(end)..end];
        let records = part.iter().filter(|record| !record.is(mark::VACANT));
        (records, (end < self.records.len()).then_some(end))
    }
}
